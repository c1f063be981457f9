"""Checkpoints: exact, sealed, and safe from kills, damage, full disks and other processes."""

import functools
import itertools
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from bm_jax import array_files
from bm_jax.checkpoint import (
    CheckpointError,
    Checkpoints,
    RunDirectoryError,
    lock_run_directory,
    restore_parameters,
)

ROOT = Path(__file__).resolve().parent.parent

# Orbax leaves the other writes of a failed save running, perhaps into the next test; they find its event loop closed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict[str, Any]
    opt_state: Any
    key: jax.Array
    raw_key: jax.Array


def make_state(step: int, width: int = 48, dtype: Any = jnp.bfloat16) -> State:
    """A state of every kind of leaf, another one for each step."""
    keys = jax.random.split(jax.random.key(step), 3)
    params = {
        "layers": {"w": jax.random.normal(keys[0], (width, 40)).astype(dtype), "b": jnp.arange(width) * step},
        "odd": jnp.array([jnp.nan, -0.0, jnp.inf, 1e-45], jnp.float32),
        "flag": jnp.array([True, False]),
        "scale": jnp.float32(step),
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    floats = {"w": params["layers"]["w"].astype(jnp.float32)}
    return State(jnp.int32(step), params, optimizer.init(floats), keys[1], jax.random.PRNGKey(step))


def bits(tree: Any) -> list[tuple[str, str, bytes]]:
    """Path, type and bytes of every leaf."""

    def leaf_bits(path, leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.tree_util.keystr(path), str(leaf.dtype), np.asarray(jax.random.key_data(leaf)).tobytes()
        return jax.tree_util.keystr(path), f"{leaf.dtype}{leaf.shape}", np.asarray(leaf).tobytes()

    return [leaf_bits(*item) for item in jax.tree_util.tree_leaves_with_path(tree)]


def abstract(state: Any) -> Any:
    return jax.eval_shape(lambda: state)


def save_steps(directory: Path, *steps: int, keep_last: int = 10) -> None:
    with Checkpoints(directory, keep_last=keep_last) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), data_state={"position": step}, config={"width": [1, None]})


def restore(directory: Path, step: int | None = None):
    with Checkpoints(directory, keep_last=10) as checkpoints:
        return checkpoints.restore(abstract(make_state(0)), step)


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


# --- what is saved comes back -----------------------------------------------------------------------------------------


def test_a_restored_state_is_the_saved_one_bit_for_bit(tmp_path):
    save_steps(tmp_path, 3, 7)
    for step, asked in ((7, None), (7, 7), (3, 3)):
        restored = restore(tmp_path, asked)
        assert restored.step == step
        assert bits(restored.state) == bits(make_state(step))
        assert jax.tree.structure(restored.state) == jax.tree.structure(make_state(0))
        assert restored.data_state == {"position": step}
        assert restored.config == {"width": [1, None]}
    draw = jax.random.uniform(restored.state.key, (3,))
    assert np.array_equal(draw, jax.random.uniform(make_state(3).key, (3,)))


def test_nothing_to_restore(tmp_path):
    assert restore(tmp_path / "new") is None
    with pytest.raises(CheckpointError, match="cannot be read"):
        restore(tmp_path / "new", 5)
    assert not (tmp_path / "new").exists()  # asking changes nothing


def test_a_save_in_the_background_does_not_see_later_steps(tmp_path):
    """The training step donates its state: the buffers are reused while the save is running."""
    step = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf * -3 + 1, x), donate_argnums=0)
    x = {"params": {str(i): jnp.full((256, 1024), i, jnp.float32) for i in range(8)}}
    expected = bits(x)
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        checkpoints.save(1, x, data_state={}, config={})
        for _ in range(20):
            x = step(x)
        jax.block_until_ready(x)
        assert bits(checkpoints.restore(abstract(x)).state) == expected


