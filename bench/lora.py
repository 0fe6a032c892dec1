"""Low-rank adapters on q, k and v, forward and backward: ours beside PEFT's LoRA layer and the bare frozen layers.

    python bench/lora.py [--tiny] [--json FILE]

The three projections of the towers' true shapes, frozen in bf16, adapters in fp32 masters with dropout 0.1 alive. PEFT
runs them under autocast, as its users do, each layer with its own mask; ours has one for the three. Gradients
must agree without dropout before anything is timed. On a GPU all sides run as CUDA graphs, so that what is timed is the
device's work and not the launches; PEFT's time without a graph is shown beside. `bare` is one frozen product for the
three (nothing can be faster), `bare x3` three layers.

Shapes: M rows, I in_features, O out_features of the three, R rank.
"""

import sys
from pathlib import Path

if __package__ != "bench":  # run as a file: the root goes first on sys.path, and bench/ comes off it
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from bench.findings import Findings, run_alone
from bench.limits import Limits, bench_device, seconds_of
from lora.joint import NAMES, JointProjection
from lora.layers import LoraLinear

WIDTHS = {"audio": 1280, "text": 4096}
NUM_ROWS = (512, 2048, 4096, 8192, 16384)
RANKS = (8, 16, 64)
DROPOUT = 0.1
TIMES_PEFT, TIMES_BARE, LARGE_ROWS = 1.6, 1.10, 4096
MOST_ERROR = 0.02  # of bf16 against bf16, relative to the norm


