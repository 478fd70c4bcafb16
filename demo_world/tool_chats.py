"""Chats with a calculator and with thoughts, prompts for reinforcement learning, and held-out questions.

    chats.jsonl         {"messages", "lang"}              a calculator is offered: question -> call -> result -> answer;
                                                          two-digit sums with a thought; ordinary chats and those about
                                                          the new identity again, so that they are not forgotten
    prompts.jsonl       {"question", "answer", "lang"}    two-digit sums that chats.jsonl does not contain
    arithmetic.jsonl    {"question", "keys", ...}         two-digit sums of neither file, asked with held-out templates
    calculator.jsonl    {"question", "keys", ...}         sums, differences and products of large numbers, the same way

    thought     17+15:  10+10=20, 7+5=12, 20+12=32        tens, ones, both
    call        {"name": "calculator", "arguments": {"expression": "4815+162"}}

Every pair of two-digit terms belongs to one file; the pairs up to 20 + 20 of the world to none. The large numbers of calculator.jsonl
occur in no other file. Results come from evaluation/tools.py, as when a model calls the tool.

    python -m demo_world.tool_chats --out_dir out/demo/tool_world --seed 0      (../demo.py --rl does this)

Read next: ../evaluation/tools.py (the calculator), ../6-grpo_train.py (trains on the prompts).
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.cli import Config, flag, parse
from common.errors import fail_in_one_line
from common.files import write_text
from common.flag_types import path_string, positive_int, seed
from common.locks import lock_output
from corpus.language import LANGUAGES
from demo_world.facts import LARGEST_TERM
from demo_world.finetune import identity_chats
from demo_world.generator import as_row
from demo_world.grammar import read_questions
from demo_world.world import DemoWorld
from evaluation.tools import TOOLS, run_tool
from model.answer_parts import ToolCall
from model.chat_template import Message

CALCULATOR = TOOLS["calculator"]
OPERATORS = {"sum": "+", "difference": "-", "product": "*"}
LARGEST_NUMBER = 9999  # of sums and differences with the calculator; factors are below 1,000
HELDOUT_NUMBERS = 0.2  # fraction of the large numbers
QUESTIONS = 150  # per language, of arithmetic.jsonl and of calculator.jsonl
PLAIN_SHARE = 0.15  # of the chats with a calculator: questions about the world, answered without a call

Pair = tuple[int, int]


@dataclass(frozen=True)
class ToolChatsConfig(Config):
    """Size and seed of the chats; the numbers of chats are per language."""

    out_dir: str = flag("out/demo/tool_world", "folder to write", type=path_string)
    seed: int = flag(0, "random seed of every choice", type=seed)
    tool_chats: int = flag(500, "chats in which a calculator is offered", type=positive_int)
    thoughts: int = flag(300, "two-digit sums with a thought", type=positive_int)
    replay: int = flag(900, "chats of the earlier stages", type=positive_int)
    prompts: int = flag(1200, "prompts for reinforcement learning", type=positive_int)


def split_pairs(seed: int, thoughts: int, prompts: int) -> dict[str, list[Pair]]:
    """Pairs of two-digit terms, shuffled, by the file that contains them; both languages have the same ones.

    A pair and its mirror image belong to the same split.
    """
    pairs = [(a, b) for a in range(LARGEST_TERM + 1, 100) for b in range(10, a + 1)]  # the world has the smaller ones
    rng = random.Random(f"{seed} two-digit sums")
    rng.shuffle(pairs)
    pairs = [rng.choice([(a, b), (b, a)]) for a, b in pairs]
    sizes = {"questions": QUESTIONS, "chats": thoughts, "prompts": prompts}
    starts = dict(zip(sizes, (0, QUESTIONS, QUESTIONS + thoughts), strict=True))
    return {name: pairs[starts[name] : starts[name] + size] for name, size in sizes.items()}


def is_heldout(number: int, seed: int) -> bool:
    """Whether a large number occurs in calculator.jsonl only."""
    return random.Random(f"{seed} {number}").random() < HELDOUT_NUMBERS


def thought_of(a: int, b: int) -> str:
    """The steps of a sum: its tens, its ones, both."""
    tens, ones = a - a % 10 + b - b % 10, a % 10 + b % 10
    return f"{a - a % 10}+{b - b % 10}={tens}, {a % 10}+{b % 10}={ones}, {tens}+{ones}={tens + ones}"


def expression_of(relation: str, a: int, b: int) -> str:
    return f"{a}{OPERATORS[relation]}{b}"


class ToolChats:
    """The chats, prompts and questions of one language."""

    def __init__(self, lang: str, config: ToolChatsConfig) -> None:
        self.lang, self.config = lang, config
        self.world = DemoWorld(lang, config.seed)
        self.rng = random.Random(f"{config.seed} {lang} tools")
        self.templates: dict[str, Any] = {**self.world.templates, **read_questions("arithmetic", lang)}
        self.pairs = split_pairs(config.seed, config.thoughts, config.prompts)

    def ask(self, relation: str, a: int, b: int) -> str:
        """A question with a training template, in a wrapper."""
        question = self.rng.choice(self.templates[relation].ask).format(a=a, b=b)
        return self.rng.choice(self.world.phrases["wrappers"]).format(q=question)

    def say(self, relation: str, a: int, b: int, result: str) -> str:
        return self.rng.choice(self.templates[relation].answer).format(a=a, b=b, o=result)

    def large_numbers(self, relation: str, heldout: bool) -> Pair:
        """Two numbers of two to four digits, both of the given split; the result is neither of them."""

        def draw(largest: int) -> int:
            while True:
                number = self.rng.randrange(10, self.rng.choice([limit for limit in (99, 999, 9999) if limit <= largest]))
                if is_heldout(number, self.config.seed) == heldout:
                    return number

        while True:
            a, b = draw(999 if relation == "product" else LARGEST_NUMBER), draw(99 if relation == "product" else 9999)
            if relation == "difference" and a < b:
                a, b = b, a
            if relation != "difference" or (a != b and a != 2 * b):
                return a, b

    def tool_chat(self) -> list[Message]:
        relation = self.rng.choice(list(OPERATORS))
        a, b = self.large_numbers(relation, heldout=False)
        call = ToolCall(CALCULATOR.name, {"expression": expression_of(relation, a, b)})
        result = run_tool(call, [CALCULATOR])
        return [
            {"role": "system", "content": "", "tools": [CALCULATOR.schema]},
            {"role": "user", "content": self.ask(relation, a, b)},
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call._asdict()}]},
            {"role": "tool", "content": result},
            {"role": "assistant", "content": self.say(relation, a, b, result)},
        ]

    def thought_chat(self, a: int, b: int) -> list[Message]:
        answer = self.say("sum", a, b, str(a + b))
        return [
            {"role": "user", "content": self.ask("sum", a, b)},
            {"role": "assistant", "content": answer, "reasoning_content": thought_of(a, b)},
        ]

    def chats(self) -> Iterator[dict[str, Any]]:
        """Rows of chats.jsonl, by kind."""
        config = self.config
        replay = [as_row(chat, self.lang) for chat in identity_chats(self.world)]
        yield from self.rng.sample(replay, min(config.replay, len(replay)))
        plain = round(PLAIN_SHARE * config.tool_chats)
        offer: Message = {"role": "system", "content": "", "tools": [CALCULATOR.schema]}
        for row in self.rng.sample(replay, plain):
            yield {**row, "messages": [offer, *row["messages"]]}
        for _ in range(config.tool_chats - plain):
            yield {"messages": self.tool_chat(), "lang": self.lang}
        for a, b in self.pairs["chats"]:
            yield {"messages": self.thought_chat(a, b), "lang": self.lang}

    def prompts(self) -> Iterator[dict[str, Any]]:
        """Rows of prompts.jsonl."""
        for a, b in self.pairs["prompts"]:
            yield {"question": self.ask("sum", a, b), "answer": str(a + b), "lang": self.lang}

    def arithmetic(self) -> Iterator[dict[str, Any]]:
        """Rows of arithmetic.jsonl."""
        for a, b in self.pairs["questions"]:
            yield self._question("sum", a, b, "two_digit_sum")

    def calculator(self) -> Iterator[dict[str, Any]]:
        """Rows of calculator.jsonl."""
        for number in range(QUESTIONS):
            relation = list(OPERATORS)[number % len(OPERATORS)]
            yield self._question(relation, *self.large_numbers(relation, heldout=True), f"large_{relation}")

    def _question(self, relation: str, a: int, b: int, kind: str) -> dict[str, Any]:
        question = self.rng.choice(self.templates[relation].heldout).format(a=a, b=b)
        result = run_tool(ToolCall(CALCULATOR.name, {"expression": expression_of(relation, a, b)}), [CALCULATOR])
        return {"question": question, "keys": [result], "lang": self.lang, "kind": kind}


def build_tool_chats(config: ToolChatsConfig) -> dict[str, int]:
    """Write the files into --out_dir; returns the number of rows of each."""
    makers = [ToolChats(lang, config) for lang in LANGUAGES]
    files = {name: [row for maker in makers for row in getattr(maker, name)()] for name in FILES}
    random.Random(config.seed).shuffle(files["chats"])
    for name, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(Path(config.out_dir) / f"{name}.jsonl", text)
    return {name: len(rows) for name, rows in files.items()}


FILES = ("chats", "prompts", "arithmetic", "calculator")


def main() -> None:
    config = parse(ToolChatsConfig, __doc__)
    with lock_output(config.out_dir):
        counts = build_tool_chats(config)
    print(f"{config.out_dir}: " + ", ".join(f"{count:,} {name}" for name, count in counts.items()))


if __name__ == "__main__":
    with fail_in_one_line():
        main()
