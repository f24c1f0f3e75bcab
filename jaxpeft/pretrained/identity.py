"""The identity of a base apart from its weights: config, tokenizer and chat template.

Together with the fingerprint of the weights (`jaxpeft.pretrained.weights.fingerprint`) they
identify what an adapter or a run was trained on. The values of the config are stored, so that a
change can be reported with both values; of the tokenizer and the template a sha256 is stored:

* **config**: the fields of `ModelConfig`, which are all that a model uses of its ``config.json``;
* **tokenizer**: how it encodes, not its files: its backend's JSON in a canonical form, and the ids
  of the tokens that begin and end a text;
* **chat template**: its text.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from jaxpeft.core.errors import first_few
from jaxpeft.models.config import ModelConfig, RopeScaling

_SETTINGS = ("padding", "truncation", "version")
"""Settings that depend on calls and versions, and do not affect how a text is encoded."""
_PLAIN_PROCESSOR = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {},
}
"""A processor that adds nothing, which equals none."""


@dataclasses.dataclass(frozen=True)
class Identity:
    """The identity of a base, apart from its weights.

    Attributes:
        config: Fields of its config; empty if unknown.
        tokenizer: sha256 of how its tokenizer encodes; "" if unknown.
        chat_template: sha256 of its chat template; "" for none, or if unknown.
    """

    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tokenizer: str = ""
    chat_template: str = ""

    def to_values(self) -> dict[str, Any]:
        """The identity as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_values(cls, values: Any) -> "Identity":
        """Reads the values of `to_values`; those missing or of a wrong type are unknown."""
        values = values if isinstance(values, Mapping) else {}
        config = values.get("config")
        texts = (str(values.get(name) or "") for name in ("tokenizer", "chat_template"))
        return cls(config if isinstance(config, Mapping) else {}, *texts)

    @classmethod
    def is_whole(cls, values: Mapping[str, Any]) -> bool:
        """Whether JSON values hold all of an identity, or none of it as in older versions."""
        kinds = {"config": dict, "tokenizer": str, "chat_template": str}
        there = [isinstance(values[name], kind) for name, kind in kinds.items() if name in values]
        return not there or (len(there) == len(kinds) and all(there) and bool(values["config"]))

    @property
    def known(self) -> bool:
        """Whether there is anything to compare."""
        return bool(self.config)


def identity_of(config: ModelConfig, tokenizer: Any, template: str = "") -> Identity:
    """The identity of a base.

    Args:
        config: Its config.
        tokenizer: Its tokenizer, or None.
        template: A chat template that is used in place of the tokenizer's; "" for none.
    """
    own = getattr(tokenizer, "chat_template", None)
    return Identity(
        json.loads(json.dumps(dataclasses.asdict(config))),
        tokenizer_hash(tokenizer),
        template_hash(template or own),
    )


def config_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The fields of two configs that differ, such as ``rope_theta from 10000.0 to 500000.0``.

    A field that one of them does not have counts with its default, so that a version with one more
    field finds no difference.
    """
    fields = {field.name: field for field in dataclasses.fields(ModelConfig)}
    names = dict.fromkeys([*fields, *before, *now])
    return [
        text
        for name in names
        for text in _compare(name, _value(before, fields, name), _value(now, fields, name))
    ]


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of how a tokenizer encodes; "" for none, or without a fast backend."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return ""
    values = json.loads(backend.to_str())
    for name in _SETTINGS:
        values.pop(name, None)
    if values.get("post_processor") == _PLAIN_PROCESSOR:
        del values["post_processor"]
    model = values.get("model")
    if isinstance(model, dict) and isinstance(model.get("merges"), list):
        model["merges"] = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    ends = {name: getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id")}
    return _digest({"backend": _without_defaults(values), **ends})


def template_hash(template: Any) -> str:
    """sha256 of a chat template, or of several named ones; "" for none."""
    return _digest(template) if template else ""


def _value(config: Mapping[str, Any], fields: Mapping[str, Any], name: str) -> Any:
    if name in config or name not in fields:
        return config.get(name)
    default = fields[name].default
    return None if default is dataclasses.MISSING else json.loads(json.dumps(default))


def _compare(name: str, before: Any, now: Any) -> Iterator[str]:
    """Compares the parts of a rotary scaling separately, and everything else as one value."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        fields = {field.name: field for field in dataclasses.fields(RopeScaling)}
        for key in dict.fromkeys([*before, *now]):
            one, other = (_value(side, fields, key) for side in (before, now))
            yield from _compare(f"{name}.{key}", one, other)
    elif before != now:
        yield f"{name} from {_show(before)} to {_show(now)}"


def _show(value: Any) -> str:
    return (
        f"[{first_few([str(item) for item in value], 4)}]"
        if isinstance(value, list)
        else repr(value)
    )


def _without_defaults(value: Any) -> Any:
    """Drops null, false and empty values in objects, which other versions leave out."""
    if isinstance(value, dict):
        pairs = {key: _without_defaults(item) for key, item in value.items()}
        return {
            key: item for key, item in pairs.items() if item or (item == 0 and item is not False)
        }
    return [_without_defaults(item) for item in value] if isinstance(value, list) else value


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
