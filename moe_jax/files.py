"""Files that are there whole or not at all, whatever moment a process dies."""

import json
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any


def read_object(path: str | os.PathLike[str], error: type[Exception]) -> dict[str, Any] | None:
    """The JSON object in a file, or None where there is no file; raises `error` for one that cannot be read or holds something else."""
    try:
        value = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as problem:
        raise error(f"cannot read {path}: {getattr(problem, 'strerror', None) or str(problem)[:100]}") from None
    if not isinstance(value, dict):
        raise error(f"cannot read {path}: it holds {type(value).__name__}, no object")
    return value


def write_atomic(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Replaces a file, and makes its folder where there is none; a reader, or a crash at any moment, finds the old or the new content and nothing between."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")  # pids repeat among the machines that share a file system
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def append(file: Any, data: bytes) -> None:
    """Writes data to a file that is open without a buffer; raises OSError where the disk took a part of it alone."""
    if (written := file.write(data)) < len(data):
        raise OSError(28, f"No space left on device: {written} of {len(data)} bytes were written", str(file.name))


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Makes the names in a folder durable: a rename survives a power cut only after this."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
