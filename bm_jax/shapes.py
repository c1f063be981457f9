"""The one legend of dimension letters. Suffixes of names (`x_BLM`) and shapes in docstrings use them.

    B batch                 M model width               X experts
    L length (tokens)       E inner width of Mamba      K experts a token is sent to; taps of a convolution
    T tokens (B * L)        N state size                F hidden width of an MLP or expert
    V vocabulary rows       R rank of dt                H heads, G key/value heads, S cache slots

`segment_ids` are integers `[B, L]`: tokens of one packed document share an id, neighbours of different documents differ,
and id 0 marks padding, which no layer routes, attends to or lets into a state.
"""

from jaxtyping import Array, Bool, Float, Int

Tokens = Int[Array, "B L"]
SegmentIds = Int[Array, "B L"]
TokenMask = Bool[Array, "B L"]
Hidden = Float[Array, "B L M"]
Logits = Float[Array, "B L V"]

__all__ = ["Array", "Bool", "Float", "Hidden", "Int", "Logits", "SegmentIds", "TokenMask", "Tokens"]
