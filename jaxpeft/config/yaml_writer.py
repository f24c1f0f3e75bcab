"""Writes a config as YAML that reads back to the same config."""

import math
import re
from typing import Any

import yaml

from jaxpeft.config.schema import to_plain


def dumps(config: Any) -> str:
    """A config as YAML with every default written out; `loads` reads it back.

    Lists of numbers, which may be long, are on one line each.
    """
    return yaml.dump(
        to_plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf
    )


class _Dumper(yaml.SafeDumper):
    """Quotes every text that is not plain printable ASCII."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = None if re.fullmatch(r"[ -~]+", text) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _represent_list(dumper: yaml.SafeDumper, items: list) -> yaml.Node:
    numbers = all(type(item) in (int, float) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=numbers)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(list, _represent_list)
