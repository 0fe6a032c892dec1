"""Train, evaluate and retrieve on Modal, with the repository's own programs.

    modal run launch/modal_job.py upload data/my_shards                        to the data volume; only what changed
    modal run launch/modal_job.py train --epochs 20 --lr 2e-4                  any flag of bin/train.py
    modal run --detach launch/modal_job.py train --gpu H100:8 --max_cost 300   goes on when this machine is closed
    modal run launch/modal_job.py evaluate RUN --k 10                          flags of bin/evaluate.py
    modal run launch/modal_job.py retrieve RUN talk.wav --glossary terms.json  flags of bin/retrieve.py
    modal run launch/modal_job.py fetch RUN                                    results to ./runs/RUN

`train` is what is done when no command is named. Relative data paths count from the data volume. Its own flags:

    --gpu NAME:COUNT    default A100-40GB:8; also A100-80GB:4, H100:8, H200, B200, L40S, A10, L4
    --run_name NAME     default: the time; name an earlier run to go on with it
    --max_cost DOLLARS  start nothing when the estimate is higher
    --clips_per_s N     speed over all GPUs for the estimate, from an earlier run's log
    --hf_secret NAME    Modal secret with HF_TOKEN (default: none, as the published model is open)
    --wandb_secret NAME Modal secret with WANDB_API_KEY (default wandb-secret), used only with --wandb_project

Before any GPU starts, settings and data are checked in a small container. A preempted or failed attempt goes on from
its newest checkpoint. Other GPUs, retries and places: launch/modal_setup.py.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import modal
import modal_setup as setup

app = modal.App("earmark")
image = setup.build_image()

ATTEMPT_S = 86_400  # Modal's longest, for one attempt
SPARE_S = 900  # before it, the run is stopped in good order, and the next attempt goes on
GRACE_S = 27  # Modal kills 30 s after its interrupt
WRONG, STOPPED = 2, 75  # exit codes of launch/attempts.py
RESERVED = ("--runs_dir", "--resume", "--config")

# ----------------------------------------------------------------------------------------------------- in the container


def trainer_flags(run_name: str, flags: list[str]) -> list[str]:
    """Where things are in the container, then the user's flags, then what makes a retry go on."""
    places = ["--data_root", setup.DATA, "--check_cache_path", f"{setup.CACHE}/audio_checks.jsonl"]
    return [*places, *flags, "--runs_dir", setup.RUNS, "--run_name", run_name, "--resume", "auto"]


def checkpoints(run_dir: Path) -> set[tuple[str, int]]:
    """What a commit should carry away: whole checkpoints and models, each by name and time."""
    found = [*run_dir.glob("checkpoints/step-*"), *run_dir.glob("model_*"), *run_dir.glob("status.json")]
    return {(path.name, path.stat().st_mtime_ns) for path in found if path.exists()}


def supervise(command: list[str], run_dir: Path, commit: Callable[[], None], limit_s: float) -> int:
    """Run a command, commit its volume whenever a checkpoint is there, hand an interruption on. Returns its exit code.

    Modal interrupts a container that it takes away, and cancels a call, by an exception in this thread. The command is
    told once, has the grace time for its checkpoint, and the exception goes on.
    """
    process = subprocess.Popen(command, cwd=setup.DATA, start_new_session=True)
    known, until, is_told = checkpoints(run_dir), time.monotonic() + limit_s, False
    try:
        while process.poll() is None:
            time.sleep(1.0)
            if time.monotonic() > until and not is_told:
                process.send_signal(signal.SIGTERM)
                is_told = True
            if (now := checkpoints(run_dir)) != known:
                known = now
                commit()
    except BaseException:
        if not is_told:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            print("the training did not stop in time; its newest checkpoint counts", flush=True)
            os.killpg(process.pid, signal.SIGKILL)
        commit()
        raise
    commit()
    return process.returncode


def commit_runs() -> None:
    """Make the runs volume's state durable. A failure is told, and the next checkpoint tries again."""
    try:
        setup.runs_volume.commit()
    except modal.exception.Error as error:
        print(f"the volume could not be committed: {error}", flush=True)


