"""Engines as JAX primitives, differentiable to any order and in both modes.

Three primitives carry a norm. `forward` and `backward` are the two passes of the engine; `tangent`
is the derivative of the first as a linear map, whose transpose is the second: from a change of what
is normalized, which with a residual is the sum, to that of y and of the sum itself. On the CPU and
on GPUs the first two become calls of an engine, elsewhere and in exported programs what
composite.py does; all further derivatives are those of composite.py.

The primitives always take and give everything: what is absent is an empty vector.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType

from normwise.kernels import composite, cpu, gpu, jax_gpu, library, partitioned, private
from normwise.kernels.kernel import Engine, Kernel
from normwise.norm import Norm, Operands

_LACKS = private.missing(private.JAX)
_PRIVATE = {name: private.find(each.path) for name, each in private.JAX.items()}
_GPUS = ("cuda", "rocm")


def kernel_of(engine: Engine, primitives=None) -> Kernel:
    """A kernel of an engine for arrays of the CPU.

    Args:
        engine: its passes and what it can do.
        primitives: of the engine, by default those that call back to Python.
    """
    primitives = primitives or _Primitives(engine.name, {"cpu": _callbacks(engine)})

    def why_not(norm, x):
        return engine.why_not(norm) or _why_not_here()

    def is_elsewhere(x):
        return not _on_cpu()

    def adds(norm, x, residual):
        # Those that call back give no residual on.
        return engine is cpu.ENGINE

    return Kernel(engine.name, why_not, primitives.run, is_elsewhere=is_elsewhere, adds=adds)


def _why_not_here() -> str | None:
    """Why no engine of the CPU can be called here and now, or None.

    The primitives can go anywhere, so this is a matter of speed: on accelerators XLA fuses the
    composite, derivatives and all.
    """
    if _LACKS is not None:
        return _LACKS
    if not _on_cpu():
        return f"the native kernels run on the CPU, and JAX runs on {jax.default_backend()}"
    return None


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _on_gpu() -> bool:
    return jax.default_backend() in ("gpu", *_GPUS)


def _why_not_on_gpu(norm: Norm, x) -> str | None:
    """Why the Triton kernels cannot take a norm here and now, or None."""
    if _LACKS is not None:
        return _LACKS
    if not _on_gpu():
        return f"the Triton kernels run on a GPU, and JAX runs on {jax.default_backend()}"
    return jax_gpu.why_not(norm)


# What the passes mean: what runs elsewhere and in exported programs, and what has the derivatives.


def _present(gamma, beta) -> Operands:
    return Operands(*(p if p.size else None for p in (gamma, beta)))


def _rounded(x):
    """`x` in no more digits than its dtype has.

    XLA takes a conversion to 16 bits and back for nothing, and would normalize another sum than the
    one that is returned.
    """
    if x.dtype.itemsize > 2:
        return x
    kind = jnp.finfo(x.dtype)
    return jax.lax.reduce_precision(x, kind.nexp, kind.nmant)


composite.ROUNDED["jax"] = _rounded


def _summed(x, residual, norm):
    return composite.summed(x, residual, x.dtype) if norm.operands.residual else x


def _meant_y(x, gamma, beta, *, norm, run=composite.run):
    """The result for what is normalized."""
    return run(norm, x, _present(gamma, beta))


def _meant_forward(x, gamma, beta, residual, *, norm, run=composite.run):
    # The composite has no use for the statistics, so XLA drops them again, unless a program that
    # ends elsewhere hands them to a backward pass on the CPU.
    x = _summed(x, residual, norm)
    y = _meant_y(x, gamma, beta, norm=norm, run=run)
    return y, composite.statistics(norm, x), x if norm.operands.residual else residual


# As `_meant_forward` where nobody takes derivatives any more.
_lowered_forward = functools.partial(_meant_forward, run=composite.run_for_inference)


def _meant_tangent(x, gamma, beta, statistics, *tangents, norm):
    _, dy = jax.jvp(functools.partial(_meant_y, norm=norm), (x, gamma, beta), tangents)
    return dy, tangents[0] if norm.operands.residual else jnp.zeros(0, x.dtype)


def _meant_backward(x, gamma, beta, statistics, dy, dsum, *, norm):
    _, pull = jax.vjp(functools.partial(_meant_y, norm=norm), x, gamma, beta)
    dx, *found = pull(dy)
    return dx + dsum if dsum.size else dx, *found


def _type(array):
    return jax.core.ShapedArray(array.shape, array.dtype)


def _forward_types(x, gamma, beta, residual, *, norm):
    statistics = norm.geometry.statistics_shape(x.shape)
    kept = jax.core.ShapedArray(statistics, jnp.dtype(norm.arithmetic))
    return _type(x), kept, _type(residual)


def _backward_types(x, gamma, beta, *others, norm):
    return _type(x), _type(gamma), _type(beta)


def _tangent_types(x, *others, norm):
    # By its type alone: from 0.12 on JAX asks for types where no array can be made.
    absent = jax.core.ShapedArray((0,), x.dtype)
    return _type(x), _type(x) if norm.operands.residual else absent


class _Primitives:
    """The primitives of engines, one for a platform, with every rule that JAX asks for.

    Args:
        name: of the engine, or of all.
        passes: by the name of a platform, the forward and the backward pass on arrays that lie
            there, called with the operands and the Norm.
    """

    def __init__(self, name, passes):
        forward, backward = (
            {platform: both[i] for platform, both in passes.items()} for i in range(2)
        )
        self.forward = self._primitive(
            f"{name}_forward", _meant_forward, forward, _forward_types, _lowered_forward
        )
        self.backward = self._primitive(
            f"{name}_backward", _meant_backward, backward, _backward_types
        )
        self.tangent = self._primitive(f"{name}_tangent", _meant_tangent, {}, _tangent_types)
        ad.primitive_jvps[self.forward] = self._forward_jvp
        ad.primitive_transposes[self.tangent] = self._tangent_transpose
        ad.primitive_jvps[self.tangent] = functools.partial(_jvp_of, _meant_tangent)
        ad.primitive_jvps[self.backward] = functools.partial(_jvp_of, _meant_backward)
        batching.primitive_batchers[self.forward] = self._batch_forward
        batching.primitive_batchers[self.backward] = self._batch_backward
        batching.primitive_batchers[self.tangent] = functools.partial(_vmap_of, _meant_tangent)
        self._jitted = jax.jit(self._run, static_argnums=4)

    def run(self, norm: Norm, x, operands: Operands):
        """Normalize every set of `x`, apply gamma, beta and the activation.

        Returns:
            The result, and with a residual the sum.
        """
        return self._jitted(x, operands.gamma, operands.beta, operands.residual, norm)

    def _run(self, x, gamma, beta, residual, norm):
        uniform = norm.uniform
        x = x.astype(uniform.x_dtype)
        absent = jnp.zeros(0, norm.arithmetic)
        operands = (x, *(absent if p is None else p for p in (gamma, beta)))
        added = jnp.zeros(0, x.dtype) if residual is None else residual
        # Inside shard_map and on a mesh with explicit axes a type says how its array is split, in
        # terms that are private to JAX and change with it. The composite's follow by themselves.
        if any(kind != AxisType.Auto for kind in jax.sharding.get_abstract_mesh().axis_types):
            y, _, total = _meant_forward(*operands, added, norm=uniform)
        else:
            y, _, total = self.forward.bind(*operands, added, norm=uniform)
        y = y.astype(norm.y_dtype)
        return y if residual is None else (y, total)

    @staticmethod
    def _primitive(name, meaning, natives, types, lowered=None):
        """A primitive that is what `natives` has for a platform, and elsewhere `meaning`.

        In a program that is compiled `lowered` takes the place of `meaning`, if there is one.
        """
        lowered = lowered or meaning
        primitive = Primitive(f"normwise_{name}")
        primitive.multiple_results = True
        primitive.def_abstract_eval(types)

        # Of the function and not of the primitive: where jit is disabled or a NaN is sought,
        # the primitive would only call itself.
        def evaluate(*operands, norm):
            if not natives:
                return tuple(meaning(*operands, norm=norm))
            return jax.lax.platform_dependent(
                *operands,
                default=lambda *operands: tuple(meaning(*operands, norm=norm)),
                **{
                    platform: lambda *operands, native=native: native(*operands, norm)
                    for platform, native in natives.items()
                },
            )

        jitted = jax.jit(evaluate, static_argnames="norm")

        @primitive.def_impl
        def _(*operands, norm):
            with jax.disable_jit(False):
                return jitted(*operands, norm=norm)

        mlir.register_lowering(primitive, mlir.lower_fun(lowered, multiple_results=True))
        if natives and _LACKS is None:
            # Else a lowering for several devices does not learn which; custom_partitioning must.
            _PRIVATE["devices"].add(primitive)
            for platform, native in natives.items():
                mlir.register_lowering(primitive, _lowering(lowered, native), platform=platform)
        if _LACKS is None:
            _PRIVATE["checks"][primitive] = functools.partial(_PRIVATE["nan_check"], primitive)
            _PRIVATE["jets"][primitive] = functools.partial(_jet_of, meaning)
        return primitive

    def _forward_jvp(self, primals, tangents, *, norm):
        x, gamma, beta, _ = primals
        dx, dgamma, dbeta, dresidual = tangents
        y, statistics, total = self.forward.bind(*primals, norm=norm)
        if norm.operands.residual:
            x, dx = total, ad.add_tangents(dx, dresidual)
        tangents = map(ad.instantiate_zeros, (dx, dgamma, dbeta))
        dy, dsum = self.tangent.bind(x, gamma, beta, statistics, *tangents, norm=norm)
        # The statistics follow from x, and that way is part of every derivative by x.
        return (y, statistics, total), (dy, ad.Zero(jax.typeof(statistics)), dsum)

    def _tangent_transpose(self, cotangents, x, gamma, beta, statistics, *tangents, norm):
        dy, dsum = cotangents
        dy = ad.instantiate_zeros(dy)
        dsum = jnp.zeros(0, x.dtype) if isinstance(dsum, ad.Zero) else dsum
        found = self.backward.bind(x, gamma, beta, statistics, dy, dsum, norm=norm)
        wanted = map(ad.is_undefined_primal, tangents)
        return [None] * 4 + [g if w else None for g, w in zip(found, wanted, strict=True)]

    def _batch_forward(self, operands, axes, *, norm):
        x, gamma, beta, residual = operands
        summed = [axes[0], axes[3]] if norm.operands.residual else [axes[0]]
        if axes[1:3] != (None, None) or None in summed or norm.per_sample:
            return _vmap_of(_meant_forward, operands, axes, norm=norm)
        x = jnp.moveaxis(x, axes[0], 0)
        residual = jnp.moveaxis(residual, axes[3], 0) if norm.operands.residual else residual
        found = self.forward.bind(x, gamma, beta, residual, norm=norm.of(norm.geometry.batched()))
        return found, (0, 0, 0 if norm.operands.residual else None)

    def _batch_backward(self, operands, axes, *, norm):
        x, gamma, beta, statistics, dy, dsum = operands
        # The engine sums dgamma and dbeta over outer, where one for each is asked for.
        if gamma.size or beta.size or dsum.size or None in (axes[0], axes[3], axes[4]):
            return _vmap_of(_meant_backward, operands, axes, norm=norm)
        x, statistics, dy = (jnp.moveaxis(operands[i], axes[i], 0) for i in (0, 3, 4))
        batched = norm.of(norm.geometry.batched())
        found = self.backward.bind(x, gamma, beta, statistics, dy, dsum, norm=batched)
        return found, (0, None, None)


def _lowering(meaning, native):
    lower_meaning = mlir.lower_fun(meaning, multiple_results=True)
    lower_native = mlir.lower_fun(lambda *a, norm: native(*a, norm), multiple_results=True)

    def lower(context, *operands, norm):
        # Whoever loads an exported program need not have the engine.
        exports = context.module_context.lowering_parameters.for_export
        return (lower_meaning if exports else lower_native)(context, *operands, norm=norm)

    return lower


def _jvp_of(meaning, primals, tangents, *, norm):
    tangents = tuple(map(ad.instantiate_zeros, tangents))
    return jax.jvp(functools.partial(meaning, norm=norm), tuple(primals), tangents)


def _vmap_of(meaning, operands, axes, *, norm):
    results = jax.vmap(functools.partial(meaning, norm=norm), tuple(axes))(*operands)
    return results, jax.tree.map(lambda _: 0, results)


def _jet_of(meaning, primals, series, *, norm):
    from jax.experimental import jet

    # A rule is given Taylor coefficients, and `jet` itself derivatives.
    series = [[t * math.factorial(i) for i, t in enumerate(each, 1)] for each in series]
    y, found = jet.jet(functools.partial(meaning, norm=norm), tuple(primals), series)
    # A series stands for each result of `meaning`, or is the one itself.
    several = [found] if not isinstance(y, tuple) else found
    several = [[t / math.factorial(i) for i, t in enumerate(each, 1)] for each in several]
    return y, several if isinstance(y, tuple) else several[0]


def _callbacks(engine: Engine):
    """The passes of an engine that takes NumPy arrays, as calls from JAX back to Python."""

    def call(engines_pass, types, operands, norm):
        def back(*operands):
            x, *operands = map(np.asarray, operands)
            parameters = (p if p.size else None for p in operands[:2])
            results = [np.zeros(kind.shape, kind.dtype) for kind in types]
            wanted = [r if r.size or r is results[0] else None for r in results]
            here = norm.of(dataclasses.replace(norm.geometry, shape=x.shape))
            engines_pass(here, x, *parameters, *operands[2:], *wanted)
            return tuple(results)

        return jax.pure_callback(back, types, *operands)

    # A Kernel of an engine that adds nothing is given no residual.
    def forward(x, gamma, beta, residual, norm):
        *types, _ = _forward_types(x, gamma, beta, residual, norm=norm)
        return *call(engine.forward, types, (x, gamma, beta), norm), residual

    def backward(x, gamma, beta, statistics, dy, dsum, norm):
        types = _backward_types(x, gamma, beta, norm=norm)
        return call(engine.backward, types, (x, gamma, beta, statistics, dy), norm)

    return forward, backward


@functools.cache
def _register():
    """Make the library's handlers known to XLA."""
    handlers = library.load()
    for name in ("normwise_jax_forward", "normwise_jax_backward"):
        handler = jax.ffi.pycapsule(getattr(handlers, name))
        jax.ffi.register_ffi_target(name, handler, platform="cpu")


