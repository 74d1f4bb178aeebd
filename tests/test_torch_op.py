"""The kernels as operators in the graphs of torch.compile."""

import keras
import numpy as np
import pytest

if keras.backend.backend() != "torch":
    pytest.skip("of torch.compile", allow_module_level=True)

import torch
from frameworks import allow_torch_compile, assert_within, to_numpy

import normwise
from normwise import kernels, layers, ops
from normwise.kernels import library

if library.path() is None:
    pytest.skip("the native library was not built", allow_module_level=True)


@pytest.fixture(autouse=True)
def _fresh():
    allow_torch_compile(jit_compile=True)


def samples(*shape):
    return torch.tensor(np.random.default_rng(0).normal(0.5, 1, shape).astype("float32"))


def parameters():
    random = np.random.default_rng(1)
    return [torch.tensor(random.uniform(0.5, 1.5, 6)).float().requires_grad_() for _ in "gb"]


def group(x, gamma=None, beta=None):
    return ops.group_norm(x, gamma, beta, axis=1, groups=3, activation="silu")


def layer(x, gamma=None, beta=None):
    return ops.layer_norm(x, gamma, beta, axis=1)


def instance(x, gamma=None, beta=None):
    return ops.instance_norm(x, gamma, beta, axis=1, epsilon=1e-5)


def added(x, gamma=None, beta=None):
    """A norm of a sum, with an offset of gamma and a gamma for each sample."""
    gamma = x.mean((2, 3)) if gamma is None else gamma
    return ops.instance_norm(x, gamma, beta, axis=1, residual=x.cos(), gamma_offset=1.0)[0]


NORMS = pytest.mark.parametrize("norm", [group, layer, instance])


class Graphs:
    """A backend of torch.compile that keeps the names of what its graphs call."""

    def __init__(self):
        self.called = []

    def __call__(self, graph, inputs):
        self.called += [str(node.target) for node in graph.graph.nodes]
        return graph.forward


def called(function, *args):
    """What is called in the graph of a function, which has to be one."""
    graphs = Graphs()
    torch.compile(function, fullgraph=True, backend=graphs)(*args)
    return " ".join(graphs.called)


@NORMS
def test_a_graph_has_the_kernel_as_one_operator(norm):
    with torch.no_grad():
        assert "normwise.forward" in called(norm, samples(2, 6, 5, 4))


@NORMS
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients(norm, backend, layout):
    found, want = ([samples(2, 6, 5, 4), *parameters()] for _ in range(2))
    for inputs, function in (
        (found, torch.compile(norm, fullgraph=True, backend=backend)),
        (want, norm),
    ):
        inputs[0] = inputs[0].to(memory_format=layout).requires_grad_()
        inputs.append(function(*inputs[:3]))
        inputs[3].square().sum().backward()
    assert_within(to_numpy(found[3].detach()), to_numpy(want[3].detach()), 1e-6)
    for one, other in zip(found[:3], want[:3], strict=True):
        assert_within(to_numpy(one.grad), to_numpy(other.grad), 1e-5)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_what_needs_no_gradient_gets_none(frozen):
    inputs = [samples(2, 6, 5, 4).requires_grad_(), *parameters()]
    inputs[frozen] = inputs[frozen].detach()
    torch.compile(group, fullgraph=True, backend="aot_eager")(*inputs).sum().backward()
    assert [t.grad is None for t in inputs] == [i == frozen for i in range(3)]


def test_memory_of_any_order():
    """Of x, of dy and of the parameters, which an engine reads by their addresses."""
    wide = torch.stack(parameters(), dim=-1).detach()
    inputs = [samples(4, 5, 6, 2).permute(3, 2, 1, 0), *wide.unbind(-1)]
    found, want = ([t.requires_grad_() for t in map(torch.Tensor.detach, inputs)] for _ in "fw")
    dy = samples(4, 5, 6, 2).cos().permute(3, 2, 1, 0)
    torch.compile(group, fullgraph=True, backend="aot_eager")(*found).backward(dy)
    group(*want).backward(dy)
    for one, other in zip(found, want, strict=True):
        assert_within(to_numpy(one.grad), to_numpy(other.grad), 1e-5)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_other_precisions(dtype):
    x = samples(2, 6, 5, 4).to(getattr(torch, dtype))
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert y.dtype == x.dtype
    assert torch.equal(y, layer(x))


@pytest.mark.parametrize("norm", [group, layer, instance, added])
def test_one_graph_for_images_of_all_sizes(norm):
    graphs = Graphs()
    function = torch.compile(norm, fullgraph=True, dynamic=True, backend=graphs)
    for shape in ((2, 6, 5, 4), (3, 6, 9, 5), (4, 6, 7, 8)):
        x = samples(*shape)
        assert torch.equal(function(x), norm(x))
    assert graphs.called.count("normwise.forward") == 1


def test_a_layer_whose_sizes_are_open():
    made = layers.GroupNormalization(groups=3, axis=1)
    made.build((None, 6, None))
    function = torch.compile(made, fullgraph=True, dynamic=True, backend="aot_eager")
    for extent in (4, 5, 9):
        x = samples(2, 6, extent)
        assert torch.equal(function(x), made(x))


TRANSFORMS = {
    "grad": lambda f: torch.func.grad(lambda x: f(x).square().sum()),
    "vmap": torch.func.vmap,
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x.cos(),))[1],
    "hessian": lambda f: lambda x: torch.func.hessian(lambda x: f(x).square().sum())(x[:1, :, :2]),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_torch_func_inside_a_graph(name):
    """It sees into torch's own functions only, and an operator would be silently wrong."""
    x = samples(2, 6, 3)
    norm = (lambda x: layer(x[None])[0]) if name == "vmap" else layer
    transformed = TRANSFORMS[name](norm)
    found = torch.compile(transformed, fullgraph=True, backend="aot_eager")(x)
    with normwise.use_kernels("composite"):
        want = transformed(x)
    assert_within(to_numpy(found.detach()), to_numpy(want.detach()), 1e-5)


def test_rows_that_inductor_is_faster_at_are_left_to_it():
    with torch.no_grad():
        assert "normwise" not in called(ops.layer_norm, samples(8, 6))
        assert "normwise" not in called(ops.rms_norm, samples(2**12, 2**8))
        assert "normwise" in called(ops.layer_norm, samples(2**12, 2**8))


def test_an_engine_that_was_added_is_not_taken_for_the_native_one():
    engine = kernels.Engine("other", lambda norm: None, None, None)
    kernels.add(engine)
    try:
        with torch.no_grad():
            # Its passes are None, and would raise.
            assert "normwise.forward" in called(group, samples(2, 6, 5, 4))
    finally:
        kernels.remove("other")


def test_the_operators_keep_their_promises():
    inputs = (samples(2, 6, 5, 4), *parameters(), "1 1 2 0 1 0 silu", 3, 1e-3, 0.0)
    torch.library.opcheck(torch.ops.normwise.forward, inputs, test_utils="test_schema")
    torch.library.opcheck(torch.ops.normwise.forward, inputs, test_utils="test_faketensor")
    _, statistics = torch.ops.normwise.forward(*inputs)
    inputs = (*inputs[:3], samples(2, 6, 5, 4), statistics, [True, False], *inputs[3:])
    torch.library.opcheck(torch.ops.normwise.backward, inputs, test_utils="test_faketensor")
