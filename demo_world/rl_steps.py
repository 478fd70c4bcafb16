"""The further steps of ../demo.py --rl: tools, thoughts and reinforcement learning.

    tool_world   tool_chats.py       writes chats with a calculator and with thoughts, prompts, held-out questions
    tools        3-full_sft.py       trains the model of the demo on these chats -> tools/full_sft_256.pth
    grpo         6-grpo_train.py     samples answers to other sums, rewards right results -> grpo_256.pth

Before and after each training 2-eval.py asks the same questions: sums of three terms, large numbers with a calculator,
the world. Read next: tool_chats.py (the chats), rl_report.py (the table).
"""

from dataclasses import dataclass
from pathlib import Path

QUESTIONS = {  # name -> file, flags of 2-eval.py
    "arithmetic": ("tool_world/arithmetic.jsonl", "--max_new_tokens 64"),
    "calculator": ("tool_world/calculator.jsonl", "--max_new_tokens 64 --tools calculator"),
    "world": ("world/questions.jsonl", ""),
}
SMALL = "--tool_chats 12 --sums 12 --replay 40 --wordings 1 --questions 6"  # with --max_steps


@dataclass(frozen=True)
class DemoStep:
    """One command of the demo. It is complete if it exited with 0 and the files in `results` exist."""

    name: str
    title: str
    command: list[str]  # without the interpreter
    results: list[Path]


def answers_path(out: Path, stage: str, questions: str) -> Path:
    """The answers of a model to one of QUESTIONS."""
    return out / (f"answers_{stage}.json" if questions == "world" else f"answers_{stage}_{questions}.json")


def rl_steps(out: Path, dim: int, seed: int, max_steps: int) -> list[DemoStep]:
    """The steps after those of the plain demo. max_steps: as the flag of demo.py."""
    models = {
        "dpo": out / f"dpo_{dim}.pth", "tools": out / "tools" / f"full_sft_{dim}.pth", "grpo": out / f"grpo_{dim}.pth",
    }  # fmt: skip
    limit = f"--max_steps {max_steps}" if max_steps else ""

    def step(name: str, title: str, command: str, *results: Path) -> DemoStep:
        return DemoStep(name, title, [word.replace("OUT", str(out)) for word in command.split()], list(results))

    def ask(stage: str, questions: str, title: str) -> DemoStep:
        file, flags = QUESTIONS[questions]
        answers = answers_path(out, stage, questions)
        command = [
            "2-eval.py", "--checkpoint", str(models[stage]), "--questions", str(out / file), "--json", str(answers),
        ]  # fmt: skip
        return DemoStep(f"{stage}_{questions}", title, [*command, *flags.split()], [answers])

    files = [out / "tool_world" / f"{name}.jsonl" for name in ("chats", "prompts", "arithmetic", "calculator")]
    return [
        step("tool_world", "Generate chats with a calculator and thoughts, and sums",
             f"-m demo_world.tool_chats --out_dir OUT/tool_world --seed {seed} {SMALL if max_steps else ''}", *files),
        step("tools_data", "Tokenize these chats",
             "data_process.py sft OUT/tool_world/chats.jsonl --tokenizer OUT/tokenizer --out_dir OUT/tools_data"
             " --max_seq_len 512", out / "tools_data"),
        step("rl_data", "Prepare the sums as prompts",
             "data_process.py rl OUT/tool_world/prompts.jsonl --out_dir OUT/rl", out / "rl"),
        ask("dpo", "arithmetic", "Ask the model of the demo for sums of three terms"),
        step("tools", "Fine-tune on these chats",
             f"3-full_sft.py --data_path OUT/tools_data --init_from OUT/dpo_{dim}.pth --out_dir OUT/tools --seed {seed}"
             f" {limit} @recipes/demo-tools.args", models["tools"]),
        ask("tools", "arithmetic", "Ask for the same sums after this fine-tuning"),
        ask("tools", "calculator", "Ask for results with large numbers; the model may call a calculator"),
        ask("tools", "world", "Ask the demo's held-out questions again"),
        step("grpo", "GRPO: sample answers to other sums and reward right results",
             f"6-grpo_train.py --data_path OUT/rl --init_from OUT/tools/full_sft_{dim}.pth --out_dir OUT --seed {seed}"
             f" {limit} @recipes/demo-grpo.args", models["grpo"]),
        ask("grpo", "arithmetic", "Ask for the same sums after reinforcement learning"),
        ask("grpo", "calculator", "Ask for the results with the calculator again"),
        ask("grpo", "world", "Ask the demo's held-out questions again"),
    ]  # fmt: skip
