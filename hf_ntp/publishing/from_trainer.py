"""From a trainer to the folder that is published."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub.utils import validate_repo_id

from ..data import Content, DomainReference, contents_of, shared_images
from ..evaluation.measure import Measurement, measure_sparsity
from ..models import has_head, notes_of, plain_model
from ..run_folder import weight_digests, whole_folder
from ..training.domains import Joined
from .card import NO_REPO
from .errors import RecordError, listed
from .record import RECORD_FILE, SIGNATURE_FILE, read_record
from .report import CURVES_FIGURE, build_record, suite_files, write_report
from .results import build_results

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
        folder: Where to. It appears when it is whole, and replaces what was published there before.
        repo_id: What the card tells users to pass to ``from_pretrained``.
        source: Authorized domains; default: those of the trainer by name, or one called "source", with the classes of
            the model.
        targets: Unauthorized domains; default: those of the trainer by name, with numbered classes. Needed with
            ``target_access="none"``. Where they have fingerprints of the parts "owner" and "attacker", attacks with
            other images are refused later (``hf-ntp report``).
        license: Licence id as the Hub spells it.
        terms: What the owner allows, in words.
        measured: What :func:`~hf_ntp.measure_protection` found out about these weights on the only authorized and the
            only unauthorized domain; without it, record and card say that nothing was measured. The recipes report
            several domains.

    Raises:
        ValueError: If the model is not protected yet, or the measurement is of another one, or one domain of several,
            or made with images that the protection has seen or the references do not name, or these are swapped,
            or the folder holds files that are not published with a model, or cannot be replaced as a whole.
    """
    if repo_id != NO_REPO:
        validate_repo_id(repo_id)
    folder = Path(folder).resolve()
    _check_place(folder)
    model = trainer.model
    if not notes_of(model):
        raise ValueError(
            "the trainer's model is not protected yet: its config has no entry 'ntp'; needed: a finished train(). "
            "Train first, or resume the run."
        )
    if targets is None and trainer.args.target_access == "none":
        raise ValueError(
            "the protection has seen no unauthorized domain (target_access is 'none') and targets is None; needed: "
            "the names of what is not authorized. Pass targets=[DomainReference(...)]."
        )
    classes = [str(label) for label in (model.config.id2label or {}).values()] if has_head(model) else []
    images = trainer.train_dataset.source
    authorized = list(images.parts) if isinstance(images, Joined) else ["source"]
    named = {name: _classes(trainer, name) for name in trainer.target_classes}
    source = source or [DomainReference(name, name, None, None, {}, classes) for name in authorized]
    targets = targets or [DomainReference(name, name, None, None, {}, labels) for name, labels in named.items()]
    _check_names(source, targets, len(authorized), len(named))
    if measured is not None and (len(source) > 1 or len(targets) > 1):
        raise ValueError(
            f"there is a measurement of one authorized and one unauthorized domain, and {len(source)} and "
            f"{len(targets)} were protected; needed: one of each. Protect several with recipes/ntp_vit.py, which "
            "measures and reports all, or leave the measurement out."
        )
    seen = frozenset[Content]().union(*map(contents_of, trainer.train_dataset.targets.values()))
    _check_sides(source, targets, contents_of(images), seen)
    if measured is not None:
        _check_images(measured.images, source[0].fingerprint, targets[0].fingerprint, seen, contents_of(images))
    with whole_folder(folder) as staged:
        model.save_pretrained(staged)
        if trainer.processing_class is not None:
            trainer.processing_class.save_pretrained(staged)
        results = None
        if measured is not None:
            if measured.weights != weight_digests(staged):
                raise ValueError(
                    "the measurement is of another model; needed: one of these very weights. Save them with "
                    "save_model, and pass that folder to measure_protection."
                )
            results = build_results(source[0], targets[0], measured, {}, trainer.args.target_access)
        record = build_record(
            results,
            source,
            targets,
            type(plain_model(model)).__name__,
            # What was loaded by id may be any commit: a loaded model does not say which.
            {"name": trainer.base_model, "revision": None, "weights": None},
            trainer.args.summary() | _cut_short(trainer),
            measure_sparsity(model, images),
            license,
            terms,
        )
        write_report(staged, record, results, repo_id=repo_id)
        _check_replaceable(folder, os.listdir(staged))


