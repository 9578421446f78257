"""How every slot draws its tokens, which tokens it has seen, prefers and may draw: the device tables.

Owns their layout and the packing of a new owner's row. Never computes anything: reference.py (torch) and
kernels.py (Triton) read and write the tables. The worker allocates them once and packs a row per admission.

Shapes: `S` slots, `V` vocabulary. Row S is the trash slot of padded rows: neutral, never given an owner.

A slot's settings are one packed row, so that a new owner is one copy on the device and a kernel finds all it needs
in two cache lines. Floats are stored by their bits.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from graphgen.ipc.errors import InvalidRequestError
from graphgen.ipc.worker_messages import MAX_LOGIT_BIASES, MAX_STOP_TOKEN_IDS, SamplerParams, SlotInit

TEMPERATURE = 0
TOP_K = 1
TOP_P = 2
MIN_P = 3
REPETITION = 4
PRESENCE = 5
FREQUENCY = 6
PROMPT_LEN = 7
SEED = 8  # two words, the low one first; even, so that a view as int64 reads it whole
MIN_LENGTH = 10
MAX_LEN = 11
LOGPROBS = 12
NUM_BIASES = 13
STOP_TOKEN_IDS = 14  # a row that is read as int64 has an even number of words
ROW_WIDTH = STOP_TOKEN_IDS + MAX_STOP_TOKEN_IDS
"""int32 words of a slot's packed row."""

BIAS_WIDTH = 2 * MAX_LOGIT_BIASES
"""int32 words of a slot's row of biases: rising token ids, and the bits of as many float32."""

IN_PROMPT = 1 << 30
"""Bit of an entry of `occurrences` that says the token is in the prompt; the bits below count it in the output."""
OUTPUT_COUNT_MASK = IN_PROMPT - 1

NO_TOKEN = -1
"""What a drawing row gives where no token can be drawn: every logit is NaN or -inf. No token id is negative."""

_MAX_INT32 = 2**31 - 1
_NEUTRAL = SlotInit(prompt_len=0, min_length=0, stop_token_ids=(), sampler=SamplerParams())


