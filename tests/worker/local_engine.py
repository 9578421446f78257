"""The scheduler's policy and the worker's runner in one process: everything of an engine but its sockets."""

from collections import deque
from collections.abc import Sequence
from pathlib import Path

import msgspec

from graphgen import demo
from graphgen.ipc.codec import pack_int32
from graphgen.ipc.engine_messages import Outputs, Rejected, Submit, TokenOutput
from graphgen.ipc.step_schema import unpack_columns
from graphgen.ipc.worker_messages import SamplerParams
from graphgen.launch.config import EngineConfig
from graphgen.launch.launch_config import LaunchConfig
from graphgen.launch.resolve import resolve
from graphgen.launch.tokenizer_file import TokenizerPart
from graphgen.models.families import load_spec
from graphgen.scheduler.limits import SchedulerLimits
from graphgen.scheduler.policy import Scheduler
from graphgen.worker.runner import LaunchedStep, ModelRunner
from tests.scheduler.harness import tokens_of

GREEDY = SamplerParams()
Asks = tuple[int | None, int | None]
"""`logprobs` and `prompt_logprobs` of a request."""


def launch_config(folder: Path, max_model_len: int | None = None, **settings: object) -> LaunchConfig:
    """What the Engine would tell its processes; `max_model_len` is not held to the model's limit."""
    config = resolve(EngineConfig(**settings), load_spec(str(folder)), folder)  # type: ignore[arg-type]  # test settings
    return config if max_model_len is None else msgspec.structs.replace(config, max_model_len=max_model_len)


def demo_tokenizer() -> TokenizerPart:
    return TokenizerPart((demo.model_folder() / "tokenizer.json").read_text())


def token_ids_of(step: LaunchedStep) -> Sequence[int]:
    """Of its drawing rows, once it is fetched."""
    return unpack_columns(step.outputs.read()[0])["token_ids"]


class LocalEngine:
    """Runs requests with two steps in flight."""

    def __init__(self, config: LaunchConfig) -> None:
        self.runner = ModelRunner(config, lambda progress: None, read_tokenizer=demo_tokenizer)
        worker = self.runner.describe()
        self.scheduler = Scheduler(
            SchedulerLimits(
                buckets=worker.captured,
                num_pages=worker.num_pages,
                page_size=worker.page_size,
                windows=tuple(group.window for group in worker.page_groups),
                num_slots=config.num_slots,
                max_chunks=worker.max_chunks,
                token_budget=config.token_budget,
                max_model_len=config.max_model_len,
                prefix_cache=config.prefix_cache,
                pads=worker.graphs,
            )
        )
        self._next_id = 0
        self.outputs: list[TokenOutput] = []  # all that came with news
        self.num_refused = 0
        """Draws that a grammar refused."""
        self.rejected: list[Rejected] = []
        """Of requests whose grammar could not go on."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        samplers: Sequence[SamplerParams] | None = None,
        stop_token_ids: tuple[int, ...] = (),
        preempt_after: int | None = None,
        asks: Sequence[Asks] = (),
        grammars: Sequence[str] | None = None,
        emitted: Sequence[Sequence[int]] | None = None,
    ) -> list[list[int]]:
        """Tokens of all prompts, submitted at once, in their order.

        preempt_after: steps whose results have arrived when one request is preempted, the one to be served last.
        asks: for log-probabilities, of each prompt; `outputs` has them afterwards.
        grammars: of each prompt; "" is none. emitted: of each prompt, the tokens that another engine has emitted.
        """
        first_id = self._next_id
        self._next_id += len(prompts)
        for number, prompt in enumerate(prompts):
            sampler = samplers[number] if samplers else GREEDY
            submit = Submit(first_id + number, pack_int32(prompt), max_tokens, 0, stop_token_ids, sampler, 0.0)
            if asks:
                submit = msgspec.structs.replace(submit, logprobs=asks[number][0], prompt_logprobs=asks[number][1])
            grammar = grammars[number] if grammars else ""
            if emitted is not None:
                had = pack_int32(emitted[number])
                submit = msgspec.structs.replace(submit, num_moves=1, output_token_ids=had)
            self.scheduler.add(msgspec.structs.replace(submit, grammar=grammar))
        tokens: list[list[int]] = [[] for _ in prompts]
        in_flight: deque[LaunchedStep] = deque()
        unfinished = len(prompts)
        num_steps = 0
        while unfinished:
            if num_steps == preempt_after:
                life = self.scheduler._life
                life.preemption.preempt(next(life.running.victims()))
            num_steps += 1
            while (plan := self.scheduler.schedule(0.0)) is not None:
                in_flight.append(self.runner.launch(plan, received_s=0.0))
            num_rejected = len(self.rejected)
            outputs = self.update(in_flight.popleft())
            self.outputs += outputs.outputs
            unfinished -= len(self.rejected) - num_rejected
            for request_id, (token_id, reason) in tokens_of(outputs).items():
                tokens[request_id - first_id].append(token_id)
                unfinished -= reason is not None
        while in_flight:
            self.update(in_flight.popleft())
        return tokens

    def update(self, step: LaunchedStep) -> Outputs:
        """What a step gives to its requests, once it is fetched."""
        step.fetched.wait()
        of_prompts = b"" if step.prompt_logprobs is None else step.prompt_logprobs()
        verdicts = self.runner.grammars.judge(step.draws, step.outputs.token_ids)
        self.rejected += self.scheduler.fail_grammars(step.step_id, verdicts.failed)
        self.num_refused += len(verdicts.refused)
        return self.scheduler.update(
            step.step_id, token_ids_of(step), step.outputs.logprobs(), of_prompts, verdicts.refused
        )

    def close(self) -> None:
        self.runner.close()
