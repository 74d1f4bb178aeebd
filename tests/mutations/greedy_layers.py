"""Layers that ask for much: elements, steps and work that their configs claim.

Every maker takes a folder and a random generator, and gives a path, a kind, and what to do with it.
"""

import keras
import numpy as np
from old_models import input_layer, layer, sequential

from mutations.greedy_models import DENSE, HUGE, NEGATIVE, about, calling, graph, made


def layers_that_grow(folder, rng):
    """Layers whose outputs are as large as they say, one after the other."""
    most = rng.choice([16, 20, 24, 26, 30, 40])
    rank, layers = rng.choice([1, 2, 3]), []
    for i in range(count := rng.choice([1, 1, 2, 4])):
        size = about(rng, most / count / 2, most / count)
        side = max(1, int(size ** (1 / rank)))
        name, options = rng.choice(
            [
                (f"UpSampling{rank}D", {"size": size if rank == 1 else [side] * rank}),
                (f"ZeroPadding{rank}D", {"padding": [[0, side]] * rank if rank > 1 else size}),
                (f"Cropping{rank}D", {"cropping": side}),
                ("Resizing", {"height": side, "width": side}),
                ("CategoryEncoding", {"num_tokens": size, "output_mode": "multi_hot"}),
                ("CenterCrop", {"height": side, "width": side}),
                ("Reshape", {"target_shape": [-1, side]}),
                ("Flatten", {}),
            ]
        )
        layers.append(layer(name, f"l{i}", **options))
    shape = rng.choice([[2] * rank + [1], [8] * rank + [3]])
    config = sequential(input_layer("x", *shape), *layers)
    if rng.random() < 0.3:
        size = about(rng, most / 2, most)
        config = sequential(input_layer("x", 4), layer("RepeatVector", "r", n=size), *layers[1:])
    return made(folder, rng, config, f"grows to 2^{most}", 0.8)


def huge_inputs(folder, rng):
    inputs = []
    for i in range(rng.choice([1, 1, 2, 5])):
        shape = [about(rng, 0, 40) for _ in range(rng.choice([1, 2, 3]))]
        if rng.random() < 0.3:
            shape[0] = rng.choice([*NEGATIVE, None, 0, 2**70])
        dtype = rng.choice(
            ["float32", "float64", "int64", "bool", "float16", "complex64", "string"]
        )
        data = input_layer(f"x{i}", *shape, dtype=dtype)
        if rng.random() < 0.4:
            data["config"]["batch_input_shape"][0] = about(rng, 0, 40)
        inputs.append(data)
    last = rng.choice([layer("Flatten", "f"), layer("ReLU", "f"), layer("Masking", "f")])
    config = graph(inputs, [calling(last, [["x0", 0, 0, {}]])], [["f", 0, 0]])
    return made(folder, rng, config, f"inputs of {len(inputs)}", 0.9)


def recurrent(rng, name, units):
    """A recurrent layer, and its weights for two features."""
    gates = {"LSTM": 4, "GRU": 3, "SimpleRNN": 1, "Addons>LayerNormLSTMCell": 4}[name]
    if "Cell" in name:
        cell = layer(name, "cell", units=units)
        data, weights = layer("RNN", "r", cell=cell), {}
    else:
        data = layer(name, "r", units=units)
        bias = (2, 3 * units) if name == "GRU" else (gates * units,)
        shapes = {"kernel": (2, gates * units), "recurrent_kernel": (units, gates * units)}
        weights = {key: np.ones(s, "float32") for key, s in {**shapes, "bias": bias}.items()}
    data["config"]["unroll"] = rng.choice([True, True, False])
    data["config"]["return_sequences"] = rng.choice([True, False])
    return data, weights


def long_series(folder, rng):
    steps = about(rng, 3, rng.choice([13, 20, 30]))
    data, weights = recurrent(rng, rng.choice(["LSTM", "GRU", "SimpleRNN"]), rng.choice([1, 4]))
    if rng.random() < 0.2:
        data, weights = layer("TimeDistributed", "r", layer=layer("ReLU", "relu")), {}
    elif rng.random() < 0.3:
        both = {f"{way}_{key}": each for way in ("f", "b") for key, each in weights.items()}
        data, weights = layer("Bidirectional", "r", layer={**data}), both
        data["config"]["layer"]["config"]["name"] = "inner"
    if keras.config.backend() == "tensorflow":
        # Which takes milliseconds for a step: between these lie the honest ones that take seconds.
        steps = rng.choice([min(steps, 150), steps + 10_000])
    if data["class_name"] == "TimeDistributed":
        # For each of which JAX compiles a slice.
        steps = rng.choice([min(steps, 50), steps + 10_000])
    start = input_layer("x", steps, 2)
    if stateful := data["class_name"] != "TimeDistributed" and rng.random() < 0.2:
        data["config"].get("layer", data)["config"]["stateful"] = True
        start["config"]["batch_input_shape"][0] = about(rng, 0, 36)
    config = sequential(start, data)
    kind = f"{data['class_name']} of {steps} steps{' stateful' * stateful}"
    return made(folder, rng, config, kind, 0.8, {"r": weights})


