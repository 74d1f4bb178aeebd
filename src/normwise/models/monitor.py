"""A callback that watches the norms of a model while it is trained."""

import inspect
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np

from normwise.kernels import gradients
from normwise.models import comparison, pictures, readings
from normwise.models.norms import KINDS, Norm
from normwise.models.readings import Reading
from normwise.models.surgery import layers_of
from normwise.models.watching import epsilon_of, inner_norm, watchable, watched
from normwise.models.writers import CsvWriter, TensorBoardWriter
from normwise.typing import Tensor

# Whose gamma is all that the result is multiplied by, where they have one: global response norm
# adds its input to it, and the condition of a modulated norm scales it once more.
PARTLY_SCALED = ("global response", "modulated")


class NormMonitor(keras.callbacks.Callback):
    """Watches the norms of a model while it is trained, to show which layer dies or explodes.

    Before the first step, if the model is built by then, and once an epoch or every so many steps
    the model runs on one batch, always the same, as in inference. For each norm there is a
    `Reading` of that: mean and spread of what comes in, the share of sets (as a sample's group of
    channels) that are flat, the range of gamma and beta, and the gradients' norms. A norm

        dies       where every |gamma + gamma_offset| is under 1/1000, or half of the sets are flat
                   or more;
        explodes   where a number is not finite, or the spread is more than 1000 times that of the
                   first reading, or the median of the model's other norms now. A spread under the
                   root of epsilon counts as that.

    A residual branch that begins with a gamma of zeros is dead until it is trained. Padding counts
    as any other element, for masks are ignored. What comes in and the gradients are those of
    inference: no dropout, and a batch norm that uses its moving statistics; its sets are the
    channels of this batch. Norms of weights, spectral and weight norm, have no sets and are not
    watched. Of a norm within a loop that the framework traces by itself, as a recurrent layer's, or
    that the batch does not reach, only gamma and beta are known, and the gradients.

    The training is the same, bit for bit, as without the callback. A reading costs about what a
    training step on its batch does; the first one, with TensorFlow and JAX, a compilation too.

    Args:
        x: the batch's inputs, as `fit` takes them: arrays of a sample or more.
        y: the batch's targets; without, there are no gradients.
        every: "epoch", or a number of training steps.
        csv: a file to which a line for each reading is appended; it begins anew with the training.
        tensorboard: a folder for TensorBoard, which must be installed.
        picture: a file for `figure()`, written at the end of the training.

    Attributes:
        records: the readings, of all norms at one time after those at another.
        layers: the paths of the norms, in the order of the model.

    At the end of an epoch the logs, and so `history.history`, have "norms/dying" and
    "norms/exploding", the number of such layers. The history also has every number of the last
    readings, as "norms/<layer>/spread", NaN where it is not known. A second `fit` of the same model
    goes on in the same records; that of another model begins anew.

    Raises:
        TypeError: x or y holds what is no array.
        ValueError: x or y has no sample, or they have different numbers of them; `every` is neither
            "epoch" nor a positive int; what writes a file is not installed, or knows no such
            format; at the beginning of a training, the model has no norm to watch, or there is a y
            and the loss cannot be computed.

    Example:

    >>> import keras, numpy as np, normwise
    >>> model = keras.Sequential([
    ...     keras.Input((8,)), keras.layers.Dense(4),
    ...     keras.layers.LayerNormalization(gamma_initializer="zeros", name="norm"),
    ...     keras.layers.Dense(1)])
    >>> model.compile("sgd", "mse")
    >>> x, y = np.random.default_rng(0).normal(size=(32, 8)), np.zeros((32, 1))
    >>> monitor = normwise.models.NormMonitor(x[:8], y[:8])
    >>> _ = model.fit(x, y, epochs=2, verbose=0, callbacks=[monitor])
    >>> [(reading.epoch, reading.layer, reading.state) for reading in monitor.records]
    [(0, 'norm', 'dies'), (1, 'norm', 'dies'), (2, 'norm', 'dies')]
    """

    def __init__(
        self,
        x: Any,
        y: Any = None,
        every: int | Literal["epoch"] = "epoch",
        csv: str | Path | None = None,
        tensorboard: str | Path | None = None,
        picture: str | Path | None = None,
    ):
        super().__init__()
        self.every = _check_every(every)
        self._x, self._y = _arrays("x", x), None if y is None else _arrays("y", y)
        if y is not None and _samples(self._x) != _samples(self._y):
            raise ValueError(
                f"y has {_samples(self._y)} samples, but x has {_samples(self._x)}; pass a target "
                "for each input"
            )
        self._csv, self._tensorboard, self._picture = (
            None if path is None else Path(path) for path in (csv, tensorboard, picture)
        )
        if self._tensorboard is not None:
            TensorBoardWriter.check(self._tensorboard)
        if self._picture is not None:
            pictures.check(self._picture)
        # So that Keras does not wait for each step's logs, where the steps are only counted.
        self.async_safe = every == "epoch"
        self._counting = threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self.records: list[Reading] = []
        self._norms: list[Norm] = []
        self._trained: list[keras.Variable] = []
        self._writers: list[CsvWriter | TensorBoardWriter] = []
        self._evaluate: Callable | None = None
        self._watched: keras.Model | None = None
        self._made_for: Any = None
        self._steps_before = self._steps_in_epoch = self._epoch = 0

    @property
    def layers(self) -> list[str]:
        """The paths of the norms that are watched, in the order of the model."""
        return [norm.path for norm in self._norms]

    @property
    def step(self) -> int:
        """How many training steps there were."""
        return self._steps_before + self._steps_in_epoch

    def arrays(self) -> dict[str, np.ndarray]:
        """The records as arrays (layers, times), by the names of their fields; NaN for None."""
        return readings.arrays(self.records)

    def figure(self, file: str | Path | None = None):
        """Draw layers by time: the spread of what comes in, the largest |gamma|, the gradient.

        Args:
            file: where to write it too, in the format that the suffix names.

        Returns:
            A `matplotlib.figure.Figure`.

        Raises:
            ValueError: there is no reading yet, or Matplotlib is not installed.
        """
        if not self.records:
            raise ValueError("there is no reading yet to draw; pass the monitor to fit first")
        if file is not None:
            pictures.check(Path(file))
        figure = pictures.layers_by_time(self.arrays(), "epoch" if self.async_safe else "step")
        if file is not None:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(file, facecolor=figure.get_facecolor())
        return figure

    def on_train_begin(self, logs=None):
        """Begin to watch the model, with a reading before its first step."""
        model = self.model
        if model is not self._watched:
            self._forget()
            self._watched = model
        # What is not built yet, as a subclassed model may be, the first step is to build.
        if model.built and all(layer.built for _, layer in layers_of(model)):
            self._begin(model)
            if not self.records:
                self._read(model)

    def on_epoch_begin(self, epoch, logs=None):
        """Note the epoch."""
        self._epoch = epoch + 1

    def on_train_batch_end(self, batch, logs=None):
        """Count the steps, and read where that is due."""
        with self._counting:
            before = self.step
            self._steps_in_epoch = max(self._steps_in_epoch, batch + 1)
        if self.every != "epoch" and self.step // self.every > before // self.every:
            self._read(self.model)

    def on_epoch_end(self, epoch, logs=None):
        """Read where that is due, and hand the last numbers to the logs and the history."""
        if self.every == "epoch":
            self._read(self.model)
        self._steps_before, self._steps_in_epoch = self.step, 0
        last = self.records[-len(self._norms) :]
        if logs is not None:
            for name, state in (("dying", readings.DIES), ("exploding", readings.EXPLODES)):
                logs[f"norms/{name}"] = float(sum(each.state == state for each in last))
        # Not through the logs, all of which the progress bar prints.
        history = getattr(getattr(self.model, "history", None), "history", {})
        for each in last:
            for name, number in each.numbers().items():
                values = history.setdefault(f"norms/{each.layer}/{name}", [])
                values.append(math.nan if number is None else number)

    def on_train_end(self, logs=None):
        """Draw the picture."""
        if self._picture is not None:
            self.figure(self._picture)

    def _begin(self, model: keras.Model) -> None:
        """Find the norms, and make what evaluates the model unless it is still right."""
        if not self._norms:
            self._norms = [norm for norm in watchable(model) if norm.layer.built]
            if not self._norms:
                raise ValueError(
                    f"the model {model.name!r} has no norm to watch; leave the monitor out"
                )
        made_for = getattr(model, "train_function", None)
        # Keras makes that anew when the model is compiled again.
        if self._evaluate is None or made_for is None or made_for is not self._made_for:
            self._evaluate, self._made_for = self._evaluation(model), made_for

    def _evaluation(self, model: keras.Model) -> gradients.Evaluation:
        """What runs the model on the batch, and gives statistics by path and gradients."""
        in_inference = {"training": False}
        options = in_inference if "training" in model.call_signature_parameters else {}

        def evaluate(x: Any, y: Any) -> tuple[Tensor | None, dict[str, list[Tensor]]]:
            with watched(self._norms) as noted:
                outputs = model(x, **options)
            if y is None:
                return None, noted
            names = inspect.signature(model.compute_loss).parameters
            try:
                loss = model.compute_loss(
                    x, y, outputs, None, **(in_inference if "training" in names else {})
                )
            except Exception as error:
                raise ValueError(
                    f"the loss of the model {model.name!r} cannot be computed for x and y of the "
                    f"monitor ({comparison.first_line(error)}); pass a y as to fit, or none to "
                    "watch no gradients"
                ) from error
            return loss, noted

        if self._y is not None:
            self._trained = [v for norm in self._norms for v in _trained(norm.layer)]
        reads = [*model.variables, *model.metrics_variables]
        return gradients.with_gradients(
            evaluate, self._trained, reads, compiled=not model.run_eagerly
        )

    def _read(self, model: keras.Model) -> None:
        """Take a reading of every norm.

        Args:
            model: is asked of Keras at this moment, for JAX's trainer keeps the values of the
                variables to itself until then.
        """
        if self._evaluate is None:
            self._begin(model)
        if not self._writers:
            if self._csv is not None:
                self._writers.append(CsvWriter(self._csv))
            if self._tensorboard is not None:
                self._writers.append(TensorBoardWriter(self._tensorboard))
        noted, found = self._evaluate(*map(_tensors, (self._x, self._y)))
        slopes = {
            id(variable): float(np.linalg.norm(comparison.numbers(gradient)))
            for variable, gradient in zip(self._trained, found, strict=True)
        }
        made = [self._reading(norm, noted[norm.path], slopes) for norm in self._norms]
        made = self._judged(made)
        self.records += made
        for writer in self._writers:
            writer.write(made)

    def _reading(self, norm: Norm, noted: list[Tensor], slopes: dict[int, float]) -> Reading:
        numbers: dict[str, float | None] = {}
        if noted:
            each = np.stack([comparison.numbers(tensor) for tensor in noted])  # (calls, 4)
            sets = each[:, 0]
            averages = (each[:, 1:] * sets[:, None]).sum(0) / sets.sum()
            numbers = dict(zip(("mean", "spread", "flat"), map(float, averages), strict=True))
        for name, variable in _parameters(norm.layer).items():
            values = comparison.numbers(variable.value)
            if name == "gamma":
                values = values + getattr(inner_norm(norm.layer) or norm.layer, "gamma_offset", 0.0)
            numbers[f"{name}_min"], numbers[f"{name}_max"] = values.min(), values.max()
            numbers[f"{name}_gradient"] = slopes.get(id(variable))
        numbers = {name: None if each is None else float(each) for name, each in numbers.items()}
        return Reading(self.step, self._epoch, norm.path, norm.kind, **numbers)

    def _judged(self, made: list[Reading]) -> list[Reading]:
        first = self.records[: len(made)] or made
        return [
            readings.judged(
                each,
                _scales(norm),
                epsilon_of(norm.layer),
                (
                    readings.typical(other.spread for other in made if other is not each),
                    begun.spread,
                ),
            )
            for norm, each, begun in zip(self._norms, made, first, strict=True)
        ]


