"""The token folder of chats or pairs: its name, the inputs that it was built from, and whether it is current.

    dataset/sft/tokens-<fingerprint>/     the fingerprint is that of the tokenizer and its chat template

meta.json of the folder stores max_seq_len and a fingerprint of the jsonl files.
Read next: tokenize_chats.py (writes the folder), dataset_meta.py.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

from common.errors import UserError
from corpus.dataset_meta import read_meta
from model.tokenizer import ChatTokenizer

ROW_FILES = ("train.jsonl", "val.jsonl")


def data_command(kind: str) -> str:
    """The command that writes "chats" or "pairs"."""
    return f"data_process.py {'dpo' if kind == 'pairs' else 'sft'}"


def token_folder_name(tokenizer: ChatTokenizer) -> str:
    """tokens-<rendering fingerprint>: the fingerprint of the tokenizer and its chat template."""
    return f"tokens-{tokenizer.rendering_fingerprint}"


def token_inputs(folder: Path, max_seq_len: int, kind: str) -> dict[str, Any]:
    """The inputs of a token folder besides the tokenizer; meta.json stores them to detect an outdated folder."""
    return {"max_seq_len": max_seq_len, "source": _fingerprint_rows(folder, kind)}


def _fingerprint_rows(folder: Path, kind: str) -> dict[str, str]:
    """Fingerprints of the jsonl files, from size, first and last MiB: fast enough to check at every start."""
    result = {}
    for name in ROW_FILES:
        path = folder / name
        if not path.is_file():
            raise UserError(
                f"no {kind} in {folder} ({name} is missing): run `python {data_command(kind)} FILES…` first"
            )
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest = hashlib.blake2b(str(size).encode(), digest_size=8)
            for start in (0, max(0, size - (1 << 20))):
                file.seek(start)
                digest.update(file.read(1 << 20))
        result[name] = digest.hexdigest()
    return result


def is_current(target: Path, job: dict[str, Any]) -> bool:
    """Whether a token folder exists that was built from these inputs."""
    try:
        meta = read_meta(target)
    except UserError:
        return False
    return all(meta.get(name) == value for name, value in job.items())
