"""The Llama / Qwen2 decoder by hand, with weights in and out as raw safetensors.

- one decoder for Llama 2/3.x, SmolLM2 (arXiv:2407.21783) and Qwen2/2.5 (arXiv:2407.10671): RMSNorm,
  rotary positions, grouped-query attention, SwiGLU; they differ by configuration only (bias on
  q, k, v; tied lm_head; llama3 scaling of the rotary frequencies)
- attributes carry the names of the Hugging Face checkpoint, so a checkpoint loads and saves
  without renaming
- weights stream, in and out: each tensor goes from the memory-mapped shard to its device, dtype or
  4-bit form on its own, so that an 8B model quantises to NF4 in less than 8 GB; checkpoints that
  bitsandbytes has already quantised load too
- what a config.json asks for is computed or refused by name
- sequences of unequal length are laid end to end (`lengths`) rather than padded; key-value cache;
  sampling

    model = load_pretrained("meta-llama/Llama-3.1-8B", quantize="nf4", device="cuda")  # or a path
    tokenizer = load_tokenizer("meta-llama/Llama-3.1-8B")
    logits = model(ids)                      # (B, T) -> (B, T, vocab)
    nll = token_nll(model, ids, lengths)     # -log p of every token but each sequence's first
    tokens = generate(model, [tokenizer.encode("We study").ids], max_new_tokens=100)

Shapes: B sequences of T tokens, hidden size C, H query heads and G key-value heads of size D,
S keys.
"""
import contextlib
import functools
import json
import math
import os
import platform
import shutil
import sys
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from quant import NF4Linear, dequantize_nf4, from_bitsandbytes, quantize_nf4

# ---------------------------------------------------------------------------------------------
# Files: the one way to read and to write, for all that is a model.
# data_arxiv.py has `reading` and `writing` once more, for all that is data.

UMASK = os.umask(0)
os.umask(UMASK)


@contextlib.contextmanager
def reading(path, advice="get or make it again"):
    """Whatever goes wrong inside, as `path` is read, becomes a ValueError: file, reason, advice."""
    try:
        yield Path(path)
    except BaseException as e:                                # a panic of Rust's is no Exception
        said = isinstance(e, ValueError) and str(e).startswith(str(path))
        if said or isinstance(e, (KeyboardInterrupt, SystemExit, GeneratorExit)):
            raise
        reason = getattr(e, "strerror", None) or str(e).partition("\n")[0] or type(e).__name__
        if isinstance(e, FileNotFoundError):
            reason = "is not there"
        elif isinstance(e, KeyError):
            reason = f"lacks {e}"
        raise ValueError(f"{path}: {reason}; {advice}") from e


@contextlib.contextmanager
def writing(path):
    """A temporary path to write to, which takes the place of `path` once it is whole and on disk.

    A reader, or a kill, meets the old file or the new one; no two processes, of one machine or of
    several, share a temporary one. What is no regular file, such as /dev/null, is written to
    directly. Raises OSError, with the file's name, for a full disk."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}.tmp")
    try:
        if path.exists() and not path.is_file():
            yield path
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~UMASK)                   # safetensors writes 0600
        os.replace(temporary, path)
    except Exception as e:
        if not isinstance(e, (OSError, RuntimeError)) and type(e).__name__ != "SafetensorError":
            raise
        reason = getattr(e, "strerror", None) or str(e).partition("\n")[0]
        raise OSError(f"{path} could not be written ({reason}); what was there is as it was, so "
                      "free some space or choose another place, and run this again") from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def new_directory(path):
    """A temporary directory to fill, which becomes `path` once it is whole, or leaves no trace.

    Raises ValueError if `path` exists; an OSError from inside names `path`, not what is gone."""
    path = Path(path)
    if path.exists():
        raise ValueError(f"{path} exists already; remove it or choose another name")
    temporary = path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(path)
    except OSError as e:
        raise OSError(str(e).replace(str(temporary), str(path))) from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def printable(text):
    """The text without control characters, which a terminal would obey; line breaks stay."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in str(text))


