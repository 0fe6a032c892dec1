"""Other tools read our files and measure what we do."""

import csv
import json
from pathlib import Path

import ir_measures
import numpy as np
import pytest
import torch
from ir_measures import RR, R, Success

from data.clips import Clip
from retrieval.judgements import Judgements
from retrieval.measured import Measured
from retrieval.metrics import KS
from retrieval.ranks import rank_positives
from retrieval.trec import write_beir, write_trec
from tests.retrieval.cases import random_case


def measurement(seed: int, num_top: int, tied: bool) -> Measured:
    scores_CN, judgements = random_case(seed)
    if tied:
        scores_CN = (scores_CN * 12).round() / 12
    terms = [f"term {i} %/#é" for i in judgements.order_N]  # blanks and signs; sorts as the made-up ones only by luck
    order_N = np.empty(40, dtype=np.int64)
    order_N[sorted(range(40), key=lambda i: terms[i])] = np.arange(40)
    judgements = Judgements(
        judgements.positives, judgements.ignored, judgements.is_no_term_C, judgements.seen_N, order_N
    )
    clips = [
        Clip(f"clip {i}", "a.wav", 0.5, None, "said", tuple(terms[p] for p in places), (), (), not places, "x")
        for i, places in enumerate(judgements.positives)
    ]
    return Measured(clips, terms, 40, {40: rank_positives(scores_CN, range(60), judgements, num_top)})


@pytest.mark.parametrize("tied", [False, True])
def test_ir_measures_on_our_files_gives_our_metrics(tmp_path: Path, tied: bool) -> None:
    measured = measurement(11, num_top=40, tied=tied)
    write_trec(tmp_path, measured)
    run = list(ir_measures.read_trec_run(str(tmp_path / "run.trec")))
    qrels = list(ir_measures.read_trec_qrels(str(tmp_path / "qrels.trec")))
    wanted = [RR, *(measure @ k for k in KS for measure in (R, Success))]
    outside = {str(m): v for m, v in ir_measures.calc_aggregate(wanted, qrels, run).items()}
    ours = measured.result().subsets["all"]
    assert outside["RR"] == pytest.approx(ours.mrr, abs=1e-9)
    for k in KS:
        assert outside[f"R@{k}"] == pytest.approx(ours.recall[k], abs=1e-9)
        assert outside[f"Success@{k}"] == pytest.approx(ours.hit[k], abs=1e-9)


def test_the_run_is_as_deep_as_terms_were_kept_and_strictly_descending(tmp_path: Path) -> None:
    judgements = Judgements.from_terms(["a", "b", "c"], [["b"], []], [["c"], []])
    clips = [Clip(f"c{i}", "a.wav", None, None, "", t, (), t, not t, "x") for i, t in enumerate([("b",), ()])]
    ranks = rank_positives(torch.tensor([[0.5, 0.5, 0.5], [0.25, 0.5, 0.25]]), range(2), judgements, num_top=3)
    write_trec(tmp_path, Measured(clips, ["a", "b", "c"], 3, {3: ranks}), tag="mine")
    lines = [line.split() for line in (tmp_path / "run.trec").read_text().splitlines()]
    assert [line[:4] for line in lines] == [
        ["c0", "Q0", "a", "1"], ["c0", "Q0", "b", "2"],  # c is ignored
        ["c1", "Q0", "b", "1"], ["c1", "Q0", "a", "2"], ["c1", "Q0", "c", "3"],
    ]  # fmt: skip
    scores = np.array([line[4] for line in lines], dtype=np.float32)
    assert (scores[1] < scores[0], scores[4] < scores[3]) == (True, True)
    assert {line[5] for line in lines} == {"mine"}
    assert (tmp_path / "qrels.trec").read_text() == "c0 0 b 1\n"


def test_the_beir_folder_has_corpus_queries_and_qrels_that_fit(tmp_path: Path) -> None:
    measured = measurement(12, num_top=5, tied=False)
    write_beir(tmp_path, measured)
    corpus = [json.loads(line) for line in (tmp_path / "corpus.jsonl").read_text().splitlines()]
    queries = [json.loads(line) for line in (tmp_path / "queries.jsonl").read_text().splitlines()]
    assert [row["text"] for row in corpus] == measured.terms
    assert queries[3]["metadata"] == {"audio": "a.wav", "start_s": 0.5, "end_s": None}
    with (tmp_path / "qrels" / "test.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert len(rows) == len(measured.ranks.rank_P)
    assert {row["query-id"] for row in rows} <= {row["_id"] for row in queries}
    assert {row["corpus-id"] for row in rows} <= {row["_id"] for row in corpus}
    assert {row["score"] for row in rows} == {"1"}
