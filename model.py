"""The Llama / Qwen2 decoder by hand, with weights in and out as raw safetensors.

- one decoder for Llama 2/3.x, SmolLM2 (arXiv:2407.21783) and Qwen2/2.5 (arXiv:2407.10671): RMSNorm, rotary positions, grouped-query
  attention, SwiGLU; they differ by configuration only (bias on q, k, v; tied lm_head; llama3 scaling of the rotary frequencies)
- attributes carry the names of the Hugging Face checkpoint, so a checkpoint loads and saves without renaming
- weights stream: each tensor goes from the memory-mapped shard to its device, dtype or 4-bit form on its own, so that an 8B model
  quantises to NF4 in less than 8 GB; checkpoints that bitsandbytes has already quantised load too
- sequences of unequal length are laid end to end (`lengths`) rather than padded; key-value cache; sampling

    model = load_pretrained("meta-llama/Llama-3.1-8B", quantize="nf4", device="cuda")     # or a directory
    tokenizer = load_tokenizer("meta-llama/Llama-3.1-8B")
    logits = model(ids)                                       # (B, T) -> (B, T, vocab)
    nll = token_nll(model, ids, lengths)                      # -log p of every token but the first of each sequence
    tokens = generate(model, [tokenizer.encode("We study").ids], max_new_tokens=100)

Shapes: B sequences of T tokens, hidden size C, H query heads and G key-value heads of size D, S keys.
"""
import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint

from quant import NF4Linear, from_bitsandbytes, quantize_nf4

# ---------------------------------------------------------------------------------------------------------- configuration


@dataclass
class Config:
    """Fields as in the checkpoint's config.json. vocab_size 0: a decoder without embeddings, fed with `embeds`."""
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
    rope_scaling: dict | None = None       # None, or the llama3 rule: factor, low_freq_factor, high_freq_factor, original_max_position_embeddings
    max_position_embeddings: int = 131072
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None
    attention_dropout: float = 0.0

    @property
    def qkv_bias(self):
        return self.model_type == "qwen2"


LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SHAPES = {  # the published shapes, for --dry-run and random weights: no download needed
    "llama-3.1-8b": Config("llama", 128256, 4096, 14336, 32, 32, 8, 128, 1e-5, 500000.0, LLAMA3_ROPE, 131072, False, 128000, 128001),
    "qwen2.5-0.5b": Config("qwen2", 151936, 896, 4864, 24, 14, 2, 64, 1e-6, 1000000.0, None, 32768, True, 151643, 151645),
    "smollm2-135m": Config("llama", 49152, 576, 1536, 30, 9, 3, 64, 1e-5, 100000.0, None, 8192, True, 1, 2),
}


def read_config(raw, where="config.json"):
    """The dictionary of a config.json, of old or of transformers-5 style -> Config.

    Raises ValueError, naming the field, for anything that this decoder does not compute."""
    def refuse(what):
        raise ValueError(f"{where}: {what}; model.py computes Llama and Qwen2 decoders only")
    kind = raw.get("model_type")
    if kind not in ("llama", "qwen2"):
        refuse(f"model_type {kind!r}")
    if raw.get("use_sliding_window") or "sliding_attention" in (raw.get("layer_types") or []):
        refuse("sliding-window attention (use_sliding_window / layer_types)")
    if any(key in raw for key in ("num_experts", "num_local_experts", "n_routed_experts")):
        refuse("mixture of experts")
    if raw.get("hidden_act", "silu") != "silu":
        refuse(f"hidden_act {raw['hidden_act']!r}")
    for key in ("attention_bias", "mlp_bias"):
        if kind == "llama" and raw.get(key):
            refuse(f"{key} true")
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type not in ("default", "llama3"):
        refuse(f"rope type {rope_type!r}")
    quantization = raw.get("quantization_config")
    if quantization and not (quantization.get("quant_method") == "bitsandbytes" and quantization.get("bnb_4bit_quant_type") == "nf4"):
        refuse(f"weights quantised with {quantization.get('quant_method')} ({quantization.get('bnb_4bit_quant_type', 'not NF4')})")
    try:
        heads = raw["num_attention_heads"]
        config = Config(
            kind, raw["vocab_size"], raw["hidden_size"], raw["intermediate_size"], raw["num_hidden_layers"], heads,
            raw.get("num_key_value_heads") or heads, raw.get("head_dim") or raw["hidden_size"] // heads, raw.get("rms_norm_eps", 1e-6),
            float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0),
            {key: rope[key] for key in LLAMA3_ROPE if key != "rope_type"} | {"rope_type": "llama3"} if rope_type == "llama3" else None,
            raw.get("max_position_embeddings", 2048), raw.get("tie_word_embeddings", False), raw.get("bos_token_id"), raw.get("eos_token_id"))
    except KeyError as e:
        raise ValueError(f"{where}: the field {e} is missing; is this the config.json of a language model?") from None
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(f"{where}: num_attention_heads {heads} is no multiple of num_key_value_heads {config.num_key_value_heads}")
    return config


