"""Bidirectional and VimMixer beside their formulas with flips, written here in plain PyTorch, in float64."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambakit import Backbone
from mambakit.kernels.testing import assert_close, random_tensor
from mambakit.mixers import S4D, Attention, Bidirectional, Mamba1, Mamba2, VimMixer
from mambakit.models import LanguageModel
from mambakit.optim import parameter_groups

OWN = ("conv1d.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight", "dt_proj.bias", "A_log", "D")
VIM_BACKWARDS = ("conv1d_b.weight", "conv1d_b.bias", "x_proj_b.weight", "dt_proj_b.weight", "dt_proj_b.bias")
VIM_BACKWARDS = (*VIM_BACKWARDS, "A_b_log", "D_b")


def plain_direction(xz: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """One direction of the block between its projections, gated: convolution, projections, a loop over time."""
    x, z = xz.chunk(2, dim=-1)
    kernel = weights["conv1d.weight"]
    x = F.pad(x.transpose(1, 2), (kernel.shape[-1] - 1, 0))
    x = F.silu(F.conv1d(x, kernel, weights.get("conv1d.bias"), groups=kernel.shape[0])).transpose(1, 2)
    A = -weights["A_log"].exp()
    rank, states = weights["dt_proj.weight"].shape[1], A.shape[1]
    dt, B, C = (x @ weights["x_proj.weight"].T).split([rank, states, states], dim=-1)
    delta = F.softplus(dt @ weights["dt_proj.weight"].T + weights["dt_proj.bias"])
    h, outputs = torch.zeros(x.shape[0], *A.shape, dtype=x.dtype), []
    for t in range(x.shape[1]):
        h = h * (delta[:, t, :, None] * A).exp() + (delta[:, t] * x[:, t]).unsqueeze(-1) * B[:, t, None]
        outputs.append((h * C[:, t, None]).sum(-1) + weights["D"] * x[:, t])
    return torch.stack(outputs, dim=1) * F.silu(z)


def plain_mamba(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    xz = F.linear(x, weights["in_proj.weight"], weights.get("in_proj.bias"))
    return F.linear(plain_direction(xz, weights), weights["out_proj.weight"], weights.get("out_proj.bias"))


def plain_vim(x: Tensor, weights: dict[str, Tensor], divisor: float) -> Tensor:
    """Zhu et al., as the original's v2 does it: flip xz, run, flip back, add, divide, project."""
    backwards = {name: weights[own] for name, own in zip(OWN, VIM_BACKWARDS, strict=True) if own in weights}
    xz = F.linear(x, weights["in_proj.weight"], weights.get("in_proj.bias"))
    y = plain_direction(xz, weights) + plain_direction(xz.flip(1), backwards).flip(1)
    return F.linear(y / divisor, weights["out_proj.weight"], weights.get("out_proj.bias"))


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def livened(module: nn.Module) -> Any:
    """In float64, with steps that remember and forget, and no parameter at a special value."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
            if "dt_proj" in name and name.endswith("bias"):
                parameter.add_(3.0)
    return module.double()


def compare_with_gradients(name: str, mixer: nn.Module, plain: Any, x: Tensor) -> None:
    """Outputs, and the gradients of the input and of every parameter."""
    leaf = x.clone().requires_grad_()
    weights = {key: value.requires_grad_() for key, value in weights_of(mixer).items()}
    want, got = plain(leaf, weights), mixer(x.requires_grad_())
    assert_close(name, got, want, 1e-10)
    factor = random_tensor(*got.shape, seed=9, dtype=torch.float64)
    wanted = torch.autograd.grad((want * factor).sum(), [leaf, *weights.values()])
    found = torch.autograd.grad((got * factor).sum(), [x, *mixer.parameters()])
    for key, one, other in zip(["x", *weights], found, wanted, strict=True):
        assert_close(f"{name}, gradient of {key}", one, other, 1e-9)


@pytest.mark.parametrize("options", [{}, {"divide_out": False, "bias": True}, {"conv_bias": False, "d_conv": 2}])
def test_vim_equals_its_formula(options: dict[str, Any]) -> None:
    mixer = livened(VimMixer(6, d_state=3, **options))
    divisor = 2.0 if options.get("divide_out", True) else 1.0
    x = random_tensor(2, 11, 6, seed=1, dtype=torch.float64)
    compare_with_gradients("vim", mixer, partial(plain_vim, divisor=divisor), x)


def test_vim_has_the_originals_names() -> None:
    shared = {"in_proj.weight", "out_proj.weight"}
    assert set(VimMixer(8).state_dict()) == shared | set(OWN) | set(VIM_BACKWARDS)


def test_vim_spares_what_decides_the_memory() -> None:
    """Trap 11: both A_log are matrices, and neither is decayed; the initial steps of both directions are marked."""
    model = Backbone(8, 1, mixer="vim")
    spared = {n for group in parameter_groups(model, 0.1) if group["weight_decay"] == 0 for n in group["names"]}
    decayed = {n for group in parameter_groups(model, 0.1) if group["weight_decay"] == 0.1 for n in group["names"]}
    assert {f"layers.0.mixer.{n}" for n in ("A_log", "A_b_log", "D", "D_b", "dt_proj_b.bias")} <= spared
    assert {f"layers.0.mixer.{n}" for n in ("x_proj_b.weight", "dt_proj_b.weight", "conv1d_b.weight")} <= decayed
    mixer: Any = model.layers[0].mixer
    assert mixer.dt_proj.bias._no_reinit and mixer.dt_proj_b.bias._no_reinit
    assert not torch.equal(mixer.dt_proj.bias, mixer.dt_proj_b.bias)


@pytest.mark.parametrize("strategy", ["add", "multiply"])
@pytest.mark.parametrize("tie", ["none", "projections", "all"])
@pytest.mark.parametrize("bias", [False, True])
def test_bidirectional_equals_its_formula(strategy: str, tie: str, bias: bool) -> None:
    make = partial(Mamba1, d_state=3, bias=bias)
    mixer = livened(Bidirectional(6, make, strategy=strategy, tie=tie))  # type: ignore[arg-type]

    def plain(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
        parts = {part: {} for part in ("mamba_fwd", "mamba_rev")}  # type: ignore[var-annotated]
        for name, value in weights.items():
            part, own = name.split(".", 1)
            parts[part][own] = value
        forwards, backwards = parts["mamba_fwd"], {**parts["mamba_fwd"], **parts["mamba_rev"]}
        y, back = plain_mamba(x, forwards), plain_mamba(x.flip(1), backwards).flip(1)
        return y + back if strategy == "add" else y * back

    x = random_tensor(2, 9, 6, seed=2, dtype=torch.float64)
    compare_with_gradients(f"{strategy}, {tie}", mixer, plain, x)


def test_ties() -> None:
    """What is shared is one parameter; the names of Caduceus load strictly either way."""
    count = {
        tie: sum(p.numel() for p in Bidirectional(8, tie=tie).parameters()) for tie in ("none", "projections", "all")
    }
    projections = sum(p.numel() for n, p in Mamba1(8).named_parameters() if n in ("in_proj.weight", "out_proj.weight"))
    assert count["none"] == 2 * count["all"] == count["projections"] + projections
    tied = Bidirectional(8, tie="projections")
    names = {f"{side}.{name}" for side in ("mamba_fwd", "mamba_rev") for name in Mamba1(8).state_dict()}
    assert set(tied.state_dict()) == names and tied.mamba_rev.in_proj.weight is tied.mamba_fwd.in_proj.weight
    other = Bidirectional(8, tie="projections")
    other.load_state_dict(tied.state_dict(), strict=True)
    assert other.mamba_rev.out_proj.weight is other.mamba_fwd.out_proj.weight


@pytest.mark.parametrize(
    "make",
    [
        partial(Mamba2, headdim=2, d_state=2),
        partial(S4D, d_state=4),
        partial(Attention, n_heads=2),
        partial(Mamba1, bias=True),
        partial(Mamba1, bias=True, b_c_dt_rms="weighted"),
    ],
)
def test_any_mixer_in_both_directions(make: Any) -> None:
    """The two halves on x and on x turned round, each row at its own end."""
    mixer = livened(Bidirectional(8, make))
    x = random_tensor(2, 7, 8, seed=4, dtype=torch.float64)
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    y = mixer(x, mask=mask)
    for row, length in enumerate((7, 4)):
        real = x[row : row + 1, :length]
        want = mixer.mamba_fwd(real) + mixer.mamba_rev(real.flip(1)).flip(1)
        assert_close(f"row {row}", y[row : row + 1, :length], want, 1e-9)


@pytest.mark.parametrize(
    "make",
    [VimMixer, Bidirectional, partial(Bidirectional, strategy="multiply"), partial(Bidirectional, tie="projections")],
)
def test_no_activation_is_flipped(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a sequence's length is turned round, neither going forwards nor in the gradient."""
    length, seen = 23, []
    for name in ("flip", "gather", "index_select", "fliplr", "take_along_dim"):
        for home in (torch, Tensor):
            if hasattr(home, name):
                original = getattr(home, name)

                def spy(x: Tensor, *rest: Any, original: Any = original, name: str = name, **named: Any) -> Tensor:
                    if length in x.shape:
                        seen.append((name, tuple(x.shape)))
                    return original(x, *rest, **named)

                monkeypatch.setattr(home, name, spy)
    mixer = make(8)
    mixer(torch.randn(1, length, 8, requires_grad=True)).sum().backward()
    assert not seen


