"""Floating-point operations of a program's matrix products, counted exactly from its jaxpr, over all devices.

A product of `[m, k]` and `[k, n]` is 2 m k n operations; elementwise work is not counted. Rules:

- A loop counts its trips, or the bound its condition compares with; one without either counts once.
- A conditional counts one branch: `usual` the last, which is the one of a true predicate, `most` the largest.
- A grouped product (`ragged_dot`) counts each row once, whatever its group.
- Inside a `shard_map` shapes are those of one device, so it counts once a device.
- A Pallas kernel counts its grid times its body, blocks under `pl.when` as if taken. One whose work is only known at run
  time, as of Mosaic GPU or with a grid of that kind, counts as the grouped product that its arguments are of, or as nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.extend import core


class Flops(NamedTuple):
    """Operations with the usual and with the largest branches of conditionals."""

    usual: float
    most: float

    def plus(self, other: Flops, times: float = 1) -> Flops:
        """This and `other` so many times."""
        return Flops(self.usual + times * other.usual, self.most + times * other.most)


NONE = Flops(0, 0)


def matrix_flops(jaxpr: Any, platform: str) -> Flops:
    """Of a closed or open jaxpr, for code that is compiled for `platform` ("cpu", "cuda" or "tpu")."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    total = NONE
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            total = total.plus(_dot(equation))
        elif name in ("ragged_dot", "ragged_dot_general"):
            total = total.plus(_ragged_dot(equation))
        elif name == "conv_general_dilated":
            total = total.plus(_convolution(equation))
        elif name == "scan":
            total = total.plus(matrix_flops(params["jaxpr"], platform), params["length"])
        elif name == "while":
            total = total.plus(matrix_flops(params["body_jaxpr"], platform), _bound(params["cond_jaxpr"]))
        elif name == "cond":
            branches = [matrix_flops(branch, platform) for branch in params["branches"]]
            index = _platform_branch(params.get("branches_platforms"), platform)
            if index is not None:
                total = total.plus(branches[index])
            else:
                total = total.plus(Flops(branches[-1].usual, max(branch.most for branch in branches)))
        elif name == "shard_map":
            sizes = params["mesh"].shape
            axes = params.get("manual_axes", sizes)
            total = total.plus(matrix_flops(params["jaxpr"], platform), math.prod(sizes[axis] for axis in axes))
        elif name == "pallas_call":
            grid = params["grid_mapping"].grid
            if all(isinstance(size, int) for size in grid):
                total = total.plus(matrix_flops(params["jaxpr"], platform), math.prod(grid))
            else:
                total = total.plus(_grouped_kernel(equation))
        elif name == "mpmd_map":
            total = total.plus(_grouped_kernel(equation))
        else:
            for inner in _inner(params):
                total = total.plus(matrix_flops(inner, platform))
    return total


def _dot(equation: Any) -> Flops:
    (contracting, _), _ = equation.params["dimension_numbers"]
    lhs = equation.invars[0].aval
    flops = 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(lhs.shape[i] for i in contracting)
    return Flops(flops, flops)


def _ragged_dot(equation: Any) -> Flops:
    """Rows times columns: of the second factor every dimension that is neither contracted, nor shared, nor that of groups."""
    numbers = equation.params.get("ragged_dot_dimension_numbers")
    lhs, rhs = (v.aval for v in equation.invars[:2])
    if numbers is None:
        own = rhs.shape[2:]
    else:
        (_, contracting), (_, batch) = numbers.dot_dimension_numbers
        shared = {*contracting, *batch, *numbers.rhs_group_dimensions}
        own = [size for i, size in enumerate(rhs.shape) if i not in shared]
    flops = 2 * math.prod(lhs.shape) * math.prod(own)
    return Flops(flops, flops)


def _convolution(equation: Any) -> Flops:
    rhs = equation.invars[1].aval
    outputs = rhs.shape[equation.params["dimension_numbers"].rhs_spec[0]]
    flops = 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(rhs.shape) // outputs
    return Flops(flops, flops)


def _grouped_kernel(equation: Any) -> Flops:
    """Rows `[T, K]` with matrices `[X, K, N]`, or with `[T, N]` for the gradient of those: 2 T K N."""
    arguments = [v.aval for v in equation.invars if jax.numpy.issubdtype(v.aval.dtype, jax.numpy.floating)]
    if [len(a.shape) for a in arguments] not in ([2, 3], [2, 2]):
        return NONE
    flops = 2 * math.prod(arguments[0].shape) * equation.outvars[0].aval.shape[-1]
    return Flops(flops, flops)


def _bound(condition: Any) -> int:
    """The largest whole number that a loop's condition compares with, 1 if there is none."""
    bounds = [1]
    for equation in condition.jaxpr.eqns:
        if equation.primitive.name in ("lt", "le", "gt", "ge", "ne"):
            literals = [v.val for v in equation.invars if isinstance(v, core.Literal)]
            bounds += [
                int(value) for value in literals if jax.numpy.issubdtype(jax.numpy.result_type(value), jax.numpy.integer)
            ]
    return max(bounds)


def _platform_branch(platforms: Any, platform: str) -> int | None:
    """Which branch of `lax.platform_dependent` is for this platform."""
    if platforms is None:
        return None
    default = None
    for index, names in enumerate(platforms):
        if names is None:
            default = index
        elif platform in names:
            return index
    return default


def _inner(params: Any) -> Iterator[Any]:
    """The jaxprs among an equation's parameters."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else [value]:
            if hasattr(item, "eqns") or hasattr(getattr(item, "jaxpr", None), "eqns"):
                yield item
