"""LightningDataModules, one folder a modality. They know nothing of models, and import none."""
