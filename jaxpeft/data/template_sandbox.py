"""The environment that chat templates run in: that of transformers, with all work counted.

Jinja turns a template into Python code. `BoundedCodeGenerator` adds to that code what takes from
the budget of a rendering: a step at the head of every loop and macro, and the size of what is
printed, joined, sliced or compared. Operators, calls, filters and tests go through the
environment, which measures their results before they run. Every rendering has a context of its
own, with a budget of its own.
"""

import types
from collections.abc import Callable
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame, operators
from jinja2.runtime import BlockReference, Context, LoopContext, Macro
from jinja2.sandbox import (
    ImmutableSandboxedEnvironment,
    SandboxedEscapeFormatter,
    SandboxedFormatter,
)
from jinja2.utils import Namespace, _PassArg, generate_lorem_ipsum
from markupsafe import Markup

from jaxpeft.data import template_bounds, template_filters
from jaxpeft.data.template_date import strftime_now
from jaxpeft.data.template_limits import (
    MAX_CHARS,
    STEPS_OF_A_CALL,
    STEPS_OF_A_MACRO,
    Budget,
    Counted,
    LimitPassed,
    weigh,
)

_NODES_OF_A_STEP = 100


class RaisedByTemplate(jinja2.TemplateError):
    """What a template says with ``raise_exception``."""


class BoundedContext(Context):
    """The variables of one rendering, and what is left of its limits."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.budget = Budget()

    def derived(self, locals: dict[str, Any] | None = None) -> "BoundedContext":
        """A context of the same rendering."""
        context = super().derived(locals)
        assert isinstance(context, BoundedContext)
        context.budget = self.budget
        return context


class BoundedCodeGenerator(CodeGenerator):
    """Writes Python code that takes from the budget of its context."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._costs: dict[int, int] = {}
        self._conditions: set[int] = set()

    def write_commons(self) -> None:
        """Writes the head of a root or block function."""
        super().write_commons()
        self.writeline("budget = context.budget")
        self.writeline("concat = budget.concat")
        for name in ("tick", "read", "text", "shown", "checked", "sliced"):
            self.writeline(f"budget_{name} = budget.{name}")

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        """Visits a node; the condition of a loop is a step."""
        if id(node) not in self._conditions:
            return super().visit(node, *args, **kwargs)
        self._conditions.remove(id(node))
        self.write("budget_tick() and (")
        super().visit(node, *args, **kwargs)
        self.write(")")
        return None

    def blockvisit(self, nodes: Any, frame: Frame) -> None:
        """Writes statements; those of a loop, macro or block begin with their steps."""
        if cost := self._costs.pop(id(nodes), 0):
            self.writeline(f"budget_tick({cost})")
        super().blockvisit(nodes, frame)

    def visit_Template(self, node: nodes.Template, frame: Frame | None = None) -> None:
        """Writes the module."""
        for block in node.find_all(nodes.Block):
            self._count(block)
        super().visit_Template(node, frame)

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        """Writes a loop."""
        self._count(node)
        if node.test is not None:
            self._conditions.add(id(node.test))
        super().visit_For(node, frame)

    def macro_body(self, node: nodes.Macro | nodes.CallBlock, frame: Frame) -> Any:
        """Writes the function of a macro or call block."""
        self._count(node)
        return super().macro_body(node, frame)

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        """Writes a comparison, which reads both sides where both can be long."""
        operands = [node.expr, *(operand.expr for operand in node.ops)]
        if any(operand.op in ("in", "notin") for operand in node.ops):
            is_short = all(map(_is_written_out, operands[1:]))
        else:
            is_short = any(map(_is_written_out, operands))
        if is_short and len(operands) == 2:
            super().visit_Compare(node, frame)
            return
        self.write("(")
        self._visit_read(node.expr, frame)
        for operand in node.ops:
            self.write(f" {operators[operand.op]} ")
            self._visit_read(operand.expr, frame)
        self.write(")")

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        """Writes ``~``, with a look at the sizes before the texts are joined."""
        join = "markup_join" if frame.eval_ctx.autoescape else "str_join"
        if frame.eval_ctx.volatile:
            join = "(markup_join if context.eval_ctx.volatile else str_join)"
        self.write(f"{join}(budget_checked((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")))")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        """Writes a lookup; what is sliced counts."""
        if not isinstance(node.arg, nodes.Slice):
            super().visit_Getitem(node, frame)
            return
        self.write("budget_sliced(")
        self.visit(node.node, frame)
        self.write(", slice(")
        for bound in (node.arg.start, node.arg.stop, node.arg.step):
            if bound is None:
                self.write("None")
            else:
                self.visit(bound, frame)
            self.write(", ")
        self.write("))")

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        """Writes a mapping; keys are read when they are hashed."""
        self.write("{")
        for item in node.items:
            self._visit_read(item.key, frame)
            self.write(": ")
            self.visit(item.value, frame)
            self.write(", ")
        self.write("}")

    def _output_child_pre(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        if frame.eval_ctx.volatile:
            self.write("(escape if context.eval_ctx.autoescape else str)(budget_shown(")
        elif frame.eval_ctx.autoescape:
            self.write("escape(budget_shown(")
        else:
            self.write("budget_text((")

    def _output_child_post(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        self.write("))")

    def _visit_read(self, node: nodes.Expr, frame: Frame) -> None:
        if isinstance(node, nodes.Const):
            self.visit(node, frame)
            return
        self.write("budget_read(")
        self.visit(node, frame)
        self.write(")")

    def _count(self, node: Any) -> None:
        """Notes how many steps the body of a node takes each time."""
        size = sum(1 for part in node.body for _ in part.find_all(nodes.Node))
        self._costs[id(node.body)] = 1 + size // _NODES_OF_A_STEP


def _is_written_out(node: nodes.Expr) -> bool:
    """Whether a value stands in the template itself, so that it is short."""
    if isinstance(node, (nodes.List, nodes.Tuple)):
        return all(map(_is_written_out, node.items))
    return isinstance(node, nodes.Const)


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks what an assistant writes, and renders as what is in it."""

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
        template_bounds.format_field(self.budget, value, format_spec)
        return super().format_field(value, format_spec)


