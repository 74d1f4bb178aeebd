"""What will run here, and why: for a layer on a shape, and for this machine."""

import importlib.metadata
import platform

import keras

from normwise import dispatch, ops
from normwise.kernels import library


def explain(what, shape, dtype=None, **options) -> dispatch.Choice:
    """Say which kernel will run, and why.

    Args:
        what: a layer of normwise, or a function of normwise.ops.
        shape: of the input; an extent that is not known is None.
        dtype: of the input, by default the layer's compute dtype or `keras.config.floatx()`.
        **options: of the function, as `groups` and `axis`.

    Returns:
        A Choice with the kernel's name and the reason, for an input on the CPU and outside of a
        trace: under XLA on TensorFlow, torch.compile or an export, the composite runs instead.

    Raises:
        ValueError, TypeError: as the layer or function itself would on this shape.

    Example:

    >>> import normwise
    >>> layer = normwise.layers.LayerNormalization(axis=1)
    >>> with normwise.use_kernels("composite"):
    ...     normwise.explain(layer, (8, 96, 56, 56))
    Choice(kernel='composite', reason="use_kernels('composite') is in force")
    """
    if isinstance(what, keras.layers.Layer) and hasattr(what, "geometry"):
        plan, epsilon, result = what.geometry(shape), what.epsilon, what.compute_dtype
        centred, learned = what.subtract_mean, what.learned_epsilon
    else:
        epsilon = options.pop("epsilon", 1e-3)
        learned = options.pop("learned_epsilon", None) is not None
        plan, result = ops.geometry_of(what, shape, **options), None
        centred = ops.operation_of(what).centred
    given, result = (keras.backend.standardize_dtype(d) for d in (dtype or result, result or dtype))
    through = ops.kernel_dtype(given, result)
    epsilon = None if learned else epsilon
    return dispatch.choose(plan, dtype=through, epsilon=epsilon, masked=False, centred=centred)


def report() -> dict[str, str]:
    """What matters for normwise on this machine: versions, backend, CPU and kernels, in words."""
    versions = {}
    for name in ("normwise", "keras", "tensorflow", "tensorflow-cpu", "jax", "torch", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    native = library.missing()
    if native is None:
        native = f"{library.instructions()} instructions, up to {library.threads()} threads"
    return {
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        **versions,
        "Keras backend": keras.backend.backend(),
        "kernels in force": dispatch.mode(),
        "native kernels": native,
    }
