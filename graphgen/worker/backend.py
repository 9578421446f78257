"""Which attention kernels serve this device: chosen once, at the start.

Owns the choice; the backends are in graphgen.models.attention.
"""

from typing import NamedTuple

import torch

from graphgen.ipc.errors import ConfigError, GraphgenError, UnsupportedModelError
from graphgen.ipc.step_schema import StepBounds
from graphgen.ipc.worker_messages import Bucket
from graphgen.launch.launch_config import LaunchConfig
from graphgen.models.attention.backend import AttentionBackend
from graphgen.models.attention.kernels import AttentionShape, Scores
from graphgen.models.attention.reference import TorchAttention
from graphgen.models.attention.variant import AttentionVariant, Numbers, Scoring
from graphgen.models.layers import variant_of
from graphgen.models.spec import GQA, Latent, ModelSpec, kv_format

MOST_CHUNK_PAGES = 1024
"""65 536 positions on CUDA: 256 MiB of plain pages for heads as those of Llama 3.1 8B."""

_LEAST_FP8 = (8, 9)
"""Of compute capability: Triton converts e4m3 from there on."""


def open_backend(
    config: LaunchConfig,
    device: torch.device,
    dtype: torch.dtype,
    buckets: tuple[Bucket, ...],
    bounds: StepBounds,
) -> AttentionBackend:
    """The backend the config asks for; "auto" takes the fast kernels, FlashInfer's and ours, and says why where they
    cannot run."""
    if config.attention == "torch":
        return _open_torch(config, device, "as configured")
    if device.type != "cuda":
        if config.attention == "flashinfer":
            raise GraphgenError(
                f"attention is 'flashinfer', which needs CUDA, device is {device}: use attention='torch'"
            )
        return _open_torch(config, device, "the CPU has no other")
    check_kv_format(config.kv_format, torch.cuda.get_device_capability(device))
    try:
        most = _Most(
            chunks=bounds.max_chunks,
            prefill_rows=max(bucket.prefill_rows for bucket in buckets),
            decode_rows=max(bucket.decode_rows for bucket in buckets),
        )
        if (latent := config.rank_spec.latent) is not None:
            return _open_latent(config, latent, device, dtype, most)
        return _open_flashinfer(config, dtype, most)
    except (ImportError, GraphgenError) as error:
        if config.attention == "flashinfer":
            raise
        return TorchAttention(f"the fast kernels cannot be used: {error}")


def _open_torch(config: LaunchConfig, device: torch.device, reason: str) -> AttentionBackend:
    """reason: why it was chosen."""
    return TorchAttention(reason, config.page_size if device.type == "cpu" and not config.compile else None)


def check_kv_format(name: str, capability: tuple[int, int]) -> None:
    """Raises ConfigError for keys and values that no kernel can read on a device of that compute capability."""
    if name == "fp8" and capability < _LEAST_FP8:
        raise ConfigError(
            f"kv_cache_dtype is 'fp8', which needs compute capability {'.'.join(map(str, _LEAST_FP8))}, this device has"
            f" {'.'.join(map(str, capability))}: use 'int8'"
        )


def attention_shape(config: LaunchConfig, dtype: torch.dtype) -> AttentionShape:
    """What FlashInfer's kernels are built for with this config."""
    spec = config.rank_spec
    return AttentionShape(
        num_heads=spec.attention.num_heads,
        num_kv_heads=spec.attention.num_kv_heads,
        head_dim=spec.attention.width,
        page_size=config.page_size,
        dtype=dtype,
        windows=tuple(sorted({window or 0 for window in spec.windows})),
        scores=_scores(spec),
    )


def _scores(spec: ModelSpec) -> Scores | None:
    """Which of FlashInfer's libraries the layers need; None where it has none for all of them."""
    mixers = dict.fromkeys(layer.mixer for layer in spec.layers if isinstance(layer.mixer, GQA))
    variants = [_variant(mixer) for mixer in mixers]
    try:
        found = {Scores.of(Scoring(Numbers.unpacked(numbers), *tensors)) for numbers, *tensors in variants}
    except UnsupportedModelError:
        return None
    return found.pop() if len(found) == 1 else None


def _variant(mixer: GQA) -> AttentionVariant:
    """With any numbers for learned ones."""
    heads = range(mixer.num_heads)
    return variant_of(mixer, heads, torch.zeros(mixer.num_heads) if mixer.sinks else None)


class _Most(NamedTuple):
    """What a step may hold."""

    chunks: int
    prefill_rows: int
    decode_rows: int


def _open_flashinfer(config: LaunchConfig, dtype: torch.dtype, most: _Most) -> AttentionBackend:
    from graphgen.models.attention.flashinfer import FlashInferAttention

    shape = attention_shape(config, dtype)
    return FlashInferAttention(
        shape,
        most.chunks,
        most.prefill_rows,
        most.decode_rows,
        most_quantised_pages=most_chunk_pages(config, most.chunks) if kv_format(config.kv_format).quantised else 0,
    )


def most_chunk_pages(config: LaunchConfig, most_chunks: int) -> int:
    """Quantised pages that the chunks of a step may see together: what any step's see, or what few steps' go beyond and
    one context of any length does not."""
    of_context = -(-config.max_model_len // config.page_size)
    return min(most_chunks * of_context, max(of_context, MOST_CHUNK_PAGES))


def _open_latent(
    config: LaunchConfig, latent: Latent, device: torch.device, dtype: torch.dtype, most: _Most
) -> AttentionBackend:
    from graphgen.models.attention.latent_tiles import LatentTiles
    from graphgen.models.attention.row_tiles import TileShape

    shape = TileShape(latent.num_heads, 1, latent.latent_size, latent.rope_dim)
    return LatentTiles(shape, config.page_size, dtype, *most, device)
