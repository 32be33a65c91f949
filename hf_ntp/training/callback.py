"""When the pruning happens: a callback that only calls the trainer's pruner."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import IntervalStrategy, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from .trainer import NTPTrainer


class PruningCallback(TrainerCallback):
    """Delegates Trainer's events to the trainer: epoch order, ADMM penalty, Z-steps, mask, signals."""

    def __init__(self, trainer: NTPTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The number of steps is known."""
        self.trainer.begin_pruning(state.max_steps)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the sampler which epoch's order to give."""
        self.trainer.paired_sampler.set_epoch(int(state.epoch or 0))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the penalty's gradient, after clipping: the clip is for the task's gradient."""
        self.trainer.add_penalty(state.global_step + 1, state.max_steps)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Advance pruning, then look at the result; ``global_step`` does not count this step yet."""
        self.trainer.advance_pruning(state.global_step + 1, state.max_steps)
        self.trainer.look_at_source(state.global_step + 1)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop a run that is broken, save one that shall end, log what came since the last log of one that ends."""
        if self.trainer.end_step():
            control.should_save = True
        if state.global_step >= state.max_steps and args.logging_strategy != IntervalStrategy.NO:
            control.should_log = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leave if asked to."""
        self.trainer.leave()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make sure the sparsity is reached even when training was stopped early."""
        self.trainer.complete_pruning()
