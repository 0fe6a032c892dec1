import pytest
import torch
import torch.distributed as dist

from bench.traffic import Payload, recorded
from distributed import collectives


def test_bytes_that_rings_send() -> None:
    payload = Payload()
    payload.num_bytes.update(all_gather=10, reduce_scatter=20, all_reduce=80, broadcast=7)
    assert payload.sent(8) == 7 * 30 + 2 * 7 * 80 / 8 + 7
    assert payload.sent(1) == 7


def test_calls_are_counted_and_made_and_the_functions_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for module, name in (
        (dist, "all_reduce"), (dist, "broadcast"), (collectives, "_torch_all_gather"),
        (collectives, "_torch_reduce_scatter"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, lambda *args, name=name, **more: made.append(name))
    before = dist.all_reduce, collectives._torch_all_gather
    with pytest.raises(KeyError), recorded() as traffic:  # noqa: PT012
        collectives.all_reduce(torch.zeros(3, dtype=torch.float64))
        collectives._all_gather(torch.zeros(8), torch.zeros(4))
        collectives._all_gather(torch.zeros(8, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))
        collectives._reduce_scatter(torch.zeros(5), torch.zeros(10))
        collectives._broadcast_from_0(torch.zeros(2, dtype=torch.int64))
        raise KeyError
    assert (dist.all_reduce, collectives._torch_all_gather) == before
    assert made == ["all_reduce", "_torch_all_gather", "_torch_all_gather", "_torch_reduce_scatter", "broadcast"]
    assert traffic.floats.num_bytes == {"all_reduce": 24, "all_gather": 16, "reduce_scatter": 20}
    assert traffic.ids.num_bytes == {"all_gather": 32, "broadcast": 16}
    assert (traffic.num_calls, traffic.device_s) == (5, 0.0)
    assert traffic.host_s > 0
