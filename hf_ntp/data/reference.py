"""Where a domain came from and what exactly was used of it, for records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets

from .columns import column_values, dataset_fingerprint, find_columns


def domain_name(dataset: str, config: str | None = None) -> str:
    """What reports call a domain: the last part of its path or id, and its configuration where one was chosen."""
    name = Path(dataset).stem if Path(dataset).exists() else dataset.rpartition("/")[2]
    return name if config is None else f"{name}-{config}"


def _classes(dataset: datasets.Dataset) -> list[str]:
    column = find_columns(dataset)[1]
    feature = dataset.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    return [str(label) for label in sorted(set(column_values(dataset, column)))]


@dataclass(frozen=True)
class DomainReference:
    """Identity of a domain.

    Args:
        name: What reports call it.
        dataset: Embedded name, Hub id or path.
        config: Configuration of a Hub dataset.
        revision: Revision of a Hub dataset.
        fingerprint: SHA-256 of the content of every part that was used, by part.
        classes: Names of the classes.
    """

    name: str
    dataset: str
    config: str | None
    revision: str | None
    fingerprint: Mapping[str, str]
    classes: list[str]

    @classmethod
    def of(
        cls,
        dataset: str,
        parts: Mapping[str, datasets.Dataset],
        config: str | None = None,
        revision: str | None = None,
    ) -> DomainReference:
        """Describe the parts of a domain that :func:`~hf_ntp.load_domain` loaded.

        Args:
            dataset: What was passed to ``load_domain``. Of a local path only the last part is kept.
            parts: Splits, or parts of splits, of images and labels.
            config: As passed to ``load_domain``.
            revision: As passed to ``load_domain``.

        Raises:
            TypeError: If ``parts`` is one dataset.
            ValueError: If images or labels cannot be found.
        """
        if not isinstance(parts, Mapping):
            raise TypeError(
                f"parts is {type(parts).__name__}; needed: a dict of datasets by what they were used for, such as "
                "{'train': ...}, or {'owner': ..., 'attacker': ..., 'validation': ..., 'test': ...} of a target."
            )
        local = Path(dataset).exists()
        return cls(
            name=domain_name(dataset, config),
            dataset=Path(dataset).name if local else dataset,
            config=config,
            revision=revision,
            fingerprint={name: dataset_fingerprint(part) for name, part in parts.items()},
            classes=_classes(next(iter(parts.values()))),
        )

    def for_record(self) -> dict[str, Any]:
        """Return the entry of the authorization record."""
        return asdict(self)
