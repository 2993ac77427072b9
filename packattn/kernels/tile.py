"""Pieces of a tile that all passes share, each written once.

A tile of scores is [rows, columns]; in the forward and dQ kernels the rows are queries, in dK/dV they are keys. A head
dim is cut into parts whose widths are powers of two, all but the last alike: 80 = 64 + 16, 512 = 4 x 128. A matrix with
the head dim across is a tuple of tiles, one for each part. Equation numbers are those of docs/kernel.md.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NEVER = tl.constexpr(2**31 - 1)  # no index reaches it


@triton.jit
def load_part(base, index, stride, bounds, START: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr,
              BOUNDED: tl.constexpr):  # fmt: skip
    """Columns [START, START + WIDTH) of the rows at `index`: [ROWS, WIDTH], zero outside."""
    d = START + tl.arange(0, WIDTH)
    pointers = base + index[:, None] * stride + d[None, :]
    if START + WIDTH <= DIM:
        mask = bounds[:, None] if BOUNDED else None
    else:
        mask = (bounds[:, None] & (d[None, :] < DIM)) if BOUNDED else d[None, :] < DIM
    return tl.load(pointers, mask=mask, other=None if mask is None else 0.0)


@triton.jit
def load_tile(base, index, stride, bounds, DIM: tl.constexpr, PARTS: tl.constexpr, BOUNDED: tl.constexpr):
    """Rows `index` of a matrix with row stride `stride`, in parts; with BOUNDED, rows out of bounds are zero."""
    parts = ()
    for i in tl.static_range(len(PARTS)):
        parts = parts + (load_part(base, index, stride, bounds, i * PARTS[0], PARTS[i], DIM, BOUNDED),)
    return parts


@triton.jit
def store_part(base, index, stride, bounds, part, START: tl.constexpr, DIM: tl.constexpr):
    d = START + tl.arange(0, part.shape[1])
    pointers = base + index[:, None] * stride + d[None, :]
    tl.store(pointers, part.to(base.dtype.element_ty), mask=bounds[:, None] & (d[None, :] < DIM))


@triton.jit
def store_tile(base, index, stride, bounds, tile, factor, DIM: tl.constexpr, PARTS: tl.constexpr):
    """Store `tile` times `factor`, a number for each row."""
    for i in tl.static_range(len(PARTS)):
        store_part(base, index, stride, bounds, tile[i] * factor[:, None], i * PARTS[0], DIM)


@triton.jit
def zeros(ROWS: tl.constexpr, WIDTH: tl.constexpr):
    return tl.zeros([ROWS, WIDTH], tl.float32)


@triton.jit
def zero_tile(ROWS: tl.constexpr, PARTS: tl.constexpr):
    parts = ()
    for i in tl.static_range(len(PARTS)):
        parts = parts + (zeros(ROWS, PARTS[i]),)
    return parts


@triton.jit
def scale_tile(tile, factor):
    """Each row times its factor."""
    parts = ()
    for i in tl.static_range(len(tile)):
        parts = parts + (tile[i] * factor[:, None],)
    return parts


@triton.jit
def keep_rows(tile, kept):
    """The rows in `kept`; zero in the others, whatever was in them."""
    parts = ()
    for i in tl.static_range(len(tile)):
        parts = parts + (tl.where(kept[:, None], tile[i], 0.0),)
    return parts


@triton.jit
def in_registers(tile, HELD: tl.constexpr):
    """The tile, HELD of its parts as products with the identity, which are exact: operands that need no reading.

    What is loaded for a loop Triton keeps in shared memory and reads again in every step. An accumulator lies in
    registers as an operand does.
    """
    parts = ()
    for i in tl.static_range(len(tile)):
        part = tile[i]
        if i < HELD:
            d = tl.arange(0, part.shape[1])
            identity = (d[:, None] == d[None, :]).to(part.dtype)
            part = tl.dot(part, identity).to(part.dtype)
        parts = parts + (part,)
    return parts


@triton.jit
def dot_transposed(a, b, PRECISION: tl.constexpr):
    """a @ b.T over the head dim: [ROWS, dim], [COLUMNS, dim] -> [ROWS, COLUMNS]."""
    s = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    for i in tl.static_range(1, len(a)):
        s = tl.dot(a[i], tl.trans(b[i]), s, input_precision=PRECISION)
    return s


@triton.jit
def add_dot(acc, weights, x, PRECISION: tl.constexpr):
    """acc + weights @ x: [ROWS, dim], [ROWS, COLUMNS], [COLUMNS, dim] -> [ROWS, dim]."""
    parts = ()
    for i in tl.static_range(len(acc)):
        parts = parts + (tl.dot(weights.to(x[i].dtype), x[i], acc[i], input_precision=PRECISION),)
    return parts


@triton.jit
def visible(start, end, columns):
    """Which columns each row sees (1): [ROWS], [ROWS], [COLUMNS] -> [ROWS, COLUMNS]."""
    return (start[:, None] <= columns[None, :]) & (columns[None, :] < end[:, None])


@triton.jit
def tanh(x):
    """tanh by exp2 (the interpreter has no libdevice), by its series near 0 where 1 - 2 / (e^2x + 1) cancels."""
    far = 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)
    y = x * x
    near = x * (1.0 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835 - y * (1382 / 155925))))))
    return tl.where(tl.abs(x) < 0.3, near, far)


@triton.jit
def scores(products, scale, softcap, slope, distance, HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr):
    """Products of queries and keys -> (s, unit, derivative): scores in base 2 are s * unit (2), (3), (4).

    Without a cap and a bias s is the products themselves, so that the one multiplication by `unit` fuses with the
    subtraction of the maximum. slope and distance broadcast to the shape of products.
    """
    s, unit, derivative = products, scale * LOG2E, 1.0
    if HAS_SOFTCAP:
        t = tanh(products * (scale / softcap))
        s, unit, derivative = t * (softcap * LOG2E), 1.0, 1.0 - t * t
    if HAS_ALIBI:
        s, unit = s * unit - slope * LOG2E * tl.abs(distance).to(tl.float32), 1.0
    return s, unit, derivative


@triton.jit
def keep_mask(seed, query, key, head, threshold):
    """Which scores dropout keeps (packattn/dropout.py): broadcast shape of the int32 indices query, key and head."""
    query, key = tl.broadcast(query.to(tl.uint32, bitcast=True), key.to(tl.uint32, bitcast=True))
    head = (query * 0) + head.to(tl.uint32, bitcast=True)
    word, _, _, _ = tl.philox(seed, query, key, head, query * 0)
    return word >= threshold.to(tl.uint32, bitcast=True)


@triton.jit
def unmasked_blocks(lo, begin, end, BLOCK: tl.constexpr):
    """The whole blocks of [begin, end) on the grid of blocks that starts at lo: [first, second)."""
    first = lo + tl.cdiv(tl.maximum(begin - lo, 0), BLOCK) * BLOCK
    return first, first + tl.maximum(end - first, 0) // BLOCK * BLOCK


@triton.jit
def program_tile(order_ptr, heads, HAS_ORDER: tl.constexpr):
    """(tile, head) of this program: heads vary fastest, tiles go in the order given (big ones first) or as they lie."""
    tile = tl.program_id(0) // heads
    if HAS_ORDER:
        tile = tl.load(order_ptr + tile)
    return tile, tl.program_id(0) % heads
