"""The native kernels as JAX primitives, differentiable to any order and in both modes.

Three primitives carry a norm. `forward` and `backward` are the two entries of the library;
`tangent` is the derivative of the first as a linear map, whose transpose is the second. On the CPU
the first two become calls of the library, elsewhere and in exported programs what composite.py
does; all further derivatives are those of composite.py.

The primitives always take gamma and beta: one that is absent is an empty vector.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import dispatch
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from normwise.geometry import Geometry
from normwise.kernels import composite, library


def normalize(
    x,
    gamma,
    beta,
    geometry: Geometry,
    *,
    epsilon: float,
    centred: bool,
    activation: library.Activation = library.IDENTITY,
):
    """Normalize every set of `x`, apply gamma, beta and the activation.

    Args:
        x: float32, float64, float16 or bfloat16 array of `geometry.shape`.
        gamma, beta: arrays of `geometry.parameter_shape`, or None; float64 where x is, else
            float32.
        geometry: which elements share their statistics, and without a permutation.
        epsilon: added to the variance.
        centred: whether the mean is subtracted.
        activation: applied to the result.

    Returns:
        An array of the shape and dtype of x.
    """
    return _normalize(x, gamma, beta, _norm(geometry, epsilon, centred, activation))


def obstacle(x) -> str | None:
    """Why the native kernels cannot take `x` here and now, or None.

    The primitives can go anywhere, so this is a matter of speed: on accelerators XLA fuses the
    composite, derivatives and all.
    """
    if jax.default_backend() != "cpu":
        return f"the native kernels run on the CPU, and JAX runs on {jax.default_backend()}"
    return None


@dataclasses.dataclass(frozen=True)
class _Norm:
    """What a call is, beside its arrays: the static parameter of the primitives."""

    geometry: Geometry
    layout: library.Layout
    epsilon: float
    centred: bool
    activation: library.Activation

    def batched(self):
        """The same norm of an input with one more axis in front."""
        geometry, layout = self.geometry, self.layout
        return dataclasses.replace(
            self,
            geometry=dataclasses.replace(
                geometry,
                shape=(None, *geometry.shape),
                outer=None,
                set_axes=tuple(axis + 1 for axis in geometry.set_axes),
                parameter_axes=tuple(axis + 1 for axis in geometry.parameter_axes),
            ),
            layout=dataclasses.replace(
                layout,
                outer_end=layout.outer_end + 1,
                before_end=layout.before_end + 1,
                channels_end=layout.channels_end + 1,
            ),
        )

    def attributes(self):
        """What the handlers of csrc/jax_ffi.cc read."""
        integers = dataclasses.asdict(self.layout)
        integers |= {"centred": self.centred, "activation": self.activation.code}
        reals = {"epsilon": self.epsilon, "slope": self.activation.slope}
        return {
            **{name: np.int64(value) for name, value in integers.items()},
            **{name: np.float64(value) for name, value in reals.items()},
        }


# Of an eager call's 18 us at (2, 4, 6) this saves 4.
@functools.lru_cache(maxsize=1024)
def _norm(geometry, epsilon, centred, activation):
    return _Norm(geometry, library.layout(geometry), epsilon, centred, activation)


@functools.partial(jax.jit, static_argnums=3)
def _normalize(x, gamma, beta, norm):
    absent = jnp.zeros(0, _arithmetic(x))
    operands = (x, *(absent if p is None else p for p in (gamma, beta)))
    # Inside shard_map and on a mesh with explicit axes a type says how its array is split, in terms
    # that are private to JAX and change with it. The composite's types follow by themselves.
    if any(kind != AxisType.Auto for kind in jax.sharding.get_abstract_mesh().axis_types):
        return _composite_y(*operands, norm=norm)
    return _forward.bind(*operands, norm=norm)[0]


def _arithmetic(x):
    """The dtype of the statistics and parameters of `x`."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _composite_y(x, gamma, beta, *, norm):
    gamma, beta = (p if p.size else None for p in (gamma, beta))
    options = {"epsilon": norm.epsilon, "centred": norm.centred}
    y = composite.normalize(x.astype(_arithmetic(x)), gamma, beta, norm.geometry, **options)
    return norm.activation.function(y).astype(x.dtype)


def _composite_forward(x, gamma, beta, *, norm):
    return _composite_y(x, gamma, beta, norm=norm), _statistics(x, norm)


