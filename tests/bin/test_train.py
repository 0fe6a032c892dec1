"""The whole program on tones: learns, resumes bit for bit, agrees over ranks, stops cleanly, refuses bad input."""

import hashlib
import json
import os
import signal
import subprocess
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import bin.train
from bin.config import parse
from distributed.atomic import load_single_file
from distributed.rundir import read_status
from model.dual import DualEncoder
from retrieval.model_files import open_model
from tests.bin.tones import environment, finish, torchrun, write_samples

ROOT = Path(__file__).resolve().parents[2]
Flags = Callable[..., list[str]]


def train(flags: list[str]) -> int:
    """A run in this process."""
    return bin.train.train(parse(flags))


def metrics(run: Path, key: str) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def trained_sha256(run: Path, name: str = "model_final") -> dict[str, str]:
    files = sorted((run / name).glob("*.safetensors"))
    assert files
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_one_process_learns_and_leaves_the_whole_run_directory(flags: Flags, tmp_path: Path) -> None:
    settings = ["--epochs", "30", "--patience", "0", "--lr", "1e-2", "--save_every", "15", "--tower_dropout", "0"]
    assert train(flags(*settings, "--tensorboard")) == 0
    run = tmp_path / "runs" / "run"
    assert metrics(run, "before/recall@1")[0] < 0.6 < metrics(run, "test/recall@1")[-1]
    assert metrics(run, "train/loss")[-1] < metrics(run, "train/loss")[0]
    assert read_status(run)["state"] == "finished"
    names = {path.name for path in run.iterdir()}
    assert {
        "config.toml",
        "env.json",
        "metrics.jsonl",
        "status.json",
        "tb",
        "bad_records.jsonl",
        "checkpoints",
    } <= names
    assert {"model_best", "model_final", "model_best.pt", "model_final.pt", "report.html"} <= names
    assert list(run.glob("train_*_*.log"))
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000045", "step-00000090"]
    assert not [name for name in names if ".tmp" in name]
    tensors, settings = load_single_file(run / "model_best.pt")
    assert "heads.safetensors/audio_head.weight" in tensors
    assert settings["retriever_config.json"]["trainable"] == "full"
    assert (
        json.loads((run / "model_best" / "retriever_config.json").read_text())["info"]["metrics"]["eval/recall@10"] > 0
    )
    opened = open_model(run / "model_best")  # needs nothing but the folder
    assert opened.built.model.audio_head.weight.shape == (16, 32)
    assert opened.temperature == pytest.approx(0.07)


@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_a_killed_run_resumes_bit_for_bit_in_the_middle_of_an_epoch_on_two_ranks(
    flags: Flags, tmp_path: Path, trainable: str
) -> None:
    """Dropout, augmentation, the term bank, plateau and Adam's moments all have to come back exactly. Adapters are
    trained in two passes of the batch, whose second one draws the first one's dropout again."""
    settings = [
        *("--epochs", "8", "--save_every_steps", "4", "--trainable", trainable, "--save_every", "50"),
        *("--augment_speed", "0.1", "--lora_targets", "*.q_proj", "*.v_proj", "--learn_temperature"),
        *("--log_every", "2", "--keep_checkpoints", "99", "--clips_per_pass", "0" if trainable == "full" else "2"),
    ]
    undisturbed = finish(torchrun(flags(*settings, "--run_name", "undisturbed")), tmp_path)
    assert undisturbed.returncode == 0, undisturbed.stderr[-2000:]

    command = torchrun(flags(*settings, "--run_name", "killed", "--resume", "auto"))
    killed = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment(),
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    run = tmp_path / "runs" / "killed"
    deadline = time.monotonic() + 120
    while not list((run / "checkpoints").glob("step-*/MANIFEST.json")):  # step 4 of 3 an epoch: within the second
        assert killed.poll() is None, killed.stdout.read().decode()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    kill_session(killed.pid)
    killed.wait()
    assert read_status(run)["state"] != "finished", "the run was over before it could be killed: make it longer"

    resumed = finish(command, tmp_path)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert "resumed from" in resumed.stdout
    assert trained_sha256(run) == trained_sha256(tmp_path / "runs" / "undisturbed")
    assert trained_sha256(run, "model_best") == trained_sha256(tmp_path / "runs" / "undisturbed", "model_best")
    for key in ("train/loss", "eval/recall@10"):  # and the record of the run has no step twice
        assert metrics(run, key) == metrics(tmp_path / "runs" / "undisturbed", key)