def _scales(norm: Norm) -> bool:
    # What another library calls a scale may be one to which it adds 1.
    return norm.kind not in PARTLY_SCALED and isinstance(norm.layer, KINDS[norm.kind])


def _parameters(layer: keras.Layer) -> dict[str, keras.Variable]:
    """Gamma and beta of a norm, where it has them; RMS norm of Keras calls gamma scale."""
    owner = inner_norm(layer) or layer
    found = {
        "gamma": next(
            (
                value
                for value in (getattr(owner, "gamma", None), getattr(owner, "scale", None))
                if isinstance(value, keras.Variable)
            ),
            None,
        ),
        "beta": getattr(owner, "beta", None),
    }
    return {name: each for name, each in found.items() if isinstance(each, keras.Variable)}


def _trained(layer: keras.Layer) -> list[keras.Variable]:
    return [each for each in _parameters(layer).values() if each.trainable]


def _check_every(every: Any) -> int | str:
    if every == "epoch":
        return every
    if isinstance(every, bool) or not isinstance(every, (int, np.integer)) or every < 1:
        raise ValueError(
            f'every={every!r} is no interval; use "epoch", or a positive int for a number of steps'
        )
    return int(every)


def _arrays(name: str, values: Any) -> Any:
    """A batch as NumPy arrays, real numbers in the dtype in which `fit` hands them to a model."""

    def array(value: Any) -> np.ndarray | None:
        if value is None:
            return None
        if not hasattr(value, "shape") or not hasattr(value, "dtype") or not len(value.shape):
            raise TypeError(
                f"{name} holds {value!r}, which is no array of samples; pass a batch of arrays, as "
                "x[:32]"
            )
        if not value.shape[0]:
            raise ValueError(
                f"{name} holds an array of shape {tuple(value.shape)}, which has no "
                "sample; pass one or more"
            )
        value = keras.ops.convert_to_numpy(value) if keras.ops.is_tensor(value) else value
        value = np.asarray(value)
        return value.astype(keras.config.floatx()) if value.dtype.kind == "f" else value

    batch = keras.tree.map_structure(array, values)
    if not any(each is not None for each in keras.tree.flatten(batch)):
        raise TypeError(f"{name}={values!r} holds no array; pass a batch of arrays, as x[:32]")
    return batch


def _samples(batch: Any) -> int:
    return len(next(each for each in keras.tree.flatten(batch) if each is not None))


def _tensors(batch: Any) -> Any:
    return keras.tree.map_structure(
        lambda value: None if value is None else keras.ops.convert_to_tensor(value), batch
    )
