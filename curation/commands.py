"""Curation subcommands of data_process.py, which run before tokenisation: flags and summary.

    python data_process.py clean FILES…                             -> dataset/clean/
    python data_process.py dedup FILES…                             -> dataset/dedup/
    python data_process.py decontaminate FILES… --against EXAM…     -> dataset/decontaminate/

Each command reads the same formats as `pretrain`, `sft` and `dpo` and writes the rows in their input format.

Read next: cleaning.py, near_duplicates.py, cluster_dedup.py, decontaminate.py (the transforms), transform.py (output).
"""

import argparse
import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from common import cli, flag_types
from common.errors import UserError
from common.files import remove
from common.locks import lock_output
from corpus.layouts import parse_keys
from corpus.row_text import RowReader
from corpus.stats import DataStats

CURATION_COMMANDS = {
    "clean": "edit texts and drop bad ones by rules; --skip and --also choose them, the report counts each",
    "dedup": "drop duplicates and near-duplicates (MinHash, locality-sensitive hashing)",
    "decontaminate": "drop documents that contain questions of an exam",
}
NEXT_COMMAND = {"clean": "dedup", "dedup": "decontaminate", "decontaminate": "pretrain"}
ProgressBar = Callable[[list[str], DataStats], AbstractContextManager[Callable[[], None]]]


def add_subcommands(subparsers: Any) -> None:
    """Add clean, dedup and decontaminate to the subcommands of data_process.py."""
    for name, description in CURATION_COMMANDS.items():
        sub = subparsers.add_parser(name, help=description, description=description)
        sub.add_argument(
            "files",
            nargs="+",
            type=flag_types.path_string,
            metavar="FILES",
            help="text, chats or preference pairs, in the formats of `pretrain`, `sft` and `dpo`",
        )
        sub.add_argument(
            "--out_dir",
            type=flag_types.path_string,
            default=f"dataset/{name}",
            help="folder to write (default: %(default)s)",
        )
        sub.add_argument("--max_bad_share", type=flag_types.fraction, default=0.01,
                         help="largest allowed fraction of unusable rows (default: 0.01)")  # fmt: skip
        sub.add_argument("--accept_damaged", action="store_true", help=flag_types.ACCEPT_DAMAGED_HELP)
        sub.add_argument("--keys", default="", metavar="FIELD=KEY,…", help="keys of another layout, as for `sft`")
        sub.add_argument("--workers", type=flag_types.int_between(1, 1024), default=1,
                         help="processes; the result does not depend on it (default: 1)")  # fmt: skip
        ADD_FLAGS[name](sub)


def _add_clean_flags(sub: argparse.ArgumentParser) -> None:
    name_list: dict[str, Any] = {"action": cli.NameList, "nargs": None}  # one argument: FILES may follow
    sub.add_argument("--list_rules", action=_ListRules, nargs=0, help="print every rule with its source and exit")
    sub.add_argument("--skip", **name_list, default=[], metavar="RULE,…", help="rules to turn off")
    sub.add_argument("--also", **name_list, default=[], metavar="RULE,…", help="rules to turn on: simplify, …")
    sub.add_argument("--min_words", type=flag_types.non_negative_int, default=10,
                     help="drop shorter texts (default: %(default)s; Gopher: 50)")  # fmt: skip
    sub.add_argument(
        "--languages", **name_list, default=["zh", "en"], help="languages to keep (ISO 639-1; default: zh,en)"
    )
    sub.add_argument(
        "--unsafe_words",
        type=flag_types.path_string,
        metavar="FILE",
        help="more phrases for the rule `unsafe`, one per line",
    )
    sub.add_argument("--check", action="store_true", help="dry run: print the report with its examples, write nothing")


def _add_dedup_flags(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--exact_only", action="store_true", help="drop only documents with equal text, ignoring white space"
    )
    sub.add_argument("--executor", choices=("here", "local", "slurm", "ray"), default="here",
                     help="here: one machine, fast; others: datatrove, one task per file (default: here)")  # fmt: skip
    sub.add_argument("--partition", default="", help="slurm only: partition of the jobs")
    sub.add_argument("--time", default="24:00:00", help="slurm only: time limit of a job (default: %(default)s)")


def _add_decontaminate_flags(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--against", nargs="+", type=flag_types.path_string, required=True, metavar="EXAM",
                     help="folders, archives or files with exam questions")  # fmt: skip
    sub.add_argument("--overlap", type=flag_types.fraction, default=0.5,
                     help="fraction of a question in a dropped row; 0: one n-gram (default: %(default)s)")  # fmt: skip


ADD_FLAGS = {"clean": _add_clean_flags, "dedup": _add_dedup_flags, "decontaminate": _add_decontaminate_flags}


