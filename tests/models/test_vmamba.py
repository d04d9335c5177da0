"""VMamba and the hybrid beside restatements in plain PyTorch; VMamba's checkpoints; what the pyramid promises."""

from __future__ import annotations

import re
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mambakit
from mambakit.kernels.testing import assert_close
from mambakit.mixers import SS2D, FullAttention, Mamba2, VimMixer
from mambakit.models.hybrid_vision import ConvBlock, HybridVision
from mambakit.models.vmamba import VMamba

assert mambakit  # its import is what registers the models

TINY: dict[str, Any] = {"dims": (8, 16, 24, 32), "depths": (1, 2, 1, 1), "num_classes": 5}


def tiny(seed: int = 0, **options: Any) -> VMamba:
    torch.manual_seed(seed)
    return VMamba(**{**TINY, **options}).eval()


def images(height: int = 64, width: int = 64, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def channel_norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    """VMamba's LN2D: the layer norm over the channels of (B, D, H, W)."""
    mean, variance = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
    y = (x - mean) / (variance + 1e-5).sqrt()
    return y * weights[f"{name}.weight"][:, None, None] + weights[f"{name}.bias"][:, None, None]


def conv(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride=2, padding=1)


def restated(model: VMamba, x: Tensor) -> Tensor:
    """The released architecture on (B, D, H, W), around the model's own SS2D, which has a restatement in its tests."""
    weights = dict(model.state_dict())
    x = channel_norm(conv(x, weights, "patch_embed.0"), weights, "patch_embed.2")
    x = channel_norm(conv(F.gelu(x), weights, "patch_embed.5"), weights, "patch_embed.7")
    for i, depth in enumerate(TINY["depths"]):
        for j in range(depth):
            name = f"layers.{i}.blocks.{j}"
            op = model.get_submodule(f"{name}.op")
            mixed = op.mix_image(channel_norm(x, weights, f"{name}.norm").permute(0, 2, 3, 1))
            x = x + mixed.permute(0, 3, 1, 2)
            hidden = channel_norm(x, weights, f"{name}.norm2")
            for k in (1, 2):
                weight, bias = weights[f"{name}.mlp.fc{k}.weight"], weights[f"{name}.mlp.fc{k}.bias"]
                hidden = torch.einsum("oc,bchw->bohw", weight, hidden) + bias[:, None, None]
                hidden = F.gelu(hidden) if k == 1 else hidden
            x = x + hidden
        if i < 3:
            x = channel_norm(conv(x, weights, f"layers.{i}.downsample.1"), weights, f"layers.{i}.downsample.3")
    pooled = channel_norm(x, weights, "classifier.norm").mean((2, 3))
    return pooled @ weights["classifier.head.weight"].T + weights["classifier.head.bias"]


def shaken(model: nn.Module) -> nn.Module:
    """Norms and biases off their ones and zeros, so that a forgotten one shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_definition():
    model, x = shaken(tiny(expand=2).double()), images().double()
    assert_close("logits", model(x), restated(model, x), 1e-10)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("tiny_s1l8", 30),
        ("tiny_s2l5", 31),
        ("small_s1l20", 49),
        ("small_s2l15", 50),
        ("base_s1l20", 87),
        ("base_s2l15", 89),
    ],
)
def test_sizes_are_the_published_ones(name, millions):
    with torch.device("meta"):
        model = timm.create_model(f"vmamba_{name}")
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == millions
    assert len(model.layers[2].blocks) == int(name.rsplit("l", 1)[1])


def test_names_are_vmambas():
    """Every name of a released checkpoint, and no other: as its modules' indices and parameters give them."""
    block = r"(norm2?|op\.out_norm|mlp\.fc[12])\.(weight|bias)|op\.(in_proj|conv2d|out_proj)\.weight"
    block += r"|op\.(x_proj_weight|dt_projs_weight|dt_projs_bias|A_logs|Ds)"
    name = r"patch_embed\.[0257]\.(weight|bias)|layers\.[0-2]\.downsample\.[13]\.(weight|bias)"
    name += rf"|layers\.[0-3]\.blocks\.\d+\.({block})|classifier\.(norm|head)\.(weight|bias)"
    names = list(tiny().state_dict())
    assert not [own for own in names if not re.fullmatch(name, own)]
    assert len(names) == 8 + 3 * 4 + 5 * 18 + 4


@pytest.mark.parametrize("as_convolutions", [False, True])
def test_a_checkpoint_of_the_authors(tmp_path, as_convolutions):
    """Under "model", strictly; some of their files have linear layers as convolutions of one point."""
    model, other, x = tiny(), tiny(seed=1), images()
    weights = model.state_dict()
    if as_convolutions:
        point = re.compile(r".*(in_proj|out_proj|fc1|fc2)\.weight")
        weights = {name: v[:, :, None, None] if point.fullmatch(name) else v for name, v in weights.items()}
    torch.save({"model": weights, "epoch": 3}, tmp_path / "vmamba.pth")
    assert not torch.equal(other(x), model(x))
    options = {**TINY, "expand": 1, "pretrained_cfg_overlay": {"file": str(tmp_path / "vmamba.pth"), "num_classes": 5}}
    loaded = timm.create_model("vmamba_tiny_s1l8", pretrained=True, **options).eval()
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize(
    ("options", "words"),
    [({"dims": (8, 16, 24, 48)}, ["48 wide", "32"]), ({"depths": (1, 2, 3, 1)}, ["(1, 2, 3, 1)", "(1, 2, 1, 1)"])],
)
def test_a_checkpoint_of_another_size(options, words):
    with pytest.raises(ValueError) as error:
        tiny().load_state_dict(tiny(**options).state_dict())
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("name", ["vmamba_tiny_s1l8", "vimhybrid_tiny"])
@pytest.mark.parametrize(("height", "width"), [(64, 96), (37, 50)])
def test_maps_of_any_size(name, height, width):
    """At strides 4, 8, 16 and 32, each rounding up, whatever the image's sides."""
    model = timm.create_model(name, **{**TINY, "depths": (1, 1, 2, 2)}, features_only=True).eval()
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    for y, width_of_stage, stride in zip(model(images(height, width)), TINY["dims"], (4, 8, 16, 32), strict=True):
        assert y.shape == (2, width_of_stage, -(-height // stride), -(-width // stride))


def test_fewer_stages():
    """A model cut to its first stages keeps nothing that they do not need, and its width is theirs."""
    model = timm.create_model("vmamba_tiny_s1l8", **TINY, features_only=True, out_indices=(0, 1)).eval()
    assert len(model(images())) == 2 and len(model.model.layers) == 2
    assert model.model.num_features == 16
    assert not any(name.startswith(("model.classifier", "model.layers.1.downsample")) for name in model.state_dict())


def test_intermediates_normalised_and_channels_last():
    model, x = tiny(), images()
    features, (last,) = model.forward_intermediates(x, indices=1, norm=True)
    assert torch.equal(last, features) and torch.equal(features, model.forward_features(x))
    (turned,) = model.forward_intermediates(x, indices=1, norm=True, output_fmt="NHWC", intermediates_only=True)
    assert torch.equal(turned.permute(0, 3, 1, 2), last)
    with pytest.raises(ValueError, match="NLC.*NCHW"):
        model.forward_intermediates(x, output_fmt="NLC")


def test_the_stream_is_float32_under_autocast():
    streams = []
    model = tiny()
    for stage in model.layers:
        for block in stage.blocks:
            block.register_forward_hook(lambda _, __, output: streams.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(images())
    assert streams == [torch.float32] * 5
    assert_close("logits", logits.float(), model(images()), 0.05)


def test_pools():
    model, x = tiny(global_pool="catavgmax"), images()
    y = model.forward_features(x)
    want = torch.cat((y.mean((2, 3)), y.amax((2, 3))), dim=1)
    assert_close("pooled", model.forward_head(y, pre_logits=True), want, 1e-6)
    assert model.get_classifier().in_features == model.head_hidden_size == 64
    model.reset_classifier(3, "max")
    assert model(x).shape == (2, 3)
    with pytest.raises(ValueError, match="'token'.*'avg'"):
        model.reset_classifier(3, "token")


def hybrid(**options: Any) -> HybridVision:
    torch.manual_seed(0)
    sizes = {"dims": (8, 16, 24, 32), "depths": (1, 1, 3, 2), "num_heads": (2, 4), "num_classes": 5}
    return HybridVision(**{**sizes, **options}).eval()


def kinds(model: HybridVision) -> list[list[type]]:
    return [[type(getattr(block, "op", block)) for block in stage.blocks] for stage in model.layers]


def test_where_the_hybrid_attends():
    """Convolutions in the first two stages; of n blocks in the others the last n // 2 attend."""
    attends = [[ConvBlock], [ConvBlock], [VimMixer, VimMixer, FullAttention], [VimMixer, FullAttention]]
    assert kinds(hybrid()) == attends
    assert all(module.d_rotary == 0 for module in hybrid().modules() if isinstance(module, FullAttention))
    model = hybrid(mixer=lambda dim: Mamba2(dim, d_state=4, headdim=8))
    assert kinds(model)[3] == [Mamba2, FullAttention]
    assert kinds(hybrid(mixer="ss2d"))[3] == [SS2D, FullAttention]


def test_a_block_reads_row_by_row():
    """x + op(norm(x)) over the points of each image, then the MLP; an image does not hear another."""
    block = shaken(hybrid().double()).layers[2].blocks[0]
    x = torch.randn(2, 3, 4, 24, dtype=torch.float64)
    want = x + block.op(block.norm(x).flatten(1, 2)).view_as(x)
    want = want + block.mlp(block.norm2(want))
    assert_close("block", block(x), want, 1e-12)
    assert_close("alone", block(x[1:]), want[1:], 1e-12)


def test_attention_is_over_the_whole_map_without_positions():
    """softmax(q k^T / sqrt(P)) v with the projections' biases; points in another order give the same in that order."""
    attention = shaken(FullAttention(8, 2, d_rotary=0, bias=True).double())
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in attention.in_proj(x).chunk(3, dim=-1))
    weights = (q @ k.transpose(-1, -2) / 2).softmax(-1)
    want = attention.out_proj((weights @ v).transpose(1, 2).flatten(2))
    assert_close("attention", attention(x), want, 1e-12)
    assert_close("turned", attention(x.flip(1)).flip(1), want, 1e-12)


def test_initial_steps_are_kept():
    """Trap 13: the redrawing of linear layers passes over those that set a mixer's steps."""
    for model in (hybrid(), tiny()):
        for name, parameter in model.named_parameters():
            if name.endswith(("dt_proj.bias", "dt_projs_bias")):
                steps = F.softplus(parameter.detach())
                assert float(steps.min()) > 0.9e-4 and float(steps.max()) < 0.11, name


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: VMamba(dims=(8, 16), depths=(1,)), ["dims=(8, 16)", "depths=(1,)"]),
        (lambda: hybrid(num_heads=(2,)), ["num_heads=(2,)", "last two stages"]),
        (lambda: hybrid(mixer="vin"), ["vin", "did you mean vim"]),
        (lambda: hybrid(num_heads=(5, 4)), ["d_model=24", "n_heads=5"]),
        (lambda: tiny(global_pool="token"), ["global_pool='token'"]),
    ],
)
def test_bad_options(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert all(word in str(error.value) for word in words), str(error.value)
