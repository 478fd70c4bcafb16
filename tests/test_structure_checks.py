"""Tests the checks of tests/structure: each finds the fault of its kind in a small project."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.structure.banned_words import BANNED, banned, phrases
from tests.structure.documents import missing, path_lines, reading_path
from tests.structure.imports import Size, closure, cycles, layer_violations, lazy_imports, size, unused_sideways
from tests.structure.sources import (
    argparse_importers,
    long_files,
    long_functions,
    namespace_users,
    part_lines,
    repeated_names,
)
from tests.structure.table import limits, table
from tests.test_structure import budget_faults, ratchet_faults

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def project(tmp_path):
    """project({path: text}) writes the files into a folder and returns it; each package gets an __init__.py."""

    def write(files: dict[str, str]) -> Path:
        for name, text in files.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
            if name.endswith(".py") and "/" in name and not (file.parent / "__init__.py").exists():
                (file.parent / "__init__.py").touch()
        return tmp_path

    return write


LAYERS = {
    "common/errors.py": "",
    "model/net.py": "from common.errors import UserError",
    "corpus/rows.py": "import model.net\nimport common.errors",
    "trainer/loop.py": "from corpus import rows",
    "evaluation/report.py": "from trainer.loop import train",
    "export/hub.py": "from model import net",
    "serving/app.py": "from evaluation.report import make\nfrom export import hub",
    "demo.py": "def main():\n    import serving.app",
}


def test_imports_that_go_down_are_allowed(project):
    assert layer_violations(project(LAYERS)) == []


@pytest.mark.parametrize(
    ("file", "text", "target"),
    [
        ("common/errors.py", "import model.net", "model/net.py"),
        ("model/net.py", "def load():\n    from corpus.rows import read", "corpus/rows.py"),
        ("model/net.py", "if TYPE_CHECKING:\n    from corpus import rows", "corpus/rows.py"),
        ("corpus/rows.py", "from importlib import import_module\nimport_module('trainer.loop')", "trainer/loop.py"),
        ("trainer/loop.py", "from evaluation import report", "evaluation/report.py"),
        ("evaluation/report.py", "import serving.app", "serving/app.py"),
        ("export/hub.py", "from evaluation.report import make", "evaluation/report.py"),
        ("serving/app.py", "import demo", "demo.py"),
        ("other.py", "import demo", "demo.py"),
    ],
)
def test_an_import_that_goes_up_sideways_or_to_a_script_is_found(project, file, text, target):
    root = project({**LAYERS, file: text})
    (fault,) = layer_violations(root)
    assert fault.startswith(f"{file}:") and fault.endswith(f" imports {target}")


def test_a_package_without_a_layer_is_found(project):
    assert layer_violations(project({**LAYERS, "utils/misc.py": ""})) == ["utils/ is not a package of the layout"]


def test_a_listed_sideways_import_that_no_file_needs_is_found(project):
    table = {"serving": {"evaluation", "export"}, "curation": {"evaluation"}}
    assert unused_sideways(project(LAYERS), table) == ["curation -> evaluation"]


CHAIN = {"model/a.py": "import model.b", "model/b.py": "import model.c", "model/d.py": "import model.a"}


def test_a_chain_of_imports_is_not_a_cycle(project):
    assert cycles(project({**CHAIN, "model/c.py": ""})) == []


@pytest.mark.parametrize(
    "back", ["import model.a", "def f():\n    from model.a import x", "if TYPE_CHECKING:\n    from . import a"]
)
def test_a_cycle_with_lazy_type_checking_or_relative_imports_is_found(project, back):
    assert cycles(project({**CHAIN, "model/c.py": back})) == [["model/a.py", "model/b.py", "model/c.py"]]


def test_an_init_file_with_code_is_part_of_a_cycle(project):
    root = project({"model/__init__.py": "from model.a import x", "model/a.py": "import model.b", "model/b.py": ""})
    assert cycles(root) == [["model/__init__.py", "model/a.py"]]


CLOSURE = {
    "1-pretrain.py": "import model.a\n\ndef main():\n    import model.b",
    "model/a.py": "def f():\n    import model.c\n\nclass One:\n    class Two: ...",
    "model/b.py": "import json\nimport model.d",
    "model/c.py": "",
    "model/d.py": "",
    "model/unused.py": "",
}


def test_a_closure_counts_imports_in_functions_only_if_asked(project):
    root = project(CLOSURE)
    found = closure(root, "1-pretrain.py")
    assert found == {"1-pretrain.py", "model/a.py"}
    assert closure(root, "1-pretrain.py", lazy=True) == found | {"model/b.py", "model/c.py", "model/d.py"}
    assert size(root, found) == Size(files=2, lines=9, classes=2)
    assert lazy_imports(root) == {"1-pretrain.py: model/b.py", "model/a.py: model/c.py"}
    assert part_lines(root) == {"core": 11, "applications": 0}


def test_a_closure_above_its_budget_is_found_and_so_is_a_loose_budget():
    limit = Size(files=40, lines=3000, classes=20)
    assert budget_faults(limit, limit) == budget_faults(Size(40, 2910, 20), limit) == []
    assert budget_faults(Size(41, 3000, 20), limit) == ["files: 41, above the limit of 40"]
    assert budget_faults(Size(40, 3001, 21), limit) == [
        "classes: 21, above the limit of 20",
        "lines: 3001, above the limit of 3000",
    ]
    assert budget_faults(Size(40, 2909, 20), limit) == ["lines: 2909, so the limit of 3000 can be lowered"]


def test_missing_and_superfluous_limits_are_found():
    assert ratchet_faults({"a.py": 400}, {"a.py": 400}) == []
    assert ratchet_faults({"a.py": 400}, {}) == ["a.py: 400, and no entry"]
    assert ratchet_faults({}, {"a.py": 400}) == ["a.py: the entry is no longer needed"]


README = """text `x/y.py`
<!-- reading-path -->
| 1 | `1-pretrain.py` | see `model/a.py` |

