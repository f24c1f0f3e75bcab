"""The folder of a run: which run may write there, and how an earlier run is discarded.

output_dir/
  config.yaml                      resolved; discarded last: marks a run
  chat_template.jinja              the text of model.chat_template; written before it
  metrics.jsonl  samples.jsonl     numbers and answers by step
  checkpoints/                     see `jaxpeft.checkpoints.checkpoints`
  adapter/ or model/               the result; `.unexported`: not yet of the last step
  profile/  tensorboard/  wandb/   where asked for; on a disk only

The folder may be in a bucket (``gs://``), see `jaxpeft.files.storage`.
"""

import contextlib
import errno
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Collection

import jax

from jaxpeft.config import run_config
from jaxpeft.config.run_config import RunConfig
from jaxpeft.core import limits
from jaxpeft.core.errors import ResourceError, UserError, first_few
from jaxpeft.files import storage
from jaxpeft.files.folders import remove_leftovers
from jaxpeft.files.local_copy import on_disk
from jaxpeft.files.storage import StoragePath
from jaxpeft.mesh.processes import from_first, is_first, together
from jaxpeft.pretrained.save import same_folder
from jaxpeft.training.output.result import ADAPTER, MODEL, PENDING, export_path
from jaxpeft.training.output.resume import check_config

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
TEMPLATE = "chat_template.jinja"
CHECKPOINTS = "checkpoints"
PROFILE = "profile"

_OURS = (CHECKPOINTS, ADAPTER, MODEL, METRICS, SAMPLES)
_SEEN_SECONDS = 20  # until other hosts must see a new file: NFS caches listings
_PROBE = ".probe"
_SHARED = re.compile(r"\.shared-[0-9a-f]{32}")
_KEPT = (TEMPLATE, PENDING, PROFILE, "tensorboard", "wandb", "wandb_run_id")


def check_folder(
    config: RunConfig,
    *,
    resume: bool = True,
    overwrite: bool = False,
    accepted: Collection[str] = (),
) -> None:
    """Checks that runs will not be mixed. It changes nothing.

    Args:
        config: The run that wants the folder.
        resume: Whether it may continue the run that is there.
        overwrite: Whether a run that is there shall be discarded.
        accepted: Keys whose changes are accepted, see `jaxpeft.training.output.resume`.

    Raises:
        UserError: The folder holds another run, one that shall not be resumed, or files with the
            names of a run's files that belong to no run; or it is the folder of the base.
    """
    output = storage.as_path(config.output_dir)
    size = len(run_config.to_yaml(config).encode())
    limits.require_bytes(f"{output / CONFIG}", size, limits.WRITTEN_CONFIG_BYTES)
    if same_folder(config.model.path, output):
        raise UserError(
            f"output_dir: {output} is the folder of the base model, model.path, and a run writes "
            "into its folder; choose another output_dir."
        )
    if storage.is_remote(output):
        _check_bucket(config, output)
    there = output / CONFIG
    if not storage.exists(there):
        found = [name for name in _OURS if storage.exists(output / name)]
        if found:
            raise UserError(
                f"{output}: holds {first_few(found)} but no {CONFIG}, so it is not clear whose "
                "they are; choose another output_dir, or remove them."
            )
        return
    if overwrite:
        inputs = (
            *(config.model.path, config.model.chat_template or ""),
            *(config.data.train, config.data.eval or ""),
            config.method.init_from or "",
        )
        inside = [name for name in inputs if name and _lies_in(name, output)]
        if inside:
            raise UserError(
                f"{output}: --overwrite would discard what this run reads: {first_few(inside)}; "
                "choose another output_dir."
            )
        return
    if not resume:
        raise UserError(
            f"{output}: holds a run, and --resume never was given; add --overwrite to discard "
            "it, or choose another output_dir."
        )
    with on_disk(output, [CONFIG]) as folder:
        old = run_config.load_written(str(folder / CONFIG))
    check_config(old, config, accepted, output)


def _check_bucket(config: RunConfig, output: StoragePath) -> None:
    """Refuses options that need a disk if the folder is in a bucket."""
    for key, value in (
        ("track.tensorboard", config.track.tensorboard),
        ("track.wandb", config.track.wandb),
    ):
        if value:
            raise UserError(f"{key}: needs an output_dir on a disk, not {output}; turn it off.")


