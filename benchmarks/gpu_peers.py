"""Who is timed on a GPU: normwise's kernels, op and layer, torch's and Keras's own, and a copy.

A peer is a dict of functions without arguments, by direction: forward gives y, backward the
gradients by x, gamma and where there is one beta, and forward+backward both. A problem is gpu.py's.
"""

import functools

import keras

import normwise
from normwise.norm import SHARED, Norm, Operands

BACKEND = keras.backend.backend()
if BACKEND == "torch":
    import torch

    from normwise.kernels import torch_gpu
elif BACKEND == "jax":
    import jax

# Of a backward pass alone XLA calculates anew what it needs of the forward one.
DIRECTIONS = {
    "torch": ("forward", "backward", "forward+backward"),
    "jax": ("forward", "forward+backward"),
}
# In which normwise calculates; the others may fail.
OURS = ("kernels", "normwise", "layer", "compiled normwise")


def makers(problem, compiled: bool) -> dict:
    """What makes each peer, by its name; that or the peer's first call may raise."""
    of = functools.partial(_peer, problem)
    if compiled:
        # A graph of both passes at once, of which the backward one is not to be had alone.
        of = functools.partial(of, directions=DIRECTIONS["jax"])
        pairs = {"compiled torch": _torchs_own(problem), "compiled normwise": _op(problem)}
        return {
            name: lambda function=function, weights=weights: of(
                torch.compile(function, dynamic=False), weights
            )
            for name, (function, weights) in pairs.items()
        }
    found = {
        "normwise": lambda: of(*_op(problem)),
        "layer": lambda: of(*_of_layer(problem.ours)),
        "Keras": lambda: of(*_of_layer(problem.theirs)),
    }
    if BACKEND == "torch":
        found["kernels"] = lambda: _kernels(problem)
        found["torch"] = lambda: of(*_torchs_own(problem))
    else:
        found["composite"] = lambda: of(*_op(problem, "composite"))
    return found


def _op(problem, mode="auto"):
    """The function of normwise.ops."""
    case = problem.case
    options = {"axis": case.axis, "epsilon": problem.ours.epsilon}
    if case.groups:
        options["groups"] = case.groups
    norm = getattr(normwise.ops, f"{case.norm}_norm")

    def function(x, *weights):
        with normwise.use_kernels(mode):
            return norm(x, *weights, **options)

    # Where no kernels are asked for, nothing stands between the caller and the op.
    plain = functools.partial(norm, **options)
    return (plain if mode == "auto" else function), problem.weights


def _of_layer(layer):
    weights = [variable.value for variable in layer.trainable_variables]
    if BACKEND == "jax":
        return (lambda x, *weights: layer.stateless_call(weights, [], x)[0]), weights
    return (lambda x, *_: layer(x)), weights


def _torchs_own(problem):
    """torch.nn.functional: the axis that it wants is moved there as a view.

    Its weights are in x's dtype, as a torch model has them.
    """
    case, epsilon = problem.case, problem.ours.epsilon
    functional, groups = torch.nn.functional, case.groups or case.channels
    weights = [w.detach().to(problem.x.dtype).requires_grad_() for w in problem.weights]
    if case.norm in ("group", "instance"):
        place = 1

        def norm(x, *weights):
            return functional.group_norm(x, groups, *weights, eps=epsilon)

    else:
        place, own = -1, getattr(functional, f"{case.norm}_norm")

        def norm(x, *weights):
            return own(x, (case.channels,), *weights, eps=epsilon)

    def function(x, *weights):
        return norm(x.movedim(case.axis, place), *weights).movedim(place, case.axis)

    return function, weights


def _peer(problem, function, weights, directions=DIRECTIONS["torch"]) -> dict:
    """A peer of a function from x and weights to y."""
    x, dy = problem.x, problem.dy
    if BACKEND == "jax":

        @jax.jit
        def both(x, dy, *weights):
            y, pull = jax.vjp(function, x, *weights)
            return y, pull(dy)

        forward = jax.jit(function)
        return {
            "forward": lambda: forward(x, *weights),
            "forward+backward": lambda: both(x, dy, *weights),
        }
    wanted = [x.detach().requires_grad_(), *weights]

    def forward():
        with torch.no_grad():
            return function(x, *weights)

    def both():
        y = function(*wanted)
        return y, torch.autograd.grad(y, wanted, dy)

    @functools.cache
    def y():
        return function(*wanted)

    def backward():
        return torch.autograd.grad(y(), wanted, dy, retain_graph=True)

    found = {"forward": forward, "backward": backward, "forward+backward": both}
    return {direction: found[direction] for direction in directions}


def _kernels(problem) -> dict:
    """The kernels of normwise on tensors that exist."""
    case, dtype, layer, x = problem.case, problem.dtype, problem.ours, problem.x
    gamma, beta = (*problem.weights, None)[:2]
    lie = Operands(SHARED, None if beta is None else SHARED)
    geometry, epsilon = layer.geometry(case.shape), layer.epsilon
    norm = Norm(geometry, dtype, dtype, epsilon, layer.subtract_mean, operands=lie)
    plan = torch_gpu.engine(x.device).plan(norm)
    y, dx, dgamma, dbeta = (
        None if tensor is None else torch.empty_like(tensor) for tensor in (x, x, gamma, beta)
    )
    moments = torch.empty(geometry.statistics_shape(case.shape), device=x.device)
    gradients = [tensor for tensor in (dx, dgamma, dbeta) if tensor is not None]

    def forward():
        plan.forward(*plan.buffers(x, gamma, beta, y, moments))
        return y

    def backward():
        # Not made once for all: an address keeps no tensor alive.
        taken = (x, gamma, beta, moments, problem.dy, dx, dgamma, dbeta)
        plan.backward(*plan.buffers(*taken))
        return gradients

    def both():
        return forward(), backward()

    return {"forward": forward, "backward": backward, "forward+backward": both}


def copies(problem) -> dict:
    """A copy of x, and for a call of the least cost what only asks for memory."""
    x = problem.x
    if BACKEND == "jax":
        copy = jax.jit(jax.numpy.copy)
        return {"copy": lambda: copy(x)}
    return {"copy": x.clone, "empty_like": lambda: torch.empty_like(x)}
