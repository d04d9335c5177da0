"""Named sizes: Mamba, Mamba-2, the Transformer of equal size, and a small Jamba.

>>> model = mamba_130m()
>>> encoder = PresetBackbone("mamba2_370m", gradient_checkpointing=True)

In a recipe: ``backbone: mamba_130m``, or ``class_path: mambakit.models.PresetBackbone`` with its arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

from mambakit.backbone import Backbone
from mambakit.mixers.attention import Attention
from mambakit.mixers.mamba1 import Mamba1
from mambakit.mlp import MixtureOfExperts, SwiGLU
from mambakit.models.language_model import LanguageModel
from mambakit.spelling import did_you_mean

PresetName = Literal[
    "mamba_130m",
    "mamba_370m",
    "mamba_790m",
    "mamba_1_4b",
    "mamba_2_8b",
    "mamba2_130m",
    "mamba2_370m",
    "mamba2_780m",
    "mamba2_1_3b",
    "mamba2_2_7b",
    "transformer_125m",
    "transformer_350m",
    "transformer_760m",
    "transformer_1_3b",
    "transformer_2_7b",
    "jamba_small",
]


@dataclass(frozen=True)
class Preset:
    """A language model of a named size: call it.

    Args:
        stack: what makes its backbone; takes ``dropout`` and ``gradient_checkpointing``.
        pad_vocab: the vocabulary is rounded up to a multiple of this, as in the released checkpoints.
    """

    stack: partial[Backbone]
    pad_vocab: int = 16

    def __call__(
        self,
        vocab_size: int = 50277,
        tie_embeddings: bool = True,
        dropout: float = 0.0,
        gradient_checkpointing: bool = False,
    ) -> LanguageModel:
        """An untrained model.

        Args:
            vocab_size: number of token ids before rounding up; GPT-NeoX's by default.
            tie_embeddings: embedding and head share one matrix.
            dropout: as of :class:`mambakit.Backbone`.
            gradient_checkpointing: as of :class:`mambakit.Backbone`.
        """
        backbone = self.stack(dropout=dropout, gradient_checkpointing=gradient_checkpointing)
        return LanguageModel(round_up(vocab_size, self.pad_vocab), backbone, tie_embeddings)


def _attention(d_model: int, n_layers: int) -> Preset:
    """A Transformer++: RMSNorm, rotary positions, SwiGLU, no biases, heads of 64 channels or a little more."""
    return Preset(partial(Backbone, d_model, n_layers, "attention", mlp="swiglu"))


# Gu and Dao 2023, arXiv 2312.00752; released as state-spaces/mamba-130m and so on.
mamba_130m = Preset(partial(Backbone, 768, 24, "mamba1"), 8)
mamba_370m = Preset(partial(Backbone, 1024, 48, "mamba1"), 8)
mamba_790m = Preset(partial(Backbone, 1536, 48, "mamba1"), 8)
mamba_1_4b = Preset(partial(Backbone, 2048, 48, "mamba1"), 8)
mamba_2_8b = Preset(partial(Backbone, 2560, 64, "mamba1"), 8)

# Dao and Gu 2024, arXiv 2405.21060; released as state-spaces/mamba2-130m and so on.
mamba2_130m = Preset(partial(Backbone, 768, 24, "mamba2"))
mamba2_370m = Preset(partial(Backbone, 1024, 48, "mamba2"))
mamba2_780m = Preset(partial(Backbone, 1536, 48, "mamba2"))
mamba2_1_3b = Preset(partial(Backbone, 2048, 48, "mamba2"))
mamba2_2_7b = Preset(partial(Backbone, 2560, 64, "mamba2"))

# What those papers compare with. A layer of attention and SwiGLU has about as many parameters as two of Mamba.
transformer_125m = _attention(768, 12)
transformer_350m = _attention(1024, 24)
transformer_760m = _attention(1536, 24)
transformer_1_3b = _attention(2048, 24)
transformer_2_7b = _attention(2560, 32)

# One block of Jamba (Lieber et al. 2024, arXiv 2403.19887; Jamba-v0.1 is four of them, 4,096 wide, with 16 experts) at
# a size of ours: grouped attention without positions in one layer of eight, two of 8 experts in every second.
jamba_small = Preset(
    partial(
        Backbone,
        512,
        8,
        partial(Mamba1, b_c_dt_rms="weighted"),
        norm_eps=1e-6,
        pattern="mmmmammm",
        letters={"a": partial(Attention, n_heads=8, n_kv_heads=2, d_rotary=0)},
        mlp=partial(SwiGLU, d_hidden=1792),
        experts=partial(MixtureOfExperts, n_experts=8, top_k=2, d_hidden=1792),
    )
)


def preset(name: str) -> Preset:
    """The preset of a name.

    Raises:
        ValueError: an unknown name, with the nearest.
    """
    names = get_args(PresetName)
    if name not in names:
        raise ValueError(f"preset={name!r} is unknown{did_you_mean(name, names)}; expected one of {', '.join(names)}")
    return globals()[name]


class PresetBackbone(Backbone):
    """The stack of a preset alone, without embedding and head.

    Args:
        name: of the preset.
        dropout: as of :class:`mambakit.Backbone`.
        gradient_checkpointing: as of :class:`mambakit.Backbone`.

    Raises:
        ValueError: an unknown name, with the nearest.
    """

    def __init__(self, name: PresetName, dropout: float = 0.0, gradient_checkpointing: bool = False) -> None:
        stack = preset(name).stack
        options = {**stack.keywords, "dropout": dropout, "gradient_checkpointing": gradient_checkpointing}
        super().__init__(*stack.args, **options)


def round_up(value: int, multiple: int) -> int:
    """The least multiple of ``multiple`` that is at least ``value``."""
    return -(-value // multiple) * multiple
