"""A step over real ranks is the step of one process, to rounding, in value and in every gradient."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bin.step import center_heads, encode_batch, encode_in_passes, loss_share
from data.glossary import Entry, Glossary
from distributed.atomic import read_tensors
from distributed.processes import World
from losses.settings import LossSettings
from tests.bin import ranks_step
from tests.bin.ranks_step import SPREADS, WIDTH, bank_of, batch_of, build, head_outputs
from tests.distributed.launching import launch

ALONE = World(0, 1, 0, torch.device("cpu"), "none", 0)
ONLY_HARD = LossSettings(audio_text_loss_ratio=0, audio_term_loss_ratio=0, hard_neg_weight=1, temperature=0.2)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ranks_step.py found at 1, 2 and 3 ranks."""
    folder = tmp_path_factory.mktemp("steps")
    launch(1, folder, "tests.bin.ranks_step:steps_at_all_world_sizes")
    return folder


@pytest.mark.parametrize("passes", ["", " in passes"])
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("spread", SPREADS)
def test_loss_and_gradients_equal_one_process(written: Path, spread: str, world_size: int, passes: str) -> None:
    """Negatives of all ranks, each row once, nothing averaged: the temperature's gradient too. In passes, ranks have
    different numbers of them."""
    expected = read_tensors(written / "one process 1 0.safetensors")
    assert {"log_inv_temperature", "audio_head.weight", "text_head.weight"} <= expected.keys()
    assert {f"loss of {n}" for n in ("total", "audio_text", "audio_term", "hard", "no_term")} <= expected.keys()
    for rank in range(world_size):
        found = read_tensors(written / f"{spread}{passes} {world_size} {rank}.safetensors")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert value.dtype == torch.float64
            size = float(value.abs().max())
            assert size > 1e-6, f"{name} is zero in the reference: its comparison says nothing"
            assert float((found[name] - value).abs().max()) < 1e-9 * size, name


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_centred_heads_give_zero_on_average_and_are_the_same_on_all_ranks(written: Path, world_size: int) -> None:
    of_ranks = [read_tensors(written / f"centred {world_size} {rank}.safetensors") for rank in range(world_size)]
    expected = read_tensors(written / "centred 1 0.safetensors")
    for name in ("audio", "text"):
        rows_RE = torch.cat([found[name] for found in of_ranks])
        assert len(rows_RE) == len(expected[name])
        assert float(rows_RE.abs().mean()) > 0.1
        assert float(rows_RE.mean(0).abs().max()) < 1e-12
        for found in of_ranks:
            assert torch.equal(found[f"{name} bias"], of_ranks[0][f"{name} bias"])
        torch.testing.assert_close(of_ranks[0][f"{name} bias"], expected[f"{name} bias"], rtol=0, atol=1e-12)


def test_centring_measures_without_dropout_and_touches_nothing_but_biases(tmp_path: Path) -> None:
    built, _ = build(tmp_path, tower_dropout=0.5)
    batches = [batch_of(built, [0, 1]), batch_of(built, [2, 3, 4])]
    before, weights = head_outputs(built, batches), copy.deepcopy(built.model.state_dict())
    state = torch.get_rng_state()
    center_heads(built.model, iter(batches))
    assert torch.equal(torch.get_rng_state(), state), "dropout was on"
    assert built.model.training
    built.model.eval()
    after = head_outputs(built, batches)
    for name in ("audio", "text"):
        assert float(before[name].mean(0).abs().max()) > 0.1
        assert float(after[name].mean(0).abs().max()) < 1e-12
    changed = {n for n, value in built.model.state_dict().items() if not torch.equal(value, weights[n])}
    assert changed == {"audio_head.bias", "text_head.bias"}
    assert not any(module._forward_pre_hooks for module in built.model.modules())


