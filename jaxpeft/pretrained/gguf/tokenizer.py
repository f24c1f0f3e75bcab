"""The tokenizer and chat template in the metadata of a GGUF file.

A GGUF file stores the vocabulary, the merges, the token types and the *name* of a rule for
splitting text before merging. The rules themselves are code and are listed here, for the models
that this library reads. Files with a sentencepiece vocabulary (Llama 2, Mistral 7B) store scores,
from which the merges follow.
"""

import pathlib
from typing import Any

from jaxpeft.core.errors import UserError, first_few
from jaxpeft.pretrained.gguf.file import read_gguf

_GPT2, _SMOLLM, _LLAMA3, _QWEN2, _TEKKEN = "gpt-2", "smollm", "llama-bpe", "qwen2", "tekken"
# Names found in files, and the rules that they mean.
PRE_TOKENIZERS = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": _SMOLLM,
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
}
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REGEX = {
    _LLAMA3: _WORDS + r"\p{N}{1,3}" + _REST,
    _QWEN2: _WORDS + r"\p{N}" + _REST,
    _TEKKEN: (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
_UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 2, 3, 4, 5, 6
_SPACE = "\u2581"


def read_gguf_tokenizer(path: pathlib.Path) -> Any:
    """The tokenizer that a GGUF file describes.

    Args:
        path: The file.

    Returns:
        A `transformers.PreTrainedTokenizerFast` with the file's special tokens and chat template.

    Raises:
        UserError: The metadata is incomplete, or the tokenizer is not supported.
    """
    metadata, _ = read_gguf(path)
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise UserError(
            f"{path}: tokenizer.ggml.model: {kind!r} is not supported; supported: gpt2 (byte-level "
            "BPE), llama (sentencepiece)"
        )
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise UserError(f"{path}: tokenizer.ggml.tokens is missing")
    types = metadata.get("tokenizer.ggml.token_type")
    types = [1] * len(tokens) if types is None else [int(kind) for kind in types]
    if len(types) != len(tokens):
        raise UserError(
            f"{path}: tokenizer.ggml.token_type: {len(types)} entries for {len(tokens)} tokens"
        )
    vocab = {t: i for i, (t, kind) in enumerate(zip(tokens, types, strict=True)) if kind != _UNUSED}
    if len(vocab) != len(tokens) - types.count(_UNUSED):
        raise UserError(f"{path}: tokenizer.ggml.tokens: a token is there twice")
    if kind == "gpt2":
        tokenizer, add_bos = _byte_level(path, metadata, vocab)
    else:
        tokenizer, add_bos = _sentencepiece(path, metadata, vocab, types), True
    return _finish(path, metadata, tokenizer, tokens, types, add_bos)


def _byte_level(
    path: pathlib.Path, metadata: dict[str, Any], vocab: dict[str, int]
) -> tuple[Any, bool]:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in PRE_TOKENIZERS:
        raise UserError(
            f"{path}: tokenizer.ggml.pre: {name!r} is not supported; supported: "
            f"{', '.join(PRE_TOKENIZERS)}. Load the model's Hugging Face folder instead"
        )
    pre = PRE_TOKENIZERS[name]
    lines = metadata.get("tokenizer.ggml.merges")
    if not isinstance(lines, list):
        raise UserError(f"{path}: tokenizer.ggml.merges is missing")
    merges = [tuple(line.split(" ")) for line in lines]
    odd = [
        line
        for line, pair in zip(lines, merges, strict=True)
        if len(pair) != 2 or any(part not in vocab for part in (*pair, "".join(pair)))
    ]
    if odd:
        raise UserError(
            f"{path}: tokenizer.ggml.merges: {len(odd)} lines do not join two known tokens: "
            f"{first_few([repr(line) for line in odd])}"
        )
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == _LLAMA3))
    steps: list[Any] = []
    if pre == _SMOLLM:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if pre in _REGEX:
        steps.append(pre_tokenizers.Split(Regex(_REGEX[pre]), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in _REGEX))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    if pre == _QWEN2:
        tokenizer.normalizer = normalizers.NFC()  # type: ignore[assignment]
    return tokenizer, pre in (_LLAMA3, _TEKKEN)


def _sentencepiece(
    path: pathlib.Path, metadata: dict[str, Any], vocab: dict[str, int], types: list[int]
) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(types):
        raise UserError(f"{path}: tokenizer.ggml.scores: expected one for each of the tokens")
    unknown = [token for token, index in vocab.items() if types[index] == _UNKNOWN]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=merges_from_scores(vocab, scores.tolist(), types),
            unk_token=unknown[0] if unknown else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps: list[Any] = [normalizers.Prepend(_SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])  # type: ignore[assignment]
    tail: list[Any] = [decoders.Strip(content=" ", left=1, right=0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *tail]
    )
    return tokenizer


def merges_from_scores(
    vocab: dict[str, int], scores: list[float], types: list[int]
) -> list[tuple[str, str]]:
    """The merges that a sentencepiece BPE vocabulary implies, best score first.

    Args:
        vocab: Id of every token.
        scores: Score of every id.
        types: Type of every id; only ordinary tokens are merged.
    """
    found = []
    for token, index in vocab.items():
        if types[index] in (_UNKNOWN, _CONTROL, _BYTE):
            continue
        for cut in range(1, len(token)):
            left, right = vocab.get(token[:cut]), vocab.get(token[cut:])
            if left is not None and right is not None:
                found.append((-scores[index], index, left, right, token[:cut], token[cut:]))
    found.sort(key=lambda item: item[:4])
    return [(left, right) for *_, left, right in found]


def _finish(
    path: pathlib.Path,
    metadata: dict[str, Any],
    tokenizer: Any,
    tokens: list[str],
    types: list[int],
    add_bos: bool,
) -> Any:
    """Adds the special tokens, the tokens around a text, and the chat template."""
    from tokenizers import AddedToken, processors

    from jaxpeft.pretrained.quiet_transformers import import_transformers

    added = [
        AddedToken(token, normalized=False, special=kind == _CONTROL)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (_CONTROL, _USER)
    ]
    tokenizer.add_tokens(added)
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special: dict[str, str] = {}
    for ours, theirs in names.items():
        index = metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if index is None:
            continue
        if not 0 <= index < len(tokens):
            raise UserError(
                f"{path}: tokenizer.ggml.{theirs}_token_id: {index} is outside the "
                f"{len(tokens)} tokens"
            )
        special[f"{ours}_token"] = tokens[index]
    bos, eos = special.get("bos_token"), special.get("eos_token")
    before = [bos] if bos and metadata.get("tokenizer.ggml.add_bos_token", add_bos) else []
    after = [eos] if eos and metadata.get("tokenizer.ggml.add_eos_token", False) else []
    if before or after:
        around = dict.fromkeys((*before, *after))
        single = [*before, "$A", *after]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single,
            pair=[*single, *(f"{piece}:1" for piece in [*before, "$B", *after])],
            special_tokens=[(token, tokens.index(token)) for token in around],
        )
    arch = metadata.get("general.architecture")
    extra = {}
    if template := metadata.get("tokenizer.chat_template"):
        extra["chat_template"] = template
    return import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=metadata.get(f"{arch}.context_length", 2**31 - 1),
        clean_up_tokenization_spaces=False,
        **special,
        **extra,
    )
