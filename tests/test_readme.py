"""Promises of README and docs/: short, equal in both languages, commands are accepted.

docs/test_links.py checks links and anchors.
"""

import re
import shlex
from functools import cache

import pytest

from common.errors import UserError
from tests.helpers import ROOT
from tests.scripts.test_flags import parser_of

DOCS = sorted(path.stem for path in (ROOT / "docs").glob("*.md") if not path.stem.endswith("_zh"))
PAIRS = {"README": ("README.md", "README_zh.md"), **{name: (f"docs/{name}.md", f"docs/{name}_zh.md") for name in DOCS}}
PAGES = [page for pair in PAIRS.values() for page in pair]
FENCE = re.compile(r"^```[a-z]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROGRAM = re.compile(r"(\w+=\S+ )*(\S*python|torchrun|deepspeed|sbatch|docker run) ")
OTHER = re.compile(r"[…{]| -m (venv|pip|pytest) ")
WITHOUT_FLAGS = ("benchmarks.machines",)
SCRIPT = re.compile(r"[\w-]+\.py")
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def shape(text):
    """The kinds of the parts of a page in order: headings, rows with their columns, code, pictures, items."""
    parts = []
    for line in FENCE.sub("```", text).splitlines():
        if heading := re.match("#+ ", line):
            parts.append(heading[0])
        elif line.startswith(("|", "```", "![", "* ")):
            parts.append((line[0], line.count("|")))
    return parts


def links(text):
    """The targets of links and pictures outside code."""
    return re.findall(r"\]\(([^()\s]+)\)", re.sub(r"`[^`\n]*`", "", FENCE.sub("", text)))


def commands(text):
    """(script, its arguments) of each command of this project in code blocks and between backquotes."""
    codes = re.findall(r"`([^`]+)`", FENCE.sub("", text))
    for block in FENCE.findall(text):
        codes += block.replace("\\\n", " ").splitlines()
    for code in codes:
        for command in " ".join(code.split(" #")[0].replace("\\", "/").split()).split(" && "):
            if PROGRAM.match(command) and not OTHER.search(command):
                words = shlex.split(command)
                module = words.index("-m") + 1 if "-m" in words else None
                at = module or next((i for i, word in enumerate(words) if SCRIPT.fullmatch(word)), None)
                if at is not None:
                    yield words[at], words[at + 1 :]


cached_parser = cache(parser_of)


@pytest.mark.parametrize("page", PAIRS["README"])
def test_readme_has_at_most_200_lines(page):
    assert len(read(page).splitlines()) <= 200


@pytest.mark.parametrize("name", PAIRS)
def test_both_languages_have_the_same_parts_and_commands(name):
    english, chinese = (read(page) for page in PAIRS[name])
    assert shape(english) == shape(chinese)
    assert set(map(str, commands(english))) == set(map(str, commands(chinese)))


def test_both_readmes_state_the_same_figures():
    english, chinese = (
        set(NUMBER.findall(re.sub(r"\([^()]*\.md[^()]*\)", "", read(page)))) for page in PAIRS["README"]
    )
    assert english == chinese


def test_every_page_of_docs_is_linked_in_its_language():
    for chinese, page in enumerate(PAIRS["README"]):
        linked = {link.partition("#")[0] for link in links(read(page))}
        assert {pair[chinese] for name, pair in PAIRS.items() if name != "README"} <= linked


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_accepted_by_their_scripts(page):
    wrong = []
    for script, words in commands(read(page)):
        try:
            if script in WITHOUT_FLAGS:
                assert words == []
            else:
                cached_parser(script).parse_args(words)
        except (UserError, FileNotFoundError, ModuleNotFoundError) as error:
            wrong.append(f"{script}: {error}")
    assert wrong == []


def test_a_wrong_flag_is_refused():
    (script, words), *_ = commands("```\npython 1-pretrain.py --dims 3    # no such flag\n```\n")
    with pytest.raises(UserError):
        cached_parser(script).parse_args(words)


def test_pictures_are_small():
    pictures = [link for page in PAGES for link in links(read(page)) if link.endswith(".png")]
    sizes = {path.name: path.stat().st_size for path in (ROOT / "docs").rglob("*.png")}
    assert pictures and all(sizes[picture.rpartition("/")[2]] < 150_000 for picture in pictures)
