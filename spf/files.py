"""Writing files whole or not at all, reading tensors back, one run at a time in a directory, and going on with one."""

import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from spf.config import read_json


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; the file takes its place when the block ends, and is removed if it fails.

    Makes the directory. A symlink stays and its target gets the content; an existing file keeps its mode.
    Two processes may write the same file: the later one's stays.

    Raises:
        OSError: `path` is a directory, a device, a fifo or a socket.
    """
    target = path.resolve()
    mode = _mode_of_file(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
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


def _mode_of_file(path: Path) -> int | None:
    """The mode of an existing file, None where there is none; refuses what is no file."""
    if not path.exists():
        return None
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "a device, fifo or socket"
        raise OSError(f"{path}: {kind}, which is not replaced; name a file to write")
    return mode


def check_output_file(path: Path) -> None:
    """Before any work: whether a file can be written there.

    Raises:
        OSError: no, in one sentence.
    """
    _mode_of_file(path)
    check_output_directory(path.resolve().parent)


def check_output_directory(path: Path) -> None:
    """Before any work: whether files can be written into this directory, or into one made there.

    Raises:
        OSError: no, in one sentence.
    """
    target = path.resolve()
    there = next(place for place in (target, *target.parents) if place.exists())
    if not there.is_dir():
        place = "" if there == target else f"{there} is "
        raise OSError(f"{path}: {place}no directory, so nothing can be written there; name another")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise OSError(f"{path}: nothing can be written in {there} ({error.strerror}); name another place") from error


def read_tensors(path: Path, what: str, remedy: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors and header of a safetensors file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged or something else: one sentence with the path and what to do.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {'a directory' if path.is_dir() else 'no such file'}, not {what}")
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not {what}, or damaged ({' '.join(str(error).split())}); {remedy}") from error


@contextmanager
def directory_lock(path: Path) -> Iterator[None]:
    """Hold a directory for one run; makes it. The system frees the lock of a process that dies, however it dies.

    Raises:
        OSError: it cannot be made or written into.
        BlockingIOError: another run holds it; the message has its pid and start time.
    """
    check_output_directory(path)
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


def claim(path: Path, settings: Mapping[str, Any], *, overwrite: bool = False, parts: Sequence[str] = ()) -> None:
    """Note in a file what the run in its directory is made with, so that only the same run goes on there.

    overwrite: begin anew, whatever there is: the `parts`, files and directories beside it, are removed.

    Raises:
        ValueError: a run with other settings is there; the message names the first that differs.
    """
    wanted = json.loads(json.dumps(dict(settings)))
    if overwrite:
        for part in (path.parent / name for name in (path.name, *parts)):
            if part.is_dir():
                shutil.rmtree(part)
            else:
                part.unlink(missing_ok=True)
    if not path.exists():
        write_json(path, wanted)
        return
    found = read_json(dict[str, Any], path, "damaged; remove it and what was made with it")
    if difference := _difference(found, wanted):
        remedy = "name another directory" + (" or give --overwrite" if parts else "")
        raise ValueError(f"{path.parent}: holds a run with other settings: {difference}; {remedy}")


@contextmanager
def claimed_for(path: Path, parts: Sequence[str]) -> Iterator[None]:
    """A run whose directory was claimed in `path`: if it breaks off before any of its `parts` was written, by a model
    that is not there, say, the claim is taken back."""
    try:
        yield
    except BaseException:
        if not any((path.parent / part).exists() for part in parts):
            path.unlink(missing_ok=True)
        raise


def _difference(found: Any, wanted: Any, name: str = "") -> str:
    """The first setting that differs, by its dotted name; empty if none does."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in (*wanted, *(found.keys() - wanted.keys())):
            if text := _difference(found.get(key), wanted.get(key), f"{name}.{key}" if name else str(key)):
                return text
        return ""
    return "" if found == wanted else f"{name} was {found}, now {wanted}"


def weights_at(name: str) -> dict[str, list[int]]:
    """Size and time of change of a model directory's weights, by file; empty for what is no directory.

    What tells that a model is no longer the one a run began with.
    """
    found = sorted(Path(name).glob("*.safetensors")) if Path(name).is_dir() else []
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in found}
