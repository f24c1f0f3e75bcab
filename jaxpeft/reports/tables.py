"""Tables for the user: what a run is about to do, and what it gave.

Tables go to standard output, progress to standard error. On a terminal progress is one line redrawn
in place; anywhere else it is about twenty plain lines per run, without escape codes. ``NO_COLOR``
is respected. The tables are built by pure functions (`describe_run`, `describe_adapter`) and
printed by others.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxpeft.core.errors import first_few
from jaxpeft.methods.summary import ModuleRow, size_of

PIPE_WIDTH = 120
"""Columns of a table that is not printed on a terminal."""

_PERCENT = ("eval_token_accuracy", "eval_exact_match")


def describe_run(
    *,
    trainable: int,
    base_parameters: int,
    dtypes: Mapping[str, Any],
    tokens_per_epoch: int,
    supervised_per_epoch: int,
    rows: int,
    examples: int = 0,
    steps: int,
    epochs: float,
    first_step: int = 0,
    batch_size: int,
    microbatch_size: int | None,
    seq_len: int,
    mesh: Mapping[str, int],
    dropped: int = 0,
    truncated: int = 0,
    replicated: Sequence[str] = (),
) -> list[tuple[str, str]]:
    """What a run is about to do, as (name, value) rows for `print_run_table`.

    Args:
        trainable: Trained numbers, from `count_trainable`.
        base_parameters: Numbers in the base, from `count_parameters`.
        dtypes: The dtype of each part, or a name for it, such as ``{"base": jnp.bfloat16}``.
        tokens_per_epoch: Tokens that are not padding.
        supervised_per_epoch: Tokens that carry loss.
        rows: Rows of training data that are used.
        examples: Examples made of these rows, if there are more or fewer.
        steps: Updates of the whole run.
        epochs: Passes over the data in the whole run.
        first_step: The number of updates that a resumed run did before.
        batch_size: Sequences per update, over all devices.
        microbatch_size: Sequences computed at a time, or None for all.
        seq_len: Tokens per sequence, padding included.
        mesh: Devices by mesh axis.
        dropped: Rows left out because they are too long.
        truncated: Rows cut because they are too long.
        replicated: Paths that no sharding rule fits, so that every device holds all of them.

    Returns:
        Rows in reading order; rows without content (such as no dropped rows) are left out.
    """
    percent = 100 * trainable / max(base_parameters, 1)
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1)
    devices = size_of(tuple(mesh.values()))
    data = f"{rows:,} rows" + (f", {examples:,} examples" if examples > rows else "")
    accumulated = ""
    if microbatch_size is not None and microbatch_size != batch_size:
        accumulated = f", {microbatch_size} at a time"
    table = [
        ("trainable", f"{trainable:,} of {base_parameters:,} parameters ({percent:.3g} %)"),
        ("dtypes", ", ".join(f"{what} {_dtype_name(dtype)}" for what, dtype in dtypes.items())),
        ("data", f"{data}{_counted(dropped, 'dropped')}{_counted(truncated, 'truncated')}"),
        ("an epoch", f"{tokens_per_epoch:,} tokens, {supervised_per_epoch:,} supervised"),
        ("batch", f"{batch_size} x {seq_len} tokens{accumulated}"),
        ("steps", f"{steps:,} ({epochs:.3g} epochs)"),
        ("devices", f"{devices} ({axes})" if axes else str(devices)),
    ]
    if first_step:
        table.append(("resumed", f"after step {first_step:,}"))
    if replicated:
        table.append(("replicated", f"no sharding rule fits {first_few(list(replicated))}"))
    return table


def print_run_table(
    rows: Sequence[tuple[str, str]],
    modules: Sequence[ModuleRow],
    *,
    stream: Any = None,
) -> None:
    """Prints the tables at the start of a run.

    Args:
        rows: Names and values, from `describe_run`.
        modules: Adapted leaves, from `describe_adapter`.
        stream: A text stream; standard output by default.
    """
    console = make_console(stream or sys.stdout)
    if modules:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        table.add_column("module", overflow="fold")
        for name in ("layers", "shape", "rank", "trainable"):
            table.add_column(name, justify="right", overflow="fold")
        for row in modules:
            table.add_row(row.path, row.layers, row.shape, row.rank, f"{row.trainable:,}")
        console.print(table)
        console.print()
    _print_pairs(console, rows)


def print_final_table(
    before: Mapping[str, Any] | None,
    after: Mapping[str, Any] | None,
    rows: Sequence[tuple[str, str]] = (),
    *,
    stream: Any = None,
) -> None:
    """Prints how training changed the metrics, and where the results are.

    Args:
        before: Evaluation metrics at the start, as in ``metrics.jsonl``; None if there are none.
        after: The same at the end.
        rows: Further names and values, such as the folder of the adapter.
        stream: A text stream; standard output by default.
    """
    console = make_console(stream or sys.stdout)
    names = [name for name in after or {} if name.startswith("eval_")]
    names = [name for name in names if (after or {})[name] is not None]
    if names:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        table.add_column("evaluation", overflow="fold")
        for name in ("start", "end"):
            table.add_column(name, justify="right", overflow="fold")
        for name in names:
            table.add_row(
                _words(name), *(_metric(name, (side or {}).get(name)) for side in (before, after))
            )
        console.print(table)
        console.print()
    _print_pairs(console, rows)


def evaluation_line(step: int, metrics: Mapping[str, Any]) -> str:
    """One line for the user with the ``eval_`` metrics of a step.

    Example:
        >>> evaluation_line(50, {"eval_loss": 0.8125, "eval_exact_match": 0.75})
        'evaluation at step 50: loss 0.812  exact match 75.0 %'
    """
    parts = [
        f"{_words(name)} {_metric(name, value)}"
        for name, value in metrics.items()
        if name.startswith("eval_") and value is not None
    ]
    return f"evaluation at step {step}: " + ("  ".join(parts) or "no metrics")


def print_evaluation(step: int, metrics: Mapping[str, Any], *, stream: Any = None) -> None:
    """Prints `evaluation_line` to standard error; while a `Progress` is live, use its `note`."""
    print(evaluation_line(step, metrics), file=stream or sys.stderr, flush=True)


def number(value: float) -> str:
    """A number with three decimals; with three significant digits if it is small or large."""
    return f"{value:.3f}" if value == 0 or 0.01 <= abs(value) < 10_000 else f"{value:.3g}"


def is_live_terminal(stream: Any) -> bool:
    """Whether `stream` is a terminal that can redraw a line."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


def make_console(stream: Any) -> Console:
    """A rich console that writes escape codes to terminals only, whatever the environment says."""
    terminal = is_live_terminal(stream)
    return Console(
        file=stream,
        force_terminal=terminal,
        force_jupyter=False,
        color_system="auto" if terminal and not os.environ.get("NO_COLOR") else None,
        width=None if terminal else PIPE_WIDTH,
        markup=False,
        highlight=False,
        emoji=False,
    )


def _print_pairs(console: Console, rows: Sequence[tuple[str, str]]) -> None:
    if not rows:
        return
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(Text(name), Text(value))
    console.print(grid)


def _dtype_name(dtype: Any) -> str:
    return dtype if isinstance(dtype, str) else np.dtype(dtype).name


def _counted(count: int, what: str) -> str:
    return f", {count:,} {what}" if count else ""


def _words(name: str) -> str:
    return name.removeprefix("eval_").replace("_", " ")


def _metric(name: str, value: Any) -> str:
    if value is None:
        return "-"
    return f"{100 * float(value):.1f} %" if name in _PERCENT else number(float(value))
