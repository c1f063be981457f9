"""Streams, windows and batches: every token a target once, right segments, exact resume, mixing, held-out text."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bm_jax.config import ConfigError, DataConfig
from bm_jax.data.bundled import shakespeare_texts
from bm_jax.data.pipeline import open_data
from bm_jax.data.prepare import prepare
from bm_jax.data.stream import Piece, TokenStream, Windows
from bm_jax.data.tokenizer import load_tokenizer


def make_stream(pieces: list[list[int]], limit: int = 1 << 16) -> TokenStream:
    """A stream of pieces of documents with the given lengths; token i of the stream is i."""
    made, start = [], 0
    for lengths in pieces:
        total = sum(lengths)
        made.append(Piece(np.arange(start, start + total, dtype=np.uint16), np.cumsum(lengths).astype(np.uint64), "p"))
        start += total
    return TokenStream(made, limit)


def write_documents(path, documents) -> str:
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    return str(path)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Two prepared folders, `small` of the letters a-m and `large` of n-z, with documents of 0 to 400 letters."""
    root = tmp_path_factory.mktemp("prepared")
    random = np.random.default_rng(0)
    folders = {}
    for name, letters, count in (("small", "abcdefghijklm", 60), ("large", "nopqrstuvwxyz", 300)):
        texts = ["".join(random.choice(list(letters), random.integers(1, 400))) for _ in range(count)]
        source = write_documents(root / f"{name}.jsonl", texts)
        prepare(source, root / name, validation_fraction=0.2, unit_bytes=5000, workers=1, progress=False)
        folders[name] = str(root / name)
    return folders


def config(folders, **changes) -> DataConfig:
    sources = tuple(str(path) for path in folders)
    return DataConfig(**{"sources": sources, "sequence_length": 32, "batch_size": 4, "seed": 3} | changes)


documents = st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=8), min_size=1, max_size=5)


@given(documents, st.integers(1, 40), st.data())
def test_read_gives_tokens_and_segments(pieces, length, data):
    stream = make_stream(pieces)
    owner = np.repeat(np.arange(sum(map(len, pieces))), [n for lengths in pieces for n in lengths])
    assert stream.tokens == len(owner)
    start = data.draw(st.integers(0, len(owner)))
    stop = min(start + length, len(owner))
    tokens, segments = stream.read(start, stop)
    np.testing.assert_array_equal(tokens, np.arange(start, stop))
    expected = np.unique(owner[start:stop], return_inverse=True)[1] + 1
    np.testing.assert_array_equal(segments, expected)
    assert tokens.dtype == segments.dtype == np.int32


@given(documents, st.integers(1, 20))
def test_windows_predict_every_token_once(pieces, length):
    stream = make_stream(pieces)
    windows = Windows(stream, length, partial=True)
    rows = [windows[i] for i in range(len(windows))]
    assert all(row["tokens"].shape == row["segment_ids"].shape == (length + 1,) for row in rows)
    targets = [t for row in rows for t, s in zip(row["tokens"][1:], row["segment_ids"][1:], strict=True) if s]
    assert targets == list(range(1, stream.tokens))
    full = Windows(stream, length)
    assert len(full) == max(0, stream.tokens - 1) // length
    assert all((full[i]["segment_ids"] > 0).all() for i in range(len(full)))


def test_segments_of_long_and_tiny_documents():
    stream = make_stream([[7, 1, 1], [1, 12]])
    rows = [Windows(stream, 4, partial=True)[i]["segment_ids"].tolist() for i in range(6)]
    assert rows == [[1, 1, 1, 1, 1], [1, 1, 1, 2, 3], [1, 2, 3, 3, 3], [1] * 5, [1] * 5, [1, 1, 0, 0, 0]]


def test_token_out_of_range_is_named():
    with pytest.raises(ConfigError, match=r"p contains token id 19, but model and tokenizer have ids 0 to 14"):
        make_stream([[10], [10]], limit=15).read(5, 20)
    negative = TokenStream([Piece(np.array([3, -7], np.int32), np.array([2]), "file.bin")], 15)
    with pytest.raises(ConfigError, match=r"file\.bin contains token id -7"):
        negative.read(0, 2)


