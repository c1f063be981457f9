"""Text to batches: tokenizers, preparing and checking token shards, packed and mixed windows.

Nothing here imports jax, and only `Data.train_batches` needs grain.
"""

from bm_jax.data.errors import DataError
from bm_jax.data.pipeline import Data, open_data
from bm_jax.data.prepare import prepare
from bm_jax.data.shards import Manifest, open_prepared, read_manifest, verify
from bm_jax.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "Data",
    "DataError",
    "Manifest",
    "Tokenizer",
    "load_tokenizer",
    "open_data",
    "open_prepared",
    "prepare",
    "read_manifest",
    "verify",
]
