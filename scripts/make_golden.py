"""Writes the golden files under ``tests/golden``: what transformers and HF PEFT compute.

The project itself never uses torch, so this script has a virtual environment of its own::

    python3 -m venv .venv-oracle
    .venv-oracle/bin/pip install torch==2.13.0 transformers==5.23.0 peft==0.21.0 gguf safetensors
    .venv-oracle/bin/python scripts/make_golden.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf

Three kinds of files come out, always the same ones (seeds are fixed, torch runs on one thread):

* ``models/NAME/``: a tiny Hugging Face folder with random weights (norm scales and biases too),
  and ``golden.safetensors`` with two rows of tokens, their mask and the float32 logits;
* ``adapters/NAME/``: a folder as PEFT's ``save_pretrained`` writes it, factors random and not
  zero, and beside it ``NAME.safetensors`` with the logits of the adapted and of the merged model;
  ``bf16_layer.safetensors``: one adapted layer of a bfloat16 model, input to output;
* ``smollm2.json`` and ``smollm2.safetensors``: texts, tokens and log-probabilities of SmolLM2 as
  transformers reads it from a GGUF file. Left alone unless ``--gguf`` is given.
"""

# pyright: reportMissingImports=false

import argparse
import copy
import json
import re
import shutil
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# What differs from SMALL. `rope_theta` and `rope_scaling` are the spelling of transformers 4,
# which most files on the hub have; `rope_parameters` that of transformers 5. Both occur.
MODELS: dict[str, dict] = {
    "llama2": {"model_type": "llama", "num_key_value_heads": 4, "rope_theta": 10000.0},
    "llama3": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA3_ROPE,
    },
    "llama_linear": {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
    },
    "llama_bias": {
        "model_type": "llama",
        "head_dim": 12,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0},
    },
    "mistral": {
        "model_type": "mistral",
        "num_hidden_layers": 2,
        "sliding_window": 7,
        "rope_theta": 10000.0,
    },
    "qwen2": {
        "model_type": "qwen2",
        "num_hidden_layers": 2,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "sliding_window": 7,
        "max_window_layers": 1,
    },
    "qwen2_window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
        "rope_theta": 1000000.0,
    },
    "qwen3": {
        "model_type": "qwen3",
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
}
ADAPTERS: dict[str, tuple[str, dict]] = {
    "qv": ("llama3", {"r": 4, "lora_alpha": 8}),
    "all_linear": (
        "llama_bias",
        {"r": 3, "lora_alpha": 16, "target_modules": "all-linear", "lora_dropout": 0.05},
    ),
    "rslora": (
        "llama3",
        {
            "r": 4,
            "lora_alpha": 6,
            "use_rslora": True,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        },
    ),
    "regex": (
        "llama3",
        {
            "r": 2,
            "lora_alpha": 5,
            "target_modules": r"model\.layers\.[12]\.(self_attn\.(q|v)|mlp\.down)_proj",
        },
    ),
    "patterns": (
        "llama2",
        {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["q_proj", "down_proj", "gate_proj"],
            "exclude_modules": ["model.layers.1.mlp.gate_proj"],
            "layers_to_transform": [0, 1],
            "rank_pattern": {"down_proj": 3, r"layers\.1\.self_attn\.q_proj": 5},
            "alpha_pattern": {r"layers\.0\..*": 7},
        },
    ),
    "lm_head": ("llama2", {"r": 2, "lora_alpha": 4, "target_modules": ["lm_head", "v_proj"]}),
}
TEXTS = {
    "prose": "The tower was built in 1889, and nobody expected it to stand for more than 20 years.",
    "digits": "3.14159 + 2,718 = 1234567890; 50% off!",
    "code": "def add(a, b):\n    # sums two numbers\n\treturn a + b  \n\n\nprint(add(1, 2))\n",
    "unicode": "Größe, naïve café — 東京 и Москва; e\u0301 👩‍🔬🎉",
    "spaces": "  two leading,   three inside, don't we'll I'VE   ",
}
CHAT = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "Name one river there."},
]


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Draws every parameter so that each one matters: logits of a few units, sharp attention."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:
                gain = 2.5 if re.search("q_proj|k_proj|embed_tokens|lm_head", name) else 1.0
                parameter.copy_(noise * gain / parameter.shape[-1] ** 0.5)


def sample_inputs(seed: int) -> dict[str, torch.Tensor]:
    """Two rows of 32 tokens, the second one padded on the right from token 21 on."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, SMALL["vocab_size"], (2, 32), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, 21:], mask[1, 21:] = SMALL["pad_token_id"], 0
    return {"input_ids": ids, "attention_mask": mask}


def logits_of(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Float32 logits, zero where the input is padding."""
    with torch.no_grad():
        logits = model(**inputs).logits
    return (logits.float() * inputs["attention_mask"][..., None]).contiguous()


