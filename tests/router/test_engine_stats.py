"""The statistics of several engines as those of one."""

from msgspec.structs import replace

from graphgen.ipc.engine_messages import BucketSteps, EngineStats
from graphgen.ipc.worker_messages import Bucket
from graphgen.router.engine_stats import COUNTS, MOST, NOW, sum_of
from tests.fakes import STATS

OF_THEIR_OWN = {
    *("padding_share", "worker_loss", "waiting_by_class", "buckets", "steps_within_ms", "recent_steps", "engines")
}
COUNTING = replace(
    STATS,
    **dict.fromkeys(COUNTS, 10),
    buckets=(BucketSteps(Bucket(16, 16), 3, 6.0),),
    steps_within_ms=(1, 2),
    waiting_by_class=(2, 0),
)


def test_every_number_is_a_count_or_of_now_or_the_most_of_any() -> None:
    named = [*COUNTS, *MOST, *NOW, *OF_THEIR_OWN]
    assert sorted(named) == sorted(EngineStats.__struct_fields__)


def test_of_engines_that_are_gone_their_counts_alone_are_left() -> None:
    total = sum_of([COUNTING, None], [COUNTING, COUNTING])
    assert {name: getattr(total, name) for name in COUNTS} == dict.fromkeys(COUNTS, 30)
    for name in (*MOST, *NOW, "waiting_by_class"):
        assert getattr(total, name) == getattr(COUNTING, name), name
    assert total.buckets == (BucketSteps(Bucket(16, 16), 9, 18.0),)
    assert total.steps_within_ms == (3, 6)
    assert total.padding_share == 1.0
    assert total.engines == (COUNTING, None)
