"""Multitask prompt tuning: one shared prompt, and a low-rank factor for every task.

The prompt of task ``t`` is ``P * (cols[t] @ rows[t])``, element by element, with the shared
``P: (n, d)``, ``cols: (tasks, n, rank)`` and ``rows: (tasks, rank, d)``. Its virtual ids are
``vocab + t * n + j``; they determine the task, so one packed row may mix tasks. In a run every row
of data names its task, ``{"messages": [...], "task": 1}``; `jaxpeft.with_prompt` and
`jaxpeft.generate` take ``task=``.

Reference:
    Wang et al., "Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning", 2023,
    https://arxiv.org/abs/2303.02861, section 3.1, equation 1.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.core import paths
from jaxpeft.methods.adapter import Adapter
from jaxpeft.methods.family import Kind, Leaf
from jaxpeft.methods.fields import require_count
from jaxpeft.methods.method import NO_CONTEXT, Context, Method
from jaxpeft.methods.peft.values import PeftFormat, Tensors, Values
from jaxpeft.methods.prompts import prompt, table
from jaxpeft.ops.linear import shape_of

STDDEV = 0.02


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultitaskPromptTuning(Method):
    """The numbers of virtual tokens and of tasks.

    Attributes:
        num_tokens: Virtual tokens in front of every segment.
        num_tasks: How many tasks share the prompt.
        rank: Inner dimension of each task's factor.
        initial: What the shared prompt starts from, see `PromptTuning`.
        text: The text to start from; for "text" only.
    """

    name: ClassVar[str] = "multitask_prompt_tuning"

    num_tokens: int = 20
    num_tasks: int = 1
    rank: int = 1
    initial: prompt.Initial = "sampled"
    text: str | None = None

    def __post_init__(self):
        for field in ("num_tokens", "num_tasks", "rank"):
            require_count(self, field)
        prompt.require_start(self)

    @property
    def num_virtual_tokens(self) -> int:
        """Virtual tokens in front of every segment."""
        return self.num_tokens

    def check_any_model(self) -> None:
        """Checks that its start needs no tokenizer.

        Raises:
            UserError: It does.
        """
        prompt.require_no_text(self)

    def init(self, params: dict, key: jax.Array, context: Context = NO_CONTEXT) -> Adapter:
        """A new prompt; the tasks' factors are normal with standard deviation 0.02, as in PEFT.

        Args:
            params: Base parameters; "random" needs their shapes only.
            key: Typed PRNG key.
            context: For "text", its tokenizer is used.

        Returns:
            An adapter with ``prompt``, ``cols`` and ``rows`` at the embedding table.

        Raises:
            UserError: If there is no tokenizer for "text", or the text gives no ids of the
                vocabulary.
        """
        path = paths.table_of(params)
        table = paths.get(params, path)
        vocab_size, width = shape_of(table)
        keys = jax.random.split(key, 3)
        shared = prompt.first_rows(
            self.initial, self.num_tokens, table, keys[0], self.text, context.tokenizer
        )
        cols = jax.random.normal(keys[1], (self.num_tasks, self.num_tokens, self.rank))
        rows = jax.random.normal(keys[2], (self.num_tasks, self.rank, width))
        arrays = {"prompt": shared, "cols": STDDEV * cols, "rows": STDDEV * rows}
        return prompt.prompt_adapter(self.name, arrays, vocab_size, path, num_tasks=self.num_tasks)


def bind(leaf: Leaf) -> dict[str, Any]:
    """The node for the embedding table, with the rows of all tasks.

    Raises:
        UserError: The table has the rows of another soft prompt already.
    """
    shared, cols, rows = (leaf.params[name] for name in ("prompt", "cols", "rows"))
    products = jnp.matmul(cols, rows, precision=jax.lax.Precision.HIGHEST)
    return table.bind_rows(leaf, (shared * products).reshape(-1, shared.shape[-1]))


def config_of(adapter: Adapter) -> MultitaskPromptTuning:
    """The config of an adapter; its initialisation is not stored."""
    tasks, count, rank = prompt.arrays_of(adapter)["cols"].shape
    return MultitaskPromptTuning(num_tokens=count, num_tasks=tasks, rank=rank)


def config_from_peft(values: Values) -> MultitaskPromptTuning:
    """Reads PEFT's config; see `PeftFormat`."""
    values.only("prompt_tuning_init", "RANDOM", "TEXT")
    return MultitaskPromptTuning(
        num_tokens=prompt.read_count(values),
        num_tasks=values.count("num_tasks"),
        rank=values.count("num_ranks"),
        **prompt.read_start(values),
    )


def read(values: Values, tensors: Tensors, base: Any) -> Adapter:
    """Reads the adapter of a PEFT folder."""
    count, width = prompt.read_sizes(values, base)
    tasks, rank = values.count("num_tasks"), values.count("num_ranks")
    wanted = {
        prompt.EMBEDDINGS: (count, width),
        "prefix_task_cols": (tasks, count, rank),
        "prefix_task_rows": (tasks, rank, width),
    }
    tensors.require(wanted, base.name)
    arrays = [jnp.array(tensors.read(key)) for key in wanted]
    return prompt.prompt_adapter(
        MultitaskPromptTuning.name,
        dict(zip(("prompt", "cols", "rows"), arrays, strict=True)),
        base.config.vocab_size,
        num_tasks=tasks,
    )


def write(adapter: Adapter, base: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Config values and tensors of a PEFT folder."""
    arrays = prompt.arrays_of(adapter)
    tasks, count, rank = arrays["cols"].shape
    values = prompt.write_sizes(count, base) | {"num_tasks": tasks, "num_ranks": rank}
    return values, prompt.write_tensors(
        **{prompt.EMBEDDINGS: arrays["prompt"]},
        prefix_task_cols=arrays["cols"],
        prefix_task_rows=arrays["rows"],
    )


START: dict[str, Any] = prompt.INITIAL | {
    "prompt_tuning_init_state_dict_path": None,
    "prompt_tuning_init_task": 0,
}
"""Keys about the initialisation."""

KIND = Kind(
    config=MultitaskPromptTuning,
    bind=bind,
    own_axes=prompt.OWN_AXES,
    config_of=config_of,
    no_merge=prompt.NO_MERGE,
    virtual_tokens=prompt.virtual_tokens,
    first_virtual_id=prompt.first_virtual_id,
    tasks=lambda adapter: prompt.arrays_of(adapter)["cols"].shape[-3],
    check=prompt.check,
    peft=PeftFormat(
        type="MULTITASK_PROMPT_TUNING",
        defaults=prompt.SIZES | START | {"num_ranks": 1, "num_tasks": 1},
        read_keys=(*prompt.READ_KEYS, "num_ranks", "num_tasks"),
        harmless_keys=(*prompt.HARMLESS_KEYS, *START),
        read=read,
        write=write,
        config=config_from_peft,
        title="Soft prompt of several tasks",
    ),
)
