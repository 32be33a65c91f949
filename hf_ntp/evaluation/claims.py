"""Who fits what: processes that share nothing but a folder agree on it, and survive each other's death."""

from __future__ import annotations

import errno
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from threading import Event, Thread

import psutil

from ..run_folder import writing

HEARTBEAT = 5.0
"""Seconds between two signs of life of a claim."""
EXPIRY = 60.0
"""Seconds without one after which its owner counts as dead."""
POLL = 0.5
"""Seconds between two looks at what other processes have finished."""


class Claims:
    """Claims of this process on pieces of work, visible to all processes that have the folder.

    A claim is a file that is made atomically and touched for as long as its process lives. A dead process's claim
    stays where it is: whoever makes the file of the next generation, which only one process can, has taken over. Work
    of a process that was only thought to be dead is done twice; as results are written whole, that costs time alone.

    Args:
        folder: Shared folder, made when needed. None shares nothing: everything can be claimed.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._held: dict[str, list[Path]] = {}

    def take(self, key: str) -> bool:
        """Claim ``key`` for this process; False where another process has it that seems to live.

        Raises:
            OSError: If the claim cannot be written; nothing is left of it.
        """
        if self.folder is None:
            return True
        self.folder.mkdir(parents=True, exist_ok=True)
        generations = []
        for number in count():
            path = self.folder / f"{key}.{number}.claim"
            generations.append(path)
            try:
                with writing(path), path.open("x") as file:
                    try:
                        file.write(f"{socket.gethostname()} {os.getpid()}")
                        file.flush()
                    except OSError:
                        path.unlink(missing_ok=True)
                        raise
            except FileExistsError:
                if self._alive(path):
                    return False
            else:
                break
        self._held[key] = generations
        return True

    def release(self, key: str) -> None:
        """Give ``key`` back, when its result is stored or cannot be had; the claims of its dead owners go too."""
        for path in self._held.pop(key, []):
            path.unlink(missing_ok=True)

    @contextmanager
    def kept_alive(self) -> Iterator[None]:
        """Show now and then that this process lives; at the end of the block, give back what is still claimed."""
        over = Event()
        heart = Thread(target=self._beat, args=(over,), daemon=True)
        heart.start()
        try:
            yield
        finally:
            over.set()
            heart.join()
            for key in list(self._held):
                self.release(key)

    def make_once(self, path: Path, make: Callable[[], None]) -> None:
        """Let one process call ``make``, which has to write ``path`` whole, and the others wait for it."""
        with self.kept_alive():
            while not path.exists():
                if self.take(path.name):
                    if not path.exists():
                        make()
                    self.release(path.name)
                else:
                    time.sleep(POLL)

    def _beat(self, over: Event) -> None:
        while not over.wait(HEARTBEAT):
            for *_, mine in list(self._held.values()):
                with suppress(OSError):
                    os.utime(mine)

    def _alive(self, claim: Path) -> bool:
        try:
            host, _, process = claim.read_text().partition(" ")
            # Both times are the file server's: clocks of machines differ.
            with tempfile.TemporaryFile(dir=self.folder) as now:
                age = os.fstat(now.fileno()).st_mtime - claim.stat().st_mtime
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                raise
            return True  # just given back: there is a result, or the next look finds it free
        if process and host == socket.gethostname() and not psutil.pid_exists(int(process)):
            return False
        return age < EXPIRY
