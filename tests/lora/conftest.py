"""Small module trees with the model's dotted paths, in our naming and in both of the checkpoint's."""

import copy
import os

import pytest
import torch
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # PEFT would look base models up

WIDTH = 8


class Attention(nn.Module):
    """Not attention, but as many projections, each of which matters to the output."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj, self.out_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.k_proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(torch.tanh(self.q_proj(x)) * self.k_proj(x) + self.v_proj(x))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.norm = Attention(), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.self_attn(self.norm(x))


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Projector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Model(nn.Module):
    """audio_tower, multi_modal_projector, language_model: paths as ours."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(WIDTH, WIDTH, 3)
        self.audio_tower, self.multi_modal_projector, self.language_model = Tower(), Projector(), Tower()

    def forward(self, x: Tensor) -> Tensor:
        return self.language_model(self.multi_modal_projector(self.audio_tower(x)))


class Holder(nn.Module):
    """Its children under given names; computes what the Model that they come from does."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.model if hasattr(self, "model") else self
        if not hasattr(inner, "audio_tower"):
            return inner(x)
        return inner.language_model(inner.multi_modal_projector(inner.audio_tower(x)))


@pytest.fixture
def tiny_model():
    """Callable: a Model in fp64 (or another dtype), in eval mode, the same weights each time."""

    def make(dtype: torch.dtype = torch.float64) -> Model:
        torch.manual_seed(0)
        return Model().to(dtype).eval()

    return make


@pytest.fixture
def renamed():
    """Callable: a copy of a Model's modules under the paths of a key scheme."""

    def make(model: Model, scheme: str) -> Holder:
        model = copy.deepcopy(model)
        if scheme == "v4":
            language_model = Holder(model=model.language_model)
            parts = {"audio_tower": model.audio_tower, "multi_modal_projector": model.multi_modal_projector}
            return Holder(**parts, language_model=language_model).eval()
        inner = Holder(**dict(model.named_children()))
        return Holder(model=inner).eval()

    return make


@pytest.fixture
def x_BTD() -> Tensor:
    return torch.randn(2, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def stir():
    """Callable: fill every lora_B, which start at zero, so that adapters do something."""

    def fill(model: nn.Module, seed: int = 2) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                with torch.no_grad():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)

    return fill
