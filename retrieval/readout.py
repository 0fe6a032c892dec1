"""Clips as a trained model reads them out, and their scores with terms: one vector a clip, or the best of its windows.

    readout mean     encode_clips -> audio_CE, scores = audio_CE @ term_NE.T
    readout maxsim   encode_clips -> AudioWindows, score of (clip, term) = cosine of the clip's best window; the window
                     that wins says when in the clip the term is spoken (`term_spans`)

Shapes: C clips, N terms, K terms of each clip, E embedding.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.dual import AudioWindows, DualEncoder
from model.maxsim import frame_seconds
from model.packing import AudioPack
from retrieval.topk import best_rows

EncodedClips = Tensor | AudioWindows


def encode_clips(model: DualEncoder, pack: AudioPack) -> EncodedClips:
    """One batch of clips, as the model's read-out has them."""
    return model.encode_audio(pack) if model.windows is None else model.encode_windows(pack)


def score_clips(clips: EncodedClips, term_NE: Tensor) -> Tensor:
    """scores_CN, cosines in fp32. maxsim costs as many products a clip as it has windows, and holds few at a time."""
    if isinstance(clips, Tensor):
        return clips.float() @ term_NE.float().T
    return clips.clips.against(term_NE.float())


def best_terms(
    clips: EncodedClips, term_NE: Tensor, k: int, order_N: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Scores and places of the best k terms of each clip, each [C, K], best first; `best_rows` for either read-out."""
    if isinstance(clips, Tensor):
        return best_rows(clips.float(), term_NE.float(), k, order_N)
    if k < 1:
        raise ValueError(f"k: got {k}; allowed: at least 1")
    scores_CN = score_clips(clips, term_NE).cpu().numpy()
    k = min(k, scores_CN.shape[1])
    places_CK = np.empty((len(scores_CN), k), dtype=np.int64)
    for clip, scores_N in enumerate(scores_CN):
        reached = np.flatnonzero(scores_N >= np.partition(scores_N, -k)[-k])  # all that tie with the k-th
        places_CK[clip] = reached[np.lexsort((order_N[reached], -scores_N[reached]))[:k]]
    return np.take_along_axis(scores_CN, places_CK, axis=1), places_CK


def term_spans(model: DualEncoder, windows: AudioWindows, term_CKE: Tensor) -> Tensor:
    """Start and end, in seconds from its clip's start, of the window that wins for each of a clip's terms: [C, K, 2] on
    the CPU. term_CKE: the embeddings of these terms (of `term_NE[places_CK]`, say)."""
    winner_CK = windows.clips.winners(term_CKE)
    return windows.table.spans_s(winner_CK, frame_seconds(model.audio_tower.config.pool))


def no_clips(model: DualEncoder) -> Tensor:
    """Embeddings of no clip at all, of either read-out: nothing has no windows."""
    return torch.zeros(0, model.audio_head.out_features, device=model.device)
