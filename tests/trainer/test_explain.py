"""--explain: marked tokens, shapes, parameters and cost of the first step; no file is written, no weight changes."""

import json
import re

import numpy as np
import pytest
import torch

from model.lora import LoRAConfig, adapter_state, attach
from tests.helpers import TINY_MODEL_FLAGS, make_chat_row, read_folder, run_script, tiny_model, write_rows
from trainer.datasets import ChatDataset, PackedDataset
from trainer.explain import format_shape, output_shapes, parameters_by_part, tokens_and_mask

CPU = ["--device", "cpu", "--dtype", "float32", "--explain"]


@pytest.fixture
def explain(monkeypatch, tokenizer_dir, tiny_parent, capsys, tmp_path):
    """Run a script with --explain; returns what it prints. Its output folder stays empty, its data as they are."""

    def run(name, data_path, *flags):
        monkeypatch.setenv("COLUMNS", "300")
        start = ["--tokenizer", tokenizer_dir, *TINY_MODEL_FLAGS] if name[0] == "1" else ["--init_from", tiny_parent]
        before = tiny_parent.read_bytes()
        try:
            run_script(monkeypatch, name, *CPU, "--data_path", data_path, "--out_dir", tmp_path / "out", *start, *flags)
        except SystemExit as stop:
            assert stop.code == 0
        assert not (tmp_path / "out").exists() and tiny_parent.read_bytes() == before
        return capsys.readouterr().out

    return run


def marked(text):
    return re.findall(r"\[\[(.*?)\]\]", text, re.S)


def test_pretraining_trains_every_token_but_the_first(explain, pretrain_dir):
    text = explain("1-pretrain.py", pretrain_dir, "--batch_size", 4, "--max_steps", 7)
    assert "one forward pass of 4 rows x 32 tokens; 128 tokens that are not padding, 128 of them trained (100%)" in text
    assert len(marked(text)) == 2 and "row 1, 33 tokens" in text
    assert re.search(r"layers\.\*\.self_attn\.k_proj +\(4, 32, 16\) +x 2\n", text), "2 of 4 heads have keys"
    assert re.search(r"logits of the trained tokens, by the loss +\(128, 2\d\d\)\n", text)
    assert re.search(r"GFLOP counted by torch", text) and "7 steps: about" in text


def test_sft_marks_the_answers(explain, sft_dir):
    text = explain("3-full_sft.py", sft_dir, "--batch_size", 4)
    answers = {row["messages"][1]["content"] + "<|im_end|>" for row in map(make_chat_row, range(40))}
    assert len(marked(text)) == 2 and {part.strip() for part in marked(text)} <= answers


def test_lora_says_what_is_frozen(explain, sft_dir):
    text = explain("4-lora_sft.py", sft_dir, "--batch_size", 4, "--rank", 2)
    assert re.search(r"LoRA matrices +[\d,]+ +[\d.]+%\n", text) and re.search(r"attention .*frozen\n", text)
    assert re.search(r"q_proj\.lora_A +\(4, \d+, 2\) +x 2\n", text)


def test_dpo_shows_both_answers_and_needs_no_reference_file(explain, tmp_path):
    sides = [{name: [{"role": "assistant", "content": answer}] for name, answer in
              (("chosen", "good"), ("rejected", "bad bad"))} for _ in range(12)]  # fmt: skip
    rows = [{"prompt": [{"role": "user", "content": f"{i}?"}], **both, "lang": "en"} for i, both in enumerate(sides)]
    folder = tmp_path / "dpo"
    folder.mkdir()
    for split in ("train", "val"):
        write_rows(folder / f"{split}.jsonl", rows)
    text = explain("5-dpo_train.py", folder, "--batch_size", 4)
    assert [part.strip() for part in marked(text)] == ["good<|im_end|>", "bad bad<|im_end|>"]
    assert "chosen answer, " in text and "rejected answer, " in text and "one forward pass of 8 rows" in text


