"""Every notebook runs from top to bottom without an error or a warning, and is kept in git without what a machine left in it.

`python tests/test_notebooks.py` runs all, or those that it is given, and cleans them, with new pictures of the cells that
have the tag `keep-picture`.
"""

from __future__ import annotations

import base64
import importlib.util
import os
import re
import sys
import tempfile
from pathlib import Path

import pytest

WHY = "install the `notebooks` extra to run notebooks"
nbclient = pytest.importorskip("nbclient", reason=WHY)
nbformat = pytest.importorskip("nbformat", reason=WHY)
traitlets = pytest.importorskip("traitlets", reason=WHY)
kernels = pytest.importorskip("jupyter_client.kernelspec", reason=WHY)
managers = pytest.importorskip("jupyter_client.manager", reason=WHY)
pytest.importorskip("ipykernel", reason=WHY)

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NEEDS = {"2_convert_and_generate": ("torch", "transformers")}
"""What a notebook imports beside what the library needs."""
KEPT = "keep-picture"
"""A tag of cells whose pictures are kept in git."""
MOST_CELLS = 24
MOST_PICTURE_BYTES = 400_000
"""Of all notebooks together."""
SECONDS = 300
"""For one cell; machines of tests may be ten times slower than a quiet one."""

EXPECTED = (
    # The progress of a run: its bar, and the lines above it.
    r"\s*\d+%\|.*\| \d+/\d+ \[.*\]\s*",
    r"[\d,]+ parameters, [\d,]+ active per token; .*",
    r"step \d+: validation loss [\d.]+ nats a token",
    # Other libraries have tqdm say so, once, where Jupyter has no ipywidgets to draw a bar with.
    r".*TqdmWarning: IProgress not found\. .*",
    r"  from \.autonotebook import tqdm as notebook_tqdm",
)
"""Lines that may stand on standard error; everything else there fails the test."""
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


class UnexpectedError(AssertionError):
    """A notebook said something on standard error."""


class ThisInterpreter(managers.AsyncKernelManager):
    """Kernels of this interpreter, whatever kernels are installed for the user."""

    @traitlets.default("kernel_spec_manager")
    def _only_the_native_one(self):
        return kernels.KernelSpecManager(kernel_dirs=[])


def execute(notebook, folder):
    """Run a notebook in `folder`, in a kernel of this interpreter that sees this repository; its outputs are put in it.

    Raises:
        CellExecutionError: a cell raised.
        UnexpectedError: there is something else than `EXPECTED` on standard error, a warning for example.
    """
    # Not inherited: what tests set for themselves, what would hide pictures or warnings, and the name of the test, without
    # which the kernel hands on what compiled libraries write, too.
    dropped = (
        "TRITON_INTERPRET",
        "XLA_FLAGS",
        "PALLAS_KERNELS_IMPLEMENTATION",
        "MPLBACKEND",
        "TF_CPP_MIN_LOG_LEVEL",
        "PYTEST_CURRENT_TEST",
    )
    environment = {name: value for name, value in os.environ.items() if name not in dropped} | {
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
        "IPYTHONDIR": str(Path(folder) / ".ipython"),  # no start-up files of a user
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    place = {"metadata": {"path": str(folder)}}
    client = nbclient.NotebookClient(notebook, timeout=SECONDS, kernel_manager_class=ThisInterpreter, resources=place)
    client.execute(env=environment)
    unexpected = unexpected_lines(notebook)
    if unexpected:
        raise UnexpectedError("on standard error:\n" + "\n".join(unexpected))


def unexpected_lines(notebook):
    """Lines on standard error, each with its cell's number, that `EXPECTED` does not have."""
    lines = []
    for number, cell in enumerate(notebook.cells):
        said = "".join(output.text for output in cell.get("outputs", ()) if output.get("name") == "stderr")
        # A bar is drawn over itself: it goes back to the start of its line.
        for line in re.split(r"[\r\n]", said):
            if line.strip() and not any(re.fullmatch(pattern, line) for pattern in EXPECTED):
                lines.append(f"cell {number}: {line}")
    return lines


def clean(notebook):
    """The notebook as it is kept: of outputs only pictures, and nothing of the machine it ran on."""
    cleaned = nbformat.from_dict({"nbformat": 4, "nbformat_minor": 5, "metadata": METADATA, "cells": []})
    for cell in notebook.cells:
        tags = {name: value for name, value in cell.metadata.items() if name == "tags"}
        kept = nbformat.from_dict({"cell_type": cell.cell_type, "id": cell.id, "metadata": tags, "source": cell.source})
        if cell.cell_type == "code":
            kept.execution_count, kept.outputs = None, []
            for output in cell.outputs:
                picture = output.get("data", {}).get("image/png")
                if picture is not None and KEPT in tags.get("tags", ()):
                    data = {"image/png": picture.strip()}
                    kept.outputs.append(nbformat.from_dict({"output_type": "display_data", "data": data, "metadata": {}}))
        cleaned.cells.append(kept)
    return cleaned


def written(notebook):
    """The text of a notebook's file."""
    return nbformat.writes(notebook) + "\n"


def read(path):
    return nbformat.read(path, as_version=4)


def of_cells(*sources):
    """A notebook of these code cells."""
    cells = [nbformat.v4.new_code_cell(source, id=f"cell_{i}") for i, source in enumerate(sources)]
    return nbformat.v4.new_notebook(cells=cells, metadata=METADATA)


def code(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_five():
    assert [path.name[0] for path in NOTEBOOKS] == list("12345")


@pytest.mark.slow
@every_notebook
def test_runs(path, tmp_path):
    for name in NEEDS.get(path.stem, ()):
        if importlib.util.find_spec(name) is None:  # importing torch here would be slow, and warn
            pytest.skip(f"{path.stem} needs {name}: install the `parity` extra")
    execute(read(path), tmp_path)


@every_notebook
def test_is_short_and_installs_first(path):
    notebook = read(path)
    assert len(notebook.cells) <= MOST_CELLS
    assert notebook.cells[0].cell_type == "markdown", "a title comes first"
    install = code(notebook)[0]
    assert re.search(r'find_spec\("bm_jax"\) is None:\n(    .*\n)*    %pip install .*git\+', install), install


@every_notebook
def test_asks_for_the_repository_where_it_has_to_install(path, tmp_path):
    missing = "import importlib.util\nimportlib.util.find_spec = lambda name: None"
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="set `repository` above to the address"):
        execute(of_cells(missing, code(read(path))[0]), tmp_path)


@every_notebook
def test_names_no_place_on_a_machine(path):
    text = "\n".join(cell.source for cell in read(path).cells)
    assert not re.findall(r"/(?:home|root|work|tmp|content|Users|usr|opt)/\S*", text)


@every_notebook
def test_is_kept_clean(path):
    """`python tests/test_notebooks.py NOTEBOOK` makes it so."""
    assert read(path) == clean(read(path))
    assert path.read_text(encoding="utf-8") == written(read(path))


def test_pictures_are_few_and_small():
    sizes = {
        f"{path.stem} {cell.id}": len(base64.b64decode(output.data["image/png"]))
        for path in NOTEBOOKS
        for cell in read(path).cells
        for output in cell.get("outputs", ())
    }
    assert sizes, "the pictures are gone: python tests/test_notebooks.py draws them again"
    assert sum(sizes.values()) <= MOST_PICTURE_BYTES, sizes


def test_pictures_that_are_asked_for_are_there():
    for path in NOTEBOOKS:
        for cell in read(path).cells:
            assert bool(cell.get("outputs")) == (KEPT in cell.metadata.get("tags", ())), f"{path.stem} {cell.id}"


def test_an_error_fails(tmp_path):
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="this went wrong"):
        execute(of_cells("x = 1", "raise ValueError('this went wrong')"), tmp_path)


