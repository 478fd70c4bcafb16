"""benchmarks/loaders.py: every loader counts the same tokens, and the padded ones have rows of one width."""

import numpy as np
import pytest
import torch

from benchmarks import loaders
from benchmarks.loaders import CutDocuments, PaddedRows
from common.errors import UserError
from corpus.shard_reader import open_split
from corpus.token_folder import token_folder_name
from trainer.datasets import ChatDataset
from trainer.loss import IGNORE_INDEX


def test_a_padded_text_row_is_one_document(pretrain_dir):
    data = CutDocuments(pretrain_dir, 24)
    split = open_split(pretrain_dir, "train")
    assert len(data) == split.documents and data.lengths() is None
    batch = data.batch(np.arange(len(data)))
    assert batch["labels"].shape == (len(data), 24)
    lengths = np.minimum(split.lengths(), 25) - 1  # a document of n tokens has n - 1 labels
    assert batch["num_tokens"] == batch["num_targets"] == lengths.sum() and len(set(lengths)) > 1
    ids, _ = split.read_document(3)
    assert batch["labels"][3, : lengths[3]].tolist() == ids[1 : lengths[3] + 1].tolist()


def test_padding_changes_the_width_only(process, sft_dir, tokenizer):
    out = process("sft", sft_dir / "train.jsonl", out="chats")
    chats = ChatDataset(str(out / token_folder_name(tokenizer)), "train", tokenizer.pad_id)
    padded, rows = PaddedRows(chats, 200), np.arange(4)
    plain, wide = chats.batch(rows), padded.batch(rows)
    assert wide["labels"].shape == (4, 200) and padded.lengths() is None and chats.lengths() is not None
    width = plain["labels"].shape[1]
    for name, padding in (("input_ids", 0), ("labels", IGNORE_INDEX), ("token_mask", 0)):
        assert torch.equal(wide[name][:, :width], plain[name]) and (wide[name][:, width:] == padding).all()
    assert wide["num_tokens"] == plain["num_tokens"] and wide["num_targets"] == plain["num_targets"]


@pytest.mark.parametrize("flags", [["--max_seq_len", "64"], ["--max_seq_len", "4"]])
def test_the_table_has_a_row_for_every_loader(
    monkeypatch, capsys, process, pretrain_dir, sft_dir, tokenizer_dir, flags
):
    out = process("sft", sft_dir / "train.jsonl", out="chats")
    sizes = ["--batch_size", "2", "--steps", "1", "--rounds", "1", "--device", "cpu", *flags]
    folders = ["--pretrain", str(pretrain_dir), "--sft", str(out), "--tokenizer", str(tokenizer_dir)]
    monkeypatch.setattr("sys.argv", ["loaders", *folders, *sizes])
    if flags[1] == "4":
        with pytest.raises(UserError, match="give --max_seq_len"):
            loaders.main()
        return
    loaders.main()
    said = capsys.readouterr().out
    assert all(f"\n| {name} |" in said for name in ("padded", "windows", "buckets"))
    assert "windows: 100.0% of the positions are useful" in said and "of the text" in said
