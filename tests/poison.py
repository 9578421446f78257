"""One request that ends the worker whenever it is computed, among others that do no harm.

    python -m tests.poison

An engine of the embedded model on the CPU in float32, with a trap in its workers (`tests.traps`): the process exits
when a step holds a token that no other request has. After three deaths the request fails alone; the others get the
tokens of an undisturbed run.
"""

import argparse
import random
import tempfile
import time
from pathlib import Path

from graphgen import Engine, PoisonedRequestError
from tests.traps import Harm, Traps
from tests.worker_deaths import SETTINGS, WAIT_S, Reader, check_idle, make_requests

DEATHS = 3
"""What the engine promises."""


def run(num_others: int, seed: int = 0, harm: Harm = "exit") -> dict[str, float]:
    """Raises AssertionError when another request suffers. The figures otherwise."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        traps = Traps(Path(folder))
        with traps.in_environment(), Engine(**SETTINGS) as engine:  # type: ignore[arg-type]  # a plain dict of settings
            requests = make_requests(chance, num_others)
            expected = [output.token_ids for output in engine.generate(*map(list, zip(*requests, strict=True)))]
            token_id = unused_token([*(prompt for prompt, _ in requests), *map(list, expected)])
            poison = ([5, 6, token_id, 7], requests[0][1])
            traps.set(token_id, harm)
            begun_s = time.monotonic()
            half = num_others // 2
            before, culprit, after = (
                [Reader(engine, *one) for one in some] for some in (requests[:half], [poison], requests[half:])
            )
            others = [*before, *after]
            for reader in (*others, *culprit):
                reader.thread.join(WAIT_S)
            seconds = time.monotonic() - begun_s
            check(culprit[0], others, expected)
            stats = engine.stats()
            check_idle(stats)
            assert (stats.worker_restarts, stats.poisoned) == (DEATHS, 1), stats
            assert engine.generate([requests[0][0]], requests[0][1])[0].token_ids == expected[0]
    return {"others": num_others, "deaths": stats.worker_restarts, "seconds": seconds, "start_s": engine.start_s}


def unused_token(sequences: list[list[int]]) -> int:
    """A token id of the embedded model that none of them holds."""
    return next(token_id for token_id in range(1023, 0, -1) if not any(token_id in one for one in sequences))


def check(culprit: Reader, others: list[Reader], expected: list[tuple[int, ...]]) -> None:
    assert isinstance(culprit.error, PoisonedRequestError), f"the poisoned request: {culprit.error!r}"
    assert f"the worker ended {DEATHS} times" in str(culprit.error)
    assert "springs its trap" in str(culprit.error), "the error says what the worker wrote last"
    assert not culprit.token_ids
    for reader, token_ids in zip(others, expected, strict=True):
        assert reader.error is None, f"a request that does no harm ended with {reader.error!r}"
        assert reader.token_ids == list(token_ids), "tokens were lost, doubled or changed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--others", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--harm", choices=["exit", "raise", "raise later", "kill"], default="exit")
    arguments = parser.parse_args()
    figures = run(arguments.others, arguments.seed, arguments.harm)
    print(", ".join(f"{name} {value:.3g}" for name, value in figures.items()), "- it failed alone")


if __name__ == "__main__":
    main()
