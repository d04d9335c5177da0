"""swap_mixers and swap_convolutions: what goes, what stays, what is refused; in timm, in torch, in Lightning."""

from __future__ import annotations

import copy
from functools import partial

import lightning
import pytest
import timm
import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from mambakit import swap_convolutions, swap_mixers
from mambakit.kernels.testing import assert_close, random_tensor
from mambakit.mixers import Bidirectional, Mamba1, Mamba2, S4NDConv, VimMixer

SMALL = partial(Mamba2, d_state=4, headdim=8, chunk_size=8)


def vit(**options) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 5}
    return timm.create_model("deit_tiny_patch16_224", **{**sizes, **options})


def encoder(batch_first: bool = True, layers: int = 2) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=batch_first)
    return nn.TransformerEncoder(layer, layers)


def test_timm():
    """Attention goes, all else stays, weights included; every parameter learns."""
    model = vit(proj_drop_rate=0.25)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    replaced = swap_mixers(model, SMALL)
    assert list(replaced) == [f"blocks.{i}.attn" for i in range(3)]
    assert all(type(module) is timm.layers.Attention for module in replaced.values())
    after = model.state_dict()
    kept = [name for name in before if ".attn." not in name]
    assert kept == [name for name in after if ".attn." not in name]
    assert all(torch.equal(before[name], after[name]) for name in kept) and "cls_token" in kept
    assert all(isinstance(block.attn.mixer, Bidirectional) for block in model.blocks)
    assert all(block.attn.proj_drop is replaced[f"blocks.{i}.attn"].proj_drop for i, block in enumerate(model.blocks))
    logits = model(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing


def test_the_function_is_the_mixers():
    """The block computes x + mixer(norm1(x)) where it computed x + attention(norm1(x)); both ways by default."""
    model = vit(depth=1).eval()
    swap_mixers(model, SMALL)
    block, x = model.blocks[0], torch.randn(1, 5, 16)
    want = x + block.attn.mixer(block.norm1(x))
    assert_close("block", block(x), want + block.mlp(block.norm2(want)), 1e-6)
    moved = x.clone()
    moved[:, -1, 0] += 1
    assert not torch.equal(block(x)[:, 0], block(moved)[:, 0])


def test_dropout_behind_the_attention_is_kept():
    model = vit(depth=1, proj_drop_rate=0.5)
    swap_mixers(model, SMALL)
    attn, x = model.blocks[0].attn, torch.randn(2, 5, 16)
    dropped = attn(x) == 0
    assert 0.2 < dropped.float().mean() < 0.8
    assert torch.equal(attn.eval()(x), attn.mixer(x))


def test_one_direction():
    model = vit(depth=1)
    swap_mixers(model, SMALL, bidirectional=False)
    assert type(model.blocks[0].attn.mixer) is Mamba2
    x = torch.randn(1, 5, 16)
    assert torch.equal(model.blocks[0](x, is_causal=True), model.blocks[0](x))


def test_a_mixer_that_sees_both_ways_is_taken_as_it_is():
    model = vit(depth=1)
    swap_mixers(model, "vim")
    assert type(model.blocks[0].attn.mixer) is VimMixer


@pytest.mark.parametrize(
    "where", ["blocks.[02].attn", lambda name, module: name.startswith("blocks") and "1" not in name]
)
def test_where(where):
    model = vit()
    assert list(swap_mixers(model, SMALL, where=where)) == ["blocks.0.attn", "blocks.2.attn"]
    assert type(model.blocks[1].attn) is timm.layers.Attention


def test_device_dtype_and_mode_are_kept():
    model = vit(depth=1).eval().to("meta", torch.bfloat16)
    swap_mixers(model, SMALL)
    place = model.blocks[0].attn
    assert {(p.device.type, p.dtype) for p in place.parameters()} == {("meta", torch.bfloat16)}
    assert not any(module.training for module in place.modules())


def test_a_module_in_two_places_stays_one():
    model = vit(depth=2)
    model.blocks[1].attn = model.blocks[0].attn
    assert len(swap_mixers(model, SMALL)) == 2
    assert model.blocks[0].attn is model.blocks[1].attn


def test_timm_does_not_decay_what_decides_the_memory():
    """A_log of Mamba-1 is a matrix: timm decays it unless the model says no (and the model can still be copied)."""
    model = vit(depth=1)
    swap_mixers(model, partial(Mamba1, d_state=2))
    model = copy.deepcopy(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
    spared = {names[id(p)] for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert "blocks.0.attn.mixer.mamba_fwd.A_log" in spared and "pos_embed" in spared
    assert "blocks.0.attn.mixer.mamba_fwd.in_proj.weight" not in spared


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_torch(batch_first, training):
    """Both layouts, in training and on the path that torch would take fused in evaluation, padding kept out."""
    model = encoder(batch_first)
    replaced = swap_mixers(model, SMALL)
    assert list(replaced) == ["layers.0.self_attn", "layers.1.self_attn"]
    model.train(training)
    x = random_tensor(2, 6, 16, seed=1)
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])

    def run(x: Tensor, padding: Tensor | None = None) -> Tensor:
        with torch.set_grad_enabled(training):
            x = x if batch_first else x.transpose(0, 1)
            y = model(x, src_key_padding_mask=padding)
        return y if batch_first else y.transpose(0, 1)

    y = run(x, padding)
    assert y.shape == x.shape
    assert_close("unpadded", y[:1], run(x[:1]), 1e-5)
    assert_close("padded", y[1:, :4], run(x[1:, :4]), 1e-5)


def test_an_encoder_that_keeps_its_attention_keeps_its_fast_path():
    both = nn.ModuleDict({"swapped": encoder(), "kept": encoder()})
    swap_mixers(both, SMALL, where="swapped.*")
    assert both["kept"].use_nested_tensor and not both["swapped"].use_nested_tensor


def test_torch_layouts_agree():
    first, second = encoder(True), encoder(False)
    swap_mixers(first, SMALL)
    swap_mixers(second, SMALL)
    second.load_state_dict(first.state_dict())
    x = random_tensor(2, 6, 16, seed=1)
    assert_close("layout", second(x.transpose(0, 1)).transpose(0, 1), first(x), 1e-6)


def test_causal_masks():
    """A causal mask is what a causal mixer does; another mask is refused, and any is by one that sees both ways."""
    model = encoder()
    swap_mixers(model, SMALL, bidirectional=False)
    x = random_tensor(2, 6, 16, seed=1)
    causal = nn.Transformer.generate_square_subsequent_mask(6)
    y = model(x, mask=causal)
    assert torch.equal(y, model(x, mask=causal, is_causal=True)) and torch.equal(y, model(x, mask=causal < 0))
    assert_close("past", y[:, :3], model(x[:, :3]), 1e-5)
    with pytest.raises(ValueError, match="other than the causal one"):
        model(x, mask=causal.T)
    both = encoder()
    swap_mixers(both, SMALL)
    with pytest.raises(ValueError, match="bidirectional=False"):
        both(x, mask=causal)
    timms = vit(depth=1)
    swap_mixers(timms, SMALL, bidirectional=False)
    tokens = random_tensor(1, 6, 16, seed=1)
    seen = causal == 0  # in timm's masks True is seen, in torch's hidden
    assert torch.equal(timms.blocks[0](tokens, attn_mask=seen), timms.blocks[0](tokens, attn_mask=causal))
    with pytest.raises(ValueError, match="other than the causal one"):
        timms.blocks[0](tokens, attn_mask=~seen)


def test_multihead_attention_by_itself():
    """Called as it was, batched or not; there are no weights to return."""
    holder = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2, batch_first=True)})
    swap_mixers(holder, SMALL)
    x = torch.randn(3, 5, 16)
    y, weights = holder["attention"](x, x, x)
    assert weights is None and y.shape == x.shape
    one, start = x[0], x[0, :4]
    alone, _ = holder["attention"](one, one, one, key_padding_mask=torch.tensor([False] * 4 + [True]))
    cut, _ = holder["attention"](start, start, start)
    assert_close("unbatched", alone[:4], cut, 1e-5)
    with pytest.raises(ValueError, match="another sequence"):
        holder["attention"](x, x.clone(), x.clone())


