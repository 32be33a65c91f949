"""Run by test_sharing.py in several processes at once: two sweeps, in the second of which "victim" is killed."""

import json
import os
import signal
import time
from dataclasses import asdict

from hf_ntp import FineTuneProtocol, sample_wise_learning_curves, standard_arms
from hf_ntp.attacks.fine_tuning import FineTuning

from ..processes import begin
from .conftest import attack_data

PROTOCOL = FineTuneProtocol(steps=8, batch_size=8, learning_rates=(1e-3, 1e-2), warmup_steps=2)


def sweep(folder, cache_dir):
    """What every process runs, and the test itself for comparison."""
    data = attack_data()
    arms = standard_arms(str(folder / "unprotected"), str(folder / "protected"))[:2]
    return sample_wise_learning_curves(arms, data, [6, 24], [0, 1], PROTOCOL, cache_dir, jobs=1)


def main(folder, name):
    """Body of a process."""
    begin(folder / f"{name}.log")
    real, done = FineTuning.fit, []

    def noted(attack, model, loot, protocol, value, seed):
        predict = real(attack, model, loot, protocol, value, seed)
        time.sleep(0.1)  # as in a fit of some length, the others are at work meanwhile
        if name == "victim" and stage == "killed" and len(done) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(value)
        with (folder / f"{stage}.{name}").open("a") as log:
            log.write(f"{value} {seed} {len(loot.labels)}\n")
        return predict

    FineTuning.fit = noted
    for stage in ("shared", "killed"):
        done.clear()
        (folder / f"{stage}.{name}").touch()
        while len(list(folder.glob(f"{stage}.*"))) < 2:  # both, or one would be through before the other is there
            time.sleep(0.02)
        curves = sweep(folder, folder / f"fits_{stage}")
        (folder / f"{name}_{stage}.json").write_text(json.dumps(asdict(curves)))
