"""Cost of a protected training step: NTPTrainer against plain Trainer on as many images, side by side in one run.

    python benchmarks/step_overhead.py

Both train the same model on 64 images per step (NTPTrainer: 32 authorized and 32 unauthorized), turn by turn, so that
drifts of the machine cancel out. Prints a table and, with --json PATH, writes the figures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import TrainerCallback

from hf_ntp import NTPConfig, NTPTrainer
from hf_ntp.training.arguments import PRESETS
from hf_ntp.training.pretraining import small_resnet, small_vit

LABELS = [str(digit) for digit in range(10)]
IMAGES = 64
# ADMM, target head and Fisher term alone, and everything that the presets for these models do.
WITHOUT_ATTACKERS = {"attackers": 0, "source_distillation": 0.0, "source_tolerance": [], "collapse_weight": 0.0}
KINDS: dict[str, Callable[[str], dict[str, Any] | None]] = {
    "plain": lambda model: None,
    "no attackers": lambda model: WITHOUT_ATTACKERS,
    "preset": lambda model: PRESETS["adaptive" if model.startswith("ViT") else "adaptive_convnet"],
}


class RandomImages(Dataset):
    """Images in memory: reading them costs both trainers the same."""

    def __init__(self, image_size: int, rows: int = 3000) -> None:
        self.images = torch.randn(rows, 3, image_size, image_size)
        self.labels = torch.randint(0, len(LABELS), (rows,))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.images[index], "labels": int(self.labels[index])}


class StepTimes(TrainerCallback):
    """Wall time from the end of one step to the end of the next; the first one is left out."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._last: float | None = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the time."""
        now = perf_counter()
        if self._last is not None:
            self.times.append(now - self._last)
        self._last = now


def models() -> dict[str, PreTrainedModel]:
    """Tiny ViT of the recipe and a small ResNet at 32x32."""
    return {"ViT 16x16": small_vit(LABELS), "ResNet 32x32": small_resnet(LABELS)}


def seconds_per_step(
    model: PreTrainedModel, image_size: int, steps: int, method: dict[str, Any] | None, folder: str
) -> float:
    """Mean seconds of a step of NTPTrainer with options, Z-steps included, or of plain Trainer (None)."""
    watch = StepTimes()
    options: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": steps,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 50,
        "disable_tqdm": True,
        "use_cpu": True,
        "learning_rate": 1e-5,
        "dataloader_pin_memory": False,
    }
    data = RandomImages(image_size)
    if method is not None:
        config = NTPConfig(per_device_train_batch_size=IMAGES // 2, pruning_end=1.0, **options, **method)
        trainer: Trainer = NTPTrainer(model, config, data, RandomImages(image_size), callbacks=[watch])
    else:
        plain = TrainingArguments(per_device_train_batch_size=IMAGES, **options)
        trainer = Trainer(model, plain, train_dataset=data, callbacks=[watch])
    trainer.train()
    return statistics.mean(watch.times)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=100, help="steps per turn")
    parser.add_argument("--turns", type=int, default=5, help="turns of each trainer")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models().items():
            size = int(name.rpartition("x")[2])
            turns = [
                [seconds_per_step(model, size, options.steps, kind(name), folder) for kind in KINDS.values()]
                for _ in range(options.turns)
            ]
            figures[name] = {}
            for kind, column in zip(KINDS, zip(*turns, strict=True), strict=True):
                ratios = [ours / plain for ours, (plain, *_) in zip(column, turns, strict=True)]
                ratio = statistics.median(ratios)
                figures[name][kind] = {"seconds": statistics.median(column), "ratio": ratio, "ratios": ratios}
                print(
                    f"{name:<14}{kind:<14}{1e3 * statistics.median(column):>8.2f} ms{ratio:>8.3f} x plain"
                    f"{min(ratios):>8.3f} to {max(ratios):.3f}"
                )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
