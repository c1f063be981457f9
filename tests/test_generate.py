"""Generation: the decode path equals the full forward, rows are independent, and text comes out whole.

Two kinds of real models: small random ones of every family, and *table* models, whose weights are written by hand so
that each byte is followed by a chosen one. Those say known text, so stop strings, characters of several bytes and the
end of a document can be put anywhere.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import BYTE, FAMILIES, random_parameters, tiny_config, tiny_model

from bm_jax import decoding, generate, language_model, state
from bm_jax.cache import init_cache
from bm_jax.checkpoint import CheckpointError, Checkpoints
from bm_jax.completion import Completion, Detokenizer, Writer
from bm_jax.config import (
    Config,
    ConfigError,
    MlpConfig,
    ModelConfig,
    to_dict,
)
from bm_jax.data.tokenizer import ByteTokenizer, JsonTokenizer
from bm_jax.language_model import LanguageModel
from bm_jax.model import forward
from bm_jax.model import logits as unembed
from bm_jax.sampling import SamplingConfig

ROOT = Path(__file__).resolve().parent.parent
compilations = 0


def _count(event: str, *_, **__) -> None:
    global compilations
    compilations += event == "/jax/core/compile/backend_compile_duration"


jax.monitoring.register_event_duration_secs_listener(_count)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """These tests compile much and compute little."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@partial(jax.jit, static_argnames="config")
def full_forward(parameters, tokens, config):
    """The statement: logits of every position, by one pass over whole rows, without cache or padding."""
    return unembed(parameters, forward(parameters, tokens, config).hidden, config)


def expected_logits(model: LanguageModel, rows) -> np.ndarray:
    """`full_forward` of up to 4 rows of up to 80 ids; what follows a row changes nothing, and this compiles once."""
    tokens = np.zeros((4, 80), np.int32)
    for b, row in enumerate(rows):
        tokens[b, : len(row)] = row
    return np.asarray(full_forward(model.parameters, tokens, model.config))


@pytest.fixture(scope="module", params=FAMILIES, ids="-".join)
def family(request) -> LanguageModel:
    return tiny_model(tiny_config(request.param))


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_model(tiny_config(FAMILIES[0]))


@pytest.fixture(scope="module")
def hybrid() -> LanguageModel:
    return tiny_model(tiny_config(FAMILIES[-1]))


TABLE = ModelConfig(
    layers=("mlp",), repeats=1, vocab_size=257, width=257, mlp=MlpConfig(width=2), tie_embeddings=False,
    compute_dtype="float32",
)  # fmt: skip


def table_model(text: str, **values) -> LanguageModel:
    """After `^` it says `text` (bytes all different) and then ends the document."""
    chain = [*b"^", *text.encode(), BYTE.end_of_document]
    assert len(set(chain)) == len(chain)
    parameters = random_parameters(TABLE)
    parameters["final_norm"], parameters["final_norm_bias"] = np.ones(257, np.float32), np.zeros(257, np.float32)
    parameters["embedding"] = np.eye(257, dtype=np.float32)
    parameters["unembedding"] = np.zeros((257, 257), np.float32)
    parameters["unembedding"][chain[:-1], chain[1:]] = 10.0
    parameters["periods"] = jax.tree.map(np.zeros_like, parameters["periods"])
    return LanguageModel(TABLE, parameters, BYTE, **values)


STORY = "One day, bé€😀 sUHNJ z! QRSTVWXYZ"


@pytest.fixture(scope="module")
def story() -> tuple[LanguageModel, str]:
    seen, text = set(b"^"), ""
    for character in STORY:  # every byte once
        if not seen & set(character.encode()):
            seen |= set(character.encode())
            text += character
    assert len(text.encode()) > 2 * decoding.CHUNK
    assert "é€😀" in text
    return table_model(text), text


# --- the decode path equals the full forward -------------------------------------------------------------------------


def test_greedy_is_the_argmax_of_the_full_forward(family):
    prompts = ["a", "The quick brown fox jumps over the lazy dog", "xyz", "0123456789"]
    completions = family.generate(prompts, max_tokens=37, temperature=0)
    rows = [[*BYTE.encode(p), *c.tokens] for p, c in zip(prompts, completions, strict=True)]
    best = expected_logits(family, rows)[:, :, : BYTE.vocab_size].argmax(-1)
    for b, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        expected = best[b, len(prompt) - 1 :].tolist()
        assert completion.tokens == tuple(expected[: len(completion.tokens)])
        if completion.finish_reason == "length":
            assert len(completion.tokens) == 37
        else:
            assert expected[len(completion.tokens)] == BYTE.end_of_document
    assert len({i for c in completions for i in c.tokens}) > 20  # the model says something