def test_a_warning_fails_and_so_does_what_a_library_writes(tmp_path):
    notebook = of_cells(
        "print('this is fine')",
        "import warnings\nwarnings.warn('of a user')",
        "warnings.warn('of the past', DeprecationWarning)",
        "import sys\nprint('of a program', file=sys.stderr)",
        "import os, time\nos.write(2, b'of a compiled library\\n')\ntime.sleep(0.5)",
    )
    with pytest.raises(UnexpectedError) as error:
        execute(notebook, tmp_path)
    for number, said in ((1, "of a user"), (2, "of the past"), (3, "of a program"), (4, "of a compiled library")):
        assert re.search(rf"^cell {number}: .*{said}", str(error.value), re.MULTILINE), error.value
    assert "cell 0" not in str(error.value)


def test_progress_may_be_shown():
    notebook = of_cells("train()")
    output = {"output_type": "stream", "name": "stderr", "text": ""}
    notebook.cells[0].outputs = [nbformat.from_dict(output)]
    shown = "\r  0%|          | 0/9 [00:00<?, ?step/s]\r 11%|█ | 1/9 [00:15<09:57, 1.33s/step, tokens/s=69]  \n"
    shown += "2,728,216 parameters, 663,832 active per token; 1 x cpu\nstep 9: validation loss 2.1 nats a token\n"
    notebook.cells[0].outputs[0].text = shown
    assert unexpected_lines(notebook) == []
    notebook.cells[0].outputs[0].text = shown + "step 9: the loss is not finite\n"
    assert unexpected_lines(notebook) == ["cell 0: step 9: the loss is not finite"]


def test_cleaning_leaves_only_pictures_that_are_asked_for():
    notebook = of_cells("show()", "show()")
    data = {"image/png": "aGk=\n", "text/plain": "<Figure size 640x480>"}
    picture = {"output_type": "display_data", "data": data, "metadata": {"width": 9}}
    result = {"output_type": "execute_result", "data": {"text/plain": "1"}, "metadata": {}, "execution_count": 3}
    stream = {"output_type": "stream", "name": "stdout", "text": "/ho" + "me/somebody"}
    for cell in notebook.cells:
        cell.outputs = [nbformat.from_dict(output) for output in (picture, result, stream)]
        cell.execution_count, cell.metadata = 3, nbformat.from_dict({"execution": {"iopub.status.busy": "now"}})
    notebook.cells[0].metadata.tags = [KEPT]
    notebook.metadata["language_info"] = {"name": "python", "version": "3.11.7"}
    cleaned = clean(notebook)
    assert cleaned != notebook
    assert cleaned == clean(cleaned)
    assert cleaned.metadata == METADATA
    assert [cell.metadata for cell in cleaned.cells] == [{"tags": [KEPT]}, {}]
    assert [cell.execution_count for cell in cleaned.cells] == [None, None]
    kept = {"output_type": "display_data", "data": {"image/png": "aGk="}, "metadata": {}}
    assert [cell.outputs for cell in cleaned.cells] == [[kept], []]
    nbformat.validate(cleaned)


if __name__ == "__main__":
    for name in map(Path, sys.argv[1:] or NOTEBOOKS):
        ran = read(name)
        with tempfile.TemporaryDirectory() as folder:
            execute(ran, folder)
        name.write_text(written(clean(ran)), encoding="utf-8")
        print(f"{name}: ran without an error, and was cleaned")
