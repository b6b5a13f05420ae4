"""Public names that are imported when they are first used (PEP 562): `import retina` takes no torch."""

import importlib
from collections.abc import Callable, Mapping, Sequence


def lazy(
    package: str, names: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], object], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package; `names` lists public names under the modules that have them,
    relative to the package."""
    module_of = {name: f"{package}.{module}" for module, group in names.items() for name in group}

    def find(name: str) -> object:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(module_of[name]), name)

    return find, lambda: sorted(module_of), sorted(module_of)
