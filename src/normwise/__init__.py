"""Group, instance, layer and RMS normalization for Keras 3, right on every axis, dtype and backend.

>>> import numpy as np, normwise
>>> layer = normwise.layers.GroupNormalization(groups=5, axis=3)
>>> tuple(layer(np.ones((32, 26, 26, 10), "float32")).shape)
(32, 26, 26, 10)
"""

import importlib.metadata

from normwise import geometry, layers, ops, rnn
from normwise.dispatch import use_kernels
from normwise.doctor import explain

__all__ = [
    "explain",
    "figures",
    "geometry",
    "layers",
    "migrate",
    "models",
    "ops",
    "rnn",
    "use_kernels",
]


# What needs more than Keras, as Matplotlib or h5py, is imported when it is asked for.
_ON_DEMAND = {
    "figures": "normwise.tutorial.figures",
    "migrate": "normwise.migrate",
    "models": "normwise.models",
}


def __getattr__(name: str):
    if name == "__version__":
        return _version()
    if name in _ON_DEMAND:
        return importlib.import_module(_ON_DEMAND[name])
    raise AttributeError(f"module 'normwise' has no attribute {name!r}")


def _version() -> str:
    """The version that was installed: the tag's, or one that counts the commits since."""
    try:
        return importlib.metadata.version("normwise")
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"  # run from its sources, and not installed
