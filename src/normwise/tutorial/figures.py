"""The tutorial's pictures: which elements share their statistics, and how training went.

Both are Matplotlib figures made without pyplot, so that drawing one needs no display and leaves the
caller's figures and settings alone. Colours are Okabe and Ito's, which colour-blind readers can
tell apart.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from normwise.geometry import Geometry

__all__ = ["learning_curves", "save", "shared_statistics"]

# More cells along one edge could not be told apart.
MAX_CELLS = 64

INK, PALE_INK, BACKGROUND = "#1a1a1a", "#5f5f5f", "white"
FONT_POINTS = 11
DPI = 160

# What a cell can be: outside the set, in the set, or the element whose set it is.
OUTSIDE, SHARED, CHOSEN = range(3)
_FILL = {OUTSIDE: "#ffffff", SHARED: "#56b4e9", CHOSEN: "#d55e00"}
# How much light falls on a face, which lets the eye see a block.
_LIGHT = {"spatial": 1.0, "batch": 0.92, "channel": 0.82}

# Where one step along each edge of the block leads on paper: nearest the reader stands the edge
# between the first sample and the first channel, and the first pixel is on top.
_STEP = np.array([[0.87, 0.46], [-0.87, 0.46], [0.0, -1.0]])  # (N, C, spatial) x (x, y)

_SPATIAL_NAMES = {0: "", 1: "(L)", 2: "(H, W)", 3: "(D, H, W)"}

_LINES = {
    "group": ("#0072b2", "-"),
    "instance": ("#d55e00", "-"),
    "layer": ("#009e73", "-"),
    "batch": ("#cc79a7", "--"),
    "none": ("#4d4d4d", ":"),
}


def shared_statistics(
    norms: Any, shape: Sequence[int] | None = None, *, channels: int | None = None
) -> Figure:
    """Draw which elements of an input share their mean and variance, one block per norm.

    The input is drawn as a block of N x C x (spatial), its spatial axes folded into one. One
    element, the one nearest the reader, is marked, and so is every element of its set. Which these
    are is asked of `Geometry.set_of` and of nothing else.

    Args:
        norms: a layer or geometry, a sequence of them, or a mapping from titles to them. A layer
            is anything with a method `geometry(input_shape)`.
        shape: the input's shape (N, ...), of rank 2 to 5; needed where `norms` has a layer. A
            geometry is drawn with its own.
        channels: the axis drawn as C. Default: the axis that gamma spans, if it is but one, else
            the last axis.

    Returns:
        A `matplotlib.figure.Figure`; `figure.savefig(path)` writes it.

    Raises:
        TypeError: a norm is neither a layer nor a geometry, or a layer comes without a shape.
        ValueError: the shape is of another rank, has an unknown or empty extent, or folds into a
            block of more than 64 cells along an edge.

    Reference: Wu and He, Group Normalization, 2018, figure 2, https://arxiv.org/abs/1803.08494

    Example:

    >>> from normwise import figures, geometry
    >>> figure = figures.shared_statistics({"group": geometry.group((4, 5, 5, 6), groups=2)})
    >>> [axes.get_title() for axes in figure.axes]
    ['group']
    """
    blocks = {
        title: _Block(_geometry_of(norm, shape), channels) for title, norm in _titled(norms).items()
    }
    columns = min(len(blocks), 5)
    rows = math.ceil(len(blocks) / columns)
    legend_height = 0.4
    width, height = (5.2, 4.4) if len(blocks) == 1 else (2.1 * columns, 2.7 * rows)
    figure = Figure(figsize=(width, height + legend_height), dpi=DPI, facecolor=BACKGROUND)
    grid = figure.add_gridspec(
        rows,
        columns,
        left=0.01,
        right=0.99,
        wspace=0.04,
        top=1 - 0.35 / (height + legend_height),
        bottom=legend_height / (height + legend_height),
        hspace=0.25,
    )
    for cell, (title, block) in zip(grid, blocks.items(), strict=False):
        axes = figure.add_subplot(cell)
        _draw(axes, block)
        axes.set_title(title, fontsize=FONT_POINTS, color=INK, fontweight="bold")
    figure.legend(
        handles=[
            Patch(facecolor=_FILL[CHOSEN], edgecolor=INK, label="one element"),
            Patch(
                facecolor=_FILL[SHARED], edgecolor=INK, label="elements that share its statistics"
            ),
        ],
        loc="lower center",
        ncols=2,
        frameon=False,
        fontsize=FONT_POINTS,
        labelcolor=INK,
    )
    return figure


def learning_curves(runs: Iterable[Any]) -> Figure:
    """Draw loss and accuracy against the training step, one line per run.

    Args:
        runs: objects with `norm`, `epochs` and `history["loss"]`, `history["accuracy"]`, such as
            `normwise.tutorial.run.Run`; a step's values are smoothed over the steps before it.

    Returns:
        A `matplotlib.figure.Figure`; `figure.savefig(path)` writes it.

    Example:

    >>> from types import SimpleNamespace
    >>> from normwise import figures
    >>> history = {"loss": [2.3, 1.1, 0.6], "accuracy": [0.1, 0.6, 0.8]}
    >>> run = SimpleNamespace(norm="group", epochs=1, history=history)
    >>> [axes.get_title() for axes in figures.learning_curves([run]).axes]
    ['loss', 'accuracy']
    """
    runs = list(runs)
    figure = Figure(figsize=(10, 4.2), dpi=DPI, facecolor=BACKGROUND)
    grid = figure.add_gridspec(1, 2, left=0.075, right=0.985, bottom=0.14, top=0.83, wspace=0.2)
    window = max(1, max((len(run.history["loss"]) for run in runs), default=1) // 12)
    for cell, quantity in zip(grid, ("loss", "accuracy"), strict=True):
        axes = figure.add_subplot(cell, facecolor=BACKGROUND)
        for run, spare in zip(runs, itertools.cycle(_LINES.values()), strict=False):
            colour, line = _LINES.get(run.norm, spare)
            values = _smoothed(run.history[quantity], window)
            steps = np.arange(1, len(values) + 1)
            axes.plot(steps, values, line, color=colour, linewidth=2, label=run.norm)
        axes.set_title(
            f"{quantity}, mean of {window} steps" if window > 1 else quantity,
            fontsize=FONT_POINTS + 1,
            color=INK,
        )
        axes.set_xlabel("training step", fontsize=FONT_POINTS, color=INK)
        axes.tick_params(labelsize=FONT_POINTS, colors=INK)
        axes.grid(color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_ylim(bottom=0, top=None if quantity == "loss" else 1)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(PALE_INK)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="upper center",
        ncols=max(1, len(labels)),
        frameon=False,
        fontsize=FONT_POINTS + 1,
        labelcolor=INK,
    )
    return figure


class _Block:
    """An input as N x C x (spatial), with the role of every cell."""

    def __init__(self, geometry: Geometry, channels: int | None):
        shape = geometry.shape
        rank = len(shape)
        if not 2 <= rank <= 5:
            raise ValueError(
                f"shape {shape} has rank {rank}, but the figure draws rank 2 to 5; give a shape "
                "such as (4, 5, 5, 8)"
            )
        if any(extent is None or extent < 1 for extent in shape):
            raise ValueError(
                f"shape {shape} has an extent that is unknown or empty; every extent must be a "
                "positive int to be drawn"
            )
        if channels is None:
            channels = geometry.parameter_axes[0] if len(geometry.parameter_axes) == 1 else -1
        if not -rank <= channels < rank or channels % rank == 0:
            raise ValueError(
                f"channels={channels} is no channel axis of shape {shape}; use an axis from 1 to "
                f"{rank - 1}"
            )
        self.geometry = geometry
        self.channel_axis = channels % rank
        self.spatial_axes = tuple(a for a in range(1, rank) if a != self.channel_axis)
        extents = tuple(shape[axis] for axis in self.spatial_axes)
        self.extents = (shape[0], shape[self.channel_axis], math.prod(extents))
        self.spatial_name = _SPATIAL_NAMES[len(extents)]
        self.spatial_extents = extents
        if max(self.extents) > MAX_CELLS:
            named = ", ".join(
                f"{name} = {extent}"
                for name, extent in zip(("N", "C", self.spatial_name), self.extents, strict=True)
                if name
            )
            raise ValueError(
                f"shape {shape} folds into a block of {named}, and more than {MAX_CELLS} cells "
                "along an edge cannot be told apart; draw a smaller shape, such as (4, 5, 5, 8): "
                "the pattern is the same"
            )

        # An edge grows with the root of its extent, so that no block is a needle.
        self.cell_lengths = np.sqrt(self.extents) / self.extents
        # Whether the spatial edge is short beside the two others.
        self.is_flat = 2 * self.extents[2] < self.extents[0] + self.extents[1]

    def on_paper(self, points) -> np.ndarray:
        """Where points of the block, (..., N x C x spatial), lie on paper: (..., x and y)."""
        return (np.asarray(points) * self.cell_lengths) @ _STEP

    def position(self, sample: int, channel: int, pixel: int) -> tuple[int, ...]:
        """Where a cell of the block lies in the input."""
        spatial = np.unravel_index(pixel, self.spatial_extents) if self.spatial_extents else ()
        position = [sample, *map(int, spatial)]
        position.insert(self.channel_axis, channel)
        return tuple(position)

    def role(self, cell: tuple[int, int, int]) -> int:
        """What a cell is, as seen from the cell nearest the reader, (0, 0, 0)."""
        if cell == (0, 0, 0):
            return CHOSEN
        chosen = self.geometry.set_of(self.position(0, 0, 0))
        return SHARED if self.geometry.set_of(self.position(*cell)) == chosen else OUTSIDE


def _draw(axes: Axes, block: _Block) -> None:
    """Draw the three faces of a block that the reader sees, and name its edges."""
    for name, hidden_axis in (("spatial", 2), ("channel", 1), ("batch", 0)):
        spans = [range(extent) for extent in block.extents]
        spans[hidden_axis] = range(1)
        cells = list(itertools.product(*spans))
        face = PolyCollection(
            block.on_paper(_outlines(np.array(cells), hidden_axis)),
            facecolors=[_lit(_FILL[block.role(cell)], _LIGHT[name]) for cell in cells],
            edgecolors=INK,
            # Thinner where there are many cells, which the lines would otherwise cover.
            linewidths=0.5 * min(1, 20 / max(block.extents)),
            joinstyle="round",
            gid=name,
        )
        axes.add_collection(face)
    samples, channels, pixels = block.extents
    corners = block.on_paper(list(itertools.product((0, samples), (0, channels), (0, pixels))))
    low, high = corners.min(axis=0), corners.max(axis=0)
    axes.set_aspect("equal")
    axes.set_axis_off()
    # Room for the names of the edges, and for the caption under them.
    side = 0.12 * (high - low).max()
    axes.set_xlim(low[0] - side, high[0] + side)
    axes.set_ylim(low[1] - 1.4 * side, high[1])

    edges = [
        ("N", (samples / 2, 0, pixels), (4, -2), {"ha": "left", "va": "top"}),
        ("C", (0, channels / 2, pixels), (-4, -2), {"ha": "right", "va": "top"}),
        # Upwards from the lower end of its edge where the edge is too short to be centred on.
        (
            block.spatial_name,
            (0, channels, pixels if block.is_flat else pixels / 2),
            (-4, 0),
            {"ha": "right", "va": "bottom" if block.is_flat else "center", "rotation": 90},
        ),
    ]
    for name, at, offset_points, alignment in edges:
        axes.annotate(
            name,
            block.on_paper(at),
            offset_points,
            textcoords="offset points",
            fontsize=FONT_POINTS,
            color=INK,
            **alignment,
        )
    axes.text(
        0.5,
        0,
        f"{block.geometry.set_size} of {math.prod(block.extents)} elements",
        transform=axes.transAxes,
        ha="center",
        va="bottom",
        fontsize=FONT_POINTS,
        color=PALE_INK,
    )


def _outlines(cells: np.ndarray, hidden_axis: int) -> np.ndarray:
    """The outline of one face of each cell, in block coordinates: (cells, corners, 3)."""
    along = np.delete(np.eye(3, dtype=int), hidden_axis, axis=0)
    return cells[:, None, :] + np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) @ along


def _lit(colour: str, light: float) -> tuple[float, float, float]:
    return tuple(light * channel for channel in to_rgb(colour))


def _titled(norms) -> Mapping:
    """The norms by title; those that come without one are named after their class."""
    if isinstance(norms, Mapping):
        titled = dict(norms)
    else:
        norms = list(norms) if isinstance(norms, Iterable) else [norms]
        titled = {}
        for norm in norms:
            name = type(norm).__name__.removesuffix("Normalization")
            again = sum(title.split(" ")[0] == name for title in titled)
            titled[f"{name} {again + 1}" if again else name] = norm
    if not titled:
        raise ValueError("norms is empty; give at least one layer or geometry to draw")
    return titled


def _geometry_of(norm, shape) -> Geometry:
    if isinstance(norm, Geometry):
        return norm
    if not callable(getattr(norm, "geometry", None)):
        raise TypeError(
            f"{norm!r} has no geometry to draw; give a layer of normwise.layers, or a geometry "
            "such as normwise.geometry.batch(shape, axis=-1)"
        )
    if shape is None:
        raise TypeError(
            f"shape is missing, and {norm!r} has none of its own; give shape=(4, 5, 5, 8)"
        )
    return norm.geometry(tuple(shape))


def _smoothed(values: Sequence[float], window: int) -> np.ndarray:
    """The mean of each value and the `window - 1` before it, fewer at the start."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    end = np.arange(1, len(total))
    start = np.maximum(end - window, 0)
    return (total[end] - total[start]) / (end - start)


def save(figure: Figure, path: Path) -> None:
    """Write a figure on its own background, in the format that the path's suffix names.

    Raises:
        ValueError: Matplotlib knows no such format.
        OSError: the file cannot be written.

    Example:

    >>> import pathlib, tempfile
    >>> from normwise import figures, geometry
    >>> figure = figures.shared_statistics({"layer": geometry.layer((4, 5, 5, 6))})
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "layer.svg"
    >>> figures.save(figure, path)
    >>> path.exists()
    True
    """
    figure.savefig(path, facecolor=figure.get_facecolor())
