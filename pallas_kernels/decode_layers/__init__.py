"""A step of decoding through all layers at once."""

from pallas_kernels.decode_layers.pallas_gpu import Sizes, decode_layers_gpu, refusal

__all__ = ["Sizes", "decode_layers_gpu", "refusal"]
