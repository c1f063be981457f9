"""The HTTP server: OpenAI's API over `bm_jax.engine`; `bm_jax.serve` is its command."""
