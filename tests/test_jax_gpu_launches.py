"""What the launches of the Triton kernels on JAX calculate, and which part of a split input.

All is as on a GPU but for the custom call of a launch, in whose place another function stands.
"""

import os
import subprocess
import sys

import keras
import pytest

from normwise.kernels import gpu

if keras.backend.backend() != "jax":
    pytest.skip("the kernels of another backend", allow_module_level=True)
if gpu.missing():
    pytest.skip(gpu.missing(), allow_module_level=True)

# What the launches calculate, one after another, with Triton's interpreter in the place of a GPU.
# It takes tensors of PyTorch.
INTERPRETED = """
import jax, jax.numpy as jnp, numpy as np, torch
from normwise import geometry
from normwise.kernels import composite, jax as kernel, jax_gpu
from normwise.kernels.gpu import launch, plan
from normwise.norm import PER_SAMPLE, Norm, Operands

plan._TILE = plan._MOST = plan._MOST_WHOLE = 64
plan._MOST_BACKWARD, plan._MOST_ALONE, plan._NEIGHBOURS = 32, 300, 8
jax_gpu._why_not_here = lambda: None
jax_gpu.device = lambda: launch.Device("cuda", 90, 32, multiprocessors=4)

def tensor(array):
    array = np.array(array)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)

def call(step, operands, results):
    def back(*arrays):
        buffers = {name: tensor(array) for name, array in zip(operands, arrays)}
        for name, kind in results.items():
            buffers[name] = torch.full(kind.shape, torch.nan, dtype=getattr(torch, kind.dtype.name))
        step.kernel[(step.programs,)](*step.arguments(buffers))
        return [jnp.asarray(buffers[n].float().numpy(), k.dtype) for n, k in results.items()]
    return jax.pure_callback(back, list(results.values()), *operands.values())

jax_gpu._call = call
primitives = kernel._Primitives("interpreted", {"cpu": kernel._ENGINES["cuda"]})
rng = np.random.default_rng(0)

def same(found, expected, tolerance):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        one, other = (np.asarray(a, "float32") for a in (one, other))
        assert one.shape == other.shape
        assert np.abs(one - other).max() <= tolerance * (1 + np.abs(other).max())

GEOMETRIES = {
    "whole": geometry.group((4, 3, 3, 6), -1, 3),
    "columns in pieces": geometry.group((4, 9, 15, 6), -1, 3),
    "runs": geometry.group((4, 6, 40), 1, 3),
    "rows": geometry.layer((4, 3, 24)),
    "rows in pieces": geometry.layer((4, 500)),
    "two axes": geometry.layer((4, 3, 5), (1, 2)),
    "kept": geometry.layer((4, 6, 5), 1),
}
for name, plan_ in GEOMETRIES.items():
    x, dy = rng.normal(3, 2, (2, *plan_.shape)).astype("float32")
    parameters = rng.uniform(0.5, 1.5, (2, *plan_.parameter_shape)).astype("float32")
    for given in (parameters, (None, None), (parameters[0], None)):
        norm = Norm(plan_, "float32", "float32", 1e-3, operands=Operands(*given).lie())

        def run(how):
            def both(x, gamma, beta, dy):
                y, pull = jax.vjp(lambda *a: how(norm, a[0], Operands(*a[1:])), x, gamma, beta)
                return y, pull(dy)
            return jax.jit(both)

        on_gpu = run(primitives.run)(x, *given, dy)
        same(on_gpu, run(composite.run)(x, *given, dy), 2e-5)

    # Only the primitives' batching rule, and second derivatives.
    def curve(how):
        def slope(x):
            return jax.grad(lambda x: jnp.sin(how(norm, x, Operands(given[0]))).sum())(x)
        def along(x):
            return jax.jvp(slope, (x,), (dy,))[1]
        return jax.jit(along)(x)
    same(curve(primitives.run), curve(composite.run), 1e-3)
    many = jnp.stack([x, dy])
    batched = [jax.jit(jax.vmap(lambda x: how(norm, x, Operands(given[0]))))(many)
               for how in (primitives.run, composite.run)]
    same(*batched, 2e-5)

    # Gamma and beta of each sample, and a residual, whose sum goes elsewhere too or does not.
    residual, dsum = rng.normal(3, 2, (2, *plan_.shape)).astype("float32")
    own = rng.uniform(0.5, 1.5, (2, plan_.shape[0], *plan_.parameter_shape)).astype("float32")
    norm = Norm(plan_, "float32", "float32", 1e-3, operands=Operands(PER_SAMPLE, PER_SAMPLE))

    def meant(x, gamma, beta, residual):
        return composite.run(norm, x + residual, Operands(gamma, beta)), x + residual

    results, pull = jax.vjp(meant, x, *own, residual)
    norm = norm.with_operands(norm.operands._replace(residual=True))
    y, statistics, total = jax_gpu.forward(x, *own, residual, norm)
    same((y, total), results, 2e-5)
    for given, same_as in ((dsum, dsum), (jnp.zeros(0), 0 * dsum)):
        found = jax_gpu.backward(total, *own, statistics, dy, given, norm)
        same(found, pull((dy, same_as))[:3], 2e-5)

# Where jit is disabled, and where a NaN is sought.
norm = Norm(GEOMETRIES["rows"], "float32", "float32", 1e-3)
x = rng.normal(3, 2, norm.geometry.shape).astype("float32")

def slope(how, x):
    return jax.grad(lambda x: jnp.sin(how(norm, x, Operands())).sum())(x)

want = slope(composite.run, x)
with jax.disable_jit():
    same(slope(primitives.run, x), want, 2e-5)
with jax.debug_nans(True):
    same(slope(primitives.run, x), want, 2e-5)
    x[0, 0, 0] = np.inf
    try:
        primitives.run(norm, x, Operands())
    except FloatingPointError:
        print("equal")
"""


