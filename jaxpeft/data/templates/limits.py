"""Limits on the cost of rendering a chat template, counted in steps and characters.

A template is text from somebody else that runs for every row. A limit in seconds would refuse good
templates on a slow machine, so the work itself is counted. Every run through the body of a loop or
macro takes from a budget of steps, and everything that is read or made takes from a budget of
characters. No single text, list or number may grow beyond a size that no conversation needs.
Operations that could make something large are measured before they run.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jinja2.utils import Namespace

from jaxpeft.core.limits import TEMPLATES

MAX_TEMPLATE_CHARS = TEMPLATES["TEMPLATE_CHARS"].most
MAX_CHARS = TEMPLATES["TEMPLATE_TEXT"].most
MAX_TOTAL_CHARS = TEMPLATES["TEMPLATE_TEXTS"].most
MAX_STEPS = TEMPLATES["TEMPLATE_STEPS"].most
MAX_ITEMS = TEMPLATES["TEMPLATE_ITEMS"].most
MAX_BITS = TEMPLATES["TEMPLATE_BITS"].most
MAX_DEPTH = TEMPLATES["TEMPLATE_DEPTH"].most

MIN_STEPS = 10_000
"""Steps that every rendering may take, however often its template passed a limit before."""

MIN_TOTAL_CHARS = 1_000_000
"""Characters of all texts that every rendering may read and make."""

STEPS_OF_A_MACRO = 20
"""Steps that a call of a macro, a block or a recursive loop takes."""

STEPS_OF_A_CALL = 4
"""Steps that any other call takes, and each item that a filter yields."""

_ITEM_CHARS = 8
_ATOMS = frozenset({int, float, bool, type(None)})
_VIEWS = (type({}.keys()), type({}.values()), type({}.items()))


class LimitPassed(Exception):
    """A template passes a limit; the text completes "the template ..."."""


class Budget:
    """The remaining budget while one template is rendered once.

    Args:
        failures: How often the template passed a limit before. It then gets only a part of the
            steps and characters, so that a template that always passes them is soon done with a
            file.

    Attributes:
        steps: Steps that are left.
        chars: Characters that are left.
        known: Weights of containers that the caller passed in, by id; the containers stay alive.
    """

    __slots__ = ("_all_chars", "_all_steps", "chars", "known", "steps")

    def __init__(self, failures: int = 0):
        self._all_steps = max(MAX_STEPS // (1 + failures), min(MIN_STEPS, MAX_STEPS))
        self._all_chars = max(MAX_TOTAL_CHARS // (1 + failures), MIN_TOTAL_CHARS)
        self.steps = self._all_steps
        self.chars = self._all_chars
        self.known: dict[int, int] = {}

    def tick(self, cost: int = 1) -> bool:
        """Takes `cost` steps from the budget.

        Returns:
            True, always, so that a call can stand in a condition.

        Raises:
            LimitPassed: No steps are left.
        """
        self.steps -= cost
        if self.steps < 0:
            raise LimitPassed(f"takes more than {self._all_steps:,} steps")
        return True

    def spend(self, chars: int) -> None:
        """Takes characters that are read or made from the budget.

        Raises:
            LimitPassed: No characters are left.
        """
        self.chars -= chars
        if self.chars < 0:
            raise LimitPassed(f"makes and reads more than {self._all_chars:,} characters in all")

    def expect(self, chars: int) -> None:
        """Refuses a text of this length before it is made.

        Raises:
            LimitPassed: It is too long.
        """
        if chars > MAX_CHARS:
            raise LimitPassed(f"makes a text of more than {MAX_CHARS:,} characters")
        self.spend(chars)

    def expect_items(self, items: int) -> None:
        """Refuses a list of this length before it is made.

        Raises:
            LimitPassed: It is too long.
        """
        if items > MAX_ITEMS:
            raise LimitPassed(f"makes a list of more than {MAX_ITEMS:,} items")
        self.spend(_ITEM_CHARS * items)

    def expect_bits(self, bits: int) -> None:
        """Refuses a number of this size before it is computed.

        Raises:
            LimitPassed: It is too large.
        """
        if bits > MAX_BITS:
            raise LimitPassed(f"computes a number of more than {MAX_BITS:,} bits")

    def weigh(self, value: Any) -> int:
        """About how many characters the text of a value has, including values inside it."""
        return weigh(value, self.known, self.tick)

    def read(self, value: Any) -> Any:
        """Charges the cost of reading a whole value, and returns it."""
        if type(value) is str:
            self.chars -= 1 + (len(value) >> 3)
            if self.chars < 0:
                self.spend(0)
        elif type(value) not in _ATOMS:
            self.spend(self.weigh(value))
        return value

    def text(self, value: Any) -> str:
        """The text of a value, measured before it is made."""
        if type(value) is str:
            self.chars -= 1 + (len(value) >> 3)
            if self.chars < 0:
                self.spend(0)
            return value
        if type(value) not in _ATOMS:
            self.expect(self.weigh(value))
        return str(value)

    def shown(self, value: Any) -> Any:
        """The value, after its text was measured as in `text`."""
        if type(value) is not str and type(value) not in _ATOMS:
            self.expect(self.weigh(value))
        return value

    def checked(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        """The values, after a check that their texts together are not too long."""
        total = 0
        for value in values:
            total += len(value) if type(value) is str else self.weigh(value)
        self.expect(total)
        return values

    def concat(self, pieces: list[str]) -> str:
        """Joins the pieces of a block, macro or loop."""
        self.expect(sum(map(len, pieces)))
        return "".join(pieces)

    def sliced(self, value: Any, where: slice) -> Any:
        """A slice of a list or text, charged to the budget."""
        return self.made(value[where])

    def made(self, value: Any) -> Any:
        """Charges the cost of a new value, and returns it; a value that is too large is refused."""
        if isinstance(value, (str, bytes)):
            self.expect(len(value))
        elif isinstance(value, (list, tuple, dict)):
            self.expect_items(len(value))
        elif isinstance(value, int):
            self.expect_bits(value.bit_length())
        return value

    def items(self, values: Iterable[Any]) -> list[Any]:
        """Makes a list of an iterable; if its length is unknown, every item takes a step."""
        if hasattr(values, "__len__"):
            self.expect_items(len(values))  # type: ignore[arg-type]
            return list(values)
        listed = []
        for value in values:
            listed.append(value)
            self.tick()
        self.expect_items(len(listed))
        return listed


class Counted(Iterator[Any]):
    """A generator of a filter, whose items take steps.

    Args:
        items: The generator.
        budget: The budget of the rendering.
        source: The input of the filter; another `Counted` adds to the nesting.
        cost: Steps that an item takes.
    """

    __slots__ = ("_budget", "_cost", "_depth", "_items")

    def __init__(
        self, items: Iterator[Any], budget: Budget, source: Any, cost: int = STEPS_OF_A_CALL
    ):
        self._items = items
        self._budget = budget
        self._cost = cost
        self._depth = source._depth + 1 if type(source) is Counted else 1
        check_depth(self._depth)

    def __next__(self) -> Any:
        self._budget.tick(self._cost)
        return next(self._items)


def check_depth(depth: int) -> None:
    """Checks how deeply values are nested.

    Raises:
        LimitPassed: They are nested too deeply.
    """
    if depth > MAX_DEPTH:
        raise LimitPassed(f"nests values more than {MAX_DEPTH} deep")


def weigh(value: Any, known: Mapping[int, int] | None = None, tick: Any = None) -> int:
    """About how many characters the text of a value has.

    A list that occurs several times inside another one counts as often, but is visited once, so
    lists that double in every iteration of a loop are weighed quickly.

    Args:
        value: Any value that a template can have.
        known: Weights of containers by id.
        tick: Called with the number of items of every container that is visited.

    Returns:
        The weight, at least 1.

    Raises:
        LimitPassed: The value is nested too deeply.
    """
    if type(value) in _ATOMS:
        return 8
    return _weigh(value, known or {}, tick, {}, 1)


def _weigh(
    value: Any, known: Mapping[int, int], tick: Any, seen: dict[int, int], depth: int
) -> int:
    if isinstance(value, (str, bytes)):
        return len(value) + 2
    if isinstance(value, Namespace):
        value = value._Namespace__attrs  # type: ignore[attr-defined]
    is_mapping = isinstance(value, dict)
    if not is_mapping and not isinstance(value, (list, tuple, *_VIEWS)):
        return 8 if type(value) in _ATOMS else 80
    key = id(value)
    weight = known.get(key) or seen.get(key)
    if weight is not None:
        return weight
    check_depth(depth)
    if tick is not None:
        tick(1 + len(value))
    weight = 2
    for item in value:
        weight += 4 + _weigh(item, known, tick, seen, depth + 1)
    if is_mapping:
        for item in value.values():
            weight += _weigh(item, known, tick, seen, depth + 1)
    seen[key] = weight
    return weight
