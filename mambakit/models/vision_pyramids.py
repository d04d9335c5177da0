"""The sizes of VMamba and of the hybrid in timm's registry.

Importing this module registers them, which ``import mambakit`` brings about (:mod:`mambakit.registry`):

>>> model = timm.create_model("vmamba_tiny_s1l8", num_classes=10)
>>> maps = timm.create_model("vimhybrid_tiny", features_only=True)(images)  # at strides 4, 8, 16, 32

Every option of :class:`mambakit.models.vmamba.VMamba` and :class:`mambakit.models.hybrid_vision.HybridVision` may be
given. In VMamba's names "s" is the expansion of its scans and "l" the depth of its third stage.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

if TYPE_CHECKING:
    from mambakit.models.hybrid_vision import HybridVision
    from mambakit.models.vmamba import VMamba


def _cfg(**options: Any) -> dict[str, Any]:
    """Evaluation at 224 pixels. No url: there are files of VMamba's authors, loaded by their path, and no others."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "first_conv": "patch_embed.0",
        "classifier": "classifier.head",
        **options,
    }


_VMAMBA = {"paper_ids": "arXiv:2401.10166", "origin_url": "https://github.com/MzeroMiko/VMamba", "license": "mit"}
_WIDE = (128, 256, 512, 1024)
default_cfgs = generate_default_cfgs(
    {
        **{
            f"vmamba_{size}": _cfg(**_VMAMBA)
            for size in ("tiny_s1l8", "tiny_s2l5", "small_s1l20", "small_s2l15", "base_s1l20", "base_s2l15")
        },
        **{f"vimhybrid_{size}": _cfg() for size in ("tiny", "small", "base")},
    }
)


def _create(variant: str, pretrained: bool, **options: Any) -> Any:
    # Loaded here: timm, whose import may be what brings this module in, is not complete before.
    from mambakit.models.hybrid_vision import HybridVision
    from mambakit.models.pyramid import checkpoint_filter_fn
    from mambakit.models.vmamba import VMamba

    return build_model_with_cfg(
        VMamba if variant.startswith("vmamba") else HybridVision,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **options,
    )


@register_model
def vmamba_tiny_s1l8(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T[s1l8], the tiny one of the paper."""
    return _create("vmamba_tiny_s1l8", pretrained, **{"depths": (2, 2, 8, 2), "expand": 1, **kwargs})


@register_model
def vmamba_tiny_s2l5(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T[s2l5]."""
    return _create("vmamba_tiny_s2l5", pretrained, **{"depths": (2, 2, 5, 2), "expand": 2, **kwargs})


@register_model
def vmamba_small_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S[s1l20]."""
    return _create("vmamba_small_s1l20", pretrained, **{"depths": (2, 2, 20, 2), "expand": 1, **kwargs})


@register_model
def vmamba_small_s2l15(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S[s2l15], the small one of the paper."""
    return _create("vmamba_small_s2l15", pretrained, **{"depths": (2, 2, 15, 2), "expand": 2, **kwargs})


@register_model
def vmamba_base_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B[s1l20]."""
    options = {"dims": _WIDE, "depths": (2, 2, 20, 2), "expand": 1, **kwargs}
    return _create("vmamba_base_s1l20", pretrained, **options)


@register_model
def vmamba_base_s2l15(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B[s2l15], the base one of the paper."""
    options = {"dims": _WIDE, "depths": (2, 2, 15, 2), "expand": 2, **kwargs}
    return _create("vmamba_base_s2l15", pretrained, **options)


@register_model
def vimhybrid_tiny(pretrained: bool = False, **kwargs: Any) -> HybridVision:
    """Widths 80 to 640, 16 blocks: the arrangement of MambaVision-T."""
    options = {"dims": (80, 160, 320, 640), "depths": (1, 3, 8, 4), **kwargs}
    return _create("vimhybrid_tiny", pretrained, **options)


@register_model
def vimhybrid_small(pretrained: bool = False, **kwargs: Any) -> HybridVision:
    """Widths 96 to 768, 18 blocks: the arrangement of MambaVision-S."""
    options = {"dims": (96, 192, 384, 768), "depths": (3, 3, 7, 5), **kwargs}
    return _create("vimhybrid_small", pretrained, **options)


@register_model
def vimhybrid_base(pretrained: bool = False, **kwargs: Any) -> HybridVision:
    """Widths 128 to 1024, 21 blocks: the arrangement of MambaVision-B."""
    options = {"dims": _WIDE, "depths": (3, 3, 10, 5), **kwargs}
    return _create("vimhybrid_base", pretrained, **options)
