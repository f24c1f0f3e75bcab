"""A tokenizer of single characters with a ChatML template, for tests.

Ids: 0 ``<|im_start|>``, 1 ``<|im_end|>`` (eos and pad), 2 ``<s>``, 3 the merged token " b",
then one id for every printable ASCII character.
"""

import string

CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and m['role'] != 'system' %}"
    "<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<s>"]
CHARACTERS = [" b", *string.printable]
VOCAB_SIZE = len(SPECIAL) + len(CHARACTERS)


def toy_tokenizer(template: str | None = CHATML, bos: bool = False, eos: bool = True):
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {token: index for index, token in enumerate(SPECIAL + CHARACTERS)}
    backend = Tokenizer(models.BPE(vocab, [(" ", "b")]))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 2)]
        )
    names = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"} if eos else {}
    if bos:
        names["bos_token"] = "<s>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = template
    return tokenizer


def shown(ids, mask=None) -> str:
    """The tokens in words, with what is learned in square brackets."""
    text, inside = "", False
    for index, token in enumerate(ids):
        learned = mask is not None and bool(mask[index])
        if learned != inside:
            text += "[" if learned else "]"
        inside = learned
        text += (SPECIAL + CHARACTERS)[token]
    return text + ("]" if inside else "")
