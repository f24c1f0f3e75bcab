"""A decoder-only transformer in Flax Linen: Llama, SmolLM2, Mistral, Qwen2 and Qwen3.

Layers are stacked on a leading axis and run under ``nn.scan(nn.remat(Block))``, so compile time
does not grow with depth. A setting that differs by layer (the window) is an array that is scanned
along. Parameters are named like Hugging Face's modules; a parameter may be an array or a node (see
`jaxpeft.ops.linear`).

Reference:
    Touvron et al., "Llama 2: Open Foundation and Fine-Tuned Chat Models", 2023,
    https://arxiv.org/abs/2307.09288, section 2.2.
"""

import dataclasses
import operator
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpeft.core import paths
from jaxpeft.mesh.constraints import GATHERED, gathered, keep_rows, look_up, on_mesh
from jaxpeft.models import rope
from jaxpeft.models.attention import Prefix, attention, positions_of
from jaxpeft.models.cache import Cache, append, append_slots, merge_heads
from jaxpeft.models.config import ModelConfig
from jaxpeft.models.head import head_logits
from jaxpeft.models.layers import Linear, RMSNorm, Weight
from jaxpeft.models.tiles import KEPT
from jaxpeft.ops.linear import CAPTURE, PRODUCT, SHARED, Transposed
from jaxpeft.ops.products import chain_dtype, kept_input

_POLICIES = jax.checkpoint_policies
STREAM = "stream"
"""Tag of a layer's input that is kept as bits, see `jaxpeft.ops.products.kept_input`."""

_KEEP_ATTENTION = _POLICIES.save_only_these_names(KEPT, STREAM)
REMAT_POLICIES: dict[str, Any] = {
    "none": _POLICIES.save_anything_except_these_names(GATHERED),
    "full": _KEEP_ATTENTION,
    "dots": _POLICIES.save_only_these_names(KEPT, STREAM, PRODUCT),
}
"""Policies for what is kept of a layer for the backward pass.

"none" rematerialises nothing: everything is kept except weights that a mesh gathers for the layer.
"full" keeps the layer's input and, where attention runs in tiles, its result (``heads * head_dim``
numbers per token) and its log-sum-exp (``heads`` numbers per token). "dots" also keeps the products
of linear modules and of adapters: no product of tokens with a kernel is computed again. Operations
between the products are, which takes less time on CPU than keeping their results. (LoHa of a high
rank and LoKr multiply their factors again.)
"""


@flax.struct.dataclass
class Shared:
    """Inputs that all layers read: positions, segments and rotations of queries and keys.

    `one_by_one` says that layers are not scanned, and that the cache has the form of `by_layer`.
    """

    cos: Any
    sin: Any
    q_positions: Any
    k_positions: Any
    q_segments: Any
    k_segments: Any
    used: Any
    in_order: bool = flax.struct.field(pytree_node=False)
    one_by_one: bool = flax.struct.field(pytree_node=False, default=False)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch seq d_model"], layer: dict, shared: Shared
    ) -> tuple[Float[Array, "batch seq d_model"], Any]:
        """Returns the layer's output and, if there is a cache, the layer's new keys and values."""
        c = self.config
        batch, seq, _ = x.shape

        def heads(name: str, count: int) -> Float[Array, "batch seq heads head_dim"]:
            y = Linear(count * c.head_dim, c.qkv_bias, c.initializer_range, name=name)(x)
            return y.reshape(batch, seq, count, c.head_dim)

        q = heads("q_proj", c.num_heads)
        k = heads("k_proj", c.num_kv_heads)
        v = heads("v_proj", c.num_kv_heads)
        if c.qk_norm:
            q, k = RMSNorm(c.rms_eps, name="q_norm")(q), RMSNorm(c.rms_eps, name="k_norm")(k)
        q, k = rope.rotate(q, shared.cos, shared.sin), rope.rotate(k, shared.cos, shared.sin)
        stored = None
        if layer["cache"] is not None:
            new = tuple(x.swapaxes(1, 2) for x in (k, v))
            if shared.one_by_one:
                stored = append_slots(layer["cache"], merge_heads(new), shared.used)
                whole = (x.reshape(batch, c.num_kv_heads, -1, c.head_dim) for x in stored)
            else:  # only the new tokens' part: a scan would copy the whole cache once more
                stored, whole = new, append_slots(layer["cache"], new, shared.used)
            k, v = (x.swapaxes(1, 2) for x in whole)
        out = attention(
            q,
            k.astype(q.dtype),
            v.astype(q.dtype),
            q_positions=shared.q_positions,
            k_positions=shared.k_positions,
            q_segments=shared.q_segments,
            k_segments=shared.k_segments,
            window=layer["window"],
            windows=c.windows,
            prefix=layer["prefix"],
            in_order=shared.in_order,
        )
        out = out.reshape(batch, seq, c.num_heads * c.head_dim)
        return Linear(c.d_model, c.out_bias, c.initializer_range, name="o_proj")(out), stored


