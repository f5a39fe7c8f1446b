"""Upload a folder to a repository of the Hugging Face Hub: retried, resumable, errors in one line."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the HTTP library: httpx or httpx2, by the version of huggingface_hub
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from adni_ldm.errors import UserError

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

ATTEMPTS = 5
LONGEST_WAIT = 300.0  # seconds between attempts, even if the server asks for more
_TRANSIENT = (408, 429, 500, 502, 503, 504)
# A repository with other content in these files is another model or data set; cards and previews may change.
_IDENTIFYING = (".safetensors", "metadata.csv")


def check_login(repo_id: str, api: HfApi | None = None) -> None:
    """Check that `repo_id` has the form ME/NAME, that the Hub can be reached, and that the token may write.

    Raises:
        UserError: one of these does not hold.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"--repo_id {repo_id}: {' '.join(str(error).split())}") from error
    if repo_id.count("/") != 1:
        raise UserError(f"--repo_id {repo_id}: expected ME/NAME, the account and the repository")
    token = _retry((api or HfApi()).whoami, repo_id).get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise UserError(f"{repo_id}: the token may only read: run `hf auth login` with one that may write")


def check_not_public(repo_id: str, repo_type: str = "model", api: HfApi | None = None) -> None:
    """Raise UserError if the repository exists and is public: a private push would be published."""
    api, options = api or HfApi(), {"repo_id": repo_id, "repo_type": repo_type}
    exists = _retry(lambda: api.repo_exists(**options), repo_id)
    if exists and _retry(lambda: api.repo_info(**options).private, repo_id) is False:
        raise UserError(
            f"{repo_id} exists and is public: add --public, make it private, or choose another name"
        )


def upload_folder(
    folder: Path,
    repo_id: str,
    repo_type: str = "model",
    public: bool = False,
    overwrite: bool = False,
    api: HfApi | None = None,
) -> str:
    """Create the repository if needed, and upload the files of the folder; returns the URL.

    An interrupted upload continues when it is started again: files that arrived are not sent twice. A
    repository with other weights, or with files that the folder does not have, is refused unless
    `overwrite`, which removes what is not in the folder.

    Raises:
        UserError: no network, an invalid token, no write access, a repository that is taken, or one that is
            public although a private one was requested.
    """
    api = api or HfApi()
    check_login(repo_id, api)
    options = {"repo_id": repo_id, "repo_type": repo_type}
    sdk = {"space_sdk": "gradio"} if repo_type == "space" else {}
    url = _retry(lambda: api.create_repo(**options, **sdk, private=not public, exist_ok=True), repo_id)
    if not public:
        check_not_public(repo_id, repo_type, api)
    remote = _retry(lambda: list(api.list_repo_tree(**options, recursive=True)), repo_id)
    if not overwrite:
        _check_not_taken(repo_id, folder, [file for file in remote if isinstance(file, RepoFile)])
    options |= {"delete_patterns": "*" if overwrite else None, "commit_message": "Upload with adni_ldm.hub"}
    _retry(lambda: api.upload_folder(folder_path=folder, **options), repo_id)
    return str(url)


def _check_not_taken(repo_id: str, folder: Path, remote: list[RepoFile]) -> None:
    for file in remote:
        local = folder / file.path
        if file.path == ".gitattributes":
            continue
        if not local.is_file() or (file.path.endswith(_IDENTIFYING) and not _is_same(local, file)):
            raise UserError(
                f"{repo_id} is taken: it contains {file.path}, which this push does not; choose another "
                "name, or add --overwrite to replace all its content"
            )


def _is_same(local: Path, file: RepoFile) -> bool:
    content = local.read_bytes()
    if file.lfs:
        return hashlib.sha256(content).hexdigest() == file.lfs.sha256
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == file.blob_id  # git's own hash


def _retry(request: Callable[[], Result], repo_id: str) -> Result:
    """The result of `request`, repeated while the connection breaks or the server is busy.

    The client retries most of its requests itself, depending on its version; this covers all of them.
    """
    wait = 1.0
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return request()
        except (OSError, HTTPError, RuntimeError) as error:  # RuntimeError: the client's wrapper of another
            cause = _http_cause(error)
            if not _is_transient(cause) or attempt == ATTEMPTS:
                raise UserError(f"{repo_id}: {_describe(cause)}") from error
            asked = getattr(getattr(cause, "response", None), "headers", {}).get("Retry-After", "")
            pause = min(float(asked), LONGEST_WAIT) if asked.isdecimal() else wait
            logger.warning("%s; retry %d of %d in %.0f s", _short(cause), attempt, ATTEMPTS - 1, pause)
            time.sleep(pause)
            wait *= 2
    raise AssertionError("not reached")


def _http_cause(error: BaseException) -> BaseException:
    """The HTTP error that `error` was raised from, else `error` itself."""
    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, HTTPError):
        inner = inner.__cause__
    return inner or error


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _TRANSIENT
    return isinstance(error, (HTTPError, ConnectionError)) and not isinstance(error, OfflineModeIsEnabled)


def _describe(error: BaseException) -> str:
    """What went wrong, and what to do about it."""
    if isinstance(error, LocalTokenNotFoundError):
        return "no token: run `hf auth login`, or set HF_TOKEN"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing can be pushed: unset it"
    if not isinstance(error, HfHubHTTPError):
        if isinstance(error, (HTTPError, ConnectionError)):
            return f"the Hub cannot be reached ({_short(error)}): check the network and push again"
        return f"the push failed ({_short(error)}): push again, and it continues"
    status = error.response.status_code
    if status in _TRANSIENT:
        return f"the Hub is busy or down ({status}): push again later, and it continues"
    known = {
        401: "the Hub rejects the token (401): run `hf auth login`, or correct HF_TOKEN",
        403: "the token has no write access there (403): use one that has, and an account of yours",
        409: f"the name is taken, or another upload is in progress (409: {_short(error)})",
    }
    return known.get(status, f"the Hub refused the request ({status}: {_short(error)})")


def _short(error: BaseException) -> str:
    message = getattr(error, "server_message", None) or str(error) or type(error).__name__
    return " ".join(message.split())[:200]
