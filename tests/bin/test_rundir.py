"""Which folder a run takes, what a checkpoint brings back, what a trained model leaves."""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import bin.rundir
from bin.config import RunSettings, parse
from bin.optimizer import parameter_groups
from bin.rundir import (
    Resumable,
    RunState,
    choose_run_dir,
    load_checkpoint,
    save_checkpoint,
    save_trained,
    tell_status,
)
from bin.update import make_update
from data.clips import load_clips
from data.drops import DropLog
from data.loader import Loader
from distributed.atomic import damage, json_bytes, load_single_file, read_tensors
from distributed.checkpoints import CheckpointStore
from distributed.processes import World
from lora.inject import inject_lora
from losses.temperature import Temperature
from losses.terms import TermBank
from model.build import build_model
from retrieval.metrics import EvalResult, SubsetMetrics
from retrieval.model_files import open_model

ALONE = World(0, 1, 0, torch.device("cpu"), "none", 0)
BEFORE = EvalResult(9, 2, 6, None, {"all": SubsetMetrics(7, 8, {1: 0.1, 10: 0.7}, {1: 0.1}, {1: 0.2}, 1 / 3)})
Start = Callable[..., Resumable]


@pytest.fixture
def start(flags: Callable[..., list[str]]) -> Start:
    """start(*flags, seed=0): all that a checkpoint holds the state of; the trained weights are those of the seed."""

    def make(*more: str, seed: int = 0) -> Resumable:
        config = parse(flags("--learn_temperature", *more))
        torch.manual_seed(0)
        built = build_model(config.model)
        if config.model.trainable == "lora":
            inject_lora(built.model, config.lora)
        temperature = Temperature(0.07, learned=True)
        named = [(n, p) for m in (built.model, temperature) for n, p in m.named_parameters() if p.requires_grad]
        torch.manual_seed(seed)
        with torch.no_grad():
            for _, param in named:
                param.add_(torch.randn_like(param) * 0.1)
        groups = parameter_groups(named, built.sources, 0.1, 1.0)
        update = make_update(groups, named, 1e-3, 0.999, config.train.flat_optimizer)
        factor = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(factor, mode="max", factor=0.5, patience=1)
        clips = load_clips(config.data.train_samples_path, config.data, DropLog())
        loader = Loader(clips, config.train.batch_size, built.tokenizer, config.data, seed=config.train.seed)
        return Resumable(config, built, temperature, update, named, plateau, loader)

    return make


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    store.prepare()
    return store


def step(run: Resumable, count: int = 1) -> None:
    """Optimizer steps along gradients out of torch's random numbers."""
    for _ in range(count):
        for _, param in run.named:
            gradient = torch.randn_like(param)
            if param.grad is None:
                param.grad = gradient
            else:  # a view of the flat buffer
                param.grad.copy_(gradient)
        run.update.optimizer.step()


def values(run: Resumable) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in run.named}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


# --- which folder ----------------------------------------------------------------------------------------------------


def old_run(runs: Path, name: str, state: str, time: str, has_checkpoints: bool = True) -> None:
    (runs / name).mkdir(parents=True)
    (runs / name / "status.json").write_text(json.dumps({"state": state, "time": time}))
    if has_checkpoints:
        (runs / name / "checkpoints").mkdir()


def test_a_named_run_is_that_folder_whatever_else_there_is(tmp_path: Path) -> None:
    old_run(tmp_path, "other", "preempted", "2026-01-01")
    for resume in ("never", "auto"):
        run = RunSettings(runs_dir=str(tmp_path), run_name="mine", resume=resume)
        assert choose_run_dir(run, ALONE) == tmp_path / "mine"


def test_a_new_run_is_named_by_the_time_of_its_start(tmp_path: Path) -> None:
    old_run(tmp_path, "other", "preempted", "2026-01-01")
    assert re.fullmatch(r"\d{8}_\d{6}", choose_run_dir(RunSettings(runs_dir=str(tmp_path)), ALONE).name)
    anew = RunSettings(runs_dir=str(tmp_path / "nothing here"), resume="auto")
    assert re.fullmatch(r"\d{8}_\d{6}", choose_run_dir(anew, ALONE).name)


def test_auto_goes_on_with_the_newest_that_is_unfinished_and_has_checkpoints(tmp_path: Path) -> None:
    auto = RunSettings(runs_dir=str(tmp_path), resume="auto")
    old_run(tmp_path, "z_older", "preempted", "2026-01-01T00:00:00+00:00")
    old_run(tmp_path, "a_newer", "training", "2026-01-02T00:00:00+00:00")  # killed: it could not say so
    old_run(tmp_path, "finished", "finished", "2026-01-09T00:00:00+00:00")
    old_run(tmp_path, "empty", "failed", "2026-01-09T00:00:00+00:00", has_checkpoints=False)
    (tmp_path / "damaged" / "checkpoints").mkdir(parents=True)
    (tmp_path / "damaged" / "status.json").write_text('{"state": "trai')
    (tmp_path / "no_status" / "checkpoints").mkdir(parents=True)
    (tmp_path / "a file").touch()
    assert choose_run_dir(auto, ALONE) == tmp_path / "a_newer"
    old_run(tmp_path, "failed", "failed", "2026-01-03T00:00:00+00:00")
    assert choose_run_dir(auto, ALONE) == tmp_path / "failed"


