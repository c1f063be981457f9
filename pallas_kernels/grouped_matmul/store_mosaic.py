"""A store of some rows of a tile, as MLIR."""

from __future__ import annotations

from typing import Any

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, scf, vector


def store_rows(out: Any, tile: Any, row: Any, column: Any, low: Any, high: Any, columns: int) -> None:
    """Write to `out` what each lane holds of the tile at `row` and `column`, in rows `low` to `high` and below `columns`."""
    index = ir.IndexType.get()
    row, column, low, high = (arith.index_cast(index, number) for number in (row, column, low, high))
    limit = utils.c(columns, index)
    less, greater = arith.CmpIPredicate.slt, arith.CmpIPredicate.sge
    for (i, j), register in zip(tile.layout.thread_idxs(tile.shape), tile.registers.flat, strict=True):
        at_row, at_column = arith.addi(row, i), arith.addi(column, j)
        inside = arith.andi(arith.cmpi(greater, at_row, low), arith.cmpi(less, at_row, high))
        branch = scf.IfOp(arith.andi(inside, arith.cmpi(less, at_column, limit)))
        with ir.InsertionPoint(branch.then_block):
            vector.store(register, out, [at_row, at_column])
            scf.yield_([])
