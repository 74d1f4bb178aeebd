"""Functions of TensorFlow by keras.ops, with the arguments that Keras 2 keeps in a file."""

import keras
import numpy as np
import old_models
import pytest
from frameworks import to_numpy

from normwise import migrate
from normwise.migrate.models import operations

X = np.arange(1.0, 13.0, dtype="float32").reshape(2, 2, 3) / 7.0
NORM = np.sqrt((X**2).sum(-1, keepdims=True))
SOFTMAX = np.exp(X) / np.exp(X).sum(-1, keepdims=True)
FULL = {"start": None, "stop": None, "step": None}

CASES = [
    ("__operators__.getitem", [X], {"slice_spec": [FULL, {"start": 1, "stop": None}]}, X[:, 1:]),
    ("__operators__.getitem", [X], {"slice_spec": [FULL, None, 0]}, X[:, None, 0]),
    ("__operators__.getitem", [X], {"slice_spec": [{"class_name": "__ellipsis__"}, 2]}, X[..., 2]),
    ("math.subtract", [2.0], {"y": X}, 2.0 - X),
    ("math.truediv", [X], {"y": 4.0}, X / 4.0),
    ("math.pow", [X], {"y": 2}, X**2),
    ("math.squared_difference", [X], {"y": 1.0}, (X - 1.0) ** 2),
    ("math.add_n", [[X, X, X]], {}, 3 * X),
    ("math.greater", [X], {"y": 1.0}, X > 1.0),
    ("math.reduce_mean", [X], {"axis": [1], "keepdims": True}, X.mean(1, keepdims=True)),
    ("math.reduce_std", [X], {"axis": -1}, X.std(-1)),
    ("math.l2_normalize", [X], {"axis": -1}, X / NORM),
    ("compat.v1.norm", [X], {"ord": "euclidean", "axis": 2, "keepdims": None}, NORM[..., 0]),
    ("compat.v1.gather", [X], {"indices": [0, 2], "axis": 2, "batch_dims": 0}, X[..., [0, 2]]),
    ("compat.v1.squeeze", [X[:, :1]], {"axis": [1]}, X[:, 0]),
    ("compat.v1.transpose", [X], {"perm": [0, 2, 1], "conjugate": False}, X.transpose(0, 2, 1)),
    (
        "compat.v1.pad",
        [X],
        {"paddings": [[0, 0], [1, 0], [0, 2]], "mode": "CONSTANT", "constant_values": 3},
        np.pad(X, [[0, 0], [1, 0], [0, 2]], constant_values=3),
    ),
    ("concat", [[X, X]], {"axis": 1}, np.concatenate([X, X], 1)),
    ("expand_dims", [X], {"axis": 1}, X[:, None]),
    ("linalg.matmul", [X], {"b": X, "transpose_b": True}, X @ X.transpose(0, 2, 1)),
    ("nn.softmax", [X], {}, SOFTMAX),
    ("nn.log_softmax", [X], {"axis": -1}, np.log(SOFTMAX)),
    ("clip_by_value", [X], {"clip_value_min": 0.5, "clip_value_max": 1}, X.clip(0.5, 1.0)),
    ("reshape", [X], {"shape": [-1, 6]}, X.reshape(-1, 6)),
    ("reverse", [X], {"axis": [1]}, X[:, ::-1]),
    ("stack", [[X, X]], {"axis": 1}, np.stack([X, X], 1)),
    ("tile", [X], {"multiples": [1, 2, 1]}, np.tile(X, [1, 2, 1])),
    ("where", [X > 1.0], {"x": X, "y": -X}, np.where(X > 1.0, X, -X)),
]


def tensors(structure):
    return keras.tree.map_structure(
        lambda each: keras.ops.convert_to_tensor(each) if isinstance(each, np.ndarray) else each,
        structure,
    )


@pytest.mark.parametrize(("name", "inputs", "options", "expected"), CASES)
def test_functions(name, inputs, options, expected):
    options = {key: tensors(v) if isinstance(v, np.ndarray) else v for key, v in options.items()}
    found = to_numpy(operations.find({"function": name})(*tensors(inputs), **options))
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)


def test_splits_are_by_number_or_by_sizes():
    split = operations.find({"function": "split"})
    for sizes, shapes in ((3, [1, 1, 1]), ([1, 2], [1, 2])):
        parts = split(keras.ops.convert_to_tensor(X), num_or_size_splits=sizes, axis=2)
        assert [part.shape[2] for part in parts] == shapes


def test_what_has_no_equal_is_named():
    with pytest.raises(ValueError, match=r"the model calls tf\.signal\.fft, for which there is no"):
        operations.find({"function": "signal.fft"})
    with pytest.raises(ValueError, match=r"tf\.gather with batch_dims"):
        operations.find({"function": "gather"})(X, indices=[0], batch_dims=1)


def test_a_constant_among_the_options_of_a_call(tmp_path):
    add = {**old_models.layer("TFOpLambda", "add", function="math.add"), "name": "add"}
    config = old_models.functional([(old_models.input_layer("x", 4), [])], ["x"], ["add"])
    options = {"y": ["_CONSTANT_VALUE", -1, 2.5], "name": None}
    config["config"]["layers"].append({**add, "inbound_nodes": [["x", 0, 0, options]]})
    model = migrate.load_model(old_models.write_h5(tmp_path / "old.h5", config, {}))
    assert to_numpy(model(np.ones((1, 4), "float32"))).tolist() == [[3.5] * 4]
