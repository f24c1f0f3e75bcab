"""Measures a model with and without adapters: loss, perplexity, accuracy, exact match.

Command: ``python -m jaxpeft.evaluate --model PATH --data FILE [--adapter DIR ...]``
"""

from jaxpeft.cli import arguments, exits, huge_pages

if __name__ == "__main__":  # before heavy imports, because it restarts the program
    huge_pages.enable_huge_pages()

import sys
from collections.abc import Mapping
from typing import Any

from jaxpeft.core.errors import UserError
from jaxpeft.inference.metrics import CUT, evaluate_file
from jaxpeft.methods.adapter import Adapter

CUT_HINT = "note: answers were cut inside of their thinking; raise max_new_tokens"


def print_results(results: Mapping[str, Mapping[str, float]], stream: Any) -> None:
    """Prints one line for every entry in the result of `evaluate_file`."""
    from rich import box
    from rich.table import Table

    from jaxpeft.reports.tables import make_console

    names = list(dict.fromkeys(key for metrics in results.values() for key in metrics))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("adapter", overflow="fold")
    for name in names:
        table.add_column(name.removeprefix("eval_").replace("_", " "), justify="right")
    for name, metrics in results.items():
        table.add_row(name, *[f"{metrics[key]:.4g}" if key in metrics else "-" for key in names])
    make_console(stream).print(table)
    if any(CUT in metrics for metrics in results.values()):
        print(CUT_HINT, file=stream)


def main(argv: list[str]) -> None:
    """Prints a table: one line for the base and one for every adapter.

    Raises:
        UserError: An argument, the data, the model or an adapter is wrong.
    """
    parser = arguments.make_parser(
        "evaluate", "Evaluates a base model and adapters on a file of rows."
    )
    arguments.add_base(parser)
    parser.add_argument("--data", required=True, help="a .jsonl or .json file of rows")
    parser.add_argument(
        "--adapter", action="append", default=[], help="adapter folder or hub id; repeat"
    )
    parser.add_argument("--max_length", type=int, default=512, help="longest row in tokens")
    parser.add_argument("--max_rows", type=int, help="only the first rows")
    parser.add_argument("--max_new_tokens", type=int, default=32, help="longest answer")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences computed at once")
    parser.add_argument("--no_base", action="store_true", help="leave the bare base out")
    args, _ = arguments.parse_arguments(parser, argv)
    if args.no_base and not args.adapter:
        raise UserError("--no_base leaves nothing to evaluate; give an --adapter too.")
    for name in ("max_length", "max_rows", "max_new_tokens", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}.")
    from jaxpeft.data.rows.kinds import read_rows

    read_rows(args.data)  # reports bad rows before the slow load of the model
    base = arguments.load_base(args)
    adapters: dict[str, Adapter | None] = {} if args.no_base else {"base": None}
    adapters |= {path: arguments.load_adapter(args, path, base) for path in args.adapter}
    results = evaluate_file(
        base,
        args.data,
        adapters,
        max_length=args.max_length,
        max_rows=args.max_rows,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
    )
    print_results(results, sys.stdout)


if __name__ == "__main__":
    exits.run(main)
