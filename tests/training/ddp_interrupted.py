"""Run by test_survival.py on every rank: one rank gets a signal, both stop at the same step; then it is resumed."""

import signal
import sys
from pathlib import Path

import torch

from tests.survival import SignalAtStep
from tests.training.test_trainer import trainer


def main(folder, how):
    ours = trainer(folder / "run", save_strategy="steps", save_steps=5, per_device_train_batch_size=4)
    if how == "interrupted" and ours.args.process_index == 1:
        ours.add_callback(SignalAtStep(3, signal.SIGTERM))
    try:
        ours.train(resume_from_checkpoint=how == "resumed")
    finally:
        rank = ours.args.process_index
        torch.save((ours.state.global_step, ours.model.state_dict()), folder / f"{how}{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
