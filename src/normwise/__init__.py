"""Group, instance, layer and RMS normalization for Keras 3, right on every axis, dtype and backend.

>>> import numpy as np, normwise
>>> layer = normwise.layers.GroupNormalization(groups=5, axis=3)
>>> tuple(layer(np.ones((32, 26, 26, 10), "float32")).shape)
(32, 26, 26, 10)
"""

import importlib

from normwise import geometry, layers, ops
from normwise.dispatch import use_kernels
from normwise.doctor import explain

__version__ = "0.1.0.dev0"

__all__ = ["explain", "figures", "geometry", "layers", "ops", "use_kernels"]


def __getattr__(name: str):
    # The figures need Matplotlib, which a program that only trains should not have to install.
    if name == "figures":
        return importlib.import_module("normwise.tutorial.figures")
    raise AttributeError(f"module 'normwise' has no attribute {name!r}")
