"""Vision Mamba's bidirectional mixer, v2: Zhu et al., "Vision Mamba" (2024), arXiv 2401.09417."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from mambakit.kernels.inner import Direction, bimamba_inner
from mambakit.mixers.base import NonCausal
from mambakit.mixers.mamba1 import Mamba1


class VimMixer(NonCausal):
    """Two Mamba-1 in one, forwards and backwards, with their input, their gate and their output projection in common.

    With x, z = in_proj(input) of width D = expand * d_model, and own weights for each direction o:

        x_o = SiLU(conv_o(x));    delta_o, B_o, C_o = projections of x_o
        y_o = the selective scan of x_o in that direction (:class:`mambakit.mixers.Mamba1`)
        output = out_proj((y_forwards + y_backwards) / 2 * SiLU(z))

    Convolution and scan of the backward direction run from the last element to the first: nothing is flipped. The
    parameters carry the original's names, ``conv1d_b``, ``x_proj_b``, ``dt_proj_b``, ``A_b_log`` and ``D_b`` for the
    backward direction. Not causal: there is no state, and :meth:`step` is refused.

    Args:
        d_model: width of input and output.
        d_state: N, states a channel.
        d_conv: W, width of the convolutions, 2 to 4.
        expand: D / d_model.
        dt_rank: rank of the projections to delta; "auto" is ceil(d_model / 16).
        dt_min: smallest step delta at initialisation (drawn log-uniformly up to ``dt_max``).
        dt_max: largest step delta at initialisation.
        dt_init: "random" (uniform) or "constant" weights of the projections to delta.
        dt_scale: scale of those weights, in units of dt_rank ** -0.5.
        dt_init_floor: lower bound of the initial step.
        conv_bias: the convolutions have biases.
        bias: in_proj and out_proj have biases.
        divide_out: take the mean of the directions (the original's ``if_divide_out``); False takes their sum.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | Literal["auto"] = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: Literal["random", "constant"] = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        divide_out: bool = True,
    ) -> None:
        super().__init__()
        self.d_model = d_model
        self.divide_out = divide_out
        forwards, backwards = (
            Mamba1(
                d_model, d_state, d_conv, expand, dt_rank, dt_min, dt_max, dt_init, dt_scale, dt_init_floor,
                conv_bias, bias,
            )
            for _ in range(2)
        )  # fmt: skip
        self.in_proj, self.out_proj = forwards.in_proj, forwards.out_proj
        self.conv1d, self.conv1d_b = forwards.conv1d, backwards.conv1d
        self.x_proj, self.x_proj_b = forwards.x_proj, backwards.x_proj
        self.dt_proj, self.dt_proj_b = forwards.dt_proj, backwards.dt_proj
        self.A_log, self.A_b_log = forwards.A_log, backwards.A_log
        self.D, self.D_b = forwards.D, backwards.D

    def mix_all(self, x: Tensor, *, seq_idx: Tensor | None, lengths: Tensor | None) -> Tensor:
        return bimamba_inner(
            self.in_proj(x),
            direction(self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D),
            direction(self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b),
            self.out_proj.weight,
            self.out_proj.bias,
            scale=0.5 if self.divide_out else 1.0,
            seq_idx=seq_idx,
            lengths=lengths,
        )


def direction(conv1d: nn.Conv1d, x_proj: nn.Linear, dt_proj: nn.Linear, A_log: Tensor, D: Tensor) -> Direction:
    """What ``bimamba_inner`` takes of the modules that one direction has to itself."""
    return Direction(conv1d.weight, conv1d.bias, x_proj.weight, dt_proj.weight, dt_proj.bias, A_log, D)
