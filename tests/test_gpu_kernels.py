"""The Triton kernels by themselves, in Triton's interpreter, against the float64 reference.

    TRITON_INTERPRET=1 KERAS_BACKEND=torch python -m pytest tests/test_gpu_kernels.py

Blocks are made small, so that small inputs take every way through the kernels. The interpreter cuts
float32 to bfloat16 where a GPU rounds; all else is as there but for the order of sums.
"""

import dataclasses

import keras
import numpy as np
import pytest
import reference
from frameworks import assert_within

from normwise import geometry
from normwise.activations import IDENTITY, NAMES, Activation
from normwise.kernels import gpu
from normwise.norm import PER_SAMPLE, SHARED, Norm, Operands

if gpu.missing() or not gpu.interpreted() or keras.backend.backend() != "torch":
    pytest.skip(
        gpu.missing() or "set TRITON_INTERPRET=1 and KERAS_BACKEND=torch", allow_module_level=True
    )

import torch

from normwise.kernels.gpu import plan
from normwise.kernels.gpu.launch import Device

DEVICE = Device("cuda", 90, 32, multiprocessors=2)
EPS = {**reference.EPS, "bfloat16": 2.0**-7}
SMALL = {
    "_TILE": 64,
    "_MOST": 128,
    "_MOST_BACKWARD": 64,
    "_MOST_WHOLE": 128,
    "_MOST_ALONE": 600,
    "_NEIGHBOURS": 8,
    "_TILES": 2,
    "_ROWS": 2,
}

# Of each pattern shapes for every way through its kernels; with the small blocks.
GROUPS = {
    "columns whole": ((3, 3, 3, 12), -1, 4),
    "columns whole, instances": ((3, 3, 2, 5), -1, 5),
    "columns in pieces": ((2, 9, 15, 10), -1, 5),
    "columns in pieces, one group": ((2, 100, 3), -1, 1),
    "columns in pieces, many channels": ((2, 20, 80), -1, 5),
    "columns in pieces, instances": ((2, 150, 6), -1, 6),
    "runs whole": ((3, 12, 3, 3), 1, 3),
    "runs whole, instances": ((3, 5, 7), 1, 5),
    "runs twice": ((3, 12, 5, 9), 1, 3),
    "runs twice, long": ((2, 4, 130), 1, 2),
    "runs twice, instances": ((3, 5, 70), 1, 5),
    "runs in pieces": ((2, 6, 300), 1, 2),
    "runs of several": ((2, 3, 6, 20), 2, 3),
    "runs of several, long": ((2, 3, 6, 140), 2, 2),
    "rows": ((7, 24), 1, 4),
    "rows of one": ((3, 5), 1, 5),
    "rows in pieces": ((3, 600), 1, 2),
}
LAYERS = {
    "rows": ((5, 3, 48), (-1,)),
    "rows, one": ((1, 64), (-1,)),
    "rows, short": ((70, 3), (-1,)),
    "rows of several axes": ((4, 3, 5, 7), (2, 3)),
    "rows, whole forward alone": ((3, 100), (-1,)),
    "rows in pieces": ((5, 300), (-1,)),
    "kept": ((3, 7, 5, 3), (1,)),
    "kept, long after": ((2, 5, 70), (1,)),
    "kept, short after": ((2, 5, 2), (1,)),
    "kept in blocks": ((2, 40, 9), (1,)),
    "kept, several axes": ((2, 3, 4, 9), (1, 2)),
}
CASES = [("group", name) for name in GROUPS] + [("layer", name) for name in LAYERS]
# One for each kernel and each way in which it finds its elements.
FEW = [
    ("group", "columns whole"),
    ("group", "columns in pieces"),
    ("group", "runs whole"),
    ("group", "runs twice"),
    ("group", "runs of several"),
    ("layer", "rows"),
    ("layer", "rows in pieces"),
    ("layer", "kept"),
    ("layer", "kept in blocks"),
]

# Of exp, in NumPy: a sigmoid far out is 0.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")


