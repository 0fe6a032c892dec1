"""What a benchmark of speed or memory found: one table, and the targets it is held against.

Every such benchmark is a module of bench/ with

    def measure(limits: Limits, tiny: bool = False) -> Findings

and ends in `sys.exit(run_alone(measure))`; bench/all.py runs them all, each in a process of its own. `tiny` is a smoke
test at small shapes, on the CPU as well: same code, figures that mean nothing.
"""

import argparse
import importlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from bench.limits import Limits, measure_limits
from retrieval.evaluate import plain_table

Cell = str | float | int | None


@dataclass(frozen=True)
class Check:
    """A figure beside its target."""

    name: str
    value: float | None  # None: it could not be measured
    target: float
    wanted: Literal["at least", "at most"] = "at least"

    @property
    def is_met(self) -> bool:
        if self.value is None or math.isnan(self.value):
            return False
        return self.value >= self.target if self.wanted == "at least" else self.value <= self.target

    def line(self) -> str:
        value = "not measured" if self.value is None else number(self.value)
        return f"{'ok    ' if self.is_met else 'MISSED'}  {self.name}: {value}, {self.wanted} {number(self.target)}"


@dataclass
class Findings:
    """Rows of one table (the columns are their keys, in order of appearance), checks, and remarks to print below."""

    title: str
    rows: list[dict[str, Cell]] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def check(
        self, name: str, value: float | None, target: float, wanted: Literal["at least", "at most"] = "at least"
    ) -> None:
        self.checks.append(Check(name, value, target, wanted))

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "checks": [{**asdict(c), "is_met": c.is_met} for c in self.checks]}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "Findings":
        checks = [Check(**{k: v for k, v in one.items() if k != "is_met"}) for one in saved["checks"]]
        return cls(saved["title"], saved["rows"], checks, saved["notes"])

    def text(self) -> str:
        """Title, table, checks and remarks."""
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        cells = [[_shown(row.get(name)) for name in columns] for row in self.rows]
        table = [plain_table(columns, cells)] if self.rows else []
        return "\n".join([self.title, *table, *(c.line() for c in self.checks), *self.notes])


def number(value: float) -> str:
    """Three or four digits that matter, never an exponent for what a person would write out. Close below one, such as a
    cosine, two digits of the distance."""
    if value != value or abs(value) == math.inf:
        return str(value)
    if value and not 1e-3 <= abs(value) < 1e7:
        return f"{value:.3g}"
    if 0.99 <= abs(value) < 1:
        return f"{value:.{min(7, 1 - math.floor(math.log10(1 - abs(value))))}f}"
    digits = 0 if abs(value) >= 1000 else max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{min(digits, 4)}f}" if digits else f"{value:,.0f}"


def _shown(cell: Cell) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, str):
        return cell
    return f"{cell:,}" if isinstance(cell, int) else number(cell)


def find_pyplot() -> Any:
    """matplotlib.pyplot without a window; None where matplotlib, which nothing else needs, is not installed."""
    try:
        importlib.import_module("matplotlib").use("Agg")
        return importlib.import_module("matplotlib.pyplot")
    except ImportError:
        return None


def run_alone(measure: Callable[[Limits, bool], Findings], argv: Sequence[str] | None = None) -> int:
    """A benchmark as a program: measures the limits, then the benchmark; prints, and writes JSON where asked to.

    Exit code 0 once it has measured, whether or not targets are met: they are printed.
    """
    parser = argparse.ArgumentParser(description=(measure.__doc__ or "").split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="small shapes: does it run at all")
    parser.add_argument("--json", type=Path, help="write the findings there too")
    args = parser.parse_args(argv)
    limits = measure_limits(args.tiny)
    print(limits.line(), flush=True)
    found = measure(limits, args.tiny)
    print(found.text())
    if args.json is not None:
        args.json.write_text(json.dumps({"limits": limits.to_json(), **found.to_json()}, indent=1) + "\n")
    return 0
