"""Blocks of transformers (its PyTorch path, random seeded weights): the same output and gradient of the input.

The key names are the original ones, so a state dictionary passes over as it is, and strictly.
"""

import pytest
import torch
from torch import nn

from mambakit.kernels.testing import assert_close
from mambakit.mixers import Mamba1, Mamba2

transformers = pytest.importorskip("transformers", reason="transformers, the peer, is not installed")


def theirs(kind):
    """Their mixer of width 16, every weight drawn, in eval mode: training looks for CUDA kernels first."""
    from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaMixer
    from transformers.models.jamba.modeling_jamba import JambaMambaMixer
    from transformers.models.mamba.modeling_mamba import MambaMixer
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    sizes = {"hidden_size": 16, "state_size": 3, "num_hidden_layers": 1, "use_bias": True}
    two = {"head_dim": 4, "num_heads": 8, "n_groups": 2, "chunk_size": 4, "time_step_limit": (0.01, 1.5)}
    jamba = {"hidden_size": 16, "mamba_d_state": 3, "mamba_proj_bias": True, "rms_norm_eps": 1e-3}
    torch.manual_seed(0)
    block = {
        "mamba": lambda: MambaMixer(transformers.MambaConfig(**sizes), layer_idx=0),
        "mamba2": lambda: Mamba2Mixer(transformers.Mamba2Config(**sizes, **two), layer_idx=0),
        "falcon_mamba": lambda: FalconMambaMixer(
            transformers.FalconMambaConfig(**sizes, mixer_rms_eps=1e-3), 0, initialize_mixer_weights=False
        ),
        "jamba": lambda: JambaMambaMixer(transformers.JambaConfig(**jamba), layer_idx=0),
    }[kind]()
    for name, parameter in block.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "norm" in name or name == "D" else 0.0, std=0.4)
    return block.eval()


OURS = {
    "mamba": lambda: Mamba1(16, d_state=3, bias=True),
    "mamba2": lambda: Mamba2(16, d_state=3, headdim=4, ngroups=2, chunk_size=4, dt_limit=(0.01, 1.5), bias=True),
    "falcon_mamba": lambda: Mamba1(16, d_state=3, bias=True, b_c_dt_rms="unweighted", b_c_dt_rms_eps=1e-3),
    "jamba": lambda: Mamba1(16, d_state=3, bias=True, b_c_dt_rms="weighted", b_c_dt_rms_eps=1e-3),
}


@pytest.mark.parametrize("kind", OURS)
def test_a_block(kind):
    reference, ours = theirs(kind), OURS[kind]()
    ours.load_state_dict(reference.state_dict(), strict=True)
    x = torch.randn(2, 11, 16, requires_grad=True)
    weight = torch.randn(2, 11, 16)
    want, got = reference(x), ours(x)
    assert_close("output", got, want, 1e-5)
    gradients = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (got, want)]
    assert_close("gradient of the input", *gradients, 1e-5)


def test_norms_by_a_wrong_name():
    with pytest.raises(ValueError, match=r"b_c_dt_rms='falcon'.*'weighted'.*'unweighted'"):
        Mamba1(8, b_c_dt_rms="falcon")
