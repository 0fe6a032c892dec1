"""Random inputs for a reader, and what it does with each: takes it, refuses it as it should, or crashes or hangs.

A target is a strategy for inputs and a function that reads one. Reading may return how many things it took, or raise
ValueError with a message, which is how all readers refuse. Everything else is a fault: any other exception, more than
TIME_LIMIT_S, more memory than the process may have, an empty message.
"""

from __future__ import annotations

import random
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

TIME_LIMIT_S = 10.0
BATCH = 500  # inputs a run of hypothesis, which remembers all that it has tried


class Hang(BaseException):
    """Reading took more than TIME_LIMIT_S; no Exception, so that no reader can take it for a fault of the input."""


@dataclass
class Target:
    """`read(value)` returns how many things it took, or raises ValueError."""

    name: str
    inputs: st.SearchStrategy[Any]
    read: Callable[[Any], int]


@dataclass
class Outcome:
    """Counts, and for each distinct fault its traceback and the shortest input that shows it."""

    name: str
    num_inputs: int = 0
    taken: int = 0
    refused: int = 0
    slowest_s: float = 0.0
    messages: Counter[str] = field(default_factory=Counter)
    faults: dict[str, tuple[str, Any]] = field(default_factory=dict)
    num_faults: int = 0

    def line(self) -> str:
        return (
            f"{self.name:<16}{self.num_inputs:>9}{self.taken:>9}{self.refused:>9}{self.num_faults:>8}"
            f"{self.slowest_s * 1000:>12.0f}"
        )


HEADER = f"{'target':<16}{'inputs':>9}{'taken':>9}{'refused':>9}{'faults':>8}{'slowest, ms':>12}"


def fuzz(target: Target, num_inputs: int, first_seed: int = 0) -> Outcome:
    """Read `num_inputs` inputs, the same for the same seed."""
    outcome = Outcome(target.name)
    previous = signal.signal(signal.SIGALRM, _raise_hang)
    try:
        batch = 0
        while outcome.num_inputs < num_inputs:
            _run_batch(target, outcome, min(BATCH, num_inputs - outcome.num_inputs), first_seed * 1_000_003 + batch)
            batch += 1
    finally:
        signal.signal(signal.SIGALRM, previous)
    return outcome


def _run_batch(target: Target, outcome: Outcome, num_inputs: int, batch_seed: int) -> None:
    before = outcome.num_inputs

    @seed(batch_seed)
    @settings(
        max_examples=num_inputs,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(target.inputs)
    def one(value: Any) -> None:
        if outcome.num_inputs - before < num_inputs:
            _read(target, outcome, value)

    one()
    if outcome.num_inputs == before:
        raise AssertionError(f"{target.name}: the strategy gives no input")


def _read(target: Target, outcome: Outcome, value: Any) -> None:
    outcome.num_inputs += 1
    start = time.perf_counter()
    signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT_S)
    try:
        taken = target.read(value)
        outcome.taken += bool(taken)
        outcome.refused += not taken
    except ValueError as error:
        outcome.refused += 1
        outcome.messages[str(error)[:40]] += 1
        if not str(error):
            _fault(outcome, "refused without a word", value)
    except (Exception, Hang) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        _fault(outcome, f"{type(error).__name__} at {last.filename.split('/')[-1]}:{last.lineno}", value)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    outcome.slowest_s = max(outcome.slowest_s, time.perf_counter() - start)


def _fault(outcome: Outcome, what: str, value: Any) -> None:
    outcome.num_faults += 1
    known = outcome.faults.get(what)
    if known is None or len(repr(value)) < len(repr(known[1])):
        outcome.faults[what] = (traceback.format_exc(limit=-6), value)


def _raise_hang(*_: Any) -> None:
    raise Hang(f"more than {TIME_LIMIT_S} s")


@st.composite
def damaged(draw: st.DrawFn, originals: list[bytes]) -> bytes:
    """One of the originals with up to six bytes or stretches changed, cut out, doubled, moved in or cut off."""
    content = bytearray(draw(st.sampled_from(originals)))
    dice = random.Random(draw(st.integers(0, 2**32)))
    for _ in range(draw(st.integers(0, 6))):
        at = dice.randrange(len(content) + 1)
        length = min(dice.choice((1, 1, 2, 4, 16, 200)), len(content) - at)
        kind = dice.randrange(8)
        if kind == 0 and at < len(content):
            content[at] ^= 1 << dice.randrange(8)
        elif kind == 1 and at < len(content):
            content[at] = dice.choice(b'\x00\xff\x7f\x80"{}[],:\\-0 \n')
        elif kind == 2:
            del content[at : at + length]
        elif kind == 3:
            content[at:at] = content[at : at + length] * dice.choice((1, 2, 50))
        elif kind == 4:
            content[at:at] = dice.choice(STRANGE)
        elif kind == 5:
            content[at : at + length] = dice.randbytes(length)
        elif kind == 6 and dice.random() < 0.3:
            del content[at:]
        elif kind == 7 and content:
            source = dice.randrange(len(content))
            content[at : at + length] = content[source : source + length]
    return bytes(content)


STRANGE = [
    *(b"NaN", b"-Infinity", b"1e400", b"-1", b"1e-400", b"9" * 30, b"9" * 5000, b"null", b"true", b'""', b"{}", b"[]"),
    *(b"\xef\xbb\xbf", b"\xff\xfe", b"\x00", b"\xed\xa0\x80", b"\\ud800", b"\\u0000", b"\r\n", b"\n\n", b'"', b"\\"),
    *(
        b"[" * 300,
        b'{"a":' * 300,
        b"[" * 20_000,
        "井号键".encode(),
        "\u202e\u0301🎧".encode(),
        b"x" * 5000,
        b"..",
        b"/",
    ),
]