@functools.cache
def note(message):
    """Print it to stderr, once in a process, as one line."""
    print(f"note: {' '.join(printable(message).split())}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------
# Configuration


@dataclass
class Config:
    """Fields as in the checkpoint's config.json.

    vocab_size 0: a decoder without embeddings, fed with `embeds`."""
    model_type: str = "llama"              # llama or qwen2
    vocab_size: int = 0
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None       # None, or the llama3 rule with the keys of LLAMA3_ROPE
    max_position_embeddings: int = 131072
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None
    attention_dropout: float = 0.0


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SHAPES = {  # the published shapes, for --dry-run and random weights: no download needed
    "llama-3.1-8b": Config("llama", 128256, 4096, 14336, 32, 32, 8, 128, 1e-5, 500000.0,
                           LLAMA3_ROPE, 131072, False, 128000, 128001),
    "qwen2.5-0.5b": Config("qwen2", 151936, 896, 4864, 24, 14, 2, 64, 1e-6, 1000000.0,
                           None, 32768, True, 151643, 151645),
    "smollm2-135m": Config("llama", 49152, 576, 1536, 30, 9, 3, 64, 1e-5, 100000.0,
                           None, 8192, True, 1, 2),
}

# Fields of a config.json besides those of Config. Set, the first change what is computed, in ways
# that are not written here; the second do so if they are not 1; the third change nothing.
REFUSED = {
    "num_experts": "mixture of experts",
    "num_local_experts": "mixture of experts",
    "n_routed_experts": "mixture of experts",
    "use_sliding_window": "sliding-window attention",
    "attention_bias": "biases on all of attention",
    "mlp_bias": "biases in the MLP",
    "attn_logit_softcapping": "capped attention scores",
    "final_logit_softcapping": "capped logits",
    "qk_norm": "normalised queries and keys",
    "use_qk_norm": "normalised queries and keys",
    "clip_qkv": "clipped queries, keys and values",
    "alibi": "positions by bias",
    "no_rope_layers": "layers without positions",
    "rope_interleaved": "interleaved rotary positions",
    "pruned_heads": "pruned heads",
    "original_max_position_embeddings": "a context length outside rope_parameters",
    "transformers_weights": "weights in a file of another name",
}
FACTORS = ("partial_rotary_factor", "attention_multiplier", "embedding_multiplier", "logit_scale",
           "logits_scaling", "residual_multiplier", "scale_emb", "scale_depth")
HARMLESS = (
    "_name_or_path", "architectures", "chunk_size_feed_forward", "dtype", "hidden_act",
    "id2label", "initializer_range", "is_causal", "is_llama_config", "label2id", "layer_types",
    "max_window_layers", "pad_token_id", "pretraining_tp", "quantization_config", "return_dict",
    "rope_parameters", "sliding_window", "tokenizer_class", "torch_dtype",
    "transformers_version", "transformers.js_config", "unk_token_id", "unsloth_fixed",
    "unsloth_version", "use_cache")


def read_config(raw, where="config.json"):
    """The dictionary of a config.json, of old or of transformers-5 style -> Config.

    Raises ValueError, naming the field, for a value that is none and for anything that this
    decoder does not compute; a note names fields that it does not know."""
    if not isinstance(raw, dict):
        raise ValueError(f"{where}: not the config.json of a language model: no JSON object")
    kind = raw.get("model_type")
    refused = [f"{key} {raw[key]!r} ({what})" for key, what in REFUSED.items() if raw.get(key)]
    refused += [f"{key} {raw[key]!r}" for key in FACTORS if raw.get(key) not in (None, 1)]
    if kind not in ("llama", "qwen2"):
        refused = [f"model_type {kind!r}"]
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        refused.append(f"hidden_act {raw['hidden_act']!r}")
    if kind == "llama" and raw.get("sliding_window"):            # Qwen2 has a switch for it
        refused.append(f"sliding_window {raw['sliding_window']!r}")
    if any(layer != "full_attention" for layer in raw.get("layer_types") or []):
        refused.append("sliding-window or other attention in layer_types")
    if raw.get("is_causal", True) is not True:
        refused.append("attention that is not causal (is_causal)")
    quantization = raw.get("quantization_config") or {}
    method = [quantization.get(key) for key in ("quant_method", "bnb_4bit_quant_type")]
    if quantization.get("load_in_8bit"):
        method[1] = "8 bit"
    if quantization and method != ["bitsandbytes", "nf4"]:
        refused.append(f"weights quantised with {method[0]} ({method[1] or 'not NF4'})")
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}      # transformers' order
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type not in ("default", "llama3"):
        refused.append(f"rope type {rope_type!r}")
    unknown = rope.keys() - LLAMA3_ROPE.keys() - {"type", "rope_theta"}
    refused += [f"{key} {rope[key]!r}" for key in unknown if rope[key] not in (None, 1)]
    if refused:
        raise ValueError(f"{where}: {', '.join(refused)}; model.py computes Llama and Qwen2 "
                         "decoders only")
    config = checked_config(raw, rope, rope_type == "llama3", where)
    known = {*Config.__dataclass_fields__, *REFUSED, *FACTORS, *HARMLESS} - {"attention_dropout"}
    unknown = sorted(key for key in raw if raw[key] and key not in known)
    if unknown:
        note(f"{where}: not known here and left out of the computation: {', '.join(unknown)}")
    return config


