"""The Triton kernels on a GPU as PyTorch and JAX call them, held against the float64 reference.

    pytest -m gpu tests/test_gpu_device.py

Without a GPU all are skipped, but TRITON_INTERPRET=1 runs most of them on PyTorch's CPU tensors.
"""

import functools
import importlib
import inspect
import itertools
import math
import pkgutil
from typing import NamedTuple

import keras
import numpy as np
import pytest
from frameworks import allow_torch_compile, assert_within, gradients, second_gradients, to_numpy
from reference import EPS, SMALLEST
from reference import Norm as Reference

from normwise import geometry, kernels, ops
from normwise.activations import IDENTITY, Activation
from normwise.kernels import gpu
from normwise.norm import PER_SAMPLE, SHARED, Norm, Operands

BACKEND = keras.backend.backend()
if BACKEND == "torch":
    import torch
elif BACKEND == "jax":
    import jax

INTERPRETED = gpu.interpreted()
EPSILON = 1e-3


def lacks() -> str | None:
    """What keeps the tests from running here, or None."""
    if BACKEND not in ("torch", "jax"):
        return f"Keras's backend {BACKEND} calls no kernels for a GPU"
    if gpu.missing():
        return gpu.missing()
    if BACKEND == "jax" and INTERPRETED:
        return "TRITON_INTERPRET is set, and JAX calls compiled kernels only"
    if BACKEND == "jax":
        return None if jax.default_backend() == "gpu" else "JAX sees no GPU"
    if torch.cuda.is_available() or INTERPRETED:
        return None
    return "torch sees no GPU, and TRITON_INTERPRET=1 is not set"


LACKS = lacks()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(LACKS is not None, reason=str(LACKS)),
    # Here come versions of frameworks that no other machine has, and what they warn of.
    pytest.mark.filterwarnings("default", "ignore:__array__ implementation:DeprecationWarning"),
]
on_torch = pytest.mark.skipif(BACKEND != "torch", reason="PyTorch alone has this")
needs_gpu = pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter runs on no GPU")


def multiprocessors() -> int:
    if INTERPRETED or LACKS is not None:
        return 4  # as torch_gpu.py has it for the interpreter
    if BACKEND == "jax":
        return jax.devices()[0].core_count
    return torch.cuda.get_device_properties(0).multi_processor_count


class Path(NamedTuple):
    """A norm: group norm, or layer norm where groups is None."""

    shape: tuple
    axis: int = -1
    groups: int | None = None

    @property
    def plan(self):
        if self.groups is None:
            return geometry.layer(self.shape, self.axis)
        return geometry.group(self.shape, self.axis, self.groups)

    @property
    def labels(self):
        """Those of reference.py, which takes a second for 2**18 elements, in a moment."""
        index = np.indices(self.shape, sparse=True)
        axis = self.axis % len(self.shape)
        if self.groups is not None:
            labels = index[0] * self.groups + index[axis] // (self.shape[axis] // self.groups)
        else:
            labels = 0
            for kept in range(len(self.shape)):
                if kept != axis:
                    labels = labels * self.shape[kept] + index[kept]
        return np.broadcast_to(labels, self.shape)


# Enough for each program of a loop to go through it more than once.
MANY = multiprocessors()
PATHS = {
    "rows": Path((9 * MANY, 1030)),
    "short rows": Path((703, 10)),
    "rows of groups": Path((37, 60), -1, 3),
    "long rows": Path((3, 9001)),
    "longer rows": Path((3, 40001)),
    "runs": Path((3, 6, 15), 1, 3),
    "long runs": Path((3, 4, 16400), 1, 4),
    "long runs of members": Path((3, 36, 1025), 1, 4),
    "runs in pieces": Path((2, 6, 50021), 1, 2),
    "columns": Path((3, 15, 12), -1, 4),
    "columns of one": Path((3, 333, 36), -1, 36),
    "columns in pieces": Path((2, 4099, 36), -1, 9),
    "columns of many channels": Path((2, 300, 200), -1, 4),
    "before and after": Path((2, 30, 6, 50), 2, 3),
    "kept": Path((3 * MANY, 5, 35), 1),
    "kept, in blocks backward": Path((2, 300, 40), 1),
    "kept, in blocks": Path((2, 1100, 40), 1),
}


