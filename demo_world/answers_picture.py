"""Draws what each stage of the demo achieved: the same three questions, and how many of their kind are answered right.

    python demo.py --rl                                              the models in out/demo
    python -m demo_world.answers_picture                             docs/pictures/answers_zh.png, answers_en.png
    python -m demo_world.answers_picture --demo out/demo2 --out_dir out

Every stage answers all questions of three sets greedily. The question shown is the first of its set that the first
stage answers wrong and the last one right. Takes half a minute on one core. The Chinese picture needs a font with
Chinese characters, as Noto Sans CJK.
Read next: report.py (the report of the demo), ../evaluation/qa.py (when an answer is right).
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from common.cli import Config, flag, parse
from common.errors import UserError, fail_in_one_line
from common.flag_types import path_string
from corpus.language import LANGUAGES
from demo_world.report import read_result
from evaluation.chat_model import open_chat_model
from evaluation.qa import accuracy_by_language, answer_questions
from evaluation.qa_data import KeyedQuestion, read_keyed_questions

# Stage: its model in the folder of the demo and the names of its steps in report.json.
STAGES = {
    "pretrain": ("pretrain_256.pth", ("pretrain",)),
    "SFT": ("full_sft_256.pth", ("full_sft",)),
    "LoRA": ("lora_sft_256.pth", ("lora_sft",)),
    "DPO": ("dpo_256.pth", ("dpo",)),
    "RL": ("grpo_256.pth", ("tools", "grpo")),
}
SETS = ("world/questions.jsonl", "world/identity_questions.jsonl", "tool_world/arithmetic.jsonl")
CHINESE_FONTS = ("Noto Sans CJK SC", "Noto Sans SC", "WenQuanYi Micro Hei", "SimHei", "PingFang SC", "Microsoft YaHei",
                 "Noto Sans CJK JP")  # fmt: skip
TEXTS: dict[str, dict[str, Any]] = {
    "en": {
        "stages": ("Pretraining\n1-pretrain.py", "SFT\n3-full_sft.py", "LoRA\n4-lora_sft.py", "DPO\n5-dpo_train.py",
                   "RL (SFT with thoughts, GRPO)\n6-grpo_train.py"),
        "learns": ("continues text", "answers", "a new name", "good and bad answers", "only the result is graded"),
        "sets": ("held-out questions", "questions about the new name", "sums of three terms"),
        "score": "{correct} of {questions}",
        "seconds": "{} s",
    },
    "zh": {
        "stages": ("预训练\n1-pretrain.py", "SFT\n3-full_sft.py", "LoRA\n4-lora_sft.py", "DPO\n5-dpo_train.py",
                   "强化学习（SFT＋GRPO）\n6-grpo_train.py"),
        "learns": ("续写文本", "学会回答", "换一个新名字", "分辨好坏回答", "只按结果给奖励"),
        "sets": ("留出的常识题", "关于新名字的问题", "三数相加"),
        "score": "{questions} 题对 {correct}",
        "seconds": "{} 秒",
    },
}  # fmt: skip
CLOSING = "，。？！：、；”》）"
GREEN, GREY, INK = "#2e7d32", "#f2f2f2", "#222222"


@dataclass(frozen=True)
class PictureConfig(Config):
    """Flags of this program."""

    demo: str = flag("out/demo", "folder of a demo with reinforcement learning", type=path_string)
    out_dir: str = flag("docs/pictures", "folder of answers_zh.png and answers_en.png", type=path_string)


def main() -> None:
    config = parse(PictureConfig, __doc__)
    demo, out = Path(config.demo), Path(config.out_dir)
    seconds = read_result(demo / "report.json")["seconds"]
    if "grpo" not in seconds:
        raise UserError(f"{demo} has no model after reinforcement learning: python demo.py --rl --out_dir {demo}")
    answers = {stage: stage_answers(demo, model) for stage, (model, _) in STAGES.items()}
    times = [sum(seconds[step] for step in steps) for _, steps in STAGES.values()]
    out.mkdir(parents=True, exist_ok=True)
    for lang in LANGUAGES:
        path = out / f"answers_{lang}.png"
        draw(answers, times, lang, path)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def stage_answers(demo: Path, model: str) -> list[list[KeyedQuestion]]:
    """The three sets, each question with "answer" and "correct" of one stage."""
    chat_model = open_chat_model(str(demo / model))
    sets = [read_keyed_questions(str(demo / name)) for name in SETS]
    for questions in sets:
        answer_questions(chat_model, questions, max_new_tokens=64 if chat_model.is_chat_model else None)
    return sets


def pick(answers: dict[str, list[list[KeyedQuestion]]], number: int, lang: str) -> int:
    """Index of the first question of a language that the first stage answers wrong and the last right."""
    first, *_, last = (sets[number] for sets in answers.values())
    ours = [i for i, row in enumerate(last) if row["lang"] == lang]
    return next((i for i in ours if last[i]["correct"] and not first[i]["correct"]), ours[0])


def draw(answers: dict[str, list[list[KeyedQuestion]]], times: list[float], lang: str, path: Path) -> None:
    """One column per stage, one row per question: the answer, the score of its set and a bar as long as the score."""
    texts, shown = TEXTS[lang], [pick(answers, number, lang) for number in range(len(SETS))]
    figure = Figure(figsize=(13, 4.7), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0, 6.1), ylim=(3.95, 0))
    axes.axis("off")
    family = [*chinese_fonts()[:1], "DejaVu Sans"]
    if lang == "zh" and len(family) == 1:
        raise UserError("no font with Chinese characters: install Noto Sans CJK (Debian: apt install fonts-noto-cjk)")

    def write(x: float, y: float, text: str, size: float, **style: Any) -> None:
        axes.text(x, y, text, fontsize=size, family=family, va="top", **{"color": INK, **style})

    for column, (title, learns, time) in enumerate(zip(texts["stages"], texts["learns"], times, strict=True)):
        write(1.1 + column, 0.05, title, 10.5, weight="bold")
        write(1.1 + column, 0.52, f"{learns} · {texts['seconds'].format(round(time))}", 9.5)
    for row, number in enumerate(shown):
        top = 0.85 + row * 1.04
        question = answers["pretrain"][row][number]["question"]
        write(0, top + 0.06, wrapped(question, 18), 11, weight="bold")
        write(0, top + 0.78, texts["sets"][row], 8.5)
        for column, sets in enumerate(answers.values()):
            counts = accuracy_by_language(sets[row])[lang]
            cell(axes, column, top, counts["accuracy"], right=sets[row][number]["correct"])
            write(1.15 + column, top + 0.07, wrapped(sets[row][number]["answer"], 27), 9.5)
            write(1.15 + column, top + 0.71, texts["score"].format(**counts) + f" · {counts['accuracy']:.0%}", 8.5)
    figure.savefig(path, pil_kwargs={"optimize": True})
    reduce_colours(path)


def chinese_fonts() -> list[str]:
    """The installed fonts of CHINESE_FONTS, best first, also those that are newer than matplotlib's cache."""
    known = {entry.fname for entry in font_manager.fontManager.ttflist}
    for path in font_manager.findSystemFonts():
        if path not in known and path.lower().endswith((".ttf", ".ttc", ".otf")):
            font_manager.fontManager.addfont(path)
    names = {entry.name for entry in font_manager.fontManager.ttflist}
    return [name for name in CHINESE_FONTS if name in names]


