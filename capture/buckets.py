"""Which shapes are captured: the ladder of buckets of an engine.

A step of `d` decodes and `p` prompt tokens runs in the smallest bucket that holds both, so the ladder trades graphs
(start-up time, memory) against padding. Mixed buckets are spaced by their total rows, multiples of 128: then the linear
layers, which see all rows at once, run at sizes their tiles divide. Between those sizes nothing is gained: on an H200
the linear layers of an 8B model take longer for 448 to 496 rows than for 512, and 416 or 544 to 704 are fewer rows a
second. Padded decode rows keep prompt rows out, so mixed buckets have a decode ladder of their own instead of one
widest region. It is densest at 512 rows, the size that is full most often there.

Steps of 1024 and 1536 rows are taken while a queue of prompts waits. Where prompts are much longer than outputs, 15 to
37 requests decode meanwhile, and in a bucket of 64 decode rows the padding keeps out one prompt row in thirty. So these
sizes have a rung of 32 as well: 992+32 takes 25.5 ms on an H200 where 960+64 takes 27.0, and 64 clients with prompts of
2600 tokens and outputs of 60 get 2.8 % more requests a second, as simulated, and 3 to 4 % measured. Rungs of 16 or 48
beside it, or one of 32 at 2048 rows, gain less than 0.4 % more; one of 32 at 768 rows gains up to 0.8 %, but such steps
are then taken for shorter queues, too, and gaps get longer.

Below 128 rows a step reads weights and hardly computes, so what is saved is the attention of padded decode rows. The
buckets there are for a prompt that is short or mostly cached, as the next turn of a chat, beside few decodes. On an
H200 a step of 28+4 takes 5.6 ms, 60+4 5.7, 56+8 5.7 and 112+16 6.5; 16 rows are no faster than 32, and beside 16
decodes or more 32 and 64 rows hold too few prompt tokens for what they save.
"""

from collections.abc import Sequence

from graphgen.ipc.errors import ConfigError
from graphgen.ipc.worker_messages import Bucket

MIN_TOKEN_BUDGET = 8
"""Below this, no ladder leaves room for both regions."""

_DECODE_RUNGS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
_MIXED_ROWS = (128, 256, 384, 512, 768, 1024, 1536, 2048)
_SHORT_PROMPT_SHAPES = ((32, 4), (64, 4), (64, 8), (128, 4))  # rows, and how many of them decode
_DENSE_ROWS = 512
_LARGE_DECODE_RUNGS = (64, 128, 256, 512, 1024)
_QUEUE_ROWS = range(1024, 1537)
_QUEUE_DECODE_RUNGS = (32, *_LARGE_DECODE_RUNGS)
_DENSE_DECODE_RUNGS = (8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024)
_MIXED_DECODE_RUNGS = (16, 32, *_LARGE_DECODE_RUNGS)
_SMALL_DECODE_RUNGS = (4, *_MIXED_DECODE_RUNGS)
_ESSENTIAL_DECODE_RUNGS = (1, 4, 16, 32, 64, 128, 256, 512, 1024)
_ESSENTIAL_OF_BUDGET = (1, 16, *_LARGE_DECODE_RUNGS)
_ESSENTIAL_MIXED = {128: (4, 64), 256: (64,), 512: (16, 64, 256), 1024: (64, 256)}  # rows, and how many of them decode


