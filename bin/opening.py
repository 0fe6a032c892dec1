"""How the programs that search open a model and what it searches: the flags they share."""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bin.redaction import RedactingFormatter
from distributed.processes import choose_device
from retrieval.index import TermIndex
from retrieval.model_files import read_config
from retrieval.retriever import Retriever, find_model

logger = logging.getLogger("earmark")


@dataclass
class ModelFlags:
    """The model."""

    model: str
    """Folder of the model, or of its run (whose best model is taken)."""
    model_name: str | None = None
    """Where the base model of the adapters lies now, if not where it lay in training."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA when there is a GPU."""


@dataclass
class SearchFlags:
    """What is searched, and what counts as found."""

    glossary: str | None = None
    """Glossary file (.json, .jsonl, .csv, .tsv, .txt); its terms are embedded at the start."""
    index: str | None = None
    """Index folder made by bin/index.py instead: starts faster, and the language model is not loaded at all."""
    k: int = 10
    """Terms looked for, at most, in a clip or window."""
    threshold: float | None = None
    """Least cosine of a term. By default the threshold that was calibrated and stored with the model, if any."""
    merge_adapters: bool = True
    """Fold adapters into the base weights: faster; embeddings differ in the last bits of bf16."""

    def __post_init__(self) -> None:
        if (self.glossary is None) == (self.index is None):
            raise ValueError(
                f"glossary: got {self.glossary!r}, and index {self.index!r}; allowed: one of the two flags"
            )
        if self.k < 1:
            raise ValueError(f"k: got {self.k}; allowed: at least 1")


def open_retriever(model: ModelFlags, search: SearchFlags) -> Retriever:
    """The model with its index in use. Raises ValueError for what is missing or does not fit."""
    folder = find_model(model.model)
    # Audio that passes through the language model needs it even where the terms are embedded already.
    audio_only = search.index is not None and read_config(folder)["audio_readout"] == "tower"
    device = choose_device(model.device, 0)
    retriever = Retriever.load(folder, device, model.model_name, audio_only, search.merge_adapters)
    if search.index is not None:
        retriever.use(TermIndex.load(search.index, device))
    elif search.glossary is not None:
        retriever.index(Path(search.glossary))
    return retriever


def threshold_of(retriever: Retriever, search: SearchFlags) -> float | None:
    """The flag's, else the one stored with the model, else none."""
    if search.threshold is not None:
        return search.threshold
    if retriever.calibrated_threshold is None:
        logger.warning("the model has no calibrated threshold: the best %d are told, however unlikely", search.k)
    return retriever.calibrated_threshold


def log_to_standard_error() -> None:
    """Standard output is for what is found."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(RedactingFormatter("%(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for noisy in ("transformers", "huggingface_hub", "torch", "httpx", "model", "data"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
