"""graphgen: LLM serving with Dynamic SplitFuse on captured CUDA graphs.

The public names. Each is imported when it is first used, so that `import graphgen` costs nothing and the engine's own
processes, which import this package too, load only what they need.
"""

import importlib
from typing import TYPE_CHECKING

from graphgen.base.version import __version__ as __version__

if TYPE_CHECKING:
    from graphgen.api.async_engine import AsyncEngine
    from graphgen.api.engine import Engine
    from graphgen.ipc.errors import (
        CheckpointError,
        ConfigError,
        ConnectionLostError,
        DeadlineError,
        EngineClosedError,
        EngineDeadError,
        GraphgenError,
        InvalidRequestError,
        NumericalError,
        OverloadedError,
        PoisonedRequestError,
        PromptTooLongError,
        ServerError,
        UnsupportedModelError,
    )
    from graphgen.ipc.messages import EngineStats
    from graphgen.launch.config import EngineConfig
    from graphgen.remote.async_client import AsyncClient
    from graphgen.remote.client import Client
    from graphgen.requests.outputs import RequestOutput, StreamPiece, Timing
    from graphgen.requests.prompts import Chat
    from graphgen.requests.sampling_params import SamplingParams


_HOMES = {
    "AsyncClient": "graphgen.remote.async_client",
    "AsyncEngine": "graphgen.api.async_engine",
    "Chat": "graphgen.requests.prompts",
    "CheckpointError": "graphgen.ipc.errors",
    "Client": "graphgen.remote.client",
    "ConfigError": "graphgen.ipc.errors",
    "ConnectionLostError": "graphgen.ipc.errors",
    "DeadlineError": "graphgen.ipc.errors",
    "Engine": "graphgen.api.engine",
    "EngineClosedError": "graphgen.ipc.errors",
    "EngineConfig": "graphgen.launch.config",
    "EngineDeadError": "graphgen.ipc.errors",
    "EngineStats": "graphgen.ipc.messages",
    "GraphgenError": "graphgen.ipc.errors",
    "InvalidRequestError": "graphgen.ipc.errors",
    "NumericalError": "graphgen.ipc.errors",
    "OverloadedError": "graphgen.ipc.errors",
    "PoisonedRequestError": "graphgen.ipc.errors",
    "PromptTooLongError": "graphgen.ipc.errors",
    "RequestOutput": "graphgen.requests.outputs",
    "SamplingParams": "graphgen.requests.sampling_params",
    "ServerError": "graphgen.ipc.errors",
    "StreamPiece": "graphgen.requests.outputs",
    "Timing": "graphgen.requests.outputs",
    "UnsupportedModelError": "graphgen.ipc.errors",
}

__all__ = [
    "AsyncClient",
    "AsyncEngine",
    "Chat",
    "CheckpointError",
    "Client",
    "ConfigError",
    "ConnectionLostError",
    "DeadlineError",
    "Engine",
    "EngineClosedError",
    "EngineConfig",
    "EngineDeadError",
    "EngineStats",
    "GraphgenError",
    "InvalidRequestError",
    "NumericalError",
    "OverloadedError",
    "PoisonedRequestError",
    "PromptTooLongError",
    "RequestOutput",
    "SamplingParams",
    "ServerError",
    "StreamPiece",
    "Timing",
    "UnsupportedModelError",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'graphgen' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
