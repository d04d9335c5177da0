"""Key maps and loaders for other ecosystems' checkpoints."""

from mambakit.interop.mamba import language_model_from_config, load_language_model, rename_keys

__all__ = ["language_model_from_config", "load_language_model", "rename_keys"]