def config_json(config):
    """Config -> the dictionary of a config.json that transformers, vLLM and llama.cpp's converter read."""
    raw = {k: v for k, v in vars(config).items() if v is not None}
    return raw | {"architectures": [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[config.model_type]], "hidden_act": "silu"}


# ---------------------------------------------------------------------------------------------------------------- network


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2 + eps) * weight (arXiv:1910.07467), the mean in float32."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32)).square()
        return (self.weight * (x * torch.rsqrt(square / x.shape[-1] + self.eps)).to(x.dtype)).to(x.dtype)


def rope_frequencies(config, device=None):
    """Angular frequency of each pair of head dimensions: (D/2,) float32, radians per token (arXiv:2104.09864).

    The llama3 rule stretches the context (arXiv:2407.21783, section 3.4.1): wavelengths longer than original/low are slowed by
    `factor`, those shorter than original/high are kept, and in between the two are blended."""
    freq = 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim)
    if config.rope_scaling:
        r = config.rope_scaling
        wavelength = 2 * math.pi / freq
        blend = (r["original_max_position_embeddings"] / wavelength - r["low_freq_factor"]) / (r["high_freq_factor"] - r["low_freq_factor"])
        blend = blend.clamp(0, 1)
        freq = (1 - blend) * freq / r["factor"] + blend * freq
    return freq


