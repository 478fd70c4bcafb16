"""Deduplication of near_duplicates.py on several machines, as a datatrove pipeline: each input file is one task.

    stage        tasks           output                                                      implementation
    1  sign      one per file    MinHash signatures, sorted, one file per band               MinhashDedupSignature
    2  buckets   one per band    pairs of documents with an equal band                       MinhashDedupBuckets
    3  clusters  one             for every document the first document of its cluster        merge_clusters
    4  write     one per file    the kept rows
    5  finish    one             the reports; renames the staging folder to --out_dir

    --executor local    processes on this machine
    --executor ray      the Ray cluster that `ray status` shows, or a new one on this machine
    --executor slurm    five job arrays, each depends on the previous one; --out_dir must be on a shared disk

Signatures and bands are those of near_duplicates.py, so both commands keep the same rows. A repeated command skips the
tasks that are complete. The command holds the lock of the output folder while it runs or submits the tasks; it does not
hold it while Slurm runs them.

Read next: near_duplicates.py (the method), transform.py (the files of the output folder).
"""

import contextlib
import json
import os
import shutil
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets, MinhashDedupSignature
from datatrove.utils.hashing import HashConfig

from common.errors import UserError
from common.files import remove, remove_leftovers, report_write_errors, write_json
from corpus.dataset_writer import dataset_staging_folder, replace_dataset
from corpus.job_state import input_fingerprints
from corpus.stats import DataStats
from curation.near_duplicates import (
    HASHES_PER_BAND,
    NUM_BANDS,
    DedupConfig,
    KeepFirstOfCluster,
    merge_clusters,
    minhash_signatures,
    row_text_hash,
    shingle_hashes,
)
from curation.rule_stats import RuleStats
from curation.transform import NumberedRow, batch_rows, check_out_dir, read_numbered_rows, write_reports, write_rows

MINHASH_CONFIG = MinhashConfig(
    num_buckets=NUM_BANDS, hashes_per_bucket=HASHES_PER_BAND, hash_config=HashConfig(precision=32)
)
_ROOT = Path(__file__).resolve().parent.parent


@dataclass
class DedupJob:
    """The configuration with absolute paths, and the folders of the job. Pickled with the tasks."""

    config: DedupConfig

    @property
    def folder(self) -> Path:
        return dataset_staging_folder(self.config.out_dir)

    @property
    def work_dir(self) -> Path:
        return self.folder / "cluster"

    @property
    def log_dir(self) -> Path:
        """datatrove's logs and completion markers; outside the staging folder, which the last task renames."""
        return Path(self.config.out_dir + ".log")

    def load(self, name: str) -> np.ndarray:
        """An array of an earlier task, mapped into memory."""
        array: np.ndarray = np.load(self.work_dir / name, mmap_mode="r", allow_pickle=False)
        return array

    def read_rows(self, rank: int, report: DataStats, first_number: int = 0) -> Iterator[NumberedRow]:
        """The rows of one input file."""
        return read_numbered_rows([self.config.files[rank]], report, first_number, self.config.reader)


# ---- the tasks: datatrove calls them with (data, rank, world_size) after the job -------------------------------------
def read_documents_of_file(job: DedupJob, data: Any, rank: int, world_size: int) -> Iterator[Document]:
    """Yield the rows of the task's file as datatrove documents, and save the hashes of their texts."""
    hashes = []
    for row in job.read_rows(rank, job.config.new_stats()):
        hashes.append(row_text_hash(row))
        yield Document(text=row.text, id=str(row.number))
    np.save(job.work_dir / f"hashes_{rank:05d}.npy", np.array(hashes, np.uint64))


