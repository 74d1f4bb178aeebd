import io
import json
from pathlib import Path

import keras
import matplotlib.image
import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

import normwise
from normwise import cli
from normwise.tutorial import NORMS, data, figures, model, run

MNIST = Path(__file__).parents[2] / "shared" / "data" / "mnist"
PICTURES = {"learning-curves.png", "shared-statistics.png"}


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """The commands set environment variables and write to the current folder."""
    monkeypatch.setenv("KERAS_BACKEND", keras.config.backend())
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "2")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def few(tmp_path):
    """An .npz with the first 64 digits: two batches of 32, so that a step compiles but once."""
    images, labels = (getattr(data.load().training, name)[:64] for name in ("images", "labels"))
    path = tmp_path / "data" / "few.npz"
    path.parent.mkdir()
    np.savez_compressed(path, x_test=images, y_test=labels)
    return str(path)


def command(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def refused(result, *texts):
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    for text in texts:
        assert text in result.stderr
    return result.stderr


def written(folder):
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


def test_all_five_norms_by_default(few, tmp_path):
    result = command("tutorial", "--data", few, "--json", "numbers.json")
    assert result.exit_code == 0, result.output
    rows = [line for line in result.stdout.splitlines() if line.startswith("│")]
    assert [row.split()[1] for row in rows] == list(NORMS)
    assert f"few.npz, test split, on {keras.config.backend()}" in result.stdout
    for heading in ("norm", "loss", "accuracy", "ms per", "first step", "parameters"):
        assert heading in result.stdout

    folder = "normwise-tutorial"
    assert written(tmp_path) == {
        "data/few.npz",
        "numbers.json",
        *(f"{folder}/{name}" for name in PICTURES),
    }
    for name in PICTURES:
        assert matplotlib.image.imread(tmp_path / folder / name).shape[1] >= 1600

    report = json.loads((tmp_path / "numbers.json").read_text())
    assert set(report) == {"versions", "data", "interrupted", "runs"}
    backend = keras.config.backend()
    assert report["versions"]["backend"] == backend
    assert report["versions"]["backend_version"] == __import__(backend).__version__
    assert report["versions"]["normwise"] == normwise.__version__
    assert set(report["versions"]) >= {"python", "keras", "numpy"}
    assert report["data"] == {
        "name": "few.npz",
        "source": few,
        "split": "test",
        "training_images": 64,
        "evaluation_images": 64,
        "image_shape": [8, 8],
        "class_count": 10,
    }
    assert report["interrupted"] is False
    assert [entry["norm"] for entry in report["runs"]] == list(NORMS)
    for entry in report["runs"]:
        assert 0 <= entry["accuracy"] <= 1
        assert entry["loss"] > 0
        assert entry["ms_per_step"] > 0
        assert entry["first_step_ms"] > 0
        assert (entry["epochs"], entry["batch_size"], entry["seed"]) == (1, 32, 0)
        assert [len(values) for values in entry["history"].values()] == [2, 2]
    # Ten filters and 6 x 6 x 10 features; each norm adds gamma and beta, batch norm two more.
    bare = (9 * 10 + 10) + (360 * 128 + 128) + (128 * 10 + 10)
    parameters = {entry["norm"]: entry["parameters"] for entry in report["runs"]}
    with_norm = dict.fromkeys(("group", "instance", "layer"), bare + 20)
    assert parameters == with_norm | {"batch": bare + 40, "none": bare}


def test_options_choose_norms_steps_and_folder(few, tmp_path):
    result = command(
        *("tutorial", "--data", few, "--norm", "none", "--norm", "none"),
        *("--epochs", 2, "--batch-size", 64, "--seed", 5, "--out", "a/b", "--json", "a/n.json"),
    )
    # The folder of the numbers is made by --out.
    assert result.exit_code == 0, result.output
    assert written(tmp_path / "a") == {"n.json", *(f"b/{name}" for name in PICTURES)}
    report = json.loads((tmp_path / "a" / "n.json").read_text())
    assert [entry["norm"] for entry in report["runs"]] == ["none"]
    for entry in report["runs"]:
        assert (entry["epochs"], entry["batch_size"], entry["seed"]) == (2, 64, 5)
        assert len(entry["history"]["loss"]) == 2


def test_the_model_is_the_originals():
    layers = {
        norm: [type(layer).__name__ for layer in model.build(norm, (28, 28)).layers]
        for norm in NORMS
    }
    expected = {
        "group": "GroupNormalization",
        "instance": "InstanceNormalization",
        "layer": "LayerNormalization",
        "batch": "BatchNormalization",
    }
    for norm in NORMS:
        chosen = [expected[norm]] if norm in expected else []
        assert layers[norm] == [
            *("Reshape", "Conv2D", *chosen),
            *("Flatten", "Dense", "Dropout", "Dense"),
        ]
    built = model.build("group", (28, 28))
    convolution, norm = built.layers[1:3]
    assert tuple(convolution.output.shape) == (None, 26, 26, 10)
    assert (norm.groups, norm.axis) == (5, 3)
    assert built.output_shape == (None, 10)
    instance = model.norm_layer("instance")
    for initializer in (instance.gamma_initializer, instance.beta_initializer):
        assert isinstance(initializer, keras.initializers.RandomUniform)
    assert isinstance(built.optimizer, keras.optimizers.Adam)
    with pytest.raises(ValueError, match="norm='grup' is no norm of the tutorial; use group"):
        model.norm_layer("grup")


def test_the_clock_keeps_each_batchs_own_numbers():
    clock = run.StepClock(sample_count=70, batch_size=32)
    own = {"loss": [3.0, 1.0, 0.5], "accuracy": [0.25, 0.5, 1.0]}
    counts = np.array([32, 32, 6])
    for epoch in range(2):
        clock.on_epoch_begin(epoch)
        for step in range(3):
            clock.on_train_batch_begin(step)
            seen = counts[: step + 1]
            means = {name: np.average(v[: step + 1], weights=seen) for name, v in own.items()}
            clock.on_train_batch_end(step, means)
    for name, values in own.items():
        np.testing.assert_allclose(clock.history[name], values * 2, rtol=1e-12)
    assert len(clock.step_ms) == 6


def test_a_seed_gives_the_same_run_whatever_ran_before(few):
    loaded = data.load(few)
    first, second = run.train(["none", "none"], loaded, batch_size=64, verbose=0)
    (other_seed,) = run.train(["none"], loaded, batch_size=64, seed=1, verbose=0)
    assert second.loss == pytest.approx(first.loss, rel=1e-4)
    assert second.history["loss"] == pytest.approx(first.history["loss"], rel=1e-4)
    assert abs(first.loss - other_seed.loss) > 1e-3 * first.loss
    # The only step is the first, so that there is no median of the others.
    assert first.ms_per_step is None


def interrupt_at(monkeypatch, interrupted_run, step):
    """Press Ctrl-C at one step of one run."""
    begun = []
    original = run.StepClock.on_train_batch_end

    def on_epoch_begin(clock, epoch, logs=None):
        begun.append(clock)
        clock._seen, clock._means = 0, {"loss": 0.0, "accuracy": 0.0}

    def on_train_batch_end(clock, batch, logs=None):
        if len(begun) == interrupted_run and batch == step:
            raise KeyboardInterrupt
        original(clock, batch, logs)

    monkeypatch.setattr(run.StepClock, "on_epoch_begin", on_epoch_begin)
    monkeypatch.setattr(run.StepClock, "on_train_batch_end", on_train_batch_end)


def test_ctrl_c_ends_with_what_is_done(few, tmp_path, monkeypatch):
    interrupt_at(monkeypatch, interrupted_run=2, step=1)
    result = command("tutorial", "--data", few, "--json", "numbers.json")
    assert result.exit_code == 130
    assert "Interrupted: 1 of 5 norms are done." in result.stderr
    rows = [line for line in result.stdout.splitlines() if line.startswith("│")]
    assert [row.split()[1] for row in rows] == ["group"]
    assert written("normwise-tutorial") == PICTURES
    report = json.loads((tmp_path / "numbers.json").read_text())
    assert report["interrupted"] is True
    assert [entry["norm"] for entry in report["runs"]] == ["group"]


def test_ctrl_c_before_anything_is_done(few, monkeypatch):
    interrupt_at(monkeypatch, interrupted_run=1, step=0)
    result = command("tutorial", "--data", few, "--json", "numbers.json")
    assert result.exit_code == 130
    assert "Interrupted: 0 of 5 norms are done." in result.stderr
    assert "│" not in result.stdout
    assert not Path("numbers.json").exists()


def a_run(**changed):
    numbers = {"loss": 0.5, "accuracy": 0.9, "training_accuracy": 0.8, "first_step_ms": 9.0}
    counts = {"parameters": 1234, "epochs": 1, "batch_size": 32, "seed": 0}
    history = {"loss": [0.5], "accuracy": [0.9]}
    fields = {"norm": "group", "ms_per_step": 1.0, "history": history, **numbers, **counts}
    return run.Run(**fields | changed)


def test_json_is_json_even_when_training_diverged(few, tmp_path):
    diverged = a_run(loss=float("nan"), history={"loss": [float("inf")], "accuracy": [0.1]})
    path = tmp_path / "numbers.json"
    run.write_json(path, [diverged], data.load(few))

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    (entry,) = json.loads(path.read_text(), parse_constant=refuse)["runs"]
    assert (entry["loss"], entry["history"]["loss"]) == (None, [None])


def test_json_is_written_whole_or_not_at_all(few, tmp_path, monkeypatch):
    path = tmp_path / "numbers.json"
    path.write_text("before")

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        run.write_json(path, [a_run()], data.load(few))
    assert path.read_text() == "before"
    assert written(tmp_path) == {"numbers.json", "data/few.npz"}


def test_the_table_fits_a_narrow_terminal(few):
    console = Console(file=io.StringIO(), width=80)
    console.print(run.table([a_run(norm="instance", parameters=1_234_567)], data.load(few)))
    assert "…" not in console.file.getvalue()
    assert "1,234,567" in console.file.getvalue()


def test_a_number_that_is_missing_is_a_dash(few):
    table = run.table([a_run(ms_per_step=None)], data.load(few))
    assert list(table.columns[4].cells) == ["-"]


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["--data", "no-such"], ["--data no-such: there is no such", "digits, mnist"]),
        (["--split", "train"], ["digits has no train split", "--split test"]),
        (["--json", "no/such/n.json"], ["--json no/such/n.json", "there is no folder no/such"]),
        (["--out", "data/few.npz"], ["data/few.npz"]),
        (["--norm", "grup"], ["'grup'", "group", "instance"]),
        (["--epochs", "0"], ["--epochs"]),
        (["--batch-size", "-3"], ["--batch-size"]),
        (["--seed", str(2**32)], ["--seed"]),
    ],
)
def test_bad_arguments_are_refused_in_one_place(few, arguments, texts):
    refused(command("tutorial", *arguments), *texts)


