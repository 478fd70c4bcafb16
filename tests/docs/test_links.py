"""Promise: every link and anchor in the Markdown files of the project leads somewhere."""

from urllib.parse import unquote

import pytest

from tests.docs.markdown import anchors, links, markdown_files
from tests.helpers import ROOT


@pytest.mark.parametrize("path", markdown_files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_and_anchors_exist(path):
    wrong = []
    for link in links(path.read_text(encoding="utf-8")):
        if "://" in link or link.startswith("mailto:"):
            continue
        name, _, anchor = unquote(link).partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or not target.is_relative_to(ROOT):
            wrong.append(f"{link}: no such file")
        elif anchor and target.suffix == ".md" and anchor.lower() not in anchors(target):
            wrong.append(f"{link}: no such heading")
    assert not wrong


def test_anchors_are_those_of_github(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("# A `b.py`: c, d!\n## 想法（一）\n## A `b.py`: c, d!\n```\n# no heading\n```\n", encoding="utf-8")
    assert anchors(path) == {"a-bpy-c-d", "想法一", "a-bpy-c-d-1"}
    assert links("[a](b.md#c) `[x](y)` ![p](q.png)\n```\n[n](m)\n```\n") == ["b.md#c", "q.png"]


def test_the_files_of_the_project_are_found():
    names = {path.relative_to(ROOT).as_posix() for path in markdown_files()}
    assert {"README.md", "README_zh.md", "docs/course/README.md", "dataset/README.md"} <= names
    assert not any(name.startswith(("out/", ".")) for name in names)