def paths(*names):
    return pytest.mark.parametrize("path", [PATHS[name] for name in names], ids=names)


every_path = paths(*PATHS)
# One of each pattern.
few_paths = paths("short rows", "runs", "columns of many channels", "kept, in blocks backward")

erf = np.vectorize(math.erf, otypes=[float])
ACTIVATIONS = {
    "identity": (IDENTITY, lambda z: z),
    "relu": (Activation("leaky_relu"), lambda z: np.maximum(z, 0)),
    "leaky_relu": (Activation("leaky_relu", 0.3), lambda z: np.where(z < 0, 0.3 * z, z)),
    "sigmoid": (Activation("sigmoid"), lambda z: 1 / (1 + np.exp(-z))),
    "tanh": (Activation("tanh"), np.tanh),
    "silu": (Activation("silu"), lambda z: z / (1 + np.exp(-z))),
    "gelu": (Activation("gelu"), lambda z: 0.5 * z * (1 + erf(z / math.sqrt(2)))),
    "gelu_tanh": (
        Activation("gelu_tanh"),
        lambda z: 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    ),
}


class How(NamedTuple):
    """All that a call is besides its geometry and its tensors."""

    centred: bool = True
    activation: str = "identity"
    epsilon: float = EPSILON


PLAIN = How()


def calls(path: Path, how: How = PLAIN):
    """The kernels as a function of x, gamma and beta."""

    def function(x, gamma=None, beta=None):
        kernel = next(each for each in kernels.listed() if each.name == gpu.NAME)
        operands, dtype = Operands(gamma, beta), keras.backend.standardize_dtype(x.dtype)
        activation, _ = ACTIVATIONS[how.activation]
        norm = Norm(path.plan, dtype, dtype, how.epsilon, how.centred, activation, operands.lie())
        assert kernel.why_not(norm, x) is None
        return kernel.run(norm, x, operands)

    return function


def tensors(path: Path, dtype="float32", mean=1.0, present=(True, True)):
    """[x, gamma, beta], None for what is absent, and dy."""
    rng = np.random.default_rng(0)
    x, dy = (
        keras.ops.cast(keras.ops.convert_to_tensor(each.astype("float32")), dtype)
        for each in (rng.normal(mean, 2.0, path.shape), rng.normal(0.0, 1.0, path.shape))
    )
    parameters = rng.uniform(0.5, 1.5, (2, *path.plan.parameter_shape)).astype("float32")
    parameters = (
        keras.ops.convert_to_tensor(parameter) if there else None
        for parameter, there in zip(parameters, present, strict=True)
    )
    return [x, *parameters], dy


def both_passes(function, arrays, dy):
    """y and the gradients by what is there of x, gamma and beta, as NumPy arrays."""
    there = [array is not None for array in arrays]

    def of_given(*given):
        each = iter(given)
        return function(*(next(each) if is_there else None for is_there in there))

    return gradients(of_given, list(itertools.compress(arrays, there)), dy)


def assert_right(path, arrays, dy, y, found, how: How = PLAIN, times=1):
    """Hold y and the gradients against the reference.

    Args:
        times: how often x was repeated along its positions, and so was what gamma and beta get.
    """
    dtype = keras.backend.standardize_dtype(arrays[0].dtype)
    x, gamma, beta = (None if array is None else to_numpy(array) for array in arrays)
    axes = path.plan.parameter_axes
    right = Reference(x, gamma, beta, path.labels, axes, how.epsilon, how.centred)
    eps, dy = EPS["float32"], np.asarray(to_numpy(dy), np.float64)

    # Through the activation: the error of z, the slope's of that, and a few roundings more.
    _, function = ACTIVATIONS[how.activation]
    z, step = right.y, 1e-5
    dz, want = dy, function(z)
    y_tolerance, dz_tolerance = right.y_tolerance(eps), np.zeros_like(z)
    if how.activation != "identity":
        dz = dy * (function(z + step) - function(z - step)) / (2 * step)
        y_tolerance = 1.2 * y_tolerance + 16 * eps * (1 + np.abs(z))
        dz_tolerance = np.abs(dy) * y_tolerance

    # The interpreter rounds to bfloat16 towards 0.
    rounding = 0 if dtype == "float32" else EPS[dtype] * (2 if INTERPRETED else 1)
    smallest = SMALLEST[dtype]
    assert_within(y, want, y_tolerance + rounding * np.abs(want) + smallest, "y")

    given = [array is not None for array in arrays]
    wanted = right.gradients(dz)
    of_terms = right.gradient_tolerances(dz, eps)
    of_slope = right.gradient_tolerances(dz_tolerance, 1, units=1)
    names, factors = ("dx", "dgamma", "dbeta"), (1, times, times)
    every = zip(names, factors, wanted, of_terms, of_slope, strict=True)
    for gradient, each in zip(found, itertools.compress(every, given), strict=True):
        name, factor, want, tolerance, more = each
        tolerance = tolerance + more
        if name == "dx":
            tolerance = tolerance + rounding * np.abs(want) + smallest
        assert_within(gradient, factor * want, factor * tolerance, name)


