"""The result of a run: its place, whether it may be written there, and whether it is final.

If a finished run is continued, its earlier result stays until the new one replaces it. Meanwhile a
file in its folder, `PENDING`, marks that the last step is not exported.
"""

from jaxpeft.config.run_config import RunConfig
from jaxpeft.files import storage
from jaxpeft.files.folders import real_path, require_replaceable
from jaxpeft.files.storage import StoragePath
from jaxpeft.methods.registry import KINDS
from jaxpeft.pretrained.adapters import OURS, SIDE
from jaxpeft.pretrained.save import require_place

ADAPTER, MODEL = "adapter", "model"
PENDING = ".unexported"


def export_path(config: RunConfig) -> StoragePath:
    """The place of the trained result: a PEFT folder or a whole model.

    It is a whole model if leaves of the base are trained, or if PEFT has no folders for the method.
    """
    whole = KINDS[config.method.name].peft is None or bool(config.optim.trainable)
    return storage.as_path(config.output_dir) / (MODEL if whole else ADAPTER)


def is_exported(config: RunConfig) -> bool:
    """Whether the result of a run that has made its last step is there and complete.

    It is complete if the file that is written last exists and no run has continued since.
    """
    place = export_path(config)
    last = "config.json" if place.name == MODEL else SIDE
    return storage.exists(place / last) and not storage.exists(place.parent / PENDING)


def check_results(config: RunConfig, *, overwrite: bool) -> None:
    """Checks whether results in this folder may be replaced or discarded.

    Args:
        config: The run.
        overwrite: Whether all results of an earlier run are going to be discarded.

    Raises:
        UserError: A folder that would be removed holds files that belong to no result.
    """
    place = export_path(config)
    places = (place.with_name(ADAPTER), place.with_name(MODEL)) if overwrite else (place,)
    for one in places:
        if one.name == MODEL:
            require_place(one, overwrite=True)
        else:
            require_replaceable(real_path(one), OURS)


def begin_result(config: RunConfig) -> None:
    """Marks that an earlier result, if there is one, is not that of the run's last step."""
    if not is_exported(config):
        return
    output = storage.as_path(config.output_dir)
    if storage.is_remote(output):
        storage.write_objects(output, {PENDING: b""})
    else:
        (output / PENDING).touch()


def end_result(config: RunConfig) -> None:
    """Marks that the last step is exported."""
    place = storage.as_path(config.output_dir) / PENDING
    with storage.explained(place):
        place.unlink(missing_ok=True)
