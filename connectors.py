"""Connectors: numbers into a language model and out again (L3M, arXiv:2506.14757). The backbone is a `Decoder` of model.py.

Regression: the sky-averaged 21cm signal, 47 numbers, becomes 47 vectors of the backbone's hidden size through one affine layer (the input connector) and is set
into a prompt. The last vector of the prompt is a trainable token, <|ska-param|>; its final hidden state goes through another affine layer (the output connector)
to the mean and the precision of a Gaussian over the six parameters. The backbone stays frozen, pretrained or random; the reference networks are small backbones of
the same kind, trained from scratch.

    regressor = load_regressor("out/regress-pretrained-seed0")          # what train_l3m.py regress wrote
    mean, L = regressor(signals)                                        # (B, 47) normalised -> (B, 6) in [0, 1], (B, 6, 6): precision = L L^T
    samples = sample_gaussian(mean, L, 50)                              # (50, B, 6)

Generation: slices of a lightcone become a row of patches, each a vector through one affine layer, after a prompt that holds the six parameters and the index of the
first slice. The final hidden state before a patch, through another affine layer, conditions a small velocity network (flow.py), which draws the patch. Here adapters
(LoRA) and norms of the backbone, or all of it, are trained with the connectors.

    generator = load_generator("out/generate-pretrained-seed0")         # what train_l3m.py generate wrote
    loss = generator(slices, conditions).mean()                         # (B, 12, X, Y) normalised, (B, 7), as SubLightcones returns them
    for s in generator.generate(slices[:, :2], conditions, 100, bins=2350, seeds=range(B)):  # (B, 1, X, Y), slice after slice

Shapes: B lightcones, T tokens, hidden size C, 6 parameters; S slices of X x Y cells, R x K patches of p x p cells each, L = R (K + 1) + 1 tokens a slice.
"""
import json
import math
import zlib
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from flow import VelocityCNN, cfm_loss, sample
from lora import inject
from model import SHAPES, Config, Decoder, KVCache, RMSNorm, init_weights, load_pretrained, load_tokenizer

# ------------------------------------------------------------------------------------------------------------ prompts

SIGNAL = "signal"                                             # stands for the vectors that the input connector makes
TOKENS = ("<|ska-param|>", "<|system-prompt-token|>", "<|lightcone-token|>")           # trainable vectors, N(0, 1) at the start
PROMPTS = {   # all else is words in ChatML, with an explicit empty system message (or none would be empty: templates fill in their own)
    "minimal": (SIGNAL, "<|ska-param|>"),
    "chat": ("<|im_start|>system\n<|im_end|>\n<|im_start|>user\n", SIGNAL, "<|im_end|>\n<|im_start|>assistant\n", "<|ska-param|>"),
    "chat-trainable": ("<|im_start|>system\n", "<|system-prompt-token|>", "<|im_end|>\n<|im_start|>user\n", "<|lightcone-token|>", SIGNAL,
                       "<|im_end|>\n<|im_start|>assistant\n", "<|ska-param|>"),
}


def is_words(piece):
    return piece != SIGNAL and piece not in TOKENS


def encode_words(base, pieces):
    """The words among the pieces of a prompt -> {piece: ids (n,)}, each encoded alone by the tokenizer of `base`, nothing added.

    Raises ValueError if the base has no tokenizer or does not know the ChatML tokens."""
    words = [piece for piece in pieces if is_words(piece)]
    if not words:
        return {}
    if base in SHAPES:
        raise ValueError(f"{base} is a shape without a tokenizer: a prompt with words needs a model directory or hub id as --base; "
                         "to regress without words, use --prompt minimal")
    tokenizer = load_tokenizer(base)
    if missing := [t for t in ("<|im_start|>", "<|im_end|>") if tokenizer.token_to_id(t) is None]:
        raise ValueError(f"{base} does not know {' and '.join(missing)}, the words of a ChatML prompt: take a base such as Qwen/Qwen2.5-0.5B-Instruct; "
                         "to regress without words, use --prompt minimal")
    return {piece: torch.tensor(tokenizer.encode(piece, add_special_tokens=False).ids) for piece in words}


