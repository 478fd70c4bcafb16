"""Atomic writes of files, atomic replacement of folders, and cleanup after a kill."""

import ast
import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from common.files import (
    atomic_write,
    find_replaced_folder,
    remove,
    remove_leftovers,
    replace_file,
    replace_folder,
    temporary_path,
    write_json,
    write_text,
)
from tests.helpers import ROOT


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_atomic_write_leaves_one_complete_file(tmp_path):
    write_text(tmp_path / "deep" / "a.txt", "萌芽\n")
    assert (tmp_path / "deep" / "a.txt").read_bytes() == "萌芽\n".encode()
    write_json(tmp_path / "deep" / "b.json", {"k": [1, "二"]})
    assert (tmp_path / "deep" / "b.json").read_text(encoding="utf-8") == '{\n "k": [\n  1,\n  "二"\n ]\n}\n'
    assert names(tmp_path / "deep") == ["a.txt", "b.json"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_failed_write_keeps_the_old_file_and_leaves_no_temporary(tmp_path, error):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(UserError if isinstance(error, OSError) else type(error)) as raised:
        with atomic_write(tmp_path / "a.txt") as file:
            file.write(b"new")
            raise error
    if isinstance(error, OSError):
        assert str(raised.value) == (
            f"cannot write {tmp_path / 'a.txt'}: No space left on device: free some space or choose another path"
        )
    assert names(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "old"


def test_a_file_in_place_of_a_folder_is_a_one_line_error(tmp_path):
    write_text(tmp_path / "out", "a file")
    with pytest.raises(UserError, match=r"cannot write .*out"):
        write_text(tmp_path / "out" / "a.txt", "x")


def test_replace_folder_leaves_no_temporaries(tmp_path):
    for name, text in (("data", "old"), ("data.partial", "new")):
        write_text(tmp_path / name / "f", text)
    replace_folder(tmp_path / "data.partial", tmp_path / "data")
    assert names(tmp_path) == ["data"] and (tmp_path / "data" / "f").read_text() == "new"


@pytest.mark.parametrize("operation", range(1, 5))
def test_a_kill_at_any_point_of_a_replacement_leaves_the_old_or_the_new_folder(tmp_path, operation, monkeypatch):
    class Killed(BaseException):
        pass

    calls = 0
    real = os.rename

    def rename(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == operation:
            raise Killed
        return real(*args, **kwargs)

    for name, text in (("data", "old"), ("data.partial", "new")):
        write_text(tmp_path / name / "f", text)
    monkeypatch.setattr(os, "rename", rename)
    with contextlib.suppress(Killed):
        replace_folder(tmp_path / "data.partial", tmp_path / "data")
    monkeypatch.setattr(os, "rename", real)
    remove_leftovers(tmp_path / "data")
    assert (tmp_path / "data" / "f").read_text() in ("old", "new")
    assert not [name for name in names(tmp_path) if name.startswith(".")]


def test_remove_leftovers_keeps_files_of_other_names(tmp_path):
    for name in (".a.pth.17.tmp", ".b.pth.17.tmp", ".a.pth.lock", "a.pth", ".a.pth.17.tmp.txt"):
        write_text(tmp_path / name, "")
    (tmp_path / ".a.pth.99.gone" / "deep").mkdir(parents=True)
    remove_leftovers(tmp_path / "a.pth")
    assert names(tmp_path) == [".a.pth.17.tmp.txt", ".a.pth.lock", ".b.pth.17.tmp", "a.pth"]


def test_remove_deletes_files_links_and_folders_but_not_link_targets(tmp_path):
    write_text(tmp_path / "kept" / "f", "x")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    write_text(tmp_path / "folder" / "f", "x")
    write_text(tmp_path / "file", "x")
    for name in ("link", "folder", "file", "absent"):
        remove(tmp_path / name)
    assert names(tmp_path) == ["kept"] and names(tmp_path / "kept") == ["f"]


def test_temporary_names_contain_the_pid(tmp_path):
    assert temporary_path(tmp_path / "m.pth", "tmp").name == f".m.pth.{os.getpid()}.tmp"


def test_a_write_removes_temporaries_of_killed_writers_of_that_file_only(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    running = os.getppid()
    for name in (f".a.png.{ended.pid}.tmp", f".a.png.{running}.tmp", f".b.png.{ended.pid}.tmp"):
        (tmp_path / name).write_text("half")
    write_text(tmp_path / "a.png", "whole")
    assert names(tmp_path) == sorted([f".a.png.{running}.tmp", f".b.png.{ended.pid}.tmp", "a.png"])


def test_find_replaced_folder_after_a_kill_between_renames(tmp_path):
    assert find_replaced_folder(tmp_path / "sft") is None
    (tmp_path / ".sft.17.old").mkdir()
    assert find_replaced_folder(tmp_path / "sft") == tmp_path / ".sft.17.old"
    (tmp_path / "sft").mkdir()
    assert find_replaced_folder(tmp_path / "sft") is None


def test_replace_file_renames_over_the_target(tmp_path):
    for name in ("a", "a.part"):
        write_text(tmp_path / name, name)
    replace_file(tmp_path / "a.part", tmp_path / "a")
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "a.part"


# Files that may rename or remove folders themselves, with the reason. All others use common/files.py.
ALLOWED = {
    "common/files.py": "what all others call",
}


def direct_file_operations(path: Path) -> list[str]:
    """Lines of a file that rename, remove a folder or create a temporary name."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = getattr(node.func.value, "id", "")
            renames = node.func.attr in ("rename", "renames", "rmtree", "move") and owner != "dataclasses"
            # Only Path.replace and os.replace: str.replace takes two arguments, dataclasses.replace keywords.
            replaces = node.func.attr == "replace" and not node.keywords and (len(node.args) == 1 or owner == "os")
            if renames or replaces:
                found.append(f"{path.name}:{node.lineno}: {owner}.{node.func.attr}")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.search(r"^[^*]*\.tmp$", node.value):
            found.append(f"{path.name}:{node.lineno}: {node.value}")
    return found


def test_no_other_file_renames_or_removes_folders_or_makes_temporary_names():
    packages = (
        "common",
        "model",
        "corpus",
        "trainer",
        "curation",
        "demo_world",
        "evaluation",
        "export",
        "serving",
        "launch",
    )
    files = [*ROOT.glob("*.py"), *(path for package in packages for path in (ROOT / package).rglob("*.py"))]
    assert len(files) > 100 and direct_file_operations(ROOT / "common" / "files.py")
    found = {path: direct_file_operations(path) for path in files if str(path.relative_to(ROOT)) not in ALLOWED}
    assert not {str(path): lines for path, lines in found.items() if lines}
