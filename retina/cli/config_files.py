"""How Hydra reads YAML files, with a bound on what their aliases stand for. Beside the road."""

from pathlib import Path

import yaml
from hydra._internal.core_plugins import file_config_source
from hydra._internal.sources_registry import SourcesRegistry
from hydra.plugins.config_source import ConfigResult

MOST_REPEATED = 10_000
"""Items that the aliases of one file may repeat: each is copied, so a few lines could stand for more than memory."""


class FileConfigSource(file_config_source.FileConfigSource):
    """Of this name because Hydra keeps the source of a scheme that is there already, if it has the name of its own."""

    def load_config(self, config_path: str) -> ConfigResult:
        """As Hydra's own, after `refuse_bomb`."""
        file = Path(self.path, self._normalize_file_name(config_path))
        if file.is_file() and b"*" in (content := file.read_bytes()):
            refuse_bomb(file, content)
        return super().load_config(config_path)


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


SourcesRegistry.instance().register(FileConfigSource)
