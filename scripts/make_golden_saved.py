"""Writes ``tests/golden/saved``: adapters as jaxpeft saves them, and what HF PEFT makes of them.

Two steps, because the project's environment has no torch and the other one (``make_golden.py`` says
how to make it) has no jax::

    .venv/bin/python scripts/make_golden_saved.py write [--only NAME ...]
    .venv-oracle/bin/python scripts/make_golden_saved.py check [--only NAME ...]

For every entry of `ADAPTERS` the first writes the folder ``NAME/`` by ``jaxpeft.save_adapter``. The
second loads it with PEFT and writes ``NAME.safetensors``: two rows of tokens, their mask, and
PEFT's float32 logits at the tokens' own positions. It fails as ``check_peft.py`` does on a warning,
on a missing or unexpected key, and if PEFT would save other tensors than it read; also if the
adapter does nothing.

``test_golden_saved.py`` saves the same adapters again and wants the same bytes. Where that
fails because what we write was changed on purpose, run both steps, and read what they change.
"""

# pyright: reportMissingImports=false

import argparse
import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

# name: (base, class of jaxpeft, settings)
ADAPTERS: dict[str, tuple[str, str, dict]] = {
    "lora_patterns": (
        "llama2",
        "LoRA",
        {
            "rank": 3,
            "alpha": 5.0,
            "rslora": True,
            "dropout": 0.1,
            "targets": ("q_proj", "up_proj", "down_proj"),
            "exclude": ("model.layers.1.mlp.up_proj",),
            "rank_pattern": {"q_proj": 2, "2.mlp.down_proj": 4},
            "alpha_pattern": {"up_proj": 7.5, "0.self_attn.q_proj": 2.0},
        },
    ),
    "adalora_pruned": (
        "llama3",
        "AdaLoRA",
        {"rank": 3, "initial_rank": 5, "alpha": 7.0, "targets": ("q_proj", "down_proj")},
    ),
    "ia3_names": (
        "llama_bias",
        "IA3",
        {
            "targets": (
                "model.layers.0.self_attn.k_proj",
                "model.layers.2.self_attn.k_proj",
                "model.layers.1.self_attn.o_proj",
                "model.layers.1.mlp.down_proj",
            ),
            "feedforward": ("model.layers.1.mlp.down_proj",),
        },
    ),
    "loha": ("qwen2", "LoHa", {"rank": 3, "alpha": 5.0, "targets": "all-linear"}),
    "lokr": (
        "mistral",
        "LoKr",
        {
            "rank": 2,
            "alpha": 3.0,
            "targets": ("v_proj", "gate_proj", "model.layers.1.mlp.down_proj"),
            "decompose_both": True,
            "decompose_factor": 8,
        },
    ),
    "prefix": ("qwen3", "PrefixTuning", {"num_tokens": 3}),
}


def build(name: str, base: Any) -> Any:
    """The adapter of an entry on its base, a `jaxpeft.Model`, always the same to the last bit."""
    import jax
    import jax.numpy as jnp

    import jaxpeft as jp
    from jaxpeft.core import paths

    _, method, settings = ADAPTERS[name]
    adapter = jp.init_adapter(getattr(jp, method)(**settings), base, jax.random.key(0))
    draw = np.random.RandomState(sum(name.encode()))  # NumPy keeps this stream for ever
    buffers, values = paths.flatten(adapter.buffers), {}
    for path, leaf in sorted(paths.flatten(adapter.params).items()):
        place, _, letter = path.rpartition("/")
        noise = draw.uniform(-1, 1, leaf.shape)
        if letter == "l":
            noise = 1 + 0.5 * noise
        elif letter != "e":
            noise *= 2 / np.sqrt(leaf.shape[-1])
        rank = np.asarray(buffers.get(f"{place}/rank", 1))
        values[path] = jnp.asarray(noise * _used(letter, rank, leaf.shape), jnp.float32)
    return dataclasses.replace(adapter, params=paths.unflatten(values))


def _used(letter: str, rank: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Which entries of a trained array count: those of adapted layers, within the rank."""
    on = (rank > 0).reshape(rank.shape + (1,) * (len(shape) - rank.ndim))
    if letter in ("a", "b"):
        axis = -1 if letter == "a" else -2
        within = np.arange(shape[axis]) < rank[..., None]
        return within[..., None, :] if letter == "a" else within[..., None]
    if letter == "e":  # AdaLoRA has taken the second triplet away, and in the last layer one more
        kept = np.ones(shape, bool)
        kept[..., 1] = kept[-1, -1] = False
        return kept & on
    return on


def write(root: Path, name: str) -> None:
    """Writes the folder of one adapter."""
    import jaxpeft as jp

    base_name = ADAPTERS[name][0]
    base = jp.load_model(root / "models" / base_name, dtype="float32", compute_dtype="float32")
    base = base.replace(name=base_name)
    shutil.rmtree(root / "saved" / name, ignore_errors=True)
    jp.save_adapter(root / "saved" / name, build(name, base), base)
    print(f"wrote {root / 'saved' / name}")


def check(root: Path, name: str) -> None:
    """Writes PEFT's logits for the folder of one adapter, or exits with what is wrong with it."""
    from check_peft import load_in_peft
    from make_golden import load, sample_inputs, write_inputs
    from make_golden_methods import logits_of

    folder = root / "saved" / name
    base, inputs = load(root / "models" / ADAPTERS[name][0]), sample_inputs(sum(name.encode()))
    plain = logits_of(base, inputs)
    model, faults = load_in_peft(base, folder)
    logits = logits_of(model, inputs)
    moved = float((logits - plain).abs().max())
    if moved < 0.1:
        faults.append(f"the adapter moves no logit by more than {moved:.3g}")
    if faults:
        sys.exit(f"{name}: " + "\n".join(faults))
    write_inputs(folder.with_suffix(".safetensors"), inputs, logits=logits)
    print(f"{name}: ok, moves logits by up to {moved:.3g}")


def main() -> None:
    """Does one step for everything, or for what ``--only`` names."""
    parser = argparse.ArgumentParser(description="Writes tests/golden/saved.")
    parser.add_argument("step", choices=["write", "check"])
    parser.add_argument("--out", type=Path, default=Path("tests/golden"))
    parser.add_argument("--only", nargs="*", default=list(ADAPTERS), choices=list(ADAPTERS))
    args = parser.parse_args()
    (args.out / "saved").mkdir(exist_ok=True)
    for name in args.only:
        (write if args.step == "write" else check)(args.out, name)


if __name__ == "__main__":
    main()
