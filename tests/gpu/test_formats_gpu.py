"""Products with quantised weights: the kernels of few rows and the products of many, against the reference in torch."""

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from msgspec.structs import replace
from torch import Tensor
from torch.fx.experimental import _config as symbolic_shapes_config

from graphgen.models.activations import ACTIVATIONS
from graphgen.models.few_rows_layers import IN_KERNELS
from graphgen.models.formats import matrices
from graphgen.models.formats.as_they_lie import BLOCK
from graphgen.models.formats.layout import unpack_int4
from graphgen.models.formats.linear import Linear
from graphgen.models.formats.products import Weight, product, quantise_rows
from graphgen.models.gated import gated_product
from graphgen.models.normed import Normed
from graphgen.models.norms import RMSNorm
from graphgen.models.spec import Norm
from graphgen.models.spec.formats import LinearFormat
from tests.models.format_cases import E4M3, FORMATS, INT4, matrix, random_weight

TOLERANCE = 4e-3  # relative norm: one rounding to bfloat16 of a float32 sum
OF_E4M3 = 0.04  # of an input with three bits of mantissa
EPS = 1e-5


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def random_norm(size: int) -> RMSNorm:
    norm = RMSNorm(size, Norm(eps=EPS), torch.bfloat16).cuda()
    assert norm.weight is not None
    norm.weight.data.normal_(1.0, 0.3)
    return norm


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def on_cuda(form: LinearFormat, size: int, depth: int) -> Weight:
    return random_weight(form, size, depth, "cuda")


@pytest.mark.parametrize("num_rows", [1, 7, 8, 9, 16, 17, 64])
@pytest.mark.parametrize("name", FORMATS)
def test_few_rows_are_multiplied_with_the_weight_that_the_codes_mean(name: str, num_rows: int) -> None:
    from graphgen.models import few_rows

    for size, depth in ((1024, 1024), (96, 1152), (352, 128)):
        weight, bias = on_cuda(FORMATS[name], size, depth), randn(size)
        x, residual, norm = randn(num_rows, depth), randn(num_rows, size), random_norm(size)
        sums, normed = few_rows.adding_linear(x, weight, bias, residual, norm, chained=True)
        want = residual.float() + F.linear(x.float(), matrix(weight), bias.float())
        assert relative_error(sums, want) < TOLERANCE, (size, depth)
        assert relative_error(normed.squares.sum(1), sums.float().pow(2).sum(1)) < 1e-5


@pytest.mark.parametrize("depth", [4096, 7936, 14336])
@pytest.mark.parametrize(
    "form", [form for form in FORMATS.values() if form.storage == "int4"], ids=lambda form: form.name
)
def test_one_row_is_multiplied_in_as_many_turns_as_it_takes(form: LinearFormat, depth: int) -> None:
    from graphgen.models import few_rows

    weight, x, norm = on_cuda(form, 96, depth), randn(1, depth), random_norm(96)
    for scale in (1.0, 0.0):
        nothing = torch.zeros(1, 96, device="cuda", dtype=torch.bfloat16)
        sums, _ = few_rows.adding_linear(x * scale, weight, None, nothing, norm, chained=True)
        want = F.linear(x.float() * scale, matrix(weight)).bfloat16()
        # Few of the 96 round otherwise, each of which is up to 8e-4 of them all.
        assert relative_error(sums, want) < 2e-3 if scale else torch.equal(sums, want)


@pytest.mark.parametrize("num_rows", [1, 7, 16, 64])
@pytest.mark.parametrize("form", [E4M3, INT4, *list(FORMATS.values())[2:4]], ids=lambda form: form.name)
def test_norms_and_activations_meet_the_product(form: LinearFormat, num_rows: int) -> None:
    from graphgen.models import few_rows

    size, depth = 1408, 1024
    x, norm, weight, bias = randn(num_rows, depth), random_norm(depth), on_cuda(form, 2 * size, depth), randn(2 * size)
    assert norm.weight is not None
    scaled = (x.float() * norm.weight.float()).bfloat16()
    normed = Normed(scaled, x.float().pow(2).unflatten(1, (4, -1)).sum(-1))
    over_rms = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)
    both = F.linear(scaled.float(), matrix(weight)) * over_rms + bias.float()
    assert relative_error(few_rows.normed_linear(normed, EPS, weight, bias, chained=True), both) < TOLERANCE
    gate, up = both.chunk(2, dim=-1)
    got = few_rows.gated_linear(normed, EPS, weight, bias, "silu", chained=True)
    assert relative_error(got, ACTIVATIONS["silu"](gate) * up) < 2 * TOLERANCE


