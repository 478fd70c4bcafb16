"""One shape for every preference pair: a row of whatever file -> a prompt, the better answer and the worse one.

    {"chosen": […], "rejected": […]}                               whole conversations, as messages
    {"prompt": "…" or […], "chosen": …, "rejected": …}             answers as text, as messages, or whole conversations
    {"conversations": […], "chosen": {…}, "rejected": {…}}         answers as one message each
    prompt,chosen,rejected                                         csv

The prompt is what both conversations share, message by message and never letter by letter: two answers that begin with
the same words are still two answers. Only answers are compared; what the assistant said inside the prompt is read.

    pair -> two documents of the token folder, one after the other: prompt + chosen, prompt + rejected

Read next: chats.py (the messages), pack.py (who calls `render_pairs`), ../5-dpo_train.py (who learns from it).
"""

import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any

from corpus.chats import LIST_KEYS, Message, chat_text, check_turns, is_blank, message_of, messages_from_list
from corpus.items import Item, content_key
from corpus.language import is_missing, language_of, sound_text
from corpus.pack import Document, Form, answer_bytes
from corpus.read import Path_, all_rows
from corpus.report import BadRow, DataReport, UnfitRow

SIDES = ("chosen", "rejected")
PROMPT_KEYS = ("prompt", "question", *LIST_KEYS)
EXPECTED_PAIR = "a pair row needs chosen and rejected: whole conversations, or the answers to its prompt"

Pair = tuple[list[Message], list[Message], list[Message]]  # prompt, chosen, rejected


# ---- reading ---------------------------------------------------------------------------------------------------------
def normalise_pair(row: Any) -> Pair:
    """(prompt, chosen, rejected) of a row, checked: prompt + either answer is a sound chat that ends with an answer.

    Raises UnfitRow for a sound row that compares nothing (an empty answer, two equal ones, two prompts, an answer that
    the assistant did not give), BadRow for one that cannot be used.
    """
    if not isinstance(row, dict) or not row.keys() >= set(SIDES):
        raise BadRow("none of the keys of a pair")
    chosen, rejected = (_conversation(row, side) for side in SIDES)
    shared = _common(chosen, rejected)
    answers = chosen[shared:], rejected[shared:]
    if not any(answers):
        raise UnfitRow("chosen and rejected are the same")
    if not all(answers):
        raise UnfitRow("one conversation is only the beginning of the other")
    if any(answer[0]["role"] != "assistant" for answer in answers):
        raise UnfitRow("chosen and rejected have different prompts")
    return chosen[:shared], *answers


def _common(one: list[Any], other: list[Any]) -> int:
    """How many entries both begin with."""
    return sum(1 for _ in itertools.takewhile(lambda two: two[0] == two[1], zip(one, other, strict=False)))


def _conversation(row: dict[str, Any], side: str) -> list[Message]:
    """The whole conversation of one side."""
    answer, prompt = row[side], next((row[key] for key in PROMPT_KEYS if not is_missing(row.get(key))), None)
    if isinstance(answer, dict):
        answer = [answer]
    if is_blank(answer) or answer == [] or (isinstance(answer, list) and is_blank(message_of(answer[-1])["content"])):
        raise UnfitRow(f"an empty answer ({side})")
    before = _as_messages(prompt, "user") if prompt is not None else []
    messages = messages_from_list(answer) if prompt is None else _as_messages(answer, "assistant")
    if messages and messages[-1]["role"] != "assistant":
        raise UnfitRow("an answer that is not the assistant's")
    if messages and messages[0]["role"] == "assistant":
        messages = before + messages
    elif before and not any(messages[i : i + len(before)] == before for i in range(len(messages))):
        raise UnfitRow("chosen and rejected have different prompts")
    system = row.get("system")
    if not is_blank(system) and (not messages or messages[0]["role"] != "system"):
        messages.insert(0, {"role": "system", "content": sound_text(system, "system")})
    check_turns(messages)
    return messages


