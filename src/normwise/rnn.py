"""The layer-normalized recurrent cells of TensorFlow Addons, for `keras.layers.RNN`."""
