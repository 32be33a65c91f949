"""The model card: metadata for the Hub and the rendered template of `model_cards/`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .wording import domain_names, interval, percent

CARD_FILE = "README.md"
NO_REPO = "path/to/this/folder"
"""What a card tells users to load as long as no repository is known."""
ARM_LABELS = {
    "unprotected": "before protection",
    "protected_mask": "protected, mask kept",
    "protected_dense": "protected, all weights tuned",
}
MEASURES = {
    "classification": "test accuracy",
    "linear_probe": "accuracy of a linear probe",
    "knn": "accuracy of nearest neighbours",
}
"""What a record's "measure" of the authorized domain is, as readers see it."""
_ATTACK_LABELS = {
    "as_published": "used as published, without training",
    "mask_kept": "mask kept",
    "dense": "all weights tuned",
    "dense_3x": "all weights tuned, three times as long",
    "dense_sgd": "all weights tuned with SGD",
    "head_kept": "all weights tuned, from the model's own head",
    "bias_only": "biases tuned only",
    "zeros_regrown": "zeros drawn anew, all weights tuned",
    "statistics_kept": "all weights tuned, BatchNorm statistics kept",
    "all_kept": "all weights tuned, from the model's own head and BatchNorm statistics",
    "norms_reset": "norm layers reset, all weights tuned",
    "renormalized": "kernels renormalized, all weights tuned",
    "shrink_perturb": "shrunk and perturbed, all weights tuned",
    "stem_reinit": "new stem, all weights tuned",
    "first_block_reinit": "new first block, all weights tuned",
    "last_block_reinit": "new last block, all weights tuned",
    "lora": "LoRA",
    "dora": "DoRA",
    "ia3": "IA3",
    "whitened_probe": "linear probe, features whitened",
    "knn": "nearest neighbours",
    "linear_probe_statistics": "linear probe, BatchNorm statistics estimated anew",
    "source_all_kept": "authorized images first, on all weights",
    "source_all_new": "authorized images first, on all weights and a new head",
    "source_last_kept": "authorized images first, on the head",
    "source_last_new": "authorized images first, on a new head",
    "transntl": "TransNTL",
    "shot": "SHOT",
}
_ACCESS = {
    "labelled": "labelled unauthorized images",
    "unlabelled": "unauthorized images without labels (clusters stood for classes)",
    "none": "changed copies of the authorized images: the protection has seen nothing of the unauthorized domain",
}
# What stands before the lines that load the model.
_DENSE = "Load it as any other model:\n\n```python"
_COMPRESSED = (
    "Its weights are stored without their zeros, which takes the library `hf_ntp` to read:\n\n"
    "```python\nimport hf_ntp  # tells transformers how to read these weights"
)


def template_path() -> str:
    """Path of the card template."""
    return str(files("hf_ntp.model_cards").joinpath("protected_model.md"))


def attack_label(name: str) -> str:
    """Name of an attack as readers see it."""
    return _ATTACK_LABELS.get(name, name.replace("_", " "))


def card_data(record: Mapping[str, Any], name: str) -> ModelCardData:
    """Card metadata with a model-index of the measured figures.

    Args:
        record: Authorization record.
        name: Model name in the model-index.
    """
    evaluations = []
    accuracy = record["source_accuracy"]
    if accuracy is not None:
        label = f"{MEASURES[accuracy['measure']].capitalize()} (authorized)"
        authorized = {domain["name"]: domain for domain in record["authorized_domains"]}
        single = [{"domain": record["authorized_domains"][0]["name"], "after": accuracy["after"]}]
        evaluations += [
            _result(authorized[found["domain"]], "accuracy", label, found["after"])
            for found in accuracy.get("domains", single)
        ]
    domains = {domain["name"]: domain for domain in record["unauthorized_domains"]}
    areas: dict[tuple[str, str], float] = {}  # one value for one name: that of the strongest attacker
    for measurement in record["evidence"]:
        for attack, found in measurement["attacks"].items():
            area, key = found["protected"]["normalized"], (measurement["domain"], attack)
            areas[key] = max(area, areas.get(key, area))
    evaluations += [
        _result(domains[domain], "slc_auc", f"SLC-AUC normalized, {attack_label(attack)}", area)
        for (domain, attack), area in areas.items()
    ]
    every = [*record["authorized_domains"], *record["unauthorized_domains"]]
    return ModelCardData(
        license=record["terms"]["license"],
        library_name="transformers",
        pipeline_tag="image-classification" if _classifies(record) else "image-feature-extraction",
        base_model=record["base_model"]["name"],
        datasets=[domain["dataset"] for domain in every if _on_the_hub(domain["dataset"])] or None,
        tags=["non-transferable-pruning", "hf_ntp"],
        # The Hub wants results with a model name, and no name without results.
        model_name=name if evaluations else None,
        eval_results=evaluations or None,
        extra_gated_prompt=record["terms"]["text"],
    )


