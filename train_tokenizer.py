"""Lesson 1: trains a tokenizer, which splits text into pieces and maps each piece to an id.

    compression = characters per token

Higher compression gives shorter sequences: training is faster, and more text fits into the context. But each entry of
the vocabulary costs a row of the embedding: 6,400 x 512 is 3.3 M of the small model's 26.9 M weights.

    python train_tokenizer.py data/*.jsonl.xz                    # byte-level BPE, 6,400 entries -> model/tokenizer
    python train_tokenizer.py notes.txt --vocab_size 2000 --out_dir out/tiny_tokenizer
    python train_tokenizer.py --inspect "从零开始 train a model"   # prints the tokens of this text
    python train_tokenizer.py --compare model/tokenizer ../Qwen3-0.6B --compare_on held_out.jsonl --out table.md

Reads texts and chats from txt, jsonl, json, csv, parquet and arrow files (also .gz .xz .zst .bz2), or folders of them.
Writes --out_dir: tokenizer.json, tokenizer_config.json (with the chat template), special_tokens_map.json, which
transformers can load.

Read next: corpus/tokenizer_training.py (the algorithms), model/chat_template.py (chat templates), then data_process.py
(text -> token ids on disk).
"""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import cli, flag_types
from common.errors import UserError, fail_in_one_line
from common.locks import lock_output
from model.chat_template import CHAT_FORMATS

if TYPE_CHECKING:
    from corpus.tokenizer_sample import TextSample
    from model.tokenizer import ChatTokenizer

LANGUAGE_NAMES = {"zh": "Chinese", "en": "English"}
DEMO_BYTES = 100_000  # of demo world text, per language


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.FlagParser(
        description="Train a tokenizer on your own text in less than a minute.",
        epilog="examples:  python train_tokenizer.py data/*.jsonl.xz\n"
        '           python train_tokenizer.py --inspect "从零开始 train a model"',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(name: str, help: str, **options: Any) -> None:
        parser.add_argument(name, help=help, **options)

    add(
        "files",
        "training text: txt, jsonl, csv or parquet, also .gz .xz .zst .bz2",
        nargs="*",
        type=flag_types.path_string,
        metavar="FILE",
    )
    add(
        "--algorithm",
        "bpe merges frequent pairs; unigram (SentencePiece) drops the least useful pieces (default: bpe)",
        choices=["bpe", "unigram"],
        default="bpe",
    )
    counts: dict[str, Any] = {"type": flag_types.positive_int, "metavar": "N"}
    add("--vocab_size", "entries, including the 16 special tokens (default: 6400)", default=6400, **counts)
    add(
        "--out_dir",
        "tokenizer folder to write, or to read with --inspect (default: model/tokenizer)",
        default="model/tokenizer",
        type=flag_types.path_string,
        metavar="FOLDER",
    )
    add(
        "--chat_format",
        "chat template: chatml (<|im_start|>user), mindllm (<user>), belle (Human:), text (no roles);"
        " 3-full_sft.py can select another one (default: chatml)",
        choices=CHAT_FORMATS,
        default="chatml",
    )
    add("--byte_budget", "maximum bytes of text to train on (default: 12000000)", default=12_000_000, **counts)
    add("--read_budget", "maximum bytes of text to read (default: 1000000000)", default=1_000_000_000, **counts)
    add(
        "--max_bad_share",
        "maximum fraction of unusable rows (default: 0.01)",
        default=0.01,
        type=flag_types.fraction,
        metavar="FRACTION",
    )
    add("--accept_damaged", flag_types.ACCEPT_DAMAGED_HELP, action="store_true")
    add("--seed", "seed of the document sample (default: 0)", default=0, type=flag_types.seed, metavar="N")
    add("--inspect", "print the tokens of TEXT with the tokenizer in --out_dir; trains nothing", metavar="TEXT")
    add_compare_flags(parser)
    args = parser.parse_args(argv)
    if sum((bool(args.files), args.inspect is not None, bool(args.compare))) != 1:
        parser.error("give either FILES to train on, --inspect TEXT, or --compare FOLDERS")
    if (args.compare_on or args.out) and not args.compare:
        parser.error("--compare_on and --out need --compare")
    return args


def add_compare_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("compare tokenizers (trains nothing)").add_argument
    add(
        "--compare",
        nargs="+",
        type=flag_types.path_string,
        metavar="FOLDER",
        help="print a table of these tokenizers: folders with a tokenizer.json or a SentencePiece *.model",
    )
    add(
        "--compare_on",
        nargs="+",
        type=flag_types.path_string,
        metavar="FILE",
        help="text to measure on (default: text of the built-in demo world)",
    )
    add("--out", type=flag_types.path_string, metavar="FILE.md", help="also write the table of --compare to this file")


def read_sample(args: argparse.Namespace) -> "TextSample":
    """Sample the training text from the files, with a progress bar; print how much was read and sampled."""
    from rich.console import Console
    from rich.progress import Progress

    from corpus.input_files import expand_inputs
    from corpus.stats import DataStats
    from corpus.tokenizer_sample import sample_texts

    args.files = expand_inputs(args.files)
    report = DataStats(args.max_bad_share, args.accept_damaged)
    size = sum(Path(file).stat().st_size for file in args.files if Path(file).is_file())
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("reading", total=size)
        sample = sample_texts(args.files, report, args.byte_budget, args.read_budget, args.seed,
                              lambda read: progress.update(bar, completed=read))  # fmt: skip
    for language, name in LANGUAGE_NAMES.items():
        taken, held_out = (
            sum(len(text.encode()) for text in texts[language]) / 1e6 for texts in (sample.texts, sample.held_out)
        )
        print(f"{name}: read {sample.documents[language]:,} documents, {sample.bytes[language] / 1e6:,.1f} MB;"
              f" train on {taken:,.1f} MB, measure on {held_out:,.2f} MB held out")  # fmt: skip
    for file in sample.truncated_files:
        print(f"{file}: only the beginning was read; a larger --read_budget reads more")
    report.print_notes()
    if report.bad_rows:
        reasons = "; ".join(
            f"{reason.count:,} x {name} (first: {reason.locations()})" for name, reason in report.bad.items()
        )
        print(f"skipped {report.bad_rows:,} rows: {reasons}")
    return sample


def print_result(tokenizer: "ChatTokenizer", sample: "TextSample", wanted: int) -> None:
    """Print the vocabulary size and the characters per token of each language on held-out text."""
    print(f"\nvocabulary: {tokenizer.vocab_size:,} entries")
    if tokenizer.vocab_size < wanted:
        print(f"  not {wanted:,}: the text has too few repeated pieces; use more text or a smaller --vocab_size")
    for language, name in LANGUAGE_NAMES.items():
        texts, kind = sample.held_out[language], "held-out"
        if not texts:
            texts, kind = sample.texts[language][:1000], "training (too few documents to hold any out)"
        tokens = sum(map(len, tokenizer.encode_batch(texts)))
        if tokens:
            characters = sum(map(len, texts))
            print(f"{name}: {characters / tokens:.3f} characters per token on {characters:,} characters of {kind} text")


def print_pieces(tokenizer: "ChatTokenizer", text: str) -> None:
    """Print the tokens of a text and their ids; bytes of a character that spans several tokens print as <E6>."""
    from corpus.tokenizer_training import printable_piece, vocab_bytes

    meaning = vocab_bytes(tokenizer.backend)
    ids = tokenizer.encode(text)
    pieces = [printable_piece(meaning[i]) for i in ids]
    print(" | ".join(pieces))
    print(f"{len(text)} characters, {len(ids)} tokens, {len(text) / max(len(ids), 1):.2f} characters per token")
    for i, piece in zip(ids, pieces, strict=True):
        print(f"{i:>8}  {piece}")


def demo_texts() -> dict[str, list[str]]:
    """The first DEMO_BYTES of demo world documents of each language."""
    from demo_world.world import DemoWorld

    texts: dict[str, list[str]] = {}
    for lang in LANGUAGE_NAMES:
        texts[lang], left = [], DEMO_BYTES
        for text in DemoWorld(lang, 0).texts(1):
            texts[lang].append(text)
            left -= len(text.encode())
            if left <= 0:
                break
    return texts


def compare_tokenizers(folders: list[str], files: list[str], out: str | None) -> None:
    """Print a table of the tokenizers on the same text; also write it to `out` as Markdown, if given."""
    from rich.console import Console
    from rich.table import Table

    from common.files import write_text
    from evaluation.tokenizer_table import (
        TABLE_HEADERS,
        describe_texts,
        load_any_tokenizer,
        measure_tokenizers,
        read_texts_by_language,
        table_cells,
        tokenizer_table_markdown,
    )

    tokenizers = [load_any_tokenizer(folder) for folder in folders]
    texts = read_texts_by_language(files) if files else demo_texts()
    rows, measured_texts = measure_tokenizers(tokenizers, texts), describe_texts(texts, files)
    table = Table(*TABLE_HEADERS, box=None)
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*table_cells(row))
    Console().print(table)
    print(measured_texts)
    if out:
        write_text(out, tokenizer_table_markdown(rows, measured_texts))
        print(f"written: {out}")


