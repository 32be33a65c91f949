"""`NTPTrainer`: protects an encoder while Trainer does the training."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import (
    BaseImageProcessor,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerState,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints

from ..data import fingerprint_of, has_labels
from ..interruption import KeptSignals, deaf_worker
from ..models import (
    batch_norms,
    blocks_of,
    check_precision,
    class_names,
    find_head,
    frozen,
    has_head,
    hub_id,
    interleaved,
    load_model,
    parts_of,
    plain_model,
    recorded_features,
    scale_free_weights,
    separate_batch_norms,
    stage_tokens,
    with_head,
    without_randomness,
    zero_fraction,
)
from ..models.adapters import with_adapter  # not of the package: only who needs it waits for peft
from ..models.sharding import whole
from ..run_folder import only_writer, remove, whole_model, writing
from .attackers import AttackerPool, slot_domains
from .callback import PruningCallback
from .checkpoint import RunState, check_settings, last_checkpoint, load_state, load_weights_strictly, save_state
from .checks import check_apart, check_call, check_fit, check_pairs, check_sizes, frozen_weights, matches_features
from .config import NTPConfig
from .distributed import check_processes, choose_units
from .domains import (
    Joined,
    check_domain_names,
    check_evaluated,
    check_task,
    classifies,
    held_out,
    shares_of,
    source_domain,
    target_domains,
)
from .guard import FeatureGuard, Guard, ReconstructionGuard, SourceGuard
from .objective import TargetBatch, target_terms
from .paired_data import (
    ImageData,
    PairedDataset,
    PairedSampler,
    Transform,
    as_pixels,
    collate,
    count_classes,
    evaluation_data,
    labels_of,
    length_of,
)
from .pruning import ADMMPruner, chosen_weights
from .pseudo_labels import with_clusters
from .target_head import TargetHead
from .terms import Reading, Terms, not_finite

logger = logging.getLogger(__name__)

# Z-steps without which the weights have not been led to zero when the mask is fixed.
_FEW_Z_STEPS = 3
# Shorter is no length: what has none cannot be given one by a factor.
_NO_LENGTH = 1e-12

# Trainer's upload leaves names with a leading underscore alone.
_STAGING = "_unfinished"


def _spare_draws(args: NTPConfig, rows: int, domains: Sequence[str], shares: Sequence[float] | None) -> int:
    """Target rows beside each of so many source rows: the attackers', ``attacker_batch_size`` or more for each."""
    slots = slot_domains(domains, args.simulated_attackers, shares)[: args.simulated_attackers]
    images = max((slots.count(name) for name in slots), default=0) * args.attacker_batch_size
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return math.ceil(images / min(step, rows))


def _source_parts(source: Dataset, weights: Mapping[str, float] | str | None) -> list[tuple[int, float]]:
    """Size and share of every authorized domain, where the user wants other shares than those of their images."""
    if weights is None:
        return []
    parts = source.parts if isinstance(source, Joined) else {"train_dataset": source}
    shares = shares_of(weights, list(parts), "source_weights")
    return [(length_of(part), share) for part, share in zip(parts.values(), shares or [], strict=True)]


