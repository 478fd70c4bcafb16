"""Engines: forward, backward, optimizer step and state of one process, or of several with DDP, FSDP2 or ZeRO.

    --parallel    weights     gradients   optimizer state
    ddp           replicated  replicated  replicated         torch's DistributedDataParallel; also for one process
    fsdp          sharded     sharded     sharded            torch's FSDP2 (fully_shard), layer by layer
    zero1         replicated  replicated  sharded            DeepSpeed ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054,
    zero2         replicated  sharded     sharded            section 5), in zero.py
    zero3         sharded     sharded     sharded

The wrapped module (StageLoss) maps a batch to its loss. It contains the whole loss because the loss uses the weight of
the output layer outside the model's forward, and FSDP and ZeRO gather only weights that their module's forward uses.
Weights are fp32; autocast computes matrix products in --dtype. So all engines give the same losses up to rounding.
Read next: loop.py (the caller), zero.py, train_state.py (saved states).
"""

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.moe import MoEFeedForward
from model.transformer import Transformer
from trainer.config import TrainConfig
from trainer.datasets import Batch
from trainer.distributed import DistContext
from trainer.optim import make_optimizers
from trainer.stage import LossAndMetrics, Stage
from trainer.state_files import SavedState, TensorDict


class StageLoss(nn.Module):
    """The stage's loss as a module: batch -> (sum of losses, {name: sum to log})."""

    def __init__(self, stage: Stage, dist: DistContext, model: nn.Module) -> None:
        super().__init__()
        self.model, self.dist, self.compute_loss = model, dist, stage.compute_loss

    def forward(self, batch: Batch) -> LossAndMetrics:
        with self.dist.autocast():
            return self.compute_loss(self.model, batch)


