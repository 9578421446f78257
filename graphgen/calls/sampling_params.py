"""How one prompt is to be sampled and served and when it ends: the public SamplingParams and what it is on the wire.

Owns every check of its values. Knows no model: limits that depend on one (vocabulary, context) are checked by
`graphgen.requests.core` when the request is made, which also knows the model's own values.
"""

import math
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import msgspec
from msgspec import Struct

from graphgen.base.keywords import KnownKeywords
from graphgen.base.plain import plain_fields, plain_number
from graphgen.calls.structured import Structured
from graphgen.ipc.codec import pack_int32
from graphgen.ipc.engine_messages import MAX_PRIORITY, MAX_TARGET_MS
from graphgen.ipc.errors import InvalidRequestError
from graphgen.ipc.ggp.messages import SamplingDefaults
from graphgen.ipc.worker_messages import MAX_LOGIT_BIASES, MAX_LOGPROBS, MAX_STOP_TOKEN_IDS, SamplerParams

MAX_STOP_STRINGS = 16
MAX_STOP_STRING_LEN = 1024
"""Characters of one stop string: so many are held back at most while a stream waits for its end."""

MAX_SAMPLES = 16
"""Outputs of one prompt."""
MAX_CACHE_SALT_LEN = 256
"""Characters of a cache salt."""

MAX_LOGIT_BIAS = 100.0
"""As OpenAI has it: -100 bans a token, 100 leaves nothing else."""

_MAX_INT32 = 2**31 - 1
_MAX_SEED = 2**63 - 1


