"""Show a protected model: try it, see the evidence, verify it, score your own curves.

    python Space/app.py

shows the quick demo model (built first, in a few minutes, where it is missing). NTP_MODEL names another one, a folder
or a Hub id; see README.md for the other variables.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from gradio import Blocks
    from ntp_space.classifiers import Classifiers
    from ntp_space.settings import Settings

# Before the imports that read them: nothing is reported to anybody.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))


def main() -> None:
    """Start the page."""
    from ntp_space.settings import Settings

    try:
        settings = Settings.from_environment()
    except ValueError as error:
        sys.exit(f"error: {error}")
    if settings.demo and not Path(settings.model).is_dir():
        from build_demo import build

        build(settings.cache)
    page, load = serve(settings)
    load()
    page.block_thread()


def serve(settings: Settings, **options: Any) -> tuple[Blocks, Callable[[], None]]:
    """Serve the page, and return it with a function that loads what the first visitor would otherwise wait for.

    Args:
        settings: What to show.
        options: For `launch`.
    """
    from ntp_space.classifiers import Classifiers
    from ntp_space.look import CSS, THEME
    from ntp_space.page import build_page
    from ntp_space.showcase import open_showcase

    showcase = open_showcase(settings)
    classifiers = Classifiers(showcase) if showcase.labels else None
    page = build_page(showcase, classifiers)
    page.launch(
        theme=THEME,
        css=CSS,
        ssr_mode=False,
        max_file_size="10mb",
        footer_links=[],
        prevent_thread_lock=True,
        **options,
    )
    return page, lambda: warm_up(classifiers)


def warm_up(classifiers: Classifiers | None) -> None:
    """Load the models and what else takes seconds to import; the page is there already."""
    import hf_ntp.data.images

    if classifiers is not None:
        # Whoever asks first sees why it fails, and the page lives on.
        with suppress(OSError, ValueError):
            classifiers.load()
    import hf_ntp.functional  # noqa: F401


if __name__ == "__main__":
    main()
