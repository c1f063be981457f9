"""The same weights give the same logits and the same greedy text as the PyTorch models of `transformers`."""

from __future__ import annotations

import functools
import os
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch", reason="install the `parity` extra to compare with PyTorch")
    transformers = pytest.importorskip("transformers", reason="install the `parity` extra to compare with PyTorch")

from bm_jax.cache import init_cache
from bm_jax.config import AttentionConfig, MambaConfig, MlpConfig, ModelConfig, MoeConfig
from bm_jax.model import forward, init_parameters, logits

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch and transformers

V, M = 61, 32
ENDS = {"vocab_size": V, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}


def mamba_branch(state, prefix, norms=False):
    in_proj = state[f"{prefix}.in_proj.weight"]
    branch = {
        "in_proj": in_proj.reshape(2, -1, M).transpose(2, 0, 1),
        "conv_weight": state[f"{prefix}.conv1d.weight"][:, 0].T,
        "conv_bias": state[f"{prefix}.conv1d.bias"],
        "x_proj": state[f"{prefix}.x_proj.weight"].T,
        "dt_proj": state[f"{prefix}.dt_proj.weight"].T,
        "dt_bias": state[f"{prefix}.dt_proj.bias"],
        "A_log": state[f"{prefix}.A_log"],
        "D": state[f"{prefix}.D"],
        "out_proj": state[f"{prefix}.out_proj.weight"].T,
    }
    if norms:
        branch |= {f"{ours}_norm": state[f"{prefix}.{ours.lower()}_layernorm.weight"] for ours in ("dt", "B", "C")}
    return branch


def attention_branch(state, prefix, size):
    split = {
        ours: state[f"{prefix}.{ours[0]}_proj.weight"].reshape(-1, size, M).transpose(2, 0, 1)
        for ours in ("query", "key", "value")
    }
    return split | {"out": state[f"{prefix}.o_proj.weight"].T.reshape(-1, size, M)}


def mlp_branch(state, prefix):
    gate, up, down = (state[f"{prefix}.{name}_proj.weight"].T for name in ("gate", "up", "down"))
    return {"w_in": np.stack([gate, up], axis=1), "w_out": down}


def moe_branch(state, prefix, router):
    gate_up = state[f"{prefix}.experts.gate_up_proj"]  # [X, 2 F, M], gates first
    experts, twice_hidden, _ = gate_up.shape
    return {
        "router": state[f"{prefix}.{router}.weight"].T,
        "w_in": gate_up.reshape(experts, 2, twice_hidden // 2, M).transpose(0, 3, 1, 2),
        "w_out": state[f"{prefix}.experts.down_proj"].transpose(0, 2, 1),
    }


def stack(branches, config):
    """`branches[n]` is the one of layer n, `(kind, parameters)`; periods are stacked."""
    period = len(config.layers)
    layers = {}
    for i in range(period):
        kind = config.layers[i]
        repeats = [branches[i + period * r] for r in range(config.repeats)]
        assert all(k == kind for k, _ in repeats)
        layers[f"layer_{i}"] = {kind: {name: np.stack([b[name] for _, b in repeats]) for name in repeats[0][1]}}
    return layers


def mamba():
    theirs = transformers.MambaConfig(hidden_size=M, num_hidden_layers=3, state_size=8, layer_norm_epsilon=1e-5, **ENDS)
    ours = ModelConfig(
        layers=("mamba",), repeats=3, vocab_size=V, width=M, mamba=MambaConfig(state_size=8), final_norm="rmsnorm"
    )

    def convert(state):
        branches = [
            ("mamba", {"norm": state[f"backbone.layers.{n}.norm.weight"]} | mamba_branch(state, f"backbone.layers.{n}.mixer"))
            for n in range(3)
        ]
        return {
            "embedding": state["backbone.embeddings.weight"],
            "final_norm": state["backbone.norm_f.weight"],
            "periods": stack(branches, ours),
        }

    return transformers.MambaForCausalLM(theirs), ours, convert


def mixtral():
    theirs = transformers.MixtralConfig(
        hidden_size=M, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, num_experts_per_tok=2, rms_norm_eps=1e-5, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0}, sliding_window=None, **ENDS,
    )  # fmt: skip
    ours = ModelConfig(
        layers=("attention", "moe"),
        repeats=2,
        vocab_size=V,
        width=M,
        attention=AttentionConfig(heads=4, kv_heads=2, rotary_base=1000.0),
        moe=MoeConfig(experts=4, width=24, router="topk", top_k=2, normalize_gates=True, router_bias=False),
        final_norm="rmsnorm",
        tie_embeddings=False,
    )

    def convert(state):
        branches = []
        for n in range(2):
            layer = f"model.layers.{n}"
            norms = [state[f"{layer}.{name}_layernorm.weight"] for name in ("input", "post_attention")]
            branches.append(("attention", {"norm": norms[0]} | attention_branch(state, f"{layer}.self_attn", 8)))
            branches.append(("moe", {"norm": norms[1]} | moe_branch(state, f"{layer}.mlp", "gate")))
        return {
            "embedding": state["model.embed_tokens.weight"],
            "final_norm": state["model.norm.weight"],
            "unembedding": state["lm_head.weight"].T,
            "periods": stack(branches, ours),
        }

    return transformers.MixtralForCausalLM(theirs), ours, convert