def rotate(x, cos, sin):
    """Rotates the pairs (x_i, x_{i + D/2}). x (B, heads, T, D); cos, sin (B or 1, 1, T, D)."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def attend(q, k, v, mask=None, causal=False, dropout=0.0):
    """softmax(q k^T / sqrt D) v: q (B, H, T, D), k and v (B, G, S, D), mask (B, 1, T, S) True where a query may look -> (B, H, T, D).

    On a CPU short sequences are multiplied out: the fused kernel, there to save memory, takes 2.5 times as long forward and backward."""
    (B, H, T, D), (_, G, S, _) = q.shape, k.shape
    if q.device.type != "cpu" or T * S > 512 * 512:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout, enable_gqa=G < H)
    R = H // G                                                        # query heads that share a key head: one product for all of them
    q = (q * D ** -0.5).reshape(B * G, R * T, D)
    k, v = k.reshape(B * G, S, D), v.reshape(B * G, S, D)
    if causal:
        mask = torch.ones(1, 1, T, S, dtype=torch.bool).tril()
    if mask is None:
        scores = torch.bmm(q, k.mT)                                   # (B*G, R*T, S)
    elif T == 1:                                                      # generation: K q^T, because bmm would copy a cache to transpose it
        scores = torch.bmm(k, q.mT).mT.reshape(B, G, R, S).masked_fill_(~mask, -torch.inf).view(B * G, R, S)
    else:
        bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, -torch.inf)          # (B or 1, 1, T, S)
        bias = bias.repeat(1, 1, R, 1) if len(mask) == 1 else bias.expand(B, G, T, S).repeat(1, 1, R, 1)
        scores = torch.baddbmm(bias.flatten(0, 1), q, k.mT)
    return torch.bmm(F.dropout(scores.softmax(-1), dropout), v).view(B, H, T, D)


class Attention(nn.Module):
    def __init__(self, config, linear):
        super().__init__()
        c, self.config = config, config
        self.q_proj = linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(self, x, rope, lengths, cache, layer, causal, last_only=False):
        B, T, _ = x.shape
        D = self.config.head_dim
        n = 1 if last_only else T                                     # positions that ask; all answer
        q = self.q_proj(x[:, -n:]).view(B, n, -1, D).transpose(1, 2)  # (B, n, H*D) -> (B, H, n, D)
        k = self.k_proj(x).view(B, T, -1, D).transpose(1, 2)          # (B, T, G*D) -> (B, G, T, D)
        v = self.v_proj(x).view(B, T, -1, D).transpose(1, 2)
        q, k = rotate(q, *(f[:, :, -n:] for f in rope)), rotate(k, *rope)
        drop = self.config.attention_dropout if self.training else 0.0
        if lengths is None and cache is None:                         # the last position sees all that is there, causal or not
            y = attend(q, k, v, causal=causal and not last_only, dropout=drop)
        elif lengths is None:
            k, v, mask = cache.update(layer, k, v)                    # (B, G, S, D), (B, 1, T, S)
            y = attend(q, k, v, mask[:, :, -n:], dropout=drop)
        else:                                                         # each sequence attends to itself alone: no mask, no padding
            if cache is not None:
                cache.fill(layer, k, v, lengths)
            parts = zip(q.split(lengths, dim=2), k.split(lengths, dim=2), v.split(lengths, dim=2))
            y = torch.cat([attend(*qkv, causal=causal, dropout=drop) for qkv in parts], dim=2)
        return self.o_proj(y.transpose(1, 2).reshape(B, n, -1))       # (B, H, n, D) -> (B, n, H*D) -> (B, n, C)


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

    def forward(self, x, rope, lengths, cache, layer, causal, last_only=False):
        x = x[:, -1 if last_only else None:] + self.self_attn(self.input_layernorm(x), rope, lengths, cache, layer, causal, last_only)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """The transformer without its language-model head. `linear` builds the seven projections (nn.Linear or NF4Linear).

    Set `checkpoint_activations` to keep only each block's input for the backward pass and compute the block again there (arXiv:1604.06174):
    the same result, dropout included, in a fraction of the memory and 4/3 of the time."""
    checkpoint_activations = False

    def __init__(self, config, linear=nn.Linear):
        super().__init__()
        self.config = config
        if config.vocab_size:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, linear) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, ids=None, *, embeds=None, positions=None, lengths=None, cache=None, causal=True, last_only=False):
        """-> hidden states after the final norm, (B, T, C).

        ids (B, T) int64, or embeds (B, T, C) in their place. positions (T,) or (B, T), default 0..T-1 (after what the cache holds).
        lengths: with B = 1, T is a row of sequences of these lengths (summing to T) laid end to end; none sees another, and the
        default positions restart at each. Padding on the right of a batch needs no mask: under causal attention nothing sees it.
        cache: a KVCache, which grows by T; attention is then causal. With `lengths` it must be empty, and sequence i fills its row i.
        causal=False: every token sees its whole sequence.
        last_only: (B, 1, C), of the last position alone; the last block then computes nothing but keys and values for the others.
        Raises ValueError if lengths do not sum to T or are combined with a cache that is not empty, with B > 1 or with last_only."""
        x = self.embed_tokens(ids) if embeds is None else embeds
        B, T, _ = x.shape
        if lengths is not None:
            lengths = [int(n) for n in lengths]
            if B != 1 or sum(lengths) != T or cache is not None and cache.used or last_only:
                raise ValueError(f"lengths need one row, without last_only or a cache that is in use, and must sum to its {T} tokens; got {B} rows and the sum {sum(lengths)}")
        if positions is None:
            if lengths is not None:
                positions = torch.cat([torch.arange(n) for n in lengths]).to(x.device)
            else:
                positions = torch.arange(T, device=x.device) + (0 if cache is None else cache.lengths[:, None])
        angle = positions.reshape(-1, 1, T, 1) * rope_frequencies(self.config, x.device)      # (B or 1, 1, T, D/2)
        rope = [f(torch.cat((angle, angle), dim=-1)).to(x.dtype) for f in (torch.cos, torch.sin)]
        recompute = self.checkpoint_activations and torch.is_grad_enabled()
        for i, layer in enumerate(self.layers):
            context = rope, lengths, cache, i, causal, last_only and i == len(self.layers) - 1
            x = checkpoint(layer, x, *context, use_reentrant=False) if recompute else layer(x, *context)
        if cache is not None:
            cache.grow(T if lengths is None else lengths)
        return self.norm(x)


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


def init_weights(model):
    """Fresh weights: matrices N(0, 0.02), biases 0, norms 1. Draws from torch's global generator."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, 0.0, 0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)


