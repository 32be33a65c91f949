"""Sample-wise learning curves: many independent fits, shared out over cores, processes and machines, and cached."""

from __future__ import annotations

import copy
import logging
import math
import os
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import joblib
import numpy as np
import torch
import transformers
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..attacks import Attack, FineTuneProtocol, Loot, Predict
from ..data import PixelDataset, check_pixels, nested_subsets
from ..models import load_model
from .arms import Arm
from .cache import ResultCache, local_folder
from .claims import POLL, Claims
from .fits import Describer, Fit

logger = logging.getLogger(__name__)

# Fits trained as one on an accelerator: no more than that many, and than have that many weights.
_MOST_TOGETHER = 32
_WEIGHTS_TOGETHER = 20_000_000
RETUNE_MARGIN = 0.03
"""Loss of validation accuracy, against the first seed, from which on another seed tunes for itself; about the standard
error on a few hundred images."""


@dataclass(frozen=True)
class AttackData:
    """Unauthorized data as the attacker has it; none of it may have been seen by the protection.

    Args:
        train: Labelled images from which nested subsets are drawn; attacks that need no labels use all its images.
        validation: Chooses the learning rate.
        test: Gives the accuracies of the curves; no choice is made on it.
        source: A small labelled set of the authorized domain, for the attacks that begin there.
    """

    train: PixelDataset
    validation: PixelDataset
    test: PixelDataset
    source: PixelDataset | None = None

    def __post_init__(self) -> None:
        """Check that there are labels, and that one means the same in all parts.

        Raises:
            TypeError: If they are not `PixelDataset`s.
            ValueError: If a part has no labels, or is another one, or their classes have other names or another order.
        """
        for name in ("train", "validation", "test", "source"):
            if name != "source" or self.source is not None:
                check_pixels(getattr(self, name), name)
                if not getattr(self, name).labelled:
                    raise ValueError(
                        f"the images of {name!r} have no labels; needed: labelled ones, or every accuracy would be 0."
                    )
        prints = {name: getattr(self, name).fingerprint for name in ("train", "validation", "test")}
        if same := sorted(name for name, one in prints.items() if list(prints.values()).count(one) > 1):
            raise ValueError(
                f"{' and '.join(same)} are the same images: learning rates would be chosen on what is trained on or "
                "reported; needed: parts of their own. Divide the data, as load_domain does."
            )
        names = {name: getattr(self, name).class_names for name in ("train", "validation", "test")}
        known = {name: tuple(classes) for name, classes in names.items() if classes}
        if len(set(known.values())) > 1:
            found = "; ".join(f"{name}: {', '.join(classes[:6])}" for name, classes in known.items())
            raise ValueError(
                f"the parts of the target have different classes ({found}); needed: the same ones in the same order. "
                "Take all from one domain, or bring them in order with align_labels_with_mapping."
            )

    @property
    def num_labels(self) -> int:
        """Classes of the target: those that have names, also where there is no image of the last ones."""
        named = len(self.train.class_names or ())
        return max(named, int(max(part.labels.max() for part in (self.train, self.validation, self.test))) + 1)


class Accuracies(NamedTuple):
    """Result of one fit, in eval mode; NaN where it diverged."""

    validation: float
    test: float

    @classmethod
    def of(cls, stored: Mapping[str, Any] | None) -> Accuracies | None:
        """Result that was stored; None where there is none, or something else."""
        found = stored or {}
        whole = found.keys() == set(cls._fields) and all(isinstance(value, float | int) for value in found.values())
        return cls(**found) if whole else None