class MLP(nn.Module):
    """SwiGLU (Shazeer, "GLU Variants Improve Transformer", 2020, equation 6)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch seq d"]) -> Float[Array, "batch seq d"]:
        """``down(silu(gate(x)) * up(x))``."""
        c = self.config
        gate = Linear(c.d_ff, c.mlp_bias, c.initializer_range, name="gate_proj")(x)
        up = Linear(c.d_ff, c.mlp_bias, c.initializer_range, name="up_proj")(x)
        down = Linear(c.d_model, c.mlp_bias, c.initializer_range, name="down_proj")
        dtype = chain_dtype(x)
        return down((nn.silu(gate.astype(dtype)) * up.astype(dtype)).astype(x.dtype))


class Block(nn.Module):
    """One layer: attention and MLP, each behind a norm and added to the stream."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch seq d"], layer: dict, shared: Shared) -> Any:
        """Returns the residual stream and the layer's part of the cache, a pair for ``nn.scan``."""
        eps = self.config.rms_eps
        x = kept_input(x, STREAM)
        h = RMSNorm(eps, name="input_layernorm")(x)
        h, stored = Attention(self.config, name="self_attn")(h, layer, shared)
        x = keep_rows(x + h)
        h = RMSNorm(eps, name="post_attention_layernorm")(x)
        return keep_rows(x + MLP(self.config, name="mlp")(h)), stored


