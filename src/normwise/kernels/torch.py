"""PyTorch's own fused norms, called so that they keep the numerics contract.

Layer norm and RMS norm do as they are: (x - mean) * inv_std, with Welford's moments. Group norm
calculates x * scale + shift, where at mean 1e4 beta loses half its digits, and channels last takes
E[x^2] - E[x]^2, where none is left; so it is given x - mean.
"""

from normwise.geometry import Geometry
from normwise.kernels import composite

# Channels last, torch's group norm works along the channels; with fewer than a few vectors of them
# a copy to channels first is sooner done: 0.2 ms for 1.0 at (32, 26, 26, 10), 5 groups.
_FEW_CHANNELS = 32


def normalize(x, gamma, beta, geometry: Geometry, *, epsilon: float, centred: bool):
    """Normalize every set of `x`; arguments and result are those of composite.normalize."""
    if "groups" in geometry.per:
        return _group_norm(x, gamma, beta, geometry, epsilon)
    from torch.nn import functional

    shape = geometry.parameter_shape
    if centred:
        return functional.layer_norm(x, shape, gamma, beta, epsilon)
    y = functional.rms_norm(x, shape, gamma, epsilon)
    return y if beta is None else y + beta


def _group_norm(x, gamma, beta, geometry: Geometry, epsilon: float):
    import torch

    if gamma is None and beta is not None:
        # torch 2.13's backward of beta alone fails: "tensor does not have a device".
        gamma = torch.ones_like(beta)
    (channel,) = geometry.parameter_axes
    # Any shift leaves y as it is, so no gradient need pass through this one.
    mean = composite.total(x.detach(), geometry) / composite.set_size(x, geometry)
    deviation = (x - mean).movedim(channel, 1)
    if deviation.shape[1] < _FEW_CHANNELS:
        deviation = deviation.contiguous()
    return torch.group_norm(deviation, geometry.groups, gamma, beta, epsilon).movedim(1, channel)
