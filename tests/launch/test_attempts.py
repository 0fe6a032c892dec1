"""launch/attempts.py: the run's own status decides; signals reach the command once; nothing is left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.standins import ROOT, write_program

PROGRAM = str(ROOT / "launch" / "attempts.py")

# Does at its n-th start what the n-th word of PLAN says; writes down its arguments and the signals that it gets.
COMMAND = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
run = Path(sys.argv[1])
run.mkdir(exist_ok=True)
calls = run / "calls"
plan = os.environ["PLAN"].split()
word = plan[min(calls.read_text().count("\\n") if calls.exists() else 0, len(plan) - 1)]
with calls.open("a") as file:
    file.write(json.dumps(sys.argv[2:]) + "\\n")

def status(state, message=""):
    (run / "new").write_text(json.dumps({"state": state, "step": 7, "message": message}))
    os.replace(run / "new", run / "status.json")

def on_signal(number, frame):
    with (run / "signals").open("a") as file:
        file.write(f"{number}\\n")
    if word == "wait":
        status("preempted")
        sys.exit(1)

if word == "finish":
    status("finished")
    sys.exit(1)  # torchrun's code says nothing
if word == "fail":
    status("failed", "RuntimeError: CUDA error")
    sys.exit(0)
if word == "wrong":
    status("failed", "ValueError: lr: got 0")
    sys.exit(1)
if word in ("told", "agreed"):
    status("preempted")
    sys.exit(1 if word == "told" else 0)
if word == "die":
    status("training")
    os.kill(os.getpid(), signal.SIGKILL)
if word == "silent":
    sys.exit(3)
if word == "orphan":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    (run / "orphan").write_text(str(child.pid))
    os.kill(os.getpid(), signal.SIGKILL)
if word == "bar":
    sys.stdout.write("\\x1b[2K\\rworking 1%\\x1b[2K\\rworking 2%\\x1b[2K\\r\\x1b[1mstep 1\\x1b[0m\\n")
    status("finished")
    sys.exit(0)
if word == "linger":
    status("finished")
    time.sleep(60)  # as torchrun does for machines that are gone
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, on_signal)
status("training")
(run / "ready").touch()
time.sleep(60)
"""


def command(folder: Path, retries: int = 3, *more: str) -> list[str]:
    (folder / "command.py").write_text(COMMAND)
    own = ["--run_dir", str(folder / "run"), "--retries", str(retries), "--wait_s", "0.01", *more]
    return [sys.executable, PROGRAM, *own, "--", sys.executable, str(folder / "command.py"), str(folder / "run"), "--a"]


def run(folder: Path, plan: str, *more: str, retries: int = 3) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PLAN": plan}
    return subprocess.run(
        command(folder, retries, *more), env=env, capture_output=True, text=True, timeout=60, check=False
    )


def calls(folder: Path) -> list[list[str]]:
    return [json.loads(line) for line in (folder / "run" / "calls").read_text().splitlines()]


@pytest.mark.parametrize(
    ("plan", "retries", "code", "attempts"),
    [
        ("finish", 3, 0, 1),
        ("fail die silent finish", 3, 0, 4),
        ("fail", 2, 1, 3),
        ("die", 0, 1, 1),
        ("wrong finish", 3, 2, 1),
        ("told told finish", 3, 0, 3),  # by torchrun, for a worker had died
        ("agreed finish", 3, 75, 1),  # by another machine's scheduler
    ],
)
def test_the_status_decides(tmp_path: Path, plan: str, retries: int, code: int, attempts: int) -> None:
    done = run(tmp_path, plan, retries=retries)
    assert done.returncode == code, done.stdout + done.stderr
    started = calls(tmp_path)
    assert len(started) == attempts
    assert started[0] == ["--a"]
    assert all(arguments == ["--a", "--resume", "auto"] for arguments in started[1:])


