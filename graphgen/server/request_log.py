"""One line for each request that a server has ended: who asked, how much, how it went. Never what was said.

Owns the line, the names of keys in it, and that a flood of requests that come to nothing fills no disk. Used by the
supervisor, whose standard error an operator reads.
"""

import logging
import re
from pathlib import Path

from graphgen.base.logs import FIELDS, RepeatedLines
from graphgen.ipc.server_messages import RequestEnded
from graphgen.server.frontend.keys import Keys, read_public_key

logger = logging.getLogger("graphgen.requests")

LINE = (
    "request id=%d client=%s address=%s prompt_tokens=%d cached_tokens=%d output_tokens=%d finish=%s"
    " first_token_ms=%.1f total_ms=%.1f"
)

NAMES = (*re.findall(r"(\w+)=", LINE), "request_id")


class RequestLog:
    """Writes the lines. A request without a token of output is one line of its kind a second, the rest counted."""

    def __init__(self, keys: Path | None) -> None:
        """keys: the server's folder of keys, where a client's name is that of its key's file."""
        self._keys = keys
        self._names: dict[str, str] = {}
        self._limit = RepeatedLines()

    def write(self, ended: RequestEnded) -> None:
        values = (
            ended.request_id,
            self._name(ended.key),
            ended.address or "-",
            ended.prompt_tokens,
            ended.cached_tokens,
            ended.output_tokens,
            ",".join(ended.finish),
            ended.first_token_ms,
            ended.total_ms,
            ended.log_id,
        )
        fields = dict(zip(NAMES, values, strict=True))
        line, shown = (LINE, values[:-1]) if not ended.log_id else (LINE + " request_id=%s", values)
        record = logger.makeRecord(logger.name, logging.INFO, __file__, 0, line, shown, None, extra={FIELDS: fields})
        if logger.isEnabledFor(logging.INFO) and (ended.output_tokens or self._limit.filter(record)):
            logger.handle(record)

    def _name(self, key: str) -> str:
        """Of the client that has the key; the key's beginning where its file is gone, - without keys."""
        if not key or self._keys is None:
            return "-"
        if key not in self._names:
            files = Keys(self._keys).clients.glob("*.key")
            self._names = {public: file.stem for file in files if (public := read_public_key(file)) is not None}
        return self._names.get(key, key[:8])
