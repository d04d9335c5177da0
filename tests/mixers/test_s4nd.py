"""S4ND against plain convolutions, S4D and S4 along one axis, other resolutions, bands, timm's ConvNeXt."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mambakit import Backbone
from mambakit.kernels.testing import assert_close
from mambakit.mixers import S4ND
from mambakit.mixers.s4d import fft_convolve
from mambakit.mixers.s4nd import S4NDConv

SIZES = (4, 3, 5)


def double(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(sizes)))


def plain(conv: S4NDConv, x: torch.Tensor) -> torch.Tensor:
    """K * x by torch's convolution: the kernel flipped, offsets from -(size-1) to size-1, zeros around."""
    sizes = x.shape[2:]
    K = torch.ones(1, *[1] * conv.dim, dtype=x.dtype)
    for axis, (kernel, size, ahead) in enumerate(zip(conv.kernel, sizes, conv.bidirectional, strict=True)):
        back, front = kernel(size).chunk(2) if ahead else (kernel(size), torch.zeros_like(kernel(size)))
        flipped = torch.cat((back.flip(1), front[:, : size - 1]), dim=1)  # size-1 ... 0, -1 ... 1-size
        K = K * flipped.view(len(back), *[1] * axis, -1, *[1] * (conv.dim - 1 - axis))
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[conv.dim]
    edge = tuple(size - 1 for size in sizes)
    if conv.out_channels is None:
        return convolve(x, K.unsqueeze(1), padding=edge, groups=conv.channels)
    return convolve(x, K.unflatten(0, (conv.out_channels, conv.channels)), padding=edge)


@torch.no_grad()
@pytest.mark.parametrize("bidirectional", ["all", "last", "none"])
@pytest.mark.parametrize("out_channels", [None, 3])
@pytest.mark.parametrize("systems", ["lin", "dplr"])
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_it_is_the_convolution_with_the_outer_product(dim, systems, out_channels, bidirectional):
    torch.manual_seed(0)
    ahead = {"all": True, "last": [False] * (dim - 1) + [True], "none": False}[bidirectional]
    conv = S4NDConv(2, dim, 4, out_channels, systems, ahead).double()
    x = double(2, 2, *SIZES[:dim])
    want = plain(conv, x)
    if out_channels is None:
        want = want + conv.D.view(-1, *[1] * dim) * x
    assert_close("y", conv(x), want, 1e-9)


@torch.no_grad()
@pytest.mark.parametrize("systems", ["lin", "inv", "legs", "real", "dplr"])
def test_an_axis_that_looks_back_is_s4(systems: str):
    torch.manual_seed(0)
    conv = S4NDConv(3, 1, 4, systems=systems, bidirectional=False).double()
    x = double(2, 3, 9)
    want = fft_convolve(x.transpose(1, 2), conv.kernel[0](9)).transpose(1, 2) + conv.D.unsqueeze(1) * x
    assert_close("y", conv(x), want, 1e-9)


@torch.no_grad()
def test_a_point_shows_where_each_axis_looks():
    torch.manual_seed(0)
    conv = S4NDConv(1, 2, 4, bidirectional=(False, True)).double()
    x = torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    x[..., 2, 2] = 1
    seen = conv(x)[0, 0].abs() > 1e-9
    assert not seen[:2].any() and seen[2:].all()


@torch.no_grad()
def test_separable_input_gives_separable_output():
    torch.manual_seed(0)
    conv = S4NDConv(1, 2, 4).double()
    x = double(4, 1) * double(1, 5)
    y = conv(x.view(1, 1, 4, 5))[0, 0] - conv.D * x
    singular = torch.linalg.svdvals(y)
    assert singular[1] < 1e-9 * singular[0]


@torch.no_grad()
@pytest.mark.parametrize("bidirectional", [True, False])
def test_half_the_resolution_is_rate_two(bidirectional: bool):
    """Zero-order hold is exact for an image of blocks: the last output of each block is that of the small image."""
    torch.manual_seed(0)
    conv = S4NDConv(2, 2, 6, bidirectional=bidirectional).double()
    small = double(1, 2, 5, 6)
    want = conv(small.repeat_interleave(2, 2).repeat_interleave(3, 3))[:, :, 1::2, 2::3]
    conv.rate = (2.0, 3.0)
    assert_close("y", conv(small), want, 1e-9)


