"""The generated files: correct facts, held-out questions, balance, punctuation, and equal bytes for equal seeds."""

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter, defaultdict

import pytest

from corpus.language import LANGUAGES
from demo_world.facts import Term, facts_of
from demo_world.finetune import identity_chats, pairs
from demo_world.generator import WorldConfig, build_world, tool_words
from demo_world.grammar import fill
from demo_world.world import DemoWorld, terms
from evaluation.qa_data import is_correct
from evaluation.tools import find_tools, run_tool
from model.answer_parts import ToolCall
from tests.helpers import ROOT

# SHA-256 of the files of seed 0: a change in data/ changes them, a refactoring must not.
GOLDEN = {
    "chats.jsonl": "540f4f351f31bc33d8d60b64a0605b63810bf5704c75679a74b1d10927b92f6d",
    "facts.jsonl": "81aed799370f7410874758821bc04586eac339e41c4ac31f5238ef2eb896895e",
    "identity.jsonl": "55a4d7c6c764bc72d2a97ac8d2d546e39d1b8a7465bb897e342c342133853f53",
    "identity_questions.jsonl": "271c916003ed13262c90beb1b89a97864e90c0e6fbcfab7868de9e1b40a3401d",
    "pairs.jsonl": "eb2bb135863381bc91672069640356785296890952bdcc842a11755e4abb6c2d",
    "pretrain.jsonl": "0a8a9888bb742ddd9075b2dc0f3443254fce2b7ba7ec46227414822912d16704",
    "questions.jsonl": "77857bd33af02524e2421476d4b288038d42be4269f0bb7b88513e2082045735",
    "words.jsonl": "8a5f5484598b52030ba385535897d4f0effdf1dedbd32c2e23f259df38414719",
}
# The same with statement_rounds=4, chat_rounds=2.
GOLDEN_SMALL = {
    "chats.jsonl": "6617a7737aad818a326f29b28b7d7d99b60367b23e3aef16ae028af1f8483a73",
    "facts.jsonl": "81aed799370f7410874758821bc04586eac339e41c4ac31f5238ef2eb896895e",
    "identity.jsonl": "d5fb2d83f4989c2c3f7693abb5cabe40ecdf9a48ee87a2a4255ab3e692c00892",
    "identity_questions.jsonl": "271c916003ed13262c90beb1b89a97864e90c0e6fbcfab7868de9e1b40a3401d",
    "pairs.jsonl": "eb2bb135863381bc91672069640356785296890952bdcc842a11755e4abb6c2d",
    "pretrain.jsonl": "c3825e51baee2109e47ea337ee53d36341e1d5ee2941cfabb9483ac19786b130",
    "questions.jsonl": "f053f346798a5d49e2d5734ce4ff080f8222be344cf10f7dd1583235d4523ca1",
    "words.jsonl": "2a3f1fd49881cb125fa0e5c1829c4219f43a5c0314d8225a2c68a01e05ee83c8",
}


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    build_world(WorldConfig(str(folder)))
    return folder


@pytest.fixture(scope="module")
def texts(folder):
    return read(folder / "pretrain.jsonl")


@pytest.fixture(scope="module")
def chats(folder):
    return read(folder / "chats.jsonl")


@pytest.fixture(scope="module")
def questions(folder):
    return read(folder / "questions.jsonl")


@pytest.fixture(scope="module")
def worlds():
    return {lang: DemoWorld(lang, 0) for lang in LANGUAGES}


def everything(texts, chats, lang):
    contents = [row["text"] for row in texts if row["lang"] == lang]
    return contents + [message["content"] for row in chats if row["lang"] == lang for message in row["messages"]]


def held_out(world):
    """Every held-out question of every fact: (fact, question, keys)."""
    for fact in world.facts + world.new_sums:
        templates = world.templates[fact.relation]
        for heldout, keys in zip(templates.heldout_templates(), (fact.keys, fact.back_keys), strict=True):
            for template in heldout:
                yield fact, fill(template, fact), keys


