"""The page at `/`: files that are served as they lie in the folder `page`, compressed once.

Owns what a browser is told of them: nothing is loaded from elsewhere, nothing runs that is not a file here. They need
no key; what they show is fetched from endpoints that do.
"""

import gzip
import mimetypes
from pathlib import Path
from typing import NamedTuple

from graphgen.gateway.errors import ApiError, Headers
from graphgen.gateway.http import Receive, Scope, Send, send_bytes

FOLDER = Path(__file__).parent / "page"
INDEX = "index.html"
HEADERS: Headers = [
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none';"
        b" form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-cache"),
    (b"vary", b"accept-encoding"),
]


class Asset(NamedTuple):
    """A file as it is sent."""

    content_type: bytes
    plain: bytes
    compressed: bytes


class Page:
    """All files, read when the gateway starts."""

    def __init__(self) -> None:
        self._assets = {
            path.relative_to(FOLDER).as_posix(): _read(path) for path in FOLDER.rglob("*") if path.is_file()
        }

    async def index(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._send(INDEX, scope, send)

    async def file(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._send(scope["path_params"]["name"], scope, send)

    async def _send(self, name: str, scope: Scope, send: Send) -> None:
        asset = self._assets.get(name)
        if asset is None:
            raise ApiError(404, f"the page has no file {name!r:.100}", "not_found")
        headers = [(b"content-type", asset.content_type), *HEADERS]
        if b"gzip" in dict(scope["headers"]).get(b"accept-encoding", b""):
            await send_bytes(send, 200, asset.compressed, [*headers, (b"content-encoding", b"gzip")])
        else:
            await send_bytes(send, 200, asset.plain, headers)


def _read(path: Path) -> Asset:
    kind = mimetypes.guess_type(path.name)[0] or "text/plain"
    kind = "text/javascript" if path.suffix == ".js" else kind
    content_type = kind if kind.startswith("image/") else f"{kind}; charset=utf-8"
    data = path.read_bytes()
    return Asset(content_type.encode(), data, gzip.compress(data, mtime=0))
