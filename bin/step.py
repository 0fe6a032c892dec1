"""From a batch to this rank's share of the loss: encode, gather, compare.

    batch -> embeddings of own clips, texts, terms -> gathered with gradient -> share of the loss
    the sum of the shares over the ranks is the loss of one process that holds the whole batch

With the maxsim read-out the clips' windows stay on their rank: they meet the gathered terms there, and what is gathered
is the scores (see losses/scores.py).

Shapes: B clips of this rank, G of all ranks, L terms of this rank (each once), U terms it owns, N unique terms of all
ranks, T texts of this rank, E embedding, K bank.
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bin.feed import FedBatch, FedPart
from data.batches import Batch
from distributed.bigbatch import TwoPass, chunk_bounds
from distributed.collectives import gather_int_arrays, gather_json, gather_row_blocks
from distributed.processes import World
from losses.choice import choose_kernels
from losses.pairs import ship
from losses.relations import BatchIds, Relations
from losses.scores import TermScores
from losses.settings import LossSettings
from losses.temperature import Temperature
from losses.terms import TermBank
from losses.total import Embeddings, align_texts, total_loss
from model.dual import DualEncoder
from model.maxsim import WindowedClips


@dataclass(frozen=True)
class Encoded:
    """A batch's embeddings. A side with nothing in it has zero rows: every rank must go on all the same."""

    audio_BE: Tensor
    text_TE: Tensor
    term_LE: Tensor
    clips: WindowedClips | None  # with the maxsim read-out


