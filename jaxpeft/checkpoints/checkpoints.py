"""Checkpoints of a run: complete or invisible, verified before use, and limited in number.

Orbax writes the arrays in the background; this package decides which folders are checkpoints. Orbax
does not notice a flipped bit, takes a bare folder for the latest step and casts dtypes silently. So
every step gets a manifest (`jaxpeft.checkpoints.manifest`) after Orbax is done, and exists only
with it (`jaxpeft.checkpoints.folder`). `jaxpeft.checkpoints.leaves` describes how leaves are saved.

Example:
    >>> import tempfile, jax, jax.numpy as jnp
    >>> state = {"adapter": {"a": jnp.ones((2, 3))}, "key": jax.random.key(0)}
    >>> with Checkpoints(tempfile.mkdtemp()) as checkpoints:
    ...     checkpoints.save(10, state, meta={"seed": 0})
    ...     step = checkpoints.latest()
    ...     restored = checkpoints.restore(step, like=state)
    >>> step, float(restored["adapter"]["a"].sum())
    (10, 6.0)
"""

import contextlib
import errno
import json
import math
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from typing import Any

import jax

from jaxpeft.checkpoints import failures
from jaxpeft.checkpoints import leaves as checkpoint_leaves
from jaxpeft.checkpoints.environment import environment
from jaxpeft.checkpoints.folder import CheckpointFolder, notes_on_scores
from jaxpeft.checkpoints.orbax import open_orbax
from jaxpeft.core import notes
from jaxpeft.core.errors import CheckpointError, UserError
from jaxpeft.mesh.processes import from_first, together