def test_a_prompt_gets_alone_what_it_gets_among_others(family):
    prompts = ["a", "the longest of them all, beyond one bucket", "bc", "to be or not to be"]
    seeds = [2**32 - 1, 6, 7, 5]
    options = {"max_tokens": 20, "temperature": 0.9, "top_k": 50}
    together = family.generate(prompts, seed=seeds, **options)
    assert family.generate(prompts[0], seed=seeds[0], **options) == [together[0]]
    assert family.generate(prompts[2], seed=seeds[2], **options) == [together[2]]
    assert family.generate(prompts[::-1], seed=seeds[::-1], **options) == together[::-1]
    assert len({c.tokens for c in together}) == 4


def test_one_seed_for_all_is_that_seed_for_each(model):
    same = model.generate(["same"] * 4, max_tokens=12, seed=3)
    assert same == [same[0]] * 4
    assert same == model.generate(["same"] * 4, max_tokens=12, seed=[3] * 4)
    different = model.generate(["same"] * 4, max_tokens=12, seed=range(3, 7))
    assert different[0] == same[0]
    assert len({c.tokens for c in different}) == 4
    with pytest.raises(ConfigError, match="got 1 for 2 prompts"):
        model.generate(["a", "b"], seed=[1])


def test_more_prompts_than_a_batch_are_taken_in_turns(model):
    prompts = [f"{'word ' * (i % 3)}{i}" for i in range(9)]
    small = LanguageModel(model.config, model.parameters, BYTE, max_batch=4)
    alone = [model.generate(prompt, max_tokens=6, temperature=0)[0] for prompt in prompts]
    assert small.generate(prompts, max_tokens=6, temperature=0) == alone
    assert small.generate([]) == []


def test_long_prompts_are_read_in_pieces(hybrid, monkeypatch):
    text = "It was a bright cold day in April, and the clocks were striking."
    prompts = [text, "short", text[:33], text[:32]]
    whole = hybrid.generate(prompts, max_tokens=10, temperature=0)
    monkeypatch.setattr(language_model, "PIECE", 32)
    before = compilations
    assert hybrid.generate(prompts, max_tokens=10, temperature=0) == whole
    assert compilations == before + 1  # it did read another shape, twice


def test_ids_and_text_are_both_prompts(model):
    prompts = [[104, 105], np.array([104, 105]), "hi"]
    assert model.generate(prompts, max_tokens=5) == 3 * model.generate("hi", max_tokens=5)


def test_padding_ids_are_never_drawn():
    model = tiny_model(tiny_config(("mlp",), vocab_size=320))
    model.parameters["unembedding"][:, 257:] *= 100  # what a trained model does not do
    drawn = [i for c in model.generate(["a"] * 4, max_tokens=100, temperature=5.0, seed=range(4)) for i in c.tokens]
    assert len(drawn) > 100
    assert model.logits([97])[0].argmax() >= 257
    assert max(drawn) < 257


def test_the_device_stops_when_every_row_has_ended(story):
    model, text = story
    chain = [*text.encode(), 256]
    rows = decoding.make_rows([SamplingConfig(max_tokens=4), SamplingConfig()], 2, end=256, vocab_size=257)
    token = np.array([chain[0], chain[-4]])
    index, alive = np.array([1, 1]), np.array([True, True])
    cache = init_cache(TABLE, 2)
    going = decoding.Going(cache, None, token, index, alive)
    going, (drawn, _) = decoding.decode(*model.inference, going, rows, decoding.CHUNK, TABLE)
    assert np.asarray(drawn)[:, :4].tolist() == [[*chain[1:4], -1], [*chain[-3:], -1]]
    assert (np.asarray(drawn)[:, 3:] == -1).all()
    assert going.cache.length.tolist() == [3, 3]


# --- what may be asked of a completion -------------------------------------------------------------------------------


