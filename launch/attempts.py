"""Run a training command until the run has finished: restarts, signals, log and GPU use around torchrun.

    python launch/attempts.py --run_dir runs/NAME --retries 3 --log logs/train.log -- torchrun ... bin/train.py FLAG ...

What ended an attempt is read from the run's status.json, since torchrun exits with 1 even where all its workers stopped
as they were told. Every attempt is a fresh torchrun, so no store, port or address of a dead one is met again. Attempts
after the first have `--resume auto` appended. Needs the standard library alone.

Exit code: 0 the run has finished; 75 it was stopped and has a checkpoint to go on from; 2 its settings or data are
wrong, which another attempt cannot mend; 1 otherwise.
"""

import argparse
import ctypes
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Literal

HERE = Path(__file__).resolve().parent
FINISHED, FAILED, WRONG, STOPPED = 0, 1, 2, 75  # 75 is EX_TEMPFAIL of sysexits.h: "try again later"
LONGEST_WAIT_S = 60.0
# After the run has said how it ended, torchrun may wait 5 minutes for machines that are gone. Uploads of trackers come
# within this time, too.
SETTLED_LIMIT_S = float(os.environ.get("SETTLED_LIMIT_S", "120"))
SETTLED = ("finished", "preempted", "failed")
PR_SET_CHILD_SUBREAPER = 36  # of linux/prctl.h
KEPT: set[int] = set()  # processes of ours that outlast an attempt
TERMINAL_CODES = re.compile(rb"\x1b\[[0-?]*[ -/]*[@-~]")

Outcome = Literal["finished", "stopped", "wrong", "failed"]
CODES: dict[Outcome, int] = {"finished": FINISHED, "stopped": STOPPED, "wrong": WRONG, "failed": FAILED}


@dataclass
class Attempts:
    """One run, over as many attempts as it takes."""

    command: list[str]
    run_dir: Path
    retries: int
    wait_s: float
    log: IO[bytes] | None = None
    num_started: int = 0
    stopping: bool = False
    process: subprocess.Popen[bytes] | None = None
    _status_before: tuple[int, int] | None = None
    _settled_since: float | None = None

    def run(self) -> int:
        """Start attempts until one settles it. Returns the exit code."""
        while True:
            outcome, reason = self._attempt()
            if outcome != "failed" or self.stopping:
                self.say(f"{outcome}: {reason}")
                return CODES[outcome]
            if self.num_started > self.retries:
                self.say(f"failed after {self.num_started} attempt(s): {reason}")
                return FAILED
            wait_s = min(self.wait_s * 2 ** (self.num_started - 1), LONGEST_WAIT_S)
            self.say(f"attempt {self.num_started} of {self.retries + 1} failed: {reason}")
            self.say(f"the next one starts in {wait_s:g} s and goes on from the newest good checkpoint")
            until = time.monotonic() + wait_s
            while time.monotonic() < until and not self.stopping:
                time.sleep(0.05)
            if self.stopping:
                self.say("stopped: a signal came between two attempts")
                return STOPPED

    def forward(self, number: int, frame: FrameType | None) -> None:
        """Hand a stop signal on. torchrun is told once: a second signal would break off its orderly end."""
        if self.process is not None and not self.stopping:
            self.process.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)
        elif self.process is not None and number == signal.SIGINT:
            self.process.send_signal(signal.SIGINT)  # Ctrl-C again: at once
        self.stopping = True

    def say(self, text: str) -> None:
        line = f"launch: {text}\n"
        sys.stdout.write(line)
        sys.stdout.flush()
        if self.log is not None:
            self.log.write(line.encode())
            self.log.flush()

    def _attempt(self) -> tuple[Outcome, str]:
        self._status_before, self._settled_since = self._status_stamp(), None
        again = ["--resume", "auto"] if self.num_started else []
        self.num_started += 1
        terminal = os.openpty() if self.log is not None and sys.stdout.isatty() else None
        piped = subprocess.PIPE if self.log is not None else None
        # A session of its own: Ctrl-C at a terminal reaches this program only, which hands it on once.
        self.process = subprocess.Popen(
            [*self.command, *again],
            stdout=piped if terminal is None else terminal[1],
            stderr=subprocess.STDOUT if self.log is not None else None,
            start_new_session=True,
        )
        if self.stopping:  # the signal came while the process was being made
            self.process.send_signal(signal.SIGTERM)
        if terminal is not None:
            _copy_window_size(terminal[1])
            os.close(terminal[1])
            self._copy_output(terminal[0])
            os.close(terminal[0])
        elif self.process.stdout is not None:
            self._copy_output(self.process.stdout.fileno())
            self.process.stdout.close()
        while self.process.poll() is None:
            self._end_if_settled()
            time.sleep(0.1)
        exit_code = self.process.wait()
        self.process = None
        end_orphans()
        return self._outcome(exit_code)

    def _outcome(self, exit_code: int) -> tuple[Outcome, str]:
        status = self._new_status()
        if status is None:
            # Nothing was written: on nodes without the run's disk, or before there was a run directory.
            ended = f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
            if exit_code == 0:
                return "finished", "torchrun ended with exit code 0"
            return "failed", f"no word in {self.run_dir / 'status.json'}; torchrun ended with {ended}"
        state, message = str(status.get("state")), str(status.get("message", ""))
        where = f"step {status.get('step')}"
        if state == "finished":
            return "finished", message or where
        if state == "preempted":
            # torchrun tells its workers to stop when one of them dies: nobody wanted that, and it ends in failure.
            ended_by_us = self.stopping or self._settled_since == float("inf")
            if exit_code != 0 and not ended_by_us:
                return "failed", f"{where}: a worker died, and torchrun stopped the others ({message})"
            return "stopped", f"checkpoint at {where}; {message}"
        if state == "failed":
            return ("wrong" if message.startswith("ValueError") else "failed"), f"{where}: {message}"
        return "failed", f"ended while {state} after {where} was reported"

    def _status_stamp(self) -> tuple[int, int] | None:
        """Tells a new status.json from an old one: each is another file, whatever the clock says."""
        try:
            found = (self.run_dir / "status.json").stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    def _new_status(self) -> dict[str, object] | None:
        if self._status_stamp() in (None, self._status_before):
            return None
        try:
            status = json.loads((self.run_dir / "status.json").read_bytes())
        except (OSError, ValueError) as error:
            self.say(f"status.json cannot be read: {error}")
            return None
        return status if isinstance(status, dict) else None

    def _end_if_settled(self) -> None:
        """End a torchrun that goes on although the run has ended."""
        if self._settled_since is None:
            status = self._new_status()
            self._settled_since = time.monotonic() if status and status.get("state") in SETTLED else None
        elif time.monotonic() > self._settled_since + SETTLED_LIMIT_S and self.process is not None:
            self.say("the run has ended, but torchrun has not; ending it")
            self.process.terminate()
            self._settled_since = float("inf")

    def _copy_output(self, source: int) -> None:
        """To standard output as it is, to the log without colours and without what a progress bar overwrote."""
        assert self.log is not None
        rest = b""
        while True:
            # A worker that outlives torchrun may keep the pipe open: the end of torchrun is the end.
            ready, _, _ = select.select([source], [], [], 0.5)
            if not ready:
                self._end_if_settled()
                if self.process is not None and self.process.poll() is not None:
                    break
                continue
            try:
                chunk = os.read(source, 65536)
            except OSError:  # a terminal whose other end is closed
                break
            if not chunk:
                break
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                shown = TERMINAL_CODES.sub(b"", line).rstrip(b"\r").rpartition(b"\r")[2]
                self.log.write(shown + b"\n")
            self.log.flush()
            rest = rest.rpartition(b"\r")[2] if len(rest) > 65536 else rest
        self.log.write(rest)