class Checkpoints:
    """The checkpoints of one run in one folder. Use it as a context manager.

    If there are several processes, all of them call every method; the first process writes
    manifests, verifies and deletes. Nothing is changed until `save` is called.

    Args:
        directory: The folder, on disk or in a bucket (``gs://``), made at the first save.
        keep: How many of the newest steps to keep.
        warn: Called with one line when a step is damaged or set aside; prints to stderr by default.
        check_owner: Raises a UserError if the folder does not belong to this run. The first process
            calls it before it sets damaged steps aside, and in a thread before a step begins to
            exist and before old steps are deleted.
        scored_on: What the metrics given to `save` were computed on, such as a hash of evaluation
            data. `best` compares only metrics of the same data.

    Raises:
        UserError: `directory` is a file or a URL of another kind, or `keep` is below 1.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int = 2,
        warn: Callable[[str], None] = notes.warn,
        check_owner: Callable[[], None] = lambda: None,
        scored_on: str = "",
    ):
        if keep < 1:
            raise UserError(f"checkpoint.keep must be at least 1, got {keep}")
        self._folder = CheckpointFolder(directory, warn, scored_on)
        self._scored_on = scored_on
        self._keep = keep
        self._warn = warn
        self._check_owner = check_owner
        self._orbax: Any = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._last = (-1, 0)  # step and bytes of the last save
        self._has_damaged = False  # the same in all processes

    def save(
        self,
        step: int,
        state: Any,
        *,
        meta: dict[str, Any],
        metric: float | None = None,
    ) -> None:
        """Starts saving `state`; returns as soon as its values are copied off the devices.

        Every method except `steps`, `newest_whole`, `tidy` and `best` first waits for a save in
        progress and raises its error. A step that exists is left as it is; steps that `latest`
        found damaged are first set aside in `damaged/`.

        Args:
            step: The number of updates done.
            state: A tree of arrays, such as a `jaxpeft.TrainState` or nested dicts; may be donated
                as soon as this returns.
            meta: JSON values to find again with `meta` (config, data hash, ...).
            metric: The step with the lowest metric is kept beside the newest steps.

        Raises:
            ResourceError: No room or no permission, now or in the save before; earlier steps are
                safe.
            CheckpointError: A newer step exists, or the save before failed for another reason.
            TypeError: A leaf is not an array or number, or `meta` is not JSON.
            ValueError: `meta` holds NaN or infinity, which JSON cannot express.
        """
        self.wait()
        leaves = checkpoint_leaves.named_leaves(state)
        fields = {
            "step": step,
            "metric": float(metric) if metric is not None and math.isfinite(metric) else None,
            "meta": {"environment": environment(), **meta},
            "leaves": {name: checkpoint_leaves.signature(leaf) for name, leaf in leaves.items()},
        }
        if self._scored_on and fields["metric"] is not None:
            fields["scored_on"] = self._scored_on
        json.dumps(fields, allow_nan=False)
        if self._has_damaged:
            from_first(self._set_damaged_aside)
            self._has_damaged = False
        existing = self.steps()
        if step in (*existing, self._last[0]):
            return
        if existing and step < existing[-1]:
            raise CheckpointError(
                f"{self._folder.directory}: step {existing[-1]} is newer than step {step} to be "
                "saved; remove it, or start afresh with --overwrite or another output_dir"
            )
        # Small leaves are stored twice and described in 300 bytes each.
        self._last = (step, checkpoint_leaves.num_bytes(leaves) + 2048 * len(leaves) + 65536)
        self._make_room(self._last[1])
        try:
            response = self._checkpointer().save_async(
                step, checkpoint_leaves.to_orbax(leaves), force=True
            )
        except Exception as error:  # Orbax waits for the others here: any may have failed
            failed = self._failure(error)
            failed.alone = jax.process_count() > 1
            raise failed from error
        self._thread = threading.Thread(target=self._finish, args=(step, fields, response))
        self._thread.start()

    def steps(self) -> list[int]:
        """The steps that exist, oldest first; their files are not verified yet."""
        return self._folder.steps()

    def latest(self) -> int | None:
        """The newest step whose every file matches its sha256, or None if there are no steps.

        Damaged steps newer than that are named through `warn`; the next `save` sets them aside.

        Raises:
            CheckpointError: Steps exist and all of them are damaged.
        """
        self.wait()
        found, self._has_damaged = from_first(
            lambda: (self.newest_whole(), bool(self._folder.damaged))
        )
        self._forget()  # a damaged step may be saved again
        return found

    def tidy(self) -> None:
        """Removes what killed saves left, and steps beyond those to keep.

        One process calls it, after `latest`, once the folder belongs to its run. While steps are
        damaged nothing is removed, because the next save sets them aside first.
        """
        if self._has_damaged or not self._folder.steps():
            return
        self._check_owner()
        self._folder.remove_leftovers()
        self._folder.prune(self._keep, self._check_owner)

    def newest_whole(self) -> int | None:
        """The result of `latest`, found by one process alone."""
        return self._folder.newest_whole()

    def best(self) -> int | None:
        """The step with the lowest metric, the newest among equals; None if none has a metric."""
        return from_first(self._folder.best)

    def notes_on_scores(self) -> list[str]:
        """Notes for the user about steps whose metric may be of other data."""
        return notes_on_scores(*from_first(self._folder.scored_otherwise), self._scored_on)

    def restore(self, step: int, like: Any) -> Any:
        """Loads a step into the structure, shapes, dtypes and shardings of `like`.

        Args:
            step: A step from `steps` or `latest`; verified here unless `latest` did.
            like: A tree of arrays or `jax.ShapeDtypeStruct`.

        Returns:
            A tree like `like`, equal to the saved one bit for bit.

        Raises:
            CheckpointError: The step does not exist, is damaged, or has other leaves than `like`;
                the text names them.
        """
        from orbax.checkpoint import v1 as ocp

        self.wait()
        path = self._folder.existing(step)
        first = jax.process_index() == 0
        fields = self._folder.verify(step) if first else self._folder.read(step)
        leaves = checkpoint_leaves.named_leaves(like)
        checkpoint_leaves.check(leaves, fields["leaves"], str(path))
        try:
            tree = ocp.load(os.fspath(path), checkpoint_leaves.targets(leaves))
        except Exception as error:
            raise CheckpointError(
                f"{path}: cannot be loaded: {failures.first_line(error)}"
            ) from error
        return checkpoint_leaves.from_orbax(tree, like)

    def meta(self, step: int) -> dict[str, Any]:
        """The `meta` given to `save`, and versions, device kind and XLA flags as `environment`."""
        self.wait()
        self._folder.existing(step)
        return self._folder.read(step)["meta"]

    def wait(self) -> None:
        """Waits until the save in progress is complete in all processes, or has failed in all.

        Raises:
            ResourceError: There was no room, or no permission.
            StoreError: The store failed.
            UserError: The folder does not belong to this run any more.
            CheckpointError: The save failed for another reason.
        """
        if self._thread is None and self._error is None:
            return
        # The others finish before the first process has committed the step. None of them may leave
        # until it has, because that would end the first process too.
        try:
            together(self._wait)
        except UserError:
            self._orbax, self._last = None, (-1, 0)  # where it failed in another process too
            raise

    def _wait(self) -> None:
        """Waits for this process's part of the save in progress."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise self._failure(error) from error

    def close(self) -> None:
        """Waits for this process's part of the save in progress, and closes Orbax's checkpointer.

        Raises:
            UserError: The save in progress failed.
        """
        try:
            self._wait()  # not for the others: a process that failed is alone here
        finally:
            self._forget()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self.close()
        except UserError as failed:
            if error is None:
                raise
            self._warn(str(failed))

    def _set_damaged_aside(self) -> None:
        self._check_owner()
        self._folder.set_damaged_aside()

    def _forget(self) -> None:
        orbax, self._orbax, self._last = self._orbax, None, (-1, 0)
        if orbax is not None:
            orbax.close()

    def _checkpointer(self) -> Any:
        if self._orbax is None:
            self._orbax = open_orbax(self._folder.directory)
        return self._orbax

    def _make_room(self, needed_bytes: int) -> None:
        """Prepares a save; it succeeds in all processes, or fails in all."""
        fresh = self._orbax is None

        def tried(act: Callable[[], None]) -> None:
            try:
                act()
            except Exception as error:
                raise self._failure(error) from error

        def clean() -> None:
            if not self._folder.remote:
                self._folder.directory.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=self._folder.directory):
                    pass  # an unwritable folder fails here
            if fresh and jax.process_index() == 0:
                self._folder.clean()

        def measure() -> None:
            if shutil.disk_usage(self._folder.directory).free < needed_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if jax.process_index() == 0:
                self._folder.begin(self._last[0])

        try:
            together(lambda: tried(clean))
            if not self._folder.remote:
                together(lambda: tried(measure))  # once the first process has cleaned
        except UserError:
            self._orbax, self._last = None, (-1, 0)  # where it failed in another process too
            raise

    def _finish(self, step: int, fields: dict[str, Any], response: Any) -> None:
        """Runs in a thread: commits the step that Orbax wrote, then deletes old steps."""
        try:
            response.result()
            if jax.process_index() == 0:
                self._check_owner()
                self._folder.commit(step, fields)
                self._folder.prune(self._keep, self._check_owner)
        except BaseException as error:
            self._error = error

    def _failure(self, error: BaseException) -> UserError:
        """Cleans up after a failed save and returns the error to raise."""
        step, needed_bytes = self._last
        described = failures.describe(error, self._folder.path(step), needed_bytes)
        # Orbax repeats the error of a failed save at every later call, so a new one is opened.
        self._orbax, self._last = None, (-1, 0)
        failures.drop_coroutines(error)
        if jax.process_index() == 0:
            with contextlib.suppress(OSError, UserError):  # the first error is the reason
                self._check_owner()  # never removes another run's unfinished step
                self._folder.remove_leftovers(unfinished=step)
        return described
