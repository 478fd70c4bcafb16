"""Jinja templates of imported models: training samples, and chats that a template does not support.

Promises: every answer is trained once, in the context of its generation and with the ids of transformers; an
unsupported chat is dropped and counted and does not end the run; a template that supports no chat or does not terminate
is an error.
"""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import UserError
from corpus.data_config import DpoDataConfig, SftDataConfig
from corpus.prepare_chats import prepare_chats
from corpus.shard_reader import open_split
from corpus.stats import DataStats
from data_process import main
from model.tokenizer import ChatTokenizer, load_tokenizer
from tests.export.test_hf_import import make_tokenizer
from tests.model.test_chat_template import format_tokens, messages_of

TURN = "'<|' + m.role + '|>' + m.content + '</s>'"
ASK = "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
# The behaviour of Qwen3's template: only the last answer has reasoning (possibly empty), that of earlier answers is
# removed, and enable_thinking=false adds an empty one to the generation prompt.
THINKS = (
    "{%- set ns = namespace(last=-1) %}"
    "{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}"
    "{%- set parts = m.content.split('</think>') %}"
    "{%- set thoughts = m.reasoning_content if m.reasoning_content is string else '' %}"
    "{%- if parts | length > 1 %}{% set thoughts = parts[0].split('<think>')[-1].strip('\\n') %}{% endif %}"
    "{{- '<|assistant|>' }}"
    "{%- if loop.index0 > ns.last and (loop.last or thoughts) %}{{- '<think>\\n' + thoughts + '\\n</think>\\n\\n' }}"
    "{%- endif %}{{- parts[-1].lstrip('\\n') + '</s>' }}"
    "{%- else %}{{- " + TURN + " }}{% endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{%- endif %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
    "{% for m in messages %}{{ " + TURN + " }}{% endfor %}" + ASK
)
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
CHAT = messages_of(
    [("system", "S"), ("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b"), ("user", "s"),
     ("assistant", "c")]
)  # fmt: skip
EMPTY = "<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def open_with_template(tmp_path_factory):
    """A function: template -> (ChatTokenizer, transformers' tokenizer)."""
    files, theirs = {}, {}

    def open_with_template(template):
        if not files:
            folder = tmp_path_factory.mktemp("tok")
            theirs["tokenizer"] = make_tokenizer(folder)
            files.update(load_tokenizer(folder).files)
        theirs["tokenizer"].chat_template = template
        return ChatTokenizer({**files, "chat_template.jinja": template}), theirs["tokenizer"]

    return open_with_template


# ---- training samples ------------------------------------------------------------------------------------------------
def test_each_answer_is_trained_as_it_is_generated(open_with_template):
    tokenizer, _ = open_with_template(THINKS)
    ((first, second, last),) = (rendered.samples for rendered in tokenizer.render_each([CHAT]))
    start = "<|system|>S</s><|user|>q</s>"
    assert format_tokens(tokenizer, *first[:2]) == f"{start}<|assistant|>[[{EMPTY}a</s>]]"
    start += "<|assistant|>a</s><|user|>r</s>"
    assert format_tokens(tokenizer, *second[:2]) == f"{start}<|assistant|>[[{EMPTY}b</s>]]"
    start += "<|assistant|>b</s><|user|>s</s>"
    assert format_tokens(tokenizer, *last[:2]) == f"{start}<|assistant|>[[{EMPTY}c</s>]]"
    assert [sample.answers for sample in (first, second, last)] == [[2], [4], [6]]
    assert tokenizer.render(CHAT) == (last.ids, last.mask)


