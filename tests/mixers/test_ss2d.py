"""SS2D beside VMamba's definition, written here in plain PyTorch: four sequences, flips and a loop over points."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mambakit import Backbone
from mambakit.kernels import use_backend
from mambakit.kernels.testing import assert_close, random_tensor
from mambakit.mixers.ss2d import SS2D
from mambakit.optim import parameter_groups


def loop_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """u and delta (B, L, D), B and C (B, L, N): the recurrence, point by point."""
    h, outputs = torch.zeros(len(u), *A.shape, dtype=u.dtype), []
    for t in range(u.shape[1]):
        h = h * (delta[:, t, :, None] * A).exp() + (delta[:, t] * u[:, t])[..., None] * B[:, t, None]
        outputs.append((h * C[:, t, None]).sum(-1))
    return torch.stack(outputs, dim=1)


def plain_ss2d(x: Tensor, weights: dict[str, Tensor], count: int | None = None) -> Tensor:
    """Images (B, H, W, d_model): four orders laid out, scanned forwards, laid back, added (VMamba, section 4).

    With ``count`` the image has only its first so many points: the others are in no order, zeros to the convolution.
    """
    x = F.linear(x, weights["in_proj.weight"], weights.get("in_proj.bias"))
    inner = weights["conv2d.weight"].shape[0]
    x, z = x.split([inner, x.shape[-1] - inner], dim=-1)
    kernel = weights["conv2d.weight"]
    if count is not None:
        x = torch.cat((x.flatten(1, 2)[:, :count], torch.zeros_like(x.flatten(1, 2)[:, count:])), dim=1).view_as(x)
    x = F.conv2d(x.permute(0, 3, 1, 2), kernel, weights.get("conv2d.bias"), padding=kernel.shape[-1] // 2, groups=inner)
    x = F.silu(x)
    batch, _, height, width = x.shape
    orders = torch.arange(height * width).view(height, width)
    rows, columns = orders.flatten(), orders.T.flatten()
    total = torch.zeros(batch, height * width, inner, dtype=x.dtype)
    rank, states = weights["dt_projs_weight"].shape[-1], weights["A_logs"].shape[1]
    for k, order in enumerate((rows, columns, rows.flip(0), columns.flip(0))):
        order = order if count is None else order[order < count]
        u = x.flatten(2).transpose(1, 2)[:, order]
        dt, B, C = F.linear(u, weights["x_proj_weight"][k]).split([rank, states, states], dim=-1)
        delta = F.softplus(F.linear(dt, weights["dt_projs_weight"][k], weights["dt_projs_bias"][k]))
        own = slice(k * inner, (k + 1) * inner)
        y = loop_scan(u, delta, -weights["A_logs"][own].exp(), B, C) + weights["Ds"][own] * u
        total[:, order] += y
    y = F.layer_norm(total, (inner,), weights["out_norm.weight"], weights["out_norm.bias"]).unflatten(
        1, (height, width)
    )
    if z.shape[-1]:
        y = y * F.silu(z)
    return F.linear(y, weights["out_proj.weight"], weights.get("out_proj.bias"))


def shaken(mixer: SS2D) -> SS2D:
    """Every parameter moved off its initial value, steps large enough for the directions to forget differently."""
    with torch.no_grad():
        for index, parameter in enumerate(mixer.parameters()):
            parameter.add_(random_tensor(*parameter.shape, seed=index + 1, dtype=parameter.dtype), alpha=0.3)
        mixer.dt_projs_bias.add_(2.0)
    return mixer


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(
    "options", [{}, {"d_state": 3, "gate": True, "conv_bias": True, "bias": True, "expand": 1.5, "d_conv": 1}]
)
def test_definition(backend, options):
    mixer = shaken(SS2D(8, grid=(3, 5), **options).double())
    x = random_tensor(2, 15, 8, seed=0, dtype=torch.float64)
    with use_backend(backend):
        got = mixer(x)
    want = plain_ss2d(x.unflatten(1, (3, 5)), dict(mixer.named_parameters())).flatten(1, 2)
    assert_close("output", got, want, 1e-11)


def test_square_by_default_and_open_height():
    mixer = shaken(SS2D(8).double())
    x = random_tensor(1, 16, 8, seed=0, dtype=torch.float64)
    want = mixer.mix_image(x.unflatten(1, (4, 4))).flatten(1, 2)
    assert_close("square", mixer(x), want, 1e-12)
    mixer.grid = (None, 8)
    assert_close("two rows", mixer(x), mixer.mix_image(x.unflatten(1, (2, 8))).flatten(1, 2), 1e-12)


def test_an_unfinished_row_is_as_if_the_image_ended_there():
    """No scan sees the points that fill up the last row, nor those of a row that is all padding."""
    mixer = shaken(SS2D(8, grid=(None, 4), bias=True).double())
    x = random_tensor(1, 10, 8, seed=0, dtype=torch.float64)
    filled = F.pad(x, (0, 0, 0, 2)).unflatten(1, (3, 4))
    want = plain_ss2d(filled, dict(mixer.named_parameters()), count=10).flatten(1, 2)[:, :10]
    assert_close("filled", mixer(x), want, 1e-11)
    padded = F.pad(x, (0, 0, 0, 5), value=7.0)
    assert_close("padded", mixer(padded, mask=(torch.arange(15) < 10).unsqueeze(0))[:, :10], want, 1e-11)


def test_every_point_hears_every_other():
    mixer = shaken(SS2D(8, grid=(3, 4)).double())
    x = random_tensor(1, 12, 8, seed=0, dtype=torch.float64).requires_grad_()
    for point in (0, 5, 11):
        (gradient,) = torch.autograd.grad(mixer(x)[:, point].square().sum(), x)
        assert bool((gradient.abs().sum(-1) > 0).all())


def test_triton_kernels_agree():
    """One state a channel, in both directions, through the kernels in Triton's interpreter."""
    pytest.importorskip("triton")
    mixer = shaken(SS2D(4, grid=(2, 3)))
    x = random_tensor(1, 6, 4, seed=0)
    want = mixer(x)
    with use_backend("triton"):
        got = mixer(x)
    assert_close("output", got, want, 1e-5)


