"""Plans: what is read from compiled programs, what is refused, and that the released models fit the pods they are meant for."""

from __future__ import annotations

import dataclasses
import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import configs
from bm_jax import plan, planner
from bm_jax.config import ConfigError, MeshConfig
from bm_jax.hlo import Movement, Program, Traffic, size_in_bytes
from bm_jax.matrix_flops import matrix_flops
from bm_jax.model import forward, init_parameters, logits
from bm_jax.optimizer import make_optimizer
from bm_jax.plan_compile import Compiler, CompilerError, out_of_memory
from bm_jax.plan_estimate import check_layout, estimate, estimate_inference, layouts, nearest, with_layout
from bm_jax.plan_report import Program as Found
from bm_jax.plan_report import Refusal, fits, report
from bm_jax.topologies import CHIPS, GIB, parse_topology, why_not_compiled
from bm_jax.train_step import init_state, make_train_step

HLO = """HloModule jit_step, is_scheduled=true, num_partitions=8

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%few (p: f32[64]) -> f32[64] {
  %p = f32[64]{0} parameter(0)
  ROOT %swap = f32[64]{0} all-to-all(%p), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
}

%many (q: f32[64]) -> f32[64] {
  %q = f32[64]{0} parameter(0)
  %first = f32[64]{0} all-to-all(%q), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %second = f32[64]{0} all-to-all(%first), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
}

%slice (stack: f32[5,1000], i: s32[]) -> f32[1,1000] {
  %stack = f32[5,1000]{1,0:T(8,128)} parameter(0)
  %i = s32[] parameter(1)
  ROOT %taken = f32[1,1000]{1,0} dynamic-slice(%stack, %i, %i), dynamic_slice_sizes={1,1000}
}

%body (state: (s32[], f32[64], f32[5,1000])) -> (s32[], f32[64], f32[5,1000]) {
  %state = (s32[], f32[64]{0}, f32[5,1000]{1,0}) parameter(0)
  %index = s32[] get-tuple-element(%state), index=0
  %x = f32[64]{0} get-tuple-element(%state), index=1
  %weights = f32[5,1000]{1,0} get-tuple-element(%state), index=2
  %row = f32[1,1000]{1,0:T(8,128)S(1)} fusion(%weights, %index), kind=kLoop, calls=%slice
  %gathered = bf16[32]{0} all-gather(%half), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %half = bf16[8]{0:S(1)} constant({...})
  ROOT %next = (s32[], f32[64]{0}, f32[5,1000]{1,0}) tuple(%index, %x, %weights)
}

%until (state: (s32[], f32[64], f32[5,1000])) -> pred[] {
  %state = (s32[], f32[64]{0}, /*index=2*/f32[5,1000]{1,0}) parameter(0)
  %index = s32[]{:T(128)} get-tuple-element(%state), index=0
  %bound = s32[]{:T(128)} constant(5)
  ROOT %less = pred[]{:T(512)} compare(%index, %bound), direction=LT
}

ENTRY %main (x: f32[64], w: f32[5,1000], which: s32[]) -> f32[64] {
  %x = f32[64]{0} parameter(0)
  %w = f32[5,1000]{1,0} parameter(1)
  %which = s32[] parameter(2)
  %zero = s32[] constant(0)
  %start = (s32[], f32[64]{0}, f32[5,1000]{1,0}) tuple(%zero, %x, %w)
  %loop = (s32[], f32[64]{0}, f32[5,1000]{1,0}) while(%start), condition=%until, body=%body, metadata={op_name="jit(step)"}
  %counted = (s32[], f32[64]{0}, f32[5,1000]{1,0}) while(%loop), condition=%until, body=%body, LOOPS
  %y = f32[64]{0} get-tuple-element(%counted), index=1
  %either = f32[64]{0} conditional(%which, %y, %y), branch_computations={%many, %few}
  %begun = f32[64]{0} all-reduce-start(%either), channel_id=3, replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%sum
  ROOT %done = f32[64]{0} all-reduce-done(%begun)
}
""".replace("LOOPS", 'backend_config={"known_trip_count":{"n":"3"},"known_init_step":{"init":"0"}}')


