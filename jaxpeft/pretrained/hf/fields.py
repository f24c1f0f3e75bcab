"""The fields of a ``config.json``, read one by one; a wrong type is an error that names it."""

import sys
from typing import Any

from jaxpeft.core import limits
from jaxpeft.core.errors import UserError

OURS = {
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "num_hidden_layers": "num_layers",
    "max_window_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
}
"""Names of sizes in `ModelConfig`."""


class Fields:
    """A dict whose getters check values and name the field in errors."""

    def __init__(self, d: dict, where: str, prefix: str = ""):
        self.d, self.where, self.prefix = d, where, prefix

    def error(self, key: str, text: str) -> UserError:
        """The error about a field."""
        return UserError(f"{self.where}: {self.prefix}{key}: {text}")

    def get(self, key: str, default: Any = None) -> Any:
        """The value without a check; `default` if the field is missing or null."""
        value = self.d.get(key)
        return default if value is None else value

    def size(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A whole number from `least` up to the limit in `jaxpeft.core.limits`.

        Raises:
            UserError: The field has another value.
        """
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            what = "a positive whole number" if least else "a whole number of at least 0"
            raise self.error(key, f"expected {what}, got {value!r:.60}")
        most = limits.size_of_model(OURS.get(key, key))
        if value > most:
            raise self.error(key, f"at most {most:,} is supported, got {limits.number(value)}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive, finite number.

        Raises:
            UserError: The field has another value.
        """
        value = self.get(key, default)
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        if not numeric or not 0 < value <= sys.float_info.max:  # excludes NaN and infinity
            raise self.error(key, f"expected a positive number, got {value!r}")
        return float(value)

    def flag(self, key: str) -> bool:
        """True or false; false if the field is missing.

        Raises:
            UserError: The field has another value.
        """
        value = self.get(key, False)
        if not isinstance(value, bool):
            raise self.error(key, f"expected true or false, got {value!r}")
        return value

    def token(self, key: str) -> int | None:
        """A token id; None if the field is missing or negative.

        Raises:
            UserError: The field has another value.
        """
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, f"expected a token id, got {value!r}")
        return None if value < 0 else value

    def tokens(self, key: str) -> tuple[int, ...]:
        """One token id or a list of them, each once."""
        value = self.get(key)
        values = value if isinstance(value, list) else [value]
        found = [Fields({key: v}, self.where, self.prefix).token(key) for v in values]
        return tuple(dict.fromkeys(v for v in found if v is not None))
