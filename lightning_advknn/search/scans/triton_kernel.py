"""The kernel of `TritonScan`: int8 products, their scores, and the best of each block. Imports Triton."""

import triton
import triton.language as tl

_LEAST = tl.constexpr(-3.4028234663852886e38)  # of finite float32


@triton.jit  # type: ignore[untyped-decorator]
def best_of_blocks(  # type: ignore[no-untyped-def]
    queries,  # int8 (B, width)
    rows,  # int8 (M, width)
    weights,  # float32 (M,)
    left,  # float32 (terms, B)
    right,  # float32 (terms, M), whose rows are `right_stride` apart
    scores,  # float32 (B, blocks, kept), written
    places,  # int32 (B, blocks, kept), written: rows
    n_queries,
    n_rows,
    blocks,
    width,
    right_stride,
    terms: tl.constexpr,
    fused: tl.constexpr,
    kept: tl.constexpr,
    block_queries: tl.constexpr,
    block_rows: tl.constexpr,
    block_width: tl.constexpr,
):
    """Score queries with rows, block by block. Each query keeps the best rows of a block.

    Block b holds rows b, b + blocks, b + 2 blocks, ...: neighbours in the bank, which may be alike (of one
    class, copies, frames of one film), are in different blocks. Products never leave the chip.

    Programs of one block follow each other, so that its rows stay in cache.
    """
    groups = tl.cdiv(n_queries, block_queries)
    block = tl.program_id(0) // groups
    query = (tl.program_id(0) % groups) * block_queries + tl.arange(0, block_queries)
    row = block + tl.arange(0, block_rows) * blocks
    # What is beyond the end reads the last vector again, and is masked after the products.
    some_queries = tl.minimum(query, n_queries - 1)
    some_rows = tl.minimum(row, n_rows - 1)
    column = tl.arange(0, block_width)
    query_at = queries + some_queries.to(tl.int64)[:, None] * width + column[None, :]
    row_at = rows + some_rows.to(tl.int64)[None, :] * width + column[:, None]
    product = tl.zeros((block_queries, block_rows), dtype=tl.int32)
    for start in range(0, width, block_width):
        inside = column < width - start
        a = tl.load(query_at + start, mask=inside[None, :], other=0)
        b = tl.load(row_at + start, mask=inside[:, None], other=0)
        product = tl.dot(a, b, product, out_dtype=tl.int32)

    # As `TorchScan.scores`, operation by operation.
    found = product.to(tl.float32) * tl.load(weights + some_rows)[None, :]
    for term in tl.static_range(terms):
        of_query = tl.load(left + term * n_queries + some_queries)[:, None]
        of_row = tl.load(right + term * right_stride + some_rows)[None, :]
        found = tl.fma(of_query, of_row, found) if fused else found + of_query * of_row
    # A score that is not finite comes with an infinite bound on rounding, so its value does not matter.
    found = tl.where(found > _LEAST, found, _LEAST)
    found = tl.where((row < n_rows)[None, :], found, float("-inf"))

    place = tl.arange(0, block_rows)
    written = (query.to(tl.int64) * blocks + block) * kept
    for rank in tl.static_range(kept):
        best, where = tl.max(found, axis=1, return_indices=True)  # the first of equals
        tl.store(scores + written + rank, best, mask=query < n_queries)
        tl.store(places + written + rank, block + where * blocks, mask=query < n_queries)
        found = tl.where(place[None, :] == where[:, None], float("-inf"), found)
