"""The sections of a config, except those of data, method and optimizer."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from jaxpeft.core import limits
from jaxpeft.core.frozen_map import FrozenMap
from jaxpeft.core.records import Record
from jaxpeft.files import storage
from jaxpeft.mesh.layouts import parse_rules
from jaxpeft.ops.quant import Quantization

Metric = Literal["eval_loss", "eval_perplexity", "eval_token_accuracy", "eval_exact_match"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSection(Record):
    """Which base model, and in which dtypes.

    Attributes:
        path: A Hugging Face folder, on disk or in a bucket (``gs://``), a hub id, or a GGUF file.
        revision: Branch, tag or commit of a hub id.
        chat_template: A file, on disk or in a bucket, with the chat template to use; null is the
            tokenizer's own. Its text is saved with the run and with the adapter.
        dtype: Dtype of the stored base parameters.
        compute_dtype: Dtype of activations; "auto" is float32 on CPU and `dtype` elsewhere. On a
            CPU with bfloat16 products (AMX, AVX-512 BF16), bfloat16 for both is the fastest.
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
        check_all(
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
    """The length of training and its batches.

    Attributes:
        steps: Number of updates; give this or `epochs`.
        epochs: Passes over the training rows; may be a fraction. Steps are rounded up, so that
            one pass sees every row.
        batch_size: Sequences per update, over all devices.
        microbatch_size: Sequences computed at once, a divisor of `batch_size`; null is all.
        remat: What the backward pass recomputes: "none", "dots" (all but matrix products) or
            "full" (every layer).
        seed: Seed of the initial adapter, the order of rows, and dropout.
    """

    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 8
    microbatch_size: int | None = None
    remat: Literal["none", "dots", "full"] = "full"
    seed: int = 0

    def __post_init__(self):
        micro = self.microbatch_size
        check_all(
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
        every: Steps between evaluations; null evaluates at the start and the end only.
        exact_match: Whether to generate answers and compare them.
        max_new_tokens: Longest answer to generate.
        max_rows: Evaluate only this many rows of the file, the first ones; null is all.
        batch_size: Sequences computed at once.
    """

    every: int | None = None
    exact_match: bool = False
    max_new_tokens: int = 32
    max_rows: int | None = None
    batch_size: int = 8

    def __post_init__(self):
        check_all(
            _at_least("every", self.every, 1),
            _at_least("max_new_tokens", self.max_new_tokens, 1),
            _at_least("max_rows", self.max_rows, 1),
            _at_least("batch_size", self.batch_size, 1),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointSection(Record):
    """When to save, and what to keep.

    Attributes:
        every: Steps between checkpoints; null saves at the end and on a signal only.
        keep: How many of the newest checkpoints are kept.
        best: The evaluation metric by which the exported adapter is chosen; null is the last step.
    """

    every: int | None = None
    keep: int = 2
    best: Metric | None = None

    def __post_init__(self):
        check_all(
            _at_least("every", self.every, 1),
            _at_least("keep", self.keep, 1),
            _one_of("best", self.best, (None, *Metric.__args__)),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSection(Record):
    """Sizes of the device mesh; one axis may be -1 for all remaining devices.

    Attributes:
        data: Copies of the base that see different rows.
        fsdp: Devices that the base is spread over; they see different rows too.
        tensor: Devices that each matrix is cut over.
        rules: Sharding rules that take precedence over the built-in ones: patterns of whole paths
            with the mesh axis of every dimension, "-" for none, as in
            ``{layers/mlp/up_proj/kernel: "- fsdp tensor"}``.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    rules: Mapping[str, str] = FrozenMap()

    def __post_init__(self):
        free = [name for name, size in self.sizes.items() if size == -1]
        check_all(
            *(
                (size != -1 and size < 1, f"{name} must be at least 1, or -1, got {size}")
                for name, size in self.sizes.items()
            ),
            (len(free) > 1, f"at most one axis may be -1, got {' and '.join(free)}"),
        )
        parse_rules(self.rules)

    @property
    def sizes(self) -> dict[str, Any]:
        """The number of devices along every axis, for `jaxpeft.make_mesh`."""
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
        check_all((self.wandb == "", "wandb must be null or a project's name, got ''"))


def check_all(*tests: tuple[bool, str]) -> None:
    """Checks the fields of a section.

    Args:
        tests: Pairs of whether a check failed, and the error text.

    Raises:
        ValueError: A check failed. The message has one line for each failed check.
    """
    texts = [text for failed, text in tests if failed]
    if texts:
        raise ValueError("\n".join(texts))


def _at_least(name: str, value: int | None, low: int) -> tuple[bool, str]:
    return value is not None and value < low, f"{name} must be at least {low}, got {value}"


def _one_of(name: str, value: Any, choices: tuple) -> tuple[bool, str]:
    return value not in choices, f"{name} must be one of {choices}, got {value!r}"


def batch_fits(name: str, batch_size: int, max_length: int) -> tuple[bool, str]:
    """A pair for `check_all`: whether a batch has too many tokens, and the error text."""
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