def test_decoders():
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 1)
    with pytest.raises(ValueError, match=r"layers.0.multihead_attn.*encoder's"):
        swap_mixers(decoder, SMALL)
    assert type(decoder.layers[0].self_attn) is nn.MultiheadAttention  # nothing was changed
    swap_mixers(decoder, SMALL, where="*.self_attn", bidirectional=False)
    x, memory = torch.randn(2, 6, 16), torch.randn(2, 3, 16)
    assert_close("past", decoder(x, memory)[:, :4], decoder(x[:, :4], memory), 1e-5)


@pytest.mark.parametrize(
    ("make", "where", "words"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4)), None, ["Sequential", "no attention"]),
        (vit, "layers.*", ["layers.*", "blocks.0.attn"]),
        (lambda: nn.MultiheadAttention(16, 2), None, ["itself", "MultiheadAttention"]),
        (lambda: nn.ModuleDict({"a": nn.MultiheadAttention(16, 2, kdim=8)}), None, ["a has", "kdim=8", "width"]),
        (
            lambda: timm.create_model("swin_tiny_patch4_window7_224", embed_dim=8, depths=(1,), num_heads=(2,)),
            None,
            ["WindowAttention", "windows"],
        ),
    ],
)
def test_what_cannot_be_swapped(make, where, words):
    with pytest.raises(ValueError) as error:
        swap_mixers(make(), SMALL, where=where)
    assert all(word in str(error.value) for word in words), str(error.value)


