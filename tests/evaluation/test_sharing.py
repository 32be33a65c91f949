"""Several processes and one folder: every fit once, and a death holds nobody up."""

import json
import os
import signal
import socket
import time
from dataclasses import asdict
from pathlib import Path
from threading import Barrier, Thread

import pytest

from hf_ntp.evaluation import claims, runner
from hf_ntp.evaluation.claims import Claims

from ..processes import fresh
from .sweep_script import main, sweep


def test_two_processes_share_the_fits_and_one_survives_the_other(checkpoints, tmp_path):
    victim, survivor = (
        fresh.Process(target=main, args=(tmp_path, name), daemon=True) for name in ("victim", "survivor")
    )
    for process in (victim, survivor):
        process.start()
    for process in (victim, survivor):
        process.join(180)
    said = (tmp_path / "survivor.log").read_text()
    assert (victim.exitcode, survivor.exitcode) == (-signal.SIGKILL, 0), said
    assert "Traceback" not in said

    alone = json.loads(json.dumps(asdict(sweep(tmp_path, tmp_path / "fits_alone"))))
    for found in ("victim_shared", "survivor_shared", "survivor_killed"):
        assert json.loads((tmp_path / f"{found}.json").read_text()) == alone, found
    for stage in ("shared", "killed"):
        shares = [(tmp_path / f"{stage}.{name}").read_text().splitlines() for name in ("victim", "survivor")]
        assert all(len(share) > 1 for share in shares), "both had their share"
        assert sum(map(len, shares)) == alone["fits"], "no fit was finished twice"
        assert not list((tmp_path / f"fits_{stage}").glob("*.claim"))


def test_a_claim_has_one_owner(tmp_path):
    mine, theirs = Claims(tmp_path), Claims(tmp_path)
    assert mine.take("a")
    assert not theirs.take("a")
    assert not mine.take("a")
    assert theirs.take("b")
    mine.release("a")
    assert theirs.take("a")
    assert Claims(None).take("a")


@pytest.mark.parametrize(
    ("owner", "age", "free"),
    [
        (f"elsewhere {os.getpid()}", 0, False),
        (f"elsewhere {os.getpid()}", claims.EXPIRY + 5, True),
        (f"{socket.gethostname()} {os.getpid()}", 0, False),
        (f"{socket.gethostname()} {2**22 + 1}", 0, True),  # beyond any process id
        ("", 0, False),  # being written
        ("", claims.EXPIRY + 5, True),
    ],
    ids=["elsewhere", "elsewhere silent", "alive", "dead", "being written", "never written"],
)
def test_a_dead_owner_loses_the_claim_to_one_process_only(tmp_path, owner, age, free):
    dead = tmp_path / "a.0.claim"
    dead.write_text(owner)
    os.utime(dead, (time.time() - age,) * 2)
    start, takers, won = Barrier(8), [Claims(tmp_path) for _ in range(8)], []

    def race(taker):
        start.wait()
        if taker.take("a"):
            won.append(taker)

    threads = [Thread(target=race, args=(taker,)) for taker in takers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == free
    for winner in won:
        winner.release("a")
        assert not list(tmp_path.iterdir())


def test_a_claim_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no device that is always full")
    path = tmp_path / "a.0.claim"
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda self, mode: (opened(self, mode).close(), opened(full, "w"))[1])
    with pytest.raises(OSError, match="was not written: No space left on device; needed: more room"):
        Claims(tmp_path).take("a")
    assert not path.exists()


def test_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "HEARTBEAT", 0.01)
    mine = Claims(tmp_path)
    with mine.kept_alive():
        assert mine.take("a")
        (claim,) = tmp_path.iterdir()
        os.utime(claim, (0, 0))
        deadline = time.time() + 10
        while claim.stat().st_mtime == 0 and time.time() < deadline:
            time.sleep(0.01)
        assert claim.stat().st_mtime > 0
    assert not list(tmp_path.iterdir())


def test_a_failing_fit_is_named_and_given_back(checkpoints, tmp_path, monkeypatch):
    def fail(*args):
        raise ZeroDivisionError("no images")

    monkeypatch.setattr(runner, "_fit", fail)
    message = r"fit of scratch, 24 images, seed 0, tuned value 0\.001 failed \(ZeroDivisionError: no images\)"
    with pytest.raises(RuntimeError, match=message):
        sweep(tmp_path, tmp_path / "fits")
    assert not list((tmp_path / "fits").iterdir())
