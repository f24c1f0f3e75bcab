"""Classes with which every family reads and writes HF PEFT folders.

A family brings a `PeftFormat`: the name and keys of its ``adapter_config.json``, and functions that
convert between config and tensors and an adapter. Everything is strict: `Values` refuses wrong
types and unsupported settings, and `Tensors` accounts for every tensor.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxpeft.core import limits
from jaxpeft.core.errors import UserError, first_few
from jaxpeft.core.float32 import misfit
from jaxpeft.methods.adapter import Adapter
from jaxpeft.methods.peft.patterns import Selection

CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
FLOAT32_MAX = 3.4e38
PEFT_TARGETS = ("q_proj", "v_proj")
"""Modules that most PEFT methods adapt in Llama, Mistral and Qwen models by default."""
_OURS = {
    **dict.fromkeys(("r", "init_r", "target_r", "num_ranks"), "rank"),
    "encoder_hidden_size": "hidden_size",
    "num_cayley_neumann_terms": "terms",
    "num_virtual_tokens": "num_tokens",
    "oft_block_size": "block_size",
}
"""Names of counts in jaxpeft where PEFT's differ; for their limits."""
FLOATS = ("F32", "F16", "BF16")

COMMON: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "inference_mode": True,
    "peft_type": None,
    "peft_version": "0.21.0",
    "revision": None,
    "task_type": "CAUSAL_LM",
}
"""Keys of every ``adapter_config.json`` of PEFT 0.21, with their usual values."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftFormat:
    """How HF PEFT writes the adapters of one family.

    Attributes:
        type: PEFT's ``peft_type``, such as "LORA".
        defaults: Every further key that PEFT writes, with the value that changes nothing.
        read_keys: Keys that `read` understands.
        harmless_keys: Keys whose value does not change what a trained adapter computes, such as
            dropout that only PEFT has: it matters in training alone, and is not kept.
        read: ``read(values, tensors, base)`` returns the adapter; `base` is a `jaxpeft.Model`. It
            calls `Tensors.require` for all tensors before it reads one.
        write: ``write(adapter, base)`` returns the family's keys of the config that differ from
            `defaults`, and the tensors.
        config: ``config(values)`` returns the `Method` that the config describes; it refuses
            settings that the family's config class cannot express.
        title: The adapter's name on the model card, such as "LoRA adapter".
    """

    type: str
    defaults: Mapping[str, Any]
    read_keys: tuple[str, ...]
    harmless_keys: tuple[str, ...] = ()
    read: Callable[["Values", "Tensors", Any], Adapter]
    write: Callable[[Adapter, Any], tuple[dict[str, Any], dict[str, np.ndarray]]]
    config: Callable[["Values"], Any] | None = None
    title: str


FORMATS: dict[str, PeftFormat] = {}
"""Formats by ``peft_type``; `jaxpeft.register_method` adds to it."""


class Values:
    """An ``adapter_config.json``, read key by key; a wrong type is an error that names the key."""

    def __init__(self, values: Mapping[str, Any], file: Any, defaults: Mapping[str, Any]):
        self.values, self.file, self.defaults = values, file, defaults

    def get(self, key: str) -> Any:
        """The value without a check, or PEFT's default."""
        return self.values.get(key, self.defaults.get(key))

    def wrong(self, key: str, expected: str) -> UserError:
        """The error about a key's value."""
        return UserError(f"{self.file}: {key}: expected {expected}, got {self.get(key)!r:.60}.")

    def only(self, key: str, *allowed: Any) -> None:
        """Checks that a key has one of the allowed values.

        Raises:
            UserError: The key has another value.
        """
        if self.get(key) not in allowed:
            expected = " or ".join(json.dumps(value) for value in allowed)
            raise self.wrong(key, f"{expected}, as nothing else has a counterpart in jaxpeft")

    def probability(self, key: str) -> float:
        """A number in [0, 1).

        Raises:
            UserError: The key has another value.
        """
        value = self.number(key)
        if not 0.0 <= value < 1.0:
            raise self.wrong(key, "a probability in [0, 1)")
        return float(value)

    def number(self, key: str) -> int | float:
        """A finite number that float32 holds.

        Raises:
            UserError: The key has another value.
        """
        return self._number(key, self.get(key))

    def count(self, key: str, least: int = 1) -> int:
        """A whole number of at least `least`.

        Raises:
            UserError: The key has another value.
        """
        return self._count(key, self.get(key), least)

    def flag(self, key: str) -> bool:
        """True or false.

        Raises:
            UserError: The key has another value.
        """
        if not isinstance(value := self.get(key), bool):
            raise self.wrong(key, "true or false")
        return value

    def names(self, key: str, empty: Any = ()) -> str | tuple[str, ...]:
        """A regex, or a list of names; `empty` if the value is null.

        Raises:
            UserError: The key has another value.
        """
        value = self.get(key)
        if value is None:
            return empty
        if isinstance(value, str):
            self._require_regex(value, key)
            return value
        if not isinstance(value, list | tuple) or not all(isinstance(i, str) for i in value):
            raise self.wrong(key, "a string or a list of strings")
        return tuple(value)

    def ints(self, key: str) -> tuple[int, ...] | None:
        """A tuple of whole numbers, from one number or a list of them; None for null.

        Raises:
            UserError: The key has another value.
        """
        value = self.get(key)
        if value is None:
            return None
        value = [value] if type(value) is int else value
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise self.wrong(key, "a whole number or a list of them")
        return tuple(value)

    def pattern(self, key: str, *, whole: bool) -> dict[str, Any]:
        """A dict from names or regexes to numbers; if `whole`, to whole numbers of at least 1.

        Raises:
            UserError: The key has another value.
        """
        value = self.get(key) or {}
        if not isinstance(value, dict):
            raise self.wrong(key, "an object of names and numbers")
        check = self._count if whole else self._number
        for name in value:
            self._require_regex(name, key)
        return {name: check(key, item) for name, item in value.items()}

    def selection(self, default: str | tuple[str, ...] = PEFT_TARGETS) -> Selection:
        """The modules that the config adapts; `default` if it names none.

        Raises:
            UserError: A key has another type, or a regex is malformed.
        """
        layers, pattern = self.ints("layers_to_transform"), self.names("layers_pattern")
        for name in pattern:
            self._require_regex(name, "layers_pattern")
        return Selection(
            targets=self.names("target_modules", default),
            exclude=self.names("exclude_modules"),
            layers=layers or None,
            layers_pattern=(pattern,) if isinstance(pattern, str) else pattern,
        )

    def _number(self, key: str, value: Any) -> int | float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(key, "a number")
        if not abs(value) <= FLOAT32_MAX:
            raise self.wrong(key, "a finite number")
        if text := misfit(value):
            raise UserError(f"{self.file}: {key}: {text}.")
        return value

    def _count(self, key: str, value: Any, least: int = 1) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.wrong(key, f"a whole number of at least {least}")
        if text := limits.exceeds(_OURS.get(key, key), value):
            raise UserError(f"{self.file}: {key}: {text}.")
        return value

    def _require_regex(self, pattern: str, key: str) -> None:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(
                f"{self.file}: {key}: {pattern!r} is not a valid regex: {error}."
            ) from None


