"""Shows that HF PEFT reads an adapter we saved, transformers the merged model, with our logits.

Three steps, because the project's environment has no torch and the other one (``make_golden.py``
says how to make it) has no jax::

    .venv/bin/python scripts/check_peft.py write ADAPTER BASE logits.safetensors MERGED
    .venv-oracle/bin/python scripts/check_peft.py check ADAPTER BASE logits.safetensors
    .venv-oracle/bin/python scripts/check_peft.py merged MERGED logits.safetensors

ADAPTER is a folder of any method, written by ``jaxpeft.save_adapter``; BASE a Hugging Face folder
or a ``.gguf`` file. The first step writes our float32 logits and, where the two can be merged, base
and adapter as one model into the new folder MERGED. The second loads ADAPTER with ``peft``, the
third MERGED with ``transformers``. Both fail on a missing or unexpected key, on another best token,
or on logits that differ by more than 1e-4 of the largest one; the second also on any warning of
PEFT, or if PEFT would save other tensors than it read.
"""

# pyright: reportMissingImports=false

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np

TEXT = "Question: What is the capital of France? Answer: Paris, a city of 2 million people."
TOLERANCE = 1e-4
USUAL = {"ADALORA": "The following rank_pattern keys", "LN_TUNING": "Unsupported layer type"}
"""How warnings begin that PEFT gives for its own adapters of a type, too."""


def write(adapter_folder: Path, base_path: Path, file: Path, merged: Path) -> None:
    """Writes tokens, our logits and the merged model."""
    import jax.numpy as jnp
    from safetensors.numpy import save_file

    from jaxpeft.methods.registry import KINDS
    from jaxpeft.pretrained.adapters import load_adapter
    from jaxpeft.pretrained.load import load_model
    from jaxpeft.pretrained.save import save_model

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
    print(f"wrote {file}: {ids.shape[1]} tokens, kind {adapter.spec.kind}")
    if not (why := KINDS[adapter.spec.kind].no_merge):
        save_model(str(merged), base, adapter=adapter)
        print(f"wrote {merged}")
    else:
        print(f"cannot be merged: {why}")
    print(f"the adapter moves logits by {gap(plain, adapted):.2e} of the largest")


def check(adapter_folder: Path, base_path: Path, file: Path) -> None:
    """Loads the folder with PEFT and compares; exits with an error if anything differs."""
    import torch
    from safetensors.numpy import load_file
    from transformers import AutoModelForCausalLM

    where = {"pretrained_model_name_or_path": base_path}
    if base_path.suffix == ".gguf":
        where = {"pretrained_model_name_or_path": base_path.parent, "gguf_file": base_path.name}
    base = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    golden = load_file(file)
    ids = golden["input_ids"]
    faults = compare("base", golden["base_logits"], torch_logits(base, ids))
    model, more = load_in_peft(base, adapter_folder)
    faults += more
    extra = {}
    if model.peft_config["default"].peft_type == "MULTITASK_PROMPT_TUNING":
        extra["task_ids"] = torch.zeros(1, dtype=torch.long)
    faults += compare("adapted", golden["logits"], torch_logits(model, ids, **extra))
    if hasattr(model, "merge_and_unload"):
        merged = torch_logits(model.merge_and_unload(), ids)
        faults += compare("merged by PEFT", golden["logits"], merged)
    finish(faults)


def load_in_peft(base: Any, adapter_folder: Path) -> tuple[Any, list[str]]:
    """The adapted model, and what PEFT had to say against the folder: warnings, keys, tensors."""
    from peft import PeftModel, get_peft_model_state_dict
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
    from safetensors.numpy import load_file

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, adapter_folder)
        result = model.load_adapter(adapter_folder, adapter_name="again")
    config = model.peft_config["default"]
    warned = [str(w.message) for w in caught if "peft" in w.filename]
    usual = USUAL.get(config.peft_type)
    warned = [text for text in warned if usual is None or not text.startswith(usual)]
    faults = [f"PEFT warns: {text}" for text in warned]
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]
    missing = [key for key in result.missing_keys if prefix in key]
    faults += [f"missing keys: {missing[:3]}"] if missing else []
    saved = load_file(adapter_folder / "adapter_model.safetensors")
    again = get_peft_model_state_dict(model, save_embedding_layers=False)
    unexpected = result.unexpected_keys
    if config.is_prompt_learning:  # PEFT reads these tensors apart, and calls all of them so
        unexpected = [key for key in unexpected if key not in again]
    faults += [f"unexpected keys: {unexpected[:3]}"] if unexpected else []
    print(f"keys: {len(missing)} missing, {len(unexpected)} unexpected")
    faults += same_tensors(saved, {key: value.detach().numpy() for key, value in again.items()})
    return model.eval(), faults


def check_merged(folder: Path, file: Path) -> None:
    """Loads the merged model with transformers and compares; exits with an error if it differs."""
    import torch
    from safetensors.numpy import load_file
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    print("keys: " + ", ".join(f"{len(info[kind])} {kind.removesuffix('_keys')}" for kind in kinds))
    faults = [f"{kind}: {sorted(info[kind])[:3]}" for kind in kinds if info[kind]]
    golden = load_file(file)
    logits = torch_logits(model.eval(), golden["input_ids"])
    finish(faults + compare("merged by jaxpeft", golden["logits"], logits))


def torch_logits(model: Any, ids: np.ndarray, **extra: Any) -> np.ndarray:
    """What a torch model computes for the tokens themselves, without those of a soft prompt."""
    import torch

    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(ids).long(), **extra).logits.numpy()
    return logits[:, -ids.shape[1] :]


def same_tensors(saved: dict[str, np.ndarray], again: dict[str, np.ndarray]) -> list[str]:
    """What differs between the tensors of the file and those that PEFT would save."""
    keys = sorted(saved.keys() ^ again.keys())
    values = [
        key for key in saved.keys() & again.keys() if not np.array_equal(saved[key], again[key])
    ]
    print(f"tensors: {len(saved)}, {len(keys)} not on both sides, {len(values)} other values")
    return ([f"keys differ: {keys[:3]}"] if keys else []) + (
        [f"values differ: {sorted(values)[:3]}"] if values else []
    )


def finish(faults: list[str]) -> None:
    """Says "ok", or exits with what is wrong."""
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
    parser = argparse.ArgumentParser(description="Compares what we save in HF PEFT.")
    steps = parser.add_subparsers(dest="step", required=True)
    for name, function, arguments in (
        ("write", write, ("adapter_folder", "base_path", "file", "merged")),
        ("check", check, ("adapter_folder", "base_path", "file")),
        ("merged", check_merged, ("folder", "file")),
    ):
        step = steps.add_parser(name, help=function.__doc__)
        step.set_defaults(function=function)
        for argument in arguments:
            step.add_argument(argument, type=Path)
    args = vars(parser.parse_args())
    del args["step"]
    args.pop("function")(**args)


if __name__ == "__main__":
    main()
