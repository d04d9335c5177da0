"""Step sizes, against what the mixers hand to their scans and against loops by hand."""

from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from mambakit import Backbone
from mambakit.embeddings import PatchEmbedding
from mambakit.inspect import receptive_field, step_sizes
from mambakit.kernels import use_backend
from mambakit.kernels.inner import bimamba_op
from mambakit.mixers import Bidirectional, Mamba1, ss2d
from mambakit.mixers.ss2d import SS2D
from mambakit.models.vision_mamba import VisionMamba


def tiny_vim(**options):
    torch.manual_seed(0)
    options = {"img_size": (8, 12), "patch_size": 4, "embed_dim": 16, "depth": 2, "num_classes": 3, **options}
    return VisionMamba(**options).eval()


def recorded(monkeypatch, module) -> list:
    """The steps that each call of ``module.selective_scan`` takes: softplus(delta + bias)."""
    found = []
    scan = module.selective_scan

    def note(u, delta, A, B, C, D, z, delta_bias, delta_softplus, **options):
        assert delta_softplus
        found.append(F.softplus(delta.detach().float() + delta_bias.detach().float()))
        return scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, **options)

    monkeypatch.setattr(module, "selective_scan", note)
    return found


def test_of_a_vim_they_are_those_its_scans_take(monkeypatch):
    model, images = tiny_vim(), torch.randn(2, 3, 8, 12)
    steps = step_sizes(model, images)
    taken = recorded(monkeypatch, bimamba_op)
    with torch.no_grad(), use_backend("reference"):
        model(images)
    assert [one.layer for one in steps] == ["layers.0.mixer", "layers.1.mixer"]
    for one, (forwards, backwards) in zip(steps, zip(taken[::2], taken[1::2], strict=True), strict=True):
        assert list(one.directions) == ["forwards", "backwards"]
        for name, delta in (("forwards", forwards), ("backwards", backwards)):
            patches = delta[:, [0, 1, 2, 4, 5, 6]].reshape(2, 2, 3, 32)  # number 3 of 7 is the class token
            torch.testing.assert_close(one.directions[name], patches, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(one.maps()[name], patches.mean(-1), rtol=1e-5, atol=1e-6)


def test_of_ss2d_they_are_those_its_scans_take_each_place_where_it_lies(monkeypatch):
    torch.manual_seed(0)
    embedding = PatchEmbedding(8, (6, 8), 2, in_chans=1)
    for gate in (False, True):
        model = Backbone(8, 1, partial(SS2D, grid=(3, 4), gate=gate), embedding=embedding).eval()
        images = torch.randn(2, 1, 6, 8)
        (found,) = step_sizes(model, images)
        with monkeypatch.context() as patch, torch.no_grad():
            taken = recorded(patch, ss2d)
            model(images)
        (of_all,) = taken  # one scan, the channels by direction
        rows, columns, rows_back, columns_back = of_all.chunk(4, dim=-1)
        expected = {
            "rows": rows.unflatten(1, (3, 4)),
            "columns": columns.unflatten(1, (4, 3)).transpose(1, 2),
            "rows, from the end": rows_back.unflatten(1, (3, 4)),
            "columns, from the end": columns_back.unflatten(1, (4, 3)).transpose(1, 2),
        }
        assert list(found.directions) == list(expected)
        for name, delta in expected.items():
            torch.testing.assert_close(found.directions[name], delta, rtol=1e-5, atol=1e-6)


def test_of_a_pyramid_each_stage_has_its_own_grid():
    options = {"dims": (8, 16), "depths": (1, 1)}
    model = timm.create_model("vmamba_tiny_s1l8", num_classes=0, **options)
    steps = step_sizes(model, torch.randn(1, 3, 32, 64))
    shapes = [{tuple(delta.shape[1:3]) for delta in one.directions.values()} for one in steps]
    assert shapes == [{(8, 16)}, {(4, 8)}]
    assert receptive_field(model, torch.randn(1, 3, 32, 64), layer=0).grid == (8, 16)


def by_hand(mixer: Mamba1, x: torch.Tensor, reverse: bool) -> torch.Tensor:
    """Delta (B, L, D) of a Mamba-1, element by element."""
    u = mixer.in_proj(x)[..., : mixer.d_inner]
    order = list(range(u.shape[1]))[:: -1 if reverse else 1]
    delta = torch.empty_like(u)
    for t, place in enumerate(order):
        total = mixer.conv1d.bias.clone()
        for back in range(min(t + 1, mixer.d_conv)):
            total = total + mixer.conv1d.weight[:, 0, mixer.d_conv - 1 - back] * u[:, order[t - back]]
        dt = mixer.x_proj(total * torch.sigmoid(total))[:, : mixer.dt_rank]
        if mixer.has_norms:
            dt = dt / (dt.square().mean(-1, keepdim=True) + mixer.dt_layernorm.eps).sqrt() * mixer.dt_layernorm.weight
        delta[:, place] = torch.log1p(torch.exp(mixer.dt_proj(dt)))
    return delta


@pytest.mark.parametrize("norms", [None, "weighted"])
@pytest.mark.parametrize("tie", ["none", "projections", "all"])
@torch.no_grad()
def test_of_bidirectional_mamba_they_are_those_by_hand(tie, norms):
    torch.manual_seed(0)
    make = partial(Mamba1, d_state=4, b_c_dt_rms=norms)
    mixer = Bidirectional(8, make, tie=tie).double()
    for parameter in mixer.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    (found,) = step_sizes(mixer, x)
    backwards = mixer.mamba_fwd if tie == "all" else mixer.mamba_rev
    torch.testing.assert_close(found.directions["forwards"], by_hand(mixer.mamba_fwd, x, False))
    torch.testing.assert_close(found.directions["backwards"], by_hand(backwards, x, True))


@torch.no_grad()
def test_of_a_backbone_of_sequences_they_are_those_by_hand():
    torch.manual_seed(0)
    model = Backbone(8, 2, pattern="ma")  # attention takes no steps
    x = torch.randn(2, 6, 8)
    (found,) = step_sizes(model, x)
    assert found.layer == "layers.0.mixer" and list(found.directions) == ["forwards"]
    expected = by_hand(model.layers[0].mixer, model.layers[0].norm(x)[0], False)
    torch.testing.assert_close(found.directions["forwards"], expected, rtol=1e-5, atol=1e-6)


def test_layers_are_chosen_and_the_model_is_left_as_it_was():
    model, images = tiny_vim(depth=3).train(), torch.randn(1, 3, 8, 12)
    every = step_sizes(model, images)
    chosen = step_sizes(model, images, layers=[-1, 0])
    assert [one.layer for one in chosen] == ["layers.2.mixer", "layers.0.mixer"]
    torch.testing.assert_close(chosen[0].directions, every[2].directions)
    assert all(part.training for part in model.modules())
    assert not any(part._forward_pre_hooks for part in model.modules())
    assert not chosen[0].directions["forwards"].requires_grad


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = Mamba1(8), Mamba1(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x)


def test_what_cannot_be_told_is_named():
    x = torch.randn(1, 4, 8)
    with pytest.raises(ValueError, match="VisionTransformer has no mixer with a selective scan"):
        step_sizes(
            timm.create_model("deit_tiny_patch16_224", img_size=16, embed_dim=24, depth=1), torch.zeros(1, 3, 16, 16)
        )
    with pytest.raises(ValueError, match="Bidirectional has no mixer with a selective scan"):
        step_sizes(Bidirectional(8, "s4d"), x)
    with pytest.raises(ValueError, match="there is no layer 2, expected -2 to 1"):
        step_sizes(Unused(), x, layers=[2])
    with pytest.raises(ValueError, match="the model did not run other"):
        step_sizes(Unused(), x)
