"""Progress of what takes long: one kind of bar, tqdm's, on one process; it moves even where one step takes long."""

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

Item = TypeVar("Item")


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
    with tqdm(total=total, desc=description, disable=not shown, **options) as bar:
        if not shown:
            yield bar
            return
        ended = Event()
        thread = Thread(target=_beat, args=(bar, ended), daemon=True)
        thread.start()
        try:
            yield bar
        finally:
            ended.set()
            thread.join()


def _beat(bar: tqdm, ended: Event) -> None:
    while not ended.wait(BEAT):
        bar.refresh()
        bar.last_print_t = time()  # else tqdm thinks that nothing was shown, and does not clear it


def tracked(items: Collection[Item], description: str, *, shown: bool = True) -> Iterator[Item]:
    """The items, with a bar that counts them."""
    with progress(len(items), description, shown=shown) as bar:
        for item in items:
            yield item
            bar.update()
