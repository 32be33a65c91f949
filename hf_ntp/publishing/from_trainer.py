"""From a trainer to the folder that is published."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..data import DomainReference
from ..evaluation.measure import Measurement, measure_sparsity
from ..models import has_head, hub_id, plain_model
from ..run_folder import weight_digests
from ..training.domains import Joined
from .card import NO_REPO
from .report import build_record, build_results, write_report

if TYPE_CHECKING:
    from ..training.trainer import NTPTrainer


def write_folder(
    trainer: NTPTrainer,
    folder: str | Path,
    repo_id: str = NO_REPO,
    source: Sequence[DomainReference] | None = None,
    targets: Sequence[DomainReference] | None = None,
    license: str = "other",
    terms: str | None = None,
    measured: Measurement | None = None,
) -> None:
    """Write a trainer's protected model with image processor, record and card, ready for :func:`hf_ntp.push_folder`.

    Args:
        trainer: After ``train``.
        folder: Where to; made when missing.
        repo_id: What the card tells users to pass to ``from_pretrained``.
        source: Authorized domains; default: those of the trainer by name, or one called "source", with the classes of
            the model.
        targets: Unauthorized domains; default: those of the trainer by name, with numbered classes.
        license: Licence id as the Hub spells it.
        terms: What the owner allows, in words.
        measured: What :func:`~hf_ntp.measure_protection` found out about these weights on the only authorized and the
            only unauthorized domain; without it, record and card say that nothing was measured. The recipes report
            several domains.

    Raises:
        ValueError: If the model is not protected yet, or the measurement is of another one, or one domain of several.
    """
    model = trainer.model
    if not getattr(model.config, "ntp", None):
        raise ValueError(
            "the trainer's model is not protected yet: its config has no entry 'ntp'; needed: a finished train(). "
            "Train first, or resume the run."
        )
    model.save_pretrained(folder)
    if trainer.processing_class is not None:
        trainer.processing_class.save_pretrained(folder)
    classes = [str(label) for label in (model.config.id2label or {}).values()] if has_head(model) else []
    images = trainer.train_dataset.source
    authorized = list(images.parts) if isinstance(images, Joined) else ["source"]
    named = {name: [str(i) for i in range(int(labels.max()) + 1)] for name, labels in trainer.target_labels.items()}
    source = source or [DomainReference(name, name, None, None, {}, classes) for name in authorized]
    targets = targets or [DomainReference(name, name, None, None, {}, labels) for name, labels in named.items()]
    results = None
    if measured is not None:
        if len(source) > 1 or len(targets) > 1:
            raise ValueError(
                f"there is a measurement of one authorized and one unauthorized domain, and {len(source)} and "
                f"{len(targets)} were protected; needed: one of each. Protect several with recipes/ntp_vit.py, which "
                "measures and reports all, or leave the measurement out."
            )
        if measured.weights != weight_digests(folder):
            raise ValueError(
                "the measurement is of another model; needed: one of these very weights. Save them with save_model, "
                "and pass that folder to measure_protection."
            )
        results = build_results(source[0], targets[0], measured, {}, trainer.args.target_access)
    record = build_record(
        results,
        source,
        targets,
        type(plain_model(model)).__name__,
        # What was loaded by id may be any commit: a loaded model does not say which.
        {"name": hub_id(getattr(model.config, "_name_or_path", None)), "revision": None, "weights": None},
        trainer.args.summary(),
        measure_sparsity(model, images),
        license,
        terms,
    )
    write_report(folder, record, results, repo_id=repo_id)
