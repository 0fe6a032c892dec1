"""A checkpoint at its true size: do our towers agree with transformers, how fast do they train, in how much memory.

    python bench/random_checkpoint.py /tmp/qwen2-audio --tokenizer DIR
    python bench/true_size.py --checkpoint /tmp/qwen2-audio --out report [-- further flags of bin/train.py]

Parts, in order: `parity` (bench/parity.py), `train` (bench/training_run.py). Each prints a line as it finishes, and the
report so far goes to OUT/true_size.json. A table closes; the loss curve is drawn to OUT/loss.png where matplotlib is
installed. Exit code 1 when a part failed or a cosine is below its target: the other part is still run and reported.
"""

import sys
from pathlib import Path

if __package__ != "bench":  # run as a file: the root goes first on sys.path, and bench/ comes off it
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]

import argparse
import traceback
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from bench import parity, training_run
from bench.findings import find_pyplot
from bench.limits import free_memory
from bin.runlog import environment
from data.clips import load_clips
from data.drops import DropLog
from data.glossary import load_glossary
from data.reader import AudioReader
from data.settings import DataSettings
from distributed.atomic import json_bytes, write_file_atomically

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("parity", "train")
REPORT_FILE, PLOT_FILE = "true_size.json", "loss.png"


def choose_inputs(clips: Path, count: int) -> tuple[list[np.ndarray], list[str]]:
    """`count` waveforms of all lengths (int16, 16 kHz mono), and up to `count` strings: texts of clips, then terms."""
    known = load_clips(clips / "train.json", DataSettings(), DropLog())
    known.sort(key=lambda clip: ((clip.end_s or 0.0) - (clip.start_s or 0.0), clip.clip_id))
    chosen = _spread(known, count)
    reader = AudioReader()
    waves = [reader.read(clip.audio_path, clip.start_s, clip.end_s) for clip in chosen]
    texts = list(dict.fromkeys(clip.text for clip in chosen if clip.text))
    terms = [term for term in load_glossary(clips / "glossary.json").terms if term not in texts]
    return waves, [*texts[: count // 2], *_spread(terms, count - count // 2)]


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """`count` items at even distances, the first and the last among them."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[place] for place in places]


def draw_loss(loss: Sequence[float | None], path: Path) -> bool:
    """The loss curve as an image; False where matplotlib, which nothing else needs, is not installed."""
    pyplot = find_pyplot()
    if pyplot is None:
        return False
    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(range(1, len(loss) + 1), [float("nan") if value is None else value for value in loss], marker=".")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def train_line(train: dict[str, Any]) -> str:
    within, loss = train["steps_within_epochs"], train["loss"]
    return (
        f"train  {train['steps']} steps{' with --checkpointing (out of memory without)' * (len(train['attempts']) > 1)}"
        f"  step {within['step_ms_median']:.0f} ms (p90 {within['step_ms_p90']:.0f})"
        f"  {within['clips_per_s_median']:.0f} clips/s  wait {within['wait_ms_median']:.1f} ms"
        f"  peak {_number(train['peak_gib'], '.1f')} GiB  loss {_number(loss[0], '.3f')} -> {_number(loss[-1], '.3f')}"
        f"  in {train['seconds']:.0f} s"
    )


def table(report: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, value) rows of whatever the report holds."""
    env = report["environment"]
    rows = [("device", env["device"]), ("torch / transformers", f"{env['torch']} / {env['transformers']}")]
    if "parity" in report and "agreements" in report["parity"]:
        found = report["parity"]
        rows.append(("load, ours / transformers", f"{found['ours_load_s']:.1f} s / {found['theirs_load_s']:.1f} s"))
        for name, one in found["agreements"].items():
            rows.append((f"cosine {name}, min / mean", f"{one['min_cosine']:.6f} / {one['mean_cosine']:.6f}"))
    if "train" in report and "loss" in report["train"]:
        train = report["train"]
        every, within = train["all_steps"], train["steps_within_epochs"]
        memory = f"{_number(train['peak_gib'], '.1f')} GiB / {train['host_peak_gib']:.1f} GiB"
        rows += [
            (
                "checkpointing",
                "on, out of memory without" if len(train["attempts"]) > 1 else str(train["checkpointing"]),
            ),
            ("parameters, trained / all", f"{train['trainable_m']} M / {train['parameters_m']} M"),
            ("model ready, first step done", f"{train['model_ready_s']} s, {train['first_step_after_s']:.1f} s"),
            ("step, median / p90", f"{within['step_ms_median']:.1f} / {within['step_ms_p90']:.1f} ms"),
            ("  first of epochs included", f"{every['step_ms_median']:.1f} / {every['step_ms_p90']:.1f} ms"),
            ("  the very first", f"{train['first_step_ms']:.0f} ms"),
            ("clips/s, median", f"{within['clips_per_s_median']:.1f} (all {every['clips_per_s_median']:.1f})"),
            ("waiting for data, median / p90", f"{within['wait_ms_median']:.1f} / {within['wait_ms_p90']:.1f} ms"),
            ("peak memory, GPU / host", memory),
            ("loss, first / last", f"{_number(train['loss'][0], '.4f')} / {_number(train['loss'][-1], '.4f')}"),
            ("Recall@1/5/10 before", _recalls(train["before"])),
            ("Recall@1/5/10 after", _recalls(train["after"])),
            ("checkpoint saved in", f"{_number(train['checkpoint_s'], '.2f')} s"),
            (
                "on disk, MB",
                "  ".join(f"{name} {size:.1f}" for name, size in train["mb_on_disk"].items() if size >= 0.1),
            ),
        ]
    rows += [
        (f"{part} FAILED", report[part]["error"].splitlines()[0]) for part in PARTS if "error" in report.get(part, {})
    ]
    return rows


def _recalls(numbers: dict[str, float]) -> str:
    return " / ".join(_number(numbers.get(f"recall@{k}"), ".3f") for k in (1, 5, 10))


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    split = argv.index("--") if "--" in argv else len(argv)
    argv, train_flags = argv[:split], argv[split + 1 :]
    parser = argparse.ArgumentParser(
        description="Measure a checkpoint at its true size.", epilog="Flags after -- go to bin/train.py."
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of a Qwen2-Audio checkpoint")
    parser.add_argument(
        "--clips", type=Path, default=ROOT / "samples" / "telephony", help="train.json, test.json and glossary.json"
    )
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps to train")
    parser.add_argument("--num_inputs", type=int, default=24, help="clips and strings to compare")
    parser.add_argument("--out", type=Path, default=Path("runs/true_size"), help="where the report goes")
    parser.add_argument("--runs_dir", type=Path, help="where the run goes; by default OUT/runs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args(argv)
    checkpoint, clips, out = args.checkpoint.resolve(), args.clips.resolve(), args.out.resolve()
    for file in (checkpoint / "config.json", *(clips / name for name in ("train.json", "test.json", "glossary.json"))):
        if not file.is_file():
            parser.error(f"{file} does not exist")
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report: dict[str, Any] = {"environment": environment(str(device)), "checkpoint": str(checkpoint)}
    print(f"device {report['environment']['device']}, torch {torch.__version__}", flush=True)

    def run(part: str) -> bool:
        """One part, its result or its error into the report. True when all is well."""
        if part == "parity":
            found = parity.measure(checkpoint, *choose_inputs(clips, args.num_inputs), device)
            report[part] = parity.as_json(found)
            print("\n".join(one.line(name) for name, one in found["agreements"].items()), flush=True)
            return bool(found["is_good"])
        runs_dir = (args.runs_dir or out / "runs").resolve()
        report[part] = training_run.measure(checkpoint, clips, args.steps, runs_dir, train_flags)
        print(train_line(report[part]), flush=True)
        if draw_loss(report[part]["loss"], out / PLOT_FILE):
            print(f"plot   {out / PLOT_FILE}", flush=True)
        return True

    is_good = True
    for part in (part for part in PARTS if part in args.parts):
        try:
            is_good &= run(part)
        except Exception as error:  # the other part, on a machine that was hard to get, is worth its figures
            traceback.print_exc()
            report[part] = {"error": f"{type(error).__name__}: {error}"}
            is_good = False
        free_memory(device)
        write_file_atomically(out / REPORT_FILE, json_bytes(report))
    rows = table(report)
    width = max(len(name) for name, _ in rows)
    print("\n".join(["", *(f"{name:{width}}  {value}" for name, value in rows), "", f"report {out / REPORT_FILE}"]))
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