def test_an_old_status_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "status.json").write_text(json.dumps({"state": "finished", "step": 1, "message": ""}))
    done = run(tmp_path, "silent", retries=1)
    assert done.returncode == 1
    assert "no word in" in done.stdout
    assert "exit code 3" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_is_handed_on_once_and_ends_the_attempts(tmp_path: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(command(tmp_path), env={**os.environ, "PLAN": "wait"}, stdout=subprocess.PIPE, text=True)
    try:
        wait_for(tmp_path / "run" / "ready")
        process.send_signal(number)
        said, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 75, said
    assert "stopped: checkpoint at step 7" in said
    received = (tmp_path / "run" / "signals").read_text().split()
    assert received == [str(int(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM))]
    assert len(calls(tmp_path)) == 1


def wait_for(path: Path, limit_s: float = 30.0) -> None:
    until = time.monotonic() + limit_s
    while not path.exists():
        assert time.monotonic() < until, f"{path} did not appear"
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="orphans are adopted on Linux only")
def test_processes_of_a_dead_attempt_are_ended_before_the_next(tmp_path: Path) -> None:
    done = run(tmp_path, "orphan finish")
    assert done.returncode == 0, done.stdout + done.stderr
    orphan = int((tmp_path / "run" / "orphan").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(orphan, 0)


@pytest.mark.parametrize("more", [(), ("--log", "log")])
def test_a_torchrun_that_waits_for_others_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    monkeypatch.setenv("SETTLED_LIMIT_S", "0.2")
    monkeypatch.chdir(tmp_path)
    done = run(tmp_path, "linger", *more)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the run has ended, but torchrun has not" in done.stdout


def test_the_closing_table_of_gpu_use_is_in_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_program(tmp_path / "tools" / "nvidia-smi", "#!/bin/sh\necho 0, 90, 30000, 40960, 250.5, 61\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'tools'}:{os.environ['PATH']}")
    monkeypatch.setenv("GPU_SAMPLE_S", "0.02")
    log = tmp_path / "train.log"
    process = subprocess.Popen(command(tmp_path, 3, "--log", str(log)), env={**os.environ, "PLAN": "wait"})
    try:
        wait_for(tmp_path / "run" / "ready")
        time.sleep(1.0)
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    finally:
        process.kill()
    assert "launch:   GPU  0   90 %   30000 of 40960 MiB   250 W   61 C" in log.read_text()


def test_the_log_has_all_attempts_and_no_progress_bar(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "train.log"
    assert run(tmp_path, "fail bar", "--log", str(log)).returncode == 0
    lines = log.read_text().splitlines()
    assert "step 1" in lines
    assert not any("working" in line or "\x1b" in line for line in lines)
    assert any("attempt 1 of 4 failed: step 7: RuntimeError: CUDA error" in line for line in lines)
    assert any(line.startswith("launch: finished") for line in lines)


def test_under_a_terminal_the_command_has_one_too(tmp_path: Path) -> None:
    """A progress bar shows itself on terminals only; the log must not take the terminal away."""
    (tmp_path / "command.py").write_text(
        "import os, sys, json, pathlib\n"
        "run = pathlib.Path(sys.argv[1]); run.mkdir()\n"
        "print('terminal', sys.stdout.isatty(), os.get_terminal_size().columns)\n"
        "(run / 'status.json').write_text(json.dumps({'state': 'finished', 'step': 1, 'message': ''}))\n"
    )
    import pty
    import termios

    outer, inner = pty.openpty()
    termios.tcsetwinsize(inner, (40, 123))
    log = tmp_path / "train.log"
    own = ["--run_dir", str(tmp_path / "run"), "--log", str(log), "--"]
    words = [sys.executable, PROGRAM, *own, sys.executable, str(tmp_path / "command.py"), str(tmp_path / "run")]
    done = subprocess.run(words, stdout=inner, stderr=inner, timeout=60, check=False)
    os.close(inner)
    os.close(outer)
    assert done.returncode == 0, log.read_text()
    assert "terminal True 123" in log.read_text()
