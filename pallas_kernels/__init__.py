"""Operators with several implementations behind one function each; depends on jax alone.

Each folder holds one operator: `api.py` (the public function and its checks), `reference.py` (the plain statement that
every other file must match in value and gradient) and one file per implementation:

    from pallas_kernels.selective_scan import selective_scan
    from pallas_kernels.causal_conv import causal_conv
    from pallas_kernels.grouped_matmul import grouped_matmul
"""
