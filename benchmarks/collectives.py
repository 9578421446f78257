"""What does it cost to add up over ranks, and to gather logits? By bytes and by the way, in graphs.

    python -m benchmarks.collectives --ranks 2 --json collectives.json
    python -m benchmarks.collectives --ranks 2 4 8
    python -m benchmarks.collectives --ranks 2 --device cpu --kib 8 64

Sums are of bfloat16, float32 on the CPU. CALLS of them are in one CUDA graph, which hides that ranks arrive at unequal
times: within a step expect somewhat more. Each way is called as layers call it, the copy to memory that the ranks share
included; "in place" leaves that out, for what a product that writes there would save. "chosen" is what an engine does
with so many bytes and ranks (`graphgen.models.collectives.ways`), which this table is to hold to account. "wrong by" is
the largest difference of a way's sum from NCCL's. On the CPU there is one way, Gloo, and no graph.
"""

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.options import make_parser, run_script
from benchmarks.report import Row, machine, percentile, show, write_json
from graphgen.launch.devices import find_device
from graphgen.models.collectives.group import RankGroup, shared_room
from graphgen.models.collectives.operators import gather_over_ranks, sum_over_ranks
from graphgen.models.collectives.ways import NCCL_ALONE, Ways, ways_of
from graphgen.models.spec import Shard

CALLS = 20
REPLAYS = 30
START_S = 300.0
LOGIT_ROWS = (1, 64, 256)
"""Whose logits are gathered; on the CPU the first alone."""
VOCABULARY = 128_256

Work = Callable[[], object]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--device", default="auto", help="cpu, or cuda: one GPU a rank, from cuda:0 on")
    parser.add_argument("--kib", type=int, nargs="+", default=[8, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--json", help="write the figures here")
    options = parser.parse_args()
    device = find_device() if options.device == "auto" else options.device
    if device != "cpu" and (most := torch.cuda.device_count()) < max(options.ranks):
        raise SystemExit(f"--ranks {max(options.ranks)} needs as many GPUs, {most} are here: ask for fewer")
    rows: list[Row] = []
    for size in options.ranks:
        rows += run_ranks(size, device, options.kib)
    about = machine(torch.cuda.get_device_name() if device != "cpu" else "cpu")
    if device != "cpu":
        about |= {"nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    show("Sums and gathering over ranks, microseconds a call", rows, about)
    write_json(options.json, rows, about)


def run_ranks(size: int, device: str, kib: list[int]) -> list[Row]:
    """The rows of the first of so many ranks, each a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        spawn = multiprocessing.get_context("spawn")
        ranks = [spawn.Process(target=run_rank, args=(rank, size, device, kib, folder)) for rank in range(size)]
        for rank in ranks:
            rank.start()
        while any(rank.is_alive() for rank in ranks):
            if any(rank.exitcode for rank in ranks):
                for rank in ranks:
                    rank.kill()
                raise SystemExit("a rank failed: its trace is above")
            time.sleep(0.05)
        found: list[Row] = json.loads((Path(folder) / "rows").read_text())
        return found


def run_rank(rank: int, size: int, device_kind: str, kib: list[int], folder: str) -> None:
    device = torch.device("cpu" if device_kind == "cpu" else f"cuda:{rank}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with torch.inference_mode():
        group = RankGroup(Shard(rank, size), Path(folder) / "ranks", device, START_S)
        rows = rows_of(group, device, kib)
    if rank == 0:
        (Path(folder) / "rows").write_text(json.dumps(rows))
    dist.barrier()
    os._exit(0)  # a group that was captured may not end


def rows_of(group: RankGroup, device: torch.device, kib: list[int]) -> list[dict[str, object]]:
    size, name = group.shard.size, group.name
    room = shared_room(max(kib) << 10, device, group.process_group)[0] if device.type == "cuda" else None
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    rows: list[dict[str, object]] = []
    for one in kib:
        part = torch.randn((one << 10) // dtype.itemsize, dtype=dtype, device=device)
        row: dict[str, object] = {"ranks": size, "what": f"sum of {one} KiB"}
        ways = ways_within(room)
        expected = sum_over_ranks(part, room, name, NCCL_ALONE)
        wrong = 0.0
        for way, limits in ways.items():
            found = sum_over_ranks(part, room, name, limits)
            wrong = max(wrong, float((found.float() - expected.float()).abs().max()))
            row[way] = microseconds(partial(sum_over_ranks, part, room, name, limits), device)
        if room is not None:
            row |= in_place(room, part, name, device)
            row |= {"chosen": chosen(part.nbytes, ways_of(size)), "wrong by": wrong}
        rows.append(row)
    general = "NCCL" if device.type == "cuda" else "Gloo"
    for num_rows in LOGIT_ROWS if device.type == "cuda" else LOGIT_ROWS[:1]:
        columns = torch.randn(num_rows, -(-VOCABULARY // size), dtype=dtype, device=device)
        took = microseconds(partial(gather_over_ranks, columns, size), device)
        rows.append({"ranks": size, "what": f"logits of {num_rows} rows", general: took})
    return rows


def ways_within(room: Tensor | None) -> Mapping[str, Ways]:
    """Each way alone."""
    if room is None:
        return {"Gloo" if not torch.cuda.is_available() else "NCCL": NCCL_ALONE}
    return {"NCCL": NCCL_ALONE, "one-shot": Ways(room.nbytes, 0), "two-shot": Ways(0, room.nbytes)}


def in_place(room: Tensor, part: Tensor, name: str, device: torch.device) -> dict[str, object]:
    """Where the part lies in the shared memory already."""
    shared, out = room[: part.nbytes].view(part.dtype), torch.empty_like(part)
    one_shot, two_shot = torch.ops.symm_mem.one_shot_all_reduce_out, torch.ops.symm_mem.two_shot_all_reduce_out
    return {
        "one-shot in place": microseconds(lambda: one_shot(shared, "sum", name, out), device),
        "two-shot in place": microseconds(lambda: two_shot(shared, "sum", name, out), device),
    }


def chosen(num_bytes: int, ways: Ways) -> str:
    return "one-shot" if num_bytes <= ways.one_shot else "two-shot" if num_bytes <= ways.two_shot else "NCCL"


def microseconds(work: Work, device: torch.device) -> float:
    """Of one call: the median over replays of a graph of CALLS, on the CPU over calls."""
    if device.type == "cpu":
        work()
        times = []
        for _ in range(CALLS):
            begun_s = time.perf_counter()
            work()
            times.append(time.perf_counter() - begun_s)
        return percentile(times, 50) * 1e6
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
        stream.synchronize()
        dist.barrier()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for _ in range(CALLS):
                work()
        dist.barrier()
        times = []
        for replay in range(5 + REPLAYS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if replay >= 5:
                times.append(begin.elapsed_time(end) * 1e3 / CALLS)
    dist.barrier()
    return percentile(times, 50)


if __name__ == "__main__":
    run_script(main)
