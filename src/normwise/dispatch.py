"""Which kernel runs, decided in one place and with a reason."""

import dataclasses

from normwise.geometry import Geometry


@dataclasses.dataclass(frozen=True)
class Choice:
    """A kernel by the name of its module in `normwise.kernels`, and why it was chosen."""

    kernel: str
    reason: str


def choose(geometry: Geometry, *, backend: str, epsilon: float, masked: bool) -> Choice:
    """Choose the kernel for one call.

    Args:
        geometry: of the input.
        backend: Keras's backend, as `keras.backend.backend()` names it.
        epsilon: added to the variance.
        masked: whether the call has a mask.

    Example:

    >>> from normwise import geometry
    >>> choose(geometry.group((8, 4, 4, 6), groups=3), backend="jax", epsilon=1e-3, masked=False)
    Choice(kernel='composite', reason='jax has no kernel of its own for this norm')
    """
    if backend != "torch":
        return Choice("composite", f"{backend} has no kernel of its own for this norm")
    if masked:
        return Choice("composite", "torch's fused norms take no mask")
    if epsilon == 0:
        return Choice("composite", "torch's fused norms give NaN for equal elements at epsilon 0")
    if 0 in geometry.shape:
        return Choice("composite", "torch's fused norms give NaN gradients for empty inputs")
    if geometry.trailing:
        return Choice("torch", "the sets are whole trailing axes, one fused call in torch")
    if geometry.per == ("outer", "groups"):
        return Choice("torch", "the sets are groups of channels, one fused call in torch")
    return Choice("composite", "torch has no fused norm over these axes")
