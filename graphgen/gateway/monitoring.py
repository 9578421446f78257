"""What an operator looks at: `/metrics`.

Counts nothing itself but the gateway's own answers: see `graphgen.gateway.answers`.
"""

import asyncio

from graphgen.gateway.http import Receive, Scope, Send, send_bytes
from graphgen.gateway.metric_table import Names
from graphgen.gateway.metrics import render
from graphgen.gateway.service import Service
from graphgen.ipc.ggp.messages import StatsRequest

METRICS = StatsRequest(metrics=True)


class Monitoring:
    """See this module."""

    def __init__(self, service: Service, names: Names) -> None:
        """names: of the metrics."""
        self._service = service
        self._names: Names = names

    async def metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._service.answers.report()
        stats = await asyncio.to_thread(self._service.frontends.stats, METRICS)
        accept = dict(scope["headers"]).get(b"accept", b"").decode("latin-1")
        body, content_type = render(stats, self._names, self._service.model_names[0], accept)
        await send_bytes(send, 200, body, [(b"content-type", content_type.encode())])
