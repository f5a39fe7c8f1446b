"""What a Space of app.py contains: the page and the package's own files, after the leak scan."""

import shutil
from pathlib import Path

import pytest

import adni_ldm
from adni_ldm.data.folder import FolderListing
from adni_ldm.errors import UserError
from adni_ldm.hub import space
from adni_ldm.hub.leak_scan import find_leaks, index_training_data

ROOT = Path(__file__).parents[2]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the package, from which the Space is made."""
    ignored = shutil.ignore_patterns("__pycache__")
    copy = shutil.copytree(Path(adni_ldm.__file__).parent, tmp_path / "package/adni_ldm", ignore=ignored)
    monkeypatch.setattr(adni_ldm, "__file__", str(copy / "__init__.py"))
    return copy


@pytest.fixture
def uploaded(monkeypatch):
    """Names of the folders that were uploaded."""
    folders = []
    monkeypatch.setattr(space, "upload_folder", lambda folder, *_: folders.append(folder))
    return folders


def test_other_files_in_the_package_do_not_leave(package, tmp_path):
    (package / ".env").write_text("HF_TOKEN=hf_" + "x" * 20)
    (package / "data/s0p0003_01.png").write_bytes(b"a slice")
    (package / "data/cache.arrow").write_bytes(b"slices")
    (package / "data/link.py").symlink_to(package / ".env")
    folder = tmp_path / "space"
    folder.mkdir()
    space.write_space(folder, ROOT / "app.py", "me/model")
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {
        *(".py", ".md", ".jinja", ".yaml", ".txt")
    }
    assert not (folder / "adni_ldm/data/link.py").exists()
    assert (folder / "adni_ldm/hub/model_card.md").is_file()
    assert find_leaks(folder, index_training_data([FolderListing(tmp_path)], 1), "me/space", "me/model") == []


def test_a_space_goes_through_the_leak_scan(package, uploaded):
    space.push_space("me/space", ROOT / "app.py", "me/model", public=False)
    assert len(uploaded) == 1
    (package / "data/notes.py").write_text('KEY = "hf_' + "x" * 20 + '"\n')
    with pytest.raises(UserError, match="adni_ldm/data/notes.py: a secret, hf_x…"):
        space.push_space("me/space", ROOT / "app.py", "me/model", public=False)
    assert len(uploaded) == 1
