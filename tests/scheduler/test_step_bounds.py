"""How many steps go without prompts behind one with prompts that took too long. What of it all a tenant gets is tested
in `test_rests`."""

from itertools import groupby
from typing import Any, cast

import pytest

from graphgen.scheduler.step_bounds import MEAN_TOLERANCE, MOST_SKIPPED, TOLERANCE, Gap, StepBounds
from graphgen.scheduler.tenants import Tenant

SHARE_MS = 8.0
NOT_ASKED: Any = None


def bounds_of_steps() -> StepBounds:
    return StepBounds(NOT_ASKED, NOT_ASKED, NOT_ASKED, NOT_ASKED)


def some_gap() -> Gap:
    return Gap(cast(Tenant, object()), SHARE_MS)


def steps_with_prompts(step_ms: float, decode_ms: float, count: int = 2000) -> list[bool]:
    """Of so many steps in a row, each time that there are prompts to compute."""
    bounds, gap = bounds_of_steps(), some_gap()
    return [not bounds.skips_prompts(gap, step_ms, decode_ms) for _ in range(count)]


@pytest.mark.parametrize("decode_ms", [3.0, 7.0])
@pytest.mark.parametrize("step_ms", [11.0, 20.0, 30.0])
def test_the_mean_of_steps_is_what_a_share_allows_and_no_shorter(step_ms: float, decode_ms: float) -> None:
    steps = steps_with_prompts(step_ms, decode_ms)
    mean_ms = sum(step_ms if has_prompts else decode_ms for has_prompts in steps) / len(steps)
    assert mean_ms == pytest.approx(MEAN_TOLERANCE * SHARE_MS, rel=0.01)


@pytest.mark.parametrize(("step_ms", "decode_ms"), [(500.0, 4.0), (30.0, 9.99), (30.0, 12.0)])
def test_prompts_go_on_in_one_of_so_many_steps_however_long_those_take(step_ms: float, decode_ms: float) -> None:
    steps = steps_with_prompts(step_ms, decode_ms)
    runs = [len(list(run)) for has_prompts, run in groupby(steps) if not has_prompts]
    assert set(runs[:-1]) == {MOST_SKIPPED}


def test_steps_within_the_share_are_never_without_prompts() -> None:
    assert all(steps_with_prompts(TOLERANCE * SHARE_MS, 4.0))


def test_what_is_not_made_up_for_in_so_many_steps_is_forgotten() -> None:
    """Also where the next steps with prompts are short, and where decodes take too long to make up for anything."""
    bounds, gap = bounds_of_steps(), some_gap()
    assert not bounds.skips_prompts(gap, 500.0, 4.0)
    skipped = [bounds.skips_prompts(gap, 9.0, 4.0) for _ in range(100)]
    assert skipped == [True] * MOST_SKIPPED + [False] * (100 - MOST_SKIPPED)
    assert not bounds.skips_prompts(gap, 30.0, 10.2)
    skipped = [bounds.skips_prompts(gap, 10.5, 10.2) for _ in range(100)]
    assert skipped == [True] * MOST_SKIPPED + [False] * (100 - MOST_SKIPPED)


def test_one_tenants_late_tokens_are_not_anothers() -> None:
    bounds, one, other = bounds_of_steps(), some_gap(), some_gap()
    assert not bounds.skips_prompts(one, 500.0, 4.0)
    assert all(bounds.skips_prompts(one, 9.0, 4.0) for _ in range(3))
    assert not bounds.skips_prompts(other, 500.0, 4.0)
    assert [bounds.skips_prompts(other, 9.0, 4.0) for _ in range(20)].count(True) == MOST_SKIPPED
