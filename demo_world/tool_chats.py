"""Chats with a calculator and with thoughts, prompts for reinforcement learning, and held-out questions.

    chats.jsonl         {"messages", "lang"}              a calculator is offered: question -> call -> result -> answer;
                                                          sums of three terms with a thought; ordinary chats and
                                                          those about the new identity again (replay)
    prompts.jsonl       {"question", "answer", "lang"}    sums of three terms that chats.jsonl does not contain, and
                                                          questions about the world, which keep its answers rewarded
    arithmetic.jsonl    {"question", "keys", ...}         sums of neither file, asked with held-out templates
    calculator.jsonl    {"question", "keys", ...}         sums, differences and products of large numbers, the same way

    thought     8+7+15:  8+7=15, 15+15=30                 two sums that the world's texts contain
    call        {"name": "calculator", "arguments": {"expression": "481+62"}}

Each set of three terms belongs to one file, in any order. The large numbers of calculator.jsonl occur in no other
file. Results come from evaluation/tools.py, as when a model calls the tool.

    python -m demo_world.tool_chats --out_dir out/demo/tool_world --seed 0      (../demo.py --rl does this)

Read next: ../evaluation/tools.py (the calculator), ../6-grpo_train.py (trains on the prompts).
"""

import json
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.cli import Config, flag, parse
from common.errors import fail_in_one_line
from common.files import write_text
from common.flag_types import int_between, path_string, positive_int, seed
from common.locks import lock_output
from corpus.language import LANGUAGES
from demo_world.facts import LARGEST_TERM
from demo_world.finetune import identity_chats
from demo_world.generator import CALCULATOR, as_row
from demo_world.grammar import fill, read_questions
from demo_world.world import DemoWorld
from evaluation.tools import run_tool
from model.answer_parts import ToolCall
from model.chat_template import Message
from trainer.reward_text import agrees

OFFER: Message = {"role": "system", "content": "", "tools": [CALCULATOR.schema]}
OPERATORS = {"sum": "+", "difference": "-", "product": "*"}
LARGE = range(100, 1000)  # numbers of the calculator
HELDOUT_NUMBERS = 0.2  # fraction of these numbers
TURNS = 5  # questions of a chat with a calculator: its schema is the longest part
SFT_SHARE = 0.65  # fraction of the wordings of a sum that SFT answers with a thought; the prompts have all of them
PLAIN_SHARE = 0.2  # of these questions: about the world, answered without a call

FILES = ("chats", "prompts", "arithmetic", "calculator")
Terms = tuple[int, ...]


@dataclass(frozen=True)
class ToolChatsConfig(Config):
    """Size and seed of the files; the numbers are per language."""

    out_dir: str = flag("out/demo/tool_world", "folder to write", type=path_string)
    seed: int = flag(0, "random seed of every choice", type=seed)
    tool_chats: int = flag(900, "chats in which a calculator is offered", type=positive_int)
    sums: int = flag(150, "sums of three terms in the chats", type=int_between(1, 400))
    replay: int = flag(1300, "chats of the earlier stages", type=positive_int)
    wordings: int = flag(2, "chats, or prompts of reinforcement learning, for each sum", type=positive_int)
    questions: int = flag(150, "held-out questions of each kind", type=int_between(1, 300))


def split_terms(seed: int, sums: int, questions: int) -> dict[str, list[Terms]]:
    """Three terms a, b, c by file: at most 10, 10 and 20, so that the world has a + b and (a + b) + c.

    Both languages have the same ones, in any order of a and b.
    """
    terms: list[Terms] = [(a, b, c) for a in range(1, 11) for b in range(a, 11) for c in range(b, LARGEST_TERM + 1)]
    rng = random.Random(f"{seed} three terms")
    rng.shuffle(terms)
    terms = [rng.choice([(a, b, c), (b, a, c)]) for a, b, c in terms]
    end = questions + sums
    return {"arithmetic": terms[:questions], "chats": terms[questions:end], "prompts": terms[end:]}


def split_numbers(seed: int) -> dict[bool, list[int]]:
    """The large numbers of calculator.jsonl (True) and of the chats (False)."""
    heldout = {n: random.Random(f"{seed} {n}").random() < HELDOUT_NUMBERS for n in LARGE}
    return {split: [n for n in LARGE if heldout[n] == split] for split in (True, False)}


def thought_of(a: int, b: int, c: int) -> str:
    return f"{a}+{b}={a + b}, {a + b}+{c}={a + b + c}"


def call_of(relation: str, a: int, b: int) -> tuple[ToolCall, str]:
    """The call of the calculator and its result."""
    call = ToolCall(CALCULATOR.name, {"expression": f"{a}{OPERATORS[relation]}{b}"})
    return call, run_tool(call, [CALCULATOR])


