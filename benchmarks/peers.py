"""Who is timed on a case: normwise, its composite, Keras's layer, torch's function, and a copy.

Every peer is a pair of functions on tensors of the backend in use: one forward, and one that goes
forward and back as training does. Beside them there are copies of as many bytes.
"""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable

import keras
import measuring
import numpy as np

import normwise
from normwise.kernels import cpu, library
from normwise.norm import Norm

BACKEND = keras.backend.backend()
OURS = ("normwise", "composite", "op")
# Left out where they are wrong or raise; of any other peer that is a failure of the benchmark.
MAY_FAIL = ("Keras", "Keras XLA")


@dataclasses.dataclass(frozen=True)
class Case:
    """One norm of one shape.

    Args:
        name: of the case.
        norm: "group", "instance", "layer" or "rms".
        shape: of the input.
        axis: of the channels.
        groups: of group norm.
    """

    name: str
    norm: str
    shape: tuple[int, ...]
    axis: int = -1
    groups: int | None = None

    @property
    def channels(self):
        """How many channels the input has."""
        return self.shape[self.axis]

    @property
    def geometry(self):
        """Which elements share their statistics, and how they lie in memory."""
        ours, _ = self.layers("float32")
        return ours.geometry(self.shape)

    def layers(self, dtype):
        """The layers of normwise and of Keras, from `dtype` to `dtype` with float32 weights."""
        options = {"axis": self.axis, "dtype": "mixed_bfloat16" if dtype == "bfloat16" else dtype}
        if self.norm == "instance":
            # Keras's way to an instance norm.
            theirs = keras.layers.GroupNormalization(groups=-1, **options)
            return normwise.layers.InstanceNormalization(**options), theirs
        if self.norm == "group":
            options["groups"] = self.groups
        name = {"group": "Group", "layer": "Layer", "rms": "RMS"}[self.norm] + "Normalization"
        return getattr(normwise.layers, name)(**options), getattr(keras.layers, name)(**options)


@dataclasses.dataclass(frozen=True)
class Peer:
    """How one library calculates a case.

    Args:
        forward: from x to y.
        train: from x and dy to y and the gradients by x, gamma and, where there is one, beta.
    """

    forward: Callable
    train: Callable


def makers(case: Case, ours, theirs) -> dict[str, Callable[[], Peer]]:
    """What makes each peer out of the built layers; that or the peer's first call may raise."""
    found = {
        "normwise": functools.partial(_of_layer, ours),
        "composite": lambda: _under("composite", _of_layer(ours)),
        "Keras": functools.partial(_of_layer, theirs),
    }
    if BACKEND == "tensorflow":
        found["Keras XLA"] = functools.partial(_of_layer, theirs, jit_compile=True)
    if BACKEND == "torch":
        found["op"] = functools.partial(_of_op, case, ours)
        found["torch"] = functools.partial(_torchs_own, case, ours)
    return found


