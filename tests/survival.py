"""Processes that are killed at a chosen moment, and jobs for them; see test_survival.py."""

import ctypes
import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

from huggingface_hub import constants
from transformers import TrainerCallback

from hf_ntp import FineTuneProtocol, sample_wise_learning_curves
from hf_ntp.evaluation.arms import Arm
from hf_ntp.evaluation.cache import ResultCache
from hf_ntp.publishing.hub import push_folder
from hf_ntp.publishing.record import write_record
from hf_ntp.run_folder import claim_run_folder, whole_folder

from .conftest import tiny_vit
from .evaluation.conftest import attack_data
from .hub_server import OWNER
from .processes import begin
from .publishing.folders import make_folder, minimal_record
from .training.test_trainer import trainer

# What Python tells of its dealings with files; each is a moment at which a process may die.
_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.scandir", "shutil.rmtree"}


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def _at_file_event(folder, at):
    """Count what is done to files below a folder; die before number ``at``, or say in the end how many there were."""
    count, prefix = itertools.count(1), str(folder)

    def hook(event, arguments):
        if event in _EVENTS and str(arguments[0]).startswith(prefix) and next(count) == at:
            _die()

    sys.addaudithook(hook)
    return count


def run(job, folder, at=None, seconds=None, **options):
    """Body of a process: do a job in a folder, perhaps die at a file event or after some seconds."""
    begin(f"{folder}.log")
    count = _at_file_event(folder, at)
    if seconds is not None:
        timer = threading.Timer(seconds, _die)
        timer.daemon = True
        timer.start()
    JOBS[job](Path(folder), **options)
    Path(f"{folder}.events").write_text(str(next(count) - 1))


def protect(folder, callbacks=None):
    """A run as the recipe does it: resumed where it was left, saved when it has ended."""
    work, weights = folder / "work", folder / "weights"
    if weights.exists():
        return
    options = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "max_steps": 10}
    ours = trainer(work, tiny_vit(dropout=0.1), callbacks=callbacks, **options)
    ours.train(resume_from_checkpoint=work.exists() and any(work.glob("checkpoint-*")))
    with whole_folder(weights) as staged:
        ours.save_model(str(staged))


class SignalAtStep(TrainerCallback):
    """Sends this process a signal while it takes a step."""

    def __init__(self, step, number):
        self.step, self.number = step, number

    def on_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), self.number)


def terminated(folder):
    """The job "protect", with SIGTERM in its step 3."""
    protect(folder, [SignalAtStep(3, signal.SIGTERM)])


def interrupted(folder):
    """The same with SIGINT in step 7."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell begin with it ignored
    protect(folder, [SignalAtStep(7, signal.SIGINT)])


def sweep(folder):
    """Learning curves; every fit is remembered."""
    start = folder / "start"
    if not start.exists():
        with whole_folder(start) as staged:
            tiny_vit().save_pretrained(staged)
    data = attack_data()
    protocol = FineTuneProtocol(steps=3, batch_size=4, learning_rates=(1e-3, 1e-2), warmup_steps=0)
    arms = [Arm("dense", str(start)), Arm("scratch", str(start), random_init=True)]
    curves = sample_wise_learning_curves(arms, data, [6, 12], [0, 1], protocol, folder / "fits", jobs=1)
    (folder / "curves.json").write_text(json.dumps(curves.accuracies))


def push(folder):
    """Publish the folder "model" on the server whose address is in the file "url"."""
    constants.ENDPOINT = (folder / "url").read_text()
    constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = False, True
    push_folder(folder / "model", "org/model", token=OWNER)


_libc = ctypes.CDLL(None, use_errno=True)
_NEW_NAMESPACE, _PRIVATE, _READ_ONLY, _REMOUNT = 0x20000, 0x44000, 1, 32
NO_DISK = 77


def _mount(folder, flags=0, size=None):
    options = None if size is None else f"size={size}k".encode()
    return _libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", flags, options) == 0


def small_disk(folder, size):
    """Put a disk of so many KiB at a folder, which only this process sees; leave where this may not be done."""
    folder.mkdir(parents=True, exist_ok=True)
    alone = _libc.unshare(_NEW_NAMESPACE) == 0 and _libc.mount(None, b"/", None, _PRIVATE, None) == 0
    if not (alone and _mount(folder, size=size)):
        os._exit(NO_DISK)


def on_small_disk(folder, doing, size):
    """Do a job on a disk that is too small, then on one that is not; tell what was said and what was there."""
    small_disk(folder, size)
    said = ""
    try:
        JOBS[doing](folder)
    except OSError as error:
        said = f"{type(error).__name__} {error}"
    shutil.copytree(folder, f"{folder}.failed")
    assert _mount(folder, _REMOUNT, 1 << 16)
    JOBS[doing](folder)
    shutil.copytree(folder, f"{folder}.ended")
    Path(f"{folder}.said").write_text(said)


def _attempts(disk):
    """Things that write to a disk, by name."""
    ours = trainer(disk / "run", max_steps=2, hub_model_id="org/model")
    ours.train()
    tempfile.tempdir = str(disk)
    make_folder(disk / "model")
    return {
        "model": lambda: whole_copy(ours, disk / "saved"),
        "record": lambda: write_record(disk / "model", minimal_record()),
        "cache": lambda: ResultCache(disk / "fits").put("key", {"test": 0.5}),
        "claim": lambda: claim_run_folder(disk / "another", {"rho": 1}),
        "push": lambda: ours.push_to_hub(),
    }


def whole_copy(ours, folder):
    with whole_folder(folder) as staged:
        ours.save_model(str(staged))


def writers(folder):
    """Write all kinds of things to a disk that is full, and to one that is read-only; tell what was said."""
    disk, found = folder / "disk", {}
    small_disk(disk, 4096)
    attempts = _attempts(disk)
    before = {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()}
    with suppress(OSError), (disk / "ballast").open("wb", buffering=0) as ballast:
        while True:
            ballast.write(b"0" * 4096)
    for state in ("full", "read-only"):
        if state == "read-only":
            del attempts["push"]  # Python finds no place for a temporary folder and says so
        for name, attempt in attempts.items():
            try:
                attempt()
                found[f"{name} {state}"] = "nothing"
            except Exception as error:
                found[f"{name} {state}"] = f"{type(error).__name__} {error}"
        if state == "full":
            (disk / "ballast").unlink()
            assert _mount(disk, _REMOUNT | _READ_ONLY)
        assert {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()} == before
    (folder / "found.json").write_text(json.dumps(found))


JOBS = {job.__name__: job for job in (protect, terminated, interrupted, sweep, push, on_small_disk, writers)}
