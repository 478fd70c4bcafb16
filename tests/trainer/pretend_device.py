"""A pretend accelerator "gpu": runs the project's code on fake tensors and notes what a GPU would have to do.

    python -m tests.trainer.pretend_device TOKENIZER_FOLDER    prints one line of JSON:
    {job: {"launches": int, "reads": {"file: line (what)": int}, "error": str}}

launches   kernels that the host starts: operators on device tensors that are neither views nor allocations
reads      places at which the host needs a number from the device, and so waits for it; the run continues with 1
error      a CPU tensor that meets a device tensor ("" without one)

The device is torch's PrivateUse1 with FakeTensorMode: no kernel, no compiler, no GPU. Autocast does nothing on it, and
branches for device.type == "cuda" are not taken; "not a CPU" is. It changes this process, so tests run it in another.
"""

import collections
import functools
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from model.config import ModelConfig
from model.generate import generate
from model.lora import LoRAConfig, attach
from model.sampling import SamplingParams
from model.tokenizer import ChatTokenizer, load_tokenizer
from model.transformer import Transformer
from tests.helpers import ROOT, load_script
from trainer.config import TrainConfig
from trainer.datasets import Batch
from trainer.distributed import DistContext
from trainer.engine import DDPEngine
from trainer.grpo_config import GRPOConfig
from trainer.loop import train_step
from trainer.stage import Stage

SHAPE = (4, 64)  # of a batch
SIZES: dict[str, Any] = {"dim": 64, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 64, "vocab_size": 640}
STAGES = {"pretrain": "1-pretrain.py", "moe": "1-pretrain.py", "sft": "3-full_sft.py", "lora": "4-lora_sft.py",
          "dpo": "5-dpo_train.py", "grpo": "6-grpo_train.py"}  # fmt: skip
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.8, "top_p": 0.9, "top_k": 10, "min_p": 0.01, "seed": 0},
    "with penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.1},
    "without repeated n-grams": {"no_repeat_ngram_size": 2},
    "with log-probabilities": {"logprobs": 2, "prompt_logprobs": 2},
    "beams": {"num_beams": 2},
}
ALLOCATIONS = ("aten::empty", "aten::new_empty", "aten::lift_fresh", "aten::_unsafe_view", "aten::_reshape_alias")


def register_device() -> torch.device:
    """Register the device with torch and return it."""
    from torch.utils import backend_registration

    class Backend(backend_registration._DummyBackendModule):
        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16, torch.float16]

    backend_registration._setup_privateuseone_for_python_backend("gpu", backend_module=Backend())
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(1, device="gpu") is lifted on the CPU, then copied
    return torch.device("gpu", 0)


def last_place(stack: traceback.StackSummary) -> str:
    """Return "file: line" of the innermost line of the project."""
    lines = [line for line in stack if line.filename.startswith(str(ROOT)) and line.filename != __file__]
    lines = [line for line in lines if "site-packages" not in line.filename]  # of an environment in the project folder
    return f"{os.path.relpath(lines[-1].filename, ROOT)}: {lines[-1].line}" if lines else "this file"


