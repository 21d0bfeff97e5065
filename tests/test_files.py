"""Files are written whole or not at all."""

import json

import pytest

from spf.files import atomic_path, replace_file, write_json


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
