"""Without a process group everything works as with one rank; settings, health, run directory."""

import json
import logging
import math
import os

import pytest
import torch
from torch import nn

from distributed import collectives, gradsync, processes
from distributed.health import NonFiniteGuard, missing_gradients, nonfinite_gradients
from distributed.rundir import RunLock, read_status, write_status
from distributed.settings import DistributedSettings


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch):
    for name in processes.TORCHRUN_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_no_environment_is_one_process():
    world = processes.start("cpu")
    assert (world.rank, world.world_size, world.backend, world.is_main) == (0, 1, "none", True)
    assert world.device == torch.device("cpu")
    processes.stop()


def test_torchrun_with_one_process_needs_no_store(monkeypatch):
    for name, value in zip(processes.TORCHRUN_VARIABLES, ("0", "1", "0", "nowhere.invalid", "1"), strict=True):
        monkeypatch.setenv(name, value)
    assert processes.start("cpu").world_size == 1


def test_half_an_environment_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="not WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT; start with torchrun"):
        processes.start("cpu")
    for name, value in zip(processes.TORCHRUN_VARIABLES, ("4", "4", "0", "localhost", "1"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="RANK is 4; allowed: 0 to WORLD_SIZE - 1 = 3"):
        processes.start("cpu")
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(ValueError, match="WORLD_SIZE is 'many'"):
        processes.start("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_asked_for_cuda_without_a_gpu_is_refused():
    with pytest.raises(ValueError, match="shows 0 GPUs"):
        processes.start("cuda")


def test_collectives_are_the_identity():
    x_RE = torch.ones(2, 3, requires_grad=True)
    assert collectives.gather_rows(x_RE, [2], torch.bfloat16) is x_RE
    values, counts = collectives.gather_ints(torch.tensor([4, 5]))
    assert (values.tolist(), counts) == ([4, 5], [2])
    agreed = collectives.agree(stop=False, loss=math.nan)
    assert agreed["stop"] == 0
    assert math.isnan(agreed["loss"])
    assert collectives.sum_over_ranks(n=3) == {"n": 3.0}
    assert collectives.gather_json({"a": 1}) == [{"a": 1}]
    assert collectives.broadcast_json([1]) == [1]
    with pytest.raises(KeyError):
        collectives.on_rank_0(lambda: {}["missing"])
    collectives.barrier()


def test_clip_matches_torch():
    for scale in (1e-3, 1e3):
        ours, theirs = nn.Linear(4, 3), nn.Linear(4, 3)
        for model in (ours, theirs):
            for i, param in enumerate(model.parameters()):
                param.grad = torch.linspace(-1, 2, param.numel()).view_as(param) * (i + 1) * scale
        norm = gradsync.clip_gradients(ours.parameters(), 1.0)
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(theirs.parameters(), 1.0))
        for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(own.grad, other.grad)


def test_clip_accumulates_bf16_gradients_in_fp32():
    param = nn.Parameter(torch.zeros(100_000, dtype=torch.bfloat16))
    param.grad = torch.ones_like(param)
    norm = gradsync.clip_gradients([param])
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(100_000**0.5, rel=1e-5)


def test_a_non_finite_norm_is_reported_and_spreads_no_nan():
    params = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    params[0].grad, params[1].grad = torch.tensor([1.0, math.inf]), torch.tensor([3.0, 4.0])
    assert gradsync.clip_gradients(params, 1.0).item() == math.inf
    assert params[1].grad.tolist() == [3.0, 4.0]
    assert nonfinite_gradients([("a", params[0]), ("b", params[1])]) == ["a"]
    with pytest.raises(ValueError, match="max_norm is 0"):
        gradsync.clip_gradients(params, 0)


def test_sync_fills_missing_gradients_with_one_rank_too():
    model = nn.Linear(2, 2)
    gradsync.sync_gradients(model.parameters())
    assert not model.weight.grad.any()


def test_parameter_hash_sees_every_bit_dtype_and_name():
    one = {"a": torch.zeros(3), "b": torch.ones(2)}
    reference = gradsync.parameter_hash(one.items())
    assert gradsync.parameter_hash(reversed(one.items())) == reference
    others = [
        one | {"a": torch.tensor([0.0, -0.0, 0.0])},
        one | {"a": torch.zeros(3, dtype=torch.int32)},
        one | {"a": torch.zeros(3, 1)},
        {"a": one["a"], "c": one["b"]},
    ]
    assert reference not in {gradsync.parameter_hash(other.items()) for other in others}
    gradsync.parameter_hash([("scalar", torch.tensor(1.0)), ("half", torch.ones(2, dtype=torch.bfloat16))])


def test_guard_lets_a_few_steps_go_then_names_the_culprit(caplog):
    guard = NonFiniteGuard(3)
    assert guard.accepts(1, loss=1.0, grad_norm=2.0)
    assert not guard.accepts(2, loss=math.nan, grad_norm=2.0)
    assert not guard.accepts(3, loss=1.0, grad_norm=math.inf)
    assert guard.accepts(4, loss=1.0, grad_norm=2.0)  # the count starts anew
    for step in (5, 6):
        assert not guard.accepts(step, loss=math.nan)
    assert "step 6 is skipped: loss is nan (2 in a row)" in caplog.text
    with pytest.raises(RuntimeError, match=r"grad_norm is inf at step 7: 3 such steps in a row"):
        guard.accepts(7, loss=1.0, grad_norm=math.inf)
    assert guard.num_skipped == 5


def test_missing_gradients_are_named_but_zeros_and_frozen_are_fine():
    params = {name: nn.Parameter(torch.zeros(2)) for name in ("zeros", "none", "frozen")}
    params["zeros"].grad = torch.zeros(2)
    params["frozen"].requires_grad_(False)
    assert missing_gradients(params.items()) == ["none"]


def test_lock_refuses_a_second_job_and_opens_after_release(tmp_path):
    with RunLock(tmp_path / "run"), pytest.raises(ValueError, match=rf"in use by process {os.getpid()} on .* since"):
        RunLock(tmp_path / "run")
    RunLock(tmp_path / "run").release()


def test_status_is_replaced_and_checked(tmp_path):
    assert read_status(tmp_path) is None
    write_status(tmp_path, "training", 3, 1)
    write_status(tmp_path, "failed", 4, 1, "loss is nan")
    status = json.loads((tmp_path / "status.json").read_text())
    assert status | {"time": ""} == {"state": "failed", "step": 4, "epoch": 1, "time": "", "message": "loss is nan"}
    assert read_status(tmp_path) == status
    with pytest.raises(ValueError, match="state is 'done'; allowed: starting, training"):
        write_status(tmp_path, "done", 0, 0)
    assert [item.name for item in tmp_path.iterdir()] == ["status.json"]


def test_settings_refuse_what_cannot_work():
    for field, value in {
        "collective_timeout_s": 0,
        "start_timeout_s": math.nan,
        "parameter_hash_every": -1,
        "max_nonfinite_steps": 0,
        "keep_checkpoints": 0,
    }.items():
        with pytest.raises(ValueError, match=rf"{field} is .*; allowed"):
            DistributedSettings(**{field: value})


def test_wire_dtype_follows_the_device():
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert DistributedSettings().wire_dtype(cpu) is None
    assert DistributedSettings().wire_dtype(cuda) is torch.bfloat16
    assert DistributedSettings(gather_dtype="full").wire_dtype(cuda) is None
    assert DistributedSettings(gather_dtype="bf16").wire_dtype(cpu) is torch.bfloat16


def test_packages_configure_no_logging():
    assert not logging.getLogger("distributed").handlers