def test_an_epoch_has_every_window_once_and_epochs_differ(prepared):
    data = open_data(config([prepared["small"]], batch_size=1), 257)
    windows = Windows(data.sources[0].train, 32)
    iterator = data.train_batches()
    epochs = [[next(iterator)["tokens"][0].tobytes() for _ in range(len(windows))] for _ in range(2)]
    everything = sorted(windows[i]["tokens"].tobytes() for i in range(len(windows)))
    assert sorted(epochs[0]) == sorted(epochs[1]) == everything
    assert epochs[0] != epochs[1]
    other = open_data(config([prepared["small"]], batch_size=1, seed=4), 257).train_batches()
    assert [next(other)["tokens"][0].tobytes() for _ in range(len(windows))] != epochs[0]


def test_batches(prepared):
    batch = next(open_data(config(prepared.values()), 257).train_batches())
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        "tokens": ((4, 33), np.int32),
        "segment_ids": ((4, 33), np.int32),
    }
    ends = batch["tokens"][:, :-1] == 256
    np.testing.assert_array_equal(np.diff(batch["segment_ids"], axis=1), ends)
    assert ends.any()
    assert (batch["segment_ids"][:, 0] == 1).all()


@pytest.mark.parametrize("stop", [0, 1, 2, 7, 61])
def test_resume_is_exact_at_any_point(prepared, stop):
    data = open_data(config(prepared.values()), 257)
    through = data.train_batches()
    expected = [next(through)["tokens"] for _ in range(stop + 12)]
    first = data.train_batches()
    for _ in range(stop):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    next(first)
    resumed = open_data(config(prepared.values()), 257).train_batches()
    next(resumed)
    resumed.set_state(state)
    assert resumed.get_state() == state
    for want in expected[stop:]:
        np.testing.assert_array_equal(next(resumed)["tokens"], want)
    np.testing.assert_array_equal(next(data.train_batches(start=stop))["tokens"], expected[stop])


def test_processes_share_a_batch(prepared):
    data = open_data(config(prepared.values()), 257)
    whole = data.train_batches()
    parts = [data.train_batches(process_index=i, process_count=2) for i in range(2)]
    for _ in range(5):
        joined = np.concatenate([next(part)["tokens"] for part in parts])
        np.testing.assert_array_equal(joined, next(whole)["tokens"])
    assert parts[0].get_state() == parts[1].get_state() == whole.get_state()
    with pytest.raises(ConfigError, match="multiple of 3 processes"):
        data.train_batches(process_count=3)


def test_sources_are_mixed_by_weight(prepared):
    sources = prepared["small"], prepared["large"]
    iterator = open_data(config(sources, weights=(3.0, 1.0), batch_size=20), 257).train_batches()
    rows = np.concatenate([next(iterator)["tokens"] for _ in range(40)])
    is_small = np.array([any(97 <= t < 110 for t in row) for row in rows])
    assert abs(is_small.mean() - 0.75) < 0.01
    pattern = is_small[:400].reshape(4, 100).mean(axis=1)
    assert np.abs(pattern - 0.75).max() < 0.05, "one source must not come in long runs"


def test_validation_is_complete_deterministic_and_apart(prepared):
    data = open_data(config(prepared.values()), 257)
    batches = data.validation_batches(4)
    assert list(batches) == ["small", "large"]
    for source in data.sources:
        rows = np.concatenate([b["tokens"] for b in batches[source.name]])
        kept = np.concatenate([b["segment_ids"] for b in batches[source.name]])
        assert len(rows) % 4 == 0
        held_out = source.validation.read(0, source.validation.tokens)[0]
        np.testing.assert_array_equal(rows[:, 1:][kept[:, 1:] > 0], held_out[1:])
        train = source.train.read(0, source.train.tokens)[0]
        assert not _texts(held_out) & _texts(train)
    again = open_data(config(prepared.values()), 257).validation_batches(4)
    for name, source in batches.items():
        assert [b["tokens"].tobytes() for b in source] == [b["tokens"].tobytes() for b in again[name]]
        assert [b["tokens"].tobytes() for b in source] == [b["tokens"].tobytes() for b in source]


