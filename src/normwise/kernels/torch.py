"""PyTorch's own fused norms, where they keep the numerics contract.

Its layer norm and RMS norm over trailing axes do: their moments are Welford's, exact for equal
elements. Its group norm does not: channels last, it takes E[x^2] - E[x]^2 of the raw data.
"""

from normwise.geometry import Geometry


def normalize(x, gamma, beta, geometry: Geometry, *, epsilon: float, centred: bool):
    """Normalize every set of `x`, the sets being its trailing axes; see composite.normalize."""
    from torch.nn import functional

    shape = geometry.parameter_shape
    if centred:
        return functional.layer_norm(x, shape, gamma, beta, epsilon)
    y = functional.rms_norm(x, shape, gamma, epsilon)
    return y if beta is None else y + beta