def check(path, dtype="float32", how=PLAIN, mean=1.0, present=(True, True)):
    arrays, dy = tensors(path, dtype, mean, present)
    y, found = both_passes(calls(path, how), arrays, dy)
    assert_right(path, arrays, dy, y, found, how)


def test_every_kernel_is_met():
    from normwise.kernels.gpu import launch, plan

    met = set()
    for path in PATHS.values():
        lie = Operands(True, True).lie()
        norm = Norm(path.plan, "float32", "float32", EPSILON, operands=lie)
        device = launch.Device("cuda", 90, 32, multiprocessors())
        for each in (plan.forward(norm, device), plan.backward(norm, device, True, True)):
            met |= {(one.kernel.fn.__module__, one.kernel.fn.__name__) for one in each.launches}
    there = set()
    for module in pkgutil.iter_modules(gpu.__path__, f"{gpu.__name__}."):
        if not module.name.endswith(".arithmetic"):
            for name, value in vars(importlib.import_module(module.name)).items():
                function = getattr(value, "fn", None)
                if getattr(function, "__module__", None) == module.name and name[0] != "_":
                    # A kernel takes buffers, which are in capitals and come first.
                    first = next(iter(inspect.signature(function).parameters))
                    there |= {(module.name, name)} if first.isupper() else set()
    assert met == there


@every_path
@pytest.mark.parametrize("mean", [1.0, 1e4])
def test_float32(path, mean):
    check(path, mean=mean)


@every_path
def test_bfloat16_without_a_mean_and_activated(path):
    check(path, "bfloat16", How(centred=False, activation="silu"))


@few_paths
def test_float16(path):
    check(path, "float16")


@few_paths
@pytest.mark.parametrize("present", [(True, False), (False, True), (False, False)])
def test_absent_parameters(path, present):
    check(path, present=present)


@paths("short rows")
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(path, name):
    check(path, how=How(activation=name))


@every_path
def test_equal_elements_at_epsilon_0(path):
    arrays, dy = tensors(path)
    arrays[0] = keras.ops.full(path.shape, 3.7, "float32")
    y, found = both_passes(calls(path, How(epsilon=0.0)), arrays, dy)
    beta = to_numpy(arrays[2])
    shape = [n if a in path.plan.parameter_axes else 1 for a, n in enumerate(path.shape)]
    assert_within(y, np.broadcast_to(beta.reshape(shape), path.shape), 0, "y")
    assert_within(found[0], np.zeros(path.shape), 0, "dx")
    assert all(np.isfinite(gradient).all() for gradient in found)


@paths("rows", "longer rows", "long runs", "runs in pieces", "columns in pieces", "kept")
def test_two_runs_give_the_same_bits(path):
    arrays, dy = tensors(path, "bfloat16")
    (y, found), (again, found_again) = (both_passes(calls(path), arrays, dy) for _ in range(2))
    for one, other in zip([y, *found], [again, *found_again], strict=True):
        np.testing.assert_array_equal(one, other)


@few_paths
def test_second_gradients(path):
    arrays, dy = tensors(path)
    rng = np.random.default_rng(1)
    direction = rng.normal(size=path.shape).astype("float32")
    found = second_gradients(calls(path), arrays, dy, direction)
    x, gamma, beta, dy = (to_numpy(array).astype("float64") for array in (*arrays, dy))

    def first(step):
        parts = (gamma, beta, path.labels, path.plan.parameter_axes, EPSILON)
        return Reference(x + step * direction, *parts).gradients(dy)

    # The derivative of dx along a direction is that of the gradients along the same.
    step = 1e-4
    for one, ahead, back in zip(found, first(step), first(-step), strict=True):
        want = (ahead - back) / (2 * step)
        assert_within(one, want, 1e-4 * (1 + np.abs(want).max()))