@pytest.mark.parametrize(("keep_every", "kept"), [(None, [9, 10]), (4, [4, 8, 9, 10])])
def test_keep_last_and_keep_every(tmp_path, keep_every, kept):
    with Checkpoints(tmp_path, keep_last=2, keep_every=keep_every) as checkpoints:
        for step in range(1, 11):
            checkpoints.save(step, {"x": jnp.int32(step)}, data_state={}, config={})
        checkpoints.wait()
        assert checkpoints.steps() == kept
        assert checkpoints.latest_step() == 10
    assert names(tmp_path) == sorted(map(str, kept))


def test_a_step_is_never_overwritten(tmp_path):
    save_steps(tmp_path, 5)
    with pytest.raises(CheckpointError, match="already has a checkpoint of step 5"):
        save_steps(tmp_path, 5)
    assert bits(restore(tmp_path).state) == bits(make_state(5))


def test_from_one_device_to_eight_and_back(tmp_path, run_with_devices):
    x = {"w": jnp.arange(64, dtype=jnp.float32).reshape(16, 4), "key": jax.random.key(3), "step": jnp.int32(9)}
    with Checkpoints(tmp_path, keep_last=9) as checkpoints:
        checkpoints.save(1, x, data_state={}, config={})
    run_with_devices(f"""
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from bm_jax.checkpoint import Checkpoints
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
def leaf(shape, dtype, *spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))
x = {{"w": leaf((16, 4), jnp.float32, "data"), "key": leaf((), jax.random.key(0).dtype), "step": leaf((), jnp.int32)}}
with Checkpoints({str(tmp_path)!r}, keep_last=9) as checkpoints:
    restored = checkpoints.restore(x).state
    assert {{shard.data.shape for shard in restored["w"].addressable_shards}} == {{(2, 4)}}
    assert restored["key"].sharding.is_equivalent_to(x["key"].sharding, 0)
    restored["w"] = jax.jit(lambda w: w + 1)(restored["w"])
    checkpoints.save(2, restored, data_state={{}}, config={{}})
""")
    with Checkpoints(tmp_path, keep_last=9) as checkpoints:
        restored = checkpoints.restore(abstract(x))
    assert restored.step == 2
    assert bits(restored.state) == bits(x | {"w": x["w"] + 1})
    assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(restored.state))


PEAK_MEMORY = """
def peak_megabytes():  # of this process alone: getrusage begins with the peak of the process that started it
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) // 1024
"""
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")

SHARE_OF_A_HOST = (
    PEAK_MEMORY
    + """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(f"localhost:{sys.argv[2]}", num_processes=2, process_id=int(sys.argv[3]))
import jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from bm_jax.checkpoint import Checkpoints
split = NamedSharding(Mesh(np.array(jax.devices()), ("fsdp",)), PartitionSpec(None, "fsdp"))
wanted = {str(i): jax.ShapeDtypeStruct((4096, 8192), jnp.float32, sharding=split) for i in range(8)}
before = peak_megabytes()
with Checkpoints(sys.argv[1], keep_last=1) as checkpoints:
    state = checkpoints.restore(wanted).state
print("megabytes", peak_megabytes() - before)
shards = {name: leaf.addressable_shards for name, leaf in state.items()}
assert all(shard.data.shape == (4096, 1024) and (np.asarray(shard.data) == int(i)).all() for i in shards for shard in shards[i])
"""
)


@needs_proc
def test_a_host_reads_its_shards_and_no_more(tmp_path):
    """Two processes of four devices, as two hosts: each gets its half of 1024 MB, and never has all of it."""
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        state = {str(i): jnp.full((4096, 8192), i, jnp.float32) for i in range(8)}
        checkpoints.save(1, state, data_state={}, config={})
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    start = functools.partial(run_python, SHARE_OF_A_HOST, tmp_path, port, stderr=subprocess.PIPE)
    with start(0) as first, start(1) as second:
        for host in (first, second):
            output, errors = host.communicate(timeout=120)
            assert host.returncode == 0, errors
            peak = re.search(r"megabytes (\d+)", output)  # among what libraries print
            assert peak, output
            assert 512 <= int(peak[1]) < 1024  # its half, and what is on the way there


