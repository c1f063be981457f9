"""A batch that is drawn on and on, for scripts that time generation: the library's loop, and nothing ends early.

As in `LanguageModel.decode`, a step is one kernel where `bm_jax.decode_step` has one.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bm_jax import decoding
from bm_jax.cache import init_cache
from bm_jax.config import ModelConfig
from bm_jax.decode_step import Kernel, kernel_for, step_parameters
from bm_jax.language_model import inference_parameters
from bm_jax.model import Parameters, unrolled
from bm_jax.sampling import SamplingConfig

NEVER = -1
"""As the end-of-document id: no id that is drawn."""


class Drawing:
    """Tokens drawn from one-token prompts, chunk by chunk as `LanguageModel.generate` does, without text.

    Args:
        parameters: from `decoding_parameters`.
        head: of the unembedding, likewise.
        config: the model.
        batch: rows; each has a seed of its own.
        kernel: that a step is one kernel, from `kernel_of`.
        room: tokens that attention layers have room for at first, at least `decoding.CHUNK`.
        growth: how many times larger the next room is, when one is full.
        programs: what is compiled already, see `compile_drawing`.
    """

    def __init__(
        self,
        parameters: Parameters,
        head: Parameters,
        config: ModelConfig,
        *,
        batch: int = 1,
        kernel: Kernel | None = None,
        room: int = 256,
        growth: int = 2,
        programs: Mapping[tuple[str, int], Any] | None = None,
    ) -> None:
        self.parameters, self.head, self.batch, self.growth = parameters, head, batch, growth
        self.config, self.kernel, self.grows = config_of(config, kernel), kernel, "attention" in config.kinds
        self.first_room = max(room, decoding.CHUNK) if self.grows else 0
        self.rows, self.programs = rows_of(config, batch), programs or {}
        self.restart()

    def restart(self) -> None:
        """Begin again, with nothing read."""
        self.room, self.drawn = self.first_room, 0
        self.going = start(self.config, self.batch, self.room)

    def draw(self, tokens: int) -> list[np.ndarray]:
        """Go on until each row has so many tokens; the ids drawn, `[B, ...]` of each call, when they are there."""
        ids: list[np.ndarray] = []
        while self.drawn < tokens:
            steps = min(decoding.CHUNK, tokens - self.drawn)
            if self.grows and self.drawn + steps > self.room:
                self.room *= self.growth
                self.going = self._grow(self.going)
            self.going, drawn = self._decode(self.going, steps)
            ids.append(np.asarray(drawn.ids)[:, :steps])
            self.drawn += steps
        return ids

    def _decode(self, going: decoding.Going, steps: int) -> tuple[decoding.Going, decoding.Drawn]:
        program = self.programs.get(("decode", self.room))
        if program and steps == decoding.CHUNK:
            return program(self.parameters, self.head, going, self.rows)
        return decoding.decode(self.parameters, self.head, going, self.rows, steps, self.config, self.kernel)

    def _grow(self, going: decoding.Going) -> decoding.Going:
        program = self.programs.get(("grow", self.room))
        return program(going) if program else grow(going, self.room)


def kernel_of(config: ModelConfig, batch: int) -> Kernel | None:
    """The kernel that a step is, where it is one: for rows without limits."""
    kernel = kernel_for(config, batch)
    return None if kernel is None else kernel._replace(limited=False)


def config_of(config: ModelConfig, kernel: Kernel | None) -> ModelConfig:
    """The configuration that `decoding.decode` is given."""
    return unrolled(config) if kernel is None else config


def decoding_parameters(parameters: Parameters, config: ModelConfig, kernel: Kernel | None) -> tuple[Parameters, Parameters]:
    """What `decoding.decode` is given of a model's parameters, in the compute dtype: of the layers, and of the unembedding."""
    layers, head = inference_parameters(parameters, config)
    return (layers if kernel is None else step_parameters(parameters, config)), head


def rows_of(config: ModelConfig, batch: int) -> decoding.Rows:
    """Temperature 1, no end."""
    settings = [SamplingConfig(max_tokens=2**31 - 1, seed=row) for row in range(batch)]
    return decoding.make_rows(settings, batch, end=NEVER, vocab_size=config.vocab_size)


@partial(jax.jit, static_argnames=("config", "batch", "room"))
def start(config: ModelConfig, batch: int, room: int) -> decoding.Going:
    """Nothing read: the prompt's token is what the loop is fed first."""
    number = jnp.zeros(batch, jnp.int32)
    return decoding.Going(init_cache(config, batch, room), None, number + 1, number, jnp.ones(batch, bool))


@partial(jax.jit, static_argnames=("room",))
def grow(going: decoding.Going, room: int) -> decoding.Going:
    """The same with room for more keys and values."""

    def more(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        if path[-1].key not in ("key", "value"):
            return leaf
        return jnp.pad(leaf, ((0, 0), (0, 0), (0, room - leaf.shape[2]), (0, 0), (0, 0)))

    layers = jax.tree_util.tree_map_with_path(more, going.cache.layers)
    return going._replace(cache=going.cache._replace(layers=layers))


def rooms(config: ModelConfig, tokens: int, room: int, growth: int) -> list[int]:
    """The rooms that drawing so many tokens goes through; 0 alone for a model without attention."""
    if "attention" not in config.kinds:
        return [0]
    found = [max(room, decoding.CHUNK)]
    while found[-1] < tokens:
        found.append(found[-1] * growth)
    return found


def compile_drawing(
    shapes: tuple[Parameters, Parameters],
    config: ModelConfig,
    *,
    batch: int,
    kernel: Kernel | None,
    room: int,
    before: int | None,
) -> dict[tuple[str, int], Any]:
    """Programs of a `Drawing` for one room and for the way there from the room `before`.

    `shapes` are the parameters of `decoding_parameters`, or their shapes and dtypes.
    """
    config = config_of(config, kernel)
    state = jax.eval_shape(partial(start, config, batch, room))
    rows = rows_of(config, batch)
    found = {("decode", room): decoding.decode.lower(*shapes, state, rows, decoding.CHUNK, config, kernel).compile()}
    if before is not None:
        found["grow", room] = grow.lower(jax.eval_shape(partial(start, config, batch, before)), room).compile()
    return found
