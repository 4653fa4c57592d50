"""Files that are replaced whole."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from moe_jax.files import write_atomic


def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    write_atomic(tmp_path / "a.json", "old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_atomic(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


def test_writers_of_one_pid_do_not_meet(tmp_path):
    """As two containers on a file system that they share, whose processes have the same number."""
    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(lambda n: write_atomic(tmp_path / "folder" / "a", bytes([n]) * 10_000), range(64)):
            pass
    found = (tmp_path / "folder" / "a").read_bytes()
    assert len(found) == 10_000 and len(set(found)) == 1 and os.listdir(tmp_path / "folder") == ["a"]