def test_chunks_are_small_and_experts_apart(tmp_path):
    """So that a device of any mesh reads little besides its shard."""
    shapes = {"stacked": (2, 1024, 2, 3072), "experts": (2, 8, 512, 2, 1024), "matrix": (4096, 1024), "small": (3,)}
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        checkpoints.save(1, {name: jnp.zeros(shape) for name, shape in shapes.items()}, data_state={}, config={})
    with ocp.PyTreeCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(tmp_path / "1/state").item_metadata.tree
    chunks = {name: metadata[name].storage.chunk_shape for name in shapes}
    assert all(np.prod(chunk) * 4 <= 2**23 for chunk in chunks.values()), chunks
    assert chunks["experts"][1] == 1
    assert chunks["stacked"][1] > 1
    assert chunks["small"] == (3,)


@pytest.mark.parametrize("room", [1, 2**22])
def test_a_shard_of_more_bytes_than_are_read_at_a_time(tmp_path, room, monkeypatch):
    monkeypatch.setattr(array_files, "READ_BYTES", room)
    state = {"large": jnp.arange(3 * 2**20).reshape(3, -1), "small": jnp.ones(3), "key": jax.random.key(0)}
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        checkpoints.save(1, state, data_state={}, config={})
        restored = checkpoints.restore(abstract(state))
    assert restored is not None
    assert bits(restored.state) == bits(state)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (make_state(0, width=50), ["params/layers/w: bfloat16[48, 40]", "bfloat16[50, 40] here"]),
        (make_state(0, dtype=jnp.float32), ["params/layers/w: bfloat16[48, 40]", "float32[48, 40] here"]),
        (make_state(0).replace(params={"new": jnp.zeros(3)}), ["params/new: absent", "params/odd: float32[4]"]),
    ],
    ids=["shape", "dtype", "tree"],
)
def test_a_checkpoint_of_another_shape_is_refused(tmp_path, wanted, words):
    save_steps(tmp_path, 1, 2)
    before = names(tmp_path)
    with Checkpoints(tmp_path, keep_last=2) as checkpoints, pytest.raises(CheckpointError) as error:
        checkpoints.restore(abstract(wanted))
    for word in [*words, "run.directory", str(tmp_path / "2")]:
        assert word in str(error.value)
    assert names(tmp_path) == before


# --- damage -----------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip_bit(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("unlisted", ["data_state.json", "leaves.json"])
def test_a_file_that_no_checksum_is_kept_of_is_damage(tmp_path, unlisted):
    save_steps(tmp_path, 1, 2)
    sums = json.loads((tmp_path / "2/checksums.json").read_text())
    del sums[unlisted]
    (tmp_path / "2/checksums.json").write_text(json.dumps(sums))
    with pytest.warns(RuntimeWarning, match=f"{unlisted} is not among those that"):
        assert restore(tmp_path).step == 1


def test_an_old_checkpoint_that_was_moved_and_linked_is_deleted_as_a_link(tmp_path):
    save_steps(tmp_path / "run", 1)
    (tmp_path / "run/1").rename(tmp_path / "moved")
    (tmp_path / "run/1").symlink_to(tmp_path / "moved")
    save_steps(tmp_path / "run", 2, 3, keep_last=2)
    assert "1" not in names(tmp_path / "run")
    assert not [name for name in names(tmp_path / "run") if "partial" in name]
    assert (tmp_path / "moved/checksums.json").exists()


