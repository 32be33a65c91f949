"""The model card: metadata for the Hub and the rendered template of `model_cards/`."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

ARM_LABELS = {
    "unprotected": "before protection",
    "protected_mask": "protected, mask kept",
    "protected_dense": "protected, all weights tuned",
}


def template_path() -> str:
    """Path of the card template."""
    return str(files("hf_ntp.model_cards").joinpath("protected_model.md"))


def card_data(results: Mapping[str, Any], name: str, license: str, base_model: str | None) -> ModelCardData:
    """Card metadata with a model-index of the measured figures.

    Args:
        results: Content of ``results.json``.
        name: Model name in the model-index.
        license: SPDX id of the licence, as the Hub spells it.
        base_model: Hub id, or None for a model trained in the run.
    """
    source, target = results["source"]["domain"], results["target"]["domain"]

    def result(domain: str, metric: str, label: str, value: float) -> EvalResult:
        return EvalResult(
            task_type="image-classification",
            dataset_type=domain,
            dataset_name=domain,
            metric_type=metric,
            metric_name=label,
            metric_value=round(value, 4),
        )

    evaluations = [result(source, "accuracy", "Accuracy (authorized)", results["source"]["accuracy_after"])]
    evaluations += [
        result(target, "slc_auc", f"SLC-AUC normalized, {ARM_LABELS[arm]}", area["normalized"])
        for arm, area in results["slc_auc"].items()
    ]
    return ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="image-classification",
        base_model=base_model,
        datasets=[domain for domain in (results["source"]["dataset"], results["target"]["dataset"]) if "/" in domain]
        or None,
        tags=["non-transferable-pruning", "hf_ntp"],
        model_name=name,
        eval_results=evaluations,
    )


def render_card(
    results: Mapping[str, Any],
    record: Mapping[str, Any],
    repo_id: str = "path/to/this/folder",
    license: str = "other",
) -> ModelCard:
    """Render the card of a protected model.

    Args:
        results: Content of ``results.json``.
        record: Authorization record.
        repo_id: What users pass to ``from_pretrained``.
        license: Licence id for the metadata.
    """
    rows = [
        {
            "label": ARM_LABELS[arm],
            "area": area,
            "retained": _retained(results["retained_transfer"], arm),
        }
        for arm, area in results["slc_auc"].items()
    ]
    return ModelCard.from_template(
        card_data(results, repo_id.rpartition("/")[2], license, record["base_model"]["name"]),
        template_path=template_path(),
        title=f"{results['source']['domain']} only: a protected vision encoder",
        results=results,
        record=record,
        repo_id=repo_id,
        rows=rows,
        disjoint=_disjoint(record),
        percent=lambda value: f"{100 * value:.1f} %",
        signed=lambda value: f"{value:+.3f}",
        interval=lambda bounds: "one seed" if bounds[0] is None else f"[{bounds[0]:+.3f}, {bounds[1]:+.3f}]",
    )


def _retained(shares: Mapping[str, float | None], arm: str) -> str:
    if arm == "unprotected":
        return "100 %"
    share = shares[arm.removeprefix("protected_")]
    return "no transfer to retain" if share is None else f"{100 * share:.0f} %"


def _disjoint(record: Mapping[str, Any]) -> bool:
    """Whether the record shows that owner and attacker had parts of their own of every unauthorized domain."""
    prints = [domain["fingerprint"] for domain in record["unauthorized_domains"]]
    return all({"owner", "attacker"} <= part.keys() and part["owner"] != part["attacker"] for part in prints)
