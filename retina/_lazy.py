"""Public names that are imported when they are first used (PEP 562): `import retina` takes no torch."""

import ast
import importlib
import importlib.util
import sys
from collections.abc import Callable


def lazy(package: str) -> tuple[Callable[[str], object], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a module, for the names that its source imports `if TYPE_CHECKING`.
    `dir()` lists them, and of a module that is no package what it defines itself too.

    So every name is written once, as an ordinary import, which type checkers and editors read too."""
    spec = importlib.util.find_spec(package)
    source = spec.loader.get_source(package) if spec else ""  # type: ignore[union-attr]
    module_of = {
        alias.name: statement.module
        for block in ast.parse(source or "").body
        if isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"
        for statement in block.body
        if isinstance(statement, ast.ImportFrom) and statement.module
        for alias in statement.names
    }

    def find(name: str) -> object:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(module_of[name]), name)

    def names() -> list[str]:
        is_package = hasattr(sys.modules[package], "__path__")
        return sorted(module_of if is_package else {*vars(sys.modules[package]), *module_of})

    return find, names, sorted(module_of)
