"""The folder that is published: record, results, figures and card beside the weights."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub.utils import validate_repo_id

from ..data import DomainReference
from ..evaluation.measure import SparsityReport
from ..models.sparse_storage import SPARSE_FILE, compress_into, expand_into, free_folder
from ..run_folder import weight_digests, weight_files, whole_file, whole_folder
from .attack_report import plot_attacks
from .card import CARD_FILE, NO_REPO, card_repo_ids, compressed_card, expanded_card, render_card
from .errors import listed
from .evidence import not_tested, source_accuracy, standard_evidence, standard_measurement, suite_measurement
from .figure import plot_learning_curves
from .files import PROCESSOR_FILES
from .record import SCHEMA_VERSION, SIGNATURE_FILE, encode_record, file_digests, read_record, write_record
from .results import RESULTS_FILE, read_results
from .strict_json import strict_json
from .verify import verify_folder
from .wording import domain_names

logger = logging.getLogger(__name__)

CURVES_FIGURE = "slc.png"
_ENVIRONMENT = ("torch", "transformers", "accelerate", "datasets", "peft", "numpy", "scikit-learn")


def build_record(
    results: Mapping[str, Any] | None,
    source: Sequence[DomainReference],
    target: Sequence[DomainReference],
    architecture: str,
    base_model: Mapping[str, Any],
    settings: Mapping[str, Any],
    sparsity: SparsityReport,
    license: str = "other",
    terms: str | None = None,
    third: DomainReference | None = None,
) -> dict[str, Any]:
    """Authorization record of a run, see ``authorization.schema.json``; "files" is filled in when it is written.

    Args:
        results: Content of ``results.json``; None where nothing was measured, and the record says so.
        source: Authorized domains.
        target: Unauthorized domains.
        architecture: Name of the class of transformers that loads the model.
        base_model: "name" (Hub id or None), "revision", "weights" (digest of every file) and, where it was trained on
            the authorized domain first, "fine_tuning_steps".
        settings: Everything that determined the run.
        sparsity: Zeros of the published weights.
        license: Licence id as the Hub spells it.
        terms: What the owner allows, in words; by default what the domains say.
        third: Domain of the results' "third".
    """
    authorized, unauthorized = ([domain.for_record() for domain in side] for side in (source, target))
    evidence = standard_evidence(results)
    record = {
        "schema_version": SCHEMA_VERSION,
        "library": {"name": "hf_ntp", "version": version("hf-ntp")},
        "environment": {"python": python_version(), **{name: version(name) for name in _ENVIRONMENT}},
        "architecture": architecture,
        "base_model": dict(base_model),
        "authorized_domains": authorized,
        "unauthorized_domains": unauthorized,
        "terms": {
            "license": license,
            "text": terms
            or f"Use on {domain_names(authorized)} is authorized. Use on {domain_names(unauthorized)} is not, "
            "neither as it is nor fine-tuned.",
        },
        "method": {"name": "non-transferable-pruning", "settings": dict(settings)},
        "sparsity": asdict(sparsity),
        "source_accuracy": None if results is None else source_accuracy(results),
        "evidence": evidence,
        "not_tested": not_tested(evidence, [domain.name for domain in target]),
    }
    if results is not None and third is not None:
        record["third_domain"] = {"domain": third.for_record(), "measurement": standard_measurement(results["third"])}
    return record


def write_report(
    folder: str | Path,
    record: Mapping[str, Any],
    results: Mapping[str, Any] | None = None,
    attacks: Mapping[str, Mapping[str, Any]] | None = None,
    repo_id: str = NO_REPO,
) -> None:
    """Write results, figures, model card and, last, the authorization record beside the weights of a protected model.

    Args:
        folder: Folder that holds the saved model.
        record: See :func:`build_record`.
        results: See :func:`~hf_ntp.publishing.results.build_results`; None where nothing was measured.
        attacks: What :func:`hf_ntp.evaluation.suite.run_attacks` returned for these weights, if it was run, by the
            name of the unauthorized domain.
        repo_id: What the card tells users to pass to ``from_pretrained``.
    """
    folder = Path(folder)
    # What cannot be drawn or rendered is an error before anything is changed.
    with TemporaryDirectory() as private_folder:
        made = Path(private_folder)
        if results is not None:
            _write_json(made / RESULTS_FILE, results)
            plot_learning_curves(results, made / CURVES_FIGURE)
        names = suite_files(record)
        for domain, suite in (attacks or {}).items():
            file, figure = names[domain]
            _write_json(made / file, _published(suite))
            plot_attacks(suite, made / figure, f"What the checkpoint is worth on {domain}")
        present = {path.name for place in (folder, made) for path in place.iterdir()}
        (made / CARD_FILE).write_text(card_text(record, repo_id, present), encoding="utf-8")
        # It would be of what was there before.
        (folder / SIGNATURE_FILE).unlink(missing_ok=True)
        for path in made.iterdir():
            with whole_file(folder / path.name) as staged:
                shutil.copyfile(path, staged)
    write_record(folder, record)


def card_text(record: Mapping[str, Any], repo_id: str, files: Collection[str]) -> str:
    """Card of a folder with these files; other arguments as in :func:`write_report`."""
    figures = {}
    if RESULTS_FILE in files:
        figures[CURVES_FIGURE] = f"Learning curves on {domain_names(record['unauthorized_domains'])}"
    for domain, (file, figure) in suite_files(record).items():
        if file in files:
            figures[figure] = f"Attacks on {domain}"
    processed = not PROCESSOR_FILES.isdisjoint(files)
    return f"{render_card(record, repo_id, figures, SPARSE_FILE in files, processed)}\n"


def suite_files(record: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Names of file and figure of the attack suite on every unauthorized domain, by its name."""
    names = [domain["name"] for domain in record["unauthorized_domains"]]
    numbers = [""] if len(names) == 1 else [f"_{i}" for i in range(1, len(names) + 1)]
    return {name: (f"attacks{i}.json", f"attacks{i}.png") for name, i in zip(names, numbers, strict=True)}


