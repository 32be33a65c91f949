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
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, gather
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy, transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .config import NTPConfig


def check_processes(
    args: NTPConfig, kind: DistributedType, model: nn.Module, fsdp: FullyShardedDataParallelPlugin | None = None
) -> None:
    """Raise ``ValueError`` for ways to share the work out that a protection run cannot take part in.

    Args:
        args: Configuration.
        kind: Accelerate's ``distributed_type``.
        model: As Trainer got it.
        fsdp: Accelerate's ``fsdp_plugin``, where weights are sharded.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs would be driven from one process (DataParallel), which splits batches out of "
            "sight; needed: one process per GPU. Start with `accelerate launch`, or set CUDA_VISIBLE_DEVICES."
        )
    if args.fsdp and kind != DistributedType.FSDP:
        raise ValueError(
            f"fsdp is set and the processes work together as {kind.value}: Accelerate does not shard on CPUs, nor "
            "after a Trainer without fsdp that was made later than this NTPConfig; needed: GPUs, and an NTPConfig "
            "made right before NTPTrainer. Leave fsdp out for whole copies."
        )
    if kind == DistributedType.FSDP and fsdp is not None:
        _check_sharding(args, fsdp)
    elif not (kind == DistributedType.NO or kind.value.startswith("MULTI_")):
        raise ValueError(
            f"the processes work together as {kind.value}; needed: a whole copy of the model in every process (DDP), "
            "or shards as FSDP2 makes them. Start with `accelerate launch --multi_gpu`, or set fsdp=True."
        )
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError(
            "the model's weights are shards (DTensor); needed: whole weights. Load it without tp_plan and device mesh."
        )
    synced = any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    if args.world_size > 1 and args.simulated_attackers and synced:
        raise ValueError(
            f"the model has SyncBatchNorm with {args.attackers} simulated attackers, who are on different processes "
            "at a time and would get each other's statistics; needed: BatchNorm, or attackers=0."
        )
    loader: Any = args.accelerator_config
    # One process that dispatches cuts the attackers' images to the size of the batch.
    if loader.dispatch_batches or (args.world_size > 1 and (loader.split_batches or not loader.even_batches)):
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


def _check_sharding(args: NTPConfig, fsdp: FullyShardedDataParallelPlugin) -> None:
    """Raise ``ValueError`` unless weights are sharded as FSDP2 does it and nothing needs them whole."""
    if args.simulated_attackers:
        raise ValueError(
            f"FSDP would shard the model, and {args.attackers} simulated attackers are whole copies of it; needed: "
            "attackers=0, as in the preset 'paper', or a whole copy in every process. Leave fsdp out (`accelerate "
            "launch --multi_gpu`)."
        )
    if args.source_loss == "reconstruction":
        raise ValueError(
            "FSDP would shard the model, and source_loss='reconstruction' calls a part of it; needed: 'features', or "
            "a whole copy in every process. Leave fsdp out (`accelerate launch --multi_gpu`)."
        )
    if args.torch_compile:
        raise ValueError("FSDP would shard the model, and torch_compile is on; needed: one of them. Leave one out.")
    by_size, by_layer = fsdp.auto_wrap_policy is size_based_auto_wrap_policy, "TRANSFORMER_BASED_WRAP"
    # What transformers chooses with fsdp=True; `accelerate config` asks for each.
    settings = {
        "fsdp_version": (fsdp.fsdp_version, 2),
        "fsdp_state_dict_type": (fsdp.state_dict_type.name, "FULL_STATE_DICT"),
        "fsdp_cpu_ram_efficient_loading": (bool(fsdp.cpu_ram_efficient_loading), False),
        "fsdp_offload_params": (isinstance(fsdp.cpu_offload, CPUOffloadPolicy), False),
        "fsdp_activation_checkpointing": (bool(fsdp.activation_checkpointing), False),
        "fsdp_auto_wrap_policy": ("SIZE_BASED_WRAP" if by_size else by_layer, by_layer),
    }
    if wrong := {name: pair for name, pair in settings.items() if pair[0] != pair[1]}:
        raise ValueError(
            f"FSDP is set up with {', '.join(f'{name}={found}' for name, (found, _) in wrong.items())}; needed: "
            f"{', '.join(f'{name}={needed}' for name, (_, needed) in wrong.items())}. Pass these to `accelerate "
            "launch` or its configuration file, or set fsdp=True and leave fsdp_config alone."
        )


def choose_units(model: PreTrainedModel, fsdp: FullyShardedDataParallelPlugin) -> None:
    """Set which layers FSDP gathers at a time, where that was left open.

    Accelerate takes the classes that a model must not be split in, and then the input embedding apart. Where one of
    the classes is around it, as in ViTs, it would be cut twice, which fails.

    Raises:
        ValueError: If the model does not say what its input embedding is: Accelerate does not shard it.
    """
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError as error:
        raise ValueError(
            f"FSDP would shard {type(model).__name__}, which Accelerate cannot: it has no get_input_embeddings(); "
            "needed: a model that has it, or whole copies. Leave fsdp out (`accelerate launch --multi_gpu`)."
        ) from error
    if fsdp.auto_wrap_policy is transformer_auto_wrap_policy and fsdp.transformer_cls_names_to_wrap is None:
        classes = {type(module).__name__ for module in model.modules()}
        around = {
            type(module).__name__
            for module in model.modules()
            if module is not embedding and any(part is embedding for part in module.modules())
        }
        # The list may name layers of other models of the family.
        fsdp.transformer_cls_names_to_wrap = sorted(classes & set(model._no_split_modules or ()) - around)


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
