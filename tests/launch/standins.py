"""Stand-ins for launchers' tests: a python that writes torchrun's argv down, an nvidia-smi with chosen GPUs."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Writes down `-m torch.distributed.run ...`, one argument a line, and leaves a status as a run of that name would.
# Checks of bin/preflight.py are left out where PLAN is given, since they take seconds. Else it is the real python.
PYTHON = f"""#!/usr/bin/env bash
case "$*" in
    "-m torch.distributed.run"*) shift 2; printf '%s\\n' "$@" >> "$RECORD"
        printf 'OMP_NUM_THREADS=%s\\nCUDA_VISIBLE_DEVICES=%s\\n--\\n' "$OMP_NUM_THREADS" "${{CUDA_VISIBLE_DEVICES:-}}" >> "$RECORD"
        if [[ -n "${{STATUS:-}}" ]]; then mkdir -p "runs/${{@: -1}}"; echo "$STATUS" > "runs/${{@: -1}}/status.json"; fi ;;
    "-m pip install"*) ;;
    *sys.executable*) echo "$0" ;;
    */bin/doctor.py*) echo "finding of the doctor"; exit "${{DOCTOR_EXIT:-0}}" ;;
    */bin/preflight.py*) if [[ -n "${{PLAN:-}}" ]]; then echo "$PLAN"; else exec "{sys.executable}" "$@"; fi ;;
    */launch/attempts.py*) exec "{sys.executable}" "$@" ;;
    */bin/train.py*) printf 'train.py %s\\n' "${{*:2}}" ;;
    *) exec "{sys.executable}" "$@" ;;
esac
"""  # noqa: E501

GPU_LINE = "{index}, 570.86, 40960, {free}"


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


class Launcher:
    """Runs a launcher with stand-ins before everything else on PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tools, self.record = folder, folder / "tools", folder / "record"
        self.python = write_program(self.tools / "python3", PYTHON)

    def gpus(self, free: list[int]) -> None:
        """An nvidia-smi with one GPU for each amount of free memory, in MiB."""
        lines = "\\n".join(GPU_LINE.format(index=i, free=mib) for i, mib in enumerate(free))
        write_program(self.tools / "nvidia-smi", f"#!/bin/sh\nprintf '{lines}\\n'\n")

    def environment(self, **extra: str) -> dict[str, str]:
        ours = (
            "EARMARK_",
            "OMP_",
            "CUDA_",
            "SLURM_",
            "SKYPILOT_",
            "GPUS",
            "NNODES",
            "NODE_RANK",
            "MASTER_",
            "REHEARSE",
        )
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
        path = f"{self.tools}:{os.environ['PATH']}"
        stand_ins = {"PATH": path, "PYTHON": str(self.python), "EARMARK_VENV": "none", "RECORD": str(self.record)}
        return {**inherited, **stand_ins, **extra}

    def __call__(self, command: list[str], **extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment(**extra),
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )

    def torchruns(self) -> list[list[str]]:
        """The arguments of each torchrun that was started, and its variables at the end."""
        text = self.record.read_text() if self.record.exists() else ""
        return [block.strip("\n").split("\n") for block in text.split("--\n")[:-1]]


def training_flags(arguments: list[str]) -> list[str]:
    """What bin/train.py was given, of a recorded torchrun."""
    program = next(i for i, argument in enumerate(arguments) if argument.endswith("bin/train.py"))
    return [a for a in arguments[program + 1 :] if not a.startswith(("OMP_NUM_THREADS=", "CUDA_VISIBLE_DEVICES="))]
