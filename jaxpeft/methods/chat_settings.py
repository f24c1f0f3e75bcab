"""The chat settings of an adapter's training, which generation must use too.

The settings travel with the adapter: in memory as a label (they never affect compilation) and on
disk as ``chat`` in ``jaxpeft.json``.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxpeft.core.errors import UserError
from jaxpeft.methods.adapter import Adapter, Label
from jaxpeft.methods.binding import adapters_of
from jaxpeft.methods.chat_label import joined_chat


@dataclasses.dataclass(frozen=True)
class ChatSettings:
    """The settings of the chats that an adapter learned from.

    Attributes:
        template: The text of a chat template that replaces the tokenizer's; "" for the tokenizer's
            own.
        arguments: Values passed to the template with every conversation
            (``data.chat_template_kwargs``).
        stop_ids: Ids of the tokens that ended learned turns; generation stops there too.
        learn: Which turns were learned (``data.learn``); "" for the default.
        end_of_turn: What ended them (``data.end_of_turn``); "" for the default.
        special_tokens_in_content: Whether contents may hold special tokens; "" for the default.
    """

    template: str = ""
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    stop_ids: tuple[int, ...] = ()
    learn: str = ""
    end_of_turn: str = ""
    special_tokens_in_content: str = ""

    def to_values(self) -> dict[str, Any]:
        """The settings as JSON values; empty if all are the defaults."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values |= {"arguments": dict(self.arguments), "stop_ids": list(self.stop_ids)}
        return {name: value for name, value in values.items() if value}

    @classmethod
    def from_values(cls, values: Any, where: str) -> "ChatSettings":
        """The settings that `to_values` wrote.

        Args:
            values: JSON values.
            where: The place that holds them, for errors.

        Raises:
            UserError: If they are no such settings.
        """
        known = {field.name: str for field in dataclasses.fields(cls)}
        known |= {"arguments": dict, "stop_ids": list}
        if not isinstance(values, dict):
            raise UserError(f"{where}: chat: expected an object.")
        for name, value in values.items():
            if name not in known:
                raise UserError(f"{where}: chat.{name}: unknown; update jaxpeft.")
            if not isinstance(value, known[name]):
                raise UserError(f"{where}: chat.{name}: has the wrong type.")
        stops = values.get("stop_ids", [])
        if not all(type(token) is int and token >= 0 for token in stops):
            raise UserError(f"{where}: chat.stop_ids: expected ids of tokens.")
        return cls(**{**values, "stop_ids": tuple(stops)})

    def label(self) -> Label:
        """The settings as the label that an adapter carries."""
        values = self.to_values()
        return Label(json.dumps(values, sort_keys=True, ensure_ascii=False) if values else "")


def chat_of(adapter: Adapter | Sequence[Adapter] | None) -> ChatSettings:
    """The chat settings of an adapter, or of several together; empty settings if there are none."""
    text = "" if adapter is None else str(joined_chat(adapters_of(adapter)))
    return ChatSettings.from_values(json.loads(text), "the adapter") if text else ChatSettings()
