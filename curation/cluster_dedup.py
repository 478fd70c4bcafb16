"""The same deduplication as near_duplicates.py on many machines, as a datatrove pipeline: one file of rows is one task.

    1  sign      a task a file, as in near_duplicates.py, sorted, a file a band datatrove's MinhashDedupSignature
    2  buckets   a task a band: pairs of documents whose bands are equal           datatrove's MinhashDedupBuckets
    3  clusters  one task: pairs -> clusters, the first document stays             merge_clusters
    4  write     a task a file: the rows that stay
    5  finish    one task: reports, and the folder gets its name

    --executor local    processes of this machine
    --executor ray      the Ray cluster that `ray status` shows, or one on this machine
    --executor slurm    five job arrays, each waiting for the one before; the folder must be on a disk that all share

Signatures and bands are those of near_duplicates.py, so the kept rows are the same rows. A task that is done is not
done again when the command is repeated. The command holds the lock of the output folder while it hands out the tasks:
with Slurm not until they are done.

Read next: near_duplicates.py (the idea), transform.py (the folder that is written).
"""

import contextlib
import json
import os
import shutil
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.files import remove, remove_leftovers, write_json
from corpus.job_state import input_fingerprints
from corpus.readers import PathLike
from corpus.row_text import DEFAULT_READER, RowReader
from corpus.shard_writer import dataset_staging_folder, replace_dataset, report_write_errors
from corpus.stats import DataStats
from curation.near_duplicates import (
    HASHES_PER_BAND,
    NUM_BANDS,
    Clusters,
    KeepFirstOfCluster,
    merge_clusters,
    minhash_signatures,
    row_text_hash,
    shingle_hashes,
)
from curation.rule_stats import RuleStats
from curation.transform import batch_rows, check_out_dir, read_numbered_rows, to_json_line, write_reports

try:
    from datatrove.data import Document
    from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
    from datatrove.pipeline.base import PipelineStep
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets, MinhashDedupSignature
    from datatrove.utils.hashing import HashConfig
except ImportError:
    raise UserError('--executor needs one more package: pip install "datatrove>=0.6,<0.11"') from None

EXECUTORS = ("local", "slurm", "ray")
MINHASH_CONFIG = MinhashConfig(
    num_buckets=NUM_BANDS, hashes_per_bucket=HASHES_PER_BAND, hash_config=HashConfig(precision=32)
)
_ROOT = Path(__file__).resolve().parent.parent


@dataclass
class DedupJob:
    """What every task knows: the files (one a task), where to work, how many bad rows to put up with."""

    paths: list[str]
    out_dir: str
    folder: str
    max_bad_share: float
    accept_damaged: bool | None
    keys: dict[str, str] = field(default_factory=dict)  # --keys

    @property
    def reader(self) -> RowReader:
        return RowReader(self.keys)

    def report(self) -> DataStats:
        """An empty report with the limits of the job."""
        return DataStats(self.max_bad_share, self.accept_damaged)

    @property
    def work_dir(self) -> Path:
        return Path(self.folder) / "cluster"

    @property
    def log_dir(self) -> Path:
        """datatrove's notes on which tasks are done; beside the folder, because the last task renames that."""
        return Path(self.out_dir + ".log")


# ---- the steps: called as step(data, rank, world_size) ---------------------------------------------------------------
@dataclass
class ReadRows:
    """The rows of the task's own file as datatrove's documents; leaves the hashes of the texts behind."""

    job: DedupJob

    def __call__(self, data: Any, rank: int, world_size: int) -> Iterator[Document]:
        hashes = []
        for row in read_numbered_rows([self.job.paths[rank]], self.job.report(), 0, self.job.reader):
            hashes.append(row_text_hash(row))
            yield Document(text=row.text, id=str(row.number))
        np.save(self.job.work_dir / f"hashes_{rank:05d}.npy", np.array(hashes, np.uint64))


class SignRows(MinhashDedupSignature):
    """datatrove's first step with our shingles and rensa's hash functions in place of its own."""

    def __init__(self, job: DedupJob) -> None:
        PipelineStep.__init__(self)  # its own constructor loads a word tokenizer, which n-grams of characters need not
        from datatrove.io import get_datafolder

        self.output_folder = get_datafolder(str(job.work_dir / "signatures"))
        self.config, self.skip_existing_sigs = MINHASH_CONFIG, False

    def get_shingles(self, text: str) -> np.ndarray:
        return shingle_hashes(text)

    def get_signature(self, shingle_hashes: np.ndarray) -> list[list[int]]:
        return minhash_signatures([shingle_hashes])[0].reshape(NUM_BANDS, HASHES_PER_BAND).tolist()