@torch.no_grad()
@pytest.mark.parametrize("systems", ["lin", "dplr"])
def test_bandlimit_removes_what_turns_faster(systems: str):
    """A system whose modes turn 0, 1/20, ... a point keeps those below the limit, and only those are heard."""
    torch.manual_seed(0)
    limited, full = (S4NDConv(1, 1, 20, None, systems, False, limit).double() for limit in (0.4, None))
    for conv in (limited, full):
        kernel = conv.kernel[0]
        kernel.log_dt.zero_()
        kernel.log_A_real.fill_(math.log(0.02))
        kernel.A_imag.copy_(2 * math.pi * torch.arange(10).double() / 20 + 0.01)
        if systems == "dplr":
            kernel.P.zero_()
    limited.kernel[0].C.copy_(full.kernel[0].C)
    wide, narrow = (conv.kernels((400,))[0][:, :400] for conv in (full, limited))
    high = torch.fft.rfft(wide).abs()[:, 140:].norm(), torch.fft.rfft(narrow).abs()[:, 140:].norm()
    assert high[1] < 0.1 * high[0]
    full.kernel[0].C[:, 4:] = 0  # 0.2 turns a point and more
    assert_close("kernel", narrow, full.kernels((400,))[0][:, :400], 1e-12)


@torch.no_grad()
@pytest.mark.parametrize("stride", [2, (1, 3)])
def test_stride_keeps_every_so_manieth_point(stride):
    torch.manual_seed(0)
    conv = S4NDConv(2, 2, 4, 3, bias=True)
    conv.bias.normal_()
    x = torch.randn(1, 2, 7, 8)
    whole = conv(x)
    conv.stride = (stride, stride) if isinstance(stride, int) else stride
    down, across = conv.stride
    assert torch.equal(conv(x), whole[:, :, ::down, ::across])


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 2, 7, 23])
def test_sizes_whose_transforms_are_lengthened(size: int):
    torch.manual_seed(0)
    conv = S4NDConv(2, 1, 4).double()
    x = double(1, 2, size)
    assert_close("y", conv(x), plain(conv, x) + conv.D.unsqueeze(1) * x, 1e-9)


def test_no_spectrum_of_the_input_is_kept():
    conv, x = S4NDConv(2, 2, 2), torch.randn(50, 2, 8, 8)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        conv(x)
    assert sizes and max(sizes) <= x.numel()


@pytest.mark.parametrize("systems", ["lin", "dplr"])
@pytest.mark.parametrize("out_channels", [None, 2])
def test_gradients(systems, out_channels):
    torch.manual_seed(0)
    conv = S4NDConv(2, 2, 2, out_channels, systems, bias=True).double()
    names, parameters = zip(*conv.named_parameters(), strict=True)

    def function(x, *weights):
        return torch.func.functional_call(conv, dict(zip(names, weights, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (double(1, 2, 3, 2).requires_grad_(), *parameters), fast_mode=True)
    conv(double(1, 2, 4, 4)).square().sum().backward()
    for name, parameter in conv.named_parameters():
        assert parameter.grad is not None and bool((parameter.grad != 0).any()), name


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 7, padding=3, groups=4),
        nn.Conv2d(4, 6, 3, padding=1, stride=2, bias=False),
        nn.Conv2d(4, 6, (3, 5), padding="same"),
        nn.Conv2d(4, 6, 2, stride=2),
        nn.Conv1d(4, 4, 9, padding=4, groups=4),
        nn.Conv3d(4, 2, 3, padding=1, stride=(1, 2, 2)),
    ],
    ids=lambda conv: f"{type(conv).__name__}-{conv.kernel_size}-{conv.stride}",
)
def test_in_the_place_of_a_convolution(conv: nn.Module):
    own = S4NDConv.like(conv, d_state=2)
    x = torch.randn(2, 4, *[6] * (conv.weight.dim() - 2))
    assert own(x).shape == conv(x).shape
    assert (own.bias is None) == (conv.bias is None)
    assert (own.D is not None) == (conv.groups == 4)
    assert all(p.dtype == torch.float64 for p in S4NDConv.like(conv.double(), d_state=2).parameters())
    conv.float()


@pytest.mark.parametrize(
    ("conv", "error", "words"),
    [
        (nn.Conv2d(4, 8, 3, padding=1, groups=2), ValueError, ["groups=2"]),
        (nn.Conv2d(4, 8, 3), ValueError, ["padding=(0, 0)"]),
        (nn.Conv2d(4, 8, 2, stride=2, padding=1), ValueError, ["padding=(1, 1)"]),
        (nn.Conv2d(4, 4, 3, padding=1, dilation=2), ValueError, ["dilation=(2, 2)"]),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), ValueError, ["padding_mode='circular'"]),
        (nn.ConvTranspose2d(4, 4, 3), TypeError, ["ConvTranspose2d"]),
        (nn.Linear(4, 4), TypeError, ["Linear"]),
    ],
)
def test_a_convolution_it_cannot_stand_for_is_refused(conv, error, words):
    with pytest.raises(error) as raised:
        S4NDConv.like(conv)
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_timm_convnext_with_it():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(4, 4, 8, 8), num_classes=3)
    for block in (stage.blocks[0] for stage in model.stages):
        block.conv_dw = S4NDConv.like(block.conv_dw, d_state=4)
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    for stage in model.stages:
        for name, parameter in stage.blocks[0].conv_dw.named_parameters():
            assert bool((parameter.grad != 0).any()), name


