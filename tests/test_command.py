"""The script `normwise` runs with whichever backend is installed."""

import json
import os
import subprocess
import sys

import pytest

import normwise_command


@pytest.mark.parametrize(
    ("installed", "variable", "file", "chosen"),
    [
        ({"tensorflow", "jax", "torch"}, None, None, "tensorflow"),
        ({"jax", "torch"}, None, None, "jax"),
        ({"torch"}, None, None, "torch"),
        # Keras itself writes this file, whatever is installed.
        ({"jax"}, None, "tensorflow", "jax"),
        ({"jax", "torch"}, None, "torch", None),
        ({"jax", "torch"}, "torch", "jax", "torch"),
        ({"jax"}, "openvino", None, "openvino"),
    ],
)
def test_the_backend_is_one_that_is_installed(
    monkeypatch, tmp_path, installed, variable, file, chosen
):
    settle(monkeypatch, tmp_path, installed, variable, file)
    normwise_command.choose_backend()
    # None: Keras reads its file by itself.
    assert os.environ.get("KERAS_BACKEND") == chosen


@pytest.mark.parametrize(
    ("installed", "variable", "file", "texts"),
    [
        (set(), None, None, ["none is installed", "pip install 'normwise[jax]'"]),
        ({"jax"}, "torch", None, ["backend torch, which is not", "'normwise[torch]'"]),
        ({"jax"}, "tensorflow", None, ["backend tensorflow, which is not"]),
        ({"tensorflow"}, None, "jax", ["backend jax, which is not", "'normwise[jax]'"]),
        ({"jax"}, "nope", None, ["backend nope, which there is not", "tensorflow, jax or torch"]),
    ],
)
def test_a_backend_that_is_not_installed_is_refused(
    monkeypatch, tmp_path, installed, variable, file, texts
):
    settle(monkeypatch, tmp_path, installed, variable, file)
    with pytest.raises(SystemExit) as refused:
        normwise_command.choose_backend()
    # sys.exit prints a text and exits with 1.
    assert all(text in refused.value.code for text in texts)


def settle(monkeypatch, folder, installed, variable, file):
    """Pretend what is installed and what the user has set."""
    monkeypatch.setattr(
        normwise_command.importlib.util,
        "find_spec",
        lambda name: name if name in installed else None,
    )
    monkeypatch.setenv("KERAS_HOME", str(folder))
    monkeypatch.setenv("KERAS_BACKEND", variable or "")
    if not variable:
        monkeypatch.delenv("KERAS_BACKEND")
    if file:
        (folder / "keras.json").write_text(json.dumps({"backend": file}))


def test_the_script_sets_the_backend_before_keras_is_imported(tmp_path):
    """As for a user of JAX alone: Keras's own default is TensorFlow, which is not there."""
    program = (
        "import importlib.util, sys; found = importlib.util.find_spec;"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'tensorflow' "
        "else found(name, *rest); sys.argv = ['normwise', '--version'];"
        "import normwise_command; normwise_command.main()"
    )
    environment = {k: v for k, v in os.environ.items() if k != "KERAS_BACKEND"}
    environment["KERAS_HOME"] = str(tmp_path)
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.startswith("normwise ")
    assert "keras.src.backend.jax" in shown.stderr
    assert "keras.src.backend.tensorflow.core" not in shown.stderr
