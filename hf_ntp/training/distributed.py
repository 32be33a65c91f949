"""A batch that lies on several processes, taken as one: terms that compare images see all of them.

DistributedDataParallel averages the gradients of the ranks' losses. That is exact for a mean over images, and wrong
for any term that is not one (class means, scatter, spread): such a term is computed from the rows of all ranks, on
every rank alike. Its gradient then reaches the rows of a rank once per rank, which the average divides out again.

All ranks must hold equally many rows; Accelerate's data loader sees to it.
"""

from __future__ import annotations

import torch
from accelerate import PartialState
from accelerate.utils import gather
from torch import Tensor


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor) -> Tensor:
        return gather(rows.contiguous())

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        state = PartialState()
        # Every rank has computed the same: no message is needed to sum their gradients.
        return state.num_processes * gradient.chunk(state.num_processes)[state.process_index]


def gather_rows(*parts: Tensor) -> list[Tensor]:
    """Rows of all ranks in the order of ranks, in float32 and differentiable, in one message.

    Every rank has to derive the same loss from them.

    Args:
        parts: [N, D_i] each, N the same on every rank.

    Returns:
        [ranks * N, D_i] each; with a single process the tensors themselves.
    """
    if PartialState().num_processes == 1:
        return list(parts)
    rows = _Gather.apply(torch.cat([part.float() for part in parts], 1))
    return list(rows.split([part.shape[1] for part in parts], 1))


def average(value: Tensor) -> Tensor:
    """Mean over ranks of a tensor of any shape, differentiable under the conditions of :func:`gather_rows`."""
    return value if PartialState().num_processes == 1 else _Gather.apply(value[None]).mean(0)
