"""What changes how a step is computed must not change what it computes."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from transformers import Trainer
from transformers.trainer_pt_utils import AcceleratorConfig

from hf_ntp import NTPConfig
from hf_ntp.training.distributed import check_processes
from hf_ntp.training.trainer import _spare_draws

from ..conftest import Rows, tiny_resnet, tiny_vit
from .test_trainer import NO_TARGET, trainer

# Attackers act at once, on a model that moves.
FEW_STEPS = {"max_steps": 4, "logging_steps": 1, "optim": "sgd", "learning_rate": 0.05, "attacker_patience": 0}

# With fsdp=True.
BY_TRANSFORMERS = {"state_dict_type": "FULL_STATE_DICT", "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}


def options_of(**options):
    defaults = {
        "attackers": 4,
        "attacker_batch_size": 16,
        "attacker_weight": 1.0,
        "world_size": 1,
        "n_gpu": 0,
        "fsdp": None,
    }
    given = {**defaults, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, **options}
    return SimpleNamespace(**given, simulated_attackers=given["attackers"] if given["attacker_weight"] else 0)


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


def test_no_image_is_read_that_nothing_looks_at(tmp_path):
    """Each of 2 steps: 8 images for terms and 8 x 2 for the attacker, each only where it is on."""
    read = []

    class Target(Rows):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    def images_read(**options):
        ours = trainer(tmp_path, target=Target(classes=4), **{**NO_TARGET, "attacker_batch_size": 16, **options})
        batches = iter(ours.get_train_dataloader())
        read.clear()
        # Accelerate's loader is one batch ahead.
        next(batches)
        return len(read)

    assert images_read(attackers=1, fisher_weight=1.0) == 2 * (8 + 16)
    assert images_read(attackers=1) == 2 * 16
    assert images_read(fisher_weight=1.0) == 2 * 8
    assert images_read(attackers=1, attacker_weight=0.0) == 0


def test_torch_compile_with_batch_norm_is_refused(tmp_path):
    """Statistics of each domain would compile every step anew."""
    with pytest.raises(ValueError, match="torch_compile is on and ResNetForImageClassification has BatchNorm"):
        trainer(tmp_path, tiny_resnet(), torch_compile=True)


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


@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.XLA])
def test_other_ways_to_share_the_work_out_are_refused(tmp_path, kind):
    args = NTPConfig(output_dir=str(tmp_path), report_to="none")
    with pytest.raises(ValueError, match=f"work together as {kind.value}.*needed: a whole copy"):
        check_processes(args, kind, tiny_vit())


@pytest.fixture
def under_fsdp(monkeypatch):
    """Trainer believes to be started under FSDP; what `accelerate launch` chooses can be added."""
    create, plugin = Trainer.create_accelerator_and_postprocess, {"fsdp_version": 2, **BY_TRANSFORMERS}
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "False")  # where a plugin leaves it

    def create_and_say_so(self):
        create(self)
        self.is_fsdp_enabled = True
        self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**plugin)

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", create_and_say_so)
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    yield plugin
    AcceleratorState._reset_state()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "4 simulated attackers are whole copies of it; needed: attackers=0"),
        ({"attackers": 0, "torch_compile": True}, "torch_compile is on; needed: one of them"),
        ({"attackers": 0, "model": tiny_resnet()}, "ResNetForImageClassification, which Accelerate cannot"),
    ],
)
def test_what_needs_whole_weights_is_refused_under_fsdp(tmp_path, under_fsdp, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **options)


def test_fsdp_that_accelerate_would_leave_out_is_an_error():
    with pytest.raises(ValueError, match="fsdp is set and the processes work together as MULTI_CPU"):
        check_processes(options_of(fsdp=True), DistributedType.MULTI_CPU, tiny_vit())


def test_how_fsdp_has_to_be_set_up(tmp_path, under_fsdp):
    trainer(tmp_path, attackers=0)
    under_fsdp |= {"state_dict_type": "SHARDED_STATE_DICT", "cpu_ram_efficient_loading": True, "cpu_offload": True}
    under_fsdp |= {"activation_checkpointing": True, "auto_wrap_policy": "SIZE_BASED_WRAP"}
    with pytest.raises(
        ValueError,
        match="state_dict_type=SHARDED_STATE_DICT, fsdp_cpu_ram_efficient_loading=True, fsdp_offload_params=True, "
        "fsdp_activation_checkpointing=True, fsdp_auto_wrap_policy=SIZE_BASED_WRAP; "
        "needed: fsdp_state_dict_type=FULL_STATE_DICT",
    ):
        trainer(tmp_path, attackers=0)


def test_layers_around_the_embedding_are_no_units(tmp_path, under_fsdp):
    """Accelerate would cut the patch embedding of a ViT twice, and miss what is not there; the user's word counts."""
    model = tiny_vit()
    assert set(model._no_split_modules) == {"ViTEmbeddings", "ViTLayer"}
    model._no_split_modules = {*model._no_split_modules, "TextLayer"}
    ours = trainer(tmp_path, model, attackers=0)
    assert ours.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap == ["ViTLayer"]
    under_fsdp["transformer_cls_names_to_wrap"] = ["ViTAttention"]
    ours = trainer(tmp_path, attackers=0)
    assert ours.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap == ["ViTAttention"]


@pytest.mark.parametrize("loader", [{"split_batches": True}, {"dispatch_batches": True}, {"even_batches": False}])
def test_parts_of_a_batch_that_are_not_alike_are_refused(loader):
    args = options_of(world_size=2, accelerator_config=AcceleratorConfig(**loader))
    with pytest.raises(ValueError, match=f"{next(iter(loader))}={next(iter(loader.values()))}"):
        check_processes(args, DistributedType.MULTI_CPU, tiny_vit())
    alone = options_of(accelerator_config=AcceleratorConfig(**loader))
    if "dispatch_batches" in loader:  # it cuts the attackers' images to the size of a batch in one process, too
        with pytest.raises(ValueError, match="dispatch_batches=True"):
            check_processes(alone, DistributedType.NO, tiny_vit())
    else:
        check_processes(alone, DistributedType.NO, tiny_vit())


def test_statistics_that_attackers_would_mix_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(tiny_resnet())
    options = {"world_size": 2, "accelerator_config": AcceleratorConfig()}
    with pytest.raises(ValueError, match="SyncBatchNorm with 4 simulated attackers"):
        check_processes(options_of(**options), DistributedType.MULTI_GPU, model)
    check_processes(options_of(**options, attackers=0), DistributedType.MULTI_GPU, model)


def test_images_of_attackers_are_counted_over_processes_and_micro_batches():
    """4 attackers x 16 images: 8 rows beside each of 8 source rows, and fewer where a step has more source rows."""
    assert _spare_draws(options_of(), 2, ["a"], None) == 32, "an epoch has no more"
    assert _spare_draws(options_of(), 1000, ["a"], None) == 8
    assert _spare_draws(options_of(), 1000, ["a", "b"], None) == 4
    assert _spare_draws(options_of(world_size=2), 1000, ["a"], None) == 4
    assert _spare_draws(options_of(world_size=2, gradient_accumulation_steps=3), 1000, ["a"], None) == 2
    for off in ({"attacker_weight": 0.0}, {"attackers": 0}):
        assert _spare_draws(options_of(**off), 1000, ["a"], None) == 0
