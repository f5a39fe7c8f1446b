"""docs/demo.ipynb from top to bottom, on a tiny model of random weights."""

import base64
import io
import json
from pathlib import Path

import pytest
from PIL import Image
from stand_ins import make_pipeline

NOTEBOOK = Path(__file__).parents[1] / "docs/demo.ipynb"
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install 'adni-ldm[test]'")
nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: pip install 'adni-ldm[test]'")


def run(monkeypatch, model, data):
    """Execute the notebook; returns its outputs, and all that it printed."""
    monkeypatch.setenv("ADNI_LDM_MODEL", str(model))
    monkeypatch.setenv("ADNI_LDM_DATA", str(data))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    place = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(notebook, timeout=120, resources=place).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return outputs, "".join(output.get("text", "") for output in outputs)


def test_runs_from_top_to_bottom(tmp_path, monkeypatch):
    make_pipeline().save_pretrained(tmp_path / "ldm")
    verdict = {"good": False, "text": "Three samples are copies."}
    (tmp_path / "report").mkdir()
    (tmp_path / "report/metrics.json").write_text(json.dumps({"verdicts": {"privacy": verdict}}))
    data = tmp_path / "data/test/NC"
    data.mkdir(parents=True)
    Image.linear_gradient("L").resize((16, 16)).save(data / "s1_000.png")

    outputs, printed = run(monkeypatch, tmp_path / "ldm", tmp_path / "data")
    images = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(images) == 6, "classes, difference, guidance, trajectory, counterfactual, morph"
    for image in images:
        low, high = Image.open(io.BytesIO(base64.b64decode(image))).convert("L").getextrema()
        assert low < high
    assert "classes AD, NC; slices of 16 x 16 pixels" in printed
    assert "privacy: unfavourable. Three samples are copies." in printed


def test_no_outputs_are_committed():
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)
