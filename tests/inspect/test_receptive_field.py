"""The effective receptive field, against models whose field is known and against gradients taken by hand."""

import pytest
import timm
import torch
from torch import nn

from mambakit import Backbone
from mambakit.embeddings import PatchEmbedding
from mambakit.inspect import ReceptiveField, receptive_field
from mambakit.models.vision_mamba import VisionMamba


def tiny_vim(**options):
    torch.manual_seed(0)
    return VisionMamba(
        **{"img_size": (8, 12), "patch_size": 2, "embed_dim": 16, "depth": 2, "num_classes": 3, **options}
    )


def ones(*layers: nn.Conv2d) -> nn.Sequential:
    for layer in layers:
        nn.init.ones_(layer.weight)
    return nn.Sequential(*layers)


def test_of_three_convolutions_it_is_the_product_of_three_boxes():
    model = ones(*(nn.Conv2d(i, o, 3, padding=1, bias=False) for i, o in ((2, 1), (1, 1), (1, 2))))
    with torch.no_grad():
        model[2].weight[0] *= 3
        model[2].weight[1] *= 4  # a vector (3 f, 4 f) is 5 f long
    field = receptive_field(model, torch.rand(2, 2, 11, 13))
    rows, columns = torch.zeros(11, dtype=torch.float64), torch.zeros(13, dtype=torch.float64)
    paths = torch.tensor([1, 3, 6, 7, 6, 3, 1], dtype=torch.float64)
    rows[2:9], columns[3:10] = paths, paths
    expected = 5 * 2 * torch.outer(rows, columns)  # 2: the channels of the images
    assert field.location == (5, 6) and field.grid == (11, 13) and field.images == 2
    torch.testing.assert_close(field.contribution, expected, rtol=1e-6, atol=0)
    assert field.center == (5, 6)
    assert field.side(1) == 7


def test_of_strided_convolutions_it_is_the_window_of_the_location():
    model = ones(nn.Conv2d(1, 1, 2, stride=2, bias=False), nn.Conv2d(1, 1, 3, stride=3, bias=False))
    field = receptive_field(model, torch.rand(1, 1, 12, 18), location=(1, 0))
    expected = torch.zeros(12, 18, dtype=torch.float64)
    expected[6:12, 0:6] = 1
    assert field.grid == (2, 3)
    torch.testing.assert_close(field.contribution, expected)
    assert field.center == (8.5, 2.5)
    assert field.side(1) == 6


def test_it_is_the_mean_over_images_of_sizes_without_sign():
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.ReLU())
    nn.init.constant_(model[0].weight, -2.0)
    images = torch.ones(4, 1, 3, 3)
    images[0] = -1  # of four images the ReLU lets one through
    for given in (images, images.split(1), iter(images.split(3))):
        field = receptive_field(model, given)
        assert field.images == 4
        assert field.contribution[1, 1] == 0.5 and field.contribution.sum() == 0.5


@pytest.mark.parametrize("location", [(0, 0), (1, 5), (2, 0), (3, 5)])
def test_the_class_token_in_the_middle_of_a_vim_has_no_place(location):
    model = tiny_vim(patch_size=2)
    field = receptive_field(model, torch.randn(2, 3, 8, 12), location=location)
    row, column = location
    patches = field.contribution.unflatten(0, (4, 2)).unflatten(2, (6, 2)).sum((1, 3))
    assert field.grid == (4, 6) and field.contribution.shape == (8, 12)
    assert divmod(int(patches.argmax()), 6) == (row, column)  # at the start of training a place moves itself most


@pytest.mark.parametrize("layer", [0, -1])
def test_of_a_vim_it_is_the_gradient_of_the_stream(layer):
    model = tiny_vim().double().eval()
    images = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    field = receptive_field(model, images, layer=layer, location=(2, 1))
    x = images.clone().requires_grad_()
    hidden, residual = model._embed(x), None
    for i in range(1 if layer == 0 else 2):
        hidden, residual = model._layer(i, hidden, residual)
    stream = residual + hidden
    stream[:, 2 * 6 + 1 + 1].norm(dim=1).sum().backward()  # behind the class token, which is number 12
    torch.testing.assert_close(field.contribution, x.grad.abs().sum(1).mean(0), rtol=1e-9, atol=1e-12)


def test_a_task_around_a_model_is_looked_through():
    model = tiny_vim()
    images = torch.randn(1, 3, 8, 12)
    inside = receptive_field(nn.Sequential(model, nn.Softmax(-1)), images)
    torch.testing.assert_close(inside.contribution, receptive_field(model, images).contribution)


def test_of_a_transformer_of_timm_its_class_token_in_front_has_no_place():
    torch.manual_seed(0)
    options = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = timm.create_model("deit_tiny_patch16_224", **options)
    field = receptive_field(model, torch.randn(2, 3, 16, 16), location=(2, 1))
    patches = field.contribution.unflatten(0, (4, 4)).unflatten(2, (4, 4)).sum((1, 3))
    assert field.grid == (4, 4)
    assert divmod(int(patches.argmax()), 4) == (2, 1)


