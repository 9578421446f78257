"""What quantised weights cost: the embedded model on a text that it was not trained on, against its own weights.

The limits of mean divergence, equal first choices and perplexity tell the kinds apart: a wrong scale or a lost half of
the codes is beyond all of them. A second gate asks nothing of quality: a kind that rounds weights alone must predict
what a model does whose weights were dequantised before, so that its products are right whatever its rounding is worth.
"""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from graphgen import demo
from graphgen.demo.train import split_play, validation_windows
from graphgen.models.decoder import Decoder
from graphgen.models.families import load_spec
from graphgen.models.formats import linear as linear_module
from graphgen.models.formats import matrices
from graphgen.models.formats.layout import dequantised
from graphgen.models.formats.linear import Linear
from graphgen.models.formats.products import Weight, product, quantise_rows
from graphgen.models.loader import load_decoder
from graphgen.models.spec import format_at_load
from tests.models.driver import Driver

CPU = torch.device("cpu")
FOLDER = demo.model_folder()
WINDOWS, LENGTH = 2, 512


class Limits(NamedTuple):
    divergence: float  # nats, at most
    equal: float  # share of positions with the same first choice, at least
    perplexity: float  # how much it may grow, as a share


LIMITS = {
    "fp8": Limits(2e-3, 0.96, 0.003),
    "fp8 with inputs in fp8": Limits(2e-3, 0.96, 0.003),
    "int8": Limits(2e-4, 0.99, 0.001),
    "int4": Limits(1e-2, 0.92, 0.03),
    "int4 with inputs in fp8": Limits(1e-2, 0.92, 0.03),
}


@pytest.fixture(scope="module")
def text() -> Tensor:
    """[windows, positions + 1] ids."""
    ids = Tokenizer.from_file(str(FOLDER / "tokenizer.json")).encode(split_play(demo.play_file().read_text())[1]).ids
    return validation_windows(torch.tensor(ids), LENGTH)[:WINDOWS]


def load(kind: str | None, dtype: torch.dtype) -> Decoder:
    spec = load_spec(FOLDER)
    if kind is not None:
        name: Any = kind.split()[0]
        spec = spec.with_formats(lambda _, place: format_at_load(name, place.num_columns))
    return load_decoder(FOLDER, spec, dtype, CPU)


def predicted(decoder: Decoder, text: Tensor) -> Tensor:
    """[positions, V] log-probabilities of what comes next."""
    driver = Driver(decoder, page_size=16, num_pages=40 * WINDOWS)
    steps = [driver.step([(driver.request(ids), LENGTH)])[0] for ids in text[:, :LENGTH].tolist()]
    return torch.cat(steps).float().log_softmax(-1)


def divergence_of(want: Tensor, got: Tensor) -> float:
    return (want.exp() * (want - got)).sum(-1).mean().item()


@pytest.fixture(scope="module")
def unquantised(text: Tensor) -> Tensor:
    return predicted(load(None, torch.float32), text)


def with_rounded_inputs(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """As a device that multiplies e4m3 by e4m3, for which codes of int4 become e4m3."""
    codes, scale = quantise_rows(x.flatten(0, -2))
    rounded = (codes.float() * scale).view(x.shape)
    if weight.format.storage != "int4":
        return product(rounded, weight, bias)
    own, of_rows = matrices.weight_in_e4m3(weight.format, weight.codes, weight.scale, weight.zeros)
    return F.linear(rounded, own.float() * of_rows, bias)


@pytest.mark.parametrize("kind", LIMITS)
def test_the_text_is_predicted_as_well(
    kind: str, text: Tensor, unquantised: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "inputs" in kind:
        monkeypatch.setattr(linear_module, "product", with_rounded_inputs)
    got, next_ids = predicted(load(kind, torch.float32), text), text[:, 1 : LENGTH + 1].reshape(-1, 1)
    divergence = divergence_of(unquantised, got)
    equal = (unquantised.argmax(-1) == got.argmax(-1)).float().mean().item()
    grown = (unquantised.gather(1, next_ids) - got.gather(1, next_ids)).mean().expm1().item()
    print(f"{kind}: mean KL divergence {divergence:.6f}, equal first choices {equal:.4f}, perplexity {grown:+.4%}")
    limits = LIMITS[kind]
    assert 0.0 < divergence <= limits.divergence
    assert equal >= limits.equal
    assert grown <= limits.perplexity


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_products_in_bfloat16_are_those_of_dequantised_weights(kind: str, text: Tensor) -> None:
    """Steps of many rows here; tests of the products have steps of few."""
    quantised, plain = load(kind, torch.bfloat16), load(None, torch.bfloat16)
    # In float32 the CPU keeps codes as they were read.
    own = [module for module in load(kind, torch.float32).modules() if isinstance(module, Linear)]
    meant = [module for module in plain.modules() if isinstance(module, Linear)]
    for one, other in zip(own, meant, strict=True):
        other.weight.data.copy_(dequantised(one.rows(0, one.out_features), torch.float32))
    divergence = divergence_of(predicted(plain, text), predicted(quantised, text))
    print(f"{kind}: mean KL divergence {divergence:.6f} from its dequantised weights")
    assert divergence < 3e-4
