"""Makes a notebook for Colab or Jupyter from the chapters of a language.

    python -m docs.course.notebook                    writes docs/course/course_en.ipynb and course_zh.ipynb

Its first code cell clones the project if needed, installs it and runs the demo (six minutes on two CPU cores). Each
code block with commands becomes a code cell; the picture that it draws is shown below. The format is nbformat 4.5.
Read next: README.md (the chapters).
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.cli import Config, flag, parse
from common.errors import fail_in_one_line
from common.flag_types import path_string

HERE = Path(__file__).parent
STAGE_PICTURES = {"06-sft": "full_sft_256", "08-dpo": "dpo_256", "09-rl": "grpo_256"}  # drawn by the training scripts
SETUP = """import os
import sys

REPOSITORY = ""  # its address, to clone it: on Colab there is no checkout
if os.path.basename(os.getcwd()) == "course":  # opened in the checkout
    os.chdir("../..")
if not os.path.exists("demo.py"):
    !git clone {REPOSITORY} mengya
    os.chdir("mengya")
!{sys.executable} -m pip install -q -r requirements.txt
!{sys.executable} demo.py"""
INTRODUCTION = {
    "en": "# A chat model from scratch\n\nEleven short chapters. Run the cells from top to bottom. The first code cell "
    "trains the demo: six minutes on two CPU cores. No GPU is needed.",
    "zh": "# 从零训练一个对话模型\n\n十一篇短文，请从上到下依次运行。第一个代码单元格训练演示模型，"
    "两个 CPU 核上需要六分钟，不需要 GPU。",
}
_PART = re.compile(r"^```\n(.*?)^```\n|^!\[[^\]]*\]\(\.\./pictures/([\w-]+)\.png\)\n", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class NotebookConfig(Config):
    out_dir: str = flag("docs/course", "folder for the notebooks", type=path_string)


def cell(kind: str, source: str, number: int) -> dict[str, Any]:
    """Return a cell with the id `cell-NUMBER`. kind: markdown or code."""
    made: dict[str, Any] = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}}
    made["source"] = source.strip("\n").splitlines(keepends=True)
    return made | ({"execution_count": None, "outputs": []} if kind == "code" else {})


def chapter_parts(text: str) -> list[tuple[str, str]]:
    """Split a chapter into (kind, source): commands and pictures are code, all other text is markdown."""
    text = re.sub(r"\n\[[^\]]+\]\(\.\./README\.md\).*?\n\n", "\n", text, count=1, flags=re.DOTALL)  # links to chapters
    parts, start = [], 0
    for match in _PART.finditer(text):
        block, picture = match.groups()
        if block is not None and not block.startswith("python "):
            continue
        if text[start : match.start()].strip():
            parts.append(("markdown", text[start : match.start()]))
        if picture:
            path = f"out/course/{STAGE_PICTURES.get(picture, picture)}.png"
            parts.append(("code", f'from IPython.display import Image\n\nImage("{path}")'))
        else:
            parts.append(("code", re.sub("^python ", "!{sys.executable} ", block, flags=re.MULTILINE)))
        start = match.end()
    return [*parts, ("markdown", text[start:])]


def make_notebook(language: str) -> dict[str, Any]:
    """Return the notebook of a language ("en", "zh") as JSON data."""
    parts = [("markdown", INTRODUCTION[language]), ("code", SETUP)]
    for chapter in sorted((HERE / language).glob("*.md")):
        parts += chapter_parts(chapter.read_text(encoding="utf-8"))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {
        "cells": [cell(kind, source, number) for number, (kind, source) in enumerate(parts)],
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def main() -> None:
    config = parse(NotebookConfig, __doc__)
    for language in INTRODUCTION:
        path = Path(config.out_dir) / f"course_{language}.ipynb"
        text = json.dumps(make_notebook(language), ensure_ascii=False, indent=1)
        path.write_text(text + "\n", encoding="utf-8")
        print(path)


if __name__ == "__main__":
    with fail_in_one_line():
        main()
