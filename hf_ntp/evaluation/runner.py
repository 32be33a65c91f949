"""Sample-wise learning curves: many independent fits, shared out over cores, processes and machines, and cached."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import joblib
import numpy as np
import torch
import transformers
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoConfig, PreTrainedModel

from ..attacks import FineTuneProtocol, Loot, Predict
from ..data import PixelDataset, nested_subsets
from ..models import load_model
from .arms import Arm
from .cache import ResultCache, checkpoint_digest, content_key, local_folder
from .claims import POLL, Claims


@dataclass(frozen=True)
class AttackData:
    """Unauthorized data as the attacker has it; none of it may have been seen by the protection.

    Args:
        train: Labelled images from which nested subsets are drawn.
        validation: Chooses the learning rate.
        test: Gives the accuracies of the curves; no choice is made on it.
        source: A small labelled set of the authorized domain, for the attacks that begin there.
    """

    train: PixelDataset
    validation: PixelDataset
    test: PixelDataset
    source: PixelDataset | None = None

    @property
    def num_labels(self) -> int:
        """Classes of the target."""
        return int(max(part.labels.max() for part in (self.train, self.validation, self.test))) + 1


class Accuracies(NamedTuple):
    """Result of one fit, in eval mode."""

    validation: float
    test: float


@dataclass(frozen=True)
class LearningCurves:
    """Test accuracies of every arm on one grid.

    Attributes:
        sample_sizes: Labelled target samples, increasing.
        seeds: Attack seeds: subset, head, scratch initialisation and batch order.
        accuracies: Arm name to [seeds, sizes], fractions.
        learning_rates: Arm name to the chosen rate (or other tuned value of the attack) per size.
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
    value: float

    def __str__(self) -> str:
        return f"{self.arm.name}, {self.size} images, seed {self.seed}, tuned value {self.value:g}"


def sample_wise_learning_curves(
    arms: Sequence[Arm],
    data: AttackData,
    sample_sizes: Sequence[int],
    seeds: Sequence[int] = (0, 1, 2),
    protocol: FineTuneProtocol | None = None,
    cache_dir: str | Path | None = None,
    jobs: int | None = None,
) -> LearningCurves:
    """Attack every arm with nested subsets of the target and measure test accuracy.

    One protocol and one grid for all starts of an attack. Per arm and size, the learning rate (or whatever the attack
    tunes) is the one with the best validation accuracy on the first seed, the lower one on ties; the other seeds use
    it. Accuracies are those of the last step.

    Processes that call this with the same arguments and one ``cache_dir``, such as those that `accelerate launch`
    starts on one or several machines, share the fits out among them, and each returns the whole. They talk through
    that folder alone: one that dies holds nobody up, and its fits are taken over.

    Args:
        arms: Starting points and attacks, see :func:`~hf_ntp.evaluation.arms.standard_arms`.
        data: Target data of the attacker.
        sample_sizes: Strictly increasing, at most ``len(data.train)``.
        seeds: Attack seeds; three are the minimum for an interval worth showing.
        protocol: How to fine-tune; defaults of :class:`FineTuneProtocol`.
        cache_dir: Where finished fits are kept; None keeps nothing, and shares nothing with other processes.
        jobs: Fits at a time in this process; default one per core that it has, or one where an accelerator does the
            work. More of them share it, each in a process of its own: small models leave it mostly idle.

    Raises:
        ValueError: For sizes that are unsorted, repeated or larger than the set.
        RuntimeError: If a fit fails; says which.
    """
    protocol = protocol or FineTuneProtocol()
    check_seeds(seeds)
    subsets = {seed: nested_subsets(data.train.labels, sample_sizes, seed) for seed in seeds}
    arms = [replace(arm, checkpoint=local_folder(arm.checkpoint)) for arm in arms]
    run = _Sweep(subsets, data, protocol, ResultCache(cache_dir), jobs)
    # Large fits first, so that no core is left with a long one at the end.
    points = [(size, arm) for size in sorted(sample_sizes, reverse=True) for arm in arms]
    first, *others = seeds
    results = run(
        [_Fit(arm, size, first, value) for size, arm in points for value in arm.attack.grid(protocol)], "tuning"
    )
    best = {
        (arm, size): max(
            sorted(arm.attack.grid(protocol)), key=lambda v: results[_Fit(arm, size, first, v)].validation
        )
        for size, arm in points
    }
    results |= run([_Fit(arm, size, seed, best[arm, size]) for size, arm in points for seed in others], "other seeds")
    return LearningCurves(
        tuple(sample_sizes),
        tuple(seeds),
        {
            arm.name: [[results[_Fit(arm, n, seed, best[arm, n])].test for n in sample_sizes] for seed in seeds]
            for arm in arms
        },
        {arm.name: [best[arm, n] for n in sample_sizes] for arm in arms},
        len(results),
    )


