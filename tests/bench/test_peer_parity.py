import pytest
import torch

from bench import peer_parity, peers
from bench.peer_parity import compare, peer_name

CPU = torch.device("cpu")


def test_a_peer_computes_what_our_step_does() -> None:
    found = compare("tuned", CPU)["float32"]
    assert found["loss_difference"] < 1e-5
    assert found["gradient_cosine"] > 1 - 1e-6


def test_a_peer_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_parity, "NUM_CLIPS", 2)
    monkeypatch.setattr(peers, "TEMPERATURE", 0.08)
    with pytest.raises(RuntimeError, match="do not compute the same"):
        compare("stock", CPU)


def test_names_in_the_peer() -> None:
    ours = "audio_tower.layers.0.self_attn.q_proj.lora_A"
    assert peer_name(ours) == "tower.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert peer_name("text_head.weight") == "text_head.weight"
