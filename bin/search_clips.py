"""The hardest wrong terms of some clips: encode, score against the whole glossary, leave out what may be right.

Left out for a clip: its positives, its cut terms, terms that its text speaks without a label, all their variants; and,
as in L_hard, every term with a cosine above pos - |pos| * margin, where pos is the clip's best positive (Moreira et al.
2024, "NV-Retriever"). A clip without a positive has no such limit. Of several variants of a term, the hardest stays.

Shapes: B clips of a batch, N glossary terms and after them the clips' labels that it lacks, K candidates.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from data.audio import AudioError
from data.batches import spoken_groups
from data.clips import Clip
from data.drops import DropLog
from data.glossary import Glossary, group_of
from data.reader import AudioReader
from data.terms import normalise_term
from losses.pairs import SortedKeys, pair_mask
from model.dual import DualEncoder
from model.packing import AudioPack
from retrieval.readout import encode_clips, score_clips

VARIANTS = 4  # candidates looked at for each one wanted, as variants of a better one are passed over


class ClipSearch:
    """Searches batches of clips; the same answer for the same batch, whoever asks."""

    def __init__(
        self,
        model: DualEncoder,
        terms: Sequence[str],
        term_NE: Tensor,
        glossary: Glossary,
        num_negatives: int,
        margin: float,
    ) -> None:
        """terms: the glossary's, then labels that it lacks; term_NE: their embeddings, on the model's device."""
        assert len(terms) == len(term_NE), (len(terms), term_NE.shape)
        self.model = model
        self.glossary = glossary
        self.term_NE = term_NE
        self.num_negatives, self.margin = num_negatives, margin
        self.surfaces = [entry.surface for entry in glossary.entries]
        self.place = {term: i for i, term in enumerate(terms)}
        groups = [group_of(entry.key, glossary) for entry in glossary.entries]
        self.groups, self.maskable = torch.tensor(groups, dtype=torch.int64), frozenset(groups)
        self.by_group = SortedKeys.of(self.groups)

    @torch.no_grad()
    def __call__(self, clips: Sequence[Clip], reader: AudioReader, drops: DropLog) -> Iterator[tuple[Clip, list[str]]]:
        """(clip, its negatives as written, hardest first) of the clips that can be read; the others go to `drops`."""
        kept, waves = [], []
        for clip in clips:
            try:
                waves.append(torch.from_numpy(reader.read(clip.audio_path, clip.start_s, clip.end_s).copy()))
                kept.append(clip)
            except AudioError as error:
                drops.add(error.reason, clip.source, error.detail)
        if not kept:
            return
        encoded = encode_clips(self.model, AudioPack(torch.cat(waves), [len(wave) for wave in waves]))
        scores_BN = score_clips(encoded, self.term_NE)
        limit_B = self._limits(scores_BN, kept)
        num_terms = len(self.surfaces)
        candidates_BN = scores_BN[:, :num_terms]
        closed_BN = self._spoken(kept).to(scores_BN.device) | (candidates_BN > limit_B[:, None])
        best_BK, place_BK = candidates_BN.masked_fill(closed_BN, -math.inf).topk(
            min(VARIANTS * self.num_negatives, num_terms), dim=1
        )
        for clip, scores, places in zip(kept, best_BK.tolist(), place_BK.tolist(), strict=True):
            chosen: dict[int, str] = {}
            for score, place in zip(scores, places, strict=True):
                if score > -math.inf and len(chosen) < self.num_negatives:
                    chosen.setdefault(int(self.groups[place]), self.surfaces[place])
            yield clip, list(chosen.values())

    def _limits(self, scores_BN: Tensor, clips: Sequence[Clip]) -> Tensor:
        """Highest cosine that a negative may have, [B]."""
        limits = []
        for row, clip in enumerate(clips):
            places = [self.place[term] for term in clip.terms]
            best = scores_BN[row, places].amax() if places else scores_BN.new_tensor(math.inf)
            limits.append(best - best.abs() * self.margin if places else best)
        return torch.stack(limits)

    def _spoken(self, clips: Sequence[Clip]) -> Tensor:
        """bool [B, N of the glossary]: terms that a clip speaks, wholly, in part or as a variant."""
        rows, groups = [], []
        for row, clip in enumerate(clips):
            own = {group_of(term, self.glossary) for term in (*clip.terms, *clip.ignored)}
            own.update(spoken_groups(normalise_term(clip.text), self.maskable, self.glossary))
            rows += [row] * len(own)
            groups += sorted(own)
        query, place = self.by_group.matches(torch.tensor(groups, dtype=torch.int64))
        return pair_mask(torch.tensor(rows, dtype=torch.int64)[query], place, len(clips), len(self.surfaces))
