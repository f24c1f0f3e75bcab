"""What the tests of the config share."""

import dataclasses
from collections.abc import Mapping

from jaxpeft.config.schema import Schema
from jaxpeft.config.yaml_reader import loads
from jaxpeft.core.frozen_map import FrozenMap

SMALL = """\
model: {path: base}
method: {name: lora}
data: {train: train.jsonl, eval: test.jsonl}
train: {steps: 20}
output_dir: out
"""


@dataclasses.dataclass(frozen=True)
class Values:
    text: str = ""
    maybe: str | None = None
    number: float = 0.0
    count: int = 0
    flag: bool = False
    names: str | tuple[str, ...] = ()
    ranks: Mapping[str, int] = FrozenMap()
    alphas: Mapping[str, float] = FrozenMap()


def value(key, text):
    return getattr(loads(Schema(Values), f"{key}: {text}\n", "v.yaml"), key)