def require_supported(values: Mapping[str, Any], file: Any, peft: PeftFormat) -> None:
    """Checks that all settings of a config are known and supported.

    Args:
        values: The config.
        file: Its file, for messages.
        peft: The format that the config belongs to.

    Raises:
        UserError: A setting is unknown, or has a value that means something unsupported.
    """
    task = values.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise UserError(f"{file}: task_type: only 'CAUSAL_LM' is supported, got {task!r}.")
    known = {*COMMON, *peft.read_keys, *peft.harmless_keys, "runtime_config"}
    unsupported, unknown = [], []
    for key, value in values.items():
        if key in known or not value or value == peft.defaults.get(key):
            continue
        (unsupported if key in peft.defaults else unknown).append(f"{key}={json.dumps(value)[:60]}")
    if unsupported:
        raise UserError(f"{file}: not supported yet: {first_few(unsupported)}.")
    if unknown:
        raise UserError(
            f"{file}: unknown settings: {first_few(unknown)}; a newer PEFT may have written them. "
            "Remove those that do not change what the adapter computes."
        )


class Tensors:
    """The tensors of an ``adapter_model.safetensors``; nothing is read before `require`.

    Attributes:
        file: Their file, for errors.
        shapes: Shape by key.
        dtypes: Dtype by key, as safetensors calls it.
    """

    def __init__(
        self,
        file: Any,
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, str],
        read: Callable[[str], np.ndarray],
    ):
        self.file, self.shapes, self.dtypes, self._read = file, dict(shapes), dict(dtypes), read

    def require(self, wanted: Mapping[str, Sequence[int]], base_name: str) -> None:
        """Checks that the file holds exactly these tensors.

        Args:
            wanted: Shape by key.
            base_name: The name of the base, for messages.

        Raises:
            UserError: Tensors are missing, unexpected, of another shape, or not floats.
        """
        self._require_there(wanted, base_name)
        extra = sorted(self.shapes.keys() - wanted.keys())
        if extra:
            raise UserError(
                f"{self.file}: {len(extra)} unexpected tensors: {first_few(extra, 3)}; "
                f"{CONFIG} and the base {base_name!r} have no place for them."
            )
        self.require_some(wanted, base_name)

    def require_some(self, wanted: Mapping[str, Sequence[int]], base_name: str) -> None:
        """Checks that the file holds these tensors; it may hold others. See `require`.

        Raises:
            UserError: Tensors are missing, of another shape, or not floats.
        """
        self._require_there(wanted, base_name)
        wrong = [
            f"{key} is {list(self.shapes[key])}, expected {list(shape)}"
            for key, shape in wanted.items()
            if self.shapes[key] != tuple(shape)
        ]
        if wrong:
            raise UserError(
                f"{self.file}: {len(wrong)} tensors do not fit {CONFIG} or the base "
                f"{base_name!r}: {first_few(wrong, 3)}; the adapter was made for another model."
            )
        self.require_floats(wanted)

    def _require_there(self, wanted: Iterable[str], base_name: str) -> None:
        missing = [key for key in wanted if key not in self.shapes]
        if missing:
            raise UserError(
                f"{self.file}: {len(missing)} tensors are missing: {first_few(missing, 3)}; the "
                f"file is incomplete, or made for another base than {base_name!r}."
            )

    def require_floats(self, keys: Iterable[str]) -> None:
        """Checks that tensors hold float32, float16 or bfloat16.

        Raises:
            UserError: A tensor has another dtype.
        """
        odd = [f"{key} is {self.dtypes[key]}" for key in keys if self.dtypes[key] not in FLOATS]
        if odd:
            raise UserError(
                f"{self.file}: {len(odd)} tensors of an unsupported dtype (supported: "
                f"{', '.join(FLOATS)}): {first_few(odd, 3)}."
            )

    def raw(self, key: str) -> np.ndarray:
        """One tensor in its own dtype."""
        return self._read(key)

    def read(self, key: str) -> np.ndarray:
        """Reads one tensor as float32.

        Raises:
            UserError: A value is not finite.
        """
        value = self.raw(key).astype(np.float32)
        if count := int(np.count_nonzero(~np.isfinite(value))):
            raise UserError(
                f"{self.file}: {key.removeprefix(PREFIX)}: {count} of {value.size} values are not "
                "finite; the adapter is damaged or its training diverged."
            )
        return value
