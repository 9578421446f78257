"""One request that ends the worker whenever it is computed, among others that do no harm.

    python -m tests.poison
    python -m tests.poison --rows decodes

An engine of the embedded model on the CPU in float32, with a trap in its workers (`tests.traps`): the process exits
when a step holds a token that no other request has, or when a request decodes that has it in its prompt. Such a request
may get a token in each life, of its prompt. After at most DEATHS deaths it fails alone; the others get the tokens of an
undisturbed run.
"""

import argparse
import random
import tempfile
import time
from pathlib import Path

from graphgen import Engine, PoisonedRequestError, SamplingParams
from tests.traps import Harm, Rows, Traps
from tests.worker_deaths import SETTINGS, WAIT_S, Reader, check_idle, check_tokens, make_requests

DEATHS: dict[Rows, int] = {"chunks": 4, "decodes": 5}
"""What the engine promises."""


def run(num_others: int, seed: int = 0, harm: Harm = "exit", rows: Rows = "chunks") -> dict[str, float]:
    """Raises AssertionError when another request suffers. The figures otherwise."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        traps = Traps(Path(folder))
        with traps.in_environment(), Engine(**SETTINGS) as engine:  # type: ignore[arg-type]  # a plain dict of settings
            requests = make_requests(chance, num_others)
            expected = [output.token_ids for output in engine.generate(*map(list, zip(*requests, strict=True)))]
            token_id = unused_token([*(prompt for prompt, _ in requests), *map(list, expected)])
            poison = ([5, 6, token_id, 7], requests[0][1])
            traps.set(token_id, harm, rows=rows)
            begun_s = time.monotonic()
            half = num_others // 2
            before, culprit, after = (
                [Reader(engine, *one) for one in some] for some in (requests[:half], [poison], requests[half:])
            )
            others = [*before, *after]
            for reader in (*others, *culprit):
                reader.thread.join(WAIT_S)
            seconds = time.monotonic() - begun_s
            stats = engine.stats()
            check_idle(stats)
            assert DEATHS["chunks"] <= stats.worker_restarts <= DEATHS[rows], stats
            assert stats.poisoned == 1, stats
            had = tuple(culprit[0].token_ids)
            assert len(had) <= (0 if rows == "chunks" else stats.worker_restarts)
            check_error(culprit[0].error, stats.worker_restarts)
            check_others(engine, requests, others, expected)
            assert engine.generate([requests[0][0]], requests[0][1])[0].token_ids == expected[0]
            traps.remove(token_id)
            assert engine.generate([poison[0]], poison[1])[0].token_ids[: len(had)] == had
    return {"others": num_others, "deaths": stats.worker_restarts, "seconds": seconds, "start_s": engine.start_s}


def unused_token(sequences: list[list[int]]) -> int:
    """A token id of the embedded model that none of them holds."""
    return next(token_id for token_id in range(1023, 0, -1) if not any(token_id in one for one in sequences))


def check_error(error: Exception | None, num_deaths: int) -> None:
    assert isinstance(error, PoisonedRequestError), f"the poisoned request: {error!r}"
    assert f"the worker ended {num_deaths} times" in str(error)
    assert "springs its trap" in str(error), "the error says what the worker wrote last"


def check_others(
    engine: Engine,
    requests: list[tuple[list[int], SamplingParams]],
    others: list[Reader],
    expected: list[tuple[int, ...]],
) -> None:
    for request, reader, token_ids in zip(requests, others, expected, strict=True):
        assert reader.error is None, f"a request that does no harm ended with {reader.error!r}"
        check_tokens(engine, request, reader.token_ids, token_ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--others", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--harm", choices=["exit", "raise", "raise later", "kill"], default="exit")
    parser.add_argument("--rows", choices=["chunks", "decodes"], default="chunks", help="those that end the worker")
    arguments = parser.parse_args()
    figures = run(arguments.others, arguments.seed, arguments.harm, arguments.rows)
    print(", ".join(f"{name} {value:.3g}" for name, value in figures.items()), "- it failed alone")


if __name__ == "__main__":
    main()
