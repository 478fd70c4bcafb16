"""LoRA and DPO under FSDP and ZeRO-3 have the losses and outputs of DDP."""

import importlib.util
import json
import sys

import pytest

from tests.helpers import ROOT, load_weights, make_chat_row, read_jsonl, run_process

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
FLAGS = ["--device", "cpu", "--dtype", "float32", "--log_interval", "1", "--optimizer", "adamw", "--batch_size", "3"]
FLAGS += ["--max_steps", "4", "--accumulation_steps", "2", "--checkpoint_activations", "--warmup_iters", "1"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, sft_dir):
    """Data folders of chats and of pairs, by script."""
    dpo = tmp_path_factory.mktemp("data") / "dpo"
    dpo.mkdir()
    for split, count in (("train", 20), ("val", 6)):
        rows = []
        for i in range(count):
            chat = make_chat_row(i)
            sides = {side: [{"role": "assistant", "content": side[0] * 3}] for side in ("chosen", "rejected")}
            rows.append({"prompt": chat["messages"][:1], **sides, "lang": chat["lang"]})
        (dpo / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"4-lora_sft.py": sft_dir, "5-dpo_train.py": dpo}


def write_parent(folder, tokenizer):
    import torch

    from model.checkpoint import save_model
    from model.config import ModelConfig
    from model.transformer import Transformer

    torch.manual_seed(0)
    moe = {"use_moe": True, "n_routed_experts": 8, "n_active_experts": 1}
    model = Transformer(ModelConfig(tokenizer.vocab_size, 32, 2, 4, 2, max_seq_len=64, **moe))
    save_model(folder / "full_sft_32_moe.pth", model, "full_sft", tokenizer, [{"stage": "pretrain"}])


@pytest.mark.parametrize("script", ["4-lora_sft.py", "5-dpo_train.py"])
def test_later_stage_trains_under_every_parallel_mode(script, folders, tokenizer, tmp_path):
    logs, states = {}, {}
    for mode in ("ddp", "fsdp", "zero3"):
        out = tmp_path / mode
        out.mkdir()
        write_parent(out, tokenizer)
        more = ["--peft_dir", out / "peft", "--targets", "attention"] if script.startswith("4") else []
        paths = ["--data_path", folders[script], "--out_dir", out]
        result = run_process(*TORCHRUN, ROOT / script, *FLAGS, *paths, "--parallel", mode, *more)
        assert result.returncode == 0, result.stdout[-800:] + result.stderr[-2500:]
        assert not more or (out / "peft" / "adapter_model.safetensors").exists()
        assert script.startswith("4") or "answers that loop, after" in result.stdout
        (log,), (file,) = out.glob("*.jsonl"), [path for path in out.glob("*.pth") if "full" not in path.name]
        logs[mode], states[mode] = read_jsonl(log), load_weights(file)
    for mode in ("fsdp", "zero3"):
        for mine, whole in zip(logs[mode], logs["ddp"], strict=True):
            for name in set(mine) & {"loss", "grad_norm", "reward_accuracy", "val_loss"}:
                assert mine[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-6), (mode, name, mine["step"])
        assert states[mode].keys() == states["ddp"].keys()
