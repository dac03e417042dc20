"""The notebooks run from the first cell to the last, and what they show is what they say."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


def texts(cell: nbformat.NotebookNode) -> str:
    parts = [output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in cell.outputs]
    return "".join(parts)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_quantization_notebook_runs(tmp_path: Path):
    notebook = nbformat.read(NOTEBOOKS / "quantize.ipynb", as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    everything = "".join(map(texts, cells))
    assert "0 bytes copied" not in texts(cells[2]) or "layers" in texts(cells[2])
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)
    assert any("<table>" in output.get("data", {}).get("text/html", "") for output in cells[2].outputs)
    assert everything.count("Paris") >= 2
