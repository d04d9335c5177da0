"""What works on each element by itself between two mixers: MLP, SwiGLU, and a mixture of experts.

Letters: B batch, L length, D d_model, F hidden width, E experts, K experts an element.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambakit.kernels.grouped import grouped_linear
from mambakit.spelling import did_you_mean

MLPName = Literal["mlp", "swiglu", "moe"]


class MLP(nn.Module):
    """y = fc2(gelu(fc1(x))): (..., D) to (..., D), the Transformer's own.

    Args:
        d_model: D, width of input and output.
        d_hidden: F, width between; 4 D by default.
        bias: both layers have biases.
    """

    def __init__(self, d_model: int, d_hidden: int | None = None, bias: bool = True) -> None:
        super().__init__()
        d_hidden = 4 * d_model if d_hidden is None else d_hidden
        self.fc1 = nn.Linear(d_model, d_hidden, bias=bias)
        self.fc2 = nn.Linear(d_hidden, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """u, g = fc1(x); y = fc2(u * SiLU(g)): (..., D) to (..., D) (Shazeer 2020, arXiv 2002.05202).

    Parameters carry the names and layouts of mamba_ssm's ``GatedMLP``.

    Args:
        d_model: D, width of input and output.
        d_hidden: F, width of u and of g; 8 D / 3 rounded up to a multiple of 128 by default.
        bias: both layers have biases.
    """

    def __init__(self, d_model: int, d_hidden: int | None = None, bias: bool = False) -> None:
        super().__init__()
        d_hidden = swiglu_width(d_model) if d_hidden is None else d_hidden
        self.fc1 = nn.Linear(d_model, 2 * d_hidden, bias=bias)
        self.fc2 = nn.Linear(d_hidden, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        u, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(u * F.silu(gate))


def swiglu_width(d_model: int) -> int:
    """8 D / 3 rounded up to a multiple of 128: as many parameters as an MLP of width 4 D."""
    return -(-8 * d_model // 384) * 128


class Experts(nn.Module):
    """E SwiGLUs without biases, their matrices stacked: ``fc1`` (E, 2F, D), ``fc2`` (E, D, F)."""

    def __init__(self, n_experts: int, d_model: int, d_hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Parameter(torch.empty(n_experts, 2 * d_hidden, d_model))
        self.fc2 = nn.Parameter(torch.empty(n_experts, d_model, d_hidden))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, scale: float = 1.0) -> None:
        """Draw each matrix as ``nn.Linear`` draws its own, fc2 times ``scale``."""
        for weight, factor in ((self.fc1, 1.0), (self.fc2, scale)):
            bound = factor * weight.shape[-1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """x (T, D), the first ``counts[0]`` rows for expert 0 and so on, to (T, D)."""
        u, gate = grouped_linear(x, self.fc1, counts).chunk(2, dim=-1)
        return grouped_linear(u * F.silu(gate), self.fc2, counts)


class MixtureOfExperts(nn.Module):
    """Each element goes to K of E SwiGLUs (Shazeer et al. 2017, arXiv 1701.06538; Jamba, arXiv 2403.19887).

    With p = softmax(router(x)), float32 whatever x is, and S the K largest of p:

        y = sum_{e in S} p_e expert_e(x),    balance = E sum_e f_e mean(p_e)

    f_e is the share of all choices that fell on expert e, the mean is over elements. ``balance`` (Fedus et al. 2021,
    arXiv 2101.03961) is 1 where every expert is chosen and weighed alike, and up to E / K where the router always
    picks the same; its gradient, through p, spreads the choices. It is returned, never stored. No element is
    dropped: an element's output does not depend on what else is in the batch. The elements are sorted by expert, so
    that the cost is that of the K experts chosen and the shapes do not depend on the choice (``torch.compile``).

    Args:
        d_model: D, width of input and output.
        n_experts: E.
        top_k: K.
        d_hidden: F of each expert, as of :class:`SwiGLU`.
        renormalize: divide the K weights by their sum (Mixtral); by default they are used as they are (Jamba).

    Raises:
        ValueError: ``top_k`` outside 1..n_experts.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int = 8,
        top_k: int = 2,
        d_hidden: int | None = None,
        renormalize: bool = False,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= n_experts:
            raise ValueError(f"MixtureOfExperts: top_k={top_k}, expected 1 to n_experts={n_experts}")
        self.n_experts = n_experts
        self.top_k = top_k
        self.renormalize = renormalize
        self.router = nn.Linear(d_model, n_experts, bias=False)
        self.experts = Experts(n_experts, d_model, swiglu_width(d_model) if d_hidden is None else d_hidden)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Work on x (..., D).

        Args:
            x: (..., D); (B, L, D) where ``lengths`` is given.
            lengths: (B,); elements of row b from ``lengths[b]`` on are padding, and do not count in the balance.

        Returns:
            y (..., D) and the balance, a float32 (or wider) scalar.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            p = F.linear(x.to(wide), self.router.weight.to(wide)).softmax(dim=-1)
        weights, chosen = p.topk(self.top_k, dim=-1)
        picks = (chosen.unsqueeze(-1) == torch.arange(self.n_experts, device=x.device)).sum(dim=-2)
        balance = self._balance(p, picks, lengths)
        if self.renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        order = chosen.flatten().argsort(stable=True)
        rows = x.flatten(0, -2)[order // self.top_k]
        y = self.experts(rows, picks.flatten(0, -2).sum(0))[order.argsort()].view(*chosen.shape, -1)
        out = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        return (y.to(wide) * weights.unsqueeze(-1)).sum(dim=-2).to(out), balance

    def _balance(self, p: Tensor, picks: Tensor, lengths: Tensor | None) -> Tensor:
        """E sum_e f_e mean(p_e) of p and picks (..., E), 1 at the chosen, over the elements that are no padding."""
        share = picks.to(p.dtype) / self.top_k
        if lengths is None:
            share, mean = share.flatten(0, -2).mean(0), p.flatten(0, -2).mean(0)
        else:
            real = (torch.arange(p.shape[1], device=p.device) < lengths.unsqueeze(1)).unsqueeze(-1).to(p.dtype)
            count = real.sum().clamp(min=1)
            share, mean = (share * real).sum((0, 1)) / count, (p * real).sum((0, 1)) / count
        return self.n_experts * (share * mean).sum()


def mlp_factory(mlp: str | Callable[[int], nn.Module]) -> Callable[[int], nn.Module]:
    """The callable, from d_model to a module, that a name, class or callable stands for.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor something callable.
    """
    homes: dict[str, Any] = {"mlp": MLP, "swiglu": SwiGLU, "moe": MixtureOfExperts}
    if isinstance(mlp, str):
        if mlp not in homes:
            raise ValueError(
                f"mlp={mlp!r} is unknown{did_you_mean(mlp, homes)}; expected one of {', '.join(homes)}, or a class"
            )
        return homes[mlp]
    if not callable(mlp):
        raise TypeError(f"mlp is a {type(mlp).__name__}; expected a name, a class or a callable taking d_model")
    return mlp
