"""The selective scan of Mamba-1 (Gu and Dao 2023, algorithm 2)."""

from pallas_kernels.selective_scan.api import explain_selective_scan, selective_scan
from pallas_kernels.selective_scan.sequence import selective_scan_over

__all__ = ["explain_selective_scan", "selective_scan", "selective_scan_over"]