class Prefix:
    """Keys and values of the frozen words that begin a prompt, computed once and shared by all rows: a `cache` for Decoder.forward.

    Unlike a KVCache it stores nothing: gradients pass through the new keys and values. k, v: (blocks, 1, G, P, D)."""

    def __init__(self, k, v):
        self.k, self.v = k, v
        self.lengths = torch.full((1,), k.shape[3], device=k.device)

    def update(self, layer, k, v):
        """k, v (B, G, T, D) -> all keys, all values (B, G, P + T, D), mask (1, 1, T, P + T) of what each token may see."""
        (B, _, T, _), P = k.shape, self.k.shape[3]
        k, v = (torch.cat((old[layer].expand(B, -1, -1, -1), new), dim=2) for old, new in ((self.k, k), (self.v, v)))
        return k, v, torch.ones(T, P + T, dtype=torch.bool, device=k.device).tril(P)[None, None]

    def grow(self, T):
        pass


# ------------------------------------------------------------------------------------------------------ the Gaussian

ROW, COLUMN = torch.tril_indices(6, 6)


def gaussian_head(raw):
    """Raw outputs (B, 27) -> mean (B, 6) in [0, 1] and L (B, 6, 6), lower triangular, of the precision matrix L L^T.

    L_ij = 2/sqrt(i) raw_ij with softplus on the diagonal, i = 1..6. Row i of L L^T sums i squares: without the factor the last
    parameter would start with a sixfold precision (arXiv:2506.14757, section on regression)."""
    lower = raw.new_zeros(len(raw), 6, 6)
    lower[:, ROW, COLUMN] = raw[:, 6:]                                              # (B, 21) -> (B, 6, 6)
    L = lower.tril(-1) + torch.diag_embed(F.softplus(lower.diagonal(dim1=1, dim2=2)))
    return raw[:, :6].sigmoid(), L * (2 / torch.arange(1, 7, device=raw.device).sqrt())[:, None]


def whiten(mean, L, y):
    """L^T (y - mean), (B, 6): standard normal where the Gaussian is right."""
    return torch.einsum("bij,bi->bj", L, y - mean)


def gaussian_nll(mean, L, y):
    """[1/2 (mu - y)^T L L^T (mu - y) - log det L] / 6, (B,): the negative log-likelihood a parameter, without its constant log(2 pi)/2."""
    return (whiten(mean, L, y).square().sum(-1) / 2 - L.diagonal(dim1=1, dim2=2).log().sum(-1)) / 6


def sample_gaussian(mean, L, n, generator=None):
    """-> (n, B, 6) draws, not clamped to the prior. Their covariance is (L L^T)^-1 = L^-T L^-1. generator: a CPU one."""
    e = torch.randn(len(mean), 6, n, generator=generator).to(mean)
    return mean + torch.linalg.solve_triangular(L.mT, e, upper=True).permute(2, 0, 1)           # (B, 6, n) -> (n, B, 6)


def standard_deviation(L):
    """(B, 6): of each parameter, the others integrated out: the square roots of the diagonal of (L L^T)^-1."""
    inverse = torch.linalg.solve_triangular(L, torch.eye(6, device=L.device).expand_as(L), upper=False)
    return inverse.square().sum(1).sqrt()


def coverage(mean, L, y, levels):
    """Fraction of truths y (B, 6) in the central interval of each level, for each parameter: (levels, 6). Calibrated: equal to the level."""
    levels = torch.as_tensor(levels, dtype=mean.dtype, device=mean.device)
    pull = (y - mean).abs() / standard_deviation(L)
    return torch.stack([(pull < math.sqrt(2) * torch.erfinv(level)).float().mean(0) for level in levels])


