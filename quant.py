"""NF4, the 4-bit number format of QLoRA, by hand (arXiv:2305.14314), as bitsandbytes, bit for bit.

A weight matrix is flattened and cut into blocks of 64. A block is divided by its largest magnitude
("absmax"), which brings it into [-1, 1], and each value becomes the index (4 bits) of one of 16
levels that are close to the quantiles of a normal distribution. Two indices share a byte, the
earlier one in the high nibble.

That leaves one float32 absmax for 64 weights, half a bit a weight. Double quantisation stores them
in 8 bits as well: their mean ("offset") is subtracted, and blocks of 256 of what remains are
divided by their own maximum ("nested_absmax") and rounded to one of the 256 levels of the dynamic
map (arXiv:1511.04561), a small floating point format with a flexible exponent. Together:

    4 bits + 8/64 + 32/(64*256) = 4.127 bits a weight
    w ~ NF4[code] * (DYNAMIC[absmax] * nested_absmax + offset)

    q = quantize_nf4(weight)          # NF4Weight
    w = dequantize_nf4(q)             # the same shape and dtype as the weight had
    y = NF4Linear(...)                # y = x W^T, W in 4 bits and frozen; the gradient goes to x

Dequantising is bound by memory, not by arithmetic. On a CPU one table look-up yields two weights,
piece by piece in the cache; on a CUDA device, where Triton works (it comes with torch and needs a C
compiler), one kernel reads 4 bits and writes 16, with nothing in between.
"""
import functools
import json
import math
import sys
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:     # a machine without CUDA: everything works, in plain torch
    triton = None

BLOCK = 64      # weights that share one absmax
NESTED = 256    # absmax values that share one nested_absmax
TINY = 1e-38    # an all-zero block is divided by this instead of by zero

# The 16 levels (arXiv:2305.14314, appendix E): quantiles of N(0, 1), asymmetric so that zero is a
# level, scaled to [-1, 1].
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0])


def dynamic_map():
    """The 256 levels of the signed 8-bit dynamic map, ascending: (256,) float32 in [-0.993, 1].

    0, 1, and +-10^(i-6) times the midpoints of 2^i equal intervals of [0.1, 1], i = 0..6: the
    larger the exponent, the finer the fraction."""
    levels = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** i + 1)
        positive = 10 ** (i - 6) * (edges[:-1] + edges[1:]) / 2
        levels += positive.tolist() + (-positive).tolist()
    return torch.tensor(sorted(levels))


DYNAMIC = dynamic_map()
# The two float32 levels of each byte side by side in one 64-bit word, (256,): one look-up yields
# two weights.
NF4_PAIRS = torch.stack([NF4.repeat_interleave(16), NF4.repeat(16)], 1).view(torch.int64).view(-1)


@functools.cache
def tables(device):
    """-> NF4, DYNAMIC, NF4_PAIRS on `device`, copied there once."""
    return NF4.to(device), DYNAMIC.to(device), NF4_PAIRS.to(device)


@dataclass
class NF4Weight:
    """A quantised tensor of n elements; `shape` and `dtype` are the original's."""
    packed: torch.Tensor             # (ceil(n/2),) uint8
    absmax: torch.Tensor             # (ceil(n/64),) uint8
    nested_absmax: torch.Tensor      # (ceil(n/64/256),) float32
    nested_offset: torch.Tensor      # () float32
    shape: torch.Size
    dtype: torch.dtype

    def to(self, device):
        parts = (self.packed, self.absmax, self.nested_absmax, self.nested_offset)
        return NF4Weight(*(part.to(device) for part in parts), self.shape, self.dtype)


