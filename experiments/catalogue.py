"""Names of the experiments with one sentence each, for `python demo.py --experiment list`. Imports no torch.

Read next: __main__.py (runs one), training.py (trains its arms).
"""

import difflib

from common.errors import UserError

SENTENCES = {
    "no_rmsnorm": "pretraining without RMSNorm",
    "no_rope": "pretraining without RoPE: the model is not told the positions of tokens",
    "no_warmup": "pretraining whose learning rate starts at its peak",
    "shifted_mask": "SFT with a loss mask that is shifted by one token",
    "padding": "pretraining on padded documents instead of packed rows",
    "wrong_accumulation": "gradient accumulation by the mean of the means of the micro-batches",
    "muon_adamw": "Muon against AdamW, each at three learning rates",
    "lora_rank": "LoRA of rank 1, 8 and 64",
    "dpo_no_reference": "DPO without its reference model",
    "sampling": "greedy answers against repetition penalties",
    "tokenizer_size": "vocabularies of 512 to 5,120 entries on the same text",
}


def chosen_experiments(name: str) -> list[str]:
    """Return the names that `--experiment` chooses: one, or with "all" every one. Raises UserError if it is unknown."""
    if name == "all":
        return list(SENTENCES)
    if name not in SENTENCES:
        close = difflib.get_close_matches(name, [*SENTENCES, "list", "all"], 1, 0.5)
        hint = f": did you mean {close[0]}?" if close else ""
        raise UserError(f"--experiment {name} is unknown{hint} `python demo.py --experiment list` prints the names")
    return [name]


def experiment_list() -> str:
    """Return a line per experiment: its name and its sentence."""
    width = max(map(len, SENTENCES))
    return "\n".join(f"{name:{width}}  {sentence}" for name, sentence in SENTENCES.items())