def joint_coverage(mean, L, y, levels):
    """Fraction of truths in the ellipsoid of each level, all six parameters at once: (levels,).

    The squared Mahalanobis distance x is chi^2 with 6 degrees of freedom: P(<x) = 1 - exp(-x/2) (1 + x/2 + x^2/8)."""
    half = whiten(mean, L, y).square().sum(-1) / 2
    inside = 1 - torch.exp(-half) * (1 + half + half.square() / 2)
    return (inside[:, None] < torch.as_tensor(levels, dtype=mean.dtype, device=mean.device)).float().mean(0)


# ----------------------------------------------------------------------------------------------------- the regressor

REFERENCES = {  # networks of the connectors' size and 30 times it, trained from scratch
    "small": Config("qwen2", 0, 32, 64, 3, 2, 2, 16, 1e-6, 10000.0),
    "large": Config("qwen2", 0, 128, 256, 6, 4, 4, 32, 1e-6, 10000.0),
}


def seed_of(seed, what):
    """A seed of its own for each use: equal draws in two places would be a correlation."""
    return int(np.random.SeedSequence([seed, what]).generate_state(1)[0])


def init_connectors(modules, tokens, seed):
    """Affine layers N(0, 0.02) with zero bias, tokens N(0, 1), drawn on the CPU whatever the device."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in modules:
            module.weight.copy_(0.02 * torch.randn(module.weight.shape, generator=draw))
            module.bias.zero_()
        for token in tokens:
            token.copy_(torch.randn(token.shape, generator=draw))


class Regressor(nn.Module):
    """backbone: a Decoder, frozen, or to be trained if its parameters require a gradient. words: {piece of the prompt: (n, C) embeddings}."""

    def __init__(self, backbone, prompt, words, causal=True, seed=0):
        super().__init__()
        C, pieces = backbone.config.hidden_size, list(PROMPTS[prompt])
        self.backbone, self.causal = backbone, causal
        self.dtype = backbone.layers[0].self_attn.q_proj.weight.dtype
        self.input_connector = nn.Linear(1, C)
        self.output_connector = nn.Linear(C, 6 + 21)
        self.tokens = nn.ParameterDict({piece: nn.Parameter(torch.empty(1, C)) for piece in pieces if piece in TOKENS})
        if not self.input_connector.weight.is_meta:
            init_connectors([self.input_connector, self.output_connector], self.tokens.values(), seed)
        self.prefix_length = 0
        if is_words(pieces[0]):
            self.run_prefix(words[pieces.pop(0)])
        self.pieces = pieces
        for i, piece in enumerate(pieces):
            if is_words(piece):
                self.register_buffer(f"words{i}", words[piece], persistent=False)

    @torch.no_grad()
    def run_prefix(self, embeds):
        """Keep the keys and values of the words (P, C) that nothing trainable precedes. They have no attention dropout, in training neither."""
        cache = KVCache(self.backbone.config, 1, len(embeds), self.dtype, embeds.device)
        training = self.backbone.training
        self.backbone.eval()(embeds=embeds[None], cache=cache)
        self.backbone.train(training)
        self.prefix_length = len(embeds)
        self.register_buffer("prefix_k", cache.k, persistent=False)
        self.register_buffer("prefix_v", cache.v, persistent=False)

    def hidden(self, signals):
        """(B, 47) float32, normalised -> (B, C) float32: the final hidden state of <|ska-param|>."""
        parts = []
        for i, piece in enumerate(self.pieces):
            if piece == SIGNAL:
                vectors = self.input_connector(signals[..., None])                              # (B, 47) -> (B, 47, C)
            else:
                vectors = self.tokens[piece] if piece in TOKENS else getattr(self, f"words{i}")
                vectors = vectors.expand(len(signals), -1, -1)                                  # (n, C) -> (B, n, C)
            parts.append(vectors.to(self.dtype))
        prefix = Prefix(self.prefix_k, self.prefix_v) if self.prefix_length else None
        return self.backbone(embeds=torch.cat(parts, dim=1), cache=prefix, causal=self.causal, last_only=True)[:, 0].float()

    def head(self, hidden):
        """(B, C) -> mean (B, 6), L (B, 6, 6)."""
        return gaussian_head(self.output_connector(hidden))

    def forward(self, signals):
        """(B, 47) float32, normalised -> mean (B, 6) in [0, 1], L (B, 6, 6) of the precision L L^T."""
        return self.head(self.hidden(signals))

    def trained(self):
        """{name: parameter} of all that is trained."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def groups(self):
        """Lists of names, updated one after the other on each batch: what feeds the frozen backbone, then what reads it; references: all at once."""
        names = list(self.trained())
        if any(name.startswith("backbone.") for name in names):
            return [names]
        after = [name for name in names if name.startswith("output_connector.")]
        return [[name for name in names if name not in after], after]


