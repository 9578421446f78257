"""Where attention kernels are looked for, that a start builds only what lies nowhere and leaves it for the next, and
that FlashInfer's Python package is imported only when something must be built."""

import importlib.metadata
import importlib.util
import logging
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch

from graphgen.ipc.errors import ConfigError
from graphgen.models.attention.direct import NUM_SHARED, PlannedFunctions, _plan_tails, _run_tail
from graphgen.models.attention.kernels import Kernel, Library, PlannedLibrary, Scores, needed_libraries
from graphgen.models.attention.libraries import (
    KernelFolder,
    Source,
    _loading_from,
    build_libraries,
    describe_sources,
    load_libraries,
    package_to_load,
    planned_functions,
)
from graphgen.models.attention.variant import Numbers, Scoring
from tests.models.fake_flashinfer import FA3_NAME, SOME_LIBRARY, VERSION, FakeFlashInfer
from tests.models.test_kernels import shape

PLAIN = Scoring(Numbers(128**-0.5))
FA2 = PlannedLibrary("fa2", torch.bfloat16, 128, windowed=False)
FA3 = PlannedLibrary("fa3", torch.bfloat16, 128, windowed=False)


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
    assert (flashinfer.opened, flashinfer.loaded) == tuple([folder.library_path(name)] for name in names)


def test_the_folder_is_of_one_version_and_one_architecture(flashinfer: FakeFlashInfer, tmp_path: Path) -> None:
    assert KernelFolder.of("8.0").path == tmp_path / "caches" / "kernels" / VERSION / "8.0"


def test_prebuilding_loads_nothing_and_the_worker_then_builds_nothing(
    flashinfer: FakeFlashInfer, folder: KernelFolder, libraries: list[Library]
) -> None:
    names = [library.spec().name for library in libraries]
    assert build_libraries(libraries, folder) == dict.fromkeys(names, Source.BUILT)
    assert flashinfer.loaded == flashinfer.opened == []
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
    assert flashinfer.opened == [packaged]
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


def install(folder: KernelFolder, library: PlannedLibrary) -> Path:
    """The library lies ready in the folder."""
    folder.keep(library.name, SOME_LIBRARY)
    return folder.library_path(library.name)


def call(functions: PlannedFunctions, scoring: Scoring = PLAIN) -> tuple[object, ...]:
    """Calls both functions as a step does. Returns what `paged_run` was given behind the shared arguments."""
    functions.plan(*range(NUM_SHARED), *functions.plan_tail)
    tail = functions.run_tail(scoring)
    functions.paged_run(*range(NUM_SHARED), *tail)
    return tail


def test_the_name_formed_here_is_the_one_flashinfer_forms() -> None:
    assert FA3.name == FA3_NAME
    assert FA2.name == FA3_NAME.removesuffix("_sm90")


def test_a_start_with_all_kernels_ready_does_without_flashinfers_package(
    flashinfer: FakeFlashInfer, folder: KernelFolder
) -> None:
    paths = [install(folder, library) for library in (FA2, FA3)]
    flashinfer.uninstall()
    assert KernelFolder.of("9.0a") == folder
    assert package_to_load([FA2, FA3], folder) == "tvm_ffi"
    assert load_libraries([FA2, FA3], folder) == [Source.PREBUILT] * 2
    assert flashinfer.opened == paths
    assert call(planned_functions(FA3, folder)) == (None,) * 4 + (0.0, 128**-0.5, 1.0, 0)
    assert call(planned_functions(FA2, folder)) == (None,) * 8 + (0.0, 128**-0.5, 1.0, 1e-4, 0)


@pytest.mark.parametrize("backend", ["fa2", "fa3"])
def test_each_way_to_score_is_a_library_of_its_own_that_gets_what_it_needs(
    backend: Literal["fa2", "fa3"], flashinfer: FakeFlashInfer, folder: KernelFolder
) -> None:
    numbers, heads = Numbers(0.3, softcap=50.0), torch.arange(4.0)
    scorings = {
        Scores.SOFTCAP: (Scoring(numbers), (50.0, 0.3)),
        Scores.SINKS: (Scoring(numbers._replace(softcap=0.0), sinks=heads), (heads, 0.3)),
        Scores.ALIBI: (Scoring(numbers._replace(softcap=0.0), alibi_slopes=heads), (heads, 0.0, 0.3)),
    }
    names = set()
    for scores, (scoring, passed) in scorings.items():
        if (backend, scores) == ("fa3", Scores.ALIBI):
            continue
        assert Scores.of(scoring) is scores
        library = PlannedLibrary(backend, torch.bfloat16, 128, windowed=True, scores=scores)
        install(folder, library)
        names.add(library.name)
        tail = call(planned_functions(library, folder), scoring)
        assert [value for value in tail if value is not None][: len(passed)] == list(passed)
    flashinfer.uninstall()
    assert len(names) == (3 if backend == "fa2" else 2)


