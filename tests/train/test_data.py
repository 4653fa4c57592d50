"""Windows, splits and batches, against plain loops; resuming, sharding, and the seed study's counts."""

import dataclasses
import itertools
import json
import threading

import numpy as np
import pytest

from moe_jax.errors import ConfigError, DataError
from moe_jax.train import data as D
from moe_jax.train import sources, texts, tokenizers

SMALL = D.DataConfig(source="synthetic", tokenizer="bytes", seq_len=16, batch_size=4, accumulation=3, max_documents=200)
BYTES = tokenizers.load("bytes")


def corpus_of(config, train, validation=()):
    """A corpus of given ids, as load_corpus would have made."""
    arrays = [np.asarray(part, np.int32) for part in (train, validation)]
    return D.Corpus(config, *arrays, BYTES, "0" * 64, 1, 1, 0, 1, 1)


@pytest.fixture(scope="module")
def corpus():
    return D.load_corpus(SMALL)


@pytest.fixture(scope="module")
def data(corpus):
    return D.build(SMALL, 0, corpus=corpus)


# The two splits


def test_seed_study_counts():
    """Seed study 000: 500,000 tokens and windows of 512 give 499,488 windows, 49,948 of them validation; 9.8 passes in 100 updates."""
    config = D.DataConfig(seq_len=512, batch_size=24, accumulation=4, split="leaky", max_tokens=500_000, eval_windows=2400)
    data = D.build(config, 42, corpus=corpus_of(config, np.arange(500_000)))
    told = data.describe(steps=100)
    assert (told["train_windows"], told["validation_windows"], told["evaluated_windows"]) == (449_540, 49_948, 2400)
    assert told["train_windows"] + told["validation_windows"] == 499_488
    assert told["tokens_seen"] == 9600 * 512 and round(told["passes"], 1) == 9.8
    assert sum(array.nbytes for array in (data.tokens, data.train_starts, data.validation_starts)) < 7e6  # 1 GB if windows were copied
    every = np.concatenate([data.train_starts, data.validation_starts])
    np.testing.assert_array_equal(np.sort(every), np.arange(499_488))
    batches = list(data.validation_batches())
    assert len(batches) == 100 and batches[0]["tokens"].shape == (24, 512)
    # Split order, not sorted: the seed's loader does not shuffle what random_split has permuted.
    np.testing.assert_array_equal([batch["tokens"][0, 0] for batch in batches], data.validation_starts[:2400:24])
    assert not np.array_equal(data.validation_starts, np.sort(data.validation_starts))


def test_leaky_split_differs_by_seed():
    config = SMALL.replace(split="leaky")
    corpus = corpus_of(config, np.arange(1000))
    first, second, again = (D.build(config, seed, corpus=corpus) for seed in (0, 1, 0))
    assert set(first.validation_starts) != set(second.validation_starts)
    np.testing.assert_array_equal(first.validation_starts, again.validation_starts)
    assert len(first.validation_starts) == int(984 * 0.1)


def test_clean_windows_by_hand():
    config = SMALL.replace(seq_len=3, batch_size=1, accumulation=1)
    data = D.build(config, 0, corpus=corpus_of(config, [0, 1, 2, 3, 4, 5, 6, 7], [50, 51, 52, 53, 54]))
    seen = {tuple(data.batch(step)["tokens"][0, 0]): tuple(data.batch(step)["targets"][0, 0]) for step in range(2)}
    assert seen == {(0, 1, 2): (1, 2, 3), (3, 4, 5): (4, 5, 6)}  # 7 has no successor in its window's stream
    [batch] = data.validation_batches(1)
    assert batch["tokens"].tolist() == [[50, 51, 52]] and batch["targets"].tolist() == [[51, 52, 53]]


