"""Measurements in the form of the authorization record: what each attack got out of the published weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..attacks import ATTACKS

# Attacks of the standard measurement, and the arms that they are in `results.json`.
STANDARD = {"mask_kept": ("protected_mask", "mask"), "dense": ("protected_dense", "dense")}

# What no measurement of this library shows, whatever it finds.
_BEYOND = (
    "Other attacks than those, other optimizers, learning rates or longer training than those named with a "
    "measurement, and more labelled unauthorized images than its largest size.",
    "Other domains than those named here. Protection is not a ban on other uses, and no claim is made about them.",
    "Protection of the weights against copying, or of the model's outputs against imitation.",
)


def measured_sources(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a ``results.json`` has for each authorized domain: names, accuracies, test images."""
    return [results["source"], *results.get("other_sources", [])]


def measured_targets(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a ``results.json`` has for each unauthorized domain: "target", "slc", "slc_auc", "retained_transfer"."""
    return [results, *results.get("other_targets", [])]


def standard_evidence(results: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Entries of "evidence" for a run's standard comparison, one for each unauthorized domain."""
    return [] if results is None else [standard_measurement(found) for found in measured_targets(results)]


def source_accuracy(results: Mapping[str, Any]) -> dict[str, Any]:
    """Entry "source_accuracy": over the test images of all authorized domains, and of each where there are several."""
    measure = {"measure": results["source"].get("measure", "classification")}
    domains = [
        {
            "domain": source["domain"],
            "before": source["accuracy_before"],
            "after": source["accuracy_after"],
            "images": source["test_images"],
        }
        for source in measured_sources(results)
    ]
    if len(domains) == 1:
        del domains[0]["domain"]
        return measure | domains[0]
    images = sum(found["images"] for found in domains)
    means = {when: sum(found[when] * found["images"] for found in domains) / images for when in ("before", "after")}
    return {**measure, **means, "images": images, "domains": domains}


def standard_measurement(results: Mapping[str, Any]) -> dict[str, Any]:
    """Entry of "evidence" for a run's standard comparison on one domain.

    Args:
        results: Content of ``results.json``, or what it has for one domain.
    """
    slc, areas = results["slc"], results["slc_auc"]
    attacks = {
        name: {
            "protected": areas[arm],
            "unprotected": areas["unprotected"],
            "retained_transfer": results["retained_transfer"][share],
        }
        for name, (arm, share) in STANDARD.items()
    }
    worst = max(attacks, key=lambda name: attacks[name]["protected"]["normalized"])
    return {
        "domain": results["target"]["domain"],
        **{key: slc[key] for key in ("sample_sizes", "seeds", "protocol", "scratch_convergence")},
        "attacks": attacks,
        "worst_case": {
            "attack": worst,
            "slc_auc": attacks[worst]["protected"]["normalized"],
            "retained_transfer": attacks[worst]["retained_transfer"],
        },
    }


def suite_measurement(attacks: Mapping[str, Any], domain: str) -> dict[str, Any]:
    """Entry of "evidence" for an attack suite.

    Args:
        attacks: What :func:`hf_ntp.evaluation.suite.run_attacks` returns.
        domain: Name of the unauthorized domain.
    """
    protected, unprotected = attacks["starts"]["protected"], attacks["starts"].get("unprotected", {})
    worst = attacks["worst_case"]["protected"]
    largest = max(entry["normalized"] for entry in protected.values())
    if worst["attack"] not in protected or not worst["slc_auc"] == protected[worst["attack"]]["normalized"] == largest:
        raise ValueError(f"worst_case is {worst}, and the largest area of the attacks is {largest}")
    return {
        "domain": domain,
        **{key: attacks[key] for key in ("sample_sizes", "seeds", "protocol")},
        "scratch_convergence": None,
        "attacks": {
            name: {
                "protected": _area(entry),
                "unprotected": _area(unprotected[name]) if name in unprotected else None,
                "retained_transfer": attacks["retained_transfer"]["protected"][name],
            }
            for name, entry in protected.items()
        },
        "worst_case": worst,
    }


def _area(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: entry[key] for key in ("nats", "decades", "normalized", "ci", "seeds")}


def not_tested(evidence: Sequence[Mapping[str, Any]], domains: Sequence[str]) -> list[str]:
    """What is not claimed: first the attacks of this library that were not run, on each domain if they differ.

    Args:
        evidence: Measurements of a record.
        domains: Names of its unauthorized domains.
    """
    if not evidence:
        return ["Anything at all: no attack has been measured on these weights.", *_BEYOND[1:]]
    missing = {domain: ", ".join(_not_run(evidence, domain)) for domain in domains}
    if len(set(missing.values())) == 1:
        missing = {"": missing[domains[0]]}
    first = [
        f"Attacks of hf_ntp that were not run on these weights{domain and f' on {domain}'}: {names}."
        for domain, names in missing.items()
        if names
    ]
    return [*first, *_BEYOND]


def _not_run(evidence: Sequence[Mapping[str, Any]], domain: str) -> list[str]:
    run = {name for measurement in evidence if measurement["domain"] == domain for name in measurement["attacks"]}
    return [name for name in ATTACKS if name not in run]
