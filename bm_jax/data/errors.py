"""The one exception of this package."""

from bm_jax.config import ConfigError


class DataError(ConfigError):
    """Text, tokens or a tokenizer on disk are not what the configuration or their format says.

    The message names the file, what was expected, what was found and what to do.
    """