def _on_the_hub(dataset: str) -> bool:
    """Whether a name may be that of a dataset of somebody on the Hub, and is no path on the owner's machine."""
    with suppress(HFValidationError):
        validate_repo_id(dataset)
        return "/" in dataset and not dataset.startswith(".")
    return False


def _result(domain: Mapping[str, Any], metric: str, label: str, value: float) -> EvalResult:
    return EvalResult(
        task_type="image-classification",
        dataset_type=domain["dataset"],
        dataset_name=domain["name"],
        dataset_config=domain["config"],
        dataset_revision=domain["revision"],
        metric_type=metric,
        metric_name=label,
        metric_value=round(value, 4),
    )


def card_repo_ids(folder: str | Path) -> list[str]:
    """What the card in a folder tells users to pass to ``from_pretrained``, in order; empty where it does not say."""
    try:
        card = (Path(folder) / CARD_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{Path(folder) / CARD_FILE} is no text in UTF-8 ({error}); needed: that. Save it anew."
        ) from error
    return re.findall(r"from_pretrained\(\"([^\"]+)\"\)", card)


def compressed_card(card: str) -> str:
    """Return a card, as it was rendered or edited since, with what it takes to load weights without their zeros."""
    return card.replace(_DENSE, _COMPRESSED)


def expanded_card(card: str) -> str:
    """Undo :func:`compressed_card`."""
    return card.replace(_COMPRESSED, _DENSE)


def render_card(
    record: Mapping[str, Any],
    repo_id: str = NO_REPO,
    figures: Mapping[str, str] | None = None,
    compressed: bool = False,
    processed: bool = True,
) -> ModelCard:
    """Render the card of a protected model.

    Args:
        record: Authorization record; every number of the card is in it.
        repo_id: What users pass to ``from_pretrained``.
        figures: Pictures in the folder and what they show, the learning curves first.
        compressed: Whether the weights are stored without their zeros, which transformers alone cannot read.
        processed: Whether there is an image processor.
    """
    return ModelCard.from_template(
        card_data(record, repo_id.rpartition("/")[2]),
        template_path=template_path(),
        record=record,
        model_class=_model_class(record),
        repo_id=repo_id,
        loading=_COMPRESSED if compressed else _DENSE,
        processed=processed,
        figures=list((figures or {}).items()),
        authorized=domain_names(record["authorized_domains"]),
        unauthorized=domain_names(record["unauthorized_domains"]),
        measure=MEASURES[record["source_accuracy"]["measure"]] if record["source_accuracy"] else "",
        disjoint=_disjoint(record),
        seen=_ACCESS[_access(record)],
        by_area=lambda attacks: sorted(attacks.items(), key=lambda item: -item[1]["protected"]["normalized"]),
        label=attack_label,
        percent=lambda value: f"{100 * value:.1f} %",
        share=percent,
        signed=lambda value: f"{value:+.3f}",
        interval=partial(interval, none="one seed"),
    )


def _classifies(record: Mapping[str, Any]) -> bool:
    return "ForImageClassification" in record["architecture"]  # DeiT has one WithTeacher


def _model_class(record: Mapping[str, Any]) -> str:
    """Name of the class of transformers that loads the model as it was protected."""
    if _classifies(record):
        return "AutoModelForImageClassification"
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES  # loads torch

    own = record["architecture"]
    known = any(own in ((names,) if isinstance(names, str) else names) for names in MODEL_MAPPING_NAMES.values())
    # AutoModel may know another one of the family: without a projection or a decoder; or none.
    return "AutoModel" if known or not hasattr(transformers, own) else own


def _access(record: Mapping[str, Any]) -> str:
    return record["method"]["settings"].get("target_access", "labelled")


def _disjoint(record: Mapping[str, Any]) -> bool:
    """Whether the record shows that owner and attacker had parts of their own of every unauthorized domain."""
    if _access(record) == "none":
        return True
    prints = [domain["fingerprint"] for domain in record["unauthorized_domains"]]
    return all({"owner", "attacker"} <= part.keys() and part["owner"] != part["attacker"] for part in prints)
