"""timm's model protocol, every model we register in turn: the checks of timm's own tests/test_models.py, and more.

TorchScript and FX tracing are not among them: the operators are opaque to both (torch.compile sees through them).
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

import mambakit
from mambakit.kernels.testing import assert_close
from mambakit.optim import SPARED_NAMES
from mambakit.registry import MODEL_HOMES

assert mambakit  # its import is what registers the models

# What makes a registered model tiny, by the beginning of its name, and the side of the images fed to it then. A model
# of fixed size (in its configuration) is told it by img_size.
SMALL: dict[str, tuple[int, dict[str, Any]]] = {
    "vim_": (32, {"embed_dim": 16, "depth": 3}),
    "vmamba_": (64, {"dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1)}),
    "vimhybrid_": (64, {"dims": (8, 16, 24, 32), "depths": (1, 1, 2, 2), "num_heads": (2, 4)}),
}
REGISTERED = [name for home in MODEL_HOMES for name in timm.list_models(module=home.rsplit(".", 1)[-1])]


def side_and_options(name: str) -> tuple[int, dict[str, Any]]:
    return next(found for prefix, found in SMALL.items() if name.startswith(prefix))


def small(name: str, seed: int = 0, side: int | None = None, **options: Any) -> Any:
    usual, others = side_and_options(name)
    size = {"img_size": side or usual} if timm.get_pretrained_cfg(name).fixed_input_size else {}
    torch.manual_seed(seed)
    return timm.create_model(name, **{**size, **others, **options})


def images(name: str, batch: int = 2, channels: int = 3, side: int | None = None) -> Tensor:
    side = side or side_and_options(name)[0]
    return torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    output = model(x)
    outputs = output if isinstance(output, list) else [output]
    weights = torch.Generator().manual_seed(2)
    sum((y.float() * torch.randn(y.shape, generator=weights)).sum() for y in outputs).backward()  # type: ignore
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_every_home_registers_models_and_every_model_has_a_small_form():
    assert all(timm.list_models(module=home.rsplit(".", 1)[-1]) for home in MODEL_HOMES)
    assert all(side_and_options(name) for name in REGISTERED)


@pytest.fixture(params=REGISTERED)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_configuration(name: str):
    """The modules it names exist in the model; no weights are claimed, and asking for them is refused."""
    model = small(name)
    cfg = model.pretrained_cfg
    assert cfg["architecture"] == name and cfg["num_classes"] == 1000
    assert not any(cfg.get(key) for key in ("url", "file", "hf_hub_id"))
    assert isinstance(model.get_submodule(cfg["classifier"]), nn.Linear)
    assert isinstance(model.get_submodule(cfg["first_conv"]), nn.Conv2d)
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        small(name, pretrained=True)


def test_forward(name: str):
    model, x = small(name).eval(), images(name)
    logits = model(x)
    assert logits.shape == (2, 1000) and logits.isfinite().all()
    assert_close("alone", model(x[1:]), logits[1:], 1e-5)
    assert torch.equal(model.forward_head(model.forward_features(x)), logits)


def test_backward(name: str):
    model = small(name, num_classes=42).train()
    for parameter, gradient in gradients(model, images(name)).items():
        assert gradient is not None and gradient.isfinite().all(), f"no gradient for {parameter}"


def test_classifier(name: str):
    """Without a head the pooled features, without pooling what forward_features gives; both from the start, too."""
    model, x = small(name).eval(), images(name)
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size) and model.head_hidden_size == model.num_features
    model.reset_classifier(7)
    assert model.num_classes == 7 and model.get_classifier().out_features == 7 and model(x).shape == (2, 7)
    model.reset_classifier(0)
    assert model.num_classes == 0 and torch.equal(model(x), pooled)
    model.reset_classifier(0, "")
    assert torch.equal(model(x), features)
    weights = model.state_dict()
    for global_pool, want in ((None, pooled), ("", features)):
        headless = small(name, num_classes=0, global_pool=global_pool).eval()
        headless.load_state_dict(weights)
        assert torch.equal(headless(x), want)


def test_intermediates(name: str):
    """Of the size that feature_info tells, independent of what else is asked for; beside them the whole features."""
    model, x = small(name).eval(), images(name)
    final, every = model.forward_intermediates(x)
    assert_close("final", final, model.forward_features(x), 1e-5)
    assert len(every) == len(model.feature_info)
    for y, info in zip(every, model.feature_info, strict=True):
        assert y.shape[:2] == (2, info["num_chs"]) and y.isfinite().all()
    first, last = model.forward_intermediates(x, indices=[0, -1], intermediates_only=True)
    assert torch.equal(first, every[0]) and torch.equal(last, every[-1])
    assert_close("final", model.forward_intermediates(x, indices=[0])[0], final, 1e-5)
    (early,) = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
    assert torch.equal(early, every[1])
    assert len(model.forward_intermediates(x, indices=2, intermediates_only=True)) == 2


def test_features_only(name: str):
    """A pruned model, whose every parameter serves its features, and the same features as of the whole one."""
    model, x = small(name, features_only=True), images(name)
    outputs = model.eval()(x)
    channels, reductions = model.feature_info.channels(), model.feature_info.reduction()
    assert len(outputs) == len(channels) >= 3
    for y, width, reduction in zip(outputs, channels, reductions, strict=True):
        assert y.shape[:2] == (2, width) and y.isfinite().all()
        assert abs(y.shape[2] - x.shape[2] / reduction) <= 1 and y.shape[2] == y.shape[3]
    for parameter, gradient in gradients(model, x).items():
        assert gradient is not None, f"no gradient for {parameter}"
    whole = small(name).eval().forward_intermediates(x, model.out_indices, intermediates_only=True)
    for y, want in zip(outputs, whole, strict=True):
        assert torch.equal(y, want)


def test_gradient_checkpointing(name: str):
    """The same gradients, stochastic depth included, from modules that run again in the backward pass."""
    model, x = small(name, drop_path_rate=0.3).train(), images(name, 4)
    found, runs = [], []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        torch.manual_seed(5)
        with torch.nn.modules.module.register_module_forward_hook(lambda *_: runs[-1].append(1)):
            runs.append([])
            found.append(gradients(model, x))
    for parameter, gradient in found[0].items():
        assert_close(parameter, found[1][parameter], gradient, 1e-4)
    assert len(runs[1]) > len(runs[0])


@pytest.mark.parametrize("channels", [1, 5])
def test_other_channels(name: str, channels: int):
    model = small(name, in_chans=channels).eval()
    assert model.in_chans == channels and model(images(name, channels=channels)).shape == (2, 1000)


def test_another_image_size(name: str):
    """Made for it, or changed to it and back where the model can be."""
    usual, _ = side_and_options(name)
    x, larger = images(name), images(name, side=2 * usual)
    assert small(name, side=2 * usual).eval()(larger).isfinite().all()
    model = small(name).eval()
    if hasattr(model, "set_input_size"):
        model.set_input_size((2 * usual, 2 * usual))
        assert model(larger).isfinite().all()
        model.set_input_size(usual)
        assert model(x).isfinite().all()


def test_saving_and_loading(name: str, tmp_path: Any):
    model, other, x = small(name).eval(), small(name, seed=1).eval(), images(name)
    assert not torch.equal(other(x), model(x))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(other(x), model(x))
    again = small(name, seed=1, checkpoint_path=str(tmp_path / "model.pt")).eval()
    assert torch.equal(again(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_groups_by_depth(name: str):
    """The stem first, then ever deeper, the head last; no parameter forgotten."""
    model = small(name)
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert set(groups) == {parameter for parameter, _ in model.named_parameters()}
    assert groups[f"{model.pretrained_cfg['first_conv']}.weight"] == 0
    assert groups[f"{model.pretrained_cfg['classifier']}.weight"] == max(groups.values()) >= 3
    classifier = model.pretrained_cfg["classifier"].split(".")[0]
    deepest = {parameter for parameter, depth in groups.items() if depth == max(groups.values())}
    assert all("norm" in parameter or parameter.startswith(f"{classifier}.") for parameter in deepest), deepest
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert max(coarse.values()) <= max(groups.values())


def test_weight_decay(name: str):
    """timm's optimiser decays no vector, no position and nothing that decides the memory, and every other matrix."""
    model = small(name)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = create_optimizer_v2(copy.copy(model), opt="adamw", lr=1e-3, weight_decay=0.1)
    seen = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            last = names[id(parameter)].rsplit(".", 1)[-1]
            spared = parameter.dim() < 2 or last in SPARED_NAMES
            assert group["weight_decay"] == (0.0 if spared else 0.1), names[id(parameter)]
            seen += 1
    assert seen == len(names)


def test_dropping(name: str):
    """Stochastic depth and dropout act in training alone."""
    x = images(name)
    plain = small(name).eval()(x)
    for option in ("drop_path_rate", "drop_rate"):
        model = small(name, **{option: 0.9})
        assert torch.equal(model.eval()(x), plain)
        assert not torch.equal(model.train()(x), plain)
