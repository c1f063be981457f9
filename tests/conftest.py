"""What every test shares: one CPU device, shape annotations checked at run time, and a way to ask for more devices."""

from __future__ import annotations

import functools
import gc
import inspect
import os
import shutil
import subprocess
import sys
import typing
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

# Before jax starts. Several host devices would slow every test, and a subprocess that a test starts would inherit them;
# the tests that need several ask for a process of their own (`run_with_devices`).
os.environ["JAX_PLATFORMS"] = os.environ.get("TEST_PLATFORM", "cpu")  # "cuda" runs the kernels themselves
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined
os.environ.pop("XLA_FLAGS", None)
os.environ.pop("PALLAS_KERNELS_IMPLEMENTATION", None)

import jaxtyping


def check_annotations(function: Callable) -> Callable:
    """Check the arguments whose annotations name shapes; typeguard 4 cannot see the functions jaxtyping makes."""

    def names_a_shape(hint: object) -> bool:
        kinds = (hint, *typing.get_args(hint))
        return any(isinstance(kind, type) and issubclass(kind, jaxtyping.AbstractArray) for kind in kinds)

    signature = inspect.signature(function)
    hints = {name: p.annotation for name, p in signature.parameters.items() if names_a_shape(p.annotation)}

    @functools.wraps(function)
    def checked(*args, **kwargs):
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            if name in hints and not isinstance(value, hints[name]):
                raise TypeError(f"{name} is not {hints[name]}")
        return function(*args, **kwargs)

    return checked


# Shape annotations (`Hidden`, `Tokens`, ...) of these modules are checked while they are traced.
CHECKED = ["shapes", "layers", "mamba", "attention", "moe", "routing", "cache", "model", "sharding"]
jaxtyping.install_import_hook([f"bm_jax.{name}" for name in CHECKED], "conftest.check_annotations")

import jax  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True, scope="session")
def compiled_once(tmp_path_factory):
    """What tests and processes that they start have compiled is kept for the next ones."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.3,
    }
    for name, value in settings.items():
        os.environ[name.upper()] = str(value)
        jax.config.update(name, value)


@pytest.fixture(autouse=True, scope="module")
def forget_compiled():
    """Drop a module's compiled programs after it: each keeps some memory maps, and Linux allows a process 65,530."""
    yield
    jax.clear_caches()


@pytest.fixture
def x64():
    """float64 inside the test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def run_with_devices() -> Callable[..., str]:
    """Run Python source in a process with several CPU devices; its standard output, or a failure showing its errors."""

    def run(source: str, devices: int = 8, timeout: float = 300) -> str:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "XLA_FLAGS": "--xla_backend_optimization_level=0",  # compiling for several devices is slow
            "TF_CPP_MIN_LOG_LEVEL": "2",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        command = [sys.executable, "-W", "error", "-c", source]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 8 MB and 400 files."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m,nr_inodes=400", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs to be root")
    yield path
    subprocess.run(["umount", str(path)], check=True)
    # Orbax leaves coroutines of a save that failed, which a later test's garbage collection would complain of.
    with warnings.catch_warnings(action="ignore"):
        gc.collect()