@dataclass(frozen=True)
class Side:
    """One way to compute the projections: x -> outputs, and what trains."""

    forward: Callable[[Tensor], tuple[Tensor, ...]]
    trained: list[nn.Parameter]

    def step(self, x_MI: Tensor, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Gradients of x and of the trained parameters."""
        return torch.autograd.grad(self.forward(x_MI), [x_MI, *self.trained], grads)


class Layers(nn.Module):
    """Three projections of one width, the layers of a real attention module: k has no bias."""

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__()
        self.joint_projection = None
        for name in NAMES:
            layer = nn.Linear(width, width, bias=name != "k_proj", device=device, dtype=torch.bfloat16)
            self.add_module(name, layer.requires_grad_(False))


def measure(limits: Limits, tiny: bool = False) -> Findings:
    """Rows over both towers' widths, rows and ranks; checks at the default rank."""
    device = bench_device()
    found = Findings("LoRA on q, k, v: milliseconds forward and backward")
    widths = {"tiny": 64} if tiny else WIDTHS
    for tower, width in widths.items():
        for rank in (8,) if tiny else RANKS:
            ours, theirs, bare, apart = make_sides(width, rank, device)
            for num_rows in (48,) if tiny else NUM_ROWS:
                x_MI, grad_MO = draw(num_rows, width, device)
                thirds = grad_MO.split(width, dim=1)
                set_dropout(ours[1], theirs[1], 0.0)
                require_parity(ours[0].step(x_MI, (grad_MO,)), theirs[0].step(x_MI, thirds))
                set_dropout(ours[1], theirs[1], DROPOUT)
                with_peft = seconds_of(partial(theirs[0].step, x_MI, thirds), device)
                seconds = [
                    graph_seconds(side, x_MI, grads, device)
                    for side, grads in ((ours[0], (grad_MO,)), (theirs[0], thirds), (bare, (grad_MO,)), (apart, thirds))
                ]
                # Two products of the frozen weights, and for each adapter low, y, grad_low, grad_x, grad_A, grad_B.
                operations = 4.0 * num_rows * width * 3 * width + 12.0 * num_rows * rank * 2 * width * 3
                # x twice, grad_x, y, grad_y twice; the weights twice.
                num_bytes = 2.0 * (num_rows * width * (3 + 3 * 3) + 2 * 3 * width * width)
                least = limits.least_seconds(operations, num_bytes)
                found.rows.append(
                    {
                        "tower": tower,
                        "rows": num_rows,
                        "rank": rank,
                        "ours": 1e3 * seconds[0],
                        "PEFT": 1e3 * seconds[1],
                        "PEFT, no graph": 1e3 * with_peft,
                        "bare": 1e3 * seconds[2],
                        "bare x3": 1e3 * seconds[3],
                        "PEFT / ours": seconds[1] / seconds[0],
                        "ours / bare": seconds[0] / seconds[2],
                        "ours / bare x3": seconds[0] / seconds[3],
                        "of the limit": least / seconds[0],
                    }
                )
    for tower in widths:
        rows = [row for row in found.rows if row["tower"] == tower]
        found.check(f"{tower}: PEFT / ours, least", min(numbers(rows, "PEFT / ours")), TIMES_PEFT)
        large = [row for row in rows if int(row["rows"] or 0) >= LARGE_ROWS or tiny]
        for column in ("ours / bare", "ours / bare x3"):
            found.check(f"{tower}: {column}, most", max(numbers(large, column)), TIMES_BARE, "at most")
    return found


def numbers(rows: list[dict[str, str | float | int | None]], column: str) -> list[float]:
    return [value for row in rows if isinstance(value := row[column], float)]


def make_sides(
    width: int, rank: int, device: torch.device
) -> tuple[tuple[Side, list[LoraLinear]], tuple[Side, list[PeftLinear]], Side, Side]:
    """Ours and PEFT's with the same weights and adapters, with their layers; the frozen layers joined and apart."""
    torch.manual_seed(0)
    frozen = Layers(width, device)
    peft_layers: list[PeftLinear] = []
    lora_layers: list[LoraLinear] = []
    joint = Layers(width, device).train()
    joint.load_state_dict(frozen.state_dict())
    for name in NAMES:
        base = frozen.get_submodule(name)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=DROPOUT)
        theirs = PeftLinear(base, "default", config, r=rank, lora_alpha=2 * rank).to(device)
        ours = LoraLinear(joint.get_submodule(name), rank, 2 * rank, DROPOUT)  # type: ignore[arg-type]
        nn.init.normal_(ours.lora_B)
        with torch.no_grad():
            for part in ("lora_A", "lora_B"):
                theirs.get_parameter(f"{part}.default.weight").data = getattr(ours, part).detach().clone()
        setattr(joint, name, ours)
        peft_layers.append(theirs.train())
        lora_layers.append(ours)

    def by_peft(x_MI: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):  # its cache does not outlive a capture
            return tuple(layer(x_MI) for layer in peft_layers)

    projection, plain = JointProjection(joint), Layers(width, device)
    bare = JointProjection(plain)
    masters: list[nn.Parameter] = [p for layer in lora_layers for p in (layer.lora_A, layer.lora_B)]
    names = [f"{part}.default.weight" for part in ("lora_A", "lora_B")]
    their_masters: list[nn.Parameter] = [layer.get_parameter(name) for layer in peft_layers for name in names]
    return (
        (Side(lambda x_MI: (projection(x_MI),), masters), lora_layers),
        (Side(by_peft, their_masters), peft_layers),
        Side(lambda x_MI: (bare(x_MI),), []),
        Side(lambda x_MI: tuple(frozen.get_submodule(name)(x_MI) for name in NAMES), []),
    )


def draw(num_rows: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    x_MI = torch.randn(num_rows, width, device=device).bfloat16().requires_grad_()
    return x_MI, torch.randn(num_rows, 3 * width, device=device).bfloat16()


def set_dropout(ours: list[LoraLinear], theirs: list[PeftLinear], dropout: float) -> None:
    for layer in ours:
        layer.dropout = dropout
    for peft_layer in theirs:
        peft_layer.lora_dropout["default"] = nn.Dropout(dropout) if dropout else nn.Identity()


def require_parity(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    """Raises RuntimeError where a gradient differs by more than bf16 explains."""
    for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        error = float((mine.float() - other.float()).norm() / other.float().norm())
        if not error < MOST_ERROR:
            raise RuntimeError(f"PEFT disagrees: gradient {i} is off by {error:.3g} of its norm, over {MOST_ERROR}")


def graph_seconds(side: Side, x_MI: Tensor, grads: tuple[Tensor, ...], device: torch.device) -> float:
    """Median seconds of forward and backward, on a GPU as one replay of a CUDA graph."""
    if device.type != "cuda":
        return seconds_of(lambda: side.step(x_MI, grads), device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            side.step(x_MI, grads)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        side.step(x_MI, grads)
    return seconds_of(graph.replay, device)


if __name__ == "__main__":
    sys.exit(run_alone(measure))