# A batch that is split over devices: each has launches of its own part, and nothing moves.
SPLIT = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from normwise import geometry
from normwise.kernels import jax as kernel, jax_gpu
from normwise.kernels.gpu import launch
from normwise.norm import Norm, Operands

jax_gpu._why_not_here = lambda: None
jax_gpu.device = lambda: launch.Device("cuda", 90, 32, multiprocessors=4)
launched = []

def call(step, operands, results):
    launched.append({name: each.shape for name, each in {**operands, **results}.items()})
    ends = sum(each.ravel()[0].astype("float32") for each in operands.values())
    return [jnp.full(each.shape, ends, each.dtype) for each in results.values()]

jax_gpu._call = call
primitives = kernel._Primitives("recorded", {"cpu": kernel._ENGINES["cuda"]})
mesh = Mesh(np.array(jax.devices()), ("batch",))
split, whole = (NamedSharding(mesh, PartitionSpec(*names)) for names in (["batch"], []))
GEOMETRIES = (
    geometry.group((8, 33, 40, 64)), geometry.layer((8, 5, 24)), geometry.layer((8, 6, 5), 1))
for plan in GEOMETRIES:
    x, parameter = jnp.ones(plan.shape), jnp.ones(plan.parameter_shape)
    norm = Norm(plan, "float32", "float32", 1e-3, operands=Operands(parameter, parameter).lie())

    def both(x, gamma, beta):
        y, pull = jax.vjp(lambda *a: primitives.run(norm, a[0], Operands(*a[1:])), x, gamma, beta)
        return y, pull(jnp.cos(y))

    arrays = ((x, split), (parameter, whole), (parameter, whole))
    spread = [jax.device_put(*each) for each in arrays]
    launched.clear()
    program = jax.jit(both).lower(*spread).compile()
    part = (2, *plan.shape[1:])
    assert {each[n] for each in launched for n in ("x", "y", "dy", "dx") if n in each} == {part}
    assert {each["statistics"] for each in launched if "statistics" in each} == {
        plan.statistics_shape(part)
    }
    text = program.as_text()
    assert "all-gather" not in text and "all-to-all" not in text
    # dgamma and dbeta of all devices.
    assert "all-reduce" in text
    y, (dx, *_) = program(*spread)
    assert y.sharding.is_equivalent_to(split, y.ndim)
    assert dx.sharding.is_equivalent_to(split, y.ndim)
print("split")
"""


def run_apart(program, **environment):
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


def test_the_launches_calculate_the_norm():
    pytest.importorskip("torch")
    assert run_apart(INTERPRETED, TRITON_INTERPRET="1")[-1] == "equal"


def test_each_device_launches_its_own_part():
    flags = "--xla_force_host_platform_device_count=4"
    assert run_apart(SPLIT, XLA_FLAGS=flags) == ["split"]
