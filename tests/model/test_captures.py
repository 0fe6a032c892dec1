"""What holds a side's captures and their memory, and when it is let go."""

import weakref

import pytest
import torch
from torch import Tensor

from model.captures import Replay, Side
from model.sizes import SizeClass


def a_side() -> Side:
    return Side("audio", lambda *_: torch.ones(0), lambda _: torch.zeros(0))


def test_a_history_keeps_no_capture_once_it_has_gone_back() -> None:
    """In two passes the rows of the first live on while the second captures: memory for both would be too much."""

    class Capture:
        def __init__(self) -> None:
            self.side = a_side()

        def replay_forward(self, flat: Tensor, payload: Tensor, num_rows: int) -> Tensor:
            return torch.ones(num_rows, 2)

        def replay_backward(self, grad_NE: Tensor) -> None:
            came.append(grad_NE)

    came: list[Tensor] = []
    capture = Capture()
    side, gone = capture.side, weakref.ref(capture)
    anchor, nothing = torch.zeros((), requires_grad=True), torch.zeros(0)
    rows = Replay.apply(anchor, capture, nothing, nothing, 3, None)
    assert side.is_busy()
    del capture
    assert gone() is not None, "its backward graph is still to run"
    rows.backward(torch.full((3, 2), 2.0))
    assert gone() is None
    assert not side.is_busy()
    assert [grad_NE.tolist() for grad_NE in came] == [[[2.0, 2.0]] * 3]


@pytest.mark.parametrize(("num_bytes", "num_tokens", "stay"), [(90, 64, False), (90, 32, True), (10, 64, True)])
def test_captures_make_room_for_a_larger_class_if_they_hold_much(
    num_bytes: int, num_tokens: int, stay: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("Of", (), {"total_memory": 1000}))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    side = a_side()
    side.captures, side.pool, side.num_bytes = {SizeClass(32, 1, 32): object()}, object(), num_bytes  # type: ignore[dict-item]
    side.make_room(SizeClass(num_tokens, 1, 64), torch.device("cpu"))
    assert (len(side.captures), side.pool is not None, side.num_bytes > 0) == (stay, stay, stay)
