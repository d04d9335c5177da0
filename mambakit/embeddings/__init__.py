"""What turns a modality's raw elements into vectors (B, L, d_model)."""

from mambakit.embeddings.patch import PatchEmbedding
from mambakit.embeddings.token import TokenEmbedding

__all__ = ["PatchEmbedding", "TokenEmbedding"]
