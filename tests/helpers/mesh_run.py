"""Runs of a synthetic model whose sizes divide, over packed random rows, for tests of meshes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from toy_model import toy_model

import jaxpeft as jp
from jaxpeft.config.run_config import RunConfig
from jaxpeft.config.sections import ModelSection, TrainSection
from jaxpeft.data.batches import Plan
from jaxpeft.data.encode import Examples
from jaxpeft.data.settings import DataConfig
from jaxpeft.mesh import layouts, placement
from jaxpeft.methods.quantizing import quantize
from jaxpeft.training.rows import Rows
from jaxpeft.training.run import Run

SEQ, BATCH, STEPS, LEARNING_RATE = 16, 16, 10, 2e-3
SIZES = {
    "d_model": 64,
    "d_ff": 128,
    "num_heads": 8,
    "num_kv_heads": 8,
    "head_dim": 8,
    "vocab_size": 96,
    "num_layers": 2,
    "initializer_range": 0.3,
}
# Blocks of 64 rows: eight shards of whole blocks.
QUANTISED = SIZES | {"d_model": 512, "d_ff": 512, "head_dim": 64, "initializer_range": 0.05}
METHODS = {
    "lora": jp.LoRA(rank=4, alpha=8),
    "nf4": jp.LoRA(rank=4, alpha=8),
    "prompt": jp.PromptTuning(num_tokens=4),
}


def mesh_of(data=1, fsdp=1, tensor=1):
    """A mesh of the first devices, as many as its sizes make."""
    devices = jax.devices()[: data * fsdp * tensor]
    return layouts.make_mesh(data=data, fsdp=fsdp, tensor=tensor, devices=devices)


@functools.cache
def base_of(quantized=False, dtype="float32", **changes):
    """The model on one device."""
    sizes = (QUANTISED if quantized else SIZES) | changes
    base = toy_model(jax.random.key(0), tokenizer=False, **sizes)
    params = jax.tree.map(lambda x: x.astype(dtype), base.params)
    params = quantize(params) if quantized else params
    module = base.module.clone(compute_dtype=jnp.dtype(dtype))
    return dataclasses.replace(base, params=params, module=module)


@functools.cache
def rows_of(vocab_size, virtual, seq=SEQ):
    """Rows of several short examples each."""
    random = np.random.default_rng(0)
    lengths = random.integers(3, seq - virtual, size=STEPS * BATCH * 2)
    examples = Examples(
        tokens=[random.integers(vocab_size, size=n).astype(np.int32) for n in lengths],
        masks=[np.arange(n) > n // 3 for n in lengths],
        lines=list(range(1, len(lengths) + 1)),
        rows=[{}] * len(lengths),
        dropped={},
        truncated=0,
        path="random tokens",
        sha256="",
    )
    prefix = vocab_size + np.arange(virtual, dtype=np.int32)
    plan = Plan(examples.with_prefix(prefix), batch_size=BATCH, max_length=seq, pad_id=0)
    return Rows(plan, STEPS, None, train_rows=len(lengths))


def make_run(name, mesh, *, dtype="float32", microbatch_size=8, seq=SEQ, **changes):
    """A run of a method on a mesh."""
    method = changes.pop("method", METHODS.get(name))
    remat = changes.pop("remat", "full")
    base = base_of(name == "nf4", dtype, **changes)
    layout = layouts.as_layout(mesh, base.config)
    base = dataclasses.replace(base, params=placement.shard_params(base.params, layout))
    config = RunConfig(
        model=ModelSection(path="synthetic"),
        method=method,
        data=DataConfig(train="random tokens", max_length=seq),
        optim=jp.OptimConfig(learning_rate=LEARNING_RATE, schedule="constant"),
        train=TrainSection(
            steps=STEPS, batch_size=BATCH, microbatch_size=microbatch_size, remat=remat
        ),
        output_dir="nowhere",
    )
    rows = rows_of(base.config.vocab_size, method.num_virtual_tokens, seq)
    return Run(config, base, rows, layout)


def train(run, steps=STEPS):
    """Losses of steps, by the compiled step of the trainer."""
    step, losses = run.compile_step(), []
    for index in range(steps):
        batch = run.put(run.rows.plan.batch(index))
        run.state, metrics = step(run.state, run.base.params, batch)
        losses.append(float(metrics["loss"]))
    return losses
