"""Sends metrics to TensorBoard and to Weights & Biases.

Both are optional: ``metrics.jsonl`` has everything. The package of a tracker that a config names
must be installed when a run starts, but a tracker that cannot start or fails later only causes a
warning. Among several processes only the first one sends.
"""

import importlib
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol, SupportsFloat, runtime_checkable

import jax

from jaxpeft.core import notes
from jaxpeft.core.errors import UserError
from jaxpeft.reports.event_file import EventFile

TENSORBOARD_FOLDER = "tensorboard"
WANDB_RUN_ID = "wandb_run_id"
HIDDEN = "(hidden)"

_SECRET_NAME = re.compile(
    r"(^|[_.-])(token|secret|password|passwd|credentials?|(api|access|secret|private)_?key)$", re.I
)
_SECRET_VALUE = re.compile(
    r"(?<=://)[^/@\s]+(?=@)"  # user:password@ of a URL
    r"|(?<=[?&;])[^=&#\s]*(?:token|signature|sig|key|credential|secret)[^=&#\s]*=[^&#\s]+"
    r"|\b(?:hf_|gh[pousr]_|github_pat_|sk-)\w{16,}",
    re.I,
)


@runtime_checkable
class Sink(Protocol):
    """A destination of metrics; its methods may raise."""

    name: str

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Sends the numbers of one step."""
        ...

    def close(self, exit_code: int) -> None:
        """Ends the destination's session."""
        ...


class Tracker:
    """Sends metrics to all sinks. After a failure a sink is dropped, with one warning.

    Args:
        sinks: The destinations; there may be none.
        warn: Called with a line of text.
    """

    def __init__(self, sinks: list[Sink], warn: Callable[[str], None]):
        self._sinks, self._warn = sinks, warn
        self._failed: set[str] = set()

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Sends the numbers among `metrics`; text, None and arrays with axes are left out.

        Args:
            step: Steps done.
            metrics: As in a line of ``metrics.jsonl``; the key "step" is left out.
        """
        numbers = {
            name: float(value)
            for name, value in metrics.items()
            if name != "step" and isinstance(value, SupportsFloat) and not getattr(value, "ndim", 0)
        }
        if not numbers:
            return
        for sink in self._sinks:
            if sink.name not in self._failed:
                self._guard(sink, lambda sink=sink: sink.log(step, dict(numbers)))

    def close(self, exit_code: int = 0) -> None:
        """Flushes and ends every sink; may be called twice.

        Args:
            exit_code: The exit code of the run; W&B shows a run as failed unless it is 0.
        """
        sinks, self._sinks = self._sinks, []
        for sink in sinks:
            self._guard(sink, lambda sink=sink: sink.close(exit_code))

    def _guard(self, sink: Sink, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            if sink.name not in self._failed:
                self._failed.add(sink.name)
                self._warn(
                    f"{sink.name} failed and gets no more metrics; training goes on, and "
                    f"metrics.jsonl has everything ({_one_line(error)})"
                )


def make_trackers(
    tensorboard: bool,
    wandb: str | None,
    output_dir: str | os.PathLike,
    run_config: Mapping[str, Any],
    run_id: str | None = None,
    *,
    first_step: int = 0,
    warn: Callable[[str], None] | None = None,
) -> Tracker:
    """Opens the trackers that a config names.

    A resumed run continues the same W&B run, whose id is in ``output_dir/wandb_run_id``, and the
    same TensorBoard folder. Steps that are repeated after the checkpoint are shown once.

    Args:
        tensorboard: Whether to write event files to ``output_dir/tensorboard``. Writing needs no
            package; looking at them needs ``pip install tensorboard``.
        wandb: Weights & Biases project, or None.
        output_dir: The run's folder.
        run_config: The resolved config, nested; what looks like a secret is hidden from W&B.
        run_id: W&B id to continue, instead of the stored one.
        first_step: The number of steps that a resumed run did before.
        warn: Called with a line of text; prints to standard error by default.

    Returns:
        A tracker; without sinks on all processes but the first.

    Raises:
        UserError: A package is missing. Other reasons why a tracker cannot start, such as a
            network, a login or a folder, are warnings.
    """
    warn = warn or notes.warn
    folder = pathlib.Path(output_dir)
    module = import_wandb() if wandb is not None else None  # in all processes, so that all stop
    starts: dict[str, Callable[[], Sink]] = {}
    if tensorboard:
        starts["track.tensorboard"] = lambda: _TensorBoard(folder, first_step)
    if module is not None:
        starts["track.wandb"] = lambda: _WandB(
            module, wandb, folder, without_secrets(run_config), run_id, first_step
        )
    sinks: list[Sink] = []
    if jax.process_index() != 0:
        return Tracker(sinks, warn)
    for name, start in starts.items():
        try:
            sinks.append(start())
        except Exception as error:
            warn(
                f"{name}: cannot be started: {_one_line(error)}; training goes on without it, and "
                "metrics.jsonl has everything"
            )
    return Tracker(sinks, warn)


def without_secrets(value: Any, name: str = "") -> Any:
    """A copy of a nested config in which passwords, keys and tokens read "(hidden)".

    Example:
        >>> without_secrets({"hub_token": "abc", "path": "https://me:pw@host/x", "max_tokens": 3})
        {'hub_token': '(hidden)', 'path': 'https://(hidden)@host/x', 'max_tokens': 3}
    """
    if isinstance(value, Mapping):
        return {key: without_secrets(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_secrets(item, name) for item in value]
    if value is not None and _SECRET_NAME.search(name):
        return HIDDEN
    return _SECRET_VALUE.sub(HIDDEN, value) if isinstance(value, str) else value


class _TensorBoard:
    """Event files in the run's folder."""

    name = "tensorboard"

    def __init__(self, folder: pathlib.Path, first_step: int):
        begin = first_step + 1 if first_step else 0
        self._file = EventFile(folder / TENSORBOARD_FOLDER, begin)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self._file.add(step, numbers)

    def close(self, exit_code: int) -> None:
        del exit_code
        self._file.close()


class _WandB:
    """A run on Weights & Biases, which accepts steps in rising order only."""

    name = "wandb"

    def __init__(
        self,
        module: Any,
        project: str | None,
        folder: pathlib.Path,
        config: dict,
        run_id: str | None,
        first_step: int,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        id_file = folder / WANDB_RUN_ID
        if run_id is None and first_step and id_file.exists():
            run_id = id_file.read_text().strip() or None
        self._run = module.init(
            project=project,
            id=run_id,
            resume="allow",
            name=folder.resolve().name,
            dir=str(folder),
            config=config,
            save_code=False,
            settings={"console": "off"},  # it would capture the terminal and break the live line
        )
        self._next = int(self._run.step)  # what an earlier process sent stays
        id_file.write_text(f"{self._run.id}\n")

    def log(self, step: int, numbers: dict[str, float]) -> None:
        if step >= self._next:
            self._run.log(numbers, step=step)

    def close(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)


def import_wandb() -> Any:
    """Imports wandb; call it early, to find out before a model is loaded.

    Raises:
        UserError: wandb is not installed.
    """
    way_out = "pip install wandb, or set track.wandb: null"
    try:
        module = importlib.import_module("wandb")
    except ImportError as error:
        raise UserError(
            f"track.wandb: the package wandb is not installed ({error}); {way_out}"
        ) from error
    if not hasattr(module, "init"):  # wandb's folder of logs can be imported as a package
        raise UserError(f"track.wandb: the package wandb is not installed; {way_out}")
    return module


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
