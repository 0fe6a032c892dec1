"""launch/modal_job.py: the real `modal run` against a server on the loopback, and its decisions one by one."""

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import modal
import modal_job as job
import modal_setup as setup
import pytest

from tests.launch import modal_server
from tests.launch.standins import ROOT

FILE = str(ROOT / "launch" / "modal_job.py")
MAIN = job.main.info.raw_f
OFFER = {"hours": 2.5, "total": 60.5, "gpu_dollars": 50.0, "machine_dollars": 10.5, "as_of": "2030-01-01"}
PLAN = {"train_clips": 1000, "most_steps": 300, "most_clips": 1_000_000, "batch_size": 128, "offer": OFFER}


def test_modal_run_trains_on_the_sample_and_brings_the_result_back(tmp_path: Path) -> None:
    """Client, upload, image, functions and container entrypoint are Modal's own; the GPUs are not there."""
    with modal_server.serving(tmp_path / "modal") as server:
        server.container_environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        flags = ["--preset", "quickstart", "--max_steps", "2", "--show_examples", "0", "--no-enable_hard_neg"]
        own = ["--gpu", "A100-80GB:2", "--run-name", "mock", "--max_cost", "5"]
        done = modal_server.modal(server, "run", FILE, "train", *own, *flags, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr + "".join(server.container_logs)

        assert "prices of 20" in done.stdout  # bin/cost.py has spoken, in the small container
        # The result has come back, and the run lies on the volume.
        result = json.loads(done.stdout[done.stdout.index("\n{") : done.stdout.rindex("}") + 1])
        assert (result["status"]["state"], result["status"]["step"], result["exit_code"]) == ("finished", 2, 0)
        assert 0 <= result["metrics"]["test/recall@10"] <= 1
        run_dir = server.volume_folder("earmark-runs") / "mock"
        assert (run_dir / "checkpoints" / "step-00000002" / "MANIFEST.json").exists()
        assert (run_dir / "model_best" / "heads.safetensors").exists()
        argv = json.loads((run_dir / "env.json").read_text())["argv"]
        assert argv[0].endswith("/earmark/bin/train.py")
        assert [a for a in argv if a in flags] == flags
        origin = json.loads((run_dir / "modal.jsonl").read_text())
        assert (origin["gpus"], origin["flags"]) == (2, flags)
        assert "2 process(es)" in server.container_logs[1]
        assert server.commits.count("earmark-runs") >= 3  # checkpoint, model, end

        # What was asked for, as the server saw it.
        train = server.functions["fu-train"]
        asked = train.resources
        assert (asked.gpu_config.gpu_type, asked.gpu_config.count) == ("A100-40GB", 8)
        assert (asked.milli_cpu, asked.memory_mb, train.timeout_secs) == (64_000, 262_144, 86_400)
        assert train.single_use_containers
        assert train.retry_policy.retries == 10
        mounts = {m.mount_path: (m.volume_id, m.read_only) for m in train.volume_mounts}
        names = {i: n for n, i in server.volumes.items()}
        assert {path: (names[i], read_only) for path, (i, read_only) in mounts.items()} == {
            "/data": ("earmark-data", True),
            "/runs": ("earmark-runs", False),
            "/cache": ("earmark-cache", False),
        }
        (bound,) = server.requests["FunctionBindParams"]
        chosen = bound.function_options.resources
        assert (chosen.gpu_config.gpu_type, chosen.gpu_config.count) == ("A100-80GB", 2)
        assert (chosen.milli_cpu, chosen.memory_mb) == (16_000, 65_536)
        assert not server.requests["SecretGetOrCreate"], "no secret was asked for, so a missing one must not matter"
        assert server.functions["fu-preflight"].resources.gpu_config.count == 0

        # The code is the repository's own, byte for byte, and nothing but it.
        sent = {f.filename: f.sha256_hex for m in train.mount_ids for f in server.mounts[m]}
        code = {name.removeprefix("/earmark/"): h for name, h in sent.items() if name.startswith("/earmark/")}
        assert all(server.blobs[h] == (ROOT / name).read_bytes() for name, h in code.items())
        rooms = [room for room, kinds in setup.CODE.items() if ".py" in kinds]
        python = {p.relative_to(ROOT).as_posix() for room in rooms for p in (ROOT / room).rglob("*.py")}
        assert python <= set(code)
        assert server.blobs[sent["/root/modal_job.py"]] == Path(FILE).read_bytes()

        # The image: pinned, by uv, files last.
        steps = [command for image in server.image_layers for command in image.dockerfile_commands]
        (install,) = (step for step in steps if "uv pip install" in step and "torch" in step)
        assert "--constraint /constraints.txt" in install
        assert any(f"uv:{setup.UV_VERSION}" in step for step in steps)
        assert not any("flash" in step for step in steps)


def test_help_needs_no_account() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MODAL_")}
    environment |= {"MODAL_CONFIG_PATH": "/nonexistent.toml", "MODAL_SERVER_URL": "http://127.0.0.1:9"}
    for command in (["-m", "modal", "run", f"{FILE}::main", "--help"], [FILE]):
        done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "modal run" in done.stdout


# One by one --------------------------------------------------------------------------------------------------------


class Remote:
    """In place of a function on Modal: records what it is called with, and answers."""

    def __init__(self, answer: Any) -> None:
        self.answer, self.calls, self.options = answer, [], {}

    def with_options(self, **options: Any) -> "Remote":
        self.options = options
        return self

    def remote(self, *arguments: Any) -> Any:
        self.calls.append(arguments)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def remotes(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    finished = {"run_name": "r", "exit_code": 0, "status": {"state": "finished"}, "metrics": {}}
    found = SimpleNamespace(preflight=Remote(dict(PLAN)), train=Remote(finished), run_program=Remote(0))
    for name, remote in vars(found).items():
        monkeypatch.setattr(job, name, remote)
    return found


def test_without_a_command_it_trains_with_the_defaults(remotes: SimpleNamespace) -> None:
    MAIN("--epochs", "3", "--enable_hard_neg")
    (call,) = remotes.train.calls
    assert call[1:3] == (8, ["--epochs", "3", "--enable_hard_neg"])
    assert remotes.train.options == {"gpu": "A100-40GB:8", "cpu": 64, "memory": 262_144}
    assert remotes.preflight.calls[0][0] == call[0], "the run that was checked is the run that is started"


def test_nothing_starts_when_the_data_or_the_settings_are_wrong(
    remotes: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    remotes.preflight.answer = {"error": "preflight: error: --train_samples_path is 'none.json'"}
    with pytest.raises(SystemExit):
        MAIN("train")
    assert "nothing was started" in (said := capsys.readouterr().err)
    assert "--train_samples_path is 'none.json'" in said
    assert not remotes.train.calls


def test_nothing_starts_above_the_limit_of_cost(remotes: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        MAIN("train", "--max_cost", "60", "--clips_per_s", "100")
    assert "the estimate of 60.50 $ is above --max_cost 60" in capsys.readouterr().err
    assert not remotes.train.calls
    assert remotes.preflight.calls[0][1:4] == ("A100-40GB", 8, 100.0)
    MAIN("train", "--max_cost", "61", "--clips_per_s", "100")
    assert remotes.train.calls
    assert "2.5 h and 60.50 $ (50.00 for GPUs, 10.50 for cores and memory" in capsys.readouterr().out


def test_the_estimate_is_that_of_the_cost_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """3.6 M clips at 100 a second over 8 GPUs: 10 h of steps, at an efficiency of 0.85; GPUs, 64 cores and 256 GiB."""
    monkeypatch.setattr(setup, "REPO", str(ROOT))
    offer = job.estimate("H100", 8, 3_600_000, 100.0)
    prices = tomllib.loads((ROOT / "launch" / "prices.toml").read_text())
    cores, mib = setup.resources("H100", 8)
    hourly = prices["modal"]
    machine = cores * hourly["cpu_core_hour"] + mib / 1024 * hourly["memory_gib_hour"]
    assert 10 / 0.85 < offer["hours"] < 1.01 * 10 / 0.85  # and a little for interruptions
    assert offer["gpu_dollars"] == pytest.approx(offer["hours"] * 8 * hourly["gpu_hour"]["H100"])
    assert offer["machine_dollars"] == pytest.approx(offer["hours"] * machine)
    assert job.estimate("L4", 2, 1000, None)["gpu"] == "L4"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train", "--gpu", "H100:9"), "gpu: got 'H100:9'"),
        (("train", "--runs_dir", "x"), "--runs_dir is settled by this launcher"),
        (("train", "--resume=never"), "--resume is settled by this launcher"),
        (("trian",), "command: got 'trian'; allowed: upload, train"),
        (("evaluate", "--k", "3"), "name the run first"),
        (("train", "--clips_per_s", "0"), "clips_per_s: got 0"),
    ],
)
def test_wrong_words_are_refused_in_one_line(
    remotes: SimpleNamespace, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit):
        MAIN(*words)
    assert message in capsys.readouterr().err
    assert not remotes.train.calls


def test_secrets_only_when_asked_for(remotes: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    MAIN("train", "--wandb-project", "p", "--hf_secret", "mine")
    assert len(remotes.train.options["secrets"]) == 2
    assert remotes.train.calls[0][2] == ["--wandb-project", "p"]
    remotes.train.answer = modal.exception.NotFoundError("Secret 'mine' not found")
    with pytest.raises(SystemExit):
        MAIN("train", "--hf_secret", "mine")
    assert "modal secret create" in capsys.readouterr().err


def test_other_programs_get_the_run_and_every_flag(remotes: SimpleNamespace) -> None:
    MAIN("evaluate", "r1", "--report", "x.html")
    MAIN("retrieve", "r1", "talk.wav", "--glossary", "g.json")
    assert remotes.run_program.calls == [
        ("evaluate.py", ["/runs/r1/model_best", "--report", "x.html"]),
        ("retrieve.py", ["--model", "/runs/r1", "talk.wav", "--glossary", "g.json"]),
    ]
    remotes.run_program.answer = 2
    with pytest.raises(SystemExit):
        MAIN("evaluate", "r1")


# In the container --------------------------------------------------------------------------------------------------

TRAINER = """
import signal, sys, time
from pathlib import Path
run = Path(sys.argv[1])

def stop(*_):
    (run / "checkpoints" / "step-2").mkdir()
    (run / "told").open("a").write("told\\n")
    if len(sys.argv) < 3:
        sys.exit(75)

signal.signal(signal.SIGTERM, stop)
(run / "checkpoints" / "step-1").mkdir(parents=True)
(run / "ready").touch()
time.sleep(60)
"""

# A process started in the background may inherit an ignored Ctrl-C, which Modal's container does not.
SUPERVISOR = """
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
sys.path.insert(0, {launch!r})
import modal_job as job
import modal_setup as setup
setup.DATA = {folder!r}
run = Path({folder!r}) / "run"
log = run / "commits"
commit = lambda: log.open("a").write(" ".join(sorted(p.name for p in run.glob("checkpoints/*"))) + ".\\n")
try:
    code = job.supervise([sys.executable, {trainer!r}, str(run)], run, commit, {limit})
    print("code", code)
except BaseException as error:
    print("raised", type(error).__name__)
    raise
"""


def supervisor(folder: Path, limit: float) -> subprocess.Popen[str]:
    (folder / "run").mkdir()
    (folder / "trainer.py").write_text(TRAINER)
    code = SUPERVISOR.format(
        launch=str(ROOT / "launch"), folder=str(folder), trainer=str(folder / "trainer.py"), limit=limit
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(found: Any, limit_s: float = 40.0) -> None:
    until = time.monotonic() + limit_s
    while not found():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_an_interruption_is_handed_on_and_its_checkpoint_committed(tmp_path: Path) -> None:
    """Modal interrupts a container that it takes away; whatever is not committed then is lost."""
    process, run = supervisor(tmp_path, 3600.0), tmp_path / "run"
    try:
        wait_for((run / "ready").exists)
        wait_for((run / "commits").exists)
        assert (run / "commits").read_text() == "step-1.\n"
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert "raised KeyboardInterrupt" in said
    assert (run / "told").read_text() == "told\n"
    assert (run / "commits").read_text().splitlines()[-1] == "step-1 step-2."


def test_before_modals_time_limit_the_run_stops_in_good_order(tmp_path: Path) -> None:
    process, run = supervisor(tmp_path, 0.0), tmp_path / "run"
    try:
        said, errors = process.communicate(timeout=40)
    finally:
        process.kill()
    assert "code" in said, errors
    assert (run / "told").exists() == ("code 75" in said)  # told before its handler stood: ended by the signal itself


def test_only_what_another_attempt_can_mend_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "RUNS", str(tmp_path))
    commands = []

    def ended(code: int) -> Any:
        def run(command: list[str], run_dir: Path, commit: Any, limit_s: float) -> int:
            commands.append(command)
            (run_dir / "status.json").write_text(
                json.dumps({"state": "failed", "step": 3, "message": "ValueError: lr"})
            )
            return code

        return run

    monkeypatch.setattr(job, "supervise", ended(job.WRONG))
    result = job.train.local("r", 8, ["--lr", "0"], {"git_revision": "abc"})
    assert (result["exit_code"], result["status"]["message"]) == (job.WRONG, "ValueError: lr")
    for code in (1, job.STOPPED, -9):
        monkeypatch.setattr(job, "supervise", ended(code))
        with pytest.raises(RuntimeError, match="failed at step 3"):
            job.train.local("r", 8, [], {})
    command = commands[0]
    assert command[command.index("--") + 1 :][1:5] == [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=8",
    ]
    assert command[-8:] == ["--lr", "0", "--runs_dir", str(tmp_path), "--run_name", "r", "--resume", "auto"]
    assert len((tmp_path / "r" / "modal.jsonl").read_text().splitlines()) == 4
