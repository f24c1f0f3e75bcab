"""The moment from which a folder belongs to a run, which then writes or discards files in it."""

from typing import Any

from jaxpeft.checkpoints.checkpoints import Checkpoints
from jaxpeft.config.run_config import RunConfig
from jaxpeft.core.errors import UserError
from jaxpeft.files import storage
from jaxpeft.training.output.folder import clean, discard, write_config
from jaxpeft.training.output.result import begin_result
from jaxpeft.training.output.template import keep_template


def take_folder(
    config: RunConfig,
    template: str,
    checkpoints: Checkpoints,
    latest: int | None,
    lock: Any,
    *,
    overwrite: bool,
) -> None:
    """Takes the folder for this run; from here on files are written or discarded in it.

    Raises:
        UserError: Another run took it, or saved a step after `latest`.
    """
    output = storage.as_path(config.output_dir)
    newest = None if overwrite else checkpoints.newest_whole()
    if newest not in (None, latest):
        raise UserError(
            f"{output}: another run saved step {newest} meanwhile; if it is not to go on, stop "
            "it and run the same command again."
        )
    lock.begin()
    if overwrite:
        discard(output)
    keep_template(config, template)
    begin_result(config)
    write_config(config)
    clean(config)
    checkpoints.tidy()
    lock.check()
