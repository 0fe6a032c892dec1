"""Start-up and memory out of a large packed folder, made of nothing but its index: the shards are one hole."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from data.audio import SAMPLE_RATE
from data.columns import write_columns
from data.shards import INDEX, SAMPLE_BYTES, FileEntry, Manifest, shard_name, write_manifest
from data.table import TEXTS
from data.terms import run_groups

ROOT = Path(__file__).resolve().parent.parent
BASE_CLIPS = 1000  # of a small index, whose memory is the program's own
TEXT, TERMS_A_CLIP, NUM_TERMS = "a text of some eight words for each clip", 1, 200_000

PROGRAM = """
import sys, time; started = time.perf_counter()
sys.path.insert(0, sys.argv[1])
import json, resource, psutil
from data.loader import Loader; from data.settings import DataSettings; from data.shards import open_packed
from model.tokenizer import ByteTokenizer
loader = Loader(open_packed(sys.argv[2]), int(sys.argv[3]), ByteTokenizer(), DataSettings(num_workers=1))
batch = next(loader.epoch(0))
first_s = time.perf_counter() - started
def own(process):
    fields = dict(line.split(":", 1) for line in open(f"/proc/{process.pid}/status") if line.startswith("Rss"))
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))
me = psutil.Process()
print(json.dumps({"first_s": first_s, "trainer": own(me), "worker": own(me.children()[0])}))
"""


def make_index(folder: Path, num_clips: int, seconds: float = 2.0) -> None:
    """A packed folder of `num_clips` clips with one text and silent samples; only its index takes space."""
    folder.mkdir(parents=True)
    samples = round(seconds * SAMPLE_RATE)
    counts = np.arange(num_clips + 1, dtype=np.int64)
    numbers = counts[:-1]
    columns: dict[str, np.ndarray] = {}
    for field in TEXTS:
        one = TEXT if field == "text" else f"{field}-0000000"
        columns |= _strings(field, one, num_clips)
    for name in ("term", "surface"):
        columns |= _strings(name, f"{name}-0000000", NUM_TERMS)
    runs = np.array(run_groups(TEXT), dtype=np.int64)
    columns |= {
        **dict.fromkeys(("start_s", "end_s"), np.full(num_clips, np.nan)),
        "duration_s": np.full(num_clips, seconds),
        **dict.fromkeys(("text_key", "audio_key", "path_key", "segment_key"), numbers),
        "sample_start": numbers * samples,
        "num_samples": np.full(num_clips, samples, dtype=np.int32),
        "term_key": np.arange(NUM_TERMS),
        "term_group": np.arange(NUM_TERMS),
        "positive_indptr": counts,
        **dict.fromkeys(("positive_terms", "positive_surfaces"), (numbers % NUM_TERMS).astype(np.int32)),
        "ignored_indptr": np.zeros(num_clips + 1, dtype=np.int64),
        "ignored_terms": np.zeros(0, dtype=np.int32),
        "spoken_indptr": counts * len(runs),
        "spoken_groups": np.tile(runs, num_clips),
    }
    with open(folder / INDEX, "wb") as file:
        write_columns(file, columns)
    with open(folder / shard_name(0), "wb") as file:
        file.truncate(num_clips * samples * SAMPLE_BYTES)
    files = {name: FileEntry((folder / name).stat().st_size, "not computed") for name in (INDEX, shard_name(0))}
    write_manifest(folder, Manifest(num_clips, num_clips * samples, "synthetic", files))


def _strings(name: str, one: str, count: int) -> dict[str, np.ndarray]:
    """`count` strings of the length of `one`; where it ends in a number, each has its own."""
    text = np.tile(np.frombuffer(one.encode(), dtype=np.uint8), count).reshape(count, len(one))
    if one[-1] == "0":
        for digit in range(7):
            text[:, -1 - digit] = ord("0") + np.arange(count) // 10**digit % 10
    return {f"{name}_bytes": text.ravel(), f"{name}_indptr": np.arange(count + 1, dtype=np.int64) * len(one)}


def start(folder: Path, batch_size: int) -> dict[str, float]:
    """Of a fresh process: seconds from its first line to its first batch, bytes of its own and of its worker's."""
    command = [sys.executable, "-c", PROGRAM, str(ROOT), str(folder), str(batch_size)]
    return dict(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def measure_start(num_clips: int, batch_size: int, runs: int = 3) -> list[str]:
    with tempfile.TemporaryDirectory() as temporary:
        sizes = {"base": BASE_CLIPS, "large": num_clips}
        found = {}
        for name, count in sizes.items():
            make_index(Path(temporary) / name, count)
            found[name] = [start(Path(temporary) / name, batch_size) for _ in range(runs)]
        size = (Path(temporary) / "large" / INDEX).stat().st_size
    lines = [f"index of {num_clips:,} clips, {size / 1e9:.2f} GB, mapped; {runs} fresh processes each:"]
    for name, count in sizes.items():
        seconds = sorted(run["first_s"] for run in found[name])
        lines.append(f"  {count:9,d} clips: first batch after {seconds[0]:.2f} to {seconds[-1]:.2f} s")
    for process in ("trainer", "worker"):
        least = {name: min(run[process] for run in runs_) for name, runs_ in found.items()}
        more = (least["large"] - least["base"]) / (num_clips - BASE_CLIPS)
        lines.append(f"  {process}: {least['large'] / 1e6:.0f} MB of its own, {more:.1f} bytes a clip beyond")
    return lines
