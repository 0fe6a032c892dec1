"""How a run is asked to stop: SIGTERM (a machine is taken back, a time limit nears) or Ctrl-C.

starting                the signal raises Preempted at once: there is nothing to save
with stop.held(save):   it is only noted; the loop reads it once a step, on all ranks together, and `save` is called
afterwards              Preempted at once again: all is saved
while an error is told  only noted: the launcher sends the signal to all ranks as soon as one has ended
"""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

from distributed.collectives import agree


class Preempted(BaseException):
    """The run was asked to stop. Like KeyboardInterrupt no Exception: what mends errors must not swallow it."""

    def __init__(self, agreed: bool = False) -> None:
        super().__init__("asked to stop by a signal")
        self.agreed = agreed  # all ranks raised it at the same place, so that they can save together


class StopRequest:
    """Takes over SIGTERM and Ctrl-C. A second Ctrl-C always interrupts at once."""

    _current: "StopRequest | None" = None  # signals belong to the process, and so does this

    def __init__(self) -> None:
        self.requested = False
        self._holds = False
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        StopRequest._current = self

    @contextlib.contextmanager
    def held(self, save: Callable[[], None]) -> Iterator[None]:
        """Within, a signal is only noted; `save` is called when all ranks stop together there.

        A signal that nobody acted upon raises at the end.
        """
        self._holds = True
        try:
            yield
        except Preempted as preempted:
            if preempted.agreed:
                save()
            raise  # as all errors: without letting go, so that no signal cuts off what is to be told of it
        self._holds = False
        if self.requested:
            raise Preempted

    def only_note(self) -> None:
        """From here on a signal raises nothing: what ended the run is being told."""
        self._holds = True

    def restore(self) -> None:
        StopRequest._current = None
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        is_first, self.requested = not self.requested, True
        if is_first and not self._holds:
            raise Preempted


def is_requested() -> bool:
    """Whether this process was asked to stop: long work then winds up, so that `stop_together` comes soon."""
    return StopRequest._current is not None and StopRequest._current.requested


def stop_together() -> None:
    """Raise Preempted on all ranks when any of them was asked to stop. A collective."""
    if agree(stop=is_requested())["stop"]:
        raise Preempted(agreed=True)