@pytest.fixture
def small_blocks(monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(plan, name, value)


def case_of(family, name):
    """Geometry, labels and parameter axes of a case."""
    if family == "group":
        shape, axis, groups = GROUPS[name]
        labels = reference.group_labels(shape, axis % len(shape), groups)
        return geometry.group(shape, axis, groups), labels, (axis,)
    shape, axes = LAYERS[name]
    return geometry.layer(shape, axes), reference.layer_labels(shape, axes), axes


class Problem:
    """A norm with its tensors, what the kernels make of them, and what is right."""

    def __init__(
        self,
        geo,
        dtype="float32",
        x=None,
        mean=0.0,
        epsilon=1e-3,
        subtract_mean=True,
        activation=IDENTITY,
        gamma=True,
        beta=True,
        per_sample=False,
        residual=False,
        dsum=False,
    ):
        lie = PER_SAMPLE if per_sample else SHARED
        operands = Operands(lie if gamma else None, lie if beta else None)
        operands = operands._replace(residual=residual or None)
        self.norm = Norm(geo, dtype, dtype, epsilon, subtract_mean, activation, operands)
        random = np.random.default_rng(0)
        x = random.normal(mean, 1, geo.shape) if x is None else x
        as_x = getattr(torch, dtype)
        self.tensors = {
            "x": torch.tensor(x).to(as_x),
            "dy": torch.tensor(random.normal(0, 1, geo.shape)).to(as_x),
        }
        self.parameter_shape = (geo.shape[:1] if per_sample else ()) + geo.parameter_shape
        for name, given in (("gamma", gamma), ("beta", beta)):
            value = torch.tensor(random.uniform(0.5, 1.5, self.parameter_shape)).float()
            self.tensors[name] = value if given else None
        for name, given in (("residual", residual), ("dsum", dsum)):
            if given:
                self.tensors[name] = torch.tensor(random.normal(mean, 1, geo.shape)).to(as_x)

    def launch(self, launches, **results):
        """The results of a pass. What none of its kernels writes is NaN."""
        buffers = {**self.tensors, **results}
        for name, elements in launches.scratch.items():
            buffers[name] = torch.full((elements,), torch.nan)
        for each in launches.launches:
            each.kernel[(each.programs,)](*each.arguments(buffers))
        self.tensors.update(results)
        return {name: tensor.double().numpy() for name, tensor in results.items()}

    def forward(self):
        x, geo = self.tensors["x"], self.norm.geometry
        statistics = torch.full(geo.statistics_shape(geo.shape), torch.nan)
        results = {"y": torch.full_like(x, torch.nan), "statistics": statistics}
        if self.norm.operands.residual:
            results["sum"] = torch.full_like(x, torch.nan)
        y = self.launch(plan.forward(self.norm, DEVICE), **results)["y"]
        if self.norm.operands.residual:
            self.tensors["given"], self.tensors["x"] = x, self.tensors["sum"]
        return y

    def backward(self, dgamma=True, dbeta=True):
        results = {"dx": torch.full_like(self.tensors["x"], torch.nan)}
        for name, wanted in (("dgamma", dgamma), ("dbeta", dbeta)):
            if wanted:
                results[name] = torch.full(self.parameter_shape, torch.nan)
        dsum = "dsum" in self.tensors
        return self.launch(plan.backward(self.norm, DEVICE, dgamma, dbeta, dsum), **results)

    def of_sample(self, sample):
        """The same problem for one sample, whose gamma and beta are then those of all."""
        geo = self.norm.geometry
        alone = Problem(geometry.Geometry((1, *geo.shape[1:]), geo.ends, geo.groups, geo.per))
        alone.norm = dataclasses.replace(self.norm, geometry=alone.norm.geometry)
        for name, tensor in self.tensors.items():
            parameter = name in ("gamma", "beta")
            each = slice(sample, sample + 1) if not parameter else sample
            alone.tensors[name] = tensor if tensor is None else tensor[each]
        return alone

    def right(self, labels, axes):
        known = {name: t if t is None else t.double().numpy() for name, t in self.tensors.items()}
        self.dy = known["dy"]
        return reference.Norm(
            known["x"],
            known["gamma"],
            known["beta"],
            labels,
            axes,
            self.norm.epsilon,
            self.norm.subtract_mean,
        )

    def check(self, labels, axes, dgamma=True, dbeta=True):
        y, found = self.forward(), self.backward(dgamma, dbeta)
        if "residual" in self.tensors:
            self.hold_sum()
        if not self.norm.per_sample:
            self.hold(labels, axes, y, found)
            return
        for sample, alone in enumerate(map(self.of_sample, range(len(y)))):
            each = {name: values[sample : sample + 1] for name, values in found.items()}
            alone.hold(labels[sample : sample + 1], axes, y[sample : sample + 1], each)

    def hold_sum(self):
        """Hold the sum, which is rounded once."""
        given, residual, found = (
            self.tensors[name].double().numpy() for name in ("given", "residual", "sum")
        )
        right, dtype = given + residual, self.norm.x_dtype
        tolerance = EPS[dtype] * np.abs(right) + reference.SMALLEST[dtype]
        assert_within(found, right, tolerance, "sum")

    def hold(self, labels, axes, y, found):
        """Hold y and the gradients, x being what was normalized."""
        right = self.right(labels, axes)
        rounding = EPS[self.norm.x_dtype] if self.norm.x_dtype != "float32" else 0
        smallest = reference.SMALLEST[self.norm.x_dtype]
        tolerance = right.y_tolerance(EPS["float32"]) + rounding * np.abs(right.y) + smallest
        assert_within(y, right.y, tolerance, "y")
        dx, *others = right.gradients(self.dy)
        tolerances = right.gradient_tolerances(self.dy, EPS["float32"])
        if "dsum" in self.tensors:
            # In float32 the two are added with one rounding of their sum.
            dx = dx + self.tensors["dsum"].double().numpy()
            tolerances = (tolerances[0] + EPS["float32"] * np.abs(dx), *tolerances[1:])
        for name, value, allowed in zip(
            ("dx", "dgamma", "dbeta"), (dx, *others), tolerances, strict=True
        ):
            if name in found:
                rounded = rounding * np.abs(value) + smallest if name == "dx" else 0
                assert_within(found[name].reshape(value.shape), value, allowed + rounded, name)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize(("family", "name"), CASES)
def test_values_and_gradients(family, name, mean):
    geo, labels, axes = case_of(family, name)
    Problem(geo, mean=mean).check(labels, axes)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("family", "name"), CASES)
