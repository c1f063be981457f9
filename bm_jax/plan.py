"""Plan a pod without one: compile training and generation for accelerators that are not there, and say whether they fit.

    python -m bm_jax.plan blackmamba_340m_1p5b --topology v5e:16x16 --mesh data=32,expert=8

Options beside those below are fields of the preset, as `train.py` takes them (`--data.batch-size 512 --run.remat full`). The
exit status is 0 when everything fits, 1 when something does not or cannot be, 2 after an error in the command line.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import Annotated, Literal

import tyro

from bm_jax.config import Config, ConfigError, MeshConfig, near_miss


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compile training and generation for accelerators that are not there, and say whether they fit."""

    preset: tyro.conf.Positional[str] = "default"
    """Of `configs/`."""
    topology: str = "v5e:16x16"
    """TPU generation and grid of chips (v5e:16x16, v6e:16x16, v5p:4x4x4, tpu7x:4x4x4), or GPUs of one host (h100:8)."""
    mesh: str = ""
    """Devices along each axis, as data=32,expert=8: those not named are 1; without data it takes all that remain."""
    programs: tuple[Literal["train", "prefill", "decode"], ...] = ("train", "prefill", "decode")
    """What to compile."""
    search: bool = False
    """Try meshes, batch sizes and remat policies, and print the best that fit."""
    compile_best: Annotated[int, tyro.conf.arg(metavar="N")] = 3
    """With --search: layouts to compile and print, which estimates choose. Otherwise: layouts to try when one does not fit."""
    gpu_target: str | None = None
    """For GPUs other than H100: a file with the compiler's description of them (a GpuTargetConfigProto in text form)."""


def parse(arguments: list[str]) -> tuple[Arguments, Config, bool]:
    """What the command line asks for: options, the preset with the fields it changes, whether it gives the batch size.

    Raises:
        ConfigError: an unknown preset, or a value that is wrong.
    """
    import configs

    command = "python -m bm_jax.plan"
    request, rest = tyro.cli(Arguments, prog=command, description=__doc__, args=arguments, return_unknown_args=True)
    preset = configs.load(request.preset)
    config = tyro.cli(Config, prog=f"{command} {request.preset}", args=rest, default=preset)
    if request.compile_best < 1:
        raise ConfigError(f"--compile-best must be at least 1, got {request.compile_best}")
    fixed = any(option.split("=")[0].replace("_", "-") == "--data.batch-size" for option in rest)
    return request, config, fixed


def parse_mesh(text: str) -> MeshConfig:
    """`data=32,expert=8`.

    Raises:
        ConfigError: not pairs of an axis and a size.
    """
    names = [field.name for field in dataclasses.fields(MeshConfig)]
    sizes: dict[str, int] = {}
    for pair in text.split(","):
        name, _, size = (part.strip() for part in pair.partition("="))
        if name not in names or name in sizes or not size.isascii() or not size.isdigit():
            raise ConfigError(
                f"mesh {text!r}: {pair!r} is not an axis and its size; write data=32,expert=8 with axes among "
                f"{', '.join(names)}{near_miss(name, names) if name not in names else ''}"
            )
        sizes[name] = int(size)
    return MeshConfig(**sizes)


def main(arguments: list[str] | None = None) -> int:
    """Run the command with `arguments` (the process's own when None); the exit status."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax starts: whatever is attached stays free
    try:
        request, config, fixed_batch = parse(sys.argv[1:] if arguments is None else arguments)
        from bm_jax.planner import Planner  # imports jax, which --help need not wait for

        mesh = parse_mesh(request.mesh) if request.mesh else None
        return Planner(request, config, mesh, fixed_batch).run()
    except (ConfigError, RuntimeError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
