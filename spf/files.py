"""Writing files whole or not at all."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; the file takes its place when the block ends, and is removed if it fails.

    Makes the directory. Two processes may write the same file: the later one's stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
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
