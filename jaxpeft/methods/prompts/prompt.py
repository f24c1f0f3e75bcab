"""Prompt tuning: trained embeddings of virtual tokens in front of every segment.

With token embeddings ``X`` of shape ``(seq, d)`` and a prompt ``P`` of shape ``(n, d)`` the model
reads ``[P; X]``, and only ``P`` is trained. Soft prompts are tokens here: ids from the size of the
vocabulary on address the rows of ``P``, and `jaxpeft.with_prompt` writes them in front of every
segment. So positions, masks, packing, remat and the key/value cache need no special case.

A tied head scores the real tokens only. The prompt is cast to the dtype of the embeddings.

Reference:
    Lester et al., "The Power of Scale for Parameter-Efficient Prompt Tuning", 2021,
    https://arxiv.org/abs/2104.08691, section 2.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError
from jaxpeft.methods.adapter import Adapter, Spec
from jaxpeft.methods.family import Kind, Leaf, require_values
from jaxpeft.methods.fields import require_choice, require_count
from jaxpeft.methods.method import NO_CONTEXT, Context, Method
from jaxpeft.methods.peft.modules import contiguous, require_finite
from jaxpeft.methods.peft.values import PeftFormat, Tensors, Values
from jaxpeft.methods.prompts.table import bind_rows
from jaxpeft.ops.linear import embed, shape_of

Initial = Literal["sampled", "random", "text"]
EMBEDDINGS = "prompt_embeddings"
OWN_AXES = {"prompt": 2}
NO_MERGE = "its virtual tokens stand in front of the input; keep it beside the base"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptTuning(Method):
    """The number of virtual tokens, and what they start from.

    Attributes:
        num_tokens: Virtual tokens in front of every segment.
        initial: "sampled" starts from randomly drawn rows of the embedding table, "random" from
            normal numbers (PEFT's default), "text" from the rows of `text`.
        text: A text, cut or repeated to `num_tokens` tokens; for "text" only.
    """

    name: ClassVar[str] = "prompt_tuning"

    num_tokens: int = 20
    initial: Initial = "sampled"
    text: str | None = None

    def __post_init__(self):
        require_count(self, "num_tokens")
        require_start(self)

    @property
    def num_virtual_tokens(self) -> int:
        """Virtual tokens in front of every segment."""
        return self.num_tokens

    def check_any_model(self) -> None:
        """Checks that its start needs no tokenizer.

        Raises:
            UserError: It does.
        """
        require_no_text(self)

    def init(self, params: dict, key: jax.Array, context: Context = NO_CONTEXT) -> Adapter:
        """A new prompt; it changes what the model computes from the start.

        Args:
            params: Base parameters; "random" needs their shapes only.
            key: Typed PRNG key.
            context: For "text", its tokenizer is used.

        Returns:
            An adapter with ``{"prompt": (num_tokens, d_model)}`` at the embedding table.

        Raises:
            UserError: If there is no tokenizer for "text", or it gives no ids of the vocabulary.
        """
        path = paths.table_of(params)
        table = paths.get(params, path)
        rows = first_rows(self.initial, self.num_tokens, table, key, self.text, context.tokenizer)
        return prompt_adapter(self.name, {"prompt": rows}, shape_of(table)[0], path)


def require_start(method: Any) -> None:
    """Checks the fields that say what a prompt starts from.

    Raises:
        ValueError: `initial` is unknown, or `text` is not given exactly where it is "text".
    """
    require_choice(method, "initial", Initial)
    if (method.initial == "text") != bool(method.text):
        raise ValueError(
            f'{type(method).__name__}.text must be given with initial "text" and only then, got '
            f"{method.text!r} with {method.initial!r}."
        )


def require_no_text(method: Any) -> None:
    """Checks that the start of a prompt for a model that is not ours is no text.

    Raises:
        UserError: It is one.
    """
    if method.text:
        raise UserError(
            f"{type(method).__name__}.text: is for models of jaxpeft, which come with their "
            'tokenizer; choose initial "sampled" or "random".'
        )


def first_rows(
    initial: Initial, count: int, table: Any, key: jax.Array, text: str | None, tokenizer: Any
) -> Float[Array, "count d_model"]:
    """The initial rows of a prompt, in float32; see `PromptTuning`."""
    vocab_size, width = shape_of(table)
    if initial == "random":
        return jax.random.normal(key, (count, width))
    require_values(table, f"initial {initial!r} takes rows of the embedding table")
    if initial == "sampled":
        ids = jax.random.randint(key, (count,), 0, vocab_size)
    else:
        ids = text_ids(text or "", count, vocab_size, tokenizer)
    return embed(ids, table).astype(jnp.float32)


def text_ids(text: str, count: int, vocab_size: int, tokenizer: Any) -> Int[Array, "count"]:
    """Tokenises a text, and cuts or repeats its ids to `count`.

    Raises:
        UserError: There is no tokenizer, or the text gives no ids of the vocabulary.
    """
    if tokenizer is None:
        raise UserError(
            'initial "text" needs a tokenizer: pass the model itself to init_adapter, and put its '
            "tokenizer files beside the weights."
        )
    ids = tokenizer(text)["input_ids"]
    if not ids or max(ids) >= vocab_size:
        raise UserError(
            f"text: {text!r:.60} gives {'ids outside the vocabulary' if ids else 'no tokens'}; "
            "write another one, or take the tokenizer that belongs to the model."
        )
    return jnp.array((list(ids) * -(-count // len(ids)))[:count], jnp.int32)


def prompt_adapter(
    kind: str, params: dict, vocab_size: int, path: str = paths.EMBEDDING, **options: Any
) -> Adapter:
    """An adapter with trained arrays at the embedding table, for ids from `vocab_size` on."""
    pairs = tuple(sorted({"vocab_size": vocab_size, **options}.items()))
    spec = Spec(kind=kind, paths=(path,), options=pairs)
    return Adapter(paths.unflatten({path: params}), {}, spec)


def arrays_of(adapter: Adapter) -> dict[str, Any]:
    """The trained arrays of a soft prompt by name."""
    (path,) = adapter.spec.paths
    return paths.get(adapter.params, path)


def bind(leaf: Leaf) -> dict[str, Any]:
    """The node for the embedding table.

    Raises:
        UserError: The table has the rows of another soft prompt already.
    """
    return bind_rows(leaf, leaf.params["prompt"])


def virtual_tokens(adapter: Adapter) -> int:
    """The number of rows of a prompt."""
    return arrays_of(adapter)["prompt"].shape[-2]


def first_virtual_id(adapter: Adapter) -> int:
    """The id of the first row of a prompt: the size of the vocabulary."""
    return dict(adapter.spec.options)["vocab_size"]


def check(params: dict, adapter: Adapter) -> None:
    """Checks that the table has the size that the prompt was made for.

    Raises:
        UserError: The table has another size.
    """
    (path,) = adapter.spec.paths
    ours = shape_of(paths.get(params, path))
    width = arrays_of(adapter)["prompt"].shape[-1]
    theirs = (dict(adapter.spec.options)["vocab_size"], width)
    if theirs != ours:
        raise UserError(
            f"{path}: the adapter was made for shape {theirs}, this base has {ours}; "
            "it belongs to another model."
        )


def config_of(adapter: Adapter) -> PromptTuning:
    """The config of an adapter; its initialisation is not stored."""
    return PromptTuning(num_tokens=virtual_tokens(adapter))


SIZES: dict[str, Any] = {
    "modules_to_save": None,
    "num_attention_heads": None,
    "num_layers": None,
    "num_transformer_submodules": None,
    "num_virtual_tokens": None,
    "token_dim": None,
}
"""Keys of all soft prompts in PEFT."""

READ_KEYS = ("num_transformer_submodules", "num_virtual_tokens", "token_dim")
HARMLESS_KEYS = ("num_attention_heads", "num_layers")
INITIAL: dict[str, Any] = {
    "prompt_tuning_init": "RANDOM",
    "prompt_tuning_init_text": None,
    "tokenizer_kwargs": None,
    "tokenizer_name_or_path": None,
}
"""Keys of prompt tuning about the initialisation."""


def read_count(values: Values) -> int:
    """The number of virtual tokens in a PEFT config.

    Raises:
        UserError: The prompt was made for a model with an encoder.
    """
    if values.get("num_transformer_submodules") not in (None, 1):
        raise values.wrong("num_transformer_submodules", "1, for a decoder")
    return values.count("num_virtual_tokens")


def read_sizes(values: Values, base: Any) -> tuple[int, int]:
    """Rows and width of a prompt in a PEFT config.

    Raises:
        UserError: The width is not that of `base`.
    """
    count, width = read_count(values), base.config.d_model
    if values.get("token_dim") not in (None, width):
        raise UserError(
            f"{values.file}: token_dim: this base has {width}, got {values.get('token_dim')!r}; "
            "the adapter was made for another model."
        )
    return count, width


def write_sizes(count: int, base: Any) -> dict[str, Any]:
    """The values of the keys in `SIZES`."""
    config = base.config
    return {
        "num_attention_heads": config.num_heads,
        "num_layers": config.num_layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": count,
        "token_dim": config.d_model,
    }


def write_tensors(**arrays: Any) -> dict[str, np.ndarray]:
    """Tensors with PEFT's names; values that are not finite are an error."""
    for name, value in arrays.items():
        require_finite(name, value)
    return {name: contiguous(value) for name, value in arrays.items()}


def read_start(values: Values) -> dict[str, Any]:
    """The fields `initial` and `text` from PEFT's config.

    Raises:
        UserError: The start is unknown, has no text, or needs another tokenizer.
    """
    known = {"RANDOM": "random", "SAMPLE_VOCAB": "sampled", "TEXT": "text"}
    initial = known.get(str(values.get("prompt_tuning_init")))
    if initial is None:
        raise values.wrong("prompt_tuning_init", f"one of {', '.join(known)}")
    if initial != "text":
        return {"initial": initial}
    values.only("tokenizer_kwargs", None, {})
    base, text = values.get("base_model_name_or_path"), values.get("prompt_tuning_init_text")
    if base and values.get("tokenizer_name_or_path") not in (None, base):
        raise values.wrong("tokenizer_name_or_path", f"that of the base, {base!r}")
    if not isinstance(text, str) or not text:
        raise values.wrong("prompt_tuning_init_text", "a text")
    return {"initial": initial, "text": text}


def config_from_peft(values: Values) -> PromptTuning:
    """Reads PEFT's config; see `PeftFormat`."""
    return PromptTuning(num_tokens=read_count(values), **read_start(values))


def read(values: Values, tensors: Tensors, base: Any) -> Adapter:
    """Reads the adapter of a PEFT folder."""
    tensors.require({EMBEDDINGS: read_sizes(values, base)}, base.name)
    rows = jnp.array(tensors.read(EMBEDDINGS))
    return prompt_adapter(PromptTuning.name, {"prompt": rows}, base.config.vocab_size)


def write(adapter: Adapter, base: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Config values and tensors of a PEFT folder."""
    rows = arrays_of(adapter)["prompt"]
    return write_sizes(len(rows), base), write_tensors(**{EMBEDDINGS: rows})


PEFT = PeftFormat(
    type="PROMPT_TUNING",
    defaults=SIZES | INITIAL,
    read_keys=READ_KEYS,
    harmless_keys=(*HARMLESS_KEYS, *INITIAL),
    read=read,
    write=write,
    config=config_from_peft,
    title="Soft prompt",
)

KIND = Kind(
    config=PromptTuning,
    bind=bind,
    own_axes=OWN_AXES,
    config_of=config_of,
    no_merge=NO_MERGE,
    virtual_tokens=virtual_tokens,
    first_virtual_id=first_virtual_id,
    check=check,
    peft=PEFT,
)
