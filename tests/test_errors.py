"""Errors, word for word: each names the value, the rule and the remedy."""

import re

import keras
import numpy as np
import pytest
from frameworks import BACKEND

from normwise import ops
from normwise.layers import (
    GroupNormalization,
    InstanceNormalization,
    LayerNormalization,
    RMSNormalization,
)

CHANNEL_LAYERS = [GroupNormalization, InstanceNormalization]
AXES_LAYERS = [LayerNormalization, RMSNormalization]
LAYERS = [*CHANNEL_LAYERS, *AXES_LAYERS]
CHANNEL_OPS = [ops.group_norm, ops.instance_norm]
AXES_OPS = [ops.layer_norm, ops.rms_norm]
OPS = [*CHANNEL_OPS, *AXES_OPS]

X = np.ones((8, 4, 32), "float32")


def raises(error, text):
    """The whole message; Keras wraps those of a call in its own lines."""
    return pytest.raises(error, match=rf"(^|\x1b\[1m){re.escape(text)}($|\x1b\[0m)")


NO_GROUPS = " is no number of groups; expected a positive int, or -1 for one group per channel "
NO_GROUPS += "(instance norm)"


@pytest.mark.parametrize("groups", [0, -2, -32, True, False, 2.0, 1.5, "32", None, [2]])
def test_groups_that_are_no_number_of_groups(groups):
    for call in (
        lambda: GroupNormalization(groups=groups),
        lambda: ops.group_norm(X, groups=groups),
    ):
        with raises(ValueError, f"groups={groups!r}{NO_GROUPS}"):
            call()


@pytest.mark.parametrize(
    ("groups", "channels", "text"),
    [
        (
            3,
            32,
            "groups=3 does not divide the 32 channels on axis -1 of shape (8, 32); use 1, 2, 4, 8, "
            "16 or 32",
        ),
        (
            32,
            10,
            "groups=32 is more than the 10 channels on axis -1 of shape (8, 10); use 1, 2, 5 or 10",
        ),
        (2, 1, "groups=2 is more than the 1 channels on axis -1 of shape (8, 1); use 1"),
        (5, 7, "groups=5 does not divide the 7 channels on axis -1 of shape (8, 7); use 1 or 7"),
    ],
)
def test_groups_that_do_not_fit_the_channels(groups, channels, text):
    x = np.ones((8, channels), "float32")
    for call in (
        lambda: GroupNormalization(groups=groups)(x),
        lambda: GroupNormalization(groups=groups).compute_output_shape(x.shape),
        lambda: ops.group_norm(x, groups=groups),
        lambda: ops.group_norm(keras.Input(batch_shape=x.shape), groups=groups),
    ):
        with raises(ValueError, text):
            call()


def test_the_groups_that_fit_absurdly_many_channels_are_told_soon():
    # Trial division up to the root takes minutes here.
    with pytest.raises(ValueError, match="groups=5 does not divide the 4611686018427387904"):
        GroupNormalization(groups=5).compute_output_shape((8, 2**62))


BATCH = (
    "axis=0 is the batch axis, and group and instance norm keep samples apart; use the channel "
    "axis: -1 for channels last, 1 for channels first"
)


@pytest.mark.parametrize("axis", [0, [0]])
@pytest.mark.parametrize("make", CHANNEL_LAYERS)
def test_batch_axis_of_a_layer(make, axis):
    with raises(ValueError, BATCH):
        make(axis=axis)


@pytest.mark.parametrize("make", CHANNEL_LAYERS)
def test_negative_twin_of_the_batch_axis(make):
    text = BATCH.replace("axis=0", "axis=-3").replace("axis,", "axis of shape (8, 4, 32),")
    with raises(ValueError, text):
        make(axis=-3)(X)


@pytest.mark.parametrize("op", CHANNEL_OPS)
def test_batch_axis_of_an_op(op):
    with raises(ValueError, BATCH):
        op(X, axis=0)
    text = BATCH.replace("axis=0", "axis=-3").replace("axis,", "axis of shape (8, 4, 32),")
    with raises(ValueError, text):
        op(X, axis=-3)


