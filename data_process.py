"""Prepares training data: raw files -> token shards, with statistics of every dropped and bad row.

    python data_process.py pretrain FILES…     text  -> dataset/pretrain/  token shards, split by content hash
    python data_process.py sft FILES…          chats -> dataset/sft/       train.jsonl, val.jsonl, token shards + masks
    python data_process.py dpo FILES…          pairs -> dataset/dpo/       the same, for chosen and rejected answers
    python data_process.py sft FILES… --check  prints statistics and samples (trained tokens marked), writes nothing
    python data_process.py sft FILES… --scorer out/pretrain_512.pth --keep_entropy 10%,90%
                                               keeps the chats between two percentiles of the model's cross-entropy
    python data_process.py --list_layouts      lists the supported row layouts; --keys prompt=KEY,… adds others
    python data_process.py download NAME       downloads a public dataset, with resume; without NAME: lists them

    python data_process.py clean FILES…        text -> dataset/clean/      rule-based cleaning, counted, with examples
    python data_process.py dedup FILES…        text -> dataset/dedup/      without duplicates and near-duplicates
    python data_process.py decontaminate FILES… --against EXAM…            without the questions of an exam

FILES are txt, jsonl, json, csv, parquet or arrow, also compressed as .gz .xz .zst .bz2, or folders of them;
dataset/README.md describes the formats. pretrain, sft and dpo need a tokenizer (train_tokenizer.py).
Read next: corpus/prepare_text.py, corpus/prepare_chats.py and corpus/preferences.py (the steps), 1-pretrain.py (trains
on the data), curation/commands.py (clean, dedup, decontaminate).
"""

import argparse
import contextlib
import dataclasses
import functools
import heapq
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common import cli, flag_types
from common.errors import UserError, fail_in_one_line
from common.locks import lock_output
from corpus.layouts import parse_keys, print_layouts
from corpus.row_text import DEFAULT_READER, RowReader
from corpus.stats import DataStats
from curation import commands
from curation.perplexity_filter import print_histogram
from model.chat_template import CHAT_FORMATS

TRAINING_SCRIPTS = {"pretrain": "1-pretrain.py", "sft": "3-full_sft.py", "dpo": "5-dpo_train.py"}


def main(arguments: list[str] | None = None) -> None:
    args = parse_flags(arguments)
    if args.kind in commands.COMMANDS:
        config = cli.make_config(commands.COMMANDS[args.kind], args)
        return commands.run_command(args.kind, config, reading_progress_bar)
    from corpus.input_files import expand_inputs

    args.files = expand_inputs(args.files)
    tokenizer = require_tokenizer(args.tokenizer).with_chat_format(getattr(args, "chat_format", None))
    task, filter_stage = (None, None) if args.kind == "pretrain" else make_task(args)
    report = DataStats(args.max_bad_share, args.accept_damaged)
    if args.check:
        preview_data(args, tokenizer, report, task)
        if filter_stage:
            print_histogram(filter_stage)
        return
    with lock_output(args.out_dir):
        write_dataset(args, tokenizer, report, task, filter_stage)


def write_dataset(args: argparse.Namespace, tokenizer: Any, report: DataStats, task: Any, filter_stage: Any) -> None:
    """Write the dataset to --out_dir and print the statistics of its rows."""
    from corpus.shard_writer import check_replaceable, dataset_staging_folder

    if check_replaceable(args.out_dir):
        print(f"{args.out_dir} holds an older dataset: it is replaced when the new one is complete")
    partial = dataset_staging_folder(args.out_dir)
    if (partial / "progress.json").is_file():
        print(f"{partial} holds an unfinished run: it is resumed if files and settings are the same, else replaced")
    try:
        with reading_progress_bar(args.files, report) as on_batch:
            meta = prepare_data(args, tokenizer, report, on_batch, task, filter_stage)
    except (UserError, KeyboardInterrupt):
        if (partial / "progress.json").is_file():
            print(f"unfinished work is kept in {partial}: the same command resumes it; delete it to free the space")
        raise
    report.print()
    if filter_stage:
        print_histogram(filter_stage)
    print_too_long(args, report)
    summary = ", ".join(f"{name} {split['tokens']:,}" for name, split in meta["splits"].items())
    print(f"written: {args.out_dir} (tokens: {summary})")
    print(f"next: python {TRAINING_SCRIPTS[args.kind]} --data_path {args.out_dir}")


def prepare_data(
    args: argparse.Namespace,
    tokenizer: Any,
    report: DataStats,
    on_batch: Callable[[], None],
    task: Any,
    filter_stage: Any,
) -> dict[str, Any]:
    from corpus.prepare_chats import prepare_chat_data
    from corpus.prepare_text import prepare_text_data

    if args.kind == "pretrain":
        reader = RowReader(parse_keys(args.keys))
        return prepare_text_data(
            args.files, tokenizer, args.out_dir, args.val_share, report, on_batch, args.source_key, reader
        )
    about = filter_stage.provenance() if filter_stage else None
    length, val_share = args.max_seq_len, args.val_share
    return prepare_chat_data(args.files, tokenizer, args.out_dir, length, val_share, report, on_batch, task, about)


