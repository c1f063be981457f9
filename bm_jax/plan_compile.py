"""Compiling the programs of a configuration for devices that are not there, and reading what the compilers say of them.

Everything is made from abstract shapes: no parameter is ever allocated. Compilers run in a process of their own, as one that
meets a bug in itself ends its process.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import re
import tempfile
import time
from concurrent.futures.process import BrokenProcessPool
from typing import Any, cast

from bm_jax.config import Config
from bm_jax.plan_report import Program, Refusal
from bm_jax.topologies import Topology, describe, first_line

PROGRAMS = ("train", "prefill", "decode")
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
SIZE = r"([\d.]+)([KMGT]?)i?B?"
REFUSALS = (
    rf"\({SIZE}\) exceeds available \w+ \({SIZE}\)",
    rf"[Uu]sed {SIZE} of {SIZE} hbm",
    rf"{SIZE} ?> ?{SIZE}",
)
"""How libtpu's releases say that a program needs more memory than there is."""


class CompilerError(RuntimeError):
    """A compiler failed, for another reason than memory."""


def out_of_memory(message: str) -> tuple[float, float] | None:
    """Bytes that a program needs and bytes there are, from a compiler's refusal; None when that is not what it says."""
    if "RESOURCE_EXHAUSTED" not in message and "Oom" not in message:
        return None
    for pattern in REFUSALS:
        if match := re.search(pattern, message):
            needed, unit, available, other = match.groups()
            return float(needed) * UNITS[unit], float(available) * UNITS[other]
    return 0.0, 0.0


class Compiler:
    """A process that compiles, started when it is first needed and again after a crash. A context manager."""

    def __init__(self, topology: Topology, target: str | None = None) -> None:
        self.topology, self.target = topology, target
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None
        self._log = tempfile.NamedTemporaryFile(prefix="plan-", suffix=".log")  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        self._log.close()

    def compile(self, config: Config, program: str) -> Program | Refusal:
        """One of `PROGRAMS` for the mesh of `config`.

        Raises:
            ConfigError: the topology cannot be made.
            CompilerError: the compiler failed or crashed.
        """
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = concurrent.futures.ProcessPoolExecutor(1, context, _log_to, (self._log.name,))
        try:
            return self._pool.submit(compile_program, config, program, self.topology, self.target).result()
        except BrokenProcessPool:
            self._pool = None
            with open(self._log.name, encoding="utf-8", errors="replace") as log:
                reasons = re.findall(r"Check failed: .*|.*LLVM ERROR.*|.*Fatal .*", log.read())
            reason = f": {reasons[-1][:300]}" if reasons else ""
            raise CompilerError(
                f"the compiler ended its process while compiling {program}{reason}. That is a fault of the compiler, not of "
                "the layout; training there would meet it too. Try another mesh, batch size or remat policy"
            ) from None


def _log_to(path: str) -> None:
    """Send what compilers write to standard error to a file."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 2)
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "1"


def compile_program(config: Config, program: str, topology: Topology, target: str | None) -> Program | Refusal:
    """`Compiler.compile` in this process, where jax has not yet been asked for devices."""
    devices = describe(topology, target)
    import jax

    from bm_jax.hlo import Program as Hlo
    from bm_jax.matrix_flops import matrix_flops
    from bm_jax.sharding import make_mesh

    mesh = make_mesh(config.mesh, devices)
    function, arguments, kinds = TRACEABLE[program](config, mesh)
    started = time.perf_counter()
    try:
        with jax.set_mesh(mesh):  # what tells the operators which devices they are compiled for
            traced = function.trace(*arguments)
            compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        sizes = out_of_memory(str(error))
        if sizes is None:
            raise CompilerError(f"compiling {program} failed: {first_line(error)}") from None
        return Refusal(program, *sizes, time.perf_counter() - started)
    seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    known = {name: sharded_bytes(tree) for name, tree in kinds.items()}
    hlo = Hlo(compiled.as_text(), fast_memory=topology.chip.platform == "tpu")
    flops = matrix_flops(traced.jaxpr, topology.chip.platform)
    return Program(
        program,
        known
        | {
            "other arguments": max(memory.argument_size_in_bytes - sum(known.values()), 0),
            "results beside donated ones": memory.output_size_in_bytes - memory.alias_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "code": memory.generated_code_size_in_bytes,
        },
        flops.usual / mesh.size,
        flops.most / mesh.size,
        hlo.usual(),
        hlo.most(),
        seconds,
    )


def sharded_bytes(tree: Any) -> float:
    """Bytes a device of a tree of arrays, or of their shapes, that have shardings."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    leaves = [leaf for leaf in jax.tree.leaves(tree) if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    return float(sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves))


