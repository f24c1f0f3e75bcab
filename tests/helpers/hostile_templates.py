"""Chat templates that fail, or that ask for more time or memory than a machine has."""

NESTED = "{% for a in range(99999) %}{% for b in range(99999) %}"
DOUBLING = "{% set ns = namespace(x=X) %}{% for i in range(99) %}{% set ns.x = Y %}{% endfor %}"


def doubling(start: str, turn: str, then: str = "") -> str:
    return DOUBLING.replace("X", start).replace("Y", turn) + then


HUGE = {  # name -> a template that passes a limit
    "range": "{% for i in range(10**9) %}{{ i }}{% endfor %}",
    "nested loops": NESTED + "{% endfor %}{% endfor %}",
    "nested loops that print": NESTED + "x{% endfor %}{% endfor %}",
    "nested loops of lists": "{% set l = range(99999)|list %}{% for a in l %}{% for b in l %}"
    "{% for c in l %}{% endfor %}{% endfor %}{% endfor %}",
    "loop that filters": "{% for a in range(99999) %}{% for b in range(99999) if b < 0 %}"
    "{% endfor %}{% endfor %}",
    "loop over a text": "{% set s = 'x' * 9999999 %}{% for c in s %}{% for d in s %}"
    "{% endfor %}{% endfor %}",
    "repeated text": "{{ 'x' * 3000000000 }}",
    "repeated by text": "{{ 3000000000 * 'x' }}",
    "repeated list": "{{ ([0] * 10**9)|length }}",
    "repeated tuple": "{{ ((0, 1) * 10**9)|length }}",
    "repeated bytes": "{{ ('x'.encode() * 10**10)|length }}",
    "repeated markup": "{{ ('<'|e) * 10**10 }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "product": doubling("3", "ns.x * ns.x"),
    "sum": doubling("'x'", "ns.x + ns.x"),
    "sum of lists": doubling("[1]", "ns.x + ns.x"),
    "joined": doubling("'x'", "ns.x ~ ns.x"),
    "joined markup": doubling("'x'|e", "ns.x ~ ns.x"),
    "joined lists": doubling("[1]", "[ns.x, ns.x]", "{{ ns.x ~ '' }}"),
    "printed lists": doubling("[1]", "[ns.x, ns.x]", "{{ ns.x }}"),
    "printed tuples": doubling("(1,)", "(ns.x, ns.x)", "{{ ns.x }}"),
    "printed dicts": doubling("{}", "{'a': ns.x, 'b': ns.x}", "{{ ns.x }}"),
    "printed namespace": doubling("{}", "{'a': ns.x, 'b': ns.x}", "{{ ns }}"),
    "printed items": doubling("{}", "{'a': ns.x, 'b': ns.x}", "{{ ns.x.items() }}"),
    "escaped lists": doubling("[1]", "[ns.x, ns.x]", "{{ ns.x|e }}"),
    "text of lists": doubling("[1]", "[ns.x, ns.x]", "{{ ns.x|string|length }}"),
    "lists in JSON": doubling("[1]", "[ns.x, ns.x]", "{{ ns.x|tojson }}"),
    "lists printed nicely": doubling("[1]", "[ns.x, ns.x]", "{{ ns.x|pprint }}"),
    "lists compared": doubling("[1]", "[ns.x, ns.x]")
    + doubling("[1]", "[ns.x, ns.x]").replace("ns", "ms")
    + "{{ ns.x == ms.x }}",
    "lists looked up": doubling("[1]", "[ns.x, ns.x]")
    + doubling("[1]", "[ns.x, ns.x]").replace("ns", "ms")
    + "{{ ns.x in [ms.x] }}{{ [ms.x].index(ns.x) }}",
    "lists tested": doubling("[1]", "[ns.x, ns.x]")
    + doubling("[1]", "[ns.x, ns.x]").replace("ns", "ms")
    + "{{ ns.x is eq(ms.x) }}",
    "tuples as keys": doubling("(1,)", "(ns.x, ns.x)", "{{ {ns.x: 1}|length }}"),
    "tuples looked up": doubling("(1,)", "(ns.x, ns.x)", "{{ {}.get(ns.x) }}{{ {}[ns.x] }}"),
    "tuples nested deep": "{% set ns = namespace(x=(1,)) %}{% for a in range(999) %}"
    "{% set ns.x = (ns.x,) %}{% endfor %}{{ {ns.x: 1} }}",
    "tuples nested deep, looked up": "{% set ns = namespace(x=(1,)) %}{% for a in range(999) %}"
    "{% set ns.x = (ns.x,) %}{% endfor %}{{ {}[ns.x] }}",
    "lists nested deep": "{% set ns = namespace(x=[1]) %}{% for a in range(999) %}"
    "{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
    "generators nested deep": "{% set ns = namespace(x=[1]) %}{% for a in range(999) %}"
    "{% set ns.x = ns.x|map('string') %}{% endfor %}",
    "namespace in itself": "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}",
    "a width of percent": "{{ '%1000000000d' % 1 }}",
    "a precision of percent": "{{ '%.1000000000f' % 1 }}",
    "a width as value": "{{ '%*d' % (1000000000, 1) }}",
    "percent repeats": "{{ ('%(a)s' * 9999) % {'a': 'x' * 99999} }}",
    "a width of format": "{{ '{:>1000000000}'.format(1) }}",
    "a width in format": "{{ '{:>{}}'.format(1, 1000000000) }}",
    "a precision of format": "{{ '{:.1000000000f}'.format(1.5) }}",
    "format repeats": "{{ ('{0}' * 9999).format('x' * 99999) }}",
    "a width of format_map": "{{ '{a:>1000000000}'.format_map({'a': 1}) }}",
    "a width of format by name": "{{ ('{:>1000000000}'|attr('format'))(1) }}",
    "a width of escaped format": "{{ ('{:>1000000000}'|e).format(1) }}",
    "lists formatted": doubling("[1]", "[ns.x, ns.x]", "{{ '{!r}'.format(ns.x) }}"),
    "lists in percent": doubling("[1]", "[ns.x, ns.x]", "{{ '%s' % ([ns.x],) }}"),
    "filter format": "{{ '%1000000000d'|format(1) }}",
    "odd text": "{{ '%1000000000d' is odd }}",
    "divisible text": "{{ '%1000000000d' is divisibleby(3) }}",
    "center": "{{ 'x'|center(10**9) }}",
    "indent": "{{ 'x\ny'|indent(10**9) }}",
    "indent by text": "{{ ('x\n' * 9999)|indent('y' * 99999) }}",
    "method ljust": "{{ 'x'.ljust(10**9) }}",
    "method rjust": "{{ 'x'.rjust(10**9) }}",
    "method center": "{{ 'x'.center(10**9, '-') }}",
    "method zfill": "{{ '1'.zfill(10**9) }}",
    "method expandtabs": "{{ '\t'.expandtabs(10**9) }}",
    "method expandtabs by name": "{{ '\t'.expandtabs(tabsize=10**9) }}",
    "method replace": "{{ ('x' * 99999).replace('', 'y' * 99999) }}",
    "method join": "{{ ('x' * 99999).join(range(99999)|map('string')) }}",
    "method join of a text": "{{ ('x' * 99999).join('y' * 99999) }}",
    "method translate": "{{ ('x' * 99999).translate({120: 'y' * 99999}) }}",
    "method split": "{{ (',' * 9999999).split(',')|length }}",
    "method split at blanks": "{{ ('x ' * 4999999).split()|length }}",
    "method splitlines": "{{ ('\n' * 9999999).splitlines()|length }}",
    "method strip": "{{ ('x' * 9999999).strip('y' * 4999999 ~ 'x') }}",
    "method rfind": "{{ ('x' * 9999999).rfind('y' ~ 'x' * 4999999) }}",
    "method to_bytes": "{{ (1).to_bytes(10**10, 'big')|length }}",
    "method of bytes": "{{ 'x'.encode().ljust(10**10)|length }}",
    "method encode": "{{ ('\u00fc' * 999999).encode('punycode')|length }}",
    "method in a map": "{{ ['x']|map('center', 10**9)|list }}",
    "replace": "{{ ('x' * 99999)|replace('', 'y' * 99999) }}",
    "join": "{{ range(99999)|join('y' * 99999) }}",
    "join of long texts": "{{ (['x' * 99999] * 9999)|join }}",
    "join of attributes": "{{ ([{'a': 'x' * 99999}] * 9999)|join('', attribute='a') }}",
    "wordwrap": "{{ ('x' * 9999999)|wordwrap(1) }}",
    "wordwrap with a long end": "{{ ('x ' * 9999)|wordwrap(1, wrapstring='y' * 99999) }}",
    "batch": "{{ [1]|batch(10**9, 0)|list|length }}",
    "slice": "{{ [1]|slice(10**9)|list|length }}",
    "round": "{{ 5|round(-10**9) }}",
    "round up": "{{ 5|round(10**9, 'ceil') }}",
    "indent of JSON": "{{ [1, 2]|tojson(indent=10**9) }}",
    "separators of JSON": "{{ ([1] * 99999)|tojson(separators=('x' * 99999, ':')) }}",
    "lipsum": "{{ lipsum(10**6) }}",
    "lipsum of long paragraphs": "{{ lipsum(1, min=10**9, max=10**9 + 1) }}",
    "sum of filter": "{{ ([range(999)|list] * 99999)|sum(start=[])|length }}",
    "list of a text": "{{ ('x' * 9999999)|list|length }}",
    "sort": "{% for i in range(99999) %}{% set x = range(99999)|sort %}{% endfor %}",
    "unique": "{% for i in range(99999) %}{% set x = range(99999)|unique|list %}{% endfor %}",
    "sums": "{% for i in range(99999) %}{% set x = range(99999)|sum %}{% endfor %}",
    "select": "{% for i in range(99999) %}{% set x = range(99999)|select('odd')|list %}"
    "{% endfor %}",
    "looking up": "{% set s = 'x' * 9999999 %}{% for i in range(99999) %}{{ 'y' in s }}"
    "{% endfor %}",
    "counting": "{% set s = 'x' * 9999999 %}{% for i in range(99999) %}{{ s.count('y') }}"
    "{% endfor %}",
    "slicing": "{% set s = 'x' * 9999999 %}{% for i in range(99999) %}{% set t = s[1:] %}"
    "{% endfor %}",
    "comparing": "{% set s = 'x' * 9999999 ~ 'y' %}{% set t = 'x' * 9999999 ~ 'z' %}"
    "{% for i in range(99999) %}{{ s == t }}{% endfor %}",
    "keeping": "{% set ns = namespace(l=[]) %}{% for i in range(99999) %}"
    "{% set ns.l = ns.l + ['x' * 999999 ~ i] %}{% endfor %}",
    "set block": "{% set ns = namespace(x='x') %}{% for i in range(99) %}"
    "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
    "filter block": "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x %}"
    "{% filter upper %}{{ ns.x }}{{ ns.x }}{% endfilter %}{% endset %}{% endfor %}",
    "block": "{% set ns = namespace(x='x') %}{% block b scoped %}{{ ns.x }}{{ ns.x }}{% endblock %}"
    "{% for i in range(99) %}{% set ns.x = self.b() ~ ns.x ~ ns.x %}{% endfor %}",
    "output": "{% set s = 'x' * 999999 %}{% for i in range(99) %}{{ s }}{% endfor %}",
    "text": "{% for i in range(99999) %}" + "x" * 9999 + "{% endfor %}",
    "text in a macro": "{% macro m() %}{% for i in range(99999) %}"
    + "x" * 9999
    + "{% endfor %}{% endmacro %}{{ m() }}",
    "text in a block": "{% macro m() %}{{ self.b() }}{% endmacro %}{% block b %}"
    "{% for i in range(99999) %}" + "x" * 9999 + "{% endfor %}{% endblock %}",
    "macro calls": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}"
    "{{ m(99) }}",
    "call blocks": "{% macro m(n) %}{% if n %}{% call m(n - 1) %}{% endcall %}"
    "{% call m(n - 1) %}{% endcall %}{% endif %}{{ caller() if caller else '' }}{% endmacro %}"
    "{{ m(99) }}",
    "recursive loop": "{% for i in [1, 2] recursive %}{% if loop.depth < 99 %}"
    "{{ loop([1, 2]) }}{% endif %}{% endfor %}",
    "blocks that call themselves": "{% block b %}{{ self.b() }}{% endblock %}",
    "macro without end": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "loop without end": "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "statements of a loop": "{% for i in range(99999) %}{% for j in range(99) %}"
    + "{% if i %}a{% endif %}" * 500
    + "{% endfor %}{% endfor %}",
    "many megabytes": "x" * 5_000_000,
    "many expressions": "{{ 1 }}" * 500_000,
}

