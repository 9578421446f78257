"""What engines and servers share: the checks of a request and its way to the scheduler, and what a start reads.

Owns the tokenizer and the limits of the engines that serve. Starts no process, and never waits for tokens. Used by
`graphgen.api.core` and the frontend of a server.
"""

import itertools
import logging
import secrets
import time
from collections.abc import Callable, Collection, Sequence

from graphgen import demo
from graphgen.calls.outputs import Sink
from graphgen.calls.prompts import Chat, OnePrompt
from graphgen.calls.sampling_params import SamplingParams, one_each
from graphgen.calls.structured import Structured
from graphgen.ipc.codec import pack_int32, unpack_int32
from graphgen.ipc.engine_messages import EngineStats, Ready, Submit
from graphgen.ipc.errors import ConfigError, InvalidRequestError, PromptTooLongError
from graphgen.ipc.ggp.messages import SamplingDefaults
from graphgen.ipc.ggp.routing import Routed
from graphgen.ipc.senders import first_request_id
from graphgen.launch.config import EngineConfig
from graphgen.launch.launch_config import LaunchConfig
from graphgen.launch.resolve import resolve
from graphgen.requests.link_ends import RequestLink
from graphgen.requests.open_request import OpenRequest
from graphgen.requests.routed import continued
from graphgen.requests.structured import GrammarMaker
from graphgen.requests.tokenizer import Tokenizer
from graphgen.requests.tokenizer_files import load_tokenizer

logger = logging.getLogger("graphgen")

STATS_TIMEOUT_S = 30.0
TOLD_CONTEXTS = 4
MOST_TOLD = 1 << 18
"""Tokens of a prompt that is looked at and not served, unless the context holds more: 200 bytes each meanwhile."""
NO_TOKENIZER = "none"
"""EngineConfig.tokenizer of an engine that is to serve token ids alone."""