@pytest.mark.parametrize("axis", [3, -4])
def test_axis_out_of_range(axis):
    text = f"axis={axis} is out of range for shape (8, 4, 32) of rank 3; use an axis from -3 to 2"
    for make in LAYERS:
        with raises(ValueError, text):
            make(axis=axis)(X)
        with raises(ValueError, text):
            make(axis=axis).compute_output_shape(X.shape)
    for op in OPS:
        with raises(ValueError, text):
            op(X, axis=axis)
    for over_axes in AXES_OPS:
        with raises(ValueError, text):
            over_axes(X, axis=[1, axis])


@pytest.mark.parametrize("axis", [[1, 1], [1, -2], [2, 1, -2]])
def test_axis_named_twice(axis):
    text = f"axis={axis} names axis 1 of shape (8, 4, 32) twice; name each axis once"
    for make in AXES_LAYERS:
        with raises(ValueError, text):
            make(axis=axis)(X)
    for op in AXES_OPS:
        with raises(ValueError, text):
            op(X, axis=axis)


@pytest.mark.parametrize("axis", [1.0, "1", None, True, {"axis": -1}, [1.0], [1, None]])
def test_axis_that_is_no_int(axis):
    text = f"axis={axis!r} is no axis; expected an int, or a list or tuple of ints"
    for make in LAYERS:
        with raises(TypeError, text):
            make(axis=axis)
    for op in OPS:
        with raises(TypeError, text):
            op(X, axis=axis)


def test_no_axis():
    text = "axis=[] names no axis; name at least one, as in axis=-1"
    for make in LAYERS:
        with raises(ValueError, text):
            make(axis=[])


def test_two_channel_axes():
    text = (
        "axis=[1, 2] names 2 axes, but the channels lie on one; use axis=2, or layer norm to "
        "normalize over several axes"
    )
    for make in CHANNEL_LAYERS:
        with raises(ValueError, text):
            make(axis=[1, 2])
    for op in CHANNEL_OPS:
        with raises(ValueError, text):
            op(X, axis=(1, 2))


def test_unknown_channels():
    text = (
        "the number of channels on axis -1 of shape (None, 4, None) is unknown; give that axis a "
        "fixed extent, as in keras.Input((None, None, 16))"
    )
    for call in (*(make() for make in CHANNEL_LAYERS), *CHANNEL_OPS):
        with raises(ValueError, text):
            call(keras.Input((4, None)))


@pytest.mark.parametrize(
    ("make", "options", "lacking", "remedy"),
    [
        (LayerNormalization, {}, "gamma and beta", "scale=False and center=False"),
        (LayerNormalization, {"center": False}, "gamma", "scale=False"),
        (LayerNormalization, {"scale": False}, "beta", "center=False"),
        (RMSNormalization, {}, "gamma", "scale=False"),
    ],
)
def test_unknown_extent_of_a_normalized_axis(make, options, lacking, remedy):
    text = (
        f"axis=[1, 2] of shape (None, None, 4) has an unknown extent, so the shape of {lacking} is "
        f"unknown; give it a fixed extent, or set {remedy}"
    )
    with raises(ValueError, text):
        make(axis=[1, 2], **options)(keras.Input((None, 4)))


def test_rank_below_two():
    text = (
        "shape (8,) has rank 1, but a norm needs a batch axis and at least one more; add an axis, "
        "as in x[None, :]"
    )
    for call in (*(make() for make in LAYERS), *OPS):
        with raises(ValueError, text):
            call(np.ones(8, "float32"))
        with raises(ValueError, text):
            call(keras.Input(batch_shape=(8,)))


def makers_and_ops():
    yield from LAYERS
    for op in OPS:
        yield lambda op=op, **options: op(X, **options)
        yield lambda op=op, **options: op(keras.Input((4, 32)), **options)


@pytest.mark.parametrize("epsilon", [-1e-3, float("nan"), float("inf"), -1])
def test_epsilon_that_no_variance_can_take(epsilon):
    text = (
        f"epsilon={epsilon} cannot be added to a variance; expected a number >= 0, as in "
        "epsilon=1e-3"
    )
    for call in makers_and_ops():
        with raises(ValueError, text):
            call(epsilon=epsilon)


