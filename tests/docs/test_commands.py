"""Promise: every flag of a command in the documentation is one of its script.

The course is checked more strictly: its commands are parsed with their values (test_course.py) and run (commands.py).
"""

import shlex
from functools import cache

import pytest

from tests.docs.markdown import blocks, markdown_files
from tests.helpers import ROOT
from tests.scripts.test_flags import SCRIPTS, parser_of

HISTORY = ("LOG.md", "CHANGELOG.md")
FILES = [path for path in markdown_files() if path.name not in HISTORY]


@cache
def known_flags(script):
    parsers, flags = [parser_of(script)], set()
    while parsers:
        parser = parsers.pop()
        flags |= set(parser._option_string_actions)
        parsers += [sub for action in parser._actions if action.dest == "command" for sub in action.choices.values()]
    return flags


def script_flags(line):
    """Return (script, its flags) of a shell command, or None if it starts no script of the project."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        words = line.split("#")[0].split()
    for i, word in enumerate(words):
        module = words[i - 1] == "-m" and word in SCRIPTS
        if module or word in SCRIPTS:
            rest = words[i + 1 :]
            end = min((rest.index(mark) for mark in ("|", ">", "&&", ";", "&") if mark in rest), default=len(rest))
            return word, [flag.partition("=")[0] for flag in rest[:end] if flag.startswith("--") and len(flag) > 2]
    return None


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_flag_of_a_command_exists(path):
    wrong = []
    for block in blocks(path.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            if found := script_flags(line):
                script, flags = found
                wrong += [f"{script} {flag}" for flag in flags if flag not in known_flags(script)]
    assert not wrong


def test_flags_of_shell_lines_are_found():
    assert script_flags("torchrun --nproc_per_node 2 1-pretrain.py --epochs=2 @x.args  # --no") == (
        "1-pretrain.py", ["--epochs"],
    )  # fmt: skip
    assert script_flags("python 2-eval.py --prompt 'a --b' > out.txt --c") == ("2-eval.py", ["--prompt"])
    assert script_flags("python -m demo_world.exam --seed 1") == ("demo_world.exam", ["--seed"])
    assert script_flags("pip install --upgrade pip") is None
    assert "--epochs" in known_flags("1-pretrain.py") and "--val_fraction" in known_flags("data_process.py")
    assert "--epoch_count" not in known_flags("1-pretrain.py")
