"""Which kernels a model needs, and that a start builds only what lies nowhere and leaves it for the next."""

import importlib.util
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch

from graphgen.ipc.errors import ConfigError, UnsupportedModelError
from graphgen.models.attention.kernels import (
    AttentionShape,
    Kernel,
    KernelFolder,
    Library,
    PlannedLibrary,
    Source,
    XqaLibrary,
    _loading_from,
    arch_of,
    best_kernels,
    build_libraries,
    check_supported,
    describe_sources,
    load_libraries,
    needed_libraries,
    parse_arch,
)
from tests.models.fake_flashinfer import SOME_LIBRARY, VERSION, FakeFlashInfer

HOPPER = (9, 0)


def shape(windows: tuple[int, ...] = (0,), head_dim: int = 128, dtype: torch.dtype = torch.bfloat16) -> AttentionShape:
    return AttentionShape(num_heads=32, num_kv_heads=8, head_dim=head_dim, page_size=64, dtype=dtype, windows=windows)


@pytest.fixture
def flashinfer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeFlashInfer:
    monkeypatch.setenv("GRAPHGEN_CACHE", str(tmp_path / "caches"))
    return FakeFlashInfer(tmp_path, monkeypatch)


@pytest.fixture
def folder(flashinfer: FakeFlashInfer) -> KernelFolder:
    return KernelFolder.of("9.0a")


@pytest.fixture
def libraries() -> list[Library]:
    return needed_libraries(shape(), [Kernel.FA3, Kernel.XQA])


def test_hopper_needs_fa3_for_each_kind_of_window() -> None:
    full, windowed = (PlannedLibrary("fa3", torch.bfloat16, 128, windowed) for windowed in (False, True))
    assert needed_libraries(shape(), best_kernels(HOPPER)) == [full]
    # Windows of two lengths run the same kernels.
    assert needed_libraries(shape((0, 512, 4096)), best_kernels(HOPPER)) == [full, windowed]


def test_each_decode_kernel_needs_its_library() -> None:
    xqa = [XqaLibrary(torch.bfloat16, 64, 128, 4, windowed) for windowed in (False, True)]
    assert needed_libraries(shape((0, 512)), [Kernel.XQA]) == xqa
    assert needed_libraries(shape((0, 512)), [Kernel.SPLIT_KV]) == []


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_other_architectures_need_one_fa2_library(capability: tuple[int, int]) -> None:
    assert needed_libraries(shape(), best_kernels(capability)) == [PlannedLibrary("fa2", torch.bfloat16, 128, False)]


def test_shapes_without_kernels_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="head_dim is 80"):
        check_supported(shape(head_dim=80))
    with pytest.raises(ConfigError, match="float32"):
        check_supported(shape(dtype=torch.float32))


@pytest.mark.parametrize(
    ("text", "capability", "arch"),
    [("9.0a", (9, 0), "9.0a"), ("9.0", (9, 0), "9.0a"), ("8.6", (8, 6), "8.6"), ("12.0", (12, 0), "12.0f")],
)
def test_architectures_are_read_and_completed(text: str, capability: tuple[int, int], arch: str) -> None:
    assert parse_arch(text) == capability
    assert arch_of(capability) == arch


@pytest.mark.parametrize("text", ["", "90a", "9", "9.0.0", "sm_90", "7.5", "8.0a", "9.0b"])
def test_architectures_that_cannot_be_meant_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="arch is"):
        parse_arch(text)


def test_the_first_start_builds_all_in_one_run_and_the_second_builds_nothing(
    flashinfer: FakeFlashInfer, folder: KernelFolder, libraries: list[Library]
) -> None:
    names = [library.spec().name for library in libraries]
    assert load_libraries(libraries, folder) == [Source.BUILT, Source.BUILT]
    assert flashinfer.built == [names]

    flashinfer.forget()
    shutil.rmtree(flashinfer.build_folder)
    flashinfer.build_error = FileNotFoundError("ninja")
    assert load_libraries(libraries, folder) == [Source.PREBUILT, Source.PREBUILT]
    assert flashinfer.built == []
    assert flashinfer.loaded == [folder.library_path(name) for name in names]


def test_the_folder_is_of_one_version_and_one_architecture(flashinfer: FakeFlashInfer, tmp_path: Path) -> None:
    assert KernelFolder.of("8.0").path == tmp_path / "caches" / "kernels" / VERSION / "8.0"


def test_prebuilding_loads_nothing_and_the_worker_then_builds_nothing(
    flashinfer: FakeFlashInfer, folder: KernelFolder, libraries: list[Library]
) -> None:
    names = [library.spec().name for library in libraries]
    assert build_libraries(libraries, folder) == dict.fromkeys(names, Source.BUILT)
    assert flashinfer.loaded == []
    assert build_libraries(libraries, folder) == dict.fromkeys(names, Source.PREBUILT)
    assert flashinfer.built == [names]
    assert load_libraries(libraries, folder) == [Source.PREBUILT, Source.PREBUILT]


