"""Prompts for multiple-choice questions, with two scoring methods.

    letter   log p(letter | question, options)                        one token after the prompt
    text     log p(text of the option | question) / its characters    the prompt does not list the options

The option with the largest score is the prediction; nothing is sampled. `letter` is the method of C-Eval, MMLU and
minimind v1, but small models often have not learned to refer to an option by its letter. `text` does not need that.
A chat model gets question and examples as turns of a conversation, a pretrained model as plain text.

With several orders of the options, the rotations come first: n of n options put each option once under each letter.

Called by ../eval_ceval.py. Read next: exam_logprobs.py (how the log-probabilities are computed), exam_data.py.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

from common.errors import UserError
from evaluation.exam_data import ExamItem, ExamSplit
from evaluation.exam_table import OPTION_LETTERS
from model.tokenizer import ChatTokenizer

ANSWER_PREFIX = {"zh": "答案：", "en": "Answer:"}
INSTRUCTION = {"zh": "请直接回答选项的字母。", "en": "Answer with the letter of the right option."}
CHINESE_CHARACTER = re.compile("[\u4e00-\u9fff]")

OptionOrder = tuple[int, ...]  # the index of the option under A, under B, …


@dataclass(frozen=True)
class PromptConfig:
    """Scoring method, number of examples, number of option orders. `is_chat`: use the tokenizer's chat format."""

    method: str = "letter"
    shots: int = 0
    orders: int = 1
    is_chat: bool = False

    @property
    def name(self) -> str:
        """letter_0shot, text_5shot, letter_0shot_4orders: part of the name of the results folder."""
        return f"{self.method}_{self.shots}shot" + (f"_{self.orders}orders" if self.orders > 1 else "")


@dataclass
class ExamPrompt:
    """One question with one order of its options: tokens and, after scoring, log-probabilities."""

    item: ExamItem
    order: OptionOrder
    prompt: list[int]
    options: list[list[int]]  # the tokens of each option after the prompt, in the order of the prompt
    num_shots: int  # examples that fit into the context
    is_truncated: bool  # the beginning of the question was removed
    log_probs: tuple[float, ...] = ()  # one for each option, in the order of the file

    @property
    def continuation_length(self) -> int:
        """Tokens of the longest option after its first token, which the last prompt token predicts."""
        return max(map(len, self.options)) - 1


def option_orders(count: int, options: int = 4) -> list[OptionOrder]:
    """The first `count` orders of `options` options, or all orders.

    The first `options` orders put every option once under every letter.
    """
    orders: list[OptionOrder] = []
    for others in itertools.permutations(range(1, options)):
        base = (0, *others)
        orders += [(*base[shift:], *base[:shift]) for shift in range(options)]
        if len(orders) >= count:
            break
    return orders[:count]


def build_prompts(
    exam: ExamSplit, tokenizer: ChatTokenizer, config: PromptConfig, max_seq_len: int
) -> Iterator[ExamPrompt]:
    """Yields every question in every order. Raises UserError for missing examples, and for options that do not fit."""
    for subject in exam.subjects:
        if (available := len(exam.examples.get(subject, ()))) < config.shots:
            raise UserError(f"--shots {config.shots}: {subject} has {available} examples in dev: choose no more")
    for subject in exam.subjects:
        items = [item for item in exam.items if item.subject == subject]
        # The language is that of the subject: a question of formulas alone may be part of a Chinese exam.
        chinese = sum(bool(CHINESE_CHARACTER.search(item.question)) for item in items)
        lang = "zh" if 2 * chinese >= len(items) else "en"
        builder = _PromptBuilder(tokenizer, config, exam.examples.get(subject, [])[: config.shots], lang)
        for item in items:
            for order in option_orders(config.orders, len(item.options)):
                yield builder.build(item, order, max_seq_len)


class _PromptBuilder:
    """Builds the prompts of one subject with its examples."""

    def __init__(self, tokenizer: ChatTokenizer, config: PromptConfig, examples: list[ExamItem], lang: str) -> None:
        self.tokenizer, self.config, self.examples, self.lang = tokenizer, config, examples, lang

    def build(self, item: ExamItem, order: OptionOrder, max_seq_len: int) -> ExamPrompt:
        """A prompt that fits into max_seq_len with the longest option. Removes first the earliest examples, then the
        beginning of the question. Raises UserError where the options do not fit."""
        shown = [item.options[i] for i in order]
        texts = list(OPTION_LETTERS[: len(shown)]) if self.config.method == "letter" else shown
        question = self._question_text(item, shown)
        for first in range(len(self.examples) + 1):
            examples = self.examples[first:]
            prompt, options = self._encode(examples, question, texts)
            max_prompt_tokens = max_seq_len + 1 - max(map(len, options))
            if len(prompt) <= max_prompt_tokens:
                return ExamPrompt(item, order, prompt, options, len(examples), False)
        if not self.config.is_chat and max_prompt_tokens > 1:
            start = len(self.tokenizer.encode_document("")) if prompt else 0  # keep the bos token
            prompt = prompt[:start] + prompt[len(prompt) - max_prompt_tokens + start :]
            return ExamPrompt(item, order, prompt, options, 0, True)
        while max_prompt_tokens > 0 and question and len(prompt) > max_prompt_tokens:
            kept = self.tokenizer.encode(question)[len(prompt) - max_prompt_tokens :]
            question = self.tokenizer.decode(kept).lstrip("\ufffd")  # an incomplete character at the cut
            prompt, options = self._encode([], question, texts)
        if not question or max_prompt_tokens <= 0:
            raise UserError(f"{item.location}: the options do not fit into the model's {max_seq_len} tokens")
        return ExamPrompt(item, order, prompt, options, 0, True)

    def _question_text(self, item: ExamItem, shown: list[str]) -> str:
        if self.config.method == "text":
            return item.question
        lines = [item.question, *(f"{letter}. {text}" for letter, text in zip(OPTION_LETTERS, shown, strict=False))]
        return "\n".join(lines + ([INSTRUCTION[self.lang]] if self.config.is_chat else []))

    def _encode(self, examples: list[ExamItem], question: str, texts: list[str]) -> tuple[list[int], list[list[int]]]:
        """Tokens of the prompt, and of each option after it."""
        shots = [(self._question_text(item, list(item.options)), self._answer_text(item)) for item in examples]
        if self.config.is_chat:
            messages = []
            for text, reply in shots:
                messages += [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]
            messages.append({"role": "user", "content": question})
            prompt, _ = self.tokenizer.render(messages, add_generation_prompt=True)
            return prompt, [self.tokenizer.encode(text) for text in texts]
        separator = "" if self.lang == "zh" else " "  # Answer: A
        blocks = [f"{text}\n{ANSWER_PREFIX[self.lang]}{separator}{answer}\n\n" for text, answer in shots]
        start = "".join(blocks) + f"{question}\n{ANSWER_PREFIX[self.lang]}"
        prompt = self.tokenizer.encode_document(start)
        # Encoded with the prompt: after a colon a letter may be another token than at the start of a text.
        encode = lambda text: self.tokenizer.encode_document(start + text)[len(prompt) :] or self.tokenizer.encode(text)
        return prompt, [encode(separator + text) for text in texts]

    def _answer_text(self, example: ExamItem) -> str:
        letter = example.answer
        return letter if self.config.method == "letter" else example.options[OPTION_LETTERS.index(letter)]
