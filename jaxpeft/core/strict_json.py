"""JSON as its standard has it: a key that is given twice, and NaN, are problems.

Python's reader keeps the last of two equal keys, and accepts NaN and Infinity.
"""

import json
from typing import Any


class Reader:
    """Python's JSON decoder, which also reports what it would let pass."""

    def __init__(self):
        self._problems: list[str] = []
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._take_pairs, parse_constant=self._note_constant
        )

    def read(self, text: str, start: int = 0) -> tuple[Any, int, list[str]]:
        """The value at `start`, the place where it ends, and its problems.

        Raises:
            json.JSONDecodeError: There is no JSON value at `start`.
            RecursionError: The value is nested too deeply.
        """
        self._problems = []
        value, end = self._decoder.raw_decode(text, start)
        return value, end, self._problems

    def _take_pairs(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    self._problems.append(f"{json.dumps(key)}: the key is given twice")
                seen.add(key)
        return value

    def _note_constant(self, constant: str) -> float:
        self._problems.append(f"{constant} is not JSON; write null or a number")
        return float(constant)


def loads(text: str, *, constants: bool = False) -> Any:
    """The value that a whole text holds.

    Args:
        text: The text.
        constants: Whether NaN and Infinity are numbers, as in some files of Python programs.

    Raises:
        json.JSONDecodeError: The text is no JSON.
        ValueError: A key is given twice, there is a NaN, or the nesting is too deep.
    """
    reader = Reader()
    hook = None if constants else reader._note_constant
    try:
        value = json.loads(text, object_pairs_hook=reader._take_pairs, parse_constant=hook)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if reader._problems:
        raise ValueError(reader._problems[0])
    return value
