import itertools
import math
from types import SimpleNamespace

import keras
import matplotlib
import numpy as np
import pytest
from frameworks import to_numpy
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb

import normwise
from normwise import geometry, layers
from normwise.tutorial import NORMS, figures
from normwise.tutorial.model import norms_to_draw

# For every case: the geometry, the axis drawn as C, and whether two positions share their
# statistics, written from each norm's definition.
CASES = {
    "batch": (geometry.batch((3, 2, 2, 4)), 3, lambda p, q: p[3] == q[3]),
    "batch, channels first": (geometry.batch((3, 4, 2, 2), 1), 1, lambda p, q: p[1] == q[1]),
    "layer": (geometry.layer((3, 2, 3, 4)), 3, lambda p, q: p[:3] == q[:3]),
    "layer, all": (geometry.layer((3, 2, 3, 4), (1, 2, 3)), 3, lambda p, q: p[0] == q[0]),
    "layer, channels first": (
        geometry.layer((3, 5, 2, 2), 1),
        1,
        lambda p, q: (p[0], p[2], p[3]) == (q[0], q[2], q[3]),
    ),
    "layer, space": (
        geometry.layer((3, 2, 3, 4), (1, 2)),
        3,
        lambda p, q: (p[0], p[3]) == (q[0], q[3]),
    ),
    "layer, batch and channels": (
        geometry.layer((3, 2, 3, 4), (0, 3)),
        3,
        lambda p, q: p[1:3] == q[1:3],
    ),
    "instance": (
        geometry.group((3, 2, 3, 4), groups=-1),
        3,
        lambda p, q: (p[0], p[3]) == (q[0], q[3]),
    ),
    "group": (
        geometry.group((3, 2, 3, 6), groups=2),
        3,
        lambda p, q: (p[0], p[3] // 3) == (q[0], q[3] // 3),
    ),
    "group, channels first": (
        geometry.group((2, 6, 3), 1, groups=3),
        1,
        lambda p, q: (p[0], p[1] // 2) == (q[0], q[1] // 2),
    ),
    "group, one": (geometry.group((2, 3, 4), groups=1), 2, lambda p, q: p[0] == q[0]),
    "group, volume": (
        geometry.group((2, 2, 2, 3, 4), groups=2),
        4,
        lambda p, q: (p[0], p[4] // 2) == (q[0], q[4] // 2),
    ),
    "group, dense": (
        geometry.group((5, 6), groups=2),
        1,
        lambda p, q: (p[0], p[1] // 3) == (q[0], q[1] // 3),
    ),
}

ODD = {
    "one element": geometry.layer((1, 1, 1, 1)),
    "long N": geometry.layer((64, 1, 1, 1)),
    "long C": geometry.group((1, 1, 1, 64), groups=8),
    "long H": geometry.batch((1, 8, 8, 1)),
    "all long": geometry.layer((40, 6, 6, 40), axis=(1, 2, 3)),
    "dense": geometry.layer((3, 9)),
    "long and dense": geometry.group((64, 2), groups=2),
}


def run_of(norm, steps=40):
    rng = np.random.default_rng(0)
    return SimpleNamespace(
        norm=norm, history={"loss": list(rng.random(steps)), "accuracy": list(rng.random(steps))}
    )


def faces_of(axes):
    return {face.get_gid(): face for face in axes.collections}


def colours_of(face, light):
    """What each cell of a face is: '.', 'shared' or 'chosen'."""
    names = {figures._FILL[figures.OUTSIDE]: ".", figures._FILL[figures.SHARED]: "shared"}
    names[figures._FILL[figures.CHOSEN]] = "chosen"
    lit = {
        tuple(round(light * channel, 6) for channel in to_rgb(fill)): name
        for fill, name in names.items()
    }
    return [lit[tuple(np.round(colour[:3], 6))] for colour in face.get_facecolors()]


@pytest.mark.parametrize("case", CASES)
def test_the_coloured_cells_are_the_set(case):
    plan, channel_axis, shares = CASES[case]
    axes = figures.shared_statistics({case: plan}).axes[0]

    spatial_axes = [a for a in range(1, len(plan.shape)) if a != channel_axis]
    order = [0, channel_axis, *spatial_axes]
    origin = (0,) * len(plan.shape)
    expected = {"batch": [], "channel": [], "spatial": []}
    for drawn in itertools.product(*(range(plan.shape[axis]) for axis in order)):
        position = tuple(index for _, index in sorted(zip(order, drawn, strict=True)))
        role = "chosen" if position == origin else "shared" if shares(position, origin) else "."
        sample, channel, *spatial = drawn
        if sample == 0:
            expected["batch"].append(role)
        if channel == 0:
            expected["channel"].append(role)
        if not any(spatial):
            expected["spatial"].append(role)

    drawn = {name: colours_of(face, figures._LIGHT[name]) for name, face in faces_of(axes).items()}
    assert drawn == expected


def test_every_cell_is_drawn_at_its_place():
    axes = figures.shared_statistics({"layer": geometry.layer((2, 3, 4))}).axes[0]
    faces = faces_of(axes)
    # (N, C, L) = (2, 4, 3): the top shows N x C, the left C x L, the right N x L.
    assert {name: len(face.get_paths()) for name, face in faces.items()} == {
        "spatial": 8,
        "batch": 12,
        "channel": 6,
    }
    for face in faces.values():
        areas = [polygon_area(path.vertices[:4]) for path in face.get_paths()]
        assert areas == pytest.approx([areas[0]] * len(areas))
        assert areas[0] > 0.01
    # The three faces of the nearest cell meet in the nearest corner and nowhere overlap.
    centres = np.array([face.get_paths()[0].vertices[:4].mean(axis=0) for face in faces.values()])
    top, right, left = centres
    assert left[0] < 0 < right[0]
    assert top[1] > max(left[1], right[1])


def polygon_area(corners):
    x, y = corners.T
    return abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2


def test_layers_are_drawn_by_their_own_geometry():
    shape = (4, 3, 3, 10)
    figure = figures.shared_statistics(
        [layers.GroupNormalization(groups=5), layers.GroupNormalization(groups=2)], shape
    )
    assert [axes.get_title() for axes in figure.axes] == ["Group", "Group 2"]
    shared = [
        colours_of(faces_of(axes)["batch"], figures._LIGHT["batch"]).count("shared") + 1
        for axes in figure.axes
    ]
    assert shared == [2 * 9, 5 * 9]


IMAGE, SERIES = (3, 4, 4, 6), (3, 5, 6)
CONDITION = {
    "modulated": np.ones((3, 2), "float32"),
    "adaptive": np.random.default_rng(1).normal(size=(3, 2, 2, 6)).astype("float32"),
    "spade": np.ones((3, 2, 2, 2), "float32"),
}
# Each with the shape of its input, and how many elements share their statistics.
OF_LAYERS = {
    "modulated": (layers.Modulated(layers.LayerNormalization()), IMAGE, 6),
    "adaptive": (layers.AdaptiveInstanceNormalization(), IMAGE, 16),
    "spade": (layers.SPADE(filters=2, data_format="channels_last"), IMAGE, 16),
    "response": (layers.FilterResponseNormalization(), IMAGE, 16),
    "reversible": (layers.ReversibleInstanceNormalization(), SERIES, 5),
    "reversible, time last": (layers.ReversibleInstanceNormalization(axis=2), SERIES, 6),
}


@pytest.mark.parametrize("title", OF_LAYERS)
def test_the_set_that_is_drawn_is_what_changes_with_one_element(title):
    layer, shape, size = OF_LAYERS[title]
    origin = (0,) * len(shape)
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    touched = x.copy()
    touched[origin] += 1
    condition = [CONDITION[title]] if title in CONDITION else []

    def y(x):
        # The reversible norm returns its statistics too.
        return to_numpy(keras.tree.flatten(layer(x, *condition))[0])

    sets = layer.geometry(shape)
    members = [p for p in np.ndindex(shape) if sets.set_of(p) == sets.set_of(origin)]
    assert list(map(tuple, np.argwhere(y(x) != y(touched)))) == members
    (axes,) = figures.shared_statistics(layer, shape).axes
    assert f"{size} of {x.size} elements" in {text.get_text() for text in axes.texts}


def test_the_set_of_global_response_norm_is_what_shares_a_length():
    layer = layers.GlobalResponseNormalization(gamma_initializer="ones")
    x = np.random.default_rng(0).uniform(1, 2, IMAGE).astype("float32")
    ratio = np.round(to_numpy(layer(x)) / x, 4)
    sets = layer.geometry(IMAGE)
    for position in np.ndindex(IMAGE):
        is_shared = sets.set_of(position) == sets.set_of((0, 0, 0, 0))
        assert (ratio[position] == ratio[0, 0, 0, 0]) == is_shared


def test_the_tutorials_layer_norm_is_not_over_all_activations():
    drawn = norms_to_draw()
    sizes = {title: plan.set_size for title, plan in drawn.items()}
    assert sizes == {
        "batch": 100,
        "layer, axis=[1, 2, 3]": 250,
        "layer, axis=3": 10,
        "instance": 25,
        "group, groups=5": 50,
    }


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ((4, 8), {"N", "C"}),
        ((4, 5, 8), {"N", "C", "(L)"}),
        ((4, 5, 5, 8), {"N", "C", "(H, W)"}),
        ((4, 2, 3, 3, 8), {"N", "C", "(D, H, W)"}),
    ],
)
def test_the_edges_and_the_set_are_named(shape, names):
    figure = figures.shared_statistics({"a title": geometry.layer(shape)})
    (axes,) = figure.axes
    texts = {text.get_text() for text in axes.texts} - {""}
    assert texts == names | {f"8 of {math.prod(shape)} elements"}
    assert axes.get_title() == "a title"
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {
        "one element",
        "elements that share its statistics",
    }


def pictures():
    yield "tutorial", lambda: figures.shared_statistics(norms_to_draw())
    yield "all odd", lambda: figures.shared_statistics(ODD)
    yield "cases", lambda: figures.shared_statistics({t[:20]: c[0] for t, c in CASES.items()})
    for title, plan in ODD.items():
        yield title, lambda plan=plan, title=title: figures.shared_statistics({title: plan})
    title = "group, groups=2, axis=-1, shape 4,6,5,8"
    plan = geometry.group((4, 6, 5, 8), groups=2)
    yield "command", lambda: figures.shared_statistics({title: plan})
    longest = "global-response, axis=-1, shape 4,5,5,8"
    plan_of_channels = geometry.group((4, 5, 5, 8), groups=-1)
    yield "longest", lambda: figures.shared_statistics({longest: plan_of_channels})
    yield "curves", lambda: figures.learning_curves(map(run_of, NORMS))
    yield "one curve", lambda: figures.learning_curves([run_of("group", steps=1)])


@pytest.mark.parametrize(("name", "draw"), [pytest.param(*p, id=p[0]) for p in pictures()])
def test_every_text_is_inside_and_none_overlaps(name, draw):
    figure = draw()
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    boxes = {text: text.get_window_extent(renderer) for text in texts_of(figure) if text.get_text()}
    assert len(boxes) >= 4
    (legend,) = figure.legends
    assert is_inside(figure, legend.get_window_extent(renderer))
    for text, box in boxes.items():
        assert is_inside(figure, box), text
        # In a README of 800 pixels a letter still has about ten.
        assert text.get_fontsize() * (800 / 72) / max(figure.get_figwidth(), 8) >= 10, text
    for (text, box), (other, other_box) in itertools.combinations(boxes.items(), 2):
        assert not overlap(box, other_box), (text, other)


def texts_of(figure):
    """Every text that is drawn; Matplotlib keeps more tick labels than it shows."""
    for legend in figure.legends:
        yield from legend.get_texts()
    for axes in figure.axes:
        yield from (axes.title, *axes.texts)
        if axes.axison:
            for axis in (axes.xaxis, axes.yaxis):
                low, high = sorted(axis.get_view_interval())
                yield axis.label
                yield from (
                    label
                    for place, label in zip(
                        axis.get_majorticklocs(), axis.get_ticklabels(), strict=False
                    )
                    if low <= place <= high
                )


def is_inside(figure, box):
    page = figure.bbox
    return box.x0 >= 0 and box.y0 >= 0 and box.x1 <= page.x1 and box.y1 <= page.y1


def overlap(a, b):
    return a.x0 < b.x1 and b.x0 < a.x1 and a.y0 < b.y1 and b.y0 < a.y1


@pytest.mark.parametrize("title", ODD)
def test_no_name_covers_the_block(title):
    figure = figures.shared_statistics({title: ODD[title]})
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    (axes,) = figure.axes
    for text in axes.texts:
        if not text.get_text():
            continue
        box = text.get_window_extent(renderer)
        for face in axes.collections:
            for path in face.get_paths():
                centre = axes.transData.transform(path.vertices[:4].mean(axis=0))
                assert not box.contains(*centre), text


@pytest.mark.parametrize(
    ("shape", "texts"),
    [
        ((2, 2, 2, 2, 2, 2), ["rank 6", "draws rank 2 to 5"]),
        ((None, 5, 5, 8), ["(None, 5, 5, 8)", "unknown or empty"]),
        ((4, 0, 5, 8), ["(4, 0, 5, 8)", "unknown or empty"]),
        ((32, 26, 26, 10), ["N = 32, C = 10, (H, W) = 676", "more than 64", "smaller shape"]),
        ((65, 2), ["N = 65, C = 2, and more than 64"]),
    ],
)
def test_a_shape_that_cannot_be_drawn_is_refused(shape, texts):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 -- the texts are what is compared
        figures.shared_statistics(geometry.layer(shape))
    for text in texts:
        assert text in str(caught.value)


@pytest.mark.parametrize("channels", [0, -4, 4, -5])
def test_a_channel_axis_that_is_none_is_refused(channels):
    with pytest.raises(ValueError, match=f"channels={channels} is no channel axis"):
        figures.shared_statistics(geometry.layer((4, 5, 5, 8)), channels=channels)


def test_what_has_no_geometry_is_refused():
    with pytest.raises(TypeError, match="'group' has no geometry to draw"):
        figures.shared_statistics(["group"], (4, 5, 5, 8))
    with pytest.raises(TypeError, match="shape is missing"):
        figures.shared_statistics(layers.GroupNormalization(groups=2))
    with pytest.raises(ValueError, match="norms is empty"):
        figures.shared_statistics([])


def test_learning_curves_show_every_run():
    runs = [run_of(norm) for norm in NORMS]
    figure = figures.learning_curves(runs)
    for axes, quantity in zip(figure.axes, ("loss", "accuracy"), strict=True):
        assert axes.get_title() == f"{quantity}, mean of 3 steps"
        assert [line.get_label() for line in axes.lines] == list(NORMS)
        for line, run in zip(axes.lines, runs, strict=True):
            values = run.history[quantity]
            expected = [np.mean(values[max(0, i - 2) : i + 1]) for i in range(len(values))]
            np.testing.assert_array_equal(line.get_xdata(), np.arange(1, len(values) + 1))
            np.testing.assert_allclose(line.get_ydata(), expected, rtol=1e-9)
    looks = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}
    assert len(looks) == len(NORMS)


def test_drawing_leaves_the_users_matplotlib_alone(tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"figure.facecolor": "black", "savefig.facecolor": "black"}):
        inside = dict(matplotlib.rcParams)
        figures.save(figures.shared_statistics(norms_to_draw()), tmp_path / "sets.png")
        figures.save(figures.learning_curves([run_of("group")]), tmp_path / "curves.png")
        assert dict(matplotlib.rcParams) == inside
    assert dict(matplotlib.rcParams) == before
    assert plt.get_fignums() == []
    for path in tmp_path.iterdir():
        assert matplotlib.image.imread(path)[0, 0].tolist() == [1, 1, 1, 1]


def test_figures_are_public():
    assert normwise.figures is figures