def adopt_orphans() -> None:
    """Become the parent of processes whose own parent dies: workers of a killed torchrun would hold the run's lock."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_orphans() -> None:
    """Kill what the attempt left behind. Asked to stop, workers would save and end the run as if that was wanted."""
    children = Path(f"/proc/self/task/{threading.get_native_id()}/children")
    if not children.exists():
        return
    left = {int(pid) for pid in children.read_text().split()} - KEPT
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    for pid in left:
        os.waitpid(pid, 0)


def _copy_window_size(terminal: int) -> None:
    """Give the inner terminal the size of the outer one, for the progress bar."""
    termios.tcsetwinsize(terminal, termios.tcgetwinsize(sys.stdout.fileno()))


def watch_gpus(run_dir: Path) -> subprocess.Popen[str] | None:
    """Start the sampler of GPU use where there is something to sample."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = [sys.executable, str(HERE / "gpu_use.py"), str(run_dir)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run a training command until the run has finished.")
    parser.add_argument("--run_dir", type=Path, required=True, help="the run's folder, whose status.json decides")
    parser.add_argument("--retries", type=int, default=3, help="attempts after the first (default: 3)")
    parser.add_argument("--wait_s", type=float, default=5.0, help="seconds before the second attempt, then doubled")
    parser.add_argument("--log", type=Path, help="file that gets all output of all attempts")
    parser.add_argument("command", nargs="+", help="after --: the whole command line")
    given = parser.parse_args()
    if given.retries < 0 or given.wait_s < 0:
        parser.error(f"--retries {given.retries} and --wait_s {given.wait_s} must be 0 or more")
    log = None
    if given.log is not None:
        given.log.parent.mkdir(parents=True, exist_ok=True)
        log = given.log.open("ab")
    attempts = Attempts(given.command, given.run_dir, given.retries, given.wait_s, log)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, attempts.forward)
    adopt_orphans()
    sampler = watch_gpus(given.run_dir)
    if sampler is not None:
        KEPT.add(sampler.pid)
    try:
        code = attempts.run()
    finally:
        if sampler is not None:
            sampler.terminate()
            for line in sampler.communicate()[0].splitlines():  # its closing table, for the log too
                attempts.say(line)
    if log is not None:
        print(f"launch: the log of all attempts is {given.log}", flush=True)
        log.close()
    return code


if __name__ == "__main__":
    sys.exit(main())
