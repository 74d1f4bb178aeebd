"""Norms on PyTorch where faults were met: batched and frozen gradients, tracers, memory."""

import keras
import pytest
from frameworks import assert_within, to_numpy

if keras.backend.backend() != "torch":
    pytest.skip("PyTorch's situations", allow_module_level=True)

import torch
from torch.autograd import forward_ad

import normwise
from normwise import layers, ops


def samples(*shape, **options):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator, dtype=torch.float64, **options)


def assert_same(found, want, tolerance=1e-12):
    assert_within(to_numpy(found.detach()), to_numpy(want.detach()), tolerance)


def norm(x, *parameters):
    return ops.group_norm(x, *parameters, groups=3, activation="tanh")


# Which of x, gamma and beta a gradient is asked by; the others are frozen, or data.
WANTED = {"x": [0], "gamma": [1], "x and beta": [0, 2], "parameters": [1, 2]}


@pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED.keys())
def test_many_backward_passes_with_something_frozen(wanted):
    tensors = [samples(2, 4, 6), samples(6) + 2, samples(6)]
    for index in wanted:
        tensors[index].requires_grad_()
    asked = [tensors[index] for index in wanted]
    y = norm(*tensors)
    rows = samples(5, *y.shape)

    def pull(dy):
        return torch.autograd.grad(y, asked, dy, retain_graph=True)

    want = [torch.stack(each) for each in zip(*map(pull, rows), strict=True)]
    at_once = torch.autograd.grad(y, asked, rows, is_grads_batched=True, retain_graph=True)
    for found in (torch.func.vmap(pull)(rows), at_once):
        for f, w in zip(found, want, strict=True):
            assert_same(f, w)
            assert not f.requires_grad, "a graph is kept that nobody asked for"


@pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED.keys())
def test_second_gradients_with_something_frozen(wanted):
    tensors = [samples(2, 4, 6), samples(6) + 2, samples(6)]
    for index in wanted:
        tensors[index].requires_grad_()
    asked = [tensors[index] for index in wanted]

    def second(function):
        first = torch.autograd.grad(function(*tensors).sin().sum(), asked, create_graph=True)
        return torch.autograd.grad(sum(g.sin().sum() for g in first), asked)

    def readable(x, gamma, beta):
        y = torch.nn.functional.group_norm(x.movedim(-1, 1), 3, gamma, beta, 1e-3)
        return torch.tanh(y.movedim(1, -1))

    for f, w in zip(second(norm), second(readable), strict=True):
        assert_same(f, w, 1e-10)


# Torch's own, on the way to forward mode.
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_a_dual_cotangent_is_not_dropped():
    x = samples(3, 5, requires_grad=True)

    def tangent(function):
        y = function(x)
        with forward_ad.dual_level():
            dy = forward_ad.make_dual(torch.ones_like(y), samples(3, 5))
            return forward_ad.unpack_dual(torch.autograd.grad(y, x, dy)[0]).tangent

    want = tangent(lambda x: torch.nn.functional.layer_norm(x, (5,), eps=1e-3))
    assert_same(tangent(ops.layer_norm), want, 1e-10)


# Of torch's own tracer.
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("call", [ops.layer_norm, ops.rms_norm, ops.instance_norm, norm])
def test_a_symbolic_graph_takes_any_batch(call):
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(lambda x: call(x), tracing_mode="symbolic")(samples(4, 5, 6))
    x = samples(7, 5, 6)
    assert_same(graph(x), call(x))


# Of torch's own exporter.
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda: layers.GroupNormalization(4),
        layers.InstanceNormalization,
        lambda: lambda x: ops.layer_norm(x, axis=2),
        lambda: lambda x: ops.rms_norm(x, axis=(2, 3)),
        layers.RMSNormalization,
        layers.FilterResponseNormalization,
    ],
)
def test_an_exported_program_takes_any_image(make, strict):
    x, other = samples(2, 8, 5, 8).float(), samples(3, 8, 9, 8).float()

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = make()

        def forward(self, x):
            return self.norm(x)

    module = Module()
    want = module(x), module(other)
    dims = {0: torch.export.Dim("batch"), 2: torch.export.Dim("width")}
    program = torch.export.export(module, (x,), dynamic_shapes={"x": dims}, strict=strict)
    for given, expected in zip((x, other), want, strict=True):
        assert_same(program.module()(given), expected, 1e-5)


