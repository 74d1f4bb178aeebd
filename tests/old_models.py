"""Model files as Keras 2.14 wrote them, made by hand: small, and of whatever a test asks for."""

import collections
import io
import json
import re
import zipfile

import h5py
import numpy as np

VERSION = "2.14.0"


def layer(class_name, name, **config):
    return {"class_name": class_name, "config": {"name": name, "dtype": "float32", **config}}


def input_layer(name, *shape, dtype="float32"):
    return layer("InputLayer", name, batch_input_shape=[None, *shape], dtype=dtype)


def sequential(*layers, name="sequential"):
    return {"class_name": "Sequential", "config": {"name": name, "layers": list(layers)}}


def small():
    """A model of two weighted layers around a norm, for images (6, 6, 4)."""
    return sequential(
        input_layer("image", 6, 6, 4),
        layer("Conv2D", "conv", filters=4, kernel_size=[3, 3], activation="relu"),
        layer("Addons>GroupNormalization", "norm", groups=2, axis=-1, epsilon=0.001),
        layer("GlobalAveragePooling2D", "pool"),
        layer("Dense", "dense", units=3, activation="linear"),
    )


def weights_of_small():
    """Arrays for it, by layer and by name."""
    rng = np.random.default_rng(0)
    shapes = {
        "conv": {"kernel": (3, 3, 4, 4), "bias": (4,)},
        "norm": {"gamma": (4,), "beta": (4,)},
        "dense": {"kernel": (4, 3), "bias": (3,)},
    }
    return {
        layer: {name: rng.normal(size=shape).astype("float32") for name, shape in own.items()}
        for layer, own in shapes.items()
    }


def functional(layers, inputs, outputs, name="model"):
    """`layers` holds pairs of a layer and the names of the layers that it is called on."""
    nodes = [
        {
            **each,
            "name": each["config"]["name"],
            "inbound_nodes": [[[source, 0, 0, {}] for source in sources]] if sources else [],
        }
        for each, sources in layers
    ]
    config = {
        "name": name,
        "trainable": True,
        "layers": nodes,
        "input_layers": [[each, 0, 0] for each in inputs],
        "output_layers": [[each, 0, 0] for each in outputs],
    }
    return {"class_name": "Functional", "config": config}


def write_h5(path, config, weights, layers=None):
    """Write an .h5 file of a model.

    `weights` holds, for the name of a layer, its arrays by their names, as `kernel`. `layers` are
    the names of all layers, which a config that is none does not tell.
    """
    with h5py.File(path, "w") as file:
        file.attrs["keras_version"] = VERSION
        file.attrs["backend"] = "tensorflow"
        file.attrs["model_config"] = json.dumps(config)
        stored = file.create_group("model_weights")
        stored.attrs["keras_version"] = VERSION
        stored.attrs["backend"] = "tensorflow"
        names = layers or [each["config"]["name"] for each in config["config"]["layers"]]
        stored.attrs["layer_names"] = np.array(names, "S")
        for name in names:
            group = stored.create_group(name)
            arrays = {f"{name}/{key}:0": each for key, each in weights.get(name, {}).items()}
            group.attrs["weight_names"] = np.array(list(arrays), "S")
            for key, array in arrays.items():
                group[key] = array
    return path


def write_keras(path, config, weights):
    """Write a .keras file of a model; `weights` as in write_h5."""
    stored = io.BytesIO()
    with h5py.File(stored, "w") as file:
        for name, each in _stored_names(config):
            group = file.create_group(f"_layer_checkpoint_dependencies/{name}/vars")
            for i, array in enumerate(weights.get(each["config"]["name"], {}).values()):
                group[str(i)] = array
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", json.dumps({"keras_version": VERSION}))
        archive.writestr("config.json", json.dumps(_with_modules(config)))
        archive.writestr("model.weights.h5", stored.getvalue())
    return path


def _stored_names(config):
    """Every layer under the name that Keras 2.14 made of its class."""
    counts = collections.Counter()
    for each in config["config"]["layers"]:
        name = each["class_name"].rpartition(">")[2]
        name = re.sub("([A-Z][a-z]+)", r"_\1", name).strip("_").replace("__", "_").lower()
        yield f"{name}_{counts[name]}" if counts[name] else name, each
        counts[name] += 1


def _with_modules(config):
    """The config with every class's module and registered name beside it."""
    class_name = config["class_name"]
    package, _, name = class_name.rpartition(">")
    inner = dict(config["config"])
    if "layers" in inner:
        inner["layers"] = [_with_modules(each) for each in inner["layers"]]
        module = "keras"
    else:
        module = "tensorflow_addons.layers" if package else "keras.layers"
    return {
        **config,
        "module": module,
        "class_name": name,
        "config": inner,
        "registered_name": class_name if package else None,
    }
