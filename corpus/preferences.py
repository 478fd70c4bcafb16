"""Pairs of answers for DPO: reads them and removes duplicates.

Read next: row_text.py (row -> pair), render_pairs.py (pair -> tokens), ../5-dpo_train.py (trains on them).
"""

import json
from collections.abc import Iterable, Iterator

from corpus.examples import Example, question_hash, text_hash
from corpus.language import detect_language
from corpus.prepare_chats import DataTask
from corpus.readers import PathLike, read_contents
from corpus.row_text import DEFAULT_READER, RowReader
from corpus.stats import DataStats
from corpus.tokenize_chats import PAIR_TOKENS


def read_pair_examples(
    paths: Iterable[PathLike], report: DataStats, reader: RowReader = DEFAULT_READER
) -> Iterator[Example]:
    """Yield the pairs of the files without exact duplicates; pairs with equal answers are dropped and counted.

    As for chats, the first question determines the split: a question held out by SFT is held out here as well.
    """
    seen: set[int] = set()
    for file, line, _, content in read_contents(paths, report, "pair", reader.read_pair):
        prompt, answers = content.messages, content.answers
        content_hash = text_hash(json.dumps([prompt, *answers], ensure_ascii=False))
        if content_hash in seen:
            report.row_dropped("exact duplicate", file, line)
            continue
        seen.add(content_hash)
        report.row_changed(content.changes, content.unused, file, line)
        yield Example(
            content.text,
            prompt,
            detect_language(content.text),
            question_hash(prompt),
            file,
            line,
            answers,
            content_hash,
        )


PAIR_TASK = DataTask(PAIR_TOKENS, read_pair_examples)
