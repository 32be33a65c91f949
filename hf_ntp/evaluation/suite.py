"""Many attacks on one protected model, next to the same attacks on the unprotected one and on controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel

from ..attacks import ATTACKS, Attack, FineTuneProtocol, FineTuning
from ..functional import check_sample_sizes
from ..models import class_names, has_head
from .arms import Arm
from .fits import NOT_ARCHITECTURE
from .runner import AttackData, LearningCurves, load_start, sample_wise_learning_curves
from .summary import retained_share, summarize

_REFERENCE = "dense"
DIVERGED = (
    "the fit diverged at every value of its grid at some size and seed: no measurement, and no sign of "
    "protection. Lower the learning rates"
)
"""Reason why an attack is listed as not run."""


def baseline_of(attack: Attack) -> Attack:
    """What an attack is compared with when it begins at random weights: training with the same images and steps.

    That is fine-tuning of all weights with AdamW, as many steps as the attack takes; for an attack that has authorized
    images, the attack itself, or what these images are worth to anybody would count as what the checkpoint is worth.
    """
    return attack if attack.needs_source else FineTuning(longer=attack.longer if isinstance(attack, FineTuning) else 1)


def check_suite(starts: Mapping[str, str], attacks: Sequence[str], sample_sizes: Sequence[int]) -> None:
    """Raise ``ValueError`` for what :func:`run_attacks` cannot run, whatever the images."""
    check_sample_sizes(sample_sizes)
    if unknown := sorted(set(attacks) - ATTACKS.keys()):
        raise ValueError(f"attacks are {unknown}; needed: names among {', '.join(ATTACKS)}.")
    if "protected" not in starts or "scratch" in starts or any("/" in start for start in starts) or not attacks:
        raise ValueError(
            f"starts are {list(starts)} and attacks {list(attacks)}; needed: one start called 'protected', none "
            "called 'scratch' (it is added), none with a slash, and at least one attack."
        )
    check_same_architecture(starts)


def run_attacks(
    starts: Mapping[str, str],
    data: AttackData,
    attacks: Sequence[str],
    sample_sizes: Sequence[int],
    seeds: Sequence[int] = (0, 1, 2),
    protocol: FineTuneProtocol | None = None,
    cache_dir: str | Path | None = None,
    jobs: int | None = None,
) -> dict[str, Any]:
    """Run attacks on several starting points and summarise them; JSON-ready.

    Every curve is compared with scratch training of the same architecture under the same protocol, on the same images,
    authorized ones of the attacker included (SLC-AUC, see :func:`baseline_of`), and with the unprotected model under
    the same attack (retained transfer).

    Args:
        starts: Checkpoints by name: "protected", "unprotected" where there is one, and any controls. All must have one
            architecture.
        data: Target data that the protection has not seen.
        attacks: Names in :data:`hf_ntp.ATTACKS`.
        sample_sizes: Sizes of the learning curves.
        seeds: Attack seeds.
        protocol: Budget of every attack.
        cache_dir: Where finished fits are kept.
        jobs: Processes.

    Returns:
        "sample_sizes", "seeds", "protocol", "scratch" (curve by number of steps, and by name of the attack where that
        begins with authorized images), "starts" (start to attack to "accuracies" [seeds][sizes], "tuned"
        [seeds][sizes] and areas in three units with intervals), "retained_transfer" (start to attack to share, null
        where the unprotected model was worth less than 0.01), "worst_case" (start to "attack", the one with the
        largest area, its "slc_auc", and "retained_transfer": that area over the largest one of the unprotected model
        to who has authorized images, too, or has none, either) and "not_run" (start to attack to reason). Where a
        tuned value is the first or last of its grid with all extensions, "at_edge" of the attack counts the points of
        the curve, all seeds together.

    Raises:
        ValueError: For unknown attacks or starts that miss "protected".
        FloatingPointError: If scratch training diverges, or plain fine-tuning of the unprotected model, or every
            attack on the protected one: there would be nothing to compare with.
    """
    check_suite(starts, attacks, sample_sizes)
    protocol = protocol or FineTuneProtocol()
    not_run = {start: _unsuitable(Arm(start, path), attacks, data) for start, path in starts.items()}
    arms = [
        Arm(f"{start}/{name}", path, attack=ATTACKS[name])
        for start, path in starts.items()
        for name in dict.fromkeys((_REFERENCE, *attacks) if start == "unprotected" else attacks)
        if name not in not_run[start]
    ]
    baselines = {_baseline_key(arm, protocol): baseline_of(arm.attack) for arm in arms}
    if not set(attacks) - not_run["protected"].keys():
        raise ValueError(
            f"none of the attacks can run on {starts['protected']}: {not_run['protected']}. Choose others, or give "
            "what they lack (authorized data: source_dataset of the recipe, source of AttackData)."
        )
    arms += [
        Arm(f"scratch/{key}", starts["protected"], random_init=True, attack=attack)
        for key, attack in baselines.items()
    ]
    curves = sample_wise_learning_curves(arms, data, sample_sizes, seeds, protocol, cache_dir, jobs)
    for arm in [arm for arm in arms if arm.name in curves.diverged]:
        start, _, name = arm.name.partition("/")
        if start == "scratch" or (start, name) == ("unprotected", _REFERENCE):
            raise FloatingPointError(f"{arm.name}: {DIVERGED}")
        not_run[start][name] = DIVERGED
        arms.remove(arm)
    if not any(arm.name.startswith("protected/") for arm in arms):
        raise FloatingPointError(f"{', '.join(curves.diverged)}: {DIVERGED}")
    return {
        "sample_sizes": list(curves.sample_sizes),
        "seeds": list(curves.seeds),
        "protocol": asdict(protocol),
        "fits": curves.fits,
        **_summaries(arms, curves, protocol),
        "not_run": not_run,
    }


def _baseline_key(arm: Arm, protocol: FineTuneProtocol) -> str:
    """Key of the scratch curve that an arm "start/attack" is compared with: its number of steps, or the attack."""
    baseline = baseline_of(arm.attack)
    if isinstance(baseline, FineTuning):
        return str(baseline.longer * protocol.steps)
    return arm.name.partition("/")[2]


def _unsuitable(arm: Arm, attacks: Sequence[str], data: AttackData) -> dict[str, str]:
    without_source = [name for name in attacks if ATTACKS[name].needs_source and data.source is None]
    reasons = dict.fromkeys(without_source, "no authorized data was given")
    model = load_start(arm, seed=0)
    of_the_head, of_the_source = _other_classes(model, data), _other_source(model, data)
    for name in attacks:
        attack = ATTACKS[name]
        reason = (
            attack.unsuitable(model, data.num_labels)
            or (of_the_head if attack.uses_head else None)
            or (of_the_source if attack.needs_source else None)
        )
        if reason:
            reasons[name] = reason
    return reasons


def _other_classes(model: PreTrainedModel, data: AttackData) -> str | None:
    """Say so where the target has other classes than the head, or the same in another order."""
    return _other_names(class_names(model.config), data.train.class_names, "the target's")


def _other_names(names: Sequence[str] | None, others: Sequence[str] | None, whose: str) -> str | None:
    if not names or not others or list(names) == list(others):
        return None
    found = f"the head's classes are {', '.join(names[:6])}, {whose} {', '.join(others[:6])}"
    if sorted(names) == sorted(others):
        found += ": align_labels_with_mapping(model.config.label2id, 'label') brings them into the head's order"
    return found


def _other_source(model: PreTrainedModel, data: AttackData) -> str | None:
    """Say so where the labels of the authorized images cannot be those of the head."""
    if data.source is None or not has_head(model):
        return None
    if data.source.labels.max() >= model.config.num_labels:
        largest = data.source.labels.max()
        return f"authorized images have labels up to {largest}, the head {model.config.num_labels} classes"
    names, found = class_names(model.config), data.source.class_names
    same = sorted(names or ()) == sorted(found or ())  # others may be theirs in another spelling
    return _other_names(names, found, "the authorized images'") if same else None


def _summaries(arms: Sequence[Arm], curves: LearningCurves, protocol: FineTuneProtocol) -> dict[str, Any]:
    scratch: dict[str, Any] = {}
    starts: dict[str, dict[str, Any]] = {}
    for arm in arms:
        start, _, name = arm.name.partition("/")
        accuracies, tuned = curves.accuracies[arm.name], curves.learning_rates[arm.name]
        if start == "scratch":
            scratch[name] = {"accuracies": accuracies, "tuned": tuned}
            continue
        reference = curves.accuracies[f"scratch/{_baseline_key(arm, protocol)}"]
        pair = LearningCurves(curves.sample_sizes, curves.seeds, {"scratch": reference, "it": accuracies}, {}, 0)
        grid = arm.attack.grid(protocol.extended(protocol.extensions))
        edge = sum(value in (min(grid), max(grid)) for row in tuned for value in row) if len(grid) > 2 else 0
        starts.setdefault(start, {})[name] = {
            "accuracies": accuracies,
            "tuned": tuned,
            "at_edge": edge,
            **summarize(pair)["it"],
        }
    areas = {start: {name: entry["normalized"] for name, entry in found.items()} for start, found in starts.items()}
    unprotected, against = areas.get("unprotected", {}), areas["protected"]
    # The best of as many attacks as there are against the protected model: more would flatter the protection.
    counterparts = {name if name in unprotected else _REFERENCE for name in against}
    compared = {
        start: {name: area for name, area in found.items() if start != "unprotected" or name in counterparts}
        for start, found in areas.items()
    }

    def share(name: str, area: float) -> float | None:
        # Authorized images are worth something by themselves: who has them is compared with who has them.
        same = ATTACKS[name].needs_source
        among = {
            other: of for other, of in compared.get("unprotected", {}).items() if ATTACKS[other].needs_source == same
        }
        return retained_share(area, max(among.values(), default=unprotected.get(_REFERENCE, float("nan"))))

    worst = {start: max(found, key=found.__getitem__) for start, found in compared.items()}
    return {
        "scratch": scratch,
        "starts": starts,
        "retained_transfer": {
            start: {
                # Where an attack does not apply to the unprotected model (it has no mask), plain fine-tuning does.
                name: retained_share(area, unprotected.get(name, unprotected.get(_REFERENCE, float("nan"))))
                for name, area in found.items()
            }
            for start, found in areas.items()
            if start != "unprotected"
        },
        "worst_case": {
            start: {
                "attack": name,
                "slc_auc": areas[start][name],
                "retained_transfer": share(name, areas[start][name]),
            }
            for start, name in worst.items()
        },
    }


# Trainer notes problem_type when it computes a loss; weights that are stored without zeros are the same weights; the
# configuration of a LeViT adds to down_ops whenever one is made.
_NO_SHAPE = (*NOT_ARCHITECTURE, "dtype", "architectures", "problem_type", "quantization_config", "down_ops")


def _shape(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a configuration, and of those in it, decides the sizes and the computation of a model."""
    return {
        key: _shape(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _NO_SHAPE
    }


def check_same_architecture(starts: Mapping[str, str]) -> None:
    """Raise ``ValueError`` unless all checkpoints are of one model type with equal sizes."""
    shapes = {start: _shape(AutoConfig.from_pretrained(path).to_dict()) for start, path in starts.items()}
    first, *others = shapes
    for other in others:
        if differing := [key for key in shapes[first] if shapes[first][key] != shapes[other].get(key)]:
            raise ValueError(
                f"{starts[first]} and {starts[other]} differ in {', '.join(differing[:6])}; needed: checkpoints of "
                "one architecture, or their curves are not comparable."
            )
