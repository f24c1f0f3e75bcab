"""The folder of a run's checkpoints: which steps exist, are complete, are kept or deleted.

    checkpoints/
      100/  state/...  manifest.json     a checkpoint, which Orbax can read too
      120/  state/...                    killed before its manifest: does not exist
      120.unfinished                     allows us to remove 120; without it 120 is set aside
      140.orbax-checkpoint-tmp/          killed while Orbax wrote: removed at the next save
      damaged/80/                        differs from its manifest: never used, never deleted; it is
                                         set aside at the next save, when the run owns the folder

A step is renamed (`N.deleting`) before its files are deleted, so no half-deleted folder looks
complete.

In a bucket (``gs://``) nothing is renamed. A step exists if its manifest does, an object that is
written last and removed first. A step without one was never finished, and is removed at the next
save.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

from jaxpeft.checkpoints import manifest
from jaxpeft.core.errors import CheckpointError, ResourceError, UserError, first_few
from jaxpeft.files import storage
from jaxpeft.files.storage import StoragePath

_LEFTOVER = re.compile(r"\d+\.(orbax-checkpoint-tmp.*|deleting)")
_UNFINISHED = re.compile(r"(\d+)\.unfinished")


class CheckpointFolder:
    """The steps under `directory`. Looking at them makes and changes nothing.

    Args:
        directory: A folder, on disk or in a bucket; it need not exist yet.
        warn: Called with one line when something is damaged, set aside or cannot be deleted.
        scored_on: What the current metrics are computed on, see `best`.

    Attributes:
        damaged: Damaged steps that `newest_whole` found, newer than the one it returned.

    Raises:
        UserError: `directory` is a file, or a URL but not of a bucket.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        warn: Callable[[str], None],
        scored_on: str = "",
    ):
        self.remote = storage.is_remote(directory)
        self.directory = storage.as_path(directory)
        if not self.remote:
            self.directory = self.directory.absolute()
            if self.directory.exists() and not self.directory.is_dir():
                raise UserError(f"{directory}: is a file, expected a folder for checkpoints")
        self._warn = warn
        self._scored_on = scored_on
        self._verified: set[int] = set()
        self.damaged: set[int] = set()

    def path(self, step: int) -> StoragePath:
        """The path of a step, whether it exists or not."""
        return self.directory / str(step)

    def steps(self) -> list[int]:
        """The steps that have a manifest, oldest first.

        Raises:
            ResourceError: The folder cannot be read.
        """
        return [n for n in self._numbers() if storage.exists(self.path(n) / manifest.NAME)]

    def existing(self, step: int) -> StoragePath:
        """The path of a step that exists.

        Raises:
            CheckpointError: The step does not exist; the text lists the steps that do.
        """
        steps = self.steps()
        if step not in steps:
            known = first_few([str(s) for s in reversed(steps)]) or "none"
            raise CheckpointError(f"{self.directory}: has no step {step}; steps: {known}")
        return self.path(step)

    def read(self, step: int) -> dict[str, Any]:
        """The fields of a step's manifest.

        Raises:
            CheckpointError: The manifest is damaged.
            StoreError: The store does not answer; all methods that read raise it.
        """
        try:
            return manifest.read(self.path(step))
        except manifest.DamageError as error:
            raise CheckpointError(f"{self.path(step)}: damaged: {error}") from error

    def verify(self, step: int) -> dict[str, Any]:
        """The fields of a step's manifest, after all its files are checked.

        Files are checked once for each step and object.

        Raises:
            CheckpointError: A file is missing, cut or altered; the text names it.
        """
        if step in self._verified:
            return self.read(step)
        try:
            fields = manifest.verify(self.path(step))
        except manifest.DamageError as error:
            raise CheckpointError(f"{self.path(step)}: damaged: {error}") from error
        self._verified.add(step)
        return fields

    def newest_whole(self) -> int | None:
        """The newest step whose files are intact, or None if there are no steps.

        Damaged steps are left where they are until `set_damaged_aside`.

        Raises:
            CheckpointError: Steps exist and all of them are damaged.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                self.verify(step)
            except CheckpointError as error:
                damaged[step] = str(error)
                continue
            for text in (damaged[bad] for bad in damaged if bad not in self.damaged):
                self._warn(f"{text}; step {step} is used")
            self.damaged = set(damaged)
            return step
        if damaged:
            raise CheckpointError(
                f"no usable checkpoint: {first_few(list(damaged.values()))}; nothing was changed. "
                "To start afresh, pass --overwrite or choose another output_dir."
            )
        return None

    def set_damaged_aside(self) -> None:
        """Moves the steps in `damaged` that are still damaged; only the folder's owner may call it.

        Raises:
            ResourceError: The disk does not let us move them.
        """
        for step in sorted(self.damaged.intersection(self.steps())):
            try:
                self.verify(step)
            except CheckpointError:
                try:
                    target = self._set_aside(step)
                except OSError as error:
                    raise ResourceError(
                        f"{self.path(step)}: damaged, and cannot be set aside: {error.strerror}"
                    ) from error
                self._warn(f"{self.path(step)}: set aside in {target}")
        self.damaged.clear()

    def best(self) -> int | None:
        """The step with the lowest metric, the newest among equals; None if none has a metric.

        Metrics on other data are not compared. Metrics from versions that did not record the data
        are.
        """
        found = [
            (metric, -step)
            for step, metric, scored_on in self._metrics()
            if scored_on in (None, self._scored_on)
        ]
        return -min(found)[1] if found else None

    def scored_otherwise(self) -> tuple[list[int], list[int]]:
        """The steps with a metric on other data, and the steps with a metric on unknown data."""
        found = list(self._metrics())
        others = [step for step, _, scored_on in found if scored_on not in (None, self._scored_on)]
        return others, [step for step, _, scored_on in found if scored_on is None]

    def _metrics(self) -> Iterator[tuple[int, float, str | None]]:
        """For every step with a metric: the step, the metric, and the data it was computed on."""
        for step in self.steps():
            try:
                fields = manifest.read(self.path(step))
            except manifest.DamageError:
                continue
            if fields["metric"] is not None:
                yield step, fields["metric"], fields.get("scored_on")

    def begin(self, step: int) -> None:
        """Notes that a step is about to be written; without a manifest it may be removed later.

        Raises:
            OSError: The disk is full or does not let us write.
        """
        if not self.remote:
            self._note(step).touch()

    def _note(self, step: int) -> StoragePath:
        return self.directory / f"{step}.unfinished"

    def commit(self, step: int, fields: dict[str, Any]) -> None:
        """Makes the files of a step durable and writes its manifest; from then on the step exists.

        Raises:
            OSError: The disk is full or does not let us write.
        """
        manifest.write(self.path(step), fields)
        self._verified.add(step)
        if not self.remote:
            with contextlib.suppress(OSError):  # the step is complete without the note too
                self._note(step).unlink(missing_ok=True)

    def prune(self, keep: int, check_owner: Callable[[], None]) -> None:
        """Deletes all steps but the newest `keep` and the best; a failure is only a warning.

        Args:
            keep: How many to keep.
            check_owner: Raises a UserError if the folder does not belong to this run any more.
        """
        try:
            check_owner()
            steps, best = self.steps(), self.best()
        except (OSError, UserError) as error:  # the best step is not known
            self._warn(f"{self.directory}: no old step is deleted: {error}")
            return
        for step in steps[:-keep]:
            if step != best:
                try:
                    self._delete(step)
                except (OSError, UserError) as error:
                    self._warn(f"{self.path(step)}: old step cannot be deleted: {error}")

    def _delete(self, step: int) -> None:
        if self.remote:
            with storage.explained(self.path(step)):
                (self.path(step) / manifest.NAME).unlink()
            storage.remove(self.path(step))
            return
        doomed = self.directory / f"{step}.deleting"
        os.rename(self.path(step), doomed)
        shutil.rmtree(doomed)

    def clean(self) -> None:
        """Prepares a save: removes leftovers, and sets aside other steps without a manifest.

        Raises:
            ResourceError: The folder cannot be read.
        """
        self.remove_leftovers()
        if self.remote:
            return
        for step in self._numbers():
            if not (self.path(step) / manifest.NAME).exists():
                target = self._set_aside(step)
                self._warn(f"{self.path(step)}: has no manifest; set aside in {target}")

    def remove_leftovers(self, *, unfinished: int | None = None) -> None:
        """Removes what unfinished saves and deletions left, and the step `unfinished` if given.

        Raises:
            ResourceError: The folder in the bucket cannot be read.
        """
        if self.remote:
            for step in set(self._numbers()) - set(self.steps()):
                storage.remove(self.path(step))
            return
        if not self.directory.is_dir():
            return
        paths = list(self.directory.iterdir())
        notes = {found[1]: path for path in paths if (found := _UNFINISHED.fullmatch(path.name))}
        for path in paths:
            ours = path.name in notes or path.name == str(unfinished)
            bare = ours and not (path / manifest.NAME).exists()
            if bare or _LEFTOVER.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)
        for step, note in notes.items():
            place = self.directory / step
            if (place / manifest.NAME).exists() or not place.exists():
                with contextlib.suppress(OSError):
                    note.unlink(missing_ok=True)

    def _numbers(self) -> list[int]:
        names: list[str] = []
        try:
            with storage.explained(self.directory), contextlib.suppress(FileNotFoundError):
                names = [path.name for path in self.directory.iterdir()]
        except OSError as error:
            raise ResourceError(f"{self.directory}: cannot be read: {error.strerror}") from error
        return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9]\d*", name))

    def _set_aside(self, step: int) -> StoragePath:
        """Moves a step into `damaged/`, under a name that is free."""
        target = self.directory / "damaged" / str(step)
        number = 1
        while storage.exists(target):
            number += 1
            target = target.with_name(f"{step}-{number}")
        if self.remote:
            storage.move(self.path(step), target, first=manifest.NAME)
        else:
            target.parent.mkdir(exist_ok=True)
            os.rename(self.path(step), target)
        self._verified.discard(step)
        return target


def notes_on_scores(others: list[int], unknown: list[int], scored_on: str) -> list[str]:
    """Notes for the user about steps whose metric was, or may have been, computed on other data.

    Args:
        others: Steps with a metric on other data.
        unknown: Steps with a metric on unknown data.
        scored_on: What metrics are computed on now; "" if that is not known either.
    """
    notes = []

    def texts(steps: list[int]) -> str:
        return first_few([str(step) for step in steps])

    if others:
        notes.append(
            f"what scores are measured on changed: those of steps {texts(others)} "
            "decide about the best checkpoint no more"
        )
    if unknown and scored_on:
        notes.append(
            f"what the scores of steps {texts(unknown)} were measured on is not "
            "known; they decide about the best checkpoint as if it had not changed"
        )
    return notes
