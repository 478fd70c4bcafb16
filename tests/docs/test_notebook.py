"""Promise: the notebooks of the course are made from its chapters, are up to date, and run."""

import json
import re

import pytest

from docs.course.notebook import SETUP, chapter_parts, make_notebook
from tests.docs.markdown import COURSE, LANGUAGES, chapters, commands
from tests.helpers import ROOT


def sources(notebook, kind):
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_committed_notebook_is_that_of_the_chapters(language):
    stored = json.loads((COURSE / f"course_{language}.ipynb").read_text(encoding="utf-8"))
    assert stored == make_notebook(language), "run `python -m docs.course.notebook`"


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_notebook_has_every_command_and_picture(language):
    notebook = make_notebook(language)
    code = "\n".join(sources(notebook, "code"))
    expected = [command for chapter in chapters(language) for command in commands(chapter.read_text(encoding="utf-8"))]
    assert len(re.findall(r"^!\{sys.executable\} ", code, re.MULTILINE)) == len(expected) + 2  # pip and the demo
    assert code.count("Image(") == 11
    text = "\n".join(sources(notebook, "markdown"))
    assert "../pictures" not in text and "../README.md" not in text
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])


def test_a_chapter_is_split_at_its_commands_and_pictures():
    text = (
        "# A\n\n[Contents](../README.md) · next:\n[B](b.md)\n\nx\n\n```\nf = 1\n```\n\n```\npython a.py --b 1\n```\n\n"
    )
    text += "![p](../pictures/06-sft.png)\n\nend\n"
    kinds, parts = zip(*chapter_parts(text), strict=True)
    assert kinds == ("markdown", "code", "code", "markdown")
    assert parts[0].split() == ["#", "A", "x", "```", "f", "=", "1", "```"]
    assert parts[1] == "!{sys.executable} a.py --b 1\n" and "out/course/full_sft_256.png" in parts[2]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not (ROOT / "out/demo/dpo_256.pth").exists(), reason="needs the results of make demo")
def test_the_notebook_runs():
    """Executes every cell but the setup, in the checkout, as Jupyter does; the steps of the trainings are few."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = make_notebook("en")
    setup = SETUP.split("REPOSITORY")[0]
    for cell in notebook["cells"]:
        if "REPOSITORY" in "".join(cell["source"]):
            cell["source"] = setup
    ready = nbformat.reads(json.dumps(notebook), as_version=4)
    nbformat.validate(ready)
    nbclient.NotebookClient(ready, timeout=1800, resources={"metadata": {"path": str(ROOT)}}).execute()
    failed = [
        output["text"] for cell in ready.cells if cell.cell_type == "code" for output in cell.outputs
        if "text" in output and re.search("^(error:|Traceback)", output["text"], re.MULTILINE)
    ]  # fmt: skip
    assert not failed
