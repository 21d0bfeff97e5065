"""A sign of life while libraries are imported: nothing else can show one then. Light: imports none of them."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread
from time import monotonic

BEAT = 5.0
"""Seconds between two signs; what is over sooner says nothing."""


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say every few seconds on stderr for how long the block has been running; the line is wiped out at its end."""
    ended, started = Event(), monotonic()

    def say() -> None:
        line = ""
        while not ended.wait(BEAT):
            minutes, seconds = divmod(round(monotonic() - started), 60)
            line = f"{what}: {minutes:02}:{seconds:02}"
            print(f"\r{line}", end="", file=sys.stderr, flush=True)
        if line:
            print(f"\r{' ' * len(line)}\r", end="", file=sys.stderr, flush=True)

    thread = Thread(target=say, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
