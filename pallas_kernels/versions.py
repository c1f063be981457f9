"""What differs between the supported versions of jax in Pallas for Mosaic GPU."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu


def mosaic_kernel(body: Callable, outputs: Any, scratch: Sequence[Any], **options: Any) -> Callable:
    """`plgpu.kernel` with these result and scratch shapes."""
    parameters = inspect.signature(plgpu.kernel).parameters
    names = ("out_type", "scratch_types") if "out_type" in parameters else ("out_shape", "scratch_shapes")  # since 0.11
    return plgpu.kernel(body, **dict(zip(names, (outputs, scratch), strict=True)), **options)


def mosaic_load(ref: Any, layout: Any) -> Any:
    """`plgpu.load` of all of `ref`, in this layout."""
    index = ((),) if jax.__version_info__ < (0, 11) else ()
    return plgpu.load(ref, *index, layout=layout)


def mosaic_transpose(ref: Any) -> Any:
    """A view of the matrix `ref` with its axes exchanged."""
    return plgpu.transpose_ref(ref, (1, 0)) if jax.__version_info__ < (0, 11) else ref.transpose((1, 0))


mosaic_accumulator: Any = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]
"""Memory of WGMMA's sums."""
