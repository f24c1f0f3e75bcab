"""Writes ``tests/golden/adalora_schedule.safetensors``: how HF PEFT lowers the ranks of AdaLoRA.

It needs torch and PEFT, in the virtual environment that ``scripts/make_golden.py`` describes::

    .venv-oracle/bin/python scripts/make_golden_adalora.py

An `AdaLoraModel` on the golden model ``llama3`` starts from `numbers`, gets `numbers` as gradients
in every step, goes down by plain SGD and lets PEFT allocate. Written are the budget of every step,
the singular values after it, and all factors at the end, ``(steps, modules, ...)`` and
``(modules, ...)`` in the order of the layers; and the settings as metadata.
"""

# pyright: reportMissingImports=false

import json
from pathlib import Path

import numpy as np
import peft
import torch
from make_golden import load
from safetensors.torch import save_file

ROOT = Path("tests/golden")
STEPS, RATE = 15, 0.05
SETTINGS = {
    "init_r": 4,
    "target_r": 2,
    "tinit": 2,
    "tfinal": 3,
    "deltaT": 2,
    "beta1": 0.8,
    "beta2": 0.7,
    "target_modules": ["q_proj"],
}


def numbers(step: int, module: int, part: str, shape: tuple[int, ...]) -> np.ndarray:
    """Normal float32 numbers that everyone can draw again; step 0 is the start."""
    generator = np.random.default_rng([step, module, "ABE".index(part)])
    return generator.standard_normal(shape).astype(np.float32)


def main() -> None:
    """See the module docstring."""
    torch.set_num_threads(1)
    config = peft.AdaLoraConfig(task_type="CAUSAL_LM", total_step=STEPS, **SETTINGS)
    model = peft.get_peft_model(load(ROOT / "models" / "llama3"), config)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    parts = {n: n.partition("lora_")[2][0] for n in names}
    modules = sorted({n.partition("lora_")[0] for n in names})
    leaves = dict(model.named_parameters())

    def draw(step: int, name: str) -> torch.Tensor:
        module = modules.index(name.partition("lora_")[0])
        shape = tuple(leaves[name].shape)
        return torch.from_numpy(numbers(step, module, parts[name], shape))

    for name in names:
        leaves[name].data.copy_(0.3 * draw(0, name))
    optimizer = torch.optim.SGD([leaves[name] for name in names], lr=RATE)
    budgets, values = [], []
    for step in range(1, STEPS + 1):
        for name in names:
            leaves[name].grad = draw(step, name)
        optimizer.step()
        model.base_model.update_and_allocate(step)
        budgets.append(model.base_model.rankallocator.budget_schedule(step)[0])
        values.append(stacked("E", names, parts, leaves))
    tensors = {
        "budgets": torch.tensor(budgets, dtype=torch.int32),
        "e": torch.stack(values),
        "last_a": stacked("A", names, parts, leaves),
        "last_b": stacked("B", names, parts, leaves),
    }
    metadata = {"settings": json.dumps(SETTINGS | {"steps": STEPS, "rate": RATE})}
    save_file(tensors, ROOT / "adalora_schedule.safetensors", metadata)


def stacked(part: str, names: list[str], parts: dict[str, str], leaves: dict) -> torch.Tensor:
    """One kind of factor of all modules, in their order."""
    return torch.stack([leaves[n].detach().clone() for n in sorted(names) if parts[n] == part])


if __name__ == "__main__":
    main()
