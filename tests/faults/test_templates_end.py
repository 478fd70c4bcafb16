"""Promise: malicious chat templates (nested loops, doubling text and lists, wide formats, recursion) are stopped.

Rendering stops within one CPU second and 100 MB, and the message names the limit. Templates that cannot be compiled
are refused in one line. The limits apply in every thread.
"""

import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from model.jinja_template import JinjaTemplate
from tests.helpers import run_process
from tests.model.test_jinja_template import CHAT

GROW = "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = "
ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops that skip": "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "loops over lists": "{% set l = range(99999) | list %}{% for a in l %}{% for b in l %}{% for c in l %}x"
    "{% endfor %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "recursive loops": "{% for a in range(99999) recursive %}{{ loop(range(99999)) if loop.depth < 5 }}{% endfor %}",
    "joined": GROW + "ns.x ~ ns.x %}{% endfor %}",
    "added": GROW + "ns.x + ns.x %}{% endfor %}",
    "lists": GROW.replace("'ab'", "[1]") + "ns.x + ns.x %}{% endfor %}",
    "times": "{{ 'x' * 999999999 }}",
    "lists times": "{{ ([0] * 9999999) * 9999999 }}",
    "powers": "{{ 9 ** 999999999 }}",
    "squares": GROW.replace("'ab'", "9") + "ns.x * ns.x %}{% endfor %}",
    "centred": "{{ 'x' | center(999999999) }}",
    "padded": "{{ 'x'.ljust(999999999) }}",
    "replaced": GROW + "ns.x.replace('a', 'aab').replace('b', 'baa') %}{% endfor %}",
    "filtered": GROW + "ns.x | replace('a', 'aab') | replace('b', 'baa') %}{% endfor %}",
    "percent": "{{ '%999999999d' % 1 }}",
    "percent star": "{{ '%*d' % (999999999, 1) }}",
    "format filter": "{{ '%999999999d' | format(1) }}",
    "format": "{{ '{:>999999999}'.format(1) }}",
    "format item": "{{ '{:>999999999}'['format'](1) }}",
    "format argument": "{{ '{:>{w}}'.format(1, w=999999999) }}",
    "printed": "{% set x = 'x' * 999999 %}{% for a in range(99999) %}{{ x }}{% endfor %}",
    "json": "{{ messages | tojson(indent=99999999) }}",
    "lipsum": "{{ lipsum(999999) }}",
    "bytes times": "{{ 'x'.encode() * 999999999 }}",
    "bytes centred": "{{ 'x'.encode().center(999999999) }}",
    "percent names": "{% set x = 'x' * 999999 %}{{ ('%(a)s' * 99999) % dict(a=x) }}",
    "format again": "{% set x = 'x' * 999999 %}{{ ('{0}' * 99999).format(x) }}",
    "format names": "{% set x = 'x' * 999999 %}{{ ('{a}' * 99999).format_map(dict(a=x)) }}",
    "translate": "{% set x = 'x' * 999999 %}{{ ('a' * 99999).translate({97: x}) }}",
    "tower printed": GROW.replace("'ab'", "[1]") + "[ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "tower json": GROW.replace("'ab'", "[1]") + "[ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}",
    "tower compared": "{% set a = namespace(x=[1]) %}{% set b = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set a.x = [a.x, a.x] %}{% set b.x = [b.x, b.x] %}{% endfor %}{{ a.x == b.x }}",
    "tower hashed": "{% set a = namespace(x=(1,)) %}{% for i in range(60) %}{% set a.x = (a.x, a.x) %}"
    "{% endfor %}{{ {a.x: 1} }}",
    "tower batch": "{% set a = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set a.x = (a.x + a.x) | batch(99999) | list %}{% endfor %}{{ a.x }}",
    "tower namespaces": "{% set a = namespace(x=namespace(x=1)) %}{% for i in range(60) %}"
    "{% set a.x = namespace(x=a.x, y=a.x) %}{% endfor %}{{ a.x }}",
    "tower dict": "{% set a = namespace(x=dict(x=1)) %}{% for i in range(60) %}"
    "{% set a.x = dict(x=a.x, y=a.x) %}{% endfor %}{{ a.x }}",
    "itself": "{% set a = namespace() %}{% set a.x = a %}{{ a }}",
    "many joined": "{% set x = 'x' * 7999999 %}{{ " + " ~ ".join(["x"] * 2000) + " }}",
    "many printed": "{% set x = 'x' * 7999999 %}" + "{{ x }}" * 2000,
    "own text": "{% for a in range(99999) %}" + "y" * 40000 + "{% endfor %}",
    "constants": "{{ 'x' | center(7999999) }}" * 300,
    "constants kept": "{% set l = [" + ",".join(["'😀' * 1999000"] * 300) + "] %}",
    "slice": "{{ ['a'] | map('upper') | slice(999999999) | list }}",
    "slice 2": "{{ ['a'] | map('upper') | slice(1000000) | list }}",
    "batch": "{{ ['a'] | map('upper') | batch(999999999, 'x') | list }}",
    "batch 2": "{{ ['a'] | map('upper') | batch(1000000, 'x') | list }}",
    "round": "{{ 2 | round(999999999, 'ceil') }}",
    "round 2": "{{ 2 | round(precision=999999, method='ceil') }}",
    "hex": "{% set x = ('f' * 7999999) | int(0, 16) %}{{ x // (x // 3) }}",
    "from_bytes": "{% set x = (0).from_bytes(('f' * 7999999).encode(), 'big') %}{{ x % (x // 3) }}",
    "to_bytes": "{{ (1).to_bytes(999999999, 'big') }}",
    "indent": "{{ ('\n' * 99999) | indent(99999) }}",
    "sums": "{% set r = range(99999) | list %}{% for a in range(99999) %}{{ r | sum }}{% endfor %}",
    "range sums": "{% for a in range(99999) %}{{ range(99999) | sum }}{% endfor %}",
    "sorts": "{% set r = range(99999) | list %}{% for a in range(99999) %}{{ r | sort | first }}{% endfor %}",
    "compares": "{% set x = 'x' * 7999999 %}{% set y = 'x' * 7999999 %}{% for a in range(99999) %}"
    "{% if x == y %}{% endif %}{% endfor %}",
    "contains": "{% set x = 'x' * 7999999 %}{% for a in range(99999) %}{% if 'xxxxxxxxxxy' in x %}"
    "{% endif %}{% endfor %}",
    "contains list": "{% set x = range(99999) | list %}{% for a in range(99999) %}{% if -1 in x %}"
    "{% endif %}{% endfor %}",
    "test eq": "{% set x = range(99999) | list %}{% set y = range(99999) | list %}"
    "{% for a in range(99999) %}{% if x is eq y %}{% endif %}{% endfor %}",
    "slices": "{% set x = range(99999) | list %}{% for a in range(99999) %}{% set y = x[1:] %}{% endfor %}",
    "slices kept": "{% set x = 'x' * 7999999 %}{% set n = namespace(l=[]) %}{% for a in range(1999) %}"
    "{% set n.l = n.l + [x[1:]] %}{% endfor %}",
    "slices text": "{% set x = 'x' * 7999999 %}{% for a in range(99999) %}{% set y = x[1:] %}{% endfor %}",
    "caller": "{% macro f(n) %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call f(1) %}" * 18
    + "x"
    + "{% endcall %}" * 18,
    "join nested": "{% set x = [('x' * 99999)] * 9 %}{{ range(99999) | join(x) }}",
    "escape": "{% autoescape true %}{{ '\"' * 7999999 }}{% endautoescape %}",
    "escape join": "{% autoescape true %}{{ ('\"' * 1999999) ~ 'x' }}{% endautoescape %}" * 50,
    "filter block": "{% filter replace('a', 'a' * 9999) %}{% for a in range(9999) %}a{% endfor %}{% endfilter %}",
    "json nested": GROW.replace("'ab'", "[1]").replace("99", "900")
    + "[ns.x] %}{% endfor %}{{ ns.x | tojson(indent=9999) }}",
    "zfill": "{{ '1'.zfill(999999999) }}",
    "expandtabs": "{{ ('\t' * 9999).expandtabs(99999) }}",
    "splits": "{% set x = 'x ' * 1999999 %}{% for a in range(9999) %}{% set y = x.split(' ') %}{% endfor %}",
    "list of text": "{% set x = ('x' * 3999999) | list %}{{ x | length }}",
    "list text for": "{% for c in 'x' * 7999999 %}{% endfor %}",
    "title": "{{ ('a ' * 999999) | title }}" * 50,
    "groupby": "{% for i in range(999) %}{% set x = range(9999) | map('string') | groupby('0') | list %}{% endfor %}",
    "loop length": "{% for i in range(99999) %}{% for j in range(99999) | map('string') %}"
    "{{ loop.length }}{% break %}{% endfor %}{% endfor %}",
    "cycler": "{% set c = cycler('a', 'b') %}{% for i in range(99999) %}{% for i in range(99999) %}"
    "{{ c.next() }}{% endfor %}{% endfor %}",
    "slices in a row": "{% set x = 'x' * 7999999 %}" + "".join(f"{{% set y{i} = x[{i + 1}:] %}}" for i in range(1500)),
}
# Templates that are refused at compile time.
UNREADABLE = {
    "too long": "{{ x }}" * 9999,
    "loops inside each other": "{% for a in range(2) %}" * 30 + "x" + "{% endfor %}" * 30,
    "parentheses": "{{ " + "(" * 500 + "1" + ")" * 500 + " }}",
    "literals inside each other": "{{ " + "[" * 3000 + "1" + "]" * 3000 + " }}",
    "conditions": "{% if 1 %}" * 500 + "x" + "{% endif %}" * 500,
    "a filter of more than linear time": "{{ ('<!---->' * 999999) | striptags }}",
    "a filter of that kind again": "{{ ('www.a ' * 999999) | urlize }}",
    "no jinja": "{% for %}",
}


