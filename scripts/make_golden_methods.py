"""Writes ``tests/golden/methods``: adapters of every method, as HF PEFT saves and computes them.

It needs torch and PEFT, in the virtual environment that ``scripts/make_golden.py`` describes::

    .venv-oracle/bin/python scripts/make_golden_methods.py [--only NAME ...]

For every entry of `ADAPTERS` it writes ``NAME/``, the folder of ``save_pretrained`` with trained
values that are random and not neutral, and ``NAME.safetensors``: two rows of tokens, their mask,
the float32 logits at the tokens' own positions and, where PEFT can merge, those of the merged
model. ``tests/methods/test_golden_methods.py`` finds the files by itself.
"""

# pyright: reportMissingImports=false

import argparse
import json
import shutil
from pathlib import Path

import peft
import torch
from make_golden import load, sample_inputs, write_inputs

# name: (base, config class of PEFT, settings)
ADAPTERS: dict[str, tuple[str, str, dict]] = {
    "lora": ("qwen2", "LoraConfig", {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"}),
    "lora_patterns": (
        "llama3",
        "LoraConfig",
        {
            "r": 3,
            "lora_alpha": 5,
            "use_rslora": True,
            "target_modules": ["q_proj", "up_proj", "down_proj", "model.layers.1.self_attn.v_proj"],
            "layers_to_transform": [0, 2],
            "layers_pattern": "layers",
            "rank_pattern": {"q_proj": 2, "2.mlp.down_proj": 4, "down_proj": 1},
            "alpha_pattern": {"^model.layers.0.mlp.up_proj": 7, ".*v_proj": 2.5},
        },
    ),
    "lora_bias": (
        "llama_bias",
        "LoraConfig",
        {
            "r": 2,
            "lora_alpha": 3,
            "bias": "lora_only",
            "lora_bias": True,
            "target_modules": ["q_proj", "down_proj"],
            "layers_to_transform": [0, 2],
        },
    ),
    # PEFT writes the biases of saved modules three times.
    "lora_bias_all": (
        "llama_bias",
        "LoraConfig",
        {
            "r": 2,
            "bias": "all",
            "lora_bias": True,
            "target_modules": ["q_proj", "up_proj", "down_proj"],
            "modules_to_save": ["up_proj", "model.norm"],
            "rank_pattern": {"0.self_attn.q_proj": 3},
        },
    ),
    "lora_saved": (
        "llama3",
        "LoraConfig",
        {
            "r": 2,
            "target_modules": ["q_proj", "o_proj"],
            "modules_to_save": ["lm_head", "embed_tokens", "model.layers.1.input_layernorm"],
        },
    ),
    # A tied base: PEFT trains a head of its own, and a table that the head does not read.
    "lora_saved_tied_head": (
        "qwen2",
        "LoraConfig",
        {"r": 2, "bias": "all", "modules_to_save": ["lm_head"]},
    ),
    "lora_saved_tied_table": ("qwen2", "LoraConfig", {"r": 2, "modules_to_save": ["embed_tokens"]}),
    "lora_tables": (
        "llama2",
        "LoraConfig",
        {"r": 3, "lora_alpha": 5, "target_modules": ["embed_tokens", "lm_head", "v_proj"]},
    ),
    "lora_tables_tied": (
        "llama3",
        "LoraConfig",
        {
            "r": 2,
            "use_rslora": True,
            "target_modules": ["embed_tokens", "lm_head", "o_proj"],
            "rank_pattern": {"embed_tokens": 4},
        },
    ),
    "lora_table_tied": ("qwen2", "LoraConfig", {"r": 2, "target_modules": "model.embed_tokens"}),
    "lora_head_tied": ("qwen2", "LoraConfig", {"r": 3, "target_modules": ["lm_head"]}),
    "dora_tables": (
        "mistral",
        "LoraConfig",
        {"r": 2, "use_dora": True, "target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    ),
    "dora_tables_tied": (
        "llama3",
        "LoraConfig",
        {"r": 2, "use_dora": True, "target_modules": ["embed_tokens", "lm_head"]},
    ),
    "lora_tokens": ("llama2", "LoraConfig", {"r": 2, "trainable_token_indices": [8, 71, 20]}),
    "lora_tokens_heads": (
        "mistral",
        "LoraConfig",
        {"r": 2, "trainable_token_indices": {"embed_tokens": [9, 40, 41], "lm_head": [3]}},
    ),
    "lora_tokens_tied": ("llama3", "LoraConfig", {"r": 2, "trainable_token_indices": [60, 9]}),
    "lora_tokens_head_tied": (
        "llama3",
        "LoraConfig",
        {"r": 2, "target_modules": ["lm_head"], "trainable_token_indices": [60, 9]},
    ),
    # PEFT takes a part of the base off, when it makes such an adapter and when it loads one.
    "lora_pissa": (
        "llama_bias",
        "LoraConfig",
        {
            "r": 3,
            "lora_alpha": 5,
            "lora_dropout": 0.1,
            "init_lora_weights": "pissa",
            "target_modules": ["q_proj", "up_proj", "down_proj"],
            "exclude_modules": ["model.layers.1.self_attn.q_proj"],
            "rank_pattern": {"q_proj": 2, "2.mlp.down_proj": 4},
            "alpha_pattern": {"up_proj": 7},
        },
    ),
    "lora_olora": (
        "qwen2",
        "LoraConfig",
        {
            "r": 3,
            "lora_alpha": 2,
            "use_rslora": True,
            "init_lora_weights": "olora",
            "target_modules": ["k_proj", "o_proj", "gate_proj", "down_proj"],
            "rank_pattern": {"0.self_attn.o_proj": 5},
            "alpha_pattern": {"gate_proj": 3},
        },
    ),
    "lora_mica": ("llama3", "LoraConfig", {"r": 3, "init_lora_weights": "mica"}),
    "dora": ("llama3", "LoraConfig", {"r": 3, "use_dora": True}),
    "dora_all": (
        "qwen2",
        "LoraConfig",
        {
            "r": 4,
            "lora_alpha": 6,
            "use_dora": True,
            "use_rslora": True,
            "target_modules": "all-linear",
        },
    ),
    "ln_tuning": ("llama2", "LNTuningConfig", {}),
    "ln_tuning_qk": (
        "qwen3",
        "LNTuningConfig",
        {"target_modules": ["input_layernorm", "q_norm", "layers.1.self_attn.k_norm"]},
    ),
    "adalora": (
        "llama3",
        "AdaLoraConfig",
        {
            "init_r": 5,
            "target_r": 3,
            "lora_alpha": 7,
            "total_step": 9,
            "target_modules": ["q_proj", "down_proj"],
        },
    ),
    "adalora_pruned": (
        "llama3",
        "AdaLoraConfig",
        {
            "init_r": 5,
            "target_r": 3,
            "lora_alpha": 4,
            "lora_dropout": 0.1,
            "tinit": 1,
            "tfinal": 2,
            "deltaT": 2,
            "beta1": 0.8,
            "beta2": 0.7,
            "orth_reg_weight": 0.25,
            "total_step": 7,
            "target_modules": ["q_proj", "down_proj"],
        },
    ),
    "ia3": ("llama_bias", "IA3Config", {}),
    "ia3_qwen": (
        "qwen2",
        "IA3Config",
        {
            "target_modules": ["q_proj", "k_proj", "o_proj", "gate_proj"],
            "feedforward_modules": ["gate_proj"],
        },
    ),
    "loha": ("llama3", "LoHaConfig", {}),
    "loha_patterns": (
        "qwen2",
        "LoHaConfig",
        {
            "r": 3,
            "alpha": 5,
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 4},
            "alpha_pattern": {"v_proj": 7},
        },
    ),
    "lokr": ("llama3", "LoKrConfig", {}),
    "lokr_low_rank": (
        "mistral",
        "LoKrConfig",
        {
            "r": 2,
            "alpha": 3,
            "decompose_both": True,
            "decompose_factor": 8,
            "target_modules": "all-linear",
            "alpha_pattern": {"v_proj": 7},
        },
    ),
    "vera": ("llama3", "VeraConfig", {"r": 6}),
    "vera_all": (
        "qwen2",
        "VeraConfig",
        {
            "r": 5,
            "projection_prng_key": 7,
            "vera_dropout": 0.1,
            "target_modules": "all-linear",
        },
    ),
    "oft": ("llama2", "OFTConfig", {"oft_block_size": 8, "target_modules": "all-linear"}),
    # PEFT takes the nearest number of blocks that divides the inputs, 2.
    "oft_blocks": ("llama2", "OFTConfig", {"r": 3, "oft_block_size": 0}),
    "oft_exact": (
        "mistral",
        "OFTConfig",
        {"oft_block_size": 4, "use_cayley_neumann": False, "target_modules": ["q_proj", "v_proj"]},
    ),
    "trainable_tokens": ("llama3", "TrainableTokensConfig", {"token_indices": [60, 4, 17]}),
    "trainable_tokens_untied": (
        "llama2",
        "TrainableTokensConfig",
        {"token_indices": [50, 3, 71, 20, 100]},
    ),
    "trainable_tokens_head": (
        "mistral",
        "TrainableTokensConfig",
        {"token_indices": [3, 100], "target_modules": ["embed_tokens", "lm_head"]},
    ),
    "prompt_tuning": ("llama3", "PromptTuningConfig", {"num_virtual_tokens": 3}),
    "p_tuning_mlp": (
        "llama2",
        "PromptEncoderConfig",
        {"num_virtual_tokens": 3, "encoder_hidden_size": 6},
    ),
    "p_tuning_lstm": (
        "qwen3",
        "PromptEncoderConfig",
        {
            "num_virtual_tokens": 4,
            "encoder_hidden_size": 6,
            "encoder_reparameterization_type": "LSTM",
        },
    ),
    "prefix_tuning": ("llama3", "PrefixTuningConfig", {"num_virtual_tokens": 3}),
    "prefix_tuning_window": ("mistral", "PrefixTuningConfig", {"num_virtual_tokens": 4}),
    "prefix_tuning_heads": ("qwen3", "PrefixTuningConfig", {"num_virtual_tokens": 2}),
    "multitask_prompt_tuning": (
        "qwen2",
        "MultitaskPromptTuningConfig",
        {"num_virtual_tokens": 3, "num_tasks": 2, "num_ranks": 2},
    ),
}


# PEFT merges an adapted table or head of a tied model into the one weight that both read, so its
# merged model computes something else than the adapted one; ours gets a head of its own.
NOT_MERGED = (
    "lora_tables_tied",
    "lora_table_tied",
    "lora_head_tied",
    "dora_tables_tied",
    "lora_tokens_head_tied",
)

# A module of each AdaLoRA whose ranks are lowered; it learns nothing, and none of its rank is left.
PRUNED = {"adalora_pruned": "layers.1.self_attn.q_proj"}


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Moves every trained value so that each one matters: vectors a little, matrices by rows."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        if not parameter.requires_grad:
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        spread = 0.3 if parameter.ndim < 2 or min(parameter.shape) == 1 else 0.5
        with torch.no_grad():
            if parameter.ndim < 2 or min(parameter.shape) == 1:
                parameter.add_(noise * spread)
            else:
                parameter.copy_(noise * spread / parameter.shape[-1] ** 0.5)


def allocate(model: torch.nn.Module, idle: str, seed: int) -> None:
    """Lets PEFT lower the ranks of AdaLoRA, with random gradients, zero in the module `idle`."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, model.active_peft_config.total_step + 1):
        for name, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
                parameter.grad *= f"{idle}." not in name
        model.base_model.update_and_allocate(step)


def logits_of(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Float32 logits at the tokens' own positions, zero where the input is padding."""
    extra = {}
    config = getattr(model, "active_peft_config", None)  # a merged model has none
    if config is not None and config.peft_type == "MULTITASK_PROMPT_TUNING":
        extra["task_ids"] = torch.zeros(len(inputs["input_ids"]), dtype=torch.long)
    with torch.no_grad():
        logits = model(**inputs, **extra).logits
    mask = inputs["attention_mask"]
    return (logits[:, -mask.shape[1] :].float() * mask[..., None]).contiguous()


def write_adapter(root: Path, name: str, seed: int) -> None:
    """Writes one PEFT folder and what the adapted and the merged model compute."""
    base, config_class, settings = ADAPTERS[name]
    config = getattr(peft, config_class)(task_type="CAUSAL_LM", **settings)
    torch.manual_seed(seed)
    model = peft.get_peft_model(load(root / "models" / base), config).eval()
    randomise(model, seed)
    if name in PRUNED:
        allocate(model, PRUNED[name], seed)
    folder = root / "methods" / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    file = folder / "adapter_config.json"
    written = json.loads(file.read_text()) | {"base_model_name_or_path": base}
    for key, value in written.items():
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            written[key] = sorted(value)  # PEFT holds sets, whose order changes from run to run
    file.write_text(json.dumps(written, indent=2, sort_keys=True))
    inputs = sample_inputs(seed)
    tensors = {"logits": logits_of(model, inputs)}
    if hasattr(model, "merge_and_unload") and name not in NOT_MERGED:
        tensors["merged"] = logits_of(model.merge_and_unload(), inputs)
    write_inputs(root / "methods" / f"{name}.safetensors", inputs, **tensors)


def main() -> None:
    """Writes everything, or what ``--only`` names."""
    parser = argparse.ArgumentParser(description="Writes tests/golden/methods.")
    parser.add_argument("--out", type=Path, default=Path("tests/golden"))
    parser.add_argument("--only", nargs="*", default=list(ADAPTERS), choices=list(ADAPTERS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    (args.out / "methods").mkdir(exist_ok=True)
    for name in args.only:
        write_adapter(args.out, name, seed=300 + sum(name.encode()) % 97)


if __name__ == "__main__":
    main()
