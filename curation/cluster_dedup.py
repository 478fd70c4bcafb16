"""The same deduplication as near_duplicates.py on many machines, as a datatrove pipeline: one file of rows is one task.

    1  sign      a task a file, as in near_duplicates.py, sorted, a file a band datatrove's MinhashDedupSignature
    2  buckets   a task a band: pairs of documents whose bands are equal           datatrove's MinhashDedupBuckets
    3  clusters  one task: pairs -> clusters, the first document stays             dedup.join
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
from corpus.job_state import inputs_of
from corpus.readers import Path_
from corpus.row_text import READER, RowReader
from corpus.shard_writer import partial_folder, publish, writing
from corpus.stats import DataReport
from curation.near_duplicates import BANDS, ROWS, Clusters, KeepFirst, join, row_hash, shingles, signatures_of_shingles
from curation.rule_stats import Tally
from curation.transform import as_line, batches, check_out_dir, finish, numbered_rows

try:
    from datatrove.data import Document
    from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
    from datatrove.pipeline.base import PipelineStep
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets, MinhashDedupSignature
    from datatrove.utils.hashing import HashConfig
except ImportError:
    raise UserError('--executor needs one more package: pip install "datatrove>=0.6,<0.11"') from None

EXECUTORS = ("local", "slurm", "ray")
CONFIG = MinhashConfig(num_buckets=BANDS, hashes_per_bucket=ROWS, hash_config=HashConfig(precision=32))
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Job:
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

    def report(self) -> DataReport:
        """An empty report with the limits of the job."""
        return DataReport(self.max_bad_share, self.accept_damaged)

    @property
    def cluster(self) -> Path:
        return Path(self.folder) / "cluster"

    @property
    def logs(self) -> Path:
        """datatrove's notes on which tasks are done; beside the folder, because the last task renames that."""
        return Path(self.out_dir + ".log")


# ---- the steps: called as step(data, rank, world_size) ---------------------------------------------------------------
@dataclass
class Read:
    """The rows of the task's own file as datatrove's documents; leaves the hashes of the texts behind."""

    job: Job

    def __call__(self, data: Any, rank: int, world_size: int) -> Iterator[Document]:
        hashes = []
        for row in numbered_rows([self.job.paths[rank]], self.job.report(), 0, self.job.reader):
            hashes.append(row_hash(row))
            yield Document(text=row.text, id=str(row.number))
        np.save(self.job.cluster / f"hashes_{rank:05d}.npy", np.array(hashes, np.uint64))


class Sign(MinhashDedupSignature):
    """datatrove's first step with our shingles and rensa's hash functions in place of its own."""

    def __init__(self, job: Job) -> None:
        PipelineStep.__init__(self)  # its own constructor loads a word tokenizer, which n-grams of characters need not
        from datatrove.io import get_datafolder

        self.output_folder = get_datafolder(str(job.cluster / "signatures"))
        self.config, self.skip_existing_sigs = CONFIG, False

    def get_shingles(self, text: str) -> np.ndarray:
        return shingles(text)

    def get_signature(self, shingles: np.ndarray) -> list[list[int]]:
        return signatures_of_shingles([shingles])[0].reshape(BANDS, ROWS).tolist()


@dataclass
class Cluster:
    """Pairs of all bands -> for every document the first of its cluster, numbered over all files in their order."""

    job: Job

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        counts = [
            len(np.load(self.job.cluster / f"hashes_{i:05d}.npy", mmap_mode="r", allow_pickle=False))
            for i in range(len(self.job.paths))
        ]
        starts = np.cumsum([0, *counts])
        first = np.arange(starts[-1])
        for path in sorted((self.job.cluster / "pairs").glob("*.dups")):
            pairs = np.fromfile(path, "<u4").reshape(-1, 4).astype(np.int64)
            join(first, starts[pairs[:, 0]] + pairs[:, 1], starts[pairs[:, 2]] + pairs[:, 3])
        np.save(self.job.cluster / "first.npy", first)
        np.save(self.job.cluster / "starts.npy", starts)


@dataclass
class Write:
    """The rows of the task's file that are the first of their cluster, and the counts."""

    job: Job

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        first = np.load(self.job.cluster / "first.npy", mmap_mode="r", allow_pickle=False)
        start = int(np.load(self.job.cluster / "starts.npy", allow_pickle=False)[rank])
        hashes = _Hashes(self.job)
        step = KeepFirst(Clusters(first, hashes), exact_only=False)
        tally, report = Tally(step.rule_names()), self.job.report()
        name = Path(self.job.folder) / f"text_{rank:03d}.jsonl"
        with name.open("wb") as kept, (self.job.cluster / f"dropped_{rank:05d}.tsv").open("wb") as dropped:
            for batch in batches(numbered_rows([self.job.paths[rank]], report, start, self.job.reader)):
                for row, verdict in zip(batch, step.judge(batch), strict=True):
                    tally.add(row.file, row.line, verdict)
                    if verdict.kept is not None:
                        kept.write(as_line(row.row))
                    else:
                        dropped.write(row.dropped_line(verdict))
        content = {"tally": tally.to_dict(), "report": report.to_dict()}
        write_json(self.job.cluster / f"tally_{rank:05d}.json", content)


class _Hashes:
    """The hash of the text of document i, over the files of all tasks."""

    def __init__(self, job: Job) -> None:
        self.starts = np.load(job.cluster / "starts.npy", allow_pickle=False)
        self.files = [
            np.load(job.cluster / f"hashes_{i:05d}.npy", mmap_mode="r", allow_pickle=False)
            for i in range(len(job.paths))
        ]

    def __getitem__(self, i: int) -> int:
        which = int(np.searchsorted(self.starts, i, side="right")) - 1
        return int(self.files[which][i - self.starts[which]])


