"""Start, disturb and finish runs of bin/train.py, and see what they leave behind."""

import hashlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distributed.rundir import read_status
from tests.bin.tones import AUDIO, TERMS, TEXT, write_samples
from tests.distributed.launching import free_port

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LIMIT_S = 180.0  # for any one wait
MARK = "EARMARK_FAULTS"  # in the environment of every process of a workshop


class Nursery:
    """One nursery.py process, started when first needed."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._process: subprocess.Popen[str] | None = None

    def submit(self, job: dict[str, Any]) -> None:
        if self._process is None:
            env = environment(self._device)
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "nursery.py")],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT,
            )  # fmt: skip
            assert self._process.stdout is not None
            assert self._process.stdout.readline() == "ready\n"
        assert self._process.stdin is not None
        print(json.dumps(job), file=self._process.stdin, flush=True)

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate()
            self._process = None


def children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout
    return sorted(map(int, found.split()))


def environment(device: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})}


@dataclass
class Workshop:
    """A folder with data, runs and one nursery; all cases of a soak share it. device: of all ranks, cpu or cuda."""

    folder: Path
    ranks: int = 2
    device: str = "cpu"
    word: str = field(default_factory=lambda: secrets.token_hex(6))
    references: dict[tuple[str, ...], dict[str, str]] = field(default_factory=dict)
    shared_memory: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.nursery = Nursery(self.device)
        (self.folder / "tmp").mkdir(parents=True, exist_ok=True)
        write_samples(self.folder, "train", 3 * self.batch_size, seed=1)
        write_samples(self.folder, "test", 10, seed=2)
        for name, content in {"glossary": [*TERMS, "parking lot", "hash key"], "audio": AUDIO, "text": TEXT}.items():
            (self.folder / f"{name}.json").write_text(json.dumps(content))

    @property
    def batch_size(self) -> int:
        """At least two clips a rank; an epoch has three steps."""
        return max(8, 2 * self.ranks)

    def flags(self, *more: str) -> list[str]:
        at = self.folder
        return [
            *("--train_samples_path", f"{at}/train.json", "--test_samples_path", f"{at}/test.json"),
            *("--glossary_path", f"{at}/glossary.json", "--check_cache_path", f"{at}/checks.jsonl"),
            *("--audio_model", f"{at}/audio.json", "--text_model", f"{at}/text.json", "--trainable", "full"),
            *(
                "--proj_dim",
                "16",
                "--batch_size",
                str(self.batch_size),
                "--lr",
                "3e-3",
                "--epochs",
                "4",
                "--patience",
                "0",
            ),
            *("--tower_dropout", "0.1", "--augment_speed", "0.1", "--learn_temperature", "--num_workers", "1"),
            *("--device", self.device, "--log_every", "1", "--show_examples", "0", "--save_every_steps", "2"),
            *("--runs_dir", str(at / "runs"), "--resume", "auto", "--no-tensorboard"),
            *more,
        ]

    def reference(self, *more: str) -> dict[str, str]:
        """Hashes of what an undisturbed run with these further flags trains."""
        if more not in self.references:
            job = Job(self, f"undisturbed-{len(self.references)}", more)
            job.start()
            assert not any(job.wait()), job.told()[-3000:]
            self.references[more] = job.trained()
        return self.references[more]

    def processes(self) -> list[int]:
        """Living processes of this workshop, the nursery aside; notes their shared memory."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                if f"{MARK}={self.word}".encode() not in (entry / "environ").read_bytes().split(b"\0"):
                    continue
                if (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z":
                    continue
                self.shared_memory.update(re.findall(r"/dev/shm/\S+", (entry / "maps").read_text()))
            except OSError:
                continue
            found.append(int(entry.name))
        return found


@dataclass
class Job:
    """One run directory, over as many attempts as it takes."""

    shop: Workshop
    name: str
    more: tuple[str, ...] = ()
    launcher: str = "nursery"  # or torchrun, or attempts: torchrun under launch/attempts.py
    ranks: int = 0  # those of the workshop
    runs_dir: Path | None = None
    grace_s: float = 30.0
    pids: list[int] = field(default_factory=list)
    port: int = 0

    def __post_init__(self) -> None:
        self.ranks = self.ranks or self.shop.ranks

    @property
    def dir(self) -> Path:
        return (self.runs_dir or self.shop.folder / "runs") / self.name

    @property
    def out(self) -> Path:
        return self.shop.folder / f"{self.name}.out"

    def start(self, fault: str = "none", *more: str) -> None:
        flags = self.shop.flags(*self.more, "--run_name", self.name, *more)
        if self.runs_dir is not None:
            flags += ["--runs_dir", str(self.runs_dir)]
        env = {MARK: self.shop.word, "TMPDIR": str(self.shop.folder / "tmp")}
        self.port = free_port()
        self.out.write_text("")
        if self.launcher == "nursery":
            self._answer = str(self.shop.folder / f"answer-{secrets.token_hex(4)}")
            # Shared environment only reaches /proc/PID/environ by exec, so forked ranks are known by their ids.
            self.shop.nursery.submit(
                {"answer": self._answer, "world_size": self.ranks, "port": self.port, "fault": fault, "flags": flags,
                 "cwd": str(self.shop.folder), "out": str(self.out), "env": env, "grace_s": self.grace_s}
            )  # fmt: skip
            self.pids = self._await_file(".pids")
            return
        program = [str(ROOT / "bin" / "train.py")] if fault == "none" else [str(HERE / "rank.py"), fault]
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={self.ranks}"]
        launcher += ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{self.port}"]
        if self.launcher == "attempts":
            program_of_ours = [sys.executable, str(ROOT / "launch" / "attempts.py"), "--run_dir", str(self.dir)]
            launcher = [*program_of_ours, "--wait_s", "0.1", "--", *launcher]
        with self.out.open("ab") as out:
            self._process = subprocess.Popen(
                [*launcher, *program, *flags], cwd=self.shop.folder, stdout=out, stderr=out, start_new_session=True,
                env=environment(self.shop.device) | env,
            )  # fmt: skip

    def wait(self, limit_s: float = LIMIT_S) -> list[int]:
        """Exit codes of the ranks, or of torchrun."""
        if self.launcher == "nursery":
            return self._await_file(".codes", limit_s)
        return [self._process.wait(limit_s)]

    def finish(self, attempts: int = 3) -> None:
        """Resume until the status says finished."""
        for _ in range(attempts):
            self.start()
            self.wait()
            if self.status()["state"] == "finished":
                return
        raise AssertionError(f"{self.name} did not finish in {attempts} attempts:\n{self.told()[-3000:]}")

    def kill(self, target: str, number: int = signal.SIGKILL) -> bool:
        """Signal the launcher, rank 0 or 1, or all ranks; False when there is nobody any more."""
        if target == "torchrun":
            pids = [self._torchrun_pid()]
        else:
            ranks = self.rank_pids()
            pids = ranks if target == "all" else ranks[int(target[-1]) : int(target[-1]) + 1]
        hit = False
        for pid in pids:
            try:
                os.kill(pid, number)
                hit = True
            except ProcessLookupError:
                pass
        return hit

    def rank_pids(self) -> list[int]:
        return self.pids if self.launcher == "nursery" else children(self._torchrun_pid())

    def _torchrun_pid(self) -> int:
        """torchrun is the launcher's first child, or the process itself; after its end no process has that number."""
        return (children(self._process.pid) or [2**31 - 1])[0] if self.launcher == "attempts" else self._process.pid

    def loader_workers(self) -> list[int]:
        return [worker for rank in self.rank_pids() for worker in children(rank)]

    def until(self, condition: Callable[[], Any], limit_s: float = LIMIT_S) -> bool:
        """Wait, closely; False when the attempt ended first."""
        deadline = time.monotonic() + limit_s
        while not condition():
            if self.is_over():
                return bool(condition())
            assert time.monotonic() < deadline, f"{self.name}: waited {limit_s} s in vain\n{self.told()[-2000:]}"
            time.sleep(0.001)
        return True

    def is_over(self) -> bool:
        if self.launcher == "nursery":
            return Path(self._answer + ".codes").exists()
        return self._process.poll() is not None

    def is_saving(self) -> bool:
        return any(self.dir.glob("checkpoints/.step-*.tmp-*")) or any(self.dir.glob(".model_*"))

    def checkpoints(self) -> list[Path]:
        return sorted(p for p in self.dir.glob("checkpoints/step-*") if (p / "MANIFEST.json").exists())

    def status(self) -> dict[str, Any]:
        return read_status(self.dir) or {"state": "none"}

    def told(self) -> str:
        return self.out.read_text(errors="replace")

    def trained(self) -> dict[str, str]:
        files = sorted(p for name in ("model_final", "model_best") for p in (self.dir / name).glob("*.safetensors"))
        assert files, self.dir
        return {f"{p.parent.name}/{p.name}": hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    def losses(self) -> list[float]:
        return [line["train/loss"] for line in self._metrics() if "train/loss" in line]

    def metric_steps(self) -> list[int]:
        return [line["step"] for line in self._metrics()]

    def _metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.dir / "metrics.jsonl").read_text().splitlines()]

    def until_gone(self, limit_s: float = 60.0) -> None:
        """Until no rank is left, also those that lost their launcher."""
        deadline = time.monotonic() + limit_s
        while self._living():
            assert time.monotonic() < deadline, f"{self.name}: still there: {self._living()}"
            time.sleep(0.02)

    def _living(self) -> list[int]:
        return self.shop.processes() + [pid for pid in self.pids if Path(f"/proc/{pid}").exists()]

    def leftovers(self) -> list[str]:
        """Processes, an open port, shared memory and temporary files that outlived the run; waits a little for them."""
        deadline = time.monotonic() + 15.0
        while (found := self._leftovers()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return found

    def _leftovers(self) -> list[str]:
        found = [f"process {pid}" for pid in self._living()]
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                found.append(f"port {self.port}")
        found += [name for name in self.shop.shared_memory if Path(name).exists()]
        # torchrun's own folder of logs stays behind when torchrun itself is killed: not ours to remove.
        owned = ("torchelastic_", "torchinductor_")  # the second is a cache
        found += [p.name for p in (self.shop.folder / "tmp").iterdir() if not p.name.startswith(owned)]
        found += [str(p) for p in self.dir.rglob(".*") if ".tmp" in p.name or p.name.endswith(".old")]
        return found

    def _await_file(self, suffix: str, limit_s: float = LIMIT_S) -> list[int]:
        path = Path(self._answer + suffix)
        deadline = time.monotonic() + limit_s
        while not path.exists():
            assert time.monotonic() < deadline, f"{self.name}: no {suffix} in {limit_s} s\n{self.told()[-3000:]}"
            self.shop.processes()
            time.sleep(0.01)
        return json.loads(path.read_text())
