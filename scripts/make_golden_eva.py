"""Writes ``tests/golden/eva``: a LoRA as HF PEFT's EVA starts it, and the batches it saw.

It needs torch and PEFT, in the virtual environment that ``scripts/make_golden.py`` describes::

    .venv-oracle/bin/python scripts/make_golden_eva.py

``NAME/`` is the folder of ``save_pretrained`` right after ``initialize_lora_eva_weights``: ranks
and alphas are redistributed, B is zero. ``NAME.safetensors`` holds the batches in the order in
which PEFT goes round them: ``input_ids``, ``attention_mask`` and ``labels`` of ``(batches, rows,
seq)``.
"""

# pyright: reportMissingImports=false

import argparse
import json
from pathlib import Path

import peft
import torch
from make_golden import SMALL, load, write_inputs

# name: (base, settings of the LoRA, settings of EVA)
STARTS: dict[str, tuple[str, dict, dict]] = {
    "all_linear": ("llama3", {"r": 8, "lora_alpha": 8, "target_modules": "all-linear"}, {}),
    "patterns": (
        "llama2",
        {
            "r": 4,
            "lora_alpha": 6,
            "use_rslora": True,
            "target_modules": ["k_proj", "v_proj", "down_proj", "lm_head"],
            "rank_pattern": {"layers.1.self_attn.v_proj": 7},
            "alpha_pattern": {"down_proj": 5},
        },
        {"rho": 3.0, "tau": 0.98},
    ),
}


def make_batches(seed: int, count: int = 4) -> list[dict[str, torch.Tensor]]:
    """Rows of two parts, the first of which is not learned, some with padding on the right."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        ids = torch.randint(3, SMALL["vocab_size"], (6, 32), generator=generator)
        mask = torch.ones_like(ids)
        ids[1, 25:], mask[1, 25:] = SMALL["pad_token_id"], 0
        labels = torch.where(mask == 1, ids, -100)
        for row in range(len(ids)):
            labels[row, : 1 + row] = -100
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def write_start(root: Path, name: str, seed: int) -> None:
    """Writes one folder and its batches."""
    base, settings, eva = STARTS[name]
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(**eva),
        **settings,
    )
    torch.manual_seed(seed)
    model = peft.get_peft_model(load(root / "models" / base), config).eval()
    batches = make_batches(seed)
    peft.initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    folder = root / "eva" / name
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()
    file = folder / "adapter_config.json"
    written = json.loads(file.read_text()) | {"base_model_name_or_path": base}
    written["target_modules"] = sorted(written["target_modules"])
    file.write_text(json.dumps(written, indent=2, sort_keys=True))
    stacked = {key: torch.stack([batch[key] for batch in batches]) for key in batches[0]}
    write_inputs(root / "eva" / f"{name}.safetensors", stacked)


def main() -> None:
    """Writes everything."""
    parser = argparse.ArgumentParser(description="Writes tests/golden/eva.")
    parser.add_argument("--out", type=Path, default=Path("tests/golden"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    (args.out / "eva").mkdir(exist_ok=True)
    for name in STARTS:
        write_start(args.out, name, seed=500 + sum(name.encode()) % 97)


if __name__ == "__main__":
    main()
