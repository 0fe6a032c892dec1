"""How fast batches come, beside what others use; how soon and at what cost out of two million clips.

    python bench/loader.py                      the peers' table, then the large index
    python bench/loader.py --num_clips 4000 --num_workers 2 --tokenizer <folder with tokenizer.json>

Clips a second are given twice: by the clock, and by the processor time of all processes together, which is what a core
can do and what other work on the machine disturbs least. The peers come from the `bench` extra; one that is not
installed is named and left out. What happens beside a real training step on a GPU: bench/feeding.py.
"""

import sys
from pathlib import Path

if __package__ != "bench":  # run as a file: the root goes first on sys.path, and bench/ comes off it
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]

import gc
import itertools
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import tyro

from bench.big_index import measure_start
from bench.clip_set import SPEECH, make_clips
from bench.peer_loaders import PEERS, Tokenize
from data.clips import Clip, iterate_clips, load_clips
from data.drops import DropLog
from data.loader import Loader
from data.packing import pack_clips
from data.settings import DataSettings
from data.shards import open_packed
from model.tokenizer import ByteTokenizer, CheckpointTokenizer, FastTokenizer


@dataclass
class LoaderBench:
    """Clips a second of reading, tokenising and packing batches: ours and the peers', same clips, same run."""

    num_clips: int = 2000
    """Clips of the set."""
    seconds: float = 2.0
    """Length of a clip."""
    batch_size: int = 64
    num_workers: int = 1
    """Worker processes of every loader."""
    measure_s: float = 5.0
    """Seconds that each loader is measured for, after an epoch that warms it up."""
    tokenizer: str | None = None
    """Folder with a tokenizer.json; by default bytes, for all."""
    speech: str = str(SPEECH)
    """Samples file that the clips are cut from."""
    index_clips: int = 2_000_000
    """Clips of the synthetic index; 0 = leave that part out."""
    peers: tuple[str, ...] = tuple(PEERS)
    """Which peers to measure."""


@dataclass
class Speed:
    clips_per_s: float
    clips_per_core_s: float


def processor_s() -> float:
    """Processor time of this process and its children, those that ended included."""
    me = psutil.Process()
    spent = me.cpu_times()
    total = spent.user + spent.system + spent.children_user + spent.children_system
    for child in me.children(recursive=True):
        try:
            times = child.cpu_times()
            total += times.user + times.system
        except psutil.NoSuchProcess:
            continue  # its time is the parent's children_user by now
    return total


def measure(batches: Iterator[Any], num_clips: int, batch_size: int, seconds: float) -> Speed:
    for _ in itertools.islice(batches, max(1, num_clips // batch_size)):  # an epoch: files in the cache, workers up
        pass
    started, before, count = time.perf_counter(), processor_s(), 0
    while time.perf_counter() - started < seconds:
        next(batches)
        count += batch_size
    return Speed(count / (time.perf_counter() - started), count / (processor_s() - before))


def ours(clips: Sequence[Clip], batch_size: int, num_workers: int, tokenize: Tokenize) -> Iterator[Any]:
    loader = Loader(clips, batch_size, tokenize, DataSettings(num_workers=num_workers, audio_cache_mb=0))
    full = len(clips) // batch_size  # the last, smaller batch is left out, as with the peers
    for epoch in itertools.count():
        yield from itertools.islice(loader.epoch(epoch), full)


def bench(settings: LoaderBench) -> dict[str, Speed]:
    tokenize: Tokenize = ByteTokenizer()
    if settings.tokenizer:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a worker, for all
        tokenize = FastTokenizer(CheckpointTokenizer(settings.tokenizer).recipe()[1])
    found: dict[str, Speed] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        samples = make_clips(folder / "loose", settings.num_clips, settings.seconds, speech=Path(settings.speech))
        loose = load_clips(samples, DataSettings(), DropLog())
        drops = DropLog()
        pack_clips(iterate_clips(samples, DataSettings(), drops), folder / "packed", drops)
        arguments = (settings.num_clips, settings.batch_size, settings.measure_s)
        for name, clips in (("ours, packed", open_packed(folder / "packed")), ("ours, loose files", loose)):
            batches = ours(clips, settings.batch_size, settings.num_workers, tokenize)
            found[name] = measure(batches, *arguments)
            del batches
            gc.collect()
        for name in settings.peers:
            try:
                batches = PEERS[name](
                    loose, folder / name.split()[0], settings.batch_size, settings.num_workers, tokenize
                )
                found[name] = measure(batches, *arguments)
            except ImportError as error:
                print(f"{name}: not installed ({error}); see the bench extra", file=sys.stderr)
            batches = iter(())
            gc.collect()
    return found


def report(found: dict[str, Speed]) -> list[str]:
    best = found["ours, packed"]
    lines = [f"{'loader':58s} {'clips/s':>9s} {'clips/core-s':>13s} {'ours is':>9s}"]
    for name, speed in found.items():
        ratio = best.clips_per_core_s / speed.clips_per_core_s
        lines.append(f"{name:58s} {speed.clips_per_s:9,.0f} {speed.clips_per_core_s:13,.0f} {ratio:8.2f}x")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    settings = tyro.cli(LoaderBench, args=argv, use_underscores=True, prog="bench/loader.py")
    print(
        f"{settings.num_clips} clips of {settings.seconds:g} s, batches of {settings.batch_size}, "
        f"{settings.num_workers} worker(s), {os.cpu_count()} cores, tokens: {settings.tokenizer or 'bytes'}"
    )
    print("\n".join(report(bench(settings))))
    if settings.index_clips:
        print("\n".join(measure_start(settings.index_clips, settings.batch_size)))


if __name__ == "__main__":
    main()