@pytest.mark.parametrize("storage", ["e4m3", "int8", "int4"])
@pytest.mark.parametrize("conversion", [0, 1, 2])
@pytest.mark.parametrize("slices", [0, 4])
def test_every_code_becomes_its_number(storage: str, conversion: int, slices: int) -> None:
    """Each of 256 bytes, times a one and zeros: the number itself, exact."""
    from graphgen.models import few_rows
    from graphgen.models.few_rows_tiles import Shape

    shape = Shape(32, 128, slices, warps=4, stages=3, early=False, conversion=conversion)
    codes = torch.arange(256, device="cuda", dtype=torch.uint8).repeat(32, 2)
    if storage == "e4m3":
        codes = torch.where(codes & 127 == 127, 0, codes).to(torch.uint8)  # two are not numbers
    dtype = {"e4m3": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}[storage]
    form = LinearFormat(storage=storage)  # type: ignore[arg-type]  # one of the three
    scale = torch.ones(32, 1, device="cuda")
    weight = Weight(form, codes.view(dtype), scale, None, None)
    numbers = unpack_int4(codes).float() - 8 if storage == "int4" else weight.codes.float()
    depth = numbers.shape[1]
    squares = torch.full((8, 1), float(depth), device="cuda")
    for first in range(0, depth, 8):
        x = torch.zeros(8, depth, device="cuda", dtype=torch.bfloat16)
        x[torch.arange(8), first + torch.arange(8)] = 1.0
        got = few_rows.normed_linear(Normed(x, squares), 0.0, weight, None, False, shape)
        assert torch.equal(got.float(), numbers[:, first : first + 8].t())