def test_errors_of_ours_are_one_line(few):
    assert refused(command("tutorial", "--data", "no-such")).count("\n") == 1


def test_a_missing_extra_is_named(monkeypatch):
    installed = cli.importlib.util.find_spec

    def find_spec(name):
        return None if name in ("sklearn", "matplotlib") else installed(name)

    monkeypatch.setattr(cli.importlib.util, "find_spec", find_spec)
    result = command("tutorial")
    refused(result, "matplotlib and sklearn must be", "pip install 'normwise[tutorial]'")
    result = command("figure", "layer")
    refused(result, "matplotlib must be", "pip install 'normwise[tutorial]'")


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["group", "--groups", 2, "--shape", "4,6,5,8"], "normwise-group.png"),
        (["batch"], "normwise-batch.png"),
        (["instance", "--axis", 1, "--shape", "2,4,3,3"], "normwise-instance.png"),
        (["layer", "--axis", "1,2,-1", "--out", "all.svg"], "all.svg"),
        (["rms", "--axis", "-1", "--shape", "4,8", "--out", "rms"], "rms.png"),
        (["response"], "normwise-response.png"),
        (["global-response", "--axis", 1], "normwise-global-response.png"),
        (["adaptive"], "normwise-adaptive.png"),
        (["spade"], "normwise-spade.png"),
        (["reversible"], "normwise-reversible.png"),
        (["reversible", "--axis", 2, "--shape", "4,8,12"], "normwise-reversible.png"),
    ],
)
def test_figure_writes_one_file(tmp_path, arguments, name):
    result = command("figure", *arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"Wrote {name}\n"
    assert written(tmp_path) == {name}


@pytest.mark.parametrize(
    ("norm", "text"),
    [
        ("response", "25 of 800 elements"),
        ("global-response", "25 of 800 elements"),
        ("adaptive", "25 of 800 elements"),
        ("spade", "25 of 800 elements"),
        ("reversible", "12 of 384 elements"),
        ("rms", "8 of 800 elements"),
    ],
)
def test_figure_draws_the_sets_of(norm, text, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure))
    assert command("figure", norm).exit_code == 0
    (axes,) = drawn[0].axes
    assert text in [each.get_text() for each in axes.texts]
    assert axes.get_title().startswith(f"{norm}, axis=")


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["group", "--groups", 3], ["groups=3 does not divide the 8 channels", "1, 2, 4 or 8"]),
        (["group", "--axis", 0], ["batch axis"]),
        (["group", "--axis", "1,2"], ["names 2 axes"]),
        (["layer", "--axis", 4], ["axis=4 is out of range"]),
        (["layer", "--axis", "last"], ["--axis 'last' is no list of ints"]),
        (["layer", "--shape", "4x5"], ["--shape '4x5' is no list of ints", "4,5,5,8"]),
        (["layer", "--shape", "4"], ["rank 1"]),
        (["layer", "--shape", "4,100,100,3"], ["(H, W) = 10000", "smaller shape"]),
        (["layer", "--groups", 2], ["--groups 2 is for group norm", "leave it out"]),
        (["layer", "--out", "sets.bmpp"], ["bmpp"]),
        (["layer", "--out", "no/such/sets.png"], ["no/such/sets.png"]),
        (["reversible", "--axis", 0], ["axis=0 is no time axis"]),
        (["reversible", "--axis", "1,2"], ["axis=(1, 2) is no time axis"]),
        (["reversible", "--shape", "4,5,5,8"], ["(batch, time, features)", "rank 4"]),
        (["adaptive", "--axis", "1,2"], ["names 2 axes"]),
        (["weight"], ["'weight'", "rms"]),
    ],
)
def test_figure_refuses_what_it_cannot_draw(tmp_path, arguments, texts):
    refused(command("figure", *arguments), *texts)
    assert written(tmp_path) == set()


def test_version_and_help():
    assert command("--version").stdout == f"normwise {normwise.__version__}\n"
    for arguments in ([], ["tutorial"], ["figure"]):
        shown = command(*arguments, "--help")
        assert shown.exit_code == 0
        assert "Usage" in shown.stdout


@pytest.mark.skipif(not MNIST.is_dir(), reason="the MNIST test split is not at ../shared/data")
def test_group_norm_learns_the_real_digits():
    (trained,) = run.train(["group"], data.load(str(MNIST)), batch_size=64, verbose=0)
    assert trained.accuracy > 0.75
