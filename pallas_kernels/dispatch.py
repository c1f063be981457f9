"""Choosing an implementation of an operator: what each one can serve, which is preferred where, and why one was taken."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
from jax import Array
from jax.sharding import AxisType

OVERRIDE = "PALLAS_KERNELS_IMPLEMENTATION"
"""Environment variable naming the implementation that `implementation=None` stands for, for debugging: a name for every
operator (`xla`), or pairs (`selective_scan=xla,grouped_matmul=reference`) that leave the others alone."""


CAPABILITIES = {"A100": 8.0, "H100": 9.0, "H200": 9.0, "GH200": 9.0, "B200": 10.0}
"""CUDA compute capability by a word of the device's name, for devices that are only described: those say their name alone."""


class Target(NamedTuple):
    """The device that a call is compiled for."""

    platform: str
    """"cpu", "gpu" or "tpu"."""
    kind: str
    """The vendor's name of the device, as `jax.Device.device_kind`."""
    capability: float = 0.0
    """CUDA compute capability, 9.0 on Hopper; 0 where there is none."""


class Call(NamedTuple):
    """What a choice depends on: never values, only what is known while tracing."""

    target: Target
    arguments: Mapping[str, Array | None]
    """The operator's array arguments by name."""


def always(call: Call) -> str | None:
    """An implementation that serves every call."""
    return None


class Implementation(NamedTuple):
    """One way to compute an operator."""

    function: Callable
    refusal: Callable[[Call], str | None] = always
    """Why it cannot serve a call, or None where it can."""
    preferred: Callable[[Call], bool] = lambda call: True
    """Whether `implementation=None` takes it for a call it can serve, rather than one of those after it."""


def target() -> Target:
    """The device that code traced now is for: one of the current mesh's, else the default device.

    A mesh of devices that this machine does not have (`jax.set_mesh` over a described topology) is what tells the choice
    that code is compiled for them ahead of time.
    """
    default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    device = jax.devices(default)[0] if isinstance(default, str) else default or jax.devices()[0]
    # The abstract mesh can be read while tracing, the mesh itself cannot.
    described = jax.sharding.get_abstract_mesh().abstract_device or device
    platform = "gpu" if described.platform in ("gpu", "cuda", "rocm") else described.platform
    if described.device_kind == device.device_kind:
        capability = getattr(device, "compute_capability", None) or 0
    else:
        capability = next((CAPABILITIES[word] for word in described.device_kind.split() if word in CAPABILITIES), 0)
    return Target(platform, described.device_kind, float(capability))


def divided() -> bool:
    """Whether arrays traced now may be divided over several devices: a mesh of them, outside `shard_map` over all its axes.

    A kernel sees whole arrays; one in such a program would have to be put in a `shard_map` first.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1 and any(kind != AxisType.Manual for kind in mesh.axis_types)


def overridden(operator: str) -> str | None:
    """The implementation that the environment names for `operator`, or None.

    Raises:
        NotImplementedError: the variable is neither a name nor a list of `operator=name`.
    """
    value = os.environ.get(OVERRIDE, "").strip()
    if "=" not in value:
        return value or None
    names: dict[str, str] = {}
    for pair in value.split(","):
        key, _, name = (part.strip() for part in pair.partition("="))
        if not key or not name or "=" in name:
            raise NotImplementedError(
                f"{OVERRIDE}={value!r}: give one name, or pairs such as selective_scan=xla,causal_conv=reference"
            )
        names[key] = name
    return names.get(operator)


def resolve(
    operator: str,
    implementation: str | None,
    table: Mapping[str, Implementation],
    arguments: Mapping[str, Array | None] | None = None,
) -> Callable:
    """The function in `table` that serves this call.

    `table` is in order of preference, best first. A named implementation is taken or refused; only `None` may choose.

    Raises:
        NotImplementedError: `implementation` (or the override) is not one of the operator's implementations, or cannot
            serve a call with these `arguments` on the current device; the message says why.
    """
    name = overridden(operator) if implementation is None else implementation
    call = Call(target(), arguments or {})
    if name is None:
        return next(row for row in table.values() if row.refusal(call) is None and row.preferred(call)).function
    if name not in table:
        raise NotImplementedError(f"{operator} has no implementation {name!r}; it has {', '.join(table)}")
    reason = table[name].refusal(call)
    if reason is not None:
        raise NotImplementedError(f"{operator}: {name} cannot serve this call: {reason}")
    return table[name].function


def explain(operator: str, table: Mapping[str, Implementation], arguments: Mapping[str, Array | None]) -> str:
    """One line an implementation: which would run for `implementation=None` and why each of the others would not.

    `arguments` may hold `jax.ShapeDtypeStruct`s in the place of arrays.
    """
    call = Call(target(), arguments)
    named = overridden(operator)
    lines, chosen = [], None
    for name, row in table.items():
        reason = row.refusal(call)
        if reason is not None:
            verdict = f"cannot: {reason}"
        elif chosen is None and (name == named if named else row.preferred(call)):
            chosen, verdict = name, f"runs: named by {OVERRIDE}" if named else "runs: the first that can and is preferred here"
        elif named:
            verdict = f"can; {OVERRIDE} names {named}"
        else:
            verdict = "can; one before it is preferred" if chosen else "can; not preferred for this shape"
        lines.append(f"{name}: {verdict}")
    return "\n".join([f"{operator} on {call.target.kind or call.target.platform}", *lines])
