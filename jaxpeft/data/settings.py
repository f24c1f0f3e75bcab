"""The ``data`` section of a config."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, Literal

from jaxpeft.core.frozen_map import FrozenMap
from jaxpeft.core.records import Record
from jaxpeft.data.rows.checks import check_arguments

OnLong = Literal["error", "drop", "truncate"]
OnBadRow = Literal["error", "drop"]
Learn = Literal["assistant", "last_message", "last_exchange", "all"]
EndOfTurn = Literal["template", "eos"]
SpecialTokens = Literal["error", "allow"]
Argument = bool | int | float | str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """Which turns of a row are learned, and how its chat template is called.

    Attributes:
        learn: Which turns are learned, see `DataConfig`.
        end_of_turn: The token that ends a learned turn, see `DataConfig`.
        special_tokens_in_content: See `DataConfig`.
        chat_template_kwargs: Variables of the template for all rows; a row's own override them.
        stop_ids: Tokens that end generation, from the model's config.
    """

    learn: Learn = "assistant"
    end_of_turn: EndOfTurn = "template"
    special_tokens_in_content: SpecialTokens = "error"
    chat_template_kwargs: Mapping[str, Any] = FrozenMap()
    stop_ids: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Record):
    """Which rows to learn from, and how they become sequences.

    Attributes:
        train: A ``.jsonl`` or ``.json`` file of rows, on disk or in a bucket (``gs://``).
        eval: A file of held-out rows.
        max_length: The length of a sequence, in tokens.
        packing: Whether short rows share a sequence.
        on_long: What to do with rows of more than `max_length` tokens.
        on_bad_row: What to do with rows that cannot be used; dropped ones are counted.
        learn: Which turns of a row are learned: "assistant" (every assistant turn, or the
            completion), "last_message" (the last of them), "last_exchange" (those after the last
            user message), or "all" (in rows of prompt and completion texts, the prompt too). A
            message with ``weight: 0`` is never learned.
        end_of_turn: What ends a learned turn: "template" (the token that the chat template
            writes), or "eos" (the tokenizer's end token, for templates that write none).
        special_tokens_in_content: "error" refuses messages whose text holds special tokens, which
            the model would read as markup; "allow" learns them.
        chat_template_kwargs: Variables for the chat template, such as ``enable_thinking: false``;
            a row's own override them. They are saved with the adapter, and generation uses them.
        workers: Processes that prepare batches; 0 reads ahead with threads. Processes import
            the main script again, which must then be guarded by ``__name__ == "__main__"``.
    """

    train: str
    eval: str | None = None
    max_length: int = 512
    packing: bool = True
    on_long: OnLong = "error"
    on_bad_row: OnBadRow = "error"
    learn: Learn = "assistant"
    end_of_turn: EndOfTurn = "template"
    special_tokens_in_content: SpecialTokens = "error"
    chat_template_kwargs: Mapping[str, Argument] = FrozenMap()
    workers: int = 0

    def __post_init__(self):
        if not self.train:
            raise ValueError("DataConfig.train must name a file, got an empty text.")
        if self.eval == "":
            raise ValueError("DataConfig.eval must name a file or be null, got an empty text.")
        if self.max_length < 2:
            raise ValueError(f"DataConfig.max_length must be at least 2, got {self.max_length}.")
        if self.workers < 0:
            raise ValueError(f"DataConfig.workers must be at least 0, got {self.workers}.")
        choices_of = {
            "on_long": OnLong,
            "on_bad_row": OnBadRow,
            "learn": Learn,
            "end_of_turn": EndOfTurn,
            "special_tokens_in_content": SpecialTokens,
        }
        for field, choices in choices_of.items():
            known, value = typing.get_args(choices), getattr(self, field)
            if value not in known:
                raise ValueError(
                    f"DataConfig.{field} must be one of {', '.join(known)}, got {value!r}."
                )
        object.__setattr__(self, "chat_template_kwargs", FrozenMap(self.chat_template_kwargs))
        problems = check_arguments("DataConfig.chat_template_kwargs", self.chat_template_kwargs)
        if problems:
            raise ValueError(f"{problems[0]}.")

    def reading(self, stop_ids: tuple[int, ...] = ()) -> Reading:
        """How rows are read by this config.

        Args:
            stop_ids: Tokens that end generation, from the model's config.
        """
        return Reading(
            learn=self.learn,
            end_of_turn=self.end_of_turn,
            special_tokens_in_content=self.special_tokens_in_content,
            chat_template_kwargs=self.chat_template_kwargs,
            stop_ids=stop_ids,
        )
