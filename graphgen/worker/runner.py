"""The model runner: everything of one device, built in phases, then one `launch` per plan.

Owns decoder, KV cache, slot tables, buckets' graphs and staging. Knows slots, pages and buckets, never requests.
The only place that sees both `models` and `capture`. Called by process.py.
"""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from msgspec import Struct
from torch import Tensor

from graphgen.capture.buffers import BlockLayout, StagingRing, Words
from graphgen.capture.graphs import GraphPool
from graphgen.capture.memory import (
    device_free_bytes,
    free_bytes,
    held_bytes,
    pages_that_fit,
    peak_bytes_of,
    unused_bytes,
    wait_until_free,
)
from graphgen.capture.stream import Mark, open_stream
from graphgen.ipc.step_schema import MAX_SCORED_ROWS, PAGE_COPY_WORDS, WORD_BYTES, StepShape
from graphgen.ipc.worker_messages import Bucket, Chunk, Phase, Progress, SlotInit, StepPlan, WorkerCounters, WorkerReady
from graphgen.launch.launch_config import LaunchConfig
from graphgen.launch.tokenizer_file import TokenizerPart
from graphgen.models.collectives.group import RankGroup
from graphgen.models.kv_cache import KVCache
from graphgen.models.loader import load_decoder
from graphgen.models.sampling import pack_slot
from graphgen.worker.ahead import KernelsAhead
from graphgen.worker.backend import open_backend
from graphgen.worker.background import Background, prepare_first_use
from graphgen.worker.bias_copies import BiasCopies
from graphgen.worker.grammar_compiler import GrammarCompiler
from graphgen.worker.grammars import Draw, GrammarSlots
from graphgen.worker.inputs import InputPacker, RegionLengths
from graphgen.worker.mask_copies import MaskCopies
from graphgen.worker.outputs import StepOutputs, live_drawing_rows
from graphgen.worker.redraw_copies import RedrawCopies
from graphgen.worker.scoring import SlotAsks
from graphgen.worker.step_parts import StepParts, StepShapes

STAGING_BLOCKS = 4
"""Input blocks on the host: two of steps in flight, and two that may still be on their way to the device."""

Report = Callable[[Progress], None]


class LaunchedStep(Struct, frozen=True):
    """A step that was handed to the device."""

    step_id: int
    received_s: float
    launched_s: float
    started: Mark
    finished: Mark
    fetched: Mark
    outputs: StepOutputs  # to be read once `fetched` is reached
    prompt_logprobs: Callable[[], bytes] | None = None  # those of the scored rows, likewise; None: there are none
    draws: Sequence[Draw] = ()  # of its drawing rows, those that follow a grammar


def _no_tokenizer() -> TokenizerPart:
    raise ValueError("this worker was started without a tokenizer")


