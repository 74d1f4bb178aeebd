"""Leaving TensorFlow Addons: its saved models, its weights and its source code.

Each function is imported when it is first asked for: reading a model needs h5py, rewriting source
LibCST, and training neither.
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
