"""What weight and spectral norm keep from call to call, and keep from happening."""

import keras
import numpy as np
import pytest
from frameworks import assert_within, to_numpy
from test_wrappers import both, samples, wrap

# Quantization and LoRA


# Of Keras, which asks each layer.
@pytest.mark.filterwarnings("ignore:Layer InputLayer does not have a `quantize` method")
@both
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_wrapped_kernel_cannot_be_quantized(wrapper, mode):
    layer = wrap(wrapper, keras.layers.Dense(4, name="inner"))
    model = keras.Sequential([keras.Input((16,)), layer])
    x = samples((3, 16))
    want = model.predict(x, verbose=0)
    message = rf"quantize\('{mode}'\) of inner would take away the kernel of floats from which "
    with pytest.raises(ValueError, match=f"{message}{wrapper.__name__} .*remove"):
        model.quantize(mode)
    np.testing.assert_array_equal(model.predict(x, verbose=0), want)
    plain = keras.Sequential([keras.Input((16,)), layer.remove()])
    plain.layers[0].quantize(mode)
    assert_within(plain.predict(x, verbose=0), want, 0.2 * np.abs(want).max(), "quantized")
    with pytest.raises(ValueError, match="Dense has no weight to normalize"):
        layer(x)


@both
def test_float8_keeps_the_norm(wrapper):
    layer = wrap(wrapper, keras.layers.Dense(4))
    model = keras.Sequential([keras.Input((16,)), layer])
    x = samples((8, 16))
    want = model.predict(x, verbose=0)
    layer.layer.quantize("float8")
    assert_within(model.predict(x, verbose=0), want, 0.15 * np.abs(want).max(), "float8")
    model.compile("sgd", "mse")
    model.fit(x, x[:, :4], verbose=0)
    want = model.predict(x, verbose=0)
    assert np.isfinite(want).all()


@both
def test_a_wrapped_kernel_takes_no_lora(wrapper):
    layer = wrap(wrapper, keras.layers.Dense(4, name="inner"))
    x = samples((3, 16))
    y = to_numpy(layer(x))
    message = rf"enable_lora\(2\) of inner would take away .* {wrapper.__name__} .*remove"
    with pytest.raises(ValueError, match=message):
        layer.layer.enable_lora(2)
    with pytest.raises(ValueError, match=r"enable_lora\(2\) of inner would take away"):
        layer.layer.enable_lora(rank=2)
    np.testing.assert_array_equal(to_numpy(layer(x)), y)
    dense = layer.remove()
    dense.enable_lora(2)
    assert_within(to_numpy(dense(x)), y, 1e-5 * np.abs(y).max(), "adapted")


@both
def test_a_kernel_of_integers_cannot_be_wrapped(wrapper):
    dense = keras.layers.Dense(4)
    dense.build((None, 16))
    dense.quantize("int8")
    with pytest.raises(ValueError, match=r"Dense has no weight to normalize: .* or quantization"):
        wrapper(dense)(samples((3, 16)))