@pytest.fixture(scope="module")
def render_results():
    """name -> (CPU seconds, text or error), rendered in a process limited to 100 MB of additional memory."""
    code = (
        "import json, re, resource, sys, time\n"
        "import model.template_sandbox\n"
        "from model.jinja_template import JinjaTemplate\n"
        "chat, templates = json.load(sys.stdin)\n"
        "limit = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize() + 100_000_000\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "ends = {}\n"
        "for name, template in templates.items():\n"
        "    start = time.process_time()\n"
        "    try: said = JinjaTemplate(template, {}, re.compile('</s>')).text(chat)\n"
        "    except Exception as error: said = f'{type(error).__name__}: {error}'\n"
        "    ends[name] = (time.process_time() - start, said[:200])\n"
        "print(json.dumps(ends))\n"
    )
    done = run_process(sys.executable, "-c", code, input=json.dumps([CHAT, ENDLESS | UNREADABLE]))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ENDLESS)
def test_rendering_is_bounded(render_results, name):
    seconds, message = render_results[name]
    expected_reason = "fails: 'lipsum' is undefined" if name == "lipsum" else "takes "
    assert message.startswith(f"UnsupportedChatError: the model's chat template {expected_reason}")
    assert seconds < 1.5  # the limit of 0.8, and the operation that runs when it is reached


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_invalid_template_is_one_line(render_results, name):
    seconds, message = render_results[name]
    assert message.startswith("UserError: the model's chat template ") and "\n" not in message and seconds < 1


def test_rendering_is_bounded_in_every_thread():
    """The server renders templates in a thread pool."""
    endless = JinjaTemplate(ENDLESS["loops"], {}, re.compile("</s>"))
    with ThreadPoolExecutor(8) as pool:
        message = [str(each.exception()) for each in [pool.submit(endless.text, CHAT) for _ in range(8)]]
    assert all("takes more than 200,000 steps" in one for one in message)


def test_no_template_takes_a_second_or_100_mb(render_results, record_attacks):
    refused = sum(": the model's chat template " in message for _, message in render_results.values())
    record_attacks("unbounded chat templates", len(render_results), refused=refused)
    assert refused == len(render_results)
