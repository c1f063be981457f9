"""Experiments on the library, what they measured (`metrics/`), and the figures drawn from it; the library knows none of it."""
