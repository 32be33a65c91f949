"""Processes that have imported everything when they start: importing takes longer than most of what tests do."""

import multiprocessing
import os

import torch

fresh = multiprocessing.get_context("forkserver")
fresh.set_forkserver_preload(["tests.survival"])


def begin(log):
    """First lines of such a process: one thread, and what it says goes to a file."""
    torch.set_num_threads(1)
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
