"""Megatron indexed datasets, written here by the published layout of the files."""

import struct

import numpy as np
import pytest

from bm_jax.config import ConfigError, DataConfig
from bm_jax.data.megatron import open_megatron
from bm_jax.data.pipeline import open_data

CODES = {1: np.uint8, 4: np.int32, 5: np.int64, 8: np.uint16}


def write_megatron(prefix, documents, code=8) -> None:
    """`documents`: for each document its list of sequences, each a list of ids."""
    dtype = np.dtype(CODES[code]).newbyteorder("<")
    sequences = [np.array(s, dtype) for document in documents for s in document]
    prefix.with_suffix(".bin").write_bytes(b"".join(s.tobytes() for s in sequences))
    lengths = np.array([len(s) for s in sequences], "<i4")
    offsets = (np.cumsum([0, *lengths[:-1]]) * dtype.itemsize).astype("<i8")
    boundaries = np.cumsum([0, *map(len, documents)]).astype("<i8")
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(boundaries))
    prefix.with_suffix(".idx").write_bytes(header + lengths.tobytes() + offsets.tobytes() + boundaries.tobytes())


DOCUMENTS = [[[1, 2, 3], [4]], [[5, 6]], [[7]], [[8, 9, 10], [11, 12]]]


@pytest.mark.parametrize("code", CODES)
def test_documents_as_stored(tmp_path, code):
    write_megatron(tmp_path / "corpus", DOCUMENTS, code)
    streams = open_megatron(tmp_path / "corpus", 6, 100)
    tokens, segments = streams["train"].read(0, streams["train"].tokens)
    assert tokens.tolist() == [1, 2, 3, 4, 5, 6]
    assert segments.tolist() == [1, 1, 1, 1, 2, 2]
    tokens, segments = streams["validation"].read(0, streams["validation"].tokens)
    assert tokens.tolist() == [7, 8, 9, 10, 11, 12]
    assert segments.tolist() == [1, 2, 2, 2, 2, 2]


@pytest.mark.parametrize(("held_out", "kept"), [(1, 7), (5, 7), (7, 6), (8, 4), (11, 4), (10**9, 4)])
def test_whole_documents_are_held_out_from_the_end(tmp_path, held_out, kept):
    write_megatron(tmp_path / "corpus", DOCUMENTS)
    streams = open_megatron(tmp_path / "corpus", held_out, 100)
    assert (streams["train"].tokens, streams["validation"].tokens) == (kept, 12 - kept)


def test_one_document_is_not_held_out(tmp_path):
    write_megatron(tmp_path / "corpus", [[[1, 2], [3]]])
    streams = open_megatron(tmp_path / "corpus", 5, 100)
    assert (streams["train"].tokens, streams["validation"].tokens) == (3, 0)


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_as_a_source(tmp_path, suffix):
    random = np.random.default_rng(0)
    write_megatron(tmp_path / "corpus", [[random.integers(0, 256, 50)] for _ in range(20)])
    config = DataConfig(sources=(f"{tmp_path}/corpus{suffix}",), sequence_length=16, held_out_tokens=110)
    data = open_data(config, 257)
    assert [(s.name, s.train.documents, s.validation.documents) for s in data.sources] == [("corpus", 18, 2)]
    assert next(data.train_batches())["tokens"].shape == (8, 17)


def test_ids_beyond_the_model(tmp_path):
    write_megatron(tmp_path / "corpus", [[[1, 2, 300, 4]], [[5]]])
    streams = open_megatron(tmp_path / "corpus", 1, 257)
    assert streams["train"].read(0, 2)[0].tolist() == [1, 2]
    with pytest.raises(ConfigError, match=r"corpus\.bin contains token id 300, but model and tokenizer have ids 0 to 256"):
        streams["train"].read(1, 4)


def test_ids_beyond_the_tokenizer_of_a_larger_model(tmp_path):
    write_megatron(tmp_path / "corpus", [[[300] * 40], [[5] * 40]])
    config = DataConfig(sources=(f"{tmp_path}/corpus",), sequence_length=16, batch_size=1, held_out_tokens=10)
    batches = open_data(config, 1000).train_batches()
    with pytest.raises(ConfigError, match="contains token id 300, but model and tokenizer have ids 0 to 256"):
        next(batches)


def test_damaged_files(tmp_path):
    prefix = tmp_path / "corpus"
    write_megatron(prefix, DOCUMENTS)
    binary, index = prefix.with_suffix(".bin"), prefix.with_suffix(".idx")
    good = index.read_bytes()
    binary.write_bytes(binary.read_bytes()[:-2])
    with pytest.raises(ConfigError, match=r"corpus\.bin has 22 bytes, but its index describes 24"):
        open_megatron(prefix, 5, 100)
    for content, message in (
        (good[:-3], "truncated"),
        (b"MMIDIDX\x00", "not a Megatron index"),
        (b"TNTIDX\x00\x00" + good[8:], "not a Megatron index"),
        (good[:9] + struct.pack("<QB", 1, 6) + good[18:], "dtype code 6"),
        (good[:9] + struct.pack("<QB", 2, 8) + good[18:], "version 2"),
        (good[:34] + struct.pack("<i", 9) + good[38:], "end to end"),
        (good[:-8] + struct.pack("<q", 5), "damaged"),
    ):
        index.write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            open_megatron(prefix, 5, 100)
