"""The selective scan of Mamba-1 (Gu and Dao 2023, algorithm 2)."""

from pallas_kernels.selective_scan.api import selective_scan

__all__ = ["selective_scan"]
