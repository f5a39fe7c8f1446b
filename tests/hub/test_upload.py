"""Uploads to a failing Hub: what is retried, what is refused, and what a second attempt sends."""

import subprocess
import sys
import time

import pytest
from hub_server import TOKEN, HubServer, Repo
from huggingface_hub import HfApi, constants

from adni_ldm.errors import UserError
from adni_ldm.hub.upload import upload_folder


@pytest.fixture
def hub(monkeypatch):
    """A new Hub; the client of this process may connect, over LFS, and waits take no time."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    with HubServer() as server:
        server.waits = waits
        yield server


@pytest.fixture
def folder(tmp_path):
    """Two large files, like weights, and two small ones."""
    folder = tmp_path / "model"
    for name, content in {"a/w.safetensors": b"\0" * 300_000, "b/w.safetensors": b"\1" * 300_000}.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(content)
    (folder / "README.md").write_text("---\nlicense: other\n---\n# a model\n")
    (folder / "config.json").write_text("{}")
    return folder


def push(hub, folder, token=TOKEN, repo_id="me/model", **options):
    return upload_folder(folder, repo_id, api=HfApi(endpoint=hub.url, token=token), **options)


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")}


def arrived(hub, folder):
    files = dict(hub.repos["model", "me/model"].files)
    files.pop(".gitattributes")
    return files == files_of(folder)


def test_a_space_is_uploaded(hub, folder):
    push(hub, folder, repo_id="me/page", repo_type="space")
    files = dict(hub.repos["space", "me/page"].files)
    assert {name for name in files if name != ".gitattributes"} == set(files_of(folder))


@pytest.mark.parametrize("kind", ["dataset", "space"])
def test_a_private_push_into_a_public_one_of_another_kind_is_refused(hub, folder, kind):
    """Of another kind than a model, whose push is checked before training."""
    hub.repos[kind, "me/public"] = Repo(private=False)
    with pytest.raises(UserError, match="exists and is public"):
        push(hub, folder, repo_id="me/public", repo_type=kind)


@pytest.mark.parametrize("what", ["drop", 429, 503])
@pytest.mark.parametrize(
    "request_",
    ["GET /api/whoami-v2", "POST /api/repos/create", "PUT /lfs/", "POST /api/models/me/model/commit"],
)
def test_transient_errors_are_retried(hub, folder, what, request_):
    hub.fail(request_, what, times=2, **({"Retry_After": "7"} if what == 429 else {}))
    push(hub, folder)
    assert arrived(hub, folder)
    assert len(hub.waits) >= 2
    if what == 429:
        assert min(hub.waits) >= 7, "as long as the server requests"


def test_an_interrupted_upload_continues(hub, folder):
    """Weights that arrived before the failure are not sent twice."""
    hub.fail("POST /api/models/me/model/commit", 503, times=100)
    with pytest.raises(UserError, match="busy or down .503.: push again later"):
        push(hub, folder)
    assert hub.count("PUT /lfs/") == 2 and hub.repos["model", "me/model"].commits == 0
    hub.faults.clear()
    push(hub, folder)
    assert arrived(hub, folder) and hub.count("PUT /lfs/") == 2
    push(hub, folder)
    assert hub.repos["model", "me/model"].commits == 1, "an unchanged folder makes no second commit"


def test_a_lost_connection_is_one_line(hub, folder):
    hub.fail("PUT /lfs/", "drop", times=1000)
    with pytest.raises(UserError, match="me/model: the Hub cannot be reached .*push again"):
        push(hub, folder)


def test_a_wrong_token_is_refused_before_anything_is_created(hub, folder):
    with pytest.raises(UserError, match="rejects the token .401.: run `hf auth login`"):
        push(hub, folder, token="hf_wrong")
    assert ("model", "me/model") not in hub.repos and not hub.waits
    with pytest.raises(UserError, match="no write access there .403."):
        push(hub, folder, repo_id="somebody/model")


def test_a_token_that_may_only_read_is_refused_before_anything_is_created(hub, folder):
    hub.role = "read"
    with pytest.raises(UserError, match="the token may only read: run `hf auth login`"):
        push(hub, folder)
    assert ("model", "me/model") not in hub.repos


def test_a_token_that_expires_during_the_upload_is_reported(hub, folder):
    hub.fail("PUT /lfs/", 401, times=10)
    with pytest.raises(UserError, match="rejects the token"):
        push(hub, folder)


def test_a_missing_token_is_reported(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(UserError, match="no token: run `hf auth login`"):
        push(hub, folder, token=None)


def test_a_repository_that_is_taken_is_refused_unless_overwrite(hub, folder):
    other = {"a/w.safetensors": b"of another model", "old.txt": b"old"}
    repo = hub.repos["model", "me/model"] = Repo(True, {".gitattributes": b"", **other})
    with pytest.raises(UserError, match="me/model is taken: it contains a/w.safetensors"):
        push(hub, folder)
    assert repo.files == {".gitattributes": b"", **other}
    push(hub, folder, overwrite=True)
    assert arrived(hub, folder), "old.txt is removed"


def test_a_new_card_of_the_same_model_is_accepted(hub, folder):
    push(hub, folder)
    (folder / "README.md").write_text("---\nlicense: other\n---\n# a model that was evaluated\n")
    (folder / "metrics.json").write_text("{}")
    push(hub, folder)
    assert arrived(hub, folder)


def test_a_conflict_is_reported(hub, folder):
    hub.fail("POST /api/models/me/model/commit", 409)
    with pytest.raises(UserError, match="another upload is in progress .409"):
        push(hub, folder)


def test_a_private_push_into_a_public_repository_is_refused(hub, folder):
    with pytest.raises(UserError, match="me/public exists and is public: add --public"):
        push(hub, folder, repo_id="me/public")
    assert not hub.repos["model", "me/public"].files
    push(hub, folder, repo_id="me/public", public=True)
    push(hub, folder, repo_id="me/new", public=True)
    push(hub, folder, repo_id="me/closed")
    assert not hub.repos["model", "me/new"].private and hub.repos["model", "me/closed"].private


@pytest.mark.parametrize("name", ["model", "me/a model", "me/a/b", "../model"])
def test_an_invalid_name_is_refused(hub, folder, name):
    with pytest.raises(UserError, match="--repo_id"):
        push(hub, folder, repo_id=name)
    assert not hub.requests


def test_no_network_is_one_line(folder):
    """In its own process, with real waits: no server listens at the Hub's address."""
    code = (
        "import sys; from pathlib import Path; from huggingface_hub import HfApi;"
        "from adni_ldm.errors import run_recipe; from adni_ldm.hub import upload; upload.ATTEMPTS = 2;"
        "api = HfApi(endpoint='http://127.0.0.1:9', token='hf_x');"
        "run_recipe(lambda: upload.upload_folder(Path(sys.argv[1]), 'me/model', api=api))"
    )
    code = "import os; os.environ.pop('HF_HUB_OFFLINE', 0); " + code
    result = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "error: me/model: the Hub cannot be reached" in result.stderr.splitlines()[-1]
