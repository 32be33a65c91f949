"""The numbers of a run (`results.json`) and the folder that is published."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..data import DomainReference
from ..evaluation.measure import Measurement
from ..evaluation.summary import retained, summarize
from .card import ARM_LABELS, render_card
from .figure import plot_learning_curves
from .record import SCHEMA_VERSION, weight_digests, write_record

RESULTS_FILE = "results.json"

# What the standard comparison does not show, whatever it finds.
NOT_TESTED = (
    "Attackers other than AdamW fine-tuning with a fresh head: parameter-efficient tuning (LoRA), linear probes, "
    "other optimizers and learning rates, longer training, re-initialised layers or norms, distillation.",
    "More labelled unauthorized images than the largest size of the curve.",
    "Domains other than the ones named here. Protection is not a ban on other uses, and no claim is made about them.",
    "Protection of the weights against copying or of the model's outputs against imitation.",
)


def build_results(
    source: DomainReference, target: DomainReference, measured: Measurement, seconds: Mapping[str, float]
) -> dict[str, Any]:
    """Content of ``results.json``.

    Args:
        source: Authorized domain.
        target: Unauthorized domain.
        measured: What :func:`~hf_ntp.measure_protection` found.
        seconds: Wall time of "pretrain", "protect" and "evaluate".
    """
    curves, areas = measured.curves, summarize(measured.curves)
    return {
        "source": {
            "domain": source.name,
            "dataset": source.dataset,
            "accuracy_before": measured.accuracy.before,
            "accuracy_after": measured.accuracy.after,
            "test_images": measured.accuracy.images,
        },
        "target": {"domain": target.name, "dataset": target.dataset},
        "sparsity": measured.sparsity.achieved,
        "sparsity_details": asdict(measured.sparsity),
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
        "seconds": dict(seconds),
    }


def build_record(
    results: Mapping[str, Any],
    source: DomainReference,
    target: DomainReference,
    base_model: Mapping[str, Any],
    weights: Mapping[str, str],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Authorization record of a run, see ``authorization.schema.json``.

    Args:
        results: Content of ``results.json``.
        source: Authorized domain.
        target: Unauthorized domain.
        base_model: "name" (Hub id or None) and "weights" (digest of every file).
        weights: Digest of every weight file.
        settings: Everything that determined the run.
    """
    slc = results["slc"]
    return {
        "schema_version": SCHEMA_VERSION,
        "library": {"name": "hf_ntp", "version": version("hf-ntp")},
        "base_model": dict(base_model),
        "weights": dict(weights),
        "authorized_domains": [source.for_record()],
        "unauthorized_domains": [target.for_record()],
        "method": {"name": "non-transferable-pruning", "settings": dict(settings)},
        "sparsity": results["sparsity_details"],
        "source_accuracy": {
            "before": results["source"]["accuracy_before"],
            "after": results["source"]["accuracy_after"],
            "images": results["source"]["test_images"],
        },
        "evidence": {
            **{key: slc[key] for key in ("sample_sizes", "seeds", "protocol", "scratch_convergence")},
            "slc_auc": results["slc_auc"],
            "retained_transfer": results["retained_transfer"],
        },
        "not_tested": list(NOT_TESTED),
    }


def write_report(
    folder: str | Path,
    results: Mapping[str, Any],
    source: DomainReference,
    target: DomainReference,
    base_model: Mapping[str, Any],
    settings: Mapping[str, Any],
    repo_id: str = "path/to/this/folder",
    license: str = "other",
) -> None:
    """Write results, figure, authorization record and model card beside the weights of a protected model.

    Args:
        folder: Folder that holds the saved model.
        results: See :func:`build_results`.
        source: Authorized domain.
        target: Unauthorized domain.
        base_model: See :func:`build_record`.
        settings: Options of the method.
        repo_id: What the card tells users to pass to ``from_pretrained``.
        license: Licence id for the card.
    """
    folder = Path(folder)
    record = build_record(results, source, target, base_model, weight_digests(folder), settings)
    (folder / RESULTS_FILE).write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
    plot_learning_curves(results, folder / "slc.png")
    write_record(folder, record)
    render_card(results, record, repo_id, license).save(folder / "README.md")


def read_results(folder: str | Path) -> dict[str, Any]:
    """Content of the ``results.json`` of a result folder."""
    return json.loads((Path(folder) / RESULTS_FILE).read_text())


def results_table(results: Mapping[str, Any]) -> str:
    """Return the figures of a run as a table that a person can read."""
    source, slc = results["source"], results["slc"]
    lines = [
        f"authorized    {source['domain']}: accuracy {source['accuracy_before']:.3f} before, "
        f"{source['accuracy_after']:.3f} after ({source['test_images']} test images)",
        f"sparsity      {results['sparsity']:.4f} of {results['sparsity_details']['prunable_weights']:,} weights",
        f"unauthorized  {results['target']['domain']}: mean test accuracy of {len(slc['seeds'])} seeds after "
        "fine-tuning on n labelled images",
        "",
        _row("start", [f"n={size}" for size in slc["sample_sizes"]], "SLC-AUC", "95 % interval", "retained"),
    ]
    for arm, accuracies in slc["curves"].items():
        means = [sum(column) / len(column) for column in zip(*accuracies, strict=True)]
        area = results["slc_auc"].get(arm)
        share = results["retained_transfer"].get(arm.removeprefix("protected_"))
        lines.append(
            _row(
                ARM_LABELS.get(arm, arm),
                [f"{mean:.3f}" for mean in means],
                f"{area['normalized']:+.3f}" if area else "",
                "[{:+.3f}, {:+.3f}]".format(*area["ci"]["normalized"])
                if area and area["ci"]["normalized"][0] is not None
                else "",
                f"{100 * share:.0f} %" if share is not None else "",
            )
        )
    return "\n".join([*lines, "", "SLC-AUC normalized: mean accuracy gap to scratch; above 0 the checkpoint helps."])


def _row(label: str, cells: Sequence[str], area: str, interval: str, share: str) -> str:
    return f"{label:<30}" + "".join(f"{cell:>8}" for cell in cells) + f"{area:>10}{interval:>18}{share:>10}"