def trace_train(config: Config, mesh: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The step that `bm_jax.fit` runs: the jitted function, its abstract arguments, and what they hold by kind."""
    import jax

    from bm_jax.train import Run

    run = Run(config, cast(Any, None), mesh)  # no data: nothing is read until it trains
    shape = (config.data.batch_size, config.data.sequence_length + 1)
    row = jax.ShapeDtypeStruct(shape, "int32", sharding=run.batch_sharding)
    kinds = {"parameters": run.abstract.params, "optimizer state": run.abstract.opt_state}
    return run.train_step, (run.abstract, {"tokens": row, "segment_ids": row}), kinds


def trace_prefill(config: Config, mesh: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Reading a piece of `data.sequence_length` tokens of each of `data.batch_size` prompts into an empty cache."""
    import jax.numpy as jnp

    from bm_jax.model import unrolled
    from bm_jax.state import RECENT, State, read_on

    parameters, head, cache, row = _inference(config, mesh)
    B, model = config.data.batch_size, config.model
    hidden, seen = row((B, 1, model.width), jnp.dtype(model.compute_dtype)), row((B, model.vocab_size), "bool")
    state = State(cache, hidden, seen, row((B, RECENT), "int32"))
    tokens = row((B, config.data.sequence_length), "int32")
    kinds = {"parameters": parameters, "cache": cache}
    del head  # prefill stops before the unembedding
    return read_on, (parameters, state, tokens, None, unrolled(model)), kinds


def trace_decode(config: Config, mesh: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Drawing `bm_jax.decoding.CHUNK` tokens after each of `data.batch_size` prompts."""
    import jax

    from bm_jax.decoding import CHUNK, Going, decode, make_rows
    from bm_jax.model import unrolled

    parameters, head, cache, row = _inference(config, mesh)
    size = (config.data.batch_size,)
    plain = make_rows([], config.data.batch_size, end=0, vocab_size=config.model.vocab_size)
    rows = jax.tree.map(lambda leaf: row(leaf.shape, leaf.dtype), plain)
    kinds = {"parameters": (parameters, head), "cache": cache}
    number, alive = row(size, "int32"), row(size, "bool")
    going = Going(cache, None, number, number, alive)
    return decode, (parameters, head, going, rows, CHUNK, unrolled(config.model)), kinds


def _inference(config: Config, mesh: Any) -> tuple[Any, Any, Any, Any]:
    """Abstract parameters, unembedding and cache of `bm_jax.LanguageModel`, and a function that makes rows of a batch."""
    import jax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from bm_jax.cache import init_cache
    from bm_jax.language_model import inference_parameters
    from bm_jax.model import init_parameters, unrolled
    from bm_jax.sharding import layout, parameter_shardings

    model, batch = config.model, config.data.batch_size
    key = jax.eval_shape(lambda: jax.random.key(0))
    parameters, head = jax.eval_shape(lambda key: inference_parameters(init_parameters(model, key), model), key)
    room = 2 * config.data.sequence_length if "attention" in model.kinds else 0
    cache = jax.eval_shape(lambda: init_cache(unrolled(model), batch, room))

    def place(leaf: Any, spec: P) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    def place_all(tree: Any) -> Any:
        return jax.tree.map(lambda leaf, to: place(leaf, to.spec), tree, parameter_shardings(tree, mesh))

    def row(shape: tuple[int, ...], dtype: str) -> Any:
        return place(jax.ShapeDtypeStruct(shape, dtype), layout(shape, *("batch", None, None)[: len(shape)]))

    with jax.set_mesh(mesh):

        def state(path: tuple[Any, ...], leaf: Any) -> Any:
            if leaf.ndim < 2:
                return place(leaf, layout(leaf.shape, *("batch",)[: leaf.ndim]))
            channels = {"state": 2, "conv": 3, "key": 3, "value": 3}[path[-1].key]
            axes = ["tensor" if i == channels else None for i in range(leaf.ndim)]
            return place(leaf, layout(leaf.shape, axes[0], "batch", *axes[2:]))

        cache = jax.tree_util.tree_map_with_path(state, cache)
    in_mesh = lambda shape, dtype: _within(mesh, row, shape, dtype)  # noqa: E731
    return place_all(parameters), place_all(head), cache, in_mesh


def _within(mesh: Any, function: Any, *arguments: Any) -> Any:
    import jax

    with jax.set_mesh(mesh):
        return function(*arguments)


TRACEABLE = {"train": trace_train, "prefill": trace_prefill, "decode": trace_decode}
