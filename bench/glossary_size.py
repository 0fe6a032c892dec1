"""What ranking costs on top of the bare product, and how much memory it takes, at glossaries of up to a million terms.

    python bench/glossary_size.py --device cuda

Random unit vectors, made anew for each chunk by all ways alike, stand for clips and terms. Ours is
`retrieval.evaluate.measure`: chunk by chunk, the best 10 terms and every positive's rank. Beside it, in the same
process: the product and nothing else (a floor that no ranking can beat), and the plain way: the whole score matrix at
once, a stable sort of each row, ranks looked up in it; this only where the matrix fits.

Shapes: C clips, N terms, K terms of a chunk, E embedding.
"""

import sys
from pathlib import Path

if __package__ != "bench":  # run as a file: the root goes first on sys.path, and bench/ comes off it
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import tyro
from torch import Tensor

from retrieval.evaluate import CHUNK_TERMS, measure
from retrieval.judgements import Judgements
from retrieval.ranks import ClipRanks

T = TypeVar("T")


@dataclass
class Settings:
    """Time and memory of ranking, beside the bare product and a full sort."""

    num_terms: tuple[int, ...] = (100_000, 1_000_000)
    """Glossary sizes."""
    num_clips: int = 256
    """Clips, two right terms each."""
    embedding_dim: int = 512
    """Width of the vectors."""
    batch_size: int = 32
    """Clips a batch."""
    max_matrix_gib: float = 2.0
    """The full sort is left out where its score matrix would be larger."""
    device: str = "cpu"
    """cpu or cuda."""


@dataclass(frozen=True)
class Row:
    """Seconds of each way; None where it was left out."""

    num_terms: int
    ours_s: float
    product_s: float
    sort_s: float | None
    peak_gib: float


def compare(settings: Settings, num_terms: int) -> Row:
    """All three ways at one size. Raises AssertionError when ranks differ between ours and the full sort."""
    device = torch.device(settings.device)
    generator = torch.Generator(device).manual_seed(0)

    def unit(start: int, rows: int) -> Tensor:
        """Rows start, start + 1, ... made anew each time, as an encoder would: nothing keeps the whole glossary."""
        generator.manual_seed(start)
        x = torch.randn(rows, settings.embedding_dim, generator=generator, device=device)
        return torch.nn.functional.normalize(x, dim=-1)

    audio_CE = unit(num_terms, settings.num_clips)
    keys = [f"{i:07d}" for i in range(num_terms)]
    gold = [[keys[(7 * clip) % 1000], keys[(11 * clip + 1) % 1000]] for clip in range(settings.num_clips)]
    judgements = Judgements.from_terms(keys, gold)

    def ours() -> ClipRanks:
        (ranks,) = measure(
            lambda start, stop: (range(start, stop), audio_CE[start:stop]),
            lambda start, stop: unit(start, stop - start),
            judgements,
            settings.batch_size,
            num_top=10,
            device=device,
        )
        return ranks

    def product() -> None:
        for start in range(0, num_terms, CHUNK_TERMS):
            term_KE = unit(start, min(CHUNK_TERMS, num_terms - start))
            for audio_BE in audio_CE.split(settings.batch_size):
                (audio_BE @ term_KE.T).amax()

    def full_sort() -> list[int]:
        term_NE = torch.cat(
            [unit(start, min(CHUNK_TERMS, num_terms - start)) for start in range(0, num_terms, CHUNK_TERMS)]
        )
        scores_CN = torch.cat([audio_BE @ term_NE.T for audio_BE in audio_CE.split(settings.batch_size)])
        order_CN = scores_CN.argsort(dim=1, descending=True, stable=True)
        return [
            int((order_CN[clip] == place).nonzero()) + 1
            for clip, places in enumerate(judgements.positives)
            for place in places
        ]

    fits = 4.0 * settings.num_clips * num_terms / 2**30 <= settings.max_matrix_gib
    product_s, _ = timed(product, device)
    ours_s, ranks = timed(ours, device)
    peak_gib = peak_memory_gib(device)
    sort_s = None
    if fits:
        sort_s, expected = timed(full_sort, device)
        differing = int((torch.tensor(expected) != torch.from_numpy(ranks.rank_P)).sum())
        # A product over another number of columns may round the last bit another way and swap close neighbours.
        assert differing <= len(expected) // 50, f"{differing} of {len(expected)} ranks differ"
    return Row(num_terms, ours_s, product_s, sort_s, peak_gib)


def timed(work: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Seconds of one call, the device's queue emptied before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def peak_memory_gib(device: torch.device) -> float:
    """Most memory so far: of the GPU, or of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(settings: Settings) -> None:
    with torch.no_grad():
        compare(settings, 2 * CHUNK_TERMS)  # kernels and memory pools warm up
        for num_terms in settings.num_terms:
            row = compare(settings, num_terms)
            sort = "left out" if row.sort_s is None else f"{row.sort_s:.2f} s ({row.sort_s / row.ours_s:.1f}x ours)"
            print(
                f"{row.num_terms:>9,} terms, {settings.num_clips} clips: ours {row.ours_s:.2f} s"
                f"  bare product {row.product_s:.2f} s (ours is {row.ours_s / row.product_s:.2f}x)"
                f"  full sort {sort}  peak so far {row.peak_gib:.2f} GiB",
                flush=True,
            )


if __name__ == "__main__":
    main(tyro.cli(Settings, use_underscores=True))
