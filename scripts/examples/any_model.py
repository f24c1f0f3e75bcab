"""Trains LoRA on an NNX model of one's own, with jaxpeft's data plan, checkpoints and metrics.

The model is a small decoder over bytes. Sentences are packed into rows; batches are a function of
the step, so a run that was stopped needs nothing but its step to go on. Run the same command again
and it does: it ends with the same adapter and the same lines of metrics, to the bit.

Command: ``python scripts/examples/any_model.py runs/any_model``
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxpeft as jp
from jaxpeft.checkpoints.checkpoints import Checkpoints
from jaxpeft.data.batches import iterate
from jaxpeft.data.encode import Examples
from jaxpeft.reports.metrics_log import open_log

TEXT = pathlib.Path(__file__).parents[1] / "general_text.txt"
STEPS, SAVE_EVERY = 40, 10


class Decoder(nnx.Module):
    """One block over bytes; it knows nothing of jaxpeft."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(256, 32, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 32, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(32, 64, rngs=rngs), nnx.Linear(64, 32, rngs=rngs)
        self.head = nnx.Linear(32, 256, rngs=rngs)

    def __call__(self, tokens: jax.Array, segments: jax.Array) -> jax.Array:
        """Logits of the next byte. Every byte sees those before it in its own sentence."""
        same = segments[:, None, :, None] == segments[:, None, None, :]
        x = self.embed(tokens)
        x += self.attention(x, mask=nnx.make_causal_mask(tokens) * same)
        return self.head(x + self.down(nnx.gelu(self.up(x))))


def main(folder: pathlib.Path) -> None:
    """Trains, or goes on from the newest checkpoint in the folder."""
    graph, params, rest = nnx.split(Decoder(nnx.Rngs(0)), nnx.Param, ...)

    def model(params: nnx.State, batch: dict) -> jax.Array:
        return nnx.merge(graph, params, rest)(batch["tokens"], batch["segment_ids"])

    def loss(params: nnx.State, adapter: jp.Adapter, batch: dict, key: jax.Array) -> tuple:
        del key  # of dropout: bind(params, adapter, dropout_key=key)
        logits = jp.lift(model)(jp.bind(params, adapter), batch)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return jnp.sum(losses * batch["weights"]), {"weight": batch["weights"].sum()}

    sentences = [np.frombuffer(line, np.uint8) for line in TEXT.read_bytes().splitlines()]
    plan = jp.Plan(Examples.of_tokens(sentences, str(TEXT)), batch_size=8, max_length=128)
    roles = jp.describe(model, params, plan.batch(0))
    method = jp.LoRA(rank=8, targets="all-linear")
    adapter = jp.init_adapter(method, params, jax.random.key(1), roles=roles)
    rule = jp.make_optimizer(jp.OptimConfig(learning_rate=0.01, warmup_steps=5), STEPS, method)
    tx = jp.masked(rule, jp.adapter_only)
    state = jp.init_train_state(params, adapter, tx, jax.random.key(2))
    step = jp.make_train_step(loss, tx)

    folder.mkdir(parents=True, exist_ok=True)
    with Checkpoints(folder / "checkpoints") as checkpoints, open_log(folder / "log.jsonl") as log:
        done = checkpoints.latest() or 0
        if done:
            if checkpoints.meta(done)["data"] != plan.hash:
                raise jp.UserError(f"{folder}: this run began with other data; take another folder")
            state = checkpoints.restore(done, like=state)
        log.truncate_after(done)
        for number, batch in enumerate(iterate(plan, done, STEPS), done + 1):
            state, metrics = step(state, params, batch)
            log.append({"step": number, "loss": metrics["loss"], "norm": metrics["grad_norm"]})
            if number % SAVE_EVERY == 0 or number == STEPS:
                log.keep()  # lines first: a checkpoint vouches for them
                checkpoints.save(number, state, meta={"data": plan.hash})
    jp.save_adapter(folder / "adapter", state.adapter, params)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
