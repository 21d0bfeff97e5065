"""Files are written whole or not at all."""

import json
import os
import subprocess
import sys

import pytest

from spf.files import atomic_path, directory_lock, replace_file, write_json


def test_a_failed_write_leaves_the_former_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "new" / "state.json"
    write_json(path, {"step": 1})

    def write_half():
        with atomic_path(path) as temporary:
            temporary.write_text('{"step"')
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_half()
    assert json.loads(path.read_text()) == {"step": 1}
    assert list(path.parent.iterdir()) == [path]


def test_a_finished_write_replaces_the_file(tmp_path):
    path = tmp_path / "page.html"
    replace_file(path, b"old and longer")
    assert replace_file(path, b"new").read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["directory", "fifo", "link to a device"])
def test_what_is_no_file_is_not_replaced(tmp_path, kind):
    path = tmp_path / "out"
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/null")
    before = path.lstat().st_ino
    with pytest.raises(OSError, match="not replaced; name a file"):
        replace_file(path, b"new")
    assert path.lstat().st_ino == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_symlink_stays_and_its_target_keeps_its_mode(tmp_path):
    target, link = tmp_path / "there" / "target", tmp_path / "link"
    replace_file(target, b"old")
    target.chmod(0o640)
    link.symlink_to(target)
    replace_file(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert target.stat().st_mode & 0o777 == 0o640


HOLD = """
import sys, time
from pathlib import Path
from spf.files import directory_lock
with directory_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(120)
"""


def test_a_directory_is_held_by_one_run_and_freed_when_that_is_killed(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match=f"pid {other.pid}, since"), directory_lock(tmp_path):
            pass
    finally:
        other.kill()
        other.communicate()
    with directory_lock(tmp_path):
        assert str(os.getpid()) in (tmp_path / ".spf.pid").read_text()
    assert not (tmp_path / ".spf.pid").exists()


def test_two_writers_of_one_name_do_not_share_a_temporary_file(tmp_path):
    """Processes of several machines may have one number: the first took the second's half for its own."""
    path = tmp_path / "file"
    with atomic_path(path) as first:
        first.write_text("first")
        with atomic_path(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