def test_collectives_of_a_program_made_by_hand():
    """Eight runs of the loop's body, of 4 devices gathering 8 bfloat16 each; sums and exchanges of 64 float32 among 4."""
    program = Program(HLO, fast_memory=True)
    usual, most = program.usual(), program.most()
    assert usual.collectives["all-gather"] == Traffic(8, 8 * 64, 8 * 48)
    assert usual.collectives["all-reduce"] == Traffic(1, 256, 2 * 192)
    assert usual.collectives["all-to-all"] == Traffic(1, 256, 192)
    assert most.collectives["all-to-all"] == Traffic(2, 512, 384)
    assert usual.total.sent == 8 * 48 + 384 + 192
    assert usual.unbounded == 0


def test_memory_traffic_of_a_program_made_by_hand():
    """Of its stack of weights a fusion reads one row, here into memory on the chip, where what is gathered comes from too."""
    program = Program(HLO, fast_memory=True)
    body, until = program.computations["body"], program.computations["until"]
    row, gathered, compare = program.memory(body["row"], body), program.memory(body["gathered"], body), 1 + 4 + 4
    assert (row, gathered, program.memory(until["less"], until)) == (4000 + 4, 64, compare)
    exchange = 2 * 256
    assert program.usual().memory == 8 * (row + gathered + compare) + exchange
    everywhere = Program(HLO)
    assert everywhere.memory(body["row"], body) == 4000 + 4 + 4000
    assert everywhere.memory(body["gathered"], body) == 64 + 16


def test_collectives_in_fusions_of_libtpu():
    """A sum of which each device keeps a part, and a collective that goes on in the fusions that it overlaps with."""
    text = HLO.replace("%few", "%all-reduce-scatter.1").replace("all-to-all(%p)", "all-reduce(%p)")
    text = text.replace("conditional(%which, %y, %y), branch_computations={%many, %all-reduce-scatter.1}", "FUSION")
    text = text.replace("FUSION", "fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1")
    assert Program(text).usual().collectives["reduce-scatter"] == Traffic(1, 256, 192)
    config = 'dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"STEP"}}\n}'
    begun, going = (text.replace("dimensions={0}\n}", config.replace("STEP", step)) for step in ("-1", "2"))
    assert Program(begun).usual().collectives["reduce-scatter"].count == 1
    assert "reduce-scatter" not in Program(going).usual().collectives


def test_a_loop_without_a_bound_counts_once_and_is_told():
    text = HLO.replace("constant(5)", "parameter(1)")
    assert Program(text).usual().collectives["all-gather"].count == 1 + 3
    assert Program(text).usual().unbounded == 1


@pytest.mark.parametrize(
    ("attributes", "size"),
    [
        ("replica_groups={{0,1,2},{3,4,5}}", 3), ("replica_groups=[4,2]<=[2,4]T(1,0)", 2), ("replica_groups={}", 8),
        ("replica_groups=mesh['x'=2,'y'=3,'z'=5] {'x','z'}", 10), ("source_target_pairs={{0,1}}", 8),
    ],
)  # fmt: skip
def test_groups_are_read_in_every_notation(attributes, size):
    program = Program(HLO)
    instruction = dataclasses.replace(program.computations["few"]["swap"], attributes=f", {attributes}, dimensions={{0}}")
    assert program.group_size(instruction) == size


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[2,3]{1,0}", 24), ("bf16[8,320,6144]{2,1,0:T(8,128)(2,1)S(1)}", 8 * 320 * 6144 * 2), ("pred[]", 1), ("s4[8]", 4),
        ("(f32[2]{0}, /*index=1*/u8[3]{0}, token[])", 11), ("f8e4m3fn[16]", 16), ("c64[2]", 16),
    ],
)  # fmt: skip
def test_sizes_of_shapes(shape, size):
    assert size_in_bytes(shape) == size


