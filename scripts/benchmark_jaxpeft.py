"""The benchmark's side of jaxpeft: the very steps of ``jaxpeft.train``, over random tokens.

With ``dtype: bfloat16`` weights and activations are in it, also on CPU, where jaxpeft by itself
("auto") would compute in float32. The side also writes the folder that all sides load the model
from.

Usage: see benchmark.py, which starts it.
"""

import argparse
import dataclasses
import itertools
from typing import Any, cast

import benchmark_side as side
import jax
import jax.numpy as jnp
import numpy as np

import jaxpeft as jp
from jaxpeft.cli import arguments
from jaxpeft.config.run_config import RunConfig
from jaxpeft.config.sections import ModelSection, TrainSection
from jaxpeft.data.batches import Plan, iterate
from jaxpeft.data.encode import Examples
from jaxpeft.data.settings import DataConfig
from jaxpeft.inference.decoding import generate_ids
from jaxpeft.mesh import layouts
from jaxpeft.methods.leaves.full import Full
from jaxpeft.methods.lora.config import LoRA
from jaxpeft.methods.prompts.prompt import PromptTuning
from jaxpeft.models.transformer import Transformer
from jaxpeft.ops.products import product
from jaxpeft.pretrained.hf.config import config_from_hf
from jaxpeft.training.rows import Rows
from jaxpeft.training.run import Run

PACKAGES = ("jaxpeft", "jax", "jaxlib", "flax", "optax", "numpy")
SMOLLM2_135M = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}


def measure(work: side.Work) -> dict[str, Any]:
    """Does one piece of work."""
    arguments.keep_compiled(argparse.Namespace(no_compilation_cache=False))
    if work.dtype == "float32" and jax.default_backend() != "cpu":
        jax.config.update("jax_default_matmul_precision", "highest")  # as torch by default
    jobs = {"gemm": gemm, "generate": generate, "train": train, "prepare": prepare}
    found = jobs[work.kind](work) | {"device": jax.default_backend()}
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return found if peak is None else found | {"device_peak_bytes": peak}


def prepare(work: side.Work) -> dict[str, Any]:
    """Writes the folder of the model: the weights of a file, or random ones of the same sizes."""
    if work.source:
        base = jp.load_model(work.source)
    else:
        config = config_from_hf(SMOLLM2_135M)
        module = Transformer(config)
        init = jax.jit(lambda key: module.init(key, jnp.zeros((1, 1), jnp.int32)))
        base = jp.Model(init(jax.random.key(0))["params"], config, module)
    jp.save_model(work.model, base, overwrite=True)
    return {"seconds": [], "values": []}


def gemm(work: side.Work) -> dict[str, Any]:
    """A product of two large matrices."""
    shape = (side.GEMM_SIZE, side.GEMM_SIZE)
    x = jax.random.normal(jax.random.key(0), shape, jnp.dtype(work.dtype))
    square = jax.jit(lambda x: product(x, x))
    return side.timed(work, lambda: float(square(x)[0, 0]))


def method_of(work: side.Work) -> Any:
    """What is trained."""
    if work.method == "full":
        return Full()
    if work.method == "prompt":
        return PromptTuning(num_tokens=work.virtual_tokens)
    return LoRA(rank=work.rank, alpha=2 * work.rank, dora=work.method == "dora")


def load(section: ModelSection, mesh: Any = None) -> jp.Model:
    """The base model, as the trainer loads it."""
    return jp.load_model(
        section.path,
        dtype=section.dtype,
        compute_dtype=section.compute_dtype,
        mesh=mesh,
        quantization=section.quantization,
        double_quantization=section.double_quantization,
    )


def make_run(work: side.Work) -> Run:
    """A run as the trainer makes it, over random tokens; every token but the first is learned."""
    method, steps = method_of(work), work.warmup + work.calls
    coded, dtype = work.method == "qlora", cast(Any, work.dtype)
    config = RunConfig(
        model=ModelSection(
            path=work.model,
            dtype=dtype,
            compute_dtype=dtype,
            quantization="nf4" if coded else None,
            double_quantization=coded,
        ),
        method=method,
        data=DataConfig(train="random tokens", max_length=work.seq_len + method.num_virtual_tokens),
        optim=jp.OptimConfig(
            learning_rate=side.LEARNING_RATE, schedule="constant", clip_norm=side.CLIP_NORM
        ),
        train=TrainSection(steps=steps, batch_size=work.batch_size, remat=work.remat),  # pyright: ignore[reportArgumentType]
        output_dir="nowhere",
    )
    mesh = layouts.make_mesh(**config.mesh.sizes)
    base = load(config.model, mesh)
    length, vocab_size = work.segment or work.seq_len, base.config.vocab_size
    count = steps * work.batch_size * (work.seq_len // length)
    tokens = np.random.default_rng(0).integers(vocab_size, size=(count, length))
    examples = Examples.of_tokens(list(tokens), config.data.train)
    prefix = vocab_size + np.arange(method.num_virtual_tokens, dtype=np.int32)
    plan = Plan(
        examples.with_prefix(prefix),
        batch_size=work.batch_size,
        max_length=config.data.max_length,
        pad_id=base.config.pad_token_id,
    )
    return Run(config, base, Rows(plan, steps, None, train_rows=count), mesh)


def train(work: side.Work) -> dict[str, Any]:
    """Steps of training."""
    run = make_run(work)
    step = run.compile_step()
    batches: Any = iterate(run.rows.plan, 0, run.rows.steps)

    def call() -> float:
        run.state, metrics = step(run.state, run.base.params, run.put(next(batches)))
        return float(metrics["loss"])

    found = side.timed(work, call)
    return found | {"xla": memory_of(step), "flops": model_flops(run)}


def memory_of(step: Any) -> dict[str, int]:
    """XLA's own count of a compiled program's memory, in bytes."""
    analysis = step.memory_analysis()
    names = ("argument", "output", "alias", "temp")
    return {name: getattr(analysis, f"{name}_size_in_bytes") for name in names}


def model_flops(run: Run) -> int:
    """FLOPs of the matrix products of a step; what is computed again does not count."""
    section = dataclasses.replace(run.config.train, remat="none")
    run.config = dataclasses.replace(run.config, train=section)
    return jp.count_flops(run.make_step(), run.state, run.base.params, run.rows.plan.batch(0))


def generate(work: side.Work) -> dict[str, Any]:
    """Greedy decoding of other random prompts every time."""
    dtype: Any = work.dtype
    base = load(ModelSection(path=work.model, dtype=dtype, compute_dtype=dtype))
    endless = dataclasses.replace(base.config, eos_token_ids=())
    base = dataclasses.replace(base, config=endless, tokenizer=None)
    adapter = jp.init_adapter(method_of(work), base, jax.random.key(0))
    if work.method == "merged":
        base, adapter = dataclasses.replace(base, params=jp.merge(base.params, adapter)), None
    size = (work.warmup + work.calls, work.batch_size, work.prompt_tokens)
    draws = np.random.default_rng(0).integers(base.config.vocab_size, size=size).tolist()
    number = itertools.count()

    def call() -> float:
        rows = generate_ids(
            base, draws[next(number)], adapter=adapter, max_new_tokens=work.new_tokens
        )
        assert {len(row) for row in rows} == {work.new_tokens}
        return float(rows[0][-1])

    return side.timed(work, call)


if __name__ == "__main__":
    side.run(measure, PACKAGES)
