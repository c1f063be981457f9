"""Prepared folders that are damaged or do not fit are refused, each with a message that says what to do."""

import json

import pytest
from tiny_models import small_bpe

from bm_jax.config import ConfigError, DataConfig
from bm_jax.data.pipeline import open_data
from bm_jax.data.prepare import prepare
from bm_jax.data.shards import open_prepared, read_manifest, verify
from bm_jax.data.stream import FileNumbers
from bm_jax.data.tokenizer import load_tokenizer

TOKENS = "train-00000.tokens"
ENDS = "train-00000.ends"


@pytest.fixture
def folder(tmp_path):
    lines = [json.dumps({"text": f"document number {i} " * 9}) for i in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    prepare(tmp_path / "a.jsonl", tmp_path / "out", validation_fraction=0.2, progress=False)
    return tmp_path / "out"


def edit(path, position: int, value: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] = value
    path.write_bytes(data)


def change_manifest(folder, **changes) -> None:
    values = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(values | changes))


def test_a_good_folder(folder):
    manifest = verify(folder)
    assert manifest.documents("train") + manifest.documents("validation") == 30
    streams = open_prepared(folder, load_tokenizer(folder), 257)
    assert isinstance(streams["train"]._pieces[0].tokens, FileNumbers), "shards must not be read as a whole"
    assert streams["train"].tokens == manifest.tokens("train") == (folder / TOKENS).stat().st_size // 2


@pytest.mark.parametrize("name", [TOKENS, ENDS])
@pytest.mark.parametrize(("change", "problem"), [(-1, "is truncated"), (1, "is too long")])
def test_wrong_size(folder, name, change, problem):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1] if change < 0 else data + b"x")
    message = rf"{name} {problem}: the manifest says {len(data):,} bytes, found {len(data) + change:,}\. Copy it again"
    with pytest.raises(ConfigError, match=message):
        open_prepared(folder)


def test_missing_shard(folder):
    (folder / TOKENS).unlink()
    with pytest.raises(ConfigError, match=rf"{TOKENS} is missing although the manifest lists it"):
        open_prepared(folder)


def test_wrong_checksum_is_found_by_verify(folder):
    edit(folder / TOKENS, 10, ord("!"))
    open_prepared(folder)
    with pytest.raises(ConfigError, match=rf"{TOKENS}: SHA-256 should be"):
        verify(folder)


def test_verify_names_every_problem(folder):
    edit(folder / TOKENS, 11, 9)
    edit(folder / ENDS, 0, (folder / ENDS).read_bytes()[0] ^ 1)
    with pytest.raises(ConfigError) as error:
        verify(folder)
    for part in (f"{TOKENS}: SHA-256", f"{ENDS}: SHA-256", r"of 257", "do not end with id 256"):
        assert part in str(error.value)


def test_document_ends_that_do_not_cover_the_tokens(folder):
    last = (folder / ENDS).stat().st_size - 8
    edit(folder / ENDS, last, (folder / ENDS).read_bytes()[last] ^ 1)
    with pytest.raises(ConfigError, match=rf"{ENDS} is damaged: its last document ends at token"):
        open_prepared(folder)


def test_no_document_ends(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["train"][0]["documents"] = 0
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / ENDS).write_bytes(b"")
    with pytest.raises(ConfigError, match=rf"{ENDS} is damaged: its last document ends at token 0"):
        open_prepared(folder)


def test_out_of_range_id_is_refused_when_read(folder):
    edit(folder / TOKENS, 11, 9)
    config = DataConfig(sources=(str(folder),), sequence_length=16)
    stream = open_data(config, 257).sources[0].train
    with pytest.raises(ConfigError, match=rf"{TOKENS} contains token id 2\d\d\d, but model and tokenizer have ids 0 to 256"):
        stream.read(0, 16)


def test_recorded_ids_beyond_the_model(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"uses 257 token ids, more than model.vocab_size = 256\. Set model.vocab_size"):
        open_prepared(folder, None, 256)


def test_another_tokenizer_is_refused(folder, tmp_path):
    small_bpe().save(str(tmp_path / "tokenizer.json"))
    config = DataConfig(sources=(str(folder),), tokenizer=str(tmp_path / "tokenizer.json"))
    message = r"was prepared with tokenizer 'byte' .*257 ids\), but the .* has .*401 ids\)\. Set data.tokenizer to byte"
    with pytest.raises(ConfigError, match=message):
        open_data(config, 500)


def test_the_tokenizer_travels_with_the_data(tmp_path):
    small_bpe().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.jsonl").write_text('{"text": "to be or not to be"}\n{"text": "that is the question"}')
    prepare(tmp_path / "a.jsonl", tmp_path / "out", tokenizer=tmp_path / "tokenizer.json", progress=False)
    config = DataConfig(sources=(str(tmp_path / "out"),), tokenizer=str(tmp_path / "out"))
    assert open_data(config, 401).tokenizer.vocab_size == 401
    with pytest.raises(ConfigError, match=rf"the configuration has 'byte' .*Set data.tokenizer to {tmp_path}/out"):
        open_data(DataConfig(sources=config.sources), 401)
    (tmp_path / "out/tokenizer.json").write_text('{"type": "byte"}')
    with pytest.raises(ConfigError, match="was prepared with tokenizer"):
        verify(tmp_path / "out")


def test_damaged_or_foreign_manifest(folder):
    change_manifest(folder, version=99)
    with pytest.raises(ConfigError, match="version 99; this code reads 'bm_jax tokens' version 1"):
        open_prepared(folder)
    change_manifest(folder, version=1, surprise=1)
    with pytest.raises(ConfigError, match="no field 'surprise'"):
        read_manifest(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["surprise"]
    (folder / "manifest.json").write_text(json.dumps(manifest | {"dtype": "nonsense"}))
    with pytest.raises(ConfigError, match="dtype must be uint16 or uint32, got 'nonsense'"):
        open_prepared(folder)
    (folder / "manifest.json").write_text('{"format": ')
    with pytest.raises(ConfigError, match=r"manifest\.json is damaged"):
        read_manifest(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(ConfigError, match=r"is not prepared data: there is no .*prepare INPUT"):
        read_manifest(folder)
