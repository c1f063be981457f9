"""What `python -m bm_jax.plan` does once its command line is read: check, compile or estimate, search, and say what works."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from bm_jax.config import Config, ConfigError, MeshConfig
from bm_jax.plan_compile import Compiler, CompilerError
from bm_jax.plan_estimate import batch_parts, check_layout, estimate, estimate_inference, layouts, nearest, with_layout
from bm_jax.plan_report import Program, Refusal, describe_layout, fits, report, speed, verdict
from bm_jax.topologies import parse_topology, why_not_compiled

if TYPE_CHECKING:
    from bm_jax.plan import Arguments


class Planner:
    """One call of the command.

    Args:
        request: its options.
        config: the preset with the fields that the command line changes.
        mesh: the mesh that is asked for, every axis given.
        fixed_batch: the command line gives the batch size; otherwise it is rounded up to what the mesh divides.
    """

    def __init__(self, request: Arguments, config: Config, mesh: MeshConfig | None = None, fixed_batch: bool = False) -> None:
        self.request, self.config, self.fixed_batch = request, config, fixed_batch
        self.topology = parse_topology(request.topology)
        self.chip = self.topology.chip
        self.mesh = fill_mesh(mesh or config.mesh, self.topology.size)
        self.not_compiled = why_not_compiled(self.topology, request.gpu_target)

    def run(self) -> int:
        """Print the plan; the exit status.

        Raises:
            ConfigError: a layout that cannot be made; the message names the nearest that works.
            CompilerError: a compiler failed for another reason than memory.
        """
        chip = self.chip
        print(f"{self.topology.name}: {self.topology.size} devices of {chip.memory / 2**30:.2f} GiB")
        if self.not_compiled:
            print(f"ESTIMATE from shapes, nothing is compiled: {self.not_compiled}")
        with Compiler(self.topology, self.request.gpu_target) as compiler:
            if self.request.search:
                return self._search(compiler)
            config = self._layout()
            print(f"{self.request.preset} {describe_layout(config)}", flush=True)
            unfit: list[Program | Refusal] = []
            for program in self.request.programs:
                found = self._find(compiler, config, program)
                print(report(found, config, self.topology), flush=True)
                unfit += [] if fits(found, chip) else [found]
            if unfit:
                self._name_nearest(compiler, config, unfit[0])
            return 1 if unfit else 0

    def _layout(self) -> Config:
        """The layout that is asked for; ConfigError naming the nearest one where it cannot be made."""
        config, batch = self.config, self.config.data.batch_size
        least = batch_parts(self.mesh) * config.run.accumulation
        if not self.fixed_batch and batch % least:
            batch += -batch % least
            print(f"batch size {batch}: the preset's {config.data.batch_size}, rounded up to what the mesh divides")
        try:
            made = with_layout(config, self.mesh, batch, config.run.remat)
            check_layout(made, self.topology)
        except ConfigError as error:
            other = next(self._nearest(self.request.programs[0]), None)
            advice = (
                "no mesh of this topology works"
                if other is None
                else f"the nearest layout that works is {describe_layout(other)}"
            )
            raise ConfigError(f"{error}. By estimate {advice}") from None
        return made

    def _nearest(self, program: str, scale: float = 1) -> Iterator[Config]:
        """Layouts in which a program fits by `scale` times its estimate, those most like the one asked for first."""
        config = self.config
        neighbour = dataclasses.replace(config, mesh=MeshConfig(sequence=config.mesh.sequence))
        ordered = nearest(self.mesh, config.data.batch_size, config.run.remat, layouts(neighbour, self.topology))
        return (other for other in ordered if scale * self._estimate(other, program).needed <= self.chip.memory)

    def _find(self, compiler: Compiler, config: Config, program: str) -> Program | Refusal:
        """A program compiled, or estimated where it cannot be."""
        return self._estimate(config, program) if self.not_compiled else compiler.compile(config, program)

    def _estimate(self, config: Config, program: str) -> Program:
        if program == "train":
            return estimate(config, self.topology)
        return estimate_inference(config, self.topology, program)

    def _name_nearest(self, compiler: Compiler, config: Config, unfit: Program | Refusal) -> None:
        """Say which layout is nearest to one in which a program does not fit, compiled if that is possible."""
        program = unfit.name
        scale = max(unfit.needed / self._estimate(config, program).needed, 1)  # as far as the estimate was off there
        others = (other for other in self._nearest(program, scale) if other != config)
        for other in itertools.islice(others, self.request.compile_best):
            try:
                found = self._find(compiler, other, program)
            except CompilerError as error:
                print(f"{describe_layout(other)}: {error}", flush=True)
                continue
            if fits(found, self.chip):
                print(f"nearest layout that works: {describe_layout(other)}\n  {verdict(found, self.chip)}")
                return
        print("no layout of this topology that was tried fits; take more chips, or a shorter data.sequence-length")

    def _search(self, compiler: Compiler) -> int:
        """Estimate every layout, compile the most promising, print them by predicted speed."""
        found = [(other, estimate(other, self.topology)) for other in layouts(self.config, self.topology)]
        fitting = [(other, guess) for other, guess in found if fits(guess, self.chip)]
        fitting.sort(key=lambda pair: -speed(pair[1], pair[0], self.chip))
        print(f"{len(found)} layouts, {len(fitting)} fit by estimate")
        best = self.request.compile_best
        rows = fitting[:best] if self.not_compiled else list(itertools.islice(self._compiled(compiler, fitting), best))
        if not rows:
            print("none that was tried fits; take more chips, or a shorter data.sequence-length")
            return 1
        rows.sort(key=lambda pair: -speed(pair[1], pair[0], self.chip))
        print("best first, by predicted speed (not measured):")
        for other, program in rows:
            print(f"{describe_layout(other)}\n  {report(program, other, self.topology)}")
        return 0

    def _compiled(self, compiler: Compiler, fitting: Iterable[tuple[Config, Program]]) -> Iterator[tuple[Config, Program]]:
        """Those of the first few that compile and fit."""
        for other, _ in itertools.islice(fitting, 4 * self.request.compile_best):
            try:
                program = compiler.compile(other, "train")
            except CompilerError as error:
                print(f"{describe_layout(other)}: {error}", flush=True)
                continue
            print(f"{describe_layout(other)}: {verdict(program, self.chip)}", flush=True)
            if isinstance(program, Program) and fits(program, self.chip):
                yield other, program


def fill_mesh(mesh: MeshConfig, devices: int) -> MeshConfig:
    """The mesh with `data = -1` replaced by what the other axes leave of the devices, at least 1."""
    if mesh.data != -1:
        return mesh
    return dataclasses.replace(mesh, data=max(devices // (mesh.fsdp * mesh.expert * mesh.tensor * mesh.sequence), 1))
