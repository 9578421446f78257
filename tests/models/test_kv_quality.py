"""What quantised keys and values cost: the embedded model on a text that it was not trained on, against unquantised
ones, in float32. A position's logits follow from all stored positions before it."""

import pytest
import torch
from tokenizers import Tokenizer

from graphgen import demo
from graphgen.demo.train import split_play, validation_windows
from graphgen.models.families import load_spec
from graphgen.models.loader import load_decoder
from tests.models.driver import Driver

WINDOWS, LENGTH = 4, 512


@pytest.fixture(scope="module")
def logprobs() -> dict[str | None, torch.Tensor]:
    """[positions, V] of each format."""
    folder = demo.model_folder()
    decoder = load_decoder(folder, load_spec(folder), torch.float32, torch.device("cpu"))
    text = split_play(demo.play_file().read_text())[1]
    ids = torch.tensor(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids)
    windows = validation_windows(ids, LENGTH)[:WINDOWS, :LENGTH]
    found: dict[str | None, torch.Tensor] = {}
    for kept_as in (None, "fp8", "int8"):
        driver = Driver(decoder, page_size=16, num_pages=40 * WINDOWS, kept_as=kept_as)
        steps = (driver.step([(driver.request(window), LENGTH)])[0] for window in windows.tolist())
        found[kept_as] = torch.cat([*steps]).log_softmax(-1)
    return found


@pytest.mark.parametrize(("name", "most_divergence", "least_equal"), [("fp8", 1e-3, 0.97), ("int8", 1e-4, 0.99)])
def test_the_text_is_predicted_as_without(
    name: str, most_divergence: float, least_equal: float, logprobs: dict[str | None, torch.Tensor]
) -> None:
    want, got = logprobs[None], logprobs[name]
    divergence = (want.exp() * (want - got)).sum(-1).mean().item()
    equal = (want.argmax(-1) == got.argmax(-1)).float().mean().item()
    print(f"{name}: mean KL divergence {divergence:.6f}, equal first choices {equal:.4f}")
    assert 0.0 < divergence <= most_divergence
    assert equal >= least_equal