@dataclass(frozen=True)
class LearningCurves:
    """Test accuracies of every arm on one grid.

    Attributes:
        sample_sizes: Labelled target samples, increasing.
        seeds: Attack seeds: subset, head, scratch initialisation and batch order.
        accuracies: Arm name to [seeds, sizes], fractions.
        learning_rates: Arm name to the chosen rates (or other tuned values of the attack), [seeds, sizes].
        fits: Number of fits the curves rest on.
        diverged: Names of the arms that diverged at every value at some size and seed: they measure nothing.
    """

    sample_sizes: tuple[int, ...]
    seeds: tuple[int, ...]
    accuracies: dict[str, list[list[float]]]
    learning_rates: dict[str, list[list[float]]]
    fits: int
    diverged: tuple[str, ...] = ()


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise ``ValueError`` unless there is a seed and none occurs twice: a repeated seed is no second measurement."""
    if not len(seeds) or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ValueError(
            f"seeds are {list(seeds)}; needed: at least one, none below 0, each of them once, such as 0 1 2."
        )


class _Point(NamedTuple):
    arm: Arm
    size: int
    seed: int


def sample_wise_learning_curves(
    arms: Sequence[Arm],
    data: AttackData,
    sample_sizes: Sequence[int],
    seeds: Sequence[int] = (0, 1, 2),
    protocol: FineTuneProtocol | None = None,
    cache_dir: str | Path | None = None,
    jobs: int | None = None,
    together: int | None = None,
) -> LearningCurves:
    """Attack every arm with nested subsets of the target and measure test accuracy.

    One protocol and one grid for all starts of an attack. Per arm, size and seed, the learning rate (or whatever the
    attack tunes) is the one with the best validation accuracy, on ties the one that was tried first: the lower one, or
    the first seed's choice. To save fits, the grid is tried with the first seed, and with another one only if its
    validation accuracy at the first one's choice is lower by more than :data:`RETUNE_MARGIN`: an attacker who is
    disappointed tries on. A grid of rates whose highest is the
    best is extended, by the same rule for all arms (see :class:`FineTuneProtocol`). Accuracies are those of the last
    step.

    Processes that call this with the same arguments and one ``cache_dir``, such as those that `accelerate launch`
    starts on one or several machines, share the fits out among them, and each returns the whole. They talk through
    that folder alone: one that dies holds nobody up, and its fits are taken over.

    Args:
        arms: Starting points and attacks, each with a name of its own, see
            :func:`~hf_ntp.evaluation.arms.standard_arms`.
        data: Target data of the attacker.
        sample_sizes: Strictly increasing, at most ``len(data.train)``.
        seeds: Attack seeds; three are the minimum for an interval worth showing.
        protocol: How to fine-tune; defaults of :class:`FineTuneProtocol`.
        cache_dir: Where finished fits are kept; None keeps nothing, and shares nothing with other processes. Fits of
            an attack of your own are done anew when the code of its class changes; what that calls is not looked at.
        jobs: Fits at a time in this process; default one per core that it has, or one where an accelerator does the
            work. More of them share it, each in a process of its own.
        together: Fits of like attacks and one architecture that are trained as one model, at most (`torch.func.vmap`);
            default one on CPUs, which gain nothing, and as many as have 20 million weights, at most 32, on an
            accelerator, which small models leave mostly idle. Their results are those of single fits up to rounding.

    Raises:
        ValueError: For attacks with a head that cannot name the target's classes, for sizes that are unsorted,
            repeated, below 2 or larger than the set, for arms of one name, for ``jobs`` and ``together`` below 1, and
            for several launched processes without ``cache_dir``: each would do all fits.
        RuntimeError: If a fit fails; says which.
    """
    protocol = protocol or FineTuneProtocol()
    check_seeds(seeds)
    if len({arm.name for arm in arms}) < len(arms):
        raise ValueError(f"arms are {[arm.name for arm in arms]}; needed: a name of its own for each.")
    if cache_dir is None and _launched("WORLD_SIZE", 1) > 1:
        raise ValueError(
            f"{_launched('WORLD_SIZE', 1)} processes were launched and cache_dir is None; needed: a folder that all "
            "of them see, or each would do all fits. Pass cache_dir, or start one process."
        )
    if len(sample_sizes) and min(sample_sizes) < 2:
        raise ValueError(
            f"sample_sizes are {list(sample_sizes)}; needed: two images or more, or there is nothing to tell apart."
        )
    subsets = {int(seed): nested_subsets(data.train.labels, sample_sizes, int(seed)) for seed in seeds}
    # As plain integers, whatever they came as: they become part of keys.
    seeds, sample_sizes = list(subsets), list(next(iter(subsets.values())))
    arms = [replace(arm, checkpoint=local_folder(arm.checkpoint)) for arm in arms]
    with_head = [arm for arm in arms if arm.attack.uses_head and not arm.random_init]
    for one in {arm.checkpoint: arm for arm in with_head}.values():
        model = load_start(one, seed=0)
        for arm in [arm for arm in with_head if arm.checkpoint == one.checkpoint]:
            if reason := arm.attack.unsuitable(model, data.num_labels):
                raise ValueError(f"arm {arm.name!r}: {reason}; needed: an attack that puts a new head on it.")
    run = _Sweep(subsets, data, protocol, ResultCache(cache_dir), jobs, together)
    results: dict[Fit, Accuracies] = {}
    best: dict[_Point, float] = {}

    def add(fits: list[Fit], title: str) -> None:
        if fits:
            results.update(run(fits, title))

    def tune(points: Sequence[_Point], title: str) -> None:
        # Values tried so far, best first.
        known = {point: [fit.value for fit in results if fit[:3] == point] for point in points}
        for extension in range(protocol.extensions + 1):
            tried = {point: _next_values(point.arm.attack, protocol, extension, known[point]) for point in points}
            fits = [Fit(*point, value) for point, values in tried.items() for value in values]
            add(fits, f"{title}, rates added {extension} times" if extension else title)
            for point, values in known.items():
                values += tried[point]
                # Stable, also when reversed: a tie does not replace what was tried before.
                values.sort(key=lambda value: _rank(results[Fit(*point, value)].validation), reverse=True)
        best.update({point: values[0] for point, values in known.items()})

    first, *others = seeds
    # Large fits first, so that no core is left with a long one at the end.
    points = [_Point(arm, size, first) for size in sorted(sample_sizes, reverse=True) for arm in arms]
    tune(points, "tuning")
    fits = [Fit(*point._replace(seed=seed), best[point]) for point in points for seed in others]
    add(fits, "other seeds")
    best.update({_Point(*fit[:3]): fit.value for fit in fits})
    again = []
    for fit in fits:
        wanted = results[fit._replace(seed=first)].validation - RETUNE_MARGIN
        if not results[fit].validation >= wanted:  # also where it diverged
            again.append(_Point(*fit[:3]))
    tune(again, "tuning again")
    chosen = {point: results[Fit(*point, value)].test for point, value in best.items()}
    accuracies = {arm.name: [[chosen[_Point(arm, n, seed)] for n in sample_sizes] for seed in seeds] for arm in arms}
    return LearningCurves(
        tuple(sample_sizes),
        tuple(seeds),
        accuracies,
        {arm.name: [[best[_Point(arm, n, seed)] for n in sample_sizes] for seed in seeds] for arm in arms},
        len(results),
        tuple(name for name, rows in accuracies.items() if np.isnan(rows).any()),
    )


def _next_values(attack: Attack, protocol: FineTuneProtocol, extension: int, known: Sequence[float]) -> list[float]:
    """Values to try: first the grid, then what extends it while the best of the ``known``, the first, is its highest.

    A seed that tunes again knows a value far above the grid, of the first seed: it skips none on the way there.
    """
    grid = [value for value in sorted(attack.grid(protocol.extended(extension))) if value not in known]
    if extension == 0:
        return grid
    before = attack.grid(protocol.extended(extension - 1))
    return [value for value in grid if value > known[0]] if known[0] >= max(before) else []


def _rank(validation: float) -> float:
    """What the tuned value is chosen by: a fit that diverged is worse than any other."""
    return -1.0 if math.isnan(validation) else validation


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
        together: int | None,
    ) -> None:
        if together is not None and together < 1:
            raise ValueError(f"together is {together}; needed: at least 1, the number of fits trained as one.")
        if jobs is not None and jobs < 1:
            raise ValueError(
                f"jobs is {jobs}; needed: at least 1, the number of fits at a time, or None for a default."
            )
        self.together = together
        self.subsets, self.data, self.protocol, self.cache = subsets, data, protocol, cache
        cores = max(1, joblib.cpu_count() // _launched("LOCAL_WORLD_SIZE", 1))
        self.jobs = jobs or (1 if torch.accelerator.is_available() else cores)
        self.describe = Describer(data, protocol)
        self.claims = Claims(cache.folder)

    def __call__(self, fits: Sequence[Fit], title: str) -> dict[Fit, Accuracies]:
        keys = {fit: self.describe(fit) for fit in fits}
        fits = list(keys)
        results: dict[Fit, Accuracies] = {}

        def look() -> None:
            """Note what is in the cache, whoever fitted it."""
            for fit in fits:
                if fit not in results and (found := Accuracies.of(self.cache.get(keys[fit]))):
                    results[fit] = found

        def claimed(fit: Fit) -> bool:
            if fit in results or not self.claims.take(keys[fit]):
                return False
            if found := Accuracies.of(self.cache.get(keys[fit])):  # finished since the last look
                results[fit] = found
                self.claims.release(keys[fit])
                return False
            return True

        def mine() -> Iterator[list[Fit]]:
            """Claim one fit after another, or several that are trained as one, each when there is a job for it."""
            for batch in self._batches(fits):
                if ours := [fit for fit in batch if claimed(fit)]:
                    yield ours

        look()
        # One bar per machine; fits that others finish count, so that the time left is true.
        bar = tqdm(
            total=len(fits), initial=len(results), desc=title, unit="fit", disable=_launched("LOCAL_RANK", 0) > 0
        )
        with bar, self.claims.kept_alive():
            while len(results) < len(fits):
                for finished in self._run(mine()):
                    for fit, result in finished.items():
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

    def _batches(self, fits: Sequence[Fit]) -> list[list[Fit]]:
        """Divide fits into those that are trained as one."""
        most = {arm: self._most_together(arm) for arm in dict.fromkeys(fit.arm for fit in fits)}
        alike: dict[Hashable, list[Fit]] = {}
        for fit in fits:
            kind: Hashable = fit
            if most[fit.arm] > 1:
                size = min(fit.size, self.protocol.batch_size) if self.describe.has_batch_norm(fit.arm) else None
                attack = fit.arm.attack
                kind = type(attack), attack.joint_key(), self.describe.forward(fit.arm), size
            alike.setdefault(kind, []).append(fit)
        batches = []
        for group in alike.values():
            size = most[group[0].arm]
            batches += [group[begin : begin + size] for begin in range(0, len(group), size)]
        return batches

    def _most_together(self, arm: Arm) -> int:
        if arm.attack.joint_key() is None or self.describe.has_dropout(arm):  # which each draws from a seed of its own
            return 1
        if self.together is not None or not torch.accelerator.is_available():
            return self.together or 1
        return max(1, min(_MOST_TOGETHER, _WEIGHTS_TOGETHER // self.describe.weights(arm)))

    def _run(self, fits: Iterator[list[Fit]]) -> Iterator[dict[Fit, Accuracies]]:
        work = (
            joblib.delayed(_run)(some, [self.subsets[f.seed][f.size] for f in some], self.data, self.protocol)
            for some in fits
        )
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
    """Load the arm's checkpoint, or initialise its architecture, in float32; what it lacks is drawn with ``seed``."""
    torch.manual_seed(seed)
    return load_model(arm.checkpoint, random_init=arm.random_init)


