"""The bank of glossary terms that serve as hard negatives: when it is embedded anew, of which terms, and what it costs.

Embedding the glossary stops training. With 0.02 of the time as the most that it should take, each refresh measures its
share of the time since the last one, and says what --bank_terms would bring it back to that.
"""

import logging
import time
from dataclasses import dataclass

import numpy as np
import torch

from bin.evaluation import encode_terms
from data.glossary import Glossary, group_of
from data.terms import key64
from distributed.processes import World
from losses.terms import TermBank
from model.dual import DualEncoder
from model.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

MOST_SHARE = 0.02
STREAM = 0xBA4C  # keeps the draw of terms apart from other random numbers of the same seed


def embed_bank(
    model: DualEncoder,
    tokenizer: Tokenizer,
    glossary: Glossary,
    batch_size: int,
    world: World,
    places: np.ndarray | None = None,
) -> TermBank:
    """The glossary (or the terms at these places of it) as negatives, embedded with the model of this moment, spread
    over the ranks. A collective."""
    was_training = model.training
    model.eval()
    terms = glossary.terms if places is None else [glossary.entries[i].key for i in places]
    embeddings_KE = encode_terms(model, tokenizer, terms, batch_size, world)
    model.train(was_training)
    keys = torch.tensor([key64(term) for term in terms])
    return TermBank(embeddings_KE, keys, torch.tensor([group_of(term, glossary) for term in terms]))


@dataclass
class BankSchedule:
    """Embeds the bank when it is due. Every rank calls it at every step: what is due is the same on all."""

    glossary: Glossary | None  # None: no bank at all
    refresh_every: int  # steps; 0 = at the start of each epoch
    num_terms: int  # 0 = all of the glossary
    batch_size: int
    seed: int
    world: World

    def __post_init__(self) -> None:
        self._began: float | None = None
        self._spent_s = 0.0

    def current(
        self, bank: TermBank | None, model: DualEncoder, tokenizer: Tokenizer, step: int, step_in_epoch: int
    ) -> TermBank | None:
        """The bank for this step: the one given, or a fresh one. A collective when it is due."""
        is_due = (step % self.refresh_every if self.refresh_every else step_in_epoch) == 0
        if self.glossary is None or (bank is not None and not is_due):
            return bank
        began = time.perf_counter()
        places, num_all = None, len(self.glossary.entries)
        if 0 < self.num_terms < num_all:
            rng = np.random.default_rng((STREAM, self.seed, step))
            places = np.sort(rng.choice(num_all, self.num_terms, replace=False))
        bank = embed_bank(model, tokenizer, self.glossary, self.batch_size, self.world, places)
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)  # rare, and without it nothing is measured
        self._note(time.perf_counter() - began, began, bank.keys_K.numel())
        return bank

    def numbers(self) -> dict[str, float]:
        """Seconds of embedding since the last call, for metrics.jsonl; nothing where there were none."""
        spent_s, self._spent_s = self._spent_s, 0.0
        return {"train/bank_refresh_s": spent_s} if spent_s else {}

    def _note(self, spent_s: float, began: float, num_terms: int) -> None:
        self._spent_s += spent_s
        if self._began is not None:
            since_s = began - self._began
            if spent_s > MOST_SHARE * since_s:
                fitting = int(num_terms * MOST_SHARE * since_s / spent_s)
                logger.warning(
                    "embedding %d terms as hard negatives took %.1f s, %.1f %% of the %.0f s since the last time; "
                    "--bank_terms %d, or a larger --refresh_bank_every, would bring it to %.0f %%",
                    num_terms, spent_s, 100 * spent_s / since_s, since_s, max(1, fitting), 100 * MOST_SHARE,
                )  # fmt: skip
        self._began = began
