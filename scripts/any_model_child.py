"""Checks one model in the environment of its package: `check_any_model` starts it.

Usage: see check_any_model.py.
"""

import importlib.metadata
import json
import platform
import sys
import warnings
from pathlib import Path
from typing import Any


def main() -> None:
    """Prints lines of progress, and writes what was found to a file as JSON."""
    name, file = sys.argv[1:]
    warnings.simplefilter("ignore")
    import any_model_packages as packages
    from any_model_laws import check

    def say(text: str) -> None:
        print(text, flush=True)

    model = packages.MODELS[name]()
    found: dict[str, Any] = {"package": model.package, "kind": model.kind}
    found["python"] = platform.python_version()
    found["jax"] = importlib.metadata.version("jax")
    found |= check(model, say)
    if name == packages.LEARNS_QUESTIONS:
        from any_model_task import learn_questions

        found["questions"] = learn_questions(say)
        found["broken"] += found["questions"]["broken"]
        found["seconds"] += found["questions"]["seconds"]
    Path(file).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
