"""Messages survive the wire; anything else is one kind of error."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphgen.ipc.codec import Codec, pack_int32, unpack_int32
from graphgen.ipc.engine_messages import Cancel, EngineToScheduler, Submit
from graphgen.ipc.worker_messages import Bucket, Chunk, SamplerParams, SchedulerToWorker, Shutdown, SlotInit, StepPlan

INT32 = st.integers(-(2**31), 2**31 - 1)


@given(st.lists(INT32))
def test_packed_ints_come_back_and_take_four_bytes_each(values: list[int]) -> None:
    packed = pack_int32(values)
    assert len(packed) == 4 * len(values)
    assert unpack_int32(packed).tolist() == values


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1])
def test_an_int_outside_32_bits_is_refused(value: int) -> None:
    with pytest.raises(OverflowError):
        pack_int32([value])


def test_a_torn_array_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of item size"):
        unpack_int32(b"\0\0\0")


def test_every_direction_tells_its_messages_apart() -> None:
    codec: Codec[object, object] = Codec(EngineToScheduler)
    submit = Submit(7, pack_int32([1, 2]), 5, 0, (3,), SamplerParams(temperature=0.5, seed=2**62), 1.5)
    for message in (submit, Cancel(7), Shutdown()):
        assert codec.decode(codec.encode(message)) == message


def test_a_plan_comes_back_whole() -> None:
    init = SlotInit(4, 6, (0, 9), SamplerParams(top_k=3))
    chunks = (
        Chunk(slot=0, start=0, length=4, draws=True, init=init),
        Chunk(slot=3, start=16, length=2, draws=False),
    )
    plan = StepPlan(
        step_id=9,
        bucket=Bucket(16, 4),
        chunks=chunks,
        chunk_token_ids=pack_int32(range(6)),
        decode_slots=pack_int32([2]),
        decode_positions=pack_int32([8]),
        new_pages=pack_int32([0, 0, 0, 5]),
        page_copies=pack_int32([4, 5]),
        planned_s=2.0,
    )
    codec: Codec[object, object] = Codec(SchedulerToWorker)
    assert codec.decode(codec.encode(plan)) == plan


@given(st.binary(max_size=64))
def test_bytes_that_are_no_message_raise_a_decode_error_and_nothing_else(frame: bytes) -> None:
    codec: Codec[object, object] = Codec(SchedulerToWorker)
    try:
        message = codec.decode(frame)
    except msgspec.DecodeError:
        return
    assert isinstance(message, StepPlan | Shutdown)


@pytest.mark.parametrize(
    "frame",
    [b"\x91" * 100_000, msgspec.msgpack.encode(["submit"])[:-1] + b"\xff", b"\x92\xa6submit\xa1\xff"],
    ids=["nesting bomb", "truncated tag", "bad UTF-8"],
)
def test_hostile_frames_raise_a_decode_error(frame: bytes) -> None:
    codec: Codec[object, object] = Codec(EngineToScheduler)
    with pytest.raises(msgspec.DecodeError):
        codec.decode(frame)