def test_damage_to_any_file_is_found(tmp_path):
    save_steps(tmp_path / "good", 1, 2)
    files = [path.relative_to(tmp_path / "good") for path in (tmp_path / "good/2").rglob("*") if path.is_file()]
    assert len(files) > 10
    for number, (file, damage) in enumerate(itertools.product(files, (truncate, empty, flip_bit, remove))):
        directory = tmp_path / str(number)
        shutil.copytree(tmp_path / "good", directory)
        damage(directory / file)
        with pytest.warns(RuntimeWarning, match="is damaged and not used") as caught:
            restored = restore_parameters(directory) if number % 8 else restore(directory).state.params
        if file.name != "checksums.json":
            assert str(directory / file) in str(caught[0].message)
        assert bits(restored) == bits(make_state(1).params)
        shutil.rmtree(directory)


def test_a_damaged_checkpoint_is_set_aside_and_its_step_saved_again(tmp_path):
    save_steps(tmp_path, 1, 2, 3)
    truncate(next(path for path in (tmp_path / "3/state").rglob("d/*") if path.is_file()))
    flip_bit(tmp_path / "2/state/_METADATA")
    with pytest.warns(RuntimeWarning, match=r"bytes instead of|_METADATA have changed") as caught:
        assert restore(tmp_path).step == 1
    assert len(caught) == 2
    assert names(tmp_path) == ["1", "2.corrupt", "3.corrupt"]
    save_steps(tmp_path, 2)
    assert restore(tmp_path).step == 2
    flip_bit(tmp_path / "2/state/_METADATA")
    with pytest.warns(RuntimeWarning, match="_METADATA have changed"):
        assert restore(tmp_path).step == 1
    assert names(tmp_path) == ["1", "2.corrupt", "2.corrupt-2", "3.corrupt"]


def test_when_all_are_damaged_nothing_is_changed(tmp_path):
    save_steps(tmp_path, 1, 2)
    remove(tmp_path / "1/config.json")
    remove(tmp_path / "2/checksums.json")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for _ in range(2):  # the second start refuses as the first one did
        with pytest.warns(RuntimeWarning, match="is damaged"), pytest.raises(CheckpointError) as error:
            restore(tmp_path)
        assert "no checkpoint" in str(error.value)
        assert "1/config.json is missing" in str(error.value)
    with pytest.warns(RuntimeWarning, match="is damaged"), pytest.raises(CheckpointError, match="no checkpoint"):
        restore_parameters(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_unfinished_folders_are_ignored_then_removed(tmp_path):
    save_steps(tmp_path, 1, 2)
    for name in ("3.partial-1", "3.partial-2", "1.partial-deleted"):
        shutil.copytree(tmp_path / "2", tmp_path / name)
        remove(tmp_path / name / "state/_METADATA")
    assert restore(tmp_path).step == 2
    save_steps(tmp_path, 3)
    assert names(tmp_path) == ["1", "2", "3"]
    assert bits(restore(tmp_path).state) == bits(make_state(3))


# --- kills ------------------------------------------------------------------------------------------------------------

SAVER = """
import sys
sys.path.insert(0, "tests")
import jax.numpy as jnp
from test_checkpoint import big_state
from bm_jax.checkpoint import Checkpoints
with Checkpoints(sys.argv[1], keep_last=2) as checkpoints:
    restored = checkpoints.restore(big_state(0))
    first = restored.step + 1 if restored else 1
    print(first, flush=True)
    for step in range(first, first + 1000):
        checkpoints.save(step, big_state(step), data_state={"position": step}, config={})
"""


def big_state(step: int) -> dict[str, Any]:
    return {"params": {str(i): jnp.full((512, 1024), step + i, jnp.float32) for i in range(6)}, "step": jnp.int32(step)}


def run_python(source: str, *arguments: object, **options: Any) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "-c", source, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, **options)


