"""The packaged recipes, one YAML file each, and the functions that find them."""

from mambakit.recipes.catalogue import copy, find, header, name_of, names, resolve

__all__ = ["copy", "find", "header", "name_of", "names", "resolve"]
