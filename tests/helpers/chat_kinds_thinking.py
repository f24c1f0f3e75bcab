"""Kinds of chat templates that think: by key, inside the content, or from the prompt on."""

# ruff: noqa: RUF001 (the tokens of DeepSeek have a wide bar)

import dataclasses
import json

from chat_kind import Kind, call_json
from chat_kinds_plain import IM_END, ROLES

LAST_USER = r"""
{%- set ns = namespace(user=-1) -%}
{%- for m in messages -%}
{%- if m['role'] == 'user' -%}{%- set ns.user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
"""
SPLIT = r"""
{%- set content = m['content'] or '' -%}{%- set thinking = '' -%}
{%- if m['reasoning_content'] is string -%}{%- set thinking = m['reasoning_content'] -%}
{%- elif '</think>' in content -%}
{%- set thinking = content.split('</think>')[0].split('<think>')[-1].strip('\n') -%}
{%- set content = content.split('</think>')[-1].lstrip('\n') -%}
{%- endif -%}
"""
CALLS = r"""
{%- for call in m['tool_calls'] or [] -%}
{%- if content or not loop.first -%}{{- '\n' -}}{%- endif -%}
{{- '<tool_call>\n{"name": "' + call['function']['name'] + '", "arguments": ' -}}
{{- call['function']['arguments'] | tojson + '}\n</tool_call>' -}}
{%- endfor -%}
"""
TOOLS = r"""
{%- if tools -%}
{{- '<|im_start|>system\n' -}}
{%- if messages[0]['role'] == 'system' -%}{{- messages[0]['content'] + '\n\n' -}}{%- endif -%}
{{- '# Tools\n<tools>' -}}
{%- for tool in tools -%}{{- '\n' + tool | tojson -}}{%- endfor -%}
{{- '\n</tools><|im_end|>\n' -}}
{%- elif messages[0]['role'] == 'system' -%}
{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' -}}
{%- endif -%}
"""
RESULT = r"""
{%- if loop.previtem['role'] != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
{{- '\n<tool_response>\n' + m['content'] + '\n</tool_response>' -}}
{%- if loop.last or loop.nextitem['role'] != 'tool' -%}{{- '<|im_end|>\n' -}}{%- endif -%}
"""


def chatml_thinking(answer: str, prompt: str) -> str:
    """A ChatML template with tools, of how it writes an answer and opens one."""
    return (
        LAST_USER
        + TOOLS
        + "{%- for m in messages -%}{%- if m['role'] == 'assistant' -%}"
        + SPLIT
        + r"{{- '<|im_start|>assistant\n' -}}"
        + answer
        + CALLS
        + r"{{- '<|im_end|>\n' -}}{%- elif m['role'] == 'tool' -%}"
        + RESULT
        + r"{%- elif m['role'] == 'user' -%}"
        + r"{{- '<|im_start|>user\n' + m['content'] + '<|im_end|>\n' -}}"
        + r"{%- endif -%}{%- endfor -%}"
        + r"{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}"
        + prompt
        + r"{%- endif -%}"
    )