def test_what_a_library_takes_is_asked_once_and_again_of_another_file(
    flashinfer: FakeFlashInfer, folder: KernelFolder
) -> None:
    """The question takes more than a second of a start."""
    path = install(folder, FA2)
    load_libraries([FA2], folder)
    assert sorted(flashinfer.asked) == ["paged_run", "plan"]
    flashinfer.forget()
    functions = planned_functions(FA2, folder)
    assert flashinfer.opened == [path]
    assert flashinfer.asked == []
    assert functions.plan_tail == (-1, False, 0)
    path.write_bytes(path.read_bytes() + b"another build")
    flashinfer.extra_plan_types = ["int"]
    assert planned_functions(FA2, folder).plan_tail == (-1, False, 0, 0)
    assert sorted(flashinfer.asked) == ["paged_run", "plan"]
    (path.parent / "types.json").write_text("no document")
    assert planned_functions(FA2, folder).plan_tail == (-1, False, 0, 0)


def test_kernels_of_the_package_are_found_without_importing_it(
    flashinfer: FakeFlashInfer, folder: KernelFolder, tmp_path: Path
) -> None:
    path = install(KernelFolder(tmp_path / "site" / "flashinfer" / "data" / "aot"), FA3)
    flashinfer.uninstall()
    assert package_to_load([FA3], folder) == "tvm_ffi"
    assert load_libraries([FA3], folder) == [Source.PACKAGED]
    assert flashinfer.opened == [path]


@pytest.mark.parametrize("damaged", [False, True])
def test_the_package_is_imported_ahead_when_something_must_be_built(
    flashinfer: FakeFlashInfer, folder: KernelFolder, damaged: bool
) -> None:
    install(folder, FA2)
    if damaged:
        os.truncate(install(folder, FA3), 5000)
    assert package_to_load([FA2], folder) == "tvm_ffi"
    assert package_to_load([FA2, FA3], folder) == "flashinfer"


@pytest.mark.usefixtures("flashinfer")
def test_the_package_is_imported_ahead_for_xqa_which_is_called_through_it(folder: KernelFolder) -> None:
    (xqa,) = needed_libraries(shape(), [Kernel.XQA])
    folder.keep(xqa.spec().name, SOME_LIBRARY)
    assert package_to_load([xqa], folder) == "flashinfer"


@pytest.mark.parametrize("extra", ["int", "Optional<ffi.Tensor>"])
def test_a_library_that_takes_other_arguments_is_left_to_flashinfers_loader_and_not_built_again(
    flashinfer: FakeFlashInfer, folder: KernelFolder, extra: str
) -> None:
    path = install(folder, FA3)
    flashinfer.extra_run_types = [extra]
    assert load_libraries([FA3], folder) == [Source.PREBUILT]
    assert (flashinfer.loaded, flashinfer.built) == ([path], [])
    assert call(planned_functions(FA3, folder)) == (
        *(None,) * 6,
        *(0.0, 128**-0.5),
        *(None,) * 3,
        *(1.0, 1e4, 0, 0),
    )


def test_a_plan_of_version_0_7_gets_its_further_argument(flashinfer: FakeFlashInfer, folder: KernelFolder) -> None:
    install(folder, FA2)
    flashinfer.extra_plan_types = ["int"]
    functions = planned_functions(FA2, folder)
    call(functions)
    assert functions.plan_tail == (-1, False, 0, 0)
    assert flashinfer.opened == [folder.library_path(FA2.name)]
    flashinfer.extra_run_types = ["int"]  # then it is FlashInfer's loader that opens it
    assert planned_functions(FA2, folder).plan_tail == (-1, False, 0, 0)


def test_a_plan_of_version_0_7_4_gets_both_of_its_further_arguments(
    flashinfer: FakeFlashInfer, folder: KernelFolder
) -> None:
    install(folder, FA2)
    flashinfer.extra_plan_types = ["int", "bool"]
    functions = planned_functions(FA2, folder)
    call(functions)
    assert functions.plan_tail == (-1, False, 0, 0, False)
    assert flashinfer.opened == [folder.library_path(FA2.name)]


def test_a_version_whose_plan_is_not_known_is_refused_with_its_number_and_a_remedy(
    flashinfer: FakeFlashInfer, folder: KernelFolder
) -> None:
    install(folder, FA3)
    flashinfer.extra_plan_types = ["Optional<ffi.Tensor>"]
    with pytest.raises(ConfigError, match=rf"FlashInfer {VERSION} has changed .*_sm90: its plan takes .* Install"):
        planned_functions(FA3, folder)


def test_a_library_that_is_built_at_the_start_is_called_directly_too(
    flashinfer: FakeFlashInfer, folder: KernelFolder
) -> None:
    assert load_libraries([FA3], folder) == [Source.BUILT]
    assert len(call(planned_functions(FA3, folder))) == 8
    assert flashinfer.opened == [folder.library_path(FA3.name)]


def test_without_flashinfer_the_error_is_an_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """On which `auto` takes another backend."""

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(ImportError):
        KernelFolder.of("9.0a")


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
        pytest.skip("FlashInfer is not installed; runs where the extra `cuda` is")
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


LIBRARIES = [
    *(("fa2", scores) for scores in Scores),
    *(("fa3", scores) for scores in Scores if scores is not Scores.ALIBI),
]


