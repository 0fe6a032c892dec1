"""Sample nvidia-smi while a run goes on: curves beside the training's in TensorBoard, one table at the end.

    python launch/gpu_use.py RUN_DIR [--interval_s 10]

Goes on until SIGTERM or SIGINT. Curves go to <run>/tb/gpu_node<NODE_RANK>/ over the step that metrics.jsonl has
reached, if the run has a tb/ folder; all figures at the end to <run>/gpu_use_node<NODE_RANK>.json. GPUs outside
CUDA_VISIBLE_DEVICES are left out.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

QUERY = ("index", "utilization.gpu", "memory.used", "memory.total", "power.draw", "temperature.gpu")
TAGS = {"utilization.gpu": "utilization_pct", "memory.used": "memory_mib", "power.draw": "power_w", "temperature.gpu": "temperature_c"}  # fmt: skip  # noqa: E501
TAIL_BYTES = 65536


@dataclass
class Use:
    """One GPU over the whole run."""

    memory_total_mib: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)

    def add(self, sample: dict[str, float]) -> None:
        self.memory_total_mib = sample.get("memory.total", self.memory_total_mib)
        for name in TAGS:
            if name in sample:  # some GPUs do not tell their power or temperature
                self.sums[name] = self.sums.get(name, 0.0) + sample[name]
                self.counts[name] = self.counts.get(name, 0) + 1
                self.peaks[name] = max(self.peaks.get(name, sample[name]), sample[name])

    def mean(self, name: str) -> float | None:
        return self.sums[name] / self.counts[name] if self.counts.get(name) else None


def parse_samples(text: str) -> dict[str, dict[str, float]]:
    """{GPU index: {field: value}} out of nvidia-smi's CSV; what it does not tell ([N/A]) is left out."""
    found = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != len(QUERY) or not cells[0].isdigit():
            continue
        values = {}
        for name, cell in zip(QUERY[1:], cells[1:], strict=True):
            try:
                values[name] = float(cell)
            except ValueError:
                continue
        found[cells[0]] = values
    return found


def sample_gpus() -> dict[str, dict[str, float]]:
    """One look at the GPUs. Raises OSError or subprocess.SubprocessError when nvidia-smi does."""
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").strip()
    if visible:
        command += ["-i", visible]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    return parse_samples(done.stdout)


def reached_step(run_dir: Path) -> int:
    """The step of the last whole line of metrics.jsonl; 0 before there is one."""
    try:
        with (run_dir / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0


class Curves:
    """Writes scalars with TensorBoard's own writer, which needs no torch, once the trainer has made <run>/tb."""

    def __init__(self, run_dir: Path, node: str) -> None:
        self._parent, self._folder, self._writer = run_dir / "tb", run_dir / "tb" / f"gpu_node{node}", None

    def write(self, samples: dict[str, dict[str, float]], step: int) -> None:
        if self._writer is None:
            if not self._parent.is_dir():
                return
            try:
                from tensorboard.summary.writer.event_file_writer import EventFileWriter
            except ImportError:  # the folder is an earlier attempt's; the table is to be had all the same
                return
            self._writer = EventFileWriter(str(self._folder))
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=f"gpu{index}/{tag}", simple_value=sample[name])
            for index, sample in samples.items()
            for name, tag in TAGS.items()
            if name in sample
        ]
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def table(uses: dict[str, Use], num_samples: int, seconds: float) -> str:
    """The closing table, one line a GPU."""

    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    lines = [f"GPU use, {num_samples} samples in {seconds:.0f} s: mean busy, peak memory, mean power, hottest"]
    for index, use in sorted(uses.items(), key=lambda item: int(item[0])):
        busy, power = shown(use.mean("utilization.gpu"), ".0f"), shown(use.mean("power.draw"), ".0f")
        memory, heat = shown(use.peaks.get("memory.used"), ".0f"), shown(use.peaks.get("temperature.gpu"), ".0f")
        memory = f"{memory:>6s} of {use.memory_total_mib:.0f} MiB"
        lines.append(f"  GPU {index:>2s}  {busy:>3s} %  {memory}  {power:>4s} W  {heat:>3s} C")
    return "\n".join(lines)


def figures(uses: dict[str, Use], num_samples: int, seconds: float) -> dict[str, object]:
    """The same as numbers, for the file."""
    return {
        "num_samples": num_samples,
        "seconds": round(seconds, 1),
        "gpus": {
            index: {
                "memory_total_mib": use.memory_total_mib,
                **{f"mean_{tag}": use.mean(name) for name, tag in TAGS.items()},
                **{f"peak_{tag}": use.peaks.get(name) for name, tag in TAGS.items()},
            }
            for index, use in uses.items()
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Sample nvidia-smi while a run goes on.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--interval_s", type=float, default=float(os.environ.get("GPU_SAMPLE_S", "10")))
    given = parser.parse_args()
    node = os.environ.get("NODE_RANK", "0")
    is_over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: is_over.set())
    curves, uses, num_samples, started, complaint = Curves(given.run_dir, node), {}, 0, time.monotonic(), ""
    while not is_over.wait(given.interval_s):
        try:
            samples = sample_gpus()
        except (OSError, subprocess.SubprocessError) as error:
            if str(error) != complaint:  # a driver that has gone is told once, and asked again
                complaint = str(error)
                print(f"GPU use: nvidia-smi does not answer: {error}", file=sys.stderr, flush=True)
            continue
        for index, sample in samples.items():
            uses.setdefault(index, Use()).add(sample)
        num_samples += 1
        curves.write(samples, reached_step(given.run_dir))
    curves.close()
    if uses:
        seconds = time.monotonic() - started
        print(table(uses, num_samples, seconds), flush=True)
        if given.run_dir.is_dir():
            text = json.dumps(figures(uses, num_samples, seconds), indent=1)
            (given.run_dir / f"gpu_use_node{node}.json").write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