class Engine:
    """Base of the engines. A subclass sets `module` and `optimizers`; a context manager, `close` releases resources.

    model: the Transformer that is trained: stage.model, or a copy of it whose weights are sharded.
    """

    module: Any  # StageLoss, wrapped by DDP, FSDP or DeepSpeed
    optimizers: list[torch.optim.Optimizer]
    replicated = True  # whether every process holds all unsharded tensors of `state_dict`

    def __init__(self, config: TrainConfig, stage: Stage, dist: DistContext, model: Transformer) -> None:
        self.config, self.stage, self.dist, self.model = config, stage, dist, model
        self.scaler = torch.amp.GradScaler(dist.device.type, enabled=dist.dtype == torch.float16)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        config, fused = self.config, self.dist.device.type != "mps"
        return make_optimizers(self.model, config.optimizer, config.learning_rate, config.weight_decay, fused)

    def make_loss(self) -> StageLoss:
        """Return the loss in training mode; --compile compiles its calls (evaluation calls `forward`, which is not)."""
        return StageLoss(self.stage, self.dist, self.model).train()

    def compile(self, module: nn.Module) -> None:
        """Compile the calls of a module if --compile is on. Rows of different lengths share one graph."""
        if self.config.compile == "on":
            module.compile(dynamic=True if self.stage.data.lengths() is not None else None)

    # ---- steps -------------------------------------------------------------------------------------------------------
    def forward_backward(self, batch: Batch, loss_scale: Tensor, is_last: bool) -> LossAndMetrics:
        """Accumulate the gradient of `loss_scale` x the loss of a micro-batch; average it over ranks after the last.

        Returns what compute_loss returns: (sum of losses, {name: sum to log}).
        """
        if self.config.compile == "on":  # a number would be a constant of the graph
            batch = {name: value for name, value in batch.items() if name not in ("row_ids", "num_tokens")}
            batch["num_targets"] = torch.full((), batch["num_targets"], device=self.dist.device)
        is_accumulating = isinstance(self.module, DistributedDataParallel) and not is_last
        with self.module.no_sync() if is_accumulating else contextlib.nullcontext():
            loss, metrics = self.module(batch)
            self.scaler.scale(loss * loss_scale.to(loss.dtype)).backward()
        return loss.detach(), metrics

    def clip_gradient(self, max_norm: float) -> Tensor:
        """Clip the gradient to `max_norm` (0: no clipping). Returns its norm before clipping, a scalar."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        norm: Any = nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)
        whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return whole

    def optimizer_step(self, is_finite: Tensor) -> None:
        """Update the weights, unless the loss or the gradient is not finite, and free the gradient.

        is_finite: a scalar on the device. Where the host does not read it (`reads_late`), the optimizers skip the step
        on the device by `found_inf`, as they do for the fp16 scaler: weights and state do not change.
        """
        for optimizer in self.optimizers:
            if self.scaler.is_enabled():
                self.scaler.step(optimizer)
            elif self.dist.reads_late:
                optimizer.found_inf = 1 - is_finite.float()  # type: ignore[attr-defined]
                optimizer.step()
            elif is_finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()

    @contextlib.contextmanager
    def eval_mode(self) -> Iterator[None]:
        """Inside, the model is in eval mode."""
        self.module.eval()
        try:
            yield
        finally:
            self.module.train()

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> LossAndMetrics:
        """Return the loss of a batch, without gradients. All processes must call it equally often."""
        result: LossAndMetrics = self.module(batch)
        return result

    # ---- state -------------------------------------------------------------------------------------------------------
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

    def load_optimizer(self, saved: SavedState, scaler: dict[str, Any]) -> None:
        """Load the optimizer state from a step folder. The weights of stage.model were loaded before.

        scaler: state of the gradient scaler, {} unless the saved run used fp16.
        """
        if scaler:
            self.scaler.load_state_dict(scaler)
        for optimizer in self.optimizers:
            for name, parameter in self.trainable_parameters().items():
                if parameter in optimizer.state and not any(
                    key.startswith(f"optimizer.{name}.") for key in saved.tensors
                ):
                    del optimizer.state[parameter]  # it had no optimizer step before the save
        saved.load({name: tensor for name, tensor in self.state_dict().items() if name.startswith("optimizer.")})

    def gather_weights(self, everywhere: bool = False) -> None:
        """Copy the weights to stage.model, on rank 0 or on every rank. Unsharded weights are the same tensors."""

    def close(self) -> None:
        """Release the resources of the engine."""


class DDPEngine(Engine):
    """One process, or several that each hold the whole model and average their gradients."""

    def __init__(self, config: TrainConfig, stage: Stage, dist: DistContext) -> None:
        super().__init__(config, stage, dist, stage.model.to(dist.device))
        self.optimizers = self.make_optimizers()
        init_optimizer_state(self.optimizers)
        self.loss = self.module = self.make_loss()
        self.compile(self.loss)
        if dist.world_size > 1:
            devices = [dist.device] if dist.device.type == "cuda" else None
            self.module = DistributedDataParallel(
                self.loss, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> LossAndMetrics:
        return self.loss.forward(batch)


class FSDPEngine(Engine):
    """FSDP2: tensors are sharded by rows; a layer's weights are gathered only while it is computed.

    With bf16 or fp16 the matrices of the layers are gathered in that dtype, in which autocast uses them anyway, and
    gradients are summed in fp32. Norms, router and embeddings are gathered in fp32: they are not rounded elsewhere.
    Gradients are reduced after every micro-batch: reducing only after the last would keep them unsharded until then.
    """

    def __init__(self, config: TrainConfig, stage: Stage, dist: DistContext) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # takes a second to import

        super().__init__(config, stage, dist, copy.deepcopy(stage.model))
        mesh = init_device_mesh(dist.device.type, (dist.world_size,))
        forbid_stacked_experts(self.model)
        low = None if dist.dtype == torch.float32 else dist.dtype
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for layer in self.model.model.layers:
            self.compile(layer)  # not the whole loss: FSDP gathers weights between the layers
            if low:
                fully_shard(fp32_modules(layer), mesh=mesh)
            fully_shard(layer, mesh=mesh, mp_policy=policy if low else MixedPrecisionPolicy())
        self.module = self.make_loss()
        fully_shard(self.module, mesh=mesh)  # embeddings, last norm, output layer
        self.optimizers = self.make_optimizers()
        init_optimizer_state(self.optimizers)

    @contextlib.contextmanager
    def eval_mode(self) -> Iterator[None]:
        try:
            with super().eval_mode():
                yield
        finally:
            self.module.reshard()  # without a backward pass the gathered weights would stay in memory

    @torch.no_grad()
    def gather_weights(self, everywhere: bool = False) -> None:
        target = dict(self.stage.model.named_parameters())
        for name, parameter in self.trainable_parameters().items():
            whole = parameter.full_tensor()  # type: ignore[attr-defined]
            if self.dist.is_rank0 or everywhere:
                target[name].copy_(whole)


def forbid_stacked_experts(model: nn.Module) -> None:
    """Make an MoE compute its experts one by one: stacked copies of sharded weights would stay in memory."""
    for module in model.modules():
        if isinstance(module, MoEFeedForward):
            module.has_sharded_weights = True


def fp32_modules(layer: nn.Module) -> list[nn.Module]:
    """Return the modules of a layer that compute in fp32 under autocast: its norms and the router of an MoE."""
    modules = {name: module for name, module in layer.named_modules() if name.endswith(("norm", "mlp.gate"))}
    return [module for module in modules.values() if any(True for _ in module.parameters())]


@torch.no_grad()
def init_optimizer_state(optimizers: list[torch.optim.Optimizer]) -> None:
    """Allocate the state of new optimizers, as zeros, by a step with learning rate 0 and zero gradients.

    Allocated in the first training step it would lie between the activations: the next step would then find no large
    free blocks and need a sixth more memory on a CPU.
    """
    for optimizer in optimizers:
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for values in optimizer.state.values():
            for tensor in values.values():
                tensor.zero_()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