class AttachedCore:
    """Requests to an engine that runs already. Its link, model and tokenizer are another's."""

    def __init__(
        self,
        launch: LaunchConfig,
        ready: Ready,
        tokenizer: Tokenizer | None,
        link: RequestLink,
        sender: int = 0,
        num_senders: int = 1,
        started_s: float = 0.0,
    ) -> None:
        """sender: who the engine knows the requests made here by, of so many (`graphgen.ipc.senders`). started_s: later
        than that of any other core which is this sender, as time.monotonic()."""
        self.launch = launch
        self.ready = ready
        self.has_tokenizer = tokenizer is not None
        self.eos_token_ids = end_token_ids(launch, tokenizer)
        """What ends an output: the model's end-of-sequence tokens and the tokenizer's own."""
        self._tokenizer = tokenizer
        self._grammars = GrammarMaker()
        self._link = link
        self._request_ids = itertools.count(first_request_id(sender, num_senders, started_s), num_senders)

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises InvalidRequestError where there is none."""
        if self._tokenizer is None:
            raise InvalidRequestError(
                "text and chats need a tokenizer, and this engine has none: give token ids, or name a tokenizer with"
                ' tokenizer= ("none" serves token ids alone, as does a model whose folder holds no tokenizer)'
            )
        return self._tokenizer

    def open(
        self,
        prompts: Sequence[OnePrompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None,
        streams: bool,
        sinks: Sequence[Sink],
    ) -> list[int]:
        """Checks all prompts, then sends them. Raises InvalidRequestError with none sent.

        sinks: one for each prompt. Returns the request ids in order, n for each prompt: every output is a request.
        """
        self.check_process()  # before the tokenizer, whose threads are the parent's as well
        parameters = one_each(sampling, len(prompts))
        token_ids = self.token_ids(prompts)
        arrived_s = time.monotonic()
        requests = [
            request
            for number, parts in enumerate(zip(token_ids, parameters, sinks, strict=True))
            for request in self._make_requests(
                f"prompt {number}" if len(prompts) > 1 else "the prompt", *parts, streams=streams, arrived_s=arrived_s
            )
        ]
        self._link.submit(requests)
        return [request.submit.request_id for request in requests]

    def prepare(
        self,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        sink: Sink,
        arrived_s: float,
        tenant: str,
        marked_ids: frozenset[int] = frozenset(),
        log_id: str = "",
    ) -> list[OpenRequest]:
        """The n requests of a prompt that streams, checked and not sent. Raises InvalidRequestError.

        arrived_s: when the prompt came, as time.monotonic(): its deadline and its times count from there.
        tenant: who they are accounted to. marked_ids: tokens whose places in the text the pieces say. log_id: what logs
        call them.
        """
        return self._make_requests("the prompt", token_ids, sampling, sink, True, arrived_s, tenant, marked_ids, log_id)

    def prepare_routed(
        self,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        sink: Sink,
        arrived_s: float,
        tenant: str,
        log_id: str,
        routed: Routed,
        on_deaths: Callable[[int], None],
    ) -> OpenRequest:
        """A request that a frontend elsewhere sends here, perhaps behind tokens that it got elsewhere. It has no text.

        arrived_s: at that frontend, by the clock here. on_deaths: see OpenRequest. Raises InvalidRequestError.
        """
        [request] = self._make_requests("the prompt", token_ids, sampling, sink, True, arrived_s, tenant, log_id=log_id)
        submit = continued(request.submit, routed)
        self._check_ids("output_u32", unpack_int32(submit.output_token_ids))
        return OpenRequest(submit, token_ids, sampling, None, True, sink, on_deaths=on_deaths)

    def check_prompt(self, token_ids: Sequence[int]) -> None:
        """Of a prompt that is to be looked at and not served: it may be empty, and longer than the context.

        Raises InvalidRequestError.
        """
        if len(token_ids) > self.most_told:
            raise PromptTooLongError(
                f"the prompt has {len(token_ids)} tokens, at most {self.most_told} are told of one: split it"
            )
        self._check_ids("the prompt", token_ids)

    @property
    def most_told(self) -> int:
        """Tokens of a prompt that is to be looked at and not served: some contexts, or those of a bounded memory."""
        context_len = self.launch.max_model_len
        return max(context_len, min(TOLD_CONTEXTS * context_len, MOST_TOLD))

    def check_process(self) -> None:
        """Raises EngineDeadError in a fork of the program."""
        self._link.check_process()

    def cancel(self, request_ids: Sequence[int]) -> None:
        """Ends requests and frees their pages; their sinks hear no more. Ids of finished requests are ignored."""
        self._link.cancel(request_ids)

    def stats(self) -> EngineStats:
        return self._link.stats(STATS_TIMEOUT_S)

    def token_ids(self, prompts: Sequence[OnePrompt]) -> list[Sequence[int]]:
        """The ids of each prompt. Raises InvalidRequestError."""
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        encoded = iter(self.tokenizer.encode_batch(texts) if texts else ())
        return [
            next(encoded)
            if isinstance(prompt, str)
            else self.tokenizer.encode_chat(
                prompt.messages, prompt.tools, prompt.documents, prompt.chat_template_kwargs
            )
            if isinstance(prompt, Chat)
            else prompt
            for prompt in prompts
        ]

    def _make_requests(
        self,
        name: str,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        sink: Sink,
        streams: bool,
        arrived_s: float,
        tenant: str = "",
        marked_ids: frozenset[int] = frozenset(),
        log_id: str = "",
    ) -> list[OpenRequest]:
        """The n requests of a prompt; `name` says in errors which prompt it is."""
        self._check_prompt(name, token_ids, sampling)
        stop_token_ids = sampling.resolve_stop_token_ids(self.eos_token_ids, self._special_stops(sampling))
        self._check_stop_ids(stop_token_ids)
        max_tokens = self._max_tokens(name, len(token_ids), sampling)
        prompt_token_ids, seed, launch = pack_int32(token_ids), secrets.randbits(63), self.launch
        grammar = "" if sampling.structured is None else self._grammar(sampling.structured)
        submits = [
            Submit(
                request_id=next(self._request_ids),
                prompt_token_ids=prompt_token_ids,
                max_tokens=max_tokens,
                min_tokens=sampling.min_tokens,
                stop_token_ids=stop_token_ids,
                sampler=sampling.resolve_sampler(launch.sampling_defaults, seed, sample_index),
                arrived_s=arrived_s,
                priority=sampling.priority,
                deadline_ms=sampling.deadline_ms,
                itl_target_ms=launch.itl_target_ms if sampling.itl_target_ms is None else sampling.itl_target_ms,
                ttft_target_ms=launch.ttft_target_ms if sampling.ttft_target_ms is None else sampling.ttft_target_ms,
                tpot_target_ms=launch.tpot_target_ms if sampling.tpot_target_ms is None else sampling.tpot_target_ms,
                cache_salt=sampling.cache_salt,
                tenant=tenant,
                logprobs=sampling.logprobs,
                prompt_logprobs=None if sample_index else sampling.prompt_logprobs,
                grammar=grammar,
                log_id=log_id,
            )
            for sample_index in range(sampling.n)
        ]
        return [
            OpenRequest(submit, token_ids, sampling, self._tokenizer, streams, sink, sample_index, marked_ids)
            for sample_index, submit in enumerate(submits)
        ]

    def _check_prompt(self, name: str, token_ids: Sequence[int], sampling: SamplingParams) -> None:
        if not token_ids:
            raise InvalidRequestError(f"{name} is empty: give at least one token")
        self._check_ids(name, token_ids)
        vocab_size = self.launch.spec.vocab_size
        for asked, num_top in (("logprobs", sampling.logprobs), ("prompt_logprobs", sampling.prompt_logprobs)):
            if num_top is not None and num_top > vocab_size:
                raise InvalidRequestError(f"{asked} is {num_top}, the vocabulary has {vocab_size} tokens: ask for less")
        if sampling.logit_bias:
            self._check_ids("logit_bias", sampling.logit_bias)
        if sampling.stop_strings and self._tokenizer is None:
            raise InvalidRequestError("stop strings need a tokenizer, and this engine has none: use stop_token_ids")

    def _check_ids(self, name: str, token_ids: Collection[int]) -> None:
        vocab_size = self.launch.spec.vocab_size
        if token_ids and ((low := min(token_ids)) < 0 or (high := max(token_ids)) >= vocab_size):
            raise InvalidRequestError(
                f"{name} has token id {low if low < 0 else high}, the vocabulary is 0 to {vocab_size - 1}:"
                " use ids of this model's tokenizer"
            )

    def _max_tokens(self, name: str, prompt_len: int, sampling: SamplingParams) -> int:
        """max_tokens, cut to what the model's context leaves. Raises when nothing fits, or not all of min_tokens."""
        context_len, worker = self.launch.max_model_len, self.ready.worker
        room = context_len - prompt_len
        if room < max(1, sampling.min_tokens):
            raise PromptTooLongError(
                f"{name} has {prompt_len} tokens and wants at least {max(1, sampling.min_tokens)} of output,"
                f" max_model_len is {context_len}: shorten it, lower min_tokens or raise max_model_len"
            )
        # The last token of the output is never computed, so it needs no position.
        most_positions = worker.most_positions(context_len)
        page_room = most_positions - prompt_len + 1
        max_tokens = min(room, page_room) if sampling.max_tokens is None else min(sampling.max_tokens, room)
        if page_room < max(1, max_tokens, sampling.min_tokens):
            raise PromptTooLongError(
                f"{name} has {prompt_len} tokens and max_tokens is {max(1, max_tokens)}, the KV cache holds"
                f" {most_positions} positions of a request ({worker.num_pages} pages of {worker.page_size}):"
                " shorten it, lower max_tokens, or raise num_pages or memory_fraction"
            )
        return max_tokens

    def _special_stops(self, sampling: SamplingParams) -> tuple[int, ...]:
        """Ids of the stop strings that are exactly one special token, which the text of an output may leave out."""
        found = (self.tokenizer.special_token_id(text) for text in sampling.stop_strings)
        return tuple(token_id for token_id in found if token_id is not None and token_id < self.launch.spec.vocab_size)

    @property
    def serves_structured(self) -> bool:
        """Whether outputs can follow a structure."""
        return GrammarMaker.is_installed() and self.has_tokenizer and self._can_end

    @property
    def _can_end(self) -> bool:
        return any(one < self.launch.spec.num_drawable for one in self.eos_token_ids)

    def _grammar(self, structured: Structured) -> str:
        tokenizer = self._tokenizer
        if tokenizer is None or not self._can_end:
            missing = "a tokenizer" if tokenizer is None else "an end-of-sequence token that can be drawn"
            raise InvalidRequestError(f"structured output needs {missing}, and this engine has none: leave it out")
        return self._grammars.make(structured, tokenizer.special_token_id)

    def _check_stop_ids(self, stop_token_ids: tuple[int, ...]) -> None:
        vocab_size = self.launch.spec.vocab_size
        if stop_token_ids and max(stop_token_ids) >= vocab_size:
            raise InvalidRequestError(
                f"stop token id {max(stop_token_ids)} is outside the vocabulary, 0 to {vocab_size - 1}:"
                " use ids of this model's tokenizer"
            )