def test_without_a_mean(family, name):
    geo, labels, axes = case_of(family, name)
    Problem(geo, subtract_mean=False, mean=0.5).check(labels, axes)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("family", "name"), FEW)
def test_half_precision(family, name, dtype):
    geo, labels, axes = case_of(family, name)
    Problem(geo, dtype).check(labels, axes)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("gamma", "beta"), [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize(("family", "name"), FEW)
def test_parameters_that_are_absent(family, name, gamma, beta):
    geo, labels, axes = case_of(family, name)
    Problem(geo, gamma=gamma, beta=beta).check(labels, axes, dgamma=gamma, dbeta=beta)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("family", "name"), CASES)
def test_gamma_and_beta_of_each_sample(family, name):
    geo, labels, axes = case_of(family, name)
    Problem(geo, mean=10.0, per_sample=True).check(labels, axes)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("gamma", "beta"), [(True, False), (False, True)])
@pytest.mark.parametrize(("family", "name"), FEW)
def test_gamma_or_beta_of_each_sample(family, name, gamma, beta):
    geo, labels, axes = case_of(family, name)
    activation = Activation("leaky_relu", 1.0)  # an identity that takes the way of the others
    problem = Problem(geo, gamma=gamma, beta=beta, per_sample=True, activation=activation)
    problem.check(labels, axes, dgamma=gamma, dbeta=beta)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dsum", [True, False])
