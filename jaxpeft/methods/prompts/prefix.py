"""Prefix tuning: trained keys and values in front of every segment, in every layer.

With queries ``Q``, keys ``K`` and values ``V`` of a layer, and trained ``P_k, P_v`` of shape
``(n, kv_heads, head_dim)``, attention reads

    softmax(Q [P_k; K]^T / sqrt(head_dim)) [P_v; V].

The prefix has positions 0 to n - 1, and the tokens follow from n; its keys are not rotated. It
takes no slots of the input, so logits have the places of the tokens. Every packed segment sees the
same prefix. A prefix made of the key/value cache of a real prompt has the same effect as that
prompt (`prefix_from_prompt`).

With ``projection``, keys and values of all layers are ``W_2 tanh(W_1 E + b_1) + b_2`` of trained
embeddings ``E``, computed inside ``bind``. HF PEFT saves only the result.

Reference:
    Li and Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", 2021,
    https://arxiv.org/abs/2101.00190, sections 4.2 and 4.3.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError
from jaxpeft.methods.adapter import Adapter, Label, Spec
from jaxpeft.methods.family import Kind, Leaf
from jaxpeft.methods.fields import require_choice, require_count
from jaxpeft.methods.method import NO_CONTEXT, Context, Method
from jaxpeft.methods.peft.values import PeftFormat, Tensors, Values
from jaxpeft.methods.prompts.cached_prompt import keys_and_values, require_ids
from jaxpeft.methods.prompts.prompt import (
    EMBEDDINGS,
    SIZES,
    read_count,
    write_tensors,
)
from jaxpeft.models.attention import Prefix
from jaxpeft.ops.linear import shape_of

Initial = Literal["random", "zero", "prompt"]
PATH = "prefix"
KEYS = "layers/self_attn/k_proj/kernel"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixTuning(Method):
    """The length of the prefix, its initialisation, and whether a projection computes it.

    Attributes:
        num_tokens: Keys and values in front of every segment, in every layer.
        initial: "random" starts from normal numbers as in PEFT, "zero" from zeros, "prompt" from
            the keys and values that the base computes for `text`.
        text: The text whose first `num_tokens` tokens are used; for "prompt" only.
        projection: Train embeddings and two layers that compute the prefix from them.
        hidden_size: Width of the projection; None for the width of the keys.
    """

    name: ClassVar[str] = "prefix_tuning"

    num_tokens: int = 20
    initial: Initial = "random"
    text: str | None = None
    projection: bool = False
    hidden_size: int | None = None

    def __post_init__(self):
        require_count(self, "num_tokens")
        require_choice(self, "initial", Initial)
        if (self.initial == "prompt") != bool(self.text):
            raise ValueError(
                'PrefixTuning.text must be given with initial "prompt" and only then, got '
                f"{self.text!r} with {self.initial!r}."
            )
        if self.projection and self.initial == "prompt":
            raise ValueError(
                'PrefixTuning.projection must be false with initial "prompt": no projection is '
                "known that gives its keys and values, got True."
            )
        if self.hidden_size is not None:
            require_count(self, "hidden_size")

    def check_any_model(self) -> None:
        """Refuses other models.

        Raises:
            UserError: Always.
        """
        raise UserError(
            "prefix_tuning: its keys and values enter the attention of models of jaxpeft alone; "
            "take prompt_tuning."
        )

    def init(self, params: dict, key: jax.Array, context: Context = NO_CONTEXT) -> Adapter:
        """A new prefix; it changes what the model computes from the start.

        Embeddings and plain prefixes are standard normal. Weights and biases of a projection are
        uniform in ``+-1/sqrt(fan_in)``. With "zero", keys and values are zero.

        Args:
            params: Base parameters; only "prompt" reads them.
            key: Typed PRNG key.
            context: The model's config is used; for "prompt" its tokenizer too.

        Returns:
            An adapter with ``k`` and ``v`` of shape ``(layers, n, kv_heads, head_dim)``, or with
            the arrays of the projection.

        Raises:
            UserError: If the config is missing, or for "prompt" the tokenizer, or if the text has
                too few tokens.
        """
        config = context.config
        if config is None:
            raise UserError(
                "prefix_tuning needs the number of key heads: pass the model itself to "
                "init_adapter, not its parameters."
            )
        if self.initial == "prompt":
            ids = self._prompt_ids(config.vocab_size, context.tokenizer)
            return _adapter(keys_and_values(config, context.module, params, ids))
        heads = (config.num_kv_heads, config.head_dim)
        if self.projection:
            return _adapter(self._projection(config.num_layers, heads, key))
        keys = dict(zip("kv", jax.random.split(key), strict=True))
        shape = (config.num_layers, self.num_tokens, *heads)
        if self.initial == "zero":
            return _adapter({name: jnp.zeros(shape) for name in keys})
        return _adapter({name: jax.random.normal(one, shape) for name, one in keys.items()})

    def _projection(self, layers: int, heads: tuple[int, int], key: jax.Array) -> dict[str, Any]:
        width = math.prod(heads)
        hidden = self.hidden_size or width
        shapes = {
            "mlp_0_kernel": ((width, hidden), width),
            "mlp_0_bias": ((hidden,), width),
            "mlp_1_kernel": ((hidden, layers, 2, *heads), hidden),
            "mlp_1_bias": ((layers, 2, *heads), hidden),
        }
        arrays = {"embedding": jax.random.normal(key, (self.num_tokens, width))}
        for number, (name, (shape, fan_in)) in enumerate(shapes.items(), 1):
            bound = 1.0 / math.sqrt(fan_in)
            if self.initial == "zero" and name.startswith("mlp_1"):
                bound = 0.0
            name_key = jax.random.fold_in(key, number)
            arrays[name] = jax.random.uniform(name_key, shape, minval=-bound, maxval=bound)
        return arrays

    def _prompt_ids(self, vocab_size: int, tokenizer: Any) -> list[int]:
        if tokenizer is None:
            raise UserError(
                'initial "prompt" needs a tokenizer: pass the model itself to init_adapter, and '
                "put its tokenizer files beside the weights."
            )
        ids = list(tokenizer(self.text)["input_ids"])[: self.num_tokens]
        if len(ids) < self.num_tokens:
            raise UserError(
                f"text: {self.text!r:.60} has {len(ids)} tokens, num_tokens is {self.num_tokens}; "
                "lower it, or write more."
            )
        require_ids(ids, vocab_size)
        return ids


def prefix_from_prompt(base: Any, ids: Sequence[int]) -> Adapter:
    """The prefix with the same effect as these tokens in front of every segment.

    Args:
        base: The `jaxpeft.Model`.
        ids: Token ids of a prompt.

    Returns:
        An adapter with one virtual token per id; it can be trained further.

    Raises:
        UserError: If there is no id, or one outside the vocabulary.
    """
    ids = [int(token) for token in ids]
    require_ids(ids, base.config.vocab_size)
    adapter = _adapter(keys_and_values(base.config, base.module, base.params, ids))
    return dataclasses.replace(adapter, base_name=Label(base.name))


def _adapter(arrays: dict[str, Any]) -> Adapter:
    return Adapter({PATH: arrays}, {}, Spec(kind=PrefixTuning.name, paths=(PATH,)))


def project(
    arrays: Mapping[str, Any],
) -> tuple[Float[Array, "layers n kv_heads d"], Float[Array, "layers n kv_heads d"]]:
    """Keys and values from trained arrays, with or without a projection."""
    if "k" in arrays:
        return arrays["k"], arrays["v"]
    hidden = jnp.tanh(arrays["embedding"] @ arrays["mlp_0_kernel"] + arrays["mlp_0_bias"])
    both = jnp.einsum("nh,hltkd->ltnkd", hidden, arrays["mlp_1_kernel"])
    both += arrays["mlp_1_bias"][:, :, None]
    return both[:, 0], both[:, 1]


def bind(leaf: Leaf) -> dict[str, Any]:
    """Puts the prefix beside the base's parameters.

    Raises:
        UserError: There is another prefix already.
    """
    if leaf.base is not None:
        raise UserError("two prefixes cannot stand in front of one base; pass one of them.")
    return {leaf.path: Prefix(*project(leaf.params))}


def bind_rows(leaf: Leaf, used: Any) -> dict[str, Any]:
    """Puts a prefix for each row of a mixed batch beside the parameters, or none if unused."""
    k, v = jax.vmap(project, out_axes=1)(leaf.params)
    return {leaf.path: Prefix(k, v, jnp.broadcast_to(used, k.shape[:2]))}


def length(adapter: Adapter) -> int:
    """The number of positions that a prefix takes."""
    arrays = adapter.params[PATH]
    return arrays["k"].shape[-3] if "k" in arrays else arrays["embedding"].shape[-2]


def check(params: dict, adapter: Adapter) -> None:
    """Checks that the keys have the base's number of layers and width.

    Raises:
        UserError: The keys have another number of layers or another width.
    """
    arrays = adapter.params[PATH]
    plain = "k" in arrays
    shape = arrays["k" if plain else "mlp_1_bias"].shape
    theirs = (shape[0] if plain else shape[-4], math.prod(shape[-2:]))
    kernel = shape_of(paths.get(params, KEYS))
    if theirs != (kernel[0], kernel[-1]):
        raise UserError(
            f"{PATH}: the adapter was made for {theirs[0]} layers with keys of width {theirs[1]}, "
            f"this base has {kernel[0]} with width {kernel[-1]}; it belongs to another model."
        )


def config_of(adapter: Adapter) -> PrefixTuning:
    """The config of an adapter; its initialisation is not stored."""
    arrays, count = adapter.params[PATH], length(adapter)
    if "k" in arrays:
        return PrefixTuning(num_tokens=count)
    hidden = arrays["mlp_0_bias"].shape[-1]
    return PrefixTuning(num_tokens=count, projection=True, hidden_size=hidden)


# HF PEFT.


def config_from_peft(values: Values) -> PrefixTuning:
    """Reads PEFT's config; see `PeftFormat`."""
    values.only("init_weights", None, "zero")
    projection, hidden = values.flag("prefix_projection"), None
    if projection and values.get("encoder_hidden_size") is not None:
        hidden = values.count("encoder_hidden_size")
    return PrefixTuning(
        num_tokens=read_count(values),
        initial="random" if values.get("init_weights") is None else "zero",
        projection=projection,
        hidden_size=hidden,
    )