def stated_greedy(model, prompt, count, *, repetition=1.0, presence=0.0, frequency=0.0, bias=None):
    """Greedy ids by the full forward, each step's logits changed as documented."""
    ids, drawn = BYTE.encode(prompt), []
    while len(drawn) < count:
        logits = expected_logits(model, [ids + drawn])[0, len(ids) + len(drawn) - 1, : BYTE.vocab_size].astype(np.float64)
        for i, value in (bias or {}).items():
            logits[i] += value
        for i in set(ids + drawn):
            logits[i] *= 1 / repetition if logits[i] > 0 else repetition
        for i in set(drawn):
            logits[i] -= presence + frequency * drawn.count(i)
        drawn.append(int(logits.argmax()))
        if drawn[-1] == BYTE.end_of_document:
            return tuple(drawn[:-1])
    return tuple(drawn)


def test_penalties_and_bias_are_those_of_the_statement(family):
    asked = [
        {"repetition": 1.8},
        {"presence": 1.5, "frequency": -0.4},
        {"frequency": 0.9, "bias": {97: 1.0, 104: -1.0}},
        {"bias": {101: 60.0}},
    ]
    names = {"repetition": "repetition_penalty", "presence": "presence_penalty", "frequency": "frequency_penalty"}
    plain = family.generate("the hat", max_tokens=20, temperature=0)[0].tokens
    for options in asked:
        given = {names.get(name, "logit_bias"): value for name, value in options.items()}
        (completion,) = family.generate("the hat", max_tokens=20, temperature=0, **given)
        assert completion.tokens == stated_greedy(family, "the hat", 20, **options)
        assert completion.tokens != plain
    assert set(family.generate("x", max_tokens=9, logit_bias={101: 99.0})[0].tokens) == {101}
    with pytest.raises(ValueError, match="logit_bias contains token id 257, outside the range 0 to 256"):
        family.generate("x", logit_bias={257: 1.0})
    with pytest.raises(ValueError, match="logit_bias forbids every token"):
        family.generate("x", logit_bias=dict.fromkeys(range(257), -np.inf))
    with pytest.raises(ValueError, match="stop_tokens contains token id 300, outside the range 0 to 256"):
        family.generate("x", stop_tokens=(10, 300))
    banned = dict.fromkeys(range(200), -math.inf)
    (completion,) = family.generate("x", max_tokens=40, logit_bias=banned, temperature=2.0)
    assert min(completion.tokens) >= 200


def test_what_one_row_asks_changes_no_other(model):
    """Rows that ask for penalties, bias and log-probabilities run in another program: the others draw the same in it."""
    alone = [model.generate(["one", "two"][i], max_tokens=18, seed=i) for i in range(2)]
    config = [SamplingConfig(18, seed=0), SamplingConfig(18, seed=1), SamplingConfig(18, repetition_penalty=1.5, logprobs=3)]
    pieces = model._stream(["one", "two", "three"], config)
    together = {piece.row: piece.completion for piece in pieces if piece.completion}
    assert [together[0]] == alone[0]
    assert [together[1]] == alone[1]
    assert together[2].logprobs is not None


def test_log_probabilities_of_what_was_drawn(family):
    prompts = ["a", "the hat"]
    options = {"max_tokens": 20, "temperature": 1.3, "frequency_penalty": 0.5, "logprobs": 4}
    for prompt, completion in zip(prompts, family.generate(prompts, **options), strict=True):
        ids = BYTE.encode(prompt)
        logits = expected_logits(family, [[*ids, *completion.tokens]])[0, len(ids) - 1 :, : BYTE.vocab_size].astype(np.float64)
        expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        assert len(completion.logprobs) == len(completion.tokens)
        for i, (token, said) in enumerate(zip(completion.tokens, completion.logprobs, strict=True)):
            np.testing.assert_allclose(said.logprob, expected[i, token], atol=1e-3)
            best = np.argsort(-expected[i])[:4]
            assert [j for j, _ in said.top] == best.tolist()
            np.testing.assert_allclose([value for _, value in said.top], expected[i, best], atol=1e-3)
    (none,) = family.generate("a", max_tokens=3, logprobs=0)
    assert [said.top for said in none.logprobs] == [()] * len(none.tokens)
    assert family.generate("a", max_tokens=3)[0].logprobs is None


