import pytest
import torch

from hf_ntp import NTPConfig


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("sparsity", 1.0, r"sparsity is 1.0; needed: a fraction of zeros in \[0, 1\)"),
        ("sparsity", -0.1, "sparsity is -0.1"),
        ("rho", -1.0, "rho is -1.0; needed: a positive, finite number"),
        ("rho", 0.0, "rho is 0.0"),
        ("l1_weight", -1e-4, "l1_weight is"),
        ("target_weight", -1.0, "target_weight is -1.0"),
        ("fisher_weight", float("nan"), "fisher_weight is nan"),
        ("admm_interval", 0, "admm_interval is 0"),
        ("target_head_steps", 0, "target_head_steps is 0"),
        ("target_loss", "descent", "target_loss is 'descent'; needed: one of 'uniform', 'ascent'"),
        ("fisher", "lda", "fisher is 'lda'"),
        ("fisher_level", "all", "fisher_level is 'all'"),
        ("fisher_shrinkage", 2.0, "fisher_shrinkage is 2.0"),
        ("target_warmup", -0.5, "target_warmup is -0.5"),
        ("target_bound", 0.0, "target_bound is 0.0"),
        ("pruning_end", 0.0, "pruning_begin is 0.0 and pruning_end is 0.0"),
        ("pruning_end", 1.5, "pruning_end is 1.5"),
        ("prune_pattern", "rows", "prune_pattern is 'rows'"),
        ("prune_pattern", "5:4", "0 < N <= M"),
        ("prune_pattern", "1:4", "leaves 0.75 zeros but sparsity is 0.5"),
        ("load_best_model_at_end", True, "load_best_model_at_end is True"),
        ("bf16_full_eval", True, "casts the weights"),
        ("save_only_model", True, "save_only_model is True"),
        ("auto_find_batch_size", True, "auto_find_batch_size is True"),
        ("optim", "schedule_free_adamw", "optim is 'schedule_free_adamw', which puts an average"),
        ("optim", "lomo", "optim is 'lomo', which updates the weights amid"),
        ("optim", "galore_adamw_layerwise", "optim is 'galore_adamw_layerwise'"),
        ("push_to_hub", True, "needed: 'end'"),
        ("rho", float("inf"), "rho is inf"),
        ("fisher_shrinkage", 0.0, "fisher_shrinkage is 0"),
        ("fisher_shrinkage", 1e-6, "fisher_shrinkage is 1e-06; needed: a share of 0.01 or more"),
        ("attackers", -1, "attackers is -1"),
        ("attacker_weight", -1.0, "attacker_weight is -1.0"),
        ("attacker_batch_size", 0, "attacker_batch_size is 0"),
        ("attacker_horizon", [50, 10], r"attacker_horizon is \[50, 10\]"),
        ("attacker_horizon", [1, 2], "attackers who live longer"),
        ("attacker_horizon", [50], "shortest and longest"),
        ("attacker_learning_rates", [], "at least one rate"),
        ("attacker_learning_rates", [1e-3, float("inf")], "positive and finite"),
        ("attacker_patience", -5, "attacker_patience is -5"),
        ("source_tolerance", [float("inf"), 1.0], "two positive, finite numbers"),
        ("prune_pattern", "²:4", "prune_pattern is '²:4'"),
        ("attacker_informed", 1.5, "attacker_informed is 1.5"),
        ("collapse_weight", float("inf"), "collapse_weight is inf"),
        ("source_distillation", -1.0, "source_distillation is -1.0"),
        ("fp16", True, "Use bf16, or attackers=0"),
        ("remove_unused_columns", True, "remove_unused_columns is True"),
    ],
)
def test_bad_options(tmp_path, option, value, message):
    options = {"sparsity": 0.5, option: value}
    with pytest.raises(ValueError, match=message):
        NTPConfig(output_dir=str(tmp_path), report_to="none", **options)


def test_every_option_has_help():
    from hf_ntp.training.arguments import ProtectionArguments

    assert all(field.metadata.get("help") for field in ProtectionArguments.__dataclass_fields__.values())