def _native(target, types, meant):
    """A pass of the native library as a function of arrays."""

    def call(*operands):
        *operands, norm = operands
        if cpu.why_not(norm) is not None:
            # Chosen for a GPU, and compiled for the CPU.
            return meant(*operands, norm=norm)
        _register()
        words = np.frombuffer(bytes(cpu.describe(norm)), np.int64)
        return jax.ffi.ffi_call(target, types(*operands, norm=norm))(*operands, norm=words)

    return call


_ENGINES = {
    "cpu": partitioned.passes(
        _native("normwise_jax_forward", _forward_types, _lowered_forward),
        _native("normwise_jax_backward", _backward_types, _meant_backward),
    ),
    **dict.fromkeys(
        _GPUS,
        partitioned.passes(
            jax_gpu.passed(jax_gpu.forward, _lowered_forward, _forward_types),
            jax_gpu.passed(jax_gpu.backward, _meant_backward, _backward_types),
        ),
    ),
}
_NATIVE = _Primitives("native", _ENGINES)


def accelerator() -> str | None:
    """The first GPU's name, None where JAX runs on the CPU."""
    return None if _on_cpu() else jax.devices()[0].device_kind


KERNELS = (
    kernel_of(cpu.ENGINE, _NATIVE),
    Kernel(
        gpu.NAME,
        _why_not_on_gpu,
        _NATIVE.run,
        is_elsewhere=lambda x: not _on_gpu(),
        adds=lambda norm, x, residual: True,
    ),
    composite.COMPOSITE,
)
