"""How the ranks of a run share its work: copies of the weights on each, or parts of them.

Either way each rank computes its part of the batch, losses and SyncBatchNorm take that of all ranks
for one, and gradients are averaged: see `fastssl.dist` for why that gives those of one process.
"""

import re

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..config import PretrainConfig
from ..data import Batch
from ..dist import SyncBatchNorm
from .ranks import Ranks

# Blocks of transformers and stages of ResNets, of a teacher too: ours, timm's, torchvision's.
_BLOCK = re.compile(r"(?:^|\.)(?:blocks|stages|layers?|encoder_layer)[._]?\d+$")
_WHOLE = ("lars", "lamb")  # their trust ratios are of whole tensors


class Objective(nn.Module):
    """A method as DistributedDataParallel wants it: `forward` is the loss."""

    def __init__(self, method: nn.Module):
        super().__init__()
        self.method = method

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor | float]]:
        return self.method.loss(batch)


def is_sharded(config: PretrainConfig, ranks: Ranks) -> bool:
    """Whether the weights are in shards. One process holds them all."""
    return config.parallel == "fsdp" and ranks.world > 1


def to_ranks(method: nn.Module, config: PretrainConfig, ranks: Ranks) -> nn.Module:
    """The method on its device, with statistics over all ranks, and in shards if so configured.

    Shards are of each block of the backbone and of a teacher's, and of all the rest together;
    `loss` and `features` gather what they need. To be called before the optimizer is built.

    Raises:
        ValueError: what cannot be sharded.
    """
    sharded = is_sharded(config, ranks)
    # FSDP2 takes contiguous weights only.
    layout = torch.contiguous_format if sharded else torch.channels_last
    method = method.to(ranks.device, memory_format=layout)
    if ranks.world > 1:
        method = SyncBatchNorm.convert_sync_batchnorm(method)
    if not sharded:
        return method
    if config.optimizer.startswith(_WHOLE):
        raise ValueError(
            f"pretrain: {config.optimizer} needs whole tensors, parallel=fsdp has shards of them. "
            "Use parallel=ddp, or adamw."
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    for name, module in reversed(list(method.named_modules())):  # inner ones first
        if _BLOCK.search(name):
            fully_shard(module, mesh=mesh)
    fully_shard(method, mesh=mesh)
    for name in ("loss", "features"):
        register_fsdp_forward_method(method, name)
    return method


def objective(method: nn.Module, config: PretrainConfig, ranks: Ranks) -> nn.Module:
    """What the loop calls with a batch; its backward averages gradients over the ranks."""
    wrapped = Objective(method)
    if ranks.world > 1 and not is_sharded(config, ranks):
        return DistributedDataParallel(wrapped)
    return wrapped


def refuse_unused(objective: nn.Module) -> None:
    """To be called after a backward: DistributedDataParallel waits for every gradient.

    Raises:
        ValueError: parameters that train and have none.
    """
    if not isinstance(objective, DistributedDataParallel):
        return
    trained = ((n, p) for n, p in objective.module.method.named_parameters() if p.requires_grad)
    unused = [name for name, p in trained if p.grad is None]
    if unused:
        raise ValueError(
            f"pretrain: the loss must use every parameter that trains, got none of it for "
            f"{', '.join(unused[:3])} ({len(unused)} in all). Name these in freeze, leave them out "
            "of the method, or use parallel=fsdp."
        )


def placement(method: nn.Module, optimizer: torch.optim.Optimizer):
    """Which tensor one of a checkpoint is to lie as: `like` of `load_checkpoint`."""
    weights = method.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def like(keys: tuple) -> Tensor | None:
        if keys[0] == "model":
            return weights.get(keys[1])
        return parameters[keys[2]] if keys[:2] == ("optimizer", "state") else None

    return like


def whole(x: Tensor) -> Tensor:
    """x, put together of its shards. All ranks must call it."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def gathered(module: nn.Module, plain: nn.Module) -> nn.Module:
    """`module`, or where it is in shards `plain`, a network of the same form, with its weights.

    All ranks must call it; each gets all weights, on the CPU.
    """
    state = module.state_dict()
    if not any(hasattr(x, "full_tensor") for x in state.values()):
        return module
    plain.load_state_dict({name: whole(x).cpu() for name, x in state.items()})
    return plain
