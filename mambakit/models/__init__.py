"""Whole models: an embedding, a backbone and a head under one name."""

from mambakit.models.language_model import LanguageModel

__all__ = ["LanguageModel"]