def checked_config(raw, rope, llama3, where):
    """The numbers of a config.json -> Config; ValueError for one of a wrong kind or size."""
    def number(key, default=None, fields=raw, kind=int, low=1, high=10 ** 6):
        value = default if fields.get(key) is None else fields[key]
        if type(value) not in (int, kind) or not low <= value <= high:
            said = "is missing" if value is None else f"is {value!r}"
            what = "a whole number" if kind is int else "a number"
            raise ValueError(f"{where}: {key} {said}; it must be {what} from {low} to {high:,}")
        return value

    vocab, heads = number("vocab_size"), number("num_attention_heads")
    hidden = number("hidden_size")
    groups = number("num_key_value_heads", heads)
    size = number("head_dim", hidden // heads)
    if heads % groups or size % 2 or (hidden % heads and not raw.get("head_dim")):
        raise ValueError(f"{where}: num_attention_heads {heads} is no multiple of "
                         f"num_key_value_heads {groups}, does not divide hidden_size {hidden}, or "
                         f"head_dim {size} is odd")
    tied = raw.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise ValueError(f"{where}: tie_word_embeddings is {tied!r}; it must be true or false")
    ends = raw.get("eos_token_id")
    for token in [raw.get("bos_token_id"), *(ends if isinstance(ends, list) else [ends])]:
        number("token id", 0, {"token id": token}, low=0, high=vocab - 1)
    theta = number("rope_theta", 1e4, {**raw, **rope}, float, high=1e15)
    scaling = None
    if llama3:
        scaling = {key: number(key, None, rope, float, 1e-6, 1e9) for key in LLAMA3_ROPE
                   if key != "rope_type"} | {"rope_type": "llama3"}
        if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
            raise ValueError(f"{where}: low_freq_factor must be below high_freq_factor")
    return Config(
        raw["model_type"], vocab, hidden, number("intermediate_size"),
        number("num_hidden_layers", high=1000), heads, groups, size,
        number("rms_norm_eps", 1e-6, kind=float, low=1e-15, high=1), float(theta), scaling,
        number("max_position_embeddings", 2048, high=10 ** 9), tied, raw.get("bos_token_id"), ends)


def config_json(config):
    """Config -> the dictionary of a config.json for transformers, vLLM, llama.cpp's converter."""
    raw = {key: value for key, value in vars(config).items() if value is not None}
    name = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[config.model_type]
    return raw | {"architectures": [name], "hidden_act": "silu"}


# ---------------------------------------------------------------------------------------------
# Network


def to_device(tensor, device):
    """A tensor made on the CPU, on its device, where the copy keeps its place among the work that
    is under way: the program does not wait for it."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2 + eps) * weight (arXiv:1910.07467), the mean in float32."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        wide = torch.promote_types(x.dtype, torch.float32)
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).square()
        normed = (x * torch.rsqrt(square / x.shape[-1] + self.eps)).to(x.dtype)
        return (self.weight * normed).to(x.dtype)


def rope_frequencies(config, device=None):
    """Angular frequency of each pair of head dimensions (arXiv:2104.09864).

    (D/2,) float32, radians per token. The llama3 rule stretches the context (arXiv:2407.21783,
    section 3.4.1): wavelengths longer than original/low are slowed by `factor`, those shorter
    than original/high are kept, and in between the two are blended."""
    exponent = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    freq = 1.0 / config.rope_theta ** exponent
    if config.rope_scaling:
        rule = config.rope_scaling
        low = rule["low_freq_factor"]
        high = rule["high_freq_factor"]
        wavelength = 2 * math.pi / freq
        turns = rule["original_max_position_embeddings"] / wavelength
        blend = ((turns - low) / (high - low)).clamp(0, 1)
        freq = (1 - blend) * freq / rule["factor"] + blend * freq
    return freq


def rotate(x, cos, sin):
    """Rotates the pairs (x_i, x_{i + D/2}). x (B, heads, T, D); cos, sin (B or 1, 1, T, D)."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def spare(n, x, unit=64):
    """How many to add to n tokens so that their numbers are few: on a CPU, each new shape of a
    16-bit product is compiled, and kept (of thousands, gigabytes)."""
    return -n % unit if x.device.type == "cpu" and x.dtype.itemsize == 2 else 0


def attend(q, k, v, mask=None, causal=False, dropout=0.0):
    """softmax(q k^T / sqrt D) v -> (B, H, T, D).

    q (B, H, T, D), k and v (B, G, S, D), mask (B, 1, T, S) True where a query may look. On a CPU
    short sequences are multiplied out: the fused kernel, there to save memory, takes 2.5 times as
    long forward and backward."""
    B, H, T, D = q.shape
    G, S = k.shape[1:3]
    if q.device.type != "cpu" or T * S > 512 * 512:
        return attend_fused(q, k, v, mask, causal, dropout)
    R = H // G                              # query heads that share a key head: one product for all
    q = (q * D ** -0.5).reshape(B * G, R * T, D)
    k = k.reshape(B * G, S, D)
    v = v.reshape(B * G, S, D)
    if causal:
        mask = torch.ones(1, 1, T, S, dtype=torch.bool).tril()
    if mask is None:
        scores = torch.bmm(q, k.mT)                           # (B*G, R*T, S)
    elif T == 1:             # generation: K q^T, because bmm would copy a cache to transpose it
        scores = torch.bmm(k, q.mT).mT.reshape(B, G, R, S)
        scores = scores.masked_fill_(~mask, -torch.inf).view(B * G, R, S)
    else:
        bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, -torch.inf)
        if len(mask) > 1:                                     # (B or 1, 1, T, S)
            bias = bias.expand(B, G, T, S)
        scores = torch.baddbmm(bias.repeat(1, 1, R, 1).flatten(0, 1), q, k.mT)
    return torch.bmm(F.dropout(scores.softmax(-1), dropout), v).view(B, H, T, D)


def attend_fused(q, k, v, mask, causal, dropout):
    """`attend` by a fused kernel, asked for in the one of two ways in which CUDA has it.

    Its only one for query heads that share a key head is flash, in 16 bit and without a mask; else
    it falls back to its slowest, which writes out all scores and repeated keys. So the R query
    heads that share a key head become R T queries of one head, where is_causal does not forbid."""
    B, H, T, D = q.shape
    G = k.shape[1]
    R = H // G
    if causal:
        if q.dtype.itemsize > 2 and q.device.type != "cpu":
            k = k.repeat_interleave(R, dim=1)
            v = v.repeat_interleave(R, dim=1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout,
                                              enable_gqa=k.shape[1] < H)
    if mask is not None and T > 1:
        mask = mask.repeat(1, 1, R, 1)                        # (B or 1, 1, R*T, S)
    q = q.reshape(B, G, R * T, D)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return y.reshape(B, H, T, D)


class Attention(nn.Module):
    def __init__(self, config, linear):
        super().__init__()
        self.config = config
        C = config.hidden_size
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        bias = config.model_type == "qwen2"
        self.q_proj = linear(C, queries, bias=bias)
        self.k_proj = linear(C, keys, bias=bias)
        self.v_proj = linear(C, keys, bias=bias)
        self.o_proj = linear(queries, C, bias=False)

    def project(self, x, rope, last_only):
        """-> q (B, H, n, D) of the n positions that ask; k, v (B, G, T, D) of all, which answer."""
        start = -1 if last_only else 0
        heads = (-1, self.config.head_dim)
        projected = self.q_proj(x[:, start:]), self.k_proj(x), self.v_proj(x)
        q, k, v = [part.unflatten(-1, heads).transpose(1, 2) for part in projected]
        q = rotate(q, *(f[:, :, start:] for f in rope))
        return q, rotate(k, *rope), v

    def forward(self, q, k, v, lengths, cache, layer, causal, last_only=False):
        n = q.shape[2]
        drop = self.config.attention_dropout if self.training else 0.0
        if lengths is None and cache is None:    # the last position sees all, causal or not
            y = attend(q, k, v, causal=causal and not last_only, dropout=drop)
        elif lengths is None:
            k, v, mask = cache.update(layer, k, v)            # (B, G, S, D), (B, 1, T, S)
            y = attend(q, k, v, mask[:, :, -n:], dropout=drop)
        else:                       # each sequence attends to itself alone: no mask, no padding
            if cache is not None:
                cache.fill(layer, k, v, lengths)
            parts = []
            for length, *qkv in zip(lengths, *(t.split(lengths, dim=2) for t in (q, k, v))):
                more = spare(length, q, 32) if causal else 0
                if more:                                      # behind, where nothing sees them
                    qkv = [F.pad(t, (0, 0, 0, more)) for t in qkv]
                parts.append(attend(*qkv, causal=causal, dropout=drop)[:, :, :length])
            y = torch.cat(parts, dim=2)
        return y.transpose(1, 2).flatten(2)                              # -> (B, n, H*D)