def _lies_in(path: str, folder: StoragePath) -> bool:
    if storage.is_remote(path) or storage.is_remote(folder):
        return f"{path}/".startswith(f"{folder}/")
    place = storage.expanded(path)
    return place.exists() and place.resolve().is_relative_to(folder.resolve())


def make_folder(output: StoragePath) -> list[str]:
    """Makes the folder and checks that files can be written there.

    In a bucket there is no folder to make.

    Returns:
        The folders that were made, the outermost last, for `remove_empty`.

    Raises:
        UserError: The folder cannot be made or written to.
        ResourceError: The disk is full.
    """
    if storage.is_remote(output):
        storage.write_objects(output, {_PROBE: b""})
        storage.remove(output / _PROBE)
        return []
    made: list[str] = []
    try:
        made = [str(folder) for folder in (output, *output.parents) if not folder.exists()]
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output) as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
            os.fsync(probe.fileno())
    except (NotADirectoryError, FileExistsError):
        remove_empty(made)
        raise UserError(
            f"output_dir: {output} is a file or lies in one; choose another output_dir."
        ) from None
    except OSError as error:
        remove_empty(made)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        kind = ResourceError if full else UserError
        raise kind(
            f"output_dir: {output} cannot be written to: {error.strerror}; "
            + ("free some space" if full else "make it writable")
            + ", or choose another output_dir."
        ) from None
    return made


def remove_empty(folders: list[str]) -> None:
    """Removes folders that are empty, the innermost first."""
    with contextlib.suppress(OSError):
        for folder in folders:
            os.rmdir(folder)


def check_shared(output: StoragePath) -> None:
    """Checks that all processes of the run see the same folder, by a file that the first writes.

    Raises:
        UserError: A process does not see the file, or sees another one.
    """
    if jax.process_count() == 1:
        return

    def write() -> str:
        token = uuid.uuid4().hex
        storage.write_objects(output, {f".shared-{token}": token.encode()})
        return token

    token = from_first(write)
    file = output / f".shared-{token}"

    def find() -> None:
        end = time.monotonic() + _SEEN_SECONDS
        while True:
            try:
                with storage.explained(output):
                    found = file.read_bytes() if storage.exists(file) else b""
            except OSError:
                found = b""
            if found == token.encode():
                return
            if time.monotonic() > end:
                raise UserError(
                    f"output_dir: process {jax.process_index()} does not see what process 0 wrote "
                    f"into {output}; give all processes one folder that all of them see, such as "
                    "a network disk or a bucket."
                )
            time.sleep(0.5)

    try:
        together(find)
    finally:
        if is_first():
            with storage.explained(output):
                file.unlink(missing_ok=True)


def clean(config: RunConfig) -> None:
    """Removes what a killed run left in its folder, which must belong to this run.

    Unfinished saves are removed by `jaxpeft.checkpoints.checkpoints`.
    """
    output = storage.as_path(config.output_dir)
    if storage.is_remote(output):
        return
    remove_leftovers(export_path(config))
    for path in output.iterdir():
        if _SHARED.fullmatch(path.name):
            path.unlink(missing_ok=True)


def discard(output: StoragePath) -> None:
    """Removes the files of an earlier run and nothing else; without a run nothing changes."""
    if not storage.exists(output / CONFIG):
        return
    for name in (ADAPTER, MODEL):
        remove_leftovers(output / name)
    for name in (*_OURS, *_KEPT, CONFIG):
        path = output / name
        if storage.is_remote(path):
            storage.remove(path)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_config(config: RunConfig) -> None:
    """Writes ``config.yaml`` completely or not at all."""
    place = storage.as_path(config.output_dir) / CONFIG
    if storage.is_remote(place):
        storage.write_objects(place.parent, {CONFIG: run_config.to_yaml(config).encode()})
        return
    temporary = place.with_name(f".{CONFIG}")
    try:
        temporary.write_text(run_config.to_yaml(config))
        os.replace(temporary, place)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
