"""Runs that are killed, again and again, end bit for bit as those that are not."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from . import survival
from .hub_server import HubServer
from .processes import fresh
from .publishing.folders import make_folder

ROOT = Path(__file__).parents[1]


def start(job, folder, **death):
    process = fresh.Process(target=survival.run, args=(job, str(folder)), kwargs=death, daemon=True)
    process.start()
    return process


def finish(job, folder, **death):
    """Exit status of a process that did the job, or died."""
    process = start(job, folder, **death)
    process.join(120)
    return process.exitcode


def said(folder):
    return Path(f"{folder}.log").read_text()[-3000:]


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


def survives(job, reference, folder, kills, moments):
    """Kill a job so many times at these moments; whenever it has ended, the result must be that of the whole one."""
    killed = 0
    while killed < kills:
        status = finish(job, folder, **next(moments))
        assert status in (-signal.SIGKILL, 0), said(folder)
        killed += status != 0
        if status == 0:
            CHECKS[job](reference, folder)
            shutil.rmtree(folder)
    assert finish(job, folder) == 0, said(folder)
    CHECKS[job](reference, folder)


def at_file_events(seed, folder):
    """Moments at random among the file events of a whole run, which are denser while something is saved."""
    draw, last = random.Random(seed), int(Path(f"{folder}.events").read_text())
    while True:
        yield {"at": draw.randint(1, last)}


def at_any_time(seed):
    """By the clock, so that a death may come amid a computation or amid a file."""
    draw = random.Random(seed)
    while True:
        yield {"seconds": draw.uniform(0.05, 1.5)}


def check_protect(reference, folder):
    for part in ("weights", "work/checkpoint-8", "work/checkpoint-10"):
        assert_same(reference / part, folder / part)
    assert sorted(path.name for path in (folder / "work").glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-8"]
    assert sorted(path.name for path in folder.iterdir()) == ["weights", "work"], "nothing unfinished is left"


def check_sweep(reference, folder):
    assert (reference / "curves.json").read_bytes() == (folder / "curves.json").read_bytes()
    # A claim outlives who dies between storing a result and giving the claim back; nobody looks at it any more.
    fits = [{path.name: path.read_bytes() for path in (each / "fits").glob("*.json")} for each in (reference, folder)]
    assert fits[0] == fits[1]


CHECKS = {"protect": check_protect, "sweep": check_sweep}


@pytest.mark.parametrize(("job", "kills"), [("protect", 2), ("sweep", 1)])
def test_killed_runs_end_as_uninterrupted_ones(whole, tmp_path, job, kills):
    reference = whole(job)
    survives(job, reference, tmp_path / "run", kills, at_file_events(0, reference))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize(("job", "kills"), [("protect", 6), ("sweep", 3)])
def test_runs_killed_at_file_events(whole, tmp_path, job, kills, seed):
    reference = whole(job)
    survives(job, reference, tmp_path / "run", kills, at_file_events(seed, reference))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("job", CHECKS)
def test_runs_killed_at_any_time(whole, tmp_path, job, seed):
    survives(job, whole(job), tmp_path / "run", 4, at_any_time(seed))


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


def survives_a_full_disk(job, reference, folder, size):
    status = finish("on_small_disk", folder, doing=job, size=size)
    if status == survival.NO_DISK:
        pytest.skip("needs the right to mount a small disk")
    assert status == 0, said(folder)
    failed, message = Path(f"{folder}.failed"), Path(f"{folder}.said").read_text()
    assert re.match(r"NotWrittenError.* was not written: No space left on device; needed: more room \(0\.", message)
    assert not list(failed.rglob("*unfinished*")), "what cannot be finished takes no room"
    for checkpoint in failed.glob("work/checkpoint-*"):
        assert {path.name for path in checkpoint.iterdir()} == {
            path.name for path in (reference / "work" / "checkpoint-10").iterdir()
        }
    CHECKS[job](reference, Path(f"{folder}.ended"))


def test_a_full_disk(whole, tmp_path):
    survives_a_full_disk("protect", whole("protect"), tmp_path / "run", 900)


@pytest.mark.slow
@pytest.mark.parametrize("size", range(40, 1400, 120))
def test_disks_that_are_full_at_any_point(whole, tmp_path, size):
    survives_a_full_disk("protect", whole("protect"), tmp_path / "run", size)


@pytest.mark.slow
@pytest.mark.parametrize("size", [20, 40, 60, 72])
def test_a_sweep_on_a_full_disk(whole, tmp_path, size):
    survives_a_full_disk("sweep", whole("sweep"), tmp_path / "run", size)


def test_all_that_writes_says_why_it_cannot(tmp_path):
    if finish("writers", tmp_path) == survival.NO_DISK:
        pytest.skip("needs the right to mount a small disk")
    found = json.loads((tmp_path / "found.json").read_text())
    for what, message in found.items():
        full = (
            "No space left on device; needed: more room" if "full" in what else "Read-only file system; needed: a fo"
        )
        assert message.startswith("NotWrittenError"), (what, message)
        assert full in message, (what, message)


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_both_at_the_same_step(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch += ["-m", "tests.training.ddp_interrupted"]
    ranks = {}
    for folder, how in (("a", "whole"), ("b", "interrupted"), ("b", "resumed")):
        (tmp_path / folder).mkdir(exist_ok=True)
        done = subprocess.run([*launch, str(tmp_path / folder), how], cwd=ROOT, capture_output=True, timeout=200)
        assert (done.returncode == 0) == (how != "interrupted"), done.stderr[-3000:]
        ranks[how] = [torch.load(tmp_path / folder / f"{how}{rank}.pt") for rank in (0, 1)]
    assert {step for step, _ in ranks["interrupted"]} == {4}, "the step after the one that got it"
    assert (tmp_path / "b" / "run" / "checkpoint-4" / "ntp_state.safetensors").exists()
    for (step, resumed), (last, whole) in zip(ranks["resumed"], ranks["whole"], strict=True):
        assert step == last
        assert all(torch.equal(resumed[name], whole[name]) for name in whole)


QUICK = (
    "--max_steps 20 --pretrain_steps 10 --save_steps 10 --attack_steps 22 --attack_seeds 0 1 --sample_sizes 10 20 "
    "--attack_learning_rates 1e-3 --report_to none --disable_tqdm true --source_max_samples 300 --jobs 2"
).split()


@pytest.mark.slow
def test_the_recipe_ended_by_signals_at_any_time(tmp_path):
    """Its command, ended at random moments of pretraining, protection and evaluation; the same result in the end."""

    def launch(run):
        command = [sys.executable, str(ROOT / "recipes" / "ntp_vit.py"), "--output_dir", str(run), *QUICK]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)

    started = time.monotonic()
    process = launch(tmp_path / "whole")
    assert process.wait(600) == 0, process.stderr.read()
    seconds, draw, killed = time.monotonic() - started, random.Random(0), 0
    statuses = {signal.SIGTERM: {143, -15}, signal.SIGKILL: {-9}, signal.SIGINT: {130, -2}}
    for number in (*statuses, *statuses):
        if (tmp_path / "run" / "protected").exists():  # it came too late, when all was done
            shutil.rmtree(tmp_path / "run")
        process = launch(tmp_path / "run")
        try:
            process.wait(draw.uniform(0.3, 0.8) * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            status = process.wait(100)
            killed += status in statuses[number]
            assert status in statuses[number] or (tmp_path / "run" / "protected").exists(), process.stderr.read()
    process = launch(tmp_path / "run")
    assert process.wait(600) == 0, process.stderr.read()
    assert killed >= 3
    results = [json.loads((tmp_path / run / "protected" / "results.json").read_text()) for run in ("whole", "run")]
    for result in results:
        del result["seconds"]
    assert results[0] == results[1]
    for part in ("unprotected", "work/checkpoint-20", "work/protected"):
        assert_same(tmp_path / "whole" / part, tmp_path / "run" / part)
    assert not list((tmp_path / "run").rglob("*unfinished*"))