def copies(byte_count: int) -> dict[str, Callable[[], object]]:
    """Ways to copy so many bytes on every core; which is the fastest depends on how many."""
    if BACKEND == "torch":
        import torch

        source = torch.ones(byte_count // 4)
        target = torch.empty_like(source)
        return {"copy": lambda: target.copy_(source)}
    source = np.ones(byte_count, "uint8")
    target = np.empty_like(source)
    parts = [np.array_split(array, measuring.cores()) for array in (target, source)]
    (own_target, *targets), (own_source, *sources) = parts

    def parallel():
        others = [_pool().submit(np.copyto, *pair) for pair in zip(targets, sources, strict=True)]
        np.copyto(own_target, own_source)
        concurrent.futures.wait(others)

    return {"copy, one thread": lambda: np.copyto(target, source), "copy, all threads": parallel}


def framework_copy() -> Peer:
    """The framework's own copies of x, and of x and dy, called as a layer is.

    What it takes beyond the time of `copies` is the framework's call, and memory that the framework
    asks the system for anew: no layer that returns a new tensor is spared these.
    """
    if BACKEND == "jax":
        import jax

        copy = jax.jit(lambda *tensors: [jax.numpy.copy(tensor) for tensor in tensors])

        def run(*tensors):
            return jax.block_until_ready(copy(*tensors))

    elif BACKEND == "tensorflow":
        import tensorflow as tf

        run = tf.function(
            lambda *tensors: [tf.raw_ops.DeepCopy(x=tensor) for tensor in tensors], autograph=False
        )
    else:

        def run(*tensors):
            return [tensor.clone() for tensor in tensors]

    return Peer(run, run)


def alone(layer, x, dy, dtype: str) -> dict[str, Callable[[], object]]:
    """The kernels on arrays that exist, by direction: what a call takes beyond is the framework's.

    Args:
        layer: one of normwise's, built.
        x, dy: NumPy arrays; bfloat16 ones as float32 of its precision.
        dtype: that the layer reads and writes.
    """
    if library.path() is None:
        return {}
    norm = Norm(layer.geometry(x.shape), dtype, dtype, layer.epsilon, layer.subtract_mean)
    if dtype == "bfloat16":
        x, dy = ((array.view("uint32") >> 16).astype("uint16") for array in (x, dy))
    gamma = np.ones(norm.geometry.parameter_shape, "float32")
    beta = np.zeros_like(gamma) if len(layer.weights) == 2 else None
    dgamma, dbeta = (p if p is None else np.ones_like(p) for p in (gamma, beta))
    y, dx = np.zeros_like(x), np.zeros_like(x)
    statistics = np.zeros(norm.geometry.statistics_shape(x.shape), "float32")

    def call(engines_pass, *arrays):
        addresses = [array if array is None else array.ctypes.data for array in arrays]
        # The arrays as defaults, so that they live as long as the function.
        return lambda arrays=arrays: engines_pass(*addresses)

    plan = cpu.plan(norm)
    forward = call(plan.forward, x, gamma, beta, y, statistics)
    backward = call(plan.backward, x, gamma, beta, statistics, dy, dx, dgamma, dbeta)
    return {"forward": forward, "forward+backward": lambda: (forward(), backward())}


@functools.cache
def _pool():
    return concurrent.futures.ThreadPoolExecutor(measuring.cores())


def _of_layer(layer, **compile_options) -> Peer:
    """A Keras layer as its backend compiles it."""
    weights = [variable.value for variable in layer.trainable_variables]
    if BACKEND == "jax":
        return _jax(layer, weights)
    if BACKEND == "tensorflow":
        return _tensorflow(layer, weights, **compile_options)
    return _torch(layer, weights)


def _jax(layer, weights):
    import jax

    def apply(weights, x):
        return layer.stateless_call(weights, [], x)[0]

    def apply_and_pull(weights, x, dy):
        y, pull = jax.vjp(apply, weights, x)
        dweights, dx = pull(dy)
        return y, [dx, *dweights]

    forward, train = jax.jit(apply), jax.jit(apply_and_pull)
    return Peer(
        lambda x: jax.block_until_ready(forward(weights, x)),
        lambda x, dy: jax.block_until_ready(train(weights, x, dy)),
    )


def _tensorflow(layer, weights, jit_compile=False):
    import tensorflow as tf

    def train(x, dy):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
        return y, tape.gradient(y, [x, *weights], output_gradients=dy)

    compiled = functools.partial(tf.function, autograph=False, jit_compile=jit_compile)
    return Peer(compiled(lambda x: layer(x)), compiled(train))


def _torch(function, weights):
    import torch

    def forward(x):
        with torch.no_grad():
            return function(x)

    def train(x, dy):
        leaf = x.detach().requires_grad_()
        y = function(leaf)
        return y, torch.autograd.grad(y, [leaf, *weights], dy)

    return Peer(forward, train)


def _of_op(case: Case, layer):
    """normwise.ops on the layer's weights: a function, as torch's own are."""
    weights = [variable.value for variable in layer.trainable_variables]
    norm = getattr(normwise.ops, f"{case.norm}_norm")
    options = {"axis": case.axis, "epsilon": layer.epsilon}
    if case.groups:
        options["groups"] = case.groups
    return _torch(lambda x: norm(x, *weights, **options), weights)


def _torchs_own(case: Case, layer):
    """torch.nn.functional on the same tensors: the axis that it wants is moved there as a view."""
    import torch
    from torch.nn import functional

    # In x's dtype, as a torch model has them; with others its fused RMS norm does not run.
    dtype = getattr(torch, layer.compute_dtype)
    weights = [
        variable.value.detach().to(dtype).requires_grad_() for variable in layer.trainable_variables
    ]
    if case.norm in ("group", "instance"):
        groups, place = case.groups or case.channels, 1

        def norm(x):
            return functional.group_norm(x, groups, *weights, eps=layer.epsilon)

    else:
        own, place = getattr(functional, f"{case.norm}_norm"), -1

        def norm(x):
            return own(x, (case.channels,), *weights, eps=layer.epsilon)

    return _torch(lambda x: norm(x.movedim(case.axis, place)).movedim(place, case.axis), weights)


def _under(mode: str, peer: Peer) -> Peer:
    """The peer with other kernels in force; a trace keeps those of its first call."""

    def wrapped(function):
        def call(*tensors):
            with normwise.use_kernels(mode):
                return function(*tensors)

        return call

    return Peer(wrapped(peer.forward), wrapped(peer.train))
