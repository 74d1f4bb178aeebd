"""The picture of the norms of a model: layers by time, and which of them dies or explodes.

It needs Matplotlib, which is imported where it is drawn. The colours are of cividis, which looks
the same to the colour-blind; a state is told by a symbol and a word beside.
"""

import importlib.util
from pathlib import Path

import numpy as np

from normwise.models.readings import DIES, EXPLODES, FACTOR, FINE

INK, PALE_INK, BACKGROUND, UNKNOWN = "#1a1a1a", "#5f5f5f", "white", "#d9d9d9"
FONT_POINTS = 10
DPI = 160
# Of one layer, in inches: as many layers as a model has, but no row too low to be read.
TALLEST_ROW, LOWEST_ROW, PANEL_HEIGHT = 0.34, 0.12, 9.0
LONGEST_NAME = 42

# The symbol of a state, in Matplotlib and in the text beside the layer.
MARKS = {DIES: ("X", "✕"), EXPLODES: ("^", "▲")}
MEANINGS = {
    DIES: f"dies: every |gamma| under 1/{FACTOR:.0f}, or half of the sets flat",
    EXPLODES: f"explodes: not finite, or a spread {FACTOR:.0f} times the others' or its first",
}


def check(path: Path) -> None:
    """Raise ValueError where no picture could be written to a file of this name."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            f"a picture, {str(path)!r}, needs Matplotlib, which is not installed; install it by "
            "`pip install matplotlib`, or use csv="
        )
    from matplotlib.backend_bases import FigureCanvasBase

    formats = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix.lower().lstrip(".") not in formats:
        raise ValueError(
            f"{str(path)!r} does not name a format of pictures; use a suffix such as .png, of "
            f"{', '.join(formats)}"
        )


def layers_by_time(arrays: dict[str, np.ndarray], unit: str):
    """Draw readings as tables of colours, a row for each layer, in the order of the model.

    Args:
        arrays: of `readings.arrays`.
        unit: what the times are counted in, "epoch" or "step".

    Returns:
        A `matplotlib.figure.Figure`.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            "a picture needs Matplotlib, which is not installed; install it by `pip install "
            "matplotlib`"
        )
    from matplotlib.figure import Figure

    panels = {title: table for title, table in _panels(arrays).items() if np.isfinite(table).any()}
    rows = len(arrays["layer"])
    row_height = min(TALLEST_ROW, max(LOWEST_ROW, PANEL_HEIGHT / rows))
    font_points = min(FONT_POINTS, 72 * row_height * 0.8)
    names = [
        _name(path[0], own) for path, own in zip(arrays["layer"], arrays["state"], strict=True)
    ]
    # Bold letters are about 0.65 of their height wide.
    names_width = 0.4 + max(map(len, names)) * 0.65 * font_points / 72
    above, below = 0.5, 1.65
    width, height = names_width + 2.9 * max(len(panels), 1) + 0.2, rows * row_height + above + below
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=BACKGROUND)
    grid = figure.add_gridspec(
        1,
        max(len(panels), 1),
        left=names_width / width,
        right=1 - 0.2 / width,
        top=1 - above / height,
        bottom=below / height,
        wspace=0.08,
    )
    for cell, (title, table) in zip(grid, panels.items(), strict=False):
        axes = figure.add_subplot(cell)
        _draw(figure, axes, table, below / height)
        _mark(axes, arrays["state"], row_height)
        axes.set_title(title, fontsize=FONT_POINTS, color=INK)
        _label_times(axes, arrays[unit][0], unit)
        axes.set_yticks([])
    if figure.axes:
        _name_layers(figure.axes[0], names, arrays["state"], font_points)
    _explain(figure, arrays, list(panels.values()))
    return figure


