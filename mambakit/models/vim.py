"""The sizes of Vision Mamba in timm's registry.

Importing this module registers them, which ``import mambakit`` brings about (:mod:`mambakit.registry`):

>>> model = timm.create_model("vim_tiny_patch16_224", num_classes=10)

Every option of :class:`mambakit.models.vision_mamba.VisionMamba` may be given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, register_model_deprecations

if TYPE_CHECKING:
    from mambakit.models.vision_mamba import VisionMamba


def _cfg(**options: Any) -> dict[str, Any]:
    """Evaluation as in the paper. No url: the authors' files are loaded by their path."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "fixed_input_size": True,
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "origin_url": "https://github.com/hustvl/Vim",
        "paper_ids": "arXiv:2401.09417",
        **options,
    }


default_cfgs = generate_default_cfgs(
    {f"vim_{size}_patch16_{stride}224": _cfg() for size in ("tiny", "small", "base") for stride in ("", "stride8_")}
)


def _create(variant: str, pretrained: bool, **options: Any) -> VisionMamba:
    from mambakit.models.vision_mamba import VisionMamba, checkpoint_filter_fn

    return build_model_with_cfg(
        VisionMamba,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **options,
    )


@register_model
def vim_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-Ti: 24 layers of width 192, patches of 16 pixels."""
    return _create("vim_tiny_patch16_224", pretrained, **{"embed_dim": 192, "depth": 24, **kwargs})


@register_model
def vim_tiny_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-Ti+: the same with a patch every 8 pixels, for fine-tuning on longer sequences."""
    return _create("vim_tiny_patch16_stride8_224", pretrained, **{"stride": 8, "embed_dim": 192, "depth": 24, **kwargs})


@register_model
def vim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-S: 24 layers of width 384, patches of 16 pixels."""
    return _create("vim_small_patch16_224", pretrained, **{"embed_dim": 384, "depth": 24, **kwargs})


@register_model
def vim_small_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-S+: the same with a patch every 8 pixels."""
    return _create(
        "vim_small_patch16_stride8_224", pretrained, **{"stride": 8, "embed_dim": 384, "depth": 24, **kwargs}
    )


@register_model
def vim_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-B: 24 layers of width 768, patches of 16 pixels."""
    return _create("vim_base_patch16_224", pretrained, **{"embed_dim": 768, "depth": 24, **kwargs})


@register_model
def vim_base_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-B with a patch every 8 pixels."""
    return _create("vim_base_patch16_stride8_224", pretrained, **{"stride": 8, "embed_dim": 768, "depth": 24, **kwargs})


# The names under which the original registers its models, which old scripts say.
_TAIL = "224_bimambav2_final_pool_mean_abs_pos_embed_with_"
register_model_deprecations(
    __name__,
    {
        f"vim_tiny_patch16_{_TAIL}midclstok_div2": "vim_tiny_patch16_224",
        f"vim_tiny_patch16_stride8_{_TAIL}midclstok_div2": "vim_tiny_patch16_stride8_224",
        f"vim_small_patch16_{_TAIL}midclstok_div2": "vim_small_patch16_224",
        f"vim_small_patch16_stride8_{_TAIL}midclstok_div2": "vim_small_patch16_stride8_224",
        f"vim_base_patch16_{_TAIL}middle_cls_token_div2": "vim_base_patch16_224",
    },
)
