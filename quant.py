"""NF4, the 4-bit number format of QLoRA, by hand (arXiv:2305.14314), bit for bit what bitsandbytes computes.

A weight matrix is flattened and cut into blocks of 64. A block is divided by its largest magnitude ("absmax"), which brings it into
[-1, 1], and each value becomes the index (4 bits) of one of 16 levels that are close to the quantiles of a normal distribution.
Two indices share a byte, the earlier one in the high nibble.

That leaves one float32 absmax for 64 weights, half a bit a weight. Double quantisation stores them in 8 bits as well: their mean
("offset") is subtracted, and blocks of 256 of what remains are divided by their own maximum ("nested_absmax") and rounded
to one of the 256 levels of the dynamic map (arXiv:1511.04561), a small floating point format with a flexible exponent. Together:

    4 bits + 8/64 + 32/(64*256) = 4.127 bits a weight,     w ~ NF4[code] * (DYNAMIC[absmax] * nested_absmax + offset)

    q = quantize_nf4(weight)          # NF4Weight
    w = dequantize_nf4(q)             # the same shape and dtype as the weight had
    y = NF4Linear(...)                # y = x W^T with W kept in 4 bits; the gradient goes to x only, W is frozen

Dequantising is bound by memory, not by arithmetic. On a CPU one table look-up yields two weights, piece by piece in the cache; on
a CUDA device, where Triton is installed (it comes with torch), one kernel reads 4 bits and writes 16, with nothing in between.
"""
import functools
import json
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

# The 16 levels (arXiv:2305.14314, appendix E): quantiles of N(0, 1), asymmetric so that zero is a level, scaled to [-1, 1].
NF4 = torch.tensor([-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
                    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
                    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0])


def dynamic_map():
    """The 256 levels of the signed 8-bit dynamic map, ascending: (256,) float32 in [-0.993, 1].

    0, 1, and +-10^(i-6) times the midpoints of 2^i equal intervals of [0.1, 1], i = 0..6: the larger the exponent, the finer
    the fraction."""
    levels = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** i + 1)
        positive = 10 ** (i - 6) * (edges[:-1] + edges[1:]) / 2
        levels += positive.tolist() + (-positive).tolist()
    return torch.tensor(sorted(levels))


DYNAMIC = dynamic_map()
# The two float32 levels of each byte side by side in one 64-bit word, (256,): one look-up yields two weights.
NF4_PAIRS = torch.stack([NF4.repeat_interleave(16), NF4.repeat(16)], dim=1).view(torch.int64).view(-1)


@functools.cache
def tables(device):
    """-> NF4, DYNAMIC, NF4_PAIRS on `device`, copied there once."""
    return NF4.to(device), DYNAMIC.to(device), NF4_PAIRS.to(device)


@dataclass
class NF4Weight:
    """A quantised tensor. `packed` (ceil(n/2),) uint8; `absmax` (ceil(n/64),) uint8; `nested_absmax` (ceil(n/64/256),) float32;
    `nested_offset` () float32; `shape` and `dtype` are the original's."""
    packed: torch.Tensor
    absmax: torch.Tensor
    nested_absmax: torch.Tensor
    nested_offset: torch.Tensor
    shape: torch.Size
    dtype: torch.dtype


