"""One kind of chat template, with what a model of that kind says, written down by hand.

The tokenizers read bytes, so that every text is encoded; two merges, of a blank with "b" and of
two new lines, make texts that grow together where they meet. Each kind's own tokens are added.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

MERGES = [("Ġ", "b"), ("Ċ", "Ċ")]


def keep(text: str) -> str:
    """Templates that write a text as it is."""
    return text


def call_json(name: str, arguments: dict[str, Any], key: str = "arguments") -> str:
    """A call as JSON, as ``tojson`` of transformers writes it."""
    return f'{{"name": "{name}", "{key}": {json.dumps(arguments, ensure_ascii=False)}}}'


@dataclasses.dataclass(frozen=True)
class Kind:
    """A chat template and the answers it stands for.

    Attributes:
        name: Of the kind.
        like: Real families whose templates are of this kind.
        template: The template's text, or texts by name.
        end: The token that ends an answer.
        eos: The tokenizer's eos token, "" for none.
        bos: The tokenizer's bos token, "" for none.
        special: Further tokens that are flagged special.
        added: Tokens that are added without that flag.
        arguments: What rows of this kind hand to the template.
        front: What stands before an answer that has no thinking.
        thought: How thinking stands before an answer, with {} for it. None where it is refused.
        content: How an answer's text stands, with {} for it.
        behind: What stands between an answer and its end.
        trim: What the template does to an answer's text.
        call: How one tool call is said, of its name and arguments. None where calls are refused.
        joined: What stands between two calls of a turn; None where only one may be made.
        talks: Whether a turn with calls may have a text as well.
        end_of_call: The token behind tool calls; `end` where it is "".
        system: What happens to a system text: "own", "raises" or "dropped".
        users: Whether two user turns may stand in a row.
        tools: Whether schemas of tools are rendered.
        documents: Whether documents are rendered.
        inline: What becomes of thinking inside the content: "thought" where it is the same as
            thinking by key, "text" where it is text like any other, "refused".
        loose: Whether blanks beside tags of thinking are left to the trainer, since the template
            never writes thinking.
        names: Words that an error about thinking must contain.
    """

    name: str
    like: str
    template: str | dict[str, str]
    end: str
    eos: str
    bos: str = ""
    special: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    front: str = ""
    thought: str | None = None
    content: str = "{}"
    behind: str = ""
    trim: Callable[[str], str] = keep
    call: Callable[[str, dict[str, Any]], str] | None = None
    joined: str | None = None
    talks: bool = False
    end_of_call: str = ""
    system: str = "own"
    users: bool = True
    tools: bool = False
    documents: bool = False
    inline: str = "text"
    loose: bool = False
    names: tuple[str, ...] = ("thinking",)

    def said(self, text: str, thinking: str | None = None, calls: Sequence[tuple] = ()) -> str:
        """What the model of this kind says in one turn, its stop token included.

        Args:
            text: The answer's text; "" for none.
            thinking: What it thinks before.
            calls: Name and arguments of tool calls.

        Returns:
            The text of the learned span.
        """
        front = self.front
        if thinking is not None:
            assert self.thought is not None
            front = self.thought.replace("{}", thinking)
        words = self.content.replace("{}", self.trim(text)) if text or not calls else ""
        if not calls:
            return front + words + self.behind + self.ends()
        assert self.call is not None
        said = [self.call(name, arguments) for name, arguments in calls]
        assert len(said) == 1 or self.joined is not None
        between = (self.joined or "") if words else ""
        return front + words + between + (self.joined or "").join(said) + self.ends(calls)

    def ends(self, calls: Sequence[tuple] = ()) -> str:
        """The token that ends a turn with these calls."""
        return (calls and self.end_of_call) or self.end


def add_tokens(tokenizer: Any, kind: Kind) -> None:
    """Adds a kind's tokens, and takes its template, eos and bos."""
    from transformers import AddedToken

    special = dict.fromkeys((kind.end, kind.end_of_call, kind.eos, kind.bos, *kind.special))
    tokens = [AddedToken(name, special=True, normalized=False) for name in special if name]
    tokens += [AddedToken(name, special=False, normalized=False) for name in kind.added]
    tokenizer.add_tokens(tokens)
    tokenizer.eos_token = kind.eos or None
    tokenizer.bos_token = kind.bos or None
    tokenizer.chat_template = kind.template


@functools.cache
def _letters() -> list[str]:
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def tokenizer_of(kind: Kind) -> Any:
    """A tokenizer of bytes with a kind's tokens and template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [*_letters(), *(left + right for left, right in MERGES)]
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False
    )
    add_tokens(tokenizer, kind)
    return tokenizer


def spans_of(mask: Sequence[bool]) -> list[tuple[int, int]]:
    """Start and end of every stretch that is learned."""
    edges = [False, *map(bool, mask), False]
    at = [i for i in range(len(edges) - 1) if edges[i] != edges[i + 1]]
    return list(zip(at[::2], at[1::2], strict=True))


def shown(tokenizer: Any, ids: Sequence[int], mask: Sequence[bool]) -> str:
    """The text of an example, with what is learned in square brackets of their own kind.

    The brackets are ⟦ and ⟧, since templates write [INST].
    """
    text, at = "", 0
    for start, end in spans_of(mask):
        text += tokenizer.decode(ids[at:start]) + "⟦" + tokenizer.decode(ids[start:end]) + "⟧"
        at = end
    return text + tokenizer.decode(ids[at:])
