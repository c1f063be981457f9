"""Instruction bundles of the TPU selective scan, counted in the compiler's final schedule; needs libtpu and no TPU.

    python benchmarks/tpu_schedule.py
    python benchmarks/tpu_schedule.py --topology v5e:2x2 --topology v6e:2x2 --topology v5p:2x2x1 --topology tpu7x:4x4x4

A TPU core issues one bundle a cycle, in order, so the schedule is what a kernel takes while no memory transfer makes it wait.
Nothing here is measured: transfers between HBM and vector memory do not count, and every conditional block counts as if taken.

Each line is one loop, as trips x ... x bundles without the loops inside it, or a whole kernel, in bundles for one time step of
128 channels of the arrays: padded channels are paid for and earn nothing. A device of several cores shares the steps among
them. Spills are vector stores to a spill slot, fills the loads from one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import tempfile
from pathlib import Path
from typing import Any

TOPOLOGY = "v5e:2x2"
KERNELS = ("forward_kernel", "backward_kernel")
VARIABLES = {
    "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip
"""What libtpu needs on a machine without a TPU, beside the folder for its dumps."""

BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(?:(L[HBE]|P[BF]|CT):|:)")
EXIT_BRANCH = re.compile(r"sbr\.rel \(!%(\w+)\) target = \$region(\d+)")


class UnexpectedDump(RuntimeError):
    """The dump is not in the form that this parser knows, so its numbers would be wrong."""


@dataclasses.dataclass
class Loop:
    """A loop of the schedule."""

    first: int
    last: int
    trips: int
    copies: bool
    """It moves a block between two places in vector memory, `trips` times at most."""
    inner: list[Loop] = dataclasses.field(default_factory=list)

    @property
    def own(self) -> int:
        """Bundles of one trip without the inner loops."""
        return self.last - self.first + 1 - sum(loop.last - loop.first + 1 for loop in self.inner)

    @property
    def total(self) -> int:
        """Bundles of all trips with the inner loops."""
        return self.trips * (self.own + sum(loop.total for loop in self.inner))


def read_bundles(path: Path) -> list[str]:
    """The text of every bundle; comments may run over several lines."""
    bundles: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if match := BUNDLE.match(line):
            if int(match[1], 16) != len(bundles):
                raise UnexpectedDump(f"{path.name}: bundle {match[1]} follows {len(bundles) - 1:#x}")
            bundles.append(line)
        elif bundles:
            bundles[-1] += "\n" + line
    if not bundles:
        raise UnexpectedDump(f"{path.name} has no bundles")
    return bundles


def find_loops(bundles: list[str]) -> list[Loop]:
    """The outermost loops, each with those in it.

    A loop is a region that starts at a bundle labelled LB and holds one branch back to itself, taken until a counter, from 0
    in steps of 1, reaches its bound: a number, or for copies of blocks the remainder of a division, which is counted in full.
    """
    text, guard = "\n".join(bundles), r"(?:\([^)]*\), )?"
    loops = []
    for first, bundle in enumerate(bundles):
        label = BUNDLE.match(bundle)
        if label is None or label[2] != "LB":
            continue
        starting = set(re.findall(r"Start region (\d+)", bundle))
        branches = [match for later in bundles[first:] for match in EXIT_BRANCH.findall(later) if match[1] in starting]
        if len(branches) != 1:
            raise UnexpectedDump(f"the loop at {first:#x} has {len(branches)} branches back to its start")
        predicate, region = branches[0]
        ends = [place for place in range(first, len(bundles)) if re.search(rf"End region {region}\b", bundles[place])]
        test = re.search(rf"%{predicate} = scmp\.ge\.s32\.totalorder {guard}%(\w+), (%?)(\w+)", text)
        counts = test and re.search(rf"%{test[1]} = sadd\.s32 {guard}1, %", text)
        if len(ends) != 1 or test is None or not counts:
            raise UnexpectedDump(f"the loop at {first:#x} has {len(ends)} ends and the exit test {test and test[0]}")
        bound = re.search(rf"%{test[3]} = sand\.u32 {guard}(\d+), %", text) if test[2] else test
        if bound is None:
            raise UnexpectedDump(f"the bound %{test[3]} of the loop at {first:#x} is not known")
        loops.append(Loop(first, ends[0], int(bound[1] if test[2] else test[3]), copies=bool(test[2])))
    outermost: list[Loop] = []
    for loop in loops:  # in the order of their starts
        level = outermost
        while level and loop.first <= level[-1].last:
            if loop.last > level[-1].last:
                raise UnexpectedDump(f"the loops at {level[-1].first:#x} and {loop.first:#x} overlap")
            level = level[-1].inner
        level.append(loop)
    return outermost


def spills(bundles: list[str]) -> tuple[int, int]:
    """Vector stores to spill slots, vector loads from them."""
    text = "\n".join(bundles)
    return (
        len(re.findall(r"= vst(?:\.\w+)* \[vmem:\[#allocation\w*_spill\]", text)),
        len(re.findall(r"= vld(?:\.\w+)* \[vmem:\[#allocation\w*_spill\]", text)),
    )


def compile_kernels(topology: str, shape: tuple[int, int, int], states: int) -> int:
    """Compile a scan and its gradients for one device of `topology`, and return how many cores that has."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies

    from pallas_kernels.selective_scan import selective_scan

    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)

    def kind(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    batch, length, channels = shape
    wide = kind(*shape, dtype=jnp.bfloat16)
    narrow = kind(batch, length, states, dtype=jnp.bfloat16)
    row = kind(channels)
    arguments = {
        "u": wide, "dt": wide, "A": kind(channels, states), "B": narrow, "C": narrow, "D": row, "z": wide, "dt_bias": row
    }  # fmt: skip

    def gradients(arguments: dict[str, Any], dy: Any) -> Any:
        y, pullback = jax.vjp(lambda a: selective_scan(**a, implementation="pallas_tpu")[0], arguments)
        return y, pullback(dy)

    with jax.set_mesh(jax.sharding.Mesh(np.array([device]), ("x",))):
        jax.jit(gradients).lower(arguments, wide).compile()
    return device.num_cores


def count(path: Path, steps: float) -> list[dict[str, Any]]:
    """The loops of one kernel, each without those in it, and the whole, in bundles for each of `steps`."""
    bundles = read_bundles(path)
    rows = []

    def visit(loop: Loop, outer: tuple[int, ...]) -> None:
        trips = (*outer, loop.trips)
        inner = {place for other in loop.inner for place in range(other.first, other.last + 1)}
        own = [bundles[place] for place in range(loop.first, loop.last + 1) if place not in inner]
        part = " x ".join(map(str, trips)) + f" x {loop.own}"
        rows.append((part, *spills(own), math.prod(trips) * loop.own / steps))
        for other in loop.inner:
            if not other.copies:
                visit(other, trips)

    grid = find_loops(bundles)
    if len(grid) != 1 or all(loop.copies for loop in grid[0].inner):
        raise UnexpectedDump(f"{path.name}: expected one loop over the grid with loops in it, found {grid}")
    visit(grid[0], ())
    rows.append(("all", *spills(bundles), grid[0].total / steps))
    return [dict(zip(("part", "spills", "fills", "bundles a step"), row, strict=True)) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", action="append", help=f"may be repeated; {TOPOLOGY} if not given")
    parser.add_argument("--shape", default="8,2048,2304", help="B,L,E")
    parser.add_argument("--states", type=int, default=16)
    parser.add_argument("--keep", type=Path, help="folder where the dumps stay")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    batch, length, channels = map(int, options.shape.split(","))
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        os.environ.update(VARIABLES | {"LIBTPU_INIT_ARGS": flags})  # read once, when libtpu is loaded
        for topology in options.topology or [TOPOLOGY]:
            before = set(folder.glob("*")) if folder.exists() else set()
            cores = compile_kernels(topology, (batch, length, channels), options.states)
            for kernel in KERNELS:
                paths = [path for path in set(folder.glob(f"*{kernel}*-final_bundles.txt")) - before]
                paths = [path for path in paths if "schedule-analysis" not in path.name]
                if len(paths) != 1:
                    raise UnexpectedDump(f"{topology}: expected one schedule of {kernel}, found {sorted(paths)}")
                for row in count(paths[0], batch * length * channels / 128 / cores):
                    rows.append({"topology": topology, "kernel": kernel, **row})
                    print(
                        f"{topology:12} {kernel:16} {row['part']:20} {row['bundles a step']:6.2f} a step x 128 channels, "
                        f"{row['spills']} spills, {row['fills']} fills", flush=True,
                    )  # fmt: skip
    if options.json:
        values = {"shape": (batch, length, channels), "states": options.states, "rows": rows}
        options.json.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
