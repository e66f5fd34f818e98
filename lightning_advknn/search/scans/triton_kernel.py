"""The kernel of `TritonScan`: int8 products, their scores, and the best of each block. Imports Triton."""

import triton
import triton.language as tl

LEAST = tl.constexpr(-3.4028234663852886e38)  # of finite float32


@triton.jit  # type: ignore[untyped-decorator]
def best_of_blocks(  # type: ignore[no-untyped-def]
    queries,  # int8 (B, width)
    rows,  # int8 (M, width)
    weights,  # float32 (M,)
    left,  # float32 (TERMS, B)
    right,  # float32 (TERMS, M), whose rows are `right_stride` apart
    scores,  # float32 (B, blocks, KEPT), written
    places,  # int32 (B, blocks, KEPT), written: rows
    n_queries,
    n_rows,
    blocks,
    width,
    right_stride,
    TERMS: tl.constexpr,
    FUSED: tl.constexpr,
    KEPT: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Scores of QUERIES queries with ROWS rows, of which each query keeps the KEPT best.

    Block b holds rows b, b + blocks, b + 2 blocks, ...: neighbours in the bank, which may be alike (of one
    class, copies, frames of one film), are in different blocks. Products never leave the chip.

    Programs of one block follow each other, so that its rows stay in cache.
    """
    groups = tl.cdiv(n_queries, QUERIES)
    block = tl.program_id(0) // groups
    query = (tl.program_id(0) % groups) * QUERIES + tl.arange(0, QUERIES)
    row = block + tl.arange(0, ROWS) * blocks
    # What is beyond the end reads the last vector again, and is masked after the products.
    some_queries = tl.minimum(query, n_queries - 1)
    some_rows = tl.minimum(row, n_rows - 1)
    column = tl.arange(0, WIDTH)
    query_at = queries + some_queries.to(tl.int64)[:, None] * width + column[None, :]
    row_at = rows + some_rows.to(tl.int64)[None, :] * width + column[:, None]
    product = tl.zeros((QUERIES, ROWS), dtype=tl.int32)
    for start in range(0, width, WIDTH):
        inside = column < width - start
        a = tl.load(query_at + start, mask=inside[None, :], other=0)
        b = tl.load(row_at + start, mask=inside[:, None], other=0)
        product = tl.dot(a, b, product, out_dtype=tl.int32)

    # As `TorchScan.scores`, operation by operation.
    found = product.to(tl.float32) * tl.load(weights + some_rows)[None, :]
    for term in tl.static_range(TERMS):
        of_query = tl.load(left + term * n_queries + some_queries)[:, None]
        of_row = tl.load(right + term * right_stride + some_rows)[None, :]
        if FUSED:
            found = tl.fma(of_query, of_row, found)
        else:
            found = found + of_query * of_row
    # A score that is not finite comes with an infinite bound on rounding, so its value does not matter.
    found = tl.where(found > LEAST, found, LEAST)
    found = tl.where((row < n_rows)[None, :], found, float("-inf"))

    place = tl.arange(0, ROWS)
    written = (query.to(tl.int64) * blocks + block) * KEPT
    for kept in tl.static_range(KEPT):
        best, where = tl.max(found, axis=1, return_indices=True)  # the first of equals
        tl.store(scores + written + kept, best, mask=query < n_queries)
        tl.store(places + written + kept, block + where * blocks, mask=query < n_queries)
        found = tl.where(place[None, :] == where[:, None], float("-inf"), found)
