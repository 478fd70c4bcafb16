"""Tokenise and pack text, or tokenise chats, with datasets.map and transformers' fast tokenizer.

    python -m benchmarks.peer_cases.datasets_map FOLDER pretrain|sft PROCESSES

pretrain: tokens of each text and an end token, joined and cut into blocks of 512 (the recipe of transformers' run_clm).
sft: the chat template, cut to 512 tokens. The dataset is read from jsonl and written by datasets, as ours is.
Runs in the environment of the peer, with one thread per process.
Read next: ../data.py.
"""

import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"RAYON_NUM_THREADS": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}

import datasets
from transformers import AutoTokenizer

BLOCK = 512
Batch = dict[str, list[Any]]


def group_texts(batch: Batch) -> Batch:
    """Join the token lists of a batch and cut them into blocks; the last one, which is shorter, is dropped."""
    joined = list(itertools.chain.from_iterable(batch["input_ids"]))
    blocks = [joined[i : i + BLOCK] for i in range(0, len(joined) - BLOCK + 1, BLOCK)]
    return {"input_ids": blocks}


def main() -> None:
    folder, what, processes = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")  # nosec B615

    def tokenize_texts(batch: Batch) -> Batch:
        ids = tokenizer(batch["text"], add_special_tokens=False)["input_ids"]
        return {"input_ids": [[*text, tokenizer.eos_token_id] for text in ids]}

    def tokenize_chats(batch: Batch) -> Batch:
        texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in batch["messages"]]
        return {"input_ids": tokenizer(texts, add_special_tokens=False, truncation=True, max_length=BLOCK)["input_ids"]}

    name, work = ("chats", tokenize_chats) if what == "sft" else ("text", tokenize_texts)
    sizes = json.loads((folder / "sizes.json").read_text(encoding="utf-8"))
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as cache:
        start = time.perf_counter()
        data: Any = datasets.load_dataset("json", data_files=str(folder / f"{name}.jsonl"), cache_dir=cache)["train"]  # nosec B615
        read = time.perf_counter()
        data = data.map(work, batched=True, num_proc=processes, remove_columns=data.column_names)
        if what == "pretrain":
            data = data.map(group_texts, batched=True, num_proc=processes)
        end = time.perf_counter()
    megabytes = sizes[name] / 1e6
    numbers = {"mb_per_second": megabytes / (end - start), "mb_per_second_map_only": megabytes / (end - read)}
    print(json.dumps(numbers | {"rows": len(data)}))


if __name__ == "__main__":
    main()
