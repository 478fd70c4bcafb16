"""Pairs of answers -> DPO data: without duplicates, rendered with the same prompt for both answers.

    pair -> two documents of the token folder, one after the other: prompt + chosen, prompt + rejected

Only the two answers are trained; earlier answers inside the prompt are context.

Read next: row_text.py (row -> pair), prepare_chats.py (calls `render_pairs`), ../5-dpo_train.py (trains on it).
"""

import bisect
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any

from corpus.chats import Message, chat_text
from corpus.examples import Item, content_key, question_key
from corpus.language import language_of
from corpus.pair_answers import SIDES, common_length
from corpus.prepare_chats import Form
from corpus.readers import Path_, taken_rows
from corpus.render_chats import LONGEST_TOKEN, Document, answer_bytes
from corpus.row_text import READER, RowReader
from corpus.stats import DataReport


def pair_items(paths: Iterable[Path_], report: DataReport, reader: RowReader = READER) -> Iterator[Item]:
    """All pairs of the files, without exact duplicates; pairs whose answers do not differ are dropped and counted.

    The first question decides the split, as for chats: what SFT held out is held out here as well.
    """
    seen: set[int] = set()
    for file, line, _, content in taken_rows(paths, report, "pair", reader.pair):
        prompt, answers = content.messages, content.answers
        identity = content_key(json.dumps([prompt, *answers], ensure_ascii=False))
        if identity in seen:
            report.drop("exact duplicate", file, line)
            continue
        seen.add(identity)
        report.note_row(content.changes, content.unused, file, line)
        yield Item(content.text, prompt, language_of(content.text), question_key(prompt), file, line, answers, identity)


# ---- tokens ----------------------------------------------------------------------------------------------------------
def render_pairs(items: list[Item], tokenizer: Any, max_seq_len: int, report: DataReport) -> list[list[Document]]:
    """Of each pair the documents of chosen and rejected, both with the same prompt; none when the longer one does not
    fit, or when the tokenizer's chat format cannot write one of them.

    A prompt that is too long loses its oldest whole turns, for both answers alike; an answer is never cut.
    """
    prompts = [_last_turns(item, max_seq_len) for item in items]
    whole = iter(_render_answers([(p, item.answers) for p, item in zip(prompts, items, strict=True) if p], tokenizer))
    result = []
    for item, prompt in zip(items, prompts, strict=True):
        if not prompt:
            report.drop(f"question and longer answer exceed {max_seq_len} tokens", item.file, item.line)
        result.append(_fit(item, next(whole), tokenizer, max_seq_len, report) if prompt else [])
    return result


def _fit(
    item: Item, documents: list[Document] | str, tokenizer: Any, max_seq_len: int, report: DataReport
) -> list[Document]:
    """`documents` are those of the whole pair, or why there are none."""
    prompt = _last_turns(item, max_seq_len)
    if not isinstance(documents, str) and _longest(documents) > max_seq_len:
        first = int(prompt[0]["role"] == "system")
        starts = [i for i in range(first + 1, len(prompt)) if prompt[i]["role"] == "user"]

        def fits(start: int) -> bool:
            (rendered,) = _render_answers([(prompt[:first] + prompt[start:], item.answers)], tokenizer)
            return isinstance(rendered, str) or _longest(rendered) <= max_seq_len

        # The fewer turns, the shorter: halving finds the longest prompt that fits in log2(turns) renderings.
        longest = bisect.bisect_left(starts, True, key=fits)
        if longest == len(starts):
            report.drop(f"question and longer answer exceed {max_seq_len} tokens", item.file, item.line)
            return []
        prompt = prompt[:first] + prompt[starts[longest] :]
        (documents,) = _render_answers([(prompt, item.answers)], tokenizer)
    if isinstance(documents, str):
        report.drop(documents, item.file, item.line)
        return []
    if len(prompt) < len(item.messages):
        report.shorten(f"without the oldest turns of its prompt, to fit {max_seq_len} tokens", item.file, item.line)
    tokens, trained = (sum(count) for count in zip(*((len(ids), sum(mask)) for ids, mask, _ in documents), strict=True))
    text = "".join(chat_text([*prompt, *answer]) for answer in item.answers)  # what these tokens say: the prompt twice
    report.keep(item.language, len(text), tokens, len(text.encode()), trained, _longest(documents))
    return documents


def _last_turns(item: Item, max_seq_len: int) -> list[Message]:
    """The prompt without oldest turns that cannot fit with any tokenizer; empty where no question can.

    Every message takes a token or more, and a token stands for LONGEST_TOKEN characters or less.
    """
    prompt, first = item.messages, int(item.messages[0]["role"] == "system")
    lengths = [len(turn["content"]) for turn in prompt]
    room = LONGEST_TOKEN * max_seq_len - max(sum(len(turn["content"]) for turn in answer) for answer in item.answers)
    if len(prompt) - first <= max_seq_len and sum(lengths) <= room:
        return prompt
    ends = itertools.accumulate(reversed(lengths[first:]), initial=sum(lengths[:first]))
    fitting = sum(1 for _ in itertools.takewhile(lambda end: end <= room, ends)) - 1
    earliest = len(prompt) - min(fitting, max_seq_len)
    start = next((i for i in range(max(first, earliest), len(prompt)) if prompt[i]["role"] == "user"), None)
    return [] if start is None else prompt[:first] + prompt[start:]


def _longest(documents: list[Document]) -> int:
    """Tokens of the longer document."""
    return max(len(ids) for ids, _, _ in documents)


def _render_answers(
    pairs: list[tuple[list[Message], tuple[list[Message], ...]]], tokenizer: Any
) -> list[list[Document] | str]:
    """Each prompt with each of its answers; the masks are 1 at these alone, not at earlier answers. For a pair that
    the chat format cannot write, the reason."""
    asked = tokenizer.render_each([prompt for prompt, _ in pairs], add_generation_prompt=True)
    rendered = iter(tokenizer.render_each([[*prompt, *answer] for prompt, answers in pairs for answer in answers]))
    result: list[list[Document] | str] = []
    for (_, answers), question in zip(pairs, asked, strict=True):
        whole = [next(rendered) for _ in answers]
        if refusal := next((one.refusal for one in (question, *whole) if one.refusal), ""):
            result.append(refusal)
            continue
        documents = []
        for answer, one in zip(answers, whole, strict=True):
            ids, mask, _ = one.samples[-1]
            # Where they part, the answer begins; a token may hold the prompt's end and the answer's beginning.
            start = common_length(ids, question.samples[-1].ids)
            documents.append((ids, [0] * start + mask[start:], answer_bytes(answer)))
        result.append(documents)
    return result


PAIRS = Form("pairs", "dpo", ("prompt", *SIDES), pair_items, render_pairs)
