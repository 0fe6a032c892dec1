"""A trained model, ready to find terms.

    retriever = Retriever.load("runs/mine", device="cuda")
    retriever.index("glossary.json")
    for match in retriever.search("chunk.wav", k=10, threshold=0.3):
        print(match.score, match.surface, match.translations)

An index can be kept and used without the language model, which only terms need:

    retriever = Retriever.load("runs/mine", device="cuda", audio_only=True)
    retriever.use(TermIndex.load("glossary.index"))

Shapes: B clips, N terms, E embedding, S samples, P packed tokens, K results.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.audio import SAMPLE_RATE
from data.drops import DropLog
from data.glossary import Glossary, glossary_of, load_glossary
from data.terms import MAX_TERM_CHARS, normalise_term
from lora.merge import fold
from model.packing import AudioPack, TextPack
from retrieval.equal_clips import EqualClips
from retrieval.index import Term, TermIndex
from retrieval.matches import Hits, Match
from retrieval.model_files import CONFIG_FILE, OpenedModel, open_model
from retrieval.pcm import AudioLike, pack_waves, to_pcm
from retrieval.readout import best_terms, term_spans
from retrieval.stream import Stream, StreamSettings

logger = logging.getLogger(__name__)

# What one packed forward holds: samples of audio (about 4 and 1 minutes), tokens of text.
GPU_SAMPLES, CPU_SAMPLES = 240 * SAMPLE_RATE, 60 * SAMPLE_RATE
GPU_TOKENS, CPU_TOKENS = 16_384, 4_096
TOKENISED_AT_ONCE = 10_000
MODELS_OF_A_RUN = ("model_best", "model_final")


class Retriever:
    """Encodes clips and terms, and searches the index in use. Not to be used by two threads at once."""

    def __init__(self, opened: OpenedModel) -> None:
        self.model, self.tokenizer = opened.built.model, opened.built.tokenizer
        self.config, self.fingerprint = opened.config, opened.fingerprint
        self.device = self.model.device
        self.terms: TermIndex | None = None
        self._equal_clips = EqualClips(self.model)

    @property
    def calibrated_threshold(self) -> float | None:
        """The least cosine that was chosen on held-out clips and stored with the model; None when there is none."""
        stored = self.config.get("threshold")
        return None if stored is None else float(stored["value"])

    @classmethod
    def load(
        cls,
        run_or_model_dir: Path | str,
        device: torch.device | str = "cpu",
        model_name: str | None = None,
        audio_only: bool = False,
        merge_adapters: bool = False,
        compute_dtype: torch.dtype | None = None,
    ) -> "Retriever":
        """Open a model folder, or the best model of a run.

        Args:
            model_name: where the base model of an adapter lies now, if not where it lay in training.
            audio_only: leave out the language model, none of whose weights is read; `encode_terms` and `index` then
                raise.
            merge_adapters: fold adapters into the base weights: faster, at the price of one more rounding in bf16.
            compute_dtype: None takes bf16 on CUDA and fp32 elsewhere.

        Raises:
            ValueError: no model there, a damaged one, or a base model that does not fit.
        """
        opened = open_model(find_model(run_or_model_dir), device, compute_dtype, model_name, audio_only)
        if merge_adapters:
            fold(opened.built.model)
        return cls(opened)

    # -------------------------------------------------------------------------------------------------- encoding

    def encode_audio(self, clips: Sequence[AudioLike], sample_rate: int = SAMPLE_RATE) -> Tensor:
        """audio_BE, fp32, L2-normed, on the model's device, in the order of `clips`. With the maxsim read-out these are
        the means over whole clips; terms are searched by the clips' windows, as `search` does.

        Args:
            clips: paths, int16 [S] or float [S] arrays in [-1, 1], of 0.01 to 30 s.
            sample_rate: of the arrays, Hz; another than 16000 is resampled. A file's own rate counts for paths.

        Raises:
            ValueError: `to_pcm`'s, naming the clip's place.
        """
        if isinstance(clips, str | Path | np.ndarray | Tensor):
            raise ValueError(f"clips: got one {type(clips).__name__}; allowed: a list of clips")
        return self.encode_waves([to_pcm(clip, sample_rate, f"clips[{i}]") for i, clip in enumerate(clips)])

    @torch.no_grad()
    def encode_waves(self, waves: Sequence[NDArray[np.int16]]) -> Tensor:
        """audio_BE of clips that are int16 [S], 16 kHz mono already."""
        if not waves:
            return torch.empty(0, self.model.audio_head.out_features, device=self.device)
        if self._equal_clips.knows(waves):
            return self._equal_clips.encode(waves)
        limit = GPU_SAMPLES if self.device.type == "cuda" else CPU_SAMPLES
        parts, order = [], []
        for batch in _batches([len(wave_S) for wave_S in waves], limit):
            chosen = [waves[i] for i in batch]
            parts.append(self.model.encode_audio(AudioPack(pack_waves(chosen), [len(wave_S) for wave_S in chosen])))
            order += batch
        return _in_order(parts, order)

    @torch.no_grad()
    def encode_terms(self, terms: Sequence[str]) -> Tensor:
        """term_NE of the terms' normal forms (as in training), fp32, L2-normed, on the model's device.

        Raises:
            ValueError: a term that normalises to nothing or is longer than 300 characters; an audio-only model.
        """
        texts = [normalise_term(term) for term in terms]
        for i, text in enumerate(texts):
            if not text or len(text) > MAX_TERM_CHARS:
                raise ValueError(
                    f"terms[{i}]: {terms[i]!r:.60} has {len(text)} characters in normal form; "
                    f"allowed: 1 to {MAX_TERM_CHARS}"
                )
        if not texts:
            return torch.empty(0, self.model.audio_head.out_features, device=self.device)
        ids: list[list[int]] = []
        for start in range(0, len(texts), TOKENISED_AT_ONCE):
            ids += self.tokenizer(texts[start : start + TOKENISED_AT_ONCE])
        limit = GPU_TOKENS if self.device.type == "cuda" else CPU_TOKENS
        parts, order = [], []
        for batch in _batches([len(one) for one in ids], limit):
            flat_P = torch.tensor([token for i in batch for token in ids[i]], dtype=torch.int64)
            parts.append(self.model.encode_text(TextPack(flat_P, [len(ids[i]) for i in batch])))
            order += batch
        return _in_order(parts, order)

    # ------------------------------------------------------------------------------------------- index and search

    def index(self, glossary: Glossary | Path | str | Sequence[str], drops: DropLog | None = None) -> TermIndex:
        """Embed a glossary (or its file, or bare terms), use it from now on, and return it.

        Duplicate surfaces become one term. Unusable terms are noted in `drops`, or warned about.
        Raises ValueError for a glossary without a usable term.
        """
        noted = drops or DropLog()
        if isinstance(glossary, str | Path):
            glossary = load_glossary(glossary, noted)
        elif not isinstance(glossary, Glossary):
            glossary = glossary_of(glossary, noted)
        if noted.notes and drops is None:
            logger.warning("some terms of the glossary were left out: %s", noted.summary())
        terms = [Term.of(entry) for entry in glossary.entries]
        return self.use(TermIndex(terms, self.encode_terms([term.key for term in terms]), self.fingerprint))

    def extend(self, index: TermIndex, glossary: Glossary) -> TermIndex:
        """The index with those terms of the glossary that it does not hold; only these are encoded."""
        index.check_model(self.fingerprint)
        terms = [Term.of(entry) for entry in glossary.entries if entry.key not in index.place]
        return index.append(terms, self.encode_terms([term.key for term in terms]))

    def use(self, index: TermIndex) -> TermIndex:
        """Search this index from now on, on the model's device. Raises ValueError when another model made it."""
        index.check_model(self.fingerprint)
        self.terms = index if index.term_NE.device == self.device else index.to(self.device)
        return self.terms

    def search(
        self, audio: AudioLike, k: int = 10, threshold: float | None = None, sample_rate: int = SAMPLE_RATE
    ) -> list[Match]:
        """The best k terms of a clip, best first; those below `threshold` (a cosine) are left out.

        Raises ValueError as `encode_audio`, for k below 1, and when no index is in use.
        """
        return self.search_many([audio], k, threshold, sample_rate)[0]

    def search_many(
        self,
        clips: Sequence[AudioLike],
        k: int = 10,
        threshold: float | None = None,
        sample_rate: int = SAMPLE_RATE,
    ) -> list[list[Match]]:
        """`search` of several clips, encoded and searched together."""
        waves = [to_pcm(clip, sample_rate, f"clips[{i}]") for i, clip in enumerate(clips)]
        return [self.matches(hits, threshold) for hits in self.find(waves, k)]

    def find(self, waves: Sequence[NDArray[np.int16]], k: int) -> list[Hits]:
        """The best k terms of each clip of int16 [S], 16 kHz mono: the one place where clips meet the index."""
        if self.model.windows is not None:
            return self._find_by_windows(waves, k)
        scores_BK, places_BK = self._index_in_use().search(self.encode_waves(waves), k)
        return [Hits(scores_K, places_K) for scores_K, places_K in zip(scores_BK, places_BK, strict=True)]

    @torch.no_grad()
    def _find_by_windows(self, waves: Sequence[NDArray[np.int16]], k: int) -> list[Hits]:
        """`find` with the maxsim read-out: exact, against every term of the index, with the winning windows' spans."""
        index = self._index_in_use()
        limit = GPU_SAMPLES if self.device.type == "cuda" else CPU_SAMPLES
        found: dict[int, Hits] = {}
        for batch in _batches([len(wave_S) for wave_S in waves], limit):
            chosen = [waves[i] for i in batch]
            lengths = [len(wave_S) for wave_S in chosen]
            windows = self.model.encode_windows(AudioPack(pack_waves(chosen), lengths))
            scores_BK, places_BK = best_terms(windows, index.term_NE, k, index.order_N)
            spans_BK2 = term_spans(self.model, windows, index.term_NE[torch.from_numpy(places_BK)])
            for row, i in enumerate(batch):
                spans_K2 = spans_BK2[row].clamp(max=lengths[row] / SAMPLE_RATE).double().numpy()
                found[i] = Hits(scores_BK[row], places_BK[row], spans_K2)
        return [found[i] for i in range(len(waves))]

    def matches(self, hits: Hits, threshold: float | None = None) -> list[Match]:
        """Hits with their terms, at least `threshold`."""
        terms = self._index_in_use().terms
        found = []
        for i, (score, place) in enumerate(zip(hits.scores_K.tolist(), hits.places_K.tolist(), strict=True)):
            if threshold is None or score >= threshold:
                start_s, end_s = (None, None) if hits.spans_K2 is None else hits.spans_K2[i].tolist()
                term = terms[place]
                found.append(Match(score, term.key, term.surface, term.translations, start_s, end_s))
        return found

    def stream(
        self,
        window: float = 1.92,
        hop: float = 0.96,
        lookback: float = 1.92,
        k: int = 10,
        threshold: float | None = None,
        sample_rate: int = SAMPLE_RATE,
    ) -> Stream:
        """A live signal to search with the index in use; see retrieval/stream.py. Times in seconds."""
        self._index_in_use()
        stream = Stream(self, StreamSettings(window, hop, lookback, k, threshold), sample_rate)
        self._equal_clips.prepare(round(window * SAMPLE_RATE))
        return stream

    def _index_in_use(self) -> TermIndex:
        if self.terms is None:
            raise ValueError("search: no index is in use; call index(glossary) or use(TermIndex.load(folder)) first")
        return self.terms


def find_model(run_or_model_dir: Path | str) -> Path:
    """The model folder itself, or a run's best model. Raises ValueError naming what was looked for."""
    folder = Path(run_or_model_dir).expanduser()
    candidates = [folder, *(folder / name for name in MODELS_OF_A_RUN)]
    for candidate in candidates:
        if (candidate / CONFIG_FILE).is_file():
            return candidate
    looked = ", ".join(str(candidate / CONFIG_FILE) for candidate in candidates)
    raise ValueError(f"model: got {str(folder)!r}, which holds no model (looked for {looked}); give a run's folder")


def _batches(sizes: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Places in batches of up to `limit` in all (one alone may be larger), longest first so that lengths are alike."""
    batch: list[int] = []
    total = 0
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if batch and total + sizes[i] > limit:
            yield batch
            batch, total = [], 0
        batch.append(i)
        total += sizes[i]
    if batch:
        yield batch


def _in_order(parts: list[Tensor], order: list[int]) -> Tensor:
    """Row order[i] of the result is row i of the parts put one after another."""
    rows = torch.cat(parts).float()
    result = torch.empty_like(rows)
    result[torch.tensor(order).to(rows.device, non_blocking=True)] = rows
    return result
