"""A batch that lies on several processes, taken as one: terms that compare images see all of them.

DistributedDataParallel averages the gradients of the ranks' losses. That is exact for a mean over images, and wrong
for any term that is not one (class means, scatter, spread): such a term is computed from the rows of all ranks, on
every rank alike. Its gradient then reaches the rows of a rank once per rank, which the average divides out again.

All ranks must hold equally many rows; Accelerate's data loader sees to it. BatchNorm stays what it is elsewhere: it
normalises with the images of one process.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, gather
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .config import NTPConfig


def check_processes(args: NTPConfig, kind: DistributedType, model: nn.Module) -> None:
    """Raise ``ValueError`` for ways to share the work out that a protection run cannot take part in.

    Args:
        args: Configuration.
        kind: Accelerate's ``distributed_type``.
        model: As Trainer got it.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs would be driven from one process (DataParallel), which splits batches out of "
            "sight; needed: one process per GPU. Start with `accelerate launch`, or set CUDA_VISIBLE_DEVICES."
        )
    if not (kind == DistributedType.NO or kind.value.startswith("MULTI_")):
        raise ValueError(
            f"the processes work together as {kind.value}; needed: a whole copy of the model in every process (DDP), "
            "as simulated attackers and the original model are whole copies too. Start with `accelerate launch "
            "--multi_gpu`. ADMMPruner alone also prunes sharded weights, in a training loop of your own."
        )
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError(
            "the model's weights are shards (DTensor); needed: whole weights. Load it without tp_plan and device mesh."
        )
    if args.world_size > 1 and args.attackers and any(isinstance(m, nn.SyncBatchNorm) for m in model.modules()):
        raise ValueError(
            f"the model has SyncBatchNorm with {args.attackers} simulated attackers, who are on different processes "
            "at a time and would get each other's statistics; needed: BatchNorm, or attackers=0."
        )
    loader: Any = args.accelerator_config
    if args.world_size > 1 and (loader.split_batches or loader.dispatch_batches or not loader.even_batches):
        raise ValueError(
            f"accelerator_config has split_batches={loader.split_batches}, dispatch_batches={loader.dispatch_batches} "
            f"and even_batches={loader.even_batches}; needed: False, None and True, so that every process reads its "
            "own part, as large as everybody's. Leave them at their defaults."
        )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != args.world_size:
        raise ValueError(
            f"{started} processes were started and Accelerate knows of {args.world_size}: each would train alone, "
            "and all would write the same files. On CPUs, set use_cpu=True here and in all TrainingArguments."
        )


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