@pytest.mark.parametrize("num_rows", [1, 7, 16, 64, 65, 512])
@pytest.mark.parametrize("name", FORMATS)
def test_many_rows_are_multiplied_as_exactly_as_their_format_lets(name: str, num_rows: int) -> None:
    form = FORMATS[name]
    rounds = torch.cuda.get_device_capability() >= (8, 9) and form.rounds_input
    limit = 2 * OF_E4M3 if rounds and form.storage == "int4" else OF_E4M3 if rounds else 2 * TOLERANCE
    for size, depth in ((1024, 1024), (352, 1408)):
        weight, x, bias = on_cuda(form, size, depth), randn(num_rows, depth), randn(size)
        want = F.linear(x.float(), matrix(weight), bias.float())
        got = product(x, weight, bias)
        assert got.dtype == x.dtype
        assert relative_error(got, want) < limit, (size, depth)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="the kernel is for SM90"
)
@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize(("size", "depth"), [(1024, 1024), (352, 1408), (6144, 4096), (28672, 4096), (4096, 14336)])
@pytest.mark.parametrize("num_rows", [1, 17, 64, 65, 127, 192, 256])
def test_few_rows_in_e4m3_are_as_of_the_library(num_rows: int, size: int, depth: int, blocked: bool) -> None:
    """But for the order of sums, which the tensor cores keep to 14 bits."""
    from graphgen.models.formats import few_rows_e4m3, products

    if not few_rows_e4m3.serves(num_rows, size, depth):
        pytest.skip("the library makes this product")
    codes, x = randn(size, depth).to(torch.float8_e4m3fn), randn(num_rows, depth)
    if blocked:
        left, of_left = products.quantise_blocks(x)
        scale = torch.rand(-(-size // BLOCK), depth // BLOCK, device="cuda") + 0.5
        wide = left.float() * of_left.t().repeat_interleave(BLOCK, 1)
        weight = codes.float() * scale.repeat_interleave(BLOCK, 0)[:size].repeat_interleave(BLOCK, 1)
        got = torch.ops.graphgen.product_by_blocks(left, of_left, codes, scale, torch.bfloat16)
    else:
        left, of_left = products.quantise_rows(x)
        scale = torch.rand(size, 1, device="cuda") + 0.5
        wide, weight = left.float() * of_left, codes.float() * scale
        got = torch.ops.graphgen.product_by_rows(left, of_left, codes, scale, None, torch.bfloat16)
    assert relative_error(got, (wide.double() @ weight.double().T)) < 2 * TOLERANCE


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="the kernel is for SM90"
)
@pytest.mark.parametrize("group", [64, 128, 512, None])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("size", "depth"), [(96, 512), (1072, 1536), (6144, 4096), (28672, 4096), (4096, 14336)])
def test_few_rows_are_multiplied_with_int4_as_it_lies(size: int, depth: int, zeros: bool, group: int | None) -> None:
    """Only the sums are rounded: see test_few_rows_in_e4m3_are_as_of_the_library."""
    from graphgen.models.formats import few_rows_int4, products

    weight, bias = on_cuda(LinearFormat(storage="int4", group=group, zeros=zeros), size, depth), randn(size)
    stored, meant = (weight.codes, weight.scale, weight.zeros, group or 0, 1), matrix(weight).double()
    for num_rows in (1, 16, 17, 33, 64, 65, 128):
        left, of_left = products.quantise_rows(randn(num_rows, depth))
        want = (left.double() * of_left) @ meant.t() + bias
        for _ in range(2):
            got = torch.ops.graphgen.product_of_int4(left, of_left, *stored, bias, torch.bfloat16)
            assert relative_error(got, want) < TOLERANCE, num_rows
            assert not few_rows_int4._counters(left.device).any()


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="the kernel is for SM90"
)
@pytest.mark.parametrize("zeros", [False, True])
def test_every_code_of_int4_is_multiplied_exactly_in_e4m3(zeros: bool) -> None:
    """Each of 256 bytes, times a one and zeros."""
    from graphgen.models.formats import few_rows_int4

    codes = torch.arange(256, device="cuda", dtype=torch.uint8).repeat(64, 1)
    zero = torch.arange(256, device="cuda").reshape(64, 4).remainder(16).byte() if zeros else None
    scale = torch.ones(64, 4, device="cuda")
    weight = Weight(LinearFormat(storage="int4", group=128, zeros=zeros), codes, scale, zero, None)
    cut = few_rows_int4.Cut(64, 64, 128, splits=2, warps=4, stages=3)
    for first in range(0, 512, 128):
        left = torch.eye(512, device="cuda")[first : first + 128].to(torch.float8_e4m3fn)
        ones, stored = torch.ones(128, 1, device="cuda"), (codes, scale, zero, 128, None)
        got = few_rows_int4.product(left, ones, *stored, torch.float32, chained=True, chosen=cut)
        assert torch.equal(got, matrix(weight)[:, first : first + 128].t())


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form.storage != "e4m3"])
def test_the_kernel_makes_the_matrix_of_the_reference(name: str) -> None:
    form, on_cpu = FORMATS[name], random_weight(FORMATS[name], 1030, 1408)
    tensors = on_cpu.codes, on_cpu.scale, on_cpu.zeros
    moved = tensors[0].cuda(), tensors[1].cuda(), None if tensors[2] is None else tensors[2].cuda()
    codes, scale = (tensor.cpu() for tensor in matrices.weight_in_e4m3(form, *moved))
    want_codes, want_scale = matrices.weight_in_e4m3(form, *tensors)
    assert torch.equal(scale, want_scale)
    assert torch.equal(codes.float(), want_codes.float())
    made = matrices.weight_matrix(form, *moved, torch.bfloat16)
    want = matrices.weight_matrix(form, *tensors, torch.bfloat16)
    assert torch.equal(made.cpu(), want)


@pytest.mark.parametrize("form", [form for form in FORMATS.values() if form.storage != "e4m3"], ids=lambda f: f.name)
def test_integer_codes_may_be_multiplied_in_e4m3(form: LinearFormat) -> None:
    if form.permuted:
        pytest.skip("tested as the same format in order")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("products of e4m3 need compute capability 8.9 (Ada, Hopper) and are tested there")
    weight, x = on_cuda(form, 1024, 1024), randn(100, 1024)
    rounded = weight._replace(format=replace(form, activation="e4m3"))
    assert relative_error(product(x, rounded, None), F.linear(x.float(), matrix(weight))) < 2 * OF_E4M3


@pytest.mark.parametrize("form", [E4M3, INT4, list(FORMATS.values())[2]], ids=lambda form: form.name)
def test_products_are_captured_and_replayed(form: LinearFormat) -> None:
    from graphgen.models import few_rows

    weight, norm = on_cuda(form, 512, 512), random_norm(512)
    few, many, residual = randn(3, 512), randn(70, 512), randn(3, 512)

    def run() -> tuple[Tensor, Tensor]:
        sums, _ = few_rows.adding_linear(few, weight, None, residual, norm, chained=True)
        return sums, product(many, weight, None)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            results = run()
        for _ in range(3):
            few.normal_()
            many.normal_()
            graph.replay()
            got = [result.clone() for result in results]
            assert all(torch.equal(one, other) for one, other in zip(got, run(), strict=True))


