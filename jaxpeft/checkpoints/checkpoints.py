"""Checkpoints of a run: whole or invisible, verified before use, kept within a few.

Orbax writes the arrays in the background; what makes a folder a checkpoint is ours. Orbax does not
notice a flipped bit, takes a bare folder for the latest step and casts dtypes silently, so every
step gets a manifest (`jaxpeft.checkpoints.manifest`) once Orbax is done, and exists only with it
(`jaxpeft.checkpoints.folder`). What is saved for each leaf is in `jaxpeft.checkpoints.leaves`.

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

    With several processes every method is called by all of them; the first process writes
    manifests, verifies and deletes. Without a call of `save`, nothing is changed.

    Args:
        directory: The folder, on disk or in a bucket (``gs://``), made at the first save.
        keep: How many of the newest steps to keep.
        warn: Called with one line when a step is damaged or set aside; prints to stderr by default.
        check_owner: Raises a UserError if the folder is not this run's. The first process calls it
            before it sets damaged steps aside and, in a thread, before a step begins to exist and
            before old ones go.
        scored_on: What the metrics given to `save` are of, such as a hash of evaluation data;
            `best` compares none of anything else.

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
        self._last = (-1, 0)  # step and bytes of the save begun last
        self._has_damaged = False  # the same in all processes

    def save(
        self,
        step: int,
        state: dict[str, Any],
        *,
        meta: dict[str, Any],
        metric: float | None = None,
    ) -> None:
        """Starts saving `state` and returns as soon as its values are copied off the devices.

        Every method but `steps`, `newest_whole`, `tidy` and `best` waits for its end first and
        reports what went wrong. A step that exists already is left as it is; those that `latest`
        found damaged are set aside in `damaged/` first.

        Args:
            step: The number of updates done.
            state: Nested dicts of arrays; may be donated as soon as this returns.
            meta: JSON values to find again with `meta` (config, data hash, ...).
            metric: The step with the lowest one is kept beside the newest.

        Raises:
            ResourceError: No room or no permission, now or in the save before; what was saved
                earlier is untouched.
            CheckpointError: A newer step exists, or the save before failed otherwise.
            TypeError: A leaf is not an array or number, or `meta` is not JSON.
            ValueError: `meta` holds NaN or infinity, which JSON has no word for.
        """
        self.wait()
        leaves = checkpoint_leaves.flatten(state)
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
        except Exception as error:  # Orbax waits for the others in there: who failed is not known
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
        self._forget()  # what is damaged may be saved again
        return found

    def tidy(self) -> None:
        """Removes what killed saves left, and steps beyond those to keep.

        One process calls it, after `latest`, once the folder is its run's. While steps are damaged
        nothing is removed: the next save sets them aside first.
        """
        if self._has_damaged or not self._folder.steps():
            return
        self._check_owner()
        self._folder.remove_leftovers()
        self._folder.prune(self._keep, self._check_owner)

    def newest_whole(self) -> int | None:
        """What `latest` gives, found by one process alone."""
        return self._folder.newest_whole()

    def best(self) -> int | None:
        """The step saved with the lowest metric, the newest of equals; None if none has one."""
        return from_first(self._folder.best)

    def notes_on_scores(self) -> list[str]:
        """What a person should know of steps whose metric is, or may be, of other data."""
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
        leaves = checkpoint_leaves.flatten(like)
        checkpoint_leaves.check(leaves, fields["leaves"], str(path))
        try:
            tree = ocp.load(os.fspath(path), checkpoint_leaves.targets(leaves))
        except Exception as error:
            raise CheckpointError(
                f"{path}: cannot be loaded: {failures.first_line(error)}"
            ) from error
        return checkpoint_leaves.from_orbax(tree, like)

    def meta(self, step: int) -> dict[str, Any]:
        """The `meta` given to `save`, with `environment`: versions, device kind, XLA flags."""
        self.wait()
        self._folder.existing(step)
        return self._folder.read(step)["meta"]

    def wait(self) -> None:
        """Waits until the save under way exists; in all processes, or it failed for all.

        Raises:
            ResourceError: It found no room, or no permission.
            StoreError: The store failed.
            UserError: The folder is not this run's any more.
            CheckpointError: It failed in another way.
        """
        if self._thread is None and self._error is None:
            return
        # The others are done before the first process has committed the step: none may leave, and
        # thereby end the first one, until it has.
        try:
            together(self._wait)
        except UserError:
            self._orbax, self._last = None, (-1, 0)  # where it failed in another process too
            raise

    def _wait(self) -> None:
        """Waits for this process's part of the save under way."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise self._failure(error) from error

    def close(self) -> None:
        """Waits for the save under way, as far as this process makes it, and lets go of Orbax.

        Raises:
            UserError: The save under way failed.
        """
        try:
            self._wait()  # not for the others: one that failed comes here alone
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
        """Sees to it that a save can begin; in all processes, or it fails for all."""
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
                    pass  # fails here if the folder is not writable
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
        """Runs in a thread: lets what Orbax wrote exist, then drops old steps."""
        try:
            response.result()
            if jax.process_index() == 0:
                self._check_owner()
                self._folder.commit(step, fields)
                self._folder.prune(self._keep, self._check_owner)
        except BaseException as error:
            self._error = error

    def _failure(self, error: BaseException) -> UserError:
        """Cleans up after a failed save and says what went wrong."""
        step, needed_bytes = self._last
        described = failures.describe(error, self._folder.path(step), needed_bytes)
        # Orbax raises a failed save's error again at every later call: begin with a new one.
        self._orbax, self._last = None, (-1, 0)
        failures.drop_coroutines(error)
        if jax.process_index() == 0:
            with contextlib.suppress(OSError, UserError):  # what was said first is the reason
                self._check_owner()  # another run's unfinished step is not ours to remove
                self._folder.remove_leftovers(unfinished=step)
        return described