@pytest.mark.parametrize(("family", "name"), CASES)
def test_a_residual(family, name, dsum):
    geo, labels, axes = case_of(family, name)
    Problem(geo, mean=1e3, residual=True, dsum=dsum).check(labels, axes)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("family", "name"), FEW)
def test_a_residual_in_half_precision(family, name, dtype):
    """Statistics are those of the sum as it is rounded."""
    geo, labels, axes = case_of(family, name)
    options = {"residual": True, "dsum": True, "per_sample": True, "subtract_mean": False}
    Problem(geo, dtype, mean=3.0, **options).check(labels, axes)
    Problem(geo, dtype, mean=3.0, residual=True).check(labels, axes)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("family", "name"), CASES)
def test_a_sum_of_equal_elements_gives_beta(family, name):
    geo, labels, axes = case_of(family, name)
    options = {"residual": True, "per_sample": True, "epsilon": 0.0}
    problem = Problem(geo, x=np.full(geo.shape, 0.1 + 1e4), **options)
    problem.tensors["residual"][:] = 0.3
    y = problem.forward()
    for sample in range(len(y)):
        one = problem.of_sample(sample).right(labels[sample : sample + 1], axes)
        beta = np.broadcast_to(one.shift, one.x.shape)
        assert_within(y[sample : sample + 1], beta, 0, "y")


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("dgamma", "dbeta"), [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize(("family", "name"), FEW)
def test_gradients_that_nobody_asks_for(family, name, dgamma, dbeta):
    geo, labels, axes = case_of(family, name)
    Problem(geo).check(labels, axes, dgamma, dbeta)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("activation", [name for name in NAMES if name != "identity"])
@pytest.mark.parametrize(("family", "name"), FEW)
def test_activations(family, name, activation):
    geo, labels, axes = case_of(family, name)
    activation = Activation(activation, 0.2 if activation == "leaky_relu" else 0.0)
    problem = Problem(geo, activation=activation)
    right = problem.right(labels, axes)
    z = torch.tensor(right.y, requires_grad=True)
    y = activation(z)
    (dz,) = torch.autograd.grad(y, z, torch.tensor(problem.dy))
    # No activation is steeper than 1.2, nor bends more than 1.2 but leaky relu at 0.
    slack = 1.2 * right.y_tolerance(EPS["float32"]) + 8 * EPS["float32"]
    assert_within(problem.forward(), y.detach().numpy(), slack, "y")
    found = problem.backward()
    wanted = right.gradients(dz.numpy())
    allowed = right.gradient_tolerances(problem.dy, 4 * EPS["float32"])
    for key, value, tolerance in zip(("dx", "dgamma", "dbeta"), wanted, allowed, strict=True):
        assert_within(found[key].reshape(value.shape), value, tolerance, key)


# Of NumPy, for what a mask drops.
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("family", "name"), CASES)
def test_padding_adds_nothing(family, name):
    """Where there is no element, a mean of 3e36 times 1 / standard deviation is infinite."""
    geo, _, _ = case_of(family, name)
    problem = Problem(geo, x=np.full(geo.shape, 3e36), epsilon=1e-6)
    problem.forward()
    for key, value in problem.backward().items():
        assert np.isfinite(value).all(), key


def test_relu_keeps_nan():
    problem = Problem(geometry.layer((2, 4)), activation=Activation("leaky_relu"))
    problem.tensors["x"][0, 1] = torch.nan
    y = problem.forward()
    assert np.isnan(y[0]).all()
    assert np.isfinite(y[1]).all()


@pytest.mark.parametrize("members", [1, 2, 31, 32, 33, 127, 128, 129, 1023, 1024, 1025])
def test_rows_around_the_blocks(members):
    shape = (5, members)
    Problem(geometry.layer(shape)).check(reference.layer_labels(shape, (-1,)), (-1,))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("positions", [7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 128, 129])