def jamba():
    theirs = transformers.JambaConfig(
        hidden_size=M, intermediate_size=24, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2,
        rms_norm_eps=1e-6, num_experts=4, num_experts_per_tok=2, attn_layer_period=4, attn_layer_offset=2,
        mamba_d_state=8, tie_word_embeddings=False, **ENDS,
    )  # fmt: skip
    ours = ModelConfig(
        layers=("mamba", "mlp", "mamba", "moe", "attention", "mlp", "mamba", "moe"),
        repeats=2,
        vocab_size=V,
        width=M,
        mamba=MambaConfig(state_size=8, inner_norms=True),
        attention=AttentionConfig(heads=4, kv_heads=2, rotary=False),
        mlp=MlpConfig(width=24),
        moe=MoeConfig(experts=4, width=24, router="topk", top_k=2, router_bias=False),
        norm_eps=1e-6,
        final_norm="rmsnorm",
        tie_embeddings=False,
    )

    def convert(state):
        branches = []
        for n in range(8):
            layer = f"model.layers.{n}"
            norms = [state[f"{layer}.{name}_layernorm.weight"] for name in ("input", "pre_ff")]
            if n % 4 == 2:
                branches.append(("attention", {"norm": norms[0]} | attention_branch(state, f"{layer}.self_attn", 8)))
            else:
                branches.append(("mamba", {"norm": norms[0]} | mamba_branch(state, f"{layer}.mamba", norms=True)))
            if n % 2 == 1:
                branches.append(("moe", {"norm": norms[1]} | moe_branch(state, f"{layer}.feed_forward", "router")))
            else:
                branches.append(("mlp", {"norm": norms[1]} | mlp_branch(state, f"{layer}.feed_forward")))
        return {
            "embedding": state["model.embed_tokens.weight"],
            "final_norm": state["model.final_layernorm.weight"],
            "unembedding": state["lm_head.weight"].T,
            "periods": stack(branches, ours),
        }

    return transformers.JambaForCausalLM(theirs), ours, convert


class Pair:
    """One PyTorch model and ours with its weights."""

    def __init__(self, make):
        torch.manual_seed(0)
        self.theirs, config, convert = make()
        self.config = ModelConfig(**{**vars(config), "compute_dtype": "float32"})
        self.theirs.eval()
        with torch.no_grad():
            for parameter in self.theirs.parameters():  # no norm, bias or A_log keeps its initial value
                fan_in = parameter.shape[-1] if parameter.ndim > 1 else 1
                parameter.add_(torch.randn_like(parameter) * 0.5 / fan_in**0.5)
        state = {name: tensor.float().numpy() for name, tensor in self.theirs.state_dict().items()}
        self.parameters = jax.tree.map(jnp.asarray, convert(state))
        shapes = jax.eval_shape(lambda: init_parameters(self.config, jax.random.key(0)))
        assert jax.tree.map(jnp.shape, self.parameters) == jax.tree.map(jnp.shape, shapes)
        used = sum(leaf.size for leaf in jax.tree.leaves(self.parameters))
        assert used == sum(parameter.numel() for parameter in self.theirs.parameters())

    @functools.partial(jax.jit, static_argnums=0)
    def run(self, tokens, segment_ids=None, cache=None):
        output = forward(self.parameters, tokens, self.config, segment_ids=segment_ids, cache=cache)
        return logits(self.parameters, output.hidden, self.config), output.cache


@pytest.fixture(scope="module", params=[mamba, mixtral, jamba], ids=lambda make: make.__name__)
def pair(request):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Pair(request.param)


def close(got, wanted):
    assert np.abs(np.asarray(got) - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_logits(pair):
    tokens = np.random.default_rng(0).integers(V, size=(2, 21))
    with torch.no_grad():
        wanted = pair.theirs(torch.tensor(tokens)).logits.numpy()
    close(pair.run(jnp.asarray(tokens, jnp.int32))[0], wanted)


def test_logits_of_a_left_padded_batch(pair):
    tokens = np.random.default_rng(0).integers(V, size=(2, 21))
    mask = np.ones_like(tokens)
    mask[1, :5] = 0
    with torch.no_grad():
        wanted = pair.theirs(torch.tensor(tokens), attention_mask=torch.tensor(mask)).logits.numpy()
    got, _ = pair.run(jnp.asarray(tokens, jnp.int32), jnp.asarray(mask, jnp.int32))
    close(got[0], wanted[0])
    close(got[1, 5:], wanted[1, 5:])


def test_greedy_continuation(pair):
    prompt = np.random.default_rng(1).integers(1, V, size=(2, 5))
    new = 12
    with torch.no_grad():
        wanted = pair.theirs.generate(
            torch.tensor(prompt), attention_mask=torch.ones(prompt.shape, dtype=torch.long), do_sample=False,
            max_new_tokens=new,
        ).numpy()  # fmt: skip
    values, cache = pair.run(jnp.asarray(prompt, jnp.int32), None, init_cache(pair.config, 2, 5 + new))
    text = [prompt]
    for _ in range(new):
        text.append(np.asarray(values[:, -1:].argmax(-1)))
        values, cache = pair.run(jnp.asarray(text[-1], jnp.int32), None, cache)
    np.testing.assert_array_equal(np.concatenate(text, 1), wanted)
