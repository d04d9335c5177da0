"""PatchEmbedding beside its patches cut out by hand, and what it says of images that patches do not cover."""

from __future__ import annotations

import re

import pytest
import torch

from mambakit import Backbone
from mambakit.embeddings import PatchEmbedding
from mambakit.kernels.testing import assert_close


@pytest.mark.parametrize(("patch", "stride"), [(4, None), (4, 2), ((2, 4), (2, 3))])
def test_every_vector_is_a_projected_patch(patch, stride):
    torch.manual_seed(0)
    embedding = PatchEmbedding(6, (8, 10 if isinstance(patch, tuple) else 12), patch, stride, in_chans=2)
    images = torch.randn(2, 2, *embedding.img_size)
    (rows, columns), (height, width), steps = embedding.grid_size, embedding.patch_size, embedding.stride
    y = embedding(images)
    assert y.shape == (2, rows * columns, 6) and embedding.num_patches == rows * columns
    for i in range(rows):
        for j in range(columns):
            top, left = i * steps[0], j * steps[1]
            cut = images[:, :, top : top + height, left : left + width].flatten(1)
            want = cut @ embedding.proj.weight.flatten(1).T + embedding.proj.bias
            assert_close(f"patch {i}, {j}", y[:, i * columns + j], want, 1e-5)


def test_weights_begin_as_lecun_has_them():
    torch.manual_seed(0)
    weight = PatchEmbedding(256, 32, 16).proj.weight
    deviation = (3 * 16 * 16) ** -0.5
    assert weight.std().item() == pytest.approx(deviation, rel=0.02)
    assert weight.abs().max() <= 2 * deviation / 0.8796 + 1e-6


def test_before_a_backbone():
    y = Backbone(8, 1, mixer="vim", embedding=PatchEmbedding(8, 8, 4))(torch.randn(2, 3, 8, 8))
    assert y.shape == (2, 4, 8)


def test_any_size_that_patches_cover_where_it_is_not_strict():
    embedding = PatchEmbedding(4, 8, 4, strict_img_size=False)
    assert embedding(torch.randn(1, 3, 12, 16)).shape == (1, 12, 4)
    with pytest.raises(ValueError, match="13 x 16 pixels is not divisible .* 1 rows .* resize it to 12 x 16"):
        embedding(torch.randn(1, 3, 13, 16))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"img_size": 230}, "an image of 230 x 230 pixels is not divisible into patches of 16 x 16"),
        ({"img_size": (224, 228), "stride": 8}, "0 rows and 4 columns of pixels are left over; resize it to 224 x 224"),
        ({"img_size": 8}, "an image of 8 x 8 pixels is smaller than a patch of 16 x 16"),
        ({"stride": 17}, "stride=17, expected 1 to patch_size=16"),
        ({"stride": 0}, "stride=0, expected 1 to patch_size=16"),
    ],
)
def test_sizes_that_do_not_fit(options, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        PatchEmbedding(4, **options)


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ((1, 3, 16, 32), "images of 16 x 32 pixels came, expected 32 x 32"),
        ((1, 1, 32, 32), "expected (batch, in_chans=3, height, width)"),
        ((3, 32, 32), "images have shape (3, 32, 32)"),
    ],
)
def test_images_that_do_not_fit(shape, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        PatchEmbedding(4, 32)(torch.zeros(shape))
