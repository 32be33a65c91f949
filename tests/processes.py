"""Processes that have imported everything when they start: importing takes longer than most of what tests do."""

import faulthandler
import multiprocessing
import os
import socket
import time

import torch

fresh = multiprocessing.get_context("forkserver")
fresh.set_forkserver_preload(["tests.survival"])


def begin(log):
    """First lines of such a process: one thread, and what it says goes to a file."""
    torch.set_num_threads(1)
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)


def launch(target, log, *arguments, processes=2, seconds=240):
    """Run a function in processes that have the environment torchrun gives; when one fails, all end.

    Returns:
        Exit statuses, and what each of them said.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [f"{log}{rank}.log" for rank in range(processes)]
    ranks = [
        fresh.Process(target=_rank, args=(rank, processes, port, name, target, arguments), daemon=True)
        for rank, name in enumerate(logs)
    ]
    for rank in ranks:
        rank.start()
    end = time.monotonic() + seconds
    while any(rank.exitcode is None for rank in ranks) and not any(rank.exitcode for rank in ranks):
        time.sleep(0.05)
        if time.monotonic() > end:
            break
    for rank in ranks:
        rank.kill()
        rank.join()
    said = []
    for name in logs:
        with open(name) as file:
            said.append(file.read())
    return [rank.exitcode for rank in ranks], said


def _rank(rank, processes, port, log, target, arguments):
    begin(log)
    faulthandler.enable()
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ |= {key: str(value) for key, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    target(*arguments)