@dataclass(frozen=True)
class SamplerTables:
    """The tables and named views of their columns. Contents change every step, addresses never."""

    settings: Tensor
    """[S + 1, ROW_WIDTH] int32: the packed row of each slot's owner."""
    occurrences: Tensor
    """[S + 1, V] int32: IN_PROMPT and the output count of each token, of the inputs computed so far.

    The large one: 4 * (S + 1) * V bytes, 132 MB for 256 slots of a 128256-token vocabulary.
    """
    biases: Tensor
    """[S + 1, BIAS_WIDTH] int32: `pack_biases` rows; read of slots with NUM_BIASES above 0 alone."""
    masks: Tensor
    """[S + 1, ceil(V / 32)] int32: bit `t % 32` of word `t // 32` says that token t may be drawn."""
    masked: Tensor
    """[S + 1] int32: one more than the position of the token that the slot's mask is for, 0 where it has none; at any
    other every token may be drawn."""

    @property
    def vocab_size(self) -> int:
        return self.occurrences.shape[1]

    @property
    def trash_slot(self) -> int:
        return self.occurrences.shape[0] - 1

    @property
    def temperature(self) -> Tensor:
        """[S + 1] float32; 0 is greedy."""
        return self._floats(TEMPERATURE)

    @property
    def top_k(self) -> Tensor:
        """[S + 1] int32; 0 is off."""
        return self.settings[:, TOP_K]

    @property
    def top_p(self) -> Tensor:
        """[S + 1] float32; 1 is off."""
        return self._floats(TOP_P)

    @property
    def min_p(self) -> Tensor:
        """[S + 1] float32; 0 is off."""
        return self._floats(MIN_P)

    @property
    def repetition(self) -> Tensor:
        """[S + 1] float32; 1 is off."""
        return self._floats(REPETITION)

    @property
    def presence(self) -> Tensor:
        """[S + 1] float32; 0 is off."""
        return self._floats(PRESENCE)

    @property
    def frequency(self) -> Tensor:
        """[S + 1] float32; 0 is off."""
        return self._floats(FREQUENCY)

    @property
    def seed(self) -> Tensor:
        """[S + 1] int64."""
        return self.settings.view(torch.int64)[:, SEED // 2]

    @property
    def prompt_len(self) -> Tensor:
        """[S + 1] int32: inputs at this position and later are the owner's output."""
        return self.settings[:, PROMPT_LEN]

    @property
    def min_length(self) -> Tensor:
        """[S + 1] int32: no stop token is drawn at positions before this."""
        return self.settings[:, MIN_LENGTH]

    @property
    def max_len(self) -> Tensor:
        """[S + 1] int32: the most tokens that the owner may have."""
        return self.settings[:, MAX_LEN]

    @property
    def logprobs(self) -> Tensor:
        """[S + 1] int32: 1 + the likeliest tokens whose log-probabilities the owner asks for; 0: it asks for none."""
        return self.settings[:, LOGPROBS]

    @property
    def num_biases(self) -> Tensor:
        """[S + 1] int32: tokens whose logits the owner changes; 0 is off."""
        return self.settings[:, NUM_BIASES]

    @property
    def bias_token_ids(self) -> Tensor:
        """[S + 1, MAX_LOGIT_BIASES] int32."""
        return self.biases[:, :MAX_LOGIT_BIASES]

    @property
    def bias_values(self) -> Tensor:
        """[S + 1, MAX_LOGIT_BIASES] float32."""
        return self.biases.view(torch.float32)[:, MAX_LOGIT_BIASES:]

    @property
    def stop_token_ids(self) -> Tensor:
        """[S + 1, MAX_STOP_TOKEN_IDS] int32; the vocabulary's size, which is no token, fills unused entries."""
        return self.settings[:, STOP_TOKEN_IDS:]

    def _floats(self, column: int) -> Tensor:
        return self.settings.view(torch.float32)[:, column]


def allocate(num_slots: int, vocab_size: int, device: torch.device) -> SamplerTables:
    """Tables of `num_slots` slots without an owner: neutral settings, nothing seen."""
    neutral = torch.from_numpy(pack_slot(_NEUTRAL, vocab_size))
    return SamplerTables(
        settings=neutral.repeat(num_slots + 1, 1).to(device),
        occurrences=torch.zeros(num_slots + 1, vocab_size, dtype=torch.int32, device=device),
        biases=torch.zeros(num_slots + 1, BIAS_WIDTH, dtype=torch.int32, device=device),
        masks=torch.zeros(num_slots + 1, mask_words(vocab_size), dtype=torch.int32, device=device),
        masked=torch.zeros(num_slots + 1, dtype=torch.int32, device=device),
    )


def asked_for(logprobs: int | None) -> int:
    """What a kernel reads: 1 + the likeliest tokens that are asked for, 0 for nothing."""
    return 0 if logprobs is None else 1 + logprobs


def mask_words(vocab_size: int) -> int:
    """int32 words of a slot's mask."""
    return -(-vocab_size // 32)


def pack_slot(init: SlotInit, vocab_size: int) -> npt.NDArray[np.int32]:
    """The packed row of a slot's new owner, [ROW_WIDTH] int32.

    Stop tokens outside the vocabulary are left out: they cannot be drawn. Raises InvalidRequestError for more stop
    tokens than the table holds and for a seed that is no int64.
    """
    sampler = init.sampler
    stop_token_ids = [token_id for token_id in init.stop_token_ids if 0 <= token_id < vocab_size]
    if len(stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequestError(
            f"a request has {len(stop_token_ids)} stop tokens, the limit is {MAX_STOP_TOKEN_IDS}: give fewer"
        )
    if not 0 <= sampler.seed < 2**63:
        raise InvalidRequestError(f"seed is {sampler.seed}, the limits are 0 and 2**63 - 1: choose one between")
    row = np.full(ROW_WIDTH, vocab_size, np.int32)
    floats = row.view(np.float32)
    # A float64 of tiny size becomes float32 0 here, the neutral value or the limit it stands next to.
    floats[TEMPERATURE] = sampler.temperature
    row[TOP_K] = min(sampler.top_k, _MAX_INT32)
    floats[TOP_P] = sampler.top_p
    floats[MIN_P] = sampler.min_p
    floats[REPETITION] = sampler.repetition_penalty
    floats[PRESENCE] = sampler.presence_penalty
    floats[FREQUENCY] = sampler.frequency_penalty
    row[SEED : SEED + 2].view(np.int64)[0] = sampler.seed
    row[PROMPT_LEN] = init.prompt_len
    row[MIN_LENGTH] = min(init.min_length, _MAX_INT32)
    row[MAX_LEN] = min(init.max_len, _MAX_INT32)
    row[LOGPROBS] = asked_for(init.logprobs)
    row[NUM_BIASES] = len(sampler.biases) // (2 * row.itemsize)
    row[STOP_TOKEN_IDS : STOP_TOKEN_IDS + len(stop_token_ids)] = stop_token_ids
    return row


def pack_biases(sampler: SamplerParams) -> npt.NDArray[np.int32]:
    """The row of a slot's biases, [BIAS_WIDTH] int32. Behind the live ones come ids that are no token's."""
    words = np.frombuffer(sampler.biases, np.int32)
    num_biases = len(words) // 2
    if num_biases > MAX_LOGIT_BIASES:
        raise InvalidRequestError(f"logit_bias has {num_biases} tokens, the limit is {MAX_LOGIT_BIASES}: give fewer")
    row = np.zeros(BIAS_WIDTH, np.int32)
    row[:MAX_LOGIT_BIASES] = _MAX_INT32
    row[:num_biases] = words[:num_biases]
    row[MAX_LOGIT_BIASES : MAX_LOGIT_BIASES + num_biases] = words[num_biases:]
    return row
