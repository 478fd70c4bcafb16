"""Curation commands of data_process.py, which run before tokenisation, and the download of public datasets.

    python data_process.py download NAME                            -> dataset/raw/NAME/
    python data_process.py clean FILES…                             -> dataset/clean/
    python data_process.py dedup FILES…                             -> dataset/dedup/
    python data_process.py decontaminate FILES… --against EXAM…     -> dataset/decontaminate/

clean, dedup and decontaminate read the same formats as `pretrain`, `sft` and `dpo` and write rows in their input
format.

Read next: cleaning.py, near_duplicates.py, cluster_dedup.py, decontaminate.py (the transforms), transform.py (output).
"""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import Any

from common.cli import Config, ExitAction, NameList, flag
from common.errors import UserError
from common.files import remove
from common.flag_types import (
    fraction,
    int_between,
    non_empty_text,
    non_negative_int,
    path_string,
    relative_path,
)
from common.locks import lock_output
from corpus.data_flags import DataFlags
from corpus.dataset_writer import dataset_staging_folder
from corpus.input_files import expand_inputs
from corpus.job_state import PROGRESS_FILE, SIGNING_FILE
from corpus.stats import DataStats
from curation.cleaning import CleaningTransform
from curation.decontaminate import DecontaminationTransform, build_exam_index
from curation.download import download_dataset, print_catalogue
from curation.near_duplicates import deduplicate
from curation.prose_rules import CleaningLimits
from curation.rule_stats import RuleStats
from curation.rule_words import UNSAFE_PHRASES
from curation.rules import print_rules
from curation.transform import batch_rows, check_out_dir, map_in_order, read_numbered_rows, run_transform

ProgressBar = Callable[[list[str], DataStats], AbstractContextManager[Callable[[], None]]]
NEXT_COMMAND = {"clean": "dedup", "dedup": "decontaminate", "decontaminate": "pretrain"}


@dataclass(frozen=True)
class CurationConfig(DataFlags):
    """Flags of clean, dedup and decontaminate."""

    workers: int = flag(1, "processes; the result does not depend on it", type=int_between(1, 1024))


@dataclass(frozen=True)
class CleanConfig(CurationConfig):
    """edit texts and drop bad ones by rules; --skip and --also choose them, the report counts each"""

    out_dir: str = "dataset/clean"
    list_rules: bool = flag(
        False, "print every rule with its source and exit", action=ExitAction, nargs=0, function=print_rules
    )
    # nargs=None: a list is one argument, because FILES may follow
    skip: tuple[str, ...] = flag((), "rules to turn off", action=NameList, nargs=None, metavar="RULE,…")
    also: tuple[str, ...] = flag((), "rules to turn on: simplify, …", action=NameList, nargs=None, metavar="RULE,…")
    min_words: int = flag(10, "drop shorter texts (Gopher: 50)", type=non_negative_int)
    languages: tuple[str, ...] = flag(("zh", "en"), "languages to keep (ISO 639-1)", action=NameList, nargs=None)
    unsafe_words: str | None = flag(
        None, "more phrases for the rule `unsafe`, one per line", type=path_string, metavar="FILE"
    )
    check_only: bool = flag(False, "dry run: print the report with its examples, write nothing", name="check")


@dataclass(frozen=True)
class DedupConfig(CurationConfig):
    """drop duplicates and near-duplicates (MinHash, locality-sensitive hashing)"""

    out_dir: str = "dataset/dedup"
    exact_only: bool = flag(False, "drop only documents with equal text, ignoring white space")
    executor: str = flag(
        "here",
        "here: one machine, fast; others: datatrove, one task per file",
        choices=("here", "local", "slurm", "ray"),
    )
    partition: str = flag("", "slurm only: partition of the jobs")
    time: str = flag("24:00:00", "slurm only: time limit of a job")

    def check(self) -> None:
        if self.executor != "here" and self.exact_only:
            raise UserError("--exact_only cannot be combined with --executor: it takes minutes on one machine")
        if self.executor == "slurm" and not self.partition:
            raise UserError("--executor slurm needs --partition NAME: `sinfo` lists them")


@dataclass(frozen=True, kw_only=True)
class DecontaminateConfig(CurationConfig):
    """drop documents that contain questions of an exam"""

    out_dir: str = "dataset/decontaminate"
    against: tuple[str, ...] = flag(
        MISSING, "folders, archives or files with exam questions", nargs="+", type=path_string, metavar="EXAM"
    )
    overlap: float = flag(0.5, "fraction of a question in a dropped row; 0: one n-gram", type=fraction)


@dataclass(frozen=True)
class DownloadConfig(Config):
    """download a public dataset to dataset/raw/NAME; without NAME: list the datasets"""

    name: str = flag("", "name of a dataset", positional=True, nargs="?", type=non_empty_text, metavar="NAME")
    file: tuple[str, ...] = flag(
        (), "further file of the same repository; may be repeated", action="append", type=relative_path
    )
    mirror: str = flag("", "hub, hf-mirror, modelscope or a URL (default: try each in this order)")
    out_dir: str = flag("dataset/raw", "folder to write", type=path_string)