def test_same_seed_same_bytes(tmp_path):
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        build_world(WorldConfig(str(tmp_path / name), seed, statement_rounds=4, chat_rounds=2))
    for file in ("words.jsonl", "pretrain.jsonl", "chats.jsonl", "questions.jsonl"):
        first = (tmp_path / "one" / file).read_bytes()
        assert first == (tmp_path / "again" / file).read_bytes()
        assert first != (tmp_path / "other" / file).read_bytes()
        assert b"\r" not in first
    assert hashes(tmp_path / "one") == GOLDEN_SMALL


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.jsonl")}


def test_seed_0_gives_the_golden_files(folder):
    assert hashes(folder) == GOLDEN


def test_every_fact_with_a_subject_can_be_looked_up(folder, worlds):
    tools = find_tools("lookup", str(folder / "facts.jsonl"))
    look_up = lambda **arguments: run_tool(ToolCall("lookup", arguments), tools)
    assert look_up(subject="Japan", relation="capital") == "Tokyo" and look_up(subject="一分钟") == "unit: 60秒"
    assert look_up(subject="DOG", relation="count") == "4 legs"
    for world in worlds.values():
        for fact in world.facts:
            if fact.slots["s"]:
                assert fact.slots["o"] in look_up(subject=fact.slots["s"], relation=fact.relation)


def test_words_file_is_the_text_cut_into_words(folder, texts, chats):
    """words.jsonl adds line breaks only, and cuts a name of the facts the same way everywhere. Then: words of tools."""
    contents = Counter(text.replace("\n", "") for lang in LANGUAGES for text in everything(texts, chats, lang))
    *words, tools = read(folder / "words.jsonl")
    assert tools == {"text": tool_words(), "lang": "en"} and " signatures\n within\n" in tools["text"]
    assert Counter(row["text"].replace("\n", "") for row in words) == contents
    lines = {line for row in words for line in row["text"].split("\n")}
    assert {"法国", "巴黎", "首都", "哺乳动物", "。", " capital", "The"} <= lines
    assert not {line for line in lines if "法国" in line} - {"法国"}


@pytest.mark.parametrize("lang", LANGUAGES)
def test_no_held_out_question_was_ever_trained(lang, worlds, texts, chats):
    trained = everything(texts, chats, lang)
    # Compare sentence by sentence: exact, and faster than a substring search for every question.
    joined = "\n\n".join(trained).casefold()
    bare = {re.sub(r"[\s\W]+", "", piece) for piece in re.split(r"[\n]|(?<=[.!?。！？：:])\s*", joined)}
    for _, question, _ in held_out(worlds[lang]):
        parts = [re.sub(r"[\s\W]+", "", part) for part in re.split(r"(?<=[.!?。！？：:])\s*", question.casefold())]
        assert not {part for part in parts if part} <= bare, question


@pytest.mark.parametrize("lang", LANGUAGES)
def test_no_held_out_template_is_a_training_template(lang, worlds):
    for relation, templates in worlds[lang].templates.items():
        for held in templates.heldout_templates():
            assert not held or len(held) >= 2, relation
        pattern = lambda template: re.sub(r"\W+", "", re.sub(r"\{(\w).*?\}", r"\1", template)).casefold()
        trained = {pattern(t) for t in [*templates.say, *templates.ask, *templates.back_ask, *templates.follow_up]}
        trained |= {pattern(t) for t in templates.cue + templates.back_cue}
        assert not trained & {pattern(t) for t in templates.heldout + templates.back_heldout}, relation
        assert len(templates.say) >= 5 and len(templates.ask + templates.back_ask) >= 5, relation
        assert templates.answer, relation


def test_no_question_of_the_file_is_trained(questions, texts, chats):
    trained = {lang: "\n".join(everything(texts, chats, lang)).casefold() for lang in LANGUAGES}
    for row in questions:
        assert row["question"].casefold() not in trained[row["lang"]], row


def test_every_question_has_a_true_distinctive_key(questions, worlds):
    truth = defaultdict(set)
    for lang, world in worlds.items():
        for _, question, keys in held_out(world):
            truth[lang, question].add(keys)
    for row in questions:
        assert row["keys"] and all(row["keys"])
        assert {tuple(row["keys"])} == truth[row["lang"], row["question"]], f"the facts give no unique answer: {row}"
        assert not is_correct(row["question"], row["keys"]), f"repeating the question would score: {row}"
        assert not is_correct("", row["keys"]) and not is_correct("我不知道。 I do not know.", row["keys"])