@pytest.mark.parametrize("readout", ["mean", "maxsim"])
@pytest.mark.parametrize("clips_per_pass", [1, 3, 100])
def test_a_batch_in_passes_has_the_gradients_of_one_pass_under_dropout(
    tmp_path: Path, clips_per_pass: int, readout: str
) -> None:
    """The reference keeps the graphs of the same chunks: other chunks would draw another dropout."""

    def gradients(num_kept: int) -> tuple[dict[str, Tensor], Tensor]:
        built, temperature = build(tmp_path, tower_dropout=0.3, readout=readout, spec_time_masks=1)
        batch = batch_of(built, range(8))
        torch.manual_seed(3)
        passes = encode_in_passes(built.model, batch, clips_per_pass, num_kept)
        assert passes.num_passes == -(-8 // clips_per_pass)
        share, _, _ = loss_share(
            built.model, temperature, batch, ranks_step.SETTINGS, ALONE, None, bank_of(), passes.encoded
        )
        share.backward()
        passes.finish()
        named = [*built.model.named_parameters(), *temperature.named_parameters()]
        return {n: p.grad for n, p in named if p.requires_grad}, torch.get_rng_state()

    expected, state = gradients(num_kept=100)
    found, found_state = gradients(num_kept=1)
    assert torch.equal(found_state, state)
    for name, value in expected.items():
        assert float((found[name] - value).abs().max()) <= 1e-10 * float(value.abs().max()), name


def test_texts_and_terms_come_apart_in_order(tmp_path: Path) -> None:
    built, _ = build(tmp_path)
    built.model.eval()
    batch = batch_of(built, [3, 1])
    audio_BE, text_TE, term_LE = encode_batch(built.model, batch)
    assert (audio_BE.shape, text_TE.shape, term_LE.shape) == ((2, WIDTH), (2, WIDTH), (3, WIDTH))
    alone_audio_BE, alone_text_TE, alone_term_LE = encode_batch(built.model, batch_of(built, [1]))
    torch.testing.assert_close(audio_BE[1:], alone_audio_BE)
    torch.testing.assert_close(text_TE[1:], alone_text_TE)
    torch.testing.assert_close(term_LE[2:], alone_term_LE)


def test_an_empty_side_has_zero_rows(tmp_path: Path) -> None:
    built, _ = build(tmp_path)
    for indices, num_clips in (([6, 7], 2), ([], 0)):
        audio_BE, text_TE, term_LE = encode_batch(built.model, batch_of(built, indices))
        assert (audio_BE.shape, text_TE.shape, term_LE.shape) == ((num_clips, WIDTH), (0, WIDTH), (0, WIDTH))
        assert audio_BE.dtype == text_TE.dtype == term_LE.dtype == torch.float64


def hard_gradient(folder: Path, bank_terms: tuple[str, ...] | None) -> tuple[float, Tensor, Tensor, Tensor | None]:
    """Loss, gradient at the audio head and at the text head, and at the bank, of the clip that names "voicemail"."""
    built, temperature = build(folder)
    bank = None
    if bank_terms is not None:
        bank = bank_of(Glossary("", [Entry(term, term) for term in bank_terms]))
        bank.embeddings_KE.requires_grad_()
        with torch.no_grad():  # far from the clip: else they could be taken for false negatives
            audio_BE, _, term_LE = encode_batch(built.model, batch_of(built, [1]))
            away_BE = audio_BE - 3 * torch.nn.functional.normalize(audio_BE + 0.3 * bank.embeddings_KE, dim=1)
            bank.embeddings_KE.copy_(torch.nn.functional.normalize(away_BE, dim=1))
            built.model.text_head.bias.add_(audio_BE[0] - term_LE[0])
    share, _, _ = loss_share(built.model, temperature, batch_of(built, [1]), ONLY_HARD, ALONE, None, bank)
    share.backward()
    model = built.model
    of_bank = None if bank is None else bank.embeddings_KE.grad
    return float(share.detach()), model.audio_head.weight.grad, model.text_head.weight.grad, of_bank


def test_the_bank_trains_the_audio_side(tmp_path: Path) -> None:
    """Negatives taken as constants of both sides trained nothing before."""
    loss, audio_grad, _, _ = hard_gradient(tmp_path, None)
    assert loss == 0
    assert not audio_grad.any(), "one clip with one term has no negative in its batch"
    loss, audio_grad, text_grad, bank_grad = hard_gradient(tmp_path, ("extension", "conference"))
    assert loss > 1e-4
    assert float(audio_grad.abs().max()) > 1e-4
    assert float(text_grad.abs().max()) > 1e-4  # the positive is of the batch
    assert bank_grad is None


@pytest.mark.parametrize("term", ["voicemail", "Voicemails", "voice-mail"])
def test_a_clips_own_terms_and_their_variants_in_the_bank_are_no_negatives(tmp_path: Path, term: str) -> None:
    assert hard_gradient(tmp_path, (term,))[0] == 0
