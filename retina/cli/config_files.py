"""How Hydra reads YAML files, with bounds on what a few of their lines stand for. Beside the road.

Aliases, `${interpolations}` and lists of defaults may name a thing twice that names another thing twice, and so on:
thirty such lines stand for more than time and memory hold.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from hydra._internal import config_loader_impl
from hydra._internal.config_repository import CachingConfigRepository
from hydra._internal.core_plugins import file_config_source
from hydra._internal.sources_registry import SourcesRegistry
from hydra.errors import ConfigCompositionException
from hydra.plugins.config_source import ConfigResult
from omegaconf import Container, OmegaConf
from omegaconf.errors import InterpolationResolutionError

MOST_REPEATED = 10_000
"""Items that the aliases of one file may repeat."""
MOST_LOADED = 500
"""Times that one command's lists of defaults may load a file; ours load about 70."""
MOST_RESOLVED = 1_000_000
"""Characters that the interpolations of one job's settings may stand for, where each of them and each item counts as
`ITEM` more."""
ITEM = 100


class FileConfigSource(file_config_source.FileConfigSource):
    """Of this name because Hydra keeps the source of a scheme that is there already, if it has the name of its own."""

    def load_config(self, config_path: str) -> ConfigResult:
        """As Hydra's own, after `refuse_bomb`."""
        file = Path(self.path, self._normalize_file_name(config_path))
        if file.is_file() and b"*" in (content := file.read_bytes()):
            refuse_bomb(file, content)
        try:
            return super().load_config(config_path)
        except OSError as fault:
            if fault.errno is None:  # a file that holds one number
                raise yaml.YAMLError(f"{file}: {fault}") from None
            raise


def refuse_bomb(file: Path, content: bytes) -> None:
    """Raises yaml.YAMLError for a YAML file whose aliases repeat too much."""
    sizes: dict[yaml.Node, int] = {}
    """Items that each node stands for."""

    def size(node: yaml.Node) -> int:
        if node not in sizes:
            sizes[node] = MOST_REPEATED  # while it is counted: an alias within its own anchor has no end
            parts = node.value if isinstance(node, yaml.CollectionNode) else ()
            sizes[node] = 1 + sum(sum(map(size, part)) if isinstance(part, tuple) else size(part) for part in parts)
        return sizes[node]

    root = yaml.compose(content, Loader=yaml.SafeLoader)
    if root is not None and size(root) - len(sizes) >= MOST_REPEATED:
        raise yaml.YAMLError(f"{file}: its aliases stand for more than {MOST_REPEATED} items")


class BoundedRepository(CachingConfigRepository):
    """Made anew for every composition."""

    loaded = 0

    def load_config(self, config_path: str) -> ConfigResult | None:
        """As Hydra's own, up to `MOST_LOADED` times."""
        self.loaded += 1
        if self.loaded > MOST_LOADED:
            raise ConfigCompositionException(f"{config_path}: the lists of defaults load more than {MOST_LOADED} files")
        return super().load_config(config_path)


class Interpolations:
    """What the interpolations of a job have stood for until now."""

    spent = 0

    @classmethod
    def bounded(cls, resolve: Callable[..., Any]) -> Callable[..., Any]:
        """`resolve`, a method of OmegaConf that resolves one interpolation, up to `MOST_RESOLVED` in all."""

        @functools.wraps(resolve)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            value = resolve(*args, **kwargs) if cls.spent <= MOST_RESOLVED else None
            cls.spent += _size(value)
            if cls.spent > MOST_RESOLVED:
                raise InterpolationResolutionError(f"interpolations stand for more than {MOST_RESOLVED} characters")
            return value

        return bounded


def _size(value: Any) -> int:
    if isinstance(value, Container):
        value = OmegaConf.to_container(value, resolve=False)
    if isinstance(value, dict | list):
        return ITEM + sum(map(_size, value.values() if isinstance(value, dict) else value))
    return ITEM + len(str(value))


SourcesRegistry.instance().register(FileConfigSource)
config_loader_impl.CachingConfigRepository = BoundedRepository  # type: ignore[misc]
for name in ("_resolve_node_interpolation", "_evaluate_custom_resolver"):
    setattr(Container, name, Interpolations.bounded(getattr(Container, name)))