@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("kind", ["group", "layer"])
def test_positions_around_the_blocks(positions, axis, kind):
    shape = (2, positions, 6) if axis == -1 else (2, 6, positions)
    if kind == "group":
        geo, labels = geometry.group(shape, axis, 3), reference.group_labels(shape, axis % 3, 3)
    else:
        geo, labels = geometry.layer(shape, axis), reference.layer_labels(shape, (axis,))
    Problem(geo).check(labels, (axis,))


@pytest.mark.parametrize(
    ("shape", "axis", "groups"),
    [((2, 3000, 40), -1, 8), ((2, 7, 20000), 1, 7), ((1, 4, 70000), 1, 2), ((2, 40000, 3), -1, 3)],
)
def test_blocks_as_they_are(shape, axis, groups):
    labels = reference.group_labels(shape, axis % len(shape), groups)
    Problem(geometry.group(shape, axis, groups), mean=100.0).check(labels, (axis,))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("epsilon", [0.0, 1e-3])
@pytest.mark.parametrize(("family", "name"), CASES)
def test_equal_elements_give_beta(family, name, epsilon):
    geo, labels, axes = case_of(family, name)
    # 0.1 is no sum of a few powers of 2: their mean is not exactly 0.1 unless it is sought so.
    problem = Problem(geo, x=np.full(geo.shape, 0.1 + 1e4), epsilon=epsilon)
    beta = problem.right(labels, axes).spread(problem.tensors["beta"])
    assert_within(problem.forward(), np.broadcast_to(beta, geo.shape), 0, "y")
    for name, value in problem.backward().items():
        assert np.isfinite(value).all(), name


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("family", "name"), CASES)
def test_an_element_far_off_leaves_digits_of_the_others(family, name):
    geo, labels, axes = case_of(family, name)
    x = np.random.default_rng(1).normal(0, 1, geo.shape)
    x.reshape(geo.shape[0], -1)[:, 0] = 3e3  # the first of its set, from which deviations are taken
    Problem(geo, x=x).check(labels, axes)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("family", "name"), [c for c in CASES if c[1] != "rows, one"])
def test_a_sample_is_alone(family, name):
    """What is in the others, and how many there are, changes no bit of it."""
    geo, _, _ = case_of(family, name)
    problem = Problem(geo)
    y, dx = problem.forward(), problem.backward()["dx"]
    for _ in range(2):
        assert (problem.forward() == y).all()
        assert (problem.backward()["dx"] == dx).all()
    first = Problem(geometry.Geometry((1, *geo.shape[1:]), geo.ends, geo.groups, geo.per))
    for key in ("x", "dy"):
        first.tensors[key] = problem.tensors[key][:1].contiguous()
    first.tensors.update({key: problem.tensors[key] for key in ("gamma", "beta")})
    assert (first.forward() == y[:1]).all()
    assert (first.backward()["dx"] == dx[:1]).all()
    problem.tensors["x"][1:] = torch.nan
    assert (problem.forward()[:1] == y[:1]).all()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("family", "name"), [c for c in CASES if c[1] != "rows, one"])
def test_a_sample_with_its_own_gamma_is_alone(family, name):
    """The same, and of what its gamma and beta get."""
    geo, _, _ = case_of(family, name)
    problem = Problem(geo, per_sample=True, residual=True, dsum=True)
    y, found = problem.forward(), problem.backward()
    alone = Problem(
        geometry.Geometry((1, *geo.shape[1:]), geo.ends, geo.groups, geo.per),
        per_sample=True,
        residual=True,
        dsum=True,
    )
    names = ("residual", "dy", "dsum", "gamma", "beta")
    alone.tensors.update({key: problem.tensors[key][:1].contiguous() for key in names})
    alone.tensors["x"] = problem.tensors["given"][:1].contiguous()
    assert (alone.forward() == y[:1]).all()
    for key, value in alone.backward().items():
        assert (value == found[key][:1]).all(), key
    for tensor in problem.tensors.values():
        tensor[1:] = torch.nan
    for key, value in problem.backward().items():
        assert (value[:1] == found[key][:1]).all(), key
