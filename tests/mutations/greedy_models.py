"""Models of Keras 2 that ask for much: layers, calls and tensors that their configs claim.

Every maker takes a folder and a random generator, and gives a path, a kind, and what to do with it.
"""

import json

import h5py
import numpy as np
import old_models
from old_models import functional, input_layer, layer, sequential

DENSE = layer("Dense", "dense", units=2)
WEIGHTS = {"dense": {"kernel": np.ones((4, 2), "float32"), "bias": np.zeros(2, "float32")}}
HUGE = (10**4, 10**6, 10**7, 10**9, 2**31, 2**40, 2**63)
NEGATIVE = (-1, -(10**6), -(2**40))


def about(rng, low, high):
    """A number between two powers of 2, as often small as large."""
    return int(2 ** rng.uniform(low, high))


def write(folder, rng, config, weights=WEIGHTS):
    """A file of a model, in one of two formats; the other has the weights of more layers."""
    if weights is not WEIGHTS or rng.random() < 0.5:
        return old_models.write_h5(folder / "greedy.h5", config, weights)
    return old_models.write_keras(folder / "greedy.keras", config, weights)


def made(folder, rng, config, kind, convert=0.5, weights=WEIGHTS):
    """What a maker gives for a config that both `load` and `convert` may be tried on."""
    action = "convert" if rng.random() < convert else "load"
    return write(folder, rng, config, weights), kind, action


def calling(data, *calls):
    """A layer of a functional model, and the inbound nodes of its calls."""
    return {**data, "name": data["config"]["name"], "inbound_nodes": list(calls)}


def graph(inputs, layers, outputs):
    """A functional model of layers that say their calls themselves."""
    config = functional([(each, []) for each in inputs], [], [])["config"]
    config["layers"] += layers
    config["input_layers"] = [[each["config"]["name"], 0, 0] for each in inputs]
    config["output_layers"] = outputs
    return {"class_name": "Functional", "config": config}


def function(name, called, **options):
    """A layer that calls a function of TensorFlow on what another gives."""
    data = {"class_name": "TFOpLambda", "config": {"name": name, "function": called}}
    return calling(data, ["x", 0, 0, options])


def tower(height, calls):
    """Models that call models, each several times: as many calls as `calls ** height`."""
    model = graph([input_layer("x", 4)], [calling(layer("ReLU", "r"), [["x", 0, 0, {}]])], ["r"])
    model["config"]["output_layers"] = [["r", 0, 0]]
    for level in range(height):
        model["config"]["name"] = f"m{level}"
        nodes = [[["x", 0, 0, {}]]] + [[[f"m{level}", i, 0, {}]] for i in range(calls - 1)]
        end = [[f"m{level}", calls - 1, 0]]
        model = graph([input_layer("x", 4)], [calling(model, *nodes)], end)
    return model


def models_that_call_models(folder, rng):
    height, calls = rng.choice([3, 10, 20, 24, 40]), rng.choice([1, 2, 3])
    config = tower(height, calls)
    if rng.random() < 0.3:
        config = sequential(input_layer("x", 4), config)
    return made(folder, rng, config, f"{calls}^{height} calls")


def wrapped(kind, inner, depth, rng):
    """A layer in as many others that hold one."""
    for i in range(depth):
        name = f"w{i}"
        if kind == "Sequential":
            inner = sequential(inner, name=name)
        elif kind == "Functional":
            end = [inner["config"]["name"], 0, 0]
            inner = graph([input_layer("x", 4, 4)], [calling(inner, [["x", 0, 0, {}]])], [end])
            inner["config"]["name"] = name
        elif kind == "StackedRNNCells":
            inner = layer(kind, name, cells=[inner] * (rng.choice([1, 2]) if i < 6 else 1))
        else:
            inner = layer(kind, name, layer=inner)
    return inner