class MLP(nn.Module):
    """SwiGLU (arXiv:2002.05202)."""

    def __init__(self, config, linear):
        super().__init__()
        self.gate_proj = linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config, linear):
        super().__init__()
        self.self_attn = Attention(config, linear)
        self.mlp = MLP(config, linear)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def before(self, x, rope, last_only):
        """All up to attention: x (B, T, C) -> q, k, v."""
        return self.self_attn.project(self.input_layernorm(x), rope, last_only)

    def after(self, x, y):
        """All that follows it: x (B, n, C), y (B, n, H*D) -> (B, n, C)."""
        x = self.self_attn.o_proj(y) + x
        return x + self.mlp(self.post_attention_layernorm(x))

    def forward(self, x, rope, lengths, cache, layer, causal, last_only=False):
        qkv = self.before(x, rope, last_only)
        y = self.self_attn(*qkv, lengths, cache, layer, causal, last_only)
        return self.after(x[:, -1:] if last_only else x, y)


class Decoder(nn.Module):
    """The transformer without its language-model head.

    `linear` builds the seven projections (nn.Linear or NF4Linear). Set `checkpoint_activations`
    to keep only each block's input for the backward pass and compute the block again there
    (arXiv:1604.06174): the same result, dropout included, in a fraction of the memory and 4/3 of
    the time."""
    checkpoint_activations = False

    def __init__(self, config, linear=nn.Linear):
        super().__init__()
        self.config = config
        if config.vocab_size:
            weight = torch.empty(config.vocab_size, config.hidden_size)
            if not weight.is_meta:          # there a normal draw would import half of torch's
                weight.normal_()            # compiler, two seconds
            self.embed_tokens = nn.Embedding(*weight.shape, _weight=weight)
        self.layers = nn.ModuleList(Block(config, linear) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, ids=None, *, embeds=None, lengths=None, cache=None, causal=True,
                last_only=False):
        """-> hidden states after the final norm, (B, T, C).

        ids (B, T) int64, or embeds (B, T, C) in their place. Padding on the right of a batch needs
        no mask: under causal attention nothing sees it.
        lengths: with B = 1, T is a row of sequences of these lengths (summing to T) laid end to
        end; none sees another, and positions restart at each.
        cache: a KVCache, which grows by T; positions go on after what it holds, and attention is
        causal. With `lengths` it must be empty, and sequence i fills its row i.
        causal=False: every token sees its whole sequence.
        last_only: (B, 1, C), of the last position alone; the last block then computes nothing but
        keys and values for the others.
        Raises ValueError if lengths do not sum to T or are combined with a cache that is not
        empty, with B > 1 or with last_only."""
        x = self.embed_tokens(ids) if embeds is None else embeds
        B, T, _ = x.shape
        if lengths is None:
            positions = torch.arange(T, device=x.device)
            if cache is not None:
                positions = positions + cache.lengths[:, None]
        else:
            lengths = [int(n) for n in lengths]
            in_use = cache is not None and (cache.used > 0 or len(lengths) != len(cache.lengths))
            if B != 1 or sum(lengths) != T or in_use or last_only:
                raise ValueError("lengths need one row, without last_only or a cache that is in "
                                 "use or has another number of rows, and must sum to its "
                                 f"{T} tokens; got {B} rows and the sum {sum(lengths)}")
            more = spare(T, x)
            if more:                                          # a sequence of zeros, cut off below
                x = F.pad(x, (0, 0, 0, more))
                lengths.append(more)
            positions = to_device(torch.cat([torch.arange(n) for n in lengths]), x.device)
        frequencies = rope_frequencies(self.config, x.device)
        angle = positions.reshape(-1, 1, x.shape[1], 1) * frequencies     # (B or 1, 1, T, D/2)
        angle = torch.cat((angle, angle), dim=-1)
        rope = [f(angle).to(x.dtype) for f in (torch.cos, torch.sin)]
        recompute = self.checkpoint_activations and torch.is_grad_enabled()
        for i, layer in enumerate(self.layers):
            is_last = i == len(self.layers) - 1
            context = rope, lengths, cache, i, causal, last_only and is_last
            if recompute:
                x = checkpoint(layer, x, *context, use_reentrant=False)
            else:
                x = layer(x, *context)
        if cache is not None:
            cache.grow(T if lengths is None else lengths[:len(cache.lengths)])
        return self.norm(x)[:, :T]


class CausalLM(nn.Module):
    def __init__(self, config, linear=nn.Linear):
        super().__init__()
        self.config = config
        self.model = Decoder(config, linear)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids, **context):
        """-> logits (B, T, vocab). Keyword arguments as in Decoder.forward."""
        return self.lm_head(self.model(ids, **context))