# ------------------------------------------------------------------------------------------------------------------- loss


class ChunkedNLL(torch.autograd.Function):
    """-log softmax(x W^T)[target], row by row, without ever holding the logits of all rows.

    d nll_i / d x_i = (softmax_i - onehot_i) W needs nothing from the loss above but one factor a row, so the forward
    pass computes it from the same logits and keeps (N, C) instead of (N, vocab). Plain twin: F.cross_entropy(x W^T, targets)."""
    ROWS = 256

    @staticmethod
    def forward(ctx, x, weight, targets):
        nll, grad = torch.empty(len(x), device=x.device), torch.empty_like(x) if x.requires_grad else None
        logits = x.new_empty(ChunkedNLL.ROWS, len(weight))                            # the same memory for each chunk: fresh pages cost more
        logp = torch.empty_like(logits, dtype=torch.float32)                          # than the arithmetic on a CPU
        for i in range(0, len(x), ChunkedNLL.ROWS):
            rows = slice(i, i + ChunkedNLL.ROWS)
            n, target = len(x[rows]), targets[rows, None]
            torch.mm(x[rows], weight.T, out=logits[:n])                               # (n, C) -> (n, vocab)
            torch.log_softmax(logits[:n], -1, dtype=torch.float32, out=logp[:n])
            nll[rows] = -logp[:n].gather(1, target).squeeze(1)
            if grad is not None:
                p = logp[:n].exp_().scatter_add_(1, target, torch.full_like(target, -1.0, dtype=torch.float32))
                torch.mm(logits[:n].copy_(p), weight, out=grad[rows])                 # (n, vocab) -> (n, C)
        ctx.save_for_backward(grad)
        return nll

    @staticmethod
    def backward(ctx, upstream):
        grad, = ctx.saved_tensors
        return (grad * upstream[:, None]).to(grad.dtype), None, None


def token_nll(model, ids, lengths):
    """Negative log-likelihood, in nats, of every token but the first of each sequence, given those before it.

    ids (T,) int64: sequences laid end to end; lengths: their lengths. -> (T - number of sequences,) float32, in order.
    The gradient reaches the hidden states; where lm_head itself is trained the plain computation is used."""
    lengths = [int(n) for n in lengths]
    hidden = model.model(ids[None], lengths=lengths)[0]                               # (T, C)
    first = torch.zeros(len(ids) + 1, dtype=torch.bool, device=ids.device)
    first[torch.tensor([0] + lengths).cumsum(0)] = True
    hidden, targets = hidden[~first[1:]], ids[~first[:-1]]                            # a sequence's last token predicts nothing
    if model.lm_head.weight.requires_grad:
        return F.cross_entropy(model.lm_head(hidden).float(), targets, reduction="none")
    return ChunkedNLL.apply(hidden, model.lm_head.weight, targets)


