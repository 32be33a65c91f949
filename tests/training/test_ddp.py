import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .ddp_script import RUNS, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ddp")


@pytest.fixture(scope="module")
def ranks(folder):
    """What two processes found, started once for all tests."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, "-m", "tests.training.ddp_script", str(folder)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_agree(ranks, name):
    """Weights, ADMM state, simulated attackers' heads and offsets, and logs are the same on both ranks, to the bit."""
    (one, log), (other, other_log) = (found[name] for found in ranks)
    assert one.keys() == other.keys()
    for group in one:
        assert one[group].keys() == other[group].keys()
        assert [n for n, tensor in one[group].items() if not torch.equal(tensor, other[group][n])] == []
    assert log == other_log


def relative_distance(a, b):
    """Of all tensors of a group together."""
    error, size = (
        sum(float(t.double().square().sum()) for t in part) for part in ([a[n] - b[n] for n in a], a.values())
    )
    return (error / size) ** 0.5


@pytest.mark.parametrize("name", [name for name in RUNS if name != "resnet"])
def test_two_processes_do_what_one_does(ranks, tmp_path, name):
    """Same images, same result: every term is that of the whole batch, up to rounding."""
    (one, log), (two, other_log) = run(name, tmp_path, 1), ranks[0][name]
    assert one.keys() == two.keys()
    for group in one:
        assert one[group].keys() == two[group].keys()
        assert relative_distance(one[group], two[group]) < 1e-3, group
    assert all(torch.equal(mask, two["masks"][n]) for n, mask in one["masks"].items())
    assert len(log) == len(other_log) == 8
    for row, other in zip(log, other_log, strict=True):
        assert row == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_checkpoints_are_whole(ranks, folder):
    assert (folder / "adaptive" / "checkpoint-8" / "ntp_state.safetensors").exists()
