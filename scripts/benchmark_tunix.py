"""The benchmark's side of Tunix: its Llama 3 model, Qwix's LoRA, and the step of its trainer.

The model is loaded from the folder that all sides load. ``remat: full`` is its remat of every
decoder layer. Tunix trains no DoRA and no soft prompts; its sampler is for text and is not
measured.

Usage: see benchmark.py, which starts it.
"""

# pyright: reportMissingImports=false

import json
import warnings
from pathlib import Path
from typing import Any

import benchmark_side as side

PACKAGES = ("google-tunix", "qwix", "jax", "jaxlib", "flax", "optax", "numpy")
LINEARS = ".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def measure(work: side.Work) -> dict[str, Any]:
    """Does one piece of work.

    Raises:
        UnsupportedError: Tunix has no such thing.
    """
    if work.kind != "train":
        raise side.UnsupportedError("only Tunix's training is measured")
    if work.method not in ("lora", "qlora", "full"):
        raise side.UnsupportedError("Tunix trains LoRA, QLoRA and whole models only")
    if work.remat == "dots":
        raise side.UnsupportedError("Tunix's Llama has no such remat")
    if work.segment:
        raise side.UnsupportedError("only Tunix's whole rows are measured")
    warnings.simplefilter("ignore")
    import jax

    found = train(work) | {"device": jax.default_backend()}
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return found if peak is None else found | {"device_peak_bytes": peak}


def load(work: side.Work, mesh: Any) -> Any:
    """The base model."""
    import jax.numpy as jnp
    from tunix.models.llama3 import model, params

    sizes = json.loads(Path(work.model, "config.json").read_text())
    rope = sizes.get("rope_parameters") or sizes
    config = model.ModelConfig(
        num_layers=sizes["num_hidden_layers"],
        vocab_size=sizes["vocab_size"],
        embed_dim=sizes["hidden_size"],
        hidden_dim=sizes["intermediate_size"],
        num_heads=sizes["num_attention_heads"],
        head_dim=sizes["hidden_size"] // sizes["num_attention_heads"],
        num_kv_heads=sizes["num_key_value_heads"],
        rope_theta=int(rope["rope_theta"]),
        norm_eps=sizes["rms_norm_eps"],
        weight_tying=sizes["tie_word_embeddings"],
        remat_config=model.RematConfig[{"none": "NONE", "full": "DECODER"}[work.remat]],
    )
    return params.create_model_from_safe_tensors(
        work.model, config, mesh, dtype=jnp.dtype(work.dtype)
    )


def adapted(work: side.Work, base: Any) -> Any:
    """The model with a new adapter; the model itself for full fine-tuning."""
    import qwix
    from flax import nnx

    if work.method == "full":
        return base
    coded = {"weight_qtype": "nf4", "tile_size": 64} if work.method == "qlora" else {}
    provider = qwix.LoraProvider(
        module_path=LINEARS, rank=work.rank, alpha=2.0 * work.rank, **coded
    )
    return qwix.apply_lora_to_model(
        base, provider, rngs=nnx.Rngs(params=0, lora=0), **base.get_model_input()
    )


def train(work: side.Work) -> dict[str, Any]:
    """Steps of its trainer, as its loop calls them."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import nnx
    from tunix.sft import peft_trainer, utils

    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=auto)
    with mesh:
        base = load(work, mesh)
        vocab_size = base.config.vocab_size
        model = adapted(work, base)
        rule = optax.chain(
            optax.clip_by_global_norm(side.CLIP_NORM),
            optax.adamw(side.LEARNING_RATE, weight_decay=0.0),
        )
        steps = work.warmup + work.calls
        config = peft_trainer.TrainingConfig(eval_every_n_steps=steps + 1, max_steps=steps)
        trainer = peft_trainer.PeftTrainer(model, rule, config)
        step, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)
        draws = np.random.default_rng(0)
        mask = jnp.ones((work.batch_size, work.seq_len), bool)
        given = {
            "input_mask": mask,
            "positions": utils.build_positions_from_mask(mask),
            "attention_mask": utils.make_causal_attn_mask(mask),
        }

        def call() -> float:
            tokens = draws.integers(vocab_size, size=mask.shape).astype(np.int32)
            return float(step({"input_tokens": jnp.asarray(tokens), **given})[0])

        found = side.timed(work, call)
        trained = nnx.state(model, nnx.Param if work.method == "full" else nnx.LoRAParam)
        return found | {"trained": sum(leaf.size for leaf in jax.tree.leaves(trained))}


if __name__ == "__main__":
    side.run(measure, PACKAGES)
