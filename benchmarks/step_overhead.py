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
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import TrainerCallback

from hf_ntp import NTPConfig, NTPTrainer
from hf_ntp.training.pretraining import small_vit

CLASSES = 10
IMAGES = 64


class RandomImages(Dataset):
    """Images in memory: reading them costs both trainers the same."""

    def __init__(self, image_size: int, rows: int = 3000) -> None:
        self.images = torch.randn(rows, 3, image_size, image_size)
        self.labels = torch.randint(0, CLASSES, (rows,))

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
    resnet = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic", num_labels=CLASSES
    )
    return {
        "ViT 16x16": small_vit([str(i) for i in range(CLASSES)]),
        "ResNet 32x32": ResNetForImageClassification(resnet),
    }


def seconds_per_step(model: PreTrainedModel, image_size: int, steps: int, protected: bool, folder: str) -> float:
    """Mean seconds of a step of plain Trainer or of NTPTrainer, Z-steps included."""
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
    if protected:
        config = NTPConfig(per_device_train_batch_size=IMAGES // 2, pruning_end=1.0, **options)
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
    print(f"{'model':<14}{'plain ms':>10}{'NTP ms':>10}{'ratio':>8}{'min':>8}{'max':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models().items():
            size = int(name.rpartition("x")[2])
            pairs = [
                [seconds_per_step(model, size, options.steps, protected, folder) for protected in (False, True)]
                for _ in range(options.turns)
            ]
            ratios = [ours / plain for plain, ours in pairs]
            plain, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
            figures[name] = {"plain_s": plain, "ntp_s": ours, "ratio": statistics.median(ratios), "ratios": ratios}
            print(
                f"{name:<14}{1e3 * plain:>10.2f}{1e3 * ours:>10.2f}{statistics.median(ratios):>8.3f}"
                f"{min(ratios):>8.3f}{max(ratios):>8.3f}"
            )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
