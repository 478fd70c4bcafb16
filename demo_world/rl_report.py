"""The report of ../demo.py --rl: right answers before and after SFT on tools and after GRPO, and two rollouts.

Read next: rl_steps.py (the commands that write the answers), report.py (the report of the plain demo).
"""

import json
from pathlib import Path
from typing import Any

from corpus.language import LANGUAGES
from demo_world.report import read_result
from demo_world.rl_steps import QUESTIONS, answers_path
from demo_world.texts import DemoTexts

MOMENTS = {"dpo": "before", "tools": "SFT with tools", "grpo": "GRPO"}
MEANINGS = {
    "arithmetic": "sums of three terms, without a tool; no training contains these terms or wordings",
    "calculator": "sums, differences and products of large numbers of no training; the model may call a tool",
    "world": "the demo's held-out questions: how much of what the model knew is left",
}


def make_rl_report(out: Path, dim: int) -> dict[str, Any]:
    """The value of "rl" in report.json. Raises UserError for a damaged result."""
    accuracy: dict[str, dict[str, Any]] = {
        questions: {
            stage: read_result(answers_path(out, stage, questions))["accuracy"]
            for stage in MOMENTS
            if (stage, questions) != ("dpo", "calculator")  # its context is shorter than the schema of the tool
        }
        for questions in QUESTIONS
    }
    rows = [json.loads(line) for line in (out / f"grpo_{dim}.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [row for row in rows if "reward" in row]
    return {
        "accuracy": accuracy,
        "steps": steps[-1]["step"],
        "reward": {"first": steps[0]["reward"], "last": steps[-1]["reward"]},
        "samples": [row["samples"] for row in rows if "samples" in row][-1],
        "curves": str(out / f"grpo_{dim}.png"),
    }


def print_rl_report(report: dict[str, Any], say: DemoTexts) -> None:
    """Print the table of right answers, what each line means, and two rollouts of the last logged step."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.rule(say("tools, thoughts and reinforcement learning"))
    headers = [
        f"{say(moment)}\n{lang}" if lang == LANGUAGES[0] else f"\n{lang}"
        for moment in MOMENTS.values()
        for lang in LANGUAGES
    ]
    table = Table(say("right answers"), *headers, box=None, padding=(0, 2, 0, 0))
    for questions, stages in report["accuracy"].items():
        cells = (stages.get(stage, {}).get(lang) for stage in MOMENTS for lang in LANGUAGES)
        table.add_row(questions, *("" if cell is None else f"{cell:.1%}" for cell in cells))
    console.print(table)
    for questions, meaning in MEANINGS.items():
        console.print(f"{questions:10s}  {say(meaning)}", highlight=False)
    reward = {moment: f"{report['reward'][moment]:.2f}" for moment in ("first", "last")}
    line = "mean reward of the sampled answers: {first} in step 1, {last} in the last one"
    console.print(say(line, **reward), highlight=False)
    console.rule(say("two sampled answers to one prompt, in the last step that the log shows"))
    for sample in report["samples"]:
        reward_text = say("reward {reward}", reward=f"{sample['reward']:.2f}")
        console.print(f"[bold]{reward_text}[/]", highlight=False)
        console.print(f"    {sample['prompt']}\n    {sample['answer']}", highlight=False, markup=False)
