"""The environment of chat templates: the one of transformers, with all work counted.

Operators, calls, filters and tests go through the environment, which measures their results before
they run. Other work is counted by code that `jaxpeft.data.templates.code` adds. Every rendering has
its own context and budget.
"""

import types
from collections.abc import Callable
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.runtime import BlockReference, Context, LoopContext, Macro
from jinja2.sandbox import (
    ImmutableSandboxedEnvironment,
    SandboxedEscapeFormatter,
    SandboxedFormatter,
)
from jinja2.utils import Namespace, _PassArg, generate_lorem_ipsum
from markupsafe import Markup

from jaxpeft.data.templates import bounds, filters
from jaxpeft.data.templates.code import BoundedCodeGenerator
from jaxpeft.data.templates.date import strftime_now
from jaxpeft.data.templates.limits import (
    MAX_CHARS,
    STEPS_OF_A_CALL,
    STEPS_OF_A_MACRO,
    Budget,
    Counted,
    LimitPassed,
    weigh,
)


class RaisedByTemplate(jinja2.TemplateError):
    """The error that a template raises with ``raise_exception``."""


class BoundedContext(Context):
    """The variables of one rendering, and its budget."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.budget = Budget()

    def derived(self, locals: dict[str, Any] | None = None) -> "BoundedContext":
        """A context of the same rendering."""
        context = super().derived(locals)
        assert isinstance(context, BoundedContext)
        context.budget = self.budget
        return context


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks what an assistant writes; it renders as its content."""

    tags = {"generation"}  # noqa: RUF012, as jinja declares it

    def parse(self, parser: Any) -> nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_render")
        block = nodes.CallBlock(call, [], [], body)
        block.set_lineno(line)
        return block

    def _render(self, caller: Macro) -> str:
        return caller()


class _Format:
    """``str.format`` or ``str.format_map`` of a text, as a template calls it."""

    def __init__(self, environment: "BoundedEnvironment", text: str, is_map: bool):
        self._environment = environment
        self._text = text
        self._is_map = is_map

    def __call__(self, budget: Budget, *args: Any, **kwargs: Any) -> str:
        if self._is_map:
            if kwargs or len(args) != 1:
                raise TypeError("format_map() takes exactly one argument")
            args, kwargs = (), args[0]
        if isinstance(self._text, Markup):
            formatter: Any = _EscapeFormatter(self._environment, escape=self._text.escape)
        else:
            formatter = _Formatter(self._environment)
        formatter.budget = budget
        return type(self._text)(formatter.vformat(self._text, args, kwargs))


class _Formatter(SandboxedFormatter):
    budget: Budget

    def convert_field(self, value: Any, conversion: Any) -> Any:
        if conversion is not None:
            self.budget.text(value)
        return super().convert_field(value, conversion)

    def format_field(self, value: Any, format_spec: str) -> Any:
        bounds.format_field(self.budget, value, format_spec)
        return super().format_field(value, format_spec)


class _EscapeFormatter(_Formatter, SandboxedEscapeFormatter):
    pass


