"""The config of a run: the small configs of every part, composed, read, written and compared.

Each part validates itself when it is built; what concerns two parts is checked here.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from jaxpeft.config import yaml_reader
from jaxpeft.config.schema import Schema, as_plain, flatten
from jaxpeft.config.yaml_nodes import read_text
from jaxpeft.core import limits
from jaxpeft.core.foreign_names import FOREIGN, VALUES
from jaxpeft.core.frozen_map import FrozenMap
from jaxpeft.core.records import Record
from jaxpeft.data.settings import DataConfig
from jaxpeft.files import storage
from jaxpeft.mesh.layout import parse_rules
from jaxpeft.methods.registry import METHODS
from jaxpeft.ops.quant import Quantization
from jaxpeft.updates.optimizers import OptimConfig

Metric = Literal["eval_loss", "eval_perplexity", "eval_token_accuracy", "eval_exact_match"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSection(Record):
    """Which base model, and in which dtypes.

    Attributes:
        path: A Hugging Face folder, on disk or in a bucket (``gs://``), a hub id, or a GGUF file.
        revision: Branch, tag or commit of a hub id.
        chat_template: A file, on disk or in a bucket, with the chat template to use; null is the
            tokenizer's own. Its text is saved with the run and with the adapter.
        dtype: Of the stored base parameters.
        compute_dtype: Of activations; "auto" is float32 on CPU and `dtype` elsewhere. On a CPU that
            multiplies bfloat16 itself (AMX, AVX-512 BF16) bfloat16 for both is the quickest.
        quantization: "nf4", "int4" or "int8" for the kernels of the layers (QLoRA); null for none.
        double_quantization: Keep the scales of quantised blocks in 8 bits too.
    """

    path: str
    revision: str | None = None
    chat_template: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    quantization: Quantization | None = None
    double_quantization: bool = False

    def __post_init__(self):
        _check(
            (not self.path.strip(), f"path must name a model, got {self.path!r}"),
            (self.revision == "", "revision must be null or a branch, tag or commit, got ''"),
            (
                self.chat_template is not None and not self.chat_template.strip(),
                f"chat_template must be null or a file, got {self.chat_template!r}",
            ),
            _one_of("dtype", self.dtype, ("float32", "bfloat16")),
            _one_of("compute_dtype", self.compute_dtype, ("auto", "float32", "bfloat16")),
            _one_of("quantization", self.quantization, (None, *get_args(Quantization))),
            (
                self.double_quantization and self.quantization is None,
                "double_quantization needs quantization: nf4, int4 or int8",
            ),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSection(Record):
    """How long, and in which portions.

    Attributes:
        steps: Number of updates; give this or `epochs`.
        epochs: Passes over the training rows; may be a fraction. Steps are rounded up: in one
            pass every row is seen.
        batch_size: Sequences per update, over all devices.
        microbatch_size: Sequences computed at once, a divisor of `batch_size`; null is all.
        remat: What the backward pass computes again: "none", "dots" (all but matrix products)
            or "full" (every layer).
        seed: Of the initial adapter, the order of rows, and dropout.
    """

    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 8
    microbatch_size: int | None = None
    remat: Literal["none", "dots", "full"] = "full"
    seed: int = 0

    def __post_init__(self):
        micro = self.microbatch_size
        _check(
            (
                self.steps is None and self.epochs is None,
                "give steps or epochs, e.g. steps: 200",
            ),
            (
                self.steps is not None and self.epochs is not None,
                f"give steps or epochs, not both, got steps {self.steps} and epochs "
                f"{self.epochs}; set one of them to null",
            ),
            _at_least("steps", self.steps, 1),
            (
                self.epochs is not None and not 0 < self.epochs < math.inf,
                f"epochs must be greater than 0 and finite, got {self.epochs}",
            ),
            _at_least("batch_size", self.batch_size, 1),
            _at_least("microbatch_size", micro, 1),
            (
                micro is not None and micro >= 1 and self.batch_size % micro != 0,
                f"microbatch_size must divide batch_size {self.batch_size}, got {micro}; "
                f"divisors: {_divisors(self.batch_size)}",
            ),
            _one_of("remat", self.remat, ("none", "dots", "full")),
            (not 0 <= self.seed < 2**32, f"seed must lie in [0, 2**32), got {self.seed}"),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationSection(Record):
    """When and how to evaluate; it needs ``data.eval``.

    Attributes:
        every: Steps between evaluations; null is at the start and the end only.
        exact_match: Whether to generate answers and compare them.
        max_new_tokens: Longest answer to generate.
        max_rows: Only the first rows of the file; null is all.
        batch_size: Sequences computed at once.
    """

    every: int | None = None
    exact_match: bool = False
    max_new_tokens: int = 32
    max_rows: int | None = None
    batch_size: int = 8

    def __post_init__(self):
        _check(
            _at_least("every", self.every, 1),
            _at_least("max_new_tokens", self.max_new_tokens, 1),
            _at_least("max_rows", self.max_rows, 1),
            _at_least("batch_size", self.batch_size, 1),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointSection(Record):
    """When to save, and what to keep.

    Attributes:
        every: Steps between checkpoints; null is at the end and on a signal only.
        keep: How many of the newest checkpoints stay.
        best: The evaluation metric by which the exported adapter is chosen; null is the last.
    """

    every: int | None = None
    keep: int = 2
    best: Metric | None = None

    def __post_init__(self):
        _check(
            _at_least("every", self.every, 1),
            _at_least("keep", self.keep, 1),
            _one_of("best", self.best, (None, *Metric.__args__)),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSection(Record):
    """Sizes of the device mesh; one axis may be -1, the devices that are left.

    Attributes:
        data: Copies of the base that see different rows.
        fsdp: Devices the base is spread over, that see different rows too.
        tensor: Devices each matrix is cut over.
        rules: How leaves of the base are cut, in front of our own table: patterns of whole paths
            with the mesh axis of every dimension, "-" for none, as in
            ``{layers/mlp/up_proj/kernel: "- fsdp tensor"}``.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    rules: Mapping[str, str] = FrozenMap()

    def __post_init__(self):
        free = [name for name, size in self.sizes.items() if size == -1]
        _check(
            *(
                (size != -1 and size < 1, f"{name} must be at least 1, or -1, got {size}")
                for name, size in self.sizes.items()
            ),
            (len(free) > 1, f"at most one axis may be -1, got {' and '.join(free)}"),
        )
        parse_rules(self.rules)

    @property
    def sizes(self) -> dict[str, Any]:
        """Devices along every axis, as `jaxpeft.make_mesh` takes them."""
        return {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrackSection(Record):
    """Where metrics go besides ``metrics.jsonl``.

    Attributes:
        tensorboard: Whether to write TensorBoard files to ``output_dir``.
        wandb: Weights & Biases project; null is off.
    """

    tensorboard: bool = False
    wandb: str | None = None

    def __post_init__(self):
        _check((self.wandb == "", "wandb must be null or a project's name, got ''"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(Record):
    """Everything one training run is made of.

    Attributes:
        model: The base.
        method: What is trained; its class is chosen by the key ``name``.
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
        _check(
            (not self.output_dir.strip(), "output_dir must name a folder, got ''"),
            *(_no_path(name, path) for name, path in self.paths.items()),
            _fits("train.batch_size", self.train.batch_size, self.data.max_length),
            _fits("evaluation.batch_size", self.evaluation.batch_size, self.data.max_length),
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
            ``["--optim.learning_rate=3e-4"]``; lists as ``[a, b]`` or ``a,b``, names with values
            as ``{a: 1}``; the last one wins.
        example: A command to name where there is no such file.

    Returns:
        The validated config.

    Raises:
        UserError: One line for each of the first 20 problems, ``file:line: key: what``, or
            ``--flag: what``.
    """
    return yaml_reader.load(SCHEMA, path, overrides, example)


def load_written(path: str) -> RunConfig:
    """Reads the ``config.yaml`` of a run, which may be larger than the file it was made from.

    Raises:
        UserError: It is no config, or was changed into one that is not valid.
    """
    return yaml_reader.loads(SCHEMA, read_text(path, limit=limits.WRITTEN_CONFIG_BYTES), path)


def to_yaml(config: RunConfig) -> str:
    """The config as YAML, every default written out; `load_config` gives back an equal one."""
    return yaml_reader.dumps(config)


def config_hash(config: RunConfig) -> str:
    """The sha256, in hex, of what determines the states a run goes through.

    Left out is what may change when a run goes on: ``output_dir``, ``track``, ``evaluation``,
    ``checkpoint``, ``data.eval``, ``data.workers`` (batches do not depend on it), ``mesh``
    (another mesh gives the same rows in the same order and differs by rounding only) and
    ``model.chat_template`` (its text counts, see `jaxpeft.training.output.folder.find_template`).
    Values that are the default are left out, too, so that a new key with its default changes no
    hash.
    """
    text = json.dumps(hashed_values(config))  # in mappings the order of names says something
    return hashlib.sha256(text.encode()).hexdigest()


def hashed_values(config: RunConfig) -> dict[str, Any]:
    """What `config_hash` covers, by path."""
    keys = (key for key in SCHEMA.keys if key.variant in ("", config.method.name))
    defaults = {key.path: as_plain(key.default) for key in keys}
    return {
        path: value
        for path, value in sorted(hashed(config).items())
        if path not in defaults or value != defaults[path]
    }


def hashed(config: RunConfig) -> dict[str, Any]:
    """The values that decide about the states of a run, by path."""
    return {path: value for path, value in flatten(config).items() if not _NOT_HASHED.match(path)}


def diff(old: RunConfig, new: RunConfig) -> list[tuple[str, Any, Any]]:
    """The keys that differ and decide about states, as (path, old value, new value).

    A value is None where one config does not have the key.
    """
    before, after = hashed(old), hashed(new)
    return [
        (path, before.get(path), after.get(path))
        for path in dict.fromkeys([*before, *after])
        if before.get(path) != after.get(path)
    ]


def _check(*tests: tuple[bool, str]) -> None:
    """Raises a `ValueError` with the texts of all tests that are true, one a line."""
    texts = [text for failed, text in tests if failed]
    if texts:
        raise ValueError("\n".join(texts))


def _at_least(name: str, value: int | None, low: int) -> tuple[bool, str]:
    return value is not None and value < low, f"{name} must be at least {low}, got {value}"


def _one_of(name: str, value: Any, choices: tuple) -> tuple[bool, str]:
    return value not in choices, f"{name} must be one of {choices}, got {value!r}"


def _fits(name: str, batch_size: int, max_length: int) -> tuple[bool, str]:
    limit, tokens = limits.BATCH_TOKENS, batch_size * max_length
    return tokens > limit.most, (
        f"{name} times data.max_length must be at most {limit.most:,}, got {batch_size:,} and "
        f"{max_length:,}: {limit.why}"
    )


def _no_path(name: str, path: str) -> tuple[bool, str]:
    problem = storage.problem_of(path)
    return bool(problem), f"{name} must be a path, got {storage.shown(path)}: {problem}"


def _divisors(number: int) -> str:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return ", ".join(map(str, sorted({*small, *(number // n for n in small)})))