@torch.no_grad()
@pytest.mark.parametrize("grid", [None, (4, 4), (None, 4), (2, 2, 4), (None, 2, 2), (16,)])
def test_a_sequence_is_its_grid_line_by_line(grid):
    torch.manual_seed(0)
    mixer = S4ND(3, grid, d_state=4).double()
    x = double(2, 16, 3)
    image = x.transpose(1, 2).unflatten(2, {None: (4, 4), (None, 4): (4, 4), (None, 2, 2): (4, 2, 2)}.get(grid, grid))
    want = mixer.conv(image).flatten(2).transpose(1, 2)
    want = F.glu(F.linear(F.gelu(want), mixer.output_linear.weight, mixer.output_linear.bias), dim=-1)
    assert_close("y", mixer(x), want, 1e-12)


@torch.no_grad()
def test_a_last_line_that_is_not_full_is_filled_with_zeros():
    torch.manual_seed(0)
    mixer = S4ND(3, (None, 4), d_state=4).double()
    x = double(2, 16, 3)
    x[:, 14:] = 0
    assert_close("y", mixer(x[:, :14]), mixer(x)[:, :14], 1e-10)
    x[:, 14:] = math.nan
    mask = (torch.arange(16) < 14).expand(2, -1)
    assert_close("masked", mixer(x, mask=mask)[:, :14], mixer(x[:, :14]), 1e-10)
    inside, _ = mixer.mix(x, lengths=mask.sum(1))  # as between the layers of a backbone
    assert_close("padded", inside[:, :14], mixer(x[:, :14]), 1e-10)


@torch.no_grad()
def test_rate_may_be_set_on_the_mixer():
    torch.manual_seed(0)
    mixer = S4ND(3, (None, 4), d_state=4)
    x = torch.randn(1, 16, 3)
    before = mixer(x)
    mixer.rate = (1.0, 2.0)
    assert mixer.rate == mixer.conv.rate == (1.0, 2.0)
    assert not torch.allclose(mixer(x), before)


def test_by_its_name_alone_a_square_is_understood():
    backbone = Backbone(d_model=4, n_layers=2, mixer="s4nd")
    assert backbone(torch.randn(2, 25, 4)).shape == (2, 25, 4)
    with pytest.raises(ValueError, match=r"length is 24.*no square.*grid=\(height, width\)"):
        backbone(torch.randn(2, 24, 4))


@pytest.mark.parametrize(
    ("options", "call", "words"),
    [
        ({"grid": (4, 4)}, {}, ["length is 12", "16 points", "grid=(4, 4)"]),
        ({"grid": (3, 4)}, {"mask": torch.ones(1, 12, dtype=torch.bool)}, ["mask", "grid=(3, 4)"]),
        ({"grid": (None, 4)}, {"seq_idx": torch.zeros(1, 12, dtype=torch.int32)}, ["seq_idx", "grid"]),
        ({"grid": (None, 4)}, {"return_state": True}, ["return_state", "no state"]),
    ],
)
def test_what_a_grid_cannot_do_is_refused(options, call, words):
    with pytest.raises(ValueError) as error:
        S4ND(2, d_state=2, **options)(torch.zeros(1, 12, 2), **call)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: S4NDConv(2, 4), ["dim=4"]),
        (lambda: S4NDConv(2, systems="s4"), ["systems='s4'", "dplr"]),
        (lambda: S4NDConv(2, bandlimit=0.0), ["bandlimit=0.0"]),
        (lambda: S4NDConv(2, stride=0), ["stride=0"]),
        (lambda: S4NDConv(2, stride=(1, 1, 1)), ["stride=(1, 1, 1)", "2"]),
        (lambda: S4NDConv(2, bidirectional=[True]), ["bidirectional=[True]", "2"]),
        (lambda: S4NDConv(2, rate=(1.0, -1.0)), ["rate=-1.0"]),
        (lambda: S4NDConv(2, d_state=3), ["d_state=3"]),
        (lambda: S4NDConv(2)(torch.zeros(1, 3, 4, 4)), ["(1, 3, 4, 4)", "channels=2", "height, width"]),
        (lambda: S4NDConv(2)(torch.zeros(1, 2, 4)), ["(1, 2, 4)"]),
        (lambda: S4ND(2, (4, None)), ["grid=(4, None)"]),
        (lambda: S4ND(2, ()), ["grid=()"]),
    ],
)
def test_bad_options_are_named(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert all(word in str(error.value) for word in words), str(error.value)