# ------------------------------------------------------------------------------------------------------------- generation


class KVCache:
    """Keys and values of what was seen so far: `size` slots for each of `batch` rows, filled from the left.

    Rows may have unequal `lengths` (batch,), and at most `used`, a number known without asking the device; what lies behind a row's end is masked."""

    def __init__(self, config, batch, size, dtype, device):
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, size, config.head_dim)
        self.k, self.v = torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)
        self.lengths, self.used = torch.zeros(batch, dtype=torch.int64, device=device), 0

    def fill(self, layer, k, v, lengths):
        """Store k, v (1, G, T, D) of sequences laid end to end, each in its own row of the empty cache."""
        for row, (a, b) in enumerate(zip(k[0].split(lengths, dim=1), v[0].split(lengths, dim=1), strict=True)):
            self.k[layer, row, :, :a.shape[1]], self.v[layer, row, :, :a.shape[1]] = a, b

    def update(self, layer, k, v):
        """Store k, v (B, G, T, D) behind what is there -> all keys, all values (B, G, S, D), mask (B, 1, T, S) of what each may see."""
        T = k.shape[2]
        S = self.used + T
        if S > self.k.shape[3]:
            raise ValueError(f"the key-value cache has {self.k.shape[3]} slots and would need {S}; make it larger")
        if layer == 0:                                        # the same for all layers
            self.slots = self.lengths[:, None] + torch.arange(T, device=k.device)     # (B, T)
            self.mask = torch.arange(S, device=k.device) <= self.slots[:, None, :, None]
        rows = torch.arange(len(k), device=k.device)[:, None]
        self.k[layer][rows, :, self.slots] = k.transpose(1, 2)
        self.v[layer][rows, :, self.slots] = v.transpose(1, 2)
        return self.k[layer, :, :, :S], self.v[layer, :, :, :S], self.mask

    def grow(self, T):
        """T: how many tokens came to each row, a number or a list."""
        self.lengths = self.lengths + torch.as_tensor(T, device=self.lengths.device)
        self.used += T if isinstance(T, int) else max(T)

    def keep(self, rows):
        """Shrink to these rows, in this order; only those that change their place are copied."""
        moved = [i for i, row in enumerate(rows) if row != i]
        for cache in (self.k, self.v):
            cache[:, moved] = cache[:, [rows[i] for i in moved]]
        self.k, self.v, self.lengths = self.k[:, :len(rows)], self.v[:, :len(rows)], self.lengths[rows]


