"""Kinds of chat templates that call tools or read documents, without thinking."""

import json

from chat_kind import Kind, call_json
from chat_kinds_plain import CHATML, IM_END, TAKE_TURNS
from chat_kinds_thinking import CALLS, QWEN, RESULT, TOOLS

HERMES = (
    TOOLS
    + r"""
{%- for m in messages -%}
{%- if m['role'] == 'assistant' -%}
{%- set content = m['content'] or '' -%}
{{- '<|im_start|>assistant\n' + content -}}
"""
    + CALLS
    + r"""
{{- '<|im_end|>\n' -}}
{%- elif m['role'] == 'tool' -%}
"""
    + RESULT
    + r"""
{%- elif m['role'] == 'user' -%}
{{- '<|im_start|>user\n' + m['content'] + '<|im_end|>\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
)
LLAMA_31 = r"""
{{- bos_token -}}
{%- for m in messages -%}
{%- if m['tool_calls'] -%}
{%- if m['tool_calls'] | length != 1 -%}
{{- raise_exception('This model only supports single tool-calls at once!') -}}
{%- endif -%}
{%- set call = m['tool_calls'][0]['function'] -%}
{%- if call['arguments'] is not mapping -%}
{{- raise_exception('arguments must be an object') -}}
{%- endif -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
{{- '{"name": "' + call['name'] + '", "parameters": ' + call['arguments'] | tojson -}}
{{- '}<|eot_id|>' -}}
{%- elif m['role'] == 'tool' or m['role'] == 'ipython' -%}
{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + m['content'] + '<|eot_id|>' -}}
{%- else -%}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' -}}
{%- if tools and m['role'] == 'user' and loop.index0 == (messages[0]['role'] == 'system') | int -%}
{{- 'Functions:\n' -}}{%- for tool in tools -%}{{- tool | tojson + '\n\n' -}}{%- endfor -%}
{%- endif -%}
{{- m['content'] | trim + '<|eot_id|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
{%- endif -%}
"""
MISTRAL = r"""
{%- set ns = namespace(user=-1) -%}
{%- for m in messages -%}
{%- if m['role'] == 'user' -%}{%- set ns.user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{{- bos_token -}}
{%- for m in messages -%}
{%- if m['role'] == 'system' -%}{{- '[SYSTEM_PROMPT]' + m['content'] + '[/SYSTEM_PROMPT]' -}}
{%- elif m['role'] == 'user' -%}
{%- if tools and loop.index0 == ns.user -%}
{{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' -}}
{%- endif -%}
{{- '[INST]' + m['content'] + '[/INST]' -}}
{%- elif m['role'] == 'tool' -%}
{{- '[TOOL_RESULTS]{"content": ' + m['content'] | tojson -}}
{{- ', "call_id": "' + m['tool_call_id'] + '"}[/TOOL_RESULTS]' -}}
{%- elif m['tool_calls'] -%}
{{- '[TOOL_CALLS][' -}}
{%- for call in m['tool_calls'] -%}
{%- if call['id'] is undefined or call['id'] | length != 9 -%}
{{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') -}}
{%- endif -%}
{{- '{"name": "' + call['function']['name'] + '", "arguments": ' -}}
{{- call['function']['arguments'] | tojson + ', "id": "' + call['id'] + '"}' -}}
{{- ', ' if not loop.last else '' -}}
{%- endfor -%}
{{- ']' + eos_token -}}
{%- else -%}{{- m['content'] + eos_token -}}{%- endif -%}
{%- endfor -%}
"""
TEXT_ARGUMENTS = r"""
{{- bos_token -}}
{%- for tool in tools or [] -%}{{- tool | tojson + '\n' -}}{%- endfor -%}
{%- for m in messages -%}
{%- if m['role'] == 'tool' -%}{{- '<|tool|>' + m['content'] -}}
{%- elif m['role'] == 'assistant' -%}
{{- '<|assistant|>' + (m['content'] or '') -}}
{%- for call in m['tool_calls'] or [] -%}
{{- '<|call|>' + call['function']['name'] + '\n' + call['function']['arguments'] -}}
{%- endfor -%}
{{- eos_token -}}
{%- else -%}{{- '<|' + m['role'] + '|>' + m['content'] -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""
GROUNDED = (
    r"""
{%- for document in documents or [] -%}
{{- '<doc>' + document['title'] + ': ' + document['text'] + '</doc>\n' -}}
{%- endfor -%}
"""
    + CHATML
)
ID = "a1b2c3d4e"


def call_llama(name: str, arguments: dict) -> str:
    """A call of Llama 3.1: the arguments are named parameters."""
    return call_json(name, arguments, "parameters")


def call_mistral(name: str, arguments: dict) -> str:
    """The one call of a turn, with its id."""
    return f'[TOOL_CALLS][{call_json(name, arguments)[:-1]}, "id": "{ID}"}}]'


def call_text(name: str, arguments: dict) -> str:
    """A call whose arguments are JSON text that the template does not write itself."""
    return f"<|call|>{name}\n{json.dumps(arguments, ensure_ascii=False)}"


TOOL_USE = (
    Kind("hermes", "Hermes, Qwen 2.5", HERMES, **QWEN),
    Kind(
        "named templates",
        "Hermes 3: the template for tools has a name of its own",
        {"default": CHATML, "tool_use": HERMES},
        **QWEN,
    ),
    Kind(
        "llama 3.1 tools",
        "Llama 3.1: one call, an object of arguments, results of the role ipython",
        LLAMA_31,
        end="<|eot_id|>",
        eos="<|eot_id|>",
        bos="<|begin_of_text|>",
        special=("<|start_header_id|>", "<|end_header_id|>"),
        trim=str.strip,
        call=call_llama,
        tools=True,
    ),
    Kind(
        "mistral tools",
        "Mistral: tools stand before the last user message, calls have ids",
        MISTRAL,
        end="</s>",
        eos="</s>",
        bos="<s>",
        special=("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
        added=("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[SYSTEM_PROMPT]"),
        call=call_mistral,
        tools=True,
    ),
    Kind(
        "text arguments",
        "DeepSeek V3: arguments are JSON text",
        TEXT_ARGUMENTS,
        end="</s>",
        eos="</s>",
        bos="<s>",
        special=("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|call|>"),
        call=call_text,
        tools=True,
    ),
)
DOCUMENTS = Kind(
    "documents",
    "Command R, Granite: documents stand in front",
    GROUNDED,
    eos="<|im_end|>",
    documents=True,
    **IM_END,
)
ALTERNATE = Kind(
    "turns",
    "Templates that refuse two messages of one role in a row",
    TAKE_TURNS + CHATML,
    eos="<|im_end|>",
    users=False,
    **IM_END,
)
