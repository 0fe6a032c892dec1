"""What comes of a fault, and how a row of the table is written."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from tests.faults.job import Job, Workshop


@dataclass
class Outcome:
    """survived: came to its end after the fault, or refused as it should. equal: bit for bit; None: not to be had."""

    survived: bool
    equal: bool | None
    leftovers: list[str]
    note: str = ""

    @property
    def is_good(self) -> bool:
        return self.survived and self.equal is not False and not self.leftovers


class Skipped(Exception):
    """The fault cannot be made here; the reason is shown."""


Case = Callable[[Workshop, str, random.Random], Outcome]


@dataclass(frozen=True)
class Row:
    name: str
    case: Case
    every_round: bool = True  # else once a soak: nothing in it is left to chance
    in_ci: bool = False


def compared(job: Job, *more: str) -> Outcome:
    """Resume to the end, and compare with the undisturbed run."""
    reference = job.shop.reference(*more)
    job.finish()
    return Outcome(True, job.trained() == reference, job.leftovers())
