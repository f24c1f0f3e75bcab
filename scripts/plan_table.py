"""Prints the table of planned runs as Markdown: what a TPU chip must hold, by XLA's own count.

Needs no TPU, but ``pip install 'jaxpeft[plan]'``; a row takes about a minute.

Command: ``python scripts/plan_table.py [--lengths]``; with ``--lengths`` the memory at rows of
2048, 4096 and 8192 tokens instead.
"""

import argparse
import sys
from typing import Any

from jaxpeft.config.run_config import load_config
from jaxpeft.plan import say
from jaxpeft.planning.machines import GIB
from jaxpeft.planning.plan import compile_only, make_plan

Case = tuple[str, str, list[str]]
CASES: list[Case] = [
    ("smollm2-1.7b", "v5e:1x1", []),
    ("llama-3.1-8b", "v5e:2x4", []),
    ("llama-3.1-8b-qlora", "v5e:1x1", []),
    ("llama-3.1-70b", "v5p:2x2x4", []),
]
LENGTHS: list[Case] = [
    ("llama-3.1-8b", "v6e:2x4", ["--data.max_length", str(length)]) for length in (2048, 4096, 8192)
]


def row(case: Case) -> str:
    """One line of the table."""
    name, topology, overrides = case
    config = load_config(f"configs/plan/{name}.yaml", overrides)
    plan: dict[str, Any] = make_plan(config, topology, say)
    mesh = ", ".join(f"{axis} {n}" for axis, n in plan["devices"]["mesh"].items() if n > 1)
    memory, batch = plan["memory"], plan["batch"]
    method = "QLoRA " + config.model.quantization if config.model.quantization else "LoRA bf16"
    cells = (
        name.removesuffix("-qlora"),
        method,
        topology,
        mesh or "1 chip",
        f"{batch['batch_size']} x {batch['seq_len']}",
        f"{memory['device_bytes'] / GIB:.1f} of {plan['devices']['device_bytes'] / GIB:.0f} GiB",
        "fits" if memory["fits"] else "does not fit",
        f"{plan['flops_per_step']:.3g}",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Compiles every row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", action="store_true", help="memory by length of the rows")
    cases = LENGTHS if parser.parse_args().lengths else CASES
    compile_only()
    print("| model | method | topology | mesh | batch | a chip holds | verdict | FLOPs a step |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for case in cases:
        print(row(case))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