def _texts(tokens) -> set[bytes]:
    return {part.tobytes() for part in np.split(tokens, np.flatnonzero(tokens == 256) + 1) if len(part)}


def test_limited_validation_is_spread_over_the_split(prepared):
    data = open_data(config(prepared.values()), 257)
    everything = [row.tobytes() for b in data.validation_batches(1)["large"] for row in b["tokens"]]
    limited = data.validation_batches(4, limit=3)["large"]
    assert len(limited) == 3
    chosen = [everything.index(row.tobytes()) for b in limited for row in b["tokens"]]
    assert chosen == sorted(set(chosen))
    assert chosen[-1] > 0.85 * len(everything)
    assert len(data.validation_batches(4, limit=10**6)["large"]) == len(data.validation_batches(4)["large"])


def test_same_names_are_told_apart(prepared, tmp_path):
    (tmp_path / "small").symlink_to(prepared["small"])
    data = open_data(config([prepared["small"], tmp_path / "small", "shakespeare"]), 257)
    assert [source.name for source in data.sources] == ["small", "small-2", "shakespeare"]


def test_bundled_corpus_is_clean_and_held_out_by_rule():
    splits = shakespeare_texts()
    assert list(splits["validation"]) == ["julius_caesar.txt", "two_gentlemen_of_verona.txt"]
    assert len(splits["train"]) == 14
    for text in [*splits["train"].values(), *splits["validation"].values()]:
        assert set(text) <= {"\n", *map(chr, range(32, 127))}
        assert not any(word in text for word in ("Gutenberg", "Etext", "opyright", "\n\n\n", " \n", "  "))
        assert text.splitlines()[2] == "by William Shakespeare"
        assert text.endswith("\n")
    held_out = sum(map(len, splits["validation"].values()))
    assert 100_000 < held_out < 300_000


def test_bundled_corpus_gives_batches():
    data = open_data(DataConfig(), 257)
    assert data.sources[0].train.documents == 14
    assert next(data.train_batches())["tokens"].shape == (8, 129)
    first = data.validation_batches(2)["shakespeare"][0]["tokens"][0]
    assert data.tokenizer.decode(first).startswith("JULIUS CAESAR\n\nby William Shakespeare")


def test_tokenizer_larger_than_the_model():
    with pytest.raises(ConfigError, match=r"'byte' has 257 ids, more than model.vocab_size = 256"):
        open_data(DataConfig(), 256)


def test_too_little_text_for_one_window(tmp_path):
    prepare(write_documents(tmp_path / "a.jsonl", ["short", "shorter"]), tmp_path / "out", progress=False)
    data = open_data(config([tmp_path / "out"]), 257)
    with pytest.raises(ConfigError, match=r"source 'out' has . training tokens, fewer than one window of .* = 33"):
        data.train_batches()


def test_sources_that_are_not_there(tmp_path):
    (tmp_path / "text.txt").write_text("words")
    for path, why in (
        (tmp_path / "no", "no such folder"),
        (tmp_path, "no manifest"),
        (tmp_path / "text.txt", "a file"),
    ):
        with pytest.raises(ConfigError, match=rf"cannot read the data source .*{why}.*bm_jax.data prepare"):
            open_data(config([path]), 257)


def test_nothing_here_imports_jax_or_grain_before_it_is_needed():
    code = (
        "import sys, bm_jax.data, bm_jax.data.prepare; from bm_jax.config import DataConfig;"
        "bm_jax.data.open_data(DataConfig(), 257).validation_batches(2)['shakespeare'][0];"
        "print([m for m in ('jax', 'grain', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_tokenizer_is_what_the_configuration_names(prepared):
    assert open_data(config(prepared.values()), 300).tokenizer.fingerprint == load_tokenizer("byte").fingerprint
