"""What Keras keeps to itself and this project needs, as Keras 3.12 to 3.15.1 have it.

No other module outside of `kernels/` names it. Where a version lacks a name, the function here does
without, or says so.
"""

import importlib
from typing import Any

_STATE = "keras.src.backend.common.global_state"


def saved_axes(config: dict[str, Any]) -> dict[str, Any]:
    """A config whose axes come back from a legacy `.h5` file too.

    Keras's reader of such files drops `axis` where that is a list of several; in what it writes to
    one they therefore stand under `axes` as well.
    """
    state = _find(_STATE, "get_global_attribute", lambda name: None)
    if not isinstance(config["axis"], int) and state("use_legacy_config"):
        return {**config, "axes": list(config["axis"])}
    return config


def restored_axes(config: dict[str, Any]) -> dict[str, Any]:
    """What `saved_axes` was given.

    Raises:
        ValueError: a config that was saved, and so has a dtype, has no axis.
    """
    config = dict(config)
    if "axes" in config:
        config["axis"] = config.pop("axes")
    elif "dtype" in config and "axis" not in config:
        raise ValueError(
            f"the config of {config.get('name')!r} has lost its axis: Keras drops a list of axes "
            "when it reads an .h5 file or a config of Keras 2; load a model of Keras 2 by "
            "normwise.migrate.load_model; of Keras 3, build the model in code, read the file by "
            "its load_weights, and save it as .keras"
        )
    return config


def _find(module: str, name: str, default):
    """A function of a module, or what serves where there is none."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return default
