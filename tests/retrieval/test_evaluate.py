"""Evaluation over several processes is bit for bit that of one; tables and top terms are deterministic."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from retrieval.evaluate import encode_in_fixed_batches, measure, plain_table, rank_share, recall_table, top_terms
from retrieval.judgements import Judgements
from retrieval.metrics import EvalResult, summarise
from retrieval.ranks import ClipRanks

NUM_CLIPS, NUM_TERMS, DIM = 23, 17, 8


@pytest.fixture
def weights() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    clips = torch.randn(NUM_CLIPS, 32, generator=generator)
    terms = torch.randn(NUM_TERMS, 32, generator=generator)
    return clips, terms, torch.randn(32, DIM, generator=generator)


@pytest.fixture
def judgements() -> Judgements:
    keys = [f"term {i:02d}" for i in range(NUM_TERMS)]
    terms = [[keys[i % NUM_TERMS], keys[(3 * i + 1) % NUM_TERMS]] if i % 5 else [] for i in range(NUM_CLIPS)]
    return Judgements.from_terms(keys, terms, seen_terms=keys[:9])


@given(st.integers(0, 50), st.integers(1, 9), st.integers(1, 9))
def test_shares_are_the_whole_list_once(num_items: int, batch_size: int, world_size: int) -> None:
    spans = [span for rank in range(world_size) for span in rank_share(num_items, batch_size, rank, world_size)]
    assert sorted(spans) == rank_share(num_items, batch_size, 0, 1)
    assert sorted(i for start, stop in spans for i in range(start, stop)) == list(range(num_items))


def run_at(world_size: int, weights, judgements: Judgements, lost: frozenset[int] = frozenset()):  # type: ignore[no-untyped-def]
    """All processes one after another, with gathers over what the others left: (embeddings, results) of each."""
    clips, terms, head = weights

    def encode(rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        return torch.nn.functional.normalize(rows[start:stop] @ head, dim=-1)

    def encode_clips(start: int, stop: int) -> tuple[list[int], torch.Tensor]:
        kept = [c for c in range(start, stop) if c not in lost]
        return kept, torch.nn.functional.normalize(clips[kept] @ head, dim=-1)

    sent: dict[int, torch.Tensor] = {}
    embeddings, results = [], []
    for last_round in (False, True):  # the first round only collects what each process sends
        for rank in range(world_size):

            def gather_rows(rows: torch.Tensor, counts: list[int], rank: int = rank) -> torch.Tensor:
                assert len(rows) == counts[rank]
                sent[rank] = rows
                everyone = [sent.get(r, torch.zeros(counts[r], DIM)) for r in range(world_size)]
                return torch.cat(everyone)

            args = (NUM_TERMS, 4, rank, world_size, gather_rows, DIM)
            term_NE = encode_in_fixed_batches(lambda start, stop: encode(terms, start, stop), *args)
            if last_round:
                embeddings.append(term_NE)
    packed: dict[int, torch.Tensor] = {}
    for last_round in (False, True):
        for rank in range(world_size):

            def gather_ints(values: torch.Tensor, rank: int = rank) -> torch.Tensor:
                packed[rank] = values
                return torch.cat(list(packed.values()))

            term_NE = embeddings[rank]
            (ranks,) = measure(
                encode_clips, lambda start, stop, all_NE=term_NE: all_NE[start:stop], judgements, 4,
                rank=rank, world_size=world_size, gather_ints=gather_ints,
            )  # fmt: skip
            if last_round:
                results.append(summarise(ranks, NUM_TERMS))
    return embeddings, results


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_any_number_of_processes_gives_the_bits_of_one(world_size: int, weights, judgements: Judgements) -> None:  # type: ignore[no-untyped-def]
    (alone_NE,), (alone,) = run_at(1, weights, judgements)
    embeddings, results = run_at(world_size, weights, judgements)
    assert all(torch.equal(term_NE, alone_NE) for term_NE in embeddings)
    assert all(result == alone for result in results)
    assert alone.num_clips == NUM_CLIPS


def test_unreadable_clips_are_left_out_and_show_in_the_count(weights, judgements: Judgements) -> None:  # type: ignore[no-untyped-def]
    _, results = run_at(2, weights, judgements, lost=frozenset({4, 5, 6, 7, 21}))  # one whole batch, one of another
    assert results[0] == results[1]
    assert results[0].num_clips == NUM_CLIPS - 5
    assert results[0].num_no_term_clips == 4  # clips 0, 10, 15 and 20


def test_top_terms_equal_a_full_sort_and_break_ties_by_key() -> None:
    audio_CE = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    term_NE = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.8, 0.6]])
    order_N = np.array([3, 0, 1, 2, 4])
    scores, places = top_terms(audio_CE, term_NE, 2, order_N)
    assert places.tolist() == [[2, 3], [4, 1]]
    np.testing.assert_allclose(scores, [[1.0, 1.0], [0.96, 0.8]], rtol=1e-6)
    everything, _ = top_terms(audio_CE, term_NE, 99, order_N)
    assert everything.shape == (2, 5)
    with pytest.raises(ValueError, match="k: got 0; allowed: at least 1"):
        top_terms(audio_CE, term_NE, 0, order_N)


def test_top_terms_agree_with_the_metrics(weights, judgements: Judgements) -> None:  # type: ignore[no-untyped-def]
    clips, terms, head = weights
    _, (result,) = run_at(1, weights, judgements)
    audio_CE = torch.nn.functional.normalize(clips @ head, dim=-1)
    term_NE = torch.nn.functional.normalize(terms @ head, dim=-1)
    _, places = top_terms(audio_CE, term_NE, 5, judgements.order_N)
    found = [len(set(p) & set(top)) / len(p) for p, top in zip(judgements.positives, places, strict=True) if p]
    assert result.recall(5) == pytest.approx(sum(found) / len(found), abs=1e-12)


def test_recall_table_shows_before_and_after_with_counts(weights, judgements: Judgements) -> None:  # type: ignore[no-untyped-def]
    _, (after,) = run_at(1, weights, judgements)
    only_all = EvalResult(23, 5, 17, None, {"all": after.subsets["all"]})
    header, rows = recall_table(after, only_all)
    assert header == ["terms", "R@1", "R@5", "R@10", "clips", "glossary"]
    assert [row[0] for row in rows] == ["all", "seen", "unseen"]
    value = f"{after.recall(5):.3f}"
    assert rows[0][2:] == [f"{value} -> {value}", rows[0][3], "18", "17"]
    assert rows[2] == ["unseen", "-", "-", "-", "0", "17"]
    lines = plain_table(header, rows).splitlines()
    assert len(lines) == 5
    assert len({len(line) for line in lines}) == 1


def dot_measure(weights, judgements: Judgements, sizes: list[int] | None = None) -> list[ClipRanks]:  # type: ignore[no-untyped-def]
    clips, terms, head = weights
    audio_CE, term_NE = (torch.nn.functional.normalize(rows @ head, dim=-1) for rows in (clips, terms))
    return measure(
        lambda start, stop: (range(start, stop), audio_CE[start:stop]),
        lambda start, stop: term_NE[start:stop], judgements, 4, sizes, num_top=5,
    )  # fmt: skip


def test_each_size_is_measured_as_if_the_glossary_ended_there(weights) -> None:  # type: ignore[no-untyped-def]
    keys = [f"term {(7 * i) % NUM_TERMS:02d}" for i in range(NUM_TERMS)]  # not in alphabetical order
    gold = [[keys[i % 5], keys[(i + 1) % 5]] for i in range(NUM_CLIPS)]
    sizes = [5, 6, 11, NUM_TERMS]
    measured = dot_measure(weights, Judgements.from_terms(keys, gold), sizes)
    for size, ranks in zip(sizes, measured, strict=True):
        clips, terms, head = weights
        (alone,) = dot_measure((clips, terms[:size], head), Judgements.from_terms(keys[:size], gold))
        np.testing.assert_array_equal(ranks.rank_P, alone.rank_P)
        np.testing.assert_array_equal(ranks.top_place_CT, alone.top_place_CT)
        np.testing.assert_allclose(ranks.top_score_CT, alone.top_score_CT, rtol=1e-5)
    assert (np.diff([ranks.rank_P for ranks in measured], axis=0) >= 0).all()


def test_chunks_of_terms_change_nothing(weights, judgements: Judgements, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    (whole,) = dot_measure(weights, judgements)
    monkeypatch.setattr("retrieval.evaluate.CHUNK_TERMS", 3)
    (in_chunks,) = dot_measure(weights, judgements)
    np.testing.assert_allclose(in_chunks.top_score_CT, whole.top_score_CT, rtol=1e-6)
    assert summarise(in_chunks, NUM_TERMS).subsets == summarise(whole, NUM_TERMS).subsets


@pytest.mark.parametrize("sizes", [[], [3, NUM_TERMS], [NUM_TERMS, NUM_TERMS], [NUM_TERMS + 1], [NUM_TERMS, 16]])
def test_sizes_that_cannot_be_measured_are_errors(sizes: list[int], weights, judgements: Judgements) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=re.escape(f"sizes: {sizes}; allowed: ascending, 17 (all positives) to 17")):
        dot_measure(weights, judgements, sizes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((5, 0, 0, 1), "batch_size: 0; allowed: at least 1"), ((5, 2, 2, 2), "rank: 2; allowed: 0 to 1")],
)
def test_impossible_shares_are_errors(arguments: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        rank_share(*arguments)
