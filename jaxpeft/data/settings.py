"""The ``data`` section of a config."""

import dataclasses
import typing
from typing import Literal

from jaxpeft.records import Record

OnLong = Literal["error", "drop", "truncate"]
OnBadRow = Literal["error", "drop"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Record):
    """Which rows to learn from, and how they become sequences.

    Attributes:
        train: A ``.jsonl`` or ``.json`` file of rows, on disk or in a bucket (``gs://``).
        eval: Another one, of held-out rows.
        max_length: Tokens of a sequence.
        packing: Whether short rows share a sequence.
        on_long: What to do with rows of more than `max_length` tokens.
        on_bad_row: What to do with rows that cannot be used; dropped ones are counted.
        workers: Processes that prepare batches; 0 reads ahead with threads. Processes import
            the main script again, which must then be guarded by ``__name__ == "__main__"``.
    """

    train: str
    eval: str | None = None
    max_length: int = 512
    packing: bool = True
    on_long: OnLong = "error"
    on_bad_row: OnBadRow = "error"
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
        for field, choices in (("on_long", OnLong), ("on_bad_row", OnBadRow)):
            known, value = typing.get_args(choices), getattr(self, field)
            if value not in known:
                raise ValueError(
                    f"DataConfig.{field} must be one of {', '.join(known)}, got {value!r}."
                )
