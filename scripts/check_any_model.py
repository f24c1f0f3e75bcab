"""Proves `jaxpeft.lift` on models that are not ours, each in an environment with its own package.

The models: Google's Gemma 3 and 4 (Linen), Tunix's Llama 3 and Qwen 3 (NNX), and BERT and GPT-2
of transformers 4 (Linen), some of them with experts. All are small with drawn weights, but BERT is
MiniLM with its real ones and learns a real task. The laws are the same for all, see
`any_model_laws`:

* `describe` finds what each parameter is;
* a new LoRA adapter leaves every output as it is, to the last bit;
* lifted and merged outputs agree within 1e-5 (LoRA, DoRA, IA3), and gradients too (LoRA, IA3);
* the base keeps its bytes, and an adapter that is saved and loaded keeps its own;
* another adapter is not traced anew;
* training brings the loss down.

It prints a table in Markdown with a row for each model.

Usage: python scripts/check_any_model.py [--only MODEL ...]. The environments, ``.venv-any-*``, are
made on the first run with Python 3.12 or 3.13. Exit status: 0 all laws hold, 1 one is broken, 2 an
environment could not be made or a check did not end.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import any_model_venvs as venvs

SCRIPTS = Path(__file__).resolve().parent
MODELS = {
    "gemma": ("Gemma 3", "gemma"),
    "gemma4": ("Gemma 4", "gemma"),
    "gemma4-experts": ("Gemma 4 with experts", "gemma"),
    "llama": ("Llama 3", "tunix"),
    "qwen3": ("Qwen 3", "tunix"),
    "qwen3-experts": ("Qwen 3 with experts", "tunix"),
    "bert": ("BERT (MiniLM)", "flax"),
    "gpt2": ("GPT-2", "flax"),
}
"""By name, what the table calls a model, and its environment."""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    "PYTHONPATH": os.pathsep.join(map(str, (venvs.ROOT, SCRIPTS))),
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}
HEAD = (
    *("model", "package", "kind", "roles", "adapted", "start"),
    *("LoRA, DoRA, IA3 = merged", "gradients of LoRA, IA3", "traces", "learns", "seconds"),
)


class CheckError(Exception):
    """A check did not end; the text says why."""


def run_check(name: str, python: str) -> dict[str, Any]:
    """Checks one model in a process of its own, whose lines are shown as they come.

    Raises:
        CheckError: The process failed.
    """
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        file = Path(folder, "found.json")
        command = [python, str(SCRIPTS / "any_model_child.py"), name, str(file)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ | ENVIRONMENT
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(f"    {line.rstrip()}", flush=True)
        if process.returncode or not file.is_file():
            errors.seek(0)
            last = (errors.read().strip().splitlines() or ["no message"])[-1]
            raise CheckError(f"the check ended with exit code {process.returncode}: {last[:500]}")
        return json.loads(file.read_text(encoding="utf-8"))


def row(name: str, found: dict[str, Any]) -> tuple[str, ...]:
    """A model's row of the table."""
    gaps, losses = found["gaps"], found["losses"]
    small = lambda *names: ", ".join(f"{gaps[one]:.1e}" for one in names)  # noqa: E731
    roles = ", ".join(f"{count} {role}" for role, count in found["roles"].items())
    adapted = (
        f"{found['kernels']} kernels, {found['adapted']:,} of {found['parameters']:,} parameters; "
        f"LoRA trains {found['trained']:,}"
    )
    learns = f"loss {losses[0]:.2f} to {losses[1]:.2f}"
    if task := found.get("questions"):
        learns += (
            f"; questions, {task['held_out_rows']} held out: {task['after']:.1%} right, head alone "
            f"{task['head_alone']:.1%}, before {task['before']:.1%}"
        )
    return (
        MODELS[name][0],
        f"{found['package']}, jax {found['jax']}",
        found["kind"],
        roles,
        adapted,
        f"{gaps['start']:g} (compiled {gaps['start, compiled']:.1e})",
        small("LoRA merged", "DoRA merged", "IA3 merged"),
        small("LoRA gradients", "IA3 gradients"),
        str(found["traces"]),
        learns,
        f"{found['seconds']:.0f}",
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows in Markdown."""
    lines = [HEAD, ["---"] * len(HEAD), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(description="Proves jaxpeft.lift on models that are not ours.")
    parser.add_argument("--only", nargs="+", choices=MODELS, metavar="MODEL", default=list(MODELS))
    parser.add_argument("--python", help="the Python to make environments with, 3.12 or 3.13")
    args = parser.parse_args(argv)
    rows, broken, failed = [], [], []
    for place, name in enumerate(args.only, 1):
        title, venv = MODELS[name]
        print(f"[{place}/{len(args.only)}] {title}, environment {venv}", flush=True)
        try:
            python = venvs.ready(venv, args.python, lambda text: print(f"    {text}", flush=True))
            found = run_check(name, python)
        except (venvs.VenvError, CheckError, OSError) as error:
            failed.append(f"{title}: {error}")
            print(f"    failed: {error}", flush=True)
            continue
        rows.append(row(name, found))
        broken += [f"{title}: {law}" for law in found["broken"]]
    if rows:
        print(f"\n{table(rows)}\n")
    for text in (*broken, *failed):
        print(f"error: {text}", file=sys.stderr)
    if not (broken or failed):
        print(f"all laws hold for {len(rows)} models")
    return 2 if failed else 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