def test_a_program_compiled_here(run_with_devices):
    """The parser on what XLA writes today, on every Python and jax: one sum over 4 devices in a loop of 6."""
    run_with_devices(
        """
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from bm_jax.hlo import Program
mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
def step(w, x):
    def body(x, _):
        return jax.lax.with_sharding_constraint(jnp.tanh(x @ w) @ w.T, NamedSharding(mesh, P(None, None))), None
    return jax.lax.scan(body, x, None, length=6)[0]
w = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=NamedSharding(mesh, P(None, "x")))
x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=NamedSharding(mesh, P()))
found = Program(jax.jit(step).lower(w, x).compile().as_text()).usual()
assert set(found.collectives) == {"all-reduce"}, found
assert found.collectives["all-reduce"].count == 6, found
assert found.total.payload == 6 * 16 * 64 * 4 and found.total.sent == 1.5 * found.total.payload
""",
        devices=4,
    )


def abstract(config):
    return jax.eval_shape(lambda: init_parameters(config, jax.random.key(0)))


def train_flops(config, platform="tpu"):
    optimizer = make_optimizer(config.optimizer, config.run.steps)
    row = jax.ShapeDtypeStruct((config.data.batch_size, config.data.sequence_length + 1), jnp.int32)
    state = jax.eval_shape(lambda: init_state(config, optimizer))
    step = jax.make_jaxpr(make_train_step(config, optimizer))(state, {"tokens": row, "segment_ids": row})
    return matrix_flops(step, platform)


def test_matrix_flops_of_mamba_equal_a_count_by_hand():
    """Products forward and two for each backward: 44 layers of width 1024, inner width 2048, dt rank 64, 16 states."""
    config = configs.load("mamba")
    tokens, layers, width, inner, rank, states, vocabulary = 8 * 2048, 44, 1024, 2048, 64, 16, 50304
    layer = width * 2 * inner + inner * (rank + 2 * states) + rank * inner + inner * width
    wanted = 3 * 2 * tokens * (layers * layer + width * vocabulary)
    assert train_flops(config) == (wanted, wanted)
    full = dataclasses.replace(config, run=dataclasses.replace(config.run, remat="full"))
    # The last product of a layer is only its result, which nothing needs twice.
    assert wanted < train_flops(full).usual <= wanted + 2 * tokens * layers * layer


def test_matrix_flops_of_experts_are_those_of_their_padded_rows():
    """Where every expert gets near the mean, 8 groups of 1.25 times the mean. The router's products are less than 1%."""
    config = configs.load("blackmamba_340m_1p5b").model
    tokens = jax.ShapeDtypeStruct((1, 2048), jnp.int32)
    run = lambda p, t: logits(p, forward(p, t, config).hidden, config)  # noqa: E731
    M, E, R, N, F, V, T = 1152, 2304, 72, 16, 3072, 50304, 2048
    mamba = M * 2 * E + E * (R + 2 * N) + R * E + E * M
    rows = 8 * 320  # ceil(1.25 * 2048 / 8) in blocks of 8
    products = 2 * (15 * (T * mamba + rows * 3 * M * F) + T * M * V)
    found = matrix_flops(jax.make_jaxpr(run)(abstract(config), tokens), "tpu")
    assert products < found.usual < 1.01 * products
    assert found.most >= found.usual


