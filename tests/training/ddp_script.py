"""Run by test_ddp.py on every rank and in one process: trains, and returns what must agree."""

import sys
from pathlib import Path

import torch
from transformers import ViTModel

from hf_ntp.training.arguments import PRESETS
from tests.conftest import Rows, tiny_resnet, tiny_vit
from tests.training.test_trainer import trainer

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
        {**ATTACKERS, "target_weight": 0.3, "prune_pattern": "global", "save_strategy": "steps", "save_steps": 4},
    ),
    "paper": lambda: (tiny_vit(), {**PRESETS["paper"], "sparsity": 0.6, "target": TWO_TARGETS}),
    "features": lambda: (
        ViTModel(tiny_vit().config, add_pooling_layer=False),
        {**ATTACKERS, "gradient_accumulation_steps": 2, "feature_tolerance": [0.01, 0.01]},
    ),
    # Its statistics are those of a process: ranks agree with each other, not with one process.
    "resnet": lambda: (tiny_resnet(), ATTACKERS),
}


def run(name, folder, processes):
    """State tensors by group and the log of a run."""
    model, options = RUNS[name]()
    size = GLOBAL_BATCH // processes // options.get("gradient_accumulation_steps", 1)
    ours = trainer(folder / name, model, **{**SGD, "per_device_train_batch_size": size, **options})
    start = {name: parameter.detach().clone() for name, parameter in ours.model.named_parameters()}
    ours.train()
    moved = {name: parameter.detach() - start[name] for name, parameter in ours.model.named_parameters()}
    state = {"moved": moved, "masks": ours.pruner.stored}
    if ours.args.target_weight:
        state |= {f"head {domain}": head.tensors() for domain, head in ours.heads.items()}
    if ours._pool is not None:
        state["attackers"] = ours._pool.tensors()
    state = {group: {name: t.detach() for name, t in part.items()} for group, part in state.items()}
    return state, ours.state.log_history[:-1]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    found = {name: run(name, folder, 2) for name in RUNS}
    assert torch.distributed.get_world_size() == 2
    torch.save(found, folder / f"rank{torch.distributed.get_rank()}.pt")
