"""DeepSpeed's ZeRO behind the loop's verbs: stage 1 shares out the optimizer, 2 the gradients too, 3 the weights too.

ZeRO flattens the weights and cuts them anywhere, which suits AdamW; Muon turns whole matrices, so it runs under DDP and
FSDP only. A checkpoint holds whole tensors, each written by one of the processes: it can be read under any --parallel.
Read next: engine.py.
"""

import copy
import logging
import os
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from trainer.datasets import Batch, nothing, to_device
from trainer.distributed import Run
from trainer.engine import Engine, StageLoss
from trainer.state_files import SavedState, State

KEYS = ("exp_avg", "exp_avg_sq")  # AdamW's state, beside its count of steps


def import_deepspeed(run: Run) -> Any:
    """The module, ready for the processes that torch has connected. Raises UserError when it is not installed."""
    os.environ.setdefault("DS_ACCELERATOR", run.device.type)
    try:
        import deepspeed
    except ImportError:
        raise UserError('--parallel zero needs DeepSpeed: pip install "deepspeed>=0.19,<0.20"') from None
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    operators = getattr(deepspeed.ops, "__compatible_ops__", {})
    if "deepspeed_shm_comm" in operators:  # compiling it takes a minute and a compiler; gloo does without
        operators["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(torch.distributed.get_backend(), auto_mpi_discovery=False, verbose=False)
    return deepspeed


class Zero(Engine):
    engine: Any
    replicated = False  # each process keeps other tensors

    def build(self) -> None:
        run, args, deepspeed = self.run, self.args, import_deepspeed(self.run)
        if run.dtype == torch.float16:
            raise UserError("--parallel zero trains in bf16 or fp32: --dtype float32, or --parallel fsdp for fp16")
        self.level = int(args.parallel.removeprefix("zero"))
        self.model = copy.deepcopy(self.stage.model)
        self.optimizers = self.make_optimizers()
        config = {
            "train_micro_batch_size_per_gpu": args.batch_size,
            "gradient_accumulation_steps": 1,  # the loop says which micro-batch is the last: epochs may end early
            "gradient_clipping": args.grad_clip,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": self.level},
            "steps_per_print": 2**31,
        }
        self.engine, *_ = deepspeed.initialize(
            model=StageLoss(run, self.stage, self.model),
            optimizer=self.optimizers[0],
            config=config,
            dist_init_required=False,
        )
        self.module = self.plain = self.engine

    def learn(self, batch: Batch, share: float, last: bool) -> tuple[Tensor, int, dict[str, Any]]:
        self.engine.set_gradient_accumulation_boundary(last)
        loss, count, extras = self.engine(batch)
        self.engine.backward(loss * share, scale_wrt_gas=False)
        return loss.detach(), count, extras

    def step(self, clip: float, loss_is_finite: bool) -> float:
        """As in Engine; DeepSpeed clips to the --grad_clip it was made with, and skips a step without a finite norm."""
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def state(self) -> State:
        """Whole tensors on the CPU. Put together by all processes, kept by one each, so that memory is shared too."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        state: State = {}
        steps = self.steps_taken()
        self.link_state()
        for number, (name, parameter) in enumerate(self.trained().items()):
            found = {f"model.{name}": safe_get_full_fp32_param(parameter)}
            if steps is not None:
                found |= {f"optimizer.{name}.{key}": safe_get_full_optimizer_state(parameter, key) for key in KEYS}
                found[f"optimizer.{name}.step"] = steps
            if number % self.run.world == self.run.rank:
                state |= {key: tensor.detach().cpu() for key, tensor in found.items()}
        return state

    def steps_taken(self) -> Tensor | None:
        """AdamW's count, as a tensor; None before its first step."""
        return next((values["step"] for values in self.optimizers[0].state.values() if "step" in values), None)

    def link_state(self) -> None:
        """Have every parameter find its state. DeepSpeed 0.19 does so after the first parameter group's first step,
        when the other groups have none yet, so that only the first group is found."""
        zero = self.engine.optimizer
        if self.level < 3 and self.steps_taken() is not None:
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()

    def load(self, saved: SavedState) -> None:
        if not any(key.startswith("optimizer.") for key in saved.tensors):
            return
        self.make_state()
        steps = torch.zeros(())
        for name, parameter in self.trained().items():
            shape = self.stage.model.get_parameter(name).shape
            whole = {f"optimizer.{name}.{key}": torch.zeros(shape) for key in KEYS}
            saved.load({**whole, f"optimizer.{name}.step": steps})
            for key in KEYS:
                self.put(parameter, key, whole[f"optimizer.{name}.{key}"])
        for values in self.optimizers[0].state.values():
            values["step"].fill_(steps.item())

    def make_state(self) -> None:
        """Have the optimizer make its state: a step at rate 0 on a batch that trains nothing."""
        for group in self.optimizers[0].param_groups:
            group["lr"] = 0.0
        self.learn(to_device(nothing(self.stage.data), self.run.device), 1.0, last=True)
        self.step(0.0, True)
        self.link_state()

    def put(self, parameter: torch.nn.Parameter, key: str, whole: Tensor) -> None:
        """Keep this process's part of the state of a parameter."""
        from deepspeed.utils import safe_get_local_optimizer_state as get_local
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.level < 3:
            safe_set_full_optimizer_state(parameter, whole.to(self.run.device), key)
            return
        size = get_local(parameter, key).numel()  # the last process's part may reach beyond the end
        padded = torch.nn.functional.pad(whole.flatten(), (0, size * self.run.world - whole.numel()))
        local = padded[size * self.run.rank : size * (self.run.rank + 1)]
        safe_set_local_optimizer_state(parameter, local.to(self.run.device), key)

    @torch.no_grad()
    def refresh(self) -> None:
        from deepspeed.utils import safe_get_full_fp32_param

        target = dict(self.stage.model.named_parameters())
        for name, parameter in self.trained().items():
            whole = safe_get_full_fp32_param(parameter) if self.level == 3 else parameter
            if self.run.is_main:
                target[name].copy_(whole)

    def close(self) -> None:
        self.engine.destroy()
