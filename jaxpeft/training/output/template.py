"""Finds, compares and keeps the chat template of a run that overrides its tokenizer's.

Its text is stored in the folder of the run, so that the run can continue without the file.
"""

import os
from collections.abc import Collection
from typing import Any

from jaxpeft.config import run_config
from jaxpeft.config.run_config import RunConfig
from jaxpeft.core.errors import UserError
from jaxpeft.files import storage
from jaxpeft.files.local_copy import on_disk
from jaxpeft.files.storage import StoragePath
from jaxpeft.pretrained.chat_template import override_template, read_template
from jaxpeft.pretrained.load import load_tokenizer
from jaxpeft.training.output.folder import CONFIG, TEMPLATE
from jaxpeft.training.output.resume import TEMPLATE as CHANGE


def find_template(
    config: RunConfig, *, overwrite: bool = False, accepted: Collection[str] = ()
) -> str:
    """The text of ``model.chat_template``; "" if the tokenizer's own template is used.

    Args:
        config: The run.
        overwrite: Whether a run in ``output_dir`` is discarded.
        accepted: Keys that may have changed, see `jaxpeft.training.output.resume`.

    Raises:
        UserError: The file cannot be used, or the run in ``output_dir`` began with another text.
        StoreError: A bucket refuses or does not answer.
    """
    output, path = storage.as_path(config.output_dir), config.model.chat_template
    if overwrite or not storage.exists(output / CONFIG):
        return "" if path is None else read_template(path)
    began_with = ""
    if storage.exists(output / TEMPLATE):
        began_with = storage.read_bytes(output / TEMPLATE).decode("utf-8", "replace")
    if path is not None and began_with and not _is_there(path) and path == _path_before(output):
        return began_with
    now = "" if path is None else read_template(path)
    if now != began_with and CHANGE not in accepted:
        was = "another text" if began_with else "the tokenizer's own"
        raise UserError(
            f"{output}: model.chat_template: {path or 'null'} is not what this run began with, "
            f"{was}; put it back, accept it with --accept_changes {CHANGE}, or start anew with "
            "--overwrite or another output_dir."
        )
    return now


def check_place(config: RunConfig, template: str) -> None:
    """Checks whether the text may be stored in the folder: a file there must belong to a run.

    If no run has begun, a file with the same text was left by a run that was killed before it
    began, unless it is the file that the config names.

    Raises:
        UserError: A file of that name belongs to no run.
    """
    output, path = storage.as_path(config.output_dir), config.model.chat_template
    place = output / TEMPLATE
    if storage.exists(output / CONFIG) or not _is_taken(place):
        return
    if not (_holds(place, template) and (path is None or not _is_same(path, place))):
        raise UserError(
            f"{place}: exists without {CONFIG}, so it may belong to someone else, and a run keeps "
            "its chat template under this name; move it, or choose another output_dir."
        )


def keep_template(config: RunConfig, template: str) -> None:
    """Writes the text into the run's folder, before ``config.yaml`` marks it as a run.

    Raises:
        UserError: A file of that name belongs to no run.
    """
    check_place(config, template)
    place = storage.as_path(config.output_dir) / TEMPLATE
    temporary = place.with_name(f".{TEMPLATE}")
    if not template:
        with storage.explained(place):
            for left in (place, temporary):  # left by an earlier or a killed run
                left.unlink(missing_ok=True)
        return
    if _holds(place, template):
        return
    if storage.is_remote(place):
        storage.write_objects(place.parent, {TEMPLATE: template.encode()})
        return
    try:
        temporary.write_bytes(template.encode())
        os.replace(temporary, place)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def run_tokenizer(config: RunConfig, template: str) -> Any:
    """The tokenizer of the base, with the chat template of the run."""
    tokenizer = load_tokenizer(config.model.path, config.model.revision)
    return override_template(tokenizer, template)


def _is_taken(place: StoragePath) -> bool:
    return storage.exists(place) or (not storage.is_remote(place) and os.path.lexists(place))


def _holds(place: StoragePath, template: str) -> bool:
    """Whether a file exists and holds exactly the text."""
    with storage.explained(place):
        there = bool(template) and storage.exists(place) and place.is_file()
    return there and storage.read_bytes(place) == template.encode()


def _is_same(path: str, place: StoragePath) -> bool:
    if storage.is_remote(path) or storage.is_remote(place):
        return path == str(place)
    return storage.expanded(path).resolve() == place.resolve()


def _path_before(output: StoragePath) -> str | None:
    """The ``model.chat_template`` of the run in a folder so far."""
    with on_disk(output, [CONFIG]) as folder:
        return run_config.load_written(str(folder / CONFIG)).model.chat_template


def _is_there(path: str) -> bool:
    place = storage.as_path(path) if storage.is_remote(path) else storage.expanded(path)
    return storage.exists(place)
