"""P-tuning: a soft prompt that a small encoder computes from trained input embeddings.

The rows of virtual tokens are ``encode(E)`` for input embeddings ``E`` of shape ``(n, d)``, where
``encode`` is, with hidden size ``h``,

    mlp:   Linear(d, h), ReLU, Linear(h, h), ReLU, Linear(h, d)
    lstm:  two bidirectional LSTM layers of width h, Linear(2h, 2h), ReLU, Linear(2h, d)

The encoder runs inside ``bind``, once per step; its output is a plain prompt. HF PEFT saves only
the encoder's output, so an adapter from a folder has no encoder (``encoder: none``), and its rows
are trained directly.

References:
    Liu et al., "GPT Understands, Too", 2021, https://arxiv.org/abs/2103.10385, section 3.2 and
    equation 2.
    Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxpeft.core import paths
from jaxpeft.methods.adapter import Adapter
from jaxpeft.methods.family import Kind, Leaf
from jaxpeft.methods.fields import require_choice, require_count
from jaxpeft.methods.method import NO_CONTEXT, Context, Method
from jaxpeft.methods.peft.values import PeftFormat, Tensors, Values
from jaxpeft.methods.prompts import prompt, table
from jaxpeft.ops.linear import shape_of

Encoder = Literal["mlp", "lstm", "none"]
DIRECTIONS = ("forward", "backward")
LSTM_LAYERS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class PTuning(Method):
    """The number of virtual tokens, and the encoder that computes them.

    Attributes:
        num_tokens: Virtual tokens in front of every segment.
        encoder: "mlp", "lstm", or "none" to train the rows directly.
        hidden_size: Width of the encoder; None for the model's width.
    """

    name: ClassVar[str] = "p_tuning"

    num_tokens: int = 20
    encoder: Encoder = "mlp"
    hidden_size: int | None = None

    def __post_init__(self):
        require_count(self, "num_tokens")
        require_choice(self, "encoder", Encoder)
        if self.hidden_size is not None:
            require_count(self, "hidden_size")

    @property
    def num_virtual_tokens(self) -> int:
        """Virtual tokens in front of every segment."""
        return self.num_tokens

    def check_any_model(self) -> None:
        """It can: virtual tokens are rows behind those of the table."""

    def init(self, params: dict, key: jax.Array, context: Context = NO_CONTEXT) -> Adapter:
        """A new prompt and encoder, with PEFT's distributions.

        Input embeddings are standard normal. Weights and biases are uniform in
        ``+-1/sqrt(fan_in)``, those of an LSTM in ``+-1/sqrt(hidden_size)``.

        Args:
            params: Base parameters; shapes are enough.
            key: Typed PRNG key.
            context: Not used.

        Returns:
            An adapter with the input embeddings ``prompt`` and the encoder's arrays at the
            embedding table.

        Raises:
            UserError: A model that is not ours has no table, or several.
        """
        del context
        path = paths.table_of(params)
        vocab_size, width = shape_of(paths.get(params, path))
        hidden = self.hidden_size or width
        arrays: dict[str, Any] = {"prompt": jax.random.normal(key, (self.num_tokens, width))}
        shapes = encoder_shapes(self.encoder, width, hidden)
        for number, (name, (shape, fan_in)) in enumerate(shapes.items(), 1):
            bound = 1.0 / math.sqrt(fan_in)
            name_key = jax.random.fold_in(key, number)
            arrays[name] = jax.random.uniform(name_key, shape, minval=-bound, maxval=bound)
        options = {"encoder": self.encoder, "hidden_size": hidden}
        return prompt.prompt_adapter(self.name, arrays, vocab_size, path, **options)


def encoder_shapes(
    encoder: Encoder, width: int, hidden: int
) -> dict[str, tuple[tuple[int, ...], int]]:
    """Shape and fan-in of an encoder's arrays; the fan-in determines the initial range."""
    if encoder == "none":
        return {}
    found: dict[str, tuple[tuple[int, ...], int]] = {}
    sizes = [width, hidden, hidden, width]
    if encoder == "lstm":
        sizes = [2 * hidden, 2 * hidden, width]
        for layer in range(LSTM_LAYERS):
            d_in = 2 * hidden if layer else width
            for direction in DIRECTIONS:
                place = f"lstm_{layer}_{direction}"
                found[f"{place}_input"] = (d_in, 4 * hidden), hidden
                found[f"{place}_state"] = (hidden, 4 * hidden), hidden
                found[f"{place}_input_bias"] = (4 * hidden,), hidden
                found[f"{place}_state_bias"] = (4 * hidden,), hidden
    for layer, (d_in, d_out) in enumerate(itertools.pairwise(sizes)):
        found[f"mlp_{layer}_kernel"] = (d_in, d_out), d_in
        found[f"mlp_{layer}_bias"] = (d_out,), d_in
    return found


