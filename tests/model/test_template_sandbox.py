"""Sandboxed rendering of chat templates equals that of transformers, within the step limit.

Promises: long chats stay far below the limit; rendering time is linear in the number of messages; templates have all
globals, filters and tags of transformers. Templates that do not terminate: ../faults/test_templates_end.py.
"""

import re
import time

import pytest

from model.chat_template import UnsupportedChatError
from model.jinja_template import JinjaTemplate
from model.tokenizer import ChatTokenizer, load_tokenizer
from tests.export.test_hf_import import make_tokenizer
from tests.model.test_chat_template import messages_of
from tests.model.test_jinja_template import CHAT, THINKS


@pytest.fixture(scope="module")
def render_both(tmp_path_factory):
    """A function: template, chat -> (our text, transformers' text)."""
    folder = tmp_path_factory.mktemp("tok")
    theirs = make_tokenizer(folder)
    files = load_tokenizer(folder).files

    def render_both(template, chat):
        theirs.chat_template = template
        ours = ChatTokenizer({**files, "chat_template.jinja": template})
        return ours.chat_format.text(chat), theirs.apply_chat_template(chat, tokenize=False)

    return render_both


# ---- long chats ------------------------------------------------------------------------------------------------------
def test_a_chat_of_many_turns_takes_linear_time(render_both):
    chats = [messages_of([("user", "q" * 100), ("assistant", "太阳" * 50)] * n) for n in (125, 1000)]
    form = JinjaTemplate(THINKS, {}, re.compile("</s>"))
    seconds = []
    for chat in chats:
        start = time.process_time()
        form.text(chat, add_generation_prompt=True)
        seconds.append(time.process_time() - start)
    assert seconds[1] < 1 and seconds[1] < 5 * 8 * seconds[0]
    start = time.process_time()
    with pytest.raises(UnsupportedChatError, match="more than 400,000 steps for the answers of so long a chat"):
        form.samples(chats[1])
    assert time.process_time() - start < 1
    assert len(form.samples(chats[0])) == 125


def test_long_chats_stay_below_the_step_limit(render_both):
    chat = messages_of([("user", "好" * 1000), ("assistant", "太阳" * 1000)] * 200)
    ours, theirs = render_both(THINKS, chat)
    assert ours == theirs and len(ours) > 600_000


# ---- agreement with transformers -------------------------------------------------------------------------------------
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
def test_templates_render_as_in_transformers(render_both, template):
    ours, theirs = render_both(template, CHAT)
    assert ours == theirs