@dataclass
class Finish:
    """Put the counts together, write the reports, and give the folder its name."""

    job: Job

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        folder, tally, report = Path(self.job.folder), Tally(), self.job.report()
        with (folder / "dropped.tsv").open("wb") as dropped:
            for i in range(len(self.job.paths)):
                content = json.loads((self.job.cluster / f"tally_{i:05d}.json").read_text(encoding="utf-8"))
                tally.merge(content["tally"])
                report.merge(content["report"])
                dropped.write((self.job.cluster / f"dropped_{i:05d}.tsv").read_bytes())
        step = KeepFirst(Clusters(np.zeros(0, np.int64), []), exact_only=False)
        finish(step, list(self.job.paths), folder, tally, report)
        remove(self.job.cluster)
        publish(folder, self.job.out_dir)


# ---- the executors ---------------------------------------------------------------------------------------------------
def stages(job: Job) -> list[tuple[str, list[Any], int]]:
    """(name, pipeline, tasks) of each stage."""
    pairs, signed = str(job.cluster / "pairs"), str(job.cluster / "signatures")
    many = len(job.paths)
    return [
        ("sign", [Read(job), Sign(job)], many),
        ("buckets", [MinhashDedupBuckets(signed, pairs, config=CONFIG, lines_to_buffer=10_000)], BANDS),
        ("clusters", [Cluster(job)], 1),
        ("write", [Write(job)], many),
        ("finish", [Finish(job)], 1),
    ]


def deduplicate_many(
    paths: list[Path_],
    out_dir: Path_,
    executor: str,
    workers: int,
    report: DataReport,
    slurm: dict[str, str],
    reader: RowReader = READER,
) -> Tally | None:
    """Run or submit the five stages; the counts, or None when the jobs were only submitted (Slurm).

    `report`: an empty one; its limits apply to every task. `slurm`: partition, time. Raises UserError for what the user
    can mend.
    """
    check_out_dir(out_dir, paths)
    if executor == "slurm" and not shutil.which("sbatch"):
        raise UserError(
            "--executor slurm: there is no sbatch on this machine: run the command where jobs are submitted"
        )
    signatures_of_shingles([shingles("is rensa installed?")])
    folder = partial_folder(out_dir).absolute()
    files = [str(Path(path).resolve()) for path in paths]
    job = Job(
        files, str(Path(out_dir).absolute()), str(folder), report.max_bad_share, report.accept_damaged, reader.keys
    )
    with writing(out_dir):
        _continue_or_clear(job, paths)
    if executor == "slurm":
        _submit(job, workers, slurm)
        return None
    if executor == "ray":
        _start_ray(workers)
    with writing(out_dir):
        for name, pipeline, tasks in stages(job):
            kind = LocalPipelineExecutor if executor == "local" else RayPipelineExecutor
            at_once = min(workers, tasks)
            with _messages_to(job.logs / "messages.txt"):
                kind(pipeline, tasks=tasks, workers=at_once, logging_dir=str(job.logs / name)).run()
            if len(list((job.logs / name / "completions").glob("*"))) < tasks:
                raise UserError(f"{name}: not every task succeeded: see {job.logs}, then repeat the command")
            print(f"{name}: {tasks} tasks done", flush=True)
        remove(job.logs)
    return Tally.of_report(Path(out_dir) / "report.json")


@contextlib.contextmanager
def _messages_to(path: Path) -> Iterator[None]:
    """What datatrove writes to the screen goes to a file, also from its processes."""
    screen = os.dup(2)
    with path.open("a", encoding="utf-8") as file, contextlib.redirect_stderr(file):
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(screen, 2)
            os.close(screen)


def _continue_or_clear(job: Job, paths: list[Path_]) -> None:
    """Leftovers of other files go; those of the same files stay, and so the tasks that are done."""
    content = {"inputs": inputs_of(paths), "bands": [BANDS, ROWS], **job.reader.job()}
    known = job.cluster / "job.json"
    remove_leftovers(job.cluster)
    if not known.is_file() or json.loads(known.read_text(encoding="utf-8")) != json.loads(json.dumps(content)):
        remove(job.folder)
        remove(job.logs)
        job.cluster.mkdir(parents=True)
        write_json(known, content)
    job.logs.mkdir(exist_ok=True)


def _submit(job: Job, workers: int, slurm: dict[str, str]) -> None:
    before = None
    programs = sysconfig.get_path("scripts")
    for name, pipeline, tasks in stages(job):
        before = SlurmPipelineExecutor(
            pipeline,
            tasks=tasks,
            workers=workers,
            time=slurm["time"],
            partition=slurm["partition"],
            qos="",
            job_name=f"dedup_{name}",
            logging_dir=str(job.logs / name),
            env_command=f'export PYTHONPATH="{ROOT}:$PYTHONPATH" PATH="{programs}:$PATH"',
            depends=before,
        )
        before.run()
    print(f"submitted: five job arrays; {job.out_dir} appears when the last one is done, logs in {job.logs}")


def _start_ray(workers: int) -> None:
    try:
        import ray
    except ImportError:
        raise UserError('--executor ray needs one more package: pip install "ray>=2.9,<3"') from None
    environment = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    if not ray.is_initialized():
        cpus = None if os.environ.get("RAY_ADDRESS") else workers  # a cluster that is there knows its own
        ray.init(runtime_env=environment, log_to_driver=False, num_cpus=cpus)