def refresh_report(
    folder: str | Path,
    attacks: str | Path | None = None,
    repo_id: str | None = None,
    license: str | None = None,
    terms: str | None = None,
) -> None:
    """Write card, figures and record of a folder anew, optionally with the result of an attack suite.

    Args:
        folder: As :func:`write_report` left it. A signature is no longer valid and is removed. A card that was edited
            since is kept, and recorded as it is, if nothing else is given.
        attacks: ``results.json`` of ``recipes/ntp_attack.py`` on this very model; it replaces an earlier one on the
            same domain, all of whose attacks it has to have. Its controls and its third domain are left out: what is
            published is of the unauthorized domains.
        repo_id: What the card tells users to pass to ``from_pretrained``; default what it says already.
        license: Licence id as the Hub spells it; default what the record says already, as for ``terms``.
        terms: What the owner allows, in words.

    Raises:
        FileNotFoundError: If there is no such file of attacks.
        ValueError: If the card was edited and something else is given, or the suite was run on other weights, or on a
            domain that the record does not name, or with images that the protection may have seen, or weights or
            results are not those that were recorded.
    """
    if repo_id is not None:
        validate_repo_id(repo_id)
    folder = Path(folder)
    record = read_record(folder)
    digests = file_digests(folder)
    weights = {path.name: digests[path.name] for path in weight_files(folder)}
    files = suite_files(record)
    _check_unchanged(folder, record, digests, weights, {file for file, _ in files.values()})
    paths = [folder / file for file, _ in files.values() if (folder / file).exists()]
    results = read_results(folder) if (folder / RESULTS_FILE).exists() else None
    card, shown_id = folder / CARD_FILE, [*card_repo_ids(folder), NO_REPO][0]
    edited = card.exists() and card.read_text(encoding="utf-8") != card_text(record, shown_id, record["files"])
    if edited and any(option is not None for option in (attacks, repo_id, license, terms)):
        raise ValueError(
            f"{card} is not as it was written (or as another version of hf_ntp would) and would be written over; "
            "needed: the card as it was, or none. Move it away, do this again, put your words into the new card, and "
            "record that without any option."
        )
    suites: dict[str, dict[str, Any]] = {}
    for path in [*paths, *([] if attacks is None else [Path(attacks)])]:
        suite = _read_suite(path)
        domain = _domain_of(suite, weights, record, folder)
        if lost := sorted(_attacks_of(suites.get(domain)) - _attacks_of(suite)):
            raise ValueError(
                f"{path} would replace {folder / files[domain][0]}, and lacks its {', '.join(lost)}: the record would "
                "say that these were not tried. Needed: all of them in one run of recipes/ntp_attack.py (--attacks; "
                "with one --cache_dir nothing is done twice). To do without them, delete the older file first."
            )
        suites[domain] = suite
    evidence = standard_evidence(results) + [suite_measurement(suite, name) for name, suite in suites.items()]
    changed = {key: text for key, text in (("license", license), ("text", terms)) if text is not None}
    record = {
        **record,
        "terms": record["terms"] | changed,
        "evidence": evidence,
        "not_tested": not_tested(evidence, list(files)),
    }
    encode_record(record)  # what cannot be written is an error before anything is changed
    signed = (folder / SIGNATURE_FILE).exists()
    if edited:
        (folder / SIGNATURE_FILE).unlink(missing_ok=True)
        write_record(folder, record)
    else:
        write_report(folder, record, results, suites, repo_id or shown_id)
    if signed:
        logger.warning("%s was signed, and its record is another now: the signature is removed. Sign it anew.", folder)


