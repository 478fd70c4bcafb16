"""Promises of docs/course: both languages teach the same chapters, functions and commands; all of them exist."""

import re

import pytest
from markdown_it import MarkdownIt

from common.errors import UserError
from tests.docs.markdown import (
    COURSE,
    LANGUAGES,
    blocks,
    chapters,
    commands,
    defines,
    inline_commands,
    links,
    references,
)
from tests.helpers import ROOT
from tests.scripts.test_flags import parser_of

NAMES = [path.name for path in chapters("en")]
MAX_LINES, MAX_PICTURE_BYTES = 130, 150_000


def read(language, name):
    return (COURSE / language / name).read_text(encoding="utf-8")


def test_there_are_eleven_chapters_in_both_languages():
    assert len(NAMES) == 11 and [name[:2] for name in NAMES] == [f"{number:02}" for number in range(1, 12)]
    assert [path.name for path in chapters("zh")] == NAMES
    linked = links((COURSE / "README.md").read_text(encoding="utf-8"))
    assert linked[:22] == [f"{language}/{name}" for name in NAMES for language in LANGUAGES]
    assert linked[22:] == [f"course_{language}.ipynb" for language in LANGUAGES]


@pytest.mark.parametrize("name", NAMES)
def test_both_languages_name_the_same_functions_and_all_exist(name):
    named = references(read("en", name))
    assert named == references(read("zh", name))
    assert len(named) >= 3
    missing = [f"{file}:{function}" for file, function in named
               if not (ROOT / file).is_file() or not defines(ROOT / file, function)]  # fmt: skip
    assert not missing


def test_a_function_that_does_not_exist_is_found():
    assert defines(ROOT / "model/transformer.py", "Attention.forward")
    assert not defines(ROOT / "model/transformer.py", "Attention.backward")
    assert references("`a/b-c.py:D.e` and `x.py`") == [("a/b-c.py", "D.e")]


@pytest.mark.parametrize("name", NAMES)
def test_both_languages_show_the_same_commands_and_outputs(name):
    english, chinese = read("en", name), read("zh", name)
    assert commands(english) == commands(chinese) != []
    pictures = [link for link in links(english) if link.endswith(".png")]
    assert pictures == [link for link in links(chinese) if link.endswith(".png")] and len(pictures) == 1
    assert outputs(english) == outputs(chinese) != []


def outputs(text):
    """The code blocks after the first command that are not commands."""
    shown = blocks(text)
    first = next(i for i, block in enumerate(shown) if block.startswith("python "))
    return [block for block in shown[first:] if not block.startswith("python ")]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("language", LANGUAGES)
def test_a_chapter_has_a_formula_a_question_and_a_small_picture(language, name):
    text = read(language, name)
    headings = re.findall("^## (.+)$", text, re.MULTILINE)
    expected = {
        "en": ["The idea", "The formula", "In the code", "Try it", "Question"],
        "zh": ["想法", "公式", "对应的代码", "动手试试", "问题"],
    }
    assert headings == expected[language]
    assert text.count("<details>") == text.count("</details>") == text.count("</summary>") == 1
    assert len(text.splitlines()) <= MAX_LINES
    for link in links(text):
        if link.endswith(".png"):
            assert (COURSE / language / link).stat().st_size < MAX_PICTURE_BYTES


def script_and_arguments(command):
    words = command[1:]
    return (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_command_is_accepted_by_the_parser_of_its_script(language):
    parsers = {}
    for path in chapters(language):
        text = path.read_text(encoding="utf-8")
        for command in [*commands(text), *inline_commands(text)]:
            script, arguments = script_and_arguments(command)
            parser = parsers.setdefault(script, parser_of(script))
            parser.parse_args(arguments)  # raises UserError
            recipes = [word[1:] for word in arguments if word.startswith("@")]
            assert all((ROOT / recipe).is_file() for recipe in recipes)
    assert len(parsers) >= 15


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_flag_in_the_prose_belongs_to_a_script_of_its_chapter_or_to_the_first_lesson(language):
    for path in chapters(language):
        text = path.read_text(encoding="utf-8")
        every = [*commands(text), *inline_commands(text)]
        scripts = {script_and_arguments(command)[0] for command in every} | {"1-pretrain.py"}
        known = {flag for script in scripts for flag in all_flags(parser_of(script))}
        named = {flag for code in re.findall("`([^`\n]+)`", text) for flag in re.findall(r"(?<!\S)--[a-z_0-9]+", code)}
        assert named <= known, path.name


def all_flags(parser):
    found = set(parser._option_string_actions)
    for action in parser._actions:
        for sub in getattr(action, "choices", None) or () if action.dest == "command" else ():
            found |= all_flags(action.choices[sub])
    return found


def test_a_wrong_flag_is_refused():
    with pytest.raises(UserError):
        parser_of("docs.course.tokens").parse_args(["--vocabulary", "3"])


def stray_marks(text):
    """Texts in which an asterisk or a backquote is shown, because Markdown does not take it for a mark."""
    tokens = [child for token in MarkdownIt().parse(text) for child in token.children or ()]
    return [token.content for token in tokens if token.type == "text" and set("*`") & set(token.content)]


@pytest.mark.parametrize("language", LANGUAGES)
def test_emphasis_is_closed(language):
    """In Chinese, `*` after a full stop closes nothing."""
    assert stray_marks("*甲。*乙") and not stray_marks("*甲*。乙")
    assert {path.name: marks for path in chapters(language) if (marks := stray_marks(read(language, path.name)))} == {}
