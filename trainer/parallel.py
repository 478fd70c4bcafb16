"""Parallelism backends behind the interface of Engine: DDP, FSDP2, DeepSpeed ZeRO-1/2/3.

    --parallel    weights    gradients    optimizer state
    ddp           whole      whole        whole              torch's DistributedDataParallel; also one process alone
    fsdp          in pieces  in pieces    in pieces          torch's FSDP2 (fully_shard), a layer at a time
    zero1         whole      whole        in pieces          DeepSpeed ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054,
    zero2         whole      in pieces    in pieces          section 5), in zero.py
    zero3         in pieces  in pieces    in pieces

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
    """The engine for --parallel. One process has nobody to share with: it always gets the plain one."""
    if dist.world_size == 1 or args.parallel == "ddp":
        return Engine(dist, args, stage)
    if args.parallel == "fsdp":
        return FSDPEngine(dist, args, stage)
    from trainer.zero import ZeroEngine

    return ZeroEngine(dist, args, stage)


class FSDPEngine(Engine):
    """FSDP2: every process keeps some rows of every tensor, and a layer is whole only while it is computed.

    Gradients are exchanged with every micro-batch: waiting for the last one would keep them whole until then.
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
        self.module.reshard()  # what no backward pass follows stays whole

    @torch.no_grad()
    def gather_weights(self) -> None:
        target = dict(self.stage.model.named_parameters())
        for name, parameter in self.trainable_parameters().items():
            whole = parameter.full_tensor()  # type: ignore[attr-defined]
            if self.dist.is_rank0:
                target[name].copy_(whole)
