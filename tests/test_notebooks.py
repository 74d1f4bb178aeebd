"""The tutorial as a text: it runs, says the same in both languages, and keeps tidy output.

After a change to the English notebook's code, `KERAS_BACKEND=jax python tests/test_notebooks.py`
runs it, and stores code and output in both.
"""

import os
import re
import tempfile
from pathlib import Path

import keras
import nbformat
import pytest
from nbclient import NotebookClient

import normwise

FOLDER = Path(__file__).parents[1] / "notebooks"
ENGLISH, JAPANESE = "normalizations.ipynb", "normalizations_ja.ipynb"
PAPERS = {
    "batch": "https://arxiv.org/abs/1502.03167",
    "layer": "https://arxiv.org/abs/1607.06450",
    "instance": "https://arxiv.org/abs/1607.08022",
    "group": "https://arxiv.org/abs/1803.08494",
    "rms": "https://arxiv.org/abs/1910.07467",
}
# The cells whose text states a fact, which the cell must then assert.
CLAIMS = ("by-hand", "group-batch", "instance-contrast", "layer-axis", "one-group-training", "rms")
MACHINE_PATH = re.compile(r"(?<![\w.])/(home|root|tmp|usr|opt|var|work|mnt|Users)/|[A-Z]:\\")

both = pytest.mark.parametrize("name", [ENGLISH, JAPANESE])


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


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A folder for what JAX compiles, which is most of its time, and the same in both notebooks."""
    return tmp_path_factory.mktemp("compiled")


@both
def test_runs_without_a_warning(name, monkeypatch, tmp_path, compiled):
    monkeypatch.setenv("KERAS_BACKEND", keras.backend.backend())
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(compiled))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    # The package that these tests import, and nothing of the user's IPython profile.
    source = str(Path(normwise.__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([source, os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    # Layers this small gain nothing from threads, and on a busy machine PyTorch's wait for each
    # other: 20 times as slow with two suites on two cores.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
    notebook = read(name)
    stored = {cell.id for cell in notebook.cells if cell.get("outputs")}

    execute(notebook, tmp_path)

    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            assert output.get("name") != "stderr", f"{cell.id}: {output.text}"
    assert {cell.id for cell in notebook.cells if cell.get("outputs")} == stored


@both
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
    assert "image/png" in kinds


def test_both_languages_run_the_same_code():
    english, japanese = read(ENGLISH), read(JAPANESE)
    assert english.metadata == japanese.metadata
    assert english.metadata.kernelspec.name == "python3"
    assert [(c.id, c.cell_type) for c in english.cells] == [
        (c.id, c.cell_type) for c in japanese.cells
    ]
    for one, other in zip(english.cells, japanese.cells, strict=True):
        if one.cell_type == "code":
            assert one.source == other.source, one.id
            assert [texts(o) for o in one.outputs] == [texts(o) for o in other.outputs], one.id
        else:
            assert one.source != other.source, f"{one.id} is not translated"
            assert one.source.count("https://") == other.source.count("https://"), one.id
            assert re.search("[ぁ-ん]", other.source), one.id


@both
@pytest.mark.parametrize("norm", PAPERS)
def test_names_the_paper_of(norm, name):
    assert any(PAPERS[norm] in cell.source for cell in cells(name, "markdown").values())


@both
@pytest.mark.parametrize("claim", CLAIMS)
def test_proves(claim, name):
    assert re.search(r"^\s*assert ", cells(name, "code")[claim].source, re.MULTILINE)


@both
def test_links_lead_somewhere(name):
    for key, cell in cells(name, "markdown").items():
        for target in re.findall(r"\]\((?!https://)([^)#]+)", cell.source):
            assert (FOLDER / target).exists(), f"{key}: {target}"


def store():
    """Run the English notebook, and write its code and output into both."""
    english = read(ENGLISH)
    with tempfile.TemporaryDirectory() as folder:
        execute(english, folder)
    english.metadata.language_info = {"name": "python"}
    code = {cell.id: cell for cell in english.cells if cell.cell_type == "code"}
    japanese = read(JAPANESE)
    japanese.cells = [code.get(cell.id, cell) for cell in japanese.cells]
    for name, notebook in ((ENGLISH, english), (JAPANESE, japanese)):
        nbformat.write(notebook, FOLDER / name)


if __name__ == "__main__":
    store()
