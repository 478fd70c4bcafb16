"""Engine: forward, backward, optimizer step and state, for one process or for several with DDP.

    forward_backward(batch)           forward and backward of a micro-batch; gradients accumulate
    optimizer_step()                  clip the gradient, update the weights
    evaluate(batch)                   forward without gradients
    state_dict(), load_state_dict()   trainable weights and optimizer state, for the step folders
    gather_weights()                  copy the weights to stage.model on rank 0

The wrapped module (StageLoss) maps a batch to its loss. It contains the whole loss because the loss uses the weight of
the output layer outside the model's forward, and FSDP and ZeRO gather only weights that their module's forward uses.
Weights are fp32; autocast computes matrix products in --dtype. So all engines give the same losses up to rounding.
Read next: parallel.py (FSDP, ZeRO), loop.py (the caller), train_state.py (saved states).
"""

import argparse
import contextlib
import math
import shutil
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.errors import UserError
from model.transformer import Transformer
from trainer.datasets import Batch
from trainer.distributed import DistContext
from trainer.optim import make_optimizers
from trainer.stage import Stage
from trainer.state_files import SavedState, TensorDict


class StageLoss(nn.Module):
    """The stage's loss as a module: batch -> (sum of losses, number of tokens or pairs, {name: sum to log})."""

    def __init__(self, dist: DistContext, stage: Stage, model: nn.Module) -> None:
        super().__init__()
        self.model, self.dist, self.compute_loss = model, dist, stage.compute_loss

    def forward(self, batch: Batch) -> tuple[Tensor, int, dict[str, Any]]:
        with self.dist.autocast():
            loss, count, *extras = self.compute_loss(self.model, batch)
        return loss, count, extras[0] if extras else {}


class Engine:
    """Engine of one process, or of several that each hold the whole model (DDP).

    `model`: the Transformer that is trained: stage.model here, a copy of it in the engines with sharded weights.
    """

    model: Transformer
    module: Any  # StageLoss for training, wrapped by DDP, FSDP or DeepSpeed
    eval_module: Any  # StageLoss for evaluation
    optimizers: list[torch.optim.Optimizer]
    replicated = True  # whether every process holds all unsharded tensors of `state_dict`

    def __init__(self, dist: DistContext, args: argparse.Namespace, stage: Stage) -> None:
        self.dist, self.args, self.stage = dist, args, stage
        self.scaler = torch.amp.GradScaler(dist.device.type, enabled=dist.dtype == torch.float16)
        self.build()
        self.module.train()

    def build(self) -> None:
        self.model = self.stage.model.to(self.dist.device)
        self.optimizers = self.make_optimizers()
        self.module = self.eval_module = StageLoss(self.dist, self.stage, self.compile_model(self.model))
        if self.dist.world_size > 1:
            devices = [self.dist.device] if self.dist.device.type == "cuda" else None
            self.module = DistributedDataParallel(self.eval_module, device_ids=devices)

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        args, fused = self.args, self.dist.device.type != "mps"
        return make_optimizers(self.model, args.optimizer, args.learning_rate, args.weight_decay, fused)

    def compile_model(self, model: nn.Module) -> nn.Module:
        if not self.args.compile:
            return model
        compilers = ("g++", "clang++", "c++", "cl")
        if self.dist.device.type == "cpu" and not any(shutil.which(name) for name in compilers):
            raise UserError("--compile on a CPU needs a C++ compiler (g++, clang++ or cl): install one or leave it out")
        compiled: Any = torch.compile(model)
        return compiled

    def forward_backward(self, batch: Batch, loss_scale: float, last: bool) -> tuple[Tensor, int, dict[str, Any]]:
        """Accumulate the gradient of `loss_scale` x the loss of a micro-batch; average it over ranks after the `last`.

        Returns what compute_loss returns: (sum of losses, number of tokens or pairs, {name: sum to log}).
        """
        is_accumulating = isinstance(self.module, DistributedDataParallel) and not last
        with self.module.no_sync() if is_accumulating else contextlib.nullcontext():
            loss, count, extras = self.module(batch)
            self.scaler.scale(loss * loss_scale).backward()
        return loss.detach(), count, extras

    def optimizer_step(self, clip: float, loss_is_finite: bool) -> float:
        """Clip the gradient to the norm `clip` (0: no clipping), update the weights, return the norm before clipping.

        The weights stay unchanged if the loss or the norm is not finite.
        """
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm: Any = nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], clip or math.inf)
        norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
        for optimizer in self.optimizers:
            if self.scaler.is_enabled() or (loss_is_finite and math.isfinite(norm)):
                self.scaler.step(optimizer)  # with fp16 it skips a step with non-finite gradients
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        return float(norm)

    @contextlib.contextmanager
    def eval_mode(self) -> Iterator[None]:
        """Inside, the model is in eval mode."""
        self.module.eval()
        yield
        self.module.train()

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[Tensor, int, dict[str, Any]]:
        """Return the loss of a batch, without gradients. All processes must call it equally often."""
        result: tuple[Tensor, int, dict[str, Any]] = self.eval_module(batch)
        return result

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters by their names in a checkpoint."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def state_dict(self) -> TensorDict:
        """Return trainable weights and optimizer state: live tensors, not copies; names do not depend on sharding."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.trainable_parameters().items()}
        state = {f"model.{name}": parameter.detach() for parameter, name in names.items()}
        for optimizer in self.optimizers:
            for parameter, values in optimizer.state.items():
                state |= {f"optimizer.{names[parameter]}.{key}": value for key, value in values.items()}
        return state

    def load_state_dict(self, saved: SavedState) -> None:
        """Load the optimizer state from a step folder. The weights of stage.model were loaded before `build`."""
        for optimizer in self.optimizers:
            init_optimizer_state(optimizer)
            for parameter, name in [
                (p, name) for name, p in self.trainable_parameters().items() if p in optimizer.state
            ]:
                if not any(key.startswith(f"optimizer.{name}.") for key in saved.tensors):
                    del optimizer.state[parameter]  # it had no optimizer step before the save
        saved.load({name: tensor for name, tensor in self.state_dict().items() if name.startswith("optimizer.")})

    def gather_weights(self) -> None:
        """Copy the weights to stage.model on rank 0. Here they are the same tensors."""

    def close(self) -> None:
        """Release the resources of the engine."""


@torch.no_grad()
def init_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Allocate the state of an optimizer by a step with learning rate 0 and zero gradients: weights do not change."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # the schedule sets it again before every step
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
