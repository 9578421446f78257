"""What Client and AsyncClient share: the requests of one connection. The counterpart of `graphgen.requests.core`."""

import itertools
from collections.abc import Sequence

import msgspec

from graphgen.calls.outputs import Sink
from graphgen.calls.prompts import Chat, OnePrompt
from graphgen.calls.sampling_params import SamplingParams, one_each
from graphgen.ipc.errors import InvalidRequestError
from graphgen.ipc.ggp.messages import DEFAULT_ADDRESS, Health, Report, Stats, StatsRequest, Welcome
from graphgen.remote.address import ClientSettings, ServerAddress
from graphgen.remote.connection import Connection
from graphgen.remote.requests import NO_PARSING, Parsing, PromptRequest, RemoteRequest, make_generate

STATS = StatsRequest()


class RemoteCore:
    """A connection and the ids of its requests."""

    def __init__(self, address: str | None, settings: ClientSettings) -> None:
        self._address = DEFAULT_ADDRESS if address is None else address
        self._connection = Connection(ServerAddress(address=self._address, **settings))
        self._request_ids = itertools.count()

    @property
    def welcome(self) -> Welcome:
        return self._connection.welcome

    def open(
        self,
        prompts: Sequence[OnePrompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None,
        streams: bool,
        sinks: Sequence[Sink],
        tenant: str = "",
        parsing: Parsing = NO_PARSING,
        log_id: str = "",
    ) -> list[int]:
        """Sends a request for each prompt. Raises InvalidRequestError with none sent; what only the server can check
        reaches the sinks as an exception.

        tenant: on whose behalf, where the server trusts this connection. parsing: of chats' outputs. log_id: what the
        server's logs call them.

        Returns the id of a prompt's request once for each of its outputs, which is what its sink will get.
        """
        parameters = one_each(sampling, len(prompts))
        self._check_features(prompts, parameters)
        if any(own.structured is not None for own in parameters) and "structured" not in self.welcome.features:
            raise InvalidRequestError(
                f"structured: {self.welcome.server} serves no structured output: leave it out, or ask a server that has"
                " the package llguidance, a tokenizer and an end-of-sequence token"
            )
        requests = [
            RemoteRequest(
                make_generate(next(self._request_ids), prompt, own, streams, tenant, parsing, log_id),
                prompt,
                streams,
                sink,
            )
            for prompt, own, sink in zip(prompts, parameters, sinks, strict=True)
        ]
        self._connection.submit(requests)
        return [request.message.id for request in requests for _ in range(request.message.sampling.n)]

    def read_prompt(
        self, prompt: OnePrompt, sink: Sink, *, special_tokens: bool = True, with_text: bool = False, tenant: str = ""
    ) -> None:
        """Asks what a prompt is to the model; the sink gets its PromptTokens, or an exception. Nothing is computed.

        special_tokens: of a text, those that the tokenizer puts around a prompt. with_text: its tokens as text as well.
        Raises InvalidRequestError.
        """
        if "prompt_only" not in self.welcome.features:
            raise InvalidRequestError(f"{self.welcome.server} tells no tokens of a prompt: it has no tokenizer")
        self._check_features([prompt])
        message = msgspec.structs.replace(
            make_generate(next(self._request_ids), prompt, SamplingParams(), True, tenant),
            echo_ids=True,
            echo_text=with_text,
            special_tokens=special_tokens,
            prompt_only=True,
        )
        self._connection.submit([PromptRequest(message, sink)])

    def _check_features(self, prompts: Sequence[OnePrompt], parameters: Sequence[SamplingParams] = ()) -> None:
        """An older server would read over what it does not know."""
        asks = any(one.logprobs is not None or one.prompt_logprobs is not None for one in parameters)
        if asks and "logprobs" not in self.welcome.features:
            raise InvalidRequestError(f"{self.welcome.server} tells no log-probabilities: ask for none")
        if "logit_bias" not in self.welcome.features and any(one.logit_bias for one in parameters):
            raise InvalidRequestError(f"{self.welcome.server} knows no logit_bias: leave it out")
        if "structured_opening" not in self.welcome.features and any(
            one.structured is not None and one.structured.opening for one in parameters
        ):
            raise InvalidRequestError(f"{self.welcome.server} knows no opening of a structure: leave it out")
        for prompt in prompts:
            if isinstance(prompt, Chat) and prompt.has_arguments and "template_arguments" not in self.welcome.features:
                raise InvalidRequestError(
                    f"{self.welcome.server} gives chat templates messages of role and content alone: leave tools,"
                    " documents, switches and the further keys of messages out, or ask a later server"
                )

    def check_process(self) -> None:
        """Raises EngineDeadError in a fork of the program."""
        self._connection.check_process()

    def cancel(self, request_ids: Sequence[int]) -> None:
        """Ends requests and frees their pages; their sinks hear no more."""
        self._connection.cancel(request_ids)

    def stats(self, question: StatsRequest = STATS) -> Stats:
        return self._connection.stats(question)

    def report(self, http_answers: dict[str, int]) -> None:
        """What a gateway has answered since its last report, by path and status."""
        self._connection.report(Report(http_answers=http_answers))

    def health(self) -> Health:
        return self._connection.health()

    def __str__(self) -> str:
        """Who is talked to, for the repr of a client."""
        return f"of {self.welcome.model} at {self._address}, {self.welcome.server}"

    def close(self) -> None:
        self._connection.close()