def test_a_checkpoint_under_a_mode_is_resumed_without():
    from torch.utils.checkpoint import checkpoint
    from torch.utils.flop_counter import FlopCounterMode

    x = samples(4, 8, 6, requires_grad=True)
    with FlopCounterMode(display=False):
        y = checkpoint(norm, x, use_reentrant=False)
    (found,) = torch.autograd.grad(y.sin().sum(), x)
    (want,) = torch.autograd.grad(norm(x).sin().sum(), x)
    assert_same(found, want, 1e-10)


def test_a_mode_sees_both_passes():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        names = ()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names = (*self.names, function.__name__)
            return function(*args, **(kwargs or {}))

    x = samples(2, 4, 6, requires_grad=True)
    with Seen() as forward:
        y = norm(x)
    with Seen() as backward:
        torch.autograd.grad(y.sum(), x)
    assert any("sqrt" in name for name in forward.names)
    assert any("tanh" in name for name in backward.names)


def test_tensors_whose_memory_is_not_their_values():
    x = samples(4, 6, requires_grad=True)
    zeros = torch._efficientzerotensor((4, 6), dtype=torch.float64)
    assert_same(ops.layer_norm(zeros), torch.zeros(4, 6))
    (dx,) = torch.autograd.grad(ops.layer_norm(x), x, zeros)
    assert_same(dx, torch.zeros(4, 6))
    negative = torch._neg_view(x.detach())
    assert_same(ops.layer_norm(negative), -ops.layer_norm(x))
    gamma = torch._neg_view(torch.ones(6, dtype=torch.float64))
    assert_same(ops.layer_norm(x, gamma), -ops.layer_norm(x))

    freed = samples(4, 6)
    freed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="storage was freed"):
        ops.layer_norm(freed)


def modulated(x, residual, gamma):
    """A residual, a gamma for each sample and the statistics, in one tensor."""
    options = {"groups": 3, "axis": 1, "return_statistics": True}
    results = ops.group_norm(x, gamma, residual=residual, **options)
    return torch.cat([each.reshape(-1) for each in results])


def three(dtype=torch.float64):
    """x, a residual and a gamma for each sample."""
    shapes = (2, 6, 3, 4), (2, 6, 3, 4), (2, 6)
    return [(samples(*shape) + i).to(dtype) for i, shape in enumerate(shapes)]


def composed(*arrays):
    with normwise.use_kernels("composite"):
        return modulated(*arrays)


def slopes(function, arrays, **options):
    arrays = [each.requires_grad_() for each in arrays]
    return torch.autograd.grad(function(*arrays).sin().sum(), arrays, **options)


def lay_channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def lay_in_gaps(x):
    return torch.stack([x, x], -1)[..., 0]


@pytest.mark.parametrize("lay", [lay_channels_last, lay_in_gaps])
@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)])
def test_operands_in_memory_of_any_order(lay, which):
    arrays = three()
    want, wanted = composed(*arrays), slopes(composed, arrays)
    laid = [lay(a.detach()) if i in which else a.detach() for i, a in enumerate(arrays)]
    assert_same(modulated(*laid), want)
    for f, w in zip(slopes(modulated, laid), wanted, strict=True):
        assert_same(f, w)


def test_an_expanded_residual():
    x, _, gamma = three()
    one = samples(6, 1, 1).requires_grad_()

    def function(x, one, gamma):
        return modulated(x, one.expand(2, 6, 3, 4), gamma)

    def readable(x, one, gamma):
        return composed(x, one.expand(2, 6, 3, 4).clone(), gamma)

    found, want = (slopes(f, [x, one, gamma]) for f in (function, readable))
    for f, w in zip(found, want, strict=True):
        assert_same(f, w)