def build_regressor(settings, device="cpu", dtype=None):
    """The network of a run before training, in eval mode. settings: init, base, blocks, prompt, seed, dropout, causal, dtype.

    A random backbone depends on the seed and settings["dtype"] alone: it is drawn on the CPU, whatever the device, and then cast.
    dtype: of the frozen backbone, default settings["dtype"]. References are float32.
    Raises ValueError for a base that cannot be loaded or does not know the words of the prompt."""
    init, prompt, stored = settings["init"], settings["prompt"], getattr(torch, settings["dtype"])
    ids = encode_words(settings["base"], PROMPTS[prompt])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(settings["seed"], 0))
        if init in REFERENCES:
            backbone, words = Decoder(replace(REFERENCES[init], attention_dropout=settings["dropout"])), {}
            init_weights(backbone)
        else:
            lm = load_pretrained(settings["base"], dtype=stored, random_init=init == "random", blocks=settings["blocks"],
                                 attention_dropout=settings["dropout"])
            backbone = lm.model
            words = {piece: backbone.embed_tokens.weight[rows].clone() for piece, rows in ids.items()}
            del lm, backbone.embed_tokens                                                       # all that was needed of it are those rows
            backbone.norm.weight.fill_(1.0)
    fingerprint = None if init in REFERENCES else zlib.crc32(backbone.layers[-1].mlp.down_proj.weight.view(torch.uint8).numpy())
    if init not in REFERENCES:
        backbone.to(dtype or stored)
        words = {piece: rows.to(dtype or stored) for piece, rows in words.items()}
    regressor = Regressor(backbone, prompt, words, settings["causal"], seed_of(settings["seed"], 1))
    regressor.settings, regressor.fingerprint = settings, fingerprint
    return regressor.to(device).eval()


def load_run(run_directory, experiment, build, device, dtype):
    """A directory that train_l3m.py `experiment` wrote -> build(settings, device, dtype) with the weights of the best validation; its settings: `.settings`.

    Raises ValueError if the directory holds no such run, none that has been validated yet, or if base and weights do not fit each other."""
    config, weights = Path(run_directory) / "config.json", Path(run_directory) / "model.safetensors"
    if not config.exists():
        raise ValueError(f"{run_directory} holds no run: {config.name} is missing; train one with train_l3m.py {experiment}")
    try:
        settings = json.loads(config.read_text())["settings"]
        found = settings["experiment"]
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{config} cannot be read ({e!r}); is {run_directory} a run of train_l3m.py?") from None
    if found != experiment:
        raise ValueError(f"{run_directory} is a run of train_l3m.py {found}, not of {experiment}")
    if not weights.exists():
        raise ValueError(f"{run_directory} has no {weights.name} yet: go on with train_l3m.py {experiment} --resume")
    model = build(settings, device, dtype)
    named = model.trained()
    try:
        with safe_open(weights, framework="pt") as f:
            tensors, metadata = {name: f.get_tensor(name) for name in f.keys()}, f.metadata() or {}
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{weights} is damaged ({e})") from None
    shapes, expected = ({name: tuple(t.shape) for name, t in d.items()} for d in (tensors, named))
    if shapes != expected:
        wrong = sorted(name for name in shapes | expected if shapes.get(name) != expected.get(name))
        raise ValueError(f"{weights} does not fit its backbone (hidden size {model.backbone.config.hidden_size}): "
                         + "; ".join(f"{name} is {shapes.get(name, 'missing')}, expected {expected.get(name, 'none')}" for name in wrong[:3]))
    if metadata.get("fingerprint", str(model.fingerprint)) != str(model.fingerprint):
        raise ValueError(f"{run_directory} was trained with another backbone than {settings['base']} now gives: its files, or torch's random numbers, have changed")
    with torch.no_grad():
        for name, p in named.items():
            p.copy_(tensors[name])
    return model


