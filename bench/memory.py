"""How many clips fit under 40 GiB: without recomputing anything, and with recomputed layers.

    python bench/memory.py [--tiny] [--json FILE]

The model of bench/step.py, with everything on but CUDA graphs, whose classes share memory imperfectly. The layers to
recompute are those that `--checkpointing auto` chooses (model/memory.py). Each part is a process of its own under the
cap, and one size after the other is tried until one does not fit: what a line shows has run, a step of forward,
backward and optimizer. What the peers take is in the table of bench/step.py.
"""

import sys
from pathlib import Path

if __package__ != "bench":  # run as a file: the root goes first on sys.path, and bench/ comes off it
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]

import argparse
import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.findings import Findings, run_alone
from bench.limits import Limits, bench_device, synchronize
from bench.ours import Shapes, Training, batches, build, cap_memory, count_tokens, peak_gib
from bench.step import run_side
from bin.fit import costs, room_bytes
from model.memory import AUDIO_FRONT_BYTES, Plan, bytes_needed, parked, plan_layers

CAP_GIB = 40.0
WHOLE_SIZES, TINY_SIZES = (240, 248, 256, 280, 320, 360, 400), (2, 4)
RECOMPUTED_SIZES = (400, 4000)  # 4,000: inputs of layers are in host memory
PARITY_CLIPS, LEAST_COSINE = 32, 0.9999
LIMIT_S = {"whole": 40.0, "recomputed": 70.0}
WHOLE_TARGET, RECOMPUTED_TARGET = 400, 4000


def gradient(training: Training, fed: Any) -> Tensor:
    training.zero()
    torch.manual_seed(0)
    training.backward(fed)
    return training.gradient()


def set_plan(training: Training, num_audio: int, num_text: int, parks: bool = False) -> None:
    training.model.audio_tower.num_checkpointed = num_audio
    training.model.language_model.num_checkpointed = num_text
    training.model.audio_tower.parks_checkpoints = training.model.language_model.parks_checkpoints = parks
    training.release()


