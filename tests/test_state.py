"""What was read, as a value: pieces of any size, branches, files."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import BYTE, FAMILIES, random_parameters, tiny_config, tiny_model

from bm_jax import language_model, state
from bm_jax.cache import init_cache
from bm_jax.config import ConfigError, MambaConfig
from bm_jax.language_model import LanguageModel
from bm_jax.model import forward, logits, unrolled

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen."
IDS = list(TEXT.encode())


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """These tests compile much and compute little."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module", params=[FAMILIES[0], FAMILIES[-1]], ids="-".join)
def family(request) -> LanguageModel:
    return tiny_model(tiny_config(request.param))


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_model(tiny_config())


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def copy(tree):
    return jax.tree.map(np.array, tree)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [*FAMILIES, ("mamba", "mlp")], ids="-".join)
def test_padding_on_the_right_changes_nothing(layers, x64):
    """Rows of several lengths fed in pieces, some of them empty in a piece, against each row alone and whole."""
    inner_norms = layers == ("mamba", "mlp")
    config = tiny_config(layers, compute_dtype="float64", mamba=MambaConfig(state_size=4, inner_norms=inner_norms))
    parameters = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), random_parameters(config))
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 260, (3, 24))
    fed = np.array([[0, 5, 8], [8, 3, 1], [2, 8, 0]])  # of each row in each piece of 8
    cache = init_cache(config, 3, 24)
    outputs = [[], [], []]
    step = jax.jit(forward, static_argnames="config")
    for lengths in fed.T:
        tokens = rng.integers(0, 260, (3, 8))
        for row, n in enumerate(lengths):
            done = sum(map(len, outputs[row]))
            tokens[row, :n] = ids[row, done : done + n]
        output = step(parameters, tokens, config, cache=cache, lengths=lengths)
        cache = output.cache
        values = np.asarray(logits(parameters, output.hidden, config))
        for row, n in enumerate(lengths):
            outputs[row].append(values[row, :n])
    np.testing.assert_array_equal(cache.length, fed.sum(1))
    np.testing.assert_array_equal(cache.positions, fed.sum(1))
    for row, total in enumerate(fed.sum(1)):
        whole = step(parameters, ids[row : row + 1, :total], config, cache=init_cache(config, 1, 24))
        expected = logits(parameters, whole.hidden, config)[0]
        np.testing.assert_allclose(np.concatenate(outputs[row]), expected, rtol=0, atol=1e-5)
        for path, leaf in jax.tree_util.tree_leaves_with_path(whole.cache.layers):
            got = cache.layers[path[0].key][path[1].key][path[2].key][:, row]
            got = got[:, :total] if path[2].key in ("key", "value") else got
            want = leaf[:, 0, :total] if path[2].key in ("key", "value") else leaf[:, 0]
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_lengths_need_a_cache(model):
    with pytest.raises(ValueError, match="give a cache, and no segment_ids"):
        forward(model.parameters, jnp.zeros((1, 4), int), model.config, lengths=jnp.ones(1, int))


def test_a_state_is_what_the_prompt_was(family):
    whole = family.logits(IDS)
    read = family.prefill(TEXT[:30])
    np.testing.assert_allclose(family.next_logits(read)[0], whole[29], rtol=0, atol=1e-4)
    before = copy(read)
    later = family.prefill(TEXT[30:], read)
    np.testing.assert_allclose(family.next_logits(later)[0], whole[-1], rtol=0, atol=1e-4)
    stepped = family.step(read, IDS[30:31])
    np.testing.assert_allclose(family.next_logits(stepped)[0], whole[30], rtol=0, atol=1e-4)
    assert [int(s.read[0]) for s in (read, later, stepped)] == [30, len(IDS), 31]
    assert set(np.flatnonzero(later.seen[0])) == set(IDS)
    assert later.recent[0].tolist() == IDS[-8:]
    same(read, before)  # reading on from a value leaves it
    assert later.fork([0, 0]).seen.shape == (2, 260)