def _launched(name: str, default: int) -> int:
    """Return what the launcher of several processes (torchrun, `accelerate launch`) told this one."""
    return int(os.environ.get(name, default))


class _Sweep:
    """Runs fits, as many at a time as there are jobs, together with all processes that have the same cache."""

    def __init__(
        self,
        subsets: Mapping[int, Mapping[int, np.ndarray]],
        data: AttackData,
        protocol: FineTuneProtocol,
        cache: ResultCache,
        jobs: int | None,
    ) -> None:
        self.subsets, self.data, self.protocol, self.cache = subsets, data, protocol, cache
        cores = max(1, joblib.cpu_count() // _launched("LOCAL_WORLD_SIZE", 1))
        self.jobs = jobs or (1 if torch.accelerator.is_available() else cores)
        self.describe = _Describer(data, protocol)
        self.claims = Claims(cache.folder)

    def __call__(self, fits: Sequence[_Fit], title: str) -> dict[_Fit, Accuracies]:
        keys = {fit: self.describe(fit) for fit in fits}
        fits = list(keys)
        results: dict[_Fit, Accuracies] = {}

        def look() -> None:
            """Note what is in the cache, whoever fitted it."""
            for fit in fits:
                if fit not in results and (found := self.cache.get(keys[fit])):
                    results[fit] = Accuracies(**found)

        def mine() -> Iterator[_Fit]:
            """Claim one fit after another, each when there is a job for it."""
            for fit in fits:
                if fit in results or not self.claims.take(keys[fit]):
                    continue
                if found := self.cache.get(keys[fit]):  # finished since the last look
                    results[fit] = Accuracies(**found)
                    self.claims.release(keys[fit])
                else:
                    yield fit

        look()
        # One bar per machine; fits that others finish count, so that the time left is true.
        bar = tqdm(
            total=len(fits), initial=len(results), desc=title, unit="fit", disable=_launched("LOCAL_RANK", 0) > 0
        )
        with bar, self.claims.kept_alive():
            while len(results) < len(fits):
                for fit, result in self._run(mine()):
                    self.cache.put(keys[fit], result._asdict())
                    self.claims.release(keys[fit])
                    results[fit] = result
                    look()
                    bar.update(len(results) - bar.n)
                if len(results) < len(fits):
                    time.sleep(POLL)
                    look()
                bar.update(len(results) - bar.n)
        return results

    def _run(self, fits: Iterator[_Fit]) -> Iterator[tuple[_Fit, Accuracies]]:
        work = (joblib.delayed(_run)(fit, self.subsets[fit.seed][fit.size], self.data, self.protocol) for fit in fits)
        backend = "loky" if self.jobs > 1 else "sequential"
        with joblib.parallel_config(backend, inner_max_num_threads=1 if self.jobs > 1 else None):
            # What is dispatched is claimed: no more than can run.
            parallel = joblib.Parallel(
                n_jobs=self.jobs, return_as="generator_unordered", batch_size=1, pre_dispatch="n_jobs"
            )
            yield from parallel(work)


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


def load_start(arm: Arm, seed: int) -> PreTrainedModel:
    """Load the arm's checkpoint, or initialise its architecture with ``seed``, in float32."""
    if arm.random_init:
        torch.manual_seed(seed)
    return load_model(arm.checkpoint, random_init=arm.random_init)


def _run(fit: _Fit, rows: np.ndarray, data: AttackData, protocol: FineTuneProtocol) -> tuple[_Fit, Accuracies]:
    try:
        return fit, _fit(fit, rows, data, protocol)
    except Exception as error:
        raise RuntimeError(f"the fit of {fit} failed ({type(error).__name__}: {error})") from error


def _fit(fit: _Fit, rows: np.ndarray, data: AttackData, protocol: FineTuneProtocol) -> Accuracies:
    attack = fit.arm.attack
    with _quick_and_quiet():
        torch.manual_seed(fit.seed)  # layers that a checkpoint lacks are initialised on loading
        model = load_start(fit.arm, fit.seed)
        if torch.accelerator.is_available():
            nn.Module.to(model, _accelerator())
        source = data.source.tensors() if attack.needs_source and data.source is not None else None
        loot = Loot(*data.train.tensors(rows), data.num_labels, source)
        predict = attack.fit(model, loot, protocol, fit.value, fit.seed)
        return Accuracies(accuracy_of(predict, data.validation), accuracy_of(predict, data.test))


def _accelerator() -> torch.device | int | None:
    """Return the current accelerator, or among several launched processes the one that belongs to this process."""
    if "LOCAL_RANK" in os.environ:
        return _launched("LOCAL_RANK", 0) % torch.accelerator.device_count()
    return torch.accelerator.current_accelerator()


def accuracy_of(predict: Predict, data: PixelDataset, batch_size: int = 256) -> float:
    """Share of images classified correctly by ``predict``."""
    images, labels = data.tensors()
    predicted = torch.cat([predict(batch) for batch in images.split(batch_size)])
    return float((predicted == labels).float().mean())


class _Describer:
    """Keys of fits: everything that determines a result, nothing that does not (names, paths, other grid points)."""

    def __init__(self, data: AttackData, protocol: FineTuneProtocol) -> None:
        settings = asdict(protocol)
        del settings["learning_rates"]
        self._common = {
            "protocol": settings,
            "device": str(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"),
            "versions": [version(name) for name in ("torch", "transformers", "peft", "scikit-learn")],
            "data": [part.fingerprint for part in (data.train, data.validation, data.test)],
        }
        self._source = None if data.source is None else data.source.fingerprint
        self._starts: dict[Arm, dict[str, object]] = {}

    def _start(self, arm: Arm) -> dict[str, object]:
        config = AutoConfig.from_pretrained(arm.checkpoint).to_dict()
        notes = config.pop("ntp", None) or {}
        # Not part of the architecture.
        for key in ("id2label", "label2id", "_name_or_path", "transformers_version"):
            config.pop(key, None)
        weights = None if arm.random_init else checkpoint_digest(Path(arm.checkpoint))
        # The patterns decide what a mask is, the names where things are; the rest of the note changes nothing.
        telling = ("prune_include", "prune_exclude", "head_name", "encoder_name")
        patterns = {key: value for key, value in notes.items() if key in telling}
        return {
            "config": content_key(config),
            "weights": weights,
            "attack": [type(arm.attack).__name__, arm.attack.settings()],
            "patterns": patterns,
            "source": self._source if arm.attack.needs_source else None,
        }

    def __call__(self, fit: _Fit) -> str:
        if fit.arm not in self._starts:
            self._starts[fit.arm] = self._start(fit.arm)
        point = {"size": fit.size, "seed": fit.seed, "value": fit.value}
        return content_key({**self._common, **self._starts[fit.arm], **point})
