"""The notebook runs from top to bottom, here with a tiny model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).resolve().parent.parent / "examples" / "tour.ipynb"


def test_the_notebook_runs(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf()) or plt.close())
    monkeypatch.setattr("tempfile.mkdtemp", lambda: str(tmp_path))
    names: dict[str, Any] = {"__name__": "__main__"}
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells):
        code = "".join(cell["source"])
        code = code.replace("MODEL = None", f"MODEL = {str(model_folder)!r}").replace(
            "DOCUMENTS = 8", "DOCUMENTS = 4"
        )
        code = re.sub(r"epochs=\d+", "epochs=1", code)
        exec(compile(code, f"cell {number}", "exec"), names)  # noqa: S102 - our own notebook
    assert len(shown) == 4, "loss, bytes, a route, a map"
    assert len(names["documents"]) == 4


def test_the_notebook_shows_what_it_did_and_names_no_machine() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    outputs = [output for cell in cells if cell["cell_type"] == "code" for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not re.search(
        r"/(?:tmp|home|root|work|Users)/", json.dumps([c["source"] for c in cells] + outputs)
    )
