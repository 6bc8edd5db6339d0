"""Weights spread over processes (FSDP2): each keeps a part of every tensor, and the whole only while a block runs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from icd_lightning.models.diffusion_model import DiffusionModel


def shard(model: DiffusionModel, mesh: DeviceMesh) -> None:
    """Spread a network over the processes of a mesh, block by block; one that is spread already stays so.

    Adapters need no care: a gathered block is the ordinary one, whichever adapter is on and in whatever order passes
    run. Trained and frozen weights of different types share a unit, for each is gathered in its own type.
    """
    network = model.network
    if isinstance(network, FSDPModule):
        return
    for block in [part for part in network.modules() if isinstance(part, model.backbone.blocks)]:
        fully_shard(block, mesh=mesh)
    # without it the outermost unit would stay whole after a pass without backward, and miss what is assigned then
    fully_shard(network, mesh=mesh, reshard_after_forward=True)


def gather_weights(module: nn.Module) -> None:
    """Undo `shard` for good: plain networks with whole weights on every process, all of which must call it."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if isinstance(parameter, DTensor):
                setattr(part, name, nn.Parameter(parameter.detach().full_tensor(), parameter.requires_grad))
        if isinstance(part, FSDPModule):
            # FSDP2 has no way back. These hooks are all its own; the class was made of FSDPModule and the real one
            for kind in ("forward_pre", "forward", "state_dict_pre", "load_state_dict_pre"):
                getattr(part, f"_{kind}_hooks").clear()
            part.__class__ = type(part).__bases__[1]


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors on the CPU of the first process, nothing on the others; all must call it, for the same names."""
    first = not dist.is_initialized() or dist.get_rank() == 0
    tensors_here = {}
    for name, tensor in tensors.items():
        whole = tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
        if first:
            tensors_here[name] = whole.cpu()
    return tensors_here


def part_like(whole: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, spread as `like` is; for a plain `like`, the tensor on its device."""
    whole = whole.to(like.device)
    if isinstance(like, DTensor):
        return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
    return whole


@torch.no_grad()
def assign(parameter: nn.Parameter, whole: Tensor) -> None:
    parameter.copy_(part_like(whole, parameter))