def layers_in_layers(folder, rng):
    depth = rng.choice([1, 2, 8, 16, 20, 24, 60, 200])
    kinds = ["TimeDistributed", "Sequential", "Functional", "StackedRNNCells", "Bidirectional"]
    kind = rng.choice([*kinds, "Addons>SpectralNormalization", "Addons>WeightNormalization"])
    inner, shape = layer("ReLU", "relu"), (4, 4)
    if kind == "TimeDistributed":
        shape = (1,) * min(depth, 30) + (4,)
    elif kind == "Bidirectional":
        inner = layer("LSTM", "lstm", units=2, return_sequences=True)
    elif kind == "StackedRNNCells":
        depth = min(depth, rng.choice([5, 200]))
        inner = layer("SimpleRNNCell", "cell", units=2)
    elif "Addons" in kind:
        inner = layer("Dense", "dense", units=2)
    top = wrapped(kind, inner, depth, rng)
    if kind == "StackedRNNCells":
        top = layer("RNN", "rnn", cell=top)
    config = sequential(input_layer("x", *shape), top)
    return made(folder, rng, config, f"{kind} {depth} deep", weights={})


def models_in_options(folder, rng):
    """A model where no layer has one: what Keras makes of it, no budget sees."""
    if rng.random() < 0.6:
        value = tower(rng.choice([4, 12, 20]), 2)
    else:
        value = sequential(input_layer("x", 4), layer("Dense", "d", units=rng.choice(HUGE)))
    name = rng.choice(["Dense", "LSTM", "Activation", "Embedding"])
    keys = {"Activation": ["activation"], "Embedding": ["embeddings_initializer"]}
    initial = ["kernel_initializer", "bias_regularizer", "kernel_constraint", "activation"]
    key = rng.choice(keys.get(name, initial))
    data = layer(name, "dense", **{key: value})
    data["config"] |= {"Embedding": {"input_dim": 2, "output_dim": 2}, "Activation": {}}.get(
        name, {"units": 2}
    )
    shape = (4, 4) if name == "LSTM" else (4,)
    return made(folder, rng, sequential(input_layer("x", *shape), data), f"a model as {key}")


def cuts_into_tensors(folder, rng):
    extent = rng.choice([1000, *HUGE])
    called = rng.choice(["unstack", "split"])
    options = {"axis": rng.choice([0, 1, -1, 7])}
    if called == "split":
        options["num_or_size_splits"] = rng.choice([extent, 10, [1] * 3000, *NEGATIVE])
    elif rng.random() < 0.5:
        options["num"] = rng.choice([extent, *NEGATIVE, None])
    first = function("f", "unstack", num=-(10**9), axis=0)
    calls = [first] * rng.choice([0, 1]) + [function("u", called, **options)]
    if rng.random() < 0.5:
        calls[-1]["inbound_nodes"] *= rng.choice([2, 100])
    config = graph([input_layer("x", extent)], calls, [["u", 0, 0]])
    return made(folder, rng, config, f"{called} {extent}", 0.3)


def functions_of_claimed_extents(folder, rng):
    many = rng.choice([1000, *HUGE, *NEGATIVE])
    name, options = rng.choice(
        [
            ("tile", {"multiples": [1, many]}),
            ("tile", {"multiples": [1] * min(abs(many), 3000)}),
            ("one_hot", {"depth": many}),
            ("reshape", {"shape": [-1, many]}),
            ("reshape", {"shape": [1] * min(abs(many), 3000)}),
            ("pad", {"paddings": [[0, 0], [0, many]]}),
            ("roll", {"shift": many, "axis": 1}),
            ("gather", {"indices": [0] * min(abs(many), 30_000), "axis": 1}),
            ("__operators__.getitem", {"slice_spec": [None] * min(abs(many), 3000)}),
            ("expand_dims", {"axis": many}),
            ("transpose", {"perm": list(range(min(abs(many), 3000)))}),
            ("concat", {"axis": many}),
            ("math.cumsum", {"axis": many}),
            ("math.add", {"y": [0.5] * min(abs(many), 100_000)}),
        ]
    )
    calls = [function("f", name, **options)]
    for i in range(rng.choice([0, 0, 1, 3])):
        again = function(f"f{i}", name, **options)
        again["inbound_nodes"][0][0] = calls[-1]["name"]
        calls.append(again)
    start = input_layer("x", 4, dtype=rng.choice(["float32", "int32"]))
    config = graph([start], calls, [[calls[-1]["name"], 0, 0]])
    return made(folder, rng, config, f"{name} {many}", 0.6)


