"""Which kernels of FlashInfer a model's layers ask for."""

from pathlib import Path

import pytest
import torch

from graphgen.models.attention.kernels import Kernel, Scores, best_kernels, needed_libraries
from graphgen.worker.backend import attention_shape
from tests.models import tiny
from tests.worker.local_engine import launch_config

SCORES = {
    "gemma3": Scores.PLAIN,
    "gemma2": Scores.SOFTCAP,
    "gpt_oss": Scores.SINKS,
    "bloom": Scores.ALIBI,
    "falcon_rw": Scores.ALIBI,
    "ministral3": Scores.PLAIN,
}


@pytest.mark.parametrize("case", SCORES)
def test_a_model_asks_for_the_kernels_of_its_scores(case: str, tmp_path: Path) -> None:
    tiny.save(case, tmp_path)
    config = launch_config(tmp_path, 64, device="cpu", token_budget=16, num_pages=8, page_size=16)
    assert attention_shape(config, torch.bfloat16).scores is SCORES[case]


def test_chunks_that_flashinfer_has_no_library_for_run_in_tiles(tmp_path: Path) -> None:
    tiny.save("llama4", tmp_path)
    config = launch_config(tmp_path, 64, device="cpu", token_budget=16, num_pages=8, page_size=16)
    shape = attention_shape(config, torch.bfloat16)
    assert best_kernels((9, 0), shape.scores) == (Kernel.TILES, Kernel.SPLIT_KV)
    assert needed_libraries(shape, best_kernels((9, 0), shape.scores)) == []