def test_clean_split_is_by_document_and_shares_no_text(tmp_path):
    """Every document is a repeated letter of its own, so a token tells which document it is from; one document is there twice."""
    documents = [chr(0x21 + i) * 60 for i in range(60)] + ["!" * 60]
    (tmp_path / "x.json").write_text(json.dumps(documents))
    config = SMALL.replace(source=str(tmp_path / "x.json"), validation_share=0.2, document_separator=False, max_documents=None)
    data = D.build(config, 0)
    parts = set(data.corpus.train.tolist()), set(data.corpus.validation.tolist())
    assert not parts[0] & parts[1] and len(parts[0] | parts[1]) == 60 and len(parts[1]) == 12
    read = [set(batch["tokens"][batch["weight"] > 0].tolist()) for batch in data.validation_batches()]
    assert set().union(*read) <= parts[1]
    trained = set().union(*(set(data.batch(step)["targets"].ravel().tolist()) for step in range(20)))
    assert trained <= parts[0]
    for seed in (1, 2):  # the run seed shuffles training and leaves the split alone
        other = D.build(config, seed)
        np.testing.assert_array_equal(other.corpus.validation, data.corpus.validation)
        assert not np.array_equal(other.order(0), data.order(0))


def test_trained_tokenizer_sees_training_documents_only(tmp_path, monkeypatch):
    given = []
    load = tokenizers.load
    monkeypatch.setattr(tokenizers, "load", lambda spec, documents, cache: given.extend(documents) or load(spec, documents, cache))
    corpus = D.load_corpus(SMALL.replace(tokenizer="bpe:300"), tmp_path)
    validation = corpus.tokenizer.decode(corpus.validation).split("<|endoftext|>")[:-1]
    training = corpus.tokenizer.decode(corpus.train).split("<|endoftext|>")[:-1]
    assert given == training and len(validation) == 20 and not set(validation) & set(given)


def test_too_little_text(tmp_path):
    path = tmp_path / "x.json"
    for documents, message in (
        (["only one"], "needs 2 different documents"),
        (["same", "same"], "needs 2 different documents"),
        ([" ", ""], "2 different documents, .* has 0"),
        (["long enough " * 5, "short"], "one window needs 17"),
    ):
        path.write_text(json.dumps(documents))
        with pytest.raises(DataError, match=message):
            D.build(SMALL.replace(source=str(path)), 0)
    D.build(SMALL, 0, corpus=corpus_of(SMALL, range(17), range(17)))  # one window each
    with pytest.raises(DataError, match="the validation part has 16 tokens, one window needs 17"):
        D.build(SMALL, 0, corpus=corpus_of(SMALL, range(17), range(16)))
    path.write_text(json.dumps([" "]))
    with pytest.raises(DataError, match="holds no text .1 documents, 1 of them empty"):
        D.build(SMALL.replace(source=str(path), split="leaky"), 0)
    path.write_text(json.dumps(["too short"]))
    with pytest.raises(DataError, match="10 tokens give 0 windows of 17, too few"):
        D.build(SMALL.replace(source=str(path), split="leaky"), 0)


# The stream


def leaky_stream(tmp_path, documents, **changes):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(documents))
    config = SMALL.replace(source=str(path), split="leaky", **{"document_order": "file", "max_documents": None, **changes})
    corpus = D.load_corpus(config)
    return BYTES.decode(corpus.train), corpus


def test_caps_and_separators(tmp_path):
    documents = ["abc", "  ", "defgh", "ij"]
    end = "<|endoftext|>"
    stream, corpus = leaky_stream(tmp_path, documents)
    assert stream == f"abc{end}defgh{end}ij{end}" and (corpus.train_documents, corpus.empty_documents) == (3, 1)
    assert (corpus.text_bytes, corpus.text_tokens) == (10, 10)
    assert leaky_stream(tmp_path, documents, document_separator=False)[0] == "abcdefghij"
    in_order, by_hash = (leaky_stream(tmp_path, documents, max_documents=3, document_order=order)[1] for order in ("file", "hash"))
    assert in_order.train_documents == by_hash.train_documents == 3 and in_order.text_bytes == by_hash.text_bytes == 10
    assert leaky_stream(tmp_path, documents, document_separator=False, max_characters=2)[0] == "abdeij"
    assert leaky_stream(tmp_path, documents, document_separator=False, max_documents=2)[0] == "abcdefgh"  # the empty one is none of them
    stream, corpus = leaky_stream(tmp_path, documents, document_separator=False, max_tokens=5)
    assert stream == "abcde" and corpus.train_documents == 2