def _composite_tangent(x, gamma, beta, statistics, *tangents, norm):
    function = functools.partial(_composite_y, norm=norm)
    return jax.jvp(function, (x, gamma, beta), tangents)[1]


def _composite_backward(x, gamma, beta, statistics, dy, *, norm):
    _, pull = jax.vjp(functools.partial(_composite_y, norm=norm), x, gamma, beta)
    return pull(dy)


def _statistics(x, norm):
    """What csrc/normwise.h calls the statistics. composite.py has no use for them, so XLA drops
    them again, unless a program that ends elsewhere hands them to a backward pass on the CPU.
    """
    layout = norm.layout
    outer, before, channels, after = (
        x.shape[slice(*ends)]
        for ends in itertools.pairwise(
            (0, layout.outer_end, layout.before_end, layout.channels_end, x.ndim)
        )
    )
    members = math.prod(channels) // layout.groups
    x = x.astype(_arithmetic(x))
    x = x.reshape(*outer, math.prod(before), layout.groups, members, math.prod(after))
    inside = (-4, -3, -2) if layout.keeps_after else (-4, -2, -1)
    mean = x.mean(inside, keepdims=True) if norm.centred else jnp.zeros_like(x, shape=())
    radicand = jnp.square(x - mean).mean(inside) + norm.epsilon
    inv_std = jnp.where(radicand == 0, 0, jax.lax.rsqrt(radicand))
    mean = jnp.broadcast_to(jnp.squeeze(mean, inside) if norm.centred else mean, inv_std.shape)
    return jnp.stack([mean, inv_std], len(outer))


@functools.cache
def _register():
    """Make the library's handlers known to XLA."""
    handlers = library.load()
    for name in ("normwise_jax_forward", "normwise_jax_backward"):
        handler = jax.ffi.pycapsule(getattr(handlers, name))
        jax.ffi.register_ffi_target(name, handler, platform="cpu")


def _type(array):
    return jax.core.ShapedArray(array.shape, array.dtype)


def _forward_types(x, *parameters, norm):
    statistics = norm.layout.statistics_shape(x.shape)
    return _type(x), jax.core.ShapedArray(statistics, _arithmetic(x))


def _backward_types(x, gamma, beta, *others, norm):
    return _type(x), _type(gamma), _type(beta)


def _native_forward(x, gamma, beta, norm):
    call = jax.ffi.ffi_call("normwise_jax_forward", _forward_types(x, gamma, beta, norm=norm))
    return call(x, gamma, beta, **norm.attributes())


def _native_backward(x, gamma, beta, statistics, dy, norm):
    call = jax.ffi.ffi_call("normwise_jax_backward", _backward_types(x, gamma, beta, norm=norm))
    return call(x, gamma, beta, statistics, dy, **norm.attributes())


def _partitionable(native, operands_split, results_split):
    """Let XLA split `native` over the axes of outer.

    Args:
        native: called with its operands and a _Norm.
        operands_split, results_split: for each operand and result whether it leads with the axes of
            outer. Results that do not are sums over them.
    """

    def shardings(norm, mesh, operands):
        spec = (*operands[0].sharding.spec, *[None] * norm.layout.outer_end)
        split = PartitionSpec(*spec[: norm.layout.outer_end])
        return tuple(
            tuple(NamedSharding(mesh, split if s else PartitionSpec()) for s in splits)
            for splits in (operands_split, results_split)
        )

    def infer(norm, mesh, operands, results):
        return shardings(norm, mesh, operands)[1]

    def partition(norm, mesh, operands, results):
        before, after = shardings(norm, mesh, operands)
        names = tuple(jax.tree.leaves(tuple(before[0].spec)))

        def on_shard(*operands):
            return tuple(
                result if split or not names else jax.lax.psum(result, names)
                for result, split in zip(native(*operands, norm), results_split, strict=True)
            )

        return mesh, on_shard, after, before

    def rule(norm, mesh, operands, results):
        whole = []

        def axes(split, kind):
            for axis in range(len(kind.shape)):
                if split and axis < norm.layout.outer_end:
                    yield f"outer{axis}"
                else:
                    whole.append(f"whole{len(whole)}")
                    yield whole[-1]

        sides = (
            ", ".join(" ".join(axes(*each)) for each in zip(splits, kinds, strict=True))
            for splits, kinds in ((operands_split, operands), (results_split, results))
        )
        return " -> ".join(sides), {"need_replication_factors": tuple(whole)}

    call = custom_partitioning(native, static_argnums=(len(operands_split),))
    call.def_partition(partition, infer_sharding_from_operands=infer, sharding_rule=rule)
    return call


