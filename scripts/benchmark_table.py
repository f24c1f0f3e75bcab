"""What the benchmark's records say: medians, spreads, ratios, and the comparisons that matter.

A record is what one process measured: ``{"case", "side", "dtype", "remat", "cache", "round"}``
with ``"seconds"`` of every call and its ``"amount"`` (tokens, or FLOPs of a matrix product), or
with ``"unsupported"`` or ``"failed"`` and the reason.

Usage: python scripts/benchmark_table.py FILE prints the tables of a file that benchmark.py wrote
"""

import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from exercises import markdown

OURS = "jaxpeft"
DEFAULT = ("float32", "full")
START = "start"
GEMM = "gemm"
Record = dict[str, Any]
HEADINGS = (
    *("case", "side", "setting", "speed", "peak memory"),
    *("jaxpeft's fastest: speed, memory", "jaxpeft's default: speed, memory"),
)
COMPARED = ("comparison", "jaxpeft", "other", "speed", "wanted", "memory", "wanted")


class Line(NamedTuple):
    """All that was measured of one case, by one side, in one setting.

    Attributes:
        case: Name of the case.
        side: Name of the side.
        setting: dtype, remat and compilation cache ("" where there is none).
        values: Tokens a second, or for the start seconds, or for `GEMM` FLOP/s: one a call.
        peak: The most memory of any process, in bytes; 0 if nothing was measured.
        why: Why there are no values.
        record: The last record.
    """

    case: str
    side: str
    setting: tuple[str, str, str]
    values: tuple[float, ...]
    peak: int
    why: str
    record: Record

    @property
    def median(self) -> float:
        """Of all calls of all rounds."""
        return statistics.median(self.values)


class Comparison(NamedTuple):
    """One of the figures that the project means to hold.

    Attributes:
        what: In words.
        case: Whose case.
        ours: dtype and remat of jaxpeft's side, or its cache; None for the fastest of all.
        side: Which other side.
        theirs: dtype and remat of the other side; None for the fastest of all.
        speed: The least ratio of speeds; None where it is only reported.
        memory: The largest ratio of peak memories.
        against: The other side's case, where it is another.
    """

    what: str
    case: str
    ours: tuple[str | None, str | None]
    side: str
    theirs: tuple[str | None, str | None]
    speed: float | None = None
    memory: float | None = None
    against: str = ""


F32 = ("float32", None)
COMPARISONS = (
    Comparison("LoRA, fastest in float32", "lora", F32, "torch", F32, 1.2),
    Comparison(
        *("LoRA, default against no checkpointing", "lora", DEFAULT),
        *("torch", ("float32", "none"), 1.05, 0.25),
    ),
    Comparison(
        *("LoRA, default against checkpointing", "lora", DEFAULT),
        *("torch", ("float32", "full"), 1.4),
    ),
    Comparison("LoRA, default against Tunix", "lora", DEFAULT, "tunix", F32, 1.4, 0.2),
    Comparison("LoRA, fastest of all settings", "lora", (None, None), "torch", (None, None)),
    Comparison("full fine-tuning", "full", F32, "torch", F32, 1.1),
    Comparison("prompt tuning", "prompt", F32, "torch", F32, 1.1),
    Comparison("DoRA", "dora", F32, "torch", F32, 1.1),
    Comparison("QLoRA against LoRA", "qlora", F32, OURS, F32, 1 / 1.3, against="lora"),
    Comparison(
        *("packed rows against one long example", "packed", F32, OURS, F32, 1.0), against="long"
    ),
    Comparison("one example of 2048 tokens", "long", F32, "torch", F32),
    Comparison("decoding with adapter, batch 1", "generate-adapter-1", F32, "torch", F32, 2.0),
    Comparison("decoding with adapter, batch 8", "generate-adapter-8", F32, "torch", F32, 1.3),
    Comparison("start to first step, second run", START, F32, "torch", F32, 1.0),
)


def lines_of(records: Iterable[Record]) -> list[Line]:
    """Gathers the rounds of every case, side and setting, in the order they first came."""
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        key = (record["case"], record["side"], setting_of(record))
        groups.setdefault(key, []).append(record)
    lines = []
    for (case, side, setting), group in groups.items():
        good = [record for record in group if "seconds" in record]
        values = tuple(value for record in good for value in values_of(record))
        why = [record.get("unsupported") or record.get("failed", "") for record in group]
        peak = max((peak_of(record) for record in good), default=0)
        reason = "" if values else next(filter(None, why), "nothing was measured")
        lines.append(Line(case, side, setting, values, peak, reason, (good or group)[-1]))
    return lines


def setting_of(record: Record) -> tuple[str, str, str]:
    """dtype, remat and compilation cache."""
    return record["dtype"], record["remat"], record.get("cache", "")


def values_of(record: Record) -> list[float]:
    """What counts of a record: seconds of a start, else speeds."""
    if record["case"] == START:
        return [record["start_seconds"]]
    return [record["amount"] / seconds for seconds in record["seconds"]]


def peak_of(record: Record) -> int:
    """Peak memory: of the device where it has its own, else of the process."""
    return record.get("device_peak_bytes") or record["peak_bytes"]


