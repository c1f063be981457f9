"""What the tests of models on a mesh share. Their `check_*` functions run in a process with eight CPU devices."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bm_jax.model import init_parameters


def in_eight_devices(run_with_devices, module, call):
    """Run `module.call` there; `run_with_devices` is the fixture of that name."""
    source = f"""
import sys
sys.path[:0] = [{str(Path(__file__).resolve().parent)!r}]
import {module}
{module}.{call}
print("agrees")
"""
    assert "agrees" in run_with_devices(source, devices=8, timeout=580)


def random_parameters(config):
    """Parameters far from where training starts."""
    r = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_parameters(config, jax.random.key(0)))
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * r.standard_normal(leaf.shape)), shapes)


def assert_close(got, wanted, tolerance=1e-10):
    """Every leaf within `tolerance` of its largest value; float64 sums of some thousand terms in another order need 1e-12."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        scale = max(np.abs(b).max(), 1e-6)
        np.testing.assert_allclose(a / scale, b / scale, rtol=0, atol=tolerance, err_msg=jax.tree_util.keystr(path))