def _check_unchanged(
    folder: Path,
    record: Mapping[str, Any],
    found: Mapping[str, str],
    weights: Collection[str],
    suites: Collection[str],
) -> None:
    """Raise ``ValueError`` unless all that was measured is there as it was recorded; ``suites`` may be missing."""
    noted = {name for name in record["files"] if name.endswith((".json", ".safetensors"))}
    # Weights and results that nobody recorded would be taken for those that were.
    needed = (noted - set(suites)) | {name for name in (*weights, RESULTS_FILE, *suites) if name in found}
    if others := sorted(name for name in needed if found.get(name) != record["files"].get(name)):
        raise ValueError(
            f"{listed(others)} in {folder} {'is' if len(others) == 1 else 'are'} missing or not as recorded: the "
            "record's numbers may be of others. Needed: weights, settings and results as they were measured. Restore "
            "them, or measure the new ones: run recipes/ntp_vit.py."
        )


def compress_report(folder: str | Path, out: str | Path) -> Path:
    """Copy the folder of a protected model with the weights stored without their zeros, and card and record that fit.

    Sign it anew. See :func:`hf_ntp.compress_folder` for what loads it.

    Args:
        folder: As :func:`write_report` left it.
        out: Folder to make.

    Returns:
        ``out`` as a path.

    Raises:
        RecordError: If the files are not those that the record speaks of.
        ValueError: If the folder cannot be compressed.
    """
    return _stored_otherwise(folder, out, compress_into, compressed_card)


def expand_report(folder: str | Path, out: str | Path) -> Path:
    """Undo :func:`compress_report`, with the same arguments and errors. Sign the copy anew."""
    return _stored_otherwise(folder, out, expand_into, expanded_card)