def _as_messages(value: Any, role: str) -> list[Message]:
    """Messages as they are, or text as the one message of this role."""
    if isinstance(value, str):
        return [{"role": role, "content": sound_text(value, role + " message")}]
    return messages_from_list(value)


def pair_items(paths: Iterable[Path_], report: DataReport) -> Iterator[Item]:
    """All pairs of the files, without exact duplicates; what compares nothing is dropped and counted.

    The first question decides the side, as for chats: what SFT held out is held out here as well.
    """
    seen: set[int] = set()
    for file, line, row in all_rows(paths, report, EXPECTED_PAIR):
        try:
            prompt, *answers = normalise_pair(row)
        except UnfitRow as reason:
            report.good_row(file)
            report.drop(str(reason), file, line)
            continue
        except BadRow as reason:
            report.bad_row(str(reason), file, line)
            continue
        report.good_row(file)
        identity = content_key(json.dumps([prompt, *answers], ensure_ascii=False))
        if identity in seen:
            report.drop("exact duplicate", file, line)
            continue
        seen.add(identity)
        text = chat_text([*prompt, *itertools.chain(*answers)])
        question = next(message["content"] for message in prompt if message["role"] == "user")
        place = (file, line)
        yield Item(text, prompt, language_of(text), content_key(question), *place, tuple(answers), identity)


# ---- tokens ----------------------------------------------------------------------------------------------------------
def render_pairs(items: list[Item], tokenizer: Any, max_seq_len: int, report: DataReport) -> list[list[Document]]:
    """Of each pair the documents of chosen and rejected, both with the same prompt; none when the longer one does not
    fit, or when the tokenizer's chat format cannot write one of them.

    A prompt that is too long loses its oldest whole turns, for both answers alike; an answer is never cut.
    """
    whole = _render_answers([(item.messages, item.answers) for item in items], tokenizer)
    return [_fit(item, documents, tokenizer, max_seq_len, report) for item, documents in zip(items, whole, strict=True)]


def _fit(
    item: Item, documents: list[Document] | str, tokenizer: Any, max_seq_len: int, report: DataReport
) -> list[Document]:
    """`documents` are those of the whole pair, or why there are none."""
    prompt, longest = item.messages, 0
    while not isinstance(documents, str) and (longest := max(len(ids) for ids, _, _ in documents)) > max_seq_len:
        first = int(prompt[0]["role"] == "system")
        next_question = next((i for i in range(first + 1, len(prompt)) if prompt[i]["role"] == "user"), None)
        if next_question is None:
            report.drop(f"question and longer answer exceed {max_seq_len} tokens", item.file, item.line)
            return []
        prompt = prompt[:first] + prompt[next_question:]
        (documents,) = _render_answers([(prompt, item.answers)], tokenizer)
    if isinstance(documents, str):
        report.drop(documents, item.file, item.line)
        return []
    if len(prompt) < len(item.messages):
        report.shorten(f"without the oldest turns of its prompt, to fit {max_seq_len} tokens", item.file, item.line)
    tokens, trained = (sum(count) for count in zip(*((len(ids), sum(mask)) for ids, mask, _ in documents), strict=True))
    text = "".join(chat_text([*prompt, *answer]) for answer in item.answers)  # what these tokens say: the prompt twice
    report.keep(item.language, len(text), tokens, len(text.encode()), trained, longest)
    return documents


def _render_answers(
    pairs: list[tuple[list[Message], tuple[list[Message], ...]]], tokenizer: Any
) -> list[list[Document] | str]:
    """Each prompt with each of its answers; the masks hold these alone, without what the assistant said before. Of a
    pair that the chat format cannot write the reason."""
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
            start = _common(ids, question.samples[-1].ids)
            documents.append((ids, [0] * start + mask[start:], answer_bytes(answer)))
        result.append(documents)
    return result


PAIRS = Form("pairs", "dpo", ("prompt", *SIDES), pair_items, render_pairs)