class DeviceRecorder(TorchDispatchMode):
    """Notes launches and host reads. A read gets a made-up answer, so that the run continues and all are found."""

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.reads = 0, collections.Counter()  # type: int, collections.Counter[str]

    def note_read(self, what: str) -> None:
        self.reads[f"{last_place(traceback.extract_stack())} ({what})"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        for tensor in tensors:
            tensor.constant = None  # type: ignore[attr-defined]  # FakeTensorMode would compute with it for real
        reads_device = any(tensor.device.type == "gpu" for tensor in tensors)
        if name in ("aten::_local_scalar_dense", "aten::item"):
            if reads_device:
                self.note_read("item")
            return 1.0 if tensors[0].is_floating_point() else 1
        if name == "aten::nonzero":
            if reads_device:
                self.note_read("nonzero")
            return torch.empty(tensors[0].numel(), tensors[0].dim(), dtype=torch.long, device=tensors[0].device)
        if name in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"):
            args = (args[0], self.without_masks(args[1]), *args[2:])
        out = func(*args, **kwargs)
        device = next((leaf.device.type for leaf in pytree.tree_leaves(out) if isinstance(leaf, torch.Tensor)), "cpu")
        if name in ("aten::_to_copy", "aten::copy_") and reads_device and device == "cpu":
            self.note_read("copy to the host")
        is_kernel = name.startswith("aten::") and not func.is_view and name not in ALLOCATIONS
        if is_kernel and (reads_device or device == "gpu"):
            self.launches += 1
        return out

    def without_masks(self, indices: Any) -> list[Any]:
        """Indices with every bool mask replaced by as many numbers: the size of the result is read from the device."""
        replaced: list[Any] = []
        for index in indices:
            if index is None or index.dtype != torch.bool:
                replaced.append(index)
                continue
            if index.device.type == "gpu":
                self.note_read("bool mask as an index")
            size, device = index.numel(), index.device
            replaced += [torch.empty(size, dtype=torch.long, device=device) for _ in range(index.dim())]
        return replaced


# ---- jobs ------------------------------------------------------------------------------------------------------------
def make_model(device: torch.device, **changes: Any) -> Transformer:
    with device:
        model = Transformer(ModelConfig(**{**SIZES, **changes}))
    model.to = lambda *_, **__: model  # type: ignore[method-assign]  # fake parameters cannot be moved
    return model


def make_batch(loss_unit: str) -> Batch:
    batch: Batch = {name: torch.zeros(SHAPE, dtype=torch.long) for name in ("input_ids", "labels")}
    batch |= {"token_mask": torch.ones(SHAPE, dtype=torch.bool), "row_ids": torch.zeros(SHAPE[0], dtype=torch.long)}
    if loss_unit == "pair":
        batch["reference"] = torch.zeros(SHAPE)
    if loss_unit == "answer":
        batch |= {name: torch.zeros(SHAPE) for name in ("reference", "old", "weights")}
        batch |= {"advantages": torch.zeros(SHAPE[0], 1), "mean_length": torch.tensor(2.0)}
    return batch | {"num_targets": SHAPE[0] * SHAPE[1], "num_tokens": SHAPE[0] * SHAPE[1]}


def make_engine(device: torch.device, name: str, optimizer: str) -> DDPEngine:
    torch.set_default_dtype(torch.bfloat16 if name == "moe" else torch.float32)  # of weights: grouped_mm needs bf16
    model = make_model(device, use_moe=name == "moe")
    torch.set_default_dtype(torch.float32)
    if name == "lora":
        with device:
            attach(model, LoRAConfig())
    script, config = load_script(STAGES[name]), TrainConfig(optimizer=optimizer)
    compute_loss, loss_unit = script.compute_loss, "token"
    if name == "dpo":
        compute_loss = functools.partial(compute_loss, config=script.DPOConfig())
        loss_unit = "pair"
    if name == "grpo":
        compute_loss = functools.partial(compute_loss, config=GRPOConfig())
        loss_unit = "answer"
    stage = Stage(name, model, None, compute_loss, None, loss_unit=loss_unit)  # type: ignore[arg-type]
    return DDPEngine(config, stage, DistContext(device, torch.float32))


def step_job(device: torch.device, name: str, optimizer: str) -> Callable[[], object]:
    """A step of two micro-batches."""
    engine = make_engine(device, name, optimizer)
    batches = [make_batch(engine.stage.loss_unit) for _ in range(2)]
    return lambda: train_step(engine, batches)


def evaluation_job(device: torch.device, name: str) -> Callable[[], object]:
    engine = make_engine(device, name, "adamw")
    batch = {key: value.to(device) if torch.is_tensor(value) else value for key, value in
             make_batch(engine.stage.loss_unit).items()}  # fmt: skip

    def evaluate() -> None:
        with engine.eval_mode():
            engine.evaluate(batch)

    return evaluate


def mixed_devices_job(device: torch.device) -> Callable[[], object]:
    """A batch on the CPU and a model on the device: the error that the other jobs must not have."""
    engine = make_engine(device, "pretrain", "adamw")
    return lambda: engine.evaluate(make_batch("token"))


def generation_job(device: torch.device, tokenizer: ChatTokenizer, **settings: Any) -> Callable[[], object]:
    model = make_model(device, vocab_size=tokenizer.vocab_size).eval()
    params = SamplingParams(max_new_tokens=4, **settings)
    return lambda: generate(model, [[65, 66, 67], [68, 69]], params, tokenizer)


def jobs(device: torch.device, tokenizer: ChatTokenizer) -> Iterator[tuple[str, Callable[[], Callable[[], object]]]]:
    """(name, function that prepares the job and returns what is recorded)."""
    for optimizer in ("muon", "adamw"):
        for name in STAGES:
            yield f"step {name} {optimizer}", functools.partial(step_job, device, name, optimizer)
    for name in STAGES:
        yield f"evaluate {name}", functools.partial(evaluation_job, device, name)
    yield "mixed devices", functools.partial(mixed_devices_job, device)
    for name, settings in SAMPLING.items():
        yield f"generate {name}", functools.partial(generation_job, device, tokenizer, **settings)


def main() -> None:
    tokenizer, results = load_tokenizer(sys.argv[1]), {}
    for name, prepare in jobs(register_device(), tokenizer):
        recorder, error = DeviceRecorder(), ""
        with FakeTensorMode(allow_non_fake_inputs=True), torch.autograd.set_multithreading_enabled(False):
            try:
                with DeviceRecorder():
                    job = prepare()
                with recorder:
                    job()
            except Exception as problem:
                error = f"{last_place(traceback.extract_tb(problem.__traceback__))}: {str(problem)[:300]}"
        results[name] = {"launches": recorder.launches, "reads": dict(recorder.reads), "error": error}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