def test_a_stop_token_ends_the_text_before_it(story):
    model, text = story
    for cut in (1, 5, 20, 31):
        stop = text.encode()[cut]
        (completion,) = model.generate("^", temperature=0, stop_tokens=(0, stop), logprobs=1)
        assert completion.tokens == tuple(text.encode()[:cut])
        assert completion.finish_reason == "stop"
        assert len(completion.logprobs) == cut
    assert model.generate("^", temperature=0, stop_tokens=(256,))[0].finish_reason == "end"


def test_samples_of_one_prompt_are_those_of_the_seeds_that_follow(family):
    prompts, seeds = ["the hat", "a"], [5, 2**32 - 1]
    completions = family.generate(prompts, n=3, max_tokens=12, seed=seeds)
    for i, prompt in enumerate(prompts):
        for j in range(3):
            (alone,) = family.generate(prompt, max_tokens=12, seed=(seeds[i] + j) % 2**32)
            assert completions[3 * i + j] == alone
    with pytest.raises(ConfigError, match="n must be a positive integer"):
        family.generate("a", n=0)


def test_equal_prompts_are_read_once(model, monkeypatch):
    rows = []
    read = state.read_on
    monkeypatch.setattr(state, "read_on", lambda p, s, tokens, *rest: rows.append(len(tokens)) or read(p, s, tokens, *rest))
    model.generate(["same", "other", "same"], n=8, max_tokens=2)
    assert rows == [2]


# --- shapes and compilations -----------------------------------------------------------------------------------------


def test_one_compilation_a_bucket(family):
    family.generate("first", max_tokens=30)
    before = compilations
    for i in range(1, 17):
        family.generate("x" * i, max_tokens=18 + i % 10, temperature=i / 10, seed=i)
    family.generate("a", max_tokens=30, temperature=0, top_k=3, top_p=0.5, stop=["e", "st"])
    list(family.stream("abc", max_tokens=31, top_p=0.9))
    assert compilations == before
    family.generate("x" * 17, max_tokens=20)
    assert compilations == before + 1  # reading a longer prompt; writing is the same program


def test_logits_compile_once_a_bucket(model):
    model.logits([1, 2, 3])
    before = compilations
    model.logits(list(range(16)))
    model.logits(np.ones((1, 9), np.int64))
    assert compilations == before
    model.logits(list(range(17)))
    assert compilations == before + 1


# --- logits and precision --------------------------------------------------------------------------------------------


def test_logits_are_those_of_the_model(hybrid):
    ids = np.random.default_rng(0).integers(0, 260, (3, 21))
    expected = expected_logits(hybrid, ids)[:3, :21]
    found = hybrid.logits(ids)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_logits_of_one_row_have_no_batch(model):
    ids = np.random.default_rng(0).integers(0, 260, 21)
    found = model.logits(ids.tolist())
    assert found.shape == (21, 260)
    np.testing.assert_allclose(found, expected_logits(model, [ids])[0, :21], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "tied"), [(("mamba", "moe"), True), (("attention", "mlp"), False)])
def test_casting_once_changes_no_result(layers, tied):
    config = tiny_config(layers, compute_dtype="bfloat16", tie_embeddings=tied, repeats=1)
    model = tiny_model(config)
    ids = np.random.default_rng(0).integers(0, 260, (4, 16))
    np.testing.assert_allclose(model.logits(ids), full_forward(model.parameters, ids, config), rtol=1e-5, atol=1e-5)
    parameters, head = model.inference
    dtypes = {path[-1].key: str(leaf.dtype) for path, leaf in jax.tree_util.tree_leaves_with_path(parameters)}
    exact = {"A_log", "D", "dt_bias", "norm", "router", "router_bias", "final_norm", "final_norm_bias", "embedding"}
    assert {name for name, dtype in dtypes.items() if dtype == "float32"} == exact & dtypes.keys()
    assert {str(leaf.dtype) for leaf in head.values()} == {"bfloat16"}
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(model.parameters))
    if tied:
        assert model.generate("abc", max_tokens=20)[0].finish_reason in ("length", "end")


# --- text: characters, stop strings, ends ----------------------------------------------------------------------------


def test_stream_joined_is_generate(family):
    for options in ({"temperature": 0.0}, {"seed": 4}, {"seed": 1, "top_k": 30, "stop": "a"}):
        pieces = list(family.stream("Once", max_tokens=40, **options))
        assert "".join(pieces) == family.generate("Once", max_tokens=40, **options)[0].text