class _EscapeFormatter(_Formatter, SandboxedEscapeFormatter):
    pass


class _Dict:
    """``dict`` as a template sees it: a function, and not the class."""

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
    intercepted_binops = frozenset(template_bounds.OPERATORS)

    def __init__(self):
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = strftime_now
        self.globals["dict"] = _Dict()
        self.globals["namespace"] = _Namespace
        for name, filter_ in self.filters.items():
            if name not in template_filters.CHEAP_FILTERS:
                self.filters[name] = _bounded_filter(name, filter_)
        self.filters["tojson"] = _tojson
        self.filters["sum"] = _sum
        for name, bound in template_filters.TEST_BOUNDS.items():
            self.tests[name] = _bounded_test(bound, self.tests[name])

    @staticmethod
    def concat(pieces: Any) -> str:  # type: ignore[override]
        """Joins what a block yields; jinja calls it with no context."""
        listed, total = [], 0
        for piece in pieces:
            total += len(piece)
            if total > MAX_CHARS:
                raise LimitPassed(f"makes a text of more than {MAX_CHARS:,} characters")
            listed.append(piece)
        return "".join(listed)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Computes with a binary operator."""
        return template_bounds.OPERATORS[operator](context.budget, left, right)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Looks up an item."""
        if isinstance(argument, tuple):
            weigh(argument)  # hashing one that is nested too deeply would crash
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Any) -> Any:
        """Gives a text's own format methods back as bounded ones."""
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
            args = template_bounds.method(budget, __obj.__self__, __obj.__name__, args, named)
        elif __obj is generate_lorem_ipsum:
            template_filters.lorem_ipsum(budget, args, named)
        else:
            for value in (*args, *named.values()):
                budget.read(value)
        return budget.made(super().call(__context, __obj, *args, **kwargs))


def _raise_exception(message: Any) -> None:
    raise RaisedByTemplate(message)


@jinja2.pass_context
def _tojson(context: BoundedContext, value: Any, *args: Any, **kwargs: Any) -> str:
    return template_filters.tojson(context.budget, value, *args, **kwargs)


@jinja2.pass_context
def _sum(context: BoundedContext, value: Any, *args: Any, **kwargs: Any) -> Any:
    return template_filters.summed(context.budget, context.environment, value, *args, **kwargs)


def _bounded_filter(name: str, filter_: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, with its bound in front and its result counted."""
    bound = template_filters.BOUNDS.get(name)
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
    """The test, with its bound in front."""
    passed = _passed(test)

    @jinja2.pass_context
    def bounded(context: BoundedContext, *args: Any, **kwargs: Any) -> bool:
        bound(context.budget, *args, **kwargs)
        return test(*passed(context), *args, **kwargs)

    return bounded


def _passed(function: Callable[..., Any]) -> Callable[[Context], tuple[Any, ...]]:
    """What jinja hands to a filter or test in front of its value."""
    return {
        _PassArg.context: lambda context: (context,),
        _PassArg.eval_context: lambda context: (context.eval_ctx,),
        _PassArg.environment: lambda context: (context.environment,),
    }.get(_PassArg.from_obj(function), lambda context: ())  # type: ignore[arg-type]
