"""The script `normwise`: let Keras find a backend that is installed, then run the command line.

It stands beside the package because importing anything of the package imports Keras, which reads
its backend then and never again.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

BACKENDS = ("tensorflow", "jax", "torch")
OTHER_BACKENDS = ("numpy", "openvino")  # of Keras, which do not train


def main() -> None:
    """Choose a backend and run the command line."""
    choose_backend()
    from normwise.cli import app

    app()


def choose_backend() -> None:
    """Set KERAS_BACKEND to an installed backend, unless the user named one.

    Keras falls back on TensorFlow, and writes that name into a new keras.json whatever the user
    runs; so "tensorflow" in that file is no wish, and any other name is.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    wanted = os.environ.get("KERAS_BACKEND")
    if not wanted and (configured := _configured_backend()) != "tensorflow":
        wanted = configured
    if wanted:
        if wanted not in BACKENDS + OTHER_BACKENDS:
            sys.exit(
                f"Error: Keras is set to the backend {wanted}, which there is not; set "
                f"KERAS_BACKEND to {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}"
            )
        if wanted in BACKENDS and importlib.util.find_spec(wanted) is None:
            sys.exit(
                f"Error: Keras is set to the backend {wanted}, which is not installed; run "
                f"pip install 'normwise[{wanted}]', or set KERAS_BACKEND to one that is"
            )
        return
    for backend in BACKENDS:
        if importlib.util.find_spec(backend) is not None:
            os.environ["KERAS_BACKEND"] = backend
            return
    sys.exit(
        "Error: Keras needs TensorFlow, JAX or PyTorch, and none is installed; run "
        "pip install 'normwise[jax]' (or [tensorflow], or [torch])"
    )


def _configured_backend() -> str | None:
    folder = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras")
    try:
        return json.loads((folder / "keras.json").read_text()).get("backend")
    except (OSError, ValueError, AttributeError):
        return None