def test_names_and_sizes_are_vmambas():
    """x_proj_weight (K, R + 2 N, D), dt_projs_weight (K, D, R), dt_projs_bias (K, D), A_logs (K D, N), Ds (K D)."""
    shapes = {name: tuple(parameter.shape) for name, parameter in SS2D(96, expand=1).named_parameters()}
    assert shapes == {
        "x_proj_weight": (4, 8, 96),
        "dt_projs_weight": (4, 96, 6),
        "dt_projs_bias": (4, 96),
        "A_logs": (384, 1),
        "Ds": (384,),
        "in_proj.weight": (96, 96),
        "conv2d.weight": (96, 1, 3, 3),
        "out_norm.weight": (96,),
        "out_norm.bias": (96,),
        "out_proj.weight": (96, 96),
    }


def test_initial_steps_are_in_range_and_not_decayed():
    mixer = SS2D(32, dt_min=0.01, dt_max=0.02)
    steps = F.softplus(mixer.dt_projs_bias).detach()
    assert float(steps.min()) >= 0.0099 and float(steps.max()) <= 0.0201
    decay = {name: group["weight_decay"] for group in parameter_groups(mixer, 0.1) for name in group["names"]}
    assert {name for name, value in decay.items() if value} == {
        "x_proj_weight",
        "dt_projs_weight",
        "in_proj.weight",
        "conv2d.weight",
        "out_proj.weight",
    }


def test_by_name():
    assert isinstance(Backbone(8, 1, "ss2d").layers[0].mixer, SS2D)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"grid": (3,)}, ["grid=(3,)", "(height, width)"]),
        ({"grid": (3, None)}, ["(3, None)", "height may be None"]),
        ({"grid": (0, 3)}, ["(0, 3)"]),
        ({"d_conv": 4}, ["d_conv=4", "odd"]),
        ({"expand": 1.3}, ["expand=1.3", "d_model=8"]),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError) as error:
        SS2D(8, **options)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("grid", "length", "options", "words"),
    [
        (None, 12, {}, ["12", "square"]),
        ((3, 5), 12, {}, ["12", "15"]),
        ((3, 4), 12, {"seq_idx": torch.zeros(1, 12, dtype=torch.int32)}, ["seq_idx", "one image"]),
        ((3, 4), 12, {"mask": torch.ones(1, 12, dtype=torch.bool)}, ["mask", "grid=(None, width)"]),
    ],
)
def test_bad_input(grid, length, options, words):
    with pytest.raises(ValueError) as error:
        SS2D(8, grid=grid)(torch.zeros(1, length, 8), **options)
    assert all(word in str(error.value) for word in words), str(error.value)
