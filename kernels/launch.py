"""Launching a Triton kernel again without working out again which compiled form of it serves.

At every ``kernel[grid](...)`` Triton looks at each argument (dtype, alignment, divisibility by 16, is it 1) and at
every global the kernel reads, to find the compiled form: as long, for the forty arguments of a scan, as a short
sequence takes on the GPU. Here the form is remembered by what decides it. A call whose numbers, dtypes or alignments
are new takes Triton's own way once.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

# Compiled forms and their constant arguments, by kernel, device and arguments. A new length is a new entry, so that
# changing lengths would fill memory; emptied at this size, about 10 MB, it fills again with what is in use.
_compiled: dict[Any, tuple[Any, tuple[Any, ...]]] = {}
MOST_ENTRIES = 4096
# How many parameters stand before a kernel's first number: each a tensor or None.
_pointers: dict[int, int] = {}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """``kernel[grid](*arguments, **constants)``, on the current device.

    Args:
        kernel: a function under ``triton.jit`` or ``gluon.jit``.
        grid: programs along one to three axes.
        arguments: for the kernel's first parameters, tensors or None, then numbers. The first is a tensor.
        constants: by name all other parameters, which are constexprs, and the compiler's options.
    """
    pointers = _pointers.get(id(kernel))
    if pointers is None:
        named = [i for i, argument in enumerate(arguments) if argument is None or isinstance(argument, Tensor)]
        pointers = _pointers[id(kernel)] = named[-1] + 1
    addresses = [a if a is None else a.data_ptr() for a in arguments[:pointers]]
    key = (
        id(kernel),
        arguments[0].get_device(),
        arguments[pointers:],
        tuple(constants.items()),
        *[a if a is None else a.dtype for a in arguments[:pointers]],
        *[a and a % 16 for a in addresses],
    )
    entry = _compiled.get(key)
    if entry is None:
        form = kernel[grid](*arguments, **constants)
        if form is not None:  # the interpreter compiles nothing
            if len(_compiled) >= MOST_ENTRIES:
                _compiled.clear()
            _compiled[key] = form, tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
        return
    form, values = entry
    three_axes = (*grid, 1, 1)
    # A number is taken as an address; a tensor Triton would ask for it, and the driver whether it is a GPU's.
    form[three_axes](*addresses, *arguments[pointers:], *values)