class _Dict:
    """``dict`` for templates: a function, not the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(Namespace):
    """A namespace without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any):
        self, args = args[0], args[1:]
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(
            f"a namespace has no names that begin with an underscore, as {name!r} does"
        )


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The environment of transformers' chat templates, within limits."""

    code_generator_class = BoundedCodeGenerator
    context_class = BoundedContext
    intercepted_binops = frozenset(bounds.OPERATORS)

    def __init__(self):
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = strftime_now
        self.globals["dict"] = _Dict()
        self.globals["namespace"] = _Namespace
        for name, filter_ in self.filters.items():
            if name not in filters.CHEAP_FILTERS:
                self.filters[name] = _bounded_filter(name, filter_)
        self.filters["tojson"] = _tojson
        self.filters["sum"] = _sum
        for name, bound in filters.TEST_BOUNDS.items():
            self.tests[name] = _bounded_test(bound, self.tests[name])

    @staticmethod
    def concat(pieces: Any) -> str:  # type: ignore[override]
        """Joins the pieces of a block; jinja calls it without a context.

        Raises:
            LimitPassed: The text would be too long.
        """
        listed, total = [], 0
        for piece in pieces:
            total += len(piece)
            if total > MAX_CHARS:
                raise LimitPassed(f"makes a text of more than {MAX_CHARS:,} characters")
            listed.append(piece)
        return "".join(listed)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Computes with a binary operator."""
        return bounds.OPERATORS[operator](context.budget, left, right)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Looks up an item."""
        if isinstance(argument, tuple):
            weigh(argument)  # hashing a deeply nested value would crash
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Any) -> Any:
        """Replaces a text's own format methods by bounded ones."""
        if type(value) not in (types.MethodType, types.BuiltinMethodType):
            return None
        if value.__name__ not in ("format", "format_map") or not isinstance(value.__self__, str):
            return None
        return _Format(self, value.__self__, value.__name__ == "format_map")

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls a function, macro or method."""
        budget = __context.budget
        kind = type(__obj)
        if kind in (Macro, BlockReference, LoopContext):
            budget.tick(STEPS_OF_A_MACRO)
            return budget.made(super().call(__context, __obj, *args, **kwargs))
        budget.tick(STEPS_OF_A_CALL)
        named = kwargs
        if "_loop_vars" in kwargs or "_block_vars" in kwargs:
            named = {k: v for k, v in kwargs.items() if k not in ("_loop_vars", "_block_vars")}
        if kind is _Format:
            return budget.made(__obj(budget, *args, **named))
        if kind in (types.BuiltinMethodType, types.MethodType):
            args = bounds.method(budget, __obj.__self__, __obj.__name__, args, named)
        elif __obj is generate_lorem_ipsum:
            filters.lorem_ipsum(budget, args, named)
        else:
            for value in (*args, *named.values()):
                budget.read(value)
        return budget.made(super().call(__context, __obj, *args, **kwargs))


def _raise_exception(message: Any) -> None:
    raise RaisedByTemplate(message)


@jinja2.pass_context
def _tojson(context: BoundedContext, value: Any, *args: Any, **kwargs: Any) -> str:
    return filters.tojson(context.budget, value, *args, **kwargs)


@jinja2.pass_context
def _sum(context: BoundedContext, value: Any, *args: Any, **kwargs: Any) -> Any:
    return filters.summed(context.budget, context.environment, value, *args, **kwargs)


def _bounded_filter(name: str, filter_: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, with its bound applied first and its result counted."""
    bound = filters.BOUNDS.get(name)
    passed = _passed(filter_)

    @jinja2.pass_context
    def bounded(context: BoundedContext, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget = context.budget
        budget.tick(STEPS_OF_A_CALL)
        source = value
        if bound is not None:
            value = bound(budget, value, args, kwargs)
        else:
            budget.read(value)
        if args or kwargs:
            for argument in (*args, *kwargs.values()):
                budget.read(argument)
        result = filter_(*passed(context), value, *args, **kwargs)
        if isinstance(result, types.GeneratorType):
            length = sum(len(argument) for argument in args if isinstance(argument, str))
            return Counted(result, budget, source, STEPS_OF_A_CALL + length // 16)
        return budget.made(result)

    return bounded


def _bounded_test(bound: Callable[..., None], test: Callable[..., Any]) -> Callable[..., bool]:
    """The test, with its bound applied first."""
    passed = _passed(test)

    @jinja2.pass_context
    def bounded(context: BoundedContext, *args: Any, **kwargs: Any) -> bool:
        bound(context.budget, *args, **kwargs)
        return test(*passed(context), *args, **kwargs)

    return bounded


def _passed(function: Callable[..., Any]) -> Callable[[Context], tuple[Any, ...]]:
    """The argument that jinja passes to a filter or test before its value."""
    return {
        _PassArg.context: lambda context: (context,),
        _PassArg.eval_context: lambda context: (context.eval_ctx,),
        _PassArg.environment: lambda context: (context.environment,),
    }.get(_PassArg.from_obj(function), lambda context: ())  # type: ignore[arg-type]
