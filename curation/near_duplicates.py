"""Exact and near-duplicate removal by MinHash and locality-sensitive hashing (LSH), on one machine.

    shingles     = n-grams of the letters and digits: 5 characters in Chinese, 20 in English (about 4 words)
    signature    = for each of 112 hash functions the smallest hash over the shingles       (Broder 1997)
    P(two signatures agree at one index) = Jaccard similarity s of the two sets of shingles
    candidates   = all 8 hashes of at least one of 14 bands agree:  P = 1 - (1 - s^8)^14
                   s = 0.6: 0.21   0.7: 0.56   0.8: 0.92   0.85: 0.99   0.9: 1.00

The 14 bands of 8 hashes follow FineWeb (Penedo et al. 2024, arXiv 2406.17557, section 3.4). MindLLM (Yang et al. 2023,
arXiv 2310.15777) deduplicates by MinHash LSH too. Candidates are merged into clusters; the first document of each
cluster is kept.

Three passes: signatures (parallel, stored on disk, resumable), clusters (one band at a time), writing.
Temporary disk space: 120 bytes per document. Memory: about 40 bytes per document during clustering.
For several machines: cluster_dedup.py runs the same method with datatrove.

Read next: ngrams.py (the hashes), transform.py (writing the output).
"""

import functools
import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from common.cli import flag
from common.errors import UserError, import_package
from common.packages import install_advice
from corpus.dataset_writer import dataset_staging_folder
from corpus.job_state import SIGNING_FILE, JobProgress, input_fingerprints
from corpus.language import detect_language
from corpus.row_text import DEFAULT_READER, RowReader
from corpus.stats import DataStats
from curation.ngrams import alphanumeric, code_points, hash64, ngram_hashes
from curation.rule_stats import EXAMPLES_PER_RULE, Decision, RuleHit, RuleStats
from curation.transform import (
    CurationConfig,
    NumberedRow,
    Transform,
    batch_rows,
    map_in_order,
    read_numbered_rows,
    run_transform,
    to_json_line,
)

NUM_BANDS, HASHES_PER_BAND = 14, 8
NUM_HASHES = NUM_BANDS * HASHES_PER_BAND
MINHASH_SEED = 42
SHINGLE_LENGTH = {"zh": 5, "en": 20}
KEYS_PER_DOCUMENT = NUM_BANDS + 1  # uint64 values stored per document: one per band, and the hash of its text


@dataclass(frozen=True)
class DedupConfig(CurationConfig):
    """drop duplicates and near-duplicates (MinHash, locality-sensitive hashing)"""

    out_dir: str = "dataset/dedup"
    exact_only: bool = flag(False, "drop only documents with equal text, ignoring white space")
    executor: str = flag("here", "here: one machine, fast; others: datatrove, one task per file",
                         choices=("here", "local", "slurm", "ray"))  # fmt: skip
    partition: str = flag("", "slurm only: partition of the jobs")
    time: str = flag("24:00:00", "slurm only: time limit of a job")

    def check(self) -> None:
        if self.executor != "here" and self.exact_only:
            raise UserError("--exact_only cannot be combined with --executor: it takes minutes on one machine")
        if self.executor == "slurm" and not self.partition:
            raise UserError("--executor slurm needs --partition NAME: `sinfo` lists them")


# ---- one document ----------------------------------------------------------------------------------------------------
def shingle_hashes(text: str) -> np.ndarray:
    """Hashes of the shingles, shape (num_shingles >= 1,), uint64. A text shorter than a shingle is one shingle."""
    codes = code_points(alphanumeric(text) or "".join(text.split()))
    return ngram_hashes(codes, min(SHINGLE_LENGTH[detect_language(text)], len(codes)))


def minhash_signatures(shingle_sets: list[np.ndarray]) -> np.ndarray:
    """MinHash signatures, shape (documents, 112), uint32. Raises UserError if rensa is not installed."""
    set_ends = np.cumsum([0, *map(len, shingle_sets)]).astype(np.uint64)
    matrix = _import_rensa().RMinHash.digest_matrix_from_flat_token_hashes(
        np.concatenate(shingle_sets), set_ends, NUM_HASHES, MINHASH_SEED
    )
    return np.array(matrix.to_rows(), dtype=np.uint32)


