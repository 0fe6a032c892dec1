"""Who decays and who learns slower."""

import torch
from torch.nn import Parameter

from bin.optimizer import parameter_groups


def test_matrices_decay_and_pretrained_towers_learn_slower() -> None:
    named = {
        "audio_tower.conv1.weight": Parameter(torch.zeros(2, 2, 3)),
        "audio_tower.conv1.bias": Parameter(torch.zeros(2)),
        "language_model.layers.0.self_attn.q_proj.weight": Parameter(torch.zeros(2, 2)),
        "audio_head.weight": Parameter(torch.zeros(2, 2)),
        "log_inv_temperature": Parameter(torch.zeros(())),
    }
    sources = {"audio_tower": "openai/whisper-base", "language_model": "random", "heads": "random"}
    found = {
        name: (group["weight_decay"], group["lr_scale"])
        for group in parameter_groups(named.items(), sources, 0.05, 0.1)
        for name, parameter in named.items()
        if any(parameter is p for p in group["params"])
    }
    assert found == {
        "audio_tower.conv1.weight": (0.05, 0.1),
        "audio_tower.conv1.bias": (0.0, 0.1),
        "language_model.layers.0.self_attn.q_proj.weight": (0.05, 1.0),
        "audio_head.weight": (0.05, 1.0),
        "log_inv_temperature": (0.0, 1.0),
    }


def test_adapters_on_a_pretrained_tower_learn_at_full_speed() -> None:
    lora_A = Parameter(torch.zeros(2, 2))
    named = [("audio_tower.layers.0.self_attn.q_proj.lora_A", lora_A)]
    (group,) = parameter_groups(named, {"audio_tower": "some/checkpoint"}, 0.0, 0.1)
    assert group["lr_scale"] == 1.0