class _ListRules(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from curation.rules import print_rules

        print_rules()
        parser.exit()


# ---- running ---------------------------------------------------------------------------------------------------------
def run_curation_command(args: argparse.Namespace, progress_bar: ProgressBar) -> None:
    """Run clean, dedup or decontaminate. Raises UserError for wrong flags or unusable files."""
    if args.kind == "dedup" and args.executor != "here":
        with lock_output(args.out_dir):  # held by this process only; the tasks share its folder
            return _run_cluster_dedup(args)
    reader = RowReader(parse_keys(args.keys))
    transform = None if args.kind == "dedup" else _make_transform(args, reader)
    report = DataStats(args.max_bad_share, args.accept_damaged)
    if args.kind == "clean" and args.check:
        return _print_dry_run(transform, args, report, progress_bar)
    with lock_output(args.out_dir):
        _write_output(transform, args, report, progress_bar, reader)


def _write_output(
    transform: Any, args: argparse.Namespace, report: DataStats, progress_bar: ProgressBar, reader: RowReader
) -> None:
    """Pass all rows through the transform into --out_dir and print a summary."""
    from corpus.job_state import PROGRESS_FILE, SIGNING_FILE
    from corpus.shard_writer import dataset_staging_folder
    from curation.transform import check_out_dir, run_transform

    if check_out_dir(args.out_dir, args.files):
        print(f"{args.out_dir} contains an older result: it is replaced when the new one is complete")
    try:
        with progress_bar(args.files, report) as on_batch:
            if transform is None:
                from curation.near_duplicates import deduplicate

                rule_stats = deduplicate(
                    args.files, args.out_dir, report, on_batch, args.workers, args.exact_only, reader
                )
            else:
                rule_stats = run_transform(transform, args.files, args.out_dir, report, on_batch, args.workers)
    except (UserError, KeyboardInterrupt):
        partial = dataset_staging_folder(args.out_dir)
        if any((partial / name).is_file() for name in (PROGRESS_FILE, SIGNING_FILE)):
            print(f"unfinished work is kept in {partial}: the same command continues it")
        else:
            with contextlib.suppress(OSError):  # it may be a disk error that is being raised
                remove(partial)
        raise
    report.print_skipped()
    rule_stats.print()
    print(
        f"{report.text_bytes / 1e6:,.1f} MB of text in {report.seconds:.1f} s: {report.megabytes_per_second:.2f} MB/s"
    )
    _print_next_command(args)


def _make_transform(args: argparse.Namespace, reader: Any) -> Any:
    if args.kind == "decontaminate":
        from curation.decontaminate import DecontaminationTransform, build_exam_index

        exam = build_exam_index(args.against)
        too_short_note = f"; {exam.too_short:,} questions are too short to search for" if exam.too_short else ""
        print(f"searching for {len(exam.questions):,} questions of {', '.join(exam.names)}{too_short_note}")
        return DecontaminationTransform(exam, args.overlap, reader)
    from curation.cleaning import CleaningTransform
    from curation.prose_rules import CleaningLimits
    from curation.rule_words import UNSAFE_PHRASES

    unsafe_phrases: tuple[str, ...] = UNSAFE_PHRASES
    if args.unsafe_words:
        try:
            lines = Path(args.unsafe_words).read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--unsafe_words {args.unsafe_words}: cannot be read as UTF-8 text ({error})") from None
        unsafe_phrases = (*UNSAFE_PHRASES, *(line.strip().lower() for line in lines if line.strip()))
    transform = CleaningTransform(
        args.skip, args.also, CleaningLimits(args.min_words, tuple(args.languages), unsafe_phrases), reader
    )
    transform.check_packages()
    return transform


def _print_dry_run(transform: Any, args: argparse.Namespace, report: DataStats, progress_bar: ProgressBar) -> None:
    from curation.rule_stats import RuleStats
    from curation.transform import batch_rows, map_in_order, read_numbered_rows

    rule_stats = RuleStats(transform.rule_names())
    with progress_bar(args.files, report) as on_batch:
        rows = read_numbered_rows(args.files, report, reader=transform.reader)
        for batch, decisions in map_in_order(transform.apply, batch_rows(rows), args.workers):
            for row, decision in zip(batch, decisions, strict=True):
                rule_stats.add(row.file, row.line, decision)
            report.kept = rule_stats.kept
            on_batch()
    print(rule_stats.to_markdown(transform.name))
    report.print_skipped()
    rule_stats.print()


def _run_cluster_dedup(args: argparse.Namespace) -> None:
    if args.exact_only:
        raise UserError("--exact_only cannot be combined with --executor: it takes minutes on one machine")
    if args.executor == "slurm" and not args.partition:
        raise UserError("--executor slurm needs --partition NAME: `sinfo` lists them")
    from curation.cluster_dedup import deduplicate_on_cluster

    slurm = {"partition": args.partition, "time": args.time}
    reader = RowReader(parse_keys(args.keys))
    report = DataStats(args.max_bad_share, args.accept_damaged)
    rule_stats = deduplicate_on_cluster(args.files, args.out_dir, args.executor, args.workers, report, slurm, reader)
    if rule_stats is not None:
        rule_stats.print()
        _print_next_command(args)


def _print_next_command(args: argparse.Namespace) -> None:
    print(f"written: {args.out_dir} (report.md lists examples of every rule, dropped.tsv every dropped row)")
    print(f"next: python data_process.py {NEXT_COMMAND[args.kind]} {args.out_dir}/text_*.jsonl")
