"""A round of the faults that matter most, through the real program; all of them: python tests/faults/soak.py."""

import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.cases import TABLE
from tests.faults.job import MARK, Job, Workshop
from tests.faults.outcome import Outcome, Row, Skipped, compared
from tests.faults.soak import attempt


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    shop = Workshop(tmp_path_factory.mktemp("faults"))
    yield shop
    shop.nursery.close()


@pytest.mark.parametrize("row", [row for row in TABLE if row.in_ci], ids=lambda row: row.name)
def test_the_run_survives(shop: Workshop, row: Row) -> None:
    outcome = attempt(row, shop, 0, seed=0)
    if isinstance(outcome, str):
        pytest.skip(outcome)
    assert outcome.is_good, outcome


def test_the_comparison_sees_another_result(shop: Workshop) -> None:
    """A run of another seed is not equal to the reference: the table's 'equal' means something."""
    job = Job(shop, "other-seed", ("--seed", "1"))
    outcome = compared(job)
    assert outcome.equal is False
    assert not outcome.is_good


def test_leftovers_are_found(shop: Workshop, tmp_path: Path) -> None:
    job = Job(shop, "left", runs_dir=tmp_path)
    (tmp_path / "left" / "checkpoints" / ".step-00000002.tmp-0a0b0c0d").mkdir(parents=True)
    (shop.folder / "tmp" / "forgotten").write_text("")
    orphan = subprocess.Popen(["sleep", "60"], env={**os.environ, MARK: shop.word})
    try:
        while orphan.pid not in shop.processes():  # its environment comes a little after its program
            assert orphan.poll() is None
        shop.shared_memory.add(str(tmp_path))  # stands for a segment that is still there
        found = job._leftovers()
        assert len(found) == 4, found
        assert f"process {orphan.pid}" in found
    finally:
        orphan.kill()
        orphan.wait()
        shop.shared_memory.discard(str(tmp_path))
        (shop.folder / "tmp" / "forgotten").unlink()


def test_a_case_that_breaks_is_a_failure_and_one_that_cannot_be_made_is_told(shop: Workshop) -> None:
    def broken(shop: Workshop, name: str, chance: random.Random) -> Outcome:
        raise RuntimeError("boom")

    def impossible(shop: Workshop, name: str, chance: random.Random) -> Outcome:
        raise Skipped("no mount here")

    rows = [Row("broken", broken), Row("impossible", impossible)]
    outcomes = [attempt(row, shop, 0, seed=0) for row in rows]
    assert isinstance(outcomes[0], Outcome)
    assert "boom" in outcomes[0].note
    assert outcomes[1] == "no mount here"
