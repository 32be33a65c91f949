"""What a signal does while it is kept; whole runs that get one: test_survival.py."""

import os
import signal

import pytest

from hf_ntp import interruption
from hf_ntp.interruption import KeptSignals


def press():
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_kept_signal_is_delivered_at_the_end():
    done = []
    with pytest.raises(SystemExit) as stopped, KeptSignals():
        press()
        press()  # a launcher passes on what the process has got already
        done.append("the rest")
    assert (stopped.value.code, done) == (143, ["the rest"])


def test_a_second_press_acts_at_once(monkeypatch):
    monkeypatch.setattr(interruption, "_ONE_PRESS", -1.0)
    done = []
    with pytest.raises(SystemExit) as stopped, KeptSignals():
        press()
        done.append("first")
        press()
        done.append("second")
    assert (stopped.value.code, done) == (143, ["first"])