def test_kernels_of_the_package_are_used_where_they_are(
    flashinfer: FakeFlashInfer, folder: KernelFolder, libraries: list[Library]
) -> None:
    packaged = libraries[0].spec().aot_path
    packaged.parent.mkdir(parents=True)
    shutil.copyfile(SOME_LIBRARY, packaged)
    assert load_libraries(libraries, folder) == [Source.PACKAGED, Source.BUILT]
    assert packaged in flashinfer.loaded
    assert not folder.library_path(libraries[0].spec().name).exists()


def test_flashinfer_looks_in_its_own_folder_again_afterwards(
    flashinfer: FakeFlashInfer, folder: KernelFolder, libraries: list[Library]
) -> None:
    before = flashinfer.env.FLASHINFER_AOT_DIR
    load_libraries(libraries, folder)
    flashinfer.forget()
    flashinfer.unloadable.add(folder.library_path(libraries[0].spec().name))
    flashinfer.build_error = RuntimeError("no nvcc")
    with pytest.raises(ConfigError):
        load_libraries(libraries, folder)
    after = flashinfer.env.FLASHINFER_AOT_DIR
    assert after == before


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_a_damaged_kernel_is_built_again_and_replaced(
    flashinfer: FakeFlashInfer,
    folder: KernelFolder,
    libraries: list[Library],
    damage: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    load_libraries(libraries, folder)
    path = folder.library_path(libraries[0].spec().name)
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "text": b"no library" * 1000}[damage])
    flashinfer.forget()
    with caplog.at_level(logging.WARNING, "graphgen.kernels"):
        assert load_libraries(libraries, folder) == [Source.BUILT, Source.PREBUILT]
    assert str(path) in caplog.text
    assert path.read_bytes() == whole


def test_prebuilding_replaces_a_damaged_kernel(
    flashinfer: FakeFlashInfer, folder: KernelFolder, libraries: list[Library]
) -> None:
    build_libraries(libraries, folder)
    name = libraries[1].spec().name
    os.truncate(folder.library_path(name), 5000)
    assert build_libraries(libraries, folder)[name] is Source.BUILT
    assert folder.library_path(name).stat().st_size == SOME_LIBRARY.stat().st_size


def test_a_folder_that_cannot_be_written_stops_prebuilding_but_no_start(
    flashinfer: FakeFlashInfer, libraries: list[Library], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    folder = KernelFolder(tmp_path / "file")
    with pytest.raises(ConfigError, match="cannot be written"):
        build_libraries(libraries, folder)
    with caplog.at_level(logging.WARNING, "graphgen.kernels"):
        assert load_libraries(libraries, folder) == [Source.BUILT, Source.BUILT]
    assert [path.parent.parent for path in flashinfer.loaded] == [flashinfer.build_folder] * 2
    assert "was not kept" in caplog.text


def test_a_failed_build_says_what_is_missing_and_what_to_do(
    flashinfer: FakeFlashInfer, folder: KernelFolder, libraries: list[Library]
) -> None:
    flashinfer.build_error = RuntimeError("\n".join(f"line {number}" for number in range(100)))
    with pytest.raises(ConfigError) as caught:
        load_libraries(libraries, folder)
    message = str(caught.value)
    assert libraries[0].spec().name in message
    assert "graphgen prebuild" in message
    assert message.endswith("line 99")
    assert "line 50" not in message


def test_keeping_leaves_no_partial_file(
    flashinfer: FakeFlashInfer, folder: KernelFolder, libraries: list[Library], tmp_path: Path
) -> None:
    build_libraries(libraries, folder)
    with pytest.raises(FileNotFoundError):
        folder.keep("absent", tmp_path / "absent.so")
    files = [path.name for path in folder.path.rglob("*") if path.is_file()]
    assert sorted(files) == sorted(f"{library.spec().name}.so" for library in libraries)


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ([Source.PREBUILT, Source.PREBUILT], "kernels prebuilt"),
        ([Source.BUILT, Source.PREBUILT, Source.BUILT], "kernels: 1 prebuilt, 2 built now"),
    ],
)
def test_the_sources_are_told(sources: list[Source], words: str) -> None:
    assert describe_sources(sources) == words


@pytest.fixture
def real_flashinfer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("flashinfer") is None:
        pytest.skip("FlashInfer is not installed")
    monkeypatch.setenv("FLASHINFER_CUDA_ARCH_LIST", "9.0a")
    monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", str(tmp_path))


@pytest.mark.usefixtures("real_flashinfer")
def test_flashinfer_itself_finds_a_library_in_our_folder_and_only_while_asked(
    tmp_path: Path, libraries: list[Library]
) -> None:
    """What the stand-in above assumes, held against the installed version."""
    folder = KernelFolder(tmp_path)
    specs = [library.spec() for library in libraries]
    assert len({spec.name for spec in specs}) == 2
    for spec in specs:
        assert not spec.is_aot
        folder.keep(spec.name, SOME_LIBRARY)
        with _loading_from(folder.path):
            assert spec.is_aot
            assert spec.get_library_path() == folder.library_path(spec.name)
        assert not spec.is_aot
        assert spec.jit_library_path.name == f"{spec.name}.so"