def init_weights(model, std=0.02):
    """Fresh weights: matrices N(0, std^2), biases 0, norms 1, from torch's global generator."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, 0.0, std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)


# ---------------------------------------------------------------------------------------------
# Loss


class ChunkedNLL(torch.autograd.Function):
    """-log softmax(x W^T)[target], row by row, without ever holding the logits of all rows.

    d nll_i / d x_i = (softmax_i - onehot_i) W needs nothing from the loss above but one factor a
    row, so the forward pass computes it from the same logits and keeps (N, C) instead of
    (N, vocab). Plain twin: F.cross_entropy(x W^T, targets)."""
    ROWS = 256

    @staticmethod
    def forward(ctx, x, weight, targets):
        nll = torch.empty(len(x), device=x.device)
        grad = torch.empty_like(x) if x.requires_grad else None
        # The same memory for each chunk: on a CPU fresh pages cost more than the arithmetic.
        logits = x.new_empty(ChunkedNLL.ROWS, len(weight))
        logp = torch.empty_like(logits, dtype=torch.float32)
        for i in range(0, len(x), ChunkedNLL.ROWS):
            rows = slice(i, i + ChunkedNLL.ROWS)
            target = targets[rows, None]
            n = len(target)
            torch.mm(x[rows], weight.T, out=logits[:n])                   # (n, C) -> (n, vocab)
            torch.log_softmax(logits[:n], -1, dtype=torch.float32, out=logp[:n])
            nll[rows] = -logp[:n].gather(1, target).squeeze(1)
            if grad is not None:
                onehot = torch.full_like(target, -1.0, dtype=torch.float32)
                p = logp[:n].exp_().scatter_add_(1, target, onehot)
                torch.mm(logits[:n].copy_(p), weight, out=grad[rows])     # (n, vocab) -> (n, C)
        ctx.save_for_backward(grad)
        return nll

    @staticmethod
    def backward(ctx, upstream):
        grad, = ctx.saved_tensors
        return (grad * upstream[:, None]).to(grad.dtype), None, None


def token_nll(model, ids, lengths):
    """Negative log-likelihood, in nats, of every token but the first of each sequence.

    ids (T,) int64: sequences laid end to end; lengths: their lengths.
    -> (T - number of sequences,) float32, in order. The gradient reaches the hidden states; where
    lm_head itself is trained the plain computation is used."""
    lengths = [int(n) for n in lengths]
    hidden = model.model(ids[None], lengths=lengths)[0]                   # (T, C)
    first = torch.zeros(len(ids) + 1, dtype=torch.bool)
    first[torch.tensor([0] + lengths).cumsum(0)] = True
    at = (~first[1:]).nonzero()[:, 0]             # a sequence's last token predicts nothing
    N = len(at)
    at = to_device(F.pad(at, (0, spare(N, hidden))), ids.device)
    hidden = hidden.index_select(0, at)
    targets = ids.index_select(0, at + 1)
    if model.lm_head.weight.requires_grad:
        return F.cross_entropy(model.lm_head(hidden).float(), targets, reduction="none")[:N]
    return ChunkedNLL.apply(hidden, model.lm_head.weight, targets)[:N]


# ---------------------------------------------------------------------------------------------
# Generation


class KVCache:
    """Keys and values of what was seen so far, filled from the left.

    `size` slots for each of `batch` rows. Rows may have unequal `lengths` (batch,), and at most
    `used`, a number known without asking the device; what lies behind a row's end is masked."""

    def __init__(self, config, batch, size, dtype, device):
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, size, config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.used = 0

    def fill(self, layer, k, v, lengths):
        """Store k, v (1, G, T, D) of sequences laid end to end, each in its own row of the empty
        cache."""
        for cache, new in ((self.k, k), (self.v, v)):
            for row, part in zip(cache[layer], new[0].split(lengths, dim=1)):
                row[:, :part.shape[1]] = part

    def update(self, layer, k, v):
        """Store k, v (B, G, T, D) behind what is there.

        -> all keys, all values (B, G, S, D), mask (B, 1, T, S) of what each may see."""
        T = k.shape[2]
        S = self.used + T
        size = self.k.shape[3]
        if size < S:
            raise ValueError(f"the key-value cache has {size} slots and would need {S}; make it "
                             "larger")
        S = min(S + spare(S, k), size)
        if layer == 0:                                        # the same for all layers
            self.slots = self.lengths[:, None] + torch.arange(T, device=k.device)     # (B, T)
            self.mask = torch.arange(S, device=k.device) <= self.slots[:, None, :, None]
        rows = torch.arange(len(k), device=k.device)[:, None]
        self.k[layer][rows, :, self.slots] = k.transpose(1, 2)
        self.v[layer][rows, :, self.slots] = v.transpose(1, 2)
        return self.k[layer, :, :, :S], self.v[layer, :, :, :S], self.mask

    def grow(self, T):
        """T: how many tokens came to each row, a number or a list."""
        if isinstance(T, list):
            self.used += max(T)
            T = to_device(torch.tensor(T), self.lengths.device)
        else:
            self.used += T
        self.lengths = self.lengths + T

    def keep(self, rows):
        """Shrink to these rows, in ascending or any other order."""
        moved = [i for i, row in enumerate(rows) if row != i]
        for cache in (self.k, self.v):
            cache[:, moved] = cache[:, [rows[i] for i in moved]]
        self.k = self.k[:, :len(rows)]
        self.v = self.v[:, :len(rows)]
        self.lengths = self.lengths[rows]


