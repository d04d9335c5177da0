"""Models by their timm name, with weights from a file."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mambakit.checkpoints import misfits
from mambakit.spelling import did_you_mean

# What most image models of timm and ours call their options, to suggest one for a misspelt name.
USUAL_OPTIONS = (
    *(
        "img_size",
        "patch_size",
        "stride",
        "in_chans",
        "embed_dim",
        "depth",
        "depths",
        "num_heads",
        "mlp_ratio",
        "mixer",
    ),
    *("global_pool", "drop_rate", "pos_drop_rate", "drop_path_rate", "window_size", "dynamic_img_size", "pretrained"),
)


def timm_model(name: str, weights: str | None = None, **options: Any) -> nn.Module:
    """``timm.create_model``, its refusals in words.

    Args:
        name: of a model that timm or mambakit registers.
        weights: a file: timm's or the original authors', or a checkpoint of a task of ours around a model of this name.
            Positions are resampled to another image size where the model can; the classifier stays new where the file
            has none or one of other classes. Everything else must fit.
        **options: of the model. Those that are None are left to the model.

    Raises:
        ValueError: an unknown name, an option the model does not take, weights of another model.
        FileNotFoundError: no such file of weights.
    """
    import timm

    if not timm.is_model(name):
        hint = did_you_mean(name, timm.list_models())
        raise ValueError(f"backbone: timm has no model {name!r}{hint}; timm.list_models() lists them")
    try:
        model = timm.create_model(name, **options)
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is None or unknown[1] not in options:
            raise
        raise ValueError(
            f"timm_options: {name} has no option {unknown[1]!r}{did_you_mean(unknown[1], USUAL_OPTIONS)}"
        ) from error
    if weights is not None:
        load_weights(model, weights)
    return model


def load_weights(model: nn.Module, path: str) -> None:
    """Put a file's weights into a timm model, as of :func:`timm_model`."""
    from timm.models import load_state_dict

    if not Path(path).is_file():
        raise FileNotFoundError(f"weights: there is no file {path}; give a checkpoint of this model")
    saved: dict[str, Tensor] = dict(load_state_dict(path, use_ema=False))
    if any(key.startswith("model.") for key in saved):  # a task's, which also holds metrics and heads of its own
        saved = {key.removeprefix("model."): value for key, value in saved.items() if key.startswith("model.")}
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if adapt is not None:
        saved = dict(adapt(saved, model))
    wanted = model.state_dict()
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    for key in (f"{name}.{part}" for name in names for part in ("weight", "bias")):
        if key not in wanted:
            saved.pop(key, None)
        elif key not in saved or saved[key].shape != wanted[key].shape:
            saved[key] = wanted[key]
    faults = misfits(saved, wanted)
    if faults:
        raise ValueError(f"weights: {path} is of another model: {'; '.join(faults)}; name the model it was made with")
    model.load_state_dict(saved)


def spare_from_decay(model: nn.Module) -> None:
    """Mark what a timm model wants kept from weight decay, for :func:`mambakit.optim.parameter_groups`."""
    spared: set[str] = getattr(model, "no_weight_decay", set)()
    for name, parameter in model.named_parameters():
        if name in spared:
            parameter._no_weight_decay = True  # type: ignore[attr-defined]


def check_features(model: nn.Module) -> Any:
    """The model, if it gives feature maps by timm's protocol.

    Raises:
        ValueError: it does not.
    """
    if not (hasattr(model, "forward_intermediates") and getattr(model, "feature_info", None)):
        raise ValueError(
            f"backbone: {type(model).__name__} gives no feature maps; expected a model with timm's "
            "forward_intermediates and feature_info, such as vim_tiny_patch16_224"
        )
    return model
