"""Writing files whole or not at all, and one run at a time in a directory."""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; the file takes its place when the block ends, and is removed if it fails.

    Makes the directory. A symlink stays and its target gets the content; an existing file keeps its mode.
    Two processes may write the same file: the later one's stays.

    Raises:
        OSError: `path` is a directory, a device, a fifo or a socket.
    """
    target = path.resolve()
    mode = target.stat().st_mode if target.exists() else None
    if mode is not None and not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "a device, fifo or socket"
        raise OSError(f"{path}: {kind}, which is not replaced; name a file to write")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if mode is not None:
            temporary.chmod(stat.S_IMODE(mode))
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def replace_file(path: Path, content: bytes) -> Path:
    """Write a file atomically; returns its path."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    return path


def write_json(path: Path, content: object) -> None:
    """Write a JSON file atomically."""
    replace_file(path, json.dumps(content, indent=2).encode("utf-8"))


@contextmanager
def directory_lock(path: Path) -> Iterator[None]:
    """Hold a directory for one run; makes it. The system frees the lock of a process that dies, however it dies.

    Raises:
        BlockingIOError: another run holds it; the message has its pid and start time.
    """
    path.mkdir(parents=True, exist_ok=True)
    holder = path / ".spf.pid"
    lock = FileLock(path / ".spf.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        # The holder may not have written its pid yet.
        who = holder.read_text("utf-8") if holder.is_file() else "it has only just started"
        raise BlockingIOError(
            f"{path}: another run writes here ({who}); wait for it, end it, or name another output directory"
        ) from None
    try:
        replace_file(holder, f"pid {os.getpid()}, since {datetime.now():%Y-%m-%d %H:%M:%S}".encode())
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()