def encode(arrays: Mapping[str, Any], encoder: Encoder) -> Float[Array, "n d_model"]:
    """The rows of the virtual tokens; see the module's equations."""
    h = arrays["prompt"]
    if encoder == "lstm":
        for layer in range(LSTM_LAYERS):
            ways = [lstm(h, arrays, f"lstm_{layer}_{way}", way) for way in DIRECTIONS]
            h = jnp.concatenate(ways, axis=-1)
    count = sum(name.startswith("mlp_") for name in arrays) // 2
    for layer in range(count):
        h = h @ arrays[f"mlp_{layer}_kernel"] + arrays[f"mlp_{layer}_bias"]
        h = jax.nn.relu(h) if layer < count - 1 else h
    return h


def lstm(
    x: Float[Array, "n d_in"], arrays: Mapping[str, Any], place: str, direction: str
) -> Float[Array, "n hidden"]:
    """The hidden states of one layer in one direction; gates in torch's order i, f, g, o."""
    bias = arrays[f"{place}_input_bias"] + arrays[f"{place}_state_bias"]
    inputs, weight = x @ arrays[f"{place}_input"] + bias, arrays[f"{place}_state"]

    def step(carry: Any, row: Any) -> Any:
        h, c = carry
        i, f, g, o = jnp.split(row + h @ weight, 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zeros = jnp.zeros(weight.shape[0], x.dtype)
    return jax.lax.scan(step, (zeros, zeros), inputs, reverse=direction == "backward")[1]


def bind(leaf: Leaf) -> dict[str, Any]:
    """The node for the embedding table.

    Raises:
        UserError: The table has the rows of another soft prompt already.
    """
    return table.bind_rows(leaf, encode(leaf.params, leaf.options["encoder"]))


def config_of(adapter: Adapter) -> PTuning:
    """The config of an adapter."""
    options = dict(adapter.spec.options)
    return PTuning(
        num_tokens=prompt.virtual_tokens(adapter),
        encoder=options["encoder"],
        hidden_size=options["hidden_size"],
    )


def config_from_peft(values: Values) -> PTuning:
    """Reads PEFT's config; see `PeftFormat`.

    Raises:
        UserError: The encoder is of an unknown kind.
    """
    encoder, hidden = _encoder(values)
    if encoder == "lstm":  # settings that an MLP does not have
        values.only("encoder_num_layers", LSTM_LAYERS)
        values.only("encoder_dropout", 0)
    return PTuning(num_tokens=prompt.read_count(values), encoder=encoder, hidden_size=hidden)


def _encoder(values: Values) -> tuple[Encoder, int | None]:
    """The encoder in PEFT's config and its width, None for the model's width."""
    known: dict[str, Encoder] = {"MLP": "mlp", "LSTM": "lstm"}
    encoder = known.get(str(values.get("encoder_reparameterization_type")))
    if encoder is None:
        raise values.wrong("encoder_reparameterization_type", "MLP or LSTM")
    if values.get("encoder_hidden_size") is None:
        return encoder, None
    return encoder, values.count("encoder_hidden_size")


def read(values: Values, tensors: Tensors, base: Any) -> Adapter:
    """Reads the adapter of a PEFT folder.

    The folder holds the encoder's output, not the encoder; these rows are what is trained on.

    Raises:
        UserError: The encoder is of an unknown kind.
    """
    sizes = prompt.read_sizes(values, base)
    tensors.require({prompt.EMBEDDINGS: sizes}, base.name)
    encoder, hidden = _encoder(values)
    return prompt.prompt_adapter(
        PTuning.name,
        {"prompt": jnp.array(tensors.read(prompt.EMBEDDINGS))},
        base.config.vocab_size,
        encoder="none",
        hidden_size=hidden or sizes[1],
        trained_with=encoder,
    )


def write(adapter: Adapter, base: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Config values and tensors of a PEFT folder: the encoder's output."""
    options = dict(adapter.spec.options)
    rows = encode(prompt.arrays_of(adapter), options["encoder"])
    encoder = options["encoder"]
    if encoder == "none":
        encoder = options.get("trained_with", "mlp")
    values = prompt.write_sizes(len(rows), base) | {
        "encoder_hidden_size": options["hidden_size"],
        "encoder_reparameterization_type": encoder.upper(),
    }
    return values, prompt.write_tensors(**{prompt.EMBEDDINGS: rows})


KIND = Kind(
    config=PTuning,
    bind=bind,
    own_axes=prompt.OWN_AXES,
    config_of=config_of,
    notes=("trained_with",),
    no_merge=prompt.NO_MERGE,
    virtual_tokens=prompt.virtual_tokens,
    first_virtual_id=prompt.first_virtual_id,
    check=prompt.check,
    peft=PeftFormat(
        type="P_TUNING",
        defaults=prompt.SIZES
        | {
            "encoder_dropout": 0.0,
            "encoder_hidden_size": None,
            "encoder_num_layers": 2,
            "encoder_reparameterization_type": "MLP",
        },
        read_keys=(
            *prompt.READ_KEYS,
            "encoder_hidden_size",
            "encoder_reparameterization_type",
        ),
        harmless_keys=(*prompt.HARMLESS_KEYS, "encoder_dropout", "encoder_num_layers"),
        read=read,
        write=write,
        config=config_from_peft,
        title="Soft prompt of P-tuning",
    ),
)
