"""Tokenizers: round trips, piecewise encoding, fingerprints, and what is said when something is wrong."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import small_bpe

from bm_jax.config import ConfigError
from bm_jax.data.bundled import shakespeare_texts
from bm_jax.data.tokenizer import PIECE_CHARACTERS, JsonTokenizer, cut_at_line_breaks, load_tokenizer


@pytest.fixture(scope="module")
def bpe_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    small_bpe().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def bpe(bpe_folder):
    return load_tokenizer(bpe_folder)


@given(st.text())
def test_byte_round_trip(text):
    tokenizer = load_tokenizer("byte")
    text = text.encode("utf-8", "ignore").decode()
    ids = tokenizer.encode(text)
    assert ids == list(text.encode())
    assert tokenizer.decode([*ids, tokenizer.end_of_document]) == text


def test_byte_facts():
    tokenizer = load_tokenizer("byte")
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (257, 256)
    assert tokenizer.decode([0xE4, 0xB8]) == "�"
    assert [a.dtype for a in tokenizer.encode_batch(["a", ""])] == [np.int32, np.int32]


@pytest.mark.parametrize("bad", [257, -1, 10**9])
def test_decode_refuses_ids_that_do_not_exist(bad):
    with pytest.raises(ConfigError, match=rf"cannot decode id {bad}: .* ids 0 to 256"):
        load_tokenizer("byte").decode([65, bad])


def test_bpe_round_trip_and_facts(bpe_folder):
    tokenizer = load_tokenizer(bpe_folder / "tokenizer.json")
    assert tokenizer.vocab_size == 401
    assert tokenizer.end_of_document == 0
    text = "Éa    b\n\n中 'tis <|endoftext|> done\n"
    ids = tokenizer.encode(text)
    assert tokenizer.end_of_document not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, 0]) == text
    with pytest.raises(ConfigError, match="cannot decode id 401"):
        tokenizer.decode([401])


def test_long_text_in_pieces_has_the_ids_of_the_whole(bpe_folder):
    text = shakespeare_texts()["train"]["othello.txt"].replace("\n\n", "\n \n", 50)
    tokenizer = load_tokenizer(bpe_folder)
    assert len(cut_at_line_breaks(text, PIECE_CHARACTERS)) > 5
    whole = tokenizers.Tokenizer.from_file(str(bpe_folder / "tokenizer.json")).encode(text).ids
    assert tokenizer.encode(text) == whole
    assert [list(ids) for ids in tokenizer.encode_batch(["", text, "x"])] == [[], whole, tokenizer.encode("x")]


@given(st.lists(st.sampled_from(["a", "7", "7", " ", "\n", "\n", "'s", ".", "é", "    "]), max_size=200))
def test_cutting_anywhere_allowed_changes_no_id(bpe, parts):
    text, tokenizer = "".join(parts), bpe
    pieces = cut_at_line_breaks(text, 3)
    assert "".join(pieces) == text
    assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(text)


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        tokenizers.pre_tokenizers.Sequence(
            [
                tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\n\w+|\w+|\W"), "isolated"),
                tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
    ],
    ids=["prefix space", "no splitting", "line break joined to the next word"],
)
def test_tokenizers_that_cannot_be_cut_encode_whole(tmp_path, pre_tokenizer):
    small_bpe(pre_tokenizer=pre_tokenizer).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    text = shakespeare_texts()["train"]["macbeth.txt"][: 3 * PIECE_CHARACTERS]
    assert tokenizer.encode(text) == tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids


def test_save_and_load_again(tmp_path, bpe_folder):
    for number, tokenizer in enumerate([load_tokenizer("byte"), load_tokenizer(bpe_folder)]):
        path = tokenizer.save(tmp_path / str(number))
        assert path.name == "tokenizer.json"
        again = load_tokenizer(path.parent)
        assert type(again) is type(tokenizer)
        assert again.fingerprint == tokenizer.fingerprint
        assert again.encode("To be, or not") == tokenizer.encode("To be, or not")
    assert json.loads((tmp_path / "0/tokenizer.json").read_text()) == {"type": "byte"}
    assert sorted(p.name for p in (tmp_path / "1").iterdir()) == ["tokenizer.json"]


def test_fingerprint_is_of_the_meaning(tmp_path, bpe_folder):
    text = (bpe_folder / "tokenizer.json").read_text()
    values = json.loads(text)
    reordered = json.dumps(dict(reversed(values.items())), indent=3)
    assert JsonTokenizer(reordered, "x").fingerprint == load_tokenizer(bpe_folder).fingerprint
    values["model"]["merges"] = values["model"]["merges"][:-1]
    assert JsonTokenizer(json.dumps(values), "x").fingerprint != load_tokenizer(bpe_folder).fingerprint


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path):
    raw = small_bpe()
    raw.enable_truncation(4)
    raw.enable_padding(length=50)
    raw.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("a much longer text than four")) == "a much longer text than four"


def test_other_end_of_document_names(tmp_path):
    small_bpe("</s>").save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).end_of_document == 0
    small_bpe("<finis>").save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match=r"no end-of-document token: looked for <\|endoftext\|>"):
        load_tokenizer(tmp_path)


def test_missing_tokenizer(tmp_path):
    with pytest.raises(ConfigError, match=r"no tokenizer at .*nowhere/tokenizer\.json\. Give `byte`"):
        load_tokenizer(tmp_path / "nowhere/tokenizer.json")
    with pytest.raises(ConfigError, match=r"no tokenizer at .*tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff\xfe", "not UTF-8"), (b"{", "not JSON"), (b"[1]", "expected a JSON object"), (b"{}", "cannot|can read")],
)
def test_damaged_tokenizer(tmp_path, content, message):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(tmp_path)
