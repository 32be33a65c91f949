"""Build the quick demo model of the page, in a few minutes: the default recipe with every stage shortened.

    python Space/build_demo.py

It needs a checkout of the repository. What comes out shows the page at work; its numbers are those of a shortened run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from ntp_space.images import domain_examples
from ntp_space.settings import SPACE, Settings, demo_run

RECIPE = SPACE.parent / "recipes" / "ntp_vit.py"
SOURCE, TARGET = "mnist", "optdigits"
OPTIONS = (
    "--pretrain_steps 1200 --pretrain_learning_rate 2e-3 --max_steps 600 --warmup_steps 20 --logging_steps 100 "
    "--save_strategy no --report_to none "
    "--sample_sizes 10 30 100 --attack_seeds 0 1 --attack_steps 150 --attack_learning_rates 1e-3"
)


def build(cache: Path) -> Path:
    """Build what is missing and return the folder of the protected model.

    Args:
        cache: Where the run and the example images go.
    """
    run = demo_run(cache)
    if not RECIPE.is_file():
        sys.exit(
            f"error: there is no quick demo model in {run}, and no {RECIPE} to build it with; needed: NTP_MODEL, the "
            "folder or Hub id of a protected model, or a folder “cache” built in a checkout of the repository."
        )
    print(f"Building the quick demo model in {run}: a few minutes.", flush=True)
    arguments = [*OPTIONS.split(), "--source_dataset", SOURCE, "--target_dataset", TARGET, "--output_dir", str(run)]
    done = subprocess.run([sys.executable, str(RECIPE), *arguments], env=os.environ | {"ACCELERATE_USE_CPU": "true"})
    if done.returncode:
        sys.exit(f"error: {RECIPE.name} ended with exit code {done.returncode}; see above. The folder is {run}.")
    # Only a continued run needs it, and the folder may be uploaded with the Space.
    shutil.rmtree(run / "work", ignore_errors=True)
    for domain in (SOURCE, TARGET):
        domain_examples(domain, cache)
    return run / "protected"


if __name__ == "__main__":
    print(build(Settings.from_environment().cache))