def test_grpo_shows_sampled_answers(explain, tmp_path):
    import data_process

    rows = write_rows(tmp_path / "rows.jsonl", [{"question": f"{i}?", "answer": str(i)} for i in range(12)])
    data_process.main(["rl", str(rows), "--out_dir", str(tmp_path / "rl"), "--val_fraction", "0.3"])
    flags = ("--prompts_per_step", 2, "--group_size", 2, "--max_new_tokens", 6, "--truncated", "keep")
    text = explain("6-grpo_train.py", tmp_path / "rl", *flags)
    assert len(marked(text)) == 2 and "without sampling, validations" in text


def test_the_mask_is_that_of_the_labels():
    """Ids and mask rebuild the chats that collate has padded and shifted."""
    random = np.random.default_rng(0)
    chats = [(random.integers(1, 99, n), random.integers(0, 2, n)) for n in (2, 3, 9, 20)]
    batch = ChatDataset.collate(chats, 0, 64, np.arange(4))
    for row, (ids, mask) in enumerate(chats):
        shown, trained = tokens_and_mask(batch, row)
        end = len(ids) if mask[-1] else len(ids) - 1  # an untrained last token is in no batch
        assert shown == ids[:end].tolist() and trained == [0, *mask[1:end].tolist()]
    window = PackedDataset.collate([np.arange(5)], 8, np.arange(1))
    assert tokens_and_mask(window, 0) == ([0, 1, 2, 3, 4], [0, 1, 1, 1, 1])


@pytest.mark.parametrize(
    "changes", [{}, {"tie_embeddings": True, "qk_norm": True}, {"use_moe": True, "qkv_bias": True}]
)
def test_the_parts_are_all_parameters(changes):
    model = tiny_model(**changes)
    parts = parameters_by_part(model)
    assert sum(count for count, _ in parts.values()) == model.count_parameters()[0]
    assert all(count == training for count, training in parts.values())
    assert ("router" in parts) == ("routed experts" in parts) == model.config.use_moe
    attach(model, LoRAConfig(2, 4.0, 0.0, ("all",)), 0)
    training = {part: training for part, (_, training) in parameters_by_part(model).items() if training}
    assert training == {"LoRA matrices": sum(tensor.numel() for tensor in adapter_state(model).values())}


def test_shapes_of_experts_are_those_of_their_tokens(tokenizer):
    """The rows of all routed experts of a layer are tokens x active experts."""
    import types

    from trainer.distributed import DistContext

    model = tiny_model(use_moe=True, n_routed_experts=4, n_active_experts=2, n_shared_experts=1)
    stage = types.SimpleNamespace(compute_loss=lambda model, batch: model(batch["input_ids"]))
    batch = {"input_ids": torch.arange(48).view(3, 16)}
    shapes = output_shapes(stage, model, batch, DistContext(torch.device("cpu"), torch.float32))
    experts = [shapes[f"model.layers.0.mlp.experts.{i}"] for i in range(4)]
    assert sum(rows for rows, _ in experts) == 3 * 16 * 2 and {dim for _, dim in experts} == {32}
    assert format_shape(experts).startswith("(") and format_shape([(1, 2), (3, 2)]) == "(1…3, 2)"
    assert not any(module._forward_hooks for module in model.modules())


def test_nothing_changes_beside_a_run(explain, monkeypatch, pretrain_dir, tokenizer_dir, tmp_path):
    """In a folder with a checkpoint, a log and a resume folder, --explain leaves every byte."""
    out = tmp_path / "run"
    flags = ["--tokenizer", tokenizer_dir, "--data_path", pretrain_dir, "--out_dir", out, *TINY_MODEL_FLAGS]
    flags += ["--batch_size", "4", "--device", "cpu", "--dtype", "float32", "--max_steps", "2"]
    run_script(monkeypatch, "1-pretrain.py", *flags)
    before = read_folder(out)
    with pytest.raises(SystemExit) as stop:
        run_script(monkeypatch, "1-pretrain.py", *flags, "--explain")
    assert (
        stop.value.code == 0 and read_folder(out) == before and json.loads(before["pretrain_32.jsonl"].split(b"\n")[0])
    )
