"""The training state and one pure optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bm_jax.config import Config
from bm_jax.loss import Batch, LossSums, next_token_loss, predicted
from bm_jax.model import Parameters, init_parameters
from bm_jax.optimizer import learning_rate
from bm_jax.routing import Statistics
from bm_jax.sharding import parameter_shardings


@flax.struct.dataclass
class TrainState:
    """Everything a step reads and writes on the device."""

    step: Array
    """Steps taken, skipped ones included: int32."""
    params: Parameters
    opt_state: Any
    key: Array
    """Key of the run; step k uses fold_in(key, k)."""
    skipped: Array
    """Updates skipped for a non-finite loss or gradient on the way to this state, without steps that were undone: int32."""
    skipped_in_row: Array
    """Updates skipped since the last good one: int32."""


def init_state(config: Config, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before step 1, a function of `config.run.seed`."""
    init_key, run_key = jax.random.split(jax.random.key(config.run.seed))
    params = init_parameters(config.model, init_key)
    step, skipped, in_row = (jnp.zeros((), jnp.int32) for _ in range(3))  # three buffers: each is donated
    return TrainState(step, params, optimizer.init(params), run_key, skipped, in_row)


def state_shardings(abstract: TrainState, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """NamedShardings for a state: optimizer moments lie where their parameters lie, scalars everywhere."""
    everywhere: Any = NamedSharding(mesh, PartitionSpec())
    params = parameter_shardings(abstract.params, mesh)
    masked = lambda leaf: isinstance(leaf, optax.MaskedNode)  # noqa: E731 (a parameter that another part of Muon trains)
    opt_state = optax.tree_map_params(
        optimizer,
        lambda leaf, sharding: leaf if masked(leaf) else sharding,
        abstract.opt_state,
        params,
        transform_non_params=lambda _: everywhere,
        is_leaf=masked,
    )
    return TrainState(everywhere, params, opt_state, everywhere, everywhere, everywhere)


def make_train_step(
    config: Config, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """The pure function (state, batch) -> (state, metrics); jit it with the state donated.

    An objective or gradient norm that is not finite, or a norm above `optimizer.skip_norm_above`, leaves parameters and
    optimizer as they were and is counted. Metrics: `learning_rate`, `objective` (nats a token, as optimized: training routing,
    z-loss and router losses included), `grad_norm`, `skipped`, `skipped_in_row`, and for models with MoE layers
    `expert_load_training` and `dropped` per layer.
    """

    schedule = learning_rate(config.optimizer, config.run.steps)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(state.key, state.step)
        objective, gradients, statistics = _accumulate(state.params, batch, key, config)
        with jax.named_scope("optimizer"):
            grad_norm = optax.tree.norm(gradients)
            limit = config.optimizer.skip_norm_above
            finite = jnp.isfinite(objective) & jnp.isfinite(grad_norm)
            if limit is not None:
                finite &= grad_norm <= limit

            def update(params: Parameters, opt_state: Any) -> tuple[Parameters, Any]:
                updates, opt_state = optimizer.update(gradients, opt_state, params)
                return cast(Parameters, optax.apply_updates(params, updates)), opt_state

            params, opt_state = jax.lax.cond(
                finite, update, lambda params, opt_state: (params, opt_state), state.params, state.opt_state
            )
        rate = schedule(state.step - state.skipped)
        state = TrainState(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            key=state.key,
            skipped=state.skipped + ~finite,
            skipped_in_row=jnp.where(finite, 0, state.skipped_in_row + 1),
        )
        metrics = {
            "objective": objective,
            "grad_norm": grad_norm,
            "learning_rate": rate,
            "skipped": state.skipped,
            "skipped_in_row": state.skipped_in_row,
        }
        if statistics is not None:
            metrics |= {"expert_load_training": statistics.load, "dropped": statistics.dropped}
        return state, metrics

    return train_step


def _accumulate(params: Parameters, batch: Batch, key: Array, config: Config) -> tuple[Array, Parameters, Statistics | None]:
    """Objective, gradients and mean statistics over the microbatches of a batch.

    Token losses are divided by the predicted tokens of the whole batch, so the result does not depend on how documents
    fall into microbatches; routing does, since each microbatch is balanced by itself.
    """
    parts = config.run.accumulation
    count = jnp.maximum(jnp.sum(predicted(batch["segment_ids"])), 1)

    def objective(params: Parameters, microbatch: Batch, key: Array) -> tuple[Array, Statistics | None]:
        options: Any = {"z_loss": config.run.z_loss, "remat": config.run.remat, "key": key}
        value, _, statistics = next_token_loss(params, microbatch, config.model, training=True, **options)
        value = value / count
        if statistics is not None:
            value = value + jnp.sum(statistics.loss) / parts
        return value, statistics

    gradient = jax.value_and_grad(objective, has_aux=True)
    if parts == 1:
        (value, statistics), gradients = gradient(params, batch, key)
        return value, gradients, statistics

    def add(carry: tuple[Array, Parameters], inputs: tuple[Batch, Array]):
        (value, statistics), gradients = gradient(params, *inputs)
        return jax.tree.map(jnp.add, carry, (value, gradients)), statistics

    microbatches = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
    zero = jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params)
    (value, gradients), statistics = jax.lax.scan(add, zero, (microbatches, jax.random.split(key, parts)))
    return value, gradients, jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), statistics)


def make_eval_step(config: Config) -> Callable[[Parameters, Batch], tuple[LossSums, dict[str, Array]]]:
    """The function (parameters, batch) -> (loss sums, routing metrics per MoE layer), with inference routing."""

    def eval_step(params: Parameters, batch: Batch) -> tuple[LossSums, dict[str, Array]]:
        _, sums, statistics = next_token_loss(params, batch, config.model)
        if statistics is None:
            return sums, {}
        return sums, {"expert_load": statistics.load, "router_entropy": statistics.entropy}

    return eval_step
