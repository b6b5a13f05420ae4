"""The one family of errors meant for users: a single line that says where, what and how to mend it."""


class RetinaError(Exception):
    """A fault a user can mend. `str()` is one line: `<file>: <record>: <problem> - <how to fix>`."""


class ConfigError(RetinaError):
    """A setting that does not exist, has the wrong type or contradicts another."""


class DataError(RetinaError):
    """A fault in annotations or images."""


class CheckpointError(RetinaError):
    """A checkpoint or weights file that is missing, damaged or of another model."""