class SignRows(MinhashDedupSignature):
    """MinhashDedupSignature with the shingles of near_duplicates.py and the hash functions of rensa."""

    def __init__(self, job: DedupJob) -> None:
        PipelineStep.__init__(self)  # the parent's constructor loads a word tokenizer; character n-grams need none
        from datatrove.io import get_datafolder

        self.output_folder = get_datafolder(str(job.work_dir / "signatures"))
        self.config, self.skip_existing_sigs = MINHASH_CONFIG, False

    def get_shingles(self, text: str) -> np.ndarray:
        return shingle_hashes(text)

    def get_signature(self, shingle_hashes: np.ndarray) -> list[list[int]]:
        return minhash_signatures([shingle_hashes])[0].reshape(NUM_BANDS, HASHES_PER_BAND).tolist()


def find_clusters(job: DedupJob, data: Any, rank: int, world_size: int) -> None:
    """Merge the pairs of all bands: first[i] is the first document of i's cluster, numbered over all files."""
    hashes = [job.load(f"hashes_{i:05d}.npy") for i in range(len(job.config.files))]
    offsets = np.cumsum([0, *map(len, hashes)])
    first = np.arange(offsets[-1])
    for path in sorted((job.work_dir / "pairs").glob("*.dups")):
        pairs = np.fromfile(path, "<u4").reshape(-1, 4).astype(np.int64)
        merge_clusters(first, offsets[pairs[:, 0]] + pairs[:, 1], offsets[pairs[:, 2]] + pairs[:, 3])
    np.save(job.work_dir / "first.npy", first)
    np.save(job.work_dir / "hashes.npy", np.concatenate(hashes))
    np.save(job.work_dir / "starts.npy", offsets)


def write_rows_of_file(job: DedupJob, data: Any, rank: int, world_size: int) -> None:
    """Write the rows of the task's file that are the first of their cluster, and the task's counts."""
    transform = KeepFirstOfCluster(job.load("first.npy"), job.load("hashes.npy"))
    rule_stats, report = RuleStats(transform.rule_names()), job.config.new_stats()
    kept, dropped = job.folder / f"text_{rank:03d}.jsonl", job.work_dir / f"dropped_{rank:05d}.tsv"
    with kept.open("wb") as kept_file, dropped.open("wb") as dropped_file:
        for batch in batch_rows(job.read_rows(rank, report, int(job.load("starts.npy")[rank]))):
            write_rows(batch, transform.apply(batch), rule_stats, kept_file, dropped_file)
    content = {"tally": rule_stats.to_dict(), "report": report.to_dict()}
    write_json(job.work_dir / f"tally_{rank:05d}.json", content)


def merge_reports(job: DedupJob, data: Any, rank: int, world_size: int) -> None:
    """Merge the counts of all tasks, write the reports, and rename the staging folder to --out_dir."""
    rule_stats, report = RuleStats(), job.config.new_stats()
    with (job.folder / "dropped.tsv").open("wb") as dropped:
        for i in range(len(job.config.files)):
            content = json.loads((job.work_dir / f"tally_{i:05d}.json").read_text(encoding="utf-8"))
            rule_stats.merge(content["tally"])
            report.merge(content["report"])
            dropped.write((job.work_dir / f"dropped_{i:05d}.tsv").read_bytes())
    write_reports(KeepFirstOfCluster(np.zeros(0, np.int64), []), job.config.files, job.folder, rule_stats, report)
    remove(job.work_dir)
    replace_dataset(job.folder, job.config.out_dir)


# ---- the executors ---------------------------------------------------------------------------------------------------
def pipeline_stages(job: DedupJob) -> list[tuple[str, list[Any], int]]:
    """(name, pipeline, number of tasks) of each stage, in order."""
    pairs, signatures = str(job.work_dir / "pairs"), str(job.work_dir / "signatures")
    num_files = len(job.config.files)
    buckets = MinhashDedupBuckets(signatures, pairs, config=MINHASH_CONFIG, lines_to_buffer=10_000)
    return [
        ("sign", [partial(read_documents_of_file, job), SignRows(job)], num_files),
        ("buckets", [buckets], NUM_BANDS),
        ("clusters", [partial(find_clusters, job)], 1),
        ("write", [partial(write_rows_of_file, job)], num_files),
        ("finish", [partial(merge_reports, job)], 1),
    ]


