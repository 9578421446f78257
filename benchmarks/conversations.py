"""What the clients of several replicas send: conversations that share system prompts, or prompts that share nothing.

Pure: the same seed makes the same requests. Called by `benchmarks.simulated_replicas`.

A client sends one request after another. In a conversation it begins with a system prompt, one of SYSTEMS by Zipf's
law, and each of its 2 to 6 turns adds what was answered and a new question, so its prompt is that of the turn before
and more. Then it begins another one. Lengths are spread as in `benchmarks.workload`.
"""

from bisect import bisect_left
from itertools import accumulate
from random import Random

from msgspec import Struct

from benchmarks.workload import MIN_OUTPUT_LEN, MIN_PROMPT_LEN, SPREAD
from graphgen.base.page_digests import TOKEN_BYTES

SYSTEMS, SYSTEM_LEN = 200, 1024
LEAST_TURNS, MOST_TURNS = 2, 6
QUESTION_MEAN, ANSWER_MEAN = 200, 100
PROMPT_MEAN, OUTPUT_MEAN = 2600, 60
"""Of prompts that share nothing: DeepSpeed-FastGen's case."""
HOT_LEN = 4096
"""Of a prefix that suddenly many conversations begin with."""
MAX_TOKENS = 512
"""What every request asks for at most; how long its output becomes, nobody knows before."""

_ZIPF = list(accumulate(1.0 / rank for rank in range(1, SYSTEMS + 1)))
_OWN_TOKEN = 1 << 20
"""Conversations' own token ids begin here; those of system prompts are below, and an output is zeros."""


class Turn(Struct):
    """One request of a client."""

    prompt_len: int
    output_len: int
    digests: tuple[bytes, ...]  # of the full pages of its prompt
    output_digests: tuple[bytes, ...]  # of those that its output fills
    tokens: bytes  # packed int32; b"" where nobody reads them


class Client:
    """One client, with the conversation that it is in."""

    def __init__(self, number: int, seed: int, page_size: int, *, shares: bool, has_tokens: bool) -> None:
        """shares: it holds conversations; else its prompts share nothing. has_tokens: turns have token ids."""
        self._number = number
        self._random = Random(seed * 1_000_003 + number)
        self._page_size = page_size
        self._shares = shares
        self._has_tokens = has_tokens
        self._num_conversations = 0
        self._turns_left = 0
        self._len = 0  # tokens of the conversation
        self._digests: list[bytes] = []
        self._tokens = b""
        self._own_token = b""

    def next_turn(self, hot_share: float = 0.0) -> Turn:
        """hot_share: of the conversations that begin now, those that begin with the hot prefix."""
        if not self._turns_left:
            self._begin(hot_share)
        self._turns_left -= 1
        random = self._random
        if self._shares:
            question, answer = QUESTION_MEAN, ANSWER_MEAN
        else:
            question, answer = PROMPT_MEAN, OUTPUT_MEAN
        self._add(max(MIN_PROMPT_LEN, round(random.gauss(question, SPREAD * question))), self._own_token)
        prompt_len, digests, tokens = self._len, tuple(self._digests), self._tokens
        output_len = max(MIN_OUTPUT_LEN, round(random.gauss(answer, SPREAD * answer)))
        self._add(output_len, bytes(TOKEN_BYTES))
        return Turn(prompt_len, output_len, digests, tuple(self._digests[len(digests) :]), tokens)

    def _begin(self, hot_share: float) -> None:
        """Another conversation."""
        random = self._random
        self._num_conversations += 1
        self._len, self._digests, self._tokens = 0, [], b""
        own = self._number << 16 | self._num_conversations
        self._own_token = (_OWN_TOKEN + own % (1 << 30)).to_bytes(TOKEN_BYTES, "little")
        self._name = b"c%d." % own
        if not self._shares:
            self._turns_left = 1
            return
        self._turns_left = random.randint(LEAST_TURNS, MOST_TURNS)
        if hot_share and random.random() < hot_share:
            system, length = SYSTEMS, HOT_LEN
        else:
            system, length = bisect_left(_ZIPF, random.random() * _ZIPF[-1]), SYSTEM_LEN
        own_name, self._name = self._name, b"s%d." % system
        self._add(length, (1 + system).to_bytes(TOKEN_BYTES, "little"))
        self._name = own_name

    def _add(self, num_tokens: int, token: bytes) -> None:
        self._len += num_tokens
        first, end = len(self._digests), self._len // self._page_size
        self._digests += [self._name + b"%d" % page for page in range(first, end)]
        if self._has_tokens:
            self._tokens += token * num_tokens