def test_token_cap_is_on_both_parts_together():
    for cap in (1, 20_000, 1 << 40):
        capped = D.load_corpus(SMALL.replace(max_tokens=cap))
        whole = D.load_corpus(SMALL)
        for part in ("train", "validation"):
            short, long = getattr(capped, part), getattr(whole, part)
            np.testing.assert_array_equal(short, long[: len(short)])
        assert bool(len(capped.validation)) == (cap > 1)
        assert len(capped.train) + len(capped.validation) == min(cap, len(whole.train) + len(whole.validation))


def test_hash_order_mixes_and_does_not_depend_on_the_file(tmp_path):
    documents = [f"document {i}" for i in range(40)]
    streams = []
    for shown in (documents, documents[::-1]):
        (tmp_path / "x.json").write_text(json.dumps(shown))
        config = SMALL.replace(source=str(tmp_path / "x.json"), split="leaky", max_documents=30)
        streams.append(BYTES.decode(D.load_corpus(config).train))
    assert streams[0] == streams[1] and not streams[0].startswith("document 0<|endoftext|>document 1<")


def test_tokenizer_without_an_end(tmp_path):
    backend = tokenizers.train_bpe(300, ["a b"])
    (tmp_path / "t.json").write_text(backend.to_str().replace("<|endoftext|>", "<|odd|>"))
    config = SMALL.replace(tokenizer=str(tmp_path / "t.json"))
    with pytest.raises(ConfigError, match="tokenizer.json#TOKEN, or set document_separator=False"):
        D.load_corpus(config)
    assert len(D.load_corpus(config.replace(document_separator=False)).train)


# Batches


def test_batch_is_its_windows(data):
    batch, ids = data.batch(7), data.order(7)
    assert batch["tokens"].shape == batch["targets"].shape == (3, 4, 16) and batch["tokens"].dtype == np.int32
    for a, b in itertools.product(range(3), range(4)):
        start = data.train_starts[ids[a, b]]
        assert batch["tokens"][a, b].tolist() == data.tokens[start : start + 16].tolist()
        assert batch["targets"][a, b].tolist() == data.tokens[start + 1 : start + 17].tolist()