@torch.no_grad()
@pytest.mark.parametrize("make", [VimMixer, Bidirectional, partial(Bidirectional, mixer="mamba2")])
def test_the_far_end_reaches_the_near_end(make: Any) -> None:
    mixer = livened(make(64))
    x = random_tensor(1, 12, 64, seed=5, dtype=torch.float64)
    moved = x.clone()
    moved[:, -1] += 1.0
    assert (mixer(x)[:, 0] - mixer(moved)[:, 0]).abs().max() > 1e-9
    moved = x.clone()
    moved[:, 0] += 1.0
    assert (mixer(x)[:, -1] - mixer(moved)[:, -1]).abs().max() > 1e-9


def test_bfloat16_of_a_long_sequence_stays_finite() -> None:
    """Trap 12: the original gives NaN in half precision. Steps of 20 and inputs of 30, 300 elements, gradients too."""
    torch.manual_seed(0)
    mixer = VimMixer(8)
    with torch.no_grad():
        mixer.dt_proj.bias.add_(20.0)
    x = (30 * torch.randn(1, 300, 8)).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mixer(x)
    y.float().square().mean().backward()
    assert bool(torch.isfinite(y).all())
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), name


def test_mixers_by_name() -> None:
    assert isinstance(Backbone(8, 1, mixer="vim").layers[0].mixer, VimMixer)
    assert isinstance(Backbone(8, 1, mixer="bidirectional").layers[0].mixer, Bidirectional)
    with pytest.raises(ValueError, match="later tokens"):
        LanguageModel(9, Backbone(8, 1, mixer="vim"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strategy": "mean"}, ["strategy='mean'", "add", "multiply"]),
        ({"tie": "both"}, ["tie='both'", "projections"]),
        ({"mixer": S4D, "tie": "projections"}, ["S4D", "in_proj", "tie='none'"]),
        ({"mixer": "vim"}, ["VimMixer", "both directions already"]),
        ({"mixer": "mamba9"}, ["mamba9", "unknown"]),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        Bidirectional(8, **options)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_one_direction_in_reverse_has_no_state() -> None:
    mixer = Mamba1(8)
    with pytest.raises(ValueError, match="reverse"):
        mixer.mix(torch.zeros(1, 3, 8), return_state=True, reverse=True)
