"""Putting multiple-choice questions to a model: what it reads, and how probable it finds each option.

    letter   log p(letter | question, the options)                      one token behind the prompt, a number for each
    text     log p(text of the option | question) / its characters      the options are not shown

`letter` is how C-Eval, MMLU and minimind v1 ask; a small model often has no idea what a letter stands for. `text` asks
for what it might really have learnt, an answer in words. The largest of them is the model's answer; nothing is
drawn. A chat model gets question and examples as turns of a conversation, any other as plain text.

Several orders of the options: the rotations, four of four options, put each option once under each letter.

Called by ../eval_ceval.py. Read next: exam_logprobs.py (how the log-probabilities are computed), exam_data.py.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

from common.errors import UserError
from evaluation.exam_data import Exam, Item
from evaluation.exam_table import OPTION_LETTERS
from model.tokenizer import ChatTokenizer

METHODS = ("letter", "text")
ANSWER = {"zh": "答案：", "en": "Answer:"}
INSTRUCTION = {"zh": "请直接回答选项的字母。", "en": "Answer with the letter of the right option."}
CHINESE = re.compile("[\u4e00-\u9fff]")

Order = tuple[int, ...]  # the option that stands under A, under B, …


@dataclass(frozen=True)
class Asking:
    """How questions are put. `chat`: as a conversation in the tokenizer's chat format."""

    method: str = "letter"
    shots: int = 0
    orders: int = 1
    chat: bool = False

    @property
    def name(self) -> str:
        """letter_0shot, text_5shot, letter_0shot_4orders: part of the results' folder name."""
        return f"{self.method}_{self.shots}shot" + (f"_{self.orders}orders" if self.orders > 1 else "")


@dataclass
class Asked:
    """One question in one order, as the model gets it, and what came of it."""

    item: Item
    order: Order
    prompt: list[int]
    options: list[list[int]]  # the tokens behind the prompt, of each option as it is shown
    examples: int  # those of the shots that fitted
    cut: bool  # the prompt lost its beginning
    log_probs: tuple[float, ...] = ()  # one for each option, as the file letters them

    @property
    def rest(self) -> int:
        """Tokens of the longest option behind its first, which the prompt alone predicts."""
        return max(map(len, self.options)) - 1


def option_orders(count: int, options: int = 4) -> list[Order]:
    """The first `count` orders of so many options, or all of them. Among the first `options` orders every option is
    once under every letter."""
    found: list[Order] = []
    for rest in itertools.permutations(range(1, options)):
        base = (0, *rest)
        found += [(*base[turn:], *base[:turn]) for turn in range(options)]
        if len(found) >= count:
            break
    return found[:count]


def ask(exam: Exam, tokenizer: ChatTokenizer, asking: Asking, max_seq_len: int) -> Iterator[Asked]:
    """Every question of the exam in every order, for exam_answers.answer. Raises UserError where one cannot fit."""
    for subject in exam.subjects:
        if len(exam.examples.get(subject, ())) < asking.shots:
            there = len(exam.examples.get(subject, ()))
            raise UserError(f"--shots {asking.shots}: {subject} has {there} examples in dev; ask with fewer")
    for subject in exam.subjects:
        items = [item for item in exam.items if item.subject == subject]
        # One language for the whole subject: a question made of formulas is still part of a Chinese exam.
        chinese = sum(bool(CHINESE.search(item.question)) for item in items)
        lang = "zh" if 2 * chinese >= len(items) else "en"
        prompt = _Prompt(tokenizer, asking, exam.examples.get(subject, [])[: asking.shots], lang)
        for item in items:
            for order in option_orders(asking.orders, len(item.options)):
                yield prompt.of(item, order, max_seq_len)


class _Prompt:
    """Builds prompts behind the examples of one subject."""

    def __init__(self, tokenizer: ChatTokenizer, asking: Asking, examples: list[Item], lang: str) -> None:
        self.tokenizer, self.asking, self.examples, self.lang = tokenizer, asking, examples, lang

    def of(self, item: Item, order: Order, max_seq_len: int) -> Asked:
        """The prompt in at most as many tokens as leave room for the longest option: examples go first, oldest
        first, then the beginning of the question."""
        shown = [item.options[i] for i in order]
        texts = list(OPTION_LETTERS[: len(shown)]) if self.asking.method == "letter" else shown
        question = self._question(item, shown)
        for first in range(len(self.examples) + 1):
            examples = self.examples[first:]
            prompt, options = self._encode(examples, question, texts)
            room = max_seq_len + 1 - max(map(len, options))
            if len(prompt) <= room:
                return Asked(item, order, prompt, options, len(examples), False)
        if not self.asking.chat and room > 1:
            start = len(self.tokenizer.encode_start("")) if prompt else 0  # a bos stays
            return Asked(item, order, prompt[:start] + prompt[len(prompt) - room + start :], options, 0, True)
        while room > 0 and question and len(prompt) > room:
            question = self._without_start(question, len(prompt) - room)
            prompt, options = self._encode([], question, texts)
        if not question or room <= 0:
            raise UserError(f"{item.where}: the options do not fit into the model's {max_seq_len} tokens")
        return Asked(item, order, prompt, options, 0, True)

    def _question(self, item: Item, shown: list[str]) -> str:
        if self.asking.method == "text":
            return item.question
        lines = [item.question, *(f"{letter}. {text}" for letter, text in zip(OPTION_LETTERS, shown, strict=False))]
        return "\n".join(lines + ([INSTRUCTION[self.lang]] if self.asking.chat else []))

    def _encode(self, examples: list[Item], question: str, texts: list[str]) -> tuple[list[int], list[list[int]]]:
        """Tokens of the prompt, and of each option behind it."""
        asked = [(self._question(item, list(item.options)), self._answer(item)) for item in examples]
        if self.asking.chat:
            messages = []
            for text, reply in asked:
                messages += [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]
            messages.append({"role": "user", "content": question})
            prompt, _ = self.tokenizer.render(messages, add_generation_prompt=True)
            return prompt, [self.tokenizer.encode(text) for text in texts]
        gap = "" if self.lang == "zh" else " "  # Answer: A
        blocks = [f"{text}\n{ANSWER[self.lang]}{gap}{answer}\n\n" for text, answer in asked]
        start = "".join(blocks) + f"{question}\n{ANSWER[self.lang]}"
        prompt = self.tokenizer.encode_start(start)
        # An option's tokens are what it adds: behind a colon a letter may be another token than at the start of a text.
        return prompt, [
            self.tokenizer.encode_start(start + gap + text)[len(prompt) :] or self.tokenizer.encode(gap + text)
            for text in texts
        ]

    def _answer(self, example: Item) -> str:
        letter = example.answer
        return letter if self.asking.method == "letter" else example.options[OPTION_LETTERS.index(letter)]

    def _without_start(self, text: str, tokens: int) -> str:
        """The text without its first tokens; half a character that this leaves goes too."""
        return self.tokenizer.decode(self.tokenizer.encode(text)[tokens:]).lstrip("\ufffd")