@pytest.mark.slow
def test_killed_while_saving(tmp_path):
    """SIGKILL at several moments of a save, again and again in one directory: the newest complete step comes back."""
    directory, left_over, latest = tmp_path / "checkpoints", 0, 0
    for delay in (0.0, 0.01, 0.03, 0.1):
        with run_python(SAVER, directory) as process:
            first = int(process.stdout.readline())
            assert first == latest + 1  # goes on from the newest complete step
            wait_for(lambda f=first: any(directory.glob(f"{f + 3}.partial*")))
            time.sleep(delay)
            process.kill()
        left_over += any("partial" in name for name in names(directory))
        with Checkpoints(directory, keep_last=2) as checkpoints:
            restored = checkpoints.restore(big_state(0))
        latest = restored.step
        assert latest >= first + 2
        assert bits(restored.state) == bits(big_state(latest))
        assert restored.data_state == {"position": latest}
    assert left_over >= 2  # or the kills missed the saves


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.001)


# --- full and read-only disks -----------------------------------------------------------------------------------------


def noise(megabytes: float) -> dict[str, jax.Array]:
    return {"x": jax.random.bits(jax.random.key(0), (int(megabytes * 2**18),), jnp.uint32)}


def test_too_little_room_is_seen_before_the_save(small_disk):
    state = noise(5)
    with Checkpoints(small_disk / "run", keep_last=1) as checkpoints:
        checkpoints.save(10, state, data_state={}, config={})
        checkpoints.wait()
        with pytest.raises(CheckpointError, match=r"disk full: .* needs 5\.\d+ MB, have .* free on .*") as error:
            checkpoints.save(20, state, data_state={}, config={})
        assert "last good step is 10" in str(error.value)
        assert names(small_disk / "run") == ["10"]
        assert bits(checkpoints.restore(abstract(state)).state) == bits(state)


@pytest.mark.parametrize("free_files", [0, 3, 6, 9, 12, 15])
def test_a_disk_that_fills_up_during_the_save(small_disk, free_files, caplog):
    """Room for some of the 22 to 31 files of a checkpoint; afterwards the same object saves again."""
    caplog.set_level(logging.CRITICAL, "absl")
    filler = small_disk / "filler"
    filler.mkdir()
    with Checkpoints(small_disk / "run", keep_last=2) as checkpoints:
        checkpoints.save(1, make_state(1), data_state={}, config={})
        checkpoints.wait()
        for number in range(os.statvfs(small_disk).f_ffree - free_files):
            (filler / str(number)).touch()

        def save():
            checkpoints.save(2, make_state(2), data_state={}, config={})
            checkpoints.wait()

        with pytest.raises(CheckpointError, match=r"saving step 2 failed: disk full on .* last good step is 1"):
            save()
        assert names(small_disk / "run") == ["1"]
        shutil.rmtree(filler)
        save()
    assert names(small_disk / "run") == ["1", "2"]
    assert bits(restore(small_disk / "run").state) == bits(make_state(2))


LIMITED = """
import resource, sys
sys.path.insert(0, "tests")
import jax
from test_checkpoint import noise
from bm_jax.checkpoint import CheckpointError, Checkpoints
with Checkpoints(sys.argv[1], keep_last=1) as checkpoints:
    checkpoints.save(1, noise(0.1), data_state={}, config={})
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    checkpoints.save(2, noise(4), data_state={}, config={})  # returns: the error comes later
    try:
        checkpoints.save(3, noise(0.1), data_state={}, config={})
    except CheckpointError as error:
        print(error, flush=True)
    checkpoints.save(3, noise(0.1), data_state={}, config={})
"""


def test_an_error_in_the_background_is_raised_at_the_next_save(tmp_path):
    with run_python(LIMITED, tmp_path, stderr=subprocess.PIPE) as process:
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "saving step 2 failed" in output
    assert "last good step is 1" in output
    assert names(tmp_path) == ["3"]


