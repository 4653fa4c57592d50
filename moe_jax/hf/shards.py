"""safetensors files: which tensors there are and where their bytes lie, each read alone; and files written one tensor at a time.

A file is 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, then the bytes (the safetensors format). The library of that
name maps whole files into memory; here what is in memory is what was asked for, and everything that is wrong with a file is said by name.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from moe_jax.errors import CheckpointError, Unsupported

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # bytes; as the safetensors library has it


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Its values, or those of a slice for each axis; only whole rows (of the first axis) are read."""
        first, last, _ = index[0].indices(self.shape[0]) if index else (0, self.shape[0] if self.shape else 1, 1)
        row = self.nbytes // self.shape[0] if self.shape and self.shape[0] else self.nbytes
        with open(self.file, "rb") as file:
            file.seek(self.offset + first * row)
            values = np.fromfile(file, self.dtype, max(last - first, 0) * (row // self.dtype.itemsize))
        shape = (last - first, *self.shape[1:]) if self.shape else ()
        if values.size != math.prod(shape):
            raise CheckpointError(f"{self.file} is truncated: it ended while a tensor of shape {self.shape} was read")
        return values.reshape(shape)[(slice(None), *index[1:])] if index else values.reshape(shape)


def find_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint folder, by name: of model.safetensors, or of the files that model.safetensors.index.json lists.

    Raises CheckpointError for a damaged file, an index that does not say what the files hold, and a name that leaves the folder.
    """
    if (folder / INDEX).is_file():
        return _indexed(folder)
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    others = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".safetensors"))
    pickles = (
        " (.bin and .pt files are pickles, which are never loaded)" if any(not name.endswith("safetensors") for name in others) else ""
    )
    raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}; it has {', '.join(others[:4]) or 'no weights'}{pickles}")


def _indexed(folder: Path) -> dict[str, Tensor]:
    path = folder / INDEX
    places = _parsed(path.read_bytes(), path).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise CheckpointError(f"{path} has no weight_map of tensor names to files")
    found: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name or name in ("", ".", ".."):
            raise CheckpointError(f"{path} names the file {name!r}, which points outside its folder: refused")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} lacks the file {name} that its index lists; fetch it again")
        held = read_header(folder / name)
        twice = found.keys() & held.keys()
        if twice:
            raise CheckpointError(f"{name} and {found[min(twice)].file.name} both hold the tensor {min(twice)}: refused")
        found |= held
    differing = sorted(
        tensor for tensor in found.keys() | places.keys() if tensor not in found or places.get(tensor) != found[tensor].file.name
    )
    if differing:
        raise CheckpointError(f"{path} and its files differ in where {len(differing)} tensors are, e.g. {', '.join(differing[:3])}")
    return found


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one file. Every length and offset is compared with the file's size before it is used. Raises CheckpointError."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little") if size >= 8 else -1
        if not 2 <= length <= min(size - 8, _LONGEST_HEADER):
            raise CheckpointError(f"{path} is truncated or no safetensors file: {size:,} bytes, with a header of {length:,} announced")
        header = _parsed(file.read(length), path)
    header.pop("__metadata__", None)
    begin, tensors = 8 + length, {}
    for name, entry in header.items():
        tensors[name] = _tensor(path, name, entry, begin, size)
    end = begin
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset < end:
            raise CheckpointError(f"{path}: the bytes of the tensor {name} overlap with those of another: refused")
        end = tensor.offset + tensor.nbytes
    return tensors


def _tensor(path: Path, name: str, entry: Any, begin: int, size: int) -> Tensor:
    try:
        dtype, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in (*shape, first, last)):
            raise ValueError
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(
            f"{path}: the header's entry for {name!r} is not one of a dtype, a shape and two offsets: {str(entry)[:120]}"
        ) from None
    if dtype not in DTYPES:
        raise Unsupported(f"{path}: the tensor {name} is of type {str(dtype)[:20]}; supported: {', '.join(DTYPES)}")
    tensor = Tensor(path, DTYPES[dtype], shape, begin + first)
    if tensor.nbytes != last - first:
        raise CheckpointError(
            f"{path}: {name} of type {dtype} and shape {shape} needs {tensor.nbytes:,} bytes, its offsets give it {last - first:,}"
        )
    if begin + last > size:
        raise CheckpointError(f"{path} is truncated: {name} ends at byte {begin + last:,} of a file of {size:,}")
    return tensor


def _parsed(text: bytes, path: Path) -> dict[str, Any]:
    """A JSON object; a key that stands in it twice is refused."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{path} names {twice!r} twice: refused")
        return found

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: its JSON cannot be read ({str(error)[:100]})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: its JSON is no object")
    return value


def write_shards(folder: Path, shapes: dict[str, tuple[tuple[int, ...], np.dtype]], values: Iterable[np.ndarray], shard_bytes: int) -> None:
    """Writes model.safetensors, or several files and their index, of at most `shard_bytes` each (one tensor at least).

    shapes: (shape, dtype) by name, in the order of `values`, which is read one tensor at a time.
    """
    shards, room = [[]], shard_bytes
    for name, (shape, dtype) in shapes.items():
        nbytes = math.prod(shape) * dtype.itemsize
        if shards[-1] and nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= nbytes
    stream, count = iter(values), len(shards)
    files = [SINGLE] if count == 1 else [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    for file, names in zip(files, shards, strict=True):
        _write(folder / file, {name: shapes[name] for name in names}, stream)
    if count > 1:
        total = sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes.values())
        places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2) + "\n")


def _write(path: Path, shapes: dict[str, tuple[tuple[int, ...], np.dtype]], stream: Iterator[np.ndarray]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape, dtype in shapes.values():
            value = next(stream)
            assert value.shape == shape and value.dtype == dtype, (value.shape, value.dtype, shape, dtype)
            file.write(np.ascontiguousarray(value).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
