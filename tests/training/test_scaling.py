"""What changes how a step is computed must not change what it computes."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from transformers.trainer_pt_utils import AcceleratorConfig

from hf_ntp import NTPConfig
from hf_ntp.training.distributed import check_processes

from ..conftest import tiny_resnet, tiny_vit
from .test_trainer import NO_TARGET, trainer

# Attackers act at once, on a model that moves.
FEW_STEPS = {"max_steps": 4, "logging_steps": 1, "optim": "sgd", "learning_rate": 0.05, "attacker_patience": 0}


def trained(folder, model=None, **options):
    ours = trainer(folder, model, **{**FEW_STEPS, **options})
    ours.train()
    return dict(ours.model.named_parameters()), [row for row in ours.state.log_history if "loss" in row]


def test_gradient_checkpointing_changes_nothing(tmp_path):
    """What attackers recompute in their backward pass is at their weights, not at the model's."""
    plain, log = trained(tmp_path / "plain")
    saving, other_log = trained(tmp_path / "saving", gradient_checkpointing=True)
    assert log[-1]["attacker_loss"] == other_log[-1]["attacker_loss"]
    assert all(torch.equal(weight, saving[name]) for name, weight in plain.items())


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_torch_compile_changes_nothing(tmp_path, backend):
    plain, log = trained(tmp_path / "plain", max_steps=2)
    torch._dynamo.reset()
    options = {"torch_compile": True, "torch_compile_backend": backend}
    compiled, other_log = trained(tmp_path / "compiled", max_steps=2, **options)
    for row, other in zip(log, other_log, strict=True):
        assert row == pytest.approx(other, rel=1e-2, abs=1e-4)
    assert all(torch.allclose(weight, compiled[name], atol=1e-3) for name, weight in plain.items())


def test_accumulated_batches_are_one_batch_to_terms_that_are_means(tmp_path):
    """Attackers get the images of all micro-batches; one of them, as several would share them out differently."""
    options = {**NO_TARGET, "attackers": 1, "attacker_batch_size": 24, "source_tolerance": [], "learning_rate": 1e-3}
    whole, log = trained(tmp_path / "whole", **options)
    accumulated, other_log = trained(
        tmp_path / "accumulated", **options, per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    for row, other in zip(log, other_log, strict=True):
        for name in ("source_loss", "attacker_loss"):
            assert row[name] == pytest.approx(other[name], rel=1e-4)
    assert all(torch.allclose(weight, accumulated[name], atol=1e-5) for name, weight in whole.items())


def test_checkpointing_that_cannot_work_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has BatchNorm.*needed: False"):
        trainer(tmp_path, tiny_resnet(), gradient_checkpointing=True)
    with pytest.raises(ValueError, match="use_reentrant=True with 4 simulated attackers"):
        trainer(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.XLA])
def test_sharded_training_is_refused(tmp_path, kind):
    args = NTPConfig(output_dir=str(tmp_path), report_to="none")
    with pytest.raises(ValueError, match=f"work together as {kind.value}.*needed: a whole copy"):
        check_processes(args, kind, tiny_vit())


@pytest.mark.parametrize("loader", [{"split_batches": True}, {"dispatch_batches": True}, {"even_batches": False}])
def test_parts_of_a_batch_that_are_not_alike_are_refused(loader):
    args = SimpleNamespace(world_size=2, accelerator_config=AcceleratorConfig(**loader))
    with pytest.raises(ValueError, match=f"{next(iter(loader))}={next(iter(loader.values()))}"):
        check_processes(args, DistributedType.MULTI_CPU, tiny_vit())
    args.world_size = 1
    check_processes(args, DistributedType.NO, tiny_vit())
