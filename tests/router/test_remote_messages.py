"""An engine elsewhere is told what one here would be told: every field of a request arrives at its scheduler."""

import time
from collections.abc import Iterable

import pytest
from msgspec import structs

from graphgen import Choice, InvalidRequestError, SamplingParams
from graphgen.base.salt import cache_salt
from graphgen.ipc.codec import pack_int32
from graphgen.ipc.engine_messages import EngineStats, Submit, TokenOutput
from graphgen.ipc.ggp.framing import client_framing, server_framing
from graphgen.ipc.ggp.messages import Generate
from graphgen.ipc.ggp.routing import Routed
from graphgen.ipc.worker_messages import Bucket, PageGroup
from graphgen.launch.config import EngineConfig
from graphgen.requests.core import AttachedCore, launch_config
from graphgen.requests.open_request import OpenRequest
from graphgen.router.engine_stats import sum_of_reports
from graphgen.router.remote_messages import capacity_of, generate_of, load_of, ready_of, report_of
from graphgen.server.frontend.prepare import sampling_params, unpack_prompt
from tests.fakes import READY
from tests.frontend.harness import demo_tokenizer
from tests.router.engines import report

ALL = SamplingParams(
    max_tokens=50,
    min_tokens=2,
    temperature=0.7,
    top_k=40,
    top_p=0.9,
    min_p=0.05,
    repetition_penalty=1.1,
    presence_penalty=0.2,
    frequency_penalty=0.3,
    logit_bias={5: 1.5, 3: -100.0},
    seed=2**63 - 1,
    stop=["\n\n"],
    stop_token_ids=[7],
    logprobs=3,
    prompt_logprobs=1,
    priority=4,
    deadline_ms=50_000.0,
    itl_target_ms=20.0,
    ttft_target_ms=300.0,
    tpot_target_ms=25.0,
    cache_salt="salt",
)


class NoLink:
    def check_process(self) -> None:
        pass

    def submit(self, requests: Iterable[OpenRequest]) -> None:
        raise AssertionError("nothing is sent")

    def cancel(self, request_ids: Iterable[int]) -> None:
        pass

    def stats(self, timeout_s: float) -> EngineStats:
        raise AssertionError("nothing is asked")


@pytest.fixture(scope="module")
def core() -> AttachedCore:
    ready = structs.replace(READY, worker=structs.replace(READY.worker, num_pages=100))
    return AttachedCore(launch_config(EngineConfig(device="cpu")), ready, demo_tokenizer(), NoLink())


def arrived(core: AttachedCore, request: OpenRequest) -> Submit:
    """What the engine is told at the server that the request is routed to."""
    sent = generate_of(request, 5, frozenset(core.eos_token_ids))
    message = server_framing().decode(client_framing().encode(sent))
    assert isinstance(message, Generate)
    assert message.routed is not None
    assert message.prompt_u32 is not None
    opened = core.prepare_routed(
        unpack_prompt(message.prompt_u32),
        sampling_params(message.sampling, ""),
        lambda _: None,
        time.monotonic() - message.routed.age_ms / 1000,
        message.tenant,
        message.log_id,
        message.routed,
        lambda _: None,
    )
    return opened.submit


def make(core: AttachedCore, sampling: SamplingParams) -> OpenRequest:
    [request] = core.prepare([5, 6, 7], sampling, lambda _: None, time.monotonic() - 0.25, "ann", log_id="log")
    return request


def compare(there: Submit, here: Submit) -> None:
    assert there.arrived_s == pytest.approx(here.arrived_s, abs=0.1)
    assert there.cache_salt == cache_salt("", here.cache_salt)
    assert (there.first_token_s is None) == (here.first_token_s is None)
    if here.first_token_s is not None:
        assert there.first_token_s == pytest.approx(here.first_token_s, abs=0.1)
    own = {"request_id": 0, "arrived_s": 0.0, "cache_salt": "", "first_token_s": None}
    assert structs.replace(there, **own) == structs.replace(here, **own)


def test_every_field_of_a_request_arrives(core: AttachedCore) -> None:
    request = make(core, ALL)
    request.hear(TokenOutput(request.submit.request_id, (4, 4), None, 0.0, prompt_logprobs=bytes(32)))
    request.take([4, 4], None, time.monotonic(), bytes(64))
    request.move(2)
    said = structs.asdict(request.submit)
    defaults = {field.name: field.default for field in structs.fields(Submit) if not field.required}
    silent = {name for name, default in defaults.items() if said[name] == default} - {"grammar"}
    assert not silent, f"this test says nothing of {silent}: let it"
    compare(arrived(core, request), request.submit)


def test_what_a_request_leaves_out_is_left_out_there(core: AttachedCore) -> None:
    for sampling in (SamplingParams(), SamplingParams(ignore_eos=True, max_tokens=None)):
        request = make(core, sampling)
        compare(arrived(core, request), request.submit)


def test_a_structure_arrives_as_it_was_asked_for(core: AttachedCore) -> None:
    pytest.importorskip("llguidance", reason="structured output needs llguidance, which the extra http brings")
    request = make(core, SamplingParams(structured=Choice(["yes", "no"])))
    assert request.submit.grammar
    compare(arrived(core, request), request.submit)


@pytest.mark.parametrize(
    ("output", "told"),
    [
        (b"\1\0\0", "output_u32 has 3 bytes"),
        (pack_int32([5] * 9), "output_u32 has 9 tokens, max_tokens is 9"),
        (pack_int32([4000]), "output_u32 has token id 4000"),
    ],
)
def test_an_output_that_cannot_be_gone_on_with_is_refused(core: AttachedCore, output: bytes, told: str) -> None:
    with pytest.raises(InvalidRequestError, match=told):
        core.prepare_routed(
            [5],
            SamplingParams(max_tokens=9),
            lambda _: None,
            0.0,
            "",
            "",
            Routed(seed=1, output_u32=output),
            lambda _: None,
        )


def test_a_tenant_with_a_long_name_stays_one(core: AttachedCore) -> None:
    request = make(core, SamplingParams())
    request.submit = structs.replace(request.submit, tenant="x" * 263)
    first, second = (generate_of(request, 5, frozenset()).tenant for _ in range(2))
    assert first == second
    assert len(first) <= 256


def test_room_and_work_are_those_of_the_engines_behind_a_server() -> None:
    worker = structs.replace(
        READY.worker, buckets=(Bucket(0, 4), Bucket(12, 4)), page_groups=(PageGroup(), PageGroup(32)), num_pages=20
    )
    ready = structs.replace(READY, worker=worker)
    found = ready_of(capacity_of(ready, 3), "tcp://a:1")
    assert (found.num_slots, found.token_budget, found.num_engines) == (ready.num_slots, ready.token_budget, 3)
    assert found.worker.most_positions(1000) == worker.most_positions(1000)
    told = report(2, 100, 50, epoch=4, num_steps=7)
    assert report_of(load_of(told, 3), 0) == told
    half = report_of(load_of(told, 3), 1)
    assert (half.num_others, half.others_prompt_tokens, half.others_output_tokens) == (1, 50, 25)


def test_several_reports_are_one() -> None:
    paused = report(1, 10, 5, is_serving=False)
    found = sum_of_reports([report(2, 100, 50), report(1, 20, 5, pace=2.0), paused], 9)
    assert (found.num_open, found.prompt_tokens, found.output_tokens, found.epoch) == (4, 130, 60, 9)
    assert found.is_serving
    assert found.prompt_token_s == pytest.approx(1 / (1000 + 500))
    assert not sum_of_reports([paused], 1).is_serving