def quantize_nf4(weight, name="weight"):
    """weight (any shape, float32/16/bfloat16) -> NF4Weight on the same device.

    Raises ValueError, with the tensor's `name`, for NaN or infinite weights."""
    x, n, device = weight.detach().reshape(-1), weight.numel(), weight.device
    packed = torch.empty(-(-n // 2), dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-n // BLOCK), dtype=torch.float32, device=device)
    size = 1 << (18 if device.type == "cpu" else 24)                        # in pieces, so that little memory is needed besides
    for piece, out, largest in zip(x.split(size), packed.split(size // 2), absmax.split(size // BLOCK)):
        blocks = F.pad(piece.float(), (0, -len(piece) % BLOCK)).view(-1, BLOCK)       # (n,) -> (n/64, 64)
        torch.amax(blocks.abs(), dim=1, out=largest)
        if not torch.isfinite(largest).all():
            raise ValueError(f"{name} holds NaN or infinite values and cannot be quantised; the checkpoint is damaged, get it again")
        scaled = blocks * (1 / largest.clamp(min=TINY))[:, None]
        if len(piece) % BLOCK:                                  # bitsandbytes divides the partial block, and never by zero
            largest[-1] = largest[-1].clamp(min=TINY)
            scaled[-1] = blocks[-1] / largest[-1]
        codes = nearest_level(scaled.view(-1))                                        # the padding's code is that of zero
        out.copy_((codes[::2] << 4 | codes[1::2])[:len(out)])
    return NF4Weight(packed, *quantize_absmax(absmax), weight.shape, weight.dtype)


def nearest_level(x):
    """x (n,) float32 in [-1, 1] -> (n,) uint8: how many of the 15 midpoints between levels lie below x.

    [-1, 1] is cut into 32 cells, narrower than the midpoints are apart: the cell says all but whether x is above the one midpoint
    that its cell may have. Exact, since rounding keeps the order: a larger x is never in a lower cell. Plain twin: torch.bucketize."""
    below, midpoint = cells(x.device)
    cell = (x * 16 + 17).int()                                                        # 1 for -1, 33 for 1
    return below.index_select(0, cell) + (x > midpoint.index_select(0, cell))


@functools.cache
def cells(device):
    """-> for each of 35 cells the number of midpoints in lower cells (uint8), and its own midpoint or infinity (float32)."""
    midpoints = (NF4[:-1] + NF4[1:]) / 2
    cell = (midpoints * 16 + 17).int()                                                # (15,), all different
    below = torch.bucketize(torch.arange(35, dtype=torch.int32), cell)
    return below.to(device, torch.uint8), torch.full((35,), torch.inf).scatter(0, cell.long(), midpoints).to(device)


def quantize_absmax(absmax):
    """Double quantisation of absmax (m,) float32 -> (m,) uint8 codes, (ceil(m/256),) float32 maxima, () float32 offset."""
    offset = absmax.mean()
    blocks = F.pad(absmax - offset, (0, -len(absmax) % NESTED)).view(-1, NESTED)      # (m,) -> (m/256, 256)
    nested_absmax = blocks.abs().amax(dim=1)
    x = blocks * (1 / nested_absmax)[:, None]
    if x.device.type == "cpu":                                  # bitsandbytes looks the code up on a grid of 65,536 points
        x = ((x + 1) * 32767.5 + 0.5).int().clamp(0, 65535) * 2.0 / 65535 - 1
    _, dynamic, _ = tables(x.device)
    codes = torch.bucketize(x, (dynamic[:-1] + dynamic[1:]) / 2)
    codes[nested_absmax == 0] = 0                                                     # nothing but the offset itself
    return codes.view(-1)[:len(absmax)].to(torch.uint8), nested_absmax, offset


def dequantize_nf4(q, dtype=None):
    """NF4Weight -> Tensor of q.shape in `dtype` (default: the original's), computed in float32 and rounded once."""
    if triton and q.packed.is_cuda:
        return dequantize_triton(q, dtype or q.dtype)
    return dequantize_plain(q, dtype or q.dtype)


def dequantize_plain(q, dtype):
    """The same in plain torch, on any device."""
    device, blocks = q.packed.device, len(q.absmax)
    _, dynamic, pairs = tables(device)
    absmax = F.pad(dynamic.index_select(0, q.absmax.int()), (0, -blocks % NESTED)).view(-1, NESTED)
    absmax = absmax.mul_(q.nested_absmax[:, None]).add_(q.nested_offset).view(-1, 1)[:blocks]     # (m/256, 256) -> (m, 1)
    out = torch.empty(blocks, BLOCK, dtype=dtype, device=device)
    rows = min(blocks, 8192) if device.type == "cpu" else blocks             # a piece is 2 MB in float32 and stays in the cache
    words = torch.empty(rows * BLOCK // 2, dtype=torch.int64, device=device)
    levels = words.view(torch.float32).view(rows, BLOCK)                     # each word is two float32: the same memory
    for packed, scale, piece in zip(q.packed.split(rows * BLOCK // 2), absmax.split(rows), out.split(rows)):
        torch.index_select(pairs, 0, packed.int(), out=words[:len(packed)])  # a partial block leaves the rest of its row as it was
        piece.copy_(levels[:len(piece)].mul_(scale))
    return out.view(-1)[:q.shape.numel()].view(q.shape)


if triton:
    @triton.jit
    def dequantize_kernel(packed, absmax, nested_absmax, nested_offset, nf4, dynamic, out, n_packed, n, ROWS: tl.constexpr):
        """One program dequantises ROWS blocks of 64; a thread loads and stores 16 bytes at a time. The codes are brought into the order
        of the output as bytes, before the look-up: that is the least to move between threads. Offsets are 64 bits wide: a
        weight may have more than 2^31 elements."""
        block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)                        # (ROWS,)
        inside = block * 64 < n
        scale = tl.load(dynamic + tl.load(absmax + block, mask=inside, other=0))
        scale = scale * tl.load(nested_absmax + block // 256, mask=inside, other=0) + tl.load(nested_offset)
        byte = block[:, None] * 32 + tl.arange(0, 32)[None, :]                                   # (ROWS, 32)
        codes = tl.load(packed + byte, mask=byte < n_packed, other=0)
        codes = tl.interleave(codes >> 4, codes & 15)                                            # (ROWS, 32) -> (ROWS, 64)
        i = block[:, None] * 64 + tl.arange(0, 64)[None, :]
        tl.store(out + i, (tl.load(nf4 + codes) * scale[:, None]).to(out.dtype.element_ty), mask=i < n)


def dequantize_triton(q, dtype):
    """The same in one Triton kernel, on a CUDA device (or, with TRITON_INTERPRET=1 in the environment, in Triton's interpreter on a CPU).

    Fusing the product and the sum of the absmax into one rounding would change bits: fusion is off."""
    nf4, dynamic, _ = tables(q.packed.device)
    out = torch.empty(q.shape, dtype=dtype, device=q.packed.device)
    with torch.cuda.device_of(q.packed):
        dequantize_kernel[(triton.cdiv(len(q.absmax), 64),)](q.packed, q.absmax, q.nested_absmax, q.nested_offset, nf4, dynamic, out,
                                                             len(q.packed), out.numel(), ROWS=64, num_warps=4, enable_fp_fusion=False)
    return out


def from_bitsandbytes(tensors, name):
    """The tensors that bitsandbytes serialised for one weight -> NF4Weight.

    tensors: {"": packed, "absmax": .., "nested_absmax": .., "quant_map": .., "nested_quant_map": .., "quant_state.bitsandbytes__nf4": ..}.
    Raises ValueError for a format other than NF4 with block 64 and double quantisation with block 256."""
    missing = {"absmax", "nested_absmax", "quant_map", "nested_quant_map", "quant_state.bitsandbytes__nf4"} - set(tensors)
    if missing:
        raise ValueError(f"{name}: a 4-bit checkpoint must be NF4 with double quantisation; missing: {', '.join(sorted(missing))}")
    try:
        state = json.loads(bytes(tensors["quant_state.bitsandbytes__nf4"].tolist()))
        shape, dtype, offset = torch.Size(state["shape"]), getattr(torch, state["dtype"]), float(state["nested_offset"])
        blocks = state["blocksize"], state["nested_blocksize"]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{name}: the quant_state of this 4-bit weight cannot be read ({e}); get the checkpoint again") from None
    q = NF4Weight(tensors[""].reshape(-1), tensors["absmax"], tensors["nested_absmax"], torch.tensor(offset), shape, dtype)
    if blocks != (BLOCK, NESTED) or not torch.equal(tensors["quant_map"].float(), NF4) \
            or not torch.allclose(tensors["nested_quant_map"].float(), DYNAMIC, atol=1e-7):
        raise ValueError(f"{name}: 4-bit blocks of {blocks} or another codebook; only NF4 with blocks of {BLOCK} and {NESTED} is read")
    if len(q.packed) != -(-shape.numel() // 2) or len(q.absmax) != -(-shape.numel() // BLOCK) or len(q.nested_absmax) != -(-len(q.absmax) // NESTED):
        raise ValueError(f"{name}: the sizes of the 4-bit tensors do not fit the shape {tuple(shape)}; get the checkpoint again")
    return q


class NF4Matmul(torch.autograd.Function):
    """y = x W^T. The 16-bit W exists only inside forward and inside backward; between them only its 4-bit form is kept.

    Plain twin: F.linear(x, dequantize_plain(q, x.dtype))."""

    @staticmethod
    def forward(ctx, x, q):
        ctx.q = q
        return x @ dequantize_nf4(q, x.dtype).T                                       # (..., in) -> (..., out)

    @staticmethod
    def backward(ctx, grad):
        return grad @ dequantize_nf4(ctx.q, grad.dtype), None                         # (..., out) -> (..., in)


class NF4Linear(nn.Module):
    """A frozen linear layer, weight (out_features, in_features) in NF4; the bias, if there is one, in 16 bit."""

    def __init__(self, in_features, out_features, bias=False, dtype=torch.bfloat16, device=None):
        super().__init__()
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        n = in_features * out_features
        blocks = -(-n // BLOCK)
        for name, size, kind in (("weight", (-(-n // 2),), torch.uint8), ("absmax", (blocks,), torch.uint8),
                                 ("nested_absmax", (-(-blocks // NESTED),), torch.float32), ("nested_offset", (), torch.float32)):
            self.register_buffer(name, torch.empty(size, dtype=kind, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device), requires_grad=False) if bias else None

    def set(self, q):
        """Take over an NF4Weight. Raises ValueError if its shape is not (out_features, in_features)."""
        if tuple(q.shape) != (self.out_features, self.in_features):
            raise ValueError(f"a 4-bit weight of shape {tuple(q.shape)} does not fit a layer of {(self.out_features, self.in_features)}")
        self.weight, self.absmax, self.nested_absmax, self.nested_offset, self.dtype = \
            q.packed, q.absmax, q.nested_absmax, q.nested_offset, q.dtype

    def quantized(self):
        """-> NF4Weight, sharing memory with this layer."""
        return NF4Weight(self.weight, self.absmax, self.nested_absmax, self.nested_offset,
                         torch.Size((self.out_features, self.in_features)), self.dtype)

    def forward(self, x):
        y = NF4Matmul.apply(x, self.quantized())
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self):
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
