"""The steps of an engine without a device: every bucket runs once on fake tensors, which have a shape and no memory.

Owns what stands in for the device, and the operators that must run as they do there rather than be imagined. What
happens meanwhile is the caller's: `graphgen.worker.ahead` records which Triton kernels are launched. For a process that
does nothing else.
"""

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import msgspec
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from graphgen.launch.launch_config import LaunchConfig
from graphgen.models.attention import planned
from graphgen.models.decoder import Decoder, num_unlike
from graphgen.models.formats.linear import Linear
from graphgen.models.spec import ModelSpec
from graphgen.worker.backend import open_backend
from graphgen.worker.step_parts import StepParts, StepShapes

_DEVICE = torch.device("cuda", 0)
_NUM_MULTIPROCESSORS = 132
"""Of an H100 or H200; it decides how many programs are launched, not which."""


def run_dry(config: LaunchConfig, capability: tuple[int, int]) -> None:
    """Runs a step of every bucket, and what the runner runs beside steps. capability: of the device to be thought of.

    Raises what opening the attention backend raises for a config that this device cannot serve.
    """
    # By its name: "auto" would fall back on the reference, whose kernels are torch's, and take minutes here.
    config = msgspec.structs.replace(config, spec=_shortened(config.spec), num_ranks=1, attention="flashinfer")
    fake = FakeTensorMode()
    with _stand_in(capability), torch.inference_mode(), fake, _RealBesideFake(fake):
        shapes, dtype = StepShapes(config), getattr(torch, config.dtype)
        backend = open_backend(config, _DEVICE, dtype, shapes.buckets, shapes.bounds)
        decoder = Decoder(config.spec, dtype, _DEVICE, backend.runs_fused_layers)
        for module in decoder.modules():
            if isinstance(module, Linear):
                module.settle(dtype)
        parts = StepParts(config, shapes, decoder, backend, _DEVICE, None)
        kv_cache = parts.open_kv_cache(shapes.bounds.most_pages)
        make_step = parts.step_maker(kv_cache, parts.open_slots(kv_cache))
        for shape in shapes.largest_first(shapes.buckets):
            make_step(shape)()
        parts.scoring_step()()
        kv_cache.copy_pages(torch.zeros(1, 2, dtype=torch.int32, device=_DEVICE))
        parts.sampler.write_masks(torch.zeros(4, dtype=torch.int32, device=_DEVICE), 1)


def _shortened(spec: ModelSpec) -> ModelSpec:
    """Without the layers that are as others are."""
    return msgspec.structs.replace(spec, layers=spec.layers[: num_unlike(spec.layers)])


class _RealBesideFake(TorchDispatchMode):
    """Only what is of the device is fake: tensors of the host are real, since numbers are read from them. And our own
    operators run as on CUDA, where fake tensors would have their results imagined."""

    def __init__(self, fake: FakeTensorMode) -> None:
        """fake: the mode below this one."""
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self._fake = fake

    def _imagined(self, value: object) -> object:
        if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
            return value
        return self._fake.from_tensor(value, static_shapes=True)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        # One that has a single form for all devices launches no kernel of ours.
        if func.namespace == "graphgen" and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CUDA"):
            with self:
                return func._op_dk(torch._C.DispatchKey.CUDA, *args, **named)
        device = named.get("device")
        is_fake = any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, named)))
        if is_fake or (device is not None and torch.device(device).type == "cuda"):
            return func(*tree_map(self._imagined, args), **tree_map(self._imagined, named))
        named = {name: value for name, value in named.items() if name != "pin_memory"}  # which only a driver can do
        with unset_fake_temporarily():
            return func(*args, **named)


class _NoFunctions:
    """FlashInfer's functions of a region, see PlannedFunctions: they plan nothing and compute nothing."""

    plan_tail = ()

    def paged_run(self, *arguments: object) -> None: ...

    def run_tail(self, scoring: object) -> tuple[()]:
        return ()


class _NoConstants(dict[Any, list[int]]):
    """Launch constants of shapes that were never planned."""

    def __missing__(self, key: object) -> list[int]:
        return [0]


@contextlib.contextmanager
def _stand_in(capability: tuple[int, int]) -> Iterator[None]:
    """What is asked of a device and its streams while steps are made and run."""
    from graphgen.models import page_copy  # imports Triton

    with contextlib.ExitStack() as stack:

        def replace(where: Any, **functions: Callable[..., Any]) -> None:
            for name, function in functions.items():
                stack.enter_context(mock.patch.object(where, name, function))

        stream = SimpleNamespace(wait_stream=lambda other: None)
        replace(
            torch.cuda,
            is_available=lambda: False,  # nothing may make a context
            current_device=lambda: 0,
            get_device_capability=lambda device=None: capability,
            get_device_properties=lambda device=None: SimpleNamespace(multi_processor_count=_NUM_MULTIPROCESSORS),
            current_stream=lambda device=None: stream,
            Stream=lambda device=None: stream,
            stream=lambda stream: contextlib.nullcontext(),
        )
        replace(planned, _functions=lambda *arguments: _NoFunctions())
        replace(page_copy, addresses_of=lambda tensors: torch.empty(len(tensors), dtype=torch.int64, device=_DEVICE))
        made = planned.PlannedRegion.__init__

        def make(region: Any, *arguments: Any, **named: Any) -> None:
            made(region, *arguments, **named)
            region._constants = _NoConstants()

        replace(planned.PlannedRegion, __init__=make)
        yield
