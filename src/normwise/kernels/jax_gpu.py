"""The Triton kernels on JAX: a pass as a function of arrays, with a custom call for each launch.

jaxlib has the custom call. It is given a launch as a message: the kernel's code, how many programs
run, and what their parameters are; the buffers follow from its operands and results, in order.
XLA sees functions without effects, and does with them what it does with its own.
"""

import dataclasses
import functools
import os
import tempfile
import zlib

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir

from normwise.kernels import gpu, private
from normwise.norm import PER_SAMPLE, SHARED, Norm

# XLA aligns what it allocates to more, and jaxlib checks it at each launch.
_ALIGNMENT = 16


def why_not(norm: Norm) -> str | None:
    """Why the kernels cannot calculate this norm on the GPUs here, or None."""
    return gpu.why_not(norm) or _why_not_here()


@functools.cache
def _why_not_here() -> str | None:
    if gpu.interpreted():
        return "TRITON_INTERPRET is set, and JAX calls compiled kernels only"
    lacks = private.missing(private.JAX_GPU)
    if lacks is not None:
        return lacks
    found = device()
    return found if isinstance(found, str) else None


@functools.cache
def device():
    """What plans depend on, of the GPUs of this process, or why no kernel can be made for them."""
    from normwise.kernels.gpu.launch import Device

    try:
        gpus = jax.local_devices(backend="gpu")
    except RuntimeError:
        return "JAX has no GPU here"
    kinds = {(each.compute_capability, each.core_count) for each in gpus}
    if len(kinds) > 1:
        names = ", ".join(sorted({each.device_kind for each in gpus}))
        return f"a program is compiled for one kind of GPU, and there are {names}"
    ((capability, multiprocessors),) = kinds
    if not capability.startswith("gfx"):
        return Device("cuda", int(capability.replace(".", "")), 32, multiprocessors)
    arch = capability.partition(":")[0]
    if not arch.startswith("gfx9"):
        return f"jaxlib launches Triton kernels in warps of 64 threads, and {arch} has 32"
    return Device("hip", arch, 64, multiprocessors)


def forward(x, gamma, beta, residual, norm: Norm):
    """The result and the statistics of x, and its sum with a residual, empty where none is."""
    from normwise.kernels.gpu import plan

    statistics = norm.geometry.statistics_shape(x.shape)
    statistics = jax.ShapeDtypeStruct(statistics, norm.arithmetic)
    operands = {"x": x, "gamma": gamma, "beta": beta, "residual": residual}
    results = {"y": x, "statistics": statistics, "sum": residual}
    found = _run(plan.forward(norm, device()), operands, results)
    return found["y"], found["statistics"], found.get("sum", residual)


def backward(x, gamma, beta, statistics, dy, dsum, norm: Norm):
    """The gradients by x, gamma and beta; that of one that is absent is absent too.

    With a residual x is the sum, and dsum, if it is not empty, what comes to it by another way.
    """
    from normwise.kernels.gpu import plan

    launches = plan.backward(norm, device(), gamma.size > 0, beta.size > 0, dsum.size > 0)
    operands = {"x": x, "gamma": gamma, "beta": beta, "statistics": statistics}
    operands |= {"dy": dy, "dsum": dsum}
    found = _run(launches, operands, {"dx": x, "dgamma": gamma, "dbeta": beta})
    return found["dx"], found.get("dgamma", gamma), found.get("dbeta", beta)


def _run(launches, operands: dict, results: dict) -> dict:
    """All buffers after a pass, by their names.

    Args:
        launches: the Pass.
        operands: arrays by their names.
        results: arrays or types of the shape and dtype of each result, by their names.
    """
    scratch = {
        name: jax.ShapeDtypeStruct((elements,), "float32")
        for name, elements in launches.scratch.items()
    }
    buffers, types = dict(operands), {**results, **scratch}
    for launch in launches.launches:
        reads, writes = ([n for n in names if n] for names in (launch.reads, launch.writes))
        given = {name: buffers[name] for name in reads}
        made = {name: jax.ShapeDtypeStruct(types[name].shape, types[name].dtype) for name in writes}
        buffers.update(zip(writes, _call(launch, given, made), strict=True))
    return buffers


