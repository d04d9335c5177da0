"""What turns the backbone's vectors (B, L, d_model) into a prediction or a loss."""

from mambakit.heads.classify import SequenceClassifier, mask_of, pool
from mambakit.heads.language_model import LanguageModelHead

__all__ = ["LanguageModelHead", "SequenceClassifier", "mask_of", "pool"]