def stateful_batches(folder, rng):
    """States of as many rows as a batch claims, which have values from the beginning."""
    batch = about(rng, 10, 40)
    data, weights = recurrent(rng, rng.choice(["LSTM", "GRU", "SimpleRNN"]), rng.choice([1, 4]))
    data["config"]["stateful"] = True
    start = input_layer("x", 3, 2)
    start["config"]["batch_input_shape"][0] = batch
    return made(folder, rng, sequential(start, data), f"{batch} states", 0.3, {"r": weights})


def attention_over_length(folder, rng):
    """Scores of every step with every other, which no output shows."""
    steps = about(rng, 4, 22)
    name = rng.choice(["Attention", "AdditiveAttention", "Dot", "MultiHeadAttention"])
    data, weights = layer(name, "a"), {}
    call = [["x", 0, 0, {}], ["x", 0, 0, {}]]
    if name == "Dot":
        data["config"]["axes"] = rng.choice([1, 2, [2, 2]])
    elif name == "AdditiveAttention":
        data["config"]["use_scale"] = False
    elif name == "MultiHeadAttention":
        data["config"] |= {"num_heads": 1, "key_dim": 1, "use_bias": False, "dropout": 0.0}
        weights = {each: np.ones((2, 1, 1), "float32") for each in ("query", "key", "value")}
        weights["output"] = np.ones((1, 1, 2), "float32")
        # As Keras 2 saves it: only the first argument is in the list.
        call = [["x", 0, 0, {"value": ["x", 0, 0]}]]
    config = graph([input_layer("x", steps, 2)], [calling(data, call)], [["a", 0, 0]])
    return made(folder, rng, config, f"{name} of {steps}", 0.9, {"a": weights})


def hidden_sizes(folder, rng):
    """Layers that make much inside, and little of that."""
    size, length = about(rng, 4, 30), about(rng, 4, 17)
    kind = rng.choice(["repeated", "pooled", "resized", "scaled", "encoded", "multiplied", "sound"])
    start, data = input_layer("x", length, 1, 1), layer("Flatten", "f")
    if kind in ("repeated", "pooled"):
        inner = layer("MaxPooling1D", "p", pool_size=size, strides=1, padding="same")
        if kind == "repeated":
            grown = layer("RepeatVector", "g", n=size)
            inner = sequential(grown, layer("GlobalMaxPooling1D", "p"), name="inner")
        start = input_layer("x", 3, *([2] if kind == "repeated" else [length, 2]))
        data = layer("TimeDistributed", "t", layer=inner)
    elif kind == "resized":
        data = layer("Resizing", "r", height=min(size, 1 << 20), width=1)
    elif kind == "scaled":
        data = layer("UpSampling2D", "r", size=[2, 1], interpolation="bilinear")
    elif kind == "encoded":
        start = input_layer("x", length, dtype="int32")
        data = layer("CategoryEncoding", "e", num_tokens=size, output_mode="multi_hot")
    elif kind == "multiplied":
        start = input_layer("x", min(length, 8000), min(length, 8000))
        data = layer("Dot", "d", axes=1)
    else:
        start = input_layer("x", length)
        options = {"fft_length": min(size, length), "sequence_stride": 1, "num_mel_bins": 4}
        data = layer("MelSpectrogram", "m", **options)
    name = data["config"]["name"]
    call = [["x", 0, 0, {}]] * (2 if kind == "multiplied" else 1)
    config = graph([start], [calling(data, call)], [[name, 0, 0]])
    return made(folder, rng, config, f"{kind} {length} {size}", 0.9, {})


