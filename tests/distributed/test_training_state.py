import json
import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from distributed.atomic import json_bytes, read_tensors, write_tensors
from distributed.flat import FlatParameters
from distributed.training_state import (
    pack_optimizer,
    pack_plateau,
    pack_rng,
    restore_rng,
    unpack_optimizer,
    unpack_plateau,
)


def make(lr=1e-2, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model.register_parameter("log_inv_temperature", nn.Parameter(torch.tensor(0.5)))
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0, "lr": lr / 10}]
    return model, torch.optim.AdamW(groups, lr=lr, **options)


def train(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        (model(torch.randn(5, 3, generator=generator)).pow(2).mean() * model.log_inv_temperature).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"foreach": True}, {"fused": True}])
def test_resumed_optimizer_goes_on_bit_by_bit(tmp_path, options):
    model, optimizer = make(**options)
    train(model, optimizer, range(3))
    tensors, hyper = pack_optimizer(optimizer, model.named_parameters())
    write_tensors(tmp_path / "optim.safetensors", tensors)
    hyper = json.loads(json_bytes(hyper))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, optimizer, range(3, 6))

    resumed, second = make(lr=5.0, **options)  # the saved learning rates are progress and come back
    resumed.load_state_dict(weights)
    unpack_optimizer(second, resumed.named_parameters(), read_tensors(tmp_path / "optim.safetensors"), hyper)
    assert [group["lr"] for group in second.param_groups] == [1e-2, 1e-3]
    train(resumed, second, range(3, 6))
    for expected, param in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(param, expected)


def make_flat(lr=1e-2):
    """The same model and groups as `make`, held flat."""
    model, plain = make(lr)
    name_of = {param: name for name, param in model.named_parameters()}
    flat = FlatParameters([[(name_of[p], p) for p in group["params"]] for group in plain.param_groups], num_tail=2)
    held = zip(plain.param_groups, flat.groups, strict=True)
    groups = [group | {"params": [param], "foreach": None} for group, param in held]
    return model, flat, torch.optim.AdamW(groups, lr=lr, fused=True)


def train_flat(model, flat, optimizer, steps):
    for step in steps:
        flat.zero()
        generator = torch.Generator().manual_seed(step)
        (model(torch.randn(5, 3, generator=generator)).pow(2).mean() * model.log_inv_temperature).backward()
        optimizer.step()


def test_a_flat_optimizer_packs_and_resumes_what_a_plain_one_would(tmp_path):
    model, optimizer = make()
    train(model, optimizer, range(3))
    expected, expected_hyper = pack_optimizer(optimizer, model.named_parameters())
    write_tensors(tmp_path / "optim.safetensors", expected)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    flat_model, flat, flat_optimizer = make_flat()
    train_flat(flat_model, flat, flat_optimizer, range(3))
    found, hyper = pack_optimizer(flat_optimizer, flat_model.named_parameters(), flat)
    assert [group["params"] for group in hyper["groups"]] == [group["params"] for group in expected_hyper["groups"]]
    assert hyper["state"] == expected_hyper["state"]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-9)

    train(model, optimizer, range(3, 6))
    resumed, flat, second = make_flat(lr=5.0)
    resumed.load_state_dict(weights)
    saved = read_tensors(tmp_path / "optim.safetensors")
    unpack_optimizer(second, resumed.named_parameters(), saved, expected_hyper, flat)
    back, _ = pack_optimizer(second, resumed.named_parameters(), flat)
    assert all(torch.equal(back[name], value) for name, value in saved.items())
    train_flat(resumed, flat, second, range(3, 6))
    for expected_param, param in zip(model.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(param, expected_param, rtol=1e-5, atol=1e-7)


def test_what_cannot_be_held_flat_is_refused():
    model, optimizer = make()
    train(model, optimizer, range(2))
    tensors, hyper = pack_optimizer(optimizer, model.named_parameters())
    other, flat, flat_optimizer = make_flat()
    uneven = tensors | {"0.weight/step": torch.tensor(7.0)}
    with pytest.raises(ValueError, match="have had 2 to 7 updates; use --no-flat_optimizer"):
        unpack_optimizer(flat_optimizer, other.named_parameters(), uneven, hyper, flat)
    partly = {name: value for name, value in tensors.items() if not name.startswith("0.weight")}
    with pytest.raises(ValueError, match="some have none"):
        unpack_optimizer(flat_optimizer, other.named_parameters(), partly, hyper | {"state": sorted(partly)}, flat)
    assert not flat_optimizer.state


def test_newly_given_settings_win_and_are_logged(caplog):
    model, optimizer = make()
    train(model, optimizer, range(2))
    packed = pack_optimizer(optimizer, model.named_parameters())
    model, optimizer = make(betas=(0.8, 0.99))
    unpack_optimizer(optimizer, model.named_parameters(), *packed)
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.99)
    assert "betas is now (0.8, 0.99)" in caplog.text


