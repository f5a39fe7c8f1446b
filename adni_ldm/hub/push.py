"""A folder to a repository of the Hub: retried, resumable, and refused in one line."""

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
LONGEST_WAIT = 300.0  # seconds; a server that asks for more is told as an error
_PASSING = (408, 429, 500, 502, 503, 504)
# By these a repository is the same model, or the same drawn slices; cards and previews may change.
_IDENTITY = (".safetensors", "metadata.csv")


def check_login(api: HfApi, repo_id: str) -> None:
    """Raises UserError unless `repo_id` is a name ME/NAME, the Hub answers, and the token is valid."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"--repo_id {repo_id}: {' '.join(str(error).split())}") from error
    if repo_id.count("/") != 1:
        raise UserError(f"--repo_id {repo_id}: expected ME/NAME, the account and the repository")
    _patiently(api.whoami, repo_id)


def push_folder(
    api: HfApi,
    folder: Path,
    repo_id: str,
    repo_type: str = "model",
    public: bool = False,
    overwrite: bool = False,
) -> str:
    """Make the repository where there is none, and put the folder's files into it; returns its address.

    A push that broke off goes on when it is run again: files that arrived are not sent twice. A repository
    that holds other weights, or files that the folder has not, is refused unless `overwrite`, which removes
    what is not in the folder.

    Raises:
        UserError: no network, a wrong token, no right to write, a name that is taken, or a repository that is
            public where a private one was asked for.
    """
    check_login(api, repo_id)
    options = {"repo_id": repo_id, "repo_type": repo_type}
    kind = {"space_sdk": "gradio"} if repo_type == "space" else {}  # the Hub asks what runs a space
    url = _patiently(lambda: api.create_repo(**options, **kind, private=not public, exist_ok=True), repo_id)
    if not public and _patiently(lambda: api.repo_info(**options).private, repo_id) is False:
        raise UserError(
            f"{repo_id} exists and is public: add --public, make it private, or choose another name"
        )
    remote = _patiently(lambda: list(api.list_repo_tree(**options, recursive=True)), repo_id)
    if not overwrite:
        _refuse_taken(repo_id, folder, [file for file in remote if isinstance(file, RepoFile)])
    _patiently(
        lambda: api.upload_folder(
            **options,
            folder_path=folder,
            commit_message="Upload with adni_ldm.hub",
            delete_patterns="*" if overwrite else None,
        ),
        repo_id,
    )
    return str(url)


def _refuse_taken(repo_id: str, folder: Path, remote: list[RepoFile]) -> None:
    for file in remote:
        own = folder / file.path
        if file.path == ".gitattributes":
            continue
        if not own.is_file() or (file.path.endswith(_IDENTITY) and not _is_same(own, file)):
            raise UserError(
                f"{repo_id} is taken: it holds {file.path}, which is not of this push; choose another name, "
                "or add --overwrite to replace all that is there"
            )


def _is_same(own: Path, file: RepoFile) -> bool:
    content = own.read_bytes()
    if file.lfs:
        return hashlib.sha256(content).hexdigest() == file.lfs.sha256
    return (
        hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == file.blob_id
    )  # git's name for it


def _patiently(ask: Callable[[], Result], repo_id: str) -> Result:
    """What `ask` returns, asked again where a connection broke or the server is busy.

    The client retries most of its requests itself, some versions fewer than others; this holds for all.
    """
    wait = 1.0
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return ask()
        except (OSError, HTTPError, RuntimeError) as error:  # RuntimeError: the client's own, about another
            cause = _cause(error)
            passing = _is_passing(cause)
            if not passing or attempt == ATTEMPTS:
                raise UserError(f"{repo_id}: {_in_words(cause)}") from error
            asked = getattr(getattr(cause, "response", None), "headers", {}).get("Retry-After", "")
            pause = min(float(asked), LONGEST_WAIT) if asked.isdecimal() else wait
            logger.warning(
                "%s; trying again in %.0f s (%d of %d)", _short(cause), pause, attempt, ATTEMPTS - 1
            )
            time.sleep(pause)
            wait *= 2
    raise AssertionError("not reached")


def _cause(error: BaseException) -> BaseException:
    """The HTTP error that another was raised from, else the error itself."""
    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, HTTPError):
        inner = inner.__cause__
    return inner or error


def _is_passing(error: BaseException) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _PASSING
    return isinstance(error, (HTTPError, ConnectionError)) and not isinstance(error, OfflineModeIsEnabled)


def _in_words(error: BaseException) -> str:
    if isinstance(error, LocalTokenNotFoundError):
        return "no token: run `hf auth login`, or set HF_TOKEN"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing can be pushed: unset it"
    if not isinstance(error, HfHubHTTPError):
        if isinstance(error, (HTTPError, ConnectionError)):
            return f"the Hub cannot be reached ({_short(error)}): look at the network and run the same again"
        return f"the push failed ({_short(error)}): run the same again to go on"
    status = error.response.status_code
    if status == 401:
        return "the Hub does not accept the token (401): run `hf auth login`, or correct HF_TOKEN"
    if status == 403:
        return "the token may not write there (403): take one with write access, and an account of yours"
    if status == 409:
        return f"the name is taken, or somebody else writes to it now (409: {_short(error)})"
    if status in _PASSING:
        return f"the Hub is busy or ill ({status}): run the same again later, it goes on where it was"
    return f"the Hub refused ({status}: {_short(error)})"


def _short(error: BaseException) -> str:
    said = getattr(error, "server_message", None) or str(error) or type(error).__name__
    return " ".join(said.split())[:200]
