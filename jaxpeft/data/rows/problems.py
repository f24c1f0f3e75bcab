"""The problems of a data file: collected in one pass, reported together.

The report has one line per problem, ``data/train.jsonl:17: "completion": expected text, got null``,
for the first 20 of them, then a count and the ways out.
"""

import dataclasses
from collections.abc import Sequence

from jaxpeft.core.errors import UserError

MAX_SHOWN = 20
DROP_HINT = 'set data.on_bad_row to "drop" to train without such rows'


@dataclasses.dataclass(frozen=True)
class Problem:
    """One reason why a row cannot be used.

    Attributes:
        line: Line of the file where the row starts, from 1.
        text: Field and why.
        reason: Short label, under which dropped rows are counted.
        hint: The way out, reported once for all problems that share it.
        column: Column of the line, from 1, if it is known.
        row: Place of the row among the file's rows, if several problems may share it.
        fatal: Whether the rest of the file cannot be read, so that dropping the row does not help.
    """

    line: int
    text: str
    reason: str
    hint: str = DROP_HINT
    column: int | None = None
    fatal: bool = False
    row: int | None = None

    def describe(self, path: str) -> str:
        """The problem with its place in front."""
        column = f":{self.column}" if self.column is not None else ""
        return f"{path}:{self.line}{column}: {self.text}"


def report(path: str, problems: Sequence[Problem]) -> UserError:
    """Builds the error that reports all problems of a file.

    Args:
        path: The file as the user wrote it.
        problems: At least one, in any order.

    Returns:
        The error, for the caller to raise.
    """
    ordered = sorted(problems, key=lambda problem: (problem.line, problem.column or 0))
    hints = [hint for hint in dict.fromkeys(problem.hint for problem in ordered) if hint]
    shown = [problem.describe(path) for problem in ordered[:MAX_SHOWN]]
    if len(ordered) == 1:
        return UserError("; ".join([*shown, *hints]))
    rest = len(ordered) - len(shown)
    more = f"and {rest} more; " if rest else ""
    shown.append(f"{more}{len(ordered)} problems in {path}; " + "; ".join(hints))
    return UserError("\n".join(shown).removesuffix("; "))


def count_reasons(dropped: dict[str, int]) -> str:
    """The number of dropped rows and why, e.g. "3 too long, 1 malformed JSON"."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