def sample_token(logits, uniform, temperature, top_k):
    """logits (B, vocab), uniform (B, 1) in [0, 1) -> the next token of each row, (B,).

    temperature 0: the most likely; else the top_k most likely with softmax(logits / temperature):
    the pick is where their cumulative probability passes the uniform draw."""
    if temperature == 0:
        return logits.argmax(-1)
    top, index = logits.topk(min(top_k, logits.shape[-1]))
    cumulative = F.softmax(top.float() / temperature, dim=-1).cumsum(-1)  # (B, top_k)
    pick = (cumulative < uniform * cumulative[:, -1:]).sum(-1, keepdim=True)
    return index.gather(1, pick).squeeze(1)


@torch.inference_mode()
def generate(model, prompts, max_new_tokens=256, temperature=0.7, top_k=50, eos=None, seed=42):
    """Continue `prompts`, lists of token ids -> a list of lists with the new ids only, `eos` left
    off.

    eos: an id or a list of ids that end a sequence. seed: an int, from which each row derives its
    own, or one for each prompt. A row draws from its own seed, on the CPU: neither the other rows
    nor the device change its draws (rounding of the logits may)."""
    if not all(prompts):
        raise ValueError("a prompt without any token cannot be continued; start it with the BOS "
                         "token at least")
    device = model.lm_head.weight.device
    ends = {eos} if isinstance(eos, int) else set(eos or [])
    lengths = [len(prompt) for prompt in prompts]
    cache = KVCache(model.config, len(prompts), max(lengths) + max_new_tokens,
                    model.lm_head.weight.dtype, device)
    ids = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    hidden = model.model(ids[None], lengths=lengths, cache=cache)[0]      # (T, C): end to end
    hidden = hidden[torch.tensor(lengths, device=device).cumsum(0) - 1]   # (B, C): last tokens
    seeds = seed
    if isinstance(seed, int):
        seeds = [seed * 1_000_003 + row for row in range(len(prompts))]
    uniform = torch.stack([
        torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(s)) for s in seeds])
    uniform = uniform.to(device)                              # (B, max_new_tokens)
    new = [[] for _ in prompts]
    running = list(range(len(prompts)))              # the prompt that each row continues
    for step in range(max_new_tokens):
        logits = model.lm_head(hidden)                                    # (B, vocab)
        token = sample_token(logits, uniform[:, step, None], temperature, top_k)
        going = []
        for row, t in enumerate(token.tolist()):     # the only wait in a step in which none ends
            if t not in ends:
                new[running[row]].append(t)
                going.append(row)
        if not going or step == max_new_tokens - 1:
            break
        if len(going) < len(running):                # finished sequences leave the batch
            cache.keep(going)
            running = [running[row] for row in going]
            uniform = uniform[going]
            token = token[going]
        hidden = model.model(token[:, None], cache=cache)[:, 0]
    return new


# ---------------------------------------------------------------------------------------------
# Checkpoints: hub, in, out

TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                   "chat_template.jinja", "generation_config.json"]
MODEL_FILES = ["config.json", "adapter_config.json", *TOKENIZER_FILES, "*.safetensors",
               "*.safetensors.index.json"]
AGAIN = "get the checkpoint again (only safetensors are read)"


def fetch(source, wanted=MODEL_FILES):
    """A directory, or a hub id such as "meta-llama/Llama-3.1-8B" -> a local directory.

    The wanted files (patterns; below the top level only where one has a slash) are downloaded once
    per node, with progress: its first process does so, then the others find them there. Raises
    ValueError in the hub's own words, which say what to do."""
    if os.path.isdir(source):
        return Path(source)
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise ValueError(f"{source} is neither a directory nor a hub id (ORGANISATION/NAME)")
    from huggingface_hub import snapshot_download
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if distributed and not first:
        torch.distributed.barrier()
    try:
        below = any("/" in name for name in wanted)           # else at the top level only
        return Path(snapshot_download(source, allow_patterns=wanted,
                                      ignore_patterns=None if below else ["*/*"]))
    except Exception as e:              # the hub's, the network's and the system's share no type
        raise ValueError(f"{source} cannot be had from the hub: {' '.join(str(e).split())}") from e
    finally:
        if distributed and first:
            torch.distributed.barrier()


def load_config(source):
    """A name from SHAPES, a directory with a config.json, or a hub id -> Config."""
    if source in SHAPES:
        return SHAPES[source]
    with reading(fetch(source) / "config.json", f"{source} must be a model's directory") as path:
        return read_config(json.loads(path.read_bytes()), path)


def load_tokenizer(source, control_tokens=False):
    """-> tokenizers.Tokenizer of a model directory or hub id, without truncation or padding.

    Text that reads like a control token, such as <|im_end|>, is encoded as text, unless
    `control_tokens`: for prompts that are written with them.
    Raises ValueError for a tokenizer with more tokens than the model beside it has."""
    from tokenizers import Tokenizer
    directory = fetch(source)
    with reading(directory / "tokenizer.json", "get it again, or update `tokenizers`") as path:
        path.stat()                                           # a missing file is said as such
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.encode("a")                                 # some damage shows only here
    tokenizer.no_truncation()                                 # transformers writes its last call's
    tokenizer.no_padding()                                    # into the file
    tokenizer.encode_special_tokens = not control_tokens
    if getattr(tokenizer.model, "dropout", None):             # BPE's: other tokens at every call
        tokenizer.model.dropout = None
    with reading(directory / "tokenizer_config.json") as words:
        said = json.loads(words.read_bytes()) if words.exists() else {}
        said = said.get("added_tokens_decoder") or {}
        control = {int(i) for i, token in said.items() if token.get("special")}
    if (directory / "config.json").exists():
        config = load_config(source)
        most = max(tokenizer.get_vocab().values(), default=0)
        if most >= config.vocab_size:
            raise ValueError(f"{path}: token id {most} is beyond the model's vocab_size "
                             f"{config.vocab_size}: it is of another model; copy the model's own "
                             "there")
        ends = config.eos_token_id
        control |= {config.bos_token_id, *(ends if isinstance(ends, list) else [ends])}
    for i, token in tokenizer.get_added_tokens_decoder().items():
        if i in control and not token.special:
            token.special = True                              # whatever tokenizer.json says of it
            tokenizer.add_special_tokens([token])
    return tokenizer