COMMANDS: dict[str, type[Config]] = {
    "clean": CleanConfig,
    "dedup": DedupConfig,
    "decontaminate": DecontaminateConfig,
    "download": DownloadConfig,
}


def run_command(name: str, config: Any, progress_bar: ProgressBar) -> None:
    """Run a command of COMMANDS. Raises UserError for wrong flags or unusable files."""
    if isinstance(config, DownloadConfig):
        if config.name:
            download_dataset(config.name, list(config.file), config.mirror, config.out_dir)
        else:
            print_catalogue()
        return
    config = replace(config, files=tuple(expand_inputs(config.files)))
    if name == "dedup" and config.executor != "here":
        return deduplicate_with_datatrove(config)
    transform = None
    if name == "clean":
        transform = make_cleaning_transform(config)
        if config.check_only:
            return print_dry_run(transform, config, progress_bar)
    elif name == "decontaminate":
        transform = make_decontamination_transform(config)
    with lock_output(config.out_dir):
        write_curated_rows(transform, config, progress_bar)
    print_next_command(name, config.out_dir)


def write_curated_rows(transform: Any, config: Any, progress_bar: ProgressBar) -> None:
    """Pass all rows through the transform (None: deduplication) into --out_dir and print a summary."""
    files, report = list(config.files), config.new_stats()
    if check_out_dir(config.out_dir, files):
        print(f"{config.out_dir} contains an older result: it is replaced when the new one is complete")
    try:
        with progress_bar(files, report) as on_batch:
            if transform is None:
                rule_stats = deduplicate(
                    files, config.out_dir, report, on_batch, config.workers, config.exact_only, config.reader
                )
            else:
                rule_stats = run_transform(transform, files, config.out_dir, report, on_batch, config.workers)
    except (UserError, KeyboardInterrupt):
        partial = dataset_staging_folder(config.out_dir)
        if any((partial / name).is_file() for name in (PROGRESS_FILE, SIGNING_FILE)):
            print(f"unfinished work is kept in {partial}: the same command continues it")
        else:
            with contextlib.suppress(OSError):  # it may be a disk error that is being raised
                remove(partial)
        raise
    report.print_skipped()
    rule_stats.print()
    speed = f"{report.seconds:.1f} s: {report.megabytes_per_second:.2f} MB/s"
    print(f"{report.text_bytes / 1e6:,.1f} MB of text in {speed}")


def make_cleaning_transform(config: CleanConfig) -> CleaningTransform:
    unsafe_phrases = UNSAFE_PHRASES
    if config.unsafe_words:
        try:
            lines = Path(config.unsafe_words).read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--unsafe_words {config.unsafe_words}: cannot be read as UTF-8 text ({error})") from None
        unsafe_phrases = (*UNSAFE_PHRASES, *(line.strip().lower() for line in lines if line.strip()))
    limits = CleaningLimits(config.min_words, config.languages, unsafe_phrases)
    transform = CleaningTransform(list(config.skip), list(config.also), limits, config.reader)
    transform.check_packages()
    return transform


def make_decontamination_transform(config: DecontaminateConfig) -> DecontaminationTransform:
    exam = build_exam_index(list(config.against))
    too_short_note = f"; {exam.too_short:,} questions are too short to search for" if exam.too_short else ""
    print(f"searching for {len(exam.questions):,} questions of {', '.join(exam.names)}{too_short_note}")
    return DecontaminationTransform(exam, config.overlap, config.reader)


def print_dry_run(transform: CleaningTransform, config: CleanConfig, progress_bar: ProgressBar) -> None:
    """Print the report of `clean --check` without writing anything."""
    files, report, rule_stats = list(config.files), config.new_stats(), RuleStats(transform.rule_names())
    with progress_bar(files, report) as on_batch:
        rows = read_numbered_rows(files, report, reader=transform.reader)
        for batch, decisions in map_in_order(transform.apply, batch_rows(rows), config.workers):
            for row, decision in zip(batch, decisions, strict=True):
                rule_stats.add(row.file, row.line, decision)
            report.kept = rule_stats.kept
            on_batch()
    print(rule_stats.to_markdown(transform.name))
    report.print_skipped()
    rule_stats.print()


def deduplicate_with_datatrove(config: DedupConfig) -> None:
    """Run `dedup --executor local|ray|slurm`."""
    with lock_output(config.out_dir):  # held by this process only; the tasks share its folder
        from curation.cluster_dedup import deduplicate_on_cluster  # needs datatrove

        slurm = {"partition": config.partition, "time": config.time}
        rule_stats = deduplicate_on_cluster(
            list(config.files),
            config.out_dir,
            config.executor,
            config.workers,
            config.new_stats(),
            slurm,
            config.reader,
        )
        if rule_stats is not None:
            rule_stats.print()
            print_next_command("dedup", config.out_dir)


def print_next_command(name: str, out_dir: str) -> None:
    print(f"written: {out_dir} (report.md lists examples of every rule, dropped.tsv every dropped row)")
    print(f"next: python data_process.py {NEXT_COMMAND[name]} {out_dir}/text_*.jsonl")