class ToolChats:
    """The chats, prompts and questions of one language."""

    def __init__(self, lang: str, config: ToolChatsConfig) -> None:
        self.lang, self.config = lang, config
        self.world = DemoWorld(lang, config.seed)
        self.rng = random.Random(f"{config.seed} {lang} tools")
        self.templates = read_questions("arithmetic", lang)
        self.world_turns = [found for found in self.world.turns(1) if found[0].relation != "me"]
        self.numbers = split_numbers(config.seed)
        self.terms = split_terms(config.seed, config.sums, config.questions)

    def ask(self, relation: str, *terms: int, share: float = 1.0) -> str:
        """A question with one of the first training templates, in a wrapper. share: fraction of the templates."""
        asks = self.templates[relation].ask
        question = self._fill(asks[: math.ceil(share * len(asks))], *terms)
        return self.rng.choice(self.world.phrases["wrappers"]).format(q=question)

    def _fill(self, templates: list[str], *terms: int, result: str = "") -> str:
        return self.rng.choice(templates).format(**dict(zip("abc", terms, strict=False)), o=result)

    def large_numbers(self, relation: str, heldout: bool) -> Terms:
        """Two numbers of the given split, for a difference the larger one first."""
        while True:
            a, b = self.rng.choices(self.numbers[heldout], k=2)
            if relation != "difference":
                return a, b
            if a > b and a != 2 * b:  # repeating the question must not score
                return a, b

    # ---- chats
    def tool_chat(self, plain: list[list[Message]]) -> list[Message]:
        """A chat of TURNS questions with a calculator; those about the world are taken from `plain`."""
        messages = [OFFER]
        for _ in range(TURNS):
            is_plain = self.rng.random() < PLAIN_SHARE
            messages += self.rng.choice(plain) if is_plain else self.calculation()
        return messages

    def calculation(self) -> list[Message]:
        """A question, the call, its result and the answer."""
        relation = self.rng.choice(list(OPERATORS))
        terms = self.large_numbers(relation, heldout=False)
        call, result = call_of(relation, *terms)
        return [
            {"role": "user", "content": self.ask(relation, *terms)},
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call._asdict()}]},
            {"role": "tool", "content": result},
            {"role": "assistant", "content": self._fill(self.templates[relation].answer, *terms, result=result)},
        ]

    def sum_chat(self, terms: Terms) -> list[Message]:
        answer = self._fill(self.templates["three_terms"].answer, *terms, result=str(sum(terms)))
        return [
            {"role": "user", "content": self.ask("three_terms", *terms, share=SFT_SHARE)},
            {"role": "assistant", "content": answer, "reasoning_content": thought_of(*terms)},
        ]

    def chats(self) -> Iterator[dict[str, Any]]:
        """Rows of chats.jsonl, by kind."""
        config = self.config
        old = [*identity_chats(self.world), *([turn] for _, _, turn in self.world_turns)]
        old += [[turn] for turn in (*self.world.recitals(), *self.world.repetitions())]  # facts that no chat asks about
        replay: list[list[Message]] = [as_row(chat, self.lang)["messages"] for chat in old]
        chats = self.rng.sample(replay, min(config.replay, len(replay)))
        plain = [
            chat for chat in replay if not re.search(r"\d", chat[0]["content"])
        ]  # offered, it computes all results
        chats += [self.tool_chat(plain) for _ in range(config.tool_chats)]
        chats += [self.sum_chat(terms) for terms in self.terms["chats"] * config.wordings]
        for messages in chats:
            yield {"messages": messages, "lang": self.lang}

    # ---- prompts and questions
    def prompts(self) -> Iterator[dict[str, Any]]:
        """Rows of prompts.jsonl."""
        for terms in self.terms["prompts"] * self.config.wordings:
            yield {"question": self.ask("three_terms", *terms), "answer": str(sum(terms)), "lang": self.lang}
        for fact, is_forward, (question, _) in self.world_turns:
            answers = self.world.templates[fact.relation].answer
            if is_forward and all(
                agrees(fill(answer, fact), fact.keys[0]) for answer in answers
            ):  # any right answer is rewarded
                yield {"question": question, "answer": fact.keys[0], "lang": self.lang}

    def arithmetic(self) -> Iterator[dict[str, Any]]:
        """Rows of arithmetic.jsonl."""
        for terms in self.terms["arithmetic"]:
            yield self._question("three_terms", terms, str(sum(terms)))

    def calculator(self) -> Iterator[dict[str, Any]]:
        """Rows of calculator.jsonl."""
        for number in range(self.config.questions):
            relation = list(OPERATORS)[number % len(OPERATORS)]
            terms = self.large_numbers(relation, heldout=True)
            yield self._question(relation, terms, call_of(relation, *terms)[1])

    def _question(self, relation: str, terms: Terms, result: str) -> dict[str, Any]:
        question = self._fill(self.templates[relation].heldout, *terms)
        return {"question": question, "keys": [result], "lang": self.lang, "kind": relation}


def build_tool_chats(config: ToolChatsConfig) -> dict[str, int]:
    """Write the files into --out_dir; returns the number of rows of each."""
    makers = [ToolChats(lang, config) for lang in LANGUAGES]
    files = {name: [row for maker in makers for row in getattr(maker, name)()] for name in FILES}
    random.Random(config.seed).shuffle(files["chats"])
    for name, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(Path(config.out_dir) / f"{name}.jsonl", text)
    return {name: len(rows) for name, rows in files.items()}


def main() -> None:
    config = parse(ToolChatsConfig, __doc__)
    with lock_output(config.out_dir):
        counts = build_tool_chats(config)
    print(f"{config.out_dir}: " + ", ".join(f"{count:,} {name}" for name, count in counts.items()))


if __name__ == "__main__":
    with fail_in_one_line():
        main()