class Transformer(nn.Module):
    """The decoder.

    Attributes:
        config: Sizes and variants.
        compute_dtype: dtype of activations; weights are cast as they are used.
        remat: "none", "full" or "dots": see `REMAT_POLICIES`.
    """

    config: ModelConfig
    compute_dtype: Any = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(
        self,
        input_ids: Int[Array, "batch seq"],
        *,
        segment_ids: Int[Array, "batch seq"] | None = None,
        positions: Int[Array, "batch seq"] | None = None,
        in_order: bool = False,
        cache: Cache | None = None,
        return_hidden: bool = False,
    ) -> Any:
        """Runs the decoder.

        Args:
            input_ids: Token ids; they must lie within the vocabulary.
            segment_ids: Which packed segment each token is in; 0 is padding. Default: all 1.
            positions: Position within the segment. Default: 0, 1, 2, ..., continuing where the
                cache ends; padded prompts in a cache need explicit positions. Positions do not
                count a prefix; with a prefix and without a cache, every segment begins at 0.
            in_order: Whether the given positions count up slot by slot in every segment, like
                those of packed batches. Attention may use a kernel then. The default positions do.
            cache: Keys and values of earlier tokens; the new tokens are appended to it.
            return_hidden: Return the final hidden states ``(batch, seq, d_model)`` instead.

        Returns:
            Logits ``(batch, seq, vocab)`` in float32, or hidden states; with a cache, a pair of
            these and the new cache.
        """
        c = self.config
        if segment_ids is None:
            segment_ids = jnp.ones(input_ids.shape, jnp.int32)
        prefix, in_order = self._prefix(), cache is None and (in_order or positions is None)
        if positions is None and prefix is not None and cache is None:
            positions = positions_of(segment_ids)  # because distances to the prefix matter
        if positions is None:
            first = 0 if cache is None else cache.used
            positions = jnp.broadcast_to(first + jnp.arange(input_ids.shape[1]), input_ids.shape)
        if prefix is not None:
            positions = prefix.shift(positions)
        size, std = (c.vocab_size, c.d_model), c.initializer_range
        table = Weight("embedding", size, std, name="embed_tokens")()
        x = look_up(input_ids, table).astype(self.compute_dtype)
        if cache is not None:
            cache = append(cache, positions, segment_ids)
        x, stored = self._run_layers(x, positions, segment_ids, cache, prefix, in_order)
        x = RMSNorm(c.rms_eps, name="norm")(x)
        if not return_hidden or self.is_initializing():
            logits = head_logits(self._head(table), x)
            x = x if return_hidden else logits
        if cache is None:
            return x
        if not self._is_unstacked():
            stored = append_slots((cache.k, cache.v), stored, cache.used)
        used = cache.used + input_ids.shape[1]
        return x, dataclasses.replace(cache, k=stored[0], v=stored[1], used=used)

    def _run_layers(
        self,
        x: Any,
        positions: Any,
        segment_ids: Any,
        cache: Cache | None,
        prefix: Prefix | None,
        in_order: bool,
    ) -> Any:
        c = self.config
        cos, sin = rope.angles(c, positions)
        k_positions, k_segments, used = positions, segment_ids, None
        if cache is not None:
            k_positions, k_segments, used = cache.positions, cache.segment_ids, cache.used
        shared = Shared(cos, sin, positions, k_positions, segment_ids, k_segments, used, in_order)
        layer = {
            "window": jnp.asarray(c.windows, jnp.int32) if any(c.windows) else None,
            "cache": None if cache is None else (cache.k, cache.v),
            "prefix": prefix,
        }
        if self._is_unstacked():
            return self._run_each(x, layer, shared)
        block: Any = Block
        if self.remat != "none" or on_mesh():
            block = nn.remat(Block, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        layers = nn.scan(
            block,
            variable_axes={"params": 0, CAPTURE: 0},
            variable_broadcast=SHARED,
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=c.num_layers,
        )
        return layers(c, name="layers")(x, layer, shared)

    def _is_unstacked(self) -> bool:
        return isinstance(self.variables.get("params", {}).get("layers"), tuple)

    def _run_each(self, x: Any, layer: dict, shared: Shared) -> Any:
        """Runs the layers one after the other, see `jaxpeft.models.unstack`."""
        given, block, stored = self.variables, Block(self.config, parent=None), []
        shared = dataclasses.replace(shared, one_by_one=True)
        for index, params in enumerate(given["params"]["layers"]):
            variables = {"params": params, SHARED: given.get(SHARED, {}).get("layers", {})}
            part = {
                "window": None if layer["window"] is None else layer["window"][index],
                "cache": None if layer["cache"] is None else [old[index] for old in layer["cache"]],
                "prefix": jax.tree.map(operator.itemgetter(index), layer["prefix"]),
            }
            x, new = block.apply(variables, x, part, shared)
            stored.append(new)
        return x, tuple(zip(*stored, strict=True))

    def _prefix(self) -> Prefix | None:
        """Trained keys and values of all layers, if an adapter has a prefix."""
        if not self.has_variable("params", "prefix"):
            return None
        prefix, c = self.get_variable("params", "prefix"), self.config
        if prefix.k.shape[-2:] != (c.num_kv_heads, c.head_dim):
            asked = (c.num_kv_heads, c.head_dim)
            raise ValueError(
                f"prefix has heads {prefix.k.shape[-2:]}, the config asks for {asked}."
            )
        return prefix

    def _head(self, table: Any) -> Any:
        c = self.config
        if c.tie_embeddings and not self.has_variable("params", "lm_head"):
            return Transposed(gathered(paths.EMBEDDING, table))
        size = (c.d_model, c.vocab_size)
        return gathered(paths.HEAD, Weight("kernel", size, c.initializer_range, name="lm_head")())