class Classifier(lightning.LightningModule):
    """What a user has already, with the one line that is ours."""

    def __init__(self) -> None:
        super().__init__()
        self.model = vit(depth=1)
        swap_mixers(self.model, SMALL)

    def training_step(self, batch, _):
        images, labels = batch
        return nn.functional.cross_entropy(self.model(images), labels)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def test_in_a_lightning_project(tmp_path):
    task = Classifier()
    before = task.model.blocks[0].attn.mixer.mamba_fwd.in_proj.weight.clone()
    batch = [(torch.randn(4, 3, 32, 32), torch.arange(4))]
    trainer = lightning.Trainer(
        max_steps=1, accelerator="cpu", default_root_dir=tmp_path, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(task, torch.utils.data.DataLoader(batch, batch_size=None))
    assert not torch.equal(before, task.model.blocks[0].attn.mixer.mamba_fwd.in_proj.weight)


def convnext() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("convnext_atto", dims=(4, 4, 8, 8), depths=(1, 1, 1, 1), num_classes=3)


def test_convolutions():
    """Every depth-wise convolution by default; any image size, as before."""
    model = convnext()
    replaced = swap_convolutions(model, d_state=2)
    assert list(replaced) == [f"stages.{i}.blocks.0.conv_dw" for i in range(4)]
    assert all(isinstance(model.get_submodule(name), S4NDConv) for name in replaced)
    x = torch.randn(1, 3, 32, 64)
    y = model(x)
    assert y.shape == (1, 3)
    y.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    # As large as its input: one pixel reaches every place of the first stage's output.
    stage = model.stages[0].blocks[0].conv_dw
    small = torch.randn(1, 4, 6, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(stage(small)[0, :, 5, 4].square().sum(), small)
    assert bool((gradient.abs() > 0).all())


def test_chosen_convolutions():
    model = convnext()
    assert list(swap_convolutions(model, "stem.0", d_state=2)) == ["stem.0"]
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)
    assert type(model.stages[0].blocks[0].conv_dw) is nn.Conv2d


@pytest.mark.parametrize(
    ("model", "where", "words"),
    [
        (nn.Linear(3, 3), None, ["Linear", "no depth-wise convolution"]),
        (nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)), "1", ["where='1'", "has 0"]),
        (nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)), None, ["0 cannot be replaced", "padding=(0, 0)"]),
    ],
)
def test_convolutions_that_cannot_be_swapped(model, where, words):
    with pytest.raises(ValueError) as error:
        swap_convolutions(model, where, d_state=2)
    assert all(word in str(error.value) for word in words), str(error.value)
