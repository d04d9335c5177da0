"""Whether a length fits into memory, told before anything of that length is computed."""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def peak_bytes(module: ModuleT, work: Callable[[ModuleT], object]) -> int:
    """The most memory that ``work(module)`` takes at once beyond the module's own tensors, in bytes, computing nothing.

    ``work`` is given a copy of the module in which every tensor has a shape, a dtype and a device but no numbers
    (torch's fake tensors, as ``torch.compile`` traces with), and what it makes of them, with ``torch.zeros`` for
    example, has none either. The storages that its operations give are counted while they live: what autograd keeps
    for the backward, gradients, a state. So a length of a million costs a tenth of a second and no memory, and the
    module, its gradients, buffers and metrics and all random generators stay as they are. Where ``work`` asks for the
    value of a tensor, it reads 0.

    How good it is: what an operator of ours holds while it runs, and then lets go, is not seen. On a CPU the scans hold
    some copies of one layer's tensors meanwhile, so that a training step of two or more layers of Mamba-1 takes 1.3 to
    1.8 times what is told, one of a single layer up to 2.5 times; attention, S4D and Hyena are within a tenth. On a GPU
    (NVIDIA H200, torch 2.11.0, triton 3.6.0, commit 346f389, 2026-11-23) a step of four layers of Mamba-1 or Mamba-2 of
    width 128 over 8 sequences of 4,096 takes 1.3 to 1.5 times what is told, and 1.6 to 2.2 times where each layer is
    computed again in the backward: as many bytes more in both. Reading a sequence of up to 1,048,576 in pieces takes
    1.5 to 1.6 times what is told. What an allocator rounds up, the workspaces of libraries and the copies of gradients
    that several processes exchange come on top as well. So it is a lower bound: what does not fit by it does not fit.

    Args:
        module: any module that can be copied; of a LightningModule the copy has no trainer.
        work: what is to be done, with gradients where they are enabled.

    Raises:
        Exception: whatever a module raises whose course depends on its numbers in another way, such as by
            the number of elements that meet a condition.
    """
    # Importing this takes a second where nothing else of torch.compile has been imported.
    from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

    mode = FakeTensorMode()
    with torch.inference_mode(False):  # in it, operations made of others would hide what these give
        with FakeCopyMode(mode):
            imagined = copy.deepcopy(module)
        # In threads of its own, as on a GPU, the backward would count beside us.
        with torch.autograd.set_multithreading_enabled(False), mode, _Living() as living:
            work(imagined)
    return living.peak


class _Living(TorchDispatchMode):
    """Counts the bytes of the storages that operations have given and that are still in use."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0.0 if args[0].is_floating_point() else 0
        out = func(*args, **(kwargs or {}))
        for one in tree_leaves(out):
            if isinstance(one, Tensor):
                self._see(one.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata  # two tensors of one storage must not count twice
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += self._sizes[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def optimizer_bytes(module: nn.Module) -> int:
    """What AdamW keeps: two moments of every parameter that is trained."""
    return 2 * sum(one.numel() * one.element_size() for one in module.parameters() if one.requires_grad)


def available_bytes(device: torch.device) -> int:
    """What tensors can still take on a device: free memory and what torch's allocator holds unused.

    On a CPU what the system counts as available (Linux), and else all of its memory.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_fits(needed: int, device: torch.device, what: str, mend: str) -> None:
    """Raise ValueError where ``needed`` bytes are more than there are on a device.

    Args:
        needed: of :func:`peak_bytes`, with what comes on top.
        device: where.
        what: is to be done, for the message.
        mend: how to need less.
    """
    there = available_bytes(device)
    if needed > there:
        raise ValueError(
            f"{what} needs at least {needed / 2**30:,.1f} GiB of memory and {device} has {there / 2**30:,.1f} GiB "
            f"left; {mend}"
        )
