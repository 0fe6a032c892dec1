"""Packs filled up to size classes give what they gave before; on a GPU, replayed graphs give what eager passes give."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lora.inject import inject_lora
from lora.settings import LoraSettings
from model.build import build_model
from model.captures import Side
from model.dual import DualEncoder
from model.graphs import TowerGraphs, add_graphs, why_no_graphs
from model.packing import AudioLayout, AudioPack, TextPack
from model.settings import ModelSettings
from model.sizes import SizeClass

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA graphs")


@pytest.fixture
def make_text() -> Callable[[list[int]], TextPack]:
    return lambda lengths: TextPack(torch.randint(0, 257, (sum(lengths),)), lengths)


def results(model: DualEncoder, audio: AudioPack, text: TextPack) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    audio_BE, text_NE = model.encode_both(audio, text)
    scores_BN = audio_BE @ text_NE.T
    weight_BN = torch.linspace(-1, 1, scores_BN.numel(), dtype=scores_BN.dtype).view_as(scores_BN)
    (scores_BN * weight_BN).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return audio_BE.detach(), text_NE.detach(), grads


@pytest.mark.parametrize(("kind", "readout"), [("qwen2_audio", "tower"), ("qwen2_audio", "lm"), ("whisper", "tower")])
def test_dummies_change_neither_embeddings_nor_gradients(
    kind, readout, write_qwen2_audio, architecture_files, make_pack, make_text
) -> None:
    if kind == "qwen2_audio":
        settings = ModelSettings(model_name=str(write_qwen2_audio("v4")), audio_readout=readout)
    else:
        settings = ModelSettings(audio_model=architecture_files[0], text_model=architecture_files[1], trainable="full")
    model = build_model(settings, "cpu", torch.float64).model.train()
    if kind == "qwen2_audio":
        inject_lora(model, LoraSettings(lora_r=2, lora_dropout=0.0))
        with torch.no_grad():
            for name, param in model.named_parameters():
                if name.endswith("lora_B"):
                    param.normal_()
    for seconds, lengths in (([0.3, 0.005, 0.021, 0.25], [5, 1, 14]), ([30.0, 0.5], [1]), ([0.01], [40] * 9)):
        audio, text = make_pack(seconds), make_text(lengths)
        plain = results(model, audio, text)
        model.graphs = TowerGraphs(model, captures=False)
        padded = results(model, audio, text)
        model.graphs = None
        for own, expected in zip(padded[:2], plain[:2], strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12)
        assert padded[2].keys() == plain[2].keys()
        for name, expected in plain[2].items():
            torch.testing.assert_close(padded[2][name], expected, rtol=1e-10, atol=1e-12, msg=name)


def test_tables_of_a_class_have_one_shape_whatever_the_lengths() -> None:
    shapes = set()
    for num_samples in ([16_000] * 3, [9_600, 16_000, 22_000], [23_600, 23_900]):
        frames = [-(-n // 160) for n in num_samples]
        size = SizeClass.of([(n - 1) // 2 + 1 for n in frames], 256, 1500, 2)
        assert size == SizeClass(160, 4, 256, 2)
        layout = AudioLayout.build(num_samples, 2, 3000, "cpu", size)
        assert len(layout.owner_T) == size.num_slots
        assert layout.tokens.max_len == 256
        assert layout.pooled.max_len == 128
        assert int(layout.token_slot_P.max()) < size.num_slots // 2
        assert int(layout.tokens.place_P.max()) < 256
        # What a dummy pools is no token of a real clip.
        own = sum(size.filled_pooled([max(1, t // 2) for t in [(n - 1) // 2 + 1 for n in frames]])[: len(frames)])
        assert int(layout.pool_first_Q[own:].min()) >= sum((n - 1) // 2 + 1 for n in frames)
        assert layout.pool_first_Q.diff().min() >= 0
        shapes.add(AudioLayout.tables(num_samples, 2, 3000, size).sizes)
    assert len(shapes) == 1


def test_errors_are_those_of_unpadded_packs(write_qwen2_audio, make_pack) -> None:
    model = build_model(ModelSettings(model_name=str(write_qwen2_audio("v4"))), "cpu", torch.float64).model.train()
    model.graphs = TowerGraphs(model, captures=False)
    with pytest.raises(ValueError, match="need at least one sequence"):
        model.encode_text(TextPack(torch.zeros(0, dtype=torch.int64), []))
    with pytest.raises(ValueError, match=r"the longest is 3000 tokens, the text tower takes 2048"):
        model.encode_text(TextPack(torch.zeros(3000, dtype=torch.int64), [3000]))
    with pytest.raises(ValueError, match=r"num_samples\[0\]: got 480001"):
        model.encode_audio(AudioPack(torch.zeros(480_001, dtype=torch.int16), [480_001]))


def test_evaluation_knows_nothing_of_classes(write_qwen2_audio, make_text) -> None:
    model = build_model(ModelSettings(model_name=str(write_qwen2_audio("v4"))), "cpu", torch.float64).model.train()
    text = make_text([3, 4])
    model.graphs = TowerGraphs(model, captures=False)
    asked: list[TextPack | None] = []

    def encode(audio: AudioPack | None, text: TextPack | None) -> tuple[None, Tensor]:
        asked.append(text)
        return None, torch.empty(0)

    model.graphs.encode = encode  # type: ignore[method-assign,assignment]
    model.encode_text(text)
    assert asked == [text]
    model.eval().encode_text(text)
    assert asked == [text]


def test_a_pass_without_gradient_sees_the_dropout_of_one_with_it(write_qwen2_audio, make_pack, make_text) -> None:
    settings = ModelSettings(model_name=str(write_qwen2_audio("v4")), tower_dropout=0.3)
    model = build_model(settings, "cpu", torch.float64).model.train()
    inject_lora(model, LoraSettings(lora_r=2, lora_dropout=0.2, lora_joint=False))
    audio, text = make_pack([0.3, 0.25]), make_text([5, 1])
    model.graphs = TowerGraphs(model, captures=False)
    found = []
    for learns in (True, False):
        torch.manual_seed(5)
        with torch.set_grad_enabled(learns):
            found.append((model.encode_audio(audio), model.encode_text(text)))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("failing", ["audio", "text"])
def test_a_capture_that_fails_leaves_training_eager_and_right(
    failing, write_qwen2_audio, make_pack, make_text, monkeypatch, caplog
) -> None:
    """Such as for want of memory: said once, and the numbers are those of eager passes, of the side as well whose
    capture did work: in use, it would keep memory from them."""
    model = build_model(ModelSettings(model_name=str(write_qwen2_audio("v4"))), "cpu", torch.float64).model.train()
    inject_lora(model, LoraSettings(lora_r=2, lora_dropout=0.0))
    inputs = make_pack([0.3, 0.2]), make_text([5, 3])
    model.graphs = TowerGraphs(model, captures=False)
    expected = results(model, *inputs)

    tried = []

    def capture(side: Side, *_: object) -> object:
        tried.append(side.name)
        if side.name == failing:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return object()  # which nothing can replay

    monkeypatch.setattr("model.graphs.Capture", capture)
    monkeypatch.setattr("model.graphs.Side.make_room", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
    monkeypatch.setattr(torch.cuda, "MemPool", type("MemPool", (), {}))
    graphs = model.graphs = TowerGraphs(model, captures=False)
    graphs._captures = True
    for side in (graphs._audio, graphs._text):
        side.stream = object()  # type: ignore[assignment]
    graphs.start()
    for _ in range(2):
        found = results(model, *inputs)
        for own, exact in zip(found[:2], expected[:2], strict=True):
            torch.testing.assert_close(own, exact, rtol=0, atol=0)
        for name, exact in expected[2].items():
            torch.testing.assert_close(found[2][name], exact, rtol=0, atol=0)
    assert tried == ["audio", "text"][: 1 + (failing == "text")]
    assert caplog.text.count("CUDA graphs are off from here on") == 1
    assert "OutOfMemoryError: CUDA out of memory" in caplog.text


def test_what_keeps_graphs_away_is_said(write_qwen2_audio) -> None:
    model = build_model(ModelSettings(model_name=str(write_qwen2_audio("v4")))).model
    assert why_no_graphs(model) == "it computes on cpu"
    assert add_graphs(model, "auto", True) is None
    assert add_graphs(model, "off", True) is None
    with pytest.raises(ValueError, match="cuda_graphs: got 'on', but it computes on cpu; use auto or off"):
        add_graphs(model, "on", True)
    assert model.graphs is None


# --- on a GPU --------------------------------------------------------------------------------------------------------


def on_gpu(architectures: dict[str, str], dropout: float, **more: object) -> DualEncoder:
    """A small bf16 model with adapters that do something, and gradients that stay where they are."""
    settings = ModelSettings(**architectures, cuda_graphs="on", **more)  # type: ignore[arg-type]
    model = build_model(settings, "cuda").model
    inject_lora(model, LoraSettings(lora_r=4, lora_dropout=dropout))
    generator = torch.Generator("cuda").manual_seed(0)
    for name, param in model.named_parameters():
        if param.requires_grad:
            if name.endswith("lora_B"):
                nn.init.normal_(param, std=0.1, generator=generator)
            param.grad = torch.zeros_like(param)
    return model.train()


def gradients(model: DualEncoder) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def zero(model: DualEncoder) -> None:
    for param in model.parameters():
        if param.grad is not None:
            param.grad.zero_()


def step(model: DualEncoder, audio: AudioPack, text: TextPack, seed: int | None = None) -> Tensor:
    """Embeddings, one below the other; gradients are added."""
    if seed is not None:
        torch.cuda.manual_seed(seed)
    audio_BE, text_NE = model.encode_both(audio, text)
    (audio_BE @ text_NE.T)[:, 0].sum().backward()
    return torch.cat([audio_BE.detach(), text_NE.detach()])


def assert_alike(own: Tensor, expected: Tensor, least: float = 0.9999) -> None:
    assert torch.isfinite(own).all()
    assert nn.functional.cosine_similarity(own.flatten().double(), expected.flatten().double(), dim=0) > least


@pytest.fixture
def packs(make_pack, make_text):
    audio = make_pack([0.3, 0.5, 0.25])
    pcm_S = audio.pcm_S.to(torch.float32).cuda()
    text = make_text([5, 1, 14])
    return AudioPack(pcm_S, audio.num_samples), TextPack(text.ids_P.cuda(), text.lengths)


@pytest.fixture
def wide_architectures(tmp_path) -> dict[str, str]:
    """Head sizes that the packed kernels take."""
    import json

    from tests.bin.tones import AUDIO, TEXT

    paths = tmp_path / "audio.json", tmp_path / "text.json"
    for path, config in zip(paths, (AUDIO | {"d_model": 64}, TEXT | {"hidden_size": 64}), strict=True):
        path.write_text(json.dumps(config))
    return {"audio_model": str(paths[0]), "text_model": str(paths[1])}


@needs_gpu
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_replays_give_what_eager_passes_give_dropout_included(dropout, wide_architectures, packs) -> None:
    model = on_gpu(wide_architectures, dropout)
    model.graphs = TowerGraphs(model, captures=False)
    eager = step(model, *packs, seed=1)
    eager_grad = gradients(model).clone()
    model.graphs = graphs = TowerGraphs(model)
    graphs.start()
    for _ in range(3):  # captured, then replayed
        zero(model)
        replayed = step(model, *packs, seed=1)
        assert_alike(replayed, eager)
        assert_alike(gradients(model), eager_grad)
    assert graphs.num_captures == 2
    step(model, *packs, seed=1)  # adds
    assert_alike(gradients(model), 2 * eager_grad)
    torch.testing.assert_close(gradients(model).norm(), 2 * eager_grad.norm(), rtol=1e-2, atol=0.0)


@needs_gpu
def test_packs_beside_each_other_give_what_they_give_one_after_the_other(
    wide_architectures, packs, monkeypatch
) -> None:
    """Dropout included: either side's graph draws its own numbers, also while the other one runs."""
    model = on_gpu(wide_architectures, 0.3)
    model.graphs = graphs = TowerGraphs(model)
    graphs.start()
    step(model, *packs)
    found = []
    for beside in (True, False):
        if not beside:
            monkeypatch.setattr(graphs, "_can_go_beside", lambda *_: False)
        torch.cuda.manual_seed(3)
        rows = []
        for _ in range(20):
            zero(model)
            rows.append(torch.cat([step(model, *packs).flatten(), gradients(model)]))
        found.append(torch.stack(rows))
    assert graphs.num_captures == 2
    assert len(found[0].unique(dim=0)) == 20
    torch.testing.assert_close(found[1], found[0], rtol=0.0, atol=0.0)


