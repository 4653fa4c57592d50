"""Files that are replaced whole."""

import os
import resource
from concurrent.futures import ThreadPoolExecutor

import pytest

from moe_jax.errors import DataError
from moe_jax.files import append, read_object, write_atomic


def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    write_atomic(tmp_path / "a.json", "old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_atomic(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


def test_a_disk_that_takes_a_part_is_an_error_with_the_path(tmp_path):
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open(tmp_path / "a", "ab", buffering=0) as file:
        append(file, b"whole")
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8, usual[1]))
            with pytest.raises(OSError, match="No space left on device: 3 of 100 bytes were written: '.*/a'$"):
                append(file, bytes(100))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert (tmp_path / "a").read_bytes() == b"whole" + bytes(3)


def test_writers_of_one_pid_do_not_meet(tmp_path):
    """As two containers on a file system that they share, whose processes have the same number."""
    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(lambda n: write_atomic(tmp_path / "folder" / "a", bytes([n]) * 10_000), range(64)):
            pass
    found = (tmp_path / "folder" / "a").read_bytes()
    assert len(found) == 10_000 and len(set(found)) == 1 and os.listdir(tmp_path / "folder") == ["a"]


def test_an_object_is_read_or_refused_in_one_line(tmp_path):
    path = tmp_path / "a.json"
    assert read_object(path, DataError) is None
    path.write_text('{"a": "ü"}', encoding="utf-8")
    assert read_object(path, DataError) == {"a": "ü"}
    for content, why in ((b"[1]", "it holds list, no object$"), (b"{", "Expecting"), (b"\xff", "utf-8"), (b"[" * 99_999, "recursion")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"cannot read .*a.json: .*{why}"):
            read_object(path, DataError)
    with pytest.raises(DataError, match="cannot read .*: Is a directory$"):
        read_object(tmp_path, DataError)
