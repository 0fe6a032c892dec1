import gc
import os
from dataclasses import fields

import numpy as np
import pytest

from data.batches import Batch, collate
from data.slots import Slot, anonymous_file, private_copy, read_batch


@pytest.fixture
def descriptor():
    opened = anonymous_file("test")
    yield opened
    os.close(opened)


@pytest.fixture
def batch(clip, tokenize):
    clips = [clip("键", text="press the pound key", terms=("pound key",)), clip("1", text="", ignored=("press",))]
    return collate(clips, [np.arange(10, dtype=np.int16), np.arange(7, dtype=np.int16)], tokenize)


def assert_same(one: Batch, other: Batch) -> None:
    for field in fields(Batch):
        expected, found = getattr(one, field.name), getattr(other, field.name)
        np.testing.assert_array_equal(found, expected)
        assert type(found) is type(expected)
        if isinstance(found, np.ndarray):
            assert found.dtype == expected.dtype, field.name


def test_a_batch_written_on_one_side_is_read_on_the_other(descriptor, batch):
    writer, reader, released = Slot(descriptor), Slot(descriptor), []
    for _ in range(2):  # the second time over the first
        writer.begin()
        samples = writer.allocate(len(batch.pcm_S))
        samples[:] = batch.pcm_S
        layout = writer.put(batch)
        read = read_batch(reader.view(writer.capacity, lambda: released.append(1)), layout)
        assert_same(batch, read)
    kept = read.pcm_S[2:4]
    del read
    gc.collect()
    assert len(released) == 1, "an array over the slot is held"
    del kept
    gc.collect()
    assert len(released) == 2


def test_a_slot_grows_and_what_was_given_out_stays_good(descriptor):
    slot = Slot(descriptor)
    slot.begin()
    first = slot.allocate(100)
    first[:] = 7
    second = slot.allocate(1_000_000)
    second[:] = 9
    assert (first == 7).all()
    assert slot.capacity == os.fstat(descriptor).st_size > 2_000_000
    whole = np.frombuffer(Slot(descriptor).view(slot.capacity, lambda: None), dtype=np.int16)
    assert (whole[:100] == 7).all()


def test_memory_is_pinned_when_it_is_mapped_and_unpinned_before_it_goes(descriptor):
    told = []

    def pin(memory_U8):
        told.append(("pin", memory_U8.nbytes))
        return lambda: told.append(("unpin", memory_U8.nbytes))

    slot = Slot(os.dup(descriptor), pin)
    os.ftruncate(descriptor, 8192)
    for capacity in (4096, 4096, 8192):
        slot.view(capacity, lambda: None)
    slot.close()
    assert told == [("pin", 4096), ("unpin", 4096), ("pin", 8192), ("unpin", 8192)]


def test_a_copy_has_memory_of_its_own(batch):
    copy = private_copy(batch)
    assert_same(batch, copy)
    batch.pcm_S[:] = 0
    assert copy.pcm_S.any()
