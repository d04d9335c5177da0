"""One decoding step of a Mamba-1 language model, written out on fixed buffers in a few launches a layer.

``FusedStep`` computes what :meth:`LanguageModel.step` computes, rounded where that rounds. Few rows are bound by
launches and by reading the weights, so whole runs of operators become one kernel each, four to a layer:

1. norm, in_proj, convolution and SiLU (the program that has a channel's new input also has its window);
2. x_proj;
3. dt_proj, softplus, the state's step, the skip and the gate;
4. out_proj, added to the residual stream in place.

Many rows are bound by matrix products, which cuBLAS does best: norm with the residual's addition, in_proj, convolution,
x_proj, the third kernel above, out_proj.

Letters: B batch, M d_model, D inner channels, N state size, W convolution width, P rank of delta, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambakit.backbone import BackboneState, RMSNorm
from mambakit.embeddings import TokenEmbedding
from mambakit.kernels import causal_conv1d_update, dispatch, rms_norm
from mambakit.kernels.decode import MAX_COLUMNS
from mambakit.mixers import Mamba1
from mambakit.models import LanguageModel

VECTOR_ROWS = 4  # up to here each row is multiplied by itself while the weights pass; beyond, a matrix product


class LayerWeights(NamedTuple):
    """What one layer reads; the matrices (in_proj, x_proj, dt_proj, out_proj) in the computing dtype."""

    norm: Tensor
    eps: float
    in_proj: Tensor
    in_bias: Tensor | None
    conv: Tensor
    conv_bias: Tensor | None
    x_proj: Tensor
    dt_proj: Tensor
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    out_proj: Tensor
    out_bias: Tensor | None


def obstacle(model: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why ``FusedStep`` cannot stand for ``model.step``, or None when it can.

    Args:
        model: any model; one of ours, unwrapped, with plain layers and without hooks, is taken.
        device: where the ids lie.
        dtype: computing dtype (autocast's, or the parameters').
    """
    if type(model) is not LanguageModel:
        return f"{type(model).__name__} is not a LanguageModel"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernels do not compute in {dtype}"
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{type(module).__name__} has forward hooks, which a fused step would not call"
    if type(model.backbone.embedding) is not TokenEmbedding:
        return "the embedding is no TokenEmbedding"
    if any(layer.mlp is not None for layer in model.backbone.layers):
        return "the layers have MLPs"
    mixers: list[Any] = [layer.mixer for layer in model.backbone.layers]
    for mixer in mixers:
        if type(mixer) is not Mamba1:
            return f"{type(mixer).__name__} is not Mamba1"
        if mixer.has_norms:
            return "Mamba1 norms B, C and dt"
        if any(
            type(linear) is not nn.Linear for linear in (mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj)
        ):
            return "a projection is not a plain nn.Linear"
        if max(mixer.d_model, mixer.d_inner) > MAX_COLUMNS:
            return f"{type(mixer).__name__} is wider than {MAX_COLUMNS}"
        if (mixer.d_inner, mixer.d_state, mixer.dt_rank) != (mixers[0].d_inner, mixers[0].d_state, mixers[0].dt_rank):
            return "the layers have different sizes"
    for name, parameter in model.named_parameters():
        if parameter.device != device or parameter.dtype == torch.float64 or not parameter.is_contiguous():
            return f"{name} is float64, not contiguous, or not on {device}"
    chosen = dispatch.choose("generate", "auto", torch.empty((), dtype=dtype, device=device))
    return None if chosen.backend == "triton" else chosen.why


