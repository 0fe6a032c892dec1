"""All benchmarks of speed and memory on this device, in under nine minutes on one GPU: a table, a JSON file, a plot.

    python bench/all.py [--parts step lora ...] [--out DIR] [--tiny]

Each part is the `measure` of a module of bench/ and runs in a process of its own, with a time limit, one after the
other: a part that fails or hangs is reported, and the others go on. The processes are forked from one that has imported
everything and has not touched the device. The device's limits are measured once, before them.
With --parts the other parts of an earlier report of this device and torch stay; each part says when it was measured.
Writes DIR/<device>.json and, where matplotlib is installed, DIR/<device>.png (DIR: bench/results). Exit code 1 when a
part failed; targets that are missed are printed, and no failure.
"""

import sys
from pathlib import Path

if __package__ != "bench":  # run as a file: the root goes first on sys.path, and bench/ comes off it
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import re
import signal
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch

from bench.findings import Findings, find_pyplot, number
from bench.limits import Limits, bench_device, measure_limits
from bin.runlog import environment
from distributed.atomic import json_bytes, write_file_atomically
from retrieval.evaluate import plain_table

ROOT = Path(__file__).resolve().parent.parent
# Seconds that a part may take. What matters most comes first: all of them together end before the whole's limit.
PARTS = {
    "step": 200.0, "bigbatch": 100.0, "fp8": 90.0, "loss": 50.0, "bank": 40.0, "lora": 50.0, "tower": 70.0,
    "memory": 110.0, "switches": 80.0, "scaling": 200.0,
}  # fmt: skip
PARTS_OF_SEVERAL_GPUS = ("scaling",)
"""Where there are several, and beyond the time of the others."""
WHOLE_S = 535.0
LIMITS_S = 60.0


def run_part(name: str, tiny: bool, limits: Limits | None, limit_s: float) -> dict[str, Any]:
    """What the part found, with the seconds it took; `error` when it failed."""
    started = time.perf_counter()
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([f"bench.{part}" for part in PARTS])
    with tempfile.TemporaryDirectory() as folder:
        out, printed = Path(folder) / "out.json", Path(folder) / "printed.txt"
        printed.touch()
        process = processes.Process(target=part_process, args=(name, tiny, limits, out, printed), daemon=True)
        process.start()
        assert process.pid is not None
        process.join(limit_s)
        failure = f"exit code {process.exitcode}" if process.exitcode else None
        if process.exitcode is None:
            failure = f"stopped after {limit_s:.0f} s"
            with contextlib.suppress(ProcessLookupError):  # it had not come as far as to have a group of its own
                os.killpg(process.pid, signal.SIGKILL)  # what the part has started holds the GPU as well
            process.kill()
            process.join()
        found: dict[str, Any] = {"seconds": time.perf_counter() - started}
        if failure is None and out.exists():
            return found | json.loads(out.read_text())
        lines = printed.read_text(errors="replace").strip().splitlines()
        print("\n".join(lines[-40:]), flush=True)
        return found | {"error": f"{failure or 'wrote nothing'}: {lines[-1] if lines else 'nothing was printed'}"}


def part_process(name: str, tiny: bool, limits: Limits | None, out: Path, printed: Path) -> None:
    """The process of one part; `limits` is one as well. What it prints goes to a file."""
    os.setsid()
    with printed.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    if limits is None:
        found = {key: value for key, value in environment(str(bench_device())).items() if key != "argv"}
        found["num_gpus"] = torch.cuda.device_count()
        out.write_text(json.dumps({**measure_limits(tiny).to_json(), "environment": found}))
        return
    out.write_text(json.dumps(importlib.import_module(f"bench.{name}").measure(limits, tiny).to_json()))


def earlier_parts(path: Path, limits: Limits, measured_now: Sequence[str]) -> dict[str, Any]:
    """Parts of an earlier report that are not measured now: of the same device and torch, else none."""
    if not path.exists():
        return {}
    report = json.loads(path.read_text())
    if any(report["limits"][key] != getattr(limits, key) for key in ("device", "torch")):
        return {}
    return {name: part for name, part in report["parts"].items() if name not in measured_now}