def describe_start(ready: Ready, start_s: float, with_phases: bool) -> str:
    """What serves, and in how long; below it a line for each phase of the start, unless these were logged already."""
    worker = ready.worker
    lines = [f"graphgen serves on {worker.device} with {worker.attention} attention after {start_s:.2f} s"]
    if with_phases:
        lines += [f"  {phase.name:<24}{phase.seconds:8.2f} s" for phase in worker.phases]
    return "\n".join(lines)


def launch_config(config: EngineConfig) -> LaunchConfig:
    from graphgen.models.checkpoint_config import resolve_model
    from graphgen.models.families import load_spec
    from graphgen.models.generation_config import read_sampling_defaults

    folder = demo.model_folder() if config.model is None else resolve_model(config.model, config.revision)
    defaults = read_sampling_defaults(folder) if config.generation_config == "auto" else SamplingDefaults()
    tokenizer = None if config.tokenizer == NO_TOKENIZER else config.tokenizer
    launch = resolve(config, load_spec(folder, tokenizer=tokenizer), folder, defaults)
    if formats := launch.spec.formats:
        counted = ", ".join(f"{form.name} in {count} linear layers" for form, count in formats.items())
        size_mib = launch.spec.weight_bytes(launch.dtype) / 2**20
        logger.info("weights are quantised: %s, %.0f MiB with the rest in %s", counted, size_mib, launch.dtype)
    return launch


