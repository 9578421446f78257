"""The exception tree of graphgen. Every message says the value, the limit and the remedy.

GraphgenError
├── ConfigError (ValueError)             an EngineConfig that cannot work on this machine or model
├── InvalidRequestError (ValueError)     a prompt or sampling parameter that can never be served
│   └── PromptTooLongError               a prompt that does not fit the context or the KV cache with its output
├── UnsupportedModelError (ValueError)   an architecture or a feature of a model that graphgen does not run
├── CheckpointError                      a checkpoint that is missing, misshapen or not safetensors
├── OverloadedError (RuntimeError)       a request that was refused at once; it may fit after retry_after_s
├── DeadlineError (RuntimeError)         a request whose deadline passed before its output was complete, or is too early
│                                        even for an idle engine
├── NumericalError (RuntimeError)        a request for which the model computed no number: all logits NaN or -inf
├── PoisonedRequestError (RuntimeError)  a request that ended the worker again and again; the message says how
├── EngineClosedError (RuntimeError)     a call on an Engine after close()
├── EngineDeadError (RuntimeError)       a process of the engine ended, or the call came from a fork of the
│                                        program that made the Engine or Client; the message says which and why
└── ServerError (RuntimeError)           a server's error that is none of the above, with its code
    └── ConnectionLostError (ConnectionError)   a server that does not answer, or that lost the session

They live in `ipc`, the bottom layer, because every process raises them and the wire carries their names.
Users import them from `graphgen`.
"""


class GraphgenError(Exception):
    """Base of everything graphgen raises on purpose."""


class ConfigError(GraphgenError, ValueError):
    """An engine configuration that cannot work."""


class InvalidRequestError(GraphgenError, ValueError):
    """A prompt or a sampling parameter that can never be served; nothing was sent."""


class PromptTooLongError(InvalidRequestError):
    """A prompt that can never fit with the output it wants."""


class UnsupportedModelError(GraphgenError, ValueError):
    """A model that graphgen does not run."""


class CheckpointError(GraphgenError):
    """A checkpoint that cannot be loaded."""


class OverloadedError(GraphgenError, RuntimeError):
    """A request was refused at once: the queue is full, or its deadline cannot be met now. Nothing was computed."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message, retry_after_s)
        self.message = message
        self.retry_after_s = retry_after_s
        """When the same request may be accepted, in seconds from now: an estimate."""

    def __str__(self) -> str:
        return self.message


class DeadlineError(GraphgenError, RuntimeError):
    """The deadline of a request passed before its output was complete, or could not be met even if nothing else ran:
    trying again does not help. Its pages are free."""


class NumericalError(GraphgenError, RuntimeError):
    """The model's logits for the next token of a request were all NaN or -inf, so that there was none to draw."""


class PoisonedRequestError(GraphgenError, RuntimeError):
    """The worker ended each time it computed this request, the last two times alone. The message has its last words."""


class EngineClosedError(GraphgenError, RuntimeError):
    """The engine was closed before or while the call ran."""


class EngineDeadError(GraphgenError, RuntimeError):
    """A process of the engine ended unexpectedly, or this process is a fork of the one that made engine or client."""


class ServerError(GraphgenError, RuntimeError):
    """What a server answered. `code` is one of GGP/1; `retryable` says whether the same call may succeed later."""

    def __init__(self, message: str, code: str, retryable: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.retryable = retryable


class ConnectionLostError(ServerError, ConnectionError):
    """The server does not answer, or is another than the one that had the request."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="connection_lost", retryable=True)
