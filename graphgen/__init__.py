"""graphgen: LLM serving with Dynamic SplitFuse on captured CUDA graphs.

The public names. Each is imported when it is first used, so that `import graphgen` costs nothing and the engine's own
processes, which import this package too, load only what they need. This file is the client's distribution's; the names
of the engine's are there where that is installed.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING

from graphgen.base.version import ENGINE_IS_MISSING
from graphgen.base.version import __version__ as __version__

if TYPE_CHECKING:
    from graphgen.api.engine import AsyncEngine, Engine
    from graphgen.calls.logprobs import Logprob, Logprobs, TokenLogprob
    from graphgen.calls.outputs import RequestOutput, StreamPiece, Timing
    from graphgen.calls.prompts import Chat
    from graphgen.calls.sampling_params import SamplingParams
    from graphgen.calls.structured import Choice, Grammar, JsonSchema, Regex
    from graphgen.ipc.engine_messages import EngineStats
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
    from graphgen.launch.config import EngineConfig
    from graphgen.remote.client import AsyncClient, Client

    __all__ = [
        "AsyncClient",
        "AsyncEngine",
        "Chat",
        "CheckpointError",
        "Choice",
        "Client",
        "ConfigError",
        "ConnectionLostError",
        "DeadlineError",
        "Engine",
        "EngineClosedError",
        "EngineConfig",
        "EngineDeadError",
        "EngineStats",
        "Grammar",
        "GraphgenError",
        "InvalidRequestError",
        "JsonSchema",
        "Logprob",
        "Logprobs",
        "NumericalError",
        "OverloadedError",
        "PoisonedRequestError",
        "PromptTooLongError",
        "Regex",
        "RequestOutput",
        "SamplingParams",
        "ServerError",
        "StreamPiece",
        "Timing",
        "TokenLogprob",
        "UnsupportedModelError",
    ]


_HOMES = {
    "AsyncClient": "graphgen.remote.client",
    "AsyncEngine": "graphgen.api.engine",
    "Chat": "graphgen.calls.prompts",
    "CheckpointError": "graphgen.ipc.errors",
    "Choice": "graphgen.calls.structured",
    "Client": "graphgen.remote.client",
    "ConfigError": "graphgen.ipc.errors",
    "ConnectionLostError": "graphgen.ipc.errors",
    "DeadlineError": "graphgen.ipc.errors",
    "Engine": "graphgen.api.engine",
    "EngineClosedError": "graphgen.ipc.errors",
    "EngineConfig": "graphgen.launch.config",
    "EngineDeadError": "graphgen.ipc.errors",
    "EngineStats": "graphgen.ipc.engine_messages",
    "Grammar": "graphgen.calls.structured",
    "GraphgenError": "graphgen.ipc.errors",
    "InvalidRequestError": "graphgen.ipc.errors",
    "Logprob": "graphgen.calls.logprobs",
    "Logprobs": "graphgen.calls.logprobs",
    "JsonSchema": "graphgen.calls.structured",
    "NumericalError": "graphgen.ipc.errors",
    "OverloadedError": "graphgen.ipc.errors",
    "PoisonedRequestError": "graphgen.ipc.errors",
    "PromptTooLongError": "graphgen.ipc.errors",
    "Regex": "graphgen.calls.structured",
    "RequestOutput": "graphgen.calls.outputs",
    "SamplingParams": "graphgen.calls.sampling_params",
    "ServerError": "graphgen.ipc.errors",
    "StreamPiece": "graphgen.calls.outputs",
    "Timing": "graphgen.calls.outputs",
    "TokenLogprob": "graphgen.calls.logprobs",
    "UnsupportedModelError": "graphgen.ipc.errors",
}
_ENGINE = {"AsyncEngine", "Engine", "EngineConfig"}
"""What the client's distribution does not have."""


def _names() -> list[str]:
    has_engine = importlib.util.find_spec("graphgen.api") is not None
    return sorted(name for name in _HOMES if has_engine or name not in _ENGINE)


def __getattr__(name: str) -> object:
    if name == "__all__":
        return _names()
    if name not in _HOMES:
        raise AttributeError(f"module 'graphgen' has no attribute {name!r}")
    if name in _ENGINE and name not in _names():
        raise ImportError(f"{name} {ENGINE_IS_MISSING}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_names()})
