"""Errors of filter response norm and TLU, word for word."""

import re

import keras
import numpy as np
import pytest
from norms import samples

from normwise import ops
from normwise.layers import TLU, FilterResponseNormalization

X = np.ones((8, 5, 4, 6), "float32")


def calls(**options):
    yield lambda: FilterResponseNormalization(**options)(X)
    yield lambda: FilterResponseNormalization(**options)(keras.Input(X.shape[1:]))
    yield lambda: FilterResponseNormalization(**options).compute_output_shape(X.shape)
    yield lambda: ops.filter_response_norm(X, **options)


def raises(error, text):
    return pytest.raises(error, match=re.escape(text))


@pytest.mark.parametrize(
    ("axis", "error", "text"),
    [
        (
            [1],
            ValueError,
            "axis=[1] is to name every axis of shape {} but the batch and the channels, 2 of them; "
            "use axis=[1, 2] for channels last, axis=[2, 3] for channels first",
        ),
        ([1, 2, 3], ValueError, "axis=[1, 2, 3] is to name every axis of shape {} but the batch"),
        ([], ValueError, "axis=[] is to name every axis of shape {} but the batch"),
        (
            [0, 1],
            ValueError,
            "axis=[0, 1] names the batch axis, and filter response norm keeps samples apart; name "
            "the spatial axes only: [1, 2] for images with channels last",
        ),
        ([-4, 1], ValueError, "axis=[-4, 1] names the batch axis of shape {}, and filter response"),
        ([1, 4], ValueError, "axis=4 is out of range for shape {} of rank 4; use an axis from -4"),
        ([1, -3], ValueError, "axis=[1, -3] names axis 1 of shape {} twice; name each axis once"),
        ("1", TypeError, "axis='1' is no axis; expected an int, or a list or tuple of ints"),
    ],
)
def test_axes_that_are_not_the_spatial_ones(axis, error, text):
    for call in calls(axis=axis):
        with pytest.raises(error) as raised:
            call()
        shapes = ("(8, 5, 4, 6)", "(None, 5, 4, 6)")
        assert any(text.format(shape) in str(raised.value) for shape in shapes)


def test_axes_of_an_input_without_positions():
    text = "axis=[1, 2] is to name every axis of shape (8, 6) but the batch and the channels, 0 of "
    with raises(ValueError, text + "them; use axis=[]"):
        FilterResponseNormalization()(X[:, 0, 0])


def test_rank_one():
    for call in (ops.filter_response_norm, FilterResponseNormalization(), TLU()):
        with pytest.raises(ValueError, match=r"shape \(8,\) has rank 1, but .* add an axis, as in"):
            call(X[:, 0, 0, 0])


def test_unknown_extents():
    text = "the number of channels on axis 3 of shape (None, 5, 4, None) is unknown; give that axis"
    for call in (ops.filter_response_norm, FilterResponseNormalization()):
        with raises(ValueError, text):
            call(keras.Input((5, 4, None)))
    text = (
        "shape (None, None, 6) has an unknown extent, but tau has a value for every element of a "
        "sample; give all but the batch a fixed extent, as in keras.Input((32, 32, 16))"
    )
    with raises(ValueError, text):
        TLU()(keras.Input((None, 6)))


@pytest.mark.parametrize("epsilon", [-1e-6, float("nan"), "1e-6", None])
def test_epsilon_that_no_mean_square_can_take(epsilon):
    for call in calls(epsilon=epsilon):
        with pytest.raises((ValueError, TypeError), match=r"epsilon=.*; expected a number >= 0"):
            call()


@pytest.mark.parametrize("shape", [(6,), (1, 1), (0,)])
def test_learned_epsilon_of_a_wrong_shape(shape):
    text = (
        f"learned_epsilon has shape {shape}, but it is one number for all channels; pass a tensor "
        "of shape () or (1,)"
    )
    for x in (X, keras.Input(X.shape[1:])):
        with raises(ValueError, text):
            ops.filter_response_norm(x, learned_epsilon=np.ones(shape, "float32"))


def test_parameters_and_masks_that_do_not_fit():
    with raises(ValueError, "gamma has shape (1, 6), but axis [3] of shape (8, 5, 4, 6) needs (6,"):
        ops.filter_response_norm(X, np.ones((1, 6), "float32"))
    with raises(ValueError, "mask has shape (8, 4), which does not fit x of shape (8, 5, 4, 6); "):
        FilterResponseNormalization()(X, mask=np.ones((8, 4), bool))


def test_complex_inputs():
    for call in (ops.filter_response_norm, FilterResponseNormalization(), TLU()):
        with raises(TypeError, "x has dtype complex64, and no norm is defined on complex numbers"):
            call(X.astype("complex64"))


def test_a_built_layer_keeps_to_its_rank_and_channels():
    made = FilterResponseNormalization()
    made(X)
    made(samples((2, 3, 7, 6)))
    with pytest.raises(ValueError, match="expected ndim=4, found ndim=3"):
        made(X[0])
    with pytest.raises(ValueError, match="expected axis 3 of input shape to have value 6"):
        made(X[..., :4])