class SamplingParams(Struct, frozen=True, kw_only=True, metaclass=KnownKeywords):
    """How one prompt is answered. Raises InvalidRequestError, a ValueError, for a value that cannot be served."""

    refused_with: ClassVar[type[Exception]] = InvalidRequestError
    called: ClassVar[str] = "SamplingParams"

    max_tokens: int | None = 128
    """Most tokens of output; no request goes beyond the model's context. None: to the end of that."""
    min_tokens: int = 0
    """No stop token is drawn and no stop string looked for before so many tokens of output."""
    temperature: float | None = None
    """0 is greedy: the likeliest token each time. None: what the model's generation_config.json says, else 1."""
    top_k: int | None = None
    """Draw from the k likeliest tokens; 0 and -1 are off. None: the model's, else off."""
    top_p: float | None = None
    """Draw from the smallest set of likeliest tokens that holds this probability; 1 is off. None: the model's, else
    off."""
    min_p: float | None = None
    """Draw from tokens at least this times as likely as the likeliest; 0 is off. None: the model's, else off."""
    repetition_penalty: float | None = None
    """Divides the logits of tokens in prompt and output (multiplies negative ones); 1 is off. None: the model's, else
    off."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens in the output, once; 0 is off."""
    frequency_penalty: float = 0.0
    """Taken from the logits of tokens in the output, once per time; 0 is off."""
    logit_bias: Mapping[int, float] | None = None
    """What is added to the logits of tokens, by id, -100 to 100, before the penalties; of at most 1024 tokens."""
    seed: int | None = None
    """The same seed draws the same tokens from equal logits. None: a fresh one."""
    n: int = 1
    """Outputs of the prompt, each with its sample_index i and the seed `seed + i`. They share the prompt's pages, so
    the prompt is computed once."""
    stop: str | Sequence[str] = ()
    """Strings that end the output; the text ends before the first one found. One that is exactly a special token of the
    tokenizer, as `<|im_end|>`, also ends it as that token's id does, since the text leaves special tokens out."""
    stop_token_ids: Sequence[int] = ()
    """Tokens that end the output, besides the model's end-of-sequence tokens; the last of token_ids is the one."""
    ignore_eos: bool = False
    """Do not end at the end-of-sequence tokens: those of the model's generation_config.json and the tokenizer's own."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text; token_ids has them either way."""
    logprobs: int | None = None
    """Log-probabilities of the tokens of the output: of each token, and of so many likeliest tokens in its place, 0 to
    20. They are the model's own: before temperature, penalties and filters. None: none."""
    prompt_logprobs: int | None = None
    """The same of the prompt's tokens. Such a prompt is computed at 256 tokens a step at most, and takes none of its
    rows from the prefix cache."""
    priority: int = 0
    """Service class, 0 to 9: higher ones are served first and take slots and pages from lower ones when these lack. A
    class is worth ten seconds of waiting, so that no request waits for ever."""
    deadline_ms: float | None = None
    """From the request's arrival to the end of its output. What cannot meet it is refused at once with OverloadedError;
    what misses it ends with DeadlineError."""
    itl_target_ms: float | None = None
    """What no gap between two tokens should exceed; None takes the engine's. Steps are kept shorter than the tightest
    target of those that decode, as far as measured step times tell."""
    ttft_target_ms: float | None = None
    """From the request's arrival to its first token; None takes the engine's. When it is near, steps grow."""
    tpot_target_ms: float | None = None
    """What the mean of the gaps between its tokens should not exceed; None takes the engine's. Time that the request is
    ahead of it may be spent on a longer step."""
    cache_salt: str = ""
    """Prompts share cached pages only under an equal salt: give every tenant its own, and none can find out by timing
    what another has asked."""
    structured: Structured | None = None
    """What the output must follow: a JsonSchema, a Regex, a Choice or a Grammar. One that ends with "stop" follows it
    to its end, unless a stop string or one of stop_token_ids ended it; one that ends with "length" is a beginning."""

    def __post_init__(self) -> None:
        plain_fields(self)
        self._take_biases()
        for name, kind in _FIELD_TYPES.items():
            _check_type(name, getattr(self, name), kind)
        _check_range("max_tokens", self.max_tokens, 1, _MAX_INT32)
        _check_range("min_tokens", self.min_tokens, 0, _MAX_INT32)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens is {self.min_tokens}, max_tokens is {self.max_tokens}:"
                " lower min_tokens or raise max_tokens"
            )
        _check_range("temperature", self.temperature, 0.0, 100.0)
        _check_range("top_k", self.top_k, -1, _MAX_INT32)
        _check_range("top_p", self.top_p, 0.0, 1.0, above=True)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("repetition_penalty", self.repetition_penalty, 0.0, 100.0, above=True)
        _check_range("presence_penalty", self.presence_penalty, -100.0, 100.0)
        _check_range("frequency_penalty", self.frequency_penalty, -100.0, 100.0)
        _check_range("seed", self.seed, 0, _MAX_SEED)
        _check_range("n", self.n, 1, MAX_SAMPLES)
        _check_range("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _check_range("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        _check_range("priority", self.priority, 0, MAX_PRIORITY)
        for name in ("deadline_ms", "itl_target_ms", "ttft_target_ms", "tpot_target_ms"):
            _check_range(name, getattr(self, name), 0.0, MAX_TARGET_MS, above=True)
        if len(self.cache_salt) > MAX_CACHE_SALT_LEN:
            raise InvalidRequestError(
                f"cache_salt has {len(self.cache_salt)} characters, the limit is {MAX_CACHE_SALT_LEN}: give its digest"
            )
        self._check_biases()
        self._check_stops()
        self._check_structured()

    def _take_biases(self) -> None:
        """The given mapping may be changed later: a copy, of plain numbers, is kept."""
        given = self.logit_bias
        if isinstance(given, Mapping):
            plain = {plain_number(token_id): plain_number(bias) for token_id, bias in given.items()}
            msgspec.structs.force_setattr(self, "logit_bias", plain)

    def _check_biases(self) -> None:
        biases = self.logit_bias or {}
        if len(biases) > MAX_LOGIT_BIASES:
            raise InvalidRequestError(
                f"logit_bias has {len(biases)} tokens, the limit is {MAX_LOGIT_BIASES}: give fewer"
            )
        for token_id, bias in biases.items():
            _check_range("logit_bias: a token id", token_id, 0, _MAX_INT32)
            _check_range(f"logit_bias of token {token_id}", bias, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)

    def _check_stops(self) -> None:
        if len(self.stop_strings) > MAX_STOP_STRINGS:
            raise InvalidRequestError(
                f"stop has {len(self.stop_strings)} strings, the limit is {MAX_STOP_STRINGS}: give fewer"
            )
        for text in self.stop_strings:
            if not 1 <= len(text) <= MAX_STOP_STRING_LEN:
                raise InvalidRequestError(
                    f"a stop string has {len(text)} characters: use 1 to {MAX_STOP_STRING_LEN} characters"
                )
        if len(set(self.stop_token_ids)) > MAX_STOP_TOKEN_IDS:
            raise InvalidRequestError(
                f"stop_token_ids has {len(set(self.stop_token_ids))} ids, the limit is {MAX_STOP_TOKEN_IDS}"
                " with the model's end-of-sequence tokens: give fewer"
            )
        for token_id in self.stop_token_ids:
            _check_range("a stop token id", token_id, 0, _MAX_INT32)

    def _check_structured(self) -> None:
        if self.structured is None:
            return
        if not isinstance(self.structured, Structured):
            raise InvalidRequestError(
                f"structured is of type {type(self.structured).__name__}: give a JsonSchema, Regex, Choice or Grammar"
            )
        # Where a structure is complete only the end of sequence may follow.
        if self.ignore_eos:
            raise InvalidRequestError(
                "ignore_eos is True with structured, whose end is the end of sequence: leave it out"
            )
        if self.min_tokens:
            raise InvalidRequestError(
                f"min_tokens is {self.min_tokens} with structured, which may be complete before: leave it out"
            )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, however it was given."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def resolve_sampler(self, defaults: SamplingDefaults, seed: int, sample_index: int = 0) -> SamplerParams:
        """The values of the device's tables for one of the n outputs.

        defaults: of the model, for what is None here; seed: for a request that states none.
        """
        return SamplerParams(
            temperature=float(defaults.temperature if self.temperature is None else self.temperature),
            top_k=max(0, defaults.top_k if self.top_k is None else self.top_k),
            top_p=float(defaults.top_p if self.top_p is None else self.top_p),
            min_p=float(defaults.min_p if self.min_p is None else self.min_p),
            repetition_penalty=float(
                defaults.repetition_penalty if self.repetition_penalty is None else self.repetition_penalty
            ),
            presence_penalty=float(self.presence_penalty),
            frequency_penalty=float(self.frequency_penalty),
            seed=((seed if self.seed is None else self.seed) + sample_index) % (_MAX_SEED + 1),
            biases=self._packed_biases(),
        )

    def _packed_biases(self) -> bytes:
        biases = sorted((token_id, bias) for token_id, bias in (self.logit_bias or {}).items() if bias)
        return pack_int32([one for one, _ in biases]) + array("f", [bias for _, bias in biases]).tobytes()

    def resolve_stop_token_ids(
        self, eos_token_ids: tuple[int, ...], special_stops: tuple[int, ...] = ()
    ) -> tuple[int, ...]:
        """The ids that end the request, end of sequence included unless ignored, and those of stop strings that are one
        special token each. Raises when there are too many."""
        ends = () if self.ignore_eos else eos_token_ids
        token_ids = tuple(dict.fromkeys((*ends, *self.stop_token_ids, *special_stops)))
        if len(token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidRequestError(
                f"stop_token_ids and the model's {len(eos_token_ids)} end-of-sequence tokens are {len(token_ids)} ids,"
                f" the limit is {MAX_STOP_TOKEN_IDS}: give fewer"
            )
        return token_ids


_FIELD_TYPES = {
    field.name: field.type for field in msgspec.structs.fields(SamplingParams) if field.name != "structured"
}
"""Looked up once: msgspec evaluates the annotations anew at each call."""


def one_each(sampling: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int) -> Sequence[SamplingParams]:
    """The parameters of each prompt of a call. Raises InvalidRequestError."""
    if sampling is None:
        sampling = SamplingParams()
    if isinstance(sampling, SamplingParams):
        return [sampling] * num_prompts
    if not isinstance(sampling, Sequence) or not all(isinstance(one, SamplingParams) for one in sampling):
        raise InvalidRequestError(
            f"sampling is {sampling!r}: give one SamplingParams, or a list with one for each prompt"
        )
    if len(sampling) != num_prompts:
        raise InvalidRequestError(
            f"there are {len(sampling)} SamplingParams for {num_prompts} prompts: give one, or one for each prompt"
        )
    return sampling


def _check_type(name: str, value: object, expected: Any) -> None:
    """`expected`: a field's annotation, which is no type (Any). Refuses what Python would let pass, as bool for int."""
    try:
        msgspec.convert(value, expected)
    except msgspec.ValidationError as error:
        reason = str(error)
        raise InvalidRequestError(f"{name} is {value!r}: {reason[0].lower()}{reason[1:]}") from None


def _check_range(name: str, value: float | None, least: float, most: float, *, above: bool = False) -> None:
    """least <= value <= most, or least < value with `above`. NaN and infinity are in no range; None states nothing."""
    if value is None:
        return
    if not math.isfinite(value) or value > most or value < least or (above and value == least):
        low = f"above {least}" if above else f"from {least}"
        raise InvalidRequestError(f"{name} is {value}: use a value {low} to {most}")
