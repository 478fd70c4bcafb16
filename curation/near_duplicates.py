"""Documents that are copies of others, or nearly: found by MinHash and locality-sensitive hashing, one machine.

    shingles     = n-grams of the letters and digits: 5 characters in Chinese, 20 in English (about a sentence part)
    signature    = for each of 112 hash functions the smallest hash over the shingles       (Broder 1997)
    P(two signatures agree at one place) = Jaccard similarity s of the two sets of shingles
    candidates   = equal in all 8 places of at least one of 14 bands:  P = 1 - (1 - s^8)^14
                   s = 0.6: 0.21   0.7: 0.56   0.8: 0.92   0.85: 0.99   0.9: 1.00

Fourteen bands of eight are what FineWeb used (Penedo et al. 2024, arXiv 2406.17557, section 3.4). Candidates are joined
to clusters, and of each cluster the first document stays. MindLLM (Yang et al. 2023, arXiv 2310.15777) deduplicates by
MinHash LSH, too.

Three passes: signatures (parallel, kept on disk, continued after a kill), clusters (one band at a time), writing.
On disk while it runs: 120 bytes a document. In memory: about 40 bytes a document, while the clusters are found.
For more than one machine: cluster_dedup.py does the same with datatrove.

Read next: ngrams.py (the hashes), transform.py (the writing).
"""

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.errors import UserError
from corpus.job_state import SIGNING, Progress, inputs_of
from corpus.language import language_of
from corpus.readers import Path_
from corpus.row_text import READER, RowReader
from corpus.shard_writer import partial_folder, writing
from corpus.stats import DataReport
from curation.ngrams import codes_of, mix, ngram_hashes, skeleton
from curation.rule_stats import EXAMPLES, Mark, Tally, Verdict
from curation.transform import (
    Row,
    as_line,
    batches,
    check_out_dir,
    in_order,
    numbered_rows,
    rewrite,
)

BANDS, ROWS = 14, 8
PLACES = BANDS * ROWS
SEED = 42
SHINGLE = {"zh": 5, "en": 20}
KEYS = BANDS + 1  # of a document on disk: its bands, and the hash of its text


# ---- one document ----------------------------------------------------------------------------------------------------
def shingles(text: str) -> np.ndarray:
    """Hashes of the shingles, shape (at least 1,), uint64. A text shorter than a shingle is one itself."""
    codes = codes_of(skeleton(text) or "".join(text.split()))
    return ngram_hashes(codes, min(SHINGLE[language_of(text)], len(codes)))


def signatures_of_shingles(sets: list[np.ndarray]) -> np.ndarray:
    """MinHash signatures, shape (documents, 112), uint32, of their shingles. Raises UserError without rensa."""
    ends = np.cumsum([0, *map(len, sets)]).astype(np.uint64)
    matrix = _rensa().RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(sets), ends, PLACES, SEED)
    return np.array(matrix.to_rows(), dtype=np.uint32)


def _rensa() -> Any:
    try:
        import rensa
    except ImportError:
        raise UserError(
            'near-duplicates need one more package: pip install "rensa>=0.5,<0.6", or --exact_only'
        ) from None
    return rensa