def slots_for(max_num_seqs: int, token_budget: int) -> int:
    """Slots of an engine: at least a quarter of the budget stays for prompts, however many requests decode."""
    return min(max_num_seqs, token_budget - token_budget // 4)


def build_ladder(token_budget: int, num_slots: int) -> tuple[Bucket, ...]:
    """All buckets of an engine, fewest rows first.

    For every d <= num_slots there is a decode-only bucket, and a mixed one of exactly `token_budget` rows.
    Raises ConfigError for a budget too small to split.
    """
    if token_budget < MIN_TOKEN_BUDGET:
        raise ConfigError(f"token_budget is {token_budget}, the least is {MIN_TOKEN_BUDGET}: raise token_budget")
    if not 1 <= num_slots <= token_budget - token_budget // 4:
        raise ConfigError(
            f"{num_slots} slots do not fit a token_budget of {token_budget}: at most three quarters of it may decode"
        )
    decode_only = [Bucket(0, rung) for rung in _rungs_up_to(_DECODE_RUNGS, num_slots)]
    mixed = [
        Bucket(rows - rung, rung)
        for rows in _row_counts(token_budget)
        for rung in _mixed_rungs(rows, token_budget, num_slots)
    ]
    short = _short_prompt_buckets(num_slots) if token_budget >= _MIXED_ROWS[0] else []
    return tuple(sorted({*decode_only, *mixed, *short}, key=lambda bucket: (bucket.num_rows, bucket.decode_rows)))


def essential_of(ladder: Sequence[Bucket]) -> tuple[Bucket, ...]:
    """The buckets of a ladder that are captured first, fewest rows first.

    Every step that the ladder holds fits into one of them, and they hold as many prompt tokens as the ladder beside no
    decodes and beside the most.
    """
    token_budget = ladder[-1].num_rows
    chosen = {max(ladder, key=lambda bucket: bucket.prefill_rows)}
    chosen |= _nearest([bucket for bucket in ladder if not bucket.prefill_rows], _ESSENTIAL_DECODE_RUNGS)
    for rows, rungs in (_ESSENTIAL_MIXED | {token_budget: _ESSENTIAL_OF_BUDGET}).items():
        chosen |= _nearest([one for one in ladder if one.prefill_rows and one.num_rows == rows], rungs)
    return tuple(bucket for bucket in ladder if bucket in chosen)


def _nearest(buckets: Sequence[Bucket], rungs: Sequence[int]) -> set[Bucket]:
    """For each rung the bucket of fewest decode rows that has as many; the widest where none has."""
    by_decodes = sorted(buckets, key=lambda bucket: bucket.decode_rows)
    return {next((one for one in by_decodes if one.decode_rows >= rung), by_decodes[-1]) for rung in rungs if buckets}


def _short_prompt_buckets(num_slots: int) -> list[Bucket]:
    decode_rows = [(rows, min(rung, num_slots)) for rows, rung in _SHORT_PROMPT_SHAPES]
    return [Bucket(rows - rung, rung) for rows, rung in decode_rows]


def _rungs_up_to(rungs: tuple[int, ...], top: int) -> list[int]:
    """The rungs below `top`, and `top` itself."""
    return [rung for rung in rungs if rung < top] + [top]


def _row_counts(token_budget: int) -> list[int]:
    """Total rows of mixed buckets, the budget the last."""
    return _rungs_up_to(_MIXED_ROWS, token_budget)


def _mixed_rungs(rows: int, token_budget: int, num_slots: int) -> list[int]:
    """Decode rows of the mixed buckets of `rows` rows. Only the widest ones need the rungs above half."""
    limit = rows - rows // 4 if rows == token_budget else rows // 2
    return [rung for rung in _rungs_up_to(_mixed_decode_rungs(rows, token_budget), num_slots) if rung <= limit]


def _mixed_decode_rungs(rows: int, token_budget: int) -> tuple[int, ...]:
    """A few padded decode rows are not worth graphs of their own beside 100 prompt rows, nor dozens beside many."""
    if token_budget < _MIXED_ROWS[0]:
        return _SMALL_DECODE_RUNGS
    if rows < _DENSE_ROWS:
        return _MIXED_DECODE_RUNGS
    if rows == _DENSE_ROWS:
        return _DENSE_DECODE_RUNGS
    return _QUEUE_DECODE_RUNGS if rows in _QUEUE_ROWS else _LARGE_DECODE_RUNGS