@dataclass
class FindClusters:
    """Pairs of all bands -> for every document the first of its cluster, numbered over all files in their order."""

    job: DedupJob

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        counts = [
            len(np.load(self.job.work_dir / f"hashes_{i:05d}.npy", mmap_mode="r", allow_pickle=False))
            for i in range(len(self.job.paths))
        ]
        offsets = np.cumsum([0, *counts])
        first = np.arange(offsets[-1])
        for path in sorted((self.job.work_dir / "pairs").glob("*.dups")):
            pairs = np.fromfile(path, "<u4").reshape(-1, 4).astype(np.int64)
            merge_clusters(first, offsets[pairs[:, 0]] + pairs[:, 1], offsets[pairs[:, 2]] + pairs[:, 3])
        np.save(self.job.work_dir / "first.npy", first)
        np.save(self.job.work_dir / "starts.npy", offsets)


@dataclass
class WriteRows:
    """The rows of the task's file that are the first of their cluster, and the counts."""

    job: DedupJob

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        first = np.load(self.job.work_dir / "first.npy", mmap_mode="r", allow_pickle=False)
        first_number = int(np.load(self.job.work_dir / "starts.npy", allow_pickle=False)[rank])
        hashes = _TextHashes(self.job)
        transform = KeepFirstOfCluster(Clusters(first, hashes), exact_only=False)
        rule_stats, report = RuleStats(transform.rule_names()), self.job.report()
        name = Path(self.job.folder) / f"text_{rank:03d}.jsonl"
        with name.open("wb") as kept, (self.job.work_dir / f"dropped_{rank:05d}.tsv").open("wb") as dropped:
            for batch in batch_rows(read_numbered_rows([self.job.paths[rank]], report, first_number, self.job.reader)):
                for row, decision in zip(batch, transform.apply(batch), strict=True):
                    rule_stats.add(row.file, row.line, decision)
                    if decision.kept is not None:
                        kept.write(to_json_line(row.raw))
                    else:
                        dropped.write(row.dropped_line(decision))
        content = {"tally": rule_stats.to_dict(), "report": report.to_dict()}
        write_json(self.job.work_dir / f"tally_{rank:05d}.json", content)


class _TextHashes:
    """The hash of the text of document i, over the files of all tasks."""

    def __init__(self, job: DedupJob) -> None:
        self.offsets = np.load(job.work_dir / "starts.npy", allow_pickle=False)
        self.files = [
            np.load(job.work_dir / f"hashes_{i:05d}.npy", mmap_mode="r", allow_pickle=False)
            for i in range(len(job.paths))
        ]

    def __getitem__(self, i: int) -> int:
        file_index = int(np.searchsorted(self.offsets, i, side="right")) - 1
        return int(self.files[file_index][i - self.offsets[file_index]])


@dataclass
class MergeReports:
    """Put the counts together, write the reports, and give the folder its name."""

    job: DedupJob

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        folder, rule_stats, report = Path(self.job.folder), RuleStats(), self.job.report()
        with (folder / "dropped.tsv").open("wb") as dropped:
            for i in range(len(self.job.paths)):
                content = json.loads((self.job.work_dir / f"tally_{i:05d}.json").read_text(encoding="utf-8"))
                rule_stats.merge(content["tally"])
                report.merge(content["report"])
                dropped.write((self.job.work_dir / f"dropped_{i:05d}.tsv").read_bytes())
        transform = KeepFirstOfCluster(Clusters(np.zeros(0, np.int64), []), exact_only=False)
        write_reports(transform, list(self.job.paths), folder, rule_stats, report)
        remove(self.job.work_dir)
        replace_dataset(folder, self.job.out_dir)


# ---- the executors ---------------------------------------------------------------------------------------------------
def pipeline_stages(job: DedupJob) -> list[tuple[str, list[Any], int]]:
    """(name, pipeline, tasks) of each stage."""
    pairs, signatures = str(job.work_dir / "pairs"), str(job.work_dir / "signatures")
    num_files = len(job.paths)
    return [
        ("sign", [ReadRows(job), SignRows(job)], num_files),
        ("buckets", [MinhashDedupBuckets(signatures, pairs, config=MINHASH_CONFIG, lines_to_buffer=10_000)], NUM_BANDS),
        ("clusters", [FindClusters(job)], 1),
        ("write", [WriteRows(job)], num_files),
        ("finish", [MergeReports(job)], 1),
    ]


