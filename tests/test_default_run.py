"""The README's run with its real numbers of steps, against what we promise of it. `pytest -m slow` runs it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_default_run_keeps_its_promises(tmp_path):
    """Source kept, sparsity exact, real transfer before, none left with the mask kept, scratch converged."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "recipes/ntp_vit.py",
        "--output_dir",
        str(tmp_path / "run"),
    ]
    start = time.perf_counter()
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=1800)
    seconds = time.perf_counter() - start
    results = json.loads((tmp_path / "run" / "protected" / "results.json").read_text())
    source, areas = results["source"], results["slc_auc"]
    assert source["accuracy_before"] >= 0.95
    assert source["accuracy_before"] - source["accuracy_after"] <= 0.01
    assert results["sparsity"] == pytest.approx(results["sparsity_details"]["requested"], abs=1e-5)
    assert results["sparsity"] >= 0.5
    assert areas["unprotected"]["normalized"] >= 0.10
    assert areas["protected_mask"]["normalized"] < 0
    assert len(results["slc"]["seeds"]) >= 3
    convergence = results["slc"]["scratch_convergence"]
    assert abs(convergence["accuracy_3x"] - convergence["accuracy"]) < 0.02
    assert seconds < 600
