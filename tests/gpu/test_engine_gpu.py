"""The engine on a GPU: every step a replay, planning ahead of execution, and the tokens of the reference kernels."""

import random
from pathlib import Path

import pytest
import torch

from benchmarks.step_log import idle_share
from graphgen import Engine, SamplingParams
from graphgen.demo import model_folder
from tests import ROOT, step_logs

SHAPE_8B = ROOT / "benchmarks" / "shapes" / "llama-3.1-8b"
NEW_TOKENS = 48
NEAR_TIE = 0.15  # logits of a bfloat16 model of this size carry an error of a few hundredths


def prompts() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(1, 1000) for _ in range(rng.randint(1, 300))] for _ in range(64)]


def generate(**settings: object) -> tuple[list[list[int]], object]:
    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    with Engine(device="cuda", token_budget=512, max_num_seqs=64, **settings) as engine:  # type: ignore[arg-type]
        outputs = engine.generate(prompts(), sampling)
        stats = engine.stats()
    assert stats.eager_steps == 0
    assert stats.recompilations == 0
    assert stats.graph_replays == stats.steps
    return [list(output.token_ids) for output in outputs], stats


def assert_equal_but_for_near_ties(got: list[list[int]], want: list[list[int]], near_tie: float = NEAR_TIE) -> None:
    """Where two runs part, the two tokens' logits in a float32 model must be all but equal."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32).cuda()
    parted = 0
    for prompt, a, b in zip(prompts(), got, want, strict=True):
        place = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
        if place is None:
            continue
        parted += 1
        with torch.no_grad():
            logits = model(torch.tensor([prompt + a[:place]]).cuda()).logits[0, -1]
        margin = float((logits[a[place]] - logits[b[place]]).abs())
        assert margin < near_tie, f"prompt of {len(prompt)} tokens parts at token {place} by {margin:.3f}"
        assert float(logits.max() - logits[a[place]]) < near_tie
    assert parted < len(got) // 2


def test_greedy_tokens_equal_those_of_the_torch_backend_on_the_demo_model() -> None:
    flashinfer, _ = generate(attention="flashinfer")
    reference, _ = generate(attention="torch")
    assert_equal_but_for_near_ties(flashinfer, reference)


def test_float32_tokens_equal_hugging_face_exactly() -> None:
    from transformers import AutoModelForCausalLM

    got, _ = generate(attention="torch", dtype="float32", page_size=16)
    model = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32).cuda()
    for prompt, tokens in list(zip(prompts(), got, strict=True))[:16]:
        ids = model.generate(
            torch.tensor([prompt]).cuda(), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert ids[0, len(prompt) :].tolist() == tokens


def test_a_small_page_pool_preempts_and_loses_nothing() -> None:
    whole, _ = generate()
    tight, stats = generate(num_pages=40, max_model_len=400)
    assert stats.preemptions > 0  # type: ignore[attr-defined]  # EngineStats
    assert_equal_but_for_near_ties(tight, whole)


def test_on_an_8b_model_plans_arrive_before_the_step_before_them_ends_and_the_device_never_waits(
    tmp_path: Path,
) -> None:
    """The embedded model's steps take half a millisecond, as long as the way of a result to the next plan; a model
    of the size people serve gives the scheduler its time."""
    log = tmp_path / "steps.jsonl"
    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    with Engine(
        model=str(SHAPE_8B), load_format="dummy", device="cuda", max_model_len=2048, step_log=str(log)
    ) as engine:
        engine.generate(prompts(), sampling)
        stats = engine.stats()
    assert (stats.eager_steps, stats.recompilations, stats.graph_replays) == (0, 0, stats.steps)
    steps = step_logs.read(log)
    assert step_logs.share_received_in_time(steps) >= 0.95
    idle = idle_share(steps[2:])
    assert idle is not None
    assert idle <= 0.01


@pytest.mark.parametrize("token_budget", [128, 256, 2048])
def test_an_8b_model_serves_with_any_budget(token_budget: int) -> None:
    """Each budget has buckets, and sizes of the last layer's products, that no other has."""
    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    with Engine(
        model=str(SHAPE_8B), load_format="dummy", device="cuda", max_model_len=16384, token_budget=token_budget
    ) as engine:
        outputs = engine.generate(prompts(), sampling)
        stats = engine.stats()
    assert all(len(output.token_ids) == NEW_TOKENS for output in outputs)
    assert (stats.eager_steps, stats.recompilations, stats.graph_replays) == (0, 0, stats.steps)


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="needs two CUDA devices; runs on a machine that has them")
def test_an_engine_on_the_second_device_leaves_the_first_alone() -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    tokens = {}
    for device in ("cuda:0", "cuda:1"):
        torch.cuda.synchronize()
        free_before, _ = torch.cuda.mem_get_info(0)
        with Engine(device=device, token_budget=256, max_num_seqs=16, max_model_len=1024) as engine:
            # One at a time: what shares a step with what must not differ between the two.
            tokens[device] = [engine.generate([prompt], sampling)[0].token_ids for prompt in prompts()[:6]]
            free_during, _ = torch.cuda.mem_get_info(0)
    assert free_before - free_during < 1 << 20, "a context alone takes hundreds of MiB"
    assert tokens["cuda:0"] == tokens["cuda:1"]


def test_seeded_draws_do_not_depend_on_the_batch() -> None:
    sampling = SamplingParams(temperature=1.0, top_p=0.9, seed=7, max_tokens=4, ignore_eos=True)
    others = SamplingParams(temperature=1.3, seed=1, max_tokens=24, ignore_eos=True)
    with Engine(device="cuda", token_budget=512, max_num_seqs=64, dtype="float32", attention="torch") as engine:
        alone = engine.generate(prompts()[0], sampling)[0].token_ids
        crowd = engine.generate(prompts()[:40], [sampling, *[others] * 39])[0].token_ids
    assert alone == crowd


@pytest.mark.parametrize("memory_fraction", [0.5])
def test_the_cache_takes_its_share_of_memory_and_gives_it_back(memory_fraction: float) -> None:
    free_before, total = torch.cuda.mem_get_info()
    config = {"num_pages": None, "max_model_len": 1024}
    with Engine(device="cuda", memory_fraction=memory_fraction, **config) as engine:  # type: ignore[arg-type]
        engine.generate([[1, 2, 3]], SamplingParams(max_tokens=4))
        free_during, _ = torch.cuda.mem_get_info()
        assert free_during >= total * (1 - memory_fraction) - (1 << 30)
    free_after, _ = torch.cuda.mem_get_info()
    assert free_after >= free_before - (64 << 20)
