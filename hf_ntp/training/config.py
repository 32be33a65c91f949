"""`NTPConfig`: everything that determines a protection run."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from numbers import Integral
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments

from .arguments import PRESETS, ProtectionArguments

# What may differ between a run and its continuation without changing the result.
_FREE = {
    "output_dir", "logging_dir", "run_name", "disable_tqdm", "report_to", "project", "trackio_space_id", "log_level",
    "log_level_replica", "logging_steps", "logging_strategy", "logging_first_step", "log_on_each_node", "save_steps",
    "save_strategy", "save_total_limit", "do_eval", "eval_steps", "eval_strategy", "eval_on_start",
    "per_device_eval_batch_size", "resume_from_checkpoint", "push_to_hub", "hub_model_id", "hub_strategy",
    "hub_token", "hub_private_repo", "hub_always_push", "hub_revision", "dataloader_num_workers", "local_rank",
    "logging_nan_inf_filter", "fsdp", "fsdp_config", "use_cpu", "ddp_timeout", "eval_accumulation_steps",
    "eval_delay", "torch_empty_cache_steps", "dataloader_prefetch_factor", "save_on_each_node", "skip_memory_metrics",
}  # fmt: skip


_SHAPES_A_RUN = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "max_steps", "num_train_epochs",
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm", "weight_decay", "optim",
    "adam_beta1", "adam_beta2", "bf16", "fp16", "seed", "adapter", "label_smoothing_factor", "neftune_noise_alpha",
    "lr_scheduler_kwargs", "optim_args", "data_seed",
)  # fmt: skip

# Options of Trainer that would silently undo what a protection run promises.
_REFUSED = {
    "remove_unused_columns": "It would drop the target half of every batch.",
    "load_best_model_at_end": "The checkpoint with the best source accuracy is often one from before the mask was "
    "fixed; only the last weights have the sparsity and the protection.",
    "save_only_model": "Without the optimizer an interrupted run could not end as if it had not been interrupted.",
    "enable_jit_checkpoint": "It saves amid a step and then ends as if training were complete; SIGTERM and Ctrl-C are "
    "answered anyway, by a checkpoint that resumes exactly.",
    "bf16_full_eval": "It casts the weights themselves, and training would go on with them. Use bf16.",
    "fp16_full_eval": "It casts the weights themselves, and training would go on with them. Use bf16.",
    "ignore_data_skip": "A resumed run would take other images than one that was not interrupted.",
    "dataloader_persistent_workers": "A resumed run would draw other numbers than one that was not interrupted.",
    "auto_find_batch_size": "A second attempt would start from weights that the first one changed.",
}


_LAUNCHER = " (Where nobody set it, `accelerate launch` or its configuration did: --mixed_precision.)"


@dataclass
class NTPConfig(ProtectionArguments, TrainingArguments):
    """Configuration of :class:`~hf_ntp.NTPTrainer`: `TrainingArguments` and the options of the method.

    Defaults that differ from `TrainingArguments`: ``learning_rate`` 1e-3 (as published),
    ``remove_unused_columns`` False (batches hold two domains), ``per_device_train_batch_size`` 32 (source images per
    step; as many of every target come on top), ``dataloader_pin_memory`` False, ``logging_nan_inf_filter`` False (it
    waits for the device at every step, and a loss that is not finite ends the run). ``weight_decay`` never acts on
    prunable weights.

    Raises:
        ValueError: If an option, or a combination, makes no sense; see :class:`ProtectionArguments`.
    """

    learning_rate: float = field(default=1e-3, metadata={"help": "Initial learning rate of the optimizer."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Has to stay off: a batch holds source and target images."}
    )
    per_device_train_batch_size: int = field(
        default=32, metadata={"help": "Source images per device and step; every target adds as many."}
    )
    dataloader_pin_memory: bool = field(default=False, metadata={"help": "Pin memory of data loaders."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Of no use here: a loss that is not finite ends the run."}
    )
    adapter: str | None = field(
        default=None,
        metadata={
            "help": "What becomes of a LoRA adapter that the model carries: 'merge' (it is protected with the adapter "
            "in its weights) or 'keep' (the base model is protected, with the adapter beside it as it is)."
        },
    )

    def __post_init__(self) -> None:
        """Check the method's options, then let `TrainingArguments` check its own."""
        ProtectionArguments.__post_init__(self)
        if self.adapter not in (None, "merge", "keep"):
            raise ValueError(f"adapter is {self.adapter!r}; needed: 'merge' or 'keep', for a model that carries one.")
        for option, why in _REFUSED.items():
            if getattr(self, option, False):
                raise ValueError(f"{option} is True; needed: False. {why}")
        if self.push_to_hub and self.hub_strategy != "end":
            raise ValueError(
                f"push_to_hub is on with hub_strategy={str(self.hub_strategy)!r}; needed: 'end'. Any other strategy "
                "puts checkpoints of the encoder that is not protected yet into the history of the repository."
            )
        if self.push_to_hub and self.target_access == "none":
            raise ValueError(
                "push_to_hub is on and target_access is 'none': nothing says what the record is to call unauthorized. "
                "Needed: False. Call push_to_hub(targets=[DomainReference(...)]) when training is over."
            )
        if not self.dataloader_in_order:
            raise ValueError(
                "dataloader_in_order is False; needed: True. The order of batches would hang on which worker is "
                "faster, and no run could be repeated or resumed."
            )
        if self.train_sampling_strategy != "random":
            raise ValueError(
                f"train_sampling_strategy is {self.train_sampling_strategy!r}; needed: 'random'. Images of several "
                "domains are paired in an order of their own, and which ones an attacker gets depends on it."
            )
        if not isinstance(self.max_steps, Integral) or self.max_steps == 0:
            raise ValueError(f"max_steps is {self.max_steps}; needed: a positive integer, or -1 for num_train_epochs.")
        self.max_steps = int(self.max_steps)
        for option in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            if getattr(self, option) < 1:
                raise ValueError(f"{option} is {getattr(self, option)}; needed: at least 1.")
        self._take_from_launcher()
        TrainingArguments.__post_init__(self)
        if self.metric_for_best_model is not None and self.save_total_limit == 1:
            raise ValueError(
                "save_total_limit is 1 and metric_for_best_model is set: Trainer would end with the best checkpoint "
                "alone, often one from before the mask was fixed; needed: a limit of 2 or more, which keeps the last."
            )
        if self.mixed_precision not in ("no", "bf16", "fp16"):
            raise ValueError(
                f"accelerate's mixed precision is {self.mixed_precision!r}; needed: 'no', 'bf16' or 'fp16'. Launch "
                "with --mixed_precision, or run `accelerate config`."
            )
        if self.fp16 and not (self.max_grad_norm or 0) > 0:
            raise ValueError(
                f"fp16 is on and max_grad_norm is {self.max_grad_norm}: gradients are still scaled when the ADMM "
                f"penalty is added. Use bf16, or a positive max_grad_norm.{_LAUNCHER}"
            )
        if self.fp16 and self.simulated_attackers:
            raise ValueError(
                f"fp16 is on with {self.attackers} simulated attackers, whose gradients would underflow without a "
                f"loss scale of their own. Use bf16, or attackers=0.{_LAUNCHER}"
            )
        checkpointing: Any = self.gradient_checkpointing_kwargs or {}
        if self.gradient_checkpointing and self.ddp_find_unused_parameters is None:
            # Off in Trainer with checkpointing: DDP would wait for parameters that a model does not use (DINOv2).
            self.ddp_find_unused_parameters = not checkpointing.get("use_reentrant", False)
        if self.simulated_attackers and checkpointing.get("use_reentrant"):
            raise ValueError(
                f"gradient_checkpointing_kwargs has use_reentrant=True with {self.attackers} simulated attackers, "
                "whose gradients PyTorch cannot compute that way; needed: False, the default, or attackers=0."
            )
        optimizer = str(getattr(self.optim, "value", self.optim))
        if optimizer.startswith("schedule_free"):
            raise ValueError(
                f"optim is {optimizer!r}, which puts an average in the place of the weights wherever they are looked "
                "at: pruned weights would not be zero any more; needed: another, such as 'adamw_torch'."
            )
        if optimizer in ("lomo", "adalomo") or optimizer.endswith("layerwise"):
            raise ValueError(
                f"optim is {optimizer!r}, which updates the weights amid the backward pass, before the ADMM penalty "
                "is added to the gradient; needed: another, such as 'adamw_torch'."
            )
        if self.hub_private_repo is None:
            # Trainer creates the repository when training starts; who wants the world to see it says so.
            self.hub_private_repo = True

    def _take_from_launcher(self) -> None:
        """Take over what ``accelerate launch`` or its configuration file chose, so that checks and record know it.

        Accelerate reads it from the environment, past `TrainingArguments`.
        """
        self.use_cpu |= parse_flag_from_env("ACCELERATE_USE_CPU")
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if precision in ("bf16", "fp16") and not (self.bf16 or self.fp16):
            setattr(self, precision, True)
            # Asked for in TrainingArguments, it would need this said, too.
            self.use_cpu |= not torch.accelerator.is_available()
        backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
        if backend != "no" and not (self.torch_compile or self.torch_compile_backend or self.torch_compile_mode):
            self.torch_compile, self.torch_compile_backend = True, backend

    @classmethod
    def from_preset(cls, name: str, **options: Any) -> NTPConfig:
        """Configuration of a preset of :data:`~hf_ntp.training.arguments.PRESETS`, with ``options`` on top.

        Raises:
            ValueError: For another name, or options that make no sense.
        """
        if name not in PRESETS:
            raise ValueError(f"preset is {name!r}; needed: one of {', '.join(map(repr, PRESETS))}.")
        return cls(**{**PRESETS[name], **options})

    def fingerprint(self) -> dict[str, Any]:
        """JSON-ready options that determine the result; a checkpoint resumes only under the same ones."""
        everything = self.to_dict()
        return {f.name: everything[f.name] for f in fields(self) if f.name in everything and f.name not in _FREE}

    def summary(self) -> dict[str, Any]:
        """JSON-ready options for the authorization record: the method's, and what of Trainer's shapes a run."""
        names = [f.name for f in fields(ProtectionArguments)]
        everything = self.to_dict()
        return {name: everything[name] for name in (*names, *_SHAPES_A_RUN)}
