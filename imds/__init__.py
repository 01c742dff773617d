"""imds: a sharded in-memory key-value server in Python."""

__version__ = "0.1.0"