def _primitive(name, meaning, native):
    """A primitive that is `native` on the CPU, and else `meaning`, as its derivatives are."""
    primitive = Primitive(f"normwise_{name}")
    primitive.multiple_results = True
    primitive.def_impl(jax.jit(primitive.bind, static_argnames="norm"))
    # Else a lowering for several devices does not learn which, and custom_partitioning must.
    dispatch.prim_requires_devices_during_lowering.add(primitive)
    lower_meaning = mlir.lower_fun(meaning, multiple_results=True)
    lower_native = mlir.lower_fun(lambda *a, norm: native(*a, norm), multiple_results=True)

    def lower_on_cpu(context, *operands, norm):
        # Whoever loads an exported program need not have the library.
        if context.module_context.lowering_parameters.for_export:
            return lower_meaning(context, *operands, norm=norm)
        _register()
        return lower_native(context, *operands, norm=norm)

    mlir.register_lowering(primitive, lower_meaning)
    mlir.register_lowering(primitive, lower_on_cpu, platform="cpu")
    return primitive


_forward = _primitive(
    "forward",
    _composite_forward,
    _partitionable(_native_forward, (True, False, False), (True, True)),
)
_backward = _primitive(
    "backward",
    _composite_backward,
    _partitionable(_native_backward, (True, False, False, True, True), (True, False, False)),
)
_tangent = Primitive("normwise_tangent")
_tangent.def_impl(jax.jit(_tangent.bind, static_argnames="norm"))
mlir.register_lowering(_tangent, mlir.lower_fun(_composite_tangent, multiple_results=False))


_forward.def_abstract_eval(_forward_types)
_backward.def_abstract_eval(_backward_types)
_tangent.def_abstract_eval(lambda x, *others, norm: _type(x))


def _forward_jvp(primals, tangents, *, norm):
    y, statistics = _forward.bind(*primals, norm=norm)
    tangents = map(ad.instantiate_zeros, tangents)
    dy = _tangent.bind(*primals, statistics, *tangents, norm=norm)
    # The statistics follow from x, and that way is part of every derivative by x.
    return (y, statistics), (dy, ad.Zero(jax.typeof(statistics)))


def _tangent_transpose(dy, x, gamma, beta, statistics, *tangents, norm):
    found = _backward.bind(x, gamma, beta, statistics, dy, norm=norm)
    wanted = map(ad.is_undefined_primal, tangents)
    return [None] * 4 + [g if w else None for g, w in zip(found, wanted, strict=True)]


def _jvp_of(meaning, primals, tangents, *, norm):
    tangents = tuple(map(ad.instantiate_zeros, tangents))
    return jax.jvp(functools.partial(meaning, norm=norm), tuple(primals), tangents)


ad.primitive_jvps[_forward] = _forward_jvp
ad.primitive_transposes[_tangent] = _tangent_transpose
ad.primitive_jvps[_tangent] = functools.partial(_jvp_of, _composite_tangent)
ad.primitive_jvps[_backward] = functools.partial(_jvp_of, _composite_backward)


def _vmap_of(meaning, operands, axes, *, norm):
    results = jax.vmap(functools.partial(meaning, norm=norm), tuple(axes))(*operands)
    return results, jax.tree.map(lambda _: 0, results)


def _batch_forward(operands, axes, *, norm):
    x, gamma, beta = operands
    if axes[1:] != (None, None):
        return _vmap_of(_composite_forward, operands, axes, norm=norm)
    x = jnp.moveaxis(x, axes[0], 0)
    return _forward.bind(x, gamma, beta, norm=norm.batched()), (0, 0)


def _batch_backward(operands, axes, *, norm):
    x, gamma, beta, statistics, dy = operands
    # The library sums dgamma and dbeta over outer, where one for each is asked for.
    if gamma.size or beta.size or None in (axes[0], axes[3], axes[4]):
        return _vmap_of(_composite_backward, operands, axes, norm=norm)
    x, statistics, dy = (jnp.moveaxis(operands[i], axes[i], 0) for i in (0, 3, 4))
    found = _backward.bind(x, gamma, beta, statistics, dy, norm=norm.batched())
    return found, (0, None, None)


batching.primitive_batchers[_forward] = _batch_forward
batching.primitive_batchers[_backward] = _batch_backward
batching.primitive_batchers[_tangent] = functools.partial(_vmap_of, _composite_tangent)
