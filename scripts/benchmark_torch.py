"""The benchmark's side of torch with PEFT: transformers' model, eager, with PEFT's adapters.

Attention is torch's own (``sdpa``), AdamW is the fused one, and with bfloat16 everything is, the
adapter included. ``remat: full`` is gradient checkpointing of every layer.

Usage: see benchmark.py, which starts it.
"""

# pyright: reportMissingImports=false

import importlib.util
from collections.abc import Callable
from typing import Any

import benchmark_side as side

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "numpy")


def measure(work: side.Work) -> dict[str, Any]:
    """Does one piece of work.

    Raises:
        UnsupportedError: It cannot be done here.
    """
    if work.remat == "dots":
        raise side.UnsupportedError("torch checkpoints whole layers or nothing")
    if work.method == "qlora" and importlib.util.find_spec("bitsandbytes") is None:
        raise side.UnsupportedError("bitsandbytes is not installed, and PEFT has no other NF4")
    if work.segment:
        raise side.UnsupportedError("packing without attention across examples needs flash-attn")
    import torch

    torch.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    calls: dict[str, Callable[[side.Work], Callable[[], float]]]
    calls = {"gemm": gemm, "generate": generate, "train": train}
    found = side.timed(work, calls[work.kind](work))
    found["device"] = device()
    if torch.cuda.is_available():
        found["device_peak_bytes"] = torch.cuda.max_memory_allocated()
    return found | {"threads": torch.get_num_threads()}


def device() -> str:
    """Where tensors live."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def gemm(work: side.Work) -> Callable[[], float]:
    """A product of two large matrices."""
    import torch

    shape = (side.GEMM_SIZE, side.GEMM_SIZE)
    x = torch.randn(shape, device=device()).to(getattr(torch, work.dtype))
    return lambda: float((x @ x)[0, 0])


def load(work: side.Work) -> Any:
    """The base model."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype, more = getattr(torch, work.dtype), {}
    if work.method == "qlora":
        more["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    auto: Any = AutoModelForCausalLM  # its stubs need torch
    model = auto.from_pretrained(work.model, dtype=dtype, **more)
    return model if more else model.to(device())


def adapted(work: side.Work, model: Any) -> Any:
    """The model with a new adapter; the model itself for full fine-tuning."""
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    if work.method == "full":
        return model
    if work.method == "prompt":
        config: Any = PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=work.virtual_tokens
        )
    else:
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=work.rank,
            lora_alpha=2 * work.rank,
            target_modules="all-linear",
            use_dora=work.method == "dora",
        )
    return get_peft_model(model, config, autocast_adapter_dtype=work.dtype == "float32")


def train(work: side.Work) -> Callable[[], float]:
    """A step of training, on other random tokens every time."""
    import torch

    base = load(work)
    base.config.use_cache = False
    if work.remat == "full":
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    vocab_size, model = base.config.vocab_size, adapted(work, base)
    model.train()
    trained = [leaf for leaf in model.parameters() if leaf.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=side.LEARNING_RATE, weight_decay=0.0, fused=True)
    draws = torch.Generator().manual_seed(0)
    size = (work.batch_size, work.seq_len)

    def step() -> float:
        tokens = torch.randint(vocab_size, size, generator=draws).to(device())
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, side.CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def generate(work: side.Work) -> Callable[[], float]:
    """Greedy decoding of other random prompts every time."""
    import torch

    base = load(work)
    vocab_size = base.config.vocab_size
    model = adapted(work, base)
    if work.method == "merged":
        model = model.merge_and_unload()
    model.eval()
    draws, size = torch.Generator().manual_seed(0), (work.batch_size, work.prompt_tokens)
    length = {"min_new_tokens": work.new_tokens, "max_new_tokens": work.new_tokens}

    def call() -> float:
        tokens = torch.randint(vocab_size, size, generator=draws).to(device())
        mask = torch.ones_like(tokens)
        with torch.inference_mode():
            out = model.generate(
                input_ids=tokens, attention_mask=mask, do_sample=False, pad_token_id=0, **length
            )
        assert out.shape[1] == work.prompt_tokens + work.new_tokens
        return float(out[0, -1])

    return call


if __name__ == "__main__":
    side.run(measure, PACKAGES)
