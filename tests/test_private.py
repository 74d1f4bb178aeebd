"""Where a framework lacks a private name the composite runs, right, and `explain` says why."""

import subprocess
import sys

import pytest
from frameworks import BACKEND

import normwise
from normwise import ops
from normwise.kernels import gpu, library, private

NAMES = getattr(private, BACKEND.upper(), {})

# In a process of its own, since each framework's module asks for the names when it is imported.
WITHOUT = """
import importlib, sys
import keras, numpy as np

path = sys.argv[1]
module, _, name = path.rpartition(".")
try:
    owner = importlib.import_module(module)
except ImportError:
    module, _, inner = module.rpartition(".")
    owner = getattr(importlib.import_module(module), inner)

import normwise
from normwise import ops
from normwise.kernels import private

if keras.backend.backend() == "jax":
    # It needs its names itself.
    find = private.find
    private.find = lambda wanted: None if wanted == path else find(wanted)
else:
    delattr(owner, name)

x = np.random.default_rng(0).normal(3, 2, (2, 5, 6)).astype("float32")

def norm(x):
    return ops.layer_norm(x, epsilon=0.5)

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    # The name is asked for in traces only.
    choices = []
    choose = normwise.dispatch.choose
    normwise.dispatch.choose = lambda *args: choices.append(choose(*args)) or choices[-1]
    y = tf.function(norm, autograph=False)(x)
    (choice,) = choices
else:
    y = norm(keras.ops.convert_to_tensor(x))
    choice = normwise.explain(ops.layer_norm, x.shape)
assert choice.kernel in ("composite", "torch"), choice
assert f"lacks {path}, by which normwise learns" in choice.reason, choice
want = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 0.5)
assert np.abs(keras.ops.convert_to_numpy(y) - want).max() < 1e-5
print("right")
"""


@pytest.mark.skipif(library.path() is None, reason="the native library was not built")
@pytest.mark.parametrize("name", NAMES)
def test_without_a_private_name_the_composite_runs(name):
    run = [sys.executable, "-c", WITHOUT, NAMES[name].path]
    process = subprocess.run(run, capture_output=True, text=True)
    assert process.stdout.split() == ["right"], process.stderr


@pytest.mark.skipif(BACKEND != "jax", reason="of JAX's plugin for GPUs")
@pytest.mark.parametrize("name", private.JAX_GPU)
def test_without_a_name_of_the_plugin_the_composite_runs_on_gpus(name, monkeypatch):
    import jax

    from normwise.kernels import jax as kernel
    from normwise.kernels import jax_gpu

    path, find = private.JAX_GPU[name].path, private.find
    others = {each.path: kernel for each in private.JAX_GPU.values() if each.path != path}
    monkeypatch.setattr(
        private,
        "find",
        lambda wanted: None if wanted == path else others.get(wanted) or find(wanted),
    )
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    jax_gpu._why_not_here.cache_clear()
    choice = normwise.explain(ops.layer_norm, (2, 5, 6))
    jax_gpu._why_not_here.cache_clear()
    assert choice.kernel == "composite"
    if not gpu.missing() and not gpu.interpreted():
        assert f"lacks {path}, by which normwise learns how to launch" in choice.reason


@pytest.mark.parametrize("path", ["no.such.module", "os.path.nothing", "os.nothing.deeper"])
def test_what_is_not_there_is_not_found(path):
    assert private.find(path) is None


def test_names_are_found():
    assert private.find("os.path.join") is __import__("os").path.join
    assert private.missing(NAMES) is None