@torch.inference_mode()
def generate(model, prompts, max_new_tokens=256, temperature=0.7, top_k=50, eos=None, seed=42):
    """Continue `prompts`, a list of lists of token ids -> a list of lists with the new ids only, `eos` left off.

    temperature 0 takes the most likely token; otherwise the top_k most likely are sampled with softmax(logits / temperature).
    eos: an id or a list of ids that end a sequence. seed: an int, from which each row derives its own, or one for each prompt. A row draws
    from its own seed, on the CPU: neither the other rows nor the device change its draws (rounding of the logits may)."""
    device, B = model.lm_head.weight.device, len(prompts)
    if not all(prompts):
        raise ValueError("a prompt without any token cannot be continued; start it with the BOS token at least")
    ends = {eos} if isinstance(eos, int) else set(eos or [])
    lengths = [len(p) for p in prompts]
    cache = KVCache(model.config, B, max(lengths) + max_new_tokens, model.lm_head.weight.dtype, device)
    ids = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    hidden = model.model(ids[None], lengths=lengths, cache=cache)[0]                  # (T, C): prompts laid end to end
    hidden = hidden[torch.tensor(lengths, device=device).cumsum(0) - 1]               # (B, C), at each prompt's last token
    seeds = [seed * 1_000_003 + row for row in range(B)] if isinstance(seed, int) else seed
    uniform = torch.stack([torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(s)) for s in seeds]).to(device)
    new, running = [[] for _ in prompts], list(range(B))      # running: the prompt that each row of the batch continues
    for step in range(max_new_tokens):
        logits = model.lm_head(hidden).float()                                        # (B, vocab)
        if temperature == 0:
            token = logits.argmax(-1)
        else:
            top, index = logits.topk(min(top_k, logits.shape[-1]))
            cumulative = F.softmax(top / temperature, dim=-1).cumsum(-1)              # (B, top_k); the pick: where it passes the uniform draw
            pick = (cumulative < uniform[:, step, None] * cumulative[:, -1:]).sum(-1, keepdim=True)
            token = index.gather(1, pick).squeeze(1)                                  # (B,)
        going = []
        for row, t in enumerate(token.tolist()):
            if t not in ends:
                new[running[row]].append(t)
                going.append(row)
        if not going or step == max_new_tokens - 1:
            break
        if len(going) < len(running):                         # finished sequences leave the batch; rows from its end take their places
            late = iter(row for row in going if row >= len(going))
            going = [row if row in going else next(late) for row in range(len(going))]
            cache.keep(going)
            running, uniform, token = [running[row] for row in going], uniform[going], token[going]
        hidden = model.model(token[:, None], cache=cache)[:, 0]
    return new


# ---------------------------------------------------------------------------------------------- checkpoints: in, out, hub


MODEL_FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "*.safetensors", "*.safetensors.index.json"]


