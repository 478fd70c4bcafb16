"""The data files of the demo world: what a row means; a malformed line raises an error that names file and line."""

import shutil

import pytest

from common.errors import UserError
from corpus.language import LANGUAGES
from demo_world.facts import DATA, facts_of, read_sections
from demo_world.grammar import alternatives, read_phrases, read_questions, read_templates


def slots(facts, relation):
    return [{name: str(word) for name, word in fact.slots.items()} for fact in facts if fact.relation == relation]


def test_rows_become_facts_of_each_language(tmp_path):
    path = tmp_path / "facts.txt"
    path.write_text(
        "# comment\n[animals] animal, class, count, u, sound zh\nmouse>mice/老鼠, mammal/哺乳动物, 4, legs/条腿, 吱吱\n"
        "shark/鲨鱼, fish/鱼类, -, -, -\n\n[opposites zh] word, opposite\n大, 小\n[measures zh] noun, measure, ...\n"
        "船, 艘, 条, 只\n",
        encoding="utf-8",
    )
    english, chinese = facts_of("en", path), facts_of("zh", path)
    assert slots(english, "class") == [{"s": "mouse", "o": "mammal"}, {"s": "shark", "o": "fish"}]
    assert f"{english[0].slots['s']:pl}" == "mice"
    assert slots(english, "count") == [{"s": "mouse", "o": "4", "u": "legs"}]
    assert slots(chinese, "count") == [{"s": "老鼠", "o": "4", "u": "条腿"}]
    assert not slots(english, "sound") and slots(chinese, "sound") == [{"s": "老鼠", "o": "吱吱"}]
    assert slots(chinese, "opposite") == [{"s": "大", "o": "小"}, {"s": "小", "o": "大"}]
    assert not slots(english, "opposite") and not slots(english, "measure")
    (boat,) = [fact for fact in chinese if fact.relation == "measure"]
    assert boat.slots["o"] == "艘" and boat.keys == ("一艘", "一条", "一只")


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("France, Paris\n", 1, "before the first [section]"),
        ("[countries] country, capital\nFrance, Paris, Europe\n", 2, "3 cells"),
        ("[countries] country, capital\n\n# note\nFrance\n", 4, "1 cells"),
        ("[countries] country, capital\nFrance/法国/x, Paris\n", 2, "'France/法国/x'"),
        ("[countries] country, capital\nFrance/, Paris\n", 2, "'France/'"),
        ("[opposites en] word, opposite\nbig, \n", 2, "''"),
        ("[countries]\nFrance, Paris\n", 1, "subject, relation"),
        ("[countries fr] country, capital\n", 1, "not a section"),
        ("[countries\n", 1, "not a section"),
        ("[a] b, c\n[a] b, c\n", 2, "a second section [a]"),
    ],
)
def test_a_malformed_line_of_facts_is_named(tmp_path, text, line, words):
    path = tmp_path / "facts.txt"
    path.write_text(text, encoding="utf-8")
    for lang in LANGUAGES:
        with pytest.raises(UserError) as raised:
            facts_of(lang, path)
        assert str(raised.value).startswith(f"{path}:{line}: ") and words in str(raised.value)