def check_gradient(training: Training, shapes: Shapes, num_clips: int) -> float:
    """Least cosine of the gradients with half of the layers recomputed, from inputs on the device and on the host, to
    those with none, dropout on."""
    fed = batches(shapes, training.device, num_clips, 1)[0]
    found = []
    towers = (training.model.audio_tower, training.model.language_model)
    halves = [len(tower.layers) // 2 for tower in towers]
    for share, parks in ((0, False), (1, False), (1, True)):
        set_plan(training, halves[0] * share, halves[1] * share, parks)
        found.append(gradient(training, fed))
    set_plan(training, 0, 0)
    cosine = min(float(F.cosine_similarity(found[0].double(), other.double(), dim=0)) for other in found[1:])
    if not cosine >= LEAST_COSINE:
        raise RuntimeError(f"gradient with recomputed layers: cosine {cosine:.6f}, at least {LEAST_COSINE}")
    return cosine


def try_sizes(recomputes: bool, sizes: Sequence[int], tiny: bool, cap_gib: float) -> None:
    """One JSON line a size, up to the first that does not fit."""
    device, shapes = bench_device(), Shapes.of(tiny)
    cap_memory(cap_gib, device)
    torch.manual_seed(0)
    training = Training(build(shapes, device), cuda_graphs="off")
    print(json.dumps({"model_gib": held_gib(device)}), flush=True)
    if recomputes:
        print(json.dumps({"cosine": check_gradient(training, shapes, 4 if tiny else PARITY_CLIPS)}), flush=True)
    for num_clips in sizes:
        found: dict[str, Any] = {"clips": num_clips}
        fed = batches(shapes, device, num_clips, 1)[0]
        audio_tokens, text_tokens = count_tokens(fed)
        audio, text = costs(training.model)
        plan = Plan(0, 0, 0, True)
        if recomputes:
            room = room_bytes(cap_gib, training.model)
            assert room is not None
            plan = plan_layers(audio, text, audio_tokens, text_tokens, room, may_park=True)
            set_plan(training, plan.num_audio, plan.num_text, plan.parks)
            if plan.parks:
                audio, text = parked(audio), parked(text)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        before = held_gib(device)
        try:
            training.step(fed)
            synchronize(device)
        except torch.OutOfMemoryError:
            found["out_of_memory"] = True
        parts = {
            "audio": audio.bytes_of(plan.num_audio, audio_tokens), "text": text.bytes_of(plan.num_text, text_tokens),
            "front": AUDIO_FRONT_BYTES * audio_tokens,
        }  # fmt: skip
        needed = bytes_needed(audio, text, audio_tokens, text_tokens, plan.num_audio, plan.num_text)
        found |= {"num_audio": plan.num_audio, "num_text": plan.num_text, "parks": plan.parks,
                  "peak_gib": peak_gib(device), "before_gib": before, "formula_gib": needed / 2**30,
                  **{f"{name}_mib_a_clip": count / num_clips / 2**20 for name, count in parts.items()}}  # fmt: skip
        print(json.dumps(found), flush=True)
        if "out_of_memory" in found:
            break
        training.release()


def held_gib(device: torch.device) -> float:
    return torch.cuda.memory_allocated() / 2**30 if device.type == "cuda" else 0.0


def measure(limits: Limits, tiny: bool = False) -> Findings:
    """Clips that fit in one pass under a cap."""
    found = Findings(f"clips in one pass under {CAP_GIB:.0f} GiB, one GPU")
    more = ["--tiny"] if tiny else []
    largest: dict[str, int | None] = {}
    for name, kind in (("nothing recomputed", "whole"), ("layers recomputed", "recomputed")):
        lines, failure = run_side(["bench/memory.py", "--side", kind, *more], LIMIT_S[kind])
        if failure is not None:
            found.notes.append(f"{name}: ended early: {failure}")
        fitting = [line["clips"] for line in lines if "clips" in line and "out_of_memory" not in line]
        largest[kind] = max(fitting, default=None)
        for line in lines:
            if "cosine" in line:
                found.check("gradient with recomputed layers, cosine", line["cosine"], LEAST_COSINE)
            if "clips" not in line:
                continue
            step_gib = None if line["peak_gib"] is None else line["peak_gib"] - line["before_gib"]
            failed = "out_of_memory" in line
            side = f"ours, {name}" + (", inputs on the host" if line["parks"] else "")
            found.rows.append({
                "side": side, "clips": line["clips"], "audio layers": line["num_audio"],
                "text layers": line["num_text"], "GiB": "out of memory" if failed else line["peak_gib"],
                "of a step": None if failed else step_gib, "formula": line["formula_gib"],
                "MiB a clip": None if failed or step_gib is None else step_gib * 1024 / line["clips"],
                "audio, formula": line["audio_mib_a_clip"], "text, formula": line["text_mib_a_clip"],
            })  # fmt: skip
    found.check("clips without recomputing", largest["whole"], WHOLE_TARGET)
    found.check("clips with recomputed layers", largest["recomputed"], RECOMPUTED_TARGET)
    found.notes.append("formula: what layers keep and work in (model/memory.py); what the peers take: bench/step.py")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--side", choices=("whole", "recomputed"), help="internal: be the process of this part")
    parser.add_argument("--cap_gib", type=float, default=CAP_GIB)
    args, rest = parser.parse_known_args(argv)
    if args.side is not None:
        tiny, recomputes = "--tiny" in rest, args.side == "recomputed"
        try_sizes(
            recomputes, TINY_SIZES if tiny else RECOMPUTED_SIZES if recomputes else WHOLE_SIZES, tiny, args.cap_gib
        )
        return 0
    return run_alone(measure, rest)


if __name__ == "__main__":
    sys.exit(main())
