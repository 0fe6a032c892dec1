"""The towers' memory-bound steps, kernel by kernel: time and bytes a second beside a floor and beside torch's own.

    python bench/pointwise.py

Shapes are those of a training step at the true 7B size: 16 clips of 1.6 s are 1,300 audio tokens and 160 of text, 256
clips 21,000 and 2,500. Each call is timed inside a CUDA graph of several, so that launching is no part of it. The floor
is a copy of as many bytes as the step must at least read and write; where matrix products bound the step (convolutions,
gate and up) it is these products alone, on inputs that lie ready. Median over replays. Values are compared first.
"""

import sys
from pathlib import Path

if __package__ != "bench":  # run as a file: the root goes first on sys.path, and bench/ comes off it
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.activations import swiglu
from model.convolutions import embed_frames
from model.norms import LayerNorm, RMSNorm
from model.packing import AudioLayout, SequenceLayout

AUDIO_WIDTH, TEXT_WIDTH, TEXT_FFN, NUM_MELS = 1280, 4096, 11008, 128
AUDIO_TOKENS, TEXT_TOKENS = (1300, 21_000), (160, 2500)
CLIP_SAMPLES, CLIP_TOKENS, STRING_TOKENS = 25_920, 81, 8
DEVICE = "cuda"
CALLS, REPLAYS = 8, 21
MAX_ERROR = 2.0**-6  # between two ways to round bf16, root mean square over that of the reference

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One step: what it must move, and the same with our kernels and with torch's."""

    name: str
    tokens: int
    width: int
    num_bytes: int
    ours: Callable[[], Outputs]
    plain: Callable[[], Outputs]
    products: Callable[[], Outputs] | None = None
    """The bare matrix products, for a step that they bound."""

    def floor(self) -> Callable[[], Outputs]:
        """What the step cannot be faster than."""
        if self.products is not None:
            return self.products
        source = torch.empty(self.num_bytes // 2, dtype=torch.uint8, device=DEVICE)
        target = torch.empty_like(source)
        return lambda: (target.copy_(source),)


@dataclass(frozen=True)
class Row:
    name: str
    tokens: int
    width: int
    num_bytes: int
    ours_us: float
    torch_us: float
    floor_us: float

    @property
    def ratio(self) -> float:
        return self.torch_us / self.ours_us

    @property
    def of_floor(self) -> float:
        """The floor's time as a share of ours."""
        return self.floor_us / self.ours_us

    def line(self) -> str:
        rate = self.num_bytes / self.ours_us / 1e3
        return (
            f"{self.name:24s} {self.tokens:7d} {self.width:7d} {self.ours_us:10.1f} {rate:8.0f} {self.of_floor:8.2f} "
            f"{self.torch_us:10.1f} {self.ratio:8.2f}"
        )


HEADER = (
    f"{'step':24s} {'tokens':>7s} {'width':>7s} {'ours us':>10s} {'GB/s':>8s} {'of floor':>8s} {'torch us':>10s} "
    f"{'torch/us':>8s}"
)


def measure() -> list[Row]:
    """All rows, on the current CUDA device. Raises ValueError without one, or where results differ."""
    if not torch.cuda.is_available():
        raise ValueError("device: this benchmark needs a CUDA device")
    rows = []
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for case in cases():
            check(case)
            times = [time_us(call, stream) for call in (case.ours, case.plain, case.floor())]
            rows.append(Row(case.name, case.tokens, case.width, case.num_bytes, *times))
    return rows


def check(case: Case) -> None:
    """Raise ValueError unless both give the same up to bf16."""
    for ours, plain in zip(case.ours(), case.plain(), strict=True):
        error = float((ours.double() - plain.double()).norm() / plain.double().norm())
        if not error <= MAX_ERROR:
            raise ValueError(f"{case.name} at {case.tokens} tokens: differs from torch by {error:.2e}")


def time_us(call: Callable[[], Outputs], stream: torch.cuda.Stream) -> float:
    """Microseconds a call, on the stream in force: median over replays of a graph of several calls."""

    def several() -> None:
        for _ in range(CALLS):
            call()

    call()
    torch.cuda.synchronize()
    replay: Callable[[], None] = several
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            several()
        replay = graph.replay
    except RuntimeError as error:  # an operation of the peer that cannot be captured: launching then counts
        print(f"timed without a graph: {str(error).splitlines()[0]}", flush=True)
    replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
    for event in events:
        event.record()
        replay()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairwise(events)) * 1e3 / CALLS