def _digest(weights: Iterable[Tensor]) -> str:
    """SHA-256 (hex) of weights."""
    digest = hashlib.sha256()
    for parameter in weights:
        digest.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _count_blocks(network: PreTrainedModel) -> int:
    """Blocks of an encoder, 0 where that is not known."""
    with suppress(ValueError):
        return len(blocks_of(network))
    return 0


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of images whose highest logit is the label: the default metric of :class:`NTPTrainer`."""
    outputs, labels = prediction.predictions, prediction.label_ids
    if isinstance(outputs, list):  # batches that were to stay apart
        right = [accuracy(EvalPrediction(*batch))["accuracy"] for batch in zip(outputs, labels, strict=True)]
        return {"accuracy": float(np.average(right, weights=[len(batch) for batch in labels]))}
    logits = outputs[0] if isinstance(outputs, tuple) else outputs  # hidden states may come with them
    return {"accuracy": float((np.argmax(logits, axis=-1) == labels).mean())}


class NTPTrainer(Trainer):
    """Trains a vision encoder to stay accurate on authorized data and useless as a start for unauthorized data.

    Non-Transferable Pruning (ECCV 2024): ADMM pruning, a non-transferable loss against a simulated attacker's head,
    and Fisher-space regularization, each of them optional, and simulated attackers, for whose sake the defaults switch
    the second off. Loop, optimizer, precision, accumulation, logging and checkpoints are Trainer's. Extra memory: one
    tensor per prunable weight, one linear head per unauthorized domain, by default a frozen copy of the original, and
    what :class:`~hf_ntp.training.attackers.AttackerPool` says for the attackers.

    Args:
        model: Model with an image-classification head, or an encoder without one, or the id or folder of either. An
            encoder keeps the original's pooled features on authorized images instead of its predictions; the trainer's
            ``model`` is then an :class:`~hf_ntp.models.EncoderWithHead` around it, which saves as the plain encoder. A
            ``peft.PeftModel`` with a LoRA adapter needs ``NTPConfig.adapter``. "merge" uses it up. With "keep" it goes
            on working, adapter unchanged, around weights that are protected in place while source loss, target terms
            and attackers have the adapter in the forward pass (frozen, without its dropout; attackers tune the base
            weights); the trainer's ``model`` is then the base model, which saves without the adapter.
        args: Configuration.
        train_dataset: Authorized (source) data: a `datasets.Dataset` with images and labels, or any map-style dataset
            of rows (dicts) of "pixel_values" and "labels". Labels are not needed where features are kept
            (``source_loss``). Several domains come by name; they share the head, so that their classes are the same.
        target_dataset: Unauthorized (target) data, one dataset or several by domain name. Its label set is its own.
            Labels are not looked at with ``target_access="unlabelled"``; None with ``target_access="none"``.
        eval_dataset: Authorized data for evaluation, as Trainer takes it; without a head, the loss is the distance of
            the features from the original's. With a head, ``source_tolerance`` is judged on it: pass images that the
            original was not trained on, and not those of the test. Of several by name, those count that are named
            like an authorized domain (of a dict ``train_dataset``); without any, or with a stream, training images
            have to do.
        processing_class: Image processor (PIL backend); needed where a dataset holds images.
        compute_metrics: As in Trainer (which has other arguments that are left out here, such as ``data_collator``:
            batches are made by the trainer itself); accuracy by default, and nothing without a head of classes.
        callbacks: As in Trainer.
        source_transform: Augmentation of authorized training batches: takes pixel values [N, 3, H, W] and a numpy
            Generator, its only source of randomness, and returns the same shape.
        optimizers: As in Trainer; none under FSDP.

    Raises:
        TypeError: If ``args`` is no NTPConfig, or ``model`` no model of transformers or PEFT.
        ValueError: For data or options that cannot work, before any training starts.
    """

    args: NTPConfig
    model: PreTrainedModel
    train_dataset: PairedDataset
    pruner: ADMMPruner

    def __init__(
        self,
        model: PreTrainedModel | PeftModel | str,
        args: NTPConfig,
        train_dataset: ImageData | Mapping[str, ImageData],
        target_dataset: ImageData | Mapping[str, ImageData] | None = None,
        eval_dataset: ImageData | dict[str, ImageData] | None = None,
        processing_class: BaseImageProcessor | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = accuracy,
        callbacks: list[TrainerCallback] | None = None,
        source_transform: Transform | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
    ) -> None:
        if not isinstance(args, NTPConfig):
            raise TypeError(
                f"args is {type(args).__name__}; needed: NTPConfig, which has the options of TrainingArguments and "
                "those of the method. Build NTPConfig(output_dir=..., ...) with the same options."
            )
        check_domain_names(train_dataset, target_dataset)
        network = load_model(model, args.head_name, args.encoder_name) if isinstance(model, str) else model
        if not isinstance(network, (PreTrainedModel, PeftModel)):
            raise TypeError(
                f"the model is {type(network).__name__}; needed: a transformers model, or a PeftModel of one."
            )
        network, kept_adapter = with_adapter(network, args.adapter, args.device)
        check_precision(network)
        network = with_head(network, args.head_name, args.encoder_name)
        self._headless = not has_head(network, args.head_name)
        self._matches_features = matches_features(network, args)
        head_name, head = find_head(network, args.head_name)
        self._has_classes = not self._headless and classifies(network, head)
        if args.batch_eval_metrics and self._has_classes and compute_metrics is accuracy:
            raise ValueError(
                "batch_eval_metrics is on and compute_metrics is the default, which wants all predictions together; "
                "needed: one of your own that takes compute_result. Pass it, or set batch_eval_metrics=False."
            )
        if not self._matches_features:
            check_task(network, head)
        num_classes = None if self._matches_features else head.out_features
        source = source_domain(train_dataset, processing_class, num_classes, class_names(network.config))
        seed = args.seed if args.data_seed is None else args.data_seed
        targets = target_domains(
            target_dataset,
            source,
            args.target_access,
            as_labelled=partial(
                with_clusters,
                model=network,
                head=head,
                num_clusters=args.pseudo_classes,
                seed=args.seed,
                device=args.device,
            ),
            image_processor=processing_class,
            source_classes=not self._matches_features,
            seed=seed,
        )
        compared = any((args.target_weight, args.fisher_weight, args.collapse_weight))
        paired = PairedDataset(source, targets, source_transform, seed, compared)
        self.target_labels = {name: labels_of(data, f"target {name!r}") for name, data in paired.targets.items()}
        self.target_classes = {n: count_classes(data, self.target_labels[n]) for n, data in paired.targets.items()}
        check_sizes(source, targets)
        evaluated = evaluation_data(eval_dataset, processing_class, labelled=not self._headless)
        self._names = class_names(network.config) or getattr(source, "class_names", None)
        if self._has_classes:
            parts = evaluated if isinstance(evaluated, dict) else {"eval_dataset": evaluated}
            for name, part in parts.items():
                check_evaluated(part, name, head.out_features, self._names)
        judged = not self._matches_features and args.source_tolerance
        check_apart(source, targets, evaluated if judged else None)
        check_call(network, source)
        check_fit(network, args, len(paired), len(targets))
        if args.fisher_weight:
            check_pairs(self.target_labels, args.per_device_train_batch_size * args.world_size)
        shares = shares_of(args.target_weights, list(targets), "target_weights")
        self._target_shares = shares or [1 / len(targets)] * len(targets)
        self.prunable = chosen_weights(network, args, head_name)
        self._frozen = frozen_weights(network, head_name)
        # Asked now: a folder may have moved when the record is written.
        self.base_model = hub_id(getattr(plain_model(network).config, "_name_or_path", None))
        self.paired_sampler = PairedSampler(
            len(paired),
            [len(labels) for labels in self.target_labels.values()],
            paired.seed,
            1 + _spare_draws(args, len(paired), list(targets), shares),
            _source_parts(source, args.source_weights),
        )
        super().__init__(
            model=network,
            args=args,
            data_collator=collate,
            train_dataset=paired,
            eval_dataset=evaluated,
            processing_class=processing_class,
            compute_metrics=compute_metrics if self._has_classes or compute_metrics is not accuracy else None,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # Our losses are plain means over a batch: Trainer divides by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        if self._headless:
            self.can_return_loss = True  # without labels
        self.loss_is_scaled_for_ga = False
        fsdp = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        check_processes(args, self.accelerator.distributed_type, network, fsdp)
        if fsdp is not None:
            choose_units(network, fsdp)
            if optimizers[0] is not None:
                raise ValueError(
                    "FSDP would shard a copy of the model, and the optimizer that is given holds the model's own "
                    "weights; needed: none. Choose one with NTPConfig(optim=...)."
                )
        self.heads = {
            name: TargetHead(head.in_features, classes, args.target_head_learning_rate, args.seed)
            for name, classes in self.target_classes.items()
        }
        self._head_name, self._head = head_name, head
        self._pool: AttackerPool | None = None
        # All three are of the model before protection, also where training resumes.
        self._guard: Guard
        if self._matches_features:
            kind = ReconstructionGuard if args.source_loss == "reconstruction" else FeatureGuard
            self._guard = kind(self.model, args, source, self.accelerator.autocast)
        else:
            names = list(train_dataset) if isinstance(train_dataset, Mapping) else []
            others = (
                held_out(self.eval_dataset, names, head.out_features, self._names) if args.source_tolerance else None
            )
            self._guard = SourceGuard(self.model, args, source, others, self.accelerator.autocast)
        self._lengths = [(weight, weight.detach().norm()) for weight in scale_free_weights(self.model).values()]
        # What has no part in the features of an encoder may be missing in its checkpoint, and random.
        weights = (p for p in self.model.parameters() if p.requires_grad or not self._headless)
        self._original_weights = _digest((*weights, *kept_adapter))
        self._attacked: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._batch_norms, self._blocks = batch_norms(network), _count_blocks(network)
        self._pruning_log: dict[str, Tensor] = {}
        self._terms = self._new_terms()
        self._signals = KeptSignals()
        self._until_backward = ExitStack()
        self._leaving = self._ended = self._staging = self._in_shards = False
        # Before those of the user, who may save the model when training ends.
        self.callback_handler.callbacks.insert(0, PruningCallback(self))

    # Objective

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Objective on a paired batch; on an ordinary (evaluation) batch, Trainer's own loss or that of features."""
        if "targets" not in inputs:
            if self._headless:
                return self._feature_loss(model, inputs["pixel_values"], return_outputs)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._matches_features:  # the original, whose features are compared with, draws nothing either
            self._until_backward.enter_context(without_randomness(self.model))
        logits, features, tokens, targets = self._forward(model, inputs)
        loss, terms = self._guard.terms(self.model, inputs, logits, features, self.state.global_step)
        strength = self._strength()
        if targets or self._pool is not None:
            terms["target_strength"] = strength
        if targets:
            target_loss, of_targets = target_terms(targets, tokens, self.heads, self.args, self._target_shares)
            terms |= of_targets
            loss = loss + strength * target_loss
        self._terms.add({"loss": loss, **terms})
        return (loss, {"logits": logits}) if return_outputs else loss

    def _feature_loss(self, model: nn.Module, images: Tensor, return_outputs: bool) -> Tensor | tuple[Tensor, Any]:
        """Distance of the features of an evaluation batch from the original's; the features are the output."""
        assert isinstance(self._guard, FeatureGuard)
        with recorded_features(self._head) as features:
            model(pixel_values=images)
        distance = self._guard.distance(images, features[-1])
        loss = distance.sum()
        return (loss, {"features": features[-1]}) if return_outputs else loss

    def _forward(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...], dict[str, TargetBatch]]:
        """Return logits, features and tokens of the source, and the target part, in one pass."""
        source, targets = inputs["pixel_values"], inputs["targets"]
        labels = {name: target["labels"] for name, target in targets.items()}
        images = [source, *(target["pixel_values"] for target in targets.values())]
        with separate_batch_norms(self._batch_norms, len(source), len(images)):
            logits, together = self._encode(model, interleaved(images))
        split = [parts_of(level, len(images)) for level in together]
        logits, ((kept, *tokens), *levels) = parts_of(logits, len(images))[0], list(zip(*split, strict=True))
        targets = zip(labels, levels, strict=True)
        return (
            logits,
            kept,
            tuple(tokens),
            {name: TargetBatch(features, tuple(rest), labels[name]) for name, (features, *rest) in targets},
        )

    def _encode(self, model: nn.Module, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return logits, and pooled features followed by the tokens of every block where a term looks at them."""
        stages = self.args.fisher_weight > 0 and self.args.fisher_level == "stages"
        inside = stages or self.args.collapse_weight > 0
        with recorded_features(self._head) as features:
            outputs = model(pixel_values=images, output_hidden_states=inside)
        return outputs.logits, (features[-1], *(stage_tokens(outputs.hidden_states, self._blocks) if inside else ()))

    def _strength(self) -> Tensor:
        """Share of its weight that everything aimed at the target has at this step: warm-up times guard."""
        steps = self.args.target_warmup * self.state.max_steps
        warmup = min(1.0, (self.state.global_step + 1) / steps) if steps > 1 else 1.0
        return warmup * self._guard.share(self.state.global_step / self.state.max_steps)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Trainer's step; then, once per optimizer step, the simulated attackers act on its images."""
        with self._until_backward:  # where blocks are checkpointed, backward computes them again
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self._pool is None:
            return loss
        images: dict[str, Any] = self._prepare_inputs(inputs["attacked"])
        for name, target in images.items():
            self._attacked.setdefault(name, []).append((target["pixel_values"], target["labels"]))
        if self.accelerator.sync_gradients:
            attacked, self._attacked = self._attacked, {}
            steps = self._pool.step(attacked, self.pruner.masks, self.accelerator.autocast)
            for step in steps:
                self._terms.add({"attacker_loss": step.loss})
                if step.last:
                    self._terms.add({"attacker_last_loss": step.loss})
        return loss

    # Pruning: called by PruningCallback

    def begin_pruning(self, max_steps: int) -> None:
        """Take up the weights as they are now; say so if the run is too short for its pruning to be gradual."""
        inner = getattr(self.optimizer, "optimizer", self.optimizer)  # of Accelerate's, which has all methods
        if callable(getattr(inner, "eval", None)):
            raise ValueError(
                f"the optimizer is {type(inner).__name__}, which puts other weights in the place of the trained ones "
                "for evaluation: pruned weights would not be zero any more; needed: another, such as AdamW of torch."
            )
        if self.is_fsdp_enabled:  # Accelerate has put shards in the place of the parameters
            self._find_parts()
            self.pruner.move_to(self.prunable)
        due = sum(self._is_due(step, max_steps) for step in range(1, max_steps + 1))
        if due < _FEW_Z_STEPS and self.args.sparsity:
            logger.warning(
                "%d of %d steps are Z-steps (admm_interval %d, from %g to %g of the run): pruning to %s zeros will be "
                "nearly in one go, which costs accuracy. Train longer, or lower admm_interval.",
                due,
                max_steps,
                self.args.admm_interval,
                self.args.pruning_begin,
                self.args.pruning_end,
                self.args.sparsity,
            )

    def _find_parts(self) -> None:
        """Find what is pruned and looked at in a model that, or whose parameters, has been replaced."""
        self._head = find_head(self.model, self._head_name)[1]
        self._batch_norms = batch_norms(self.model)
        self.prunable = chosen_weights(self.model, self.args, self._head_name)

    @contextmanager
    def _sharding(self) -> Iterator[None]:
        """Under FSDP, let a copy of the model be sharded and trained; the model itself gets the weights at the end."""
        if not self.is_fsdp_enabled:
            yield
            return
        model = self.model
        self.model = self.model_wrapped = copy.deepcopy(model)
        self._in_shards = True
        try:
            yield
            with torch.no_grad():
                into = model.state_dict()
                for name, tensor in self.model.state_dict().items():
                    into[name].copy_(whole(tensor))
            model.config.ntp = self.model.config.ntp
        finally:
            # The next training, or evaluation, begins with the whole model again.
            self.accelerator.free_memory()
            self.model = self.model_wrapped = self.callback_handler.model = model
            self.optimizer = self.lr_scheduler = None
            self._in_shards = self.is_in_train = False
            self._find_parts()
        # Not where training broke off: ranks do not wait for each other any more.
        nn.Module.to(model, self.args.device)
        self.pruner.move_to(self.prunable)

    def _is_due(self, step: int, max_steps: int) -> bool:
        """Whether a Z-step follows optimizer step ``step``."""
        within = self.args.pruning_begin * max_steps < step < self.args.pruning_end * max_steps
        return within and step % self.args.admm_interval == 0

    def add_penalty(self, step: int, max_steps: int) -> None:
        """Add the ADMM penalty's gradient for optimizer step ``step``, once pruning has begun."""
        begin = self.args.pruning_begin * max_steps
        if step <= begin:
            return
        if step - 1 <= begin:
            self.pruner.begin()
        self.pruner.add_penalty_gradient()

    def advance_pruning(self, step: int, max_steps: int) -> None:
        """Do what is due after optimizer step ``step``: nothing, a Z-step, the hard prune, or the mask."""
        if self._pool is not None:
            self._pool.push_back(self.args.attacker_weight * self._encoder_rate() * self._strength())
        begin, end = self.args.pruning_begin * max_steps, self.args.pruning_end * max_steps
        if self.pruner.finished:
            self.pruner.enforce_mask()
        elif step >= end:
            self._finish_pruning()
        elif self._is_due(step, max_steps):
            self._pruning_log = self.pruner.update((step - begin) / (end - begin))._asdict()
        if self._pool is not None:
            self._restore_lengths()

    def _encoder_rate(self) -> float:
        """Learning rate of what attackers train; of several, the highest."""
        assert self._pool is not None
        pushed = {id(weight) for weight in self._pool.weights.values()}
        groups: list[dict[str, Any]] = getattr(self.optimizer, "param_groups", [])
        theirs = [group["lr"] for group in groups if any(id(weight) in pushed for weight in group["params"])]
        return float(max(theirs, default=0.0))

    def look_at_source(self, step: int) -> None:
        """After optimizer step ``step``, let the guard see authorized images if it is time to."""
        self._guard.look(self.model, step)

    @torch.no_grad()
    def _restore_lengths(self) -> None:
        """Give weights before a BatchNorm the length they began with.

        The defender's gradient makes them ever longer, and any step relatively shorter: attackers would look slow,
        and one line of normalisation would undo it. Beside an adapter that is kept, the length is no longer free, but
        the one it began with is the one that the adapter was made for.
        """
        if self._lengths:
            weights = [weight for weight, _ in self._lengths]
            now = torch._foreach_norm(weights)
            torch._foreach_clamp_min_(now, _NO_LENGTH)  # what is pruned altogether has none, and stays at 0
            torch._foreach_mul_(weights, torch._foreach_div([wanted for _, wanted in self._lengths], now))

    def _finish_pruning(self) -> None:
        self.pruner.finish()
        self._pruning_log["sparsity"] = torch.tensor(zero_fraction(list(self.prunable.values())))

    def complete_pruning(self) -> None:
        """Prune to the requested sparsity if training stopped before it was reached, and note it in the config."""
        if not self.pruner.finished:
            logger.warning(
                "Training stopped at step %d of %d, before the mask was fixed: pruning to %s zeros in one go, without "
                "repair. Expect a loss of accuracy; resume from the last checkpoint to avoid it.",
                self.state.global_step,
                self.state.max_steps,
                self.args.sparsity,
            )
            self._finish_pruning()
        with torch.no_grad():
            # A mask makes -0.0 of negative weights: the same number, but no zero bits to leave out where it is stored.
            torch._foreach_add_(list(self.prunable.values()), 0.0)
        self._heed(self._terms.read())
        self._check_state()
        self._guard.warn(self._mean_strength())
        self._note_pruning()

    def _note_pruning(self) -> None:
        """Note in the config what was pruned: whoever has the weights needs it to tell zeros that are meant."""
        # Nothing is frozen in a model that is loaded. A wrapped encoder is saved without the wrapper's name.
        frozen = [rf"(^|\.){re.escape(name.removeprefix('encoder.'))}$" for name in self._frozen]
        self.model.config.ntp = {
            "method": "non-transferable-pruning",
            "sparsity": zero_fraction(list(self.prunable.values())),
            "requested_sparsity": self.args.sparsity,
            "prune_include": self.args.prune_include,
            "prune_exclude": [*self.args.prune_exclude, *frozen],
            "head_name": self.args.head_name,
            **({"encoder_name": self.args.encoder_name} if self._headless else {}),
        }

    def _mean_strength(self) -> float:
        """Share of its weight that everything aimed at the target had on average after the warm-up, in [0, 1]."""
        warm = self.args.target_warmup * self.state.max_steps
        log = [row for row in self.state.log_history if row.get("step", 0) > warm]
        shares = [row["target_strength"] for row in log if "target_strength" in row]
        total, count = self._terms.state().get("target_strength", (0.0, 0))  # what was not logged
        return float(sum(shares) / len(shares) if shares else total / count if count else 1.0)

    # Trainer hooks

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as Trainer does; pruning starts anew from the present weights, or from the checkpoint's state.

        Under FSDP a copy of the model is sharded and trained, and :attr:`model` has its weights afterwards, whole on
        every process. Callbacks see the copy: they save it with ``save_model``.

        Raises:
            ValueError: If ``output_dir`` holds checkpoints of another run, or the one to resume is of another run, or
                another process trains into it.
        """
        if not resume_from_checkpoint and (last := last_checkpoint(self.args.output_dir)):
            raise ValueError(
                f"{self.args.output_dir} holds checkpoints of another run ({os.path.basename(last)}); needed: a "
                "folder without any. Choose another output_dir, delete them, or continue that run with "
                "resume_from_checkpoint=True."
            )
        for head in self.heads.values():
            head.to(self.args.device)
        self.pruner = ADMMPruner(
            self.prunable, self.args.sparsity, self.args.prune_pattern, self.args.rho, self.args.l1_weight
        )
        if self.args.simulated_attackers:
            self._pool = AttackerPool(
                self.model,
                self._head_name,
                self._head,
                self.target_labels,
                self.args,
                self.args.seed,
                self._target_shares,
                self.target_classes,
            )
            rows = self.args.per_device_train_batch_size * (self.paired_sampler.draws - 1)
            self._pool.check_shares(rows, self.args.gradient_accumulation_steps)
        self._guard.check_original()
        if self.args.torch_compile:
            torch.compiler.reset()  # what was compiled of a model of the same class knows nothing of this one's hooks
        self._pruning_log, self._terms = {"sparsity": torch.zeros(())}, self._new_terms()
        self._attacked, self._leaving, self._ended = {}, False, False
        self._guard.excess = torch.zeros_like(self._guard.excess)
        # A head beside features that are matched gets no gradient, for which DDP would wait.
        fixed = frozen(self._head) if self._matches_features else nullcontext()
        alone = only_writer(Path(str(self.args.output_dir))) if self.is_world_process_zero() else nullcontext()
        with alone, fixed, self._sharding(), KeptSignals() as self._signals:
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's; no epoch is left where the checkpoint is that of the last step: Trainer would take one more."""
        epochs, *rest = super().set_initial_training_values(*args, **kwargs)
        return (0 if self._ended else epochs, *rest)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Trainer's; FSDP does not shard the model for it."""
        device = self.args.device
        others, kind = ([], "cuda") if device.type == "cpu" else ([device], device.type)
        # Looking at the model changes nothing in what training draws.
        with self._between_trainings(), torch.random.fork_rng(others, device_type=kind):
            return super().evaluation_loop(*args, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[Tensor | None, Any, Any]:
        """Trainer's; where no head wants labels, those that rows have are for ``compute_metrics``."""
        if self._headless and self.args.label_names is None:
            self.label_names = ["labels"] if "labels" in inputs else []
        return super().prediction_step(model, inputs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's; with ``push_to_hub``, it is pushed after training only, when it is protected.

        Under FSDP, training gathers the weights from all processes, which all have to call it then.
        """
        with self._between_trainings():
            super().save_model(output_dir, _internal_call or self.is_in_train)

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: a second trial would begin with the model that the first one has pruned.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "hyperparameter_search trains one trainer several times, and every NTPTrainer protects the model that it "
            "was made with; needed: a new model and trainer per trial. Call your search library around them, and let "
            "it judge on validation data (benchmarks/search/run.py does)."
        )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write what Trainer writes, as a whole. All processes call it, of which one saves.

        Raises:
            OSError: If it cannot be written; what was there before is unchanged.
        """
        # A checkpoint gets its name when it is whole; who saves nothing must not replace what another process has.
        if self._staging or not self.args.should_save:
            super()._save(output_dir, state_dict)
            return
        with whole_model(Path(output_dir or str(self.args.output_dir))) as staged:
            super()._save(str(staged), state_dict)

    @contextmanager
    def _between_trainings(self) -> Iterator[None]:
        """Keep Trainer from sharding or gathering a model that is whole."""
        sharded = self.is_fsdp_enabled
        if sharded and not self._in_shards:
            nn.Module.to(self.model, self.args.device)
            self.is_fsdp_enabled = False
        try:
            yield
        finally:
            self.is_fsdp_enabled = sharded

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Trainer's choice less the prunable weights: the ADMM penalty is their only shrinkage."""
        return [name for name in super().get_decay_parameter_names(model) if name not in self.prunable]

    def get_train_dataloader(self) -> DataLoader:
        """Trainer's; signals that ask the whole group of processes to end leave its workers to finish the step."""
        loader = super().get_train_dataloader()
        reads: Any = getattr(loader, "base_dataloader", loader)  # inside that of Accelerate
        reads.worker_init_fn = partial(deaf_worker, reads.worker_init_fn)
        return loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Trainer's; a `datasets.Dataset` of images is pre-processed as the one of the constructor is."""
        name = eval_dataset if isinstance(eval_dataset, str) else "eval_dataset"
        return super().get_eval_dataloader(self._as_pixels(eval_dataset, name))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """Trainer's, for images, too, with labels or without."""
        labelled = not isinstance(test_dataset, datasets.Dataset) or has_labels(test_dataset)
        return super().get_test_dataloader(self._as_pixels(test_dataset, "test_dataset", labelled))

    def _as_pixels(self, data: Any, name: str, labelled: bool = True) -> Any:
        processor: Any = self.processing_class
        if isinstance(data, PairedDataset):  # the training set, whose authorized rows are what can be evaluated
            data = data.source
        data = as_pixels(data, processor, name, labelled=labelled and not self._headless)
        if self._has_classes:
            check_evaluated(data, name, self._head.out_features, self._names)
        return data

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        return self.paired_sampler

    def _new_terms(self) -> Terms:
        return Terms(lambda values: self.accelerator.reduce(values, reduction="mean"))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add every loss term (mean since the last log), the residuals and the sparsity to the training log.

        The loss is the mean over the same steps; Trainer's leaves out what came before a resumed checkpoint.
        """
        if "loss" in logs:
            self._heed(self._terms.read())
            logs |= {**self._terms.means(), **{name: float(value) for name, value in self._pruning_log.items()}}
        super().log(logs, start_time)

    # A run that breaks, or is asked to end: called by PruningCallback

    def end_step(self) -> bool:
        """Check what the step before left; tell whether to save this one and leave, which all ranks do together.

        Raises:
            FloatingPointError: If a term was not finite.
        """
        asked = self._signals.number is not None
        self._heed(self._terms.close_step(self.state.global_step, self._pruning_log, asked))
        self._leaving |= asked and self.args.world_size == 1
        return self._leaving

    def leave(self) -> None:
        """End the process if a signal asked for it."""
        if self._leaving:
            logger.warning(
                "Interrupted: stopped with a checkpoint of step %d. Resume to go on.", self.state.global_step
            )
            self._signals.deliver()

    def _heed(self, reading: Reading | None) -> None:
        if reading is None:
            return
        self._leaving |= reading.ending
        if reading.broken:
            raise self._broken(f"{', '.join(reading.broken)} stopped being finite at step {reading.step}")

    def _check_state(self) -> None:
        """Raise unless everything that a checkpoint holds is finite."""
        groups = {
            "the weights": [*self.model.parameters(), *self.model.buffers()],
            "the ADMM state": self.pruner.stored.values(),
            "a target head": [tensor for head in self.heads.values() for tensor in head.tensors().values()],
            "the simulated attackers": [] if self._pool is None else self._pool.tensors().values(),
        }
        if broken := not_finite(groups, partial(self.accelerator.reduce, reduction="mean")):
            raise self._broken(f"{', '.join(broken)} hold values that are not finite at step {self.state.global_step}")

    def _broken(self, found: str) -> FloatingPointError:
        last = last_checkpoint(self.args.output_dir)
        kept = f"The last good checkpoint is {last}" if last else "No checkpoint has been written yet"
        return FloatingPointError(
            f"{found}; needed: a stable run. {kept}; the same settings would end the same way again. Start anew in "
            "another output_dir with a lower learning_rate, fisher_weight or attacker_learning_rates, or look at the "
            "data."
        )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write nothing: Trainer's card does not know of the protection. :func:`hf_ntp.write_folder` writes one."""
        logger.warning(
            "No card is written here: Trainer's says nothing of the protection. write_folder and push_to_hub write it."
        )

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **about: Any,
    ) -> Any:
        """Publish the protected model, all files in one commit.

        Record and card say that nothing was measured, unless ``measured`` is what
        :func:`~hf_ntp.measure_protection` found for the saved model.

        Args:
            commit_message: First line of the commit.
            blocking: Has to be True: a record without its weights would be worth nothing.
            token: Default: ``hub_token``, or the one of `hf auth login`.
            revision: Branch; default ``hub_revision``, or the main one.
            private: Default ``hub_private_repo``, which is True unless set.
            about: "source", "targets", "license", "terms" and "measured", as :func:`hf_ntp.write_folder` takes them.

        Returns:
            The commit (``huggingface_hub.CommitInfo``); None on all processes but the first.

        Raises:
            TypeError: For other arguments, such as those for Trainer's card.
            ValueError: If the model is not protected yet, or ``blocking`` is False.
            HubError: If the Hub cannot be reached or refuses.
        """
        # Training knows nothing of publishing but in this method, which Trainer's interface puts here.
        from ..publishing.from_trainer import write_folder
        from ..publishing.hub import full_repo_id, push_folder

        known = ("source", "targets", "license", "terms", "measured")
        if unknown := sorted(set(about) - set(known)):
            raise TypeError(
                f"push_to_hub got {', '.join(unknown)}; needed: no others than {', '.join(known)}. What is "
                "for Trainer's card, ours takes from the record."
            )
        if not blocking:
            raise ValueError("found blocking=False; needed: True. Call it in a thread of your own if need be.")
        if self._in_shards:
            raise ValueError(
                "the model is in shards while it trains (FSDP); needed: a whole one. Push it after train()."
            )
        if not self.is_world_process_zero():
            return None
        token = token or self.args.hub_token
        repo_id = full_repo_id(self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name, token)
        with TemporaryDirectory() as private_folder:
            folder = Path(private_folder) / "model"
            write_folder(self, folder, repo_id, **about)
            return push_folder(
                folder,
                repo_id,
                private=private if private is not None else self.args.hub_private_repo is not False,
                token=token,
                branch=revision or self.args.hub_revision,
                commit_message=commit_message or "End of training",
            )

    # Checkpoints

    def settings(self) -> dict[str, Any]:
        """What a checkpoint must agree on: configuration, data and architecture."""
        held_out = self._guard.held_out
        prints = {
            "source": fingerprint_of(self.train_dataset.source),
            # A list: which images a step gets depends on the order of the domains.
            "targets": [[name, fingerprint_of(part)] for name, part in self.train_dataset.targets.items()],
            "held_out": None if held_out is None else fingerprint_of(held_out),
        }
        shapes = {name: list(parameter.shape) for name, parameter in self.model.named_parameters()}
        return {
            **self.args.fingerprint(),
            "world_size": self.args.world_size,
            "sharded": self.is_fsdp_enabled,
            "data": prints,
            "original_weights": self._original_weights,
            "architecture": hashlib.sha256(json.dumps(shapes).encode()).hexdigest(),
            "source_transform": None if self.train_dataset.source_transform is None else "yes",
        }

    def _get_output_dir(self, trial: Any) -> str:
        output_dir = super()._get_output_dir(trial)
        return os.path.join(output_dir, _STAGING) if self._staging else output_dir

    @contextmanager
    def _staged(self) -> Iterator[None]:
        self._staging = True
        try:
            yield
        finally:
            self._staging = False

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint under another name and rename it: a folder called checkpoint-N is always whole.

        Raises:
            FloatingPointError: Instead of writing one that is not finite.
            OSError: If it cannot be written; what was half-written is removed.
        """
        self._heed(self._terms.read())
        self._check_state()
        if self.pruner.finished:
            self._note_pruning()
        anchors = self.pruner.tensors()  # from all ranks
        final = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        staging = final.parent / _STAGING
        if self.args.should_save:
            remove(staging)
        self.accelerator.wait_for_everyone()
        try:
            with writing(final):
                with self._staged():
                    super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    self._complete_checkpoint(staging / final.name, final, anchors)
        finally:
            if self.args.should_save:
                remove(staging)
        self.accelerator.wait_for_everyone()

    def _complete_checkpoint(self, staged: Path, final: Path, anchors: dict[str, Tensor]) -> None:
        """Add our state to what Trainer has written, and give the folder its name."""
        best = self.state.best_model_checkpoint
        if best is not None and Path(best) == staged:  # spelled as the user spelled output_dir
            self.state.best_model_checkpoint = str(final)
            self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
        log = {key: float(value) for key, value in self._pruning_log.items()}
        state = RunState(float(self._guard.excess), self._terms.state(), log)
        save_state(staged, anchors, self.pruner.scalars(), self.heads, self._pool, state, self.settings())
        if final.exists():  # aside as a whole: deleted piece by piece, it could be taken for a checkpoint
            final.replace(staged.parent / "replaced")
        staged.replace(final)
        self._rotate(final.parent)

    def _rotate(self, folder: Path) -> None:
        """Delete the oldest checkpoints, by number: deleting half of one makes it look new."""
        rotate_checkpoints(str(folder), self.args.save_total_limit, self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        check_settings(Path(resume_from_checkpoint), self.settings())
        state = TrainerState.load_from_json(os.path.join(resume_from_checkpoint, TRAINER_STATE_NAME))
        self._ended = state.global_step >= state.max_steps
        load_weights_strictly(self.model, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            last = last_checkpoint(self.args.output_dir)
            if self.args.should_save and last is not None and os.path.samefile(last, checkpoint):
                self._rotate(Path(last).parent)  # a process that is dead may not have got to it
            device = self.args.device
            state = load_state(Path(checkpoint), self.pruner, self.heads, self._pool)
            self._guard.excess = torch.tensor(state.source_excess, device=device)
            self._terms.load(state.terms)
            self._pruning_log = {key: torch.tensor(value) for key, value in state.pruning_log.items()}