@pytest.mark.slow
def test_generating_from_a_state_is_generating_from_the_prompt(family):
    prompts = [TEXT, "short", TEXT[:33]]
    read = family.prefill(prompts)
    before = copy(read)
    options = {"max_tokens": 12, "temperature": 0.7, "repetition_penalty": 1.3, "logprobs": 2}
    wanted = family.generate(prompts, n=2, seed=[3, 4, 5], **options)
    got = family.generate(read, n=2, seed=[3, 4, 5], **options)
    assert [c.tokens for c in got] == [c.tokens for c in wanted]
    assert "".join(family.stream(read.fork([1]), seed=4, **options)) == wanted[2].text
    same(read, before)
    # A branch: several continuations of one state, each with more to read, of different lengths.
    branches = family.prefill([" and", " but then again", "."], family.prefill(TEXT))
    texts = [TEXT + " and", TEXT + " but then again", TEXT + "."]
    assert [c.tokens for c in family.generate(branches, max_tokens=8, temperature=0)] == [
        c.tokens for c in family.generate(texts, max_tokens=8, temperature=0)
    ]


def test_rows_and_counts_that_do_not_fit(model):
    read = model.prefill(["a", "b"])
    for call, message in (
        (lambda: model.prefill(["a", "b", "c"], read), "3 prompts after a state of 2 rows"),
        (lambda: model.stream(read), r"a state of 2 rows; take one of them by fork\(\[row\]\)"),
        (lambda: model.prefill([]), "there is no prompt"),
        (lambda: model.generate(read, seed=[1]), "got 1 for 2 prompts"),
        (lambda: model.step(read, [1, 300]), "prompt 1 contains token id 300"),
        (lambda: model.step(read, [1, 1.5]), "prompt 1 must be text or a list of token ids"),
        (lambda: read.fork([2]), r"integers from 0 to 1, got \[2\]"),
        (lambda: read.fork([-1]), "integers from 0 to 1"),
        (lambda: read.fork([0.5]), "integers from 0 to 1"),
        (lambda: read.fork(0), "integers from 0 to 1, got 0"),
        (lambda: tiny_model(tiny_config(width=64)).generate(read), "not a state of this model: .* should be"),
        (lambda: tiny_model(tiny_config(("mlp",))).prefill("a", read), "not a state of this model, which has no cache/layers"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    limited = tiny_model(tiny_config(("attention", "mlp")), max_prompt_tokens=64)
    with pytest.raises(ValueError, match="state row 0 has 60 tokens and max_tokens is 5, together more than the 64"):
        limited.generate(limited.prefill("x" * 60), max_tokens=5)
    with pytest.raises(ValueError, match="the state and the prompts has 66 tokens"):
        limited.prefill("y" * 6, limited.prefill("x" * 60))


def test_a_state_does_not_grow(model, monkeypatch):
    """Memory for a long prompt is that of one piece and one state, for a model without attention; nor is there a limit."""
    monkeypatch.setattr(language_model, "PIECE", 512)
    read, widths = state.read_on, []
    monkeypatch.setattr(
        state, "read_on", lambda p, s, tokens, *rest: widths.append(tokens.shape[1]) or read(p, s, tokens, *rest)
    )
    short, long = model.prefill("ab"), model.prefill("x" * 70_001)
    assert state.size_in_bytes(short) == state.size_in_bytes(long)
    assert int(long.read[0]) == 70_001
    assert max(widths) == 512
    assert model.generate(long, max_tokens=3)[0].tokens


# --- files -----------------------------------------------------------------------------------------------------------


def test_saved_and_loaded(family, tmp_path):
    read = family.prefill([TEXT, "short"])
    family.save_state(read, tmp_path / "read.state")
    again = family.load_state(tmp_path / "read.state")
    same(read, again)
    assert jax.tree.map(lambda leaf: leaf.dtype, read) == jax.tree.map(lambda leaf: leaf.dtype, again)
    assert family.generate(again, max_tokens=6) == family.generate(read, max_tokens=6)
    family.save_state(family.prefill("other"), tmp_path / "read.state")
    assert len(family.load_state(tmp_path / "read.state").recent) == 1
    assert os.listdir(tmp_path) == ["read.state"]


def test_files_that_are_no_state_of_the_model(model, tmp_path):
    file = tmp_path / "read.state"
    model.save_state(model.prefill(TEXT), file)
    good = file.read_bytes()
    other = tiny_model(tiny_config())
    other.parameters["embedding"] = other.parameters["embedding"] * 2
    deeper, edited = tiny_model(tiny_config(repeats=3)), tiny_model(tiny_config())
    edited.parameters["periods"]["layer_0"]["mamba"]["in_proj"] *= 2
    for stranger in (other, deeper, edited):
        with pytest.raises(ConfigError, match=r"read\.state is a state of another model"):
            stranger.load_state(file)
    with pytest.raises(ConfigError, match="no such file"):
        model.load_state(tmp_path / "nothing")
    for damaged, message in (
        (good[:-1] + bytes([good[-1] ^ 1]), "damaged: its checksum"),
        (good[: len(good) // 2], "not a readable"),
        (b"", "not a readable"),
        (b"not a state at all", "not a readable"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(ConfigError, match=message):
            model.load_state(file)
    from safetensors.numpy import save_file

    file.write_bytes(good)
    with pytest.raises(ConfigError, match="nowhere is not a folder"):
        model.save_state(model.prefill("a"), tmp_path / "nowhere" / "read.state")
    read = model.prefill("a")
    for wrong in (read._replace(hidden=read.hidden[..., :5]), read._replace(recent=read.recent.astype(np.float32))):
        model.save_state(wrong, file)
        with pytest.raises(ConfigError, match="not a state of this model"):
            model.load_state(file)
    save_file({"a": np.zeros(3)}, file)
    with pytest.raises(ConfigError, match="format None version None"):
        model.load_state(file)


def test_a_full_disk_leaves_the_old_file(model, small_disk):
    file = small_disk / "read.state"
    model.save_state(model.prefill(TEXT), file)
    before = file.read_bytes()
    (small_disk / "filler").write_bytes(b"x" * (2**23 - 2**15 - len(before)))
    with pytest.raises(OSError, match="No space left"):
        model.save_state(model.prefill(["x"] * 64), file)
    assert file.read_bytes() == before
    assert sorted(os.listdir(small_disk)) == ["filler", "read.state"]


def test_bfloat16_is_kept(tmp_path):
    model = tiny_model(tiny_config(compute_dtype="bfloat16"))
    read = model.prefill(TEXT)
    model.save_state(read, tmp_path / "s")
    same(read, model.load_state(tmp_path / "s"))
    assert str(read.hidden.dtype) == "bfloat16"


def test_pieces_cover_every_row():
    rows = [list(range(1, n + 1)) for n in (70, 1, 33)]
    taken = [[], [], []]
    for tokens, lengths in language_model.pieces(rows, 4, 32, 16):
        assert tokens.shape[1] in (16, 32)
        for row in range(3):
            taken[row] += tokens[row, : (tokens.shape[1] if lengths is None else lengths[row])].tolist()
        assert lengths is None or lengths[3] == 0
    assert taken == rows
    assert [lengths for _, lengths in language_model.pieces([[1, 2] * 16], 1, 32, 16)] == [None]


def test_room_of_attention():
    model = tiny_model(tiny_config(("attention", "mlp")))
    read = model.prefill(TEXT)
    assert state.room(read) == 128
    wide = state.with_room(read, 200)
    assert state.room(wide) == 200
    same(state.with_room(wide, 128), read)
    assert model.generate(wide, max_tokens=9) == model.generate(read, max_tokens=9)
    assert state.room(state.empty(unrolled(tiny_config()), 1)) == 0
    assert BYTE.vocab_size == 257
