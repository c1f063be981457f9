"""Parameters in a folder and tensors in a file: what is written comes back, whole or in parts, and damage is found."""

from __future__ import annotations

import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from bm_jax import tensor_file
from bm_jax.leaves import CheckpointError, leaves_of
from bm_jax.parameter_folder import FILE, load_parameters, save_parameters, write_parameters
from bm_jax.tensor_file import DTYPES, Kind, TensorFile, TensorFileError, write_tensor_file


def make(seed=0, width=48):
    r = np.random.default_rng(seed)
    return {
        "layers": {"w": jnp.asarray(r.standard_normal((width, 40)), jnp.bfloat16), "b": jnp.arange(width) * seed},
        "odd": jnp.array([jnp.nan, -0.0, jnp.inf, 1e-45], jnp.float32),
        "flag": jnp.array([True, False]),
        "scale": jnp.float32(seed),
        "empty": jnp.zeros((0, 3)),
    }


def bits(tree):
    return {path: (str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()) for path, leaf in leaves_of(tree).items()}


def abstract(tree):
    return jax.eval_shape(lambda: tree)


def test_what_is_saved_comes_back(tmp_path, monkeypatch):
    params = make(4)
    monkeypatch.setattr("bm_jax.parameter_folder.BLOCK_BYTES", 100)  # a row and several rows at a time
    save_parameters(tmp_path / "model/params", params)
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["params"]
    assert bits(load_parameters(tmp_path / "model/params")) == bits(params)
    assert bits(load_parameters(tmp_path / "model/params", abstract(params))) == bits(params)
    assert bits(load_file(tmp_path / "model/params" / FILE)) == bits(params)  # the format's own library
    with pytest.raises(CheckpointError, match="exists already"):
        save_parameters(tmp_path / "model/params", make(5))
    assert bits(load_parameters(tmp_path / "model/params")) == bits(params)


def test_parameters_that_cannot_be_loaded(tmp_path):
    with pytest.raises(CheckpointError, match="there is no such folder"):
        load_parameters(tmp_path / "none")
    save_parameters(tmp_path / "params", make(4))
    with pytest.raises(CheckpointError, match=r"new: absent in the checkpoint, float32\[5\] here"):
        load_parameters(tmp_path / "params", abstract(make(4) | {"new": jnp.zeros(5)}))
    with pytest.raises(CheckpointError, match=r"layers/w: bfloat16\[48, 40\] in the checkpoint, bfloat16\[50, 40\] here"):
        load_parameters(tmp_path / "params", abstract(make(4, width=50)))
    contents = bytearray((tmp_path / "params" / FILE).read_bytes())
    contents[-5] ^= 1
    (tmp_path / "params" / FILE).write_bytes(contents)
    with pytest.raises(CheckpointError, match=rf"contents of .*{FILE} have changed"):
        load_parameters(tmp_path / "params")


def test_a_failed_write_leaves_nothing(small_disk, tmp_path):
    with pytest.raises(CheckpointError, match="disk full"):
        save_parameters(small_disk / "model/params", {"x": np.zeros(20 * 2**18, np.float32)})
    assert list((small_disk / "model").iterdir()) == []

    def blocks():
        yield np.zeros(3, np.float32)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_parameters(tmp_path / "params", {"x": Kind(np.dtype(np.float32), (6,))}, blocks())
    with pytest.raises(ValueError, match="the blocks have 12 bytes, the tensors 24"):
        write_parameters(tmp_path / "params", {"x": Kind(np.dtype(np.float32), (6,))}, [np.zeros(3, np.float32)])
    assert list(tmp_path.glob("params*")) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(CheckpointError, match="cannot write the parameters"):
        save_parameters(tmp_path / "closed/params", make())


READ_SHARDS = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from bm_jax import tensor_file
from bm_jax.config import MeshConfig
from bm_jax.parameter_folder import load_parameters
from bm_jax.sharding import make_mesh

