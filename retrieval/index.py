"""Embedded glossaries: searched exactly by one product, kept as safetensors + JSON, changed without starting again.

    index.json         format, fingerprint of the model that made it, counts, SHA-256 of the other files
    terms.jsonl        {"key": "voicemail", "surface": "Voicemail", "translations": {"zh": ["..."]}} a line
    embeddings.safetensors   term_NE fp32, row n for line n
    approximate.faiss  only where approximate search was asked for; index.json then has its measured recall

The fingerprint is checked wherever an index meets a model: embeddings of two models cannot be compared, and nothing in
the numbers would tell. Order of the terms: as they came; equal scores rank by key.

Shapes: N terms, E embedding, B queries, K results.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from data.glossary import Entry
from retrieval.approximate import Approximate, Kind
from retrieval.topk import best_rows

logger = logging.getLogger(__name__)

FORMAT = "earmark-index-1"
INDEX_FILE, TERMS_FILE, EMBEDDINGS_FILE = "index.json", "terms.jsonl", "embeddings.safetensors"
APPROXIMATE_FILE = "approximate.faiss"


@dataclass(frozen=True, slots=True)
class Term:
    """What is told of a term that was found."""

    key: str
    surface: str
    translations: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, entry: Entry) -> "Term":
        return cls(entry.key, entry.surface, entry.translations)


class TermIndex:
    """Terms and their embeddings. Not changed in place: `append` and `remove` return another, sharing what they can."""

    def __init__(
        self, terms: Sequence[Term], term_NE: Tensor, fingerprint: str, approximate: Approximate | None = None
    ) -> None:
        """
        Args:
            term_NE: L2-normalised, fp32; its device is where exact searches run.
            approximate: over the same rows; searches then use it unless they ask for exact ones.

        Raises:
            ValueError: no terms, two of the same key, or another number of rows.
        """
        self.terms, self.term_NE, self.fingerprint = list(terms), term_NE, fingerprint
        self.approximate = approximate
        self.place = {term.key: n for n, term in enumerate(self.terms)}
        if not self.terms:
            raise ValueError("index: no terms; allowed: at least one")
        if len(self.place) != len(self.terms):
            raise ValueError(f"index: {len(self.terms) - len(self.place)} keys occur more than once; allowed: distinct")
        if term_NE.ndim != 2 or len(term_NE) != len(self.terms):
            raise ValueError(f"index: embeddings {tuple(term_NE.shape)} for {len(self.terms)} terms; allowed: one each")

    def __len__(self) -> int:
        return len(self.terms)

    @cached_property
    def order_N(self) -> NDArray[np.int64]:
        """Place of each term when keys are sorted: what breaks ties."""
        order_N = np.empty(len(self.terms), dtype=np.int64)
        order_N[sorted(range(len(self.terms)), key=lambda n: self.terms[n].key)] = np.arange(len(self.terms))
        return order_N

    def search(self, query_BE: Tensor, k: int, exact: bool = False) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Cosines and places in `terms` of the best k terms (all when there are fewer), each [B, K], best first.

        exact: also where there is an approximate index, which may leave out some of the best.

        Raises ValueError for k below 1 or embeddings of another size.
        """
        if query_BE.ndim != 2 or query_BE.shape[1] != self.term_NE.shape[1]:
            raise ValueError(f"search: queries {tuple(query_BE.shape)}; allowed: [B, {self.term_NE.shape[1]}]")
        if self.approximate is not None and not exact:
            return self.approximate.search(query_BE, k, self.order_N)
        return best_rows(query_BE, self.term_NE, k, self.order_N)

    def approximated(self, kind: Kind, query_BE: Tensor | None = None) -> "TermIndex":
        """With an approximate index over all terms, and its recall; see retrieval/approximate.py."""
        approximate = Approximate.build(self.term_NE, self.order_N, kind, query_BE)
        return TermIndex(self.terms, self.term_NE, self.fingerprint, approximate)

    def append(self, terms: Sequence[Term], term_NE: Tensor) -> "TermIndex":
        """With further terms behind, searched exactly. ValueError for a key that is there already, or twice."""
        known = [term.key for term in terms if term.key in self.place]
        if known:
            raise ValueError(f"append: {len(known)} terms are in the index already, such as {known[0]!r}; remove first")
        if not terms:
            return self
        self._tell_exact()
        joined_NE = torch.cat((self.term_NE, term_NE.to(self.term_NE)))
        return TermIndex([*self.terms, *terms], joined_NE, self.fingerprint)

    def remove(self, keys: Sequence[str]) -> "TermIndex":
        """Without these terms, searched exactly. ValueError for a key that is not there, or when none would be left."""
        gone = set(keys)
        unknown = sorted(gone - self.place.keys())
        if unknown:
            raise ValueError(f"remove: {len(unknown)} terms are not in the index, such as {unknown[0]!r}")
        kept = [n for n, term in enumerate(self.terms) if term.key not in gone]
        if not kept:
            raise ValueError(f"remove: all {len(self.terms)} terms; allowed: at least one stays")
        self._tell_exact()
        rows_N = torch.tensor(kept, device=self.term_NE.device)
        return TermIndex([self.terms[n] for n in kept], self.term_NE[rows_N], self.fingerprint)

    def _tell_exact(self) -> None:
        if self.approximate is not None:
            logger.warning("the approximate index is of the terms before: it is taken off, make it again")

    def to(self, device: torch.device | str) -> "TermIndex":
        return TermIndex(self.terms, self.term_NE.to(device), self.fingerprint, self.approximate)

    def check_model(self, fingerprint: str, name: str = "index") -> None:
        """Raises ValueError when another model made this index."""
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"{name}: it was made with another model (fingerprint {self.fingerprint[:12]}, the model has "
                f"{fingerprint[:12]}); make it again with this model: bin/index.py make"
            )

    # ---------------------------------------------------------------------------------------------------- files

    def save(self, folder: Path, info: dict[str, Any] | None = None) -> None:
        """Write all files into `folder`, which exists (make it atomic around this call). info: kept under "info"."""
        lines = (
            json.dumps(
                {"key": term.key, "surface": term.surface}
                | ({"translations": term.translations} if term.translations else {}),
                ensure_ascii=False,
            )
            for term in self.terms
        )
        (folder / TERMS_FILE).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        tensors = {"term_NE": self.term_NE.detach().to("cpu", torch.float32).contiguous()}
        (folder / EMBEDDINGS_FILE).write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))
        index: dict[str, Any] = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "num_terms": len(self.terms),
            "embedding_dim": self.term_NE.shape[1],
            "sha256": {name: _sha256(folder / name) for name in (TERMS_FILE, EMBEDDINGS_FILE)},
            "info": info or {},
        }
        if self.approximate is not None:
            self.approximate.save(folder / APPROXIMATE_FILE)
            index["approximate"] = self.approximate.facts
            index["sha256"][APPROXIMATE_FILE] = _sha256(folder / APPROXIMATE_FILE)
        text = json.dumps(index, indent=2, ensure_ascii=False, allow_nan=False)
        (folder / INDEX_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path | str, device: torch.device | str = "cpu") -> "TermIndex":
        """Raises ValueError for a folder that holds no index, or a damaged or incomplete one."""
        folder = Path(folder)
        index = read_index_file(folder)
        for name in index["sha256"]:
            if not (folder / name).is_file():
                raise ValueError(f"{folder}: no {name}; the index is incomplete, make it again")
            if _sha256(folder / name) != index["sha256"][name]:
                raise ValueError(f"{folder / name}: damaged (another SHA-256 than {INDEX_FILE} says); make it again")
        try:
            term_NE = safetensors.torch.load_file(folder / EMBEDDINGS_FILE)["term_NE"]
            with (folder / TERMS_FILE).open(encoding="utf-8") as file:
                terms = [Term(**json.loads(line)) for line in file]
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder}: its files are no index ({error}); make it again") from error
        approximate = None
        if "approximate" in index:
            approximate = Approximate.load(folder / APPROXIMATE_FILE, index["approximate"], len(terms))
        return cls(terms, term_NE.to(device), index["fingerprint"], approximate)


def read_index_file(folder: Path) -> dict[str, Any]:
    """index.json; ValueError when the folder holds no index of this format."""
    path = folder / INDEX_FILE
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder}: no {INDEX_FILE}; make an index with bin/index.py make") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ValueError(f"{path}: its format is not {FORMAT!r}")
    return index


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
