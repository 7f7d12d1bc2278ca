"""Low-rank adaptation (LoRA, arXiv:2106.09685), by hand, on 16-bit and on 4-bit linear layers.

A frozen linear layer y = W x gains a trainable product of two thin matrices,

    y = W x + (alpha / r) B A dropout(x),        A (r, in), B (out, r),

which starts at zero because B does. A and B become parameters `lora_A` and `lora_B` of the layer
that is already there, so no name of the base model changes. They are float32 and cast to the
activation's dtype for the product. On disk an adapter has the format of the peft library:
adapter_config.json and adapter_model.safetensors.

    inject(model, "all", r=8, alpha=32, dropout=0.05)     # freeze, adapt all seven projections
    save_adapter(model, "adapter")
    load_adapter(model, "adapter")                        # on a fresh base
    merge(model)                                          # W + (alpha/r) B A into the 16-bit weight
    save_merged("base", "adapter", "directory")           # the same on disk, tensor by tensor
"""
import json
import math
import re
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from model import (
    fetch,
    load_pretrained,
    no_links_out,
    read_tensor,
    reading,
    tensor_files,
    whole_tensors,
    write_checkpoint,
    writing,
)
from quant import NF4Linear

TARGETS = {"qkv": ["q_proj", "k_proj", "v_proj"],
           "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
PREFIX = "base_model.model."        # what peft puts before the name of every adapted module

# Fields of adapter_config.json that are computed below, and those that change nothing. Any other
# is refused where it is set.
COMPUTED = {"peft_type", "bias", "init_lora_weights", "r", "lora_alpha", "lora_dropout",
            "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
            "layers_to_transform"}
HARMLESS = {"auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core",
            "peft_version", "qalora_group_size", "revision", "task_type"}


class LoRABranch(torch.autograd.Function):
    """y += scale B A dropout(x), in place; x (..., in), y (..., out).

    Between forward and backward it keeps x itself, which q, k and v share, and which elements were
    dropped: not a dropped copy of x for each adapter, a third of all that a plain implementation
    keeps. Plain twin: y + scale * F.linear(F.linear(F.dropout(x, p), A), B)."""

    @staticmethod
    def forward(ctx, y, x, A, B, scale, p):
        where = draw_dropped(x, p)
        flat = x.reshape(-1, x.shape[-1])                                 # (..., in) -> (N, in)
        h = zero_at(flat, where) @ A.to(x.dtype).T                        # (N, in) -> (N, r)
        ctx.scale = scale / (1 - p)
        ctx.save_for_backward(x, A, B, h, where)
        ctx.mark_dirty(y)
        y.view(-1, len(B)).addmm_(h, B.to(x.dtype).T, alpha=ctx.scale)    # (N, r) -> (N, out)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, A, B, h, where = ctx.saved_tensors
        g = grad.reshape(-1, len(B))
        flat = x.reshape(-1, x.shape[-1])
        grad_h = g @ (B * ctx.scale).to(x.dtype)                          # (N, out) -> (N, r)
        grad_x = None
        if ctx.needs_input_grad[1]:
            grad_x = zero_at(grad_h @ A.to(x.dtype), where).view(x.shape)
        grad_A = (grad_h.T @ zero_at(flat, where)).float()
        grad_B = (g.T @ h).float() * ctx.scale
        return grad, grad_x, grad_A, grad_B, None, None


def draw_dropped(x, p):
    """Which elements of x dropout zeroes, each with probability p; None for p = 0.

    On a GPU a mask (N, in); on a CPU, where random numbers are dear, flat positions, whose gaps
    have a geometric distribution: one draw for each element dropped instead of one for each."""
    if not p:
        return None
    n = x.numel()
    if x.device.type != "cpu":
        mask = torch.empty(n // x.shape[-1], x.shape[-1], dtype=torch.bool, device=x.device)
        return mask.bernoulli_(p)
    draws = int(n * p + 6 * math.sqrt(n * p) + 10)            # enough, but for one time in 10^9
    positions = torch.empty(draws).geometric_(p).cumsum(0, dtype=torch.int64) - 1
    return positions[positions < n]


def zero_at(x, where):
    """x with zeros where draw_dropped chose."""
    if where is None:
        return x
    if where.dtype == torch.bool:
        return x.masked_fill(where, 0)
    return x.reshape(-1).index_fill(0, where, 0).view(x.shape)


def lora_hook(layer, inputs, y):
    """The forward hook of an adapted layer: y (..., out) -> y + (alpha / r) B A dropout(x)."""
    p = layer.lora_dropout if layer.training else 0.0
    if torch.compiler.is_compiling():       # it fuses the plain form, and keeps no masks either
        x = F.dropout(inputs[0], p)
        h = F.linear(x, layer.lora_A.to(x.dtype))
        return y + F.linear(h, (layer.lora_scale * layer.lora_B).to(x.dtype))
    return LoRABranch.apply(y, inputs[0], layer.lora_A, layer.lora_B, layer.lora_scale, p)


def attach(layer, A, B, alpha, dropout):
    """Make `layer` (nn.Linear or NF4Linear) an adapted one with A (r, in), B (out, r), float32."""
    if A.shape[1:] != (layer.in_features,) or B.shape != (layer.out_features, len(A)):
        raise ValueError(f"lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} do not fit a layer "
                         f"{layer.in_features} -> {layer.out_features}")
    device = A.device if layer.weight.is_meta else layer.weight.device
    layer.lora_A = nn.Parameter(A.to(device, torch.float32))
    layer.lora_B = nn.Parameter(B.to(device, torch.float32))
    layer.lora_alpha = alpha
    layer.lora_scale = alpha / len(A)
    layer.lora_dropout = dropout
    layer.lora_handle = layer.register_forward_hook(lora_hook)


def adapted(model):
    """-> [(name, layer)] of the layers that carry an adapter, in the model's order."""
    return [(name, m) for name, m in model.named_modules() if hasattr(m, "lora_handle")]


def linear_layers(model):
    """-> {name: layer} of what can be adapted: not lm_head, whose weight the loss takes alone."""
    if adapted(model):
        raise ValueError("the model carries an adapter already; merge it or load the base afresh")
    return {name: m for name, m in model.named_modules()
            if isinstance(m, (nn.Linear, NF4Linear)) and name != "lm_head"}


def inject(model, targets="all", r=8, alpha=32, dropout=0.05, seed=0):
    """Freeze `model` and adapt every linear layer whose name ends in one of `targets`.

    -> the number of trainable parameters. targets: "qkv", "all", or a list of names.
    A ~ U(-1/sqrt(in), 1/sqrt(in)) (kaiming-uniform with a = sqrt 5), drawn on the CPU from `seed`,
    so that every device and process starts alike; B = 0.
    Raises ValueError for a name that matches no layer."""
    layers = linear_layers(model)
    if isinstance(targets, str):
        targets = TARGETS.get(targets, [targets])
    known = sorted({name.split(".")[-1] for name in layers})
    for target in targets:
        if target not in known:
            raise ValueError(f"no linear layer that can be adapted is named {target!r}; choose "
                             f"qkv, all or names among {', '.join(known)}")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, layer in layers.items():
        if name.split(".")[-1] in targets:
            bound = 1 / math.sqrt(layer.in_features)
            if layer.weight.is_meta:
                A = torch.empty(r, layer.in_features, device="meta")
            else:
                A = torch.empty(r, layer.in_features)
                A.uniform_(-bound, bound, generator=generator)
            B = torch.zeros(layer.out_features, r, device=A.device)
            attach(layer, A, B, alpha, dropout)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def merged_weight(layer, weight):
    """W + (alpha/r) B A, computed in float32 and rounded once to W's dtype."""
    update = layer.lora_scale * layer.lora_B @ layer.lora_A
    return (weight.float() + update).to(weight.dtype)


@torch.no_grad()
def merge(model):
    """Add every adapter to its 16-bit weight and remove it.

    Raises ValueError for adapters on NF4 layers: their rounding would swallow the update."""
    layers = adapted(model)
    for name, layer in layers:
        if isinstance(layer, NF4Linear):
            raise ValueError(f"{name} is a 4-bit layer and cannot take the adapter in; load the "
                             "base in 16 bit (quantize=None) to merge")
    for _, layer in layers:
        layer.weight = nn.Parameter(merged_weight(layer, layer.weight), requires_grad=False)
        layer.lora_handle.remove()
        for attribute in ("handle", "A", "B", "alpha", "scale", "dropout"):
            delattr(layer, f"lora_{attribute}")


@torch.no_grad()
def save_merged(base, adapter, directory, dtype=torch.bfloat16, shard_bytes=5 * 10 ** 9):
    """Write the base with the adapter merged in as a whole model, tensor by tensor.

    base: a directory or hub id; adapter, directory: directories that exist (see
    model.new_directory). At no time more than a tensor is held besides the mapped files; the
    weights are, bit for bit, those of load_pretrained, load_adapter and merge. Raises ValueError
    for a 4-bit base, and for one whose files are links that leave its directory."""
    source = fetch(base)
    no_links_out(source)
    model = load_pretrained(base, dtype=dtype, device="meta")
    tensors = whole_tensors(model)
    load_adapter(model, adapter)
    layers = dict(adapted(model))
    files = tensor_files(source)

    def merged(name):
        weight = read_tensor(files, name, "cpu", dtype)
        layer = layers.get(name.removesuffix(".weight"))
        return weight if layer is None else merged_weight(layer, weight)

    write_checkpoint(Path(directory), model.config, tensors, merged, shard_bytes)


def save_adapter(model, directory, base=None):
    """Write the adapter in peft's format; `base` is the name or path of its base model.

    Raises ValueError where there is none, or one whose layers differ in r or alpha."""
    layers = adapted(model)
    if not layers:
        raise ValueError("the model carries no adapter to save")
    kinds = {(len(m.lora_A), m.lora_alpha, m.lora_dropout) for _, m in layers}
    if len(kinds) > 1:
        raise ValueError(f"the adapter's layers differ in r, alpha or dropout ({sorted(kinds)}); "
                         "copy the files that it came from")
    (r, alpha, dropout), = kinds
    tensors = {}
    for name, layer in layers:
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A.detach().cpu().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B.detach().cpu().contiguous()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
              "r": r, "lora_alpha": alpha, "lora_dropout": dropout, "bias": "none",
              "inference_mode": True,
              "target_modules": sorted({name.split(".")[-1] for name, _ in layers})}
    with writing(Path(directory) / "adapter_model.safetensors") as path:
        save_file(tensors, path, metadata={"format": "pt"})
    with writing(Path(directory) / "adapter_config.json") as path:
        path.write_text(json.dumps(config, indent=1))


def read_adapter_config(path):
    """adapter_config.json -> its dictionary; ValueError for what is not computed here, by name."""
    with reading(path, "only plain LoRA in peft's format is computed here") as path:
        config = json.loads(path.read_bytes())
        for key, value in config.items():
            if value and key not in COMPUTED | HARMLESS:
                raise ValueError(f"{key} is set")
        kind = (config.get("peft_type"), config.get("bias") or "none")
        if kind != ("LORA", "none"):
            raise ValueError(f"{kind[0]} with bias {kind[1]}")
        start = config.get("init_lora_weights")
        if start not in (None, True, False, "gaussian", "orthogonal"):
            raise ValueError(
                f"init_lora_weights {start!r} changes the base, so this adapter is for another; "
                "save it with peft's path_initial_model_for_weight_conversion")
        numbers = [config["lora_alpha"], *(config.get("alpha_pattern") or {}).values()]
        if not all(type(n) in (int, float) and math.isfinite(n) for n in numbers):
            raise ValueError(f"lora_alpha or alpha_pattern is no finite number: {numbers}")
        dropout = config.setdefault("lora_dropout", 0.0)
        if type(dropout) not in (int, float) or not 0 <= dropout < 1:
            raise ValueError(f"lora_dropout {dropout!r} is no number from 0 to below 1")
    return config


def matches(name, modules):
    """Whether peft applies a `target_modules` or `exclude_modules` to the module called `name`."""
    if isinstance(modules, str):
        return re.fullmatch(modules, name) is not None
    return any(f".{name}".endswith(f".{module}") for module in modules or [])


def by_pattern(patterns, name, default):
    """The value of rank_pattern or alpha_pattern for a layer, as peft finds it."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def load_adapter(model, directory):
    """Attach an adapter in peft's format, ours or peft's, to a freshly loaded base, frozen.

    Raises ValueError for a damaged adapter, one that does not fit the model or its own
    adapter_config.json, and for what is not computed here."""
    directory = Path(directory)
    path = directory / "adapter_config.json"
    config = read_adapter_config(path)
    layers = linear_layers(model)
    only = config.get("layers_to_transform")
    only = [only] if isinstance(only, int) else only
    targets = {}
    with reading(path, "is it for another base?"):
        for name in ("lm_head", "model.embed_tokens"):
            if matches(name, config["target_modules"]):
                raise ValueError(f"it adapts {name}, which is not computed here")
        for name in layers:
            chosen = matches(name, config["target_modules"])
            chosen = chosen and not matches(name, config.get("exclude_modules"))
            if chosen and (not only or int(name.split(".")[2]) in only):
                rank = by_pattern(config.get("rank_pattern"), name, config.get("r"))
                alpha = by_pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
                targets[name] = (rank, alpha)
    tensors = read_adapter_tensors(directory)
    expected = {f"{PREFIX}{name}.lora_{which}.weight" for name in targets for which in "AB"}
    lacking = sorted(expected - tensors.keys())
    others = sorted(tensors.keys() - expected)
    if lacking or others or not tensors:
        raise ValueError(f"the adapter in {directory} lacks {len(lacking)} tensors that its "
                         f"target_modules ask for {lacking[:2]} and holds {len(others)} others "
                         f"{others[:2]}; is it for another base?")
    for name, (rank, alpha) in targets.items():
        A, B = (tensors[f"{PREFIX}{name}.lora_{which}.weight"] for which in "AB")
        if config.get("use_rslora"):                          # alpha / sqrt r for alpha / r
            alpha *= math.sqrt(len(A))
        try:
            if len(A) != rank:
                raise ValueError(f"lora_A has rank {len(A)}, adapter_config.json says {rank}")
            attach(layers[name], A, B, alpha, config["lora_dropout"])
        except ValueError as e:
            raise ValueError(f"the adapter in {directory} does not fit at {name}: {e}") from None
    model.requires_grad_(False)


def read_adapter_tensors(directory):
    """-> {name: tensor} of adapter_model.safetensors; ValueError for NaN, with the name."""
    pickled = directory / "adapter_model.bin"
    advice = "save or get the adapter again"
    if pickled.exists():
        advice = (f"{pickled.name} is a pickle, which could run code and is not read: where you "
                  "trust it, PeftModel.from_pretrained(base, adapter).save_pretrained(new) of peft "
                  "writes safetensors")
    with reading(directory / "adapter_model.safetensors", advice) as path:
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if not (tensor.is_floating_point() and tensor.isfinite().all()):
                raise ValueError(f"{name} holds NaN or infinite values, or no floating point ones")
    return tensors
