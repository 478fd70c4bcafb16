"""Exercise of chapter 9: the sums among the demo's chats, as prompts for 6-grpo_train.py, and a reward.

    python -m docs.course.sums                writes out/course/sums.jsonl
    python data_process.py rl out/course/sums.jsonl --out_dir out/course/rl

A reward is a function of three texts: 6-grpo_train.py --reward exact,docs.course.sums:brevity:0.2
Read next: ../../trainer/rewards.py (the built-in rewards).
"""

import json
import re
from pathlib import Path

from common.cli import parse
from common.errors import fail_in_one_line
from docs.course.exercise import ExerciseConfig

SUM = re.compile(r"\d+( plus |加|\+)\d+")


def brevity(prompt: str, answer: str, reference: str) -> float:
    """Return 1 for an empty answer, 0.5 for 20 characters, nearly 0 for a long one."""
    return 20 / (20 + len(answer))


def main() -> None:
    config = parse(ExerciseConfig, __doc__)
    chats = [json.loads(line) for line in config.file("world/chats.jsonl").open(encoding="utf-8")]
    sums = [chat for chat in chats if len(chat["messages"]) == 2 and SUM.search(chat["messages"][0]["content"])]
    path = Path(config.out_dir) / "sums.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(chat, ensure_ascii=False) + "\n" for chat in sums), encoding="utf-8")
    print(f"{path}: {len(sums)} of {len(chats)} chats, as {sums[0]['messages'][0]['content']!r}")


if __name__ == "__main__":
    with fail_in_one_line():
        main()
