"""Converters: tables that cover everything once, round trips byte for byte, parity with PyTorch, refusals."""

from __future__ import annotations

import collections
import json
import math
import pickle
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import configs
from bm_jax.checkpoint import CheckpointError
from bm_jax.config import AttentionConfig, ConfigError, MambaConfig, MlpConfig, ModelConfig, MoeConfig
from bm_jax.data.tokenizer import load_tokenizer
from bm_jax.language_model import LanguageModel
from bm_jax.leaves import nest
from bm_jax.tensor_file import Kind
from convert import compare, export_checkpoint, import_checkpoint
from convert.__main__ import main
from convert.archives import Archive, ArchiveError, PickledFile, open_archive, write_archive
from convert.config_reader import period
from convert.configs import differences, recognize, to_ours, to_theirs
from convert.plan import entries, leaf_shapes
from convert.tables import FORMATS

V, M = 272, 32
BLACKMAMBA = {
    "num_layers": 6, "hidden_size": M, "state_size": 5, "conv_dimension": 3, "vocab_size": V, "expansion_factor": 2,
    "mamba_moe_layers": ["r", "3", "r", "3", "r", "3"], "ffn_hidden_size": 12, "bias": False, "add_bias_linear": False,
    "swiglu": True, "max_sequence_length": 64,
}  # fmt: skip
JAMBA = {
    "model_type": "jamba", "vocab_size": V, "hidden_size": M, "intermediate_size": 24, "num_hidden_layers": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "attn_layer_period": 4, "attn_layer_offset": 2,
    "expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 4, "num_experts_per_tok": 2, "mamba_d_state": 6,
    "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 3, "use_mamba_kernels": False, "tie_word_embeddings": False,
}  # fmt: skip
MIXTRAL = {
    "model_type": "mixtral", "vocab_size": V, "hidden_size": M, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
    "rope_theta": 10000.0, "sliding_window": None, "tie_word_embeddings": False,
}  # fmt: skip
HF_MAMBA = {
    "model_type": "mamba", "vocab_size": V, "hidden_size": M, "num_hidden_layers": 3, "state_size": 5, "conv_kernel": 4,
    "expand": 2, "time_step_rank": 4, "use_bias": False, "use_conv_bias": True,
}  # fmt: skip
MAMBA = {"d_model": M, "n_layer": 2, "vocab_size": V - 5, "ssm_cfg": {}, "rms_norm": True, "pad_vocab_size_multiple": 8}
CASES = {
    "blackmamba": ("blackmamba", "experts apart", BLACKMAMBA),
    "blackmamba, dense layers": ("blackmamba", "experts apart", BLACKMAMBA | {"mamba_moe_layers": ["r", "1"] * 3}),
    "blackmamba, parallel": ("blackmamba", "experts apart", BLACKMAMBA | {"mamba_moe_layers": ["r4", "r", "r4"] * 2}),
    "blackmamba, parallel dense": ("blackmamba", "experts apart", BLACKMAMBA | {"mamba_moe_layers": ["r1"] * 6}),
    "blackmamba, not gated": ("blackmamba", "experts apart", BLACKMAMBA | {"swiglu": False, "mamba_moe_layers": "r8r8r8"}),
    "mamba": ("mamba", "plain", MAMBA),
    "hf-mamba": ("hf-mamba", "plain", HF_MAMBA),
    "hf-mamba, older": ("hf-mamba", "older name of the embedding", HF_MAMBA),
    "hf-jamba": ("hf-jamba", "experts apart", JAMBA),
    "hf-jamba, fused": ("hf-jamba", "experts fused", JAMBA),
    "hf-mixtral": ("hf-mixtral", "experts apart", MIXTRAL),
    "hf-mixtral, fused": ("hf-mixtral", "experts fused", MIXTRAL),
}
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def make_tensors(format, layout, fields, dtype=np.float32, seed=0):
    """Random tensors, every one different everywhere, some of them special numbers."""
    r = np.random.default_rng(seed)
    tensors = {}
    for entry in entries(FORMATS[format], layout, to_ours(format, fields)):
        tensor = (r.standard_normal(entry.shape) * 0.3).astype(dtype)
        if entry.name.endswith("A_log"):
            tensor = np.abs(tensor)
        tensors[entry.name] = tensor
    return tensors