class FusedStep:
    """logits (B, V) of ``ids`` (B,) int64, and the state moved on, all in buffers that stay where they are.

    The model's parameters are read where they lie, so a change of their values is seen at the next step. Matrices of
    another dtype than ``dtype`` are copied, and :meth:`refresh` copies them again. The object holds parameters but not
    the model, whose life it therefore does not prolong.

    Args:
        model: one for which :func:`obstacle` is None (on the CPU, in tests, Triton's interpreter runs the kernels).
        batch: B.
        dtype: what the matrices compute in.
    """

    def __init__(self, model: LanguageModel, batch: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.copies: list[Tensor] = []
        self.sources: list[Tensor] = []
        backbone = model.backbone
        self.embedding: Tensor = backbone.embedding.weight  # type: ignore[union-attr, assignment]
        self.layers = [self._layer(layer.norm, layer.mixer) for layer in backbone.layers]  # type: ignore[arg-type]
        self.norm_f, self.eps_f = backbone.norm_f.weight, backbone.norm_f.eps
        self.head = self._matrix(model.lm_head.weight)

        def buffer(width: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(batch, width, dtype=dtype, device=self.head.device)

        self.state = model.init_state(batch, device=self.head.device)
        self.ids = torch.zeros(batch, dtype=torch.int64, device=self.head.device)
        # Rows begin at multiples of 16 numbers, which cuBLAS and 16-byte loads both need.
        self.logits = buffer(-(-len(self.head) // 16) * 16)[:, : len(self.head)]
        self.residual = buffer(backbone.d_model, torch.float32)
        widest = self.layers[0]
        self.xz, self.selected = buffer(len(widest.in_proj)), buffer(len(widest.x_proj))
        self.gated = buffer(len(widest.D))

    def __call__(self) -> Tensor:
        """Take the step. The logits lie in the same place every time."""
        if len(self.ids) <= VECTOR_ROWS:
            self._few_rows()
        else:
            self._many_rows()
        return self.logits

    def refresh(self) -> None:
        """Read again the parameters of which the step has copies."""
        if self.copies:
            torch._foreach_copy_(self.copies, self.sources)

    def load(self, state: BackboneState) -> None:
        """Continue from ``state``, of which the values are copied."""
        torch._foreach_copy_(self.state.tensors(), state.tensors())

    def _few_rows(self) -> None:
        from mambakit.kernels.decode.triton_launch import embed, linear_step, state_step

        embed(self.ids, self.embedding, self.residual)
        x, z = self.xz.chunk(2, dim=-1)
        for w, state in zip(self.layers, self.state.layers, strict=True):
            conv = (state.conv, w.conv, w.conv_bias)
            linear_step(self.residual, w.in_proj, w.in_bias, self.xz, norm_weight=w.norm, eps=w.eps, conv=conv)
            linear_step(x, w.x_proj, None, self.selected)
            state_step(state.ssm, x, z, self.selected, w.dt_proj, w.dt_bias, w.A_log, w.D, self.gated)
            linear_step(self.gated, w.out_proj, w.out_bias, self.residual, add=True)
        linear_step(self.residual, self.head, None, self.logits, norm_weight=self.norm_f, eps=self.eps_f)

    def _many_rows(self) -> None:
        from mambakit.kernels.decode.triton_launch import state_step

        hidden, residual = F.embedding(self.ids, self.embedding), None
        for w, state in zip(self.layers, self.state.layers, strict=True):
            hidden, residual = rms_norm(
                hidden, w.norm, residual=residual, eps=w.eps, prenorm=True, residual_in_fp32=True
            )
            x, z = F.linear(hidden.to(self.dtype), w.in_proj, w.in_bias).chunk(2, dim=-1)
            x = causal_conv1d_update(x, state.conv, w.conv, w.conv_bias, "silu")
            selected = F.linear(x, w.x_proj)
            state_step(state.ssm, x, z, selected, w.dt_proj, w.dt_bias, w.A_log, w.D, self.gated)
            hidden = F.linear(self.gated, w.out_proj, w.out_bias)
        hidden = rms_norm(hidden, self.norm_f, residual=residual, eps=self.eps_f).to(self.dtype)
        # cuBLAS takes many times as long where the vocabulary is no multiple of 8, so the odd ones go by themselves.
        even = len(self.head) // 8 * 8
        for part in (slice(0, even), slice(even, None)):
            torch.mm(hidden, self.head[part].t(), out=self.logits[:, part])

    def _layer(self, norm: RMSNorm, mixer: Mamba1) -> LayerWeights:
        return LayerWeights(
            norm=norm.weight,
            eps=norm.eps,
            in_proj=self._matrix(mixer.in_proj.weight),
            in_bias=None if mixer.in_proj.bias is None else self._matrix(mixer.in_proj.bias),
            conv=mixer.conv1d.weight.squeeze(1),
            conv_bias=mixer.conv1d.bias,
            x_proj=self._matrix(mixer.x_proj.weight),
            dt_proj=self._matrix(mixer.dt_proj.weight),
            dt_bias=mixer.dt_proj.bias,
            A_log=mixer.A_log,
            D=mixer.D,
            out_proj=self._matrix(mixer.out_proj.weight),
            out_bias=None if mixer.out_proj.bias is None else self._matrix(mixer.out_proj.bias),
        )

    def _matrix(self, weight: Tensor) -> Tensor:
        if weight.dtype == self.dtype:
            return weight
        self.sources.append(weight)
        self.copies.append(weight.to(self.dtype))
        return self.copies[-1]