def test_matrix_flops_inside_loops_conditionals_shards_and_kernels():
    from jax.experimental import pallas as pl

    a = jnp.ones((4, 4))
    product = 2 * 4**3

    def count(function, *arguments, platform="cpu"):
        return matrix_flops(jax.make_jaxpr(function)(*arguments), platform)

    assert count(lambda a: jax.lax.fori_loop(0, 7, lambda _, x: x @ a, a), a).usual == 7 * product
    assert (
        count(lambda a: jax.lax.while_loop(lambda c: c[0] < 9, lambda c: (c[0] + 1, c[1] @ a), (0, a)), a).usual == 9 * product
    )
    chosen = count(lambda p, a: jax.lax.cond(p, lambda a: a @ a, lambda a: a @ a @ a, a), True, a)
    assert chosen == (product, 2 * product)
    here = lambda a: jax.lax.platform_dependent(a, tpu=lambda a: a @ a, default=lambda a: a + 1)  # noqa: E731
    assert (count(here, a, platform="tpu").most, count(here, a).most) == (product, 0)

    def kernel(x, y):
        y[...] = x[...] @ x[...]

    block = pl.BlockSpec((4, 4), lambda i: (i, 0))
    call = pl.pallas_call(kernel, jax.ShapeDtypeStruct((12, 4), jnp.float32), grid=(3,), in_specs=[block], out_specs=block)
    assert count(call, jnp.ones((12, 4))).usual == 3 * product
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    spec = jax.sharding.PartitionSpec()
    assert count(jax.shard_map(lambda a: a @ a, mesh=mesh, in_specs=spec, out_specs=spec), a).usual == product
    group_sizes = jnp.array([1, 3])
    ragged = count(jax.grad(lambda a, w: jax.lax.ragged_dot(a, w, group_sizes).sum(), (0, 1)), a, jnp.ones((2, 4, 5)))
    assert ragged.usual == 3 * 2 * 4 * 4 * 5


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("v5x:4x4", "did you mean"), ("v5e", "grid of 2 dimensions, for example v5e:16x16"),
        ("v5e:4x4x4", "grid of 2 dimensions"), ("v5p:16x16", "grid of 3 dimensions, for example v5p:4x4x4"),
        ("v5e:32x32", "has 1024 chips; v5e comes with 1 to 256"), ("h100:0", "has 0 chips"), ("h100:2x2", "number of GPUs"),
        ("", "there is no topology"),
    ],
)  # fmt: skip
def test_an_unknown_topology_is_refused(text, reason):
    with pytest.raises(ConfigError, match=reason):
        parse_topology(text)


def test_topologies():
    assert parse_topology("V5E:16x16").size == 256
    assert parse_topology("tpu7x:4x4x4").size == 128  # two devices a chip
    assert parse_topology("h100:8").name == "h100:8"


@pytest.mark.parametrize("text", ["data=", "data", "date=2", "data=2,data=2", "data=-1", "data=2;expert=2", "data=0"])
def test_a_mesh_that_is_not_one_is_refused(text):
    with pytest.raises(ConfigError, match=r"[mM]esh"):
        plan.parse_mesh(text)


def test_parse_mesh():
    assert plan.parse_mesh("data=32, expert=8") == MeshConfig(32, 1, 8)
    assert planner.fill_mesh(plan.parse_mesh("expert=8"), 256) == MeshConfig(32, 1, 8)


@pytest.mark.parametrize(
    ("message", "sizes"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (28.44G) exceeds "
            "available HBM (15.75G).", (28.44, 15.75),
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 18.29G of 15.75G hbm.", (18.29, 15.75)),
        ("CompileTimeHbmOom 18.29G > 15.75G", (18.29, 15.75)),
        ("RESOURCE_EXHAUSTED: no more", (0, 0)),
    ],
)  # fmt: skip
def test_refusals_of_compilers_are_read(message, sizes):
    assert out_of_memory(message) == tuple(size * GIB for size in sizes)
    assert out_of_memory("INVALID_ARGUMENT: 2G > 1G") is None


def run_plan(capsys, *arguments):
    """Exit status, standard output, standard error."""
    status = plan.main(list(arguments))
    return status, *capsys.readouterr()


