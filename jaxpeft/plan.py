"""Says what a run will do and need, before a weight is loaded or a machine is rented.

From ``config.json`` and shapes alone it tells what is trained, what the data give, what a step
costs, and what every device must hold. For the memory it compiles the real training step for this
machine or for TPUs that need not be present (`jaxpeft.planning.memory`).

Command: ``python -m jaxpeft.plan CONFIG [--topology v5e:4x4] [--json] [--section.key value ...]``
"""

import json
import sys

from jaxpeft.cli import arguments, exits
from jaxpeft.config import run_config
from jaxpeft.planning.plan import compile_only, make_plan
from jaxpeft.planning.report import print_plan

EXAMPLE = "python -m jaxpeft.plan configs/quickstart.yaml"
DOES_NOT_FIT = 5
"""The exit code if the run does not fit into memory."""


def main(argv: list[str]) -> int:
    """Prints the plan of a run; the exit code is 5 if it does not fit."""
    parser = arguments.make_parser(
        "plan",
        "Says what a run will do and need, without loading weights. Exit code 5: it does not fit.",
        run_config.SCHEMA,
    )
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, as train takes it")
    parser.add_argument(
        "--topology", help="TPUs to plan for, such as v5e:2x4; needs no TPU, but jaxpeft[plan]"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args, overrides = arguments.parse_arguments(parser, argv, run_config.SCHEMA)
    config = run_config.load_config(args.config, overrides, EXAMPLE)
    if args.topology is not None:
        compile_only()
    plan = make_plan(config, args.topology, say)
    if args.json:
        print(json.dumps(plan, indent=2))
    else:
        print_plan(plan)
    return 0 if plan["memory"]["fits"] else DOES_NOT_FIT


def say(text: str) -> None:
    """Prints a line on standard error before work that takes time."""
    print(f"plan: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    exits.run(main)
