"""Which model the page shows: the environment decides, the quick demo model is the default."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SPACE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Settings:
    """What to show.

    Args:
        model: Folder or Hub id of the protected model.
        unprotected: Folder or Hub id of the model before protection, or None to show the protected one alone.
        revision: Revision of ``model`` on the Hub.
        public_key: File with the owner's public key; when given, the signature must be valid.
        cache: Folder for example images (and the quick demo model).
        demo: Whether ``model`` is the quick demo model of ``build_demo.py``.
    """

    model: str
    unprotected: str | None
    revision: str | None
    public_key: str | None
    cache: Path
    demo: bool

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """Read NTP_MODEL, NTP_UNPROTECTED, NTP_REVISION, NTP_PUBLIC_KEY and NTP_CACHE; empty means not set."""
        given = {key: value for key, value in environment.items() if key.startswith("NTP_") and value}
        cache = Path(given.get("NTP_CACHE", SPACE / "cache"))
        demo = "NTP_MODEL" not in given
        if demo and (alone := sorted(given.keys() & {"NTP_UNPROTECTED", "NTP_REVISION"})):
            raise ValueError(
                f"{' and '.join(alone)} is set without NTP_MODEL; needed: NTP_MODEL, the folder or Hub id of a "
                "protected model. Set it, or unset the others to see the quick demo model."
            )
        return cls(
            model=given.get("NTP_MODEL", str(demo_run(cache) / "protected")),
            unprotected=str(demo_run(cache) / "unprotected") if demo else given.get("NTP_UNPROTECTED"),
            revision=given.get("NTP_REVISION"),
            public_key=given.get("NTP_PUBLIC_KEY"),
            cache=cache,
            demo=demo,
        )


def demo_run(cache: Path) -> Path:
    """Folder of the run that makes the quick demo model."""
    return cache / "demo"