def make_task(args: argparse.Namespace) -> tuple[Any, Any]:
    """(DataTask, PerplexityFilterStage or None). Raises UserError for flags that need --scorer."""
    task = make_data_task(args.kind, RowReader(parse_keys(args.keys)), getattr(args, "only", ""))
    if args.kind != "sft":
        return task, None
    from curation.perplexity_filter import PerplexityFlags

    flags = PerplexityFlags(tuple(args.files), args.out_dir, args.max_bad_share, args.accept_damaged, args.keys,
                            args.scorer, tuple(args.keep_entropy or ()), args.keep_share)  # fmt: skip
    if not args.scorer:
        return task, None
    from curation.perplexity_filter import PerplexityFilter
    from curation.perplexity_scorer import score_chats

    scores = score_chats(flags, task.read_examples, reading_progress_bar)
    chat_filter = PerplexityFilter(scores, flags.keep_entropy, flags.keep_fraction)
    read_examples = chat_filter.filter_examples(task.read_examples, args.val_share)
    settings = task.settings | chat_filter.fingerprint_fields()
    return dataclasses.replace(task, read_examples=read_examples, settings=settings), chat_filter


def make_data_task(kind: str, reader: RowReader = DEFAULT_READER, only: str = "") -> Any:
    """The DataTask of pairs for `kind` "dpo", else of chats. `only`: as in `read_chat_examples`."""
    from corpus.preferences import PAIR_TASK
    from corpus.prepare_chats import CHAT_TASK

    task, choice = PAIR_TASK if kind == "dpo" else CHAT_TASK, {"only": only} if only else {}
    read_examples = functools.partial(task.read_examples, reader=reader, **choice)
    return dataclasses.replace(task, read_examples=read_examples, settings={**reader.key_settings(), **choice})


