"""Made-up clips, terms and scores for the tests of this room."""

import numpy as np
import torch

from retrieval.judgements import Judgements


def random_case(seed: int, num_clips: int = 60, num_terms: int = 40) -> tuple[torch.Tensor, Judgements]:
    """Distinct scores; clips with 0 to 4 positives, 0 to 5 ignored terms, some without any term."""
    rng = np.random.default_rng(seed)
    keys = [f"term {i:03d}" for i in rng.permutation(num_terms)]
    terms, ignored = [], []
    for clip in range(num_clips):
        drawn = rng.permutation(num_terms)
        num_positives = 0 if clip % 7 == 0 else int(rng.integers(1, 5))
        num_ignored = 0 if clip % 7 == 0 else int(rng.integers(0, 6))
        terms.append([keys[i] for i in drawn[:num_positives]])
        ignored.append([keys[i] for i in drawn[num_positives : num_positives + num_ignored]])
    judgements = Judgements.from_terms(keys, terms, ignored, seen_terms=keys[: num_terms // 2])
    values = rng.permutation(num_clips * num_terms).reshape(num_clips, num_terms) / (num_clips * num_terms)
    return torch.from_numpy(values), judgements
