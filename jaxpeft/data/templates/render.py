"""Renders the chat template of a tokenizer: the same text as transformers, within limits.

A template is code that came with a model. Whatever it does, the result is the text or a
`TemplateError` of one line. `jaxpeft.data.templates.limits` bounds its cost, and
`jaxpeft.data.templates.date` gives it a fixed date, because data must not change daily.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from jaxpeft.core.errors import UserError
from jaxpeft.data.templates.limits import MAX_CHARS, MAX_TEMPLATE_CHARS, Budget, LimitPassed, weigh
from jaxpeft.data.templates.sandbox import BoundedContext, BoundedEnvironment, RaisedByTemplate

_MAX_MESSAGE = 1000
_GIVEN = ("messages", "tools", "documents", "add_generation_prompt")
_REASONING = ("reasoning_content", "thinking", "reasoning")


class TemplateError(ValueError):
    """A template cannot be rendered; the text is one line."""


def render_template(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    arguments: Mapping[str, Any] | None = None,
) -> str:
    """Renders messages with the chat template of a tokenizer.

    As in transformers, keys of a message whose value is None count as absent, and thinking is
    given under all names that templates use for it. Empty lists of tools and of documents become
    None.

    Args:
        tokenizer: A tokenizer of transformers.
        messages: The messages, one mapping each.
        tools: JSON schemas of functions; a template named ``tool_use`` is chosen for them.
        documents: Mappings to answer from.
        add_generation_prompt: Whether to open an assistant turn at the end.
        arguments: Further variables of the template.

    Returns:
        The text, special tokens included: encode it with ``add_special_tokens=False``.

    Raises:
        UserError: If the tokenizer has no chat template, or several and none is the default.
        TemplateError: If the template, or what the messages make of it, fails or passes a limit.
    """
    tools, documents = tools or None, documents or None
    compiled = _compiled(_source(tokenizer, tools))
    if compiled.template is None:
        raise TemplateError(compiled.problem)
    variables = {**tokenizer.special_tokens_map, **(arguments or {})}
    for name in _GIVEN:
        if name in variables:
            raise TemplateError(f"the template variable {name!r} is already given by the row")
    try:
        weights: dict[int, int] = {}
        variables = _plain(variables, weights)
        variables["messages"] = _messages(messages, weights)
        variables["tools"] = _plain(tools, weights)
        variables["documents"] = _plain(documents, weights)
        variables["add_generation_prompt"] = add_generation_prompt
        return _render(compiled, variables, weights)
    except Exception as error:
        compiled.failures += isinstance(error, LimitPassed)
        raise TemplateError(_why(error, compiled.template)) from None


def _source(tokenizer: Any, tools: Any) -> str:
    """The text of the template that applies."""
    named = tokenizer.chat_template
    if not named:
        raise UserError(
            "the model's tokenizer has no chat template, which rows with messages need; use a "
            "chat model, set tokenizer.chat_template, or give prompt and completion as text."
        )
    wanted = "default" if tools is None else "tool_use"
    if isinstance(named, dict) and not {"default", wanted} & set(named):
        raise UserError(
            f"the model's tokenizer has several chat templates ({', '.join(sorted(named))}) "
            "and none of them is named default; set model.chat_template to a file with the "
            "one to use."
        )
    source = tokenizer.get_chat_template(tools=tools)
    if not isinstance(source, str):
        raise UserError(
            f"the chat template of the model's tokenizer is no text but {type(source).__name__}."
        )
    return source


@dataclasses.dataclass
class _Compiled:
    """A compiled template.

    Attributes:
        template: The template; None if it cannot be compiled.
        problem: The reason, in one line.
        failures: How often it passed a limit.
    """

    template: jinja2.Template | None
    problem: str = ""
    failures: int = 0


@functools.lru_cache(maxsize=64)
def _compiled(source: str) -> _Compiled:
    """Compiles a text; the result is cached, also if it cannot be compiled."""
    if len(source) > MAX_TEMPLATE_CHARS:
        problem = f"the template has {len(source):,} characters, more than {MAX_TEMPLATE_CHARS:,}"
        return _Compiled(None, problem)
    try:
        return _Compiled(_environment().from_string(source))
    except Exception as error:
        return _Compiled(None, _why(error, None))


@functools.cache
def _environment() -> BoundedEnvironment:
    return BoundedEnvironment()


def _render(compiled: _Compiled, variables: dict[str, Any], weights: dict[int, int]) -> str:
    template = compiled.template
    assert template is not None
    context = template.new_context(variables)
    assert isinstance(context, BoundedContext)
    context.budget = Budget(compiled.failures)
    context.budget.known = weights
    pieces, total = [], 0
    for piece in template.root_render_func(context):
        total += len(piece)
        if total > MAX_CHARS:
            raise LimitPassed(f"makes a text of more than {MAX_CHARS:,} characters")
        pieces.append(piece)
    return "".join(pieces)


def _messages(messages: Sequence[Mapping[str, Any]], weights: dict[int, int]) -> list[Any]:
    """Copies of the messages, prepared as in transformers."""
    plain = []
    total = 2
    for message in messages:
        if not isinstance(message, Mapping):
            raise TypeError(f"a message is a mapping, not {type(message).__name__}")
        copy = {key: value for key, value in message.items() if value is not None}
        said = next((copy[name] for name in _REASONING if name in copy), None)
        if said is not None:
            copy = {"thinking": said, **copy, "reasoning_content": said}
        copy = _plain(copy, weights)
        total += 4 + weights[id(copy)]
        plain.append(copy)
    weights[id(plain)] = total
    return plain


def _plain(value: Any, weights: dict[int, int]) -> Any:
    """A copy of a value in plain types; the weight of each container is noted by id.

    Objects of other types have methods that a template must not call; it sees the name of their
    type.
    """
    return _copy(value, weights)[0]


def _copy(value: Any, weights: dict[int, int]) -> tuple[Any, int]:
    kind = type(value)
    if kind is str:
        return value, len(value) + 2
    if value is None or kind in (bool, int, float):
        return value, 8
    if isinstance(value, Mapping):
        copy: Any = {}
        weight = 2
        for key, item in value.items():
            key, size = (key, len(key) + 2) if type(key) is str else _copy(key, weights)
            if type(item) is str:
                weight += size + len(item) + 6
            else:
                item, more = _copy(item, weights)
                weight += size + more + 4
            copy[key] = item
    elif isinstance(value, (list, tuple)):
        weight = 2
        copy = []
        for item in value:
            item, size = _copy(item, weights)
            weight += size + 4
            copy.append(item)
        if isinstance(value, tuple):
            copy = tuple(copy)
    else:
        for base in (str, int, float):
            if isinstance(value, base):
                return _copy(getattr(base, f"__{base.__name__}__")(value), weights)
        return _copy(f"<{kind.__name__}>", weights)
    weights[id(copy)] = weight
    return copy, weight


def _why(error: Exception, template: jinja2.Template | None) -> str:
    """One line about an exception of a template."""
    if isinstance(error, RaisedByTemplate):
        return _line(error)
    if isinstance(error, LimitPassed):
        return f"the template {error}{_place(error, template)}"
    if isinstance(error, RecursionError) or (isinstance(error, MemoryError) and template is None):
        return f"the template nests or calls itself too deeply{_place(error, template)}"
    if isinstance(error, MemoryError):  # not the compiler's, which is handled above
        return f"the template takes more memory than there is{_place(error, template)}"
    text = _line(error)
    if not isinstance(error, jinja2.TemplateError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"{text} (line {error.lineno} of the template)"
    return text + _place(error, template)


def _line(error: Exception) -> str:
    """The message of an exception without line breaks, cut if it is long."""
    try:
        Budget().expect(sum(map(weigh, error.args)))
        text = " ".join(str(error).splitlines())
    except Exception:
        return type(error).__name__
    return text if len(text) <= _MAX_MESSAGE else text[:_MAX_MESSAGE] + " ..."


def _place(error: BaseException, template: jinja2.Template | None) -> str:
    """The place in the template where an exception was raised, in words; "" if it is unknown."""
    line = None
    trace = error.__traceback__
    while template is not None and trace is not None:
        if trace.tb_frame.f_globals.get("environment") is template.environment:
            line = template.get_corresponding_lineno(trace.tb_lineno)
        trace = trace.tb_next
    return f" (line {line} of the template)" if line else ""
