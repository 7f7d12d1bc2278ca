"""Low-rank adaptation (LoRA, arXiv:2106.09685), by hand, on 16-bit and on 4-bit linear layers.

A frozen linear layer y = W x gains a trainable product of two thin matrices,

    y = W x + (alpha / r) B A dropout(x),        A (r, in), B (out, r),

which starts at zero because B does. A and B become parameters `lora_A` and `lora_B` of the layer that is already there, so no
name of the base model changes. They are float32 and cast to the activation's dtype for the product. On disk an adapter has the
format of the peft library: adapter_config.json and adapter_model.safetensors.

    inject(model, "all", r=8, alpha=32, dropout=0.05)     # freezes the model, adds adapters to all seven projections
    save_adapter(model, "adapter")
    load_adapter(model, "adapter")                        # on a fresh base
    merge(model)                                          # W + (alpha/r) B A into the 16-bit weight
"""
import json
import math
import os
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from quant import NF4Linear

TARGETS = {"qkv": ["q_proj", "k_proj", "v_proj"],
           "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
PREFIX = "base_model.model."        # what peft puts before the name of every adapted module


class LoRABranch(torch.autograd.Function):
    """y += scale B A dropout(x), in place; x (..., in), y (..., out). Plain twin: y + scale * F.linear(F.linear(F.dropout(x, p), A), B).

    Between forward and backward it keeps x itself, which q, k and v share, and which elements were dropped: not a dropped copy of x for each
    adapter, a third of all that a plain implementation keeps."""

    @staticmethod
    def forward(ctx, y, x, A, B, scale, p):
        where, flat = draw_dropped(x, p), x.reshape(-1, x.shape[-1])                  # (..., in) -> (N, in)
        h = without(flat, where) @ A.to(x.dtype).T                                    # (N, in) -> (N, r)
        ctx.scale = scale / (1 - p)
        ctx.save_for_backward(x, A, B, h, where)
        ctx.mark_dirty(y)
        y.view(-1, len(B)).addmm_(h, B.to(x.dtype).T, alpha=ctx.scale)                # (N, r) -> (N, out)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, A, B, h, where = ctx.saved_tensors
        g, flat = grad.reshape(-1, len(B)), x.reshape(-1, x.shape[-1])
        grad_h = g @ (B * ctx.scale).to(x.dtype)                                      # (N, out) -> (N, r)
        grad_x = without(grad_h @ A.to(x.dtype), where).view(x.shape) if ctx.needs_input_grad[1] else None
        return grad, grad_x, (grad_h.T @ without(flat, where)).float(), (g.T @ h).float() * ctx.scale, None, None


def draw_dropped(x, p):
    """Which elements of x dropout zeroes, each with probability p: on a GPU a mask; on a CPU, where random numbers are dear, flat positions,
    whose gaps have a geometric distribution: one draw for each element dropped instead of one for each element. p = 0: None."""
    if not p:
        return None
    if x.device.type != "cpu":
        return torch.empty(x.numel() // x.shape[-1], x.shape[-1], dtype=torch.bool, device=x.device).bernoulli_(p)
    n = x.numel()
    gaps = torch.empty(int(n * p + 6 * math.sqrt(n * p) + 10)).geometric_(p)          # enough, but for one time in 10^9
    positions = gaps.cumsum(0, dtype=torch.int64) - 1
    return positions[positions < n]


def without(x, where):
    """x with zeros where draw_dropped chose."""
    if where is None:
        return x
    return x.masked_fill(where, 0) if where.dtype == torch.bool else x.reshape(-1).index_fill(0, where, 0).view(x.shape)


def add_lora(layer, inputs, y):
    """The forward hook of an adapted layer: y (..., out) -> y + (alpha / r) B A dropout(x), with x (..., in)."""
    p = layer.lora_dropout if layer.training else 0.0
    return LoRABranch.apply(y, inputs[0], layer.lora_A, layer.lora_B, layer.lora_scale, p)


def attach(layer, A, B, alpha, dropout):
    """Make `layer` (nn.Linear or NF4Linear) an adapted one with A (r, in) and B (out, r), kept in float32."""
    if A.shape[1:] != (layer.in_features,) or B.shape != (layer.out_features, A.shape[0]):
        raise ValueError(f"lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} do not fit a layer {layer.in_features} -> {layer.out_features}")
    device = layer.weight.device
    layer.lora_A, layer.lora_B = (nn.Parameter(t.to(device, torch.float32)) for t in (A, B))
    layer.lora_alpha, layer.lora_scale, layer.lora_dropout = alpha, alpha / A.shape[0], dropout
    layer.lora_hook = layer.register_forward_hook(add_lora)


def adapted(model):
    """-> [(name, layer)] of the layers that carry an adapter, in the model's order."""
    return [(name, m) for name, m in model.named_modules() if hasattr(m, "lora_hook")]


def inject(model, targets="all", r=8, alpha=32, dropout=0.05, seed=0):
    """Freeze `model` and give an adapter to every linear layer whose name ends in one of `targets` -> number of trainable parameters.

    targets: "qkv", "all", or a list of names. A ~ U(-1/sqrt(in), 1/sqrt(in)) (kaiming-uniform with a = sqrt 5), drawn on the CPU from
    `seed`, so that every device and process starts alike; B = 0. Raises ValueError for a name that matches no layer."""
    if adapted(model):
        raise ValueError("the model carries an adapter already; merge it or load the base afresh")
    names = TARGETS.get(targets, [targets]) if isinstance(targets, str) else list(targets)
    linear = [(name, m) for name, m in model.named_modules() if isinstance(m, (nn.Linear, NF4Linear))]
    for target in names:
        if not any(name.split(".")[-1] == target for name, _ in linear):
            known = sorted({name.split(".")[-1] for name, _ in linear})
            raise ValueError(f"no linear layer is named {target!r}; choose qkv, all or names among {', '.join(known)}")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, layer in linear:
        if name.split(".")[-1] in names:
            bound = 1 / math.sqrt(layer.in_features)
            meta = layer.weight.is_meta
            A = torch.empty(r, layer.in_features, device="meta" if meta else "cpu").uniform_(-bound, bound, generator=None if meta else generator)
            attach(layer, A, torch.zeros(layer.out_features, r, device=A.device), alpha, dropout)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def merge(model):
    """Add every adapter to its 16-bit weight, W <- W + (alpha/r) B A computed in float32 and rounded once, and remove it.

    Raises ValueError for adapters on NF4 layers: their rounding would swallow the update."""
    for name, layer in adapted(model):
        if isinstance(layer, NF4Linear):
            raise ValueError(f"{name} is a 4-bit layer and cannot take the adapter in; load the base in 16 bit (quantize=None) to merge")
    for _, layer in adapted(model):
        weight = layer.weight.float() + layer.lora_scale * layer.lora_B @ layer.lora_A
        layer.weight = nn.Parameter(weight.to(layer.weight.dtype), requires_grad=False)
        layer.lora_hook.remove()
        for attribute in ("lora_hook", "lora_A", "lora_B", "lora_alpha", "lora_scale", "lora_dropout"):
            delattr(layer, attribute)


def save_adapter(model, directory, base=None):
    """Write the adapter in peft's format; `base` is the name or path of the base model that it records.

    Both files are written under temporary names first, so an adapter that was there before stays whole until the end."""
    layers = adapted(model)
    if not layers:
        raise ValueError("the model carries no adapter to save")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {f"{PREFIX}{name}.lora_{which}.weight": getattr(layer, f"lora_{which}").detach().cpu().contiguous()
               for name, layer in layers for which in "AB"}
    first = layers[0][1]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": first.lora_A.shape[0],
              "lora_alpha": first.lora_alpha, "lora_dropout": first.lora_dropout, "bias": "none", "inference_mode": True,
              "target_modules": sorted({name.split(".")[-1] for name, _ in layers})}
    save_file(tensors, directory / "adapter_model.safetensors.tmp", metadata={"format": "pt"})
    (directory / "adapter_config.json.tmp").write_text(json.dumps(config, indent=1))
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        with open(directory / f"{file}.tmp", "rb+") as f:
            os.fsync(f.fileno())
        os.replace(directory / f"{file}.tmp", directory / file)


def load_adapter(model, directory, trainable=False):
    """Attach an adapter in peft's format, ours or peft's, to a freshly loaded base; frozen unless `trainable`.

    Raises ValueError for a damaged adapter, one that does not fit the model, and variants that add_lora does not compute."""
    directory = Path(directory)
    try:
        config = json.loads((directory / "adapter_config.json").read_text())
        tensors = load_file(directory / "adapter_model.safetensors")
        alpha, dropout = config["lora_alpha"], config.get("lora_dropout", 0.0)
    except FileNotFoundError as e:
        raise ValueError(f"{e.filename or directory} is missing: {directory} holds no adapter") from None
    except (SafetensorError, ValueError, KeyError, OSError) as e:
        raise ValueError(f"the adapter in {directory} cannot be read ({e}); save or get it again") from None
    for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "lora_bias"):
        if config.get(key):
            raise ValueError(f"the adapter in {directory} has {key} set; only plain LoRA is computed here")
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        raise ValueError(f"the adapter in {directory} is {config.get('peft_type')} with bias {config.get('bias')}; only plain LoRA is computed here")
    if adapted(model):
        raise ValueError("the model carries an adapter already; merge it or load the base afresh")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, NF4Linear))}
    names = sorted({key.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for key in tensors})
    for name in names:
        if name not in layers:
            raise ValueError(f"the adapter in {directory} adapts {name}, which this model does not have; is it for another base?")
    for name in names:
        try:
            A, B = (tensors[f"{PREFIX}{name}.lora_{which}.weight"] for which in "AB")
            attach(layers[name], A, B, alpha, dropout)
        except (KeyError, ValueError) as e:
            raise ValueError(f"the adapter in {directory} does not fit at {name}: {e}") from None
        layers[name].lora_A.requires_grad_(trainable), layers[name].lora_B.requires_grad_(trainable)
