"""The commands that make better text of text, before anything is tokenised: flags, and what is said at the end.

    python data_process.py clean FILES…                        text -> dataset/clean/
    python data_process.py dedup FILES…                             -> dataset/dedup/
    python data_process.py decontaminate FILES… --against EXAM…     -> dataset/decontaminate/

Each reads what the others and `pretrain`, `sft`, `dpo` read, and writes rows in the format they came in.

Read next: cleaning.py, near_duplicates.py, cluster_dedup.py, decontaminate.py (the steps), transform.py (what is
written).
"""

import argparse
import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from common import cli
from common.errors import UserError
from common.files import remove
from common.locks import locked
from corpus.layouts import parse_keys
from corpus.row_text import RowReader
from corpus.stats import DataReport

COMMANDS = {
    "clean": "mend texts and leave bad ones out, by rules that are listed, switchable and counted",
    "dedup": "leave copies and near-copies out (MinHash, locality-sensitive hashing)",
    "decontaminate": "leave out what holds questions of an exam, so that the exam stays one",
}
NEXT = {"clean": "dedup", "dedup": "decontaminate", "decontaminate": "pretrain"}
Bar = Callable[[list[str], DataReport], AbstractContextManager[Callable[[], None]]]


def add_commands(kinds: Any) -> None:
    """Add the three to the subcommands of data_process.py."""
    for name, what in COMMANDS.items():
        sub = kinds.add_parser(name, help=what, description=what)
        sub.add_argument(
            "files",
            nargs="+",
            type=cli.path,
            metavar="FILES",
            help="as for `pretrain`: text, chats or pairs of answers",
        )
        sub.add_argument(
            "--out_dir", type=cli.path, default=f"dataset/{name}", help="folder to write (default: %(default)s)"
        )
        sub.add_argument("--max_bad_share", type=cli.fraction, default=0.01,
                         help="largest allowed share of unusable rows (default: 0.01)")  # fmt: skip
        sub.add_argument("--accept_damaged", action="store_true", help=cli.ACCEPT_DAMAGED)
        sub.add_argument("--keys", default="", metavar="FIELD=KEY,…", help="as for `sft`: keys of another layout")
        sub.add_argument("--workers", type=cli.between(1, 1024), default=1,
                         help="processes; the result is the same (default: 1)")  # fmt: skip
        ADD_FLAGS[name](sub)


def _clean_flags(sub: argparse.ArgumentParser) -> None:
    names: dict[str, Any] = {"action": cli.NameList, "nargs": None}  # one argument: FILES may follow
    sub.add_argument("--list_rules", action=_ListRules, nargs=0, help="show every rule with its source, and end")
    sub.add_argument("--skip", **names, default=[], metavar="RULE,…", help="rules to leave out")
    sub.add_argument("--also", **names, default=[], metavar="RULE,…", help="rules to add: simplify, …")
    sub.add_argument("--min_words", type=cli.non_negative_int, default=10,
                     help="drop shorter texts (default: %(default)s; Gopher: 50)")  # fmt: skip
    sub.add_argument("--languages", **names, default=["zh", "en"], help="to keep (ISO 639-1; default: zh,en)")
    sub.add_argument(
        "--unsafe_words", type=cli.path, metavar="FILE", help="more phrases for the rule `unsafe`, one a line"
    )
    sub.add_argument("--check", action="store_true", help="write nothing: only the report, with its examples")


