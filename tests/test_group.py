"""What is particular to group norm and instance norm."""

import numpy as np
import pytest
from frameworks import assert_within, to_numpy
from norms import expected, samples

from normwise.layers import GroupNormalization, InstanceNormalization, LayerNormalization

EPS = np.finfo(np.float32).eps


@pytest.mark.parametrize("groups", [1, 2, 3, 6, -1])
@pytest.mark.parametrize("axis", [1, -1])
def test_every_number_of_groups(groups, axis):
    x = samples((2, 5, 6)) if axis == -1 else samples((2, 6, 5))
    layer = GroupNormalization(groups, axis)
    layer.build(x.shape)
    right = expected(layer, x)
    assert_within(to_numpy(layer(x)), right.y, right.y_tolerance(EPS))


def test_groups_of_minus_one_stay_so():
    layer = GroupNormalization(groups=-1)
    layer(samples((2, 5, 4)))
    assert layer.groups == layer.get_config()["groups"] == -1
    again = GroupNormalization.from_config(layer.get_config())
    assert tuple(again(samples((2, 5, 8))).shape) == (2, 5, 8)
    assert again.gamma.shape == (8,)


def test_instance_norm_is_group_norm_with_a_group_per_channel():
    x = samples()
    found = InstanceNormalization()(x)
    assert isinstance(InstanceNormalization(), GroupNormalization)
    np.testing.assert_array_equal(to_numpy(found), to_numpy(GroupNormalization(groups=6)(x)))


@pytest.mark.parametrize("groups", [1, 4, 0, None, "many"])
def test_instance_norm_ignores_groups_with_a_warning(groups):
    text = (
        rf"^InstanceNormalization ignores groups={groups}: its groups are its channels; leave "
        "groups out, or use GroupNormalization$"
    )
    with pytest.warns(UserWarning, match=text) as caught:
        layer = InstanceNormalization(groups=groups)
    assert caught[0].filename == __file__
    assert layer.groups == -1
    assert "groups" not in layer.get_config()


def test_instance_norm_takes_its_own_number_of_groups_in_silence():
    assert InstanceNormalization(groups=-1).groups == -1


def test_one_group_is_layer_norm_of_the_sample_with_a_gamma_per_channel():
    x = samples((2, 3, 4, 6))
    grouped = GroupNormalization(groups=1, scale=False, center=False)(x)
    layered = LayerNormalization(axis=[1, 2, 3], scale=False, center=False)(x)
    assert_within(to_numpy(grouped), to_numpy(layered), 1e-5)


@pytest.mark.parametrize("axis", [np.int64(2), [np.int32(-1)], (2,)])
def test_config_of_an_axis_is_a_plain_int(axis):
    config = GroupNormalization(groups=np.int64(2), axis=axis).get_config()
    assert type(config["axis"]) is type(config["groups"]) is int
