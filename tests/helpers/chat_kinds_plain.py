"""Kinds of chat templates that neither think nor call tools."""

from chat_kind import Kind

CHATML = r"""
{%- for m in messages -%}
{{- '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
DEFAULT_SYSTEM = r"""
{%- if messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\nBe kind.<|im_end|>\n' -}}
{%- endif -%}
"""
LLAMA_3 = r"""
{{- bos_token -}}
{%- set system = '' -%}{%- set rest = messages -%}
{%- if messages[0]['role'] == 'system' -%}
{%- set system = messages[0]['content'] | trim -%}{%- set rest = messages[1:] -%}
{%- endif -%}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' -}}
{{- strftime_now('%d %b %Y') + '\n\n' + system + '<|eot_id|>' -}}
{%- for m in rest -%}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' -}}
{{- m['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
{%- endif -%}
"""
TAKE_TURNS = r"""
{%- for m in messages if m['role'] != 'system' -%}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{- raise_exception('roles must alternate user/assistant/user/assistant/...') -}}
{%- endif -%}
{%- endfor -%}
"""
LLAMA_2 = (
    TAKE_TURNS
    + r"""
{%- set system = '' -%}{%- set rest = messages -%}
{%- if messages[0]['role'] == 'system' -%}
{%- set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' -%}
{%- set rest = messages[1:] -%}
{%- endif -%}
{%- for m in rest -%}
{%- if m['role'] == 'user' -%}
{{- bos_token + '[INST] ' + (system if loop.first else '') + m['content'].strip() + ' [/INST]' -}}
{%- else -%}
{{- ' ' + m['content'].strip() + ' ' + eos_token -}}
{%- endif -%}
{%- endfor -%}
"""
)
MISTRAL_NEMO = (
    TAKE_TURNS
    + r"""
{%- set system = '' -%}{%- set rest = messages -%}
{%- if messages[0]['role'] == 'system' -%}
{%- set system = messages[0]['content'] + '\n\n' -%}{%- set rest = messages[1:] -%}
{%- endif -%}
{{- bos_token -}}
{%- for m in rest -%}
{%- if m['role'] == 'user' -%}
{{- '[INST]' + (system if loop.last else '') + m['content'] + '[/INST]' -}}
{%- else -%}
{{- m['content'] + eos_token -}}
{%- endif -%}
{%- endfor -%}
"""
)
GEMMA = (
    r"""
{%- if messages[0]['role'] == 'system' -%}
{{- raise_exception('System role not supported') -}}
{%- endif -%}
"""
    + TAKE_TURNS
    + r"""
{{- bos_token -}}
{%- for m in messages -%}
{{- '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' -}}
{{- m['content'] | trim + '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}
"""
)
PHI = r"""
{%- for m in messages -%}
{{- '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- else -%}{{- eos_token -}}{%- endif -%}
"""
APRIEL_15 = r"""
{%- for m in messages -%}
{{- '<|' + m['role'] + '|>\n' + m['content'] + '\n<|end|>\n' -}}
{%- if loop.last and not add_generation_prompt -%}{{- eos_token -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- endif -%}
"""
APRIEL_16 = r"""
{%- for m in messages -%}
{{- '<|begin_' + m['role'] + '|>\n' + m['content'] -}}
{%- if m['role'] != 'assistant' -%}{{- '\n' -}}
{%- elif not loop.last or add_generation_prompt -%}{{- '\n<|end|>\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|begin_assistant|>\n' -}}{%- endif -%}
"""
COMMAND_A = r"""
{{- bos_token -}}
{%- for m in messages -%}
{{- '<|START_OF_TURN_TOKEN|><|' + m['role'] | upper + '_TOKEN|>' -}}
{%- if m['role'] == 'assistant' -%}
{{- '<|START_RESPONSE|>' + m['content'] + '<|END_RESPONSE|><|END_OF_TURN_TOKEN|>' -}}
{%- else -%}
{{- m['content'] + '<|END_OF_TURN_TOKEN|>' -}}
{%- endif -%}
{%- endfor -%}
{{- '<|START_OF_TURN_TOKEN|><|ASSISTANT_TOKEN|>' -}}
"""
GLM_4 = r"""
{{- '[gMASK]<sop>' -}}
{%- for m in messages -%}{{- '<|' + m['role'] + '|>\n' + m['content'] -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""
APERTUS = r"""
{{- bos_token -}}
{%- for m in messages -%}
{%- set before = loop.previtem['role'] if not loop.first else '' -%}
{%- if m['role'] == 'assistant' -%}
{{- ('' if before == 'assistant' else '<|assistant_start|>') + m['content'] -}}
{%- else -%}
{{- ('<|assistant_end|>' if before == 'assistant' else '') -}}
{{- '<|' + m['role'] + '_start|>' + m['content'] + '<|' + m['role'] + '_end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and messages[-1]['role'] != 'assistant' -%}
{{- '<|assistant_start|>' -}}
{%- endif -%}
"""
METHARME = r"""
{%- for m in messages -%}
{{- '<|' + ('model' if m['role'] == 'assistant' else m['role']) + '|>' + m['content'] -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|model|>' -}}{%- else -%}{{- eos_token -}}{%- endif -%}
"""
ZEPHYR = r"""
{%- for m in messages -%}
{{- '<|' + m['role'] + '|>\n' + m['content'] | trim + eos_token + '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- endif -%}
"""
ALPACA = r"""
{%- for m in messages -%}
{%- if m['role'] == 'system' -%}{{- m['content'] + '\n\n' -}}
{%- elif m['role'] == 'user' -%}{{- '### Instruction:\n' + m['content'] + '\n\n' -}}
{%- else -%}{{- '### Response:\n' + m['content'] + '\n\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Response:\n' -}}{%- endif -%}
"""
VICUNA = r"""
{%- for m in messages -%}
{%- if m['role'] == 'system' -%}{{- m['content'] + ' ' -}}
{%- elif m['role'] == 'user' -%}{{- 'USER: ' + m['content'] + ' ' -}}
{%- else -%}{{- 'ASSISTANT: ' + m['content'] + eos_token -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""
ROLE_TEXT = r"""
{{- bos_token -}}
{%- for m in messages -%}
{%- if m['role'] == 'user' -%}{{- 'User: ' + m['content'] + '\n\n' -}}
{%- elif m['role'] == 'assistant' -%}{{- 'Assistant: ' + m['content'] + eos_token -}}
{%- else -%}{{- m['content'] + '\n\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}
"""
NO_SYSTEM = r"""
{%- for m in messages if m['role'] != 'system' -%}
{{- '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
IM_END = {"end": "<|im_end|>", "special": ("<|im_start|>",)}
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")

PLAIN = (
    Kind("chatml", "Qwen 1.5, SmolLM2, Yi", CHATML, eos="<|im_end|>", **IM_END),
    Kind("chatml default system", "Qwen 2.5", DEFAULT_SYSTEM + CHATML, eos="<|im_end|>", **IM_END),
    Kind("chatml other eos", "ChatML on a base", CHATML, eos="<|endoftext|>", **IM_END),
    Kind("chatml bos", "LFM2", "{{ bos_token }}" + CHATML, eos="<|im_end|>", bos="<s>", **IM_END),
    Kind(
        "llama 3",
        "Llama 3.1 and 3.2, with the date of today",
        LLAMA_3,
        end="<|eot_id|>",
        eos="<|eot_id|>",
        bos="<|begin_of_text|>",
        special=("<|start_header_id|>", "<|end_header_id|>"),
        trim=str.strip,
    ),
    Kind(
        "llama 2",
        "Llama 2, Mistral 7B 0.1",
        LLAMA_2,
        end="</s>",
        eos="</s>",
        bos="<s>",
        content=" {} ",
        trim=str.strip,
        users=False,
    ),
    Kind(
        "mistral nemo",
        "Mistral Nemo, Mistral Small 2409",
        MISTRAL_NEMO,
        end="</s>",
        eos="</s>",
        bos="<s>",
        special=("[INST]", "[/INST]"),
        users=False,
    ),
    Kind(
        "gemma",
        "Gemma 1 and 2",
        GEMMA,
        end="<end_of_turn>",
        eos="<eos>",
        bos="<bos>",
        special=("<start_of_turn>",),
        trim=str.strip,
        system="raises",
        users=False,
    ),
    Kind("phi", "Phi 3", PHI, end="<|end|>", eos="<|endoftext|>", special=ROLES),
    Kind("apriel 1.5", "Apriel 1.5", APRIEL_15, "<|end|>", "</s>", special=ROLES, behind="\n"),
    Kind(
        "apriel 1.6",
        "Apriel 1.6: the end stands behind answers of the past only",
        APRIEL_16,
        end="<|end|>",
        eos="<|end|>",
        special=("<|begin_system|>", "<|begin_user|>", "<|begin_assistant|>"),
        behind="\n",
    ),
    Kind(
        "command a",
        "Command A, Command R7B: the next turn's opener is always there",
        COMMAND_A,
        end="<|END_OF_TURN_TOKEN|>",
        eos="<|END_OF_TURN_TOKEN|>",
        bos="<BOS_TOKEN>",
        special=(
            "<|START_OF_TURN_TOKEN|>",
            "<|SYSTEM_TOKEN|>",
            "<|USER_TOKEN|>",
            "<|ASSISTANT_TOKEN|>",
            "<|START_RESPONSE|>",
            "<|END_RESPONSE|>",
        ),
        content="<|START_RESPONSE|>{}<|END_RESPONSE|>",
    ),
    Kind(
        "glm 4",
        "GLM 4: the next turn's opener is the end",
        GLM_4,
        end="<|user|>",
        eos="<|endoftext|>",
        special=("[gMASK]", "<sop>", *ROLES),
        content="\n{}",
    ),
    Kind(
        "apertus",
        "Apertus: the end stands before a message that follows",
        APERTUS,
        end="<|assistant_end|>",
        eos="<|assistant_end|>",
        bos="<s>",
        special=(
            "<|assistant_start|>",
            "<|user_start|>",
            "<|user_end|>",
            "<|system_start|>",
            "<|system_end|>",
        ),
    ),
    Kind(
        "metharme",
        "Pygmalion, Metharme: only the last answer has an end",
        METHARME,
        end="</s>",
        eos="</s>",
        special=("<|system|>", "<|user|>", "<|model|>"),
    ),
    Kind("zephyr", "Zephyr, TinyLlama", ZEPHYR, end="</s>", eos="</s>", trim=str.strip),
    Kind("vicuna", "Vicuna", VICUNA, end="</s>", eos="</s>", content=" {}"),
    Kind(
        "role text",
        "DeepSeek V2",
        ROLE_TEXT,
        end="</s>",
        eos="</s>",
        bos="<s>",
        content=" {}",
    ),
)
"""Kinds that take every plain row, but for what their fields say."""

NO_END = Kind("alpaca", "Alpaca: no token ends an answer", ALPACA, end="", eos="</s>")
NO_TOKENS = Kind("chatml as text", "ChatML on a tokenizer that lacks it", CHATML, "", "</s>")
NO_SYSTEM_ROLE = Kind(
    "system dropped",
    "Templates that pass a system text over",
    NO_SYSTEM,
    eos="<|im_end|>",
    system="dropped",
    **IM_END,
)
BOS_TWICE = Kind(
    "bos twice",
    "Llama 3 conversions whose template repeats the bos",
    "{{ bos_token + '<s>' }}" + CHATML,
    eos="<|im_end|>",
    bos="<s>",
    **IM_END,
)
EOS_OPENS = Kind(
    "no opener",
    "Templates that write answers without an opener",
    r"""
{%- for m in messages -%}
{%- if m['role'] == 'assistant' -%}{{- m['content'] + eos_token -}}
{%- else -%}{{- '<|' + m['role'] + '|>' + m['content'] + '<|assistant|>' -}}{%- endif -%}
{%- endfor -%}
""",
    end="</s>",
    eos="</s>",
    special=ROLES,
)
