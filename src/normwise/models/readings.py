"""One reading of one norm, and by which rule it dies or explodes."""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence

import numpy as np

# A gamma that is all smaller has let through next to nothing; a spread that is larger by it is of
# no scale that the rest of the model has.
FACTOR = 1000.0
FINE, DIES, EXPLODES = "fine", "dies", "explodes"


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a norm was like at one time; None for what it has not, or what cannot be known.

    Attributes:
        step: how many training steps there were before.
        epoch: in which it was, from 1 as the progress bar counts; 0 before the first.
        layer: the names of the layers that hold the norm and its own, as "encoder/norm".
        kind: one of the keys of `normwise.models.norms.KINDS`.
        mean: the average over the sets of what comes in of their means.
        spread: the average over the sets of their standard deviations; of their root mean squares
            for a norm that subtracts no mean.
        flat: the share of sets whose variance, or mean square, is at most the norm's epsilon.
        gamma_min, gamma_max: the range of what the result is multiplied by, gamma_offset included.
        beta_min, beta_max: the range of beta.
        gamma_gradient, beta_gradient: the Euclidean norms of the loss's gradients by them.
        state: "fine", "dies" or "explodes", by the rule of `NormMonitor`.

    Example:

    >>> reading = Reading(step=0, epoch=0, layer="norm", kind="group", mean=0.1, spread=1.2)
    >>> reading.spread, reading.state
    (1.2, 'fine')
    """

    step: int
    epoch: int
    layer: str
    kind: str
    mean: float | None = None
    spread: float | None = None
    flat: float | None = None
    gamma_min: float | None = None
    gamma_max: float | None = None
    beta_min: float | None = None
    beta_max: float | None = None
    gamma_gradient: float | None = None
    beta_gradient: float | None = None
    state: str = FINE

    def numbers(self) -> dict[str, float | None]:
        """What was measured, by name."""
        return {name: getattr(self, name) for name in NUMBERS}


FIELDS = tuple(field.name for field in dataclasses.fields(Reading))
NUMBERS = FIELDS[FIELDS.index("mean") : FIELDS.index("state")]


def judged(
    reading: Reading, scales: bool, epsilon: float, spreads: Iterable[float | None]
) -> Reading:
    """A reading with its state.

    Args:
        reading: of which only the state is not known yet.
        scales: whether gamma is all that the result is multiplied by.
        epsilon: the norm's.
        spreads: with which that of the reading is compared.
    """
    known = [number for number in reading.numbers().values() if number is not None]
    if not all(map(math.isfinite, known)) or _is_large(reading.spread, epsilon, spreads):
        return dataclasses.replace(reading, state=EXPLODES)
    gamma = reading.gamma_min, reading.gamma_max
    is_silent = scales and None not in gamma and max(map(abs, gamma)) < 1 / FACTOR
    if is_silent or (reading.flat is not None and reading.flat >= 0.5):
        return dataclasses.replace(reading, state=DIES)
    return reading


def typical(spreads: Iterable[float | None]) -> float | None:
    """The median of the spreads that are numbers, the lower one of two, or None without any."""
    finite = [each for each in spreads if each is not None and math.isfinite(each)]
    return statistics.median_low(finite) if finite else None


def _is_large(spread: float | None, epsilon: float, others: Iterable[float | None]) -> bool:
    if spread is None:
        return False
    # Below the root of epsilon a spread is none, and no measure for others.
    return any(
        spread > FACTOR * max(other, math.sqrt(epsilon))
        for other in others
        if other is not None and math.isfinite(other)
    )


def arrays(records: Sequence[Reading]) -> dict[str, np.ndarray]:
    """Readings of the same layers at one time after another, by field, as (layers, times).

    Numbers are float64, NaN for None; steps and epochs are ints, the others strings.
    """
    layers = len(dict.fromkeys(reading.layer for reading in records))
    found = {}
    for name in FIELDS:
        values = [getattr(reading, name) for reading in records]
        # NumPy makes NaN of None.
        table = np.array(values, np.float64 if name in NUMBERS else None)
        found[name] = table.reshape(-1, max(layers, 1)).T
    return found