def kill_session(pid: int) -> None:
    """SIGKILL to torchrun and to its workers, which it puts into sessions of their own."""
    children = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    for process in (pid, *map(int, children)):
        os.kill(process, signal.SIGKILL)


def test_sigterm_saves_a_checkpoint_from_which_the_run_ends_as_if_undisturbed(flags: Flags, tmp_path: Path) -> None:
    settings = ["--epochs", "6", "--save_every", "50"]
    assert train(flags(*settings, "--run_name", "undisturbed")) == 0
    real_step, steps_done = torch.optim.AdamW.step, 0

    def step_then_signal(self: torch.optim.AdamW, *args: object) -> object:
        nonlocal steps_done
        steps_done += 1
        if steps_done == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return real_step(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step_then_signal)
        assert train(flags(*settings, "--run_name", "stopped")) == 0
    run = tmp_path / "runs" / "stopped"
    assert read_status(run)["state"] == "preempted"
    assert read_status(run)["step"] == 6  # the flag is read once a step, before the decision on the next
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert train(flags(*settings, "--run_name", "stopped", "--resume", "auto")) == 0
    assert trained_sha256(run) == trained_sha256(tmp_path / "runs" / "undisturbed")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA graphs")
def test_a_graphed_run_that_is_stopped_goes_on_as_if_undisturbed(flags: Flags, tmp_path: Path) -> None:
    """The host reads a step late there, and graphs are captured at other steps: dropout must not notice."""
    settings = [
        *("--device", "cuda", "--trainable", "lora", "--lora_targets", "*.q_proj", "*.v_proj", "--cuda_graphs", "on"),
        *("--batch_size", "4", "--epochs", "3", "--save_every", "50", "--log_every", "4"),
    ]
    assert train(flags(*settings, "--run_name", "undisturbed")) == 0
    real_step, steps_done = torch.optim.AdamW.step, 0

    def step_then_signal(self: torch.optim.AdamW, *args: object) -> object:
        nonlocal steps_done
        steps_done += 1
        if steps_done == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return real_step(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step_then_signal)
        assert train(flags(*settings, "--run_name", "stopped")) == 0
    run = tmp_path / "runs" / "stopped"
    assert read_status(run)["state"] == "preempted"
    assert read_status(run)["step"] == 10  # sent with the ninth, read at the next: neither is logged
    assert train(flags(*settings, "--run_name", "stopped", "--resume", "auto")) == 0
    losses = [metrics(tmp_path / "runs" / name, "train/loss") for name in ("stopped", "undisturbed")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert metrics(run, "train/num_graphs")[-1] >= 2


def test_two_ranks_train_the_same_model_as_one_and_measure_the_same(flags: Flags, tmp_path: Path) -> None:
    """Negatives come from all ranks and gradients are summed: the global batch decides, not how it is spread."""
    settings = ["--tower_dropout", "0", "--epochs", "2", "--no-center_heads", "--lr", "1e-3", "--learn_temperature"]
    assert train(flags(*settings, "--run_name", "one")) == 0
    two = finish(torchrun(flags(*settings, "--run_name", "two")), tmp_path)
    assert two.returncode == 0, two.stderr[-2000:]
    runs = [tmp_path / "runs" / name for name in ("one", "two")]
    for name in ("before/recall@5", "before/mrr"):
        assert metrics(runs[0], name) == metrics(runs[1], name)
    assert metrics(runs[1], "train/loss") == pytest.approx(metrics(runs[0], "train/loss"), rel=1e-5)
    models = [open_model(run / "model_final") for run in runs]
    for (name, ours), theirs in zip(
        models[0].built.model.named_parameters(), models[1].built.model.parameters(), strict=True
    ):
        # Adam's first steps divide a gradient by its own size, so rounding shows where gradients are near zero.
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5, msg=name)
    assert models[0].temperature == pytest.approx(models[1].temperature, rel=1e-5)