def test_a_byte_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "facts.txt"
    path.write_bytes(b"[a] b, c\nx, y\nx\xff, y\n")
    with pytest.raises(UserError, match=r"facts\.txt:3: not UTF-8"):
        facts_of("en", path)


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("templates", "[capital] capital cities", "[capital]", "topic"),
        ("templates", "[capital] capital cities", "[capitol] capital cities", "no fact has the relation [capitol]"),
        ("templates", "cue: the capital of {s}", "clue: the capital of {s}", "'clue' is not a label"),
        ("templates", "cue: the capital of {s}", "the capital of {s}", "is not a label"),
        ("templates", "cue: the capital of {s}", "cue: the capital of {u}", "wrong slot or brace"),
        ("templates", "cue: the capital of {s}", "cue: the capital of {s:Q}", "wrong slot or brace"),
        ("templates", "cue: the capital of {s}", "cue: the capital of {s", "wrong slot or brace"),
        ("templates", "cue: the capital of {s}", "cue: the capital of {s} |", "an empty text"),
        ("templates", "cue: the capital of {s}", "cue: the (capital/ of {s}", "a parenthesis without its other half"),
        ("templates", "cue: the capital of {s}", "cue: (the/a/) | ()", "an empty text"),
        ("phrases", "[names]", "[nmaes]", "unknown section [nmaes]"),
        ("phrases", "One more thing: {t}", "One more thing: {q}", "wrong slot or brace"),
        ("small_talk", "answer: Goodbye!", "answers: Goodbye!", "'answers' is not a label"),
        ("identity", "keys: Venus", "# keys: Venus", "has no line 'keys: ...'"),
    ],
)
def test_a_malformed_line_of_sentences_is_named(tmp_path, file, old, new, words):
    shutil.copytree(DATA, tmp_path, dirs_exist_ok=True)
    path = tmp_path / f"{file}_en.txt"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    line = text[: text.index(old)].count("\n") + 1
    with pytest.raises(UserError) as raised:
        read_all("en", tmp_path)
    where, _, message = str(raised.value).removeprefix(f"{path}:").partition(": ")
    assert words in message
    # A missing label is reported at the section that needs it, one line above.
    assert int(where) == (line - 1 if file == "identity" else line)


@pytest.mark.parametrize(("file", "section"), [("templates", "capital"), ("phrases", "names"), ("small_talk", "hello")])
def test_a_missing_section_is_named(tmp_path, file, section):
    shutil.copytree(DATA, tmp_path, dirs_exist_ok=True)
    path = tmp_path / f"{file}_en.txt"
    before, _, rest = path.read_text(encoding="utf-8").partition(f"[{section}]")
    path.write_text(before + rest[rest.index("\n[") + 1 :] if "\n[" in rest else before, encoding="utf-8")
    with pytest.raises(UserError, match=rf"{file}_en\.txt: no section \[{section}\]"):
        read_all("en", tmp_path)


def read_all(lang, folder):
    facts = facts_of(lang, folder / "facts.txt")
    return (
        read_templates(lang, facts, folder),
        read_phrases(lang, folder),
        read_questions("small_talk", lang, folder),
        read_questions("identity", lang, folder),
        read_questions("arithmetic", lang, folder),
    )


def test_parentheses_stand_for_all_combinations():
    assert alternatives("(I/You) have {a}(/ and {b}).") == [
        "I have {a}.", "I have {a} and {b}.", "You have {a}.", "You have {a} and {b}.",
    ]  # fmt: skip
    assert alternatives("(a)b") == ["ab"] and alternatives("plain/text") == ["plain/text"]


@pytest.mark.parametrize("lang", LANGUAGES)
def test_line_endings_and_a_byte_order_mark_change_nothing(tmp_path, lang):
    for path in DATA.glob("*.txt"):
        (tmp_path / path.name).write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_all(lang, tmp_path) == read_all(lang, DATA)
    assert facts_of(lang, tmp_path / "facts.txt") == facts_of(lang)


def test_every_data_file_is_read_and_explains_its_format():
    read = {"facts.txt"} | {
        f"{name}_{lang}.txt"
        for name in ("templates", "phrases", "small_talk", "identity", "arithmetic")
        for lang in LANGUAGES
    }
    assert {path.name for path in DATA.iterdir()} == read
    for path in DATA.iterdir():
        assert read_sections(path) and path.read_text(encoding="utf-8").startswith("# ")


def test_both_languages_have_the_same_sections():
    kinds = ("small_talk", "identity", "arithmetic")
    chinese, english = ([read_phrases(lang), *(read_questions(kind, lang) for kind in kinds)] for lang in ("zh", "en"))
    assert set(chinese[0]) - {"words"} == set(english[0])
    assert [list(part) for part in chinese[1:]] == [list(part) for part in english[1:]]
