import subprocess
import sys
from pathlib import Path

import torch


def test_two_processes_agree(tmp_path):
    """Weights, ADMM state, simulated attacker's head and logged losses are the same on both ranks."""
    root = Path(__file__).parents[2]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, "-m", "tests.training.ddp_script", str(tmp_path)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (one, log_one), (other, log_other) = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
    terms = ("source_loss", "target_loss", "fisher_loss", "sparsity", "primal_residual")
    for a, b in zip(log_one, log_other, strict=True):
        assert [a.get(term) for term in terms] == [b.get(term) for term in terms]
    assert (tmp_path / "run" / "checkpoint-12" / "ntp_state.safetensors").exists()