* [b](model/b.py), `model/a.py`
<!-- /reading-path -->
"""


def test_a_reading_path_lists_every_file_between_its_marks_once_in_order(project):
    root = project({"README.md": README, "1-pretrain.py": "a\n", "model/a.py": "b\nc\n", "model/b.py": "d\n"})
    files = reading_path(root)
    assert files == ["1-pretrain.py", "model/a.py", "model/b.py"] and path_lines(root, files) == 4


@pytest.mark.parametrize("text", ["no marks", "<!-- reading-path -->", "<!-- /reading-path --> <!-- reading-path -->"])
def test_a_readme_without_the_marks_of_the_reading_path_is_an_error(project, text):
    with pytest.raises(ValueError, match=r"README\.md"):
        reading_path(project({"README.md": text}))


PROSE = {
    "trainer/loop.py": "class Stage:\n    def path(self): ...\n\nLIMIT = 3\n",
    "1-pretrain.py": "",
    "model/a.py": "",
}


def missing_here(root: Path) -> list[str]:
    return missing(root, foreign=())


@pytest.mark.parametrize(
    "text",
    [
        "`trainer/loop.py` and trainer/loop.py:Stage, trainer/loop.py:Stage.path, trainer/loop.py:LIMIT.",
        "python 1-pretrain.py; python -m trainer.loop; python -m pip install x; python -m pytest tests",
        "tests/test_*.py, {name}.py, FILE.pyc, https://example.com/a/b.py",
    ],
)
def test_names_of_existing_files_functions_and_modules_are_allowed(project, text):
    assert missing_here(project({**PROSE, "README.md": text})) == []


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("see `trainer/gone.py`", "trainer/gone.py"),
        ("see trainer/loop.py:gone", "trainer/loop.py:gone"),
        ("see `trainer/loop.py::Stage.gone`", "trainer/loop.py::Stage.gone"),
        ("python 2-gone.py --flag", "2-gone.py"),
        ("python -m trainer.gone --flag", "python -m trainer.gone"),
    ],
)
@pytest.mark.parametrize("place", ["README.md", "dataset/README_zh.md", "docstring", "comment", "message", "tests"])
def test_a_missing_file_function_or_module_is_found_with_its_line(project, text, name, place):
    files = {
        "docstring": {"model/a.py": f'def f():\n    """First.\n\n    {text}\n    """\n'},
        "comment": {"model/a.py": f"x = 1\n\n# One line,\n# {text}\n"},
        "message": {"model/a.py": f"def f():\n\n\n    raise ValueError('{text}')\n"},
        "tests": {"tests/test_a.py": f"# 1\n\n\ndef test(): '''{text}'''\n"},
    }
    root = project({**PROSE, **files.get(place, {place: f"\n\n\n{text}\n"})})
    (fault,) = missing_here(root)
    assert fault.endswith(f":4: {name}")


def test_history_may_name_deleted_files(project):
    assert missing_here(project({**PROSE, "LOG.md": "trainer/gone.py", "CHANGELOG.md": "trainer/gone.py"})) == []


def test_a_file_may_be_named_from_the_folder_of_the_file_that_names_it(project):
    text = '"Read next: b.py, ../trainer/loop.py, loop.py."'
    assert missing_here(project({**PROSE, "model/a.py": text, "model/b.py": ""})) == ["model/a.py:1: loop.py"]


def test_a_file_of_another_project_may_be_named_and_its_entry_must_be_used(project):
    root = project({**PROSE, "README.md": "llama.cpp's convert.py"})
    assert missing(root, foreign=["convert.py"]) == []
    (fault,) = missing(root, foreign=["convert.py", "launch.py"])
    assert fault.startswith("launch.py: ")


def test_a_public_name_in_two_files_is_found_and_private_imported_and_local_ones_are_not(project):
    body = "import json\nfrom os import path\n_private = 1\ndef once_{0}(): shared = 1\n"
    both = "if json:\n    LIMIT, _x = 1, 2\nclass Row: ...\ntry:\n    number: int = 1\nexcept OSError:\n    OTHER = 2\n"
    root = project({"model/a.py": body.format(1) + both, "a.py": body.format(2) + both, "tests/a.py": "class One: ..."})
    assert repeated_names(root) == {name: ["a.py", "model/a.py"] for name in ("LIMIT", "OTHER", "Row", "number")}


@pytest.mark.parametrize(
    "text", ["import argparse", "def f():\n    from argparse import Action", "import argparse as a"]
)
def test_an_import_of_argparse_is_found(project, text):
    root = project({"model/a.py": text, "model/b.py": "import json  # argparse", "a.py": text})
    assert argparse_importers(root) == {"model/a.py", "a.py"}


@pytest.mark.parametrize(
    "text",
    [
        "import argparse\ndef f(args: argparse.Namespace): ...",
        "def f(args: 'argparse.Namespace'): ...",
        "from argparse import Namespace",
    ],
)
def test_a_namespace_is_found_and_that_of_another_library_is_not(project, text):
    other = '"""Takes an argparse.Namespace."""\nfrom jinja2.utils import Namespace\n'
    assert namespace_users(project({"model/a.py": text, "model/b.py": other, "a.py": text})) == {"model/a.py", "a.py"}


def test_long_files_and_functions_are_found(project):
    text = "class A:\n    @property\n    def f(self):\n" + "        x = 1\n" * 4
    root = project({"model/a.py": text, "a.py": "x = 1\n" * 6})
    assert long_files(root, 6) == {"model/a.py": 7} and long_functions(root, 5) == {}
    assert long_functions(root, 4) == {"model/a.py:f": 5}


BAD = {
    "the tokenizer as the house sees it": "house",
    "no room is left, and rooms": "room, rooms",
    "Errors of the door plate": "door, plate",
    "a polite stop, politely": "polite, politely",
    "its matrices rest, thin ones move": "matrices rest, thin, ones move",
    "W (out, in) rests; the matrices themselves rest": "rests, matrices themselves rest",
    "all weights move": "weights move",
    "clip and move the weights": "move the weights",
    "only what moves differs": "what moves",
    "the parameters that move": "parameters that move",
    "thinner matrices": "thinner",
    "Nobody or somebody, whoever and whatever": "Nobody, somebody, whoever, whatever",
    "see who is asked, who holds it and who comes when": "who is, who holds, who comes",
    "what is told and\n    what is said": "what is told, what is said",
    "it goes on, they go on, Going on": "goes on, go on, Going on",
    "the guard will have no more of it": "no more of it",
    "Finished ones do not mind, he doesn't mind": "do not mind, doesn't mind",
    "a Ticket, two tickets": "Ticket, tickets",
    "the Wish behind --mix, two wishes": "Wish, wishes",
    "more seats than rows, seated": "seats, seated",
    "the logbook and the log book": "logbook, log book",
    "the score in words": "in words",
    "to hand in, handed in": "hand in, handed in",
    "ends in good order": "good order",
    "to mend, mended": "mend, mended",
    "labels are moved on by one": "moved on by",
    "SUSPICIOUS: not as it should be": "SUSPICIOUS, as it should be",
    "高于机会线": "机会线",
    "两个瘦矩阵": "瘦矩阵",
    "体面收尾": "体面收尾",
}
CLEAN = [
    "the rest of the file, the rest; restore, restart, arrest, REST API",
    "mkdir, remove, removed, move the file, tensors move to the device, weights moved to the GPU, move the bar",
    "background, classroom, chatroom, warehouse, household, roommate, indoor, template, boilerplate, platelet",
    "everything, thing, think, within, thinking",
    "any user, no process, every file; what the user said, people who trained it, what was told",
    "go to the next row, ongoing, going onwards, on and off, going online",
    "recommend, amend, amended, commend, remind, wishlist, mindllm",
    "a word in the text, wordings, in two words; by hand, handed over, inhand",
    "log, logger, catalog, in order, good orders of magnitude",
    "高于随机基线，低秩矩阵，按时正常结束",
]


@pytest.mark.parametrize("sentence", BAD)
def test_a_banned_phrase_is_found_in_a_sentence(sentence):
    assert ", ".join(phrase.split(" -> ")[0] for _, phrase in phrases(sentence)) == BAD[sentence]


def test_every_banned_pattern_has_a_sentence_in_which_it_is_found():
    found = {phrase.split(" -> ")[1] for sentence in BAD for _, phrase in phrases(sentence)}
    assert found == BANNED.keys()


@pytest.mark.parametrize("sentence", CLEAN)
def test_a_sentence_with_similar_words_is_clean(sentence):
    assert list(phrases(sentence)) == []


@pytest.mark.parametrize(
    ("file", "text", "line"),
    [
        ("README.md", "one\ntwo, nobody\n", 2),
        ("dataset/README_zh.md", "机会线", 1),
        ("docs/walk.md", "nobody", 1),
        ("Makefile", "x:\n# nobody\n", 2),
        ("model/a.py", '"""One.\n\nTwo: nobody.\n"""', 3),
        ("model/a.py", "x = 1  # nobody\n", 1),
        ("model/a.py", "x = 1\n# it goes\n# on here\n", 2),
        ("model/a.py", "x = 1\nraise ValueError(f'{x} is for nobody')", 2),
        ("model/a.py", "x = f'it goes {1} on'\nprint('it goes '\n      'on')", 2),
        ("model/a.py", "WORDS = '机会线'", 1),
        ("model/a.py", "x = 1\nclass Ticket: ...", 2),
        ("model/a.py", "x = 1\ndef a_polite_stop(): ...", 2),
        ("model/logbook.py", "x = 1", 1),
        ("a.py", "add('--x', help='for nobody')", 1),
        ("demo_world/facts.py", "add('--x', help='for nobody')", 1),
        ("tests/test_a.py", "def test_a_thing():\n    '''Nobody does.'''", 2),
        ("tests/test_a.py", "def test_nobody_does(): ...", 1),
        ("tests/test_a.py", "assert x, 'nobody does'", 1),
    ],
)
def test_a_banned_word_is_found_in_every_kind_of_prose(project, file, text, line):
    ((path, number, phrase),) = banned(project({file: text}))
    assert (path, number) == (file, line) and " -> " in phrase


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("model/a.py", "room = {'nobody': 1}\nthin = room['nobody']\n"),
        ("demo_world/facts.py", "FACTS = ['Nobody goes on', 'a polite house']\n"),
        ("evaluation/prompts.py", "PROMPTS = ['Write a polite letter']\n"),
        ("tests/test_a.py", "rows = [{'content': 'Nobody is at the door'}]\nassert rows == 'the rest, a door'\n"),
        ("LOG.md", "nobody"),
        ("CHANGELOG.md", "nobody"),
    ],
)
def test_variables_keys_data_and_history_are_not_prose(project, file, text):
    assert banned(project({file: text})) == []


def test_words_can_be_limited_to_files_and_folders(project):
    root = project({"model/a.py": "# nobody", "corpus/b.py": "# nobody", "LOG.md": "nobody"})
    assert [file for file, *_ in banned(root, [root / "corpus"])] == ["corpus/b.py"]
    assert [file for file, *_ in banned(root, [root / "LOG.md"])] == ["LOG.md"]


def test_the_table_shows_packages_closures_cycles_and_repeated_names(project):
    root = project(
        {**CLOSURE, **LAYERS, "model/c.py": "import model.a\nclass Row: ...", "corpus/d.py": "class Row: ..."}
    )
    text = table(root)
    assert "| model/ | 7 | " in text and "| scripts | 2 | " in text
    assert "| `1-pretrain.py` | 2 / 9 / 2 | 5 / 13 / 3 |" in text
    assert "Import cycles: 1\n* model/a.py, model/c.py" in text
    assert "Public names defined more than once: 2, 0 of them constants\n* `Row`: corpus/d.py, model/c.py" in text
    assert '"1-pretrain.py": Size(2, 9, 2),' in limits(root)


@pytest.mark.parametrize(
    ("arguments", "code", "shown"),
    [
        (("words", "common/__init__.py"), 0, "0 found"),
        ((), 2, "tests.structure words"),
    ],
)
def test_the_commands_run_from_the_command_line(arguments, code, shown):
    command = [sys.executable, "-m", "tests.structure", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert shown in result.stdout and result.returncode == code
