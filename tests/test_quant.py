"""quant.py against bitsandbytes: bit for bit. The Triton kernel against plain torch, on a GPU or in Triton's interpreter."""
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

import quant
from quant import NF4Linear, dequantize_nf4, quantize_nf4


def mismatches(weight):
    """Number of differing elements between bitsandbytes' and our quantisation of `weight`, all five tensors and the way back."""
    packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    q = quantize_nf4(weight)
    pairs = [(packed.view(-1), q.packed), (state.absmax, q.absmax), (state.state2.absmax, q.nested_absmax), (state.offset, q.nested_offset)]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        state.dtype = dtype
        theirs, ours = bnb.dequantize_4bit(packed, state), dequantize_nf4(q, dtype)
        pairs.append((theirs.view(-1).nan_to_num(), ours.view(-1).nan_to_num()))          # float16 overflows above 65504: inf in both
    assert q.shape == weight.shape and dequantize_nf4(q).dtype == weight.dtype
    return sum((a != b).sum().item() for a, b in pairs)


def test_levels():
    assert torch.equal(quant.DYNAMIC, bnb.create_dynamic_map())
    assert torch.equal(quant.NF4, bnb.get_4bit_type("nf4", device="cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_random_weights(dtype):
    torch.manual_seed(0)
    assert mismatches((0.02 * torch.randn(2048, 2048)).to(dtype)) == 0                    # 4 million each
    sparse = torch.randn(128, 64 * 300)
    sparse[::3] = 0                                                                       # all-zero blocks
    for weight in (sparse, torch.randn(3, 5), torch.randn(7, 101), torch.randn(1000, 37), torch.randn(6400 + 63),
                   torch.randn(1111, 577), torch.zeros(64, 64), torch.zeros(5, 7), torch.ones(1, 1)):
        assert mismatches(weight.to(dtype)) == 0, weight.shape


def test_nearest_level():
    """Against its plain twin: everywhere in [-1, 1], at the midpoints and at the floats beside them."""
    torch.manual_seed(0)
    midpoints = (quant.NF4[:-1] + quant.NF4[1:]) / 2
    x = torch.cat([2 * torch.rand(10 ** 6) - 1, midpoints, quant.NF4, torch.tensor([1 + 2e-7, -1 - 2e-7, -0.0]),
                   *(torch.nextafter(midpoints, torch.tensor(side)) for side in (-1.0, 1.0))])
    assert torch.equal(quant.nearest_level(x).long(), torch.bucketize(x, midpoints))


def test_extreme_magnitudes():
    torch.manual_seed(0)
    for exponent in range(-30, 31, 5):
        assert mismatches(torch.randn(64, 512) * 10.0 ** exponent) == 0, exponent
    assert mismatches(torch.randn(4096, 64) * 10 ** (60 * torch.rand(4096, 1) - 30)) == 0


def test_real_weights(smollm2):
    """All 210 projections of SmolLM2-135M: 1.06 * 10^8 weights."""
    count = 0
    with safe_open(smollm2 / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            if name.endswith("_proj.weight"):
                weight = file.get_tensor(name)
                count += weight.numel()
                assert mismatches(weight) == 0, name
    assert count == 106168320


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_is_refused(bad):
    weight = torch.randn(64, 64)
    weight[3, 5] = bad
    with pytest.raises(ValueError, match="model.layers.7.mlp.up_proj.weight holds NaN"):
        quantize_nf4(weight, "model.layers.7.mlp.up_proj.weight")


def large_floats(size):
    """Addresses of the live floating point tensors of at least `size` elements that Python can reach."""
    return {id(t) for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and t.is_floating_point() and t.numel() >= size}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(dtype, bias):
    """Forward and input gradient equal those of the plain twin; nothing of the size of the weight is kept in between, neither as
    a saved tensor nor on the autograd node or the layer."""
    torch.manual_seed(0)
    layer, weight = NF4Linear(96, 160, bias=bias, dtype=dtype), torch.randn(160, 96, dtype=dtype)
    layer.set(quantize_nf4(weight))
    if bias:
        layer.bias.data.normal_()
    dense = dequantize_nf4(quantize_nf4(weight))
    x = torch.randn(2, 7, 96, dtype=dtype, requires_grad=True)
    kept, before = [], large_floats(weight.numel())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    assert large_floats(weight.numel()) == before and len(before) >= 2                    # weight and dense, so the count sees tensors
    twin = F.linear(x, dense) + (layer.bias if bias else 0)
    assert torch.equal(y, twin) and not any(t.is_floating_point() and t.numel() >= weight.numel() for t in kept)
    g = torch.randn_like(y)
    assert torch.allclose(torch.autograd.grad(y, x, g)[0], torch.autograd.grad(twin, x, g)[0], atol=1e-5 if dtype == torch.float32 else 0.3)
    with pytest.raises(ValueError, match="does not fit"):
        layer.set(quantize_nf4(torch.randn(96, 160)))


def compare_triton(device):
    """The kernel's output equals the plain path's, bit for bit: partial blocks, odd sizes, several nested blocks, 30 orders of magnitude.

    Triton's interpreter cuts float32 to bfloat16 where a GPU rounds; there the comparison is with the float32 values, cut."""
    torch.manual_seed(0)
    for shape in ((1,), (64,), (63,), (65,), (3, 5), (7, 101), (64, 64), (6463,), (1000, 37), (130, 129)):
        q = quantize_nf4((torch.randn(shape) * 10 ** (30 * torch.rand(shape) - 15)).to(device))
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            expected = quant.dequantize_plain(q, dtype)
            if device == "cpu" and dtype == torch.bfloat16:
                expected = (quant.dequantize_plain(q, torch.float32).view(torch.int32) & -65536).view(torch.float32).bfloat16()
            ours = quant.dequantize_triton(q, dtype)
            assert ours.shape == q.shape and ours.dtype == dtype and torch.equal(ours, expected), (shape, dtype)


def test_triton_kernel():
    """In a process of its own: whether Triton interprets or compiles is decided when quant.py is imported."""
    pytest.importorskip("triton")
    gpu = torch.cuda.is_available()
    done = subprocess.run([sys.executable, "-c", f"import test_quant; test_quant.compare_triton({'cuda' if gpu else 'cpu'!r})"], text=True,
                          capture_output=True, cwd=Path(__file__).parent, env=os.environ | {"PYTHONPATH": str(Path(quant.__file__).parent)}
                          | ({} if gpu else {"TRITON_INTERPRET": "1"}))
    assert done.returncode == 0, done.stderr


def test_without_triton():
    """quant.py needs no Triton: imported where there is none, it dequantises as ever."""
    code = ("import sys; sys.modules['triton'] = None; import torch, quant; assert quant.triton is None;"
            "w = torch.randn(640, 3); assert (quant.dequantize_nf4(quant.quantize_nf4(w)) - w).abs().max() < 1")
    subprocess.run([sys.executable, "-c", code], cwd=Path(quant.__file__).parent, check=True)


def test_triton_that_does_not_work(monkeypatch, capsys):
    """Where the first launch fails (no C compiler, no Python.h) one warning is printed and the plain path taken, once for all."""
    def launch(*_):
        raise RuntimeError("Failed to find C compiler.\nPlease specify one")
    real = torch.ones
    monkeypatch.setattr(torch, "ones", lambda size, device: real(size))
    monkeypatch.setattr(quant, "dequantize_triton", launch)
    quant.triton_works.cache_clear()
    assert [quant.triton_works(), quant.triton_works()] == [False, False]
    assert capsys.readouterr().err.startswith("warning: Triton does not work here (Failed to find C compiler.)")
    quant.triton_works.cache_clear()


def test_damaged_bitsandbytes_tensors():
    """Every tensor of a serialised weight that is missing, of another size or kind, or not finite is refused with the weight's name."""
    packed, state = bnb.quantize_4bit(torch.randn(200, 100), blocksize=64, compress_statistics=True, quant_type="nf4")
    good = {"": packed} | {k.removeprefix("."): v for k, v in state.as_dict(packed=True).items()}
    expected = quantize_nf4(bnb.dequantize_4bit(packed, state))
    q = quant.from_bitsandbytes(good, "w")
    assert torch.equal(q.packed, expected.packed) and q.shape == (200, 100) and q.dtype == torch.float32
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(quant.from_bitsandbytes(good | {"": packed.view(-1).view(dtype).view(-1, 1)}, "w").packed, q.packed)
    nan = good["nested_absmax"].clone()
    nan[0] = float("nan")
    damaged = [{k: v for k, v in good.items() if k != key} for key in good]
    damaged += [good | {"": packed[:-1]}, good | {"absmax": good["absmax"].float()}, good | {"absmax": good["absmax"][1:]}, good | {"nested_absmax": nan},
                good | {"nested_absmax": good["nested_absmax"].double()}, good | {"quant_map": good["quant_map"].flip(0)}, good | {"nested_quant_map": torch.zeros(3)},
                good | {"quant_state.bitsandbytes__nf4": torch.tensor([1, 2, 3], dtype=torch.uint8)}]
    fp4 = json.loads(bytes(good["quant_state.bitsandbytes__nf4"].tolist())) | {"quant_type": "fp4"}
    damaged.append(good | {"quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(fp4).encode()), dtype=torch.uint8)})
    for tensors in damaged:
        with pytest.raises(ValueError, match="^w"):
            quant.from_bitsandbytes(tensors, "w")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda():
    torch.manual_seed(0)
    for weight in (torch.randn(4096, 4096), torch.randn(4096, 1024).bfloat16(), 0.02 * torch.randn(512, 512).half()):
        assert mismatches(weight.cuda()) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_beyond_31_bits():
    """The end of a weight of more than 2^31 elements equals that of its last blocks alone."""
    blocks, last = 2 ** 25 + 512, 1024                                                    # of 64; the nested blocks are whole
    q = quant.NF4Weight(torch.randint(0, 256, (blocks * 32,), dtype=torch.uint8, device="cuda"),
                        torch.randint(0, 256, (blocks,), dtype=torch.uint8, device="cuda"), torch.rand(blocks // 256, device="cuda"),
                        torch.tensor(0.1, device="cuda"), torch.Size([blocks * 64]), torch.bfloat16)
    end = quant.NF4Weight(q.packed[-last * 32:], q.absmax[-last:], q.nested_absmax[-last // 256:], q.nested_offset, torch.Size([last * 64]), q.dtype)
    assert torch.equal(dequantize_nf4(q)[-last * 64:], quant.dequantize_plain(end, torch.bfloat16))