@app.function(image=image, cpu=4, memory=16384, timeout=3600, volumes=setup.VOLUMES)
def preflight(run_name: str, gpu: str, num_gpus: int, clips_per_s: float | None, flags: list[str]) -> dict[str, Any]:
    """Settings and data, checked where they will be used, without a GPU. {"error": one line} for a fault.

    Else what bin/preflight.py tells, and as "offer" what bin/cost.py puts the run at, to its last step.
    """
    command = [sys.executable, f"{setup.REPO}/bin/preflight.py", "--processes", str(num_gpus), "--check_data", "--"]
    arguments = [*trainer_flags(run_name, flags), "--device", "cpu"]
    done = subprocess.run([*command, *arguments], cwd=setup.DATA, capture_output=True, text=True, check=False)
    setup.cache_volume.commit()  # the audio headers that were read need not be read again
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        return {"error": "\n".join(said[-30:]) or f"bin/preflight.py ended with {done.returncode}"}
    plan = json.loads(done.stdout.splitlines()[-1])
    return plan | {"offer": estimate(gpu, num_gpus, plan["most_clips"], clips_per_s)}


def estimate(gpu: str, num_gpus: int, most_clips: int, clips_per_s: float | None) -> dict[str, Any]:
    """bin/cost.py's offer of this GPU on Modal. clips_per_s: over all GPUs; None takes the table's."""
    command = [sys.executable, f"{setup.REPO}/bin/cost.py", "--json", "--gpus", str(num_gpus)]
    command += ["--clips", str(most_clips), "--epochs", "1"]  # most_clips are those of all epochs
    if clips_per_s is not None:
        command += ["--clips_per_s", str(clips_per_s / num_gpus), "--measured_on", gpu]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return next(offer for offer in told["offers"] if (offer["cloud"], offer["gpu"]) == ("modal", gpu))


@app.function(
    image=image,
    gpu=setup.DEFAULT_GPU,
    cpu=64,
    memory=262_144,
    timeout=ATTEMPT_S,
    retries=modal.Retries(max_retries=10, initial_delay=10.0, backoff_coefficient=2.0, max_delay=60.0),
    single_use_containers=True,  # a retry gets a fresh machine, not one with a broken GPU or full of leftovers
    volumes=setup.VOLUMES,
)
def train(run_name: str, num_gpus: int, flags: list[str], origin: dict[str, str]) -> dict[str, Any]:
    """One attempt of a run. Raises to be tried again; wrong settings or data are returned, as no retry mends them."""
    run_dir = Path(setup.RUNS) / run_name
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "modal.jsonl").open("a", encoding="utf-8") as file:
        started = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "gpus": num_gpus, "flags": flags}
        file.write(json.dumps(started | origin) + "\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_gpus}"]
    command = [
        *(sys.executable, f"{setup.REPO}/launch/attempts.py", "--run_dir", str(run_dir), "--retries", "1", "--"),
        *(*torchrun, f"{setup.REPO}/bin/train.py", *trainer_flags(run_name, flags)),
    ]
    code = supervise(command, run_dir, commit_runs, ATTEMPT_S - SPARE_S)
    status = read_json(run_dir / "status.json")
    if code not in (0, WRONG):
        raise RuntimeError(f"attempt ended with {code}: {status.get('state')} at step {status.get('step')}")
    return {"run_name": run_name, "exit_code": code, "status": status, "metrics": last_metrics(run_dir)}


@app.function(image=image, gpu="A100-40GB", cpu=8, memory=65_536, timeout=6 * 3600, volumes=setup.VOLUMES)
def run_program(name: str, arguments: list[str]) -> int:
    """Another program of bin/, with its output in the log. Returns its exit code."""
    program = Path(setup.REPO) / "bin" / name
    try:
        return subprocess.run([sys.executable, str(program), *arguments], cwd=setup.DATA, check=False).returncode
    finally:
        setup.runs_volume.commit()


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_bytes()) if path.exists() else {}


def last_metrics(run_dir: Path) -> dict[str, float]:
    """The newest value of every figure that metrics.jsonl holds."""
    found: dict[str, float] = {}
    if (run_dir / "metrics.jsonl").exists():
        for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            found |= json.loads(line)
    return found


# ------------------------------------------------------------------------------------------------------ on this machine


