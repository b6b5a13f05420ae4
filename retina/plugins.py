"""Classes and functions by dotted name, of this library and of the packages that the user names. Beside the road.

Importing a module runs it, and dotted names may come from files. So a name is only looked up below allowed packages:
some of this library's, and `plugins`. Those come from the command line, from the user's own config or from an argument
in Python, never from a run folder or a weights file.
"""

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from retina.errors import ConfigError

CLASSES_ONLY = ("albumentations.", "torch.", "torchvision.")
"""Packages of others whose functions read files or call the network."""


def prefixes(plugins: Sequence[str]) -> tuple[str, ...]:
    """What names of the `plugins` packages begin with. Raises ConfigError for what is no list of package names."""
    if not isinstance(plugins, list | tuple) or not all(isinstance(name, str) and _is_dotted(name) for name in plugins):
        raise ConfigError(f"{plugins!r:.80} is no list of packages - give [mylab]", code="wrong-type", key="plugins")
    return tuple(f"{name}." for name in plugins)


def find(target: str, allowed: Iterable[str], *, key: str = "") -> Callable[..., Any]:
    """The class or function of that name, which begins with one of `allowed`, such as "retina.losses.".

    The name is checked before anything is imported, and the object afterwards, because a module also holds what it
    imported itself. Raises ConfigError, with `key` for its argument."""
    allowed = tuple(allowed)
    package = target.partition(".")[0]
    fix = (
        f"choose something under {', '.join(allowed) or 'a package of your own'}, which plugins=[{package}] would name"
    )
    refusal = ConfigError(f"{target} is not allowed - {fix}", code="not-allowed", key=key)
    if not target.startswith(allowed) or not _is_dotted(target):
        raise refusal
    module, _, name = target.rpartition(".")
    owner = None
    try:
        owner = importlib.import_module(module)
        thing = getattr(owner, name)
    except (ImportError, AttributeError) as fault:
        missing = getattr(fault, "name", None) or module
        if isinstance(fault, ImportError) and not f"{module}.".startswith(f"{missing}."):
            problem = f"{target} needs {missing}, which is not there - install it"
        elif owner is not None and (near := difflib.get_close_matches(name, dir(owner), n=1)):
            problem = f"{target} does not exist - did you mean {module}.{near[0]}?"
        else:
            problem = f"{target} does not exist - check its spelling, and that {package} is installed"
        raise ConfigError(problem, code="unknown-target", key=key) from None
    if not _is_own(thing, allowed):
        raise refusal
    return thing


def _is_dotted(name: str) -> bool:
    return all(part.isidentifier() for part in name.split("."))


def _is_own(thing: Any, allowed: tuple[str, ...]) -> bool:
    """Whether a module under `allowed` itself defines `thing`, a public class or function, under the name it bears: no
    method, partial, lambda, nested or borrowed object, and nothing that lies about its home."""
    if not inspect.isclass(thing) and not inspect.isfunction(thing):
        return False
    home, name = f"{thing.__module__}.", thing.__qualname__
    if not home.startswith(allowed) or name.startswith("_"):
        return False
    if home.startswith(CLASSES_ONLY) if inspect.isfunction(thing) else issubclass(thing, (type, BaseException)):
        return False  # a maker of classes makes no part, nor is a fault one
    return getattr(sys.modules.get(home[:-1]), name, None) is thing