def load_regressor(run_directory, device="cpu", dtype=None):
    """What train_l3m.py regress wrote -> Regressor in eval mode. Raises ValueError as load_run does."""
    return load_run(run_directory, "regress", build_regressor, device, dtype)


# ======================================================================================================== generation
# The sequence: the prompt, then slice after slice its patches, row by row, with a new-line token after each row of patches and another kind after each slice.

CONDITIONS = "conditions"                                     # stands for the vectors of the parameters and the index
ROW_END, SLICE_END = "<|row-newline-token|>", "<|slice-newline-token|>"
GENERATION_PROMPT = ("<|im_start|>system\n", "<|system-prompt-token|>", "<|im_end|>\n<|im_start|>user\n", CONDITIONS,
                     "<|im_end|>\n<|im_start|>assistant\n", "<|lightcone-token|>")
GENERATION_WORDS = tuple(piece for piece in GENERATION_PROMPT if piece != CONDITIONS and is_words(piece))
GENERATION_REFERENCES = {  # networks of the size of LoRA r = 2 and r = 8, trained from scratch
    "small": Config("qwen2", 0, 128, 424, 7, 4, 4, 32, 1e-6, 10000.0),
    "large": Config("qwen2", 0, 256, 560, 7, 4, 4, 64, 1e-6, 10000.0),
}
CONTEXT = 2                                                   # slices that are given, never scored