def fail(message: str) -> None:
    """One line instead of a traceback."""
    print(f"\nmodal_job: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def own_flags(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """This program's flags of `train`, and the rest, which are the trainer's."""
    parser = argparse.ArgumentParser(prog="modal run launch/modal_job.py train", allow_abbrev=False, add_help=False)
    parser.add_argument("--gpu", default=setup.DEFAULT_GPU)
    parser.add_argument("--run_name", "--run-name", default=time.strftime("%Y%m%d_%H%M%S"))
    parser.add_argument("--max_cost", "--max-cost", type=float)
    parser.add_argument("--clips_per_s", "--clips-per-s", type=float)
    parser.add_argument("--hf_secret", "--hf-secret")
    parser.add_argument("--wandb_secret", "--wandb-secret", default="wandb-secret")
    return parser.parse_known_args(argv)


def secrets_for(own: argparse.Namespace, flags: list[str]) -> list[modal.Secret]:
    """Only what was asked for: a secret that does not exist fails the whole app."""
    found = [modal.Secret.from_name(own.hf_secret)] if own.hf_secret else []
    if any(flag.replace("-", "_").startswith("__wandb") for flag in flags):
        found.append(modal.Secret.from_name(own.wandb_secret))
    return found


def revision() -> dict[str, str]:
    """Which code this is, for the run's folder: the container has no repository."""
    root = Path(__file__).resolve().parent.parent
    found = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {"git_revision": found.stdout.strip()} if found.returncode == 0 else {}


def start_training(argv: list[str]) -> dict[str, Any]:
    """Check, estimate, and only then ask for GPUs."""
    own, flags = own_flags(argv)
    if own.clips_per_s is not None and not own.clips_per_s > 0:
        fail(f"clips_per_s: got {own.clips_per_s:g}; allowed: above 0")
    for flag in flags:
        name = flag.split("=")[0].replace("-", "_").replace("__", "--", 1)
        if name in RESERVED:
            fail(f"{name} is settled by this launcher, so that a retry goes on; take --run_name and flags instead")
    gpu, count = setup.parse_gpu(own.gpu)
    print(f"run {own.run_name}: checking settings and data on the volume ...", flush=True)
    plan = preflight.remote(own.run_name, gpu, count, own.clips_per_s, flags)
    if "error" in plan:
        fail(f"nothing was started. {plan['error']}\nData that is not on the volume yet: ... modal_job.py upload PATH")
    offer = plan["offer"]
    dollars = offer["total"]
    print(
        f"{plan['train_clips']} training clips, at most {plan['most_steps']} steps of {plan['batch_size']} on "
        f"{count} x {gpu}: at most about {offer['hours']:.1f} h and {dollars:.2f} $ ({offer['gpu_dollars']:.2f} for "
        f"GPUs, {offer['machine_dollars']:.2f} for cores and memory; prices of {offer['as_of']}; early stopping makes "
        "it less)",
        flush=True,
    )
    if own.max_cost is not None and dollars > own.max_cost:
        fail(
            f"nothing was started: the estimate of {dollars:.2f} $ is above --max_cost {own.max_cost:g}. Fewer "
            "--epochs, --max_steps, another --gpu, or --clips_per_s as an earlier run's log shows it"
        )
    cores, memory = setup.resources(gpu, count)
    options: dict[str, Any] = {"gpu": f"{gpu}:{count}", "cpu": cores, "memory": memory}
    secrets = secrets_for(own, flags)
    if secrets:
        options["secrets"] = secrets
    try:
        return train.with_options(**options).remote(own.run_name, count, flags, revision())
    except modal.exception.NotFoundError as error:
        fail(f"{error}. Make it with: modal secret create NAME KEY=VALUE (HF_TOKEN, WANDB_API_KEY)")
        raise


@app.local_entrypoint()
def main(*argv: str) -> None:
    """upload PATH | train [FLAG ...] | evaluate RUN [FLAG ...] | retrieve RUN [FLAG ...] | fetch RUN [--all]

    Flags of the programs are passed through. The top of launch/modal_job.py has examples.
    """
    import modal_files

    command, rest = (argv[0], list(argv[1:])) if argv and not argv[0].startswith("-") else ("train", list(argv))
    try:
        if command == "upload":
            modal_files.upload(setup.data_volume, rest)
        elif command == "fetch":
            modal_files.fetch(setup.runs_volume, rest)
        elif command == "train":
            result = start_training(rest)
            if result["exit_code"]:
                fail(str(result["status"].get("message", "see the log above")))
            shown = {k: v for k, v in result["metrics"].items() if k.startswith(("test/recall@", "train/clips_per_s"))}
            print(json.dumps(result | {"metrics": shown}, indent=1))
            print(f"results: modal run launch/modal_job.py fetch {result['run_name']}")
        elif command in ("evaluate", "retrieve"):
            if not rest or rest[0].startswith("-"):
                fail(f"{command}: name the run first, as in: {command} RUN [FLAG ...]")
            run_dir = f"{setup.RUNS}/{rest[0]}"
            model = [f"{run_dir}/model_best"] if command == "evaluate" else ["--model", run_dir]
            code = run_program.remote(f"{command}.py", [*model, *rest[1:]])
            if code:
                fail(f"bin/{command}.py ended with {code}; its message is above")
        else:
            fail(f"command: got {command!r}; allowed: upload, train, evaluate, retrieve, fetch")
    except ValueError as error:
        fail(str(error))


if __name__ == "__main__":  # python launch/modal_job.py: how to use it, with no account
    print(__doc__)