def quantize_nf4(weight, name="weight"):
    """weight (any shape, float32/16/bfloat16) -> NF4Weight on the same device.

    Raises ValueError, with the tensor's `name`, for NaN or infinite weights."""
    x = weight.detach().reshape(-1)
    n = len(x)
    packed = torch.empty(-(-n // 2), dtype=torch.uint8, device=x.device)
    absmax = torch.empty(-(-n // BLOCK), dtype=torch.float32, device=x.device)
    size = 1 << (18 if x.device.type == "cpu" else 24)        # pieces: little memory besides
    pieces = zip(x.split(size), packed.split(size // 2), absmax.split(size // BLOCK))
    for piece, out, largest in pieces:
        blocks = F.pad(piece.float(), (0, -len(piece) % BLOCK)).view(-1, BLOCK)   # (n/64, 64)
        torch.amax(blocks.abs(), dim=1, out=largest)
        if not torch.isfinite(largest).all():
            raise ValueError(f"{name} holds NaN or infinite values and cannot be quantised; the "
                             "checkpoint is damaged, get it again")
        scaled = blocks * (1 / largest.clamp(min=TINY))[:, None]
        if len(piece) % BLOCK:        # bitsandbytes divides the partial block, never by zero
            largest[-1] = largest[-1].clamp(min=TINY)
            scaled[-1] = blocks[-1] / largest[-1]
        codes = nearest_level(scaled.view(-1))                # the padding's code is that of zero
        out.copy_((codes[::2] << 4 | codes[1::2])[:len(out)])
    return NF4Weight(packed, *quantize_absmax(absmax), weight.shape, weight.dtype)


def nearest_level(x):
    """x (n,) float32 in [-1, 1] -> (n,) uint8: how many of the 15 midpoints lie below x.

    [-1, 1] is cut into 32 cells, narrower than the midpoints are apart: the cell says all but
    whether x is above the one midpoint that its cell may have. Exact, since rounding keeps the
    order: a larger x is never in a lower cell. Plain twin: torch.bucketize."""
    below, midpoint = cells(x.device)
    cell = (x * 16 + 17).int()                                # 1 for -1, 33 for 1
    return below.index_select(0, cell) + (x > midpoint.index_select(0, cell))


@functools.cache
def cells(device):
    """-> for each of 35 cells the number of midpoints in lower cells, and its own midpoint.

    (35,) uint8, and (35,) float32 with infinity where a cell has none."""
    midpoints = (NF4[:-1] + NF4[1:]) / 2
    cell = (midpoints * 16 + 17).int()                        # (15,), all different
    below = torch.bucketize(torch.arange(35, dtype=torch.int32), cell)
    own = torch.full((35,), torch.inf).scatter(0, cell.long(), midpoints)
    return below.to(device, torch.uint8), own.to(device)


def quantize_absmax(absmax):
    """Double quantisation of absmax (m,) float32.

    -> (m,) uint8 codes, (ceil(m/256),) float32 maxima, () float32 offset."""
    offset = absmax.mean()
    blocks = F.pad(absmax - offset, (0, -len(absmax) % NESTED)).view(-1, NESTED)  # (m/256, 256)
    nested_absmax = blocks.abs().amax(dim=1)
    x = blocks * (1 / nested_absmax)[:, None]
    if x.device.type == "cpu":        # bitsandbytes looks the code up on a grid of 65,536 points
        x = ((x + 1) * 32767.5 + 0.5).int().clamp(0, 65535) * 2.0 / 65535 - 1
    _, dynamic, _ = tables(x.device)
    codes = torch.bucketize(x, (dynamic[:-1] + dynamic[1:]) / 2)
    codes[nested_absmax == 0] = 0                             # nothing but the offset itself
    return codes.view(-1)[:len(absmax)].to(torch.uint8), nested_absmax, offset


def dequantize_nf4(q, dtype=None):
    """NF4Weight -> Tensor of q.shape in `dtype` (default: the original's).

    It is computed in float32 and rounded once."""
    if q.packed.is_cuda and triton_works():
        return dequantize_triton(q, dtype or q.dtype)
    return dequantize_plain(q, dtype or q.dtype)


@functools.cache
def triton_works():
    """Whether Triton can build a kernel here: its first launch compiles its driver in C."""
    if triton is None:
        return False
    try:
        q = quantize_nf4(torch.ones(BLOCK, device="cuda"))
        return dequantize_triton(q, torch.float32).isfinite().all().item()
    except Exception as e:                  # the compiler's, Triton's and the driver's own
        reason = str(e).strip().partition("\n")[0] or type(e).__name__
        print(f"warning: Triton does not work here ({reason}); 4-bit weights take the plain path, "
              "which is slower (it needs a C compiler and Python.h)", file=sys.stderr)
        return False


def dequantize_plain(q, dtype):
    """The same in plain torch, on any device."""
    device = q.packed.device
    blocks = len(q.absmax)
    _, dynamic, pairs = tables(device)
    absmax = dynamic.index_select(0, q.absmax.int())
    absmax = F.pad(absmax, (0, -blocks % NESTED)).view(-1, NESTED)                # (m/256, 256)
    absmax = absmax.mul_(q.nested_absmax[:, None]).add_(q.nested_offset).view(-1, 1)[:blocks]
    out = torch.empty(blocks, BLOCK, dtype=dtype, device=device)
    rows = blocks
    if device.type == "cpu":                # a piece is 2 MB in float32 and stays in the cache
        rows = min(blocks, 8192)
    half = rows * BLOCK // 2
    words = torch.empty(half, dtype=torch.int64, device=device)
    levels = words.view(torch.float32).view(rows, BLOCK)      # the same memory, two a word
    for packed, scale, piece in zip(q.packed.split(half), absmax.split(rows), out.split(rows)):
        # A partial block leaves the rest of its row as it was.
        torch.index_select(pairs, 0, packed.int(), out=words[:len(packed)])
        piece.copy_(levels[:len(piece)].mul_(scale))
    return out.view(-1)[:q.shape.numel()].view(q.shape)


if triton:
    @triton.jit
    def dequantize_kernel(packed, absmax, nested_absmax, nested_offset, nf4, dynamic, out,
                          n_packed, n, ROWS: tl.constexpr):
        """One program dequantises ROWS blocks of 64; a thread loads and stores 16 bytes at a time.

        The codes are brought into the order of the output as bytes, before the look-up: that is
        the least to move between threads. Offsets are 64 bits wide: a weight may have more than
        2^31 elements."""
        block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)         # (ROWS,)
        inside = block * 64 < n
        scale = tl.load(dynamic + tl.load(absmax + block, mask=inside, other=0))
        nested = tl.load(nested_absmax + block // 256, mask=inside, other=0)
        scale = scale * nested + tl.load(nested_offset)
        byte = block[:, None] * 32 + tl.arange(0, 32)[None, :]                    # (ROWS, 32)
        codes = tl.load(packed + byte, mask=byte < n_packed, other=0)
        codes = tl.interleave(codes >> 4, codes & 15)                             # (ROWS, 64)
        value = tl.load(nf4 + codes) * scale[:, None]
        i = block[:, None] * 64 + tl.arange(0, 64)[None, :]
        tl.store(out + i, value.to(out.dtype.element_ty), mask=i < n)


def dequantize_triton(q, dtype):
    """The same in one Triton kernel, on a CUDA device.

    With TRITON_INTERPRET=1 in the environment it runs in Triton's interpreter on a CPU. Fusing the
    product and the sum of the absmax into one rounding would change bits: fusion is off."""
    nf4, dynamic, _ = tables(q.packed.device)
    out = torch.empty(q.shape, dtype=dtype, device=q.packed.device)
    grid = (triton.cdiv(len(q.absmax), 64),)
    with torch.cuda.device_of(q.packed):
        dequantize_kernel[grid](q.packed, q.absmax, q.nested_absmax, q.nested_offset, nf4, dynamic,
                                out, len(q.packed), out.numel(), ROWS=64, num_warps=4,
                                enable_fp_fusion=False)
    return out


def from_bitsandbytes(tensors, name):
    """The tensors that bitsandbytes serialised for one weight -> NF4Weight.

    tensors: {"": packed (in whatever dtype bnb_4bit_quant_storage gave its bytes), "absmax",
    "nested_absmax", "quant_map", "nested_quant_map", "quant_state.bitsandbytes__nf4"}.
    Raises ValueError for a format other than NF4 with block 64 and double quantisation with
    block 256, and for tensors that do not fit each other."""
    needed = {"", "absmax", "nested_absmax", "quant_map", "nested_quant_map",
              "quant_state.bitsandbytes__nf4"}
    missing = needed - set(tensors)
    if missing:
        raise ValueError(f"{name}: a 4-bit checkpoint must be NF4 with double quantisation; "
                         f"missing: {', '.join(sorted(missing))}")
    try:
        state = json.loads(bytes(tensors["quant_state.bitsandbytes__nf4"].tolist()))
        shape = torch.Size(state["shape"])
        offset = float(state["nested_offset"])
        blocks = (state["blocksize"], state["nested_blocksize"])
        kinds = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
        q = NF4Weight(tensors[""].reshape(-1).view(torch.uint8), tensors["absmax"],
                      tensors["nested_absmax"], torch.tensor(offset), shape, kinds[state["dtype"]])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as e:
        raise ValueError(f"{name}: the quant_state of this 4-bit weight cannot be read ({e}); get "
                         "the checkpoint again") from None
    nested_map = tensors["nested_quant_map"].float()
    same_map = nested_map.shape == DYNAMIC.shape and torch.allclose(nested_map, DYNAMIC, atol=1e-7)
    same_map = same_map and torch.equal(tensors["quant_map"].float(), NF4)
    if blocks != (BLOCK, NESTED) or not same_map or state.get("quant_type", "nf4") != "nf4":
        raise ValueError(f"{name}: 4-bit blocks of {blocks} or another codebook; only NF4 with "
                         f"blocks of {BLOCK} and {NESTED} is read")
    n = shape.numel()
    m = -(-n // BLOCK)
    for part, size, kind in ((q.packed, -(-n // 2), torch.uint8), (q.absmax, m, torch.uint8),
                             (q.nested_absmax, -(-m // NESTED), torch.float32)):
        if part.shape != (size,) or part.dtype != kind:
            raise ValueError(f"{name}: the sizes of the 4-bit tensors do not fit the shape "
                             f"{tuple(shape)}; get the checkpoint again")
    if not (math.isfinite(offset) and q.nested_absmax.isfinite().all()):
        raise ValueError(f"{name} holds NaN or infinite values; the checkpoint is damaged, get it "
                         "again")
    return q


@torch.library.custom_op("nanophys::nf4_product", mutates_args=())
def nf4_product(x: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor,
                nested_absmax: torch.Tensor, nested_offset: torch.Tensor, rows: int, columns: int,
                transposed: bool) -> torch.Tensor:
    """x W^T, or x W, of W (rows, columns) in the four tensors of an NF4Weight; W in 16 bit exists
    only inside. One operator, which torch.compile does not look into."""
    shape = torch.Size((rows, columns))
    W = dequantize_nf4(NF4Weight(packed, absmax, nested_absmax, nested_offset, shape, x.dtype))
    return x @ (W.T if transposed else W)


@nf4_product.register_fake
def _(x, packed, absmax, nested_absmax, nested_offset, rows, columns, transposed):
    return x.new_empty(*x.shape[:-1], rows if transposed else columns)


class NF4Matmul(torch.autograd.Function):
    """y = x W^T. Between forward and backward only the 4-bit form of W is kept.

    Plain twin: F.linear(x, dequantize_plain(q))."""

    @staticmethod
    def forward(ctx, x, rows, *q):
        ctx.save_for_backward(*q)
        ctx.shape = (rows, x.shape[-1])
        return nf4_product(x, *q, *ctx.shape, True)                       # (..., in) -> (..., out)

    @staticmethod
    def backward(ctx, grad):
        grad = nf4_product(grad, *ctx.saved_tensors, *ctx.shape, False)   # (..., out) -> (..., in)
        return grad, None, None, None, None, None


class NF4Linear(nn.Module):
    """A frozen linear layer, weight (out_features, in_features) in NF4; a bias is in 16 bit."""

    def __init__(self, in_features, out_features, bias=False, dtype=torch.bfloat16, device=None):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = dtype
        n = in_features * out_features
        blocks = -(-n // BLOCK)
        for name, size, kind in (
                ("weight", (-(-n // 2),), torch.uint8),
                ("absmax", (blocks,), torch.uint8),
                ("nested_absmax", (-(-blocks // NESTED),), torch.float32),
                ("nested_offset", (), torch.float32)):
            self.register_buffer(name, torch.empty(size, dtype=kind, device=device))
        self.bias = None
        if bias:
            zeros = torch.zeros(out_features, dtype=dtype, device=device)
            self.bias = nn.Parameter(zeros, requires_grad=False)

    def set(self, q):
        """Take over an NF4Weight. Raises ValueError for a shape not (out_features, in_features)."""
        if tuple(q.shape) != (self.out_features, self.in_features):
            raise ValueError(f"a 4-bit weight of shape {tuple(q.shape)} does not fit a layer of "
                             f"{(self.out_features, self.in_features)}")
        self.weight = q.packed
        self.absmax = q.absmax
        self.nested_absmax = q.nested_absmax
        self.nested_offset = q.nested_offset
        self.dtype = q.dtype

    def quantized(self):
        """-> NF4Weight, sharing memory with this layer."""
        return NF4Weight(self.weight, self.absmax, self.nested_absmax, self.nested_offset,
                         torch.Size((self.out_features, self.in_features)), self.dtype)

    def forward(self, x):
        parts = (self.weight, self.absmax, self.nested_absmax, self.nested_offset)
        y = NF4Matmul.apply(x, self.out_features, *parts)
        return y if self.bias is None else y + self.bias.to(y.dtype)
