"""LightningModules: a model, a loss, its metrics and its optimiser. No data inside."""

from mambakit.tasks.base import Task
from mambakit.tasks.causal_lm import CausalLM
from mambakit.tasks.classify import Classify

__all__ = ["CausalLM", "Classify", "Task"]