def test_vmap():
    """A batch of batches: y, and the gradient by x."""
    path = Path((8, 15, 6), -1, 3)
    arrays, dy = tensors(path)
    x, dy_of_each = (keras.ops.reshape(array, (4, 2, 15, 6)) for array in (arrays[0], dy))

    def norm(x):
        return ops.group_norm(x, *arrays[1:], groups=3, epsilon=EPSILON)

    def loss(x, dy):
        return (norm(x) * dy).sum()

    vmap, grad = (jax.vmap, jax.grad) if BACKEND == "jax" else (torch.func.vmap, torch.func.grad)
    y, dx = (
        to_numpy(each).reshape(path.shape)
        for each in (vmap(norm)(x), vmap(grad(loss))(x, dy_of_each))
    )
    _, found = both_passes(calls(path), arrays, dy)
    assert_right(path, arrays, dy, y, [dx, *found[1:]])


@on_torch
@every_path
@pytest.mark.parametrize(("lies", "dtype"), [(SHARED, "float32"), (PER_SAMPLE, "bfloat16")])
def test_a_residual(path, lies, dtype):
    """Both passes of the engine, with gamma and beta of all samples and of each."""
    from normwise.kernels import torch_gpu

    (x, *_), dy = tensors(path, dtype)
    (residual, *_), dsum = tensors(path, dtype, mean=2.0)
    samples = path.shape[:1] if lies == PER_SAMPLE else ()
    parameters = np.random.default_rng(1).uniform(
        0.5, 1.5, (2, *samples, *path.plan.parameter_shape)
    )
    parameters = keras.ops.convert_to_tensor(parameters.astype("float32"))
    norm = Norm(path.plan, dtype, dtype, EPSILON, operands=Operands(lies, lies, residual=True))
    assert gpu.why_not(norm) is None
    plan = torch_gpu.engine(x.device).plan(norm)

    y, total, dx, dx_with_dsum = (torch.full_like(x, torch.nan) for _ in range(4))
    shape = path.plan.statistics_shape(path.shape)
    statistics, gradients = (
        parameters.new_full(shape, torch.nan),
        torch.full_like(parameters, torch.nan),
    )
    plan.forward(*plan.buffers(x, *parameters, y, statistics, residual, total))
    given = (total, *parameters, statistics, dy)
    plan.backward(*plan.buffers(*given, dx_with_dsum, *gradients, dsum))
    plan.backward(*plan.buffers(*given, dx, *gradients, None))

    rounding = EPS[dtype] * (2 if INTERPRETED else 1)
    for found, *terms in ((total, x, residual), (dx_with_dsum, dx, dsum)):
        first, second = (to_numpy(each).astype("float64") for each in terms)
        # The gradient is not rounded before dsum comes to it, as dx here is.
        allowed = rounding * (np.abs(first) + np.abs(first + second))
        assert_within(to_numpy(found), first + second, allowed)
    for each in [slice(i, i + 1) for i in range(path.shape[0])] if samples else [slice(None)]:
        of_each = [p[each][0] if samples else p for p in (*parameters, *gradients)]
        part = path._replace(shape=tuple(x[each].shape))
        found = map(to_numpy, (dx[each], *of_each[2:]))
        assert_right(part, [total[each], *of_each[:2]], dy[each], to_numpy(y[each]), found)


@on_torch
@paths("short rows", "runs in pieces", "columns of many channels", "kept")
def test_misaligned(path):
    """Tensors that begin between the places where 16-byte loads may."""
    arrays, dy = tensors(path, "bfloat16")

    def shifted(tensor):
        longer = tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape)
        longer.copy_(tensor)
        assert longer.data_ptr() % 16
        return longer

    y, found = both_passes(calls(path), list(map(shifted, arrays)), shifted(dy))
    assert_right(path, arrays, dy, y, found)