def test_an_error_of_the_last_save_is_raised_on_leaving(tmp_path):
    (tmp_path / "1").write_text("in the way")

    def save(then=None):
        with Checkpoints(tmp_path, keep_last=1) as checkpoints:
            checkpoints.save(1, noise(0.1), data_state={}, config={})
            if then is not None:
                raise then

    with pytest.raises(CheckpointError, match="saving step 1 failed"):
        save()
    with pytest.raises(KeyboardInterrupt):  # is not hidden by the error of the save
        save(KeyboardInterrupt())
    assert names(tmp_path) == ["1"]


@pytest.fixture
def read_only(tmp_path, request):
    """A folder that cannot be written: by its mode, or for root by a read-only mount."""
    if os.geteuid():
        path = tmp_path / "read_only"
        path.mkdir(mode=0o500)
        yield path
        path.chmod(0o700)
        return
    path = request.getfixturevalue("small_disk")
    subprocess.run(["mount", "-o", "remount,ro", str(path)], check=True)
    yield path


def test_a_folder_that_cannot_be_written(read_only):
    with Checkpoints(read_only / "run", keep_last=1) as checkpoints, pytest.raises(CheckpointError) as error:
        checkpoints.save(1, noise(0.1), data_state={}, config={})
    assert str(read_only) in str(error.value)
    with (
        pytest.raises(RunDirectoryError, match=r"cannot use the run directory .*run\.directory"),
        lock_run_directory(read_only / "run"),
    ):
        pass


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "file").write_text("mine")
    with Checkpoints(tmp_path / "file", keep_last=1) as checkpoints, pytest.raises(CheckpointError, match="file"):
        checkpoints.save(1, noise(0.1), data_state={}, config={})
    with pytest.raises(RunDirectoryError, match="cannot use"), lock_run_directory(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "mine"


# --- parameters -------------------------------------------------------------------------------------------------------


def test_parameters_of_a_run(tmp_path):
    save_steps(tmp_path / "checkpoints", 1, 2)
    for directory in (tmp_path, tmp_path / "checkpoints"):
        assert bits(restore_parameters(directory)) == bits(make_state(2).params)
    assert bits(restore_parameters(tmp_path, abstract(make_state(2).params))) == bits(make_state(2).params)
    with pytest.raises(CheckpointError, match="another configuration"):
        restore_parameters(tmp_path, {"odd": jnp.zeros(4)})
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        restore_parameters(tmp_path / "none")


PARAMETERS_ONLY = (
    PEAK_MEMORY
    + """
import sys
import jax
from bm_jax.checkpoint import restore_parameters
jax.devices()
before = peak_megabytes()
params = restore_parameters(sys.argv[1])
print(params["x"].sum(), peak_megabytes() - before)
"""
)


@needs_proc
def test_the_optimizer_is_not_loaded_with_the_parameters(tmp_path):
    state = {"params": {"x": jnp.arange(10)}, "opt_state": jnp.zeros((512, 1024, 1024), jnp.int8)}
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        checkpoints.save(1, state, data_state={}, config={})
    with run_python(PARAMETERS_ONLY, tmp_path) as process:
        total, megabytes = process.communicate(timeout=120)[0].split()
    assert total == "45"
    assert int(megabytes) < 256  # the optimizer has twice that


# --- the lock ---------------------------------------------------------------------------------------------------------

HOLDER = """
import sys
from bm_jax.checkpoint import lock_run_directory
with lock_run_directory(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_run_directory_in_use_by_another_process(tmp_path):
    with run_python(HOLDER, tmp_path / "run", stdin=subprocess.PIPE) as process:
        assert process.stdout.readline() == "locked\n"
        with (
            pytest.raises(RunDirectoryError, match=rf"{tmp_path / 'run'} is in use by process {process.pid}\."),
            lock_run_directory(tmp_path / "run"),
        ):
            pass
        process.kill()
    with lock_run_directory(tmp_path / "run") as path:  # the kernel released it
        assert path == tmp_path / "run"
        with pytest.raises(RunDirectoryError, match=f"process {os.getpid()}"), lock_run_directory(path):
            pass
    with lock_run_directory(tmp_path / "run"):
        pass
