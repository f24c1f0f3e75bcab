"""The config of a run: its sections composed, read, written, hashed and compared.

Each section validates itself when it is built; checks that concern two sections are made here.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

from jaxpeft.config import yaml_reader, yaml_writer
from jaxpeft.config.schema import Schema, as_plain, dotted_values
from jaxpeft.config.sections import (
    CheckpointSection,
    EvaluationSection,
    MeshSection,
    ModelSection,
    TrackSection,
    TrainSection,
    _no_path,
    batch_fits,
    check_all,
)
from jaxpeft.config.yaml_nodes import read_text
from jaxpeft.core import limits
from jaxpeft.core.foreign_names import FOREIGN, VALUES
from jaxpeft.core.records import Record
from jaxpeft.data.settings import DataConfig
from jaxpeft.methods.registry import METHODS
from jaxpeft.updates.optimizers import OptimConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(Record):
    """Everything one training run is made of.

    Attributes:
        model: The base.
        method: The adapter's family and options; its key ``name`` chooses the class.
        data: The rows.
        optim: The optimizer and its schedule.
        train: Length and batches.
        evaluation: When and how to evaluate.
        checkpoint: When to save.
        mesh: How devices are laid out.
        track: Further places for metrics.
        output_dir: The run's folder, on disk or in a bucket (``gs://``).
    """

    model: ModelSection
    method: Any = dataclasses.field(metadata={"variants": METHODS})
    data: DataConfig
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    train: TrainSection
    evaluation: EvaluationSection = dataclasses.field(default_factory=EvaluationSection)
    checkpoint: CheckpointSection = dataclasses.field(default_factory=CheckpointSection)
    mesh: MeshSection = dataclasses.field(default_factory=MeshSection)
    track: TrackSection = dataclasses.field(default_factory=TrackSection)
    output_dir: str

    def __post_init__(self):
        steps, warmup = self.train.steps, self.optim.warmup_steps
        best, no_eval = self.checkpoint.best, not self.data.eval
        prompts = self.method.num_virtual_tokens * max(self.method.num_tasks, 1)
        check_all(
            (not self.output_dir.strip(), "output_dir must name a folder, got ''"),
            *(_no_path(name, path) for name, path in self.paths.items()),
            batch_fits("train.batch_size", self.train.batch_size, self.data.max_length),
            batch_fits("evaluation.batch_size", self.evaluation.batch_size, self.data.max_length),
            (
                prompts > limits.PROMPT_TOKENS.most,
                f"method.num_tokens times num_tasks must be at most {limits.PROMPT_TOKENS.most:,}, "
                f"got {prompts:,}",
            ),
            (
                steps is not None and warmup > steps,
                f"optim.warmup_steps must be at most train.steps, got {warmup} and {steps}",
            ),
            (
                no_eval and self.evaluation.every is not None,
                "evaluation.every needs rows to evaluate on; give data.eval, or every: null",
            ),
            (
                no_eval and self.evaluation.exact_match,
                "evaluation.exact_match needs rows to evaluate on; give data.eval",
            ),
            (
                no_eval and best is not None,
                f"checkpoint.best needs rows to measure {best} on; give data.eval",
            ),
            (
                best == "eval_exact_match" and not self.evaluation.exact_match,
                "checkpoint.best needs eval_exact_match; set evaluation.exact_match: true",
            ),
        )

    @property
    def paths(self) -> dict[str, str]:
        """The files and folders that a run reads or writes, by their key."""
        found = {
            "model.path": self.model.path,
            "model.chat_template": self.model.chat_template,
            "method.init_from": self.method.init_from,
            "data.train": self.data.train,
            "data.eval": self.data.eval,
            "output_dir": self.output_dir,
        }
        return {name: path for name, path in found.items() if path}


SCHEMA = Schema(RunConfig, FOREIGN, VALUES)
EXAMPLE = "python -m jaxpeft.train configs/quickstart.yaml"

_NOT_HASHED = re.compile(
    r"(output_dir|track|evaluation|checkpoint|mesh|data\.(eval|workers)|model\.chat_template)"
    r"(\.|$)"
)


def load_config(path: str, overrides: Sequence[str] = (), example: str = EXAMPLE) -> RunConfig:
    """Reads a config file, strictly.

    Args:
        path: A YAML file.
        overrides: Flags as on a command line: ``["--optim.learning_rate", "3e-4"]`` or
            ``["--optim.learning_rate=3e-4"]``. Lists are written ``[a, b]`` or ``a,b``, mappings
            ``{a: 1}``. If a key is given several times, the last value counts.
        example: A command that works, for the error about a missing file.

    Returns:
        The validated config.

    Raises:
        UserError: One line for each of the first 20 problems, ``file:line: key: what``, or
            ``--flag: what``.
    """
    return yaml_reader.load(SCHEMA, path, overrides, example)


def load_written(path: str) -> RunConfig:
    """Reads the ``config.yaml`` of a run, which may be larger than a config file that people write.

    Raises:
        UserError: It is no config, or was changed into one that is not valid.
    """
    return yaml_reader.loads(SCHEMA, read_text(path, limit=limits.WRITTEN_CONFIG_BYTES), path)


def to_yaml(config: RunConfig) -> str:
    """The config as YAML with every default written out; `load_config` reads it back."""
    return yaml_writer.dumps(config)


def config_hash(config: RunConfig) -> str:
    """The sha256, in hex, of the settings that determine the states a run goes through.

    Settings that may change when a run is resumed are left out: ``output_dir``, ``track``,
    ``evaluation``, ``checkpoint``, ``data.eval``, ``data.workers`` (batches do not depend on it),
    ``mesh`` (another mesh gives the same rows in the same order and differs by rounding only) and
    ``model.chat_template`` (its text counts instead, see `jaxpeft.training.output.template`).
    Values equal to the default are left out too, so that a new key does not change any hash.
    """
    text = json.dumps(hashed_values(config))  # the order of a mapping's keys matters
    return hashlib.sha256(text.encode()).hexdigest()


def hashed_values(config: RunConfig) -> dict[str, Any]:
    """The values that `config_hash` covers, by path."""
    keys = (key for key in SCHEMA.keys if key.variant in ("", config.method.name))
    defaults = {key.path: as_plain(key.default) for key in keys}
    return {
        path: value
        for path, value in sorted(hashed(config).items())
        if path not in defaults or value != defaults[path]
    }


def hashed(config: RunConfig) -> dict[str, Any]:
    """The values that determine the states of a run, by path."""
    return {
        path: value for path, value in dotted_values(config).items() if not _NOT_HASHED.match(path)
    }


def diff(old: RunConfig, new: RunConfig) -> list[tuple[str, Any, Any]]:
    """The keys that determine the states of a run and differ, as (path, old value, new value).

    A value is None if one config does not have the key.
    """
    before, after = hashed(old), hashed(new)
    return [
        (path, before.get(path), after.get(path))
        for path in dict.fromkeys([*before, *after])
        if before.get(path) != after.get(path)
    ]