CLOSED = r"{%- if enable_thinking is false -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}"
QWEN_3 = chatml_thinking(
    r"""
{%- if loop.index0 > ns.user and (loop.last or thinking) -%}
{{- '<think>\n' + thinking.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') -}}
{%- else -%}{{- content -}}{%- endif -%}
""",
    CLOSED,
)
QWEN_35 = chatml_thinking(
    r"""
{%- if loop.index0 > ns.user -%}
{{- '<think>\n' + thinking.strip() + '\n</think>\n\n' + content.lstrip('\n') -}}
{%- else -%}{{- content -}}{%- endif -%}
""",
    CLOSED
    + r"{%- if enable_thinking is undefined or enable_thinking -%}{{- '<think>\n' -}}{%- endif -%}",
)
NEMOTRON = chatml_thinking(
    r"""
{%- if thinking and loop.index0 > ns.user -%}
{{- '<think>\n' + thinking + '\n</think>\n' + content -}}
{%- else -%}{{- '<think></think>' + content -}}{%- endif -%}
""",
    r"{{- '<think></think>' if enable_thinking is false else '<think>\n' -}}",
)
BY_KEY = chatml_thinking(
    r"""
{%- if thinking -%}{{- '<think>' + thinking + '</think>' -}}{%- endif -%}{{- content -}}
""",
    "",
)
QWQ = r"""
{%- for m in messages -%}
{%- set content = m['content'] -%}
{%- if m['role'] == 'assistant' and not loop.last -%}
{%- set content = content.split('</think>')[-1].lstrip('\n') -%}
{%- endif -%}
{{- '<|im_start|>' + m['role'] + '\n' + content + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n<think>\n' -}}{%- endif -%}
"""
DEEPSEEK = r"""
{{- bos_token -}}
{%- for m in messages if m['role'] == 'system' -%}{{- m['content'] -}}{%- endfor -%}
{%- for m in messages -%}
{%- if m['role'] == 'user' -%}{{- '<｜User｜>' + m['content'] -}}
{%- elif m['role'] == 'assistant' -%}
{{- '<｜Assistant｜>CLOSE' + m['content'].split('</think>')[-1] + eos_token -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<｜Assistant｜>OPEN' -}}{%- endif -%}
"""
R1_DISTILL = DEEPSEEK.replace("CLOSE", "").replace("OPEN", r"<think>\n")
V31 = DEEPSEEK.replace("CLOSE", "</think>").replace(
    "OPEN' -}}", "' -}}{{- '<think>' if thinking else '</think>' -}}"
)
GLM_45 = (
    LAST_USER
    + r"""
{{- '[gMASK]<sop>' -}}
{%- if tools -%}{{- '<|system|>\n# Tools' -}}
{%- for tool in tools -%}{{- '\n' + tool | tojson -}}{%- endfor -%}
{%- endif -%}
{%- for m in messages -%}
{%- if m['role'] == 'assistant' -%}
"""
    + SPLIT
    + r"""
{%- if loop.index0 <= ns.user -%}{%- set thinking = '' -%}{%- endif -%}
{{- '<|assistant|>\n<think>' + thinking.strip() + '</think>' -}}
{%- if content -%}{{- '\n' + content -}}{%- endif -%}
{%- for call in m['tool_calls'] or [] -%}
{{- '\n<tool_call>' + call['function']['name'] -}}
{%- for key, value in call['function']['arguments'].items() -%}
{{- '\n<arg_key>' + key + '</arg_key>\n<arg_value>' + value | tojson + '</arg_value>' -}}
{%- endfor -%}
{{- '\n</tool_call>' -}}
{%- endfor -%}
{%- elif m['role'] == 'tool' -%}
{%- if loop.previtem['role'] != 'tool' -%}{{- '<|observation|>' -}}{%- endif -%}
{{- '\n<tool_response>\n' + m['content'] + '\n</tool_response>' -}}
{%- else -%}
{{- '<|' + m['role'] + '|>\n' + m['content'] -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' + ('\n<think></think>' if enable_thinking is false else '') -}}
{%- endif -%}
"""
)
GLM_47 = (
    GLM_45.replace(
        r"{{- '<|assistant|>\n<think>' + thinking.strip() + '</think>' -}}",
        "{{- '<|assistant|>' -}}"
        "{%- if thinking -%}{{- '<think>' + thinking.strip() -}}{%- endif -%}"
        "{{- '</think>' -}}",
    )
    .replace(r"{{- '\n' + content -}}", "{{- content -}}")
    .replace(
        r"('\n<think></think>' if enable_thinking is false else '')",
        "('</think>' if enable_thinking is false else '<think>')",
    )
)
KIMI_K2 = r"""
{%- for m in messages -%}
{{- '<|im_' + m['role'] + '|>' + m['role'] + '<|im_middle|>' -}}
{%- if m['role'] == 'assistant' -%}{{- '<think></think>' -}}{%- endif -%}
{{- m['content'] + '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_assistant|>assistant<|im_middle|>' -}}{%- endif -%}
"""
GPT_OSS = (
    LAST_USER
    + r"""
{%- if tools -%}
{{- '<|start|>developer<|message|># Tools' -}}
{%- for tool in tools -%}{{- '\n' + tool | tojson -}}{%- endfor -%}
{{- '<|end|>' -}}
{%- endif -%}
{%- for m in messages -%}
{%- if m['role'] == 'assistant' -%}
{%- if m['thinking'] and loop.index0 > ns.user -%}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + m['thinking'] + '<|end|>' -}}
{%- endif -%}
{%- if m['tool_calls'] -%}
{%- set call = m['tool_calls'][0]['function'] -%}
{{- '<|start|>assistant to=functions.' + call['name'] + '<|channel|>commentary json' -}}
{{- '<|message|>' + call['arguments'] | tojson + '<|call|>' -}}
{%- else -%}
{{- '<|start|>assistant<|channel|>final<|message|>' + m['content'] -}}
{{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' -}}
{%- endif -%}
{%- elif m['role'] == 'tool' -%}
{{- '<|start|>functions to=assistant<|channel|>commentary<|message|>' -}}
{{- m['content'] + '<|end|>' -}}
{%- else -%}
{{- '<|start|>' + m['role'] + '<|message|>' + m['content'] + '<|end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start|>assistant' -}}{%- endif -%}
"""
)
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
EMPTY = "<think>\n\n</think>\n\n"
BLOCK = "<think>\n{}\n</think>\n\n"