@on_torch
@pytest.mark.parametrize("groups", [None, 3])
def test_channels_last(groups):
    path = Path((2, 6, 5, 7), 1, groups)
    arrays, dy = tensors(path)
    form = torch.channels_last
    x, dy_of_form = (tensor.contiguous(memory_format=form) for tensor in (arrays[0], dy))
    assert calls(path)(x, *arrays[1:]).is_contiguous(memory_format=form)
    y, found = both_passes(calls(path), [x, *arrays[1:]], dy_of_form)
    assert_right(path, arrays, dy, y, found)


@on_torch
@few_paths
def test_torch_compile(path):
    allow_torch_compile(True)
    norm = (
        ops.layer_norm
        if path.groups is None
        else functools.partial(ops.group_norm, groups=path.groups)
    )
    function = functools.partial(norm, axis=path.axis, epsilon=EPSILON)
    arrays, dy = tensors(path)
    y, found = both_passes(torch.compile(function, fullgraph=True, dynamic=False), arrays, dy)
    assert_right(path, arrays, dy, y, found)


@on_torch
@needs_gpu
@few_paths
def test_another_stream(path):
    """The kernels wait for what came before on the current stream."""
    arrays, dy = tensors(path)
    given = [torch.zeros_like(tensor) for tensor in (*arrays, dy)]
    slow = torch.ones(8192, 8192, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(4):
            slow = slow @ slow
        for target, source in zip(given, (*arrays, dy), strict=True):
            target.copy_(source)
        y, found = both_passes(calls(path), given[:3], given[3])
    assert_right(path, arrays, dy, y, found)


@on_torch
@needs_gpu
@few_paths
def test_a_cuda_graph(path):
    """Both passes, recorded on other numbers than they are played on."""
    arrays, dy = tensors(path)
    given = [torch.zeros_like(tensor).requires_grad_() for tensor in arrays]
    dy_given = torch.zeros_like(dy)

    def run():
        y = calls(path)(*given)
        return y, torch.autograd.grad(y, given, dy_given)

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        with torch.cuda.graph(graph, stream=stream):
            y, found = run()
    torch.cuda.synchronize()
    with torch.no_grad():
        for target, source in zip((*given, dy_given), (*arrays, dy), strict=True):
            target.copy_(source)
    graph.replay()
    assert_right(path, arrays, dy, to_numpy(y.detach()), map(to_numpy, found))


# What is repeated, and along which axis.
LARGE = {
    "rows": (Path((1024, 1024)), 0),
    "runs": (Path((1, 64, 1024), 1, 8), 2),
    "columns": (Path((1, 1024, 64), -1, 8), 1),
    "kept": (Path((1, 64, 1024), 1), 2),
}


@on_torch
@needs_gpu
@pytest.mark.parametrize(("block", "axis"), LARGE.values(), ids=LARGE.keys())
def test_more_elements_than_int32_counts(block, axis):
    """Of a block that is repeated the statistics are those of one block, and so is what follows."""
    arrays, dy = tensors(block, "bfloat16")
    times = 2**31 // arrays[0].numel() + 1
    bytes_needed = 5 * 2 * times * arrays[0].numel()
    torch.cuda.empty_cache()
    if (there := torch.cuda.mem_get_info()[0]) < bytes_needed:
        pytest.skip(
            f"{bytes_needed >> 30} GiB of GPU memory are needed, and {there >> 30} are free"
        )
    repeats = [times if each == axis else 1 for each in range(len(block.shape))]
    x, dy_repeated = arrays[0].repeat(repeats).requires_grad_(), dy.repeat(repeats)
    assert x.numel() > 2**31
    given = [x, *(parameter.requires_grad_() for parameter in arrays[1:])]
    y = calls(block._replace(shape=tuple(x.shape)))(*given)
    dx, *dparameters = torch.autograd.grad(y, given, dy_repeated)
    size = block.shape[axis]
    arrays = [tensor.detach() for tensor in arrays]
    for start in (0, times // 2 * size, (times - 1) * size):
        of_block = (to_numpy(t.detach().narrow(axis, start, size)) for t in (y, dx))
        y_of_block, dx_of_block = of_block
        found = [dx_of_block, *map(to_numpy, dparameters)]
        assert_right(block, arrays, dy, y_of_block, found, times=times)