def _dedup_flags(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--exact_only", action="store_true", help="only documents with the same text, but for white space")
    sub.add_argument("--executor", choices=("here", "local", "slurm", "ray"), default="here",
                     help="here: fast, one machine; others: datatrove, a file a task (default: here)")  # fmt: skip
    sub.add_argument("--partition", default="", help="slurm only: partition of the jobs")
    sub.add_argument("--time", default="24:00:00", help="slurm only: time limit of a job (default: %(default)s)")


def _decontaminate_flags(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--against", nargs="+", type=cli.path, required=True, metavar="EXAM",
                     help="folders, archives or files of questions")  # fmt: skip
    sub.add_argument("--overlap", type=cli.fraction, default=0.5,
                     help="share of a question that must be there; 0: one n-gram (default: %(default)s)")  # fmt: skip


ADD_FLAGS = {"clean": _clean_flags, "dedup": _dedup_flags, "decontaminate": _decontaminate_flags}


class _ListRules(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from curation.rules import print_rules

        print_rules()
        parser.exit()


# ---- running ---------------------------------------------------------------------------------------------------------
def run(args: argparse.Namespace, progress_bar: Bar) -> None:
    """Run one of the commands. Raises UserError for what the user can mend."""
    if args.kind == "dedup" and args.executor != "here":
        with locked(args.out_dir):  # by the process that hands out the tasks; they share its folder
            return _run_many(args)
    reader = RowReader(parse_keys(args.keys))
    step = None if args.kind == "dedup" else _step(args, reader)
    report = DataReport(args.max_bad_share, args.accept_damaged)
    if args.kind == "clean" and args.check:
        return _check(step, args, report, progress_bar)
    with locked(args.out_dir):
        _write(step, args, report, progress_bar, reader)


def _write(step: Any, args: argparse.Namespace, report: DataReport, progress_bar: Bar, reader: RowReader) -> None:
    """Pass all rows through the step into --out_dir, and say what became of them."""
    from corpus.job_state import PROGRESS, SIGNING
    from corpus.shard_writer import partial_folder
    from curation.transform import check_out_dir, rewrite

    if check_out_dir(args.out_dir, args.files):
        print(f"{args.out_dir} holds an older result: it is replaced once the new one is complete")
    try:
        with progress_bar(args.files, report) as on_batch:
            if step is None:
                from curation.near_duplicates import deduplicate

                tally = deduplicate(args.files, args.out_dir, report, on_batch, args.workers, args.exact_only, reader)
            else:
                tally = rewrite(step, args.files, args.out_dir, report, on_batch, args.workers)
    except (UserError, KeyboardInterrupt):
        partial = partial_folder(args.out_dir)
        if any((partial / name).is_file() for name in (PROGRESS, SIGNING)):
            print(f"unfinished work is kept in {partial}: the same command continues it")
        else:
            with contextlib.suppress(OSError):  # the disk that the error is about
                remove(partial)
        raise
    report.print_left_out()
    tally.print()
    print(
        f"{report.text_bytes / 1e6:,.1f} MB of text in {report.seconds:.1f} s: {report.megabytes_per_second:.2f} MB/s"
    )
    _say_next(args)


def _step(args: argparse.Namespace, reader: Any) -> Any:
    if args.kind == "decontaminate":
        from curation.decontaminate import Decontaminate, read_exam

        exam = read_exam(args.against)
        short = f"; {exam.too_short:,} too short to look for" if exam.too_short else ""
        print(f"looking for {len(exam.questions):,} questions of {', '.join(exam.names)}{short}")
        return Decontaminate(exam, args.overlap, reader)
    from curation.cleaning import Clean
    from curation.prose_rules import Limits
    from curation.rule_words import UNSAFE

    unsafe: tuple[str, ...] = UNSAFE
    if args.unsafe_words:
        try:
            lines = Path(args.unsafe_words).read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--unsafe_words {args.unsafe_words}: cannot be read as UTF-8 text ({error})") from None
        unsafe = (*UNSAFE, *(line.strip().lower() for line in lines if line.strip()))
    step = Clean(args.skip, args.also, Limits(args.min_words, tuple(args.languages), unsafe), reader)
    step.check()
    return step


def _check(step: Any, args: argparse.Namespace, report: DataReport, progress_bar: Bar) -> None:
    from curation.rule_stats import Tally
    from curation.transform import batches, in_order, numbered_rows

    tally = Tally(step.rule_names())
    with progress_bar(args.files, report) as on_batch:
        rows = numbered_rows(args.files, report, reader=step.reader)
        for batch, verdicts in in_order(step.judge, batches(rows), args.workers):
            for row, verdict in zip(batch, verdicts, strict=True):
                tally.add(row.file, row.line, verdict)
            report.kept = tally.kept
            on_batch()
    print(tally.markdown(step.name))
    report.print_left_out()
    tally.print()


def _run_many(args: argparse.Namespace) -> None:
    if args.exact_only:
        raise UserError("--exact_only needs no --executor: it is a matter of minutes on one machine")
    if args.executor == "slurm" and not args.partition:
        raise UserError("--executor slurm needs --partition NAME: `sinfo` lists them")
    from curation.cluster_dedup import deduplicate_many

    slurm = {"partition": args.partition, "time": args.time}
    reader = RowReader(parse_keys(args.keys))
    report = DataReport(args.max_bad_share, args.accept_damaged)
    tally = deduplicate_many(args.files, args.out_dir, args.executor, args.workers, report, slurm, reader)
    if tally is not None:
        tally.print()
        _say_next(args)


def _say_next(args: argparse.Namespace) -> None:
    print(f"written: {args.out_dir} (report.md has examples of every rule, dropped.tsv every row that was left out)")
    print(f"next: python data_process.py {NEXT[args.kind]} {args.out_dir}/text_*.jsonl")
