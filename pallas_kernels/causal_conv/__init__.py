"""Causal depthwise convolution along time."""

from pallas_kernels.causal_conv.api import causal_conv
from pallas_kernels.causal_conv.sequence import causal_conv_over

__all__ = ["causal_conv", "causal_conv_over"]