def cases() -> Iterator[Case]:
    for tokens in AUDIO_TOKENS:
        yield from _norm_cases("layer norm", LayerNorm, tokens, AUDIO_WIDTH)
        yield from _pair_cases(tokens)
        yield from _mean_cases(tokens // 2, AUDIO_WIDTH, CLIP_TOKENS // 2)
        yield _front_end_case(tokens // CLIP_TOKENS)
    for tokens in TEXT_TOKENS:
        yield from _norm_cases("rms norm", lambda width, kernels: RMSNorm(width, 1e-6, kernels), tokens, TEXT_WIDTH)
        yield from _swiglu_cases(tokens)
        yield from _mean_cases(tokens, TEXT_WIDTH, STRING_TOKENS)
        yield _joined_product_case(tokens)


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device=DEVICE)


def _both_ways(
    name: str,
    tokens: int,
    width: int,
    num_bytes: tuple[int, int],
    inputs: Outputs,
    functions: tuple[Callable[..., Outputs], Callable[..., Outputs]],
) -> Iterator[Case]:
    """Forward without and backward with a graph."""
    yield Case(name, tokens, width, num_bytes[0], *(_forward(function, inputs) for function in functions))
    leaves = tuple(x.requires_grad_() for x in inputs)
    outs = [function(*leaves) for function in functions]
    grads = tuple(torch.randn_like(part) for part in outs[0])
    yield Case(f"{name}, backward", tokens, width, num_bytes[1], *(_backward(out, leaves, grads) for out in outs))


def _forward(function: Callable[..., Outputs], inputs: Outputs) -> Callable[[], Outputs]:
    return lambda: function(*inputs)


def _backward(outs: Outputs, leaves: Outputs, grads: Outputs) -> Callable[[], Outputs]:
    return lambda: torch.autograd.grad(outs, leaves, grads, retain_graph=True)


def _norm_cases(name: str, make: Callable[[int, str], LayerNorm | RMSNorm], tokens: int, width: int) -> Iterator[Case]:
    ours, plain = (make(width, k).to(DEVICE, torch.bfloat16).requires_grad_(False) for k in ("triton", "torch"))
    size = 4 * 2 * tokens * width
    inputs = (_draw(tokens, width), _draw(tokens, width))
    yield from _both_ways(f"sum and {name}", tokens, width, (size, size), inputs, (ours.add, plain.add))


def _swiglu_cases(tokens: int) -> Iterator[Case]:
    size = (2 * tokens * 3 * TEXT_FFN, 2 * tokens * 5 * TEXT_FFN)
    functions = (lambda x: (swiglu(x, "triton"),), lambda x: (swiglu(x, "torch"),))
    yield from _both_ways("swiglu", tokens, TEXT_FFN, size, (_draw(tokens, 2 * TEXT_FFN),), functions)


def _pair_cases(tokens: int) -> Iterator[Case]:
    layout = AudioLayout.build([CLIP_SAMPLES] * (tokens // CLIP_TOKENS), 2, 3000, DEVICE)
    tokens, pooled = sum(layout.tokens.lengths), sum(layout.pooled.lengths)
    norms = [LayerNorm(AUDIO_WIDTH, k).to(DEVICE, torch.bfloat16).requires_grad_(False) for k in ("triton", "torch")]
    size = (2 * AUDIO_WIDTH * (2 * tokens + 2 * pooled), 2 * AUDIO_WIDTH * (tokens + 2 * pooled))
    pairs = (layout.pool_first_Q, layout.pool_second_Q)
    functions = tuple((lambda x, d, norm=norm: (norm.add_pairs(x, d, *pairs),)) for norm in norms)
    inputs = (_draw(tokens, AUDIO_WIDTH), _draw(tokens, AUDIO_WIDTH))
    yield from _both_ways("pairs and layer norm", tokens, AUDIO_WIDTH, size, inputs, (functions[0], functions[1]))


def _mean_cases(tokens: int, width: int, length: int) -> Iterator[Case]:
    layout = SequenceLayout.build([length] * (tokens // length), DEVICE)
    tokens, sequences = sum(layout.lengths), len(layout.lengths)
    size = 2 * tokens * width + 4 * sequences * width
    functions = (lambda x: (layout.mean(x, "triton"),), lambda x: (layout.mean(x, "torch"),))
    yield from _both_ways("mean", tokens, width, (size, size), (_draw(tokens, width),), functions)


def _front_end_case(num_clips: int) -> Case:
    """Convolutions and positions; its bytes are the mel, the weights and the tokens alone."""
    layout = AudioLayout.build([CLIP_SAMPLES] * num_clips, 2, 3000, DEVICE)
    slots, tokens = len(layout.owner_T), sum(layout.tokens.lengths)
    conv1 = nn.Conv1d(NUM_MELS, AUDIO_WIDTH, 3, padding=1)
    conv2 = nn.Conv1d(AUDIO_WIDTH, AUDIO_WIDTH, 3, stride=2, padding=1)
    positions = nn.Embedding(1500, AUDIO_WIDTH)
    for part in (conv1, conv2, positions):
        part.to(DEVICE, torch.bfloat16).requires_grad_(False)
    mel_TM = _draw(slots, NUM_MELS).masked_fill(~layout.is_kept_T[:, None], 0.0)
    size = 2 * (mel_TM.numel() + conv1.weight.numel() + conv2.weight.numel() + 2 * tokens * AUDIO_WIDTH)
    calls = [
        (lambda kernels=kernels: (embed_frames(mel_TM, layout, conv1, conv2, positions, kernels),))
        for kernels in ("triton", "torch")
    ]
    shapes = ((slots, 3 * NUM_MELS), (tokens, 3 * AUDIO_WIDTH))  # of the patches, one convolution each
    patches = [(_draw(*shape), _draw(shape[1], AUDIO_WIDTH)) for shape in shapes]
    return Case("convolutions", tokens, AUDIO_WIDTH, size, calls[0], calls[1], lambda: tuple(a @ b for a, b in patches))


def _joined_product_case(tokens: int) -> Case:
    """Gate and up as one matrix product against two; its bytes are the weights', the rows' and the results'."""
    weight, x_PD = _draw(2 * TEXT_FFN, TEXT_WIDTH) / TEXT_WIDTH**0.5, _draw(tokens, TEXT_WIDTH)
    gate, up = weight.chunk(2)
    size = 2 * (weight.numel() + x_PD.numel() + tokens * 2 * TEXT_FFN)
    return Case(
        "gate and up, products",
        tokens,
        TEXT_FFN,
        size,
        lambda: F.linear(x_PD, weight).chunk(2, dim=1),
        lambda: (F.linear(x_PD, gate), F.linear(x_PD, up)),
        lambda: (F.linear(x_PD, weight),),
    )


def main() -> None:
    torch.manual_seed(0)
    rows = measure()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16")
    print(HEADER)
    for row in rows:
        print(row.line())


if __name__ == "__main__":
    main()
