"""Sample-wise learning curves: many independent fits, shared out over the cores and cached."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import joblib
import numpy as np
import torch
import transformers
from huggingface_hub import snapshot_download
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoConfig

from ..data import PixelDataset, nested_subsets
from .cache import ResultCache, checkpoint_digest, content_key
from .fine_tune import Accuracies, accuracy_of, build_model, fine_tune
from .protocol import Arm, FineTuneProtocol


@dataclass(frozen=True)
class AttackData:
    """Unauthorized data as the attacker has it; none of it may have been seen by the protection.

    Args:
        train: Labelled images from which nested subsets are drawn.
        validation: Chooses the learning rate.
        test: Gives the accuracies of the curves; no choice is made on it.
    """

    train: PixelDataset
    validation: PixelDataset
    test: PixelDataset

    @property
    def num_labels(self) -> int:
        """Classes of the target."""
        return int(max(part.labels.max() for part in (self.train, self.validation, self.test))) + 1


@dataclass(frozen=True)
class LearningCurves:
    """Test accuracies of every arm on one grid.

    Attributes:
        sample_sizes: Labelled target samples, increasing.
        seeds: Attack seeds: subset, head, scratch initialisation and batch order.
        accuracies: Arm name to [seeds, sizes], fractions.
        learning_rates: Arm name to the chosen rate per size.
        fits: Number of fits the curves rest on.
    """

    sample_sizes: tuple[int, ...]
    seeds: tuple[int, ...]
    accuracies: dict[str, list[list[float]]]
    learning_rates: dict[str, list[float]]
    fits: int


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise ``ValueError`` unless there is a seed and none occurs twice: a repeated seed is no second measurement."""
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds are {list(seeds)}; needed: at least one, each of them once, such as 0 1 2.")


class _Fit(NamedTuple):
    arm: Arm
    size: int
    seed: int
    learning_rate: float


def sample_wise_learning_curves(
    arms: Sequence[Arm],
    data: AttackData,
    sample_sizes: Sequence[int],
    seeds: Sequence[int] = (0, 1, 2),
    protocol: FineTuneProtocol | None = None,
    cache_dir: str | Path | None = None,
    jobs: int | None = None,
) -> LearningCurves:
    """Fine-tune every arm on nested subsets of the target and measure test accuracy.

    One protocol and one grid for all arms; a fresh head every time; per arm and size the learning rate with the best
    validation accuracy (mean over seeds, the lower rate on ties). Accuracies are those of the last step.

    Args:
        arms: Starting points, see :func:`~hf_ntp.evaluation.protocol.standard_arms`.
        data: Target data of the attacker.
        sample_sizes: Strictly increasing, at most ``len(data.train)``.
        seeds: Attack seeds; three are the minimum for an interval worth showing.
        protocol: How to fine-tune; defaults of :class:`FineTuneProtocol`.
        cache_dir: Where finished fits are kept; None keeps nothing.
        jobs: Processes; default one per core, or one where an accelerator does the work.

    Raises:
        ValueError: For sizes that are unsorted, repeated or larger than the set.
    """
    protocol = protocol or FineTuneProtocol()
    check_seeds(seeds)
    subsets = {seed: nested_subsets(data.train.labels, sample_sizes, seed) for seed in seeds}
    arms = [replace(arm, checkpoint=_local(arm.checkpoint)) for arm in arms]
    fits = [
        _Fit(arm, size, seed, rate)
        # Large fits first, so that no core is left with a long one at the end.
        for size in sorted(sample_sizes, reverse=True)
        for arm in arms
        for seed in seeds
        for rate in protocol.learning_rates
    ]
    results = _run_all(fits, subsets, data, protocol, ResultCache(cache_dir), jobs)
    accuracies: dict[str, list[list[float]]] = {}
    rates: dict[str, list[float]] = {}
    for arm in arms:
        validation, test = (
            np.array(
                [
                    [[results[_Fit(arm, n, s, r)][part] for n in sample_sizes] for s in seeds]
                    for r in protocol.learning_rates
                ]
            )
            for part in (0, 1)
        )
        best = validation.mean(axis=1).argmax(axis=0)
        accuracies[arm.name] = test[best, :, np.arange(len(sample_sizes))].T.tolist()
        rates[arm.name] = [protocol.learning_rates[i] for i in best]
    return LearningCurves(tuple(sample_sizes), tuple(seeds), accuracies, rates, len(fits))