def deduplicate_on_cluster(
    paths: list[PathLike],
    out_dir: PathLike,
    executor: str,
    workers: int,
    report: DataStats,
    slurm: dict[str, str],
    reader: RowReader = DEFAULT_READER,
) -> RuleStats | None:
    """Run or submit the five stages; the counts, or None when the jobs were only submitted (Slurm).

    `report`: an empty one; its limits apply to every task. `slurm`: partition, time. Raises UserError for what the user
    can mend.
    """
    check_out_dir(out_dir, paths)
    if executor == "slurm" and not shutil.which("sbatch"):
        raise UserError(
            "--executor slurm: there is no sbatch on this machine: run the command where jobs are submitted"
        )
    minhash_signatures([shingle_hashes("is rensa installed?")])
    folder = dataset_staging_folder(out_dir).absolute()
    files = [str(Path(path).resolve()) for path in paths]
    job = DedupJob(
        files, str(Path(out_dir).absolute()), str(folder), report.max_bad_share, report.accept_damaged, reader.keys
    )
    with report_write_errors(out_dir):
        _resume_or_clear(job, paths)
    if executor == "slurm":
        _submit_slurm_jobs(job, workers, slurm)
        return None
    if executor == "ray":
        _start_ray(workers)
    with report_write_errors(out_dir):
        for name, pipeline, tasks in pipeline_stages(job):
            executor_class = LocalPipelineExecutor if executor == "local" else RayPipelineExecutor
            num_workers = min(workers, tasks)
            with _redirect_stderr(job.log_dir / "messages.txt"):
                executor_class(pipeline, tasks=tasks, workers=num_workers, logging_dir=str(job.log_dir / name)).run()
            if len(list((job.log_dir / name / "completions").glob("*"))) < tasks:
                raise UserError(f"{name}: not every task succeeded: see {job.log_dir}, then repeat the command")
            print(f"{name}: {tasks} tasks done", flush=True)
        remove(job.log_dir)
    return RuleStats.from_report(Path(out_dir) / "report.json")


@contextlib.contextmanager
def _redirect_stderr(path: Path) -> Iterator[None]:
    """What datatrove writes to the screen goes to a file, also from its processes."""
    terminal = os.dup(2)
    with path.open("a", encoding="utf-8") as file, contextlib.redirect_stderr(file):
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)


def _resume_or_clear(job: DedupJob, paths: list[PathLike]) -> None:
    """Leftovers of other files go; those of the same files stay, and so the tasks that are done."""
    content = {"inputs": input_fingerprints(paths), "bands": [NUM_BANDS, HASHES_PER_BAND], **job.reader.key_settings()}
    job_file = job.work_dir / "job.json"
    remove_leftovers(job.work_dir)
    if not job_file.is_file() or json.loads(job_file.read_text(encoding="utf-8")) != json.loads(json.dumps(content)):
        remove(job.folder)
        remove(job.log_dir)
        job.work_dir.mkdir(parents=True)
        write_json(job_file, content)
    job.log_dir.mkdir(exist_ok=True)


def _submit_slurm_jobs(job: DedupJob, workers: int, slurm: dict[str, str]) -> None:
    previous = None
    scripts_dir = sysconfig.get_path("scripts")
    for name, pipeline, tasks in pipeline_stages(job):
        previous = SlurmPipelineExecutor(
            pipeline,
            tasks=tasks,
            workers=workers,
            time=slurm["time"],
            partition=slurm["partition"],
            qos="",
            job_name=f"dedup_{name}",
            logging_dir=str(job.log_dir / name),
            env_command=f'export PYTHONPATH="{_ROOT}:$PYTHONPATH" PATH="{scripts_dir}:$PATH"',
            depends=previous,
        )
        previous.run()
    print(f"submitted: five job arrays; {job.out_dir} appears when the last one is done, logs in {job.log_dir}")


def _start_ray(workers: int) -> None:
    try:
        import ray
    except ImportError:
        raise UserError('--executor ray needs one more package: pip install "ray>=2.9,<3"') from None
    environment = {"env_vars": {"PYTHONPATH": str(_ROOT)}}
    if not ray.is_initialized():
        cpus = None if os.environ.get("RAY_ADDRESS") else workers  # a cluster that is there knows its own
        ray.init(runtime_env=environment, log_to_driver=False, num_cpus=cpus)