def load(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The model as a user would load it, with the plainest attention."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    ).eval()


def write_inputs(path: Path, inputs: dict[str, torch.Tensor], **tensors: torch.Tensor) -> None:
    """Writes int32 inputs and float tensors to one file."""
    ints = {name: value.to(torch.int32) for name, value in inputs.items()}
    save_file(ints | {name: value.contiguous() for name, value in tensors.items()}, path)


def write_model(folder: Path, settings: dict, seed: int) -> None:
    """Writes one tiny model with its golden logits."""
    settings = SMALL | {"tie_word_embeddings": False} | settings
    # The copy is transformers' to change: it adds keys to the rope settings it is given.
    config = transformers.AutoConfig.for_model(**copy.deepcopy(settings))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model, seed)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    # transformers 5 rewrites the settings of its forerunner; put them back as they were given.
    written = json.loads((folder / "config.json").read_text())
    if "rope_theta" in settings:
        del written["rope_parameters"]
        written |= {key: value for key, value in settings.items() if key.startswith("rope_")}
        written.pop("layer_types", None)
        written["torch_dtype"] = written.pop("dtype")
    (folder / "config.json").write_text(json.dumps(written, indent=1, sort_keys=True) + "\n")
    inputs = sample_inputs(seed)
    write_inputs(folder / "golden.safetensors", inputs, logits=logits_of(load(folder), inputs))


def randomise_adapter(model: PeftModel, seed: int) -> None:
    """Draws A and B so that every adapted layer changes its output by about a third."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            with torch.no_grad():
                parameter.copy_(noise * 0.4 / parameter.shape[-1] ** 0.5)


def write_adapter(root: Path, name: str, base: str, settings: dict, seed: int) -> None:
    """Writes one PEFT folder with the logits of the adapted and the merged model."""
    config = LoraConfig(task_type="CAUSAL_LM", **settings)
    model = get_peft_model(load(root / "models" / base), config).eval()
    randomise_adapter(model, seed)
    folder = root / "adapters" / name
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    written = json.loads((folder / "adapter_config.json").read_text())
    written["base_model_name_or_path"] = base
    for key, value in written.items():
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            written[key] = sorted(value)  # PEFT holds sets, whose order changes from run to run
    (folder / "adapter_config.json").write_text(json.dumps(written, indent=2, sort_keys=True))
    inputs = sample_inputs(seed)
    logits = logits_of(model, inputs)
    merged = logits_of(model.merge_and_unload(), inputs)
    write_inputs(root / "adapters" / f"{name}.safetensors", inputs, logits=logits, merged=merged)


def write_bf16_layer(root: Path, seed: int) -> None:
    """Writes input, output and merged weight of one adapted layer of a bfloat16 model."""
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=["down_proj"])
    model = get_peft_model(load(root / "models" / "llama2", torch.bfloat16), config).eval()
    randomise_adapter(model, seed)
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 16, layer.in_features, generator=generator).to(torch.bfloat16)
    with torch.no_grad():
        y, base_y = layer(x), layer.base_layer(x)
        tensors = {
            "x": x,
            "y": y,
            "base_y": base_y,
            "weight": layer.base_layer.weight.clone(),
            "lora_A": layer.lora_A["default"].weight,
            "lora_B": layer.lora_B["default"].weight,
            "scale": torch.tensor(layer.scaling["default"], dtype=torch.float32),
        }
        layer.merge()
        tensors["merged_weight"] = layer.base_layer.weight
    assert tensors["lora_A"].dtype == torch.float32
    assert y.dtype == torch.bfloat16
    write_inputs(root / "adapters" / "bf16_layer.safetensors", {}, **tensors)


def write_smollm2(root: Path, gguf: Path) -> None:
    """Writes tokens and log-probabilities of SmolLM2 read from a GGUF file."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    chat = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    cases, tensors = {}, {}
    for name, text in (TEXTS | {"chat": chat}).items():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        top = logprobs.topk(5)
        following = logprobs[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0]
        cases[name] = {"text": text, "ids": ids, "decoded": tokenizer.decode(ids)}
        tensors[f"{name}.top_ids"] = top.indices.to(torch.int32)
        tensors[f"{name}.top_logprobs"] = top.values
        tensors[f"{name}.next_logprobs"] = following
    special = {
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.pad_token,
        "vocab_size": len(tokenizer),
    }
    golden = {"messages": CHAT, "special": special, "cases": cases}
    (root / "smollm2.json").write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n")
    write_inputs(root / "smollm2.safetensors", {}, **tensors)


def main() -> None:
    """Writes everything; see the module docstring."""
    parser = argparse.ArgumentParser(description="Writes tests/golden.")
    parser.add_argument("--out", type=Path, default=Path("tests/golden"))
    parser.add_argument("--gguf", type=Path, help="SmolLM2-135M-Instruct as a GGUF file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for kind in ("models", "adapters"):
        shutil.rmtree(args.out / kind, ignore_errors=True)
        (args.out / kind).mkdir(parents=True)
    for seed, (name, settings) in enumerate(MODELS.items()):
        write_model(args.out / "models" / name, settings, seed)
    for seed, (name, (base, settings)) in enumerate(ADAPTERS.items(), start=100):
        write_adapter(args.out, name, base, settings, seed)
    write_bf16_layer(args.out, seed=200)
    if args.gguf:
        write_smollm2(args.out, args.gguf)


if __name__ == "__main__":
    main()