def faster(case: str) -> Callable[[Sequence[Line]], Line]:
    """The function that picks the fastest of some lines of a case."""

    def pick(lines: Sequence[Line]) -> Line:
        return (min if case == START else max)(lines, key=lambda line: line.median)

    return pick


def find(
    lines: Iterable[Line], case: str, side: str, setting: tuple[str | None, str | None]
) -> Line | None:
    """The fastest line of a side in a case, of those whose dtype and remat are as given."""
    found = [
        line
        for line in lines
        if (line.case, line.side) == (case, side)
        and line.values
        and all(want in (None, got) for want, got in zip(setting, line.setting, strict=False))
    ]
    return faster(case)(found) if found else None


def speed_ratio(ours: Line, theirs: Line) -> float:
    """How many times as fast ours is."""
    if ours.case == START:
        return theirs.median / ours.median
    return ours.median / theirs.median


def setting_text(line: Line) -> str:
    """A setting in words."""
    dtype, remat, cache = line.setting
    words = [dtype]
    if remat != "none":
        words.append(f"remat {remat}" if line.side == OURS else "checkpointing")
    return ", ".join([*words, *filter(None, [cache])])


def value_text(line: Line) -> str:
    """Median and spread with their unit; "-" where there is nothing."""
    if not line.values:
        return "-"
    scale, unit = {START: (1, "s"), GEMM: (1e9, "GFLOP/s")}.get(line.case, (1, "tokens/s"))
    middle, low, high = (x / scale for x in (line.median, min(line.values), max(line.values)))
    spread = f" ({low:.4g}-{high:.4g})" if len(line.values) > 1 else ""
    return f"{middle:.4g}{spread} {unit}"


def bytes_text(count: int) -> str:
    """Gibibytes; "-" for nothing."""
    return f"{count / 2**30:.2f} GiB" if count else "-"


def beside(ours: Line | None, theirs: Line) -> str:
    """Ratios of speed and memory of two lines; "" where there is nothing to compare."""
    if ours is None or not theirs.values or ours is theirs:
        return ""
    return f"{speed_ratio(ours, theirs):.2f}x, {ours.peak / theirs.peak:.2f}x"


def table(lines: Sequence[Line]) -> list[list[str]]:
    """One row for every line; a line of another side is compared with jaxpeft in its dtype."""
    rows = []
    for line in lines:
        dtype, other = line.setting[0], line.side != OURS
        fastest = find(lines, line.case, OURS, (dtype, None)) if other else None
        default = find(lines, line.case, OURS, (dtype, "full")) if other else None
        cells = [line.case, line.side, setting_text(line), value_text(line), bytes_text(line.peak)]
        rows.append([*cells, beside(fastest, line), beside(default, line)])
    return rows


def compare(lines: Sequence[Line]) -> list[list[str]]:
    """One row for every comparison both of whose lines were measured."""
    rows = []
    for one in COMPARISONS:
        ours = find(lines, one.case, OURS, one.ours)
        theirs = find(lines, one.against or one.case, one.side, one.theirs)
        if ours is None or theirs is None:
            continue
        speed, memory = speed_ratio(ours, theirs), ours.peak / theirs.peak
        rows.append(
            [
                one.what,
                setting_text(ours),
                f"{theirs.side}, {setting_text(theirs)}",
                f"{speed:.2f}x",
                verdict(one.speed, speed, ">="),
                f"{memory:.2f}x",
                verdict(one.memory, memory, "<="),
            ]
        )
    return rows


def verdict(wanted: float | None, got: float, sign: str) -> str:
    """What was wanted, and whether it is met; "" where nothing was."""
    if wanted is None:
        return ""
    met = got >= wanted if sign == ">=" else got <= wanted
    return f"{sign} {wanted:.2f}x: {'met' if met else 'missed'}"


def utilisation(lines: Sequence[Line]) -> list[str]:
    """The share of a large matrix product's rate that each setting of LoRA's step reaches."""
    said = []
    for line in lines:
        if (line.case, line.side) != ("lora", OURS) or not line.values:
            continue
        peak = find(lines, GEMM, OURS, (line.setting[0], None))
        if peak is not None:
            rate = line.record["flops"] * line.median / line.record["amount"]
            usual, best = peak.median, max(peak.values)
            said.append(
                f"LoRA, {setting_text(line)}: {rate / 1e9:.4g} GFLOP/s, {rate / usual:.1%} of the "
                f"matrix product's median {usual / 1e9:.4g}, {rate / best:.1%} of its best "
                f"{best / 1e9:.4g}"
            )
    return said


def report(records: Iterable[Record]) -> str:
    """All tables, in Markdown."""
    lines = lines_of(records)
    parts = [markdown(HEADINGS, table(lines))]
    if rows := compare(lines):
        parts.append(markdown(COMPARED, rows))
    notes = utilisation(lines)
    notes += [f"{line.case}, {line.side}: {line.why}" for line in lines if line.why]
    if notes:
        parts.append("\n".join(f"- {note}" for note in dict.fromkeys(notes)))
    return "\n\n".join(parts)


def main(argv: Sequence[str]) -> int:
    """Prints the tables of a file; returns 2 where there is no such file."""
    try:
        (name,) = argv
        print(report(json.loads(Path(name).read_text(encoding="utf-8"))["records"]))
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {' '.join(argv)}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