def encode_batch(model: DualEncoder, batch: Batch | FedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """(audio_BE, text_TE, term_LE), without the windows that maxsim makes of the clips."""
    encoded = encode_all(model, batch)
    return encoded.audio_BE, encoded.text_TE, encoded.term_LE


def encode_all(model: DualEncoder, batch: Batch | FedBatch) -> Encoded:
    """Everything of a batch that the losses look at."""
    return encode_in_passes(model, batch, 0).encoded


@dataclass(frozen=True)
class Passes:
    """A batch's embeddings, and what is left to do after the backward pass of the loss over them."""

    encoded: Encoded
    finish: Callable[[], None]
    num_passes: int


def encode_in_passes(model: DualEncoder, batch: Batch | FedBatch, clips_per_pass: int, num_kept: int = 1) -> Passes:
    """Embed this rank's clips and strings in passes of `clips_per_pass` clips in the mean; 0: all at once.

    Passes have as much sound and as many string tokens each, whatever the lengths: they take the same memory and, as a
    rule, one CUDA graph. More than one is the two-pass step of distributed/bigbatch.py: `finish` must be called after
    the backward pass.
    num_kept: see `TwoPass`.
    """
    fed = FedBatch.of(batch)
    num_clips = fed.batch.num_clips
    num_passes = -(-max(num_clips, 1) // clips_per_pass) if clips_per_pass and torch.is_grad_enabled() else 1
    window_counts: list[list[int]] = [[] for _ in range(num_passes)]
    encoders = [
        partial(_encode_part, model, fed.part(clips, strings), counts)
        for clips, strings, counts in zip(
            chunk_bounds(fed.batch.num_samples, num_passes),
            chunk_bounds(fed.batch.token_lengths, num_passes),
            window_counts,
            strict=True,
        )
    ]
    two_pass = TwoPass(encoders, num_kept)
    audio_BE, strings_E, window_WE = two_pass.rows
    clips = None if model.windows is None else WindowedClips(window_WE, list(itertools.chain(*window_counts)))
    encoded = Encoded(audio_BE, strings_E[: fed.batch.num_texts], strings_E[fed.batch.num_texts :], clips)
    return Passes(encoded, two_pass.finish, num_passes)


def _encode_part(model: DualEncoder, part: FedPart, window_counts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of clips, of strings and, with the maxsim read-out, of windows, whose counts go into `window_counts`."""
    none_0E = torch.zeros(0, model.audio_head.out_features, dtype=model.audio_head.weight.dtype, device=model.device)
    window_WE = none_0E
    if model.windows is None or part.audio is None:
        audio_BE, string_E = model.encode_both(part.audio, part.text)
    else:
        windows = model.encode_windows(part.audio)
        audio_BE, window_WE = windows.audio_BE, windows.clips.window_WE
        window_counts[:] = windows.clips.counts
        _, string_E = model.encode_both(None, part.text)
    return none_0E if audio_BE is None else audio_BE, none_0E if string_E is None else string_E, window_WE


def batch_ids(batch: Batch) -> BatchIds:
    """Who is a positive of whom, as the losses want it."""
    return BatchIds.from_csr(
        text_keys_B=torch.from_numpy(batch.text_keys_B),
        term_keys_N=torch.from_numpy(batch.term_keys_N),
        term_groups_N=torch.from_numpy(batch.term_groups_N),
        positive_indptr=torch.from_numpy(batch.pos_indptr_B1),
        positive_indices=torch.from_numpy(batch.pos_terms),
        cut_indptr=torch.from_numpy(batch.ign_indptr_B1),
        cut_groups=torch.from_numpy(batch.ign_groups),
    )


def loss_share(
    model: DualEncoder,
    temperature: Temperature,
    batch: Batch | FedBatch,
    settings: LossSettings,
    world: World,
    wire_dtype: torch.dtype | None,
    bank: TermBank | None = None,
    own: Encoded | None = None,
) -> tuple[Tensor, dict[str, Tensor], Relations]:
    """(this rank's share of the total, scalar; detached shares of its parts; the global batch's relations).

    `own`: the batch's embeddings where they are there already. A collective: every rank must call it, and run its
    backward pass, or none.
    """
    fed, device = FedBatch.of(batch), model.device
    batch = fed.batch
    packed, counts = gather_int_arrays([batch_ids(batch).pack()])[0]
    relations = Relations.build([BatchIds.unpack(part) for part in packed.split(counts)])
    kernels = choose_kernels(
        settings.loss_kernels,
        device,
        model.audio_head.weight.dtype,
        relations.num_clips,
        relations.num_terms,
        model.windows is not None,
        0 if bank is None else len(bank.embeddings_KE),
    )
    pairs = relations.local_pairs(world.rank, device)
    local = pairs if kernels.tiled else pairs.dense()

    own = own or encode_all(model, fed)
    text_BE = align_texts(own.text_TE, ship(torch.from_numpy(batch.text_row_B), device))
    clip_counts = [len(relations.clips_of(rank)) for rank in range(world.world_size)]
    starts = relations.term_row_starts
    term_counts = [stop - start for start, stop in itertools.pairwise(starts)]
    audio_GE, text_GE, term_rows = gather_row_blocks(
        [own.audio_BE, text_BE, own.term_LE], [clip_counts, clip_counts, term_counts], wire_dtype
    )
    embeddings = Embeddings(
        own.audio_BE, text_BE, own.term_LE[local.own_term_rows_U], audio_GE, text_GE, term_rows[local.first_copy_N]
    )
    term_scores = None
    if own.clips is not None:
        cosine_BN = own.clips.against(embeddings.term_NE)
        # In full precision: they are few, and a rounded cosine is divided by the temperature.
        cosine_GN = gather_row_blocks([cosine_BN], [clip_counts])[0]
        mine = relations.terms_of(world.rank)
        term_scores = TermScores(cosine_BN, cosine_GN[:, mine.start : mine.stop].T, own.clips)
    negatives = None if bank is None else bank.against(relations, world.rank)
    share, parts = total_loss(embeddings, local, temperature(), settings, negatives, term_scores, kernels.triton)
    return share, parts, relations


def add_gradients(
    model: DualEncoder,
    temperature: Temperature,
    batch: Batch | FedBatch,
    settings: LossSettings,
    world: World,
    wire_dtype: torch.dtype | None,
    bank: TermBank | None,
    clips_per_pass: int,
    num_accumulated: int,
    num_kept: int = 1,
) -> tuple[dict[str, Tensor], int]:
    """Embed, compare and go back: adds the gradients of one of `num_accumulated` batches of a step to those there are.

    Returns (this rank's detached shares of the loss and its parts over num_accumulated, clips of all ranks). A
    collective. clips_per_pass, num_kept: see `encode_in_passes`.

    Nothing of the autograd graph outlives the call. A live graph holds the parameters' accumulators, which stay on the
    stream that they were made on, and a later CUDA graph capture on another stream would have to make that one wait,
    which CUDA refuses; it also holds captures that were let go, and their memory.
    """
    passes = encode_in_passes(model, batch, clips_per_pass, num_kept)
    share, parts, relations = loss_share(model, temperature, batch, settings, world, wire_dtype, bank, passes.encoded)
    (share / num_accumulated).backward()
    passes.finish()
    shares = {"loss": share.detach(), **parts}
    return {name: value / num_accumulated for name, value in shares.items()}, relations.num_clips


@torch.no_grad()
def center_heads(model: DualEncoder, batches: Iterable[Batch]) -> None:
    """Set each head's bias to minus its response to the mean of its inputs over the batches of all ranks. A collective.

    Mean-pooled features of a transformer share one large common direction (Ethayarajh 2019, "How contextual are
    contextualized word representations?"): all cosines start near 1, and the first epochs would only unlearn that.
    """
    heads: dict[str, nn.Linear] = {"audio": model.audio_head, "text": model.text_head}
    sums = {name: torch.zeros(head.in_features, dtype=torch.float64) for name, head in heads.items()}
    counts = dict.fromkeys(heads, 0)

    def listen(name: str) -> RemovableHandle:
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            sums[name] += inputs[0].double().sum(0).cpu()
            counts[name] += inputs[0].shape[0]

        return heads[name].register_forward_pre_hook(add)

    handles = [listen(name) for name in heads]
    was_training = model.training
    model.eval()
    for batch in batches:
        encode_batch(model, batch)
    model.train(was_training)
    for handle in handles:
        handle.remove()
    for name, head in heads.items():
        parts = gather_json([sums[name].tolist(), counts[name]])
        mean_D = torch.tensor([part for part, _ in parts], dtype=torch.float64).sum(0) / max(
            1, sum(n for _, n in parts)
        )
        head.bias.copy_(-(head.weight.double() @ mean_D.to(head.weight.device)).to(head.bias.dtype))
