"""Log-probabilities of a step: which rows are asked for some, and what prompt rows say of their prompts' next tokens.

Owns what a slot's owner asks for, and the scored rows. The last layer computes nothing behind its attention for rows
that draw no token, and no step should pay for a head that few ask for. So a step leaves its scored rows, at most
MAX_SCORED_ROWS, in a block at fixed addresses, and the rest of the model runs over that block behind the step: a graph
of its own on CUDA, replayed only where a plan has scored rows. Called by runner.py.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from graphgen.capture.buffers import BlockLayout, Words
from graphgen.capture.stream import DeviceStream, Mark
from graphgen.ipc.step_schema import LOGPROB_WORDS, MAX_SCORED_ROWS, SCORED_ROW_WORDS, Counts, num_scored_rows
from graphgen.ipc.worker_messages import StepPlan
from graphgen.models.decoder import Decoder, KeptRows
from graphgen.models.sampling import Sampler, asked_for
from graphgen.worker.outputs import OUTPUT_RING, pack_logprobs


class SlotAsks:
    """What the owner of each slot asks for of the tokens that are drawn for it."""

    def __init__(self, num_slots: int) -> None:
        self._asked = np.zeros(num_slots + 1, np.int32)

    def of(self, plan: StepPlan) -> Words | None:
        """1 + likeliest tokens, 0 for nothing, of each drawing row of the plan that is launched next; None: no row asks
        for anything."""
        for chunk in plan.chunks:
            if chunk.init is not None:
                self._asked[chunk.slot] = asked_for(chunk.init.logprobs)
        drawing = [chunk.slot for chunk in plan.chunks if chunk.draws]
        slots = np.concatenate((np.asarray(drawing, np.int32), np.frombuffer(plan.decode_slots, "<i4")))
        asked = self._asked[slots]
        return asked if asked.any() else None


class PromptScores:
    """The block of scored rows, and the ring of what is found for them."""

    def __init__(self, decoder: Decoder, sampler: Sampler, block: Tensor, layout: BlockLayout) -> None:
        """block: the device's input words. layout: of any step with scored rows: they lie at one address in all."""
        fields = layout.views(block)
        device = block.device
        self._decoder = decoder
        self._sampler = sampler
        self._entries = fields["scored_rows"].view(-1, SCORED_ROW_WORDS)
        self._output_row = fields["counts"][Counts.OUTPUT_ROW : Counts.OUTPUT_ROW + 1]
        self._places = torch.arange(MAX_SCORED_ROWS, dtype=torch.int32, device=device)
        self._kept = decoder.allocate_kept(MAX_SCORED_ROWS)
        num_words = MAX_SCORED_ROWS * LOGPROB_WORDS
        self._on_device = torch.zeros(OUTPUT_RING, num_words, dtype=torch.int32, device=device)
        self._on_host = torch.zeros(OUTPUT_RING, num_words, dtype=torch.int32, pin_memory=device.type == "cuda")

    def kept_rows(self, scored_rows: Tensor) -> KeptRows | None:
        """Where a step leaves its scored rows, a field of its input. None where that has no room for any."""
        rows = scored_rows.view(-1, SCORED_ROW_WORDS)[:, 0]
        if not (num_rows := len(rows)):
            return None
        residual, gathered = self._kept
        return KeptRows(rows, residual[:num_rows], gathered[:num_rows])

    def step_of(self, num_rows: int) -> Callable[[], None]:
        """What scores the first rows of the block, and writes the row of the ring that the step writes of its own."""
        residual, gathered = (rows[:num_rows] for rows in self._kept)
        entries, places = self._entries[:num_rows], self._places[:num_rows]

        def score() -> None:
            logits = self._decoder.logits_of(residual, gathered)
            rings = self._on_device[:, : num_rows * LOGPROB_WORDS]
            self._sampler.write_scores(logits, entries[:, 1], entries[:, 2], places, rings, self._output_row)

        return score

    def fetch(self, row: int, plan: StepPlan, stream: DeviceStream) -> tuple[Mark, Callable[[], bytes]]:
        """Copies what was found for the plan's scored rows to the host. When the mark is reached the call packs it."""
        num_rows = num_scored_rows(plan)
        end = num_rows * LOGPROB_WORDS
        fetched = stream.fetch(self._on_device[row, :end], self._on_host[row, :end])
        words = self._on_host[row, :end].numpy().reshape(num_rows, LOGPROB_WORDS)
        asked = np.frombuffer(plan.scored_rows, "<i4").reshape(-1, SCORED_ROW_WORDS)[:, 2]
        return fetched, lambda: pack_logprobs(words, asked)
