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

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from common import cli
from common.cli import Config, flag
from common.errors import UserError, fail_in_one_line
from common.flag_types import ACCEPT_DAMAGED_HELP, fraction, path_string, positive_int, seed
from common.locks import lock_output
from corpus.input_files import expand_inputs
from corpus.language import LANGUAGES
from corpus.progress import reading_progress_bar
from corpus.stats import DataStats
from corpus.tokenizer_sample import print_compression, print_sample_sizes, sample_texts
from corpus.tokenizer_training import check_vocab_size, print_pieces, train_tokenizer
from demo_world.world import DemoWorld
from evaluation.tokenizer_table import compare_tokenizers, read_texts_by_language
from model.chat_template import CHAT_FORMATS
from model.tokenizer import SPARE_TOKENS, SPECIAL_TOKENS, load_tokenizer, save_tokenizer

RESERVED = (*SPECIAL_TOKENS, *SPARE_TOKENS)
DEMO_BYTES = 100_000  # of demo world text, per language
COMPARE_GROUP = "compare tokenizers (trains nothing)"
SEE_HELP = "; `python train_tokenizer.py --help` describes the flags"


@dataclass(frozen=True)
class TokenizerConfig(Config):
    main_flags = (
        "files", "algorithm", "vocab_size", "out_dir", "chat_format", "byte_budget", "seed", "inspect", "compare",
        "compare_on",
    )  # fmt: skip
    files: tuple[str, ...] = flag((), "training text: txt, jsonl, csv or parquet, also .gz .xz .zst .bz2",
                                  positional=True, nargs="*", type=path_string, metavar="FILE")  # fmt: skip
    algorithm: str = flag("bpe", "bpe merges frequent pairs; unigram (SentencePiece) drops the least useful pieces",
                          choices=("bpe", "unigram"))  # fmt: skip
    vocab_size: int = flag(6400, "entries, including the 16 special tokens", type=positive_int, metavar="N")
    out_dir: str = flag("model/tokenizer", "tokenizer folder to write, or to read with --inspect", type=path_string,
                        metavar="FOLDER")  # fmt: skip
    chat_format: str = flag("chatml", "chat template: chatml (<|im_start|>user), mindllm (<user>), belle (Human:), "
                            "text (no roles); 3-full_sft.py can select another one", choices=CHAT_FORMATS)  # fmt: skip
    byte_budget: int = flag(12_000_000, "maximum bytes of text to train on", type=positive_int, metavar="N")
    read_budget: int = flag(1_000_000_000, "maximum bytes of text to read", type=positive_int, metavar="N")
    max_bad_fraction: float = flag(0.01, "maximum fraction of unusable rows", type=fraction, metavar="FRACTION",
                                   aliases=("max_bad_share",))  # fmt: skip
    accept_damaged: bool = flag(False, ACCEPT_DAMAGED_HELP)
    seed: int = flag(0, "seed of the document sample", type=seed, metavar="N")
    inspect: str | None = flag(None, "print the tokens of TEXT with the tokenizer in --out_dir; trains nothing",
                               metavar="TEXT")  # fmt: skip
    compare: tuple[str, ...] = flag((), "print a table of these tokenizers: folders with a tokenizer.json or a "
                                    "SentencePiece *.model", nargs="+", type=path_string, metavar="FOLDER",
                                    group=COMPARE_GROUP)  # fmt: skip
    compare_on: tuple[str, ...] = flag((), "text to measure on (default: text of the built-in demo world)", nargs="+",
                                       type=path_string, metavar="FILE", group=COMPARE_GROUP)  # fmt: skip
    out: str = flag("", "also write the table of --compare to this file", type=path_string, metavar="FILE.md",
                    group=COMPARE_GROUP)  # fmt: skip

    def check(self) -> None:
        if sum((bool(self.files), self.inspect is not None, bool(self.compare))) != 1:
            raise UserError(f"give either FILES to train on, --inspect TEXT, or --compare FOLDERS{SEE_HELP}")
        if (self.compare_on or self.out) and not self.compare:
            raise UserError(f"--compare_on and --out need --compare{SEE_HELP}")
        if self.files:
            check_vocab_size(self.vocab_size, len(RESERVED))


def main() -> None:
    config = cli.parse(TokenizerConfig, __doc__)
    if config.compare:
        texts = read_texts_by_language(config.compare_on) if config.compare_on else demo_texts()
        compare_tokenizers(config.compare, texts, config.compare_on, config.out)
    elif config.inspect is not None:
        try:
            print_pieces(load_tokenizer(config.out_dir), config.inspect)
        except (FileNotFoundError, ValueError) as error:
            raise UserError(str(error)) from None
    else:
        train_and_save(config)


def train_and_save(config: TokenizerConfig) -> None:
    """Train a tokenizer on a sample of the files, save it in --out_dir and print its compression."""
    start = time.perf_counter()
    folder = Path(config.out_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{config.out_dir} is a file: choose another --out_dir")
    with lock_output(folder):
        files, stats = expand_inputs(config.files), DataStats(config.max_bad_fraction, config.accept_damaged)
        with reading_progress_bar(files, stats) as on_progress:
            sample = sample_texts(files, stats, config.byte_budget, config.read_budget, config.seed, on_progress)
        print_sample_sizes(sample, stats)
        print(f"training ({config.algorithm}) ...", flush=True)
        texts = [text for documents in sample.texts.values() for text in documents]
        backend = train_tokenizer(config.algorithm, texts, config.vocab_size, RESERVED, progress=sys.stderr.isatty())
        if (folder / "tokenizer.json").exists():
            advice = "datasets and models made with the old one need the old one"
            print(f"replacing the tokenizer in {config.out_dir}: {advice}")
        tokenizer = save_tokenizer(backend, folder, config.chat_format)
    print(f"\nvocabulary: {tokenizer.vocab_size:,} entries")
    if (wanted := config.vocab_size) > tokenizer.vocab_size:
        print(f"  not {wanted:,}: the text has too few repeated pieces; use more text or a smaller --vocab_size")
    print_compression(sample, tokenizer)
    seconds = time.perf_counter() - start
    print(f"saved in {config.out_dir} ({tokenizer.fingerprint}, chats as {config.chat_format}) after {seconds:.0f} s")
    print('next: python data_process.py pretrain FILES…   or: python train_tokenizer.py --inspect "文本"')


def demo_texts() -> dict[str, list[str]]:
    """The first DEMO_BYTES of demo world documents of each language."""
    texts: dict[str, list[str]] = {language: [] for language in LANGUAGES}
    for language, documents in texts.items():
        size = 0
        for text in DemoWorld(language, 0).texts(1):
            documents.append(text)
            size += len(text.encode())
            if size >= DEMO_BYTES:
                break
    return texts


if __name__ == "__main__":
    with fail_in_one_line():
        main()
