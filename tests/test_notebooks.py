"""The notebooks: they run, say the same in both languages, and keep tidy output.

After a change to an English notebook's code, `KERAS_BACKEND=jax python tests/test_notebooks.py`
runs all of them, and stores code and output in both languages; with a title, those of that title.
"""

import os
import re
import sys
import tempfile
from pathlib import Path

import keras
import nbformat
import pytest
from nbclient import NotebookClient

import normwise

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
# For each title: the papers that it names, and the cells whose text states a fact, which the cell
# must then assert.
PAPERS = {
    "normalizations": (
        "https://arxiv.org/abs/1502.03167",  # batch
        "https://arxiv.org/abs/1607.06450",  # layer
        "https://arxiv.org/abs/1607.08022",  # instance
        "https://arxiv.org/abs/1803.08494",  # group
        "https://arxiv.org/abs/1910.07467",  # rms
    ),
    "style_transfer": ("https://arxiv.org/abs/1703.06868",),
}
CLAIMS = {
    "normalizations": (
        "by-hand",
        "group-batch",
        "instance-contrast",
        "layer-axis",
        "one-group-training",
        "rms",
    ),
    "style_transfer": ("by-hand", "train", "moved"),
}
MACHINE_PATH = re.compile(r"(?<![\w.])/(home|root|tmp|usr|opt|var|work|mnt|Users)/|[A-Z]:\\")

each_title = pytest.mark.parametrize("title", PAPERS)


def english(title):
    return f"{title}.ipynb"


def japanese(title):
    return f"{title}_ja.ipynb"


NAMES = [name(title) for title in PAPERS for name in (english, japanese)]
each_notebook = pytest.mark.parametrize("name", NAMES)


def of_each(facts):
    """The names of the notebooks with each of the facts of their titles."""
    return [
        (name(title), fact)
        for title, of_title in facts.items()
        for fact in of_title
        for name in (english, japanese)
    ]


def read(name):
    notebook = nbformat.read(FOLDER / name, as_version=4)
    nbformat.validate(notebook)
    return notebook


def cells(name, kind):
    return {cell.id: cell for cell in read(name).cells if cell.cell_type == kind}


def texts(output):
    """Everything in an output that a reader sees as text."""
    return [output.get("text", ""), output.get("data", {}).get("text/plain", "")]


def execute(notebook, folder):
    """Run every cell, in `folder`, and keep what it gives."""
    NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    ).execute()


@each_title
def test_runs_without_a_warning(title, monkeypatch, tmp_path):
    """In English: the Japanese one has the same code, as another test says."""
    monkeypatch.setenv("KERAS_BACKEND", keras.backend.backend())
    # The package that these tests import, and nothing of the user's IPython profile.
    source = str(Path(normwise.__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([source, os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    # Layers this small gain nothing from threads, and on a busy machine PyTorch's wait for each
    # other: 20 times as slow with two suites on two cores.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
    notebook = read(english(title))
    stored = {cell.id for cell in notebook.cells if cell.get("outputs")}

    execute(notebook, tmp_path)

    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            assert output.get("name") != "stderr", f"{cell.id}: {output.text}"
    assert {cell.id for cell in notebook.cells if cell.get("outputs")} == stored


@each_notebook
def test_stored_output_is_tidy(name):
    code = cells(name, "code")
    assert [cell.execution_count for cell in code.values()] == list(range(1, len(code) + 1))
    for key, cell in code.items():
        assert "execution" not in cell.metadata, f"{key}: stored with the times of its run"
        for output in cell.outputs:
            assert output.output_type in ("stream", "execute_result", "display_data"), key
            assert output.get("name") != "stderr", key
            for text in texts(output):
                assert not MACHINE_PATH.search(text), f"{key}: {text}"
    kinds = {kind for output in code["picture"].outputs for kind in output.data}
    assert kinds & {"image/png", "image/jpeg"}


@each_title
def test_both_languages_run_the_same_code(title):
    of_english, of_japanese = read(english(title)), read(japanese(title))
    assert of_english.metadata == of_japanese.metadata
    assert of_english.metadata.kernelspec.name == "python3"
    assert [(c.id, c.cell_type) for c in of_english.cells] == [
        (c.id, c.cell_type) for c in of_japanese.cells
    ]
    for one, other in zip(of_english.cells, of_japanese.cells, strict=True):
        if one.cell_type == "code":
            assert one.source == other.source, one.id
            assert [texts(o) for o in one.outputs] == [texts(o) for o in other.outputs], one.id
        else:
            assert one.source != other.source, f"{one.id} is not translated"
            assert one.source.count("https://") == other.source.count("https://"), one.id
            assert re.search("[ぁ-ん]", other.source), one.id


@pytest.mark.parametrize(("name", "paper"), of_each(PAPERS))
def test_names_the_paper(name, paper):
    assert any(paper in cell.source for cell in cells(name, "markdown").values())


@pytest.mark.parametrize(("name", "claim"), of_each(CLAIMS))
def test_proves(name, claim):
    assert re.search(r"^\s*assert ", cells(name, "code")[claim].source, re.MULTILINE)


@each_notebook
def test_links_lead_somewhere(name):
    for key, cell in cells(name, "markdown").items():
        for target in re.findall(r"\]\((?!https://)([^)#]+)", cell.source):
            assert (FOLDER / target).exists(), f"{key}: {target}"


def store(title):
    """Run the English notebook, and write its code and output into both."""
    run = read(english(title))
    with tempfile.TemporaryDirectory() as folder:
        execute(run, folder)
    run.metadata.language_info = {"name": "python"}
    code = {cell.id: cell for cell in run.cells if cell.cell_type == "code"}
    translated = read(japanese(title))
    translated.cells = [code.get(cell.id, cell) for cell in translated.cells]
    for name, notebook in ((english(title), run), (japanese(title), translated)):
        nbformat.write(notebook, FOLDER / name)


if __name__ == "__main__":
    # keras.utils.set_random_seed imports TensorFlow, whose log would be stored.
    os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}
    for title in sys.argv[1:] or PAPERS:
        store(title)