def test_an_estimate_is_marked_as_one(capsys):
    status, out, _ = run_plan(capsys, "default", "--topology", "a100:2", "--mesh", "data=1,expert=2")
    assert status == 0
    assert "ESTIMATE from shapes, nothing is compiled" in out
    assert "train: estimate: fits" in out
    assert "predicted, not measured: compute" in out
    assert out.count("estimate: fits") == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("default --topology a100:3 --mesh data=2", "the mesh is for 2 devices, a100:3 has 3. By estimate the nearest"),
        (
            "default --topology a100:2 --mesh data=2 --data.batch-size 5",
            "multiple of 2. By estimate the nearest layout that works is --mesh data=2 --data.batch-size 4",
        ),
        ("default --topology a100:6 --mesh expert=3", "must be a multiple of mesh.expert (3). By estimate the nearest layout"),
        ("blackmamba_340m_1p5b --topology a100:7 --mesh fsdp=7", "cannot be split into mesh.fsdp = 7 parts"),
        ("defautl", "did you mean default"),
        ("default --topology v9:4x4", "there is no topology"),
        ("default --mesh dta=4", "did you mean data"),
        ("default --compile-best 0", "--compile-best must be at least 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_made_ends_in_one_message_and_status_1(capsys, arguments, said):
    status, _, err = run_plan(capsys, *arguments.split())
    assert status == 1
    assert said in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_a_model_that_does_not_fit_names_the_nearest_layout_that_does(capsys):
    arguments = (
        "blackmamba_630m_2p8b",
        "--topology",
        "a100:8",
        "--mesh",
        "data=8",
        "--data.batch-size",
        "512",
        "--run.remat",
        "none",
    )
    status, out, _ = run_plan(capsys, *arguments, "--programs", "train")
    assert status == 1
    assert "train: estimate: does not fit, needs" in out
    assert "nearest layout that works: --mesh" in out


def test_a_model_that_fits_no_layout(capsys):
    status, out, _ = run_plan(capsys, "jamba_52b", "--topology", "a100:1", "--mesh", "data=1", "--programs", "train")
    assert status == 1
    assert "no layout of this topology that was tried fits" in out
    status, out, _ = run_plan(capsys, "jamba_52b", "--topology", "a100:1", "--search")
    assert status == 1
    assert "none that was tried fits" in out


def test_search_prints_the_best_first(capsys):
    status, out, _ = run_plan(capsys, "default", "--topology", "a100:2", "--search", "--compile-best", "4")
    assert status == 0
    rates = [
        float(line.split("at most ")[1].split(" tokens")[0].replace(",", "")) for line in out.splitlines() if "at most" in line
    ]
    assert len(rates) == 4
    assert rates == sorted(rates, reverse=True)
    assert "best first, by predicted speed (not measured)" in out


def test_layouts_divide_and_the_nearest_is_the_one_asked_for():
    config, topology = configs.load("blackmamba_340m_1p5b"), parse_topology("v5e:16x16")
    found = list(layouts(config, topology))
    assert len({(c.mesh, c.data.batch_size, c.run.remat) for c in found}) == len(found)
    for other in found[::37]:
        check_layout(other, topology)
    wanted = MeshConfig(32, 1, 8)
    (first, *_) = nearest(wanted, 256, "full", found)
    assert (first.mesh, first.data.batch_size, first.run.remat) == (wanted, 256, "full")


def test_an_estimate_counts_parameters_exactly_and_activations_by_remat():
    config, topology = configs.load("blackmamba_340m_1p5b"), parse_topology("v5e:16x16")
    needed = {}
    for remat in ("none", "dots", "full"):
        found = estimate(with_layout(config, MeshConfig(32, 1, 8), 256, remat), topology)
        assert found.memory["optimizer state"] == 2 * found.memory["parameters"]
        needed[remat] = found.needed
    assert needed["none"] > needed["dots"] > needed["full"]
    total = 1_458_462_072
    experts = 15 * 8 * 3 * 1152 * 3072
    assert found.memory["parameters"] == 4 * (total - experts * 7 // 8)
    assert found.moved.collectives["all-to-all"].count == 15 * 6


def test_an_estimate_of_decoding_is_bound_by_the_weights_it_reads():
    config, topology = configs.load("blackmamba_340m_1p5b"), parse_topology("h100:1")
    config = with_layout(config, MeshConfig(1), 1, "none")
    decode, prefill = (estimate_inference(config, topology, program) for program in ("decode", "prefill"))
    assert 2 * 1_458_462_072 < decode.memory["parameters"] < 2.3 * 1_458_462_072
    assert decode.memory["cache"] == 15 * 2304 * (16 * 4 + 3 * 2) + 12
    assert max(decode.bounds(topology.chip), key=decode.bounds(topology.chip).get) == "memory"
    assert prefill.flops / decode.flops == pytest.approx(2048 / 16, rel=0.2)


def test_a_report_says_what_is_predicted_and_what_overflows():
    config, topology = configs.load("default"), parse_topology("v5e:2x2")
    usual = Movement({"all-to-all": Traffic(3, 2048, 1024)}, memory=819e9)
    most = Movement({"all-to-all": Traffic(3, 8192, 4096)}, memory=819e9)
    found = Found("train", {"parameters": 2 * GIB, "temporaries": GIB}, 197e12, 394e12, usual, most, 12.0)
    text = report(found, config, topology)
    assert "train: fits, 3.00 of 15.75 GiB a device" in text
    assert "predicted, not measured: compute 1.00 s, memory 1.00 s, network" in text
    assert "up to 4.00 KiB when rows overflow their room" in text
    assert "compiled in 12 s" in text
    refused = Refusal("train", 20 * GIB, 15.75 * GIB, 3.0)
    assert not fits(refused, CHIPS["v5e"])
    assert "train: does not fit, needs 20.00 GiB a device, there are 15.75" in report(refused, config, topology)


def crash(config, program, topology, target):
    import os

    os.write(2, b"F0000 algorithm.cc:1] Check failed: offset == 3 (2 vs. 3)\n")
    os.abort()


def test_a_compiler_that_crashes_is_told_from_a_layout_that_does_not_fit(monkeypatch):
    monkeypatch.setattr("bm_jax.plan_compile.compile_program", crash)
    told = r"Check failed: offset == 3.*fault of the compiler, not of the layout"
    with Compiler(parse_topology("v5e:2x2")) as compiler, pytest.raises(CompilerError, match=told):
        compiler.compile(configs.load("default"), "train")


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'blackmamba-jax[tpu-aot]'"
)
GUARDS = [
    ("blackmamba_340m_1p5b", "v5e:16x16", MeshConfig(32, expert=8)),
    pytest.param("blackmamba_340m_1p5b", "v6e:16x16", MeshConfig(32, expert=8), marks=pytest.mark.long),
    pytest.param("blackmamba_340m_1p5b", "v5p:4x4x4", MeshConfig(2, 32), marks=pytest.mark.long),
    pytest.param("blackmamba_630m_2p8b", "v5e:16x16", MeshConfig(8, 32), marks=pytest.mark.long),
    pytest.param("blackmamba_630m_2p8b", "v6e:16x16", MeshConfig(8, 32), marks=pytest.mark.long),
    pytest.param("blackmamba_630m_2p8b", "v5p:4x4x4", MeshConfig(8, expert=8), marks=pytest.mark.long),
]


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(("preset", "topology", "mesh"), GUARDS)
def test_released_models_compile_and_fit(preset, topology, mesh):
    """The step that `fit` runs, one window of 2048 tokens a device."""
    place = parse_topology(topology)
    config = with_layout(configs.load(preset), mesh, place.size, "full")
    check_layout(config, place)
    with Compiler(place) as compiler:
        found = compiler.compile(config, "train")
    assert isinstance(found, Found), found
    print(report(found, config, place))
    assert fits(found, place.chip)
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(config.model)))
    assert found.memory["optimizer state"] == pytest.approx(2 * found.memory["parameters"], rel=1e-3)
    assert 4 * total / place.size <= found.memory["parameters"] < 4 * total
    assert found.moved.unbounded == 0
    wanted = {"all-to-all", "all-reduce"} if mesh.expert > 1 else {"all-gather", "reduce-scatter", "all-reduce"}
    assert wanted <= set(found.moved.collectives)


@needs_libtpu
@pytest.mark.slow
def test_the_compiler_refuses_what_does_not_fit():
    config = with_layout(configs.load("blackmamba_630m_2p8b"), MeshConfig(4), 4, "full")
    place = parse_topology("v5e:2x2")
    assert why_not_compiled(place) is None
    with Compiler(place) as compiler:
        found = compiler.compile(config, "train")
    assert isinstance(found, Refusal)
    assert found.available == 15.75 * GIB < found.needed


@needs_libtpu
@pytest.mark.slow
def test_training_prefill_and_decoding_of_a_small_model(capsys):
    status, out, _ = run_plan(capsys, "default", "--topology", "v5e:2x2", "--mesh", "data=2,expert=2")
    assert status == 0
    for program in ("train", "prefill", "decode"):
        assert f"{program}: fits" in out
    assert out.count("compiled in") == 3