def bos_eos(config, tokenizer):
    """-> ids of the beginning-of-sequence and end-of-sequence tokens.

    A model without BOS uses its end-of-text token for it."""
    ends = config.eos_token_id
    eos = ends[0] if isinstance(ends, list) and ends else ends
    bos = config.bos_token_id
    if bos is None:
        bos = tokenizer.token_to_id("<|endoftext|>")
    if eos is None or eos == []:
        raise ValueError("config.json names no eos_token_id; add it")
    return eos if bos is None else bos, eos


def tensor_files(directory):
    """-> {tensor name: open safetensors file} of a single-file or sharded checkpoint.

    A single file goes before an index, as in transformers. Raises ValueError for missing or
    damaged files, for index entries outside the directory, for a name in two shards and for an
    adapter beside them, which transformers would add."""
    if (directory / "adapter_config.json").exists():
        raise ValueError(f"{directory} holds a model and an adapter (adapter_config.json): move "
                         "one of them into a directory of its own")
    names = ["model.safetensors"]
    index = directory / "model.safetensors.index.json"
    if index.exists() and not (directory / names[0]).exists():
        with reading(index, AGAIN):
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            outside = [name for name in names if os.path.basename(name) != name]
            if outside:
                raise ValueError(f"{outside[0]!r} points outside the directory")
    files = {}
    for name in names:
        with reading(directory / name, AGAIN) as path:
            shard = safe_open(path, framework="pt")
            twice = sorted(files.keys() & shard.keys())
            if twice:
                raise ValueError(f"{twice[0]} is in another file, too")
            files |= dict.fromkeys(shard.keys(), shard)
    return files


def no_links_out(directory):
    """ValueError if a file of the directory is a link to somewhere else.

    What is exported from it would be the target's content. The hub's cache keeps the files of
    models--NAME/snapshots/COMMIT in models--NAME/blobs: those links are its own."""
    home = directory.resolve()
    for file in directory.iterdir():
        target = file.resolve()
        inside = target.is_relative_to(home) or target.is_relative_to(home.parent.parent / "blobs")
        if not inside:
            raise ValueError(f"{file} is a link that leaves its directory (to {target}) and is "
                             "not exported; put a copy in its place if you trust it")


def load_pretrained(source, *, quantize=None, dtype=torch.bfloat16, device="cpu",
                    random_init=False, blocks=None, attention_dropout=0.0):
    """A directory, hub id or name from SHAPES -> CausalLM in eval mode, all frozen.

    quantize "nf4": the seven projections of each block in 4 bits. A checkpoint that bitsandbytes
    has quantised stays as it is whatever is asked: what it holds in 16 bit was kept on purpose.
    dtype: of all other tensors. device "meta": names and shapes are checked, nothing is read.
    random_init: fresh weights (torch's global generator) instead of the checkpoint's.
    blocks: the first so many of the pretrained blocks, or any number of random ones.
    Raises ValueError with the names of missing, surplus, mis-shaped or not finite tensors."""
    if source in SHAPES and not random_init:
        raise ValueError(f"{source} is a shape without weights: give a model directory or hub id "
                         "(or ask for random weights)")
    config = load_config(source)
    depth = config.num_hidden_layers
    if blocks and not random_init and blocks > depth:
        raise ValueError(f"{blocks} blocks asked for, but {source} has {depth}")
    files = {} if random_init else tensor_files(fetch(source))
    packed = {name.removesuffix(".weight.absmax") for name in files
              if name.endswith(".weight.absmax")}
    tied = config.tie_word_embeddings
    ends = ("lm_head.weight", "model.embed_tokens.weight")
    if tied and files.keys() >= {*ends}:            # a head of its own counts, as in transformers
        tied = torch.equal(*(files[name].get_tensor(name) for name in ends))
    config = replace(config, num_hidden_layers=blocks or depth, tie_word_embeddings=tied,
                     attention_dropout=attention_dropout)
    with torch.device("meta"):
        model = CausalLM(config, linear_factory(None if packed else quantize, dtype))
    for name, module in list(model.model.layers.named_modules(prefix="model.layers")):
        if name in packed and isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            layer = NF4Linear(module.in_features, module.out_features, module.bias is not None,
                              dtype, "meta")
            setattr(model.get_submodule(parent), child, layer)
    if not random_init:
        dropped = range(config.num_hidden_layers, depth)
        check_names(model, files, packed, source, dropped)
    if device == "meta":
        return model.to(dtype).requires_grad_(False).eval()
    modules = list(model.named_modules())
    for name, module in tqdm(modules, f"loading {source}", unit="module", delay=2, leave=False):
        try:
            load_module(module, name, files, packed, dtype, device)
        except ValueError as e:
            raise ValueError(f"{source}: {e}") from e
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.requires_grad_(False).eval()


def linear_factory(quantize, dtype=torch.bfloat16):
    """The class of the seven projections: quantize None -> nn.Linear, "nf4" -> NF4Linear."""
    if quantize not in (None, "nf4"):
        raise ValueError(f"quantize must be nf4 or nothing, not {quantize!r}")
    return functools.partial(NF4Linear, dtype=dtype) if quantize else nn.Linear


