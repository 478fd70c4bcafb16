"""Parallelism backends behind the interface of Engine: DDP, FSDP2, DeepSpeed ZeRO-1/2/3.

    --parallel    weights     gradients   optimizer state
    ddp           replicated  replicated  replicated         torch's DistributedDataParallel; Engine in engine.py
    fsdp          sharded     sharded     sharded            torch's FSDP2 (fully_shard), layer by layer
    zero1         replicated  replicated  sharded            DeepSpeed ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054,
    zero2         replicated  sharded     sharded            section 5), in zero.py
    zero3         sharded     sharded     sharded

Read next: engine.py (the interface, and DDP), zero.py.
"""

import argparse
import contextlib
import copy
from collections.abc import Iterator

import torch

from trainer.distributed import DistContext
from trainer.engine import Engine, StageLoss
from trainer.stage import Stage


def make_engine(dist: DistContext, args: argparse.Namespace, stage: Stage) -> Engine:
    """Return the engine of --parallel. One process always gets the plain Engine."""
    if dist.world_size == 1 or args.parallel == "ddp":
        return Engine(dist, args, stage)
    if args.parallel == "fsdp":
        return FSDPEngine(dist, args, stage)
    from trainer.zero import ZeroEngine

    return ZeroEngine(dist, args, stage)


class FSDPEngine(Engine):
    """FSDP2: tensors are sharded by rows; a layer's weights are gathered only while it is computed.

    Gradients are reduced after every micro-batch: reducing only after the last would keep them unsharded until then.
    """

    def build(self) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.dist.device.type, (self.dist.world_size,))
        self.model = copy.deepcopy(self.stage.model)
        for layer in self.model.model.layers:
            fully_shard(layer, mesh=mesh)
        self.module = StageLoss(self.dist, self.stage, self.compile_model(self.model))
        self.module = self.eval_module = fully_shard(self.module, mesh=mesh)  # embeddings, last norm, output layer
        self.optimizers = self.make_optimizers()

    @contextlib.contextmanager
    def eval_mode(self) -> Iterator[None]:
        with super().eval_mode():
            yield
        self.module.reshard()  # without a backward pass the gathered weights would stay in memory

    @torch.no_grad()
    def gather_weights(self) -> None:
        target = dict(self.stage.model.named_parameters())
        for name, parameter in self.trainable_parameters().items():
            whole = parameter.full_tensor()  # type: ignore[attr-defined]
            if self.dist.is_rank0:
                target[name].copy_(whole)
