"""Sampling in torch, on any device: what the Triton kernels are held to, and what serves on the CPU.

Owns the order and meaning of the rules. Every rule reads the slot's row of the tables, so requests of any kind mix
in one batch, and no result depends on the batch. Called through `Sampler` (package module) by the worker's step.
It selects rows by value, which a captured graph cannot: on CUDA kernels.py computes the same tokens.

Shapes: `N` drawing rows, `V` vocabulary, `T` token rows, `C` chunks.

Rules, in this order, as Hugging Face's logits processors and the OpenAI API define them:
1. NaN counts as -inf, +inf as the largest float.
2. Biases are added to the logits of the tokens that they are for.
3. Repetition penalty: logits of tokens in prompt or output are divided by it, negative ones multiplied.
4. Presence and frequency penalty: logit - presence * (count > 0) - frequency * count, count = times in the output.
5. Stop tokens are removed while the sequence is shorter than the slot's min_length.
6. Greedy (temperature 0) takes the largest logit, the lowest token id among equals. With a temperature T a token's
   probability is softmax(logit / T). Nothing divides a logit: logit / T is infinite where T is small. (logit - largest)
   / T is not, and neither is logit + T * noise, which is largest where logit / T + noise is.
7. top-k keeps the k largest and all that equal the k-th.
8. top-p keeps, of those, a token when the tokens more probable than it hold less than top_p of their mass: the
   smallest set of likeliest tokens with mass >= top_p, and all that equal the last of them. The likeliest stay.
9. min-p keeps tokens at least min_p times as probable as the likeliest.
10. A mask removes the tokens that it does not allow. Where rules 7 to 9 have kept none that it allows, all that it
   allows are left. So the filters never see the mask, and a token that is drawn without a mask and that the mask
   allows is the token that is drawn with it.
11. The draw: the largest of logit + T * Gumbel noise, the lowest token id among equals, which is a draw from softmax.
   Where nothing but -inf is left there is nothing to draw: NO_TOKEN.
"""

import torch
from torch import Tensor

from graphgen.models.sampling.arithmetic import LARGEST_FLOAT, MASS_ONE, gumbel, log_positive, mass
from graphgen.models.sampling.philox import vocabulary_bits
from graphgen.models.sampling.tables import IN_PROMPT, NO_TOKEN, OUTPUT_COUNT_MASK, SamplerTables


def write_slots(tables: SamplerTables, rows: Tensor, slots: Tensor, inits: Tensor) -> None:
    """Gives slots new owners: rows [C, ROW_WIDTH] int32 and slots [C], of the chunks whose inits [C] is not 0."""
    chosen = inits != 0
    owned = slots[chosen].long()
    tables.settings.index_copy_(0, owned, rows[chosen])
    tables.occurrences.index_fill_(0, owned, 0)


def write_masks(tables: SamplerTables, block: Tensor, num_masks: int) -> None:
    """block: int32, the slots of so many masks, the positions of the tokens that they are for, and the words of each,
    ceil(V / 32). The position comes last, since a draw may be under way."""
    num_words = tables.masks.shape[1]
    slots, positions, words = block[:num_masks], block[num_masks : 2 * num_masks], block[2 * num_masks :]
    places = slots.long()
    tables.masks.index_copy_(0, places, words[: num_masks * num_words].view(num_masks, num_words))
    tables.masked.index_copy_(0, places, positions + 1)


def lift_masks(tables: SamplerTables, slots: Tensor) -> None:
    """The slots, [n] int32, have no masks."""
    tables.masked.index_fill_(0, slots.long(), 0)


def write_biases(tables: SamplerTables, slots: Tensor, rows: Tensor) -> None:
    """The biases of slots [n]: `pack_biases` rows, [n, BIAS_WIDTH] int32."""
    tables.biases.index_copy_(0, slots.long(), rows)


def forget_inputs(tables: SamplerTables, slots: Tensor, token_ids: Tensor) -> None:
    """Takes one input of each slot, [n] int32 each, out of `occurrences`: a token of the output that is computed
    again."""
    minus_one = torch.full((), -1, dtype=torch.int32, device=slots.device)
    tables.occurrences.index_put_((slots.long(), token_ids.long()), minus_one, accumulate=True)


def count_inputs(tables: SamplerTables, token_ids: Tensor, slots: Tensor, positions: Tensor) -> None:
    """Enters the step's input tokens, [T] each, into `occurrences`; rows of the trash slot are ignored, and tokens that
    are never drawn."""
    live = (slots != tables.trash_slot) & (token_ids < tables.vocab_size)
    slots, token_ids = slots[live].long(), token_ids[live].long()
    in_prompt = positions[live] < tables.prompt_len[slots]
    prompt_places = (slots[in_prompt], token_ids[in_prompt])
    # Equal places write equal values, so it does not matter which of them is last.
    tables.occurrences.index_put_(prompt_places, tables.occurrences[prompt_places] | IN_PROMPT)
    output_places = (slots[~in_prompt], token_ids[~in_prompt])
    one = torch.ones((), dtype=torch.int32, device=slots.device)
    tables.occurrences.index_put_(output_places, one, accumulate=True)


