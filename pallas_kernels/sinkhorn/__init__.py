"""The column potentials of a balanced plan: Sinkhorn's iterations."""

from pallas_kernels.sinkhorn.api import sinkhorn_potentials

__all__ = ["sinkhorn_potentials"]
