"""Curation commands of data_process.py, which run before tokenisation, and the download of public datasets.

    python data_process.py download NAME                            -> dataset/raw/NAME/
    python data_process.py clean FILES…                             -> dataset/clean/
    python data_process.py dedup FILES…                             -> dataset/dedup/
    python data_process.py decontaminate FILES… --against EXAM…     -> dataset/decontaminate/

clean, dedup and decontaminate read the same formats as `pretrain`, `sft` and `dpo` and write rows in their input
format.

Read next: cleaning.py, near_duplicates.py, cluster_dedup.py, decontaminate.py (the transforms), transform.py (output).
"""

from dataclasses import replace
from typing import Any

from common.cli import Config
from common.errors import UserError
from common.locks import lock_output
from common.packages import require_packages
from corpus.dataset_writer import dataset_staging_folder
from corpus.input_files import expand_inputs
from corpus.progress import reading_progress_bar
from curation.catalogue import print_catalogue
from curation.cleaning import CleanConfig, CleaningTransform
from curation.decontaminate import DecontaminateConfig, DecontaminationTransform, build_exam_index
from curation.download import DownloadConfig, download_dataset
from curation.near_duplicates import DedupConfig, deduplicate
from curation.rule_stats import RuleStats
from curation.transform import (
    CurationConfig,
    Transform,
    batch_rows,
    check_out_dir,
    has_progress,
    map_in_order,
    read_numbered_rows,
    run_transform,
    staging_folder_kept_if_resumable,
)

NEXT_COMMAND = {"clean": "dedup", "dedup": "decontaminate", "decontaminate": "pretrain"}


CURATION_COMMANDS: dict[str, type[Config]] = {
    "clean": CleanConfig,
    "dedup": DedupConfig,
    "decontaminate": DecontaminateConfig,
    "download": DownloadConfig,
}


def run_curation_command(name: str, config: Any) -> None:
    """Run a command of CURATION_COMMANDS. Raises UserError for wrong flags or unusable files."""
    if name == "download":
        return download_dataset(config) if config.name else print_catalogue()
    config = replace(config, files=tuple(expand_inputs(config.files)))
    if name == "dedup" and config.executor != "here":
        return deduplicate_with_datatrove(config)
    transform: Transform | None = None  # deduplication makes its own one after reading all rows
    if name == "clean":
        transform = CleaningTransform(config)
        transform.check_packages()
        if config.check_only:
            return print_dry_run(transform, config)
    elif name == "decontaminate":
        exam = build_exam_index(config.against)
        too_short = f"; {exam.too_short:,} questions are too short to search for" if exam.too_short else ""
        print(f"searching for {len(exam.questions):,} questions of {', '.join(exam.names)}{too_short}")
        transform = DecontaminationTransform(exam, config.overlap, config.reader)
    with lock_output(config.out_dir):
        write_curated_rows(transform, config)
    print_next_command(name, config.out_dir)


def write_curated_rows(transform: Transform | None, config: Any) -> None:
    """Pass all rows through the transform (None: deduplication) into --out_dir and print a summary."""
    report = config.new_stats()
    if check_out_dir(config.out_dir, config.files):
        print(f"{config.out_dir} contains an older result: it is replaced when the new one is complete")
    try:
        with staging_folder_kept_if_resumable(config.out_dir), reading_progress_bar(config.files, report) as on_batch:
            if transform:
                rule_stats = run_transform(transform, config, report, on_batch)
            else:
                rule_stats = deduplicate(config, report, on_batch)
    except (UserError, KeyboardInterrupt):
        if has_progress(config.out_dir):
            folder = dataset_staging_folder(config.out_dir)
            print(f"unfinished work is kept in {folder}: the same command continues it")
        raise
    report.print_skipped()
    rule_stats.print()
    speed = f"{report.seconds:.1f} s: {report.megabytes_per_second:.2f} MB/s"
    print(f"{report.text_bytes / 1e6:,.1f} MB of text in {speed}")


def print_dry_run(transform: CleaningTransform, config: CurationConfig) -> None:
    """Print the report of `clean --check` without writing anything."""
    files, report, rule_stats = list(config.files), config.new_stats(), RuleStats(transform.rule_names())
    with reading_progress_bar(files, report) as on_batch:
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
    ray = ("ray",) if config.executor == "ray" else ()
    require_packages(f"--executor {config.executor}", "datatrove", "rensa", *ray)
    with lock_output(config.out_dir):  # held by this process only; the tasks share its folder
        from curation.cluster_dedup import deduplicate_on_cluster  # needs datatrove

        if rule_stats := deduplicate_on_cluster(config):
            rule_stats.print()
            print_next_command("dedup", config.out_dir)


def print_next_command(name: str, out_dir: str) -> None:
    print(f"written: {out_dir} (report.md lists examples of every rule, dropped.tsv every dropped row)")
    print(f"next: python data_process.py {NEXT_COMMAND[name]} {out_dir}/text_*.jsonl")
