"""The kernels: how a norm is computed once its geometry is known.

No other package imports a framework.
"""

from normwise.kernels import composite, torch

KERNELS = {"composite": composite, "torch": torch}
