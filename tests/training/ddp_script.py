"""Run by test_ddp.py on every rank and in one process: trains, and returns what must agree."""

import sys
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import ViTModel

from hf_ntp.models import prunable_weights
from hf_ntp.training.arguments import PRESETS
from hf_ntp.training.pruning import ADMMPruner
from tests.conftest import Rows, tiny_resnet, tiny_vit
from tests.training.test_trainer import NO_TARGET, trainer

# Whatever the number of processes; 48 images are four steps of an epoch.
GLOBAL_BATCH = 12
TWO_TARGETS = {"four": Rows(20, 4, seed=1), "two": Rows(15, 2, seed=2)}
# Attackers' shares of a batch do not end where those of processes do.
ATTACKERS = {"attackers": 3, "attacker_batch_size": 5, "attacker_patience": 0, "attacker_horizon": [3, 8]}
# Adam's first steps have the size of the rate even where a gradient is rounding alone.
SGD = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 8, "logging_steps": 1, "target_warmup": 0.0}

RUNS = {
    "adaptive": lambda: (
        tiny_vit(),
        {
            **{**ATTACKERS, "target_weight": 0.3, "prune_pattern": "global", "gradient_checkpointing": True},
            **{"save_strategy": "steps", "save_steps": 4, "evaluation": Rows(101, seed=3)},
        },
    ),
    "paper": lambda: (tiny_vit(), {**PRESETS["paper"], "sparsity": 0.6, "target": TWO_TARGETS}),
    "features": lambda: (
        ViTModel(tiny_vit().config, add_pooling_layer=False),
        {**ATTACKERS, "gradient_accumulation_steps": 2, "feature_tolerance": [0.01, 0.01]},
    ),
    # Its head gets no gradient.
    "head_left_alone": lambda: (
        tiny_vit(),
        {**NO_TARGET, "source_loss": "features", "gradient_checkpointing": True, "feature_tolerance": [0.01, 0.01]},
    ),
    # Its statistics are those of a process: ranks agree with each other, not with one process.
    "resnet": lambda: (tiny_resnet(), ATTACKERS),
}

PATTERNS = ("layer", "global", "l1", "2:4")


def run(name, folder, processes, device="cpu"):
    """State tensors by group and the log of a run."""
    model, options = RUNS[name]()
    size = GLOBAL_BATCH // processes // options.get("gradient_accumulation_steps", 1)
    options = {**SGD, "per_device_train_batch_size": size, "use_cpu": device == "cpu", **options}
    ours = trainer(folder / name, model, **options)
    start = {name: parameter.detach().clone() for name, parameter in ours.model.named_parameters()}
    ours.train()
    moved = {name: parameter.detach() - start[name] for name, parameter in ours.model.named_parameters()}
    state = {"moved": moved, "masks": ours.pruner.stored}
    if ours._guard.held_out is not None:
        state["guard"] = {"excess": ours._guard.excess}
    if ours.args.target_weight:
        state |= {f"head {domain}": head.tensors() for domain, head in ours.heads.items()}
    if ours._pool is not None:
        state["attackers"] = ours._pool.tensors()
    state = {group: {name: t.detach() for name, t in part.items()} for group, part in state.items()}
    return state, ours.state.log_history[:-1]


def gathered(tensors):
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().cpu().clone() for name, t in tensors}


def prune(pattern, folder=None, mesh=None):
    """Prune a model, sharded over a mesh where there is one, in a loop without Trainer; whole tensors by group.

    Args:
        pattern: ``prune_pattern``.
        folder: Where the model is saved.
        mesh: For ``fully_shard``.
    """
    model, data = tiny_vit().train(), Rows(size=6)
    if mesh is not None:
        model.to(mesh.device_type)
        for block in model.vit.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    images, labels = (tensor.to(model.device) for tensor in (data.images, data.labels))
    weights = prunable_weights(model)
    pruner = ADMMPruner(weights, 0.5, pattern, rho=0.1, l1_weight=2e-3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps = []
    for step in range(6):
        torch.nn.functional.cross_entropy(model(images).logits, labels).backward()
        pruner.add_penalty_gradient()
        optimizer.step()
        optimizer.zero_grad()
        if step < 3:
            steps.append([float(value) for value in pruner.update((step + 1) / 3)])
        elif step == 3:
            anchors = gathered(pruner.tensors().items())
            pruner.load({name: tensor.to(model.device) for name, tensor in anchors.items()}, pruner.scalars())
            pruner.finish()
        else:
            pruner.enforce_mask()
    if mesh is not None:
        for name, stored in pruner.tensors().items():
            assert stored.to_local().shape == weights[name].to_local().shape
            assert stored.placements == weights[name].placements
            assert stored.to_local().numel() < stored.numel() or mesh.size() == 1
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if folder is not None and state:  # the first rank has it
        model.save_pretrained(folder, state_dict=state)
    masks, weights = gathered(pruner.masks().items()), gathered(weights.items())
    return {"anchors": anchors, "masks": masks, "weights": weights}, steps


if __name__ == "__main__":
    folder, device, processes = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    found = {name: run(name, folder, processes, device) for name in RUNS}
    mesh = init_device_mesh(device, (processes,))
    found |= {pattern: prune(pattern, folder / pattern, mesh) for pattern in PATTERNS}
    torch.save(found, folder / f"rank{torch.distributed.get_rank()}.pt")
