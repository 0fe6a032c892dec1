"""What a graph keeps alive: every storage that an operation filled, and whether it is still there."""

import gc
import math

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Storages(TorchDispatchMode):
    """Every storage that an operation filled with floating-point numbers: what of it is still alive, and its shape."""

    def __init__(self, tower):
        super().__init__()
        self.given = {StorageWeakRef(parameter.untyped_storage()) for parameter in tower.parameters()}
        self.shapes, self.num_bytes = {}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                storage = StorageWeakRef(x.untyped_storage())
                self.shapes.setdefault(storage, tuple(x.shape))
                self.num_bytes.setdefault(storage, x.untyped_storage().nbytes())
        return out

    def alive(self):
        return [self.shapes[storage] for storage in self._of_operations()]

    def bytes_alive(self):
        return sum(self.num_bytes[storage] for storage in self._of_operations())

    def _of_operations(self):
        return [storage for storage in self.shapes if storage not in self.given and not storage.expired()]


def wide_and_kept(tower, run, least):
    """Shapes of at least this many numbers that a graph keeps alive, parameters and inputs apart, sorted."""
    with Storages(tower) as storages:
        out = run()
    graph = out.grad_fn
    del out
    gc.collect()
    wide = sorted(shape for shape in storages.alive() if math.prod(shape) >= least)
    assert graph is not None
    return wide


def bytes_kept(tower, run):
    """Bytes of floating-point storages that a graph keeps alive, parameters and inputs apart; on a GPU all that it does
    not give back, as the allocator counts it."""
    if next(tower.parameters()).is_cuda:
        return _bytes_allocated(run)
    with Storages(tower) as storages:
        out = run()
    graph = out.grad_fn
    del out
    gc.collect()
    assert graph is not None
    return storages.bytes_alive()


def _bytes_allocated(run):
    run()  # the libraries' workspaces
    gc.collect()
    before = torch.cuda.memory_allocated()
    graph = run().grad_fn
    gc.collect()
    assert graph is not None
    return torch.cuda.memory_allocated() - before