def test_training_answers_contain_a_key(chats, worlds):
    """The metric counts the answers of the chats as correct."""
    for world in worlds.values():
        for fact, forward, (_, answer) in world.turns(2):
            keys = fact.keys if forward else fact.back_keys
            assert is_correct(answer, list(keys)), (fact, answer)


def test_every_asked_fact_was_stated(questions, texts, worlds):
    stated_in = {lang: "\n".join(row["text"] for row in texts if row["lang"] == lang) for lang in LANGUAGES}
    for lang, world in worlds.items():
        for fact in world.facts:
            stated = [t for t in world.templates[fact.relation].say if fill(t, fact) in stated_in[lang]]
            enough = 2 if fact.relation == "sum" else 5  # equations state a sum many times in one form
            assert len(stated) >= min(enough, len(world.templates[fact.relation].say)), fact


def test_unasked_facts_are_never_asked(chats, questions, worlds):
    """Neither forward nor backward, in any wrapper; and the evaluation has both kinds of questions."""
    for lang, world in worlds.items():
        wrappers = world.phrases["wrappers"]
        users = {m["content"] for row in chats if row["lang"] == lang for m in row["messages"] if m["role"] == "user"}
        for fact in world.facts:
            templates = world.templates[fact.relation]
            if fact.name in world.unasked:
                asked = (fill(t, fact) for t in templates.ask + templates.back_ask)
                assert not users & {wrapper.format(q=question) for question in asked for wrapper in wrappers}, fact
        kinds = Counter(row["kind"] for row in questions if row["lang"] == lang)
        assert kinds["seen_fact_new_wording"] >= 150 and kinds["unasked_fact_new_wording"] >= 15


def test_balance_and_diversity(texts, chats, questions):
    for rows in (texts, chats, questions):
        count = Counter(row["lang"] for row in rows)
        assert 0.8 < count["zh"] / count["en"] < 1.25
    assert len({row["text"] for row in texts}) > 0.99 * len(texts)
    assert len({row["question"] for row in questions}) == len(questions)
    assert len({json.dumps(row["messages"]) for row in chats}) == len(chats)
    for lang in LANGUAGES:
        facts = facts_of(lang)
        assert len(facts) >= 600 and len({fact.relation for fact in facts}) >= 25
        assert len({fact.name for fact in facts}) == len(facts)
        assert len({row["relation"] for row in questions if row["lang"] == lang}) >= 20


