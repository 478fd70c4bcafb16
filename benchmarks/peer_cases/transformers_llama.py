"""Train transformers' LlamaForCausalLM of the same size: in a plain loop, compiled, or by transformers' Trainer.

    python -m benchmarks.peer_cases.transformers_llama SPEC [plain|compile|trainer]

Runs in the environment of the peer. The labels are the input ids: the model shifts them itself.
Read next: plain_loop.py, ../train_spec.py.
"""

import sys
import tempfile
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from benchmarks.peer_cases.plain_loop import gpu_memory, run_plain_loop, token_rows, wait_for
from benchmarks.train_spec import StepTimes, TrainSpec, print_result


def make_llama(model: dict[str, Any]) -> transformers.LlamaForCausalLM:
    """Return the model with these fields of ModelConfig, randomly initialised, in fp32."""
    config = transformers.LlamaConfig(
        vocab_size=model["vocab_size"], hidden_size=model["dim"], intermediate_size=model["hidden_dim"],
        num_hidden_layers=model["n_layers"], num_attention_heads=model["n_heads"],
        num_key_value_heads=model["n_kv_heads"], head_dim=model["head_dim"],
        max_position_embeddings=model["max_seq_len"], rms_norm_eps=model["norm_eps"],
        tie_word_embeddings=model["tie_embeddings"], use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def llama_loss(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


class TokenRows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The rows of all steps, one by one."""

    def __init__(self, spec: TrainSpec) -> None:
        self.rows = torch.cat([token_rows(spec, step)[0] for step in range(spec.all_steps)])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


class TimeSteps(transformers.TrainerCallback):
    def __init__(self, times: StepTimes) -> None:
        self.times = times

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.times.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.times.end_step()


def run_trainer(spec: TrainSpec, model: transformers.LlamaForCausalLM) -> None:
    """Train with transformers.Trainer, its defaults but for AdamW's rate and what the spec says; print the result."""
    times = StepTimes(wait_for(spec.device))
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, per_device_train_batch_size=spec.batch_size, max_steps=spec.all_steps, learning_rate=1e-3,
            bf16=spec.dtype == "bfloat16", use_cpu=spec.device == "cpu", optim="adamw_torch_fused", max_grad_norm=1.0,
            weight_decay=0.1, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=TokenRows(spec), callbacks=[TimeSteps(times)])
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    first_loss = next(row["loss"] for row in trainer.state.log_history if "loss" in row)
    print_result(spec, times, float(first_loss), model.num_parameters(), gpu_memory(spec.device))


def main() -> None:
    spec, kind = TrainSpec.from_json(sys.argv[1]), sys.argv[2]
    transformers.logging.set_verbosity_error()
    model = make_llama(spec.model)
    if kind == "trainer":
        run_trainer(spec, model)
    else:
        if kind == "compile":
            model.compile()
        run_plain_loop(spec, model, llama_loss)


if __name__ == "__main__":
    main()
