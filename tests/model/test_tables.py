"""Tables travel as one tensor and come apart again."""

import torch

from model.tables import Tables, sequence_tables


def test_owner_and_place_of_packed_elements_empty_sequences_included() -> None:
    cu, owner, place = sequence_tables([2, 0, 3])
    assert cu.tolist() == [0, 2, 2, 5]
    assert owner.tolist() == [0, 0, 2, 2, 2]
    assert place.tolist() == [0, 1, 0, 1, 2]


def test_joined_tables_come_apart_as_they_were() -> None:
    parts = [torch.arange(3), torch.arange(0), torch.arange(5) * 7]
    joined = Tables.join(parts).to("cpu")
    assert joined.flat.shape == (8,)
    assert all(torch.equal(a, b) for a, b in zip(joined.parts(), parts, strict=True))