def test_operands_of_meta_tensors():
    x, residual, gamma = (each.to("meta").bfloat16() for each in three())
    # Keras takes tensors to the device in force.
    with keras.device("meta"):
        y, total, mean, _ = ops.instance_norm(
            x, gamma, axis=1, residual=residual, return_statistics=True
        )
    assert [each.shape for each in (y, total, mean)] == [x.shape, x.shape, (2, 6, 1, 1)]
    assert (y.device.type, total.dtype, mean.dtype) == ("meta", torch.bfloat16, torch.float32)


# Torch's own, on the way to forward mode.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_derivatives_of_operands():
    arrays = three()
    directions = [each.cos() for each in arrays]
    want, wanted = torch.func.jvp(composed, tuple(arrays), tuple(directions))
    found, tangent = torch.func.jvp(modulated, tuple(arrays), tuple(directions))
    assert_same(found, want)
    assert_same(tangent, wanted)
    with forward_ad.dual_level():
        pairs = [forward_ad.make_dual(*pair) for pair in zip(arrays, directions, strict=True)]
        assert_same(forward_ad.unpack_dual(modulated(*pairs)).tangent, wanted)

    def second(function):
        first = slopes(function, arrays, create_graph=True)
        return torch.autograd.grad(sum(each.sin().sum() for each in first), arrays)

    for f, w in zip(second(modulated), second(composed), strict=True):
        assert_same(f, w, 1e-10)


def test_transforms_of_operands():
    arrays = [torch.stack([each, each.cos()]) for each in three()]

    def slope(*arrays):
        return torch.func.grad(lambda *a: modulated(*a).sin().sum(), (0, 1, 2))(*arrays)

    for i, one in enumerate(zip(*arrays, strict=True)):
        assert_same(torch.func.vmap(modulated)(*arrays)[i], modulated(*one))
        for f, w in zip(torch.func.vmap(slope)(*arrays), slope(*one), strict=True):
            assert_same(f[i], w)
    found = torch.func.vmap(modulated, (0, None, None))(arrays[0], arrays[1][0], arrays[2][0])
    assert_same(found[1], modulated(arrays[0][1], arrays[1][0], arrays[2][0]))


# Of torch's own compiler and exporter.
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_operands_in_graphs():
    arrays = three(torch.float32)
    want, wanted = modulated(*arrays), slopes(modulated, arrays)
    compiled = torch.compile(modulated, fullgraph=True, backend="aot_eager")
    assert_same(compiled(*arrays), want, 1e-5)
    for f, w in zip(slopes(compiled, arrays), wanted, strict=True):
        assert_same(f, w, 1e-5)

    class Module(torch.nn.Module):
        def forward(self, x, residual, gamma):
            return modulated(x, residual, gamma)

    batch = torch.export.Dim("batch")
    dims = {name: {0: batch} for name in ("x", "residual", "gamma")}
    arrays = [each.detach() for each in arrays]
    program = torch.export.export(Module(), tuple(arrays), dynamic_shapes=dims)
    assert_same(program.module()(*arrays), want, 1e-5)
    more = [torch.cat([each, each]) for each in arrays]
    assert_same(program.module()(*more), modulated(*more), 1e-5)


def test_operands_through_a_checkpoint_and_autocast():
    from torch.utils.checkpoint import checkpoint
    from torch.utils.flop_counter import FlopCounterMode

    arrays = three()
    want = slopes(modulated, arrays)

    def saved(*arrays):
        with FlopCounterMode(display=False):
            return checkpoint(modulated, *arrays, use_reentrant=False)

    for f, w in zip(slopes(saved, arrays), want, strict=True):
        assert_same(f, w, 1e-10)
    single = three(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = modulated(*single)
    assert found.dtype == torch.float32
    assert_same(found, modulated(*single), 0)