def cell(axes: Axes, column: int, top: float, score: float, right: bool) -> None:
    """A box, green if the answer is right, above a bar of the length of the score."""
    axes.add_patch(Rectangle((1.1 + column, top), 0.96, 0.96, facecolor="#e3f2e4" if right else GREY, linewidth=0))
    axes.add_patch(Rectangle((1.1 + column, top + 0.91), 0.96 * score, 0.05, facecolor=GREEN, linewidth=0))


def wrapped(text: str, width: int, max_lines: int = 3) -> str:
    """The text on lines of `width` columns, a Chinese character is two; closing punctuation begins no line."""
    lines = [""]
    for piece in re.findall(rf"[!-~]+[{CLOSING}]*|[“《（]*[^!-~][{CLOSING}]*", text):
        if columns(lines[-1] + piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece if lines[-1] else piece.lstrip()
    return "\n".join(lines[:max_lines]) + ("…" if len(lines) > max_lines else "")


def columns(text: str) -> int:
    """The width of a text in columns."""
    return sum(1 if character.isascii() else 2 for character in text)


def reduce_colours(path: Path) -> None:
    """Store a PNG with a palette of 32 colours: a quarter of the size."""
    from PIL import Image

    Image.open(path).convert("RGB").quantize(32, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    with fail_in_one_line():
        main()