def check_names(model, files, packed, source, dropped=()):
    """ValueError listing every tensor that is missing, surplus or not of the expected shape.

    packed: names of 4-bit layers; dropped: numbers of the blocks that are left out."""
    shapes = {name: list(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    for name, module in model.named_modules():
        if isinstance(module, NF4Linear):
            shapes[f"{name}.weight"] = [module.out_features, module.in_features]
    ignored = tuple(f"model.layers.{i}." for i in dropped)
    if model.config.tie_word_embeddings:
        del shapes["lm_head.weight"]
        ignored += ("lm_head.weight",)
    found = {name for name in files if not name.startswith(ignored)
             and not name.endswith("rotary_emb.inv_freq")
             and name.partition(".weight.")[0] not in packed}
    problems = [f"{name} is missing" for name in shapes if name not in files]
    problems += [f"{name} is not part of this architecture" for name in sorted(found - {*shapes})]
    for name in found & shapes.keys():
        shape = files[name].get_slice(name).get_shape()
        if shape != shapes[name] and name.removesuffix(".weight") not in packed:
            problems.append(f"{name} is {shape} instead of {shapes[name]}")
    if problems:
        more = f" and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(f"{source} does not fit its config.json: {'; '.join(problems[:20])}{more}")


def read_tensor(files, name, device="cpu", dtype=None):
    """One tensor of a checkpoint, on its device, in `dtype` (default: its own).

    Raises ValueError, with its name, for NaN or infinity: the extremes are them, too."""
    tensor = files[name].get_tensor(name).to(device, dtype)
    if tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
        raise ValueError(f"{name} holds NaN or infinite values (as {tensor.dtype}); the "
                         "checkpoint is damaged, get it again")
    return tensor


def read_packed(files, name, device):
    """One weight that bitsandbytes has quantised -> NF4Weight on `device`."""
    parts = [key for key in files if key == name or key.startswith(f"{name}.")]
    tensors = {key.removeprefix(name).lstrip("."): files[key].get_tensor(key) for key in parts}
    return from_bitsandbytes(tensors, name).to(device)


def load_module(module, name, files, packed, dtype, device):
    """Give one module of the meta-device model its own tensors, one at a time: loaded (or drawn,
    where there are no `files`), moved, converted."""
    weight = f"{name}.weight"
    if isinstance(module, NF4Linear):
        if name in packed:
            module.set(read_packed(files, weight, device))
        elif files:
            module.set(quantize_nf4(files[weight].get_tensor(weight).to(device), weight))
        else:
            drawn = torch.empty(module.out_features, module.in_features, dtype=dtype)
            module.set(quantize_nf4(drawn.normal_(0, 0.02).to(device), weight))
    for key, p in list(module._parameters.items()):
        full = f"{name}.{key}"
        if p is None or (files and full not in files):        # the latter: a tied lm_head
            continue
        if not files:
            value = torch.empty(p.shape, dtype=dtype, device=device)
            constant = isinstance(module, RMSNorm) or key == "bias"
            value = value.fill_(key == "weight") if constant else value.normal_(0, 0.02)
        elif name in packed and key == "weight":    # a 4-bit lm_head: the loss wants it whole
            value = dequantize_nf4(read_packed(files, full, device), dtype)
        else:
            value = read_tensor(files, full, device, dtype)
        module._parameters[key] = nn.Parameter(value, requires_grad=False)


def fingerprint(model):
    """-> 8 hex digits that tell one frozen base from another on any device, None if none is frozen.

    CRC-32 of the first 4,096 elements of each frozen tensor (of an NF4 weight: of its codes)."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    frozen += [m.weight for m in model.modules() if isinstance(m, NF4Linear)]
    crc = 0
    for tensor in frozen:
        start = tensor.detach().flatten()[:4096].cpu()
        crc = zlib.crc32(start.view(torch.uint8).numpy(), crc)
    return f"{crc:08x}" if frozen else None


def save_pretrained(model, directory, shard_bytes=5 * 10 ** 9):
    """Write config.json and safetensors shards that transformers opens, tensor by tensor.

    The directory appears whole or not at all. Raises ValueError for 4-bit layers and for a
    directory that exists."""
    tensors = whole_tensors(model)
    with new_directory(directory) as temporary:
        write_checkpoint(temporary, model.config, tensors, tensors.get, shard_bytes)


def whole_tensors(model):
    """-> {name: tensor} of a checkpoint of the model; ValueError for 4-bit layers."""
    if any(isinstance(m, NF4Linear) or hasattr(m, "lora_A") for m in model.modules()):
        raise ValueError("the model holds NF4 layers or an adapter; load the base in 16 bit "
                         "(quantize=None) and merge to save a whole model")
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors


def write_checkpoint(directory, config, tensors, value, shard_bytes=5 * 10 ** 9):
    """Write config.json and shards (with an index if there are several) into a directory.

    tensors: {name: tensor}, for names, shapes and dtypes only: they may be on the meta device;
    value(name) -> the tensor, asked for one at a time and never kept."""
    shards = [[]]
    room = shard_bytes
    for name, tensor in tensors.items():
        if shards[-1] and tensor.nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= tensor.nbytes
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        if len(shards) == 1:
            file = "model.safetensors"
        write_safetensors(directory / file, {name: tensors[name] for name in names}, value)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        with writing(directory / "model.safetensors.index.json") as path:
            path.write_text(json.dumps(index, indent=1))
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    with writing(directory / "config.json") as path:
        path.write_text(json.dumps(config_json(config) | {"torch_dtype": dtype}, indent=1))


def write_safetensors(path, tensors, value):
    """One safetensors file: the header's length in 8 bytes, the header as JSON, the data.

    safetensors' own writer wants all tensors at once; this one holds one at a time."""
    kinds = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    header = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start = end
        end += tensor.nbytes
        header[name] = {"dtype": kinds[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                           # so that the data is aligned
    with writing(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in tensors:
            data = value(name).detach().cpu().contiguous().flatten()
            file.write(data.view(torch.uint8).numpy())
