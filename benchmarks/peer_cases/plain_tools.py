"""Train a tokenizer with plain `tokenizers`, or score an exam by a plain loop over transformers' forward.

    python -m benchmarks.peer_cases.plain_tools FOLDER tokenizer|exam

tokenizer: byte-level BPE of 6,400 entries from the texts of FOLDER/text.jsonl.
exam: one forward per question of FOLDER/prompts.json; the answer is the option with the largest next-token logit.
Runs in the environment of the peer. Read next: ../data.py.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


def train_plain_tokenizer(folder: Path) -> dict[str, float]:
    """Return the seconds of training from an iterator over the file."""

    def texts() -> Iterator[str]:
        with (folder / "text.jsonl").open(encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)["text"]

    start = time.perf_counter()
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer: Any = trainers.BpeTrainer(vocab_size=6400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts(), trainer)
    return {"seconds": time.perf_counter() - start}


def score_exam(folder: Path) -> dict[str, float]:
    """Return the questions per second of a loop over the prompts, one at a time."""
    import torch  # the tokenizer's row measures memory
    from transformers import AutoModelForCausalLM

    prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).eval()  # nosec B615
    start, answers = time.perf_counter(), []
    with torch.inference_mode():
        for prompt, options in prompts:
            logits = model(torch.tensor([prompt]), logits_to_keep=1).logits[0, -1]
            answers.append(int(logits[[option[0] for option in options]].argmax()))
    return {"questions_per_second": len(answers) / (time.perf_counter() - start)}


if __name__ == "__main__":
    program = {"tokenizer": train_plain_tokenizer, "exam": score_exam}[sys.argv[2]]
    print(json.dumps(program(Path(sys.argv[1]))))