def band_keys(found: np.ndarray) -> np.ndarray:
    """(documents, 112) signatures -> (documents, 14) keys, uint64: equal where a whole band is."""
    halves = found.astype(np.uint64).reshape(len(found), BANDS, ROWS // 2, 2)
    pairs = halves[..., 0] << np.uint64(32) | halves[..., 1]
    key = np.zeros(pairs.shape[:2], np.uint64)
    for i in range(ROWS // 2):
        key = mix(key ^ pairs[..., i])
    return key


def row_hash(row: Row) -> int:
    """64-bit hash of a row's text without regard to white space; chats are equal if each of their messages is."""
    starts = [0, *(end for _, end in row.turns)]
    parts = [row.kind, *(role for role, _ in row.turns)]
    parts += ["".join(row.text[start:end].split()) for start, end in itertools.zip_longest(starts, starts[1:])]
    text = "\0".join(parts) if row.turns else "".join(row.text.split())
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@dataclass
class Signer:
    """(documents, 15) keys of a batch of rows; exact only: the band keys are zero. Runs in worker processes."""

    exact_only: bool

    def __call__(self, rows: list[Row]) -> np.ndarray:
        keys = np.zeros((len(rows), KEYS), np.uint64)
        keys[:, BANDS] = [row_hash(row) for row in rows]
        if not self.exact_only:
            keys[:, :BANDS] = band_keys(signatures_of_shingles([shingles(row.text) for row in rows]))
        return keys


# ---- all documents ---------------------------------------------------------------------------------------------------
def sign_all(
    paths: list[Path_],
    out_dir: Path_,
    signer: Signer,
    on_batch: Callable[[], None],
    workers: int,
    report: DataReport,
    reader: RowReader = READER,
) -> Path:
    """Write the keys of every row to a file in the partial folder and return its path; continues an earlier run's."""
    folder = partial_folder(out_dir)
    path = folder / "documents.keys"
    job = {"inputs": inputs_of(paths), "exact_only": signer.exact_only, "seed": SEED, "shingle": SHINGLE}
    job |= reader.job()
    progress = Progress(folder, job, SIGNING)
    done = progress.load().get("documents", 0)
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("ab" if done else "wb") as file:
        rows = (row for row in numbered_rows(paths, report, reader=reader) if row.number >= done)
        for batch, keys in in_order(signer, batches(rows), workers):
            file.write(keys.tobytes())
            done += len(batch)
            report.kept = done
            if progress.due():
                progress.save({"documents": done}, file)
            on_batch()
        progress.save({"documents": done}, file)
    return path


def first_of_cluster(path: Path, exact_only: bool = False) -> np.ndarray:
    """For every document the number of the first document of its cluster (its own, if it stays), shape (documents,).

    Documents are in one cluster if a chain of equal keys joins them.
    """
    count = path.stat().st_size // (KEYS * 8)
    first = np.arange(count, dtype=np.int64 if count >= 2**31 else np.int32)
    for band in range(BANDS if exact_only else 0, KEYS):
        keys = _column(path, band, count)
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        same = keys[1:] == keys[:-1]
        del keys
        join(first, order[:-1][same], order[1:][same])
    return first


def _column(path: Path, band: int, count: int, at_once: int = 1 << 18) -> np.ndarray:
    """One key of every document, read in pieces, so that the others never fill the memory."""
    keys = np.empty(count, np.uint64)
    with path.open("rb") as file:
        for start in range(0, count, at_once):
            piece = np.fromfile(file, np.uint64, min(at_once, count - start) * KEYS)
            keys[start : start + at_once] = piece.reshape(-1, KEYS)[:, band]
    return keys


def join(first: np.ndarray, ones: np.ndarray, others: np.ndarray) -> None:
    """Put the clusters of each pair together, in place; `first` maps every document to its cluster's lowest number."""
    new = first[ones] != first[others]
    for one, other in zip(first[ones[new]].tolist(), first[others[new]].tolist(), strict=True):
        one, other = _root(first, one), _root(first, other)
        first[max(one, other)] = min(one, other)
    while True:  # every document points to its root again
        further = first[first]
        if np.array_equal(further, first):
            return
        first[:] = further


def _root(first: np.ndarray, i: int) -> int:
    while (up := int(first[i])) != i:
        first[i] = first[up]
        i = up
    return i


# ---- the step --------------------------------------------------------------------------------------------------------
class Clusters(NamedTuple):
    first: np.ndarray  # (documents,): the number of the first document of each one's cluster
    hashes: Any  # hashes[i] of the text of document i


@dataclass
class KeepFirst:
    """The step that writes: a row stays if it is the first of its cluster."""

    clusters: Clusters
    exact_only: bool
    reader: RowReader = READER
    name: str = "dedup"
    places: dict[int, str] = field(default_factory=dict)  # where the first document of a cluster of several stands
    shown: dict[int, str] = field(default_factory=dict)  # its text, for the examples only

    def __post_init__(self) -> None:
        first = self.clusters.first
        numbers = np.flatnonzero(first != np.arange(len(first)))
        self.several = np.zeros(len(first), bool)
        self.several[first[numbers]] = True
        ranks = mix(numbers.astype(np.uint64)) >> np.uint64(33)
        lowest = numbers[np.argsort(ranks, kind="stable")[: 4 * EXAMPLES]].tolist()
        self.examples = {*lowest, *first[lowest].tolist()}

    def rule_names(self) -> list[str]:
        return ["exact duplicate"] if self.exact_only else ["exact duplicate", "near-duplicate"]

    def job(self) -> dict[str, Any]:
        return {"exact_only": self.exact_only, "shingle": SHINGLE, "bands": [BANDS, ROWS]}

    def about(self) -> dict[str, Any]:
        return self.job()

    def pass_over(self, row: Row) -> None:
        if self.several[row.number]:
            self.places[row.number] = f"{row.file}:{row.line}"
            if row.number in self.examples:
                self.shown[row.number] = row.text[:150]

    def judge(self, rows: list[Row]) -> list[Verdict]:
        return [self._judge(row) for row in rows]

    def _judge(self, row: Row) -> Verdict:
        self.pass_over(row)
        i, first = row.number, int(self.clusters.first[row.number])
        language = language_of(row.text)
        if first == i:
            return Verdict(as_line(row.row), language, len(row.text))
        rule = "exact duplicate" if self.clusters.hashes[i] == self.clusters.hashes[first] else "near-duplicate"
        place = self.places.get(first, f"document {first + 1:,} of all files")  # one of another task's file
        example = f"kept: {self.shown.get(first, place)}\nthis: {row.text[:150]}" if i in self.examples else ""
        return Verdict(None, language, len(row.text), [Mark(rule, len(row.text), f"of {place}", example, _rank(i))])


def _rank(number: int) -> int:
    return int(mix(np.array([number], np.uint64))[0] >> np.uint64(33))


def deduplicate(
    paths: list[Path_],
    out_dir: Path_,
    report: DataReport,
    on_batch: Callable[[], None],
    workers: int = 1,
    exact_only: bool = False,
    reader: RowReader = READER,
) -> Tally:
    """Write the rows that are no copies to `out_dir` and return the counts. Raises UserError as `rewrite` does."""
    check_out_dir(out_dir, paths)
    if not exact_only:
        _rensa()
    with writing(out_dir):
        signing = DataReport(report.max_bad_share, report.accept_damaged)
        report.position = lambda: signing.position()
        keys = sign_all(paths, out_dir, Signer(exact_only), on_batch, workers, signing, reader)
        first = first_of_cluster(keys, exact_only)
        hashes = _column(keys, BANDS, len(first))
    return rewrite(KeepFirst(Clusters(first, hashes), exact_only, reader), paths, out_dir, report, on_batch)
