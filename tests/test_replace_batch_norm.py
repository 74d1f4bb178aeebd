"""`replace_batch_norm`: other norms in the place of batch norms, with their gamma and beta."""

import keras
import numpy as np
import pytest
from frameworks import assert_within, to_numpy
from reference import Norm, group_labels
from whole_models import SMALL, Untouched, images, randomize, trained

import normwise
from normwise.models import replace_batch_norm


def conv_net(channels=48, **options):
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(channels, 3, use_bias=False),
            keras.layers.BatchNormalization(name="norm", **options),
            keras.layers.ReLU(),
            keras.layers.Flatten(),
            keras.layers.Dense(2),
            keras.layers.BatchNormalization(name="last"),
        ],
        name="net",
    )


def test_norms_are_replaced_and_gamma_and_beta_kept():
    model = randomize(conv_net())
    untouched = Untouched(model)
    other, report = replace_batch_norm(model)
    untouched.check()
    norm, given = other.get_layer("norm"), model.get_layer("norm")
    assert (type(norm), norm.groups) == (normwise.layers.GroupNormalization, 24)
    for name in ("gamma", "beta"):
        np.testing.assert_array_equal(to_numpy(getattr(norm, name)), to_numpy(getattr(given, name)))
    x = images(2, 6, 6, 48)
    gamma, beta = to_numpy(norm.gamma), to_numpy(norm.beta)
    want = Norm(x, gamma, beta, group_labels(x.shape, 3, 24), (3,), given.epsilon).y
    assert_within(to_numpy(norm(x)), want, 1e-5)
    assert [(record.layer, record.done) for record in report] == [
        ("norm", "GroupNormalization(groups=24)"),
        ("last", "kept"),
    ]
    assert "no spatial axes" in report[1].why
    assert "with_='layer'" in report[1].why
    assert report.notes == ["the values change: train the model further before it is used"]


@pytest.mark.parametrize(
    ("with_", "kind"),
    [
        ("instance", normwise.layers.InstanceNormalization),
        ("layer", normwise.layers.LayerNormalization),
        (lambda layer: keras.layers.Activation("tanh", name=layer.name), keras.layers.Activation),
        (lambda layer: None, keras.layers.BatchNormalization),
    ],
)
def test_each_kind(with_, kind):
    other, report = replace_batch_norm(randomize(conv_net()), with_)
    assert type(other.get_layer("norm")) is kind
    changed = with_ != "instance" and kind is not keras.layers.BatchNormalization
    assert report[1].changed == changed
    assert other(images(2, 8, 8, 3)).shape == (2, 2)


@pytest.mark.parametrize(("channels", "groups"), [(7, 7), (64, 32), (48, 24), (37, 1), (34, 17)])
def test_groups_by_default(channels, groups):
    other, _ = replace_batch_norm(conv_net(channels))
    assert other.get_layer("norm").groups == groups


def test_options_and_axis_are_kept():
    options = {"axis": 1, "epsilon": 0.1, "center": False, "gamma_regularizer": "l2"}
    model = keras.Sequential(
        [keras.Input((6, 4, 4)), keras.layers.BatchNormalization(trainable=False, **options)]
    )
    norm = replace_batch_norm(model, groups=2)[0].layers[0]
    assert (norm.axis, norm.epsilon, norm.center, norm.scale) == (1, 0.1, False, True)
    assert (norm.groups, norm.trainable) == (2, False)
    assert type(norm.gamma_regularizer) is keras.regularizers.L2


def test_a_model_goes_on_training():
    model = randomize(SMALL["functional"]())
    x, y = images(8, 4, 6), images(8, 4, 3, seed=1)
    trained(model, x, y, steps=2)
    other, report = replace_batch_norm(model, "layer")
    assert len(report.changed) == len(report) > 0
    assert not any("begins anew" in note for note in report.notes)
    assert to_numpy(other.optimizer.iterations) == 2
    losses = trained(other, x, y, steps=8)
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


def test_a_call_that_named_training():
    """As in transfer learning: the batch norm is told in the graph that it does not train."""
    inputs = keras.Input((4, 4, 6))
    outputs = keras.layers.BatchNormalization(name="norm")(inputs, training=False)
    other, report = replace_batch_norm(keras.Model(inputs, outputs))
    assert report[0].changed
    assert other(images(2, 4, 4, 6)).shape == (2, 4, 4, 6)
    loaded = keras.Model.from_config(other.get_config())
    assert loaded(images(2, 4, 4, 6)).shape == (2, 4, 4, 6)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"with_='batch' is no norm .* use 'group', 'instance'"):
        replace_batch_norm(conv_net(), "batch")
    with pytest.raises(ValueError, match="groups=5 does not divide the 48 channels of 'norm'"):
        replace_batch_norm(conv_net(), groups=5)
    with pytest.raises(ValueError, match="groups=2 is for with_='group'; leave it out"):
        replace_batch_norm(conv_net(), "layer", groups=2)
    with pytest.raises(TypeError, match="with_ gave 3 for the batch norm 'norm'"):
        replace_batch_norm(conv_net(), lambda layer: 3)


def test_a_model_without():
    _, report = replace_batch_norm(keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)]))
    assert report.notes == ["there is no batch norm in it"]
