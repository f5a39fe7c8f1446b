"""A Hub that fails: what is retried, what is refused in a line, and what a second try sends."""

import subprocess
import sys
import time

import pytest
from hub_server import TOKEN, HubServer, Repo
from huggingface_hub import HfApi, constants

from adni_ldm.errors import UserError
from adni_ldm.hub.push import push_folder


@pytest.fixture
def hub(monkeypatch):
    """A Hub of its own; the client in this process may go online, by LFS, and its waits take no time."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    with HubServer() as server:
        server.waits = waits
        yield server


@pytest.fixture
def folder(tmp_path):
    """Two large files, as weights are, and two small ones."""
    folder = tmp_path / "model"
    for name, content in {"a/w.safetensors": b"\0" * 300_000, "b/w.safetensors": b"\1" * 300_000}.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(content)
    (folder / "README.md").write_text("---\nlicense: other\n---\n# a model\n")
    (folder / "config.json").write_text("{}")
    return folder


def push(hub, folder, token=TOKEN, repo_id="me/model", **options):
    return push_folder(HfApi(endpoint=hub.url, token=token), folder, repo_id, **options)


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")}


def arrived(hub, folder):
    files = dict(hub.repos["model", "me/model"].files)
    files.pop(".gitattributes")
    return files == files_of(folder)


def test_a_space_is_pushed_with_what_runs_it(hub, folder):
    push(hub, folder, repo_id="me/page", repo_type="space")
    files = dict(hub.repos["space", "me/page"].files)
    assert {name for name in files if name != ".gitattributes"} == set(files_of(folder))


@pytest.mark.parametrize("what", ["drop", 429, 503])
@pytest.mark.parametrize(
    "request_",
    ["GET /api/whoami-v2", "POST /api/repos/create", "PUT /lfs/", "POST /api/models/me/model/commit"],
)
def test_what_passes_is_tried_again(hub, folder, what, request_):
    hub.fail(request_, what, times=2, **({"Retry_After": "7"} if what == 429 else {}))
    push(hub, folder)
    assert arrived(hub, folder)
    assert len(hub.waits) >= 2
    if what == 429:
        assert min(hub.waits) >= 7, "as long as the server asks for"


def test_a_push_that_broke_off_goes_on(hub, folder):
    """The weights that arrived before everything failed are not sent twice."""
    hub.fail("POST /api/models/me/model/commit", 503, times=100)
    with pytest.raises(UserError, match="busy or ill .503.: run the same again later"):
        push(hub, folder)
    assert hub.count("PUT /lfs/") == 2 and hub.repos["model", "me/model"].commits == 0
    hub.faults.clear()
    push(hub, folder)
    assert arrived(hub, folder) and hub.count("PUT /lfs/") == 2
    push(hub, folder)
    assert hub.repos["model", "me/model"].commits == 1, "what is there already is no second commit"


def test_a_connection_that_stays_broken_is_one_line(hub, folder):
    hub.fail("PUT /lfs/", "drop", times=1000)
    with pytest.raises(UserError, match="me/model: the Hub cannot be reached .*run the same again"):
        push(hub, folder)


def test_a_wrong_token_is_told_before_anything_is_made(hub, folder):
    with pytest.raises(UserError, match="does not accept the token .401.: run `hf auth login`"):
        push(hub, folder, token="hf_wrong")
    assert ("model", "me/model") not in hub.repos and not hub.waits
    with pytest.raises(UserError, match="may not write there .403."):
        push(hub, folder, repo_id="somebody/model")


def test_a_token_that_ends_on_the_way_is_told(hub, folder):
    hub.fail("PUT /lfs/", 401, times=10)
    with pytest.raises(UserError, match="does not accept the token"):
        push(hub, folder)


def test_no_token_is_told(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(UserError, match="no token: run `hf auth login`"):
        push(hub, folder, token=None)


def test_a_name_that_is_taken_is_refused_and_replaced_when_told(hub, folder):
    other = {"a/w.safetensors": b"of another model", "old.txt": b"old"}
    repo = hub.repos["model", "me/model"] = Repo(True, {".gitattributes": b"", **other})
    with pytest.raises(UserError, match="me/model is taken: it holds a/w.safetensors"):
        push(hub, folder)
    assert repo.files == {".gitattributes": b"", **other}
    push(hub, folder, overwrite=True)
    assert arrived(hub, folder), "and old.txt is gone"


def test_a_new_card_of_the_same_model_is_no_other_model(hub, folder):
    push(hub, folder)
    (folder / "README.md").write_text("---\nlicense: other\n---\n# a model that was judged\n")
    (folder / "metrics.json").write_text("{}")
    push(hub, folder)
    assert arrived(hub, folder)


def test_a_conflict_is_told(hub, folder):
    hub.fail("POST /api/models/me/model/commit", 409)
    with pytest.raises(UserError, match="somebody else writes to it now .409"):
        push(hub, folder)


def test_what_is_private_does_not_go_where_everybody_sees_it(hub, folder):
    with pytest.raises(UserError, match="me/public exists and is public: add --public"):
        push(hub, folder, repo_id="me/public")
    assert not hub.repos["model", "me/public"].files
    push(hub, folder, repo_id="me/public", public=True)
    push(hub, folder, repo_id="me/new", public=True)
    push(hub, folder, repo_id="me/closed")
    assert not hub.repos["model", "me/new"].private and hub.repos["model", "me/closed"].private


@pytest.mark.parametrize("name", ["model", "me/a model", "me/a/b", "../model"])
def test_a_name_that_is_none_is_refused(hub, folder, name):
    with pytest.raises(UserError, match="--repo_id"):
        push(hub, folder, repo_id=name)
    assert not hub.requests


def test_no_network_is_one_line(folder):
    """In a process of its own, by the real waits: the Hub's address leads nowhere."""
    code = (
        "import sys; from pathlib import Path; from huggingface_hub import HfApi;"
        "from adni_ldm.errors import run_recipe; from adni_ldm.hub import push; push.ATTEMPTS = 2;"
        "api = HfApi(endpoint='http://127.0.0.1:9', token='hf_x');"
        "run_recipe(lambda: push.push_folder(api, Path(sys.argv[1]), 'me/model'))"
    )
    code = "import os; os.environ.pop('HF_HUB_OFFLINE', 0); " + code
    result = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "error: me/model: the Hub cannot be reached" in result.stderr.splitlines()[-1]
