"""Norms on JAX whose sets lie on several devices: no gathering, and the same result."""

import os
import subprocess
import sys

import keras
import pytest

from normwise.kernels import library

if keras.backend.backend() != "jax":
    pytest.skip("the kernels of another backend", allow_module_level=True)
if library.path() is None:
    pytest.skip("the native library was not built", allow_module_level=True)

# Each case: the norm, its options, the shape of x, and the mesh axes that each axis is split over.
PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from normwise import ops

mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("one", "two"))
both = ("one", "two")
CASES = {
    "space": (ops.group_norm, {"groups": 4}, (4, 8, 6, 8), ("one", "two")),
    "space of two": (ops.instance_norm, {}, (3, 8, 6, 8), (None, "one", "two")),
    "whole groups": (ops.group_norm, {"groups": 4}, (4, 5, 6, 8), ("one", None, None, "two")),
    "parts of groups": (ops.group_norm, {"groups": 3}, (4, 3, 6, 12), (None, None, None, both)),
    "one group": (ops.group_norm, {"groups": 1}, (4, 8, 6, 12), (None, "one", None, "two")),
    "channels first": (ops.group_norm, {"groups": 3, "axis": 1}, (4, 12, 6), (None, "one", "two")),
    "no positions": (ops.group_norm, {"groups": 3}, (4, 12), (None, both)),
    "features": (ops.layer_norm, {}, (4, 6, 8), ("one", None, "two")),
    "middle axis": (ops.layer_norm, {"axis": 1}, (4, 8, 6), (None, "one", "two")),
    "root mean square": (ops.rms_norm, {}, (4, 6, 8), (None, None, both)),
}
rng = np.random.default_rng(0)

def check(name, program, arrays, splits, ours):
    # On split arrays it gathers nothing, leaves `ours` of its results as x is, and is right.
    spread = [a if a is None else jax.device_put(a, s) for a, s in zip(arrays, splits)]
    text = program.lower(*spread).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text, (name, text)
    results = program(*spread)
    for there in ours(results):
        assert there.sharding.is_equivalent_to(splits[0], there.ndim), (name, there.sharding)
    for found, one in zip(jax.tree.leaves(results), jax.tree.leaves(program(*arrays))):
        error = np.abs(np.asarray(found) - np.asarray(one)).max()
        # x is of 500 deviations from 0, and so are its roundings.
        assert error <= 1e-3 * (1 + np.abs(one).max()), (name, error)

for name, (norm, options, shape, names) in CASES.items():
    split, whole = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (names, ()))
    x = rng.normal(1e3, 2, shape).astype("float32")
    channels = shape[options.get("axis", -1)]
    parameters = rng.uniform(0.5, 1.5, (2, channels)).astype("float32")

    for given in (parameters, (None, None)):
        def function(x, gamma, beta):
            y, pull = jax.vjp(
                lambda *arrays: norm(*arrays, activation="silu", **options), x, gamma, beta)
            return y, pull(jnp.sin(x))

        splits = [split, whole, whole]
        check(name, jax.jit(function), [x, *given], splits, lambda found: (found[0], found[1][0]))

    # With a residual that lies as x does, and a gamma and a beta for each sample.
    axis = options.get("axis", -1) % len(shape)
    own = NamedSharding(mesh, PartitionSpec(*((*names, None, None)[a] for a in (0, axis))))

    def function(x, gamma, beta, residual):
        (y, total), pull = jax.vjp(
            lambda x, gamma, beta, residual: norm(x, gamma, beta, residual=residual, **options),
            x, gamma, beta, residual)
        return y, total, pull((jnp.sin(x), jnp.cos(x)))

    parameters = rng.uniform(0.5, 1.5, (2, shape[0], channels)).astype("float32")
    residual = rng.normal(0, 1, shape).astype("float32")
    arrays, splits = [x, *parameters, residual], [split, own, own, split]
    check(name, jax.jit(function), arrays, splits, lambda found: (*found[:2], found[2][0]))
print("equal")
"""


def test_nothing_is_gathered_for_a_norm():
    flags = "--xla_force_host_platform_device_count=4"
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )
    assert run.stdout.strip() == "equal", run.stderr