def fetch(source, wanted=MODEL_FILES):
    """A directory, or a hub id such as "meta-llama/Llama-3.1-8B" -> a local directory (the wanted files, downloaded once per node, with progress).

    Raises ValueError, one sentence with what to do, for a missing network, token, licence or repository."""
    if os.path.isdir(source):
        return Path(source)
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise ValueError(f"{source} is neither a directory nor a hub id (ORGANISATION/NAME) nor one of the shapes {', '.join(SHAPES)}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    others_wait = distributed and int(os.environ.get("LOCAL_RANK", 0)) > 0
    error = path = None
    for my_turn in (not others_wait, others_wait):            # the node's first process downloads, then the others find it there
        if my_turn:
            try:
                path = snapshot_download(source, allow_patterns=wanted, ignore_patterns=["*/*"])
            except GatedRepoError:
                error = f"{source} needs its licence accepted: do so at https://huggingface.co/{source}, then run `hf auth login` with a read token"
            except RepositoryNotFoundError:
                error = f"the hub does not know {source}, or it is private: check the spelling, or run `hf auth login` with a token that may read it"
            except LocalEntryNotFoundError:
                error = f"{source} is not on this machine and the hub cannot be reached: get a network, or give a directory that holds it"
            except (HfHubHTTPError, OSError) as e:
                error = f"the download of {source} failed ({str(e).splitlines()[0]}); run the same command again, it goes on where it stopped"
        if distributed:
            torch.distributed.barrier()
    if error:
        raise ValueError(error)
    return Path(path)


def load_config(source):
    """A name from SHAPES, a directory with a config.json, or a hub id -> Config."""
    if source in SHAPES:
        return SHAPES[source]
    path = fetch(source) / "config.json"
    if not path.exists():
        raise ValueError(f"{path} is missing: {source} is no model directory")
    try:
        return read_config(json.loads(path.read_text()), path)
    except json.JSONDecodeError as e:
        raise ValueError(f"{path} is not JSON ({e}); get the checkpoint again") from None


def load_tokenizer(source):
    """-> tokenizers.Tokenizer of a model directory or hub id."""
    from tokenizers import Tokenizer
    path = fetch(source) / "tokenizer.json"
    if not path.exists():
        raise ValueError(f"{path} is missing: the model was saved without its tokenizer; copy tokenizer.json there")
    return Tokenizer.from_file(str(path))


def bos_eos(config, tokenizer):
    """-> ids of the beginning-of-sequence and end-of-sequence tokens; a model without BOS uses its end-of-text token for it."""
    eos = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    bos = config.bos_token_id
    if bos is None:
        bos = tokenizer.token_to_id("<|endoftext|>")
    if eos is None or (bos is None and eos is None):
        raise ValueError("config.json names no eos_token_id; add it")
    return eos if bos is None else bos, eos


def tensor_files(directory):
    """-> {tensor name: open safetensors file} of a single-file or sharded checkpoint.

    Raises ValueError for missing or damaged files and for index entries outside the directory."""
    index, files = directory / "model.safetensors.index.json", {}
    names = ["model.safetensors"]
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as e:
            raise ValueError(f"{index} cannot be read ({e!r}); get it again") from None
    for name in names:
        path = directory / name
        if os.path.basename(name) != name:
            raise ValueError(f"{index} points outside the directory ({name}); this checkpoint is not to be trusted")
        if not path.exists():
            raise ValueError(f"{path} is missing: the checkpoint is incomplete (only safetensors are read); get it again")
        try:
            shard = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as e:
            raise ValueError(f"{path} is damaged ({e}); get it again") from None
        files |= dict.fromkeys(shard.keys(), shard)
    return files


def load_pretrained(source, *, quantize=None, dtype=torch.bfloat16, device="cpu", random_init=False, blocks=None, attention_dropout=0.0):
    """A directory, hub id or name from SHAPES -> CausalLM in eval mode, all of it frozen (requires_grad False).

    quantize "nf4": the seven projections of each block in 4 bits; a checkpoint that bitsandbytes has quantised stays in 4 bits
    whatever is asked. dtype: of all other tensors. random_init: fresh weights (torch's global generator) instead of the
    checkpoint's. blocks: the first so many of the pretrained blocks, or any number of random ones.
    Raises ValueError with the names of missing, surplus, mis-shaped or not finite tensors."""
    if source in SHAPES and not random_init:
        raise ValueError(f"{source} is a shape without weights: give a model directory or hub id (or ask for random weights)")
    config = load_config(source)
    if blocks and not random_init and blocks > config.num_hidden_layers:
        raise ValueError(f"{blocks} blocks asked for, but {source} has {config.num_hidden_layers}")
    config = replace(config, num_hidden_layers=blocks or config.num_hidden_layers, attention_dropout=attention_dropout)
    files = {} if random_init else tensor_files(fetch(source))
    with torch.device("meta"):
        model = CausalLM(config, linear_factory(quantize, dtype))
    serialised = {name.removesuffix(".weight.absmax") for name in files if name.endswith(".weight.absmax")}
    for name, module in list(model.named_modules()):
        if name in serialised and isinstance(module, nn.Linear):                      # 4-bit on disk: the layer must be, too
            layer = NF4Linear(module.in_features, module.out_features, module.bias is not None, dtype, "meta")
            setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], layer)
    if not random_init:
        check_names(model, files, source)
    for name, module in model.named_modules():
        fill(module, f"{name}." if name else "", files, serialised, dtype, device)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.requires_grad_(False).eval()


def linear_factory(quantize, dtype=torch.bfloat16):
    """The class of the seven projections: quantize None -> nn.Linear, "nf4" -> NF4Linear with biases in `dtype`."""
    if quantize not in (None, "nf4"):
        raise ValueError(f"quantize must be nf4 or nothing, not {quantize!r}")
    return nn.Linear if quantize is None else lambda i, o, bias: NF4Linear(i, o, bias, dtype)


