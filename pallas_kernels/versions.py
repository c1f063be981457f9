"""What differs between the supported versions of jax in Pallas for Mosaic GPU."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu


def mosaic_kernel(body: Callable, outputs: Any, scratch: Sequence[Any], **options: Any) -> Callable:
    """`plgpu.kernel` with these result and scratch shapes."""
    parameters = inspect.signature(plgpu.kernel).parameters
    names = ("out_type", "scratch_types") if "out_type" in parameters else ("out_shape", "scratch_shapes")  # since 0.11
    return plgpu.kernel(body, **dict(zip(names, (outputs, scratch), strict=True)), **options)
