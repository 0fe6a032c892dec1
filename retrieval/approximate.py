"""Approximate search with faiss (CPU) for glossaries beyond a million terms, with its recall measured against exact.

    hnsw   a graph over all terms (Malkov and Yashunin 2016, https://arxiv.org/abs/1603.09320): fast, slow to build
    ivf    terms in cells of which the nearest are looked through (Jegou et al. 2011): builds fast, searches slower

Recall@k is the share of the exact best k that is found, over queries given by the caller (embeddings of real clips are
the ones that count) or, without any, over terms with noise added. It is measured when the index is built and kept with
it: a search that leaves terms out must say how many. Scores are exact cosines of what was found.

Shapes: N terms, E embedding, B queries, K results.
"""

import importlib
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from retrieval.topk import best_rows

Kind = Literal["hnsw", "ivf"]

HNSW_LINKS, HNSW_BUILD_EF, HNSW_SEARCH_EF = 32, 200, 256
IVF_PROBES = 64
IVF_TRAINING_ROWS_A_CELL = 64
RECALL_AT = (1, 10, 100)
NUM_QUERIES = 256
# Length of the noise beside a unit vector: a clip and its term are about as far apart (cosine 0.7).
QUERY_NOISE = 1.0


class Approximate:
    """A faiss index over the rows of one term matrix, and what was measured of it."""

    def __init__(self, faiss_index: Any, facts: dict[str, Any]) -> None:
        self._index, self.facts = faiss_index, facts

    @classmethod
    def build(
        cls, term_NE: Tensor, order_N: NDArray[np.int64], kind: Kind, query_BE: Tensor | None = None
    ) -> "Approximate":
        """Build over all terms and measure recall.

        Args:
            query_BE: embeddings like those that will be searched with; None takes noisy terms.

        Raises:
            ValueError: an unknown kind, or faiss is not installed.
        """
        faiss = _faiss()
        rows_NE = np.ascontiguousarray(term_NE.detach().cpu().float().numpy())
        num_terms, dim = rows_NE.shape
        if kind == "hnsw":
            built = faiss.IndexHNSWFlat(dim, HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
            built.hnsw.efConstruction, built.hnsw.efSearch = HNSW_BUILD_EF, HNSW_SEARCH_EF
            parameters = {"links": HNSW_LINKS, "ef_construction": HNSW_BUILD_EF, "ef_search": HNSW_SEARCH_EF}
        elif kind == "ivf":
            cells = max(1, min(round(4 * math.sqrt(num_terms)), num_terms // 40))
            built = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, cells, faiss.METRIC_INNER_PRODUCT)
            rows = np.random.default_rng(0).permutation(num_terms)[: cells * IVF_TRAINING_ROWS_A_CELL]
            built.train(rows_NE[np.sort(rows)])
            built.nprobe = min(cells, IVF_PROBES)
            parameters = {"cells": cells, "probes": built.nprobe}
        else:
            raise ValueError(f"kind: got {kind!r}; allowed: hnsw, ivf")
        built.add(rows_NE)
        source = "given" if query_BE is not None else f"terms with noise of length {QUERY_NOISE:g}"
        query_BE = noisy_terms(term_NE) if query_BE is None else query_BE
        found = cls(built, {})
        facts = {"kind": kind, "parameters": parameters, "num_queries": len(query_BE), "queries": source}
        found.facts = facts | {"recall": found.measure_recall(query_BE, term_NE, order_N)}
        return found

    def search(self, query_BE: Tensor, k: int, order_N: NDArray[np.int64]) -> tuple[NDArray, NDArray]:
        """As `best_rows`, of the terms that are found; k at most. Rows are shorter where faiss reaches fewer than k."""
        if k < 1:
            raise ValueError(f"k: got {k}; allowed: at least 1")
        queries = np.ascontiguousarray(query_BE.detach().cpu().float().numpy())
        if not len(queries):
            return np.empty((0, 0), np.float32), np.empty((0, 0), np.int64)
        scores_BK, places_BK = self._index.search(queries, min(k, self._index.ntotal))
        reached = int((places_BK >= 0).sum(axis=1).min())  # faiss fills up with -1
        scores_BK, places_BK = scores_BK[:, :reached], places_BK[:, :reached]
        best_BK = np.lexsort((order_N[places_BK], -scores_BK))
        return np.take_along_axis(scores_BK, best_BK, 1), np.take_along_axis(places_BK, best_BK, 1)

    def measure_recall(self, query_BE: Tensor, term_NE: Tensor, order_N: NDArray[np.int64]) -> dict[str, float]:
        """recall@k -> share of the exact best k that is found, over all queries."""
        deepest = min(max(RECALL_AT), len(term_NE))
        _, exact_BK = best_rows(query_BE, term_NE, deepest, order_N)
        _, found_BK = self.search(query_BE, deepest, order_N)
        recall = {}
        for k in (k for k in RECALL_AT if k <= deepest):
            hits = [len(np.intersect1d(a[:k], b[:k])) for a, b in zip(exact_BK, found_BK, strict=True)]
            recall[f"recall@{k}"] = sum(hits) / (k * len(hits))
        return recall

    def save(self, path: Path) -> None:
        """faiss's own binary format, which holds numbers only."""
        _faiss().write_index(self._index, str(path))

    @classmethod
    def load(cls, path: Path, facts: dict[str, Any], num_terms: int) -> "Approximate":
        """Raises ValueError for a file that faiss cannot read, or of another number of terms."""
        try:
            index = _faiss().read_index(str(path))
        except RuntimeError as error:
            raise ValueError(f"{path}: not a faiss index ({str(error).splitlines()[0][:200]})") from error
        if index.ntotal != num_terms:
            raise ValueError(f"{path}: {index.ntotal} terms; allowed: the index's {num_terms}")
        return cls(index, facts)


def noisy_terms(term_NE: Tensor) -> Tensor:
    """Queries [B, E] near terms, for want of real ones; the same each time."""
    generator = torch.Generator().manual_seed(0)
    chosen_B = torch.randperm(len(term_NE), generator=generator)[:NUM_QUERIES]
    rows_BE = term_NE[chosen_B.to(term_NE.device)].cpu().float()
    noise_BE = F.normalize(torch.randn(rows_BE.shape, generator=generator), dim=-1)
    return F.normalize(rows_BE + QUERY_NOISE * noise_BE, dim=-1)


def _faiss() -> Any:
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise ValueError(f"approximate search needs the extra: bash launch/setup.sh faiss ({error})") from error