_PIECES = ["a", "好", "\n", " ", "<think>", "</think>", "</s>", "<|user|>"]
_CONTENT = st.lists(st.sampled_from(_PIECES), max_size=5).map("".join)
_TEMPLATE = st.sampled_from([THINKS, NO_SYSTEM])


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(contents=st.lists(_CONTENT, min_size=2, max_size=8), template=_TEMPLATE)
def test_samples_are_what_transformers_writes(open_with_template, contents, template):
    """Every answer is trained once; each sample is the chat up to its answer and begins with the answer's prompt."""
    tokenizer, theirs = open_with_template(template)
    chat = messages_of(list(zip(("user", "assistant") * 4, contents, strict=False)))
    chat = chat[: len(chat) // 2 * 2]
    typed = any(marker in message["content"] for message in chat for marker in ("</s>", "<|user|>"))
    (rendered,) = tokenizer.render_each([chat])
    assert [i for sample in rendered.samples for i in sample.answers] == list(range(1, len(chat), 2))
    assert (len(rendered.samples) == 1) == (template == NO_SYSTEM or len(chat) == 2)
    for sample in rendered.samples:
        end = sample.answers[-1]
        text = theirs.apply_chat_template(chat[: end + 1], tokenize=False)
        assert tokenizer.decode(sample.ids) == text
        if not typed:
            assert sample.ids == list(theirs(text, add_special_tokens=False)["input_ids"])
        asked, _ = tokenizer.render(chat[:end], add_generation_prompt=True)
        assert sample.ids[: len(asked)] == asked and sum(sample.mask[len(asked) :]) == len(sample.ids) - len(asked)


def test_answers_share_a_sample_if_the_template_renders_them_alike(open_with_template):
    """Here one message changes the beginning of the rendered chat."""
    tokenizer, _ = open_with_template(
        "{% set late = messages | map(attribute='content') | select('equalto', 'z') | list %}"
        "{% if late %}<z>{% endif %}{% for m in messages %}{{ " + TURN + " }}{% endfor %}" + ASK
    )
    chat = [*CHAT, *messages_of([("user", "z"), ("assistant", "d"), ("user", "t"), ("assistant", "e")])]
    (rendered,) = tokenizer.render_each([chat])
    assert [sample.answers for sample in rendered.samples] == [[2, 4, 6], [8, 10]]


def rows_file(path, chats):
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    return path


def chats_of(number, **first):
    return [[{"role": "user", "content": f"{i}?", **first}, *CHAT[2:]] for i in range(number)]


def prepare(tmp_path, tokenizer, chats, max_seq_len=512, config_type=SftDataConfig):
    report = DataStats()
    path = rows_file(tmp_path / "rows.jsonl", chats) if config_type is SftDataConfig else chats
    config = config_type((path,), out_dir=tmp_path / "out", val_fraction=0.0, max_seq_len=max_seq_len)
    meta = prepare_chats(config, tokenizer, report)
    folder = tmp_path / "out" / f"tokens-{tokenizer.rendering_fingerprint}"
    split = open_split(folder, "train")
    rows = [split.read_document(i) for i in range(len(split.lengths()))]
    return report, meta, rows


def test_prepared_data_has_every_sample(open_with_template, tmp_path):
    tokenizer, _ = open_with_template(THINKS)
    report, meta, rows = prepare(tmp_path, tokenizer, chats_of(5))
    assert (report.read, report.kept, report.dropped_rows) == (5, 5, 0)
    assert meta["splits"]["train"]["documents"] == 15 == len(rows)
    assert report.trained_tokens == sum(int(mask.sum()) for _, mask in rows)
    assert {tokenizer.decode(ids[mask == 1].tolist()) for ids, mask in rows} == {f"{EMPTY}{x}</s>" for x in "abc"}


@pytest.mark.parametrize("template", [THINKS, NO_SYSTEM])
def test_too_long_samples_are_cut_at_whole_turns(open_with_template, tmp_path, template):
    """At any length the samples are those of the longest prefix of turns that fits."""
    tokenizer, _ = open_with_template(template)
    (chat,) = chats_of(1)
    whole = [tokenizer.render_each([chat[:end]])[0].samples for end in (2, 4, 6)]
    for length in range(1, 80):
        fitting = [samples for samples in whole if len(samples[-1].ids) <= length]
        if not fitting:
            with pytest.raises(UserError, match=f"no chat is left to train on: .*longer than {length} tokens"):
                prepare(tmp_path, tokenizer, [chat], length)
            continue
        report, _, rows = prepare(tmp_path, tokenizer, [chat], length)
        assert [(ids.tolist(), mask.tolist()) for ids, mask in rows] == [(s.ids, s.mask) for s in fitting[-1]]
        assert len(report.changed) == (len(fitting) < 3) and report.kept == 1
    assert len(fitting) == 3


def test_a_chat_too_long_for_its_template_keeps_its_first_turns(open_with_template, tmp_path):
    tokenizer, _ = open_with_template(THINKS)
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}] * 1000
    assert tokenizer.render_each([turns])[0].is_too_long
    for length, reason in ((4000, "what the model's chat template can write"), (300, "300 tokens")):
        report, _, rows = prepare(tmp_path, tokenizer, [turns], length)
        assert report.kept == 1 and list(report.changed) == [f"cut at a whole turn to {reason}"]
        assert len(rows) > 5 and max(len(ids) for ids, _ in rows) <= length