def main() -> None:
    args = parse_arguments()
    if args.compare:
        return compare_tokenizers(args.compare, args.compare_on or [], args.out)
    from model.tokenizer import SPARE_TOKENS, SPECIAL_TOKENS, load_tokenizer

    if args.inspect is not None:
        try:
            print_pieces(load_tokenizer(args.out_dir), args.inspect)
        except (FileNotFoundError, ValueError) as error:
            raise UserError(str(error)) from None
        return
    from corpus.tokenizer_training import check_vocab_size

    start = time.perf_counter()
    reserved = [*SPECIAL_TOKENS, *SPARE_TOKENS]
    check_vocab_size(args.vocab_size, len(reserved))
    if Path(args.out_dir).exists() and not Path(args.out_dir).is_dir():
        raise UserError(f"{args.out_dir} is a file: choose another --out_dir")
    with lock_output(args.out_dir):
        tokenizer, sample = train_and_save(args, reserved)
    print_result(tokenizer, sample, args.vocab_size)
    seconds = time.perf_counter() - start
    print(f"saved in {args.out_dir} ({tokenizer.fingerprint}, chats as {args.chat_format}) after {seconds:.0f} s")
    print('next: python data_process.py pretrain FILES…   or: python train_tokenizer.py --inspect "文本"')


def train_and_save(args: argparse.Namespace, reserved: list[str]) -> tuple["ChatTokenizer", "TextSample"]:
    """Train a tokenizer on a sample of the files and save it in --out_dir; return both."""
    from corpus.tokenizer_training import train_tokenizer
    from model.tokenizer import save_tokenizer

    sample = read_sample(args)
    texts = [text for language in LANGUAGE_NAMES for text in sample.texts[language]]
    print(f"training ({args.algorithm}) ...", flush=True)
    backend = train_tokenizer(args.algorithm, texts, args.vocab_size, reserved, progress=sys.stderr.isatty())
    if (Path(args.out_dir) / "tokenizer.json").exists():
        print(f"replacing the tokenizer in {args.out_dir}: datasets and models made with the old one need the old one")
    return save_tokenizer(backend, args.out_dir, args.chat_format), sample


if __name__ == "__main__":
    with fail_in_one_line():
        main()
