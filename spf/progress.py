"""Progress of what takes long: one kind of bar, tqdm's, on one process; it moves even where one step takes long."""

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from time import time
from typing import Any, TypeVar

from tqdm.auto import tqdm
from transformers.utils.logging import is_progress_bar_enabled

from spf.sharding import is_first

DELAY = 2.0
"""Seconds before anything is shown: what is over sooner says nothing."""

BEAT = 5.0
"""Seconds between two signs of life."""

SELDOM = 30.0
"""Seconds between two where nothing is drawn over, as in a file: each is a line there."""

Item = TypeVar("Item")


class Lines:
    """A stream in which each state of a bar is a line of its own."""

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, text: str) -> None:
        line = text.replace("\x1b[A", "").strip("\r\n ")  # what moves the cursor, and blanks that wipe a bar out
        if line:
            self.stream.write(f"{line}\n")

    def flush(self) -> None:
        self.stream.flush()


def _is_drawn_over() -> bool:
    """Whether a bar's next state takes the place of the one before: in a terminal or notebook."""
    return sys.stderr.isatty() or any(kind.__module__ == "tqdm.notebook" for kind in tqdm.__mro__)


@contextmanager
def progress(total: int | None, description: str, *, shown: bool = True, **options: Any) -> Iterator[tqdm]:
    """A bar to `update` while the block runs; without a total only the time that has passed.

    None is shown on other processes than the first, or where transformers' are turned off. options: tqdm's.
    """
    shown = shown and is_first() and is_progress_bar_enabled()
    if total is None:
        options["bar_format"] = "{desc}: {elapsed}{postfix}"
    # miniters: every update looks at the clock, however many went fast before
    options = {"leave": False, "miniters": 0, "delay": DELAY, **options}
    beat = BEAT
    if not _is_drawn_over():
        beat = SELDOM
        options |= {"mininterval": beat, "file": Lines(sys.stderr)}
    with tqdm(total=total, desc=description, disable=not shown, **options) as bar:
        if not shown:
            yield bar
            return
        ended = Event()
        thread = Thread(target=_beat, args=(bar, ended, beat), daemon=True)
        thread.start()
        try:
            yield bar
        finally:
            ended.set()
            thread.join()


def _beat(bar: tqdm, ended: Event, seconds: float) -> None:
    while not ended.wait(seconds):
        if time() - bar.last_print_t < seconds / 2:
            continue  # an update has just been shown
        bar.refresh()
        bar.last_print_t = time()  # else tqdm thinks that nothing was shown, and does not clear it


def tracked(items: Collection[Item], description: str, *, shown: bool = True) -> Iterator[Item]:
    """The items, with a bar that counts them."""
    with progress(len(items), description, shown=shown) as bar:
        for item in items:
            yield item
            bar.update()
