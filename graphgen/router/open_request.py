"""One open request, as the router counts it.

Owns what is left to do of it at the engine where it is; changes that engine's counts with its own. Made and kept by
`graphgen.router.policy`.
"""

from graphgen.router.load import EngineLoad
from graphgen.router.records import RoutedRequest


class OpenRequest:
    """From `Router.sent` to `Router.finished`."""

    __slots__ = (
        "age",
        "cached",
        "engine",
        "has_begun",
        "left_outputs",
        "left_prompt",
        "num_losses",
        "num_output",
        "rejections",
        "request",
    )

    def __init__(self, request: RoutedRequest) -> None:
        self.request = request
        self.engine: EngineLoad | None = None  # None: it was lost, and is to be moved
        self.num_output = request.num_output  # tokens it has
        self.num_losses = 0  # of engines, since its last new token
        self.has_begun = False  # it got a token where it is now
        self.left_prompt = 0  # tokens to compute before its next token
        self.left_outputs = 0  # tokens it is expected to draw yet
        self.cached = 0  # tokens its engine is thought to keep
        self.age: int | None = None  # when the oldest of these was touched before, see PrefixIndex
        self.rejections: tuple[EngineLoad, ...] = ()  # engines that turned it away

    def missing(self, num_cached: int) -> int:
        """Tokens that an engine which keeps so many computes before the next token: the last one at least."""
        num_tokens = self.request.prompt_len + self.num_output
        return num_tokens - min(num_cached, num_tokens - 1)

    def expected_outputs(self, output_share: float) -> int:
        """Tokens it is expected to draw yet, if requests use such a share of their max_tokens."""
        return max(1, round(self.request.max_tokens * output_share) - self.num_output)

    def enter(self, engine: EngineLoad, num_cached: int, output_share: float) -> None:
        """It was sent there."""
        request = self.request
        self.engine = engine
        self.has_begun = False
        self.cached = num_cached
        self.left_prompt = self.missing(num_cached)
        self.left_outputs = self.expected_outputs(output_share)
        engine.open(request.request_id, request.tenant, request.priority, self.left_prompt, self.left_outputs)

    def advance(self, engine: EngineLoad, num_output: int) -> None:
        """It has more tokens than before."""
        request = self.request
        done = min(num_output - self.num_output, self.left_outputs)
        if self.left_prompt or done:
            engine.change(request.tenant, request.priority, -self.left_prompt, -done)
        self.left_prompt = 0
        self.left_outputs -= done
        self.num_output = num_output
        self.num_losses = 0
        self.has_begun = True

    def begin_again(self, engine: EngineLoad) -> None:
        """Its engine lost all that it had computed, and computes it again."""
        request = self.request
        left_prompt = self.missing(0)
        engine.change(request.tenant, request.priority, left_prompt - self.left_prompt, 0)
        self.left_prompt = left_prompt
        self.has_begun = False
        self.cached, self.age = 0, None

    def leave(self) -> None:
        """It is at no engine any more."""
        request = self.request
        if self.engine is not None:
            self.engine.close(request.request_id, request.tenant, request.priority, self.left_prompt, self.left_outputs)
        self.engine, self.age = None, None
