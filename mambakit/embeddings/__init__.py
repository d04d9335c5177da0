"""What turns a modality's raw elements into vectors (B, L, d_model)."""

from mambakit.embeddings.kmer import KmerEmbedding
from mambakit.embeddings.motif import MotifEmbedding
from mambakit.embeddings.patch import PatchEmbedding
from mambakit.embeddings.placed import PlacedEmbedding
from mambakit.embeddings.rc import RCEmbedding
from mambakit.embeddings.token import TokenEmbedding
from mambakit.embeddings.waveform import WaveformEmbedding

__all__ = [
    "KmerEmbedding",
    "MotifEmbedding",
    "PatchEmbedding",
    "PlacedEmbedding",
    "RCEmbedding",
    "TokenEmbedding",
    "WaveformEmbedding",
]
