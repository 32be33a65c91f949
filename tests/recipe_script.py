"""Run by test_recipe.py on several processes: a model is protected, then attacked."""

import sys
from pathlib import Path

from accelerate import PartialState
from hf_ntp.recipes import ntp_attack, ntp_vit

from .test_recipe import QUICK, attack_options


def main(folder):
    run = folder / "run"
    ntp_vit.main(["--output_dir", str(run), *QUICK, "--attack_seeds", "0", "--use_cpu", "true"])
    PartialState().wait_for_everyone()  # as one command after the other would: the first process writes the folder
    few = ["--attacks", "mask_kept", "ridge_probe"]
    ntp_attack.main(attack_options(run, folder / "attacks", *few))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