def test_other_names_or_missing_state_are_refused_before_any_change():
    model, optimizer = make()
    train(model, optimizer, range(2))
    tensors, hyper = pack_optimizer(optimizer, model.named_parameters())
    renamed = [(name.replace("1.", "2."), p) for name, p in model.named_parameters()]
    with pytest.raises(ValueError, match=r"missing 2\.bias, 2\.weight, unexpected 1\.bias, 1\.weight"):
        unpack_optimizer(optimizer, renamed, tensors, hyper)
    less = {name: t for name, t in tensors.items() if name != "0.weight/exp_avg_sq"}
    with pytest.raises(ValueError, match=r"not whole: missing 0\.weight/exp_avg_sq"):
        unpack_optimizer(optimizer, model.named_parameters(), less, hyper)
    wrong = tensors | {"0.weight/exp_avg": torch.zeros(4, 4)}
    with pytest.raises(ValueError, match=r"0\.weight/exp_avg has shape \(4, 4\); allowed: \(4, 3\)"):
        unpack_optimizer(optimizer, model.named_parameters(), wrong, hyper)
    with pytest.raises(ValueError, match="optimizer AdamW, this run uses SGD"):
        unpack_optimizer(torch.optim.SGD(model.parameters()), model.named_parameters(), tensors, hyper)
    with pytest.raises(ValueError, match="does not name"):
        pack_optimizer(optimizer, [])
    assert optimizer.state[model[0].weight]["exp_avg_sq"].any()


def test_plateau_restores_progress_but_not_patience():
    """load_state_dict would bring the saved patience back over a newly given one."""
    _, optimizer = make()
    first = ReduceLROnPlateau(optimizer, mode="max", patience=1, factor=0.5)
    assert pack_plateau(first)["best"] is None  # -inf is not strict JSON
    for metric in (0.3, 0.2, 0.1, 0.1):
        first.step(metric)
    progress = json.loads(json_bytes(pack_plateau(first)))

    second = ReduceLROnPlateau(optimizer, mode="max", patience=7, factor=0.1)
    unpack_plateau(second, progress)
    assert (second.patience, second.factor) == (7, 0.1)
    for name in ("best", "num_bad_epochs", "cooldown_counter", "last_epoch"):
        assert getattr(second, name) == getattr(first, name), name
    assert second.get_last_lr() == first.get_last_lr()

    unmeasured = ReduceLROnPlateau(optimizer, mode="max")
    unpack_plateau(second, pack_plateau(unmeasured))
    assert second.best == -math.inf
    with pytest.raises(ValueError, match="mode is 'min'"):
        unpack_plateau(ReduceLROnPlateau(optimizer, mode="min"), progress)


def test_random_state_comes_back(tmp_path):
    write_tensors(tmp_path / "rng.safetensors", pack_rng())
    expected = torch.rand(5)
    torch.manual_seed(123)
    restore_rng(read_tensors(tmp_path / "rng.safetensors"))
    assert torch.equal(torch.rand(5), expected)
