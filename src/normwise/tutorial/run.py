"""One training run per norm: what it reached, what a step cost, and how it got there."""

import dataclasses
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import keras
import numpy as np
from rich.table import Table

import normwise
from normwise.tutorial import model as tutorial_model
from normwise.tutorial.data import Data


@dataclasses.dataclass(frozen=True)
class Run:
    """What training with one norm gave.

    Args:
        norm: its name, as in `model.NORMS`.
        loss, accuracy: measured after training, on the evaluation split.
        training_accuracy: the mean over the last epoch's steps, with dropout, while the weights
            still changed. This is the number that Keras's progress bar shows.
        first_step_ms: the first step, which compiles the model.
        ms_per_step: the median of the other steps, None where there is no other.
        parameters: how many numbers the model has, trained or not.
        history: loss and accuracy of every step's batch.
    """

    norm: str
    loss: float
    accuracy: float
    training_accuracy: float
    first_step_ms: float
    ms_per_step: float | None
    parameters: int
    epochs: int
    batch_size: int
    seed: int
    history: dict[str, list[float]]


class StepClock(keras.callbacks.Callback):
    """Times every training step and keeps its batch's own loss and accuracy.

    Keras reports the mean since the epoch began; with m_k that mean after s_k samples, the batch's
    own value is (s_k m_k - s_(k-1) m_(k-1)) / (s_k - s_(k-1)).
    """

    def __init__(self, sample_count: int, batch_size: int):
        super().__init__()
        self.sample_count = sample_count
        self.batch_size = batch_size
        self.step_ms: list[float] = []
        self.history: dict[str, list[float]] = {"loss": [], "accuracy": []}

    def on_epoch_begin(self, epoch, logs=None):
        """Begin the running means anew, as Keras does."""
        self._seen = 0
        self._means = {"loss": 0.0, "accuracy": 0.0}

    def on_train_batch_begin(self, batch, logs=None):
        """Start the clock."""
        self._began = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        """Stop the clock, and note the batch's loss and accuracy."""
        # Reading the numbers waits for the device, so that the step is over when it is timed.
        means = {name: float(logs[name]) for name in self.history}
        self.step_ms.append((time.perf_counter() - self._began) * 1e3)
        seen = min(self._seen + self.batch_size, self.sample_count)
        for name, mean in means.items():
            total = seen * mean - self._seen * self._means[name]
            self.history[name].append(total / (seen - self._seen))
        self._seen, self._means = seen, means


def train(
    norms: Iterable[str],
    data: Data,
    *,
    epochs: int = 1,
    batch_size: int = 32,
    seed: int = 0,
    verbose: int = 1,
) -> Iterator[Run]:
    """Train the tutorial's model with each norm in turn, and give each run as it ends.

    Args:
        norms: names out of `model.NORMS`.
        data: what to train and to evaluate on.
        epochs, batch_size: as for Keras's `fit`.
        seed: every run starts from it, so that a norm's result does not depend on the others.
        verbose: as for Keras's `fit`: 1 for progress bars, 2 for a line per epoch, 0 for silence.
    """
    for norm in norms:
        if verbose:
            print(f"norm: {norm}")
        keras.utils.set_random_seed(seed)
        model = tutorial_model.build(norm, data.image_shape)
        clock = StepClock(len(data.training), batch_size)
        fitted = model.fit(
            data.training.images,
            data.training.labels,
            batch_size=batch_size,
            epochs=epochs,
            verbose=verbose,
            callbacks=[clock],
        )
        loss, accuracy = model.evaluate(
            data.evaluation.images, data.evaluation.labels, batch_size=batch_size, verbose=0
        )
        first_step_ms, *other_steps_ms = clock.step_ms
        yield Run(
            norm=norm,
            loss=float(loss),
            accuracy=float(accuracy),
            training_accuracy=float(fitted.history["accuracy"][-1]),
            first_step_ms=first_step_ms,
            ms_per_step=statistics.median(other_steps_ms) if other_steps_ms else None,
            parameters=model.count_params(),
            epochs=epochs,
            batch_size=batch_size,
            seed=seed,
            history=clock.history,
        )


def versions() -> dict[str, str]:
    """The versions that the numbers depend on."""
    backend = keras.config.backend()
    return {
        "normwise": normwise.__version__,
        "python": platform.python_version(),
        "keras": keras.__version__,
        "backend": backend,
        # Keras has imported its backend, under the name that it goes by.
        "backend_version": sys.modules[backend].__version__,
        "numpy": np.__version__,
    }


def table(runs: Iterable[Run], data: Data) -> Table:
    """The runs as one table for the terminal."""
    evaluated = "test" if data.evaluation is not data.training else data.split
    titled = Table(
        title=f"{data.name}, {data.split} split, on {keras.config.backend()}",
        caption=(
            f"loss and accuracy: after training, on the {evaluated} split; "
            "training accuracy: during the last epoch, as in the progress bar"
        ),
        title_justify="left",
        caption_justify="left",
    )
    titled.add_column("norm")
    for heading in (
        "loss",
        "accuracy",
        "training\naccuracy",
        "ms per\nstep",
        "first step\nms",
        "parameters",
    ):
        titled.add_column(heading, justify="right")
    for run in runs:
        titled.add_row(
            run.norm,
            f"{run.loss:.4f}",
            f"{run.accuracy:.4f}",
            f"{run.training_accuracy:.4f}",
            "-" if run.ms_per_step is None else f"{run.ms_per_step:.2f}",
            f"{run.first_step_ms:.0f}",
            f"{run.parameters:,}",
        )
    return titled


def write_json(path: Path, runs: Iterable[Run], data: Data, *, interrupted: bool = False) -> None:
    """Write versions, data and runs to `path`, all of it or nothing."""
    report = {
        "versions": versions(),
        "data": data.summary(),
        "interrupted": interrupted,
        "runs": [_finite(dataclasses.asdict(run)) for run in runs],
    }
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _finite(value):
    """The value with None for NaN and infinity, which JSON has no word for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return value
