"""Shows that HF PEFT reads an adapter we saved and computes our logits with it.

Two steps, because the project's environment has no torch and the other one (``make_golden.py``
says how to make it) has no jax::

    .venv/bin/python scripts/check_peft.py write ADAPTER BASE logits.safetensors
    .venv-oracle/bin/python scripts/check_peft.py check ADAPTER BASE logits.safetensors

ADAPTER is a folder written by ``jaxpeft.save_adapter``; BASE a Hugging Face folder or a ``.gguf``
file. The first step writes our float32 logits. The second loads the same folder with ``peft``,
and fails on a missing or unexpected key, on any warning of PEFT, on another best token, or on
logits (bound or merged) that differ by more than 1e-4 of the largest one.
"""

# pyright: reportMissingImports=false

import argparse
import sys
import warnings
from pathlib import Path

import numpy as np

TEXT = "Question: What is the capital of France? Answer: Paris, a city of 2 million people."
TOLERANCE = 1e-4


def write(adapter_folder: Path, base_path: Path, file: Path) -> None:
    """Writes tokens and our logits."""
    import jax.numpy as jnp
    from safetensors.numpy import save_file

    from jaxpeft.models.load import load_model
    from jaxpeft.peft_format import load_adapter

    base = load_model(base_path, dtype="float32", compute_dtype="float32")
    if base.tokenizer is None:
        ids = np.random.default_rng(0).integers(0, base.config.vocab_size, 32)
    else:
        ids = base.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    ids = np.asarray(ids, np.int32)[None]
    adapter = load_adapter(adapter_folder, base)
    adapted = np.asarray(base(jnp.asarray(ids), adapter=adapter))
    plain = np.asarray(base(jnp.asarray(ids)))
    save_file({"input_ids": ids, "logits": adapted, "base_logits": plain}, file)
    print(f"wrote {file}: {ids.shape[1]} tokens, adapter moves logits by {gap(plain, adapted):.2e}")


def check(adapter_folder: Path, base_path: Path, file: Path) -> None:
    """Loads the folder with PEFT and compares; exits with an error if anything differs."""
    import torch
    from peft import PeftModel
    from safetensors.numpy import load_file
    from transformers import AutoModelForCausalLM

    where = {"pretrained_model_name_or_path": base_path}
    if base_path.suffix == ".gguf":
        where = {"pretrained_model_name_or_path": base_path.parent, "gguf_file": base_path.name}
    base = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    golden = load_file(file)
    ids = torch.from_numpy(golden["input_ids"]).long()

    def logits(model: torch.nn.Module) -> np.ndarray:
        with torch.no_grad():
            return model(ids).logits.numpy()

    faults = compare("base", golden["base_logits"], logits(base))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, adapter_folder)
        result = model.load_adapter(adapter_folder, adapter_name="again")
    faults += [f"PEFT warns: {w.message}" for w in caught if "peft" in w.filename]
    missing = [key for key in result.missing_keys if "lora_" in key]
    faults += [f"missing keys: {missing[:3]}"] if missing else []
    if result.unexpected_keys:
        faults.append(f"unexpected keys: {result.unexpected_keys[:3]}")
    print(f"keys: {len(missing)} missing, {len(result.unexpected_keys)} unexpected")
    faults += compare("adapted", golden["logits"], logits(model.eval()))
    faults += compare("merged", golden["logits"], logits(model.merge_and_unload()))
    if faults:
        sys.exit("\n".join(faults))
    print("ok")


def gap(expected: np.ndarray, actual: np.ndarray) -> float:
    """Largest difference, as a part of the largest expected logit."""
    return float(np.abs(expected - actual).max() / np.abs(expected).max())


def compare(name: str, ours: np.ndarray, theirs: np.ndarray) -> list[str]:
    """Prints how far two sets of logits are apart and returns what is wrong with that."""
    distance = gap(theirs, ours)
    same = float((ours.argmax(-1) == theirs.argmax(-1)).mean())
    print(f"{name}: largest relative difference {distance:.2e}, same best token {same:.1%}")
    return [] if distance <= TOLERANCE and same == 1.0 else [f"{name}: logits differ"]


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description="Compares an adapter of ours in HF PEFT.")
    parser.add_argument("step", choices=["write", "check"])
    parser.add_argument("adapter", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    (write if args.step == "write" else check)(args.adapter, args.base, args.file)


if __name__ == "__main__":
    main()
