"""How fast bin/pack.py's engine packs, beside plain decoding of the same files on the same number of processes.

    python bench/pack.py                        FLAC, OGG and WAV clips of 2 s
    python bench/pack.py --records 2000000      also the memory of packing a JSON array of so many records

Bounds: `soundfile.read` alone (decoded samples thrown away), and with the samples written to a file. Packing also
parses and checks the records, judges headers, looks for silence and duplicates, hashes what it writes, syncs it and
writes the index. Rates are given by the clock, and by processor time, which other work disturbs least.
"""

import sys
from pathlib import Path

if __package__ != "bench":  # run as a file: the root goes first on sys.path, and bench/ comes off it
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]

import json
import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import soundfile as sf
import tyro

from bench.clip_set import SPEECH, make_clips
from data.clips import iterate_clips
from data.drops import DropLog
from data.packing import pack_clips
from data.settings import DataSettings

ROOT = Path(__file__).resolve().parent.parent
PLAIN = """
import sys, soundfile as sf
first, step, out, *paths = sys.argv[1:]
file = open(out, "wb") if out else None
for path in open(paths[0]).read().split("\\n")[int(first)::int(step)]:
    samples = sf.read(path, dtype="int16")[0]
    if file:
        file.write(samples.tobytes())
"""
MEMORY = """
import itertools, json, resource, sys, time
sys.path.insert(0, sys.argv[1])
import numpy as np
from pathlib import Path
from data.clips import iterate_clips; from data.drops import DropLog
from data.listing import read_listing, write_listing
from data.settings import DataSettings
from data.table_writer import TableWriter, rows_of
import data.packing
started, drops, folder = time.perf_counter(), DropLog(), Path(sys.argv[3])
count, _ = write_listing(iterate_clips(sys.argv[2], DataSettings(), drops), folder / "listing", drops)
writer, clips, first = TableWriter(folder, packed=True), read_listing(folder / "listing"), 0
while block := list(itertools.islice(clips, data.packing.BLOCK)):
    numbers = np.arange(first, first + len(block))
    places = {"sample_start": numbers, "num_samples": numbers, "audio_key": numbers}
    writer.extend(rows_of(block, packed=True) | places)
    first += len(block)
with open(folder / "index", "wb") as file:
    writer.write(file)
print(json.dumps([count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, time.perf_counter() - started]))
"""


@dataclass
class PackBench:
    """Clips a second packed, and decoded by soundfile alone."""

    num_clips: int = 1500
    seconds: float = 2.0
    """Length of a clip."""
    formats: tuple[str, ...] = ("flac", "ogg", "wav")
    num_workers: int = 2
    """Processes that decode, ours and plain."""
    speech: str = str(SPEECH)
    """Samples file that the clips are cut from."""
    records: int = 0
    """Records of a synthetic JSON array whose listing is measured too; 0 = none."""


@dataclass
class Rate:
    clips_per_s: float
    clips_per_core_s: float


def timed(work: Callable[[], None], num_clips: int) -> Rate:
    before, started = _spent(), time.perf_counter()
    work()
    return Rate(num_clips / (time.perf_counter() - started), num_clips / (_spent() - before))


def _spent() -> float:
    """Processor time of this process and of its children that have ended."""
    found = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in found)


def plain(paths: Path, num_workers: int, out: Path | None) -> None:
    """soundfile in `num_workers` processes, each on its share of the files."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PLAIN, str(first), str(num_workers), f"{out}-{first}" if out else "", str(paths)]
        )
        for first in range(num_workers)
    ]
    if any(process.wait() for process in processes):
        raise RuntimeError("plain decoding failed")


def bench_format(suffix: str, settings: PackBench, folder: Path) -> dict[str, Rate]:
    count, workers = settings.num_clips, settings.num_workers
    samples = make_clips(folder / "loose", count, settings.seconds, suffix, Path(settings.speech))
    paths = folder / "paths"
    paths.write_text("\n".join(str(folder / "loose" / f"{number}.{suffix}") for number in range(count)))
    plain(paths, 1, None)  # all files in the page cache, for all alike

    def pack() -> None:
        drops = DropLog()
        clips = iterate_clips(samples, DataSettings(), drops)
        pack_clips(clips, folder / "packed", drops, num_workers=workers, cache_mb=0)

    return {
        "packing": timed(pack, count),
        "soundfile, thrown away": timed(lambda: plain(paths, workers, None), count),
        "soundfile, written": timed(lambda: plain(paths, workers, folder / "raw"), count),
    }


def bench(settings: PackBench) -> list[str]:
    lines = [f"{'format':6s} {'what':30s} {'clips/s':>9s} {'clips/core-s':>13s} {'packing is':>11s}"]
    for suffix in settings.formats:
        with tempfile.TemporaryDirectory() as temporary:
            found = bench_format(suffix, settings, Path(temporary))
        for name, rate in found.items():
            ratio = found["packing"].clips_per_core_s / rate.clips_per_core_s
            lines.append(
                f"{suffix:6s} {name:30s} {rate.clips_per_s:9,.0f} {rate.clips_per_core_s:13,.0f} {ratio:10.2f}x"
            )
    return lines


def measure_memory(num_records: int) -> str:
    """Largest memory of a process that lists a JSON array of so many records and writes its index, as packing does."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sf.write(folder / "a.wav", [0.1] * 1600, 16_000)
        samples = folder / "samples.json"
        with open(samples, "w") as file:
            for number in range(num_records):
                # Spans of one file, so that each record is a clip of its own; two records share an id.
                record = {
                    "segment_id": f"POD{number // 2:012d}",
                    "term_chunk_audio": "a.wav",
                    "term_chunk_text": f"a text of some eight words for clip {number}",
                    "term_chunk_audio_ground_truth_terms": [f"term {number % 300_000}"],
                    "term_chunk_audio_start": number * 1e-6,
                }
                file.write(("[" if number == 0 else ",\n") + json.dumps(record))
            file.write("]")
        command = [sys.executable, "-c", MEMORY, str(ROOT), str(samples), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        count, peak, seconds = json.loads(done.stdout)
        size = samples.stat().st_size
    took = f"listed and indexed in {seconds:.0f} s, {peak / 1e6:.0f} MB at most"
    return f"{count:,} records, {size / 1e6:.0f} MB of JSON: {took}"


def main(argv: Sequence[str] | None = None) -> None:
    settings = tyro.cli(PackBench, args=argv, use_underscores=True, prog="bench/pack.py")
    clips = f"{settings.num_clips} clips of {settings.seconds:g} s"
    print(f"{clips}, {settings.num_workers} processes, {os.cpu_count()} cores")
    print("\n".join(bench(settings)))
    if settings.records:
        print(measure_memory(settings.records))


if __name__ == "__main__":
    main()