def _run(
    fits: Sequence[Fit], rows: Sequence[np.ndarray], data: AttackData, protocol: FineTuneProtocol
) -> dict[Fit, Accuracies]:
    """Run fits that can be trained as one as such, or if that fails (vmap, memory) one after another."""
    if len(fits) > 1:
        try:
            return dict(zip(fits, _fit(fits, rows, data, protocol), strict=True))
        except RuntimeError as error:
            logger.warning("Cannot train %d fits as one, and fit one after another: %s", len(fits), error)
    results = {}
    for fit, own in zip(fits, rows, strict=True):
        try:
            results[fit] = _fit([fit], [own], data, protocol)[0]
        except Exception as error:
            raise RuntimeError(f"the fit of {fit} failed ({type(error).__name__}: {error})") from error
    return results


def _fit(
    fits: Sequence[Fit], rows: Sequence[np.ndarray], data: AttackData, protocol: FineTuneProtocol
) -> list[Accuracies]:
    attack = fits[0].arm.attack
    with _quick_and_quiet():
        starts: dict[tuple[Arm, int], PreTrainedModel] = {}
        models = []
        for fit in fits:
            start = starts.get((fit.arm, fit.seed))
            models.append(_load(fit) if start is None else copy.deepcopy(start))
            starts.setdefault((fit.arm, fit.seed), models[-1])
        source = data.source.tensors() if attack.needs_source and data.source is not None else None
        held = {(fit.seed, fit.size): data.train.tensors(own) for fit, own in zip(fits, rows, strict=True)}
        loots = [Loot(*held[fit.seed, fit.size], data.num_labels, source, data.train) for fit in fits]
        values, seeds = [fit.value for fit in fits], [fit.seed for fit in fits]
        if len(fits) == 1:
            predicts = [attack.fit(models[0], loots[0], protocol, values[0], seeds[0])]
        else:
            attacks = [fit.arm.attack for fit in fits]
            predicts = type(attack).fit_together(attacks, models, loots, protocol, values, seeds)
        return [_accuracies(each, data) for each in predicts]


def _accuracies(predict: Predict, data: AttackData) -> Accuracies:
    try:
        return Accuracies(accuracy_of(predict, data.validation), accuracy_of(predict, data.test))
    except FloatingPointError:
        return Accuracies(math.nan, math.nan)


def _load(fit: Fit) -> PreTrainedModel:
    return to_accelerator(load_start(fit.arm, fit.seed))


def to_accelerator(model: PreTrainedModel) -> PreTrainedModel:
    """Move a model, in place, to the accelerator of this process, where there is one."""
    return nn.Module.to(model, _accelerator()) if torch.accelerator.is_available() else model


def _accelerator() -> torch.device | int | None:
    """Return the current accelerator, or among several launched processes the one that belongs to this process."""
    if "LOCAL_RANK" in os.environ:
        return _launched("LOCAL_RANK", 0) % torch.accelerator.device_count()
    return torch.accelerator.current_accelerator()


def accuracy_of(predict: Predict, data: PixelDataset, batch_size: int = 256) -> float:
    """Share of images classified correctly by ``predict``."""
    hits = [predict(images) == labels for images, labels in data.batches(batch_size)]
    return float(torch.cat(hits).float().mean())
