"""The numbers of a run: `results.json`, and the table of it that a person can read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..data import DomainReference
from ..evaluation.measure import Measurement, SourceAccuracy, Transfer
from ..evaluation.summary import retained, summarize
from ..evaluation.utility import SourceUtility
from .card import ARM_LABELS
from .evidence import measured_sources, measured_targets
from .strict_json import strict_json
from .wording import interval, percent

RESULTS_FILE = "results.json"


def build_results(
    source: DomainReference,
    target: DomainReference,
    measured: Measurement,
    seconds: Mapping[str, float],
    target_access: str = "labelled",
    other_sources: Sequence[tuple[DomainReference, SourceAccuracy, SourceUtility | None]] = (),
    other_targets: Sequence[tuple[DomainReference, Transfer]] = (),
    third: tuple[DomainReference, Transfer] | None = None,
) -> dict[str, Any]:
    """Content of ``results.json``.

    Args:
        source: Authorized domain.
        target: Unauthorized domain.
        measured: What :func:`~hf_ntp.measure_protection` found.
        seconds: Wall time of "pretrain", "protect" and "evaluate".
        target_access: What the protection knew of the target, see :class:`~hf_ntp.NTPConfig`.
        other_sources: Authorized domains beside ``source``.
        other_targets: Unauthorized domains beside ``target``.
        third: A domain that is neither: what the protection did to uses that nobody has forbidden.
    """
    transfer = Transfer(measured.curves, measured.convergence, measured.protocol)
    results = {
        "source": _source_results(source, measured.accuracy, measured.utility),
        **_target_results(target, transfer, target_access),
        "sparsity": measured.sparsity.achieved,
        "sparsity_details": asdict(measured.sparsity),
        "seconds": dict(seconds),
    }
    if other_sources:
        results["other_sources"] = [_source_results(*found) for found in other_sources]
    if other_targets:
        results["other_targets"] = [_target_results(*found, target_access) for found in other_targets]
    if third is not None:
        results["third"] = _target_results(*third, "none")
    return results


def _source_results(
    domain: DomainReference, accuracy: SourceAccuracy, utility: SourceUtility | None
) -> dict[str, Any]:
    return {
        "domain": domain.name,
        "dataset": domain.dataset,
        "accuracy_before": accuracy.before,
        "accuracy_after": accuracy.after,
        "test_images": accuracy.images,
        "measure": accuracy.measure,
        **({} if utility is None else {"knn_before": utility.before.knn, "knn_after": utility.after.knn}),
    }


def _target_results(domain: DomainReference, measured: Transfer, access: str) -> dict[str, Any]:
    curves, areas = measured.curves, summarize(measured.curves)
    return {
        "target": {"domain": domain.name, "dataset": domain.dataset, "access": access},
        "slc": {
            "sample_sizes": list(curves.sample_sizes),
            "seeds": list(curves.seeds),
            "curves": curves.accuracies,
            "learning_rates": curves.learning_rates,
            "protocol": {**asdict(measured.protocol), "learning_rates": list(measured.protocol.learning_rates)},
            "scratch_convergence": asdict(measured.convergence),
        },
        "slc_auc": areas,
        "retained_transfer": {
            "mask": retained(areas, "protected_mask"),
            "dense": retained(areas, "protected_dense"),
        },
    }


def read_results(folder: str | Path) -> dict[str, Any]:
    """Content of the ``results.json`` of a result folder.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is not what a recipe writes: :func:`results_table` could not show it.
    """
    path = Path(folder) / RESULTS_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no {RESULTS_FILE}; needed: the folder that recipes/ntp_vit.py writes at its end."
        )
    try:
        results = strict_json(path.read_bytes())
        results_table(results)
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}: {str(error)[:200]}); needed: the file as the recipe "
            "wrote it. Restore it, or run the recipe again."
        ) from error
    return results


_ACCURACY = (("accuracy", "accuracy"),)
_PROBES = (("linear probe", "accuracy"), ("nearest neighbours", "knn"))


def results_table(results: Mapping[str, Any]) -> str:
    """Return the figures of a run as a table that a person can read."""
    lines = [
        f"authorized    {source['domain']}: {name} {source[f'{key}_before']:.3f} before, "
        f"{source[f'{key}_after']:.3f} after ({source['test_images']} test images)"
        for source in measured_sources(results)
        for name, key in (_PROBES if "knn_before" in source else _ACCURACY)
    ]
    lines.append(
        f"sparsity      {results['sparsity']:.4f} of {results['sparsity_details']['prunable_weights']:,} weights"
    )
    parts = [("unauthorized", found) for found in measured_targets(results)]
    parts += [("third domain", results["third"])] if "third" in results else []
    for kind, found in parts:
        lines += _curves_table(kind, found)
    return "\n".join([*lines, "", "SLC-AUC normalized: mean accuracy gap to scratch; above 0 the checkpoint helps."])


def _curves_table(kind: str, found: Mapping[str, Any]) -> list[str]:
    slc = found["slc"]
    lines = [
        f"{kind:<14}{found['target']['domain']}: mean test accuracy of {len(slc['seeds'])} seeds after "
        "fine-tuning on n labelled images",
        "",
        _row("start", [f"n={size}" for size in slc["sample_sizes"]], "SLC-AUC", "95 % interval", "retained"),
    ]
    for arm, accuracies in slc["curves"].items():
        means = [sum(column) / len(column) for column in zip(*accuracies, strict=True)]
        area = found["slc_auc"].get(arm)
        share = found["retained_transfer"].get(arm.removeprefix("protected_"))
        lines.append(
            _row(
                ARM_LABELS.get(arm, arm),
                [f"{mean:.3f}" for mean in means],
                f"{area['normalized']:+.3f}" if area else "",
                interval(area["ci"]["normalized"]) if area else "",
                percent(share),
            )
        )
    return lines


def _row(label: str, cells: Sequence[str], area: str, bounds: str, share: str) -> str:
    return f"{label:<30}" + "".join(f"{cell:>8}" for cell in cells) + f"{area:>10}{bounds:>18}{share:>10}"