def write(folder, format, fields, tensors, pickled=None):
    """A checkpoint folder with a byte tokenizer."""
    folder.mkdir()
    kind = FORMATS[format]
    pickled = kind.pickled if pickled is None else pickled
    if pickled:
        pytest.importorskip("torch", reason="pickled files need torch: pip install 'blackmamba-jax[parity]'")
    kinds = {name: Kind(tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    write_archive(folder, kinds, tensors.values(), pickled, kind.wrapper)
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    (folder / "tokenizer.json").write_text('{"type": "byte"}', encoding="utf-8")
    return folder


@pytest.mark.parametrize("case", CASES)
def test_tables_cover_every_leaf_and_tensor_once(case):
    format, layout, fields = CASES[case]
    assert recognize(fields) == format
    config = to_ours(format, fields)
    covered = {path: np.zeros(shape, int) for path, shape in leaf_shapes(config).items()}
    found = entries(FORMATS[format], layout, config)
    for entry in found:
        covered[entry.leaf][entry.at] += 1
        part = covered[entry.leaf][entry.at]
        assert math.prod(entry.shape) == part.size
        tensor = np.zeros(entry.shape)
        assert entry.as_ours(tensor).shape == part.shape
        assert np.shares_memory(entry.as_ours(tensor), tensor)  # what is written into one is in the other
    for path, count in covered.items():
        assert (count == 1).all(), path
    assert max(collections.Counter(entry.name for entry in found).values()) == 1


@pytest.mark.parametrize(("preset", "tensors"), [("blackmamba_340m_1p5b", 438), ("blackmamba_630m_2p8b", 525)])
def test_released_models_have_their_published_numbers_of_tensors(preset, tensors):
    config = configs.load(preset).model
    found = entries(FORMATS["blackmamba"], "experts apart", config)
    assert len(found) == tensors
    assert sum(math.prod(entry.shape) for entry in found) == {438: 1_458_462_072, 525: 2_783_213_584}[tensors]


@pytest.mark.parametrize("preset", configs.names())
def test_configurations_come_back(preset):
    config = configs.load(preset).model
    written = 0
    for format in FORMATS:
        try:
            fields = to_theirs(format, config)
        except ConfigError:
            continue
        written += 1
        assert recognize(fields) == format
        back = to_ours(format, json.loads(json.dumps(fields)), "swiglu")
        assert leaf_shapes(back) == leaf_shapes(config)
        assert back.layers * back.repeats == config.layers * config.repeats
    assert written or preset in ("moe_mamba", "transformer")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_a_round_trip_is_exact(case, dtype, tmp_path):
    """Names, types, shapes and every bit, a not-a-number and a negative zero among them; config.json too."""
    if dtype != "bfloat16" and case not in ("blackmamba", "hf-mamba", "hf-jamba, fused"):
        pytest.skip("every format once, three of them in every type")
    format, layout, fields = CASES[case]
    tensors = make_tensors(format, layout, fields, DTYPES[dtype])
    first = next(iter(tensors.values())).reshape(-1)
    first[:3] = [np.nan, -0.0, np.inf]
    mixed = next(name for name in tensors if name.endswith(("norm.weight", "layernorm.weight")))
    tensors[mixed] = tensors[mixed].astype(np.float32)  # one of another type than the rest
    if format == "mamba":
        tensors["lm_head.weight"] = tensors["backbone.embedding.weight"].copy()
    source = write(tmp_path / "source", format, fields, tensors)
    summary = import_checkpoint(source, tmp_path / "model")
    assert summary.format == format
    assert summary.layout == layout
    export_checkpoint(tmp_path / "model", tmp_path / "back", format)
    back = open_archive(tmp_path / "back", FORMATS[format].wrapper)
    assert list(back) == list(open_archive(source, FORMATS[format].wrapper))
    for name, tensor in tensors.items():
        got = back.read(name)
        assert got.dtype == tensor.dtype, name
        assert got.shape == tensor.shape, name
        assert got.tobytes() == tensor.tobytes(), name
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == fields
    assert all(difference.identical for difference in compare(source, tmp_path / "back"))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def oracle(tensors, fields, ids, gate):
    """Logits of the released BlackMamba code from its tensors, in float64: written from the description of that code."""
    t = {name: np.asarray(tensor, np.float64) for name, tensor in tensors.items()}
    rms = lambda x, w: x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-5) * w  # noqa: E731

    def mamba(x, p):
        inner, states, taps = p["A_log"].shape[0], p["A_log"].shape[1], p["conv1d.weight"].shape[2]
        xz = x @ p["in_proj.weight"].T
        u, z = xz[:, :inner], xz[:, inner:]
        padded = np.concatenate([np.zeros((taps - 1, inner)), u])
        u = silu(sum(padded[k : k + len(x)] * p["conv1d.weight"][:, 0, k] for k in range(taps)) + p["conv1d.bias"])
        low = u @ p["x_proj.weight"].T
        rank = low.shape[1] - 2 * states
        dt = np.log1p(np.exp(low[:, :rank] @ p["dt_proj.weight"].T + p["dt_proj.bias"]))
        h, out = np.zeros((inner, states)), []
        for s, B, C, v in zip(dt, low[:, rank : rank + states], low[:, rank + states :], u, strict=True):
            h = np.exp(s[:, None] * -np.exp(p["A_log"])) * h + (s * v)[:, None] * B
            out.append(h @ C + p["D"] * v)
        return (np.array(out) * silu(z)) @ p["out_proj.weight"].T

    def dense(x, p):
        hidden = x @ p["linear_fc1.weight"].T
        half = hidden.shape[1] // 2
        hidden = gate(hidden[:, :half]) * hidden[:, half:] if fields["swiglu"] else gelu(hidden)
        return hidden @ p["linear_fc2.weight"].T

    def experts(x, p):
        score = sigmoid(x @ p["router.weight"].T + p["router.bias"])
        chosen = score.argmax(1)
        out = np.zeros_like(x)
        for row, expert in enumerate(chosen):
            prefix = f"local_experts.{expert}."
            own = {name.removeprefix(prefix): w for name, w in p.items() if name.startswith(prefix)}
            out[row] = score[row, expert] * dense(x[row : row + 1], own)[0]
        return out

    def part(prefix):
        return {name.removeprefix(prefix): w for name, w in t.items() if name.startswith(prefix)}

    def mixer(x, p):
        if "A_log" in p:
            return mamba(x, p)
        return experts(x, p) if "router.weight" in p else dense(x, p)

    residual = t["embedding.word_embeddings.weight"][ids]
    for layer in range(fields["num_layers"]):
        prefix = f"decoder.layers.{layer}."
        added = mixer(rms(residual, t[prefix + "norm.weight"]), part(prefix + "mixer."))
        if prefix + "norm_moe.weight" in t:
            added = added + mixer(rms(residual, t[prefix + "norm_moe.weight"]), part(prefix + "moe."))
        residual = residual + added
    centred = residual - residual.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    normed = normed * t["decoder.final_layernorm.weight"] + t["decoder.final_layernorm.bias"]
    return normed @ t["embedding.word_embeddings.weight"].T


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("blackmamba")])
@pytest.mark.parametrize("activation", ["released", "swiglu"])
def test_blackmamba_gives_the_logits_of_its_code(case, activation, tmp_path):
    format, layout, fields = CASES[case]
    tensors = make_tensors(format, layout, fields, seed=3)
    source = write(tmp_path / "source", format, fields, tensors)
    import_checkpoint(source, tmp_path / "model", expert_activation=activation, compute_dtype="float32")
    ids = np.random.default_rng(0).integers(0, V, 40)
    wanted = oracle(tensors, fields, ids, gelu if activation == "released" else silu)
    got = LanguageModel.load(tmp_path / "model").logits(ids)
    # float32 through six layers: 1e-6 of the largest logit, with room for a factor of ten.
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("case", ["hf-mamba", "hf-jamba, fused", "hf-mixtral, fused"])
def test_parity_with_transformers_both_ways(case, tmp_path):
    """Their checkpoint gives their logits and greedy tokens here; ours, exported, loads there strictly and gives ours."""
    torch = pytest.importorskip("torch", reason="install the `parity` extra to compare with PyTorch")
    transformers = pytest.importorskip("transformers", reason="install the `parity` extra to compare with PyTorch")
    format, _, fields = CASES[case]
    fields = fields | {"vocab_size": 257}  # as many as the tokenizer has: rows past them are never sampled here
    with _quiet():
        config = transformers.AutoConfig.for_model(**fields, bos_token_id=0, eos_token_id=None, pad_token_id=0)
        torch.manual_seed(2)  # on such weights either side is some 5e-6 from float64 (1e-5 with other seeds)
        theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            r = torch.Generator().manual_seed(0)
            for parameter in theirs.parameters():  # far from where they start, so that one left out shows
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=r))
        theirs.save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").write_text('{"type": "byte"}', encoding="utf-8")
    import_checkpoint(tmp_path / "source", tmp_path / "model", compute_dtype="float32")
    model = LanguageModel.load(tmp_path / "model")
    ids = np.random.default_rng(0).integers(1, 256, (2, 24))
    with torch.no_grad(), _quiet():
        wanted = theirs(torch.tensor(ids), use_cache=False).logits.numpy()
        first = torch.tensor(ids[:1])
        tokens = theirs.generate(first, attention_mask=torch.ones_like(first), max_new_tokens=64, do_sample=False)
        tokens = tokens[0, ids.shape[1] :].tolist()
    got = model.logits(ids)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    (completion,) = model.generate([ids[0].tolist()], max_tokens=64, temperature=0.0)
    assert list(completion.tokens) == until_end(tokens)

    # Prompts of different lengths, padded on the left.
    short = ids[1, :10]
    padded = torch.tensor(np.stack([ids[0], np.concatenate([np.zeros(14, int), short])]))
    mask = torch.tensor(np.stack([np.ones(24, int), np.repeat([0, 1], [14, 10])]))
    with torch.no_grad(), _quiet():
        batch = theirs.generate(padded, attention_mask=mask, max_new_tokens=16, do_sample=False)[:, 24:].tolist()
    completions = model.generate([ids[0].tolist(), short.tolist()], max_tokens=16, temperature=0.0)
    assert [list(completion.tokens) for completion in completions] == [until_end(row) for row in batch]

    export_checkpoint(tmp_path / "model", tmp_path / "back", format)
    with torch.no_grad(), _quiet():
        again, problems = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
        assert not any(problems[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        np.testing.assert_array_equal(again.eval()(torch.tensor(ids), use_cache=False).logits.numpy(), wanted)


def until_end(tokens):
    """The ids before the end of the document, where a model here stops."""
    return tokens[: tokens.index(256)] if 256 in tokens else tokens


def _quiet():
    import warnings

    return warnings.catch_warnings(action="ignore")


def test_shards_with_an_index(tmp_path):
    format, layout, fields = CASES["hf-mixtral"]
    tensors = make_tensors(format, layout, fields)
    source = write(tmp_path / "source", format, fields, tensors)
    names = list(tensors)
    (source / "model.safetensors").unlink()
    placed = {}
    for number, part in enumerate((names[:9], names[9:])):
        file = f"model-{number + 1:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, source / file)
        placed |= dict.fromkeys(part, file)
    index = source / "model.safetensors.index.json"

    def write_index(weight_map):
        index.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")

    write_index(placed)
    import_checkpoint(source, tmp_path / "model")
    export_checkpoint(tmp_path / "model", tmp_path / "back", format)
    assert load_file(tmp_path / "back" / "model.safetensors").keys() == tensors.keys()
    for change, message in (
        ({"model.norm.weight": "../elsewhere.safetensors"}, "not in its folder"),
        ({"model.norm.weight": "missing.safetensors"}, "which is missing"),
        ({"model.norm.bias": placed[names[0]]}, "does not hold it"),
        ({names[0]: placed[names[-1]]}, "but it is in"),
    ):
        write_index(placed | change)
        with pytest.raises(ArchiveError, match=message):
            import_checkpoint(source, tmp_path / "other")
    write_index({name: file for name, file in placed.items() if name != names[0]})
    with pytest.raises(ArchiveError, match="does not name"):
        import_checkpoint(source, tmp_path / "other")
    save_file({names[0]: tensors[names[0]]}, source / "extra.safetensors")
    write_index(placed | {"x": "extra.safetensors"})
    with pytest.raises(ArchiveError, match=r"is in .* and again in"):
        import_checkpoint(source, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def _without(tensors, name):
    return {key: value for key, value in tensors.items() if key != name}


NORM = "model.layers.0.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: _without(t, NORM), f"lacks 1 of .* first {NORM}"),
        (lambda t: t | {"model.surprise": np.zeros(3, np.float32)}, r"first model.surprise \(3,\)"),
        (lambda t: t | {NORM: np.zeros(M + 1, np.float32)}, rf"{NORM} is \(33,\), config.json asks for \(32,\)"),
        (lambda t: t | {NORM: np.zeros(M, np.int32)}, f"{NORM} is int32; float32, float16 and bfloat16"),
        (lambda t: t | {NORM: np.zeros(M, np.float64)}, f"{NORM} is float64"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, message, tmp_path):
    format, layout, fields = CASES["hf-mixtral"]
    source = write(tmp_path / "source", format, fields, change(make_tensors(format, layout, fields)))
    with pytest.raises(ArchiveError, match=message):
        import_checkpoint(source, tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (BLACKMAMBA | {"mamba_moe_layers": ["r", "16", "r", "3", "r", "3"]}, "'16', which the released code reads"),
        (BLACKMAMBA | {"mamba_moe_layers": ["r", "3", "r", "4", "r", "3"]}, r"layers of \[3, 4\] experts"),
        (BLACKMAMBA | {"mamba_moe_layers": ["r", "3"]}, "must have 6 entries"),
        (BLACKMAMBA | {"add_bias_linear": True}, "add_bias_linear is True"),
        (BLACKMAMBA | {"hidden_size": "32"}, "hidden_size must be a whole number"),
        (BLACKMAMBA | {"state_size": 0}, "state_size must be a whole number"),
        (HF_MAMBA | {"use_bias": True}, "use_bias is True"),
        (HF_MAMBA | {"intermediate_size": 65}, "intermediate_size is 65"),
        (HF_MAMBA | {"model_type": "mamba2"}, "no known format: model_type is 'mamba2'"),
        (MAMBA | {"ssm_cfg": {"layer": "Mamba2"}}, "'Mamba2'; only Mamba1"),
        (MAMBA | {"attn_layer_idx": [1]}, "attn_layer_idx"),
        (MIXTRAL | {"rope_scaling": {"type": "linear"}}, "scaled rotary"),
        (MIXTRAL | {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (JAMBA | {"mamba_proj_bias": True}, "mamba_proj_bias"),
        ({}, "no known format"),
    ],
)
def test_configurations_beyond_our_models_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        to_ours(recognize(fields), fields)


class _Runs:
    def __reduce__(self):
        return (open, ("ran", "w"))


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch", reason="pickled files need torch: pip install 'blackmamba-jax[parity]'")
    monkeypatch.chdir(tmp_path)
    format, layout, fields = CASES["blackmamba"]
    source = write(tmp_path / "source", format, fields, make_tensors(format, layout, fields))
    path = source / "pytorch_model.bin"
    torch.save({"model": {}, "more": _Runs()}, path)
    for _ in range(2):
        with pytest.raises(ArchiveError, match="nothing in it was run"):
            import_checkpoint(source, tmp_path / "model")
        path.write_bytes(pickle.dumps(_Runs()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    torch.save({"model": {"x": 3}}, path)
    with pytest.raises(ArchiveError, match="'x' is int, not a tensor"):
        import_checkpoint(source, tmp_path / "model")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_truncated_file_is_refused(name, tmp_path):
    format, layout, fields = CASES["hf-mamba"]
    source = write(tmp_path / "source", format, fields, make_tensors(format, layout, fields), pickled=name.endswith(".bin"))
    content = (source / name).read_bytes()
    for length in (0, 5, 100, len(content) // 2, len(content) - 1):
        (source / name).write_bytes(content[:length])
        with pytest.raises(ArchiveError, match=name):
            import_checkpoint(source, tmp_path / "model")
        assert not (tmp_path / "model").exists()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_to_a_header_is_refused_or_harmless(data, tmp_path):
    """A safetensors header with bytes changed is refused by name, or says the same as before."""
    path = tmp_path / "damaged.safetensors"
    save_file({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}, path)
    content = bytearray(path.read_bytes())
    (size,) = struct.unpack("<Q", content[:8])
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, 8 + size - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    message = "damaged.safetensors"
    try:
        archive = open_archive(path)
        for name in archive:
            assert archive.read(name).shape == archive.tensors[name][1]
    except ArchiveError as error:
        message = str(error)
    assert "damaged.safetensors" in message


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_to_an_index_is_refused_or_harmless(data, tmp_path):
    """An index whose text or entries are changed is refused by name, or gives every tensor as it is."""
    tensors = {name: np.full(3, i, np.float32) for i, name in enumerate("abc")}
    placed = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    for file in set(placed.values()):
        save_file({name: tensors[name] for name in placed if placed[name] == file}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    names = st.sampled_from([*placed, *placed.values(), "", "..", "/", "../one.safetensors", "weight_map", "d", "\udcff", "\0"])
    values = st.one_of(names, st.none(), st.integers(), st.lists(names, max_size=2))
    weight_map = placed | data.draw(st.dictionaries(names, values, max_size=3))
    for name in data.draw(st.sets(st.sampled_from("abc"), max_size=1)):
        weight_map.pop(name)
    text = bytearray(json.dumps({"metadata": {}, "weight_map": weight_map}).encode())
    for _ in range(data.draw(st.integers(0, 2))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    index.write_bytes(text)
    message = str(tmp_path)
    try:
        archive = open_archive(tmp_path)
    except ArchiveError as error:
        message = str(error)
    else:
        # Of a file that is not named nothing is known; importing then finds that tensors are missing.
        assert {name: archive.read(name)[0] for name in archive}.items() <= {"a": 0, "b": 1, "c": 2}.items()
    assert str(tmp_path) in message


@pytest.mark.parametrize("pickled", [False, True])
def test_a_full_disk_leaves_nothing(pickled, small_disk, tmp_path):
    """Model and checkpoint have 10 MB and more, the disk has 8."""
    format, fields = ("mamba", MAMBA | {"d_model": 600}) if pickled else ("hf-mamba", HF_MAMBA | {"hidden_size": 600})
    source = write(tmp_path / "source", format, fields, make_tensors(format, "plain", fields))
    with pytest.raises((ArchiveError, CheckpointError), match=r"[Nn]o space left on device"):
        import_checkpoint(source, small_disk / "model")
    import_checkpoint(source, tmp_path / "model")
    with pytest.raises(ArchiveError, match=r"[Nn]o space left on device.*nothing is left of it"):
        export_checkpoint(tmp_path / "model", small_disk / "back", format)
    assert list(small_disk.iterdir()) == []


def test_what_is_there_is_not_overwritten(tmp_path):
    format, layout, fields = CASES["hf-mamba"]
    source = write(tmp_path / "source", format, fields, make_tensors(format, layout, fields))
    (tmp_path / "model").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        import_checkpoint(source, tmp_path / "model")
    shutil.rmtree(tmp_path / "model")
    import_checkpoint(source, tmp_path / "model")
    (tmp_path / "back").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        export_checkpoint(tmp_path / "model", tmp_path / "back", format)


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    format, layout, fields = CASES["hf-mamba"]
    source = write(tmp_path / "source", format, fields, make_tensors(format, layout, fields))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("convert.convert._write_json", full)
    with pytest.raises(ArchiveError, match=r"No space left on device.*nothing is left of it"):
        import_checkpoint(source, tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_tied_copy_must_be_the_embedding(tmp_path):
    format, layout, fields = CASES["hf-mamba"]
    tensors = make_tensors(format, layout, fields)
    source = write(tmp_path / "source", format, fields, tensors | {"lm_head.weight": tensors["backbone.embeddings.weight"] + 1})
    with pytest.raises(ArchiveError, match=r"lm_head\.weight is not the embedding"):
        import_checkpoint(source, tmp_path / "model")


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    format, layout, fields = CASES["hf-jamba"]
    source = write(tmp_path / "source", format, fields, make_tensors(format, layout, fields))
    (source / "tokenizer_config.json").write_text("{ }")
    assert main(["import", str(source), str(tmp_path / "model"), "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    assert "Hugging Face Jamba (experts apart)" in out
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "back"), "--format", "hf-jamba"]) == 0
    assert main(["verify", str(source), str(tmp_path / "back")]) == 0
    assert "tensors are identical" in capsys.readouterr().out
    assert (tmp_path / "back/tokenizer_config.json").read_text() == "{ }"
    assert main(["import", str(source), str(tmp_path / "again")]) == 0
    assert main(["verify", str(tmp_path / "model"), str(tmp_path / "again")]) == 0
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "half"), "--format", "hf-jamba", "--dtype", "float16"]) == 0
    assert main(["verify", str(source), str(tmp_path / "half")]) == 1
    assert "differs by up to" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "no"), "--format", "blackmamba"]) == 1
    assert "blackmamba cannot express this model" in capsys.readouterr().err
    assert main(["import", str(tmp_path / "nowhere"), str(tmp_path / "no")]) == 1
    assert "does not exist" in capsys.readouterr().err
    (source / "tokenizer.json").unlink()
    assert main(["import", str(source), str(tmp_path / "no")]) == 1
    assert "--tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def export_of(config, tmp_path, format):
    """What exporting a model of this configuration says, or None where it works and comes back as the same model."""
    parameters = nest({path: np.zeros(shape, np.float32) for path, shape in leaf_shapes(config).items()})
    LanguageModel(config, parameters, load_tokenizer("byte")).save(tmp_path / "ours")
    try:
        export_checkpoint(tmp_path / "ours", tmp_path / "theirs", format)
    except ConfigError as error:
        assert not (tmp_path / "theirs").exists()
        return str(error)
    import_checkpoint(tmp_path / "theirs", tmp_path / "again")
    assert not differences(config, LanguageModel.load(tmp_path / "again").config)
    return None


GATED = MoeConfig(experts=4, width=8, router="topk", top_k=2, router_bias=False, normalize_gates=True)
ONE = replace(GATED, experts=1, top_k=1, normalize_gates=False)
HEADS = AttentionConfig(heads=4, kv_heads=2)


@pytest.mark.parametrize(
    ("format", "changes", "message"),
    [
        ("hf-mixtral", {"layers": ("attention", "moe", "attention"), "repeats": 2}, "attention and moe in turns"),
        ("hf-mixtral", {"moe": replace(GATED, activation="geglu")}, "moe.activation is geglu, swiglu there"),
        ("hf-mixtral", {"moe": replace(GATED, activation="silu")}, "moe.activation is silu, swiglu there"),
        ("hf-mixtral", {}, None),
        ("hf-jamba", {"layers": ("mamba", "mlp") * 3 + ("attention", "mlp", "mamba", "mlp", "attention", "mlp")}, "evenly"),
        ("hf-jamba", {"layers": ("mamba", "mlp", "mamba", "mlp", "attention", "mlp", "attention", "mlp")}, "not evenly spaced"),
        ("hf-jamba", {"layers": ("mamba", "mlp", "attention", "mlp") * 2}, None),
        ("hf-jamba", {"layers": ("mamba", "mlp"), "mlp": MlpConfig(width=8, activation="gelu")}, "mlp.activation is gelu"),
        ("hf-jamba", {"layers": ("mamba", "moe"), "moe": ONE}, "layers is"),
        ("blackmamba", {"mamba": MambaConfig(dt_rank=3)}, "mamba.dt_rank is 3, 2 there"),
        ("blackmamba", {"norm_eps": 1e-2}, "norm_eps is 0.01, 1e-05 there"),
        ("blackmamba", {"moe": MoeConfig(experts=4, width=8, activation="silu")}, "moe.activation is silu, gelu there"),
        ("blackmamba", {"moe": MoeConfig(experts=4, width=8, activation="swiglu")}, None),
        ("mamba", {"norm_eps": 1e-2}, "norm_eps is 0.01, 1e-05 there"),
        ("mamba", {"mamba": MambaConfig(dt_rank=3)}, None),
        ("hf-mamba", {"norm_eps": 1e-2, "tie_embeddings": False}, None),
    ],
)  # fmt: skip
def test_a_model_that_a_format_cannot_say_is_refused(format, changes, message, tmp_path):
    """Every property that changes what is computed comes back, or the export is refused."""
    if message is None and FORMATS[format].pickled:
        pytest.importorskip("torch", reason="pickled files need torch: pip install 'blackmamba-jax[parity]'")
    usual = {
        "hf-mixtral": ModelConfig(layers=("attention", "moe"), moe=GATED, final_norm="rmsnorm"),
        "hf-jamba": ModelConfig(
            mamba=MambaConfig(inner_norms=True), mlp=MlpConfig(width=8), attention=replace(HEADS, rotary=False),
            moe=replace(GATED, normalize_gates=False), final_norm="rmsnorm",
        ),
        "blackmamba": ModelConfig(moe=MoeConfig(experts=4, width=8, activation="geglu")),
        "mamba": ModelConfig(layers=("mamba",), final_norm="rmsnorm"),
    }  # fmt: skip
    usual["hf-mamba"] = usual["mamba"]
    attention = changes.pop("attention", usual[format].attention if format == "hf-jamba" else HEADS)
    said = export_of(replace(usual[format], width=32, attention=attention, **({"repeats": 1} | changes)), tmp_path, format)
    assert (message in said) if message else said is None, said


def test_what_importing_wrote_is_checked(tmp_path):
    format, layout, fields = CASES["hf-mamba"]
    source = write(tmp_path / "source", format, fields, make_tensors(format, layout, fields))
    import_checkpoint(source, tmp_path / "model")
    path = tmp_path / "model" / "source.json"
    kept = json.loads(path.read_text())
    some = dict(list(kept["tensors"].items())[1:])
    for change in (
        {"format": "x"}, {"format": None}, {"layout": None}, {"layout": "experts fused"}, {"config": "x"}, {"config": {}},
        {"config": fields | {"vocab_size": 99}}, {"tensors": some}, {"tensors": []}, {"tensors": some | {"x": "float32"}},
        {"tensors": kept["tensors"] | {"backbone.norm_f.weight": "int8"}},
    ):  # fmt: skip
        path.write_text(json.dumps(kept | change))
        with pytest.raises(ArchiveError, match=r"source\.json is not what importing this model wrote"):
            export_checkpoint(tmp_path / "model", tmp_path / "back", format)
    assert not (tmp_path / "back").exists()
    path.write_text(json.dumps(kept))
    config = json.loads((tmp_path / "model/config.json").read_text())
    config["model"]["norm_eps"] = 0.5
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    with pytest.raises(ArchiveError, match=r"the model's norm_eps is 0\.5"):
        export_checkpoint(tmp_path / "model", tmp_path / "back", format)


def test_another_layout_or_format_keeps_the_type(tmp_path):
    format, layout, fields = CASES["hf-mixtral"]
    source = write(tmp_path / "source", format, fields, make_tensors(format, layout, fields, ml_dtypes.bfloat16))
    import_checkpoint(source, tmp_path / "model")
    export_checkpoint(tmp_path / "model", tmp_path / "fused", format, layout="experts fused")
    assert {str(dtype) for dtype, _ in open_archive(tmp_path / "fused").tensors.values()} == {"bfloat16"}


def test_numbers_too_large_for_a_type_are_refused(tmp_path):
    format, layout, fields = CASES["hf-mamba"]
    tensors = make_tensors(format, layout, fields)
    tensors["backbone.norm_f.weight"][3] = 1e6
    tensors["backbone.norm_f.weight"][4] = np.inf
    import_checkpoint(write(tmp_path / "source", format, fields, tensors), tmp_path / "model")
    with pytest.raises(ArchiveError, match=r"norm_f\.weight has numbers too large for float16"):
        export_checkpoint(tmp_path / "model", tmp_path / "half", format, dtype="float16")
    export_checkpoint(tmp_path / "model", tmp_path / "brain", format, dtype="bfloat16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["brain", "model", "source"]


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 40), st.sampled_from([10**12, 10**30, 10**400, -(10**400)]), st.text(max_size=3),
    st.floats(), st.lists(st.integers(-1, 9), max_size=7), st.lists(st.sampled_from(["r", "8", "r8", "16", "1"]), max_size=7),
    st.dictionaries(st.sampled_from(["layer", "d_state", "rope_type", "rope_theta", "bias"]), st.integers(-1, 4), max_size=2),
)  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_to_a_configuration_is_refused_or_another_model(data):
    """No value of a field ends in anything but a model or one error that names config.json."""
    _, _, fields = CASES[data.draw(st.sampled_from(sorted(CASES)))]
    extra = ["ssm_cfg", "rope_parameters", "rope_scaling", "layernorm_epsilon", "tie_embeddings", "head_dim", "dt_rank"]
    names = st.sampled_from(sorted({*fields, *extra}))
    changed = fields | data.draw(st.dictionaries(names, ODD, min_size=1, max_size=2))
    message = "config.json"
    try:
        to_ours(recognize(changed), changed)
    except ConfigError as error:
        message = str(error)
        assert len(message) < 600
    assert "config.json" in message or "Config." in message


def test_pickles_that_are_no_plain_tensors(tmp_path):
    torch = pytest.importorskip("torch")
    format, layout, fields = CASES["mamba"]
    source = write(tmp_path / "source", format, fields, make_tensors(format, layout, fields))
    path = source / "pytorch_model.bin"
    tensors = torch.load(path, weights_only=True)
    name = "backbone.norm_f.weight"
    for change in (
        {name: torch.zeros(1).expand(M)}, {name: torch.zeros(M, device="meta")}, {name: torch.zeros(M).to_sparse()},
        {3: torch.zeros(M)},
    ):  # fmt: skip
        torch.save(tensors | change, path)
        with pytest.raises(ArchiveError, match=r"no number in the file|not a tensor by its name"):
            import_checkpoint(source, tmp_path / "model")
    torch.save(tensors, path)
    with zipfile.ZipFile(path) as stored, zipfile.ZipFile(tmp_path / "small", "w", zipfile.ZIP_DEFLATED) as small:
        for entry in stored.namelist():
            small.writestr(entry, stored.read(entry))
    shutil.copy(tmp_path / "small", path)
    with pytest.raises(ArchiveError, match="a compressed zip file"):
        import_checkpoint(source, tmp_path / "model")
    # Parameters, and files of before PyTorch 1.6.
    torch.save({key: torch.nn.Parameter(tensor) for key, tensor in tensors.items()}, path)
    import_checkpoint(source, tmp_path / "one")
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    import_checkpoint(source, tmp_path / "two")
    assert all(difference.identical for difference in compare(tmp_path / "one", tmp_path / "two"))


def test_a_pickled_file_is_mapped_anew(tmp_path, monkeypatch):
    """As often as it takes, and what was read before stays as it was."""
    pytest.importorskip("torch")
    format, layout, fields = CASES["mamba"]
    tensors = make_tensors(format, layout, fields, ml_dtypes.bfloat16)
    source = write(tmp_path / "source", format, fields, tensors)
    monkeypatch.setattr(PickledFile, "MAPPED_BYTES", 2000)
    archive = open_archive(source)
    loads, load = [], archive.files[0]._load
    monkeypatch.setattr(archive.files[0], "_load", lambda: loads.append(1) or load())
    read = {name: archive.read(name) for name in archive}
    assert len(loads) > 5
    for name, tensor in tensors.items():
        assert read[name].tobytes() == tensor.tobytes(), name


def test_a_tensor_twice_in_one_header(tmp_path):
    entry = '"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'
    text = f"{{{entry}, {entry}}}".encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(ArchiveError, match="'a' is there twice"):
        open_archive(tmp_path)


def test_published_configurations_that_are_not_like_most():
    dense = {name: value for name, value in JAMBA.items() if name != "num_experts_per_tok"} | {"num_experts": 1}
    assert "moe" not in to_ours("hf-jamba", dense).kinds
    assert to_ours("hf-mixtral", MIXTRAL | {"num_key_value_heads": None}).attention.kv_heads == 4
    for fields, message in (
        (MIXTRAL | {"num_experts_per_tok": 1}, "num_experts_per_tok is 1"),
        (MAMBA | {"model_type": "mamba2"}, "model_type is 'mamba2'"),
        (JAMBA | {"attn_layer_offset": 4}, "attn_layer_offset must be a whole number from 0 to 3"),
        (JAMBA | {"mamba_inner_layernorms": False}, "mamba_inner_layernorms"),
        (MAMBA | {"tie_embeddings": "false"}, "tie_embeddings must be true or false"),
        (BLACKMAMBA | {"num_layers": 10**12}, "num_layers must be a whole number from 1 to 10000"),
    ):
        with pytest.raises(ConfigError, match=message):
            to_ours(recognize(fields), fields)


def test_a_configuration_of_more_layers_than_tensors(tmp_path):
    format, layout, fields = CASES["hf-mamba"]
    source = write(tmp_path / "source", format, fields | {"num_hidden_layers": 9999}, make_tensors(format, layout, fields))
    with pytest.raises(ArchiveError, match=r"32 tensors, but config\.json asks for 9999 layers"):
        import_checkpoint(source, tmp_path / "model")


@pytest.mark.slow
def test_a_command_that_is_told_to_end_leaves_nothing(tmp_path):
    format, layout, fields = "hf-mamba", "plain", HF_MAMBA | {"hidden_size": 1024, "num_hidden_layers": 40}
    source = write(tmp_path / "source", format, fields, make_tensors(format, layout, fields))
    command = [sys.executable, "-m", "convert", "import", str(source), str(tmp_path / "model")]
    with subprocess.Popen(command, cwd=Path(__file__).parent.parent, stderr=subprocess.DEVNULL) as process:
        while not list(tmp_path.glob(".model.*")) and process.poll() is None:
            time.sleep(0.002)
        process.terminate()
        assert process.wait(60) == 143
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.slow
def test_training_starts_from_an_imported_model(tmp_path):
    """Its configuration, tokenizer and parameters; what it was imported from is compared with the first step's loss."""
    import train
    from bm_jax.train import fit

    format, layout, fields = CASES["hf-mamba"]
    source = write(tmp_path / "source", format, fields, make_tensors(format, layout, fields, ml_dtypes.bfloat16))
    import_checkpoint(source, tmp_path / "model", compute_dtype="float32")
    command = ["--init-from", str(tmp_path / "model"), "--run.directory", str(tmp_path / "run"), "--run.steps", "1"]
    command += ["--run.sample-tokens", "0", "--run.eval-batches", "1", "--optimizer.warmup-steps", "1"]
    command += ["--optimizer.learning-rate", "1e-30", "--data.batch-size", "2", "--data.sequence-length", "32"]
    config = train.parse(command)
    model = LanguageModel.load(tmp_path / "model")
    assert config.model == model.config
    assert fit(config).finished
    trained = LanguageModel.load(tmp_path / "run")
    ids = np.arange(40) % 256
    np.testing.assert_array_equal(trained.logits(ids), model.logits(ids))
    # It leaves as it came, in type and configuration.
    export_checkpoint(tmp_path / "run", tmp_path / "back", format)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == fields
    assert open_archive(tmp_path / "back").tensors == open_archive(source).tensors
    # A run that has checkpoints goes on from them.
    shutil.rmtree(tmp_path / "model" / "params")
    assert fit(config).step == 1
    with pytest.raises(ConfigError, match="neither a model nor a run directory"):
        train.parse(["--init-from", str(tmp_path / "nowhere")])


def test_a_pickled_export_without_torch_says_so(tmp_path, monkeypatch):
    format, layout, fields = CASES["hf-mamba"]
    source = write(tmp_path / "source", format, fields, make_tensors(format, layout, fields))
    import_checkpoint(source, tmp_path / "model")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(
        ArchiveError, match=r"back/pytorch_model\.bin is a pickled file, which needs PyTorch: pip install torch"
    ):
        export_checkpoint(tmp_path / "model", tmp_path / "back", "mamba")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "source"]


def test_a_file_in_place_of_a_folder(tmp_path):
    format, layout, fields = CASES["hf-mamba"]
    tensors = make_tensors(format, layout, fields)
    source = write(tmp_path / "source", format, fields, tensors)
    import_checkpoint(source / "model.safetensors", tmp_path / "model")
    leaf = LanguageModel.load(tmp_path / "model").parameters["embedding"]
    np.testing.assert_array_equal(jnp.asarray(leaf), tensors["backbone.embeddings.weight"])
    assert isinstance(open_archive(source), Archive)


def test_periods():
    assert period(("a",) * 5) == (("a",), 5)
    assert period(("a", "b", "a", "b")) == (("a", "b"), 2)
    assert period(("a", "b", "a")) == (("a", "b", "a"), 1)