@pytest.mark.parametrize("epsilon", ["1e-3", None, True, 1j, [1e-3]])
def test_epsilon_that_is_no_number(epsilon):
    text = f"epsilon={epsilon!r} is no number; expected a number >= 0, as in epsilon=1e-3"
    for call in makers_and_ops():
        with raises(TypeError, text):
            call(epsilon=epsilon)


@pytest.mark.parametrize("gamma_offset", [float("nan"), float("inf")])
def test_gamma_offset_that_cannot_be_added(gamma_offset):
    text = f"gamma_offset={gamma_offset} cannot be added to gamma; expected a number, as in "
    text += "gamma_offset=1.0"
    for make in LAYERS:
        with raises(ValueError, text):
            make(gamma_offset=gamma_offset)


@pytest.mark.parametrize("gamma_offset", ["1", None, True])
def test_gamma_offset_that_is_no_number(gamma_offset):
    text = f"gamma_offset={gamma_offset!r} is no number; expected a number, as in gamma_offset=1.0"
    for make in LAYERS:
        with raises(TypeError, text):
            make(gamma_offset=gamma_offset)


@pytest.mark.parametrize("shape", [(), (7,), (8, 5), (8, 4, 31), (4, 8), (8, 4, 32, 1), (1, 1, 2)])
def test_mask_that_does_not_fit(shape):
    text = (
        f"mask has shape {shape}, which does not fit x of shape (8, 4, 32); pass the shape of x or "
        "of its first axes, an extent of 1 standing for all"
    )
    mask = np.ones(shape, bool)
    for call in (*(make() for make in LAYERS), *OPS):
        with raises(ValueError, text):
            call(X, mask=mask)


def test_symbolic_mask_that_does_not_fit():
    text = (
        "mask has shape (None, 5), which does not fit x of shape (None, 4, 32); pass the shape of "
        "x or of its first axes, an extent of 1 standing for all"
    )
    for call in (*(make() for make in LAYERS), *OPS):
        with raises(ValueError, text):
            call(keras.Input((4, 32)), mask=keras.Input((5,), dtype="bool"))


@pytest.mark.parametrize("name", ["gamma", "beta"])
@pytest.mark.parametrize("shape", [(1,), (31,), (4,), (1, 32), ()])
def test_parameter_of_a_wrong_shape(name, shape):
    text = f"{name} has shape {shape}, but axis [2] of shape (8, 4, 32) needs (32,), or "
    text += "(8, 32) for values of each sample's own"
    for op in OPS:
        with raises(ValueError, text):
            op(X, **{name: np.ones(shape, "float32")})


def test_parameter_over_several_axes():
    text = "gamma has shape (32, 4), but axis [1, 2] of shape (8, 4, 32) needs (4, 32), "
    text += "or (8, 4, 32) for values of each sample's own"
    for op in AXES_OPS:
        with raises(ValueError, text):
            op(X, np.ones((32, 4), "float32"), axis=[2, 1])


@pytest.mark.parametrize("symbolic", [False, True], ids=["array", "symbolic"])
def test_complex_dtype(symbolic):
    text = (
        "x has dtype complex64, and no norm is defined on complex numbers; normalize its real and "
        "imaginary parts, or its modulus"
    )
    x = keras.Input((4, 32), dtype="complex64") if symbolic else X.astype("complex64")
    for call in (*(make() for make in LAYERS), *OPS):
        with raises(TypeError, text):
            call(x)


def test_result_dtype_that_is_no_float():
    text = "dtype=int32 cannot hold a normalized value; use a float dtype, as dtype='float32'"
    for op in OPS:
        with raises(ValueError, text):
            op(X, dtype="int32")
        with raises(ValueError, text):
            op(keras.Input((4, 32)), dtype="int32")


@pytest.mark.skipif(BACKEND != "tensorflow", reason="graphs")
def test_errors_in_a_graph():
    import tensorflow as tf

    function = tf.function(
        lambda x: ops.group_norm(x, groups=3), input_signature=[tf.TensorSpec([None, None, 32])]
    )
    with pytest.raises(ValueError, match="groups=3 does not divide the 32 channels"):
        function(X)
