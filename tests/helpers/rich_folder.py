"""A tiny model folder with every file a tokenizer may have, written by hand in odd formatting."""

import json
import pathlib

from tiny_models import hf_tensors, write_hf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>")
PIECES = (
    "t",
    "h",
    "e",
    "a",
    "b",
    "c",
    "d",
    "o",
    "\u0120",
    "\u010a",
    "th",
    "the",
    "1",
    "2",
    "\u00c3",
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OTHER = CHATML.replace("assistant", "bot")
# Keys that nobody here interprets, beside those that transformers 4 wrote.
CONFIG = {
    "_name_or_path": "/home/someone/model",
    "architectures": ["LlamaForCausalLM"],
    "attention_dropout": 0.1,
    "auto_map": {"AutoModelForCausalLM": "modeling_x.Own"},
    "bos_token_id": 3,
    "eos_token_id": 0,
    "is_llama_config": True,
    "layer_notes": {"who": "na\u00efve"},
    "pretraining_tp": 1,
    "rope_interleaved": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": False,
}
NOT_COPIED = {"README.md", "modeling_x.py", ".env", "training_args.bin"}
GENERATION = (
    b'{ "temperature": 0.7,\n\t"top_p": 0.8, "do_sample": true,\n'
    b'  "bos_token_id": 3, "eos_token_id": 0, "repetition_penalty": 1.05 }'
)


def make_tokenizer() -> Tokenizer:
    """A byte-level BPE over a few letters, with special tokens."""
    names = (*SPECIAL, *PIECES)
    vocab = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab, [("t", "h"), ("th", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    return tokenizer


def write_rich(folder: pathlib.Path, template: str = "jinja", kind: str = "llama") -> pathlib.Path:
    """Writes the folder.

    Args:
        folder: To make.
        template: Where the chat template stands: "jinja", "config" (tokenizer_config.json), "both",
            or "named" (several, in tokenizer_config.json and in files).
        kind: Of the architecture, see `tiny_models`.
    """
    write_hf(folder, kind, hf_tensors(kind), **CONFIG)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "bos_token": "<s>",
        "own_key": [1, 2],
        "clean_up_tokenization_spaces": False,
    }
    if template in ("config", "both"):
        settings["chat_template"] = CHATML
    if template == "named":
        settings["chat_template"] = [{"name": "default", "template": "old"}]
    texts = {
        "tokenizer.json": " " + make_tokenizer().to_str() + " \n",
        "tokenizer_config.json": json.dumps(settings, indent=7),
        "special_tokens_map.json": '{"eos_token": "<|endoftext|>",   "bos_token": "<s>"}',
        "added_tokens.json": '{"<|im_end|>":2 }',
        "vocab.json": "{ }",
        "vocab.txt": "t\nh\n",
        "merges.txt": "#version: 0.2\r\nt h\nth e",
        "generation_config.json": GENERATION.decode(),
        # What no tokenizer is read from.
        "README.md": "A model.",
        "modeling_x.py": "raise SystemExit",
        ".env": "TOKEN=secret",
        "training_args.bin": "x",
    }
    if template in ("jinja", "both", "named"):
        texts["chat_template.jinja"] = CHATML
    if template == "named":
        texts["additional_chat_templates/tool_use.jinja"] = "tools: {{ tools }}"
        texts["chat_template.json"] = json.dumps({"chat_template": CHATML, "more": 1})
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(text.encode())
    return folder


def read_all(folder: pathlib.Path) -> dict[str, bytes]:
    """The bytes of every file by its name in the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
