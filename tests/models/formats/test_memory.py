"""Quantising a checkpoint as it is loaded needs the memory of the result, one stored tensor, and no more."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from graphgen.models.families import load_spec
from graphgen.models.loader import load_decoder
from graphgen.models.spec import format_at_load
from tests.models import tiny

CPU = torch.device("cpu")


class Watch(TorchDispatchMode):
    """Counts the bytes of what operators return while it is alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place in self._known:
            return
        self._known.add(place)
        self.live += size
        self.most = max(self.most, self.live)
        weakref.finalize(storage, self._forget, place, size)

    def _forget(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.live -= size


@pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
def test_the_peak_is_the_result_and_a_tensor(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}
    tiny.save("llama", tmp_path, **sizes, num_attention_heads=4, num_key_value_heads=2)
    spec = load_spec(tmp_path)
    spec = spec.with_formats(lambda _, place: format_at_load(kind, place.num_columns))
    monkeypatch.setattr("graphgen.models.targets._SLAB_ELEMENTS", 2**14)
    with Watch() as watch:
        decoder = load_decoder(tmp_path, spec, torch.float32, CPU)
    held = sum(weight.nbytes for weight in decoder.parameters())
    largest = 256 * 1024 * 4  # as it is stored
    working = 2**14 * 4 * 8  # a slab in float32, several times over
    assert held <= watch.most <= held + largest + working, (held, watch.most)