def many_calls(folder, rng):
    """A layer called again and again, many layers, or one that takes all of many."""
    calls = rng.choice([100, 1000, 3000, 20_000])
    kind = rng.choice(["again", "layers", "joined", "waiting"])
    start = input_layer("x", 4)
    if kind == "again":
        one = calling(layer("ReLU", "r"), *[[["x", 0, 0, {}]]] * calls)
        return made(folder, rng, graph([start], [one], [["r", 0, 0]]), f"{kind} {calls}")
    end = ["x", 0, 0]
    nodes = [function(f"f{i}", "identity") for i in range(min(calls, 3000))]
    for i, node in enumerate(nodes):
        if kind != "joined" and i:
            node["inbound_nodes"] = [[f"f{i - 1}", 0, 0, {}]]
    if kind in ("joined", "waiting"):
        joined = calling(layer("Concatenate", "j"), [[each["name"], 0, 0, {}] for each in nodes])
        nodes = [joined, *nodes]
        end = ["j", 0, 0]
    return made(folder, rng, graph([start], nodes, [end]), f"{kind} {calls}", 0.2)


def many_values(folder, rng):
    """JSON of a million objects that are empty, in every place that there is for some."""
    many = rng.choice([1000, 100_000, 1_000_000, 5_000_000])
    each, place = rng.choice(["{}", "[]", "0", '""', "[[]]", '["x",0,0]']), rng.random()
    config = sequential(input_layer("x", 4), layer("Dense", "dense", units=2))
    layers = config["config"]["layers"]
    holder, key = rng.choice(
        [
            *((config, "other"), (config["config"], "build_input_shape"), (layers[1], "other")),
            *((layers[1]["config"], "units"), (layers[1]["config"], "kernel_initializer")),
            *((layers[1], "build_config"), (layers[0]["config"], "batch_input_shape")),
            *((layers[1], "inbound_nodes"), (config["config"], "input_layers")),
        ]
    )
    if key == "input_layers":
        config["class_name"] = "Functional"
        config["config"]["output_layers"] = []
    holder[key] = "HERE"
    text = json.dumps(config).replace('"HERE"', f"[{','.join([each] * many)}]")
    path = old_models.write_h5(
        folder / "greedy.h5", sequential(input_layer("x", 4), DENSE), WEIGHTS
    )
    with h5py.File(path, "r+") as file:
        file.attrs["training_config" if place < 0.2 else "model_config"] = text
    return path, f"{many} times {each} as {key}", "load"


def deep_values(folder, rng):
    deep = rng.choice([20, 100, 900, 100_000, 1_000_000])
    opened, closed = rng.choice([("[", "]"), ('{"a":', "}"), ('{"class_name":"D","config":', "}")])
    where = rng.choice(["units", "inbound_nodes", "cells", "name", "dtype", "activation"])
    data = {**DENSE, "config": {**DENSE["config"], where: "HERE"}, "inbound_nodes": "HERE"}
    text = json.dumps(sequential(input_layer("x", 4), data))
    text = text.replace('"HERE"', opened * deep + "0" + closed * deep)
    path = old_models.write_h5(
        folder / "greedy.h5", sequential(input_layer("x", 4), DENSE), WEIGHTS
    )
    with h5py.File(path, "r+") as file:
        file.attrs["model_config"] = text
    return path, f"{opened} {deep} deep as {where}", "load"


KINDS = (
    *(models_that_call_models, layers_in_layers, models_in_options, cuts_into_tensors),
    *(functions_of_claimed_extents, many_calls, many_values, deep_values),
)