def test_the_end_of_the_document_ends_the_text(story):
    model, text = story
    (completion,) = model.generate("^", temperature=0)
    assert completion == Completion(text, tuple(text.encode()), "end")
    assert model.generate(text[-1], temperature=0) == [Completion("", (), "end")]
    exact = len(text.encode())
    assert model.generate("^", max_tokens=exact, temperature=0)[0].finish_reason == "length"
    assert model.generate("^", max_tokens=exact + 1, temperature=0)[0].finish_reason == "end"
    both = model.generate(["^", text[-2]], max_tokens=200, temperature=0)
    assert [c.text for c in both] == [text, text[-1]]


def test_stream_never_splits_a_character(story):
    model, text = story
    pieces = list(model.stream("^", temperature=0))
    assert "".join(pieces) == text
    assert len(pieces) > 2
    assert not any("\ufffd" in piece for piece in pieces)
    whole = text.encode().index("😀".encode())
    for cut in range(1, 4):  # a character that max_tokens cuts is shown as what it is
        (completion,) = model.generate("^", max_tokens=whole + cut, temperature=0)
        assert completion.text == text[: text.index("😀")] + "\ufffd"
        assert completion.text == BYTE.decode(completion.tokens)


def test_a_stop_string_anywhere_ends_the_text_before_it(story):
    model, text = story
    for start in range(len(text)):
        for size in (1, 2, 5):
            stop = text[start : start + size]
            pieces = list(model.stream("^", temperature=0, stop=["never", stop + "?", stop]))
            assert "".join(pieces) == text[:start]
    (completion,) = model.generate("^", temperature=0, stop=text[3:6])
    assert completion == Completion(text[:3], tuple(text[:6].encode()), "stop")
    (completion,) = model.generate("^", temperature=0, stop=[text[8:12], text[9:11]])
    assert completion.text == text[:9]  # the one that is complete first
    assert model.generate("^", temperature=0, stop=text + "!")[0] == Completion(text, tuple(text.encode()), "end")
    rows = model.generate(["^", "^" + text[:20]], temperature=0, stop=text[22:24])
    assert [row.text for row in rows] == [text[:22], text[20:22]]


