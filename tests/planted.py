"""Generates Chinese documents with planted near-duplicates, for tests and measurements of deduplication.

    python -m tests.planted 1000000 0.2 FILE     one million rows {"text", "id", "copy_of"}, 20 % of them copies

Sentences are sampled from words of one to four characters with Zipf's frequencies; documents have about 500 characters.
A copy of an earlier document has one change (COPY_KINDS): 0.5 to 2 % of its characters replaced, a sentence removed, a
sentence inserted, two sentences exchanged, other punctuation and line ends, or a line of a web page before and after.
"""

import itertools
import json
import random
import sys
from collections.abc import Iterator

COPY_KINDS = ("edits", "less", "more", "exchange", "layout", "frame")


class DocumentGenerator:
    def __init__(self, seed: int = 0, sentences: int = 60_000) -> None:
        self.random = random.Random(seed)
        characters = [chr(code) for code in range(0x4E00, 0x4E00 + 3000)]
        choose = self.random.choices
        words = ["".join(choose(characters, k=choose((1, 2, 3, 4), (2, 6, 1, 1))[0])) for _ in range(20_000)]
        weights = list(itertools.accumulate(1 / (rank + 10) for rank in range(len(words))))
        self.characters = characters
        self.pool = [
            "".join(choose(words, cum_weights=weights, k=self.random.randint(12, 28))) + "。" for _ in range(sentences)
        ]

    def document(self) -> list[str]:
        return self.random.choices(self.pool, k=self.random.randint(9, 15))

    def copy(self, document: list[str], kind: str) -> str:
        sentences_of_copy, text = list(document), "".join(document)
        if kind == "edits":
            letters = list(text)
            for position in self.random.sample(range(len(text)), int(len(text) * self.random.uniform(0.005, 0.02))):
                letters[position] = self.random.choice(self.characters)
            return "".join(letters)
        if kind == "less":
            sentences_of_copy.pop(self.random.randrange(len(sentences_of_copy)))
        elif kind == "more":
            sentences_of_copy.insert(self.random.randrange(len(sentences_of_copy)), self.random.choice(self.pool))
        elif kind == "exchange":
            one, other = self.random.sample(range(len(sentences_of_copy)), 2)
            sentences_of_copy[one], sentences_of_copy[other] = sentences_of_copy[other], sentences_of_copy[one]
        elif kind == "layout":
            return text.replace("。", "！\n\n")
        elif kind == "frame":
            return f"首页 > 新闻\n{text}\n阅读 {self.random.randrange(9999)} 次"
        return "".join(sentences_of_copy)


def planted_rows(count: int, copy_fraction: float, seed: int = 0) -> Iterator[dict]:
    """Yield `count` rows; the fraction `copy_fraction` are copies of one of the last 5,000 originals."""
    generator = DocumentGenerator(seed)
    recent: list[tuple[int, list[str]]] = []
    for i in range(count):
        if recent and generator.random.random() < copy_fraction:
            source_id, document = generator.random.choice(recent)
            yield {
                "text": generator.copy(document, COPY_KINDS[i % len(COPY_KINDS)]),
                "id": i,
                "copy_of": source_id,
                "kind": COPY_KINDS[i % 6],
            }
            continue
        document = generator.document()
        if len(recent) < 5000:
            recent.append((i, document))
        else:
            recent[i % 5000] = (i, document)
        yield {"text": "".join(document), "id": i, "copy_of": None}


if __name__ == "__main__":
    with open(sys.argv[3], "w", encoding="utf-8") as file:  # noqa: PTH123
        for row in planted_rows(int(sys.argv[1]), float(sys.argv[2])):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
