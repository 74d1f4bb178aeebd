"""Leaving TensorFlow Addons: its saved models, its weights and its source code.

Keras 3 has a reader of old `.h5` files, which is not enough: it reads neither the `.keras` files of
Keras 2 nor SavedModels nor checkpoints, knows no layer of TensorFlow Addons and no function of
TensorFlow between layers, refuses options that Keras 3 dropped, loses lists of axes, pairs weights
by their order alone, and hands whatever a file holds to HDF5 in the process that asks.

Each function is imported when it is first asked for: reading a model needs h5py, and training does
not.
"""

import importlib

_HOMES = {
    "convert": "models.conversion",
    "load_model": "models.loading",
    "load_weights": "models.loading",
    "rewrite_source": "source",
}

__all__ = ["convert", "load_model", "load_weights", "rewrite_source"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'normwise.migrate' has no attribute {name!r}")
    return getattr(importlib.import_module(f"normwise.migrate.{_HOMES[name]}"), name)


def __dir__():
    return sorted(__all__)
