"""Rows to the devices of their experts and back, along the `expert` axis: by all_to_all, padded or ragged.

Padded, a device has room for as many rows from each device of the axis; this works everywhere. Ragged, the rows that it
gets follow each other: fewer bytes travel, and room counts in all and not pair by pair. CPUs have no ragged all_to_all.

Both take the device that each row goes to, `[R]`, the axis's size for rows that go nowhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from bm_jax.config import ConfigError
from bm_jax.experts import inverse, places, take_rows
from pallas_kernels.dispatch import target

AXIS = "expert"


class Exchange(NamedTuple):
    """Where each device's rows go. The functions are called on every device of the axis together, inside `shard_map`."""

    most: Array
    """The least room that holds what is sent here."""
    there: Callable[[Array, int], Array]
    """Rows `[R, M]` -> what the device receives, `[room, M]`, zero where nothing is. Differentiable."""
    back: Callable[[Array], Array]
    """The inverse: `[room, M]` -> `[R, M]`, zero for rows that went nowhere. Differentiable."""
    labels: Callable[[Array, int, int], Array]
    """`there` for integers `[R]`, the last argument where nothing is."""


def padded(peer: Array) -> Exchange:
    """By all_to_all, in room that is a multiple of the axis's size."""
    devices, count = lax.axis_size(AXIS), len(peer)
    position, sizes = places(peer, devices)
    order = inverse(position)
    starts = jnp.cumsum(sizes) - sizes
    rank = position - starts[jnp.minimum(peer, devices - 1)]

    def slots(room: int) -> tuple[Array, Array, Array, Array]:
        """The row of each place of the device's room and the place of each row, and whether there is one."""
        each = room // devices
        place = jnp.arange(room) % each
        index = order[jnp.minimum(jnp.repeat(starts, each) + place, count - 1)]
        return index, jnp.clip(peer * each + rank, 0, room - 1), place < jnp.repeat(sizes, each), peer < devices

    def swap(x: Array) -> Array:
        return lax.all_to_all(x.reshape(devices, -1, *x.shape[1:]), AXIS, 0, 0).reshape(x.shape)

    def there(rows: Array, room: int) -> Array:
        index, slot, filled, placed = slots(room)
        return swap(take_rows(rows, index, slot, filled, placed))

    def back(rows: Array) -> Array:
        index, slot, filled, placed = slots(len(rows))
        return take_rows(swap(rows), slot, index, placed, filled)

    def labels(values: Array, room: int, nothing: int) -> Array:
        index, _, filled, _ = slots(room)
        return swap(jnp.where(filled, values[index], nothing))

    return Exchange(devices * jnp.max(sizes), there, back, labels)


class Route(NamedTuple):
    """What `lax.ragged_all_to_all` is told, each by device of the axis, int32."""

    starts: Array
    """First of the rows sent to it."""
    sizes: Array
    """Rows sent to it."""
    targets: Array
    """Where they go there."""
    received: Array
    """Rows that come from it."""


def ragged(peer: Array) -> Exchange:
    """By ragged_all_to_all, in any room.

    Raises:
        ConfigError: this is for a CPU.
    """
    if target().platform == "cpu":
        raise ConfigError("MoeConfig.exchange is 'ragged', but CPUs have no ragged all_to_all; use 'padded'")
    devices, count = lax.axis_size(AXIS), len(peer)
    position, sizes = places(peer, devices)
    order = inverse(position)
    table = lax.all_gather(sizes, AXIS)  # [from, to]
    me = lax.axis_index(AXIS)
    sent_starts = jnp.cumsum(table, axis=1) - table  # where rows lie on the device that sends them
    received_starts = jnp.cumsum(table, axis=0) - table  # and on that which gets them
    forth = Route(sent_starts[me], sizes, received_starts[me], table[:, me])
    back_again = Route(received_starts[:, me], table[:, me], sent_starts[:, me], sizes)

    def there(rows: Array, room: int) -> Array:
        return _travel(take_rows(rows, order, position), count, room, forth, back_again)

    def back(rows: Array) -> Array:
        return take_rows(_travel(rows, len(rows), count, back_again, forth), position, order)

    def labels(values: Array, room: int, nothing: int) -> Array:
        return _ragged(values[order], jnp.full(room, nothing, values.dtype), forth)

    return Exchange(jnp.sum(table[:, me]), there, back, labels)


def _ragged(rows: Array, into: Array, route: Route) -> Array:
    return lax.ragged_all_to_all(rows, into, *route, axis_name=AXIS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _travel(rows: Array, count: int, room: int, forth: Route, back: Route) -> Array:
    """`count` rows sent along `forth` into `room` of zeros; the gradient takes the way `back`."""
    return _ragged(rows, jnp.zeros((room, *rows.shape[1:]), rows.dtype), forth)


_travel.defvjp(
    lambda rows, count, room, forth, back: (_travel(rows, count, room, forth, back), (forth, back)),
    lambda count, room, routes, d: (_travel(d, room, count, *reversed(routes)), None, None),
)


EXCHANGES: dict[str, Callable[[Array], Exchange]] = {"padded": padded, "ragged": ragged}
"""By `MoeConfig.exchange`."""