POISON = """
import sys
sys.path.insert(0, {root!r})
import os
import bin.step
import bin.train
real, calls = bin.step.loss_share, 0
def poisoned(*args):
    global calls
    calls += 1
    share, parts, relations = real(*args)
    if os.environ["RANK"] == "1" and {condition}:
        share = share * float("nan")
    return share, parts, relations
bin.step.loss_share = poisoned
sys.exit(bin.train.main())
"""


def test_a_nan_on_one_rank_skips_the_step_on_all(flags: Flags, tmp_path: Path) -> None:
    program = tmp_path / "poison.py"
    program.write_text(POISON.format(root=str(ROOT), condition="calls == 2"))
    done = finish(torchrun(flags("--parameter_hash_every", "1"), program=program), tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "step 1 is skipped: loss is nan" in done.stdout
    run = tmp_path / "runs" / "run"
    assert metrics(run, "train/skipped_steps") == [0, 1, 1, 1, 1, 1]
    assert [line for line in metrics(run, "train/loss") if line is None] == [None]  # strict JSON has no NaN


def test_nans_in_a_row_end_the_run_and_say_so(flags: Flags, tmp_path: Path) -> None:
    program = tmp_path / "poison.py"
    program.write_text(POISON.format(root=str(ROOT), condition="calls > 1"))
    done = finish(torchrun(flags("--max_nonfinite_steps", "2"), program=program), tmp_path)
    assert done.returncode != 0
    assert "ERROR: failed at step 2: RuntimeError: loss is nan" in done.stdout
    status = read_status(tmp_path / "runs" / "run")
    assert status["state"] == "failed"
    assert "diverges" in status["message"]


def test_early_stop_after_patience_evaluations_on_all_ranks(flags: Flags, tmp_path: Path) -> None:
    done = finish(torchrun(flags("--epochs", "50", "--patience", "2", "--lr", "1e-12")), tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "early stop: no better Recall@10 in 2 evaluations" in done.stdout
    assert len(metrics(tmp_path / "runs" / "run", "eval/recall@10")) == 3


def test_accumulated_micro_batches_step_once(flags: Flags, tmp_path: Path) -> None:
    assert train(flags("--grad_accum_steps", "2", "--epochs", "1", "--batch_size", "12")) == 0
    assert len(metrics(tmp_path / "runs" / "run", "train/loss")) == 2  # 24 clips, 12 a step


def test_no_autograd_graph_outlives_its_batch(flags: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that did would hold the parameters' accumulators on the default stream, and no CUDA graph could be captured
    beside it."""
    real, seen = DualEncoder.encode_audio, []

    def watched(self: DualEncoder, *args: object) -> torch.Tensor:
        audio_BE = real(self, *args)
        if audio_BE.requires_grad:
            assert all(earlier() is None for earlier in seen)
            seen.append(weakref.ref(audio_BE))
        return audio_BE

    monkeypatch.setattr(DualEncoder, "encode_audio", watched)
    assert train(flags("--grad_accum_steps", "2", "--epochs", "1", "--batch_size", "12")) == 0
    assert len(seen) == 4


def test_plateau_cuts_the_learning_rate_and_the_warmup_raises_it(flags: Flags, tmp_path: Path) -> None:
    settings = (
        "--epochs",
        "6",
        "--patience",
        "0",
        "--plateau_patience",
        "0",
        "--lr",
        "1e-9",
        "--warmup_fraction",
        "0.2",
    )
    assert train(flags(*settings)) == 0
    rates = metrics(tmp_path / "runs" / "run", "train/lr")
    assert rates[:4] == pytest.approx([0.25e-9, 0.5e-9, 0.75e-9, 1e-9])  # 18 steps, warm-up over 4
    assert rates[-1] <= 0.25e-9
    assert train(flags(*settings, "--run_name", "cosine", "--lr_schedule", "cosine")) == 0
    assert metrics(tmp_path / "runs" / "cosine", "train/lr")[-1] < 0.05e-9


def test_checkpointing_changes_nothing(flags: Flags, tmp_path: Path) -> None:
    for name, more in (("plain", ()), ("checkpointed", ("--checkpointing",))):
        assert train(flags("--run_name", name, "--epochs", "1", *more)) == 0
    losses = [metrics(tmp_path / "runs" / name, "train/loss") for name in ("plain", "checkpointed")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_flat_optimizer_trains_as_the_plain_one_does(flags: Flags, tmp_path: Path) -> None:
    more = ("--epochs", "2", "--log_every", "2", "--learn_temperature", "--grad_accum_steps", "2")
    for name, setting in (("flat", "--flat_optimizer"), ("plain", "--no-flat_optimizer")):
        assert train(flags("--run_name", name, setting, *more)) == 0
    losses = [metrics(tmp_path / "runs" / name, "train/loss") for name in ("flat", "plain")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    norms = [metrics(tmp_path / "runs" / name, "train/grad_norm") for name in ("flat", "plain")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_a_dead_adapter_is_found_at_the_first_step(flags: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    real = bin.train.build_model

    def with_dead_weight(*args: object) -> object:
        built = real(*args)
        built.model.register_parameter("dead_weight", torch.nn.Parameter(torch.zeros(2)))
        return built

    monkeypatch.setattr(bin.train, "build_model", with_dead_weight)
    with pytest.raises(RuntimeError, match="1 trainable tensors get no gradient: dead_weight"):
        train(flags())


def test_a_dry_run_checks_all_and_writes_nothing(
    flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(flags("--dry_run")) == 0
    assert "3 an epoch, 6 in all" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_a_used_run_directory_is_refused_and_a_finished_run_can_be_lengthened(flags: Flags, tmp_path: Path) -> None:
    assert train(flags("--max_steps", "2")) == 0
    with pytest.raises(ValueError, match="already holds checkpoints; go on with --resume auto"):
        train(flags())
    with pytest.raises(ValueError, match="seed, batch_size or windows differ"):
        train(flags("--resume", "auto", "--batch_size", "6"))
    assert train(flags("--max_steps", "4", "--resume", "auto")) == 0
    assert read_status(tmp_path / "runs" / "run")["step"] == 4


def test_bad_input_is_one_line_with_the_remedy_and_exit_code_2(flags: Flags, tmp_path: Path) -> None:
    done = finish(torchrun(flags("--train_samples_path", "nowhere.json")), tmp_path)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("bin/train.py: error:")]
    assert len(lines) == 1, "rank 0 speaks, once"
    assert "--train_samples_path is 'nowhere.json'" in lines[0]
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT) not in done.stderr


def test_the_same_clips_in_training_and_test_are_refused(flags: Flags, tones: Path) -> None:
    with pytest.raises(ValueError, match="test clips have the same id as training clips"):
        train(flags("--test_samples_path", str(tones / "train.json")))


def test_a_broken_test_file_is_not_hidden_by_a_large_training_file(flags: Flags, tones: Path, tmp_path: Path) -> None:
    samples = write_samples(tmp_path, "broken", 4, seed=3)
    (tmp_path / "broken_1.wav").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1 of 4 records dropped .*more than max_bad_fraction"):
        train(flags("--test_samples_path", str(samples), "--max_bad_fraction", "0.1"))


def test_unreadable_clips_are_dropped_counted_and_listed(flags: Flags, tmp_path: Path) -> None:
    samples = write_samples(tmp_path, "more", 24, seed=4)
    (tmp_path / "more_3.wav").write_bytes((tmp_path / "more_3.wav").read_bytes()[:1000])
    assert train(flags("--train_samples_path", str(samples), "--max_bad_fraction", "0.1")) == 0
    listed = [json.loads(line) for line in (tmp_path / "runs" / "run" / "bad_records.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["reason"]) for line in listed] == [("drop", "truncated")]
    assert "more.json:3" in listed[0]["source"]


def test_a_dev_set_steers_and_the_test_is_read_at_the_end(flags: Flags, tmp_path: Path) -> None:
    dev = write_samples(tmp_path, "dev", 10, seed=5)
    assert train(flags("--dev_samples_path", str(dev))) == 0
    run = tmp_path / "runs" / "run"
    assert len(metrics(run, "eval/recall@10")) == 2
    assert len(metrics(run, "test/recall@10")) == 1
    log = next(run.glob("train_*.log")).read_text()
    assert "optimistic" not in log