def _run_all(
    fits: Sequence[_Fit],
    subsets: dict[int, dict[int, np.ndarray]],
    data: AttackData,
    protocol: FineTuneProtocol,
    cache: ResultCache,
    jobs: int | None,
) -> dict[_Fit, Accuracies]:
    describe = _Describer(data, protocol)
    keys = {fit: describe(fit) for fit in fits}
    results = {fit: Accuracies(**found) for fit in fits if (found := cache.get(keys[fit]))}
    missing = [fit for fit in fits if fit not in results]
    jobs = jobs or (1 if torch.accelerator.is_available() else joblib.cpu_count())
    work = (joblib.delayed(_run)(fit, subsets[fit.seed][fit.size], data, protocol) for fit in missing)
    with joblib.parallel_config("loky", inner_max_num_threads=1) if jobs > 1 else joblib.parallel_config("sequential"):
        finished = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered", batch_size=1)(work)
        for fit, result in tqdm(finished, total=len(fits), initial=len(results), desc="learning curves", unit="fit"):
            cache.put(keys[fit], result._asdict())
            results[fit] = result
    return results


@contextmanager
def _quick_and_quiet() -> Iterator[None]:
    """Flush denormal numbers and hide the loading bar of every single fit.

    Moments of weights that get no gradient decay into denormals, which cost many times what an ordinary number does.
    """
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        if bars:
            transformers.utils.logging.enable_progress_bar()


def _run(fit: _Fit, rows: np.ndarray, data: AttackData, protocol: FineTuneProtocol) -> tuple[_Fit, Accuracies]:
    with _quick_and_quiet():
        model = build_model(fit.arm, data.num_labels, fit.seed)
        if torch.accelerator.is_available():
            nn.Module.to(model, torch.accelerator.current_accelerator())
        images, labels = data.train.tensors(rows)
        fine_tune(model, images, labels, protocol, fit.learning_rate, fit.seed, fit.arm.keep_mask)
        return fit, Accuracies(accuracy_of(model, data.validation), accuracy_of(model, data.test))


class _Describer:
    """Keys of fits: everything that determines a result, nothing that does not (names, paths, other grid points)."""

    def __init__(self, data: AttackData, protocol: FineTuneProtocol) -> None:
        settings = asdict(protocol)
        del settings["learning_rates"]
        self._common = {
            "protocol": settings,
            "device": str(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"),
            "versions": [torch.__version__, transformers.__version__],
            "data": [part.fingerprint for part in (data.train, data.validation, data.test)],
        }
        self._starts: dict[Arm, dict[str, object]] = {}

    def _start(self, arm: Arm) -> dict[str, object]:
        config = AutoConfig.from_pretrained(arm.checkpoint).to_dict()
        # Notes of ours and of the head, which is replaced; not part of the architecture.
        for key in ("ntp", "id2label", "label2id", "_name_or_path", "transformers_version"):
            config.pop(key, None)
        weights = None if arm.random_init else checkpoint_digest(Path(arm.checkpoint))
        return {"config": content_key(config), "weights": weights, "keep_mask": arm.keep_mask}

    def __call__(self, fit: _Fit) -> str:
        if fit.arm not in self._starts:
            self._starts[fit.arm] = self._start(fit.arm)
        point = {"size": fit.size, "seed": fit.seed, "learning_rate": fit.learning_rate}
        return content_key({**self._common, **self._starts[fit.arm], **point})


def _local(checkpoint: str) -> str:
    """Return a folder with config and weights: the one given, or a snapshot of the Hub id."""
    if Path(checkpoint).is_dir():
        return checkpoint
    return snapshot_download(checkpoint, allow_patterns=["config.json", "*.safetensors"])