def _panels(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What is drawn, by the titles: tables (layers, times), NaN where nothing is known."""
    largest = np.fmax(np.abs(arrays["gamma_min"]), np.abs(arrays["gamma_max"]))
    gradients = np.stack([arrays["gamma_gradient"], arrays["beta_gradient"]])
    known = np.isfinite(gradients).any(axis=0)
    both = np.where(known, np.sqrt(np.nansum(np.square(gradients), axis=0)), np.nan)
    return {
        "spread of what comes in, log10": _log10(arrays["spread"]),
        "largest |gamma|": largest,
        "gradient of gamma and beta, log10": _log10(both),
    }


def _log10(table: np.ndarray) -> np.ndarray:
    """The logarithms; of 0 one less than that of the smallest number that is not."""
    positive = table[np.isfinite(table) & (table > 0)]
    least = positive.min() / 10 if positive.size else 1e-12
    return np.log10(np.where(table <= 0, least, table))


def _draw(figure, axes, table: np.ndarray, below: float) -> None:
    """Draw a table as colours, with its scale under it."""
    from matplotlib import colormaps

    colours = colormaps["cividis"].with_extremes(bad=UNKNOWN)
    finite = table[np.isfinite(table)]
    low, high = finite.min(), finite.max()
    if high - low < 1e-6:  # one number, whose colour is that of the middle
        low, high = low - 0.5, high + 0.5
    # Infinities have the last colour of the scale, and the mark of what explodes.
    shown = np.where(np.isposinf(table), high, table)
    image = axes.imshow(
        np.ma.masked_invalid(shown),
        aspect="auto",
        interpolation="nearest",
        cmap=colours,
        vmin=low,
        vmax=high,
    )
    place = axes.get_position()
    scale = figure.add_axes((place.x0, 0.56 * below, place.width, 0.07 * below))
    bar = figure.colorbar(image, cax=scale, orientation="horizontal")
    bar.ax.tick_params(labelsize=FONT_POINTS - 2, colors=PALE_INK)
    bar.ax.locator_params(nbins=5)
    bar.outline.set_edgecolor(PALE_INK)
    for spine in axes.spines.values():
        spine.set_color(PALE_INK)


def _mark(axes, states: np.ndarray, row_height: float) -> None:
    """Put the symbol of a state on its cells."""
    cell_width = axes.get_position().width * axes.figure.get_figwidth() / states.shape[1]  # inches
    points = float(np.clip(72 * 0.6 * min(row_height, cell_width), 3.5, 9))
    for state, (marker, _) in MARKS.items():
        row, time = np.nonzero(states == state)
        # White within ink is seen on every colour.
        axes.scatter(
            time,
            row,
            s=points**2,
            marker=marker,
            facecolor="white",
            edgecolor=INK,
            linewidth=0.8,
            gid=state,
        )


def _label_times(axes, times: np.ndarray, unit: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    def label(position: float, _) -> str:
        index = round(position)
        return str(times[index]) if 0 <= index < len(times) and index == position else ""

    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(label))
    axes.tick_params(labelsize=FONT_POINTS - 1, colors=PALE_INK)
    axes.set_xlabel(unit, fontsize=FONT_POINTS, color=INK)


def _name(path: str, states: np.ndarray) -> str:
    """The name of a row: the layer's, and what it was at last if it was not always fine."""
    wrong = [state for state in states if state != FINE]
    if not wrong:
        return _shortened(path)
    once = "" if states[-1] != FINE else " once"
    return f"{_shortened(path)}  {MARKS[wrong[-1]][1]} {wrong[-1]}{once}"


def _name_layers(axes, names: list[str], states: np.ndarray, font_points: float) -> None:
    axes.set_yticks(range(len(names)), labels=names, fontsize=font_points, color=INK)
    for label, own in zip(axes.get_yticklabels(), states, strict=True):
        label.set_fontweight("bold" if (own != FINE).any() else "normal")


def _shortened(path: str) -> str:
    if len(path) <= LONGEST_NAME:
        return path
    end = LONGEST_NAME * 2 // 3
    return f"{path[: LONGEST_NAME - end - 1]}…{path[-end:]}"


def _explain(figure, arrays: dict[str, np.ndarray], panels: list[np.ndarray]) -> None:
    """Say below what the symbols mean, those that there are."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [
        Line2D(
            [],
            [],
            linestyle="",
            marker=MARKS[state][0],
            markerfacecolor="white",
            markeredgecolor=INK,
            markersize=8,
            label=meaning,
        )
        for state, meaning in MEANINGS.items()
        if (arrays["state"] == state).any()
    ]
    if not handles:
        handles.append(Line2D([], [], linestyle="", label="no layer dies or explodes"))
    if any(np.isnan(table).any() for table in panels):
        handles.append(Patch(facecolor=UNKNOWN, edgecolor=PALE_INK, label="not known"))
    figure.legend(
        handles=handles,
        loc="lower center",
        ncols=1,
        frameon=False,
        fontsize=FONT_POINTS - 1,
        labelcolor=INK,
    )
