"""Batches in memory that two processes share: written once by a worker, read in place by the trainer.

A slot is an anonymous memory file (memfd). It has no name, so nothing can be left behind: the kernel frees it with the
last process that holds it, however that process ends. The worker inherits the descriptor, maps it, lets it grow when a
batch is larger than all before, and says in its answer how large it is and where each array lies.

    slot    pcm_S ......... | token_ids_P .. | clip_index_B . | ...     each array begins at a multiple of 64 bytes
"""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np

from data.batches import Batch

ALIGN = 64  # bytes
GROWTH = 1.25  # beyond what is needed, so that a slot does not grow at every batch
KINDS = {field.name: str(field.type) for field in fields(Batch)}

Pin = Callable[[np.ndarray], Callable[[], None]]
Layout = dict[str, Any]  # of JSON


def anonymous_file(name: str) -> int:
    """A descriptor of an empty file that has no name and lives in memory where the system can do that."""
    if sys.platform == "linux":
        return os.memfd_create(f"earmark-{name}")
    descriptor, path = tempfile.mkstemp(prefix="earmark-")
    os.unlink(path)
    return descriptor


class Slot:
    """One shared piece of memory, of which both sides have the descriptor."""

    def __init__(self, descriptor: int, pin: Pin | None = None) -> None:
        self.descriptor = descriptor
        self._pin, self._unpin = pin, lambda: None
        self.capacity = 0
        self._mapped: mmap.mmap | None = None
        self._used = 0

    # ------------------------------------------------------------------------------------------------ the worker's side

    def begin(self) -> None:
        self._used = 0

    def allocate(self, num_values: int, dtype: type | np.dtype = np.int16) -> np.ndarray:
        """An array to fill. OSError when there is no memory left."""
        kind = np.dtype(dtype)
        start = -(-self._used // ALIGN) * ALIGN
        stop = start + num_values * kind.itemsize
        if stop > self.capacity or self._mapped is None:
            # Arrays that were given out stay good: they hold the former map of the same memory.
            self.capacity = -(-int(stop * GROWTH + 1) // mmap.PAGESIZE) * mmap.PAGESIZE
            os.ftruncate(self.descriptor, self.capacity)
            self._mapped = mmap.mmap(self.descriptor, self.capacity)
        self._used = stop
        return np.frombuffer(self._mapped, dtype=kind, count=num_values, offset=start)

    def store(self, values: np.ndarray) -> tuple[int, int]:
        """Copy an array into the slot: (its first byte, how many values)."""
        array = self.allocate(len(values), values.dtype)
        array[:] = values
        return self._used - array.nbytes, len(values)

    def put(self, batch: Batch) -> Layout:
        """Write what is not in the slot yet (the samples are), and say where everything is."""
        layout: Layout = {}
        for name, kind in KINDS.items():
            value = getattr(batch, name)
            if name == "pcm_S":
                layout[name] = ["int16", 0, len(value)]
            elif kind == "np.ndarray" or kind == "list[int]":
                values = np.asarray(value, dtype=None if kind == "np.ndarray" else np.int64)
                layout[name] = [values.dtype.name, *self.store(values)]
            else:
                layout[name] = value
        return layout

    # ----------------------------------------------------------------------------------------------- the trainer's side

    def view(self, capacity: int, on_release: Callable[[], None]) -> memoryview:
        """The slot's bytes. `on_release` runs when the last array made of them is gone."""
        if capacity != self.capacity or self._mapped is None:
            self._unpin()  # nothing refers to the former map: a slot is filled again only when all its arrays are gone
            self._mapped, self.capacity = mmap.mmap(self.descriptor, capacity), capacity
            if self._pin is not None:
                self._unpin = self._pin(np.frombuffer(self._mapped, dtype=np.uint8))
        # The arrays made of the view keep this one alive, which a memoryview of the map alone would not tell us.
        owner = np.frombuffer(self._mapped, dtype=np.uint8)
        weakref.finalize(owner, on_release).atexit = False
        return memoryview(owner)  # type: ignore[arg-type]

    def close(self) -> None:
        self._unpin()
        self._unpin = lambda: None
        os.close(self.descriptor)


def read_batch(whole: memoryview, layout: Layout) -> Batch:
    """The batch as arrays over the slot's memory; nothing is copied but lists of host integers and strings."""
    found: dict[str, Any] = {}
    for name, kind in KINDS.items():
        entry = layout[name]
        if kind in ("np.ndarray", "list[int]"):
            dtype, start, count = entry
            values = np.frombuffer(whole, dtype=dtype, count=count, offset=start)
            found[name] = values.tolist() if kind == "list[int]" else values
        else:
            found[name] = entry
    return Batch(**found)


def private_copy(batch: Batch) -> Batch:
    """The same batch in memory of its own."""
    values: dict[str, Any] = {name: getattr(batch, name) for name in KINDS}
    copied: dict[str, Any] = {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in values.items()}
    return Batch(**copied)
