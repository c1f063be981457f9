"""Accelerators that a plan can be made for, none of them attached: chips, and the device descriptions that compilers take.

A topology is written `v5e:16x16` (TPU generation and grid of chips) or `h100:8` (GPUs of one host).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from pathlib import Path
from typing import Any, Literal

from bm_jax.config import ConfigError, near_miss

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device; for TPU v7x that is half a chip."""

    name: str
    platform: Literal["tpu", "cuda"]
    memory: float
    """Bytes of HBM that programs may use."""
    flops: float
    """Peak dense bfloat16 operations a second."""
    bandwidth: float
    """Peak HBM bytes a second."""
    network: float
    """Peak bytes a second sent to the other devices of the topology, all links together, one way."""
    grid: int = 0
    """Dimensions of a TPU's grid of chips."""
    largest: int = 1
    """Chips of the largest topology that is compiled for."""
    devices: int = 1
    """JAX devices a chip."""


# TPUs: the key specifications on Google Cloud's page of each generation: HBM bandwidth, peak compute, and half of the
# bidirectional inter-chip bandwidth. Memory is what libtpu 0.0.42 leaves to programs, as it says when it refuses one; the pages
# say 16, 95, 32 and 192 GiB a chip. GPUs: NVIDIA's data sheets of the SXM modules, the network being half of NVLink's
# bidirectional figure; memory is what CUDA reports of them.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "tpu", 15.75 * GIB, 197e12, 819e9, 200e9, grid=2, largest=256),
        Chip("v5p", "tpu", 95.74 * GIB, 459e12, 2765e9, 600e9, grid=3, largest=4096),
        Chip("v6e", "tpu", 31.25 * GIB, 918e12, 1640e9, 400e9, grid=2, largest=256),
        Chip("tpu7x", "tpu", 94.75 * GIB, 1153.5e12, 3690e9, 300e9, grid=3, largest=4096, devices=2),
        Chip("a100", "cuda", 79.1 * GIB, 312e12, 2039e9, 300e9, largest=8),
        Chip("h100", "cuda", 79.1 * GIB, 989e12, 3352e9, 450e9, largest=8),
        Chip("h200", "cuda", 139.8 * GIB, 989e12, 4800e9, 450e9, largest=8),
        Chip("b200", "cuda", 178.4 * GIB, 2250e12, 7700e9, 900e9, largest=8),
    )
}

EXAMPLES = {"v5e": "16x16", "v6e": "16x16", "v5p": "4x4x4", "tpu7x": "4x4x4"}

TPU_SETTINGS = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip
"""What libtpu asks its host where there is a TPU, and two processes compiling at once."""

# What the compiler asks of a GPU, from NVIDIA's Hopper tuning guide and the properties that CUDA reports.
H100_TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84986429440
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
GPU_TARGETS = {"h100": H100_TARGET}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of one kind that are joined by their fast network."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """As written on the command line."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def size(self) -> int:
        """JAX devices."""
        return math.prod(self.shape) * self.chip.devices


def parse_topology(text: str) -> Topology:
    """`v5e:16x16`, `v5p:4x4x4`, `h100:8`.

    Raises:
        ConfigError: the chip is not known, or not one that comes in this shape; the message names what does.
    """
    name, _, grid = text.strip().lower().partition(":")
    chip = CHIPS.get(name.removeprefix("gpu-").removeprefix("gpu "))
    if chip is None:
        raise ConfigError(f"there is no topology {text!r}; its first part is one of {', '.join(CHIPS)}{near_miss(name, CHIPS)}")
    dimensions = max(chip.grid, 1)
    example = f"{chip.name}:{EXAMPLES.get(chip.name, '8')}"
    if not re.fullmatch(r"\d{1,5}" + r"x\d{1,5}" * (dimensions - 1), grid):
        what = f"a grid of {dimensions} dimensions" if chip.grid else "a number of GPUs of one host"
        raise ConfigError(f"topology {text!r}: after {chip.name}: comes {what}, for example {example}")
    topology = Topology(chip, tuple(map(int, grid.split("x"))))
    if not 1 <= math.prod(topology.shape) <= chip.largest:
        raise ConfigError(
            f"topology {text!r} has {math.prod(topology.shape)} chips; {chip.name} comes with 1 to {chip.largest}"
        )
    return topology


def why_not_compiled(topology: Topology, target: str | None = None) -> str | None:
    """Why programs for this topology cannot be compiled here, or None where they can. `target`: see `describe`."""
    if topology.chip.platform == "tpu":
        found = importlib.util.find_spec("libtpu") is not None
        return None if found else "libtpu is not installed: pip install 'blackmamba-jax[tpu-aot]'"
    if not any(_has_plugin(version) for version in ("13", "12")):
        return "jax's CUDA plugin is not installed: pip install 'blackmamba-jax[cuda]'"
    if target is None and topology.chip.name not in GPU_TARGETS:
        return (
            f"the compiler needs a description of {topology.chip.name}: give --gpu-target FILE (a GpuTargetConfigProto as text)"
        )
    return None


def _has_plugin(version: str) -> bool:
    return importlib.util.find_spec(f"jax_cuda{version}_plugin") is not None


def describe(topology: Topology, target: str | None = None) -> list[Any]:
    """The devices of a topology, for a mesh to compile for; nothing can run on them.

    Call it before anything else asks jax for a device: the process then has CPU devices only.

    Args:
        topology: where `why_not_compiled` is None.
        target: path of a `GpuTargetConfigProto` in text form, for GPUs that `GPU_TARGETS` lacks.

    Raises:
        ConfigError: the compiler does not know a TPU topology of this shape.
    """
    import jax
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    try:
        if topology.chip.platform == "tpu":
            for name, value in TPU_SETTINGS.items():
                os.environ.setdefault(name, value)
            return list(topologies.get_topology_desc(platform="tpu", topology_name=topology.name).devices)
        text = Path(target).read_text(encoding="utf-8") if target else GPU_TARGETS[topology.chip.name]
        shape = f"1x1x{topology.size}"
        return list(topologies.get_topology_desc(platform="cuda", topology=shape, target_config=text).devices)
    except jax.errors.JaxRuntimeError as error:
        example = f"{topology.chip.name}:{EXAMPLES.get(topology.chip.name, '8')}"
        raise ConfigError(f"the compiler has no topology {topology.name}, try {example}: {first_line(error)}") from None


def first_line(error: object) -> str:
    """Of a compiler's message, which may go on for pages."""
    return (str(error).strip().splitlines() or [""])[0][:300]