def wide_windows(folder, rng):
    """Pooling and convolutions whose work is the product of an image and a window."""
    rank = rng.choice([1, 2, 3])
    side, window = (about(rng, 2, 24 / rank) for _ in range(2))
    options = {"strides": rng.choice([1, 1, 2, window]), "padding": rng.choice(["same", "valid"])}
    weights, channels = {}, rng.choice([1, 4])
    name = rng.choice([f"MaxPooling{rank}D", f"AveragePooling{rank}D", f"Conv{rank}D"])
    if name.startswith("Conv"):
        window = min(window, int(10_000 ** (1 / rank)))
        if rank == 3:
            # XLA takes a hundred times as long for a multiplication in a volume as in an image.
            side, window = min(side, 32), min(window, 5)
        else:
            name += rng.choice(["", "Transpose"])
            window = min(window, int(1000 ** (1 / rank))) if "Transpose" in name else window
        options |= {"filters": 1, "kernel_size": [window] * rank, "use_bias": False}
        ends = (1, channels) if "Transpose" in name else (channels, 1)
        weights = {"kernel": np.ones((*[window] * rank, *ends), "float32")}
        if rng.random() < 0.3:
            options |= {"dilation_rate": about(rng, 0, 30), "strides": 1}
    else:
        options["pool_size"] = window if rank == 1 else [window] * rank
        if name.startswith("Average"):
            # XLA takes long to fold what "same" divides by.
            options["padding"] = "valid"
    config = sequential(input_layer("x", *[side] * rank, channels), layer(name, "p", **options))
    return made(folder, rng, config, f"{name} {side} by {window}", 0.9, {"p": weights})


def many_dimensions(folder, rng):
    rank = rng.choice([8, 33, 65, 300, 3000, 30_000])
    names = ["ReLU", "Flatten", "BatchNormalization", "Permute", "Reshape", "Softmax"]
    layers = []
    for i in range(rng.choice([1, 5, 100])):
        name = rng.choice([*names, "Addons>GroupNormalization", "LayerNormalization"])
        options = {"dims": list(range(1, rank + 1))} if name == "Permute" else {}
        options |= {"target_shape": [1] * rank} if name == "Reshape" else {}
        options |= {"groups": 1} if "Group" in name else {}
        layers.append(layer(name, f"l{i}", **options))
    config = sequential(input_layer("x", *[rng.choice([1, 1, None])] * rank), *layers)
    return made(folder, rng, config, f"{rank} dimensions", 0.5)


def great_numbers(folder, rng):
    """An option that is a number, of a layer that would make something of it at once."""
    many = rng.choice([*HUGE, *NEGATIVE, 10**400])
    name, options, shape = rng.choice(
        [
            ("Addons>SpectralNormalization", {"layer": DENSE, "power_iterations": many}, (4,)),
            ("Addons>GroupNormalization", {"groups": many}, (4,)),
            ("Addons>Maxout", {"num_units": many}, (4,)),
            ("MelSpectrogram", {"num_mel_bins": many, "fft_length": 64}, (100,)),
            ("MelSpectrogram", {"num_mel_bins": 8, "fft_length": many}, (100,)),
            ("STFTSpectrogram", {"frame_length": many, "fft_length": many}, (100, 1)),
            ("Embedding", {"input_dim": many, "output_dim": 2}, (4,)),
            ("DepthwiseConv2D", {"kernel_size": 1, "depth_multiplier": many}, (4, 4, 4)),
            ("SeparableConv1D", {"filters": many, "kernel_size": many}, (4, 4)),
            ("MultiHeadAttention", {"num_heads": many, "key_dim": many}, (4, 4)),
            ("Hashing", {"num_bins": many}, (4,)),
            ("Discretization", {"num_bins": many, "epsilon": 0.1}, (4,)),
            ("Discretization", {"bin_boundaries": [0.5] * 100_000}, (4,)),
            ("IntegerLookup", {"max_tokens": many, "vocabulary": list(range(50_000))}, (4,)),
            ("TextVectorization", {"max_tokens": many, "ngrams": many}, (4,)),
            ("Normalization", {"mean": [0.5] * 50_000, "variance": [1] * 50_000}, (50_000,)),
            ("GaussianNoise", {"stddev": many, "seed": many}, (4,)),
            ("RandomTranslation", {"height_factor": many, "width_factor": many}, (4, 4, 1)),
            ("AugMix", {"num_chains": many, "chain_depth": many}, (4, 4, 3)),
            ("RandAugment", {"num_ops": many}, (4, 4, 3)),
            ("ConvLSTM2D", {"filters": many, "kernel_size": 1}, (4, 4, 4, 1)),
            ("StackedRNNCells", {"cells": [layer("LSTMCell", "c", units=1)] * 3000}, (4, 4)),
            ("Addons>TLU", {"alpha_initializer": {"class_name": "Identity", "config": {}}}, (4,)),
        ]
    )
    config = sequential(input_layer("x", *shape), layer(name, "n", **options))
    return made(folder, rng, config, f"{name} {many:.1e}" if many < 10**300 else name, 0.5)


KINDS = (
    *(layers_that_grow, huge_inputs, long_series, stateful_batches, attention_over_length),
    *(hidden_sizes, wide_windows, many_dimensions, great_numbers),
)
