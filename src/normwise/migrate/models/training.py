"""What a model was compiled with, as far as Keras 3 knows it."""

import warnings

import keras


def compile_as_saved(model, saved: dict | None, path, custom_objects) -> None:
    """Compile a model as it was; what is not known is left out, with a warning."""
    if not saved:
        warnings.warn(f"{path} does not say how the model was compiled, so it is not", stacklevel=3)
        return
    left_out = []

    def part(name, deserialize, config):
        if config is None:
            return None
        try:
            return _nested(deserialize, config)
        except Exception:
            left_out.append(name)
            return None

    with keras.saving.custom_object_scope(custom_objects or {}):
        arguments = {
            "optimizer": part(
                "optimizer", _optimizer, saved.get("optimizer_config", saved.get("optimizer"))
            ),
            "loss": part("loss", _loss, saved.get("loss")),
            "metrics": part("metrics", _metric, saved.get("metrics")),
            "weighted_metrics": part("weighted_metrics", _metric, saved.get("weighted_metrics")),
            "loss_weights": saved.get("loss_weights"),
        }
        if arguments["optimizer"] is None:
            # Keras 3 compiles with RMSprop, whatever that was.
            del arguments["optimizer"]
        model.compile(**arguments)
    # Its state is part of a file that Keras 3 saves.
    model.optimizer.build(model.trainable_variables)
    if left_out:
        warnings.warn(
            f"{path}: Keras 3 does not know the {' and '.join(left_out)} that the model was "
            "compiled with, which are left out; compile it anew",
            stacklevel=3,
        )


def _nested(deserialize, config):
    """Objects in the structure that a config has them in: one, a list, or a dict by output."""
    if isinstance(config, list):
        return [_nested(deserialize, each) for each in config]
    if isinstance(config, dict) and "class_name" not in config:
        return {key: _nested(deserialize, each) for key, each in config.items()}
    return None if config is None else deserialize(config)


def _optimizer(config):
    if isinstance(config, str):
        return keras.optimizers.get(config)
    cls = _known(keras.optimizers, config, keras.optimizers.Optimizer)
    # Keras 2's names of what Keras 3 computes anyway, or has no more.
    renamed = {"lr": "learning_rate"}
    options = {renamed.get(key, key): value for key, value in config["config"].items()}
    gone = ("decay", "is_legacy_optimizer", "jit_compile")
    kept = {key: value for key, value in options.items() if key not in gone}
    if not kept.get("weight_decay"):
        kept.pop("weight_decay", None)
    rate = kept.get("learning_rate")
    if isinstance(rate, dict):
        schedules = keras.optimizers.schedules
        schedule = _known(schedules, rate, schedules.LearningRateSchedule)
        kept["learning_rate"] = schedule.from_config(rate["config"])
    return cls.from_config(kept)


def _loss(config):
    if isinstance(config, str):
        return keras.losses.get(config)
    config = dict(config)
    options = dict(config.get("config") or {})
    if options.get("reduction") == "auto":
        options["reduction"] = "sum_over_batch_size"
    options.pop("fn", None)
    cls = _known(keras.losses, config, keras.losses.Loss)
    return cls.from_config(options)


def _metric(config):
    if isinstance(config, str):
        if config not in ("accuracy", "acc", "crossentropy", "ce"):
            keras.metrics.get(config)
        return config
    options = dict(config.get("config") or {})
    if config.get("class_name") == "MeanMetricWrapper":
        return _metric(options["fn"])
    return _known(keras.metrics, config, keras.metrics.Metric).from_config(options)


def _known(module, config: dict, base: type) -> type:
    name = config["class_name"].rpartition(">")[2]
    found = keras.saving.get_registered_object(config["class_name"]) or getattr(module, name)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"{name} is no {base.__name__}")
    return found
