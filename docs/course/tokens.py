"""Exercise of chapter 1: byte-level BPE with growing vocabularies, on the texts of the demo.

    python -m docs.course.tokens

Prints the first merges and how one sentence is cut; draws characters per token by vocabulary size.
Read next: ../../corpus/tokenizer_training.py (the trainer).
"""

import json

from matplotlib.figure import Figure

from common.cli import parse
from common.errors import fail_in_one_line
from corpus.tokenizer_training import train_tokenizer
from docs.course.exercise import ExerciseConfig, save_picture
from model.tokenizer import SPARE_TOKENS, SPECIAL_TOKENS, piece_bytes

RESERVED = (*SPECIAL_TOKENS, *SPARE_TOKENS)
SIZES = (300, 400, 700, 1200, 2500, 5120)
SENTENCE = "The capital of Japan is Tokyo. 日本的首都是东京。"


def show(piece: str) -> str:
    """Return a piece as text, or as the hexadecimal bytes of a part of a character."""
    content = piece_bytes(piece)
    try:
        return content.decode().replace(" ", "␣")
    except UnicodeDecodeError:
        return content.hex(" ").upper()


def main() -> None:
    config = parse(ExerciseConfig, __doc__)
    rows = [json.loads(line) for line in config.file("world/words.jsonl").open(encoding="utf-8")]
    questions = [json.loads(line) for line in config.file("world/questions.jsonl").open(encoding="utf-8")]
    held_out = {lang: [row["question"] for row in questions if row["lang"] == lang] for lang in ("zh", "en")}
    compression: dict[str, list[float]] = {lang: [] for lang in held_out}
    for size in SIZES:
        tokenizer = train_tokenizer("bpe", [row["text"] for row in rows], size, RESERVED)
        if size == 400:
            merges = json.loads(tokenizer.to_str())["model"]["merges"][:12]
            print("first merges:", ", ".join(" + ".join(map(show, merge)) for merge in merges))
        if size in (300, 400, 1200, 5120):
            encoding = tokenizer.encode(SENTENCE)
            print(f"{size:>5} entries, {len(encoding.ids)} tokens: {'|'.join(map(show, encoding.tokens))}")
        for lang, texts in held_out.items():
            tokens = sum(len(encoding.ids) for encoding in tokenizer.encode_batch(texts))
            compression[lang].append(sum(map(len, texts)) / tokens)
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for lang, values in compression.items():
        axes.semilogx(SIZES, values, marker=".", base=2, label={"zh": "Chinese", "en": "English"}[lang])
    axes.set_xticks(SIZES, SIZES, rotation=45)
    axes.set_xlabel("entries of the vocabulary")
    axes.set_ylabel("characters per token")
    axes.grid(alpha=0.3)
    axes.legend()
    save_picture(config, figure, "01-tokens")


if __name__ == "__main__":
    with fail_in_one_line():
        main()
