"""Runs that are killed, again and again, end bit for bit as those that are not."""

import json
import multiprocessing
import random
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .hub_server import HubServer
from .publishing.folders import make_folder

# Forks of a process that has imported everything: importing takes longer than these jobs.
_fresh = multiprocessing.get_context("forkserver")
_fresh.set_forkserver_preload(["tests.survival"])


def start(job, folder, **death):
    from . import survival

    process = _fresh.Process(target=survival.run, args=(job, str(folder)), kwargs=death, daemon=True)
    process.start()
    return process


def finish(job, folder, **death):
    """Exit status of a process that did the job, or died."""
    process = start(job, folder, **death)
    process.join(120)
    return process.exitcode


def said(folder):
    return Path(f"{folder}.log").read_text()[-3000:]


def events(folder):
    """Number of file events of the last whole run in a folder."""
    return int(Path(f"{folder}.events").read_text())


def without_times(log):
    return [{k: v for k, v in row.items() if not k.endswith(("runtime", "per_second"))} for row in log]


def contents(path):
    """What is in a file of a checkpoint, fit for ==."""
    if path.suffix == ".safetensors":
        return {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()}
    if path.suffix in (".pt", ".pth"):
        return repr_of(torch.load(path, weights_only=False))
    if path.name == "trainer_state.json":
        state = json.loads(path.read_text())
        return {**state, "log_history": without_times(state["log_history"])}
    if path.name == "training_args.bin":  # holds the folder's name and the time
        return None
    return path.read_bytes()


def repr_of(value):
    if isinstance(value, dict):
        return {str(key): repr_of(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [repr_of(entry) for entry in value]
    return value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value)


def assert_same(one, other):
    names = [{path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} for folder in (one, other)]
    assert names[0] == names[1]
    for name in sorted(names[0]):
        assert contents(one / name) == contents(other / name), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder of each job, done without interruption."""
    done = {}

    def get(job):
        if job not in done:
            done[job] = tmp_path_factory.mktemp(job) / "run"
            assert finish(job, done[job]) == 0, said(done[job])
        return done[job]

    return get


def killed_and_continued(job, folder, deaths):
    """Kill a job at every one of these moments, then let it end; the result must be that of the whole one."""
    for death in deaths:
        assert finish(job, folder, **death) in (-signal.SIGKILL, 0)
    assert finish(job, folder) == 0, said(folder)
    return folder


def kills(count, seed, last):
    """As many file events, at random: those of early ones die in the first save, those of late ones in the last."""
    draw = random.Random(seed)
    return [{"at": draw.randint(1, last)} for _ in range(count)]


def check_protect(reference, folder):
    for part in ("weights", "work/checkpoint-8", "work/checkpoint-10"):
        assert_same(reference / part, folder / part)
    assert sorted(path.name for path in (folder / "work").glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-8"]
    assert sorted(path.name for path in folder.iterdir()) == ["weights", "work"], "nothing unfinished is left"


def check_sweep(reference, folder):
    assert (reference / "curves.json").read_bytes() == (folder / "curves.json").read_bytes()
    fits = [{path.name: path.read_bytes() for path in (each / "fits").iterdir()} for each in (reference, folder)]
    assert fits[0] == fits[1]


CHECKS = {"protect": check_protect, "sweep": check_sweep}


@pytest.mark.parametrize(("job", "count"), [("protect", 2), ("sweep", 1)])
def test_killed_runs_end_as_uninterrupted_ones(whole, tmp_path, job, count):
    reference = whole(job)
    CHECKS[job](reference, killed_and_continued(job, tmp_path / "run", kills(count, 0, events(reference))))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize(("job", "count"), [("protect", 6), ("sweep", 3)])
def test_runs_killed_at_file_events(whole, tmp_path, job, count, seed):
    reference = whole(job)
    CHECKS[job](reference, killed_and_continued(job, tmp_path / "run", kills(count, seed, events(reference))))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("job", CHECKS)
def test_runs_killed_at_any_time(whole, tmp_path, job, seed):
    """By the clock rather than by an event, so that a death may come amid a computation or amid a file."""
    reference = whole(job)
    draw = random.Random(seed)
    deaths = [{"seconds": draw.uniform(0.05, 1.5)} for _ in range(4)]
    CHECKS[job](reference, killed_and_continued(job, tmp_path / "run", deaths))


@pytest.mark.slow
def test_pushes_killed_at_every_request(tmp_path):
    """After every death the repository holds nothing of the model, or all of it; the next push completes it."""
    folder = make_folder(tmp_path / "model")
    model = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    died = 0
    for at in range(1, 30):
        with HubServer() as hub:
            (tmp_path / "url").write_text(hub.url)
            hub.fail(".*", None, times=at - 1)
            hub.fail(".*", "stall")
            process = start("push", tmp_path)
            while process.is_alive() and len(hub.log) < at:
                process.join(0.02)
            process.kill()
            process.join()
            died += process.exitcode == -signal.SIGKILL
            for repo in hub.repos.values():
                assert repo.private
                assert set(repo.files) == {".gitattributes"} or repo.files.keys() >= model.keys()
            assert finish("push", tmp_path) == 0, said(tmp_path)
            assert {name: hub.model("org/model").files[name] for name in model} == model
        if process.exitcode == 0:
            break
    assert died >= 5


@pytest.mark.parametrize(("job", "status", "step"), [("terminated", 143, 3), ("interrupted", 1, 7)])
def test_signals_save_and_stop(whole, tmp_path, job, status, step):
    reference, folder = whole("protect"), tmp_path / "run"
    assert finish(job, folder) == status, said(folder)
    assert max(path.name for path in (folder / "work").glob("checkpoint-*")) == f"checkpoint-{step}"
    assert not (folder / "weights").exists()
    assert finish("protect", folder) == 0, said(folder)
    check_protect(reference, folder)
