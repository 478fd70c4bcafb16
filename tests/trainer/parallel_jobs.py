"""Run several trainings in one pair of processes. test_parallel.py starts it with torchrun and a list of jobs.

    torchrun --nproc_per_node 2 tests/trainer/parallel_jobs.py JOBS.json

A job is {"out": folder, "flags": [flags of 1-pretrain.py], "stop": step after which a stop signal is simulated, or
none, "late": whether steps are read one step late, as on a GPU, "double": whether to train in float64, where rounding
differences are far below real ones}.
"""

import json
import sys
from pathlib import Path

import torch

from common.cli import parse
from common.device import pick_dtype
from model.tokenizer import load_tokenizer
from model.transformer import Transformer
from tests.helpers import load_script
from trainer import curves, loop, report_page
from trainer.datasets import PackedDataset
from trainer.distributed import DistContext, init_distributed
from trainer.stage import Stage


def train_job(dist, data_path: str, tokenizer_path: str, job: dict) -> None:
    lesson = load_script("1-pretrain.py")
    config = parse(lesson.PretrainConfig, None, ["--data_path", data_path, *job["flags"], "--out_dir", job["out"]])
    dist.dtype, dist.stop_requested = pick_dtype(config.dtype, dist.device), ""
    DistContext.reads_late = bool(job.get("late"))
    torch.set_default_dtype(torch.float64 if job.get("double") else torch.float32)
    if job.get("double") and config.parallel == "zero3":
        from deepspeed.accelerator import get_accelerator

        # DeepSpeed refuses float64 weights, but only on CPUs with fp16 instructions.
        get_accelerator().is_fp16_supported = lambda: False
    torch.manual_seed(config.seed)
    tokenizer = load_tokenizer(tokenizer_path)
    model = Transformer(config.model_config(tokenizer.vocab_size))
    splits = {name: PackedDataset(data_path, name, model.config.max_seq_len) for name in ("train", "val_zh", "val_en")}
    stage = Stage("pretrain", model, tokenizer, lesson.compute_loss, splits.pop("train"), splits)

    def stop_after(row):
        if row["step"] == job.get("stop"):
            dist.stop_requested = "SIGTERM"  # the run ends after the next step
        return ""

    stage.early_stop = stop_after
    loop.train(config, stage, dist)
    dist.barrier()


def main() -> None:
    curves.draw_curves = report_page.write_page = lambda *_: None  # plotting takes longer than these trainings
    plan = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with init_distributed("cpu", "float32") as dist:
        for job in plan["jobs"]:
            dist.print0(f"job {job['out']}")
            train_job(dist, plan["data"], plan["tokenizer"], job)


if __name__ == "__main__":
    main()