class ModelRunner:
    """One device, ready to run plans."""

    def __init__(
        self,
        config: LaunchConfig,
        report: Report,
        phases: Sequence[Phase] = (),
        read_tokenizer: Callable[[], TokenizerPart] = _no_tokenizer,
        ranks: RankGroup | None = None,
        kernels: KernelsAhead | None = None,
    ) -> None:
        """phases: what the process has done before this. read_tokenizer: for requests with a grammar. ranks: that share
        the model; config.device is this one's. kernels: which are being compiled."""
        self._config = config
        self._ranks = ranks
        self._spec = config.rank_spec
        self._phases = list(phases)
        begun_s = time.monotonic()
        self._device = torch.device(config.device)
        self._stream = open_stream(self._device)
        # A worker that takes the place of one that died finds its memory free, or waits until it is.
        wait_until_free(config.needed_bytes, lambda: device_free_bytes(self._device))
        self._report = report
        self._phases.append(Phase("device", time.monotonic() - begun_s))
        if config.cpu_threads is not None:
            torch.set_num_threads(config.cpu_threads)
        self._shapes = shapes = StepShapes(config)
        self._bounds = shapes.bounds
        dtype = getattr(torch, config.dtype)
        with self._phase("attention"):
            self._backend = open_backend(config, self._device, dtype, shapes.buckets, shapes.bounds)
        compiler = GrammarCompiler(config.spec.num_drawable, config.eos_token_ids, read_tokenizer)
        # Of several ranks the first one draws for all.
        self._follows_grammars = ranks is None or ranks.shard.rank == 0
        grammars = Background("grammars", compiler.prepare if self._follows_grammars else lambda: 0.0)
        preparations = prepare_first_use(config.compile, self._device.type == "cuda", self._backend.late_import)
        with self._phase("load"):
            decoder = load_decoder(
                location=Path(config.model_path),
                spec=config.spec,
                dtype=dtype,
                device=self._device,
                load_format=config.load_format,  # type: ignore[arg-type]  # checked by EngineConfig
                seed=config.seed,
                progress=lambda done, total: report(Progress("load", done, total)),
                fused=self._backend.runs_fused_layers,
                kept_as=config.kv_format,
                ranks=ranks,
            )
        self._phases += [preparation.wait() for preparation in preparations]
        gc.freeze()  # what was imported stays: no collection need look at it again
        self._parts = parts = StepParts(config, shapes, decoder, self._backend, self._device, ranks)
        self._masks = MaskCopies(parts.sampler, self._stream, STAGING_BLOCKS)
        self.grammars = GrammarSlots(compiler, self._masks.send_late)
        """Of its slots: whoever reads the outputs of a step lets it judge them."""
        self._biases = BiasCopies(parts.sampler, self._stream, STAGING_BLOCKS, self._bounds.max_chunks)
        self._staging = StagingRing(parts.num_words, STAGING_BLOCKS, pinned=self._device.type == "cuda")
        self._packer = InputPacker(self._bounds, self._pack_slot)
        self._asks = SlotAsks(config.num_slots)
        with self._phase("kernels"):
            self._backend.load_kernels()
        if kernels is not None:
            self._phases.append(kernels.wait())
        if config.compile:
            with self._phase("compile"):
                decoder.compile_layers()
                self._run_once(shapes.buckets[-1])
        with self._phase("profile"):
            self._kv_cache = parts.open_kv_cache(self._num_pages())
        slots = parts.open_slots(self._kv_cache)
        self._redraws = RedrawCopies(parts.sampler, slots.last_token, self._stream, STAGING_BLOCKS)
        free = device_free_bytes(self._device)
        with self._phase("capture"):
            self._captured = set(shapes.first_buckets)
            self._graphs = GraphPool(
                self._stream,
                parts.step_maker(self._kv_cache, slots),
                shapes.largest_first(shapes.first_buckets),
                before_warm_up=self._fill_idle_step,
                progress=lambda done, total: report(Progress("capture", done, total)),
                shortened=decoder.shortened,
            )
            self._score_graphs = GraphPool(self._stream, parts.scores.step_of, [MAX_SCORED_ROWS])
            self._stream.submit(self._copy_once)
            self._masks.send_once()
            self._redraws.send_once()
        self._graph_bytes = max(0, free - device_free_bytes(self._device)) // len(self._captured)
        self._phases.append(grammars.wait())
        self.restart_counters()

    def describe(self) -> WorkerReady:
        """What was decided from the device that was found."""
        is_cuda = self._device.type == "cuda"
        return WorkerReady(
            device=torch.cuda.get_device_name(self._device) if is_cuda else "cpu",
            attention=self._backend.description,
            graphs=self._graphs.captures,
            compiled=self._config.compile,
            buckets=self._shapes.buckets,
            max_chunks=self._bounds.max_chunks,
            max_chunk_pages=self._backend.most_chunk_pages,
            num_pages=self._kv_cache.num_pages,
            page_size=self._config.page_size,
            page_groups=self._shapes.page_groups,
            page_bytes=self._shapes.page_bytes,
            phases=tuple(self._phases),
            device_bytes=held_bytes(self._device),
            num_ranks=self._config.num_ranks,
            collectives="" if self._ranks is None else self._ranks.description,
            rare=tuple(bucket for bucket in self._shapes.buckets if bucket not in self._captured),
        )

    def capture(self, bucket: Bucket) -> None:
        """Captures one of the rare buckets, while nothing is in flight; it is none of them afterwards.

        Raises MemoryError, on all ranks alike, where one has less memory left than a graph has taken until now, and
        RuntimeError where it is found out too late, see `is_out_of_memory`. Steps in other buckets run as before.
        """
        left = float(device_free_bytes(self._device) + unused_bytes(self._device) - self._graph_bytes)
        if self._ranks is not None:
            left = self._ranks.least(left)
        if left < 0:
            needed, missing = self._graph_bytes / 2**20, -left / 2**20
            raise MemoryError(f"a graph takes {needed:.0f} MiB of the device, {missing:.0f} MiB more than are free")
        self._graphs.capture(self._bounds.any_plan(bucket))
        self._captured.add(bucket)

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """What runs meanwhile, while no request is served, is in no counter, and leaves no slot an owner."""
        self.grammars.disown()
        before = self._graphs.num_replays, self._graphs.num_eager_steps
        yield
        self.grammars.disown()
        self._graphs.num_replays, self._graphs.num_eager_steps = before

    @property
    def kv_cache(self) -> KVCache:
        """For tests and benchmarks that poison or fill it; nothing may be in flight then."""
        return self._kv_cache

    @property
    def num_compiled_graphs(self) -> int:
        """Graphs that torch.compile made of the decoder's layers."""
        return self._parts.decoder.num_compiled_graphs()

    def restart_counters(self) -> None:
        """What ran until now was part of the start."""
        self.grammars.disown()
        self._num_compiled = self._parts.decoder.num_compiled_graphs()
        self._graphs.num_eager_steps = 0
        self._graphs.num_replays = 0

    @property
    def counters(self) -> WorkerCounters:
        """Totals since ready."""
        return WorkerCounters(
            graph_replays=self._graphs.num_replays,
            eager_steps=self._graphs.num_eager_steps,
            recompilations=self._parts.decoder.num_compiled_graphs() - self._num_compiled,
        )

    def launch(self, plan: StepPlan, received_s: float) -> LaunchedStep:
        """Packs the plan, hands it to the device and returns; steps run in the order of their launches."""
        draws = self.grammars.open(plan) if self._follows_grammars else []
        output_row = self._parts.outputs.next_row()
        shape = self._bounds.any_plan(plan.bucket) if self._graphs.captures else self._bounds.this_plan(plan)
        self._masks.send(plan, draws)
        self._biases.send(plan)
        self._redraws.send(plan)
        started = self._stage(plan, shape, output_row)
        self._stream.submit(lambda: self._graphs.run(shape))
        if plan.scored_rows:
            self._stream.submit(lambda: self._score_graphs.run(shape.num_scored_rows))
        finished = self._stream.mark()
        live_rows, asked = live_drawing_rows(plan, shape), self._asks.of(plan)
        fetched, outputs = self._parts.outputs.fetch(output_row, shape, live_rows, self._stream, asked)
        prompt_logprobs = None
        if plan.scored_rows:
            fetched, prompt_logprobs = self._parts.scores.fetch(output_row, plan, self._stream)
        return LaunchedStep(
            step_id=plan.step_id,
            received_s=received_s,
            launched_s=time.monotonic(),
            started=started,
            finished=finished,
            fetched=fetched,
            outputs=outputs,
            prompt_logprobs=prompt_logprobs,
            draws=draws,
        )

    def run_between_steps(self, work: Callable[[], None]) -> None:
        """Runs `work` on the device's memory when all that was launched has ended, and waits for it."""
        self._stream.submit(work)
        self._stream.synchronize()

    def mark(self) -> Mark:
        """The point of the device's work behind everything launched so far."""
        return self._stream.mark()

    def close(self) -> None:
        """Waits for what was launched."""
        self.grammars.close()
        self._stream.close()

    # --- the input of a step -----------------------------------------------------------------------------------

    def _stage(self, plan: StepPlan, shape: StepShape, output_row: int) -> Mark:
        """Queues the plan's input; returns the mark of the step's start."""
        block, layout = self._staging.acquire(), self._shapes.layout_of(shape)
        num_words, lengths = self._packer.pack(plan, layout, block.numpy(), output_row)
        started = self._stream.mark()
        self._stream.submit(lambda: self._load_input(plan.bucket, block, num_words, lengths))
        if plan.page_copies:
            self._stream.submit(lambda: self._copy_pages(plan, layout))
        self._staging.release(self._stream)
        return started

    def _load_input(self, bucket: Bucket, block: Tensor, num_words: int, lengths: RegionLengths) -> None:
        self._parts.block[:num_words].copy_(block[:num_words], non_blocking=True)
        self._backend.plan(bucket.prefill_rows, lengths.chunk_starts, lengths.chunk_kv_lens, lengths.decode_kv_lens)

    def _copy_pages(self, plan: StepPlan, layout: BlockLayout) -> None:
        """No part of the graph: few steps copy anything, and no other should pay for it."""
        copies = layout.views(self._parts.block)["page_copies"]
        self._kv_cache.copy_pages(copies[: len(plan.page_copies) // WORD_BYTES].view(-1, PAGE_COPY_WORDS))

    def _pack_slot(self, init: SlotInit) -> Words:
        return pack_slot(init, self._config.spec.num_drawable)

    def _fill_idle_step(self, shape: StepShape) -> None:
        """Input of a full step of the trash slot alone: it computes everything and touches no request."""
        bucket, layout = shape.bucket, self._shapes.layout_of(shape)
        length = min(bucket.prefill_rows, self._config.max_model_len)
        chunks = (Chunk(slot=self._bounds.trash_slot, start=0, length=length, draws=True),) if length else ()
        tokens = bytes(WORD_BYTES * length)
        plan = StepPlan(step_id=0, bucket=bucket, chunks=chunks, chunk_token_ids=tokens, planned_s=0.0)
        block = torch.zeros(layout.num_words, dtype=torch.int32)
        num_words, lengths = self._packer.pack(plan, layout, block.numpy(), output_row=0)
        self._load_input(bucket, block, num_words, lengths)

    # --- building ----------------------------------------------------------------------------------------------

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self._report(Progress(name, 0, 0))
        begun_s = time.monotonic()
        yield
        self._stream.synchronize()
        self._phases.append(Phase(name, time.monotonic() - begun_s))

    def _run_once(self, bucket: Bucket) -> None:
        """One idle step over a cache of one page: compiles, loads kernels, and takes the memory a step takes."""
        shape = self._bounds.any_plan(bucket)
        kv_cache = self._parts.open_kv_cache(1)
        step = self._parts.step_maker(kv_cache, self._parts.open_slots(kv_cache))(shape)
        self._stream.submit(lambda: self._fill_idle_step(shape))
        self._stream.submit(step)
        self._stream.submit(self._parts.scoring_step())
        self._stream.synchronize()

    def _copy_once(self) -> None:
        """A page onto itself: what copies pages is compiled before a request needs it."""
        self._kv_cache.copy_pages(torch.zeros(1, 2, dtype=torch.int32, device=self._device))

    def _num_pages(self) -> int:
        """Pages of the cache: what was asked for, or what is left beside the largest step, of all ranks the fewest."""
        config = self._config
        if config.num_pages is not None:
            return config.num_pages
        shapes = self._shapes
        page_bytes, step_bytes = shapes.page_bytes, 0
        if self._device.type == "cuda":
            step_bytes = peak_bytes_of(self._device, lambda: self._run_once(shapes.buckets[-1]))
        num_pages = pages_that_fit(
            budget_bytes=free_bytes(self._device, config.memory_fraction) - 2 * step_bytes - page_bytes,
            bytes_per_page=page_bytes,
            # Where windows hold less, the prefix cache has the rest.
            wanted_pages=config.num_slots * shapes.pages_per_slot * len(shapes.page_groups),
            least_pages=self._bounds.most_pages,
        )
        return num_pages if self._ranks is None else int(self._ranks.least(num_pages))