def test_pairs_train_the_last_answer(open_with_template, tmp_path):
    tokenizer, _ = open_with_template(THINKS)
    rows = [{"prompt": CHAT[:-1], "chosen": "good", "rejected": "bad"}]
    (tmp_path / "p.jsonl").write_text(json.dumps(rows[0]) + "\n", encoding="utf-8")
    _, _, rows = prepare(tmp_path, tokenizer, tmp_path / "p.jsonl", config_type=DpoDataConfig)
    asked, _ = tokenizer.render(CHAT[:-1], add_generation_prompt=True)
    for (ids, mask), answer in zip(rows, ("good", "bad"), strict=True):
        assert ids[: len(asked)].tolist() == asked and mask.tolist() == [0] * len(asked) + [1] * (len(ids) - len(asked))
        assert tokenizer.decode(ids[mask == 1].tolist()) == f"{EMPTY}{answer}</s>"


# ---- unsupported chats -----------------------------------------------------------------------------------------------
def test_a_chat_that_the_template_rejects_is_counted(open_with_template, tmp_path):
    tokenizer, _ = open_with_template(NO_SYSTEM)
    report, _, rows = prepare(tmp_path, tokenizer, [*chats_of(8), CHAT, *chats_of(2, note="x"), CHAT[:3]])
    assert len(rows) == report.kept == 8 and report.read == report.kept + report.dropped_rows
    assert report.dropped["the model's chat template refuses it: no system role here"].count == 2
    pair = {"prompt": "1?", "chosen": "a", "rejected": "b"}
    system = {"prompt": CHAT[:2], "chosen": "a", "rejected": "b"}
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (pair, system)), encoding="utf-8")
    report, _, rows = prepare(tmp_path, tokenizer, path, config_type=DpoDataConfig)
    assert len(rows) == 2 and report.kept == 1
    assert report.dropped["the model's chat template refuses it: no system role here"].count == 1


def test_a_dropped_system_message_is_counted(open_with_template, tmp_path):
    tokenizer, _ = open_with_template(
        "{% for m in messages if m.role != 'system' %}{{ " + TURN + " }}{% endfor %}" + ASK
    )
    report, _, rows = prepare(tmp_path, tokenizer, [*chats_of(8), CHAT])
    assert len(rows) == report.kept == 8
    assert report.dropped["the model's chat template leaves out the system message"].count == 1


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('only tools') }}", "3 x the model's chat template refuses it: only tools"),
        ("{{ messages[9].content.more }}", "3 x the model's chat template fails: "),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "ends answers with no control token"),
        ("{% for m in messages %}{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}?{% endif %}",
         "does not write the answer after its"),
        ("{% for %}", "is not valid jinja"),
    ],
)  # fmt: skip
def test_a_template_that_can_render_no_chat_is_an_error(open_with_template, tmp_path, template, said):
    tokenizer, _ = open_with_template(template)
    with pytest.raises(UserError, match=said) as error:
        prepare_chats(tmp_path, tokenizer, chats_of(3))
    assert "\n" not in str(error.value)
    assert str(error.value).endswith("choose another format: --chat_format of data_process.py and 3-full_sft.py")


def test_the_flag_named_in_the_error_exists(open_with_template, tmp_path, capsys):
    tokenizer, _ = open_with_template("{{ raise_exception('never') }}")
    tokenizer.save(tmp_path / "tok")
    rows = rows_file(tmp_path / "a.jsonl", chats_of(30))
    flags = ["sft", str(rows), "--tokenizer", str(tmp_path / "tok"), "--out_dir", str(tmp_path / "out")]
    with pytest.raises(UserError, match="--chat_format of data_process"):
        main(flags)
    main([*flags, "--chat_format", "belle"])
    assert list((tmp_path / "out").glob("tokens-*-belle-2"))
    assert "30" in capsys.readouterr().out


def test_unknown_roles_of_a_named_format_are_counted(open_with_template, tmp_path):
    tokenizer, _ = open_with_template(NO_SYSTEM)
    chats = [*chats_of(3), messages_of([("user", "u"), ("tool", "42"), ("assistant", "a")])]
    belle = tokenizer.with_chat_format("belle")
    rendered = belle.render_each(chats)
    assert [len(chat.samples) for chat in rendered] == [1, 1, 1, 0] and "no role 'tool'" in rendered[3].refusal


def test_an_endless_template_is_an_error(open_with_template, tmp_path):
    tokenizer, _ = open_with_template(ENDLESS + NO_SYSTEM)
    with pytest.raises(UserError, match=r"takes more than 200,000 steps for one chat, the bound.*--chat_format"):
        prepare_chats(tmp_path, tokenizer, chats_of(5))


def test_one_chat_beyond_the_step_limit_is_counted(open_with_template, tmp_path):
    template = "{% if messages[0].content == '1?' %}" + ENDLESS + "{% endif %}" + NO_SYSTEM
    tokenizer, _ = open_with_template(template)
    report, _, _ = prepare(tmp_path, tokenizer, chats_of(5))
    assert report.kept == 4
    assert report.dropped["the model's chat template takes more than 200,000 steps for one chat"].count == 1