def test_each_epoch_reads_every_window_once_in_a_new_order(data):
    count = len(data.train_starts)
    ids = np.concatenate([data.order(step).ravel() for step in range(-(-2 * count // 12))])
    first, second = ids[:count], ids[count : 2 * count]
    for epoch in (first, second):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(count))
    assert np.mean(first == second) < 0.05 and np.mean(first == np.arange(count)) < 0.05


def test_random_access_and_resume_at_any_step(data, corpus):
    whole = [batch["tokens"] for batch in itertools.islice(data.batches(), 12)]
    assert len({tokens.tobytes() for tokens in whole}) == 12
    for step in (11, 0, 5):
        np.testing.assert_array_equal(data.batch(step)["tokens"], whole[step])
    fresh = D.build(SMALL, 0, corpus=corpus)
    for batch, expected in zip(fresh.batches(9), whole[9:], strict=False):
        np.testing.assert_array_equal(batch["tokens"], expected)
    assert data.batch(10**7)["tokens"].shape == (3, 4, 16)
    with pytest.raises(ConfigError, match="step must be at least 0"):
        data.order(-1)


def test_prefetching_leaves_no_thread(data):
    before = set(threading.enumerate())
    stream = data.batches(3)
    next(stream)
    started = set(threading.enumerate()) - before
    assert started
    stream.close()
    for thread in started:
        thread.join(timeout=5)
        assert not thread.is_alive()


def test_seeds_differ(corpus, data):
    other = D.build(SMALL, 1, corpus=corpus)
    assert not np.array_equal(other.order(0), data.order(0))
    np.testing.assert_array_equal(D.build(SMALL, 0, corpus=corpus).order(0), data.order(0))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_processes_make_the_global_batch(data, count):
    shards = [data.of_process(index, count) for index in range(count)]
    for name in ("tokens", "targets"):
        joined = np.concatenate([shard.batch(5)[name] for shard in shards], axis=1)
        np.testing.assert_array_equal(joined, data.batch(5)[name])
        assert shards[0].batch(5)[name].shape == (3, 4 // count, 16)
    for parts in zip(*(shard.validation_batches(8) for shard in shards), data.validation_batches(8), strict=True):
        for name in ("tokens", "targets", "weight"):
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts[:-1]]), parts[-1][name])
    assert {shard.fingerprint for shard in shards} == {data.fingerprint}


def test_a_batch_that_does_not_divide_is_refused_when_it_is_cut(data):
    """An evaluation may be over more processes than a micro-batch, of 4 here, has rows for."""
    parts = [next(data.of_process(index, 8).validation_batches(16))["tokens"] for index in range(8)]
    np.testing.assert_array_equal(np.concatenate(parts), next(data.validation_batches(16))["tokens"])
    with pytest.raises(ConfigError, match="a batch of 4 sequences does not divide among 8 processes; change batch_size, or eval_batch"):
        data.of_process(0, 8).batch(0)


def test_more_ids_than_embeddings_are_refused(data):
    data.check_vocabulary(data.corpus.tokenizer.vocab_size)
    with pytest.raises(ConfigError, match="the tokenizer bytes has 257 ids, the model's vocab_size is 256"):
        data.check_vocabulary(256)


@pytest.mark.parametrize(("size", "cap"), [(4, None), (7, None), (7, 10), (4, 8), (1000, None)])
def test_evaluation_counts_every_window_once(corpus, size, cap):
    data = D.build(SMALL.replace(eval_windows=cap), 0, corpus=corpus)
    batches, windows = list(data.validation_batches(size)), data.describe()["evaluated_windows"]
    assert windows == min(len(data.validation_starts), cap or 10**9)
    assert {batch[name].shape for batch in batches for name in batch} == {(size, 16)}
    assert all(batch["weight"].dtype == np.float32 for batch in batches)
    assert sum(batch["weight"].sum() for batch in batches) == windows * 16
    real = np.concatenate([batch["tokens"][batch["weight"][:, 0] == 1] for batch in batches])
    expected = data.tokens[data.validation_starts[:windows, None] + np.arange(16)]
    np.testing.assert_array_equal(real, expected)
    assert all(set(np.unique(batch["weight"].mean(axis=1))) <= {0.0, 1.0} for batch in batches)


# Identity and description


def test_fingerprint_changes_with_everything_that_matters(corpus, data, tmp_path):
    prints = {data.fingerprint, D.build(SMALL, 1, corpus=corpus).fingerprint}
    for changes in (
        {"seq_len": 8},
        {"batch_size": 2},
        {"accumulation": 1},
        {"split": "leaky"},
        {"max_documents": 199},
        {"max_characters": 50},
        {"max_tokens": 5000},
        {"validation_share": 0.2},
        {"eval_windows": 3},
        {"document_separator": False},
        {"document_order": "file"},
    ):
        prints.add(D.build(SMALL.replace(**changes), 0).fingerprint)
    assert len(prints) == 13
    assert D.build(SMALL, 0).fingerprint == data.fingerprint


def test_fingerprint_follows_text_not_paths(tmp_path):
    documents, prints = texts.documents("synthetic", limit=50), []
    for name, shown in (("a.json", documents), ("b.json", documents), ("c.json", [documents[0].replace("a", "e"), *documents[1:]])):
        (tmp_path / name).write_text(json.dumps(shown))
        prints.append(D.build(SMALL.replace(source=str(tmp_path / name)), 0).fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_fingerprint_notices_another_shuffle(data):
    turned = dataclasses.replace(data, windows=data.windows[12:])
    assert turned.fingerprint != data.fingerprint


def test_corpus_of_another_config(corpus):
    with pytest.raises(ConfigError, match="loaded with tokenizer='bytes' instead of 'bpe:300', max_tokens=None instead of 9"):
        D.build(SMALL.replace(tokenizer="bpe:300", max_tokens=9), 0, corpus=corpus)
    assert D.build(SMALL.replace(seq_len=8, batch_size=2), 0, corpus=corpus).batch(0)["tokens"].shape == (3, 2, 8)


def test_describe(data, corpus):
    told = data.describe(steps=10)
    assert told["documents"] == 200 and told["validation_documents"] == 20
    assert told["tokens"] == told["train_tokens"] + told["validation_tokens"] == len(data.tokens)
    assert told["bytes_per_token"] == 1.0 and told["vocab_size"] == 257
    assert told["tokens_per_step"] == 3 * 4 * 16 and told["tokens_seen"] == 1920
    assert told["passes"] == 1920 / told["train_tokens"]
    assert told["split"].startswith("clean: documents are divided before any window is cut")
    assert "at random per seed" in D.describe(SMALL.replace(split="leaky"))["split"]
    json.dumps(told)


def test_describe_without_the_corpus(tmp_path):
    """A dry run on a machine that has nothing yet: says so, and fetches nothing."""
    told = D.describe(D.DataConfig(), steps=5, cache=tmp_path)
    assert told["documents"] == 10_033 and told["tokens_seen"] == 5 * 16 * 128
    assert "passes" not in told and "not counted: wiki is not in the cache" in told["note"]
    told = D.describe(SMALL.replace(tokenizer="smollm2"), cache=tmp_path)
    assert "--fetch=smollm2_tokenizer" in told["note"]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="no text at"):
        D.describe(D.DataConfig(source=str(tmp_path / "typo.jsonl")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 0}, "seq_len must be a whole number of at least 1, got 0"),
        ({"eval_windows": 0}, "eval_windows must be a whole number of at least 1 or None, got 0"),
        ({"max_tokens": True}, "max_tokens must be"),
        ({"validation_share": 1.0}, "validation_share must lie between 0 and 1, got 1.0"),
        ({"source": "wikki"}, "did you mean 'wiki'"),
        ({"source": "smollm2_135m"}, "holds weights, not text"),
        ({"tokenizer": "bpe"}, "unknown tokenizer 'bpe'"),
    ],
)
def test_config_is_checked(changes, message):
    with pytest.raises(ConfigError, match=message):
        SMALL.replace(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 1.5}, "batch_size must be a whole number of at least 1, got 1.5"),
        ({"accumulation": None}, "accumulation must be a whole number of at least 1, got None"),
        ({"split": "random"}, "split must be one of clean, leaky, got 'random'"),
        ({"document_order": "x"}, "document_order must be one of hash, file"),
    ],
)
def test_config_of_the_wrong_type(changes, message):
    # Where the tests' type checker is on it speaks first, with a TypeError.
    with pytest.raises((ConfigError, TypeError)) as caught:
        SMALL.replace(**changes)
    assert message in str(caught.value) or not isinstance(caught.value, ConfigError)


@pytest.mark.parametrize("seed", [-1, 1 << 32, True])
def test_seed_is_checked(corpus, seed):
    with pytest.raises(ConfigError, match="data seed"):
        D.build(SMALL, seed, corpus=corpus)


def test_wiki_when_cached():
    if not sources.is_cached(sources.CATALOGUE["wiki"]):
        pytest.skip("wiki is not in the cache; python -m launch.data --fetch=wiki")
    told = D.describe(D.DataConfig(tokenizer="bytes"), steps=1)
    assert (told["documents"], told["empty_documents"], told["tokens"]) == (10_033, 0, 4_885_535 + 10_033)
