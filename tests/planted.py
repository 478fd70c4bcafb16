"""Generated Chinese documents with planted near-duplicates, as many as one likes: what deduplication is measured on.

    python -m tests.planted 1000000 0.2 FILE     a million rows, a fifth of them copies; {"text", "id", "copy_of"}

Words of one to four characters with Zipf's frequencies make sentences, sentences make documents of about 500
characters. A copy of an earlier document has one of: 0.5 to 2 % of its characters replaced; a sentence less; a sentence
more; two sentences exchanged; other punctuation and line ends; a line of a web page before and after it.
"""

import itertools
import json
import random
import sys
from collections.abc import Iterator

KINDS = ("edits", "less", "more", "exchange", "layout", "frame")


class Maker:
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
        chosen, text = list(document), "".join(document)
        if kind == "edits":
            letters = list(text)
            for place in self.random.sample(range(len(text)), int(len(text) * self.random.uniform(0.005, 0.02))):
                letters[place] = self.random.choice(self.characters)
            return "".join(letters)
        if kind == "less":
            chosen.pop(self.random.randrange(len(chosen)))
        elif kind == "more":
            chosen.insert(self.random.randrange(len(chosen)), self.random.choice(self.pool))
        elif kind == "exchange":
            one, other = self.random.sample(range(len(chosen)), 2)
            chosen[one], chosen[other] = chosen[other], chosen[one]
        elif kind == "layout":
            return text.replace("。", "！\n\n")
        elif kind == "frame":
            return f"首页 > 新闻\n{text}\n阅读 {self.random.randrange(9999)} 次"
        return "".join(chosen)


def rows(count: int, share: float, seed: int = 0) -> Iterator[dict]:
    """`count` rows of which `share` are copies of one of the last 5,000 originals."""
    maker = Maker(seed)
    recent: list[tuple[int, list[str]]] = []
    for i in range(count):
        if recent and maker.random.random() < share:
            of, document = maker.random.choice(recent)
            yield {"text": maker.copy(document, KINDS[i % len(KINDS)]), "id": i, "copy_of": of, "kind": KINDS[i % 6]}
            continue
        document = maker.document()
        if len(recent) < 5000:
            recent.append((i, document))
        else:
            recent[i % 5000] = (i, document)
        yield {"text": "".join(document), "id": i, "copy_of": None}


if __name__ == "__main__":
    with open(sys.argv[3], "w", encoding="utf-8") as file:  # noqa: PTH123
        for row in rows(int(sys.argv[1]), float(sys.argv[2])):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
