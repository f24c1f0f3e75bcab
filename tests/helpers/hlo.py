"""Reads a compiled program's text: its collectives and products, loops with their trip counts."""

import math
import re
from collections import Counter
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_ITEM = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
_ITEM |= {"s64": 8, "u64": 8}
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.+?) ([\w-]+)\((.*)$")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One collective operation."""

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    """Of what every device holds afterwards."""
    nbytes: int
    times: int
    """How often it runs in a call of the program."""


class Program:
    """A program for one device, from ``compiled.as_text()``.

    Attributes:
        collectives: All of them.
        flops: Of its matrix products, as often as they run.
    """

    def __init__(self, text: str):
        self._lines: dict[str, list[tuple[str, str, str, str]]] = {}
        self._read(text)
        times = self._times()
        self.collectives: list[Collective] = []
        self.flops = 0
        for name, lines in self._lines.items():
            shapes = {result: _shapes(kind) for result, kind, _, _ in lines}
            for _, kind, operation, rest in lines:
                if operation.removesuffix("-start") in COLLECTIVES:
                    found = _shapes(kind)
                    nbytes = sum(_ITEM[item] * math.prod(shape) for item, shape in found)
                    only = tuple(shape for _, shape in found)
                    self.collectives.append(Collective(operation, only, nbytes, times[name]))
                if operation == "dot":
                    self.flops += times[name] * _dot_flops(kind, rest, shapes)

    def moved(self, *kinds: str) -> int:
        """Bytes that collectives of these kinds leave on a device in a call."""
        return sum(c.nbytes * c.times for c in self.collectives if c.kind in kinds)

    def _read(self, text: str) -> None:
        lines: list = []
        for line in text.splitlines():
            if match := re.match(r"^(ENTRY )?%?([\w.-]+) (?:\(.*)?\{?$", line):
                if line.rstrip().endswith("{"):
                    lines = self._lines.setdefault(match[2], [])
                    if match[1]:
                        self._entry = match[2]
            elif match := _LINE.match(line):
                lines.append(match.groups())

    def _times(self) -> Counter:
        """How often each computation runs; loops without a known count are taken for one turn."""
        times: Counter = Counter()
        pending = [(self._entry, 1)]
        while pending:
            name, count = pending.pop()
            times[name] += count
            for _, _, operation, rest in self._lines[name]:
                known = re.search(r'known_trip_count":\{"n":"(\d+)"', rest)
                turns = int(known[1]) if known and operation == "while" else 1
                called = re.findall(r"(?:body|calls|to_apply|\w+_computation)=%?([\w.-]+)", rest)
                for group in re.findall(r"branch_computations=\{(.*?)\}", rest):
                    called += [one.strip().lstrip("%") for one in group.split(",")]
                pending += [(one, count * turns) for one in called]
        return times


def _shapes(kind: str) -> list[tuple[str, tuple[int, ...]]]:
    return [
        (item, tuple(int(n) for n in sizes.split(",") if n))
        for item, sizes in _SHAPE.findall(kind)
        if item in _ITEM
    ]


def _dot_flops(kind: str, rest: str, shapes: dict) -> int:
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)
    operands = rest.split(")")[0]
    named = re.findall(r"%([\w.-]+)", operands) or re.findall(r"[\w.-]+", operands)
    left = (_shapes(operands) or shapes[named[0]])[0][1]
    axes = [int(n) for n in contracted[1].split(",") if n] if contracted else []
    return 2 * math.prod(_shapes(kind)[0][1]) * math.prod(left[axis] for axis in axes)
