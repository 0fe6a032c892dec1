"""The bank of negatives: refreshed on schedule, of as many terms as asked, its time counted and too much of it told."""

import time

import pytest
import torch

import bin.bank
from bin.bank import BankSchedule
from data.glossary import Entry, Glossary
from data.terms import key64
from distributed.processes import World
from losses.terms import TermBank

ALONE = World(0, 1, 0, torch.device("cpu"), "none", 0)
GLOSSARY = Glossary("g", [Entry(f"term {i:03d}x", f"Term {i}") for i in range(50)])


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The terms of each embedding, which takes 10 ms and gives zeros."""
    calls: list[list[str]] = []

    def encode_terms(model, tokenizer, terms, batch_size, world):
        calls.append(list(terms))
        time.sleep(0.01)
        return torch.zeros(len(terms), 4)

    monkeypatch.setattr(bin.bank, "encode_terms", encode_terms)
    return calls


def run(schedule: BankSchedule, steps: int, steps_per_epoch: int, bank: TermBank | None = None) -> list[int]:
    """Steps at which the bank was embedded."""
    fresh = []
    for step in range(steps):
        before, bank = bank, schedule.current(bank, torch.nn.Linear(1, 1), None, step, step % steps_per_epoch)
        fresh += [step] if bank is not before else []
    return fresh


def test_each_epoch_or_every_so_many_steps(embedded: list[list[str]]) -> None:
    assert run(BankSchedule(GLOSSARY, 0, 0, 8, 0, ALONE), 7, 3) == [0, 3, 6]
    assert run(BankSchedule(GLOSSARY, 2, 0, 8, 0, ALONE), 6, 3) == [0, 2, 4]
    assert embedded == [GLOSSARY.terms] * 6
    assert run(BankSchedule(None, 2, 0, 8, 0, ALONE), 6, 3) == []
    resumed = TermBank(torch.zeros(1, 4), torch.zeros(1).long(), torch.zeros(1).long())
    schedule = BankSchedule(GLOSSARY, 0, 0, 8, 0, ALONE)
    assert schedule.current(resumed, None, None, 4, 1) is resumed


def test_fewer_terms_are_drawn_anew_and_the_same_on_every_rank(embedded: list[list[str]]) -> None:
    run(BankSchedule(GLOSSARY, 1, 20, 8, 0, ALONE), 6, 3)
    assert [len(terms) for terms in embedded] == [20] * 6
    assert len({tuple(terms) for terms in embedded}) == 6
    first = list(embedded)
    run(BankSchedule(GLOSSARY, 1, 20, 8, 0, ALONE), 6, 3)
    assert embedded[6:] == first
    bank = BankSchedule(GLOSSARY, 1, 20, 8, 0, ALONE).current(None, torch.nn.Linear(1, 1), None, 5, 2)
    assert bank.keys_K.tolist() == [key64(term) for term in first[5]]


def test_its_time_is_counted_and_too_much_of_it_is_told(
    embedded: list[list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    schedule = BankSchedule(GLOSSARY, 1, 0, 8, 0, ALONE)
    run(schedule, 2, 1)
    assert schedule.numbers()["train/bank_refresh_s"] > 0.015
    assert schedule.numbers() == {}
    assert "--bank_terms" in caplog.text
