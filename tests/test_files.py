import os

import pytest

from maml_lightning.files import write_whole


def test_writes_and_replaces(tmp_path):
    for content in (b"old", b"new"):
        write_whole(tmp_path / "file", lambda file, content=content: file.write(content), ".growing")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"new"}


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, where):
    def fail(*_):
        raise OSError(28, "No space left on device")

    def write(file):
        file.write(b"half")
        if where == "write":
            fail()

    (tmp_path / "file").write_bytes(b"old")
    if where != "write":
        monkeypatch.setattr(os, where, fail)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "file", write, ".growing")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"old"}
