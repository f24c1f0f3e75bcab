"""Chat templates of many kinds, written as those of well-known models are."""

CHATML = (
    "{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n' }}{%- for tool in tools %}"
    "{{- '\\n' }}{{- tool | tojson }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

LLAMA3 = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not tools_in_user_message is defined %}
    {%- set tools_in_user_message = true %}
{%- endif %}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none and not tools_in_user_message %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- if tools_in_user_message and not tools is none %}
    {%- if messages | length != 0 %}
        {%- set first_user_message = messages[0]['content']|trim %}
        {%- set messages = messages[1:] %}
    {%- else %}
        {{- raise_exception("Cannot put tools in the first user message!") }}
{%- endif %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\n' -}}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
    {{- first_user_message + "<|eot_id|>"}}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" }}
        {{- "<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}"
    "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}"
    "{%- endif %}{{- bos_token }}{%- set ns = namespace(index=0) %}"
    "{%- for message in loop_messages %}"
    "{%- if not (message.role == 'tool' or (message.tool_calls is defined and"
    " message.tool_calls is not none)) %}"
    "{%- if (message['role'] == 'user') != (ns.index % 2 == 0) %}"
    "{{- raise_exception('roles must alternate user/assistant/user/assistant/...') }}{%- endif %}"
    "{%- set ns.index = ns.index + 1 %}{%- endif %}{%- endfor %}"
    "{%- for message in loop_messages %}{%- if message['role'] == 'user' %}"
    "{%- if loop.last and system_message is defined %}"
    "{{- '[INST] ' + system_message + '\\n\\n' + message['content'] + '[/INST]' }}{%- else %}"
    "{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}"
    "{%- elif message['role'] == 'assistant' %}"
    "{{- ' ' + message['content']|trim + eos_token}}{%- endif %}{%- endfor %}"
)

THINKING = """{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n') %}
            {%- set reasoning_content = reasoning_content.split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') }}
            {{- '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {{- '<tool_call>' ~ (tool_call.function or tool_call) | tojson ~ '</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or messages[loop.index0 - 1].role != "tool" %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

GENERATION = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
)

TYPES = """{%- macro render(spec, depth) -%}
    {%- if spec.type == "array" -%}
        {{- render(spec['items'], depth + 1) + '[]' -}}
    {%- elif spec.type == "object" -%}
        {{- '{\\n' -}}
        {%- for name, inner in spec.properties.items() -%}
            {{- '  ' * depth ~ name ~ ': ' ~ render(inner, depth + 1) -}}
            {%- if not loop.last %},{% endif -%}{{- '\\n' -}}
        {%- endfor -%}
        {{- '}' -}}
    {%- elif spec.enum -%}
        {{- '"' + spec.enum|join('" | "') + '"' -}}
    {%- else -%}
        {{- spec.type|default('any') -}}
    {%- endif -%}
{%- endmacro -%}
{%- for tool in tools or [] -%}
    {{- '// ' ~ tool.function.description ~ '\\n' ~ tool.function.name -}}
    {{- ' = ' ~ render(tool.function.parameters, 1) ~ ';\\n' -}}
{%- endfor -%}
{%- for m in messages -%}{{ '[' ~ m.role|upper ~ '] ' ~ m.content }}{%- endfor -%}"""

EACH = "{% for m in messages %}{{ X }}|{% endfor %}"
EXPRESSIONS = (
    "m.content|trim|upper",
    "m['content'][::-1]",
    "m.content[1:-1]",
    "m.content.strip().split(' ')|join('_')",
    "m.content.replace('a', 'bb')|replace('b', 'c', 1)",
    "m|tojson",
    "m|tojson(indent=2)",
    "m|tojson(separators=(',', ':'), sort_keys=True)",
    "m|tojson(ensure_ascii=True)",
    "m",
    "m.content|list",
    "m.content|length",
    "m.items()|list",
    "m|items|list",
    "m|dictsort",
    "m.role in ['user', 'assistant']",
    "'a' in m.content",
    "m.content not in m.role",
    "m.content == m.role",
    "m.content < m.role and m.role >= m.content",
    "m.content in [m.content]",
    "m.content ~ 1 ~ none ~ [m.role]",
    "m.content * 3",
    "(1, m.content) + (2,)",
    "[1, 2] * 2 + [m.role]",
    "{m.role: m.content, 'x': [1, 2.5]}",
    "'%s is %05.1f' % (m.role, 3)",
    "'%(role)s: %(content)s' % m",
    "'{0:>10}|{role!r}|{content:.3}'.format(1, **m)",
    "'{role}'.format_map(m)",
    "m.role|center(20)",
    "m.role.center(20, '*') ~ m.role.zfill(9) ~ m.role.ljust(8) ~ m.role.rjust(8)",
    "m.content|indent(2, true)",
    "m.content|wordwrap(5)",
    "m.content|title ~ m.content.title() ~ m.content|capitalize",
    "m.content|e ~ '<'",
    "m.content|truncate(5, true)",
    "m.content|wordcount",
    "m.content|urlencode",
    "m.content|batch(3, '-')|list",
    "m.content|slice(2)|list",
    "m.content|reverse",
    "m.content|first ~ m.content|last",
    "m.content|default('x')",
    "m.nothing|default('x', true) ~ m.nothing",
    "m.content|unique|list",
    "m.content|sort|join(',')",
    "m.content|groupby(0)|list|length",
    "m.content|string|int(7)",
    "messages|map(attribute='role')|join(', ')",
    "messages|selectattr('role', 'equalto', 'user')|list|length",
    "messages|rejectattr('role', 'equalto', 'user')|map(attribute='content')|list",
    "messages|selectattr('role', 'equalto', 'x') is true",
    "'yes' if messages|selectattr('role', 'equalto', 'x') else 'no'",
    "(messages|map(attribute='content')|map('length')|list|sum) / 2",
    "[[1], [2]]|sum(start=[])",
    "messages|sum(attribute='n', start=0) if m.n else 0",
    "range(10)|select('odd')|list",
    "range(5)|max ~ [3, 1]|min",
    "7 // 2 ~ 7 / 2 ~ 7 % 4 ~ 2 ** 10 ~ -7 ~ (+3 - 4 * 2)",
    "3.14159|round(2) ~ 5|round ~ 1234|round(-2)",
    "loop.index ~ loop.length ~ loop.revindex0 ~ loop.cycle('a', 'b') ~ loop.changed(m.role)",
    "loop.previtem.role if loop.previtem else '' ~ loop.nextitem",
    "dict(a=1, b=m.role)|tojson",
    "dict([(1, 2)]) ~ dict.fromkeys('ab', 1)",
    "namespace(a=m.role).a",
    "m is mapping ~ m.content is string ~ m is iterable ~ m is sequence ~ m.x is defined",
    "1 is odd ~ 2 is even ~ 9 is divisibleby(3) ~ m.content is upper ~ 1 is in([1])",
    "m.role is eq('user') ~ 1 is lt(2) ~ m is sameas(m) ~ 1 is number ~ none is none",
    "m.content.startswith('a') ~ m.content.endswith(('a', 'b')) ~ m.content.find('a')",
    "m.content.partition('a') ~ m.content.rsplit('a', 1) ~ m.content.splitlines()",
    "m.content.encode() ~ m.content.isdigit() ~ m.content.count('a') ~ m.content.expandtabs(3)",
    "' '.join(m.values()|map('string')) ~ ''.join([])",
    "m.content.translate({97: 'A'}) ~ m.content.casefold() ~ m.content.swapcase()",
    "m.content|xmlattr if false else {'a': 1}|xmlattr",
    "m.get('role') ~ m.get('x', 'y') ~ m.keys()|list",
    "m.content|striptags ~ m.content|forceescape ~ m.content|safe",
    "m.content|filesizeformat if false else 1000|filesizeformat",
    "lipsum|string|length > 0",
    "messages.index(m) ~ messages.count(m)",
    "(m.content|pprint)",
    "'a' 'b' ~ 'c'",
    "(10).to_bytes(2, 'big') ~ (3.0).is_integer()",
    "bos_token ~ eos_token ~ pad_token ~ add_generation_prompt ~ tools ~ documents ~ x",
    "1 if m.role == 'user' else 2",
    "m.content|replace('a', 'b')|trim('b ')",
    "[m.role, m.content]|join|lower",
    "m.thinking ~ m.reasoning ~ m.reasoning_content",
)

BLOCKS = {
    "break and continue": "{% for m in messages %}{% if loop.index == 1 %}{% continue %}{% endif %}"
    "{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "else of a loop": "{% for m in messages if m.role == 'x' %}{{ m }}{% else %}none{% endfor %}",
    "condition of a loop": "{% for m in messages if m.role == 'user' %}{{ loop.index }}"
    "{{ m.content }}{% endfor %}",
    "recursive loop": "{% for m in tree recursive %}<{{ m.name }}{{ loop.depth }}"
    "{% if m.kids %}{{ loop(m.kids) }}{% endif %}>{% endfor %}",
    "namespace": "{% set ns = namespace(n=0, text='') %}{% for m in messages %}"
    "{% set ns.n = ns.n + m.content|length %}{% set ns.text = ns.text ~ m.role %}{% endfor %}"
    "{{ ns.n }}{{ ns.text }}",
    "macro": "{% macro turn(m, end='!') %}[{{ m.role }}: {{ m.content }}{{ end }}]{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{{ turn(m, end='?') }}{% endfor %}",
    "macro with more": "{% macro f() %}{{ varargs }}{{ kwargs }}{% endmacro %}{{ f(1, 2, a=3) }}",
    "call block": "{% macro box(x) %}[{{ caller(x) }}]{% endmacro %}{% for m in messages %}"
    "{% call(y) box(m.role) %}{{ y }}: {{ m.content }}{% endcall %}{% endfor %}",
    "set block": "{% for m in messages %}{% set text %}<{{ m.content }}>{% endset %}"
    "{{ text|upper }}{% endfor %}",
    "filter block": "{% filter upper|trim %} {% for m in messages %}{{ m.content }}{% endfor %} "
    "{% endfilter %}",
    "block": "{% block b %}{{ messages[0].role }}{% endblock %}{{ self.b() }}",
    "scoped block": "{% for m in messages %}{% block b scoped %}{{ m.role }}{% endblock %}"
    "{% endfor %}",
    "with": "{% with a = messages[0].role, b = 2 %}{{ a }}{{ b }}{% endwith %}",
    "raw": "{% raw %}{{ x }}{% endraw %}{# a comment #}",
    "blanks": "  {% if true %}\n  a\n  {%- endif +%}\n {% if true -%}  b {% endif %}\n\n",
    "autoescape": "{% autoescape true %}{% for m in messages %}{{ m.content }}{{ m.content ~ '<' }}"
    "{% endfor %}{{ '<'|safe + '<' }}{% endautoescape %}",
    "unpacking": "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}"
    "{% set a, b = (1, 2) %}{{ a }}{{ b }}",
    "line statements": "{{ [\n1,\n2\n] }}\r\n{{ 'a\\tb' }}\n",
    "cycler": "{% set c = cycler('a', 'b') %}{% set j = joiner(', ') %}{% for m in messages %}"
    "{{ j() }}{{ c.next() }}{% endfor %}",
    "markup": "{{ ('<%s>'|e) % '&' }}{{ ('<{}>'|e).format('&') }}{{ ('<'|e).join(['a', '&']) }}",
}

TEMPLATES = (
    {
        "chatml": CHATML,
        "llama 3": LLAMA3,
        "mistral": MISTRAL,
        "thinking": THINKING,
        "generation": GENERATION,
        "types": TYPES,
    }
    | BLOCKS
    | {expression: EACH.replace("X", expression) for expression in EXPRESSIONS}
)
