"""Question and answer rows, or chats -> prompts with references, for training with rewards.

    rows -> train.jsonl, val.jsonl     the messages before the last answer of each chat, and this answer as reference

There are no tokens: a prompt is rendered when it is trained on.
Read next: read_examples.py (rows -> prompts), prompt_data.py (the format and its reader), prepare_chats.py (RowWriter).
"""

from collections.abc import Callable
from typing import Any

from common.errors import UserError
from corpus.data_config import PromptDataConfig
from corpus.dataset_meta import DATA_FORMAT
from corpus.examples import PromptExample, next_batch
from corpus.job_state import input_fingerprints
from corpus.prepare_chats import RowWriter
from corpus.provenance import read_provenance
from corpus.stats import DataStats
from corpus.tokenize_chats import no_data_message
from corpus.validation_split import ValidationSplit


def prepare_prompts(
    config: PromptDataConfig, stats: DataStats, on_batch: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Write the prompts of `config.files` to train.jsonl and val.jsonl in `config.out_dir`; returns their meta.json.

    `on_batch` is called after every batch. Raises UserError for unusable data or a disk that cannot be written.
    """
    job: dict[str, Any] = {"inputs": input_fingerprints(config.files), "kind": PromptExample.kind}
    job |= {"choice": config.reader.key_settings(), "val_share": config.val_fraction, "format": DATA_FORMAT}
    examples = config.read_examples(stats)
    with RowWriter(config.out_dir, job) as writer:
        split = ValidationSplit(config.val_fraction)
        while batch := next_batch(examples):
            writer.add(split.assign(batch))
            on_batch()
        writer.add(split.held_back())
        writer.close_files()
        if not writer.rows["train"]:
            raise UserError(no_data_message("prompt", stats))
        meta = {"kind": PromptExample.kind, "rows": writer.rows, "checksums": writer.checksums()}
        meta |= {"val_share": config.val_fraction, "report": stats.to_dict()}
        return writer.publish(meta | {"history": read_provenance(config.files)})
