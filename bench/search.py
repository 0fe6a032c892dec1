"""Exact search beside faiss Flat and plain torch: how long a batch of queries takes until its terms are on the host.

    python bench/search.py --threads 2
    python bench/search.py --devices cuda --sizes 1000000 --out search.json

Each round runs every way once, in turn, so that whatever else the machine does meets them all; the table shows medians
and quartiles over the rounds, in ms for the whole batch, and `x faiss`, `x torch`: their median over ours. On the CPU
all ways have the same number of threads. On a GPU faiss (the CPU build) has no part.

  ours    retrieval.topk.best_rows, what TermIndex.search calls: with its tie-breaking and its way back to the host
  torch   (query_BE @ term_NE.T).topk(k), and its way back to the host
  faiss   IndexFlatIP.search

Shapes: B queries, N terms, E embedding.
"""

import sys
from pathlib import Path

if __package__ != "bench":  # run as a file: the root goes first on sys.path, and bench/ comes off it
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]

import argparse
import importlib
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from retrieval.evaluate import plain_table
from retrieval.topk import best_rows

GENERATED_AT_ONCE = 100_000
Search = Callable[[], NDArray[np.int64]]


def random_units(num: int, dim: int, seed: int, device: str = "cpu") -> Tensor:
    """fp32 [num, dim], L2-normed."""
    generator = torch.Generator(device).manual_seed(seed)
    rows = torch.empty(num, dim, device=device)
    for start in range(0, num, GENERATED_AT_ONCE):
        part = rows[start : start + GENERATED_AT_ONCE]
        part.copy_(F.normalize(torch.randn(part.shape, generator=generator, device=device), dim=1))
    return rows


def ways_to_search(query_BE: Tensor, term_NE: Tensor, k: int, threads: int) -> dict[str, Search]:
    """Each way as a function from nothing to places [B, k] on the host; faiss where it is installed, on the CPU."""
    order_N = np.arange(len(term_NE))
    ways: dict[str, Search] = {
        "ours": lambda: best_rows(query_BE, term_NE, k, order_N)[1],
        "torch": lambda: (query_BE @ term_NE.T).topk(k, dim=1).indices.cpu().numpy(),
    }
    if not term_NE.is_cuda:
        try:
            faiss = importlib.import_module("faiss")
        except ImportError:
            print("faiss is not installed (pip install faiss-cpu): no comparison with it", file=sys.stderr)
            return ways
        faiss.omp_set_num_threads(threads)
        flat = faiss.IndexFlatIP(term_NE.shape[1])
        flat.add(term_NE.numpy())
        query = query_BE.numpy()
        ways["faiss"] = lambda: flat.search(query, k)[1]
    return ways


def time_in_turn(ways: dict[str, Search], rounds: int, warm_up: int = 1) -> dict[str, NDArray[np.float64]]:
    """Milliseconds of each way in each round."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + warm_up):
        for name, search in ways.items():
            started = time.perf_counter()
            search()
            if number >= warm_up:
                taken[name].append((time.perf_counter() - started) * 1e3)
    return {name: np.array(times) for name, times in taken.items()}


def measure(
    device: str, num_terms: int, num_queries: int, dim: int, k: int, rounds: int, threads: int
) -> dict[str, Any]:
    """One row of the table. Raises RuntimeError when a way finds other terms than ours."""
    term_NE = random_units(num_terms, dim, 0, device)
    query_BE = random_units(num_queries, dim, 1, device)
    ways = ways_to_search(query_BE, term_NE, k, threads)
    expected = ways["ours"]()
    for name, search in ways.items():
        same = float((search() == expected).mean())
        if same < 0.999:  # sums in another order may swap two terms that are equal to the last bit
            raise RuntimeError(f"{name} finds other terms: only {same:.4f} of the places are the same")
    times = time_in_turn(ways, rounds)
    row: dict[str, Any] = {"device": device, "terms": num_terms, "batch": num_queries}
    for name, taken in times.items():
        low, middle, high = np.percentile(taken, [25, 50, 75])
        row |= {f"{name}_ms": round(middle, 3), f"{name}_quartiles_ms": [round(low, 3), round(high, 3)]}
    row["ms_a_query"] = round(row["ours_ms"] / num_queries, 4)
    for peer in ("faiss", "torch"):
        row[f"x_{peer}"] = round(row[f"{peer}_ms"] / row["ours_ms"], 2) if f"{peer}_ms" in row else None
    return row


def as_cells(row: dict[str, Any]) -> list[str]:
    def cell(name: str) -> str:
        if f"{name}_ms" not in row:
            return "-"
        low, high = row[f"{name}_quartiles_ms"]
        return f"{row[f'{name}_ms']:.2f} [{low:.2f} {high:.2f}]"

    ratios = ["-" if row[f"x_{peer}"] is None else f"{row[f'x_{peer}']:.2f}" for peer in ("faiss", "torch")]
    return [row["device"], f"{row['terms']}", f"{row['batch']}", *map(cell, ("ours", "faiss", "torch")), *ratios]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", nargs="+", default=["cpu"], choices=["cpu", "cuda"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[100_000, 1_000_000], help="terms")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64], help="queries searched together")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    rows = []
    for device in args.devices:
        for num_terms in args.sizes:
            for batch in args.batches:
                rows.append(measure(device, num_terms, batch, args.dim, args.k, args.rounds, args.threads))
    header = ["device", "terms", "batch", "ours ms", "faiss ms", "torch ms", "x faiss", "x torch"]
    print(plain_table(header, [as_cells(row) for row in rows]))
    name = torch.cuda.get_device_name() if "cuda" in args.devices else f"CPU, {args.threads} threads"
    print(f"dim {args.dim}, k {args.k}, median [quartiles] of {args.rounds} rounds, torch {torch.__version__}, {name}")
    if args.out is not None:
        args.out.write_text(json.dumps({"torch": torch.__version__, "device": name, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