def bpe() -> JsonTokenizer:
    """A byte-level BPE tokenizer whose ids cross characters and words."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat 😀😃 the hat é€é€ of stop ping 中文中文"] * 3, trainer)
    return JsonTokenizer(tokenizer.to_str(), "bpe")


def metaspace() -> JsonTokenizer:
    """A tokenizer in the manner of SentencePiece: a first space is not decoded, unknown characters are bytes."""
    words = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"▁abcst", "▁a", "▁cat", "▁stop", "▁s", "top"]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["</s>"])
    return JsonTokenizer(tokenizer.to_str(), "metaspace")


TOKENIZERS = {"byte": BYTE, "bpe": bpe(), "metaspace": metaspace()}


def written(tokenizer, ids, config, cuts, before=()):
    """Pieces and completion of a Writer that gets `ids` in chunks; ids after its end are not given."""
    writer, pieces, start = Writer(tokenizer, before, config), [], 0
    for cut in [*sorted(cuts), len(ids)]:
        if writer.completion is None and cut > start:
            pieces.append(writer.push(ids[start:cut]))
            start = cut
    return pieces, writer.completion


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_ids_in_any_chunks_make_the_text_of_the_ids(data):
    tokenizer = TOKENIZERS[data.draw(st.sampled_from(["byte", "bpe"]))]
    text = data.draw(st.text("abst op😀😃é€中", max_size=40))
    ids = tokenizer.encode(text)
    for _ in range(data.draw(st.integers(0, 4))):  # and broken characters
        ids.insert(data.draw(st.integers(0, len(ids))), data.draw(st.integers(1, 255)))
    if not ids:
        return
    cuts = data.draw(st.lists(st.integers(1, len(ids)), max_size=6))
    stops = tuple(data.draw(st.lists(st.text("abst op😀é", min_size=1, max_size=4), max_size=3)))
    prompt = tokenizer.encode(data.draw(st.text("ab é😀", max_size=30)))
    pieces, completion = written(tokenizer, ids, SamplingConfig(len(ids), stop=stops), cuts, prompt)

    whole = tokenizer.decode(ids)
    ends = [(whole.find(s) + len(s), whole.find(s)) for s in stops if s in whole]
    expected = whole[: min(ends)[1]] if ends else whole
    assert completion is not None
    assert completion.finish_reason == ("stop" if ends else "length")
    assert "".join(pieces) == completion.text == expected
    if ends:
        drawn = completion.tokens
        assert list(drawn) == ids[: len(drawn)]
        assert any(s in tokenizer.decode(drawn) for s in stops)
    else:
        assert list(completion.tokens) == ids


def test_tokenizers_that_drop_a_first_space_keep_it_inside_the_text():
    tokenizer = TOKENIZERS["metaspace"]
    vocabulary = json.loads(tokenizer._definition())["model"]["vocab"]
    prompt = [vocabulary["▁a"]]
    ids = [vocabulary["▁cat"], vocabulary["▁s"], vocabulary["top"], vocabulary["▁a"]]
    assert tokenizer.decode(ids) == "cat stop a"
    for cuts in ([], [1], [2], [1, 2, 3]):
        pieces, completion = written(tokenizer, ids, SamplingConfig(4), cuts, prompt)
        assert "".join(pieces) == completion.text == " cat stop a"
        pieces, completion = written(tokenizer, ids, SamplingConfig(4, stop=(" stop",)), cuts, prompt)
        assert "".join(pieces) == " cat"
    smile = [vocabulary[f"<0x{b:02X}>"] for b in "😀".encode()]
    pieces, completion = written(tokenizer, smile * 20, SamplingConfig(80), range(80), prompt)
    assert completion.text == "😀" * 20
    assert all(piece in ("", "😀") for piece in pieces)


def test_of_two_stop_strings_in_one_token_the_one_complete_first_counts():
    words = ["<|endoftext|>", *"abcdx", "ab", "cd", "abcd"]
    merges = [("a", "b"), ("c", "d"), ("ab", "cd")]
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({word: i for i, word in enumerate(words)}, merges))
    inner.decoder = tokenizers.decoders.Fuse()
    tokenizer = JsonTokenizer(inner.to_str(), "merged")
    ids = tokenizer.encode("xabcdx")
    assert len(ids) == 3
    for stops in (("abcd", "bc"), ("bc", "abcd")):
        pieces, completion = written(tokenizer, ids, SamplingConfig(3, stop=stops), [1, 2])
        assert completion == Completion("xa", tuple(ids[:2]), "stop")
        assert "".join(pieces) == "xa"


def test_a_stream_of_broken_characters_is_handed_out_and_bounded():
    detokenizer = Detokenizer(BYTE)
    pieces = [detokenizer.push([0x80]) for _ in range(50)]
    assert "".join(pieces) == "\ufffd" * 47
    assert detokenizer.flush() == "\ufffd" * 3
    detokenizer = Detokenizer(BYTE)
    for _ in range(500):
        detokenizer.push([*"é".encode()])
    assert len(detokenizer._ids) <= 5 * Detokenizer.CONTEXT


# --- bad inputs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("", r"prompt 0 is empty: a prompt needs at least one token"),
        (["ok", ""], r"prompt 1 is empty"),
        ([[]], r"prompt 0 is empty"),
        ([[1, 257]], r"prompt 0 contains token id 257, outside the range 0 to 256"),
        ([[-1]], r"prompt 0 contains token id -1, outside the range 0 to 256"),
        ([1, 2], r"prompt 0 must be text or a list of token ids, got int: 1"),
        ([[1.5]], r"prompt 0 must be text or a list of token ids"),
        ("x" * 101, r"prompt 0 has 101 tokens, more than the longest shape bucket of 100"),
        ("a\udcff", r"prompt 0 is not valid Unicode text: .* at character 1"),
    ],
)
def test_bad_prompts(model, prompts, message):
    limited = LanguageModel(model.config, model.parameters, BYTE, max_prompt_tokens=100)
    with pytest.raises(ValueError, match=message):
        limited.generate(prompts)
    if isinstance(prompts, str):
        with pytest.raises(ValueError, match=message):
            limited.stream(prompts)  # at the call, not at the first piece


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "at least one id"),
        (np.zeros((0, 4), int), "at least one id"),
        (np.zeros((1, 1, 1), int), r"got shape \(1, 1, 1\)"),
        ([[1, 2], [3]], "rows of tokens have different lengths"),
        ([0.5], "ids must be integers, got float64"),
        ([3, 260], "logits contains token id 260, outside the range 0 to 259"),
        ([[3], [-2]], "logits contains token id -2, outside the range 0 to 259"),
        ([1] * 65537, "logits has 65537 tokens, more than the longest shape bucket of 65536"),
    ],
)
def test_bad_tokens(model, tokens, message):
    with pytest.raises(ValueError, match=message):
        model.logits(tokens)


def test_attention_must_hold_prompt_and_completion():
    model = tiny_model(tiny_config(("attention", "mlp")), max_prompt_tokens=64)
    with pytest.raises(ValueError, match="60 tokens and max_tokens is 5, together more than the 64 that"):
        model.generate("x" * 60, max_tokens=5)
    assert len(model.generate("x" * 60, max_tokens=4, temperature=0)[0].tokens) <= 4


def test_bad_models(model):
    with pytest.raises(ConfigError, match=r"tokenizer has 257 ids but .*vocab_size is 200"):
        tiny_model(tiny_config(vocab_size=200))
    wider = dataclasses.replace(model.config, width=64)
    with pytest.raises(ConfigError, match=r"not those of the configuration: embedding should be \(260, 64\), is \(260, "):
        LanguageModel(wider, model.parameters, BYTE)
    with pytest.raises(ConfigError, match="max_batch must be at least 1, got 0"):
        LanguageModel(model.config, model.parameters, BYTE, max_batch=0)
    with pytest.raises(ConfigError, match="temperature"):
        model.stream("a", temperature=-1)


# --- directories -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "deep" / "tiny"
    model.save(directory)
    return directory


def test_save_and_load_give_the_same_model(model, saved):
    loaded = LanguageModel.load(saved)
    assert loaded.config == model.config
    assert loaded.tokenizer.fingerprint == BYTE.fingerprint
    ids = list(range(0, 260, 7))
    np.testing.assert_array_equal(loaded.logits(ids), model.logits(ids))
    assert loaded.generate("abc", max_tokens=9) == model.generate("abc", max_tokens=9)
    assert sorted(entry.name for entry in saved.iterdir()) == ["config.json", "params", "tokenizer.json"]
    assert json.loads((saved / "config.json").read_text())["format"] == "blackmamba-jax model"


def test_save_overwrites_nothing(model, saved, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in saved.rglob("*")}
    with pytest.raises(ConfigError, match="exists already"):
        model.save(saved)
    assert {path: path.stat().st_mtime_ns for path in saved.rglob("*")} == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        model.save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_save_that_fails_leaves_nothing(model, tmp_path):
    class Unwritable(ByteTokenizer):
        def save(self, directory):
            super().save(directory)
            raise OSError("no space left")

    broken = LanguageModel(model.config, model.parameters, Unwritable())
    with pytest.raises(OSError, match="no space left"):
        broken.save(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_run_directory_gives_its_newest_checkpoint(model, tmp_path):
    run = Config(model=model.config)
    (tmp_path / "config.json").write_text(json.dumps(to_dict(run)))
    BYTE.save(tmp_path)
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        LanguageModel.load(tmp_path)
    older = jax.tree.map(np.zeros_like, model.parameters)
    with Checkpoints(tmp_path / "checkpoints", keep_last=2) as checkpoints:
        for step, parameters in ((5, older), (10, model.parameters)):
            checkpoints.save(step, {"params": parameters, "step": np.int32(step)}, data_state={}, config=to_dict(run))
    ids = [1, 2, 3]
    np.testing.assert_array_equal(LanguageModel.load(tmp_path).logits(ids), model.logits(ids))


def copied(saved: Path, tmp_path: Path) -> Path:
    target = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(saved), str(target)], check=True)
    return target


def write_config(directory: Path, **model) -> None:
    path = directory / "config.json"
    values = json.loads(path.read_text())
    values["model"] |= model
    path.write_text(json.dumps(values))


DAMAGES = {
    "no directory": (lambda d: os.rename(d, f"{d}-gone"), "neither a model nor a run directory: no such directory"),
    "no config": (lambda d: (d / "config.json").unlink(), "neither a model nor a run directory: no config.json"),
    "corrupt config": (
        lambda d: (d / "config.json").write_text('{"format": '),
        "config.json is damaged: it is not JSON",
    ),
    "binary config": (lambda d: (d / "config.json").write_bytes(b"\xff\xfe"), "config.json is damaged: it is not JSON"),
    "list config": (lambda d: (d / "config.json").write_text("[]"), "must hold a JSON object, found list"),
    "other format": (lambda d: (d / "config.json").write_text('{"format": "x"}'), "has format 'x' version None; this"),
    "unknown field": (lambda d: write_config(d, widht=32), r"model has no field 'widht' \(did you mean width\?\)"),
    "negative size": (lambda d: write_config(d, width=-32), "ModelConfig.width must be a positive integer, got -32"),
    "other shape": (
        lambda d: write_config(d, repeats=3),
        "the parameters are not those of the configuration: periods/",
    ),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "there is no tokenizer at .*tokenizer.json"),
    "corrupt tokenizer": (lambda d: (d / "tokenizer.json").write_text("{"), "is not a tokenizer.json: it is not JSON"),
    "no params": (lambda d: os.rename(d / "params", d / "elsewhere"), "has no params folder"),
    "damaged params": (
        lambda d: max((p for p in d.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size).write_bytes(b"x"),
        "cannot read the parameters in .*bytes instead of",
    ),
    "a file": (lambda d: (os.rename(d, f"{d}-gone"), d.write_text("x")), "is a file; give the directory"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_directories(saved, tmp_path, damage, capsys):
    directory = copied(saved, tmp_path)
    act, message = DAMAGES[damage]
    act(directory)
    with pytest.raises((ConfigError, CheckpointError), match=message):
        LanguageModel.load(directory)
    assert generate.main([str(directory), "--prompt", "a"]) == 1
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert str(directory) in error or "ModelConfig" in error or "configuration" in error


# --- the command line ------------------------------------------------------------------------------------------------


def command(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "bm_jax.generate", *arguments],
        env=environment, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=120, **options,
    )  # fmt: skip


def test_the_command_streams_a_prompt(tmp_path, story):
    model, text = story
    model.save(tmp_path / "story")
    done = command(str(tmp_path / "story"), "--prompt", "^", "--temperature", "0", "--stop", "Z!", "--stop", text[-3:])
    assert (done.returncode, done.stdout, done.stderr) == (0, "^" + text[:-3] + "\n", "")


def test_the_command_prints_several_prompts(saved, model, capsys):
    prompts = ["one", "another one", "a third"]
    options = ["--max-tokens", "11", "--temperature", "0.8", "--top-k", "40", "--top-p", "0.9", "--seed", "5"]
    assert generate.main([str(saved), *(a for p in prompts for a in ("--prompt", p)), *options]) == 0
    completions = model.generate(prompts, max_tokens=11, temperature=0.8, top_k=40, top_p=0.9, seed=[5, 6, 7])
    out, error = capsys.readouterr()
    assert error == ""
    assert out == "".join(
        f"--- {i} of 3 ---\n{prompt}{c.text}\n\n" for i, (prompt, c) in enumerate(zip(prompts, completions, strict=True), 1)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no prompt; give one with --prompt"),
        (["--prompt", ""], "prompt 0 is empty"),
        (["--prompt", "a", "--temperature", "-1"], "SamplingConfig.temperature must be"),
        (["--prompt", "a", "--top-p", "1.5"], "SamplingConfig.top_p must be"),
        (["--prompt", "a", "--stop", ""], "SamplingConfig.stop must be"),
    ],
)
def test_bad_requests(saved, arguments, message, capsys):
    assert generate.main([str(saved), *arguments]) == 1
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_the_command_fails_in_one_line(tmp_path):
    done = command(str(tmp_path / "nothing"), "--prompt", "a")
    assert done.returncode == 1
    assert done.stderr == f"error: {tmp_path / 'nothing'} is neither a model nor a run directory: no such directory\n"


def test_a_wrong_option_is_named(capsys):
    with pytest.raises(SystemExit) as stopped:
        generate.main(["somewhere", "--promt", "a"])
    assert stopped.value.code == 2
    assert "--prompt" in capsys.readouterr().err
