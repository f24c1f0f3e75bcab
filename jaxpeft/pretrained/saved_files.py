"""The files that a saved model takes over from its base, apart from weights.

Tokenizer and generation settings are copied byte by byte. Two things may change: the tokens that
end generation, if an adapter learned to stop at others, and the chat template, if another one is
used. Keys of ``config.json`` that this library does not interpret are kept.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

from jaxpeft.core.errors import UserError
from jaxpeft.files.companions import GENERATION, find_companions, read_companions
from jaxpeft.files.json_file import read_json
from jaxpeft.files.locate import locate_again
from jaxpeft.files.storage import StoragePath
from jaxpeft.methods.chat_settings import ChatSettings
from jaxpeft.models.config import ModelConfig
from jaxpeft.pretrained.model import Model
from jaxpeft.pretrained.tokenizer import has_tokenizer, read_tokenizer
from jaxpeft.pretrained.tokenizer_files import same_tokens, to_json, tokenizer_files, with_template

_TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Keys of a base's config.json that a saved model must not have: its path, code that is not copied,
# and the quantisation of weights that are no longer quantised.
_NOT_KEPT = ("_name_or_path", "auto_map", "quantization_config", "_attn_implementation")
# Keys that are written only because transformers needs them; the base's value takes precedence.
_OF_BASE = ("use_cache", "attention_dropout")


@dataclasses.dataclass(frozen=True)
class SavedFiles:
    """The files in a model folder beside the weights.

    Attributes:
        files: Content by name within the folder.
        settings: The base's ``config.json``; empty if there is none.
        notes: Notes for the user, a line each.
    """

    files: Mapping[str, bytes]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


def made_files(config: ModelConfig, tokenizer: Any = None) -> SavedFiles:
    """The files for a model that was not loaded from a Hugging Face folder."""
    ids = dict(zip(_TOKEN_KEYS, _token_ids(config), strict=True))
    generation = {"_from_model_config": True} | {k: v for k, v in ids.items() if v is not None}
    files = {} if tokenizer is None else tokenizer_files(tokenizer)
    return SavedFiles({GENERATION: to_json(generation), **files})


def files_for(base: Model, chat: ChatSettings | None = None) -> SavedFiles:
    """The files for a model that was loaded, with the settings that an adapter needs to chat.

    Args:
        base: The `jaxpeft.Model`. If its tokenizer was changed after loading, the changes are
            saved.
        chat: The chat settings of the adapter that is merged into it.

    Raises:
        UserError: A file cannot be read, or is a link out of the base's folder.
        StoreError: The store refuses or does not answer.
    """
    chat = chat or ChatSettings()
    place = locate_again(base.name, base.revision or None) if base.name else None
    if place is not None and place.suffix != ".gguf":
        saved = _copied(place, base.tokenizer)
    else:
        saved = made_files(base.config, base.tokenizer)
        if base.name and place is None:
            note = f"{base.name}: is not there any more; its tokenizer is written anew"
            saved = dataclasses.replace(saved, notes=(note,))
    files, notes = dict(saved.files), list(saved.notes)
    if chat.template:
        files = with_template(files, chat.template)
    content, added = with_stops(files.get(GENERATION), base.config, chat.stop_ids)
    if content is not None and added:
        files[GENERATION] = content
        notes.append(_say_stops(added, base.tokenizer))
    if chat.arguments:
        shown = ", ".join(f"{name}={value!r}" for name, value in chat.arguments.items())
        notes.append(
            f"the adapter was taught with {shown}, which a template is given anew each time: pass "
            "the same to apply_chat_template"
        )
    return SavedFiles(files, saved.settings, tuple(notes))


def check_copied(path: str, revision: str | None = None) -> None:
    """Checks whether the files of a base can be copied, for a run that will end with a copy.

    Raises:
        UserError: A file is a link out of the base's folder.
        StoreError: The store refuses or does not answer.
    """
    place = locate_again(path, revision)
    if place is not None and place.suffix != ".gguf":
        find_companions(place)


def with_stops(
    content: bytes | None, config: ModelConfig, stops: Iterable[int]
) -> tuple[bytes | None, tuple[int, ...]]:
    """A ``generation_config.json`` with further tokens at which generation stops.

    Args:
        content: The content of the file; None if there is none.
        config: The architecture of the model, with the tokens at which it stops already.
        stops: Ids of tokens at which it has to stop.

    Returns:
        The content, unchanged if no token is missing, and the ids that were added.

    Raises:
        UserError: A token is outside the vocabulary.
    """
    stops = tuple(dict.fromkeys(stops))
    for token in stops:
        if not 0 <= token < config.vocab_size:
            raise UserError(
                f"the adapter's stop token {token} is outside the vocabulary of "
                f"{config.vocab_size}; it was made for another model"
            )
    settings = {} if content is None else json.loads(content)
    here = settings.get("eos_token_id", None if content is not None else _token_ids(config)[1])
    here = [] if here is None else here if isinstance(here, list) else [here]
    if set(stops) <= set(here):
        return content, ()
    ends = [*dict.fromkeys((*here, *config.eos_token_ids, *stops))]
    if content is None:
        ids = dict(zip(_TOKEN_KEYS, _token_ids(config), strict=True))
        settings = {name: token for name, token in ids.items() if token is not None}
    # With this key, transformers would use the end tokens of config.json instead.
    settings.pop("_from_model_config", None)
    settings["eos_token_id"] = ends
    return to_json(settings), tuple(token for token in stops if token not in here)


def join_settings(ours: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """The ``config.json`` of a saved model: the current settings, and further keys of the base's.

    Args:
        ours: The current values of all settings that this library interprets.
        base: The ``config.json`` of the base; empty if there is none.
    """
    kept = {
        name: value
        for name, value in base.items()
        if (name not in ours or name in _OF_BASE) and name not in _NOT_KEPT
    }
    if "torch_dtype" in kept:  # the old name in transformers
        kept["torch_dtype"] = ours["dtype"]
    return {**ours, **kept}


def _copied(place: StoragePath, tokenizer: Any) -> SavedFiles:
    """The files of a folder, with changes that were made to its tokenizer after loading."""
    files, settings = read_companions(place), read_json(place / "config.json")
    if tokenizer is None:
        return SavedFiles(files, settings)
    again = read_tokenizer(place) if has_tokenizer(place) else None
    if again is None or not same_tokens(tokenizer, again):
        generation = {GENERATION: files[GENERATION]} if GENERATION in files else {}
        note = f"{place}: the tokenizer has other tokens than these files; it is written anew"
        return SavedFiles({**tokenizer_files(tokenizer), **generation}, settings, (note,))
    template = tokenizer.chat_template
    if isinstance(template, str) and template != again.chat_template:
        files = with_template(files, template)
    return SavedFiles(files, settings)


def _token_ids(config: ModelConfig) -> tuple[int | None, int | list[int] | None, int | None]:
    """The values of `_TOKEN_KEYS`."""
    ends = list(config.eos_token_ids)
    return config.bos_token_id, ends[0] if len(ends) == 1 else ends or None, config.pad_token_id


def _say_stops(added: tuple[int, ...], tokenizer: Any) -> str:
    """The note about stop tokens that the base does not have."""
    names = [
        str(token) if tokenizer is None else f"{tokenizer.convert_ids_to_tokens(token)} ({token})"
        for token in added
    ]
    return f"{GENERATION}: generation stops at {', '.join(names)} too, where learned turns end"
