"""ZeroEngine: DeepSpeed ZeRO. Stage 1 shards the optimizer state, 2 also the gradients, 3 also the weights.

ZeRO flattens the weights and splits them at any element. That works for AdamW but not for Muon, which needs whole
matrices and so runs with DDP and FSDP only. A step folder holds unsharded tensors, each written by one process, so it
can be read with any --parallel.
Read next: engine.py.
"""

import copy
import logging
import os
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from common.packages import require_packages
from trainer.config import TrainConfig
from trainer.datasets import Batch, empty_batch, to_device
from trainer.distributed import DistContext
from trainer.engine import Engine, StageLoss, forbid_stacked_experts
from trainer.stage import LossAndMetrics, Stage
from trainer.state_files import SavedState, TensorDict

ADAMW_STATE_KEYS = ("exp_avg", "exp_avg_sq")  # AdamW's state, besides its step count


def import_deepspeed(dist: DistContext) -> Any:
    """Import DeepSpeed and initialise it for torch's process group. Raises UserError if it is not installed."""
    os.environ.setdefault("DS_ACCELERATOR", dist.device.type)
    require_packages("--parallel zero", "deepspeed")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    operators = getattr(deepspeed.ops, "__compatible_ops__", {})
    if "deepspeed_shm_comm" in operators:  # optional with gloo; compiling it takes a minute and needs a compiler
        operators["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(torch.distributed.get_backend(), auto_mpi_discovery=False, verbose=False)
    return deepspeed


class ZeroEngine(Engine):
    """Engine for --parallel zero1, zero2 and zero3."""

    replicated = False  # state_dict of each process holds different tensors

    def __init__(self, config: TrainConfig, stage: Stage, dist: DistContext) -> None:
        deepspeed = import_deepspeed(dist)
        if dist.dtype == torch.float16:
            raise UserError("--parallel zero supports bf16 and fp32: use --dtype float32, or --parallel fsdp for fp16")
        super().__init__(config, stage, dist, copy.deepcopy(stage.model))
        self.zero_stage = int(config.parallel.removeprefix("zero"))
        if self.zero_stage == 3:
            forbid_stacked_experts(self.model)
        self.optimizers = self.make_optimizers()
        settings = {
            "train_micro_batch_size_per_gpu": config.batch_size,
            "gradient_accumulation_steps": 1,  # the loop marks the last micro-batch; an epoch's last step has fewer
            "gradient_clipping": config.grad_clip,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": self.zero_stage},
            "steps_per_print": 2**31,
        }
        self.module, *_ = deepspeed.initialize(
            model=StageLoss(stage, dist, self.model),
            optimizer=self.optimizers[0],
            config=settings,
            dist_init_required=False,
        )
        self.module.train()

    def forward_backward(self, batch: Batch, loss_scale: Tensor, is_last: bool) -> LossAndMetrics:
        self.module.set_gradient_accumulation_boundary(is_last)
        loss, metrics = self.module(batch)
        self.module.backward(loss * loss_scale.to(loss.dtype), scale_wrt_gas=False)
        return loss.detach(), metrics

    def clip_gradient(self, max_norm: float) -> Tensor:
        """As in Engine, and update the weights: DeepSpeed's step does both. It skips a norm that is not finite."""
        self.module.step()
        return torch.as_tensor(self.module.get_global_grad_norm(), device=self.dist.device)

    def optimizer_step(self, is_finite: Tensor) -> None:
        """Nothing: clip_gradient has updated the weights."""

    def state_dict(self) -> TensorDict:
        """Return unsharded tensors on the CPU. All processes gather each tensor, one of them keeps it."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        state: TensorDict = {}
        steps = self.optimizer_steps()
        self.relink_optimizer_state()
        for number, (name, parameter) in enumerate(self.trainable_parameters().items()):
            tensors = {f"model.{name}": safe_get_full_fp32_param(parameter)}
            if steps is not None:
                tensors |= {
                    f"optimizer.{name}.{key}": safe_get_full_optimizer_state(parameter, key) for key in ADAMW_STATE_KEYS
                }
                tensors[f"optimizer.{name}.step"] = steps
            if number % self.dist.world_size == self.dist.rank:
                state |= {key: tensor.detach().cpu() for key, tensor in tensors.items()}
        return state

    def optimizer_steps(self) -> Tensor | None:
        """Return AdamW's step count as a scalar tensor, or None before the first step."""
        return next((values["step"] for values in self.optimizers[0].state.values() if "step" in values), None)

    def relink_optimizer_state(self) -> None:
        """Link every parameter to its optimizer state again.

        DeepSpeed 0.19 links after the first step of the first parameter group. The other groups have no state then and
        stay unlinked.
        """
        zero = self.module.optimizer
        if self.zero_stage < 3 and self.optimizer_steps() is not None:
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()

    def load_optimizer(self, saved: SavedState, scaler: dict[str, Any]) -> None:
        if not any(key.startswith("optimizer.") for key in saved.tensors):
            return
        self.init_optimizer_state()
        steps = torch.zeros(())
        for name, parameter in self.trainable_parameters().items():
            shape = self.stage.model.get_parameter(name).shape
            whole = {f"optimizer.{name}.{key}": torch.zeros(shape) for key in ADAMW_STATE_KEYS}
            saved.load({**whole, f"optimizer.{name}.step": steps})
            for key in ADAMW_STATE_KEYS:
                self.set_optimizer_state(parameter, key, whole[f"optimizer.{name}.{key}"])
        for values in self.optimizers[0].state.values():
            values["step"].fill_(steps.item())

    def init_optimizer_state(self) -> None:
        """Allocate the optimizer state by a step with learning rate 0 on a batch without trained tokens."""
        for group in self.optimizers[0].param_groups:
            group["lr"] = 0.0
        self.forward_backward(to_device(empty_batch(self.stage.data), self.dist.device), torch.ones(()), True)
        self.clip_gradient(0.0)
        self.relink_optimizer_state()

    def set_optimizer_state(self, parameter: torch.nn.Parameter, key: str, whole: Tensor) -> None:
        """Set the optimizer state of a parameter from the unsharded tensor `whole`."""
        from deepspeed.utils import safe_get_local_optimizer_state as get_local
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.zero_stage < 3:
            safe_set_full_optimizer_state(parameter, whole.to(self.dist.device), key)
            return
        size = get_local(parameter, key).numel()  # the last process's shard is padded
        padded = torch.nn.functional.pad(whole.flatten(), (0, size * self.dist.world_size - whole.numel()))
        local = padded[size * self.dist.rank : size * (self.dist.rank + 1)]
        safe_set_local_optimizer_state(parameter, local.to(self.dist.device), key)

    @torch.no_grad()
    def gather_weights(self, everywhere: bool = False) -> None:
        from deepspeed.utils import safe_get_full_fp32_param

        target = dict(self.stage.model.named_parameters())
        for name, parameter in self.trainable_parameters().items():
            whole = safe_get_full_fp32_param(parameter) if self.zero_stage == 3 else parameter
            if self.dist.is_rank0 or everywhere:
                target[name].copy_(whole)

    def close(self) -> None:
        self.module.destroy()