def deduplicate_on_cluster(config: DedupConfig) -> RuleStats | None:
    """Run the five stages and return the counts; with Slurm, submit them and return None.

    Raises UserError if --out_dir cannot be replaced, a package or `sbatch` is missing, or a task fails.
    """
    check_out_dir(config.out_dir, config.files)
    if config.executor == "slurm" and not shutil.which("sbatch"):
        raise UserError("--executor slurm: no sbatch on this machine: run the command on a login node of the cluster")
    minhash_signatures([shingle_hashes("is rensa installed?")])
    out_dir, files = str(Path(config.out_dir).absolute()), tuple(str(Path(path).resolve()) for path in config.files)
    job = DedupJob(replace(config, out_dir=out_dir, files=files))
    with report_write_errors(config.out_dir):
        _resume_or_clear(job, config)
    if config.executor == "slurm":
        _submit_slurm_jobs(job)
        return None
    if config.executor == "ray":
        _start_ray(config.workers)
    with report_write_errors(config.out_dir):
        for name, pipeline, tasks in pipeline_stages(job):
            executor_class = LocalPipelineExecutor if config.executor == "local" else RayPipelineExecutor
            num_workers = min(config.workers, tasks)
            with _redirect_stderr(job.log_dir / "messages.txt"):
                executor_class(pipeline, tasks=tasks, workers=num_workers, logging_dir=str(job.log_dir / name)).run()
            if len(list((job.log_dir / name / "completions").glob("*"))) < tasks:
                raise UserError(f"{name}: not every task succeeded: see {job.log_dir}, then repeat the command")
            print(f"{name}: {tasks} tasks done", flush=True)
        remove(job.log_dir)
    rule_stats = RuleStats()
    rule_stats.merge(json.loads(Path(out_dir, "report.json").read_text(encoding="utf-8")))
    return rule_stats


@contextlib.contextmanager
def _redirect_stderr(path: Path) -> Iterator[None]:
    """Append stderr to a file, at the level of the file descriptor: datatrove's child processes write to it too."""
    terminal = os.dup(2)
    with path.open("a", encoding="utf-8") as file, contextlib.redirect_stderr(file):
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)


def _resume_or_clear(job: DedupJob, config: DedupConfig) -> None:
    """Keep the work of an earlier run of the same job, so its complete tasks are skipped; delete any other."""
    content = {"inputs": input_fingerprints(config.files), "bands": [NUM_BANDS, HASHES_PER_BAND]}
    content |= config.reader.key_settings()
    job_file = job.work_dir / "job.json"
    remove_leftovers(job.work_dir)
    if not job_file.is_file() or json.loads(job_file.read_text(encoding="utf-8")) != json.loads(json.dumps(content)):
        remove(job.folder)
        remove(job.log_dir)
        job.work_dir.mkdir(parents=True)
        write_json(job_file, content)
    job.log_dir.mkdir(exist_ok=True)


def _submit_slurm_jobs(job: DedupJob) -> None:
    config, previous = job.config, None
    scripts_dir = sysconfig.get_path("scripts")
    for name, pipeline, tasks in pipeline_stages(job):
        previous = SlurmPipelineExecutor(
            pipeline,
            tasks=tasks,
            workers=config.workers,
            time=config.time,
            partition=config.partition,
            qos="",
            job_name=f"dedup_{name}",
            logging_dir=str(job.log_dir / name),
            env_command=f'export PYTHONPATH="{_ROOT}:$PYTHONPATH" PATH="{scripts_dir}:$PATH"',
            depends=previous,
        )
        previous.run()
    print(f"submitted: five job arrays; {config.out_dir} appears when the last one is done, logs in {job.log_dir}")


def _start_ray(workers: int) -> None:
    import ray

    environment = {"env_vars": {"PYTHONPATH": str(_ROOT)}}
    if not ray.is_initialized():
        cpus = None if os.environ.get("RAY_ADDRESS") else workers  # a running cluster has its own count
        ray.init(runtime_env=environment, log_to_driver=False, num_cpus=cpus)
