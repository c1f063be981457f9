"""Memory and speed of converting a checkpoint of full size, against what the disk does.

    python benchmarks/conversion.py --folder /a/disk/with/room                # 2.8B parameters, 11 GB each of three
    python benchmarks/conversion.py --folder /tmp --preset blackmamba_340m_1p5b --format pickled
    python benchmarks/conversion.py --folder /tmp --preset default            # small

A synthetic checkpoint of the preset is written, imported, and exported again, each in a process of its own whose largest
resident memory is printed. The disk's speeds are those of writing (flushed at the end) and of reading (not cached) a file
as large as the checkpoint. The floor of a conversion is reading the checkpoint and writing it at these speeds; before each
conversion what the system has cached of the source is dropped. The exported tensors are compared with the first ones.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import numpy as np
from harness import machine

from bm_jax.tensor_file import Kind
from convert.archives import write_archive
from convert.configs import to_theirs
from convert.plan import entries
from convert.tables import FORMATS

BLOCK = 2**24
RUN = """
import resource, sys, time
start = time.perf_counter()
from convert.__main__ import main
status = main(sys.argv[1:])
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("measured", time.perf_counter() - start, int(peak.split()[1]) * 1024)
sys.exit(status)
"""


def forget(folder: Path) -> None:
    """Have the system drop what it has cached of the files in `folder`."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def disk(folder: Path, size: int) -> tuple[float, float]:
    """Bytes a second of writing and of reading a file of `size`."""
    path, block = folder / "speed", np.random.default_rng(0).bytes(BLOCK)
    start = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for _ in range(0, size, BLOCK):
            file.write(block)
        os.fsync(file.fileno())
    writing = time.perf_counter() - start
    forget(folder)
    buffer = bytearray(BLOCK)
    start = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    reading = time.perf_counter() - start
    path.unlink()
    return size / writing, size / reading


def checkpoint(folder: Path, preset: str, pickled: bool) -> int:
    """A checkpoint of BlackMamba with random numbers; its bytes."""
    config, kind = import_module(f"configs.{preset}").config.model, FORMATS["blackmamba"]
    tensors = {e.name: Kind(np.dtype(np.float32), e.shape) for e in entries(kind, "experts apart", config)}
    folder.mkdir()

    def arrays() -> Iterator[np.ndarray]:
        r = np.random.default_rng(0)
        for _, shape in tensors.values():
            yield r.standard_normal(shape, np.float32)

    write_archive(folder, tensors, arrays(), pickled, kind.wrapper)
    (folder / "config.json").write_text(json.dumps(to_theirs("blackmamba", config)), encoding="utf-8")
    (folder / "tokenizer.json").write_text('{"type": "byte"}', encoding="utf-8")
    return sum(4 * math.prod(shape) for _, shape in tensors.values())


def convert(*arguments: object) -> tuple[float, int]:
    """Seconds of the command, and its largest resident memory in bytes."""
    command = [sys.executable, "-c", RUN, *map(str, arguments)]
    output = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True).stdout
    seconds, peak = output.splitlines()[-1].split()[1:]
    return float(seconds), int(peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to measure; what is made there is removed")
    parser.add_argument("--preset", default="blackmamba_630m_2p8b")
    parser.add_argument("--format", choices=("safetensors", "pickled"), default="pickled", help="of the checkpoint to import")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        size = checkpoint(folder / "source", options.preset, options.format == "pickled")
        print(f"{options.preset}, {options.format}: {size / 1e9:.2f} GB")
        for _ in range(options.rounds):
            write, read = disk(folder, size)
            floor = size / write + size / read
            print(f"  disk     {write / 1e9:.2f} GB/s written, {read / 1e9:.2f} read: floor {floor:.1f} s")
            for step, arguments in (
                ("import", ("import", folder / "source", folder / "model")),
                ("export", ("export", folder / "model", folder / "back", "--format", "blackmamba")),
            ):
                forget(folder)
                seconds, peak = convert(*arguments)
                results.append({"step": step, "seconds": seconds, "floor": floor, "peak bytes": peak, "bytes": size})
                print(
                    f"  {step}   {seconds:.1f} s, {floor / seconds:.0%} of the disk's speed; peak {peak / 1e9:.2f} GB resident"
                )
            shutil.rmtree(folder / "model")
            seconds, peak = convert("verify", folder / "source", folder / "back")
            print(f"  verify   {seconds:.1f} s; peak {peak / 1e9:.2f} GB resident; every tensor identical")
            shutil.rmtree(folder / "back")
    if options.json:
        options.json.write_text(json.dumps({"results": results, "machine": machine()}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