@needs_gpu
def test_each_replay_draws_its_own_dropout_and_a_restored_state_brings_it_back(wide_architectures, packs) -> None:
    model = on_gpu(wide_architectures, 0.3)
    model.graphs = graphs = TowerGraphs(model)
    graphs.start()
    before = torch.cuda.get_rng_state()
    first = step(model, *packs)
    state = torch.cuda.get_rng_state()
    second = step(model, *packs)
    assert not torch.allclose(first, second, atol=1e-3)
    torch.cuda.set_rng_state(state)
    torch.testing.assert_close(step(model, *packs), second, rtol=0.0, atol=1e-3)
    torch.cuda.set_rng_state(before)  # the first pass captured, and drew as a replay does
    torch.testing.assert_close(step(model, *packs), first, rtol=0.0, atol=1e-3)


@needs_gpu
def test_a_replayed_step_never_waits_for_the_device(wide_architectures, packs) -> None:
    model = on_gpu(wide_architectures, 0.1)
    model.graphs = graphs = TowerGraphs(model)
    graphs.start()
    step(model, *packs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(model, *packs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_classes_take_turns_in_one_memory_and_further_ones_are_eager(wide_architectures, packs, make_text) -> None:
    model = on_gpu(wide_architectures, 0.0)
    audio, short = packs
    long = make_text([30] * 20)
    long = TextPack(long.ids_P.cuda(), long.lengths)
    model.graphs = TowerGraphs(model, captures=False)
    expected = {}
    for name, text in (("short", short), ("long", long)):
        zero(model)
        expected[name] = step(model, audio, text), gradients(model).clone()
    for most in (8, 2):
        model.graphs = graphs = TowerGraphs(model, most=most)
        graphs.start()
        for name, text in (("short", short), ("long", long)) * 3:
            zero(model)
            assert_alike(step(model, audio, text), expected[name][0])
            assert_alike(gradients(model), expected[name][1])
        assert graphs.num_captures == min(most, 3)


@needs_gpu
def test_a_second_pass_before_the_first_ones_backward_is_eager_and_right(wide_architectures, packs) -> None:
    model = on_gpu(wide_architectures, 0.0)
    model.graphs = graphs = TowerGraphs(model)
    graphs.start()
    expected = step(model, *packs)
    expected_grad = gradients(model).clone()
    zero(model)
    first, second = model.encode_audio(packs[0]), model.encode_audio(packs[0])
    text_NE = model.encode_text(packs[1])
    (first @ text_NE.T)[:, 0].sum().backward()
    assert_alike(torch.cat([second.detach(), text_NE.detach()]), expected)
    assert_alike(gradients(model), expected_grad)
    del first, second, text_NE
    zero(model)
    dropped = model.encode_audio(packs[0])  # never backward: it must not keep the graphs away for good
    del dropped
    step(model, *packs)
    assert_alike(gradients(model), expected_grad)


@needs_gpu
def test_a_capture_that_the_driver_calls_off_leaves_training_eager_dropout_included(wide_architectures, packs) -> None:
    """The accumulators of an eager pass that is still held stay on the default stream: no capture beside them."""
    model = on_gpu(wide_architectures, 0.3)
    model.graphs = TowerGraphs(model, captures=False)
    expected = step(model, *packs, seed=1)
    model.graphs = graphs = TowerGraphs(model)
    held = model.encode_audio(packs[0]), model.encode_text(packs[1])
    graphs.start()
    for _ in range(2):
        assert_alike(step(model, *packs, seed=1), expected)
    assert graphs.num_captures == 0
    del held
    torch.cuda.synchronize()
