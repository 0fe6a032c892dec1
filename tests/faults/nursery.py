"""Forks the ranks of a run out of one process that has imported everything: a second or two instead of fifteen.

It stands in for torchrun where torchrun is not what is tested: it starts the ranks of one attempt with torchrun's
environment, ends the others when one fails (SIGTERM, then SIGKILL), and tells all exit codes. It reads one JSON line a
run on standard input, works on several runs at once, and answers in files:

    {"answer": "/x/1", "world_size": 2, "port": 29512, "fault": "none", "flags": [...], "cwd": ..., "out": ..., ...}
    /x/1.pids  [4711, 4712]        /x/1.codes  [0, -9]
"""

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:] = [str(ROOT), *(p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent)]

import torch  # noqa: E402

import tests.faults.rank as program  # noqa: E402


def fork_rank(rank: int, job: dict) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["world_size"]}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": job["port"]}
        os.environ.update({k: str(v) for k, v in place.items()} | job["env"])
        os.chdir(job["cwd"])
        out = os.open(job["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        program.RANK = str(rank)
        code = program.run(job["fault"], job["flags"])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def supervise(job: dict) -> None:
    pids = [fork_rank(rank, job) for rank in range(job["world_size"])]
    tell(job["answer"] + ".pids", pids)
    codes: dict[int, int] = {}
    ending_since = None
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        living = set(pids) - codes.keys()
        if any(codes.values()) and living and ending_since is None:
            ending_since = time.monotonic()
            for pid in living:
                os.kill(pid, signal.SIGTERM)
        if ending_since and time.monotonic() - ending_since > job["grace_s"]:
            for pid in living:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    tell(job["answer"] + ".codes", [codes[pid] for pid in pids])


def tell(path: str, value: list[int]) -> None:
    Path(path + ".new").write_text(json.dumps(value))
    os.rename(path + ".new", path)


def main() -> None:
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if os.fork() == 0:
            supervise(json.loads(line))
            os._exit(0)


if __name__ == "__main__":
    main()
