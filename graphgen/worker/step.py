"""One step on the device: from the input block to the drawn tokens, without a word to the host.

Owns the order of a step. Everything here has fixed shapes and addresses, so that one graph per bucket holds all of it;
on the CPU it runs as it stands. Read `Step.__call__` top to bottom: that is what a graph is.
"""

from collections.abc import Mapping

from torch import Tensor

from graphgen.capture.buffers import BlockLayout
from graphgen.ipc.step_schema import LOGPROBS, Counts
from graphgen.ipc.worker_messages import Bucket
from graphgen.models.attention.backend import AttentionBackend
from graphgen.models.collectives.group import RankGroup
from graphgen.models.decoder import Decoder
from graphgen.models.kv_cache import KVCache
from graphgen.models.sampling import Sampler
from graphgen.worker.rows import RowExpander, SlotTables, TorchRows
from graphgen.worker.scoring import PromptScores


class Step:
    """The callable of one bucket."""

    def __init__(
        self,
        bucket: Bucket,
        layout: BlockLayout,
        block: Tensor,
        slots: SlotTables,
        outputs: Mapping[str, Tensor],
        decoder: Decoder,
        kv_cache: KVCache,
        attention: AttentionBackend,
        sampler: Sampler,
        scores: PromptScores,
        ranks: RankGroup | None,
    ) -> None:
        """block: the device's input words. outputs: see `OutputRing.views`. ranks: that share the decoder."""
        self._ranks = ranks
        self._fields = layout.views(block)
        self._rows = _open_rows(bucket, self._fields, slots, outputs, kv_cache, sampler, decoder.spec.rotates_by_limit)
        self._has_prefill_rows = bucket.prefill_rows > 0
        self._decoder = decoder
        self._kv_cache = kv_cache
        self._attention = attention
        self._sampler = sampler
        self._kept = scores.kept_rows(self._fields["scored_rows"])
        self._logprobs = outputs[LOGPROBS.name]
        self._output_row = self._fields["counts"][Counts.OUTPUT_ROW : Counts.OUTPUT_ROW + 1]

    def __call__(self) -> None:
        self._rows.append_pages()
        self._sampler.write_slots(self._fields["slot_params"], self._fields["chunk_slots"], self._fields["chunk_inits"])
        rows, tables, drawing_rows = self._rows.expand()
        self._sampler.count_inputs(rows.token_ids, rows.slots, rows.positions)
        logits = self._decoder(
            rows.token_ids,
            rows.positions,
            rows.sequence_lens,
            self._kv_cache,
            [self._attention.prepare(of_group) for of_group in tables],
            drawing_rows=drawing_rows.rows if self._has_prefill_rows else None,  # decode rows draw one and all
            kept=self._kept,
        )
        tokens = self._sampler.sample(logits, drawing_rows.slots, drawing_rows.positions)
        if self._ranks is not None:  # the first one's grammars alone say what may be drawn, as soon as they know it
            tokens = self._ranks.of_first(tokens)
        self._rows.feed_back(tokens, drawing_rows)
        self._sampler.write_logprobs(logits, tokens, drawing_rows.slots, self._logprobs, self._output_row)


def _open_rows(
    bucket: Bucket,
    fields: dict[str, Tensor],
    slots: SlotTables,
    outputs: Mapping[str, Tensor],
    kv_cache: KVCache,
    sampler: Sampler,
    by_limit: bool,
) -> RowExpander:
    """by_limit: see ModelSpec.rotates_by_limit."""
    arguments = (
        bucket,
        fields,
        slots,
        sampler.tables.max_len if by_limit else sampler.tables.prompt_len,
        outputs,
        kv_cache.page_size,
        kv_cache.trash_page,
    )
    if slots.last_token.device.type != "cuda":
        return TorchRows(*arguments)
    # Triton exists where CUDA does; elsewhere it must not be needed.
    from graphgen.worker.rows_cuda import TritonRows

    return TritonRows(*arguments)