def test_the_choice_is_rank_0s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clocks and directory listings of machines differ."""
    given: list[str | None] = []
    monkeypatch.setattr(bin.rundir, "broadcast_json", lambda name: given.append(name) or "of rank 0")
    other = World(1, 2, 1, torch.device("cpu"), "gloo", 0)
    assert choose_run_dir(RunSettings(runs_dir=str(tmp_path)), other) == tmp_path / "of rank 0"
    assert given == [None]


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "state",
    [RunState(), RunState(7, 2, 1, 0.25, 5, 1, True, True, BEFORE)],
    ids=["fresh", "far"],
)
def test_the_state_survives_strict_json(state: RunState) -> None:
    again = RunState.from_json(json.loads(json_bytes(state.to_json())))
    assert again == state
    if state.before:
        assert again.before.recall(10) == 0.7, "the k of recall@k are integers again"


@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_a_checkpoint_brings_everything_back(start: Start, store: CheckpointStore, trainable: str) -> None:
    more = ("--trainable", trainable, "--lora_targets", "*.q_proj", "*.v_proj")
    first = start(*more)
    step(first, 2)
    for recall in (0.3, 0.2, 0.2, 0.1):
        first.plateau.step(recall)
    state = RunState(12, 4, 1, 0.3, 3, 2, False, False, BEFORE)
    bank = TermBank(torch.randn(5, 16), torch.arange(5), torch.arange(5) // 2)
    save_checkpoint(store, first, state, bank)
    saved = values(first)
    step(first, 2)

    second = start(*more, seed=9)
    torch.manual_seed(99)
    checkpoint = store.latest_good()
    assert checkpoint is not None
    assert checkpoint.name == "step-00000012"
    loaded_state, loaded_bank = load_checkpoint(store, checkpoint, second)
    assert loaded_state == state
    assert loaded_bank is not None
    assert_same(vars(loaded_bank), vars(bank))
    assert_same(values(second), saved)
    step(second, 2)  # Adam's moments and the random state, or these would differ
    assert_same(values(second), values(first))
    assert second.plateau.best == 0.3
    assert second.plateau.num_bad_epochs == first.plateau.num_bad_epochs
    factors = [run.plateau.optimizer.param_groups[0]["lr"] for run in (first, second)]
    assert factors == [0.5, 0.5]
    model_files = {"full": {"model.safetensors", "audio_tower.json", "text_tower.json"},
                   "lora": {"adapter_model.safetensors", "adapter_config.json"}}  # fmt: skip
    assert {path.name for path in checkpoint.iterdir()} == model_files[trainable] | {
        "heads.safetensors", "retriever_config.json", "optim.safetensors", "state.json", "bank.safetensors",
        "rng-rank0.safetensors", "MANIFEST.json",
    }  # fmt: skip


@pytest.mark.parametrize("before", [True, False], ids=["flat to plain", "plain to flat"])
def test_a_checkpoint_goes_from_flat_to_plain_and_back(start: Start, store: CheckpointStore, before: bool) -> None:
    flags = {True: ("--flat_optimizer",), False: ("--no-flat_optimizer",)}
    first, second = start(*flags[before]), start(*flags[not before], seed=9)
    step(first, 2)
    save_checkpoint(store, first, RunState(step=2), None)
    checkpoint = store.latest_good()
    assert checkpoint is not None
    load_checkpoint(store, checkpoint, second)
    assert_same(values(second), values(first))
    torch.manual_seed(5)
    step(first, 2)
    torch.manual_seed(5)
    step(second, 2)
    for name, value in values(second).items():
        torch.testing.assert_close(value, values(first)[name], rtol=1e-5, atol=1e-6, msg=name)


def test_a_checkpoint_of_a_run_without_bank_and_evaluation(start: Start, store: CheckpointStore) -> None:
    run = start()
    save_checkpoint(store, run, RunState(step=1), None)
    checkpoint = store.latest_good()
    assert checkpoint is not None
    assert not (checkpoint / "bank.safetensors").exists()
    assert load_checkpoint(store, checkpoint, run) == (RunState(step=1), None)


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    start: Start, store: CheckpointStore, caplog: pytest.LogCaptureFixture
) -> None:
    run = start()
    save_checkpoint(store, run, RunState(step=1), None)
    expected = values(run)
    step(run)
    save_checkpoint(store, run, RunState(step=2), None)
    path = store.root / "step-00000002" / "optim.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # loads silently
    path.write_bytes(content)
    checkpoint = store.latest_good()
    assert checkpoint == store.root / "step-00000001"
    assert "optim.safetensors" in caplog.text
    state, _ = load_checkpoint(store, checkpoint, run)
    assert state.step == 1
    assert_same(values(run), expected)


@pytest.mark.parametrize(
    ("flags_of_the_other", "message"),
    [
        (("--seed", "1"), "resume: training clips, seed, batch_size or windows differ .* another --run_name"),
        (("--batch_size", "6"), "training clips, seed, batch_size or windows differ"),
        (("--train_samples_path", "{tones}/test.json"), "training clips, seed, batch_size or windows differ"),
        (("--proj_dim", "8"), "proj_dim: got 8, but .* holds a model with 16"),
        (("--trainable", "lora", "--lora_targets", "*.q_proj"), "trainable: got 'lora', but .* 'full'"),
    ],
)
def test_another_runs_checkpoint_is_refused_and_changes_nothing(
    start: Start, store: CheckpointStore, tones: Path, flags_of_the_other: tuple[str, ...], message: str
) -> None:
    save_checkpoint(store, start(), RunState(step=1), None)
    checkpoint = store.latest_good()
    assert checkpoint is not None
    other = start(*(flag.format(tones=tones) for flag in flags_of_the_other), seed=3)
    before, state = values(other), torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        load_checkpoint(store, checkpoint, other)
    assert_same(values(other), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert not other.update.optimizer.state


# --- trained models --------------------------------------------------------------------------------------------------


def test_a_trained_model_is_a_folder_and_one_file_and_replaces_the_last(start: Start, tmp_path: Path) -> None:
    run = start()
    for number in (1, 2):
        step(run)
        save_trained(tmp_path, "model_best", run, RunState(step=number, epoch=1), {"eval/recall@10": number / 4})
    folder = tmp_path / "model_best"
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(("runs", "checks"))) == [
        "model_best",
        "model_best.pt",
    ]
    assert damage(folder) is None
    opened = open_model(folder)
    assert opened.config["info"] == {"step": 2, "epoch": 1, "metrics": {"eval/recall@10": 0.5}}
    assert opened.temperature == pytest.approx(float((-run.temperature.log_inv_temperature.detach()).exp()))
    trained = dict(opened.built.model.named_parameters())
    assert all(torch.equal(trained[n], p) for n, p in run.named if n in trained)

    tensors, settings = load_single_file(tmp_path / "model_best.pt")
    files = ("heads.safetensors", "model.safetensors")
    assert_same(tensors, {f"{f}/{name}": value for f in files for name, value in read_tensors(folder / f).items()})
    assert settings.keys() == {"retriever_config.json", "audio_tower.json", "text_tower.json"}
    assert settings["retriever_config.json"] == opened.config


@pytest.mark.parametrize(
    ("wanted", "main", "extra"), [("both", "v5", ["adapter_v4"]), ("v5", "v5", []), ("v4", "v4", [])]
)
def test_adapters_are_written_under_the_names_asked_for(
    start: Start, tmp_path: Path, wanted: str, main: str, extra: list[str]
) -> None:
    run = start("--trainable", "lora", "--lora_targets", "*.q_proj", "--adapter_keys", wanted)
    save_trained(tmp_path, "model_final", run, RunState(), {})
    folder = tmp_path / "model_final"
    assert [path.name for path in folder.iterdir() if path.is_dir()] == extra
    prefix = {"v4": "base_model.model.audio_tower.", "v5": "base_model.model.model.audio_tower."}
    names = read_tensors(folder / "adapter_model.safetensors").keys()
    assert any(name.startswith(prefix[main]) for name in names)
    for name in extra:
        theirs = read_tensors(folder / name / "adapter_model.safetensors").keys()
        assert any(key.startswith(prefix[name.removeprefix("adapter_")]) for key in theirs)
    tensors, _ = load_single_file(tmp_path / "model_final.pt")
    assert {name for name in tensors if "adapter" in name} == {f"adapter_model.safetensors/{name}" for name in names}


def test_a_model_that_cannot_be_written_leaves_the_last_one(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start()
    save_trained(tmp_path, "model_best", run, RunState(step=1), {})
    files = {path: path.read_bytes() for path in tmp_path.rglob("model_best*/*") if path.is_file()}
    one_file = (tmp_path / "model_best.pt").read_bytes()

    def full_disk(folder: Path, *args: object) -> None:
        (folder / "heads.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bin.rundir, "save_model", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_trained(tmp_path, "model_best", run, RunState(step=2), {})
    assert {path: path.read_bytes() for path in files} == files
    assert (tmp_path / "model_best.pt").read_bytes() == one_file
    assert not list(tmp_path.glob(".model_best*"))


# --- what is left to do, and the status ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "is_over"),
    [
        (RunState(step=3, epoch=1), False),
        (RunState(step=6, epoch=2), True),
        (RunState(step=9, epoch=1), True),
        (RunState(step=3, epoch=1, stopped_early=True), True),
        (RunState(step=9, epoch=3, unmeasured=True), False),  # stopped within the last evaluation
    ],
)
def test_what_is_left_to_do(state: RunState, is_over: bool) -> None:
    assert state.is_over(total_steps=9, epochs=2) is is_over


def test_a_status_that_cannot_be_written_is_told_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        tell_status(tmp_path / "file" / "run", "failed", RunState(step=4), "because")
    assert "it should say failed: because" in caplog.text