def sample(tables: SamplerTables, logits: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
    """The next token of each row, [N] int32, or NO_TOKEN.

    logits: [N, V] of any float type, computed in float32, left as they are. slots: [N]. positions: [N], of the
    token being drawn.
    """
    slots = slots.long()
    scores = penalised_logits(tables, logits, slots, positions)
    masked = (tables.masked[slots] == positions + 1).nonzero().squeeze(1)
    allowed = allowed_logits(tables, scores[masked], slots[masked])
    drawn = tables.temperature[slots] > 0
    draws = bool(drawn.any())
    if draws:
        scores[drawn] = kept_logits(tables, scores[drawn], slots[drawn])
    if len(masked):
        kept = scores[masked].masked_fill_(allowed == float("-inf"), float("-inf"))
        keeps_any = (kept > float("-inf")).any(1, keepdim=True)
        scores[masked] = torch.where(keeps_any, kept, allowed)
    if draws:
        drawn_slots = slots[drawn]
        bits = vocabulary_bits(tables.seed[drawn_slots], positions[drawn], tables.vocab_size)
        scores[drawn] += tables.temperature[drawn_slots].unsqueeze(1) * gumbel(bits)
    best, token_ids = scores.max(dim=1)
    return torch.where(best > float("-inf"), token_ids, NO_TOKEN).int()


def penalised_logits(tables: SamplerTables, logits: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
    """Rules 1 to 5: [N, V] float32, a new tensor."""
    scores = logits.to(torch.float32, copy=True)
    biased = (tables.num_biases[slots] > 0).nonzero().squeeze(1)
    if len(biased):
        # The column past the vocabulary takes what is for no token of it.
        token_ids = tables.bias_token_ids[slots[biased]].long().clamp(max=tables.vocab_size)
        added = torch.zeros(len(biased), tables.vocab_size + 1, device=scores.device)
        added.scatter_(1, token_ids, tables.bias_values[slots[biased]])
        scores[biased] += added[:, :-1]
    repetition, presence, frequency = tables.repetition[slots], tables.presence[slots], tables.frequency[slots]
    penalised = ((repetition != 1) | (presence != 0) | (frequency != 0)).nonzero().squeeze(1)
    if len(penalised):
        chosen = scores[penalised]
        entries = tables.occurrences[slots[penalised]]
        counts = entries & OUTPUT_COUNT_MASK
        factor = repetition[penalised].unsqueeze(1)
        repeated = torch.where(chosen < 0, chosen * factor, chosen / factor)
        chosen = torch.where(entries != 0, repeated, chosen)
        chosen = chosen - torch.where(counts > 0, presence[penalised].unsqueeze(1), 0.0)
        scores[penalised] = chosen - counts.float() * frequency[penalised].unsqueeze(1)
    short = (positions < tables.min_length[slots]).nonzero().squeeze(1)
    if len(short):
        # The column past the vocabulary takes what unused entries point to.
        banned = torch.zeros(len(short), tables.vocab_size + 1, dtype=torch.bool, device=scores.device)
        banned.scatter_(1, tables.stop_token_ids[slots[short]].long(), True)
        scores[short] = scores[short].masked_fill(banned[:, :-1], float("-inf"))
    return scores.nan_to_num_(nan=float("-inf"), posinf=LARGEST_FLOAT, neginf=float("-inf"))


def allowed_logits(tables: SamplerTables, logits: Tensor, slots: Tensor) -> Tensor:
    """[N, V] float32, -inf where the slot's mask does not allow a token."""
    bits = torch.arange(32, dtype=torch.int32, device=logits.device)
    allowed = (tables.masks[slots].unsqueeze(2) >> bits) & 1
    return logits.masked_fill(allowed.flatten(1)[:, : tables.vocab_size] == 0, float("-inf"))


def kept_logits(tables: SamplerTables, logits: Tensor, slots: Tensor) -> Tensor:
    """Rules 7 to 9 for rows with a temperature: [N, V] float32, -inf where a token is not kept.

    The softmax of a row, divided by its temperature, is the distribution its token is drawn from.
    """
    temperature, top_k = tables.temperature[slots], tables.top_k[slots]
    top_p, min_p = tables.top_p[slots], tables.min_p[slots]
    by_rank = ((top_k > 0) & (top_k < tables.vocab_size)) | (top_p < 1)
    lowest = torch.full_like(top_p, float("-inf"))
    ranked = by_rank.nonzero().squeeze(1)
    if len(ranked):
        lowest[ranked] = _rank_threshold(logits[ranked], temperature[ranked], top_k[ranked], top_p[ranked])
    if bool((min_p > 0).any()):
        # Where min_p is 0 the logarithm is of no use, but must be of something.
        distance = temperature * log_positive(torch.where(min_p > 0, min_p, 1.0))
        lowest = torch.where(min_p > 0, torch.maximum(lowest, logits.amax(1) + distance), lowest)
    return logits.masked_fill(logits < lowest.unsqueeze(1), float("-inf"))


def _rank_threshold(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The smallest logit that top-k and then top-p keep, [N]."""
    ranked = logits.sort(dim=1, descending=True).values
    vocab_size = logits.shape[1]
    num_kept = torch.where(top_k > 0, top_k.clamp(max=vocab_size), vocab_size).long()
    kth = ranked.gather(1, (num_kept - 1).unsqueeze(1))
    distances = (ranked - ranked[:, :1]) / temperature.unsqueeze(1)
    masses = mass(distances.nan_to_num_(nan=0.0)).masked_fill_(ranked < kth, 0)
    ends = masses.cumsum(1)
    # Of equal tokens the first has exactly the more probable ones before it; the rest follow its fate.
    more_probable = ends - masses
    limit = (ends[:, -1].double() * top_p.double()).long()
    limit = torch.where(top_p < 1, limit, int(MASS_ONE) * vocab_size).unsqueeze(1)
    dropped = (more_probable >= limit) & (more_probable > 0)
    nucleus = ranked.masked_fill(dropped, float("inf")).amin(1, keepdim=True)
    return torch.maximum(kth, nucleus).squeeze(1)