read = []
read_into = tensor_file.TensorFile._read_into
def counted(self, out, name, start):
    read.append(out.size)
    read_into(self, out, name, start)
tensor_file.TensorFile._read_into = counted
for specs in ((P(None, "expert"), P("fsdp")), (P(None, None, "tensor", None, "fsdp"), P(None, ("expert", "tensor")))):
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    shapes = {"experts": ((2, 4, 64, 2, 4096), specs[0]), "matrix": ((256, 4096), specs[1])}
    wanted = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for name, (shape, spec) in shapes.items()
    }
    got = load_parameters(sys.argv[1], wanted)
    for name, (shape, _) in shapes.items():
        assert got[name].sharding == wanted[name].sharding
        np.testing.assert_array_equal(np.asarray(got[name]).reshape(-1), np.arange(np.prod(shape), dtype=np.float32))
size = sum(np.prod(shape) for shape, _ in shapes.values())
print("share read", sum(read) / (2 * size), "largest", max(read) / size)
"""


def test_each_device_reads_its_shards(tmp_path, run_with_devices):
    shapes = {"experts": (2, 4, 64, 2, 4096), "matrix": (256, 4096)}
    save_parameters(
        tmp_path / "params",
        {name: np.arange(np.prod(shape), dtype=np.float32).reshape(shape) for name, shape in shapes.items()},
    )
    output = run_with_devices(READ_SHARDS.replace("sys.argv[1]", repr(str(tmp_path / "params"))), devices=8)
    read, largest = map(float, re.search(r"share read (\S+) largest (\S+)", output).groups())
    assert read <= 1.25  # each distinct shard once, with some of what lies between
    assert largest < 0.25  # a shard is half of a period


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_part_is_what_numpy_takes(data, tmp_path_factory):
    shape = tuple(data.draw(st.lists(st.integers(0, 5), max_size=4)))
    array = np.arange(np.prod(shape, dtype=int), dtype=data.draw(st.sampled_from([np.int8, np.float64]))).reshape(shape)
    path = tmp_path_factory.mktemp("part") / "x.safetensors"
    save_file({"before": np.ones(3), "x": array, "zafter": np.ones(3)}, path)

    def entry(size):
        bounds = st.one_of(st.none(), st.integers(0, size))
        slices = st.builds(slice, bounds, bounds)
        return st.one_of(slices, st.integers(0, size - 1)) if size else slices

    index = tuple(data.draw(entry(size)) for size in shape[: data.draw(st.integers(0, len(shape)))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_file, "SMALL", data.draw(st.sampled_from([0, 16, 2**16])))
        got = TensorFile(path).read("x", index)
    assert got.dtype == array.dtype
    np.testing.assert_array_equal(got, array[index])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_type_is_written_as_the_formats_library_reads_it(dtype, tmp_path):
    array = np.random.default_rng(0).integers(0, 2, (3, 5)).astype(dtype)
    written = write_tensor_file(tmp_path / "x.safetensors", {"x": Kind(array.dtype, array.shape)}, [array[:2], array[2:]])
    assert written.bytes == (tmp_path / "x.safetensors").stat().st_size
    assert bits(load_file(tmp_path / "x.safetensors")) == bits({"x": array})


def test_a_type_that_the_format_lacks(tmp_path):
    with pytest.raises(ValueError, match="tensor x is complex64"):
        write_tensor_file(tmp_path / "x.safetensors", {"x": Kind(np.dtype(np.complex64), (1,))}, [])


def test_a_file_that_shrinks_while_it_is_open(tmp_path):
    save_file({"x": np.ones(1000)}, tmp_path / "x.safetensors")
    file = TensorFile(tmp_path / "x.safetensors")
    os.truncate(tmp_path / "x.safetensors", 500)
    with pytest.raises(TensorFileError, match=r"x\.safetensors: tensor x cannot be read: the file has become shorter"):
        file.read("x")