def parse_flags(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list_layouts", action=ListLayouts, nargs=0, help="list the supported row layouts and exit")
    kinds = parser.add_subparsers(
        dest="kind", required=True, metavar="pretrain|sft|dpo|clean|dedup|decontaminate|download"
    )
    for kind, what in (
        ("pretrain", "text (or chats, as plain text) -> token shards for 1-pretrain.py"),
        ("sft", "chats -> jsonl and token shards for 3-full_sft.py"),
        ("dpo", "pairs of a chosen and a rejected answer -> jsonl and token shards for 5-dpo_train.py"),
    ):
        held_out = 0.05 if kind == "dpo" else 0.01  # pairs are few, and the accuracy on a pair is only 0 or 1
        sub = kinds.add_parser(kind, help=what, description=what)
        sub.add_argument(
            "files",
            nargs="+",
            type=flag_types.path_string,
            metavar="FILES",
            help="txt, jsonl, json, csv, parquet, arrow; also .gz .xz .zst .bz2; or folders",
        )
        sub.add_argument(
            "--tokenizer",
            type=flag_types.path_string,
            default="model/tokenizer",
            help="folder of the tokenizer (default: %(default)s)",
        )
        sub.add_argument(
            "--out_dir",
            type=flag_types.path_string,
            default=f"dataset/{kind}",
            help="folder to write (default: %(default)s)",
        )
        sub.add_argument("--val_share", type=flag_types.fraction_below_one, default=held_out,
            help="fraction held out for validation (default: %(default)s)")  # fmt: skip
        sub.add_argument("--max_bad_share", type=flag_types.fraction, default=0.01,
            help="maximum fraction of unusable rows (default: 0.01)")  # fmt: skip
        sub.add_argument("--accept_damaged", action="store_true", help=flag_types.ACCEPT_DAMAGED_HELP)
        sub.add_argument("--check", action="store_true", help="print statistics and samples, write nothing")
        sub.add_argument("--samples", type=flag_types.non_negative_int, default=3,
            help="number of samples printed by --check (default: %(default)s)")  # fmt: skip
        sub.add_argument("--keys", default="", metavar="FIELD=KEY,…",
            help="keys of another row layout, for example prompt=ask,answer=reply; fields: --list_layouts")  # fmt: skip
        if kind == "pretrain":
            sub.add_argument(
                "--source_key",
                default="",
                metavar="KEY",
                help="row key that holds the source, or `file` for the file name; for 1-pretrain.py --mix",
            )
        else:
            longer = "chats lose their last turns" if kind == "sft" else "pairs lose the first turns of their prompt"
            sub.add_argument("--max_seq_len", type=flag_types.positive_int, default=512,
                help=f"longer {longer} (default: %(default)s); training scripts have the same flag")  # fmt: skip
            sub.add_argument("--chat_format", choices=CHAT_FORMATS,
                help="chat template (default: that of the tokenizer folder)")  # fmt: skip
        if kind == "sft":
            sub.add_argument(
                "--only", choices=("single", "multi"), default="", help="keep only chats of one turn, or of several"
            )
            add_choosing_flags(sub)
    for name, config in commands.COMMANDS.items():
        cli.add_flags(kinds.add_parser(name, help=config.__doc__, description=config.__doc__), config)
    return parser.parse_args(arguments)


class ListLayouts(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print_layouts()
        parser.exit()


def add_choosing_flags(sub: argparse.ArgumentParser) -> None:
    add = sub.add_argument_group("filter by a model's cross-entropy (see curation/perplexity_filter.py)").add_argument
    add(
        "--scorer",
        type=flag_types.path_string,
        metavar="MODEL",
        help="pretrained model that scores every chat, for example out/pretrain_512.pth",
    )
    add(
        "--keep_entropy",
        type=score_range,
        action="append",
        metavar="LOW,HIGH",
        help="keep chats whose answers have LOW to HIGH nats per token; 20%%,80%%: percentiles; zh=2,4: one language",
    )
    add("--keep_share", type=flag_types.positive_fraction, default=1.0,
        help="keep this fraction of the chats, those nearest to the middle of the range (default: 1)")  # fmt: skip


def score_range(text: str) -> Any:
    from curation.perplexity_filter import parse_score_range

    return parse_score_range(text)


def require_tokenizer(folder: str) -> Any:
    """Load the tokenizer. Raises UserError with the command that trains one."""
    from model.tokenizer import load_tokenizer

    try:
        return load_tokenizer(folder)
    except UserError:
        raise
    except Exception as error:  # tokenizers raises a bare Exception for a file that it cannot parse
        raise UserError(f"{folder} is not a valid tokenizer ({error}): train one with train_tokenizer.py") from None


@contextlib.contextmanager
def reading_progress_bar(files: list[str], report: DataStats) -> Iterator[Callable[[], None]]:
    """Progress bar over the bytes of the input files; yields the function that updates it."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    total = sum(Path(file).stat().st_size for file in files)
    columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    console = Console()
    with Progress(*columns, transient=True, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=total)

        def on_batch() -> None:
            speed = f"{report.megabytes_per_second:.1f} MB/s" if report.text_bytes else "reading"
            bar.update(task, completed=report.bytes_read(), description=f"{report.read:,} rows  {speed}")

        yield on_batch


def print_too_long(args: argparse.Namespace, report: DataStats) -> None:
    """Print a note if more than 5 % of the rows were dropped for their length: easy to overlook in a table."""
    too_long = sum(reason.count for name, reason in report.dropped.items() if name.endswith(" tokens"))
    if too_long > 0.05 * report.read:
        print(f"note: {too_long / report.read:.1%} of the rows do not fit: a larger --max_seq_len keeps more of them")


# ---- --check: the same steps without a writer ------------------------------------------------------------------------
def preview_data(args: argparse.Namespace, tokenizer: Any, report: DataStats, task: Any) -> None:
    """Print statistics and the samples with the lowest content hashes; write nothing."""
    from corpus.examples import batch_examples
    from corpus.prepare_text import tokenize_texts
    from corpus.preview import print_sample
    from corpus.read_examples import read_text_examples

    samples: list[tuple[int, int, str, list[Any]]] = []

    def add_sample(example: Any, documents: list[Any]) -> None:
        title = f"{example.file}:{example.line} ({example.language})"
        entry = (-example.split_hash, report.kept, title, documents)
        if len(samples) < args.samples:
            heapq.heappush(samples, entry)
        elif samples:
            heapq.heappushpop(samples, entry)

    with reading_progress_bar(args.files, report) as on_batch:
        if args.kind != "pretrain":
            for batch in batch_examples(("", example) for example in task.read_examples(args.files, report)):
                examples = [example for _, example in batch]
                rendered = task.tokens.render(examples, tokenizer, args.max_seq_len, report)
                for example, documents in zip(examples, rendered, strict=True):
                    if documents:
                        add_sample(example, documents)
                on_batch()
        else:
            texts = read_text_examples(args.files, report, args.source_key, RowReader(parse_keys(args.keys)))
            for tokenized in tokenize_texts((("", example) for example in texts), tokenizer, report):
                for _, example, ids in tokenized:
                    add_sample(example, [(ids[:120].tolist(), [], 0)])
                on_batch()
    report.print()
    print_too_long(args, report)
    for *_, title, documents in sorted(samples, reverse=True):
        for number, (ids, mask, _) in enumerate(documents):
            which = ["chosen", "rejected"][number] + ", " if args.kind == "dpo" else ""
            print_sample(tokenizer, which + title, ids, mask)
    if not report.kept:
        raise UserError("these files have no trainable row: see the table of rows above")


if __name__ == "__main__":
    with fail_in_one_line():
        main()