def test_chats_take_turns(chats):
    for row in chats:
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"] * (len(row["messages"]) // 2)
    for lang in LANGUAGES:
        turns = Counter(len(row["messages"]) // 2 for row in chats if row["lang"] == lang)
        assert turns[1] > 1000 and turns[2] > 500 and turns[3] > 50, turns


def test_chinese_is_punctuated_as_chinese(texts, chats):
    for text in everything(texts, chats, "zh"):
        assert not re.search(r"[\u4e00-\u9fff][,.!?;:()]|[,.!?;:()][\u4e00-\u9fff]", text), text
        assert not re.search(r"[，。！？：]{2}|\{|\}|\|", text), text
        assert text.count("“") == text.count("”") and text.count("《") == text.count("》"), text
        assert text[-1] in "。！？”", text


def test_english_is_punctuated_as_english(texts, chats):
    for text in everything(texts, chats, "en"):
        assert not re.search(r"[，。！？：“”、]", text), text
        assert not re.search(r" [.,!;:]|  |\{|\}|\|", text), text
        assert text[0].isupper() or not text[0].isalpha() or text[0] > "\u4e00", text
        assert text[-1] in '.!?"', text


def test_english_articles_and_plurals(texts, chats):
    vowel, other = re.compile(r"\b[Aa] ([aeiou]\w*)"), re.compile(r"\b[Aa]n ([^aeiouAEIOU\s]\w*)")
    for text in everything(texts, chats, "en"):
        assert not vowel.search(text) and not other.search(text), text
        assert not re.search(r"\b1 (days|legs|books)\b|\b(\w*(ch|sh|x))s\b(?<!\b(tenths))", text), text
    forms = {"fox": "foxes", "city": "cities", "day": "days", "mouse>mice": "mice", "butterfly": "butterflies"}
    assert {form: f"{Term(form):pl}" for form in forms} == forms
    assert (
        f"{Term('owl'):A} {Term('owl')} {Term('dog'):a} {Term('owl'):Pl} {Term('snow'):C}"
        == "An owl owl a dog Owls Snow"
    )


def trained_sums(world, texts):
    """Pairs of terms (smaller, larger) that the texts add, by every template of sums."""
    templates = world.templates["sum"]
    found = set()
    for template in {*templates.say, *templates.cue, *templates.ask, *templates.answer}:
        pattern = re.escape(template)
        for slot in "abo":
            pattern = pattern.replace(re.escape(f"{{{slot}}}"), rf"(?<!\d)(?P<{slot}>\d+)(?!\d)")
        for match in re.finditer(pattern, "\n".join(texts)):
            found.add(tuple(sorted((int(match["a"]), int(match["b"])))))
    return found


def test_new_sums_are_asked_and_never_trained(texts, chats, questions, worlds):
    """25 pairs of terms, the same in both languages, are in no text, chat, identity chat or preference pair."""
    new = {lang: {terms(fact) for fact in world.new_sums} for lang, world in worlds.items()}
    assert new["zh"] == new["en"] and len(new["en"]) == 25 and all(b >= 10 for _, b in new["en"])
    assert len({tuple(sorted((a % 10, b % 10))) for a, b in new["en"]}) == 25, "one pair per combination of last digits"
    for lang, world in worlds.items():
        extra = [turn for chat in identity_chats(world) for turn in chat]
        extra += [(row["chosen"][0]["content"], row["chosen"][1]["content"]) for row in pairs(world)]
        extra += [("", row["rejected"][1]["content"]) for row in pairs(world)]
        trained = trained_sums(world, everything(texts, chats, lang) + [text for turn in extra for text in turn])
        assert trained == {(a, b) for b in range(1, 21) for a in range(1, b + 1)} - new[lang]
        asked = [row for row in questions if row["lang"] == lang and row["kind"] == "new_sum"]
        assert {row["keys"][0] for row in asked} == {str(a + b) for a, b in new[lang]}
        assert len(asked) == len(world.new_sums) == 2 * 25 - sum(a == b for a, b in new[lang])


def test_recitals_state_every_fact_and_ask_nothing(worlds, chats):
    for lang, world in worlds.items():
        requests = set(world.phrases["recital_requests"])
        said = [row["messages"][1]["content"] for row in chats if row["messages"][0]["content"] in requests]
        joined = "\n".join(said)
        for fact in world.facts:
            templates = world.templates[fact.relation]
            if fact.relation != "sum":
                assert any(fill(t, fact) in joined for t in templates.answer + templates.back_answer), (lang, fact)
        assert "?" not in joined and "？" not in joined


def test_sums_are_right():
    for lang in LANGUAGES:
        for fact in facts_of(lang):
            if fact.relation in ("sum", "product"):
                a, b = int(fact.slots["a"]), int(fact.slots["b"])
                assert fact.keys == (str(a + b if fact.relation == "sum" else a * b),)


def test_tables_agree_between_the_languages():
    """One row, two languages: the tables have the same number of facts in the relations that both have."""
    counts = [Counter(fact.relation for fact in facts_of(lang)) for lang in LANGUAGES]
    for relation in (
        "capital",
        "continent",
        "language",
        "currency",
        "symbol",
        "class",
        "color",
        "job",
        "book",
        "translation",
    ):
        assert counts[0][relation] == counts[1][relation] > 5, relation


def test_demo_help_answers():
    done = subprocess.run([sys.executable, "demo.py", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0 and "1-pretrain.py" in done.stdout


def test_demo_names_a_wrong_folder_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    command = [sys.executable, str(ROOT / "demo.py"), "--out_dir", str(tmp_path / "file")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
