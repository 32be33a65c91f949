"""Weights that lie in shards on several processes (DTensor, FSDP2), and tensors that are cut like them.

Every function leaves ordinary tensors alone. What needs messages has to be called on every rank.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate


def whole(tensor: Tensor) -> Tensor:
    """Return the tensor that shards make together, on every rank; needs messages."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard(tensor: Tensor) -> Tensor:
    """Return this rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def cut_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Cut a tensor that is whole on all ranks as ``like`` is cut; no message is needed."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    copies = DTensor.from_local(tensor, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)
    return copies.redistribute(placements=like.placements)


def sum_over_shards(sums: Tensor, like: Tensor) -> Tensor:
    """Add up what every rank has of a tensor that is cut as ``like`` is; needs messages."""
    if not isinstance(like, DTensor):
        return sums
    placements = [Partial() if placement.is_shard() else placement for placement in like.placements]
    return DTensor.from_local(sums, like.device_mesh, placements, run_check=False).full_tensor()
