"""Run by test_ddp.py on every rank and in one process: trains, and returns what must agree."""

import os
from contextlib import contextmanager, nullcontext

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import LoraConfig, get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainerCallback, ViTModel

from hf_ntp.models import prunable_weights
from hf_ntp.models.sharding import whole
from hf_ntp.training.arguments import PRESETS
from hf_ntp.training.pruning import ADMMPruner
from hf_ntp.training.self_supervised import pretrain, small_encoder
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
    # Its gradient reaches the encoder by no other term.
    "collapse": lambda: (tiny_vit(), {**NO_TARGET, "collapse_weight": 1.0, "source_tolerance": []}),
    # Its head gets no gradient.
    "head_left_alone": lambda: (
        tiny_vit(),
        {**NO_TARGET, "source_loss": "features", "gradient_checkpointing": True, "feature_tolerance": [0.01, 0.01]},
    ),
    # Its statistics are those of a process: ranks agree with each other, not with one process.
    "resnet": lambda: (tiny_resnet(), ATTACKERS),
}

PATTERNS = ("layer", "global", "l1", "2:4")


SHARDED = ("adaptive", "paper", "features")
"""Runs that can also do with shards (FSDP2), which have no room for attackers."""


@contextmanager
def fsdp_on_cpus():
    """Accelerate takes FSDP on CPUs for DDP, though PyTorch can do it: tell Trainer that it is meant."""
    create, kind = Trainer.create_accelerator_and_postprocess, PartialState().distributed_type

    def create_and_insist(self):
        create(self)
        if self.args.fsdp:
            state = self.accelerator.state
            PartialState._shared_state["distributed_type"] = state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    Trainer.create_accelerator_and_postprocess = create_and_insist
    yield
    Trainer.create_accelerator_and_postprocess = create
    PartialState._shared_state["distributed_type"] = kind
    AcceleratorState._reset_state()


def run(name, folder, processes, device="cpu", resume=None, **more):
    """State tensors by group and the log of a run."""
    model, options = RUNS[name]()
    size = GLOBAL_BATCH // processes // options.get("gradient_accumulation_steps", 1)
    options = {**SGD, "per_device_train_batch_size": size, "use_cpu": device == "cpu", **options, **more}
    ours = trainer(folder / name, model, **options)
    start = {name: parameter.detach().clone() for name, parameter in ours.model.named_parameters()}
    ours.train(resume)
    moved = {
        name: parameter.detach() - start[name].to(parameter.device)
        for name, parameter in ours.model.named_parameters()
    }
    state = {"moved": moved, "masks": ours.pruner.stored}
    if ours._guard.tolerance:
        state["guard"] = {"excess": ours._guard.excess}
    if ours.args.target_weight:
        state |= {f"head {domain}": head.tensors() for domain, head in ours.heads.items()}
    if ours._pool is not None:
        state["attackers"] = ours._pool.tensors()
    state = {group: {name: t.detach() for name, t in part.items()} for group, part in state.items()}
    return state, ours.state.log_history[:-1]


class Break(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


def life(folder, processes, device):
    """What a sharded trainer is used for before, between and after trainings; of a model that keeps an adapter."""
    base, data = tiny_vit(), Rows(seed=9)
    users = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    options = {**SGD, **PRESETS["paper"], "sparsity": 0.6, "adapter": "keep", "fsdp": True, "max_steps": 4}
    size = GLOBAL_BATCH // processes
    ours = trainer(folder, users, per_device_train_batch_size=size, use_cpu=device == "cpu", **options)
    losses = [ours.evaluate(data)["eval_loss"]]
    breaking = Break()
    ours.add_callback(breaking)
    try:
        ours.train()
    except KeyboardInterrupt:
        losses.append(ours.evaluate(data)["eval_loss"])  # as it was
    ours.remove_callback(breaking)
    for _ in range(2):
        ours.train()
        losses.append(ours.evaluate(data)["eval_loss"])
    images, labels = (tensor.to(ours.args.device) for tensor in (data.images, data.labels))
    with torch.no_grad():
        logits = users.to(ours.args.device).eval()(images).logits
    losses.append(float(torch.nn.functional.cross_entropy(logits, labels)))
    ours.save_model(str(folder / "saved"))
    return losses


def pretrain_contrastively(folder, device):
    """Weights of a small encoder, and the log: processes see images of their own and end with the same weights."""
    encoder = small_encoder("simclr", image_size=8)
    log = pretrain("simclr", encoder, Rows(48), str(folder), 6, batch_size=8, use_cpu=device == "cpu")
    return {"weights": {name: parameter.detach() for name, parameter in encoder.named_parameters()}}, log[:-1]


def gathered(tensors):
    return {name: whole(tensor).detach().cpu().clone() for name, tensor in tensors}


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
        for name, stored in pruner.stored.items():
            assert stored.to_local().shape == weights[name].to_local().shape
            assert stored.placements == weights[name].placements
            assert stored.to_local().numel() < stored.numel() or mesh.size() == 1
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if folder is not None and state:  # the first rank has it
        model.save_pretrained(folder, state_dict=state)
    masks, weights = gathered(pruner.masks().items()), gathered(weights.items())
    return {"anchors": anchors, "masks": masks, "weights": weights}, steps


def main(folder, device, processes):
    """What every rank does."""
    found = {name: run(name, folder, processes, device) for name in RUNS}
    found["simclr"] = pretrain_contrastively(folder / "simclr", device)
    mesh = init_device_mesh(device, (processes,))
    found |= {pattern: prune(pattern, folder / pattern, mesh) for pattern in PATTERNS}
    with fsdp_on_cpus() if device == "cpu" else nullcontext():
        for name in SHARDED:
            found[f"{name}, sharded"] = run(name, folder / "sharded", processes, device, attackers=0, fsdp=True)
        # With moments, which are shards, too.
        sharded = {"fsdp": True, "optim": "adamw_torch", "save_strategy": "steps", "save_steps": 4}
        found["uninterrupted"] = run("paper", folder / "moments", processes, device, **sharded)
        last = str(folder / "moments" / "paper" / "checkpoint-4")
        found["resumed"] = run("paper", folder / "moments", processes, device, last, **sharded)
        found["life"] = life(folder / "life", processes, device)
    torch.save(found, folder / f"rank{torch.distributed.get_rank()}.pt")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads now and then abort a process that ends in the usual way after FSDP