WRONG = {  # name -> a template that fails, and a part of the message
    "division": ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero (line 1 of the template)"),
    "remainder": ("a\n\n{{ 1 % 0 }}", "(line 3 of the template)"),
    "undefined": ("{{ nothing.at_all }}", "'nothing' is undefined"),
    "undefined key": ("{{ messages[0].a.b }}", "has no attribute 'a'"),
    "undefined item": ("{{ messages[99]['a'] }}", "has no element 99"),
    "undefined in a sum": ("{{ 'x' + nothing }}", "'nothing' is undefined"),
    "types": ("{{ 'x' + 1 }}", "TypeError"),
    "no call": ("{{ 'x'() }}", "TypeError"),
    "index": ("{{ 'x'.index('y') }}", "ValueError: substring not found"),
    "index of a list": ("{{ [1].index(2) }}", "ValueError: 2 is not in list"),
    "key": ("{{ '%(a)s' % {} }}", "KeyError: 'a'"),
    "key of format": ("{{ '{a}'.format() }}", "KeyError: 'a'"),
    "place of format": ("{{ '{}{}'.format(1) }}", "IndexError"),
    "unpacking": ("{% for a, b in [1] %}{% endfor %}", "TypeError"),
    "overflow": ("{{ 10.0 ** 1000 }}", "OverflowError"),
    "range of texts": ("{{ range('x') }}", "TypeError"),
    "escape from the sandbox": ("{{ ''.__class__.__mro__ }}", "is unsafe"),
    "escape by name": ("{{ ''['__class__'].mro() }}", "is unsafe"),
    "escape by filter": ("{{ (''|attr('__class__')).x }}", "is unsafe"),
    "escape by format": ("{{ '{0.__class__.__mro__}'.format('') }}", "is unsafe"),
    "escape by map": ("{{ ['']|map(attribute='__class__.x')|list }}", "is unsafe"),
    "change of a list": ("{{ messages.append(1) }}", "is unsafe"),
    "change of a mapping": ("{{ messages[0].update({}) }}", "is unsafe"),
    "namespace": ("{{ namespace(__class__=1) }}", "underscore"),
    "syntax": ("{% for m in messages %}\n{{ m. }}{% endfor %}", "(line 2 of the template)"),
    "unclosed": ("{% for m in messages %}", "Unexpected end of template"),
    "brackets": ("{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}", "too deeply"),
    "lists in lists": ("{{ " + "[" * 50_000 + "]" * 50_000 + " }}", "too deeply"),
    "a long sum": ("{{ 1" + " + 1" * 50_000 + " }}", "too deeply"),
    "loops in loops": ("{% for a in [1] %}" * 30 + "{% endfor %}" * 30, "SyntaxError"),
    "conditions in conditions": ("{% if 1 %}" * 500 + "{% endif %}" * 500, ""),
    "a long number": ("{{ 1" + "0" * 5000 + " }}", "ValueError"),
    "filter": ("{{ 1|nothing }}", "No filter named 'nothing'"),
    "test": ("{{ 1 is nothing }}", "No test named 'nothing'"),
    "tag": ("{% nothing %}", "unknown tag 'nothing'"),
    "include": ("{% include 'x' %}", "no loader"),
    "import": ("{% import 'x' as x %}", "no loader"),
    "from": ("{% from 'x' import y %}", "no loader"),
    "extends": ("{% extends 'x' %}", "no loader"),
    "raised": ("{{ raise_exception('Only\nuser, please.') }}", "Only user, please."),
    "raised without text": ("{{ raise_exception(none) }}", "None"),
    "raised with a long text": ("{{ raise_exception('x' * 9999) }}", "xxx ..."),
}
