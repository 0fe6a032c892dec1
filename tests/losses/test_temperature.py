"""Fixed and learned temperature."""

import pytest
import torch

from losses.temperature import Temperature


def test_inverse_of_the_setting():
    assert float(Temperature(0.07)().detach()) == pytest.approx(1 / 0.07, rel=1e-6)


def test_only_a_learned_one_gets_a_gradient_but_both_are_saved_alike():
    fixed, learned = Temperature(0.07), Temperature(0.07, learned=True)
    assert [name for name, p in learned.named_parameters() if p.requires_grad] == ["log_inv_temperature"]
    assert not fixed().requires_grad
    assert list(fixed.state_dict()) == list(learned.state_dict()) == ["log_inv_temperature"]
    learned().backward()
    assert float(learned.log_inv_temperature.grad) == pytest.approx(1 / 0.07, rel=1e-6)


def test_never_above_100_and_free_to_come_back():
    """A clamp of the value alone has no gradient beyond the bound: the parameter would stay there for good."""
    temperature = Temperature(0.0101, learned=True)
    optimizer = torch.optim.SGD(temperature.parameters(), lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        (-temperature()).backward()  # asks for ever colder softmax
        optimizer.step()
    assert float(temperature().detach()) == pytest.approx(100.0, rel=1e-5)
    optimizer.zero_grad()
    temperature().backward()
    optimizer.step()
    assert float(temperature().detach()) < 99.0


@pytest.mark.parametrize("value", [0.0, -1.0, 0.005, float("nan")])
def test_too_cold_is_refused(value):
    with pytest.raises(ValueError, match="temperature is"):
        Temperature(value)
