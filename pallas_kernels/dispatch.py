"""Choosing an implementation of an operator."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

OVERRIDE = "PALLAS_KERNELS_IMPLEMENTATION"
"""Environment variable naming the implementation that `implementation=None` stands for, for debugging."""


def resolve(operator: str, implementation: str | None, table: Mapping[str, Callable]) -> Callable:
    """The function in `table` that serves this call.

    `table` is in order of preference, best first. A named implementation is taken or refused; only `None` may choose.

    Raises:
        NotImplementedError: `implementation` (or the override) is not one of the operator's implementations.
    """
    name = (os.environ.get(OVERRIDE) or None) if implementation is None else implementation
    if name is None:
        return next(iter(table.values()))
    if name not in table:
        raise NotImplementedError(f"{operator} has no implementation {name!r}; it has {', '.join(table)}")
    return table[name]
