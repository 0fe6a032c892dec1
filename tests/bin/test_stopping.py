"""When a signal raises at once, when it is only noted, and who saves."""

import os
import signal
from collections.abc import Iterator

import pytest

from bin.stopping import Preempted, StopRequest, is_requested, stop_together


@pytest.fixture
def stop() -> Iterator[StopRequest]:
    request = StopRequest()
    yield request
    request.restore()


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_outside_the_loop_the_signal_raises_at_once(stop: StopRequest) -> None:
    with pytest.raises(Preempted) as raised:
        terminate()
    assert not raised.value.agreed
    terminate()  # a second one changes nothing: the first is being acted upon


def test_in_the_loop_it_is_noted_and_all_ranks_save_once(stop: StopRequest) -> None:
    saves = []
    with pytest.raises(Preempted), stop.held(lambda: saves.append(1)):  # noqa: PT012
        stop_together()  # nobody asked yet
        terminate()
        terminate()
        assert is_requested()
        stop_together()
    assert saves == [1]


def test_a_signal_that_nobody_acted_upon_raises_at_the_end_and_saves_nothing(stop: StopRequest) -> None:
    saves: list[int] = []
    with pytest.raises(Preempted), stop.held(lambda: saves.append(1)):
        terminate()
    assert saves == []


def test_errors_pass_through_without_a_save(stop: StopRequest) -> None:
    with pytest.raises(RuntimeError, match="broken"), stop.held(lambda: pytest.fail("saved")):
        raise RuntimeError("broken")


def test_no_signal_cuts_off_the_telling_of_an_error(stop: StopRequest) -> None:
    """torchrun sends it to all ranks as soon as one has failed: rank 0 is then about to write why."""
    with pytest.raises(RuntimeError, match="broken"), stop.held(lambda: None):
        raise RuntimeError("broken")
    terminate()
    assert is_requested()


def test_nor_that_of_an_error_outside_the_loop(stop: StopRequest) -> None:
    stop.only_note()
    terminate()
    assert is_requested()


def test_a_second_interrupt_ends_it(stop: StopRequest) -> None:
    with pytest.raises(KeyboardInterrupt), stop.held(lambda: None):  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_what_was_there_before_is_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    StopRequest().restore()
    assert signal.getsignal(signal.SIGTERM) == before
    assert not is_requested()