@pytest.mark.usefixtures("real_flashinfer")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("backend", "scores"), LIBRARIES)
def test_flashinfer_itself_forms_the_names_that_are_formed_here(
    backend: Literal["fa2", "fa3"], scores: Scores, dtype: torch.dtype
) -> None:
    import flashinfer

    for head_dim in (64, 128, 256):
        for windowed in (False, True):
            library = PlannedLibrary(backend, dtype, head_dim, windowed, scores)
            assert library.name == library.spec().name
    assert importlib.metadata.version("flashinfer-python") == flashinfer.__version__


PLAN = (
    *("float_workspace_buffer", "int_workspace_buffer", "page_locked_int_workspace_buffer", "qo_indptr", "kv_indptr"),
    *("kv_len_arr", "total_num_rows", "batch_size", "num_qo_heads", "num_kv_heads", "page_size", "enable_cuda_graph"),
    *("head_dim_qk", "head_dim_vo", "causal", "window_left"),
)
PLAN_TAIL = ("fixed_split_size", "disable_split_kv", "num_colocated_ctas", "uniform_q_len", "fixed_uniform_q_len")
RUN = (
    *("float_workspace_buffer", "int_workspace_buffer", "plan_info_vec", "q", "paged_k_cache", "paged_v_cache"),
    *("qo_indptr", "paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len", "o", "maybe_lse"),
    *("mask_mode_code", "layout", "window_left", "enable_pdl"),
)
RUN_TAIL = {
    "fa2": (
        *("maybe_custom_mask", "maybe_mask_indptr", "maybe_alibi_slopes", "maybe_prefix_len_ptr"),
        *("maybe_token_pos_in_items_ptr", "maybe_max_item_len_ptr", "maybe_k_cache_sf", "maybe_v_cache_sf"),
        *("logits_soft_cap", "sm_scale", "rope_rcp_scale", "rope_rcp_theta", "token_pos_in_items_len"),
    ),
    "fa3": (
        *("maybe_prefix_len_ptr", "maybe_token_pos_in_items_ptr", "maybe_max_item_len_ptr", "maybe_scale_v"),
        *("logits_soft_cap", "sm_scale", "scale_v_scalar", "token_pos_in_items_len"),
    ),
    "sinks": ("sink", "sm_scale"),
}
"""What direct.py passes, in FlashInfer's own words. A type alone would not tell two numbers that change places."""

TYPES = {"int64_t": "int", "bool": "bool", "double": "float", "Optional<ffi::Tensor>": "Optional", "ffi::Tensor": "ffi"}

SAMPLE = Scoring(Numbers(0.125, softcap=30.0), torch.ones(1), torch.zeros(1))
PASSED = {"logits_soft_cap": 30.0, "sm_scale": 0.125, "sink": SAMPLE.sinks, "maybe_alibi_slopes": SAMPLE.alibi_slopes}
"""What must arrive under each name when a layer scores as SAMPLE does."""


def declared(text: str) -> list[tuple[str, str]]:
    """Type and name of each parameter of a C++ function."""
    pairs = (parameter.replace("\\", "").split() for parameter in text.split(","))
    return [(" ".join(pair[:-1]), pair[-1]) for pair in pairs if pair]


@pytest.mark.usefixtures("real_flashinfer")
@pytest.mark.parametrize(("backend", "scores"), LIBRARIES)
def test_flashinfer_itself_declares_the_arguments_that_are_passed_here(
    backend: Literal["fa2", "fa3"], scores: Scores
) -> None:
    """In the sources that a build of the installed version would compile."""
    library = PlannedLibrary(backend, torch.bfloat16, 128, windowed=False, scores=scores)
    folder = next(Path(source).parent for source in library.spec().sources)
    (binding,), (config,) = folder.glob("*jit_binding.cu"), folder.glob("*config.inc")
    functions = dict(re.findall(r"(Plan|PagedKVCache\w*Run)\((.*?)\)", binding.read_text(), re.DOTALL))
    plan = declared(functions["Plan"])
    (run,) = (declared(functions[name].replace("ADDITIONAL_FUNC_PARAMS", "")) for name in functions if "Run" in name)
    found = re.search(r"#define ADDITIONAL_FUNC_PARAMS\s*,(.*)", config.read_text())
    assert found is not None
    tail = declared(found[1])
    assert tuple(name for _, name in plan[:NUM_SHARED]) == PLAN
    assert tuple(name for _, name in run) == RUN
    assert tuple(name for _, name in tail) == RUN_TAIL["sinks" if scores is Scores.SINKS else backend]
    types, values = _run_tail(library)
    assert [TYPES[kind] for kind, _ in tail] == list(types)
    passed = dict(zip((name for _, name in tail), values(SAMPLE), strict=True))
    assert all(passed[name] is value or passed[name] == value for name, value in PASSED.items() if name in passed)
    rest = plan[NUM_SHARED:]
    assert tuple(name for _, name in rest) == PLAN_TAIL[: len(rest)]
    assert [TYPES[kind] for kind, _ in rest] in [
        [type(value).__name__ for value in each] for each in _plan_tails(library)
    ]