def test_of_a_convolutional_network_of_timm_a_layer_is_a_stage():
    model = timm.create_model("resnet10t", num_classes=0)
    fields = [receptive_field(model, torch.randn(1, 3, 64, 64), layer=layer) for layer in (1, 2)]
    assert [field.grid for field in fields] == [(16, 16), (8, 8)]
    assert fields[0].side(1) < fields[1].side(1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_causal_backbone_reads_what_came_before(checkpointing):
    torch.manual_seed(0)
    embedding = PatchEmbedding(16, 12, 4, in_chans=1)
    model = Backbone(16, 2, "mamba1", embedding=embedding, gradient_checkpointing=checkpointing)
    field = receptive_field(model, torch.randn(2, 1, 12, 12), location=(1, 1))
    patches = field.contribution.unflatten(0, (3, 4)).unflatten(2, (3, 4)).sum((1, 3)).flatten()
    assert (patches[:5] > 0).all() and (patches[5:] == 0).all()


@pytest.mark.parametrize("layer", [0, -2, 1, -1])
def test_of_a_backbone_of_sequences_it_is_the_gradient_of_the_stream(layer):
    torch.manual_seed(0)
    model = Backbone(16, 2, "vim").double()
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    field = receptive_field(model, x, layer=layer, location=(2,))
    assert field.grid == (7,) and field.contribution.shape == (7,)
    x.requires_grad_()
    stream = x
    for one in model.layers[: layer % 2 + 1]:
        stream = stream + one.mixer(one.norm(stream)[0])
    stream[:, 2].norm(dim=1).sum().backward()
    torch.testing.assert_close(field.contribution, x.grad.abs().sum(2).mean(0), rtol=1e-9, atol=1e-12)


def test_the_model_is_left_as_it_was():
    model = tiny_vim(drop_rate=0.5)
    model.train()
    model.head_drop.eval()
    before = {name: part.training for name, part in model.named_modules()}
    receptive_field(model, torch.randn(1, 3, 8, 12))
    assert {name: part.training for name, part in model.named_modules()} == before
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(part._forward_pre_hooks for part in model.modules())


def test_dropout_takes_no_part():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Dropout(1.0))
    nn.init.ones_(model[0].weight)
    assert receptive_field(model, torch.rand(1, 1, 3, 3)).contribution[1, 1] == 1


def test_the_sides_of_squares_by_hand():
    contribution = torch.zeros(5, 5, dtype=torch.float64)
    contribution[2, 2], contribution[1, 2], contribution[0, 4] = 5, 3, 2
    field = ReceptiveField(contribution, (2, 2), (5, 5), 1)
    sides, inside = field.held()
    assert sides.tolist() == [1, 3, 5] and inside.tolist() == [0.5, 0.8, 1]
    assert [field.side(share) for share in (0.5, 0.6, 0.8, 1)] == [1, 3, 3, 5]
    with pytest.raises(ValueError, match="share=0, expected above 0"):
        field.side(0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"images": []}, "images is empty"),
        ({"images": torch.rand(1, 5, 5)[0]}, r"images have shape \(5, 5\)"),
        ({"images": [torch.rand(1, 1, 5, 5), torch.rand(1, 1, 4, 5)]}, r"images of \(5, 5\) and of \(4, 5\) came"),
        ({"images": torch.full((1, 1, 5, 5), torch.nan)}, "not finite"),
        ({"location": (5, 0)}, r"location=\(5, 0\), expected a place in a grid of 5 x 5"),
        ({"location": (1,)}, r"location=\(1,\), expected a place in a grid of 5 x 5"),
        ({"layer": 0}, "layer=0, but a plain module has its output alone"),
        ({"model": nn.Flatten()}, r"the model gives \(1, 25\) for \(1, 1, 5, 5\)"),
        ({"model": lambda x: x.detach()}, r"the features at \(2, 2\) do not depend on the images"),
        ({"model": lambda x: x * 0}, r"the features at \(2, 2\) do not depend on the images"),
        ({"model": Backbone(4, 2), "images": torch.rand(1, 3, 4), "layer": 2}, "layer=2, expected -2 to 1"),
    ],
)
def test_what_cannot_be_looked_at_is_named(given, message):
    arguments = {"model": nn.Sequential(nn.Conv2d(1, 1, 1), nn.Tanh()), "images": torch.rand(1, 1, 5, 5), **given}
    with pytest.raises(ValueError, match=message):
        receptive_field(**arguments)


def test_whole_numbers_are_no_images():
    with pytest.raises(TypeError, match=r"images are torch\.uint8, expected floating"):
        receptive_field(nn.Conv2d(1, 1, 1), torch.zeros(1, 1, 5, 5, dtype=torch.uint8))
