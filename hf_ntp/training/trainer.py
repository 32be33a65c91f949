"""`NTPTrainer`: protects an encoder while Trainer does the training."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, Sampler
from transformers import (
    AutoModelForImageClassification,
    BaseImageProcessor,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
)
from transformers.trainer_utils import rotate_checkpoints

from ..data import PixelDataset, check_labels, check_target
from ..models import (
    FeatureTap,
    find_head,
    frozen_batch_norm_statistics,
    has_batch_norm,
    prunable_weights,
    stage_features,
    zero_fraction,
)
from .callback import PruningCallback
from .checkpoint import load_state, load_weights_strictly, save_state
from .config import NTPConfig
from .objective import TargetBatch, target_terms
from .paired_data import PairedDataset, PairedSampler, Transform, collate, labels_of
from .pruning import ADMMPruner
from .target_head import TargetHead

ImageData: TypeAlias = datasets.Dataset | Dataset


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of images whose highest logit is the label: the default metric of :class:`NTPTrainer`."""
    return {"accuracy": float((np.argmax(prediction.predictions, axis=-1) == prediction.label_ids).mean())}


class NTPTrainer(Trainer):
    """Trains a vision encoder to stay accurate on authorized data and useless as a start for unauthorized data.

    Non-Transferable Pruning (ECCV 2024): ADMM pruning, a non-transferable loss against a simulated attacker's head,
    and Fisher-space regularization. Loop, optimizer, precision, accumulation, logging and checkpoints are Trainer's.
    Extra memory: one tensor per prunable weight and one linear head per unauthorized domain.

    Args:
        model: Model with an image-classification head, or the id or folder of one.
        args: Configuration.
        train_dataset: Authorized (source) data: a `datasets.Dataset` with images and labels, or any map-style dataset
            of "pixel_values" and "labels".
        target_dataset: Unauthorized (target) data, one dataset or several by domain name. Its label set is its own.
        eval_dataset: Authorized data for evaluation, as Trainer takes it.
        processing_class: Image processor (PIL backend); needed where a dataset holds images.
        compute_metrics: As in Trainer; accuracy by default.
        callbacks: As in Trainer.
        source_transform: Augmentation of authorized training batches: takes pixel values [N, 3, H, W] and a numpy
            Generator, its only source of randomness, and returns the same shape.
        optimizers: As in Trainer.

    Raises:
        ValueError: For data or options that cannot work, before any training starts.
    """

    args: NTPConfig
    model: PreTrainedModel
    train_dataset: PairedDataset
    pruner: ADMMPruner

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: NTPConfig,
        train_dataset: ImageData,
        target_dataset: ImageData | Mapping[str, ImageData],
        eval_dataset: ImageData | dict[str, ImageData] | None = None,
        processing_class: BaseImageProcessor | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = accuracy,
        callbacks: list[TrainerCallback] | None = None,
        source_transform: Transform | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
    ) -> None:
        network: PreTrainedModel = (
            AutoModelForImageClassification.from_pretrained(model) if isinstance(model, str) else model
        )
        head_name, head = find_head(network, args.head_name)
        targets = target_dataset if isinstance(target_dataset, Mapping) else {"target": target_dataset}
        paired = PairedDataset(
            as_pixels(train_dataset, processing_class, "train_dataset"),
            {name: as_pixels(data, processing_class, f"target {name!r}") for name, data in targets.items()},
            source_transform,
            seed=args.data_seed or args.seed,
        )
        check_labels(labels_of(paired.source), head.out_features, "train_dataset")
        self.target_labels = {name: labels_of(data) for name, data in paired.targets.items()}
        for labels in self.target_labels.values():
            check_target(labels)
        self.paired_sampler = PairedSampler(
            len(paired), [len(labels) for labels in self.target_labels.values()], paired.seed
        )
        super().__init__(
            model=network,
            args=args,
            data_collator=collate,
            train_dataset=paired,
            eval_dataset=_evaluation_data(eval_dataset, processing_class),
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # Our losses are plain means over a batch: Trainer divides by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = False
        self.prunable = prunable_weights(network, args.prune_include, args.prune_exclude, head_name)
        self.heads = {
            name: TargetHead(head.in_features, int(labels.max()) + 1, args.target_head_learning_rate, args.seed)
            for name, labels in self.target_labels.items()
        }
        self._tap = FeatureTap(head)
        self._batch_norm = has_batch_norm(network)
        self._residuals: dict[str, Tensor] = {}
        self._terms: dict[str, Tensor] = {}
        self._term_count = 0
        self._staging = False
        self.add_callback(PruningCallback(self))

    # Objective

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Objective on a paired batch; on an ordinary (evaluation) batch, Trainer's own loss."""
        if "targets" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        logits, targets = self._forward(model, inputs)
        source_loss = F.cross_entropy(logits, inputs["labels"], label_smoothing=self.args.label_smoothing_factor)
        target_loss, terms = target_terms(targets, self.heads, self.args)
        self._record({"source_loss": source_loss.detach(), **terms})
        loss = source_loss + self._target_strength() * target_loss
        return (loss, {"logits": logits}) if return_outputs else loss

    def _forward(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, TargetBatch]]:
        """Return source logits and target features: one pass, or one per domain where BatchNorm would mix them."""
        source, targets = inputs["pixel_values"], inputs["targets"]
        labels = {name: target["labels"] for name, target in targets.items()}
        if self._batch_norm:
            logits, _ = self._encode(model, source)
            with frozen_batch_norm_statistics(self.model):
                levels = [self._encode(model, target["pixel_values"])[1] for target in targets.values()]
        else:
            images = [source, *(target["pixel_values"] for target in targets.values())]
            logits, together = self._encode(model, torch.cat(images))
            split = [level.split([len(part) for part in images]) for level in together]
            logits, (_, *levels) = logits[: len(source)], list(zip(*split, strict=True))
        return logits, {
            name: TargetBatch(features, tuple(stages), labels[name])
            for name, (features, *stages) in zip(labels, levels, strict=True)
        }

    def _encode(self, model: nn.Module, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return logits and the features of every level that the objective looks at, pooled ones first."""
        stages = self.args.fisher_level == "stages"
        outputs = model(pixel_values=images, output_hidden_states=stages)
        return outputs.logits, (self._tap.take(), *(stage_features(outputs.hidden_states) if stages else ()))

    def _target_strength(self) -> float:
        """Share of their weight that the target terms have at this step, rising linearly to 1."""
        warmup = self.args.target_warmup * self.state.max_steps
        return min(1.0, (self.state.global_step + 1) / warmup) if warmup > 1 else 1.0

    # Pruning: called by PruningCallback

    def advance_pruning(self, step: int, max_steps: int) -> None:
        """Do what is due after optimizer step ``step``: nothing, a Z-step, the hard prune, or the mask."""
        if self.pruner.finished:
            self.pruner.enforce_mask()
            return
        begin, end = self.args.pruning_begin * max_steps, self.args.pruning_end * max_steps
        if step >= end:
            self.pruner.finish()
        elif step > begin and step % self.args.admm_interval == 0:
            primal, dual = self.pruner.update((step - begin) / (end - begin))
            self._residuals = {"primal_residual": primal, "dual_residual": dual}

    def complete_pruning(self) -> None:
        """Prune to the requested sparsity if training stopped before it was reached, and note it in the config."""
        if not self.pruner.finished:
            self.pruner.finish()
        self.model.config.ntp = {
            "method": "non-transferable-pruning",
            "sparsity": zero_fraction(list(self.prunable.values())),
            "requested_sparsity": self.args.sparsity,
            "prune_include": self.args.prune_include,
            "prune_exclude": self.args.prune_exclude,
        }

    # Trainer hooks

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as Trainer does; pruning starts anew from the present weights, or from the checkpoint's state."""
        for head in self.heads.values():
            head.to(self.args.device)
        self.pruner = ADMMPruner(
            self.prunable, self.args.sparsity, self.args.prune_pattern, self.args.rho, self.args.l1_weight
        )
        self._residuals = {}
        return super().train(*args, **kwargs)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Trainer's choice less the prunable weights: the ADMM penalty is their only shrinkage."""
        return [name for name in super().get_decay_parameter_names(model) if name not in self.prunable]

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        return self.paired_sampler

    def _record(self, terms: dict[str, Tensor]) -> None:
        for name, value in terms.items():
            self._terms[name] = self._terms.get(name, torch.zeros_like(value)) + value
        self._term_count += 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add every loss term (mean since the last log), the residuals and the sparsity to the training log."""
        if "loss" in logs and self._term_count:
            means = torch.stack(list(self._terms.values())) / self._term_count
            means = self.accelerator.reduce(means, reduction="mean")
            logs |= dict(zip(self._terms, means.tolist(), strict=True))
            logs |= {name: float(value) for name, value in self._residuals.items()}
            logs["sparsity"] = self.pruner.sparsity
            self._terms, self._term_count = {}, 0
        super().log(logs, start_time)

    # Checkpoints

    def settings(self) -> dict[str, Any]:
        """What a checkpoint must agree on: configuration and data."""
        data = {"source": self.train_dataset.source, **self.train_dataset.targets}
        prints = {name: getattr(part, "fingerprint", f"{len(labels_of(part))} rows") for name, part in data.items()}
        return {**self.args.fingerprint(), "world_size": self.args.world_size, "data": prints}

    def _get_output_dir(self, trial: Any) -> str:
        output_dir = super()._get_output_dir(trial)
        return os.path.join(output_dir, "unfinished-checkpoint") if self._staging else output_dir

    @contextmanager
    def _staged(self) -> Iterator[None]:
        self._staging = True
        try:
            yield
        finally:
            self._staging = False

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint under another name and rename it: a folder called checkpoint-N is always whole."""
        name = f"checkpoint-{self.state.global_step}"
        with self._staged():
            super()._save_checkpoint(model, trial)
            staged = Path(self._get_output_dir(trial)) / name
        final = Path(self._get_output_dir(trial)) / name
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if self.state.best_model_checkpoint == str(staged):
                self.state.best_model_checkpoint = str(final)
                self.state.save_to_json(str(staged / "trainer_state.json"))
            save_state(staged, self.pruner, self.heads, self.settings())
            staged.replace(final)
            staged.parent.rmdir()
            rotate_checkpoints(
                output_dir=str(final.parent),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_weights_strictly(self.model, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_state(Path(checkpoint), self.pruner, self.heads, self.settings())


def as_pixels(data: ImageData, image_processor: BaseImageProcessor | None, name: str) -> Dataset:
    """Return a dataset of "pixel_values" and "labels": images are pre-processed once, other datasets kept.

    Raises:
        ValueError: If images come without a processor.
    """
    if not isinstance(data, datasets.Dataset):
        return data
    if image_processor is None:
        raise ValueError(
            f"{name} holds images but processing_class is None; needed: the model's image processor. Pass "
            "processing_class=AutoImageProcessor.from_pretrained(..., backend='pil')."
        )
    return PixelDataset.from_dataset(data, image_processor)


def _evaluation_data(data: Any, image_processor: BaseImageProcessor | None) -> Any:
    if isinstance(data, dict):
        return {name: as_pixels(part, image_processor, f"eval {name!r}") for name, part in data.items()}
    return None if data is None else as_pixels(data, image_processor, "eval_dataset")