def read(values: Values, tensors: Tensors, base: Any) -> Adapter:
    """Reads the adapter of a PEFT folder, whose rows hold every layer's keys, then its values.

    Raises:
        UserError: The config describes another base.
    """
    config, count = base.config, read_count(values)
    heads = (config.num_kv_heads, config.head_dim)
    sizes = {
        "num_attention_heads": heads[0],
        "num_layers": config.num_layers,
        "token_dim": math.prod(heads),
    }
    for name, ours in sizes.items():
        if values.get(name) not in (None, ours):
            raise UserError(
                f"{values.file}: {name}: this base has {ours}, got {values.get(name)!r:.60}; the "
                "adapter was made for another model."
            )
    width = 2 * config.num_layers * math.prod(heads)
    tensors.require({EMBEDDINGS: (count, width)}, base.name)
    rows = tensors.read(EMBEDDINGS).reshape(count, config.num_layers, 2, *heads)
    k, v = np.moveaxis(rows, 0, 2).swapaxes(0, 1)
    return _adapter({"k": jnp.array(k), "v": jnp.array(v)})


def write(adapter: Adapter, base: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Config values and the one tensor of a PEFT folder; a projection is computed, as in PEFT."""
    rows = np.stack(project(adapter.params[PATH]), axis=1)
    rows = np.moveaxis(rows, 2, 0)
    config = base.config
    width = config.num_kv_heads * config.head_dim
    values = {
        "encoder_hidden_size": width,
        "num_attention_heads": config.num_kv_heads,
        "num_layers": config.num_layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": len(rows),
        "token_dim": width,
    }
    return values, write_tensors(**{EMBEDDINGS: rows.reshape(len(rows), -1)})


STARTS: dict[str, Any] = {
    "encoder_hidden_size": None,
    "init_weights": None,
    "prefix_projection": False,
}
"""Keys that say how the prefix was trained; the saved tensors are the computed prefix."""

PEFT = PeftFormat(
    type="PREFIX_TUNING",
    defaults=SIZES | STARTS,
    read_keys=tuple(SIZES.keys() - {"modules_to_save"}),
    harmless_keys=tuple(STARTS),
    read=read,
    write=write,
    config=config_from_peft,
    title="Prefix of keys and values",
)

KIND = Kind(
    config=PrefixTuning,
    bind=bind,
    bind_rows=bind_rows,
    own_axes={"k": 4, "embedding": 2},
    config_of=config_of,
    needs_base=False,
    no_merge="its keys and values stand in front of the input; keep it beside the base",
    offset=length,
    check=check,
    peft=PEFT,
)
