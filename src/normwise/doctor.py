"""What will run here, and why: for a layer on a shape, and for this machine."""

import importlib.metadata
import platform
from collections.abc import Callable
from typing import Any

import keras

from normwise import activations, dispatch, geometry, kernels, ops
from normwise.kernels import gpu, library
from normwise.layers import Modulated, ReversibleInstanceNormalization
from normwise.layers.affine import Affine
from normwise.norm import PER_SAMPLE, SHARED, Norm, Operands, check_dtype
from normwise.typing import DType, Shape, Tensor


def explain(
    what: keras.Layer | Callable[..., Tensor],
    shape: Shape,
    dtype: DType | None = None,
    **options: Any,
) -> dispatch.Choice:
    """Say which kernel will run, and why.

    Args:
        what: a layer of normwise, or a function of normwise.ops.
        shape: of the input; an extent that is not known is None.
        dtype: of the input, by default the layer's compute dtype or `keras.config.floatx()`.
        **options: of the function, as `groups` and `axis`.

    Returns:
        A Choice with the kernel's name and the reason, for an input on the device that the backend
        puts its tensors on, and outside of a trace: under XLA on TensorFlow, torch.compile or an
        export, the composite runs instead. Printed, it lists every kernel that was asked, with what
        speaks against it.

    Raises:
        ValueError, TypeError: as the layer or function itself would on this shape.

    Example:

    >>> import normwise
    >>> layer = normwise.layers.LayerNormalization(axis=1)
    >>> with normwise.use_kernels("composite"):
    ...     normwise.explain(layer, (8, 96, 56, 56))
    Choice(kernel='composite', reason="use_kernels('composite') is in force")
    """
    return dispatch.choose(_norm(what, shape, dtype, **options))


def _norm(what: Any, shape: Shape, dtype: DType | None, **options: Any) -> Norm:
    if isinstance(what, (Affine, Modulated, ReversibleInstanceNormalization)):
        if options:
            raise TypeError(f"a layer has its options itself; leave out {', '.join(options)}")
        norm, lies = (what.norm, PER_SAMPLE) if isinstance(what, Modulated) else (what, SHARED)
        # What stands for rms_scaling is a layer norm with a mask.
        mask = getattr(norm, "rms_scaling", False) or None
        operands = Operands(lies, lies, mask, norm.learned_epsilon or None)
        given, result = check_dtype(dtype or what.compute_dtype), what.compute_dtype
        sets, subtract_mean = norm.geometry(shape), norm.subtract_mean
        return Norm(sets, given, result, norm.epsilon, subtract_mean, operands=operands)
    operation = ops.operation_of(what)
    options = {**what.__kwdefaults__, **options}
    others = [options.pop(name, None) for name in ("mask", "learned_epsilon", "residual")]
    for name in ("gamma_offset", "return_statistics"):  # no matter to a kernel
        del options[name]
    options["activation"] = activations.IDENTITY
    x = keras.KerasTensor(shape, dtype or keras.config.floatx())
    return operation.norm(x, Operands(SHARED, SHARED, *others).lie(), **options)


def report() -> dict[str, str]:
    """What matters for normwise on this machine: versions, processors and kernels, in words."""
    versions = {}
    frameworks = ("tensorflow", "tensorflow-cpu", "jax", "torch")
    for name in ("normwise", "keras", *frameworks, "triton", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    native = library.missing()
    if native is None:
        native = f"{library.instructions()} instructions, up to {library.threads()} threads"
    usual = Norm(geometry.layer((8, 128, 768)), "float32", "float32", 1e-3)
    return {
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        **versions,
        "Keras backend": keras.backend.backend(),
        "kernels in force": dispatch.mode(),
        "native kernels": native,
        "GPU": kernels.accelerator() or f"{keras.backend.backend()} has none",
        "GPU kernels": gpu.missing() or "Triton is installed",
        **{
            f"kernel {kernel.name}": kernel.why_not(usual, None) or "can run here"
            for kernel in kernels.listed()
        },
    }