def load_config_tokenizer(config: EngineConfig, launch: LaunchConfig) -> Tokenizer | None:
    if config.tokenizer == NO_TOKENIZER:
        return None
    tokenizer = load_tokenizer(config.tokenizer or launch.model_path, None, config.chat_template)
    if tokenizer is None and config.tokenizer is not None:
        raise ConfigError(f"tokenizer {config.tokenizer!r} is a folder without a tokenizer: name another")
    if tokenizer is not None and tokenizer.chat_template is not None and tokenizer.chat_template.fault:
        logger.warning("chats are refused: %s", tokenizer.chat_template.fault)
    if tokenizer is not None and launch.spec.needs_bos and tokenizer.leading_id is None:
        logger.warning(
            "the tokenizer begins no text with a beginning-of-sequence token, without which a %s says nothing of use:"
            " give token ids that begin with %s, or name another tokenizer with tokenizer=",
            *(launch.spec.architecture, launch.spec.bos_token_id),
        )
    return tokenizer


def end_token_ids(launch: LaunchConfig, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """What ends an output: the model's end-of-sequence tokens and the tokenizer's own."""
    own = None if tokenizer is None else tokenizer.eos_token_id
    if own is None or own >= launch.spec.vocab_size:
        return launch.eos_token_ids
    return tuple(dict.fromkeys((*launch.eos_token_ids, own)))
