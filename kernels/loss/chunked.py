"""The loss chunk by chunk of rows: logits, softmax, and their gradient, which takes the logits' place.

Letters: N rows (tokens), D channels, V vocabulary. At most a chunk of the (N, V) logits exists at any time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# The gradient of the weight is read and written once a chunk, so a chunk has rows enough to make that cheap; with a
# small vocabulary it has as many as the cache holds. On a GPU a chunk's product with the weight should also fill the
# device: half a gigabyte of logits.
CPU_ROWS, CPU_ELEMENTS = 256, 2**18
GPU_ROWS, GPU_ELEMENTS = 1024, 2**28


class Softmax(NamedTuple):
    """How rows of logits become losses and gradients.

    ``rows`` takes (logits, labels, ignore_index, label_smoothing, softcap, row_scale, gradients) and gives
    (losses, dlogits): see :func:`softmax_rows`. It wants the vocabulary padded to a multiple of ``multiple``; if that
    is more than 1, dlogits take the logits' memory, and zeros the padding's.
    """

    rows: Callable[[Tensor, Tensor, int, float, float | None, Tensor | None, bool], tuple[Tensor, Tensor]]
    multiple: int


def losses_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    row_scale: Tensor | None,
    gradients: bool,
    softmax: Softmax,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Losses (N,), and with ``gradients`` those of ``sum(row_scale * losses)`` (row_scale None: all ones).

    Returns losses in float32 (float64 for float64), dhidden (N, D) in hidden's dtype, dweight (V, D) and dbias (V,)
    in the losses' dtype. The matrix products are taken in hidden's dtype, on a CPU in float32 at least, since few
    CPUs multiply half precision any faster.
    """
    exact = torch.promote_types(hidden.dtype, torch.float32)
    compute = exact if hidden.device.type == "cpu" else hidden.dtype
    (rows, channels), vocabulary = hidden.shape, weight.shape[0]
    padded = -(-vocabulary // softmax.multiple) * softmax.multiple
    weight = _padded(weight, padded, compute)
    bias = None if bias is None else _padded(bias, padded, compute)
    losses = torch.empty(rows, dtype=exact, device=hidden.device)
    dhidden = dweight = dbias = None
    if gradients:
        dhidden = torch.empty(rows, channels, dtype=hidden.dtype, device=hidden.device)
        dweight = torch.empty(padded, channels, dtype=exact, device=hidden.device)
        dbias = None if bias is None else torch.zeros(padded, dtype=exact, device=hidden.device)
    step = _chunk_rows(hidden, vocabulary)
    for start in range(0, rows, step):
        chunk = slice(start, start + step)
        inputs = hidden[chunk].to(compute)
        logits = inputs @ weight.t() if bias is None else torch.addmm(bias, inputs, weight.t())
        scale = None if row_scale is None else row_scale[chunk]
        losses[chunk], dlogits = softmax.rows(
            logits[:, :vocabulary], labels[chunk], ignore_index, label_smoothing, softcap, scale, gradients
        )
        if dhidden is None or dweight is None:
            continue
        if padded > vocabulary:
            dlogits = logits
        if compute == hidden.dtype:
            torch.mm(dlogits, weight, out=dhidden[chunk])
        else:
            dhidden[chunk] = dlogits @ weight
        if compute == exact:
            dweight.addmm_(dlogits.t(), inputs, beta=0 if start == 0 else 1)
        elif start == 0:
            torch.mm(dlogits.t(), inputs, out_dtype=exact, out=dweight)
        else:
            torch.addmm(dweight, dlogits.t(), inputs, out_dtype=exact, out=dweight)
        if dbias is not None:
            dbias += dlogits.sum(dim=0, dtype=exact)
    dweight = None if dweight is None else dweight[:vocabulary]
    dbias = None if dbias is None else dbias[:vocabulary]
    return losses, dhidden, dweight, dbias


def _padded(tensor: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """``tensor`` in ``dtype``, with zeros up to ``size`` along axis 0."""
    if tensor.shape[0] == size:
        return tensor.to(dtype)
    out = torch.zeros(size, *tensor.shape[1:], dtype=dtype, device=tensor.device)
    out[: tensor.shape[0]] = tensor
    return out


def _chunk_rows(hidden: Tensor, vocabulary: int) -> int:
    """Rows of a chunk: as many as the limits allow, and about the same for every chunk."""
    if hidden.device.type == "cpu":
        return max(CPU_ROWS, CPU_ELEMENTS // vocabulary)
    most = max(GPU_ROWS, GPU_ELEMENTS // vocabulary)
    chunks = -(-hidden.shape[0] // most)
    even = -(-hidden.shape[0] // chunks)
    aligned = -(-even // 128) * 128  # whole tiles of the matrix product
    return aligned if aligned <= most else even


def softmax_rows(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    row_scale: Tensor | None,
    gradients: bool,
) -> tuple[Tensor, Tensor]:
    """Losses (n,) of logits (n, V), and with ``gradients`` the gradient of the logits in their dtype (else anything),
    which may take their memory.

    A label outside 0 .. V-1 that is not ``ignore_index`` gives NaN.
    """
    exact = torch.promote_types(logits.dtype, torch.float32)
    capped = logits.to(exact) if softcap is None else torch.tanh(logits.to(exact) / softcap) * softcap
    log_p = torch.log_softmax(capped, dim=-1)
    ignored = labels == ignore_index
    strange = ~ignored & ((labels < 0) | (labels >= logits.shape[1]))
    index = labels.masked_fill(ignored | strange, 0).unsqueeze(1)
    losses = log_p.gather(1, index).squeeze(1) * (label_smoothing - 1)
    if label_smoothing:
        losses -= label_smoothing * log_p.mean(-1)
    losses.masked_fill_(ignored, 0).masked_fill_(strange, torch.nan)
    if gradients:
        dlogits = log_p.exp_()
        if label_smoothing:
            dlogits -= label_smoothing / logits.shape[1]
        dlogits.scatter_add_(1, index, torch.full_like(index, label_smoothing - 1, dtype=exact))
        if softcap is not None:
            dlogits *= 1 - (capped / softcap).square_()
        if row_scale is not None:
            dlogits *= row_scale.unsqueeze(1)
        if logits.device.type != "cpu" or bool(ignored.any()):  # a GPU would have to be waited for
            dlogits.masked_fill_(ignored.unsqueeze(1), 0)
        return losses, dlogits.to(logits.dtype)
    return losses, logits