def _call(launch, operands: dict, results: dict):
    """One launch: what it leaves in its results, for arrays and types by their names."""
    dtypes = {name: each.dtype.name for name, each in {**operands, **results}.items()}
    name = f"normwise_{launch.kernel.__name__}"
    opaque = zlib.compress(_described(launch, dtypes).to_proto(name, b""))
    types, arrays = list(results.values()), operands.values()
    if any(map(private.find, private.JAX_GPU_RECORDED)):
        return jax.ffi.ffi_call("triton_kernel_call_ffi", types)(*arrays, opaque=opaque)
    options = {"custom_call_api_version": 2, "legacy_backend_config": opaque}
    return jax.ffi.ffi_call("triton_kernel_call", types, **options)(*arrays)


def _described(launch, dtypes: dict):
    """A launch as jaxlib describes it."""
    from normwise.kernels.gpu.launch import compiled

    names = {name: private.find(each.path) for name, each in private.JAX_GPU.items()}
    kernel = compiled(launch, dtypes, device(), **_options(device()))
    signature = launch.source(dtypes).signature
    arguments = launch.arguments({name: name for name in launch.buffers})
    parameters = []
    for kind, argument in zip(signature.values(), arguments, strict=True):
        if kind.startswith("*"):
            parameters.append(names["array"](0, _ALIGNMENT))
        elif kind != "constexpr":
            parameters.append(names["scalar"](argument, kind))
    return names["call"](_code(kernel, names["kernel"]), launch.programs, 1, 1, parameters)


def _options(known) -> dict:
    """The oldest PTX that knows a device: JAX assembles it, by a CUDA older than Triton's."""
    if known.backend != "cuda":
        return {}
    newer = {100: 86, 101: 86, 120: 87, 103: 88, 121: 88}
    return {"ptx_version": newer.get(known.arch, 80 if known.arch < 100 else 88)}


@functools.cache
def _code(kernel, make):
    """A compiled kernel as jaxlib loads it: PTX, or a file's path, which it reads and deletes."""
    known, arch = kernel.metadata, device().arch
    if "hsaco" in kernel.asm:
        handle, code = tempfile.mkstemp(suffix=".hsaco")
        with os.fdopen(handle, "wb") as file:
            file.write(kernel.asm["hsaco"])
        arch = 0
    else:
        code = kernel.asm["ptx"]
    clusters, source = 1, ""
    return make(known.name, known.num_warps, clusters, known.shared, code, source, arch)


def _of(norm: Norm, x, gamma, beta) -> Norm:
    """The norm of arrays of these types: a batched or a split one does not know them before."""
    lies = PER_SAMPLE if norm.per_sample else SHARED
    gamma, beta = (lies if p.size else None for p in (gamma, beta))
    geometry = dataclasses.replace(norm.geometry, shape=x.shape)
    operands = norm.operands._replace(gamma=gamma, beta=beta)
    return dataclasses.replace(norm, geometry=geometry, operands=operands)


def passed(function, meant, types):
    """A pass of the kernels, of which everything is decided where a program is compiled.

    So whatever traces it brings no Triton, and learns nothing of GPUs.

    Args:
        function: `forward` or `backward`.
        meant: the same by other means, where the kernels cannot calculate a norm.
        types: of the results, for operands and the Norm.
    """
    primitive = Primitive(f"normwise_triton_{function.__name__}")
    primitive.multiple_results = True
    primitive.def_abstract_eval(types)
    # Operation by operation, as JAX seeks a NaN, there is nothing but the meaning to see.
    primitive.def_impl(meant)
    lower_meant = mlir.lower_fun(meant, multiple_results=True)
    lower_kernels = mlir.lower_fun(function, multiple_results=True)

    def lower(context, *operands, norm):
        here = _of(norm, *context.avals_in[:3])
        chosen = lower_meant if why_not(here) else lower_kernels
        return chosen(context, *operands, norm=here)

    mlir.register_lowering(primitive, lower)
    return lambda *operands: tuple(primitive.bind(*operands[:-1], norm=operands[-1]))