def _stored_otherwise(
    folder: str | Path, out: str | Path, store: Callable[[str | Path, Path], None], reworded: Callable[[str], str]
) -> Path:
    record = verify_folder(folder).record
    out = free_folder(folder, out)
    with whole_folder(out) as staged:
        store(folder, staged)
        (staged / SIGNATURE_FILE).unlink(missing_ok=True)
        card = staged / CARD_FILE
        if card.exists():
            card.write_text(reworded(card.read_text(encoding="utf-8")), encoding="utf-8")
        for file, _ in suite_files(record).values():
            if (staged / file).exists():  # the weights are the same, in another file
                _write_json(staged / file, _read_suite(staged / file) | {"weights": weight_digests(staged)})
        write_record(staged, record)
    return out


def _published(suite: Mapping[str, Any]) -> dict[str, Any]:
    """What is published of an attack suite: nothing of other domains, controls, and paths on the owner's machine."""
    kept = {key: value for key, value in suite.items() if key not in ("checkpoint", "third_domain")}
    for part in ("starts", "retained_transfer", "worst_case", "not_run"):
        found = kept.get(part, {})
        kept[part] = {start: found[start] for start in ("protected", "unprotected") if start in found}
    return kept


def _attacks_of(suite: Mapping[str, Any] | None) -> set[str]:
    return set() if suite is None else set(suite["starts"]["protected"])


def _read_suite(path: Path) -> dict[str, Any]:
    """Read the result of an attack suite.

    Raises:
        ValueError: If it is none.
    """
    try:
        suite = strict_json(path.read_bytes())
        suite_measurement(suite, suite["target"])
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}: {str(error)[:200]}); needed: results.json as "
            "recipes/ntp_attack.py writes it."
        ) from error
    return suite


def _domain_of(attacks: Mapping[str, Any], weights: Mapping[str, str], record: Mapping[str, Any], folder: Path) -> str:
    """Return the name of the domain of an attack suite, if it belongs to the folder."""
    if attacks.get("weights") != weights:
        raise ValueError(
            f"the attacks were run on {attacks.get('checkpoint', 'a checkpoint')}, whose weights are not those of "
            f"{folder}; needed: those of this very model. Run recipes/ntp_attack.py with --checkpoint on it."
        )
    used = attacks.get("fingerprint", {})
    domains = [domain for domain in record["unauthorized_domains"] if domain["dataset"] == attacks["target"]]
    if not domains:
        known = ", ".join(domain["dataset"] for domain in record["unauthorized_domains"])
        raise ValueError(
            f"the attacks were run on the domain {attacks['target']}; needed: one that the record calls unauthorized "
            f"({known})."
        )
    if len(domains) > 1:  # several configurations of one dataset
        domains = [domain for domain in domains if domain["fingerprint"].get("attacker") == used.get("attacker")]
        if len(domains) != 1:
            raise ValueError(
                f"the record has several unauthorized domains of {attacks['target']}, and by fingerprints the attacks "
                f"were run on {len(domains)} of them; needed: one. Run recipes/ntp_attack.py with the protection's "
                "--owner_fraction and --target_... options."
            )
    (domain,) = domains
    noted = domain["fingerprint"]
    others = [part for part in ("attacker", "validation", "test") if noted.get(part) != used.get(part)]
    undivided = noted.get("train") if record["method"]["settings"].get("target_access") != "none" else None
    if undivided is not None and used.get("attacker") == undivided:
        raise ValueError(
            f"the attacks on {domain['name']} were run with the training images of that domain, which the record does "
            "not divide between the protection and an attacker: it may have seen them. Needed: images that were left "
            "to the attacker. Name the parts in write_folder's targets, as in the README, and attack with those."
        )
    if "owner" in noted and others:
        raise ValueError(
            f"the attacks on {domain['name']} were run with other images than those that the protection left to an "
            f"attacker (by the record's fingerprints of {', '.join(others)}): it may have seen some of them. Needed: "
            "the same division. Run recipes/ntp_attack.py with the protection's --owner_fraction and --target_... "
            "options."
        )
    return domain["name"]


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with whole_file(path) as staged:
        staged.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
