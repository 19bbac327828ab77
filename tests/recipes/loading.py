"""Recipes are scripts, not a package: this loads one to look inside."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

RECIPES = Path(__file__).parents[2] / "recipes" / "micro"


def recipe(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"micro_{name}", RECIPES / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(RECIPES))  # as for a script, which may import its neighbours
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(RECIPES))
    return module
