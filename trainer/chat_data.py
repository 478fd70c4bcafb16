"""Open chats and pairs for training: tokenize the jsonl files of --data_path for the model's tokenizer, once.

    dataset/sft/train.jsonl  ->  dataset/sft/tokens-<fingerprint>/  ->  ChatDataset

The fingerprint covers the tokenizer and its chat template. A folder of other rows or another length is written again.
Read next: datasets.py (the batches), ../corpus/tokenize_chats.py (how a chat becomes tokens and a mask).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from corpus.dataset_meta import check_kind, read_meta
from corpus.token_folder import is_current, token_folder_name, token_inputs
from model.tokenizer import ChatTokenizer
from trainer.datasets import ChatDataset, TokenDataset, check_data
from trainer.distributed import DistContext


def tokenized_folder(data_path: str, kind: str, max_seq_len: int, tokenizer: ChatTokenizer, dist: DistContext) -> str:
    """Return the token folder of "chats" or "pairs" in a data folder; tokenize them if it is missing or outdated.

    data_process.py has written it, unless the tokenizer, the chat format or the length is another one.
    """
    check_kind(data_path, kind)
    folder = Path(data_path) / token_folder_name(tokenizer)
    with dist.rank0_first():  # rank 0 tokenizes, the other processes find the folder complete
        if not is_current(folder, token_inputs(Path(data_path), max_seq_len, kind)):
            from corpus.examples import ChatExample, PairExample
            from corpus.tokenize_chats import tokenize_chats

            tokenize_chats(data_path, tokenizer, max_seq_len, PairExample if kind == "pairs" else ChatExample)
    for line in dropped_row_messages(read_meta(folder).get("report", {})):
        dist.print0(line)
    return str(folder)


def dropped_row_messages(report: dict[str, Any]) -> Iterator[str]:
    """Yield one line per reason for which tokenization dropped or shortened rows.

    `report` is from the meta.json of the token folder. A report with "read" was written and printed by data_process.py.
    """
    if report.get("read"):
        return
    total = report.get("kept", 0) + sum(reason["count"] for reason in report.get("dropped", {}).values())
    for verb, key in (("left out", "dropped"), ("kept, but shortened", "shortened")):
        for name, reason in report.get(key, {}).items():
            yield f"{reason['count']:,} of {total:,} rows {verb}: {name}"


def open_chat_data(
    data_path: str, max_seq_len: int, tokenizer: ChatTokenizer, dist: DistContext
) -> tuple[ChatDataset, dict[str, TokenDataset]]:
    """Return the training chats of a data folder, and the validation chats by split ("zh", "en")."""
    folder = tokenized_folder(data_path, "chats", max_seq_len, tokenizer, dist)
    splits = check_data(folder, "chats", tokenizer)
    chats = {split: ChatDataset(folder, split, tokenizer.pad_id) for split in splits}
    return chats.pop("train"), {split.removeprefix("val_"): data for split, data in chats.items()}