def _cut_short(trainer: NTPTrainer) -> dict[str, int]:
    """Say so where training ended before it was planned to: the schedules of the record were not gone through."""
    taken, planned = trainer.state.global_step, trainer.state.max_steps
    return {"stopped_at_step": taken, "planned_steps": planned} if taken < planned else {}


def _check_names(
    source: Sequence[DomainReference], targets: Sequence[DomainReference], authorized: int, unauthorized: int
) -> None:
    """Raise ``ValueError`` where references name a domain twice, or others than the protection had, by number."""
    # Without target access, the owner alone says what is not authorized.
    for side, references, count in (("source", source, authorized), ("targets", targets, unauthorized)):
        if count and len(references) != count:
            raise ValueError(
                f"{side} names {len(references)} domains ({listed([reference.name for reference in references])}), "
                f"and the protection was trained with {count}; needed: one DomainReference for each of them."
            )
    names = [reference.name for reference in (*source, *targets)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"source and targets name {listed(twice)} more than once; needed: a name of its own for every domain."
        )


def _check_sides(
    source: Sequence[DomainReference],
    targets: Sequence[DomainReference],
    authorized: Collection[Content],
    unauthorized: Collection[Content],
) -> None:
    """Raise ``ValueError`` where references of one side have the images that the other side was trained with."""
    for references, trained in ((source, unauthorized), (targets, authorized)):
        named = {fingerprint for reference in references for fingerprint in reference.fingerprint.values()}
        if named & {content.labelled for content in trained}:
            raise ValueError(
                "source and targets are swapped: the protection was trained the other way round, and the record would "
                "authorize what it protects against. Needed: the authorized domains as source, the others as targets."
            )


def _check_images(
    measured: Mapping[str, Collection[Content]],
    source: Mapping[str, str],
    target: Mapping[str, str],
    seen: Collection[Content],
    trained: Collection[Content],
) -> None:
    """Raise ``ValueError`` where a measurement took other images than the references name, or seen ones."""
    attacker = [part for part in ("attacker", "validation", "test") if part in measured]
    counts = {part: shared_images(measured[part], seen) for part in attacker}
    counts["source test"] = shared_images(measured.get("source", ()), trained)
    if overlap := [f"{part} ({count} images)" for part, count in counts.items() if count]:
        raise ValueError(
            f"the protection has seen images that were measured with as {', '.join(overlap)}; needed: images that it "
            "has not seen, or the card would promise what was not measured. Divide them with split_owner_attacker, "
            "and leave out images that come several times."
        )
    named = [(f"targets: {part}", measured[part], target.get(part)) for part in attacker]
    named.append(("source: test", measured.get("source", ()), source.get("test")))
    if others := [part for part, took, says in named if took and says and says not in {c.labelled for c in took}]:
        raise ValueError(
            f"the measurement took other images or labels than the references name ({', '.join(others)}); needed: the "
            "same, or the record would speak of others. Pass to DomainReference.of what was measured with."
        )


def _classes(trainer: NTPTrainer, target: str) -> list[str]:
    """Names of the classes of an unauthorized domain, or numbers; none where clusters stood for classes."""
    if trainer.args.target_access != "labelled":
        return []
    names = getattr(trainer.train_dataset.targets[target], "class_names", None)
    return list(names or map(str, range(trainer.target_classes[target])))


def _check_place(folder: Path) -> None:
    """Raise ``ValueError`` where no folder can be put, or the one that is there cannot be replaced as a whole."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; needed: a folder, or a name that is not taken.")
    if folder.is_mount() or Path.cwd().is_relative_to(folder):
        raise ValueError(
            f"{folder} is a mount point or holds the working directory; needed: a folder that can be replaced as a "
            "whole. Choose one inside it."
        )


def _check_replaceable(folder: Path, written: Sequence[str]) -> None:
    """Raise ``ValueError`` where more than a published model would be lost with a folder."""
    if not folder.is_dir():
        return
    known = {*written, RECORD_FILE, SIGNATURE_FILE}
    with suppress(FileNotFoundError, RecordError):
        record = read_record(folder)
        ours = {CURVES_FIGURE, *(name for names in suite_files(record).values() for name in names)}
        known |= {name for name in record["files"] if name in ours or name.endswith((".json", ".safetensors"))}
    found = {path.name for path in folder.iterdir() if path.name not in known or not path.is_file()}
    if others := sorted(found):
        raise ValueError(
            f"{folder} holds files that are not published with a model and would be lost: {listed(others)}; needed: a "
            "folder of its own. Choose another one, or move them."
        )