def check_names(model, files, source):
    """ValueError listing every tensor that is missing, surplus or of another shape than the configuration says."""
    expected = {}
    for name, module in model.named_modules():
        if isinstance(module, NF4Linear):
            expected[name + ".weight"] = [module.out_features, module.in_features]
        own = {} if isinstance(module, NF4Linear) else {"weight": getattr(module, "weight", None)}
        own["bias"] = getattr(module, "bias", None)
        expected |= {f"{name}.{key}": list(p.shape) for key, p in own.items() if isinstance(p, torch.Tensor)}
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    problems = [f"{name} is missing" for name in expected if name not in files]
    for name, shard in files.items():
        block = name.removeprefix("model.layers.").split(".")[0]
        if name in expected:
            shape = shard.get_slice(name).get_shape()
            if shape != expected[name] and name + ".absmax" not in files:
                problems.append(f"{name} is {shape} instead of {expected[name]}")
        elif not (name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq") or name.split(".weight.")[0] + ".weight" in expected
                  or name.startswith("model.layers.") and block.isdigit() and int(block) >= model.config.num_hidden_layers):
            problems.append(f"{name} is not part of this architecture")
    if problems:
        more = f" and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(f"{source} does not fit its config.json: {'; '.join(problems[:20])}{more}")


def fill(module, prefix, files, serialised, dtype, device):
    """Give one module of the meta-device model its own tensors, one at a time: loaded (or drawn, where `files` is empty), moved, converted."""
    if isinstance(module, NF4Linear) and prefix[:-1] in serialised:
        key = prefix + "weight"
        parts = {name.removeprefix(key).lstrip("."): files[name].get_tensor(name) for name in files if name == key or name.startswith(key + ".")}
        q = from_bitsandbytes(parts, key)
        for field in ("packed", "absmax", "nested_absmax", "nested_offset"):
            setattr(q, field, getattr(q, field).to(device))
        module.set(q)
    elif isinstance(module, NF4Linear):
        key = prefix + "weight"
        weight = files[key].get_tensor(key) if files else torch.empty(module.out_features, module.in_features, dtype=dtype).normal_(0, 0.02)
        module.set(quantize_nf4(weight.to(device), key))
    for key, p in list(module._parameters.items()):
        if p is None or prefix + key == "lm_head.weight" and prefix + key not in files and files:       # tied
            continue
        if files:
            value = files[prefix + key].get_tensor(prefix + key).to(device, dtype)
        else:
            value = torch.empty(p.shape, dtype=dtype, device=device)
            value.fill_(float(key == "weight")) if isinstance(module, RMSNorm) or key == "bias" else value.normal_(0, 0.02)
        module._parameters[key] = nn.Parameter(value, requires_grad=False)


def save_pretrained(model, directory, shard_bytes=5 * 10 ** 9):
    """Write config.json and safetensors shards of at most `shard_bytes` (with an index if there are several) that transformers opens.

    The directory appears whole or not at all. Raises ValueError for 4-bit layers and for a directory that exists."""
    directory = Path(directory)
    if any(isinstance(m, NF4Linear) for m in model.modules()):
        raise ValueError("the model holds NF4 layers; load the base in 16 bit (quantize=None) to save a whole model")
    if directory.exists():
        raise ValueError(f"{directory} exists already; remove it or choose another name")
    tensors = {k: v.detach() for k, v in model.state_dict().items() if not (k == "lm_head.weight" and model.config.tie_word_embeddings)}
    shards, room = [], 0
    for name, tensor in tensors.items():
        if tensor.nbytes > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    temporary = directory.with_name(f"{directory.name}.tmp-{os.getpid()}")
    temporary.mkdir(parents=True)
    weight_map = {}
    for i, shard in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file({k: v.cpu().contiguous() for k, v in shard.items()}, temporary / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
        (temporary / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    (temporary / "config.json").write_text(json.dumps(config_json(model.config) | {"torch_dtype": dtype}, indent=1))
    temporary.rename(directory)
