"""The softmax temperature, fixed or learned."""

import math

import torch
from torch import Tensor, nn

from losses.settings import MIN_TEMPERATURE


class Temperature(nn.Module):
    """Holds log(1/tau) as the fp32 scalar parameter `log_inv_temperature` (CLIP, Radford et al. 2021, section 2.5).

    Fixed and learned temperatures have the same state dict; only `requires_grad` differs. Keep it out of weight decay:
    decay would pull 1/tau towards 1.
    """

    def __init__(self, temperature: float = 0.07, learned: bool = False) -> None:
        super().__init__()
        if not temperature >= MIN_TEMPERATURE:
            raise ValueError(f"temperature is {temperature}; allowed: {MIN_TEMPERATURE} or above")
        self.log_inv_temperature = nn.Parameter(torch.tensor(-math.log(temperature)), requires_grad=learned)

    def forward(self) -> Tensor:
        """1/tau, scalar; never above 100."""
        # The parameter itself is pulled back, as clamping only the result would zero its gradient and pin it there.
        with torch.no_grad():
            self.log_inv_temperature.clamp_(max=-math.log(MIN_TEMPERATURE))
        return self.log_inv_temperature.exp()
