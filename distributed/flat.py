"""All trainable parameters in one buffer, and their gradients in another: what is done to every parameter is one call.

    values_F     | group 0: a . b . . | group 1: c . |            (.: a gap, so that each parameter starts aligned)
    gradients_F  | the same places    |              | tail |     tail: numbers that are summed over ranks together

Names, shapes and state dicts of the parameters stay what they are: their data are views of `values_F`, their `.grad`
views of `gradients_F` that live as long as this object. Autograd adds into them; nothing may set `.grad` to None.

Shapes: F elements of all groups, gaps included; X tail.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from distributed.collectives import all_reduce, num_ranks

ALIGNMENT = 64
"""Elements: 256 bytes of fp32, as the device's allocator aligns a tensor of its own."""


@dataclass(frozen=True, eq=False)
class Piece:
    """Where a parameter lies in a flat tensor: of its group's values, gradient, or state."""

    name: str
    param: Parameter
    start: int = 0

    def of(self, flat: Tensor) -> Tensor:
        """This parameter's part of a flat tensor, a view in its shape."""
        return flat.reshape(-1)[self.start : self.start + self.param.numel()].view(self.param.shape)


class FlatParameters:
    """Takes the parameters over: values are kept, gradients start at zero.

    groups: parameters that one optimizer call may treat alike. Raises ValueError when dtypes or devices differ.
    """

    def __init__(self, groups: Sequence[Sequence[tuple[str, Parameter]]], num_tail: int) -> None:
        kinds = {(param.dtype, param.device): name for group in groups for name, param in group}
        if len(kinds) != 1:
            found = ", ".join(f"{name} ({dtype}, {device})" for (dtype, device), name in kinds.items())
            raise ValueError(f"flat_optimizer: parameters of one dtype on one device are needed, got {found or 'none'}")
        ((dtype, device),) = kinds
        bounds, layout, place = [0], [], 0
        for group in groups:
            pieces = []
            for name, param in group:
                pieces.append(Piece(name, param, place - bounds[-1]))
                place += -(-param.numel() // ALIGNMENT) * ALIGNMENT
            layout.append(pieces)
            bounds.append(place)

        values_F = torch.zeros(place, dtype=dtype, device=device)
        parts = [values_F[start:stop] for start, stop in itertools.pairwise(bounds)]
        for pieces, part in zip(layout, parts, strict=True):
            for piece in pieces:
                own = piece.of(part)
                own.copy_(piece.param.detach())
                piece.param.data = own
        self._gradients_and_tail = torch.zeros(place + num_tail, dtype=dtype, device=device)
        self.gradients_F, self.tail_X = self._gradients_and_tail.split([place, num_tail])

        self.groups: list[Parameter] = []
        """One flat parameter a group, with its `.grad`: what an optimizer is given."""
        self.pieces: dict[Parameter, list[Piece]] = {}
        """What lies in each of them."""
        self._views: list[tuple[Piece, Tensor]] = []
        for i, (pieces, part) in enumerate(zip(layout, parts, strict=True)):
            flat = Parameter(part)
            flat.grad = self.gradients_F[bounds[i] : bounds[i + 1]]
            self._views += [(piece, piece.of(flat.grad)) for piece in pieces]
            self.groups.append(flat)
            self.pieces[flat] = pieces
        for piece, view in self._views:
            piece.param.grad = view

    def zero(self) -> None:
        """Gradients and tail to zero: one memset."""
        self._gradients_and_tail.zero_()

    def sum_over_ranks(self) -> None:
        """Gradients and tail become their sums over ranks: one all-reduce, the same bits on every rank."""
        for piece, view in self._views:
            assert piece.param.grad is view, f"something replaced the gradient of {piece.name}"
        if num_ranks() > 1:
            all_reduce(self._gradients_and_tail)

    def gradient_norm(self) -> Tensor:
        """L2 norm of all gradients, 0-dim on their device; gaps are zeros and the tail is left out."""
        return torch.linalg.vector_norm(self.gradients_F)