def call_hermes(name: str, arguments: dict) -> str:
    """A call between the tags of Hermes and Qwen."""
    return f"<tool_call>\n{call_json(name, arguments)}\n</tool_call>"


def call_glm(name: str, arguments: dict) -> str:
    """A call of GLM, a pair of tags for every argument."""
    said = f"\n<tool_call>{name}"
    for key, value in arguments.items():
        told = json.dumps(value, ensure_ascii=False)
        said += f"\n<arg_key>{key}</arg_key>\n<arg_value>{told}</arg_value>"
    return said + "\n</tool_call>"


def call_harmony(name: str, arguments: dict) -> str:
    """A call of gpt-oss, behind the generation prompt ``<|start|>assistant``."""
    said = json.dumps(arguments, ensure_ascii=False)
    return f" to=functions.{name}<|channel|>commentary json<|message|>{said}"


def strip_lines(text: str) -> str:
    """Templates that strip new lines in front of a text."""
    return text.lstrip("\n")


QWEN = {
    "eos": "<|im_end|>",
    "added": TAGS,
    "call": call_hermes,
    "joined": "\n",
    "talks": True,
    "tools": True,
    **IM_END,
}
DEEP = {
    "end": "<｜end▁of▁sentence｜>",
    "eos": "<｜end▁of▁sentence｜>",
    "bos": "<｜begin▁of▁sentence｜>",
    "special": ("<｜User｜>", "<｜Assistant｜>"),
    "added": ("<think>", "</think>"),
}
GLM = {
    "end": "<|user|>",
    "eos": "<|endoftext|>",
    "special": ("[gMASK]", "<sop>", "<|observation|>", *ROLES),
    "added": TAGS,
    "call": call_glm,
    "joined": "",
    "talks": True,
    "end_of_call": "<|observation|>",
    "tools": True,
}
qwen_3 = Kind(
    "qwen 3",
    "Qwen 3: old thinking is left out, a last answer without any gets an empty block",
    QWEN_3,
    front=EMPTY,
    thought=BLOCK,
    trim=strip_lines,
    inline="thought",
    **QWEN,
)
qwen_35 = Kind(
    "qwen 3.5",
    "Qwen 3.5: the prompt opens thinking, the template closes it",
    QWEN_35,
    front="\n</think>\n\n",
    thought="{}\n</think>\n\n",
    trim=strip_lines,
    inline="thought",
    **QWEN,
)
glm_47 = Kind(
    "glm 4.7",
    "GLM 4.7",
    GLM_47,
    front="</think>",
    thought="{}</think>",
    inline="thought",
    **GLM,
)
v31 = Kind(
    "v3.1",
    "DeepSeek V3.1: the prompt closes thinking",
    V31,
    names=("thinking", "chat_template_kwargs"),
    **DEEP,
)
THINKING = (
    qwen_3,
    dataclasses.replace(
        qwen_3,
        name="qwen 3 off",
        arguments={"enable_thinking": False},
        front="",
        thought=None,
        inline="refused",
        names=("enable_thinking", "chat_template_kwargs"),
    ),
    qwen_35,
    dataclasses.replace(
        qwen_35,
        name="qwen 3.5 off",
        arguments={"enable_thinking": False},
        front="",
        thought=None,
        inline="refused",
        names=("enable_thinking", "chat_template_kwargs"),
    ),
    Kind(
        "nemotron",
        "Nemotron 3: the prompt opens thinking with a new line, the template closes it without",
        NEMOTRON,
        front="</think>",
        thought="{}\n</think>\n",
        inline="thought",
        **QWEN,
    ),
    Kind(
        "by key",
        "Templates that write thinking whenever the key is there",
        BY_KEY,
        thought="<think>{}</think>",
        inline="thought",
        **QWEN,
    ),
    Kind(
        "qwq",
        "QwQ: the prompt opens thinking, only old thinking is left out",
        QWQ,
        eos="<|im_end|>",
        added=("<think>", "</think>"),
        front="\n</think>\n\n",
        thought="{}\n</think>\n\n",
        inline="thought",
        **IM_END,
    ),
    Kind(
        "r1 distill",
        "R1-Distill: the prompt opens thinking, all thinking is left out",
        R1_DISTILL,
        front="\n</think>\n\n",
        thought="{}\n</think>\n\n",
        inline="thought",
        **DEEP,
    ),
    dataclasses.replace(v31, inline="refused"),
    dataclasses.replace(
        v31,
        name="v3.1 on",
        arguments={"thinking": True},
        front="</think>",
        thought="{}</think>",
        inline="thought",
        loose=True,
    ),
    Kind(
        "glm 4.5",
        "GLM 4.5 and 4.6",
        GLM_45,
        front="\n<think></think>",
        thought="\n<think>{}</think>",
        content="\n{}",
        inline="thought",
        **GLM,
    ),
    glm_47,
    dataclasses.replace(
        glm_47,
        name="glm 4.7 off",
        arguments={"enable_thinking": False},
        front="",
        thought=None,
        inline="refused",
        names=("enable_thinking", "chat_template_kwargs"),
    ),
    Kind(
        "kimi k2 thinking",
        "Kimi K2 Thinking: an empty block that is to be filled",
        KIMI_K2,
        end="<|im_end|>",
        eos="[EOS]",
        special=("<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>"),
        added=("<think>", "</think>"),
        front="<think></think>",
        thought="<think>{}</think>",
        loose=True,
        inline="thought",
    ),
    Kind(
        "gpt-oss",
        "gpt-oss: the last answer ends in another token than those of the past",
        GPT_OSS,
        end="<|return|>",
        eos="<|return|>",
        special=("<|start|>", "<|message|>", "<|end|>", "<|channel|>"),
        thought="<|channel|>analysis<|message|>{}<|end|><|start|>assistant",
        content="<|channel|>final<|message|>{}",
        inline="thought",
        call=call_harmony,
        end_of_call="<|call|>",
        tools=True,
    ),
)

UNKNOWN_TAG = Kind(
    "unknown tag",
    "Templates whose prompt opens a tag of their own",
    QWQ.replace("think>", "musing>"),
    eos="<|im_end|>",
    added=("<musing>", "</musing>"),
    **IM_END,
)