def patch(slices, p):
    """(..., X, Y) -> (..., R, K, p*p), row by row. Raises ValueError where p does not divide the slice."""
    *some, X, Y = slices.shape
    if X % p or Y % p:
        raise ValueError(f"patches of {p} x {p} do not divide slices of {X} x {Y}: choose a patch size that divides both sides")
    return slices.reshape(*some, X // p, p, Y // p, p).transpose(-3, -2).flatten(-2)            # (..., R, p, K, p) -> (..., R, K, p, p)


def unpatch(patches):
    """(..., R, K, p*p) -> (..., X, Y): the inverse of `patch`."""
    *some, R, K, cells = patches.shape
    p = math.isqrt(cells)
    return patches.reshape(*some, R, K, p, p).transpose(-3, -2).reshape(*some, R * p, K * p)    # (..., R, K, p, p) -> (..., R, p, K, p)


class Generator(nn.Module):
    """backbone: a Decoder of which `choose_trained` has said what is trained. words: {piece of the prompt: (n, C) embeddings}, none for the references.
    dtype: what the backbone computes in; connectors, final norm and velocity network are float32."""

    def __init__(self, backbone, words, patch_size=14, dtype=torch.float32, seed=0):
        super().__init__()
        C, p = backbone.config.hidden_size, patch_size
        self.backbone, self.p, self.dtype = backbone, p, dtype
        self.patch_connector = nn.Linear(p * p, C)
        self.parameter_connectors = nn.ModuleList(nn.Linear(1, C) for _ in range(6))
        self.index_connector = nn.Linear(1, C)
        self.output_connector = nn.Linear(C, 2 * p * p)
        self.tokens = nn.ParameterDict({name: nn.Parameter(torch.empty(1, C)) for name in (*TOKENS[1:], ROW_END, SLICE_END)})
        self.velocity = VelocityCNN()
        if not self.index_connector.weight.is_meta:
            init_connectors([self.patch_connector, *self.parameter_connectors, self.index_connector, self.output_connector], self.tokens.values(), seed)
        self.pieces = [piece for piece in GENERATION_PROMPT if piece not in GENERATION_WORDS or piece in words]
        for i, piece in enumerate(self.pieces):
            if piece in words:
                self.register_buffer(f"words{i}", words[piece], persistent=False)
        backbone.norm.register_forward_pre_hook(lambda norm, inputs: (inputs[0].float(),))      # so the final norm computes and returns float32

    def embed(self, slices, conditions):
        """Slices (B, S, X, Y) after their prompt with conditions (B, 7) -> (B, P + S L, C) float32 and the length P of the prompt."""
        B, S = slices.shape[:2]
        connectors = (*self.parameter_connectors, self.index_connector)
        numbers = torch.stack([connector(value) for connector, value in zip(connectors, conditions.T[..., None])], dim=1)       # 7 of (B, 1) -> (B, 7, C)
        fixed = [self.tokens[piece] if piece in TOKENS else getattr(self, f"words{i}", None) for i, piece in enumerate(self.pieces)]
        prompt = torch.cat([numbers if part is None else part.float().expand(B, -1, -1) for part in fixed], dim=1)              # (B, P, C)
        rows = self.patch_connector(patch(slices, self.p))                                      # (B, S, R, K, p*p) -> (B, S, R, K, C)
        rows = torch.cat((rows, self.tokens[ROW_END].expand(*rows.shape[:3], 1, -1)), dim=3)    # (B, S, R, K + 1, C)
        grid = torch.cat((rows.flatten(2, 3), self.tokens[SLICE_END].expand(B, S, 1, -1)), dim=2)                               # (B, S, L, C)
        return torch.cat((prompt, grid.flatten(1, 2)), dim=1), prompt.shape[1]

    def hidden(self, embeds, **context):
        """The backbone, in its dtype: embeds (B, T, C) -> final hidden states (B, T, C) float32. Trained float32 matrices are cast at each call."""
        cast = self.backbone.layers[0].mlp.up_proj.weight.dtype != self.dtype
        with torch.autocast(embeds.device.type, self.dtype) if cast else nullcontext():
            return self.backbone(embeds=embeds.to(self.dtype), **context)

    def head(self, hidden):
        """Hidden states (..., C) -> conditions of the velocity network (..., 2, p, p)."""
        return self.output_connector(hidden).unflatten(-1, (2, self.p, self.p))

    def patch_conditions(self, slices, conditions):
        """What the network knows before each patch of slices 3.., given the true slices before it: (B, S, X, Y), (B, 7) -> (B, S - 2, R*K, 2, p, p)."""
        _, S, X, Y = slices.shape
        embeds, P = self.embed(slices, conditions)
        hidden = self.hidden(embeds)
        R, K = X // self.p, Y // self.p
        s, r, k = torch.meshgrid(torch.arange(CONTEXT, S), torch.arange(R), torch.arange(K), indexing="ij")
        before = P + s * (R * (K + 1) + 1) + r * (K + 1) + k - 1                                # the token before each patch, be it a new line
        return self.head(hidden[:, before.flatten(1).to(hidden.device)])                        # (B, S - 2, R*K, C) -> (B, S - 2, R*K, 2, p, p)

    def forward(self, slices, conditions, noise=None, t=None):
        """Loss of flow matching, for each lightcone the mean over all patches of slices 3..: slices (B, S, X, Y) normalised, conditions (B, 7) -> (B,).

        noise (B, S - 2, R*K, p, p) and t (B, S - 2, R*K): drawn from torch's global generator unless given."""
        cond = self.patch_conditions(slices, conditions).flatten(0, 2)                          # (N, 2, p, p)
        x = patch(slices[:, CONTEXT:], self.p).reshape(-1, 1, self.p, self.p)                   # (B, S - 2, R, K, p*p) -> (N, 1, p, p)
        losses = cfm_loss(self.velocity, x, cond, None if noise is None else noise.reshape(x.shape), None if t is None else t.flatten())
        return losses.view(len(slices), -1).mean(1)                                             # (N,) -> (B, (S - 2)*R*K) -> (B,)

    def draw(self, data, keys):
        """What `forward` needs of the sublightcones `keys`, pairs (epoch, i), of a SubLightcones: slices (n, 12, X, Y), conditions (n, 7), noise (n, 10, R*K, p, p)
        and times (n, 10, R*K), on the CPU. Each depends on the split and its own key alone, not on the batch it is in."""
        drawn, p = [], self.p
        for key in keys:
            slices, conditions = data[key]
            patches = (len(slices) - CONTEXT, slices[0].numel() // p**2)
            generator = torch.Generator().manual_seed(int(np.random.SeedSequence([data.split == "train", *key]).generate_state(1)[0]))
            drawn.append((slices, conditions, torch.randn(*patches, p, p, generator=generator), torch.rand(patches, generator=generator)))
        return [torch.stack(column) for column in zip(*drawn)]

    @torch.no_grad()
    def generate(self, slices, conditions, n, bins, seeds, samples=1, window=12, slide=6, **solver):
        """Continue lightcones by n slices, patch after patch; yields each new slice, (B, samples, X, Y) normalised, as it is done.

        slices (B, S, X, Y): the context, normalised. conditions (B, 7): parameters and index of its first slice, (t - bins/2) / bins, bins = slices of the store.
        seeds: B integers; sample k of a lightcone draws its noise from (seed, k) on the CPU, so neither the other lightcones nor the device change it (rounding may).
        The context of a lightcone is encoded once for all its samples. The network has never seen more than `window` slices: when they are full, the last
        window - slide are encoded anew with the index of the first of them (cut out of the cache, they would still hold what they knew of the dropped ones).
        solver: method, steps, rtol, atol of flow.sample. Call it in eval mode. Raises ValueError for a slide that does not fit the window."""
        if not 1 <= slide <= window - CONTEXT:
            raise ValueError(f"a slide of {slide} slices does not fit a window of {window}: choose 1 to {window - CONTEXT}")
        B, S, X, Y = slices.shape
        draws = [torch.Generator().manual_seed(seed_of(int(seed), k)) for seed in seeds for k in range(samples)]
        R, K, p = X // self.p, Y // self.p, self.p
        first, held, cache = 0, slices, None                                                    # held: slices first.. of each row
        for s in range(S, S + n):
            if cache is None or s - first == window:
                drop = s - first - (window - slide) if s - first >= window else 0
                first, held = first + drop, held[:, drop:]
                pending, P = self.embed(held, conditions + conditions.new_tensor([0] * 6 + [first / bins]))
                cache = KVCache(self.backbone.config, len(held), P + window * (R * (K + 1) + 1), self.dtype, slices.device)
            noise = torch.stack([torch.randn(R * K, 1, p, p, generator=draw) for draw in draws]).to(slices)          # (B*samples, R*K, 1, p, p)
            new = []
            for i in range(R * K):
                hidden = self.hidden(pending, cache=cache, last_only=True)[:, 0]                # (B*samples, C), or (B, C) after the context
                if len(hidden) < len(draws):
                    hidden, held, conditions, cache.lengths = (v.repeat_interleave(samples, dim=0) for v in (hidden, held, conditions, cache.lengths))
                    cache.k, cache.v = (v.repeat_interleave(samples, dim=1) for v in (cache.k, cache.v))
                x, _ = sample(self.velocity, self.head(hidden), noise=noise[:, i], **solver)
                new.append(x.flatten(1))                                                        # (B*samples, p*p)
                ends = [self.tokens[ROW_END]] * ((i + 1) % K == 0) + [self.tokens[SLICE_END]] * (i + 1 == R * K)
                pending = torch.cat([self.patch_connector(new[-1])[:, None], *(end.expand(len(x), 1, -1) for end in ends)], dim=1)
            new = unpatch(torch.stack(new, dim=1).unflatten(1, (R, K)))                         # (B*samples, R*K, p*p) -> (B*samples, X, Y)
            held = torch.cat((held, new[:, None]), dim=1)
            yield new.unflatten(0, (B, samples))

    def trained(self):
        """{name: parameter} of all that is trained."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def groups(self):
        """Lists of names, updated one after the other on each batch: here all at once."""
        return [list(self.trained())]


def choose_trained(backbone, tune, rank, seed=0):
    """Says which parameters of the backbone are trained, in place. tune "full": all, "lora": adapters of this rank on all seven projections, alpha = 2 rank,
    without dropout, and all norms. Whatever is trained becomes float32, and the final norm starts at one. Raises ValueError for another tune or rank."""
    if tune not in ("full", "lora") or tune == "lora" and rank < 1:
        raise ValueError(f"--tune is full or lora, the latter with a --rank of at least 1; not {tune!r} with rank {rank}")
    if tune == "lora":
        inject(backbone, "all", rank, 2 * rank, 0.0, seed)
    for name, module in backbone.named_modules():
        if tune == "full" or isinstance(module, RMSNorm):
            for p in module.parameters(recurse=False):
                p.data = p.data.float()
                p.requires_grad_(True)
    nn.init.ones_(backbone.norm.weight)


def build_generator(settings, device="cpu", dtype=None):
    """The network of a run before training, in eval mode. settings: init, base, blocks, tune, rank, patch, seed, dropout, dtype.

    What is random depends on the seed and settings["dtype"] alone: it is drawn on the CPU, whatever the device. dtype: what the backbone computes in, default settings["dtype"].
    Raises ValueError for a base that cannot be loaded or does not know the words of the prompt."""
    # The velocity network is float32. By default a GPU rounds what its convolutions multiply to 10 bits, an error as large as the sampler's tolerance.
    torch.backends.cudnn.allow_tf32 = False
    init, tune, stored = settings["init"], settings["tune"], getattr(torch, settings["dtype"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(settings["seed"], 0))
        if init in GENERATION_REFERENCES:
            backbone, words, tune = Decoder(replace(GENERATION_REFERENCES[init], attention_dropout=settings["dropout"])), {}, "full"
            init_weights(backbone)
        else:
            ids = encode_words(settings["base"], GENERATION_WORDS)
            lm = load_pretrained(settings["base"], dtype=torch.float32 if tune == "full" else stored, random_init=init == "random", blocks=settings["blocks"],
                                 attention_dropout=settings["dropout"])
            backbone = lm.model
            words = {piece: backbone.embed_tokens.weight[rows].clone() for piece, rows in ids.items()}
            del lm, backbone.embed_tokens                                                       # frozen, and all that was needed of it are those rows
        fingerprint = None if tune == "full" else zlib.crc32(backbone.layers[-1].mlp.down_proj.weight.view(torch.uint8).numpy())
        if tune == "lora":
            backbone.to(dtype or stored)
        choose_trained(backbone, tune, settings["rank"], seed_of(settings["seed"], 2))
        generator = Generator(backbone, words, settings["patch"], dtype or stored, seed_of(settings["seed"], 1))
    generator.settings, generator.fingerprint = settings, fingerprint
    return generator.to(device).eval()


def load_generator(run_directory, device="cpu", dtype=None):
    """What train_l3m.py generate wrote -> Generator in eval mode. Raises ValueError as load_run does."""
    generator = load_run(run_directory, "generate", build_generator, device, dtype)
    for module in generator.backbone.modules():               # trained matrices are cast once and for all, not at each of thousands of calls
        if isinstance(module, nn.Linear):
            module.to(generator.dtype)
    return generator