def test_fingerprint_ignores_where_and_how_often_but_not_what(tmp_path):
    def fingerprint(**options):
        return NTPConfig(output_dir=str(tmp_path), report_to="none", **options).fingerprint()

    assert fingerprint() == fingerprint(logging_steps=7, save_steps=3)
    assert fingerprint() == fingerprint(ddp_timeout=7, eval_accumulation_steps=2, torch_empty_cache_steps=3)
    for option in ({"rho": 1.0}, {"seed": 3}, {"learning_rate": 0.1}, {"max_steps": 5}, {"sparsity": 0.1}):
        assert fingerprint() != fingerprint(**option)


def test_presets(tmp_path):
    options = {"output_dir": str(tmp_path), "report_to": "none"}
    assert NTPConfig.from_preset("adaptive", **options).fingerprint() == NTPConfig(**options).fingerprint()
    paper = NTPConfig.from_preset("paper", sparsity=0.9, **options)
    assert (paper.attackers, paper.target_loss, paper.fisher, paper.sparsity) == (0, "ascent", "trace_ratio", 0.9)
    published = NTPConfig.from_preset("published", **options)
    assert (published.rho, published.target_weight, published.fisher_weight, published.l1_weight) == (
        5e-3,
        1,
        1e3,
        1e-4,
    )
    with pytest.raises(ValueError, match="needed: one of 'adaptive', 'adaptive_convnet', 'paper', 'published'"):
        NTPConfig.from_preset("strong", **options)


def config_of(folder, **options):
    return NTPConfig(output_dir=str(folder), report_to="none", use_cpu=True, **options)


def test_ddp_does_not_wait_for_what_checkpointed_models_do_not_use(tmp_path):
    """DINOv2 has a mask token without a gradient; Trainer looks for such parameters only without checkpointing."""
    assert config_of(tmp_path, gradient_checkpointing=True).ddp_find_unused_parameters is True
    told = config_of(tmp_path, gradient_checkpointing=True, ddp_find_unused_parameters=False)
    assert told.ddp_find_unused_parameters is False
    assert config_of(tmp_path).ddp_find_unused_parameters is None
    reentrant = {"gradient_checkpointing_kwargs": {"use_reentrant": True}, "attackers": 0}
    assert config_of(tmp_path, gradient_checkpointing=True, **reentrant).ddp_find_unused_parameters is False


def test_what_the_launcher_chose_is_known(tmp_path, monkeypatch):
    """`accelerate launch --mixed_precision bf16 --cpu`: Accelerate reads it past TrainingArguments."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    config = NTPConfig(output_dir=str(tmp_path), report_to="none")
    assert config.bf16
    assert config.use_cpu, "without an accelerator Trainer wants to be told"
    assert config.summary()["bf16"]
    assert config.fingerprint() == config_of(tmp_path, bf16=True).fingerprint()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert not NTPConfig(output_dir=str(tmp_path), report_to="none").use_cpu
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert NTPConfig(output_dir=str(tmp_path), report_to="none").use_cpu
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match=r"fp16 is on with 4 simulated attackers.*accelerate launch"):
        config_of(tmp_path)
    assert config_of(tmp_path, attackers=0).fp16
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(ValueError, match="mixed precision is 'fp8'; needed: 'no', 'bf16' or 'fp16'"):
        config_of(tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    config = config_of(tmp_path)
    assert (config.torch_compile, config.torch_compile_backend) == (True, "eager")
    assert config_of(tmp_path, torch_compile_backend="aot_eager").torch_compile_backend == "aot_eager"


def test_the_best_checkpoint_does_not_replace_the_last(tmp_path):
    with pytest.raises(ValueError, match="save_total_limit is 1 and metric_for_best_model is set"):
        config_of(tmp_path, save_total_limit=1, metric_for_best_model="loss")
    with pytest.raises(ValueError, match="save_total_limit is 1 and metric_for_best_model is set"):
        config_of(tmp_path, save_total_limit=1, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="epoch")
    assert config_of(tmp_path, save_total_limit=2, metric_for_best_model="loss").metric_for_best_model == "loss"


def test_another_order_of_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="dataloader_in_order is False; needed: True"):
        config_of(tmp_path, dataloader_in_order=False)
    with pytest.raises(ValueError, match=r"dataloader_persistent_workers is True; needed: False\. A resumed run"):
        config_of(tmp_path, dataloader_persistent_workers=True, dataloader_num_workers=1)
    with pytest.raises(ValueError, match="train_sampling_strategy is 'sequential'; needed: 'random'"):
        config_of(tmp_path, train_sampling_strategy="sequential")