@pytest.mark.parametrize("form", [E4M3, INT4, list(FORMATS.values())[2]], ids=lambda form: form.name)
def test_compiled_products_are_one_graph_for_any_number_of_rows(form: LinearFormat) -> None:
    weight, norm = on_cuda(form, 512, 512), random_norm(512)
    num_graphs = 0
    inductor = torch._dynamo.lookup_backend("inductor")

    def counted(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        nonlocal num_graphs
        num_graphs += 1
        return inductor(graph, inputs)

    def run(x: Tensor, residual: Tensor) -> Tensor:
        return product(norm(x + residual), weight, None)

    compiled = torch.compile(run, fullgraph=True, backend=counted)
    with torch.inference_mode(), symbolic_shapes_config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        for num_rows in (70, 1, 8, 513):
            x, residual = randn(num_rows, 512), randn(num_rows, 512)
            for tensor in (x, residual):
                torch._dynamo.mark_dynamic(tensor, 0)
            assert relative_error(compiled(x, residual), run(x, residual)) < OF_E4M3
    assert num_graphs == 1


@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize("activation", IN_KERNELS)
@pytest.mark.parametrize(("num_rows", "columns"), [(1, 352), (17, 1536), (64, 14_336), (300, 16_384)])
def test_a_gated_activation_is_rounded_as_by_two_steps(
    num_rows: int, columns: int, activation: str, chained: bool
) -> None:
    from graphgen.models.gated_kernel import gated_rows

    inner = randn(num_rows, 2 * columns)
    inner[num_rows // 2, :] *= 0.0 if num_rows > 1 else 1.0
    codes, scale = gated_rows(inner, IN_KERNELS[activation], chained)
    gate, up = inner.chunk(2, dim=-1)
    want_codes, want_scale = quantise_rows(ACTIVATIONS[activation](gate) * up)
    same = codes.float() == want_codes.float()  # also 0 and -0, which a row of zeros may have either of
    # A last bit of the activation may make another scale, and with it other codes of that row.
    torch.testing.assert_close(scale, want_scale, rtol=2.0**-6, atol=0.0)
    equal = scale[:, 0] == want_scale[:, 0]
    assert float(equal.float().mean()) > 0.8 or num_rows == 1
    assert bool(same[equal].float().mean() > 0.99) or not equal.any()
    assert relative_error(codes.float() * scale, want_codes.float() * want_scale) < OF_E4M3 / 2


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("activation", IN_KERNELS)
def test_a_gated_row_with_what_is_not_finite_is_nan_alone(activation: str, broken: float) -> None:
    from graphgen.models.gated_kernel import gated_rows

    inner = randn(5, 2 * 1536)
    whole_codes, whole_scale = gated_rows(inner, IN_KERNELS[activation], chained=False)
    inner[2, 1536 + 700] = broken
    codes, scale = gated_rows(inner, IN_KERNELS[activation], chained=False)
    assert bool(codes[2].float().isnan().all() and scale[2].isnan())
    others = [0, 1, 3, 4]
    assert torch.equal(codes[others].float(), whole_codes[others].float())
    assert torch.equal(scale[others], whole_scale[others])


@pytest.mark.parametrize("form", [E4M3, INT4], ids=lambda form: form.name)
def test_a_gated_product_compiles_to_one_graph_for_any_number_of_rows(form: LinearFormat) -> None:
    down = Linear(1536, 512, bias=False, dtype=torch.bfloat16, format=form).cuda()
    weight = on_cuda(form, 512, 1536)
    down.weight.data, down.scale = weight.codes, torch.nn.Parameter(weight.scale, requires_grad=False)
    down.zeros = None if weight.zeros is None else torch.nn.Parameter(weight.zeros, requires_grad=False)
    graphs = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(gated_product, fullgraph=True, backend=graphs)
    for num_rows in (300, 64, 17, 1):
        inner = randn(num_rows, 3072)
        torch._dynamo.mark_dynamic(inner, 0)
        with symbolic_shapes_config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]  # made at import
            got = compiled(inner, "silu", down)
        gate, up = inner.chunk(2, dim=-1)
        want = F.linear(F.silu(gate.float()) * up.float(), matrix(weight))
        assert relative_error(got, want) < OF_E4M3
    assert graphs.frame_count == 1