def _import_rensa() -> Any:
    return import_package("rensa", install_advice("dedup", "rensa", otherwise="--exact_only"))


def band_keys(signatures: np.ndarray) -> np.ndarray:
    """(documents, 112) signatures -> (documents, 14) keys, uint64: the keys of equal bands are equal."""
    halves = signatures.astype(np.uint64).reshape(len(signatures), NUM_BANDS, HASHES_PER_BAND // 2, 2)
    pairs = halves[..., 0] << np.uint64(32) | halves[..., 1]
    key = np.zeros(pairs.shape[:2], np.uint64)
    for i in range(HASHES_PER_BAND // 2):
        key = hash64(key ^ pairs[..., i])
    return key


def row_text_hash(row: NumberedRow) -> int:
    """64-bit hash of a row's text without white space. Chats are equal if roles and texts of all messages are."""
    starts = [0, *(end for _, end in row.turns)]
    parts = [row.kind, *(role for role, _ in row.turns)]
    parts += ["".join(row.text[start:end].split()) for start, end in itertools.zip_longest(starts, starts[1:])]
    text = "\0".join(parts) if row.turns else "".join(row.text.split())
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def document_keys(rows: list[NumberedRow], exact_only: bool) -> np.ndarray:
    """Keys of the rows, shape (documents, 15): 14 band keys (0 with `exact_only`) and the hash of the text."""
    keys = np.zeros((len(rows), KEYS_PER_DOCUMENT), np.uint64)
    keys[:, NUM_BANDS] = [row_text_hash(row) for row in rows]
    if not exact_only:
        keys[:, :NUM_BANDS] = band_keys(minhash_signatures([shingle_hashes(row.text) for row in rows]))
    return keys


# ---- all documents ---------------------------------------------------------------------------------------------------
def write_document_keys(config: DedupConfig, report: DataStats, on_batch: Callable[[], None]) -> Path:
    """Write the keys of every row to a file in the staging folder, resuming an earlier run. Returns its path."""
    files, reader, folder = list(config.files), config.reader, dataset_staging_folder(config.out_dir)
    path = folder / "documents.keys"
    job = {"inputs": input_fingerprints(files), "exact_only": config.exact_only, "seed": MINHASH_SEED}
    job |= {"shingle": SHINGLE_LENGTH, **reader.key_settings()}
    progress = JobProgress(folder, job, SIGNING_FILE)
    done = progress.load().get("documents", 0)
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("ab" if done else "wb") as file:
        rows = (row for row in read_numbered_rows(files, report, reader=reader) if row.number >= done)
        hash_rows = functools.partial(document_keys, exact_only=config.exact_only)
        for batch, keys in map_in_order(hash_rows, batch_rows(rows), config.workers):
            file.write(keys.tobytes())
            done += len(batch)
            report.kept = done
            if progress.is_due():
                progress.save({"documents": done}, file)
            on_batch()
        progress.save({"documents": done}, file)
    return path


def cluster_representatives(path: Path, exact_only: bool = False) -> np.ndarray:
    """For every document the number of the first document of its cluster, shape (documents,).

    Clusters are the connected components of the graph whose edges are equal keys.
    """
    count = path.stat().st_size // (KEYS_PER_DOCUMENT * 8)
    first = np.arange(count, dtype=np.int64 if count >= 2**31 else np.int32)
    for band in range(NUM_BANDS if exact_only else 0, KEYS_PER_DOCUMENT):
        keys = _read_key_column(path, band, count)
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        equal_to_previous = keys[1:] == keys[:-1]
        del keys
        merge_clusters(first, order[:-1][equal_to_previous], order[1:][equal_to_previous])
    return first


def _read_key_column(path: Path, band: int, count: int, documents_per_read: int = 1 << 18) -> np.ndarray:
    """One key of every document, shape (count,), read in blocks to bound the memory."""
    keys = np.empty(count, np.uint64)
    with path.open("rb") as file:
        for start in range(0, count, documents_per_read):
            block = np.fromfile(file, np.uint64, min(documents_per_read, count - start) * KEYS_PER_DOCUMENT)
            keys[start : start + documents_per_read] = block.reshape(-1, KEYS_PER_DOCUMENT)[:, band]
    return keys


def merge_clusters(first: np.ndarray, ones: np.ndarray, others: np.ndarray) -> None:
    """Merge the clusters of each pair (ones[i], others[i]) in place; first[i] is the lowest number in i's cluster."""
    separate = first[ones] != first[others]
    for one, other in zip(first[ones[separate]].tolist(), first[others[separate]].tolist(), strict=True):
        one, other = _find_root(first, one), _find_root(first, other)
        first[max(one, other)] = min(one, other)
    while True:  # path compression: every document points to its root
        parents = first[first]
        if np.array_equal(parents, first):
            return
        first[:] = parents


def _find_root(first: np.ndarray, i: int) -> int:
    while (parent := int(first[i])) != i:
        first[i] = first[parent]
        i = parent
    return i


# ---- the transform ---------------------------------------------------------------------------------------------------
class KeepFirstOfCluster(Transform):
    """Keeps the first row of each cluster and drops the others.

    representatives: number of the first document in the cluster of each document, shape (documents,).
    hashes: hashes[i] is the hash of the text of document i.
    """

    name = "dedup"

    def __init__(
        self, representatives: np.ndarray, hashes: Any, exact_only: bool = False, reader: RowReader = DEFAULT_READER
    ) -> None:
        self.representatives, self.hashes, self.exact_only, self.reader = representatives, hashes, exact_only, reader
        self.locations: dict[int, str] = {}  # first document of a cluster with duplicates -> file:line
        self.example_texts: dict[int, str] = {}  # the same -> beginning of its text, for examples
        numbers = np.flatnonzero(representatives != np.arange(len(representatives)))
        self.has_duplicates = np.zeros(len(representatives), bool)
        self.has_duplicates[representatives[numbers]] = True
        lowest = numbers[np.argsort(_sample_keys(numbers), kind="stable")[: 4 * EXAMPLES_PER_RULE]].tolist()
        self.example_rows = {*lowest, *representatives[lowest].tolist()}

    def rule_names(self) -> list[str]:
        return ["exact duplicate"] if self.exact_only else ["exact duplicate", "near-duplicate"]

    def fingerprint_fields(self) -> dict[str, Any]:
        return {"exact_only": self.exact_only, "shingle": SHINGLE_LENGTH, "bands": [NUM_BANDS, HASHES_PER_BAND]}

    def skip_row(self, row: NumberedRow) -> None:
        if self.has_duplicates[row.number]:
            self.locations[row.number] = f"{row.file}:{row.line}"
            if row.number in self.example_rows:
                self.example_texts[row.number] = row.text[:150]

    def apply_to_row(self, row: NumberedRow) -> Decision:
        self.skip_row(row)
        i, first = row.number, int(self.representatives[row.number])
        language, characters = detect_language(row.text), len(row.text)
        if first == i:
            return Decision(to_json_line(row.raw), language, characters)
        rule = "exact duplicate" if self.hashes[i] == self.hashes[first] else "near-duplicate"
        location = self.locations.get(first, f"document {first + 1:,} of all files")  # if another task read its file
        example = ""
        if i in self.example_rows:
            example = f"kept: {self.example_texts.get(first, location)}\nthis: {row.text[:150]}"
        sample_key = int(_sample_keys(np.array([i]))[0])
        return Decision(None, language, characters, [RuleHit(rule, characters, f"of {location}", example, sample_key)])


def _sample_keys(numbers: np.ndarray) -> np.ndarray:
    """Hashes of document numbers: the duplicates with the lowest ones are the examples of the report."""
    return hash64(numbers.astype(np.uint64)) >> np.uint64(33)


def deduplicate(config: DedupConfig, report: DataStats, on_batch: Callable[[], None]) -> RuleStats:
    """Write the rows without duplicates to --out_dir and return the counts. Raises UserError as `run_transform`."""
    if not config.exact_only:
        _import_rensa()
    hashing_report = config.new_stats()
    report.bytes_read = lambda: hashing_report.bytes_read()  # the first pass replaces the function
    keys = write_document_keys(config, hashing_report, on_batch)
    first = cluster_representatives(keys, config.exact_only)
    hashes = _read_key_column(keys, NUM_BANDS, len(first))
    transform = KeepFirstOfCluster(first, hashes, config.exact_only, config.reader)
    return run_transform(transform, replace(config, workers=1), report, on_batch)
