"""How clips score with columns, as the losses see it: from unit rows here, or in whatever way a model brings along.

A read-out that makes more of a clip than one vector (say, the best of many windows) computes the scores with the terms
itself, exchanges them between ranks as rows of an ordinary matrix, and hands them over as `TermScores`:

    cosine_BN = own clips x terms of all ranks                 (gradients to own clips, and to all terms)
    cosine_GN = gather_rows(cosine_BN)                         (the backward pass sums over ranks)
    cosine_UG = cosine_GN[:, own terms].T

The scores of a batch are far fewer numbers than its windows, and their gradients sum as those of gathered rows do, so
a rank's loss stays a share of the one-process loss.

Shapes: B clips of this rank, G of all ranks, U unique terms owned by this rank, N of all ranks, C columns, H columns of
each clip's own, E embedding.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from losses.infonce import cosine_scores


class ClipScorer(Protocol):
    """The clips of this rank. Scores are cosines, fp32 (fp64 for fp64), with gradient to the clips."""

    def against(self, cols_CE: Tensor) -> Tensor:
        """[B, C], all clips with all columns."""
        ...

    def against_own(self, cols_BHE: Tensor) -> Tensor:
        """[B, H], each clip with its own columns."""
        ...


@dataclass(frozen=True)
class UnitRows:
    """The ClipScorer of clips that are one unit vector each."""

    audio_BE: Tensor

    def against(self, cols_CE: Tensor) -> Tensor:
        return cosine_scores(self.audio_BE, cols_CE)

    def against_own(self, cols_BHE: Tensor) -> Tensor:
        return (self.audio_BE.to(cols_BHE.dtype)[:, None, :] * cols_BHE).sum(dim=2)


@dataclass(frozen=True)
class TermScores:
    """Cosines of clips and terms that were computed and exchanged outside of the losses."""

    cosine_BN: Tensor
    cosine_UG: Tensor
    clips: ClipScorer
