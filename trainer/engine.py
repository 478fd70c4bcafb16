"""The engine of one process, or of several under DDP: forward, backward, optimizer step and state for the loop.

    forward_backward(batch)  forward and backward    optimizer_step()  clip, update the weights
    state_dict(), load_state_dict()  what a checkpoint holds;  evaluate(batch)  forward;  gather_weights()  update
    stage.model

The wrapped module is the stage's whole loss, from the batch to the sum: a weight that the loss uses outside the model's
own forward (the output layer) is then in the reach of FSDP and ZeRO like every other. Weights stay fp32 and matrix
products are made in --dtype by autocast, so that all engines give the losses of one process, to rounding.
Read next: parallel.py (the engines of several processes), loop.py (the caller), train_state.py (where a state goes).
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
    """What is learnt, as one module: batch -> (sum of losses, how many, {name: sum to be logged})."""

    def __init__(self, dist: DistContext, stage: Stage, model: nn.Module) -> None:
        super().__init__()
        self.model, self.dist, self.compute_loss = model, dist, stage.compute_loss

    def forward(self, batch: Batch) -> tuple[Tensor, int, dict[str, Any]]:
        with self.dist.autocast():
            loss, count, *extras = self.compute_loss(self.model, batch)
        return loss, count, extras[0] if extras else {}


class Engine:
    """One process, or several that each hold all of the model.

    `model`: the Transformer whose weights move: stage.model itself here, a twin of it where pieces are held.
    """

    model: Transformer
    module: Any  # StageLoss as it is trained
    eval_module: Any  # StageLoss as it is evaluated
    optimizers: list[torch.optim.Optimizer]
    replicated = True  # whether what `state_dict` holds whole is held by every process

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
        """Add the gradient of `loss_scale` x the loss of a micro-batch; with the `last` one, average over ranks.

        Returns what the stage's compute_loss does.
        """
        is_accumulating = isinstance(self.module, DistributedDataParallel) and not last
        with self.module.no_sync() if is_accumulating else contextlib.nullcontext():
            loss, count, extras = self.module(batch)
            self.scaler.scale(loss * loss_scale).backward()
        return loss.detach(), count, extras

    def optimizer_step(self, clip: float, loss_is_finite: bool) -> float:
        """Clip to the norm `clip` (0: not at all) and move the weights; returns the norm of all gradients before.

        Nothing moves when the loss or the norm is not finite.
        """
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm: Any = nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], clip or math.inf)
        norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
        for optimizer in self.optimizers:
            if self.scaler.is_enabled() or (loss_is_finite and math.isfinite(norm)):
                self.scaler.step(optimizer)  # an fp16 step with non-finite gradients is skipped inside
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
        """The loss of a batch without its gradient. All processes must call it equally often."""
        result: tuple[Tensor, int, dict[str, Any]] = self.eval_module(batch)
        return result

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that move, by the names they have in a checkpoint."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def state_dict(self) -> TensorDict:
        """What a checkpoint holds: the live tensors, each under one name however it is cut."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.trainable_parameters().items()}
        state = {f"model.{name}": parameter.detach() for parameter, name in names.items()}
        for optimizer in self.optimizers:
            for parameter, values in optimizer.state.items():
                state |= {f"optimizer.{names[parameter]}.{key}": value for key, value in values.items()}
        return state

    def load_state_dict(self, saved: SavedState) -> None:
        """Fill the optimizers from a checkpoint; stage.model was filled before `build`."""
        for optimizer in self.optimizers:
            init_optimizer_state(optimizer)
            for parameter, name in [
                (p, name) for name, p in self.trainable_parameters().items() if p in optimizer.state
            ]:
                if not any(key.startswith(f"optimizer.{name}.") for key in saved.tensors):
                    del optimizer.state[parameter]  # it had not moved yet
        saved.load({name: tensor for name, tensor in self.state_dict().items() if name.startswith("optimizer.")})

    def gather_weights(self) -> None:
        """Bring stage.model up to date on the first process. Here it is."""

    def close(self) -> None:
        """Let go of what was taken."""


@torch.no_grad()
def init_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Have an optimizer make its state: a step at rate 0 with gradients of 0 moves nothing."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # the schedule sets it again before every step
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
