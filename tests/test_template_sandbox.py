"""Rendering of foreign chat templates: within a bound, and otherwise as transformers renders them.

Promises: a template that loops, recurses or grows is stopped within seconds and within half a gigabyte, whichever way
it takes; long chats are far from the bound; what transformers gives a template is there.
"""

import json
import sys

import pytest

from model.chat import ChatTokenizer, load_tokenizer
from tests.conftest import run_process
from tests.test_chat_formats import messages_of
from tests.test_chat_templates import CHAT, THINKS
from tests.test_stock_folder import make_tokenizer


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A function: template, chat -> what we render, what transformers renders."""
    folder = tmp_path_factory.mktemp("tok")
    theirs = make_tokenizer(folder)
    files = load_tokenizer(folder).files

    def both(template, chat):
        theirs.chat_template = template
        ours = ChatTokenizer({**files, "chat_template.jinja": template})
        return ours.chat_format.text(chat), theirs.apply_chat_template(chat, tokenize=False)

    return both


# ---- templates without end -------------------------------------------------------------------------------------------
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
}


@pytest.fixture(scope="module")
def ends():
    """name -> (seconds, what is said), in a process that may not grow by more than half a gigabyte."""
    code = (
        "import json, re, resource, sys, time\n"
        "import model.template_sandbox\n"
        "from model.chat_templates import TemplateFormat\n"
        "chat, templates = json.loads(sys.argv[1])\n"
        "limit = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize() + (1 << 29)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "ends = {}\n"
        "for name, template in templates.items():\n"
        "    start = time.process_time()\n"
        "    try: said = TemplateFormat(template, {}, re.compile('</s>')).text(chat)\n"
        "    except Exception as error: said = f'{type(error).__name__}: {error}'\n"
        "    ends[name] = (time.process_time() - start, said[:200])\n"
        "print(json.dumps(ends))\n"
    )
    done = run_process(sys.executable, "-c", code, json.dumps([CHAT, ENDLESS]))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ENDLESS)
def test_rendering_is_bounded(ends, name):
    seconds, said = ends[name]
    what = "fails: 'lipsum' is undefined" if name == "lipsum" else "takes "
    assert said.startswith(f"RefusedChat: the model's chat template {what}") and seconds < 10


def test_long_chats_are_far_from_the_bound(both):
    chat = messages_of([("user", "好" * 1000), ("assistant", "太阳" * 1000)] * 200)
    ours, theirs = both(THINKS, chat)
    assert ours == theirs and len(ours) > 600_000


# ---- what transformers gives a template ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "template",
    [
        "{% if tools %}{{ tools | length }}{% endif %}{% if documents is defined and documents %}d{% endif %}"
        "{{ enable_thinking is defined and enable_thinking }}{{ thinking_budget }}{{ x is defined and x.y }}",
        "{{ bos_token }}{{ strftime_now('%Y') }}{{ eos_token }}{{ pad_token is defined }}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{{ loop.length, loop.revindex, "
        "loop.nextitem, loop.previtem, loop.last }}{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}",
        "{{ messages | tojson }}{{ messages[1:] | tojson(indent=2) }}{{ messages[0] | items | list }}",
        "{% for m in messages[::-1] if m.role == 'user' %}{{ loop.index }}{{ m.content ~ '-' ~ loop.index0 }}"
        "{% else %}none{% endfor %}{{ '%s: %5d' % ('a', 3) }}{{ 'x' * 3 }}{{ '{:>4}'.format(7) }}{{ 2 ** 8 }}",
        "{% macro say(m) %}{{ m.role }}{{ caller() if caller }}{% endmacro %}{{ say(messages[0]) }}"
        "{% call say(messages[1]) %}!{% endcall %}{% filter upper %}abc{% endfilter %}{% set b %}q{% endset %}{{ b }}",
        "{{ [1, 2] + [3] }}{{ (1, 2) + (3,) }}{{ messages | selectattr('role', 'equalto', 'user') | map(attribute="
        "'content') | join(', ') }}{{ messages | groupby('role') | length }}{{ dict(a=1700000000) }}",
        "{% for m in messages recursive %}{{ m.role if m is mapping else m }}{% if m is mapping %}"
        "{{ loop([m.content]) }}{% endif %}{% endfor %}",
    ],
)
def test_templates_render_as_in_transformers(both, template):
    ours, theirs = both(template, CHAT)
    assert ours == theirs
