"""Which requests reach the page: from its own address, of a bounded size, and without addresses to fetch.

gradio's cap is one per file, of which a request may hold a thousand, and uploads that no event reads stay on
disk until they are old. It answers any name that resolves to this machine, by which a page of another site
could use it (DNS rebinding).
"""

import asyncio
import ipaddress
import json
import os
import re
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse

from adni_ldm.errors import UserError

LOOPBACK = ("localhost", "127.0.0.1", "::1")
MOST_SETTINGS = 1 << 16  # bytes of a request that is no upload
OVERHEAD = 1 << 16  # bytes around the file of an upload
UPLOADS_AT_ONCE = 8  # are held in memory
UPLOADS_ON_DISK = 50  # of the largest size, until they are read or too old
BLOCK = 1 << 12  # bytes that a file or folder takes beside its content
SECONDS = 60  # in which a request must arrive


def is_open(host: str | None) -> bool:
    """Whether others than this machine can connect. A Space is not open: the Hub decides who can."""
    host = host or os.environ.get("GRADIO_SERVER_NAME") or LOOPBACK[1]
    return host not in LOOPBACK and "SPACE_ID" not in os.environ


def read_accounts(path: str) -> list[tuple[str, str]]:
    """Read NAME:PASSWORD of each line of a file. Raises UserError if there is none, or a line is not."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"--auth {path}: cannot be read; give a file with a line NAME:PASSWORD") from error
    accounts = [line.strip().partition(":") for line in lines if line.strip()]
    if not accounts or not all(name and password for name, _, password in accounts):
        raise UserError(f"--auth {path}: each line must be NAME:PASSWORD")
    return [(name, password) for name, _, password in accounts]


class Guard:
    """ASGI middleware that refuses requests to or from another address, and what is too large.

    Bodies are read before gradio sees them: what is refused or breaks off leaves no file. An upload for which
    the folder of uploads has no room is refused with status 507.
    """

    def __init__(self, app, host: str | None, allowed_hosts: list[str], max_upload: int, folder: str):
        self.app, self.max_upload, self.folder = app, max_upload, folder
        self.anywhere = "SPACE_ID" in os.environ  # behind the Hub's proxy
        self.any_ip = is_open(host)  # no other site can point its name at a number
        own = (host, socket.gethostname(), socket.getfqdn()) if self.any_ip else (host,)
        self.names = {name.lower() for name in (*LOOPBACK, *own, *allowed_hosts) if name}
        self.uploads, self.arriving = asyncio.Semaphore(UPLOADS_AT_ONCE), 0

    async def __call__(self, scope, receive, send) -> None:
        """Answer the request with an error, or hand it on."""
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        if reason := self._foreign(headers):
            return await _refuse(scope, receive, send, 403, reason)
        if "://" in scope["path"]:
            return await _refuse(scope, receive, send, 400, "addresses are not fetched")
        if scope["type"] == "websocket" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return await self.app(scope, receive, send)
        if not scope["path"].rstrip("/").endswith("/upload"):
            return await self._checked(scope, receive, send, MOST_SETTINGS, _check_settings)
        async with self.uploads:
            room = UPLOADS_ON_DISK * self.max_upload - self._stored()
            if room < (self.arriving + 1) * self.max_upload:
                reason = "the page has no room for uploads now: try again in ten minutes"
                return await _refuse(scope, receive, send, 507, reason)
            self.arriving += 1
            try:
                await self._checked(scope, receive, send, self.max_upload + OVERHEAD, _check_upload)
            finally:
                self.arriving -= 1

    def _stored(self) -> int:
        """Bytes of uploads on disk. Removes folders that gradio left empty, unless it may be filling one."""
        total = 0
        for place, _, files in os.walk(self.folder, topdown=False):
            for name in files:
                with suppress(FileNotFoundError):  # read in between
                    total += os.stat(os.path.join(place, name)).st_size + BLOCK
            if place != self.folder:
                total += BLOCK
                with suppress(OSError):  # not empty
                    if not self.arriving:
                        os.rmdir(place)
        return total

    def _foreign(self, headers: Headers) -> str:
        """Why a request is not for this page or not from it; "" if it is."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.anywhere:
            return ""
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
        except ValueError:
            name = ""
        if name not in self.names and not (self.any_ip and _is_ip(name)):
            return f"{name or 'no host'} is not a name of this page: start it with --allowed_hosts"
        if origin is not None and origin.lower() not in (f"http://{host}".lower(), f"https://{host}".lower()):
            return "requests of other sites are refused"
        return ""

    async def _checked(self, scope, receive, send, most: int, check: Callable[[bytes, Headers], str]) -> None:
        headers, body = Headers(scope=scope), bytearray()
        too_large = f"a request may have {most} bytes"
        if not headers.get("content-length", "0").isdigit() or int(headers.get("content-length", "0")) > most:
            return await _refuse(scope, receive, send, 413, too_large)
        try:
            async with asyncio.timeout(SECONDS):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > most:
                        return await _refuse(scope, receive, send, 413, too_large)
        except TimeoutError:
            return await _refuse(scope, receive, send, 408, f"the request took more than {SECONDS} s")
        if reason := check(bytes(body), headers):
            return await _refuse(scope, receive, send, 400, reason)
        await self.app(scope, _replay(bytes(body), receive), send)


def _replay(body: bytes, receive: Callable[[], Awaitable[dict]]) -> Callable[[], Awaitable[dict]]:
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def replayed() -> dict:
        return next(messages, None) or await receive()

    return replayed


async def _refuse(scope, receive, send, status: int, reason: str) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008})
    else:
        await PlainTextResponse(reason, status)(scope, receive, send)


def _is_ip(name: str) -> bool:
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def _check_upload(body: bytes, headers: Headers) -> str:
    boundary = re.search(r'boundary="?([^";]+)', headers.get("content-type", ""))
    parts = body.count(b"--" + boundary[1].encode()) - 1 if boundary else 0  # the last one ends the form
    return "" if parts == 1 else "one file at a time"


def _check_settings(body: bytes, headers: Headers) -> str:
    """Refuse addresses: in a file's path gradio would fetch them. Its `url` is the page's own."""
    try:
        settings = json.loads(body)
    except RecursionError:
        return "nested too deeply"
    except ValueError:  # a login, or nothing
        settings = body.decode("latin-1")
    own = tuple(f"{scheme}://{headers.get('host', '')}/" for scheme in ("http", "https"))
    for key, text in _texts(settings):
        if "://" in text and not (key == "url" and text.startswith(own)):
            return "addresses are not fetched"
    return ""


def _texts(value: object, key: str = "") -> Iterator[tuple[str, str]]:
    """All texts in a JSON value, with the key that each is the value of."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _texts(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
