"""Log lines that would otherwise repeat with every call."""

import functools
import logging


@functools.cache
def log_once(logger: logging.Logger, level: int, message: str, *values: str) -> None:
    """Log a message once a process; another message or other values are another line."""
    logger.log(level, message, *values)
