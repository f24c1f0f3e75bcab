"""The chat settings of an adapter made of several, see `jaxpeft.methods.chat_settings`."""

import json
import warnings
from collections.abc import Sequence
from typing import Any

from jaxpeft.methods.adapter import Adapter, Label

_STOPS = "stop_ids"


def joined_chat(adapters: Sequence[Adapter]) -> Label:
    """The chat label of an adapter that is made of several.

    Tokens that end the learned turns of one of them end those of the result. Other settings are
    kept if all adapters agree on them; a disagreement is reported.

    Args:
        adapters: At least one; adapters without settings are ignored.
    """
    known: list[dict[str, Any]] = [json.loads(str(one.chat)) for one in adapters if one.chat]
    if not known:
        return Label("")
    first = known[0]
    names = dict.fromkeys(name for one in known for name in one if name != _STOPS)
    alike = {
        name: first[name]
        for name in names
        if all(one.get(name) == first.get(name) for one in known)
    }
    if odd := [name for name in names if name not in alike]:
        warnings.warn(
            f"adapters: they were taught to chat with different settings ({', '.join(odd)}), of "
            "which the result keeps none.",
            stacklevel=3,
        )
    stops = list(dict.fromkeys(token for one in known for token in one.get(_STOPS, [])))
    values = alike | ({_STOPS: stops} if stops else {})
    return Label(json.dumps(values, sort_keys=True, ensure_ascii=False) if values else "")