def summary(parts: dict[str, dict[str, Any]]) -> str:
    """One table: every target of every part."""
    rows = []
    for name, part in parts.items():
        if "error" in part:
            rows.append([name, "FAILED", part["error"][:60], "", ""])
            continue
        for check in Findings.from_json(part).checks:
            value = "-" if check.value is None else number(check.value)
            rows.append(
                [name, check.name, value, f"{check.wanted} {number(check.target)}", "ok" if check.is_met else "MISSED"]
            )
    return plain_table(["part", "figure", "measured", "target", ""], rows)


def draw(report: dict[str, Any], path: Path) -> bool:
    """Clips a second over the batch size, and how far each figure is from its target; False without matplotlib."""
    pyplot = find_pyplot()
    if pyplot is None:
        return False
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained")
    rows = report["parts"].get("step", {}).get("rows", [])
    for side in dict.fromkeys(row["side"] for row in rows):
        points = sorted((row["clips"], row["clips/s"]) for row in rows if row["side"] == side and row.get("clips/s"))
        if points:
            left.plot(*zip(*points, strict=True), marker="o", label=side)
    left.set(xscale="log", yscale="log", xlabel="clips a step", ylabel="clips a second", title="training step")
    sizes = sorted({row["clips"] for row in rows})
    left.set_xticks(sizes, [str(size) for size in sizes], minor=False)
    left.set_xticks([], minor=True)
    left.grid(alpha=0.3, which="both")
    if rows:
        left.legend()
    names, shares = [], []
    for name, part in report["parts"].items():
        for check in Findings.from_json(part).checks if "error" not in part else []:
            if check.value:
                ratio = check.value / check.target
                names.append(f"{name}: {check.name}")
                shares.append(ratio if check.wanted == "at least" else 1 / ratio)
    right.barh(names[::-1], shares[::-1], color=["tab:green" if s >= 1 else "tab:red" for s in shares[::-1]])
    right.axvline(1.0, color="black", linewidth=1)
    right.set(title="measured over target (1 and more: met)", xlim=(0, 2.5))
    right.tick_params(axis="y", labelsize=7)
    figure.suptitle(f"{report['limits']['device']}, torch {report['limits']['torch']}")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="All benchmarks of speed and memory on this device.")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), help="default: all that the GPUs here allow")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--tiny", action="store_true", help="small shapes: does everything run at all")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    measured = run_part("limits", args.tiny, None, LIMITS_S)
    if "error" in measured:
        print(f"the device's limits could not be measured: {measured['error']}", file=sys.stderr)
        return 1
    limits = Limits(**{key: measured[key] for key in ("device", "torch", "matrix_flops", "copy_bytes")})
    print(limits.line(), flush=True)
    report: dict[str, Any] = {"limits": limits.to_json(), "environment": measured["environment"], "parts": {}}
    args.out.mkdir(parents=True, exist_ok=True)
    name_of_device = re.sub(r"[^A-Za-z0-9]+", "-", limits.device).strip("-")
    wanted = args.parts or [p for p in PARTS if p not in PARTS_OF_SEVERAL_GPUS or report["environment"]["num_gpus"] > 1]
    report["parts"] = earlier_parts(args.out / f"{name_of_device}.json", limits, wanted)
    for name in wanted:
        limit_s = PARTS[name]
        if name not in PARTS_OF_SEVERAL_GPUS:
            limit_s = min(limit_s, WHOLE_S - (time.perf_counter() - started))
        part: dict[str, Any] = {"error": "no time was left"}
        if limit_s > 5:
            part = run_part(name, args.tiny, limits, limit_s)
        report["parts"][name] = {"measured": time.strftime("%Y-%m-%d %H:%M"), **part}
        text = f"FAILED: {part['error']}" if "error" in part else Findings.from_json(part).text()
        print(f"\n== {name}, {part.get('seconds', 0):.0f} s\n{text}", flush=True)
        report["seconds"] = time.perf_counter() - started
        write_file_atomically(args.out / f"{name_of_device}.json", json_bytes(report))
    print(f"\n{summary(report['parts'])}\n\n{report['seconds']:.0f} s; {args.out / f'{name_of_device}.json'}")
    if draw(report, args.out / f"{name_of_device}.png"):
        print(f"plot {args.out / f'{name_of_device}.png'}")
    return int(any("error" in part for part in report["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
