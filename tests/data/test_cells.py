"""Texts that a spreadsheet takes for a formula are escaped in the CSV files that we write, and read back."""

import base64
import csv
import io
import re
import zipfile

import pandas as pd
import pytest
from PIL import Image
from stand_ins import make_pipeline

import sample
from adni_ldm.config import class_names
from adni_ldm.data.cells import escape, escape_table, unescape, unescape_table
from adni_ldm.data.folder import list_folder
from adni_ldm.errors import UserError
from adni_ldm.evaluation.history import sampled_with
from adni_ldm.evaluation.image_sets import read_sample_table
from adni_ldm.files import write_json
from adni_ldm.preprocessing.assembly import assemble
from adni_ldm.preprocessing.slicing import SlicingSettings
from adni_ldm.preprocessing.study import Rejected, Study, StudyScan
from adni_ldm.web.components import download_link

FORMULA = '=HYPERLINK("http://x.example")'


@pytest.mark.parametrize("text", [FORMULA, "+a", "-a", "@a", "\ta", "\ra", "-1-1", "'=a", "''=a", "=1"])
def test_a_formula_is_escaped_and_read_back(text):
    assert escape(text) == f"'{text}"
    assert unescape(escape(text)) == text


@pytest.mark.parametrize("value", ["-1.5", "+2", "-1e-3", -1.5, -2, None, "", "a=b", "'a", "007", True])
def test_numbers_and_other_texts_stay_as_they_are(value):
    assert escape(value) is value and unescape(value) is value


def test_a_table_keeps_its_numbers_and_file_names():
    table = pd.DataFrame({"file_name": ["-a/1.png", "b"], "subject": ["=a", "b"], "shift": [-1.5, 2.0]})
    written = escape_table(table)
    assert written.to_csv(index=False) == "file_name,subject,shift\n-a/1.png,'=a,-1.5\nb,b,2.0\n"
    pd.testing.assert_frame_equal(unescape_table(written), table)


def test_the_metadata_of_samples_is_escaped_and_read_back(tmp_path):
    sample.write_metadata(
        tmp_path, make_pipeline(), {"AD": {}}, [0], {"model": "=runs/ldm", "guidance_scale": -1.5}
    )
    rows = list(csv.reader((tmp_path / "metadata.csv").open()))
    assert rows[1][-2:] == ["'=runs/ldm", "-1.5"]
    assert sampled_with(read_sample_table(tmp_path)) == {"model": "=runs/ldm", "guidance_scale": "-1.5"}


def test_the_pages_download_is_escaped():
    link = download_link("a.zip", {"AD/1.png": Image.new("L", (4, 4))}, [{"label": "=AD", "x": -1}])
    content = base64.b64decode(re.search(r"base64,([^\"]+)", link)[1])
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.read("metadata.csv").decode() == "label,x\n'=AD,-1\n"


def test_subjects_are_read_back_from_a_data_folder(ad_nc_folder):
    root = ad_nc_folder()
    rows = ["file_name,subject,slice", "AD/1001_78.jpeg,'=1001,78"]
    (root / "train/metadata.csv").write_text("\n".join(rows) + "\n")
    subjects = {file.subject for file in list_folder(root, ("AD", "NC")).files}
    assert "=1001" in subjects and "'=1001" not in subjects


def test_rejected_scans_are_escaped(tmp_path):
    scan = StudyScan("k", "-a.nii", "@s", "AD", image_id="I1")
    (tmp_path / ".scans/rejected").mkdir(parents=True)
    write_json(tmp_path / ".scans/rejected/k.json", {"reason": FORMULA})
    study = Study([scan], pd.DataFrame(), [Rejected("+b.nii", "s", "I2", "too odd")], [])
    with pytest.raises(UserError, match="no scan could be used"):
        assemble(tmp_path / ".scans", study, {}, SlicingSettings(), {})
    table = pd.read_csv(tmp_path / "rejected.csv", dtype=str, keep_default_na=False)
    assert set(table.path) == {"'-a.nii", "'+b.nii"} and f"'{FORMULA}" in set(table.reason)


def test_a_class_that_begins_like_a_formula_is_refused():
    with pytest.raises(UserError, match="--classes =AD: a spreadsheet"):
        class_names("=AD,NC")
