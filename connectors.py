"""Connectors: numbers into a language model and out again (L3M, arXiv:2506.14757).

The backbone is a `Decoder` of model.py.

Regression: the sky-averaged 21cm signal, 47 numbers, becomes 47 vectors of the backbone's hidden
size through one affine layer (the input connector) and is set into a prompt. The last vector of the
prompt is a trainable token, <|ska-param|>; its final hidden state goes through another affine layer
(the output connector) to the mean and the precision of a Gaussian over the six parameters. The
backbone stays frozen, pretrained or random; the reference networks are small backbones of the same
kind, trained from scratch.

    regressor = load_regressor("out/regress-pretrained-seed0")    # what train_l3m.py regress wrote
    mean, L = regressor(signals)              # (B, 47) normalised -> (B, 6) in [0, 1], (B, 6, 6)
    samples = sample_gaussian(mean, L, 50)    # (50, B, 6); the precision matrix is L L^T

Generation: slices of a lightcone become a row of patches, each a vector through one affine layer,
after a prompt that holds the six parameters and the index of the first slice. The final hidden
state before a patch, through another affine layer, conditions a small velocity network (flow.py),
which draws the patch. Here adapters (LoRA) and norms of the backbone, or all of it, are trained
with the connectors.

    generator = load_generator("out/generate-pretrained-seed0")   # what train_l3m.py generate wrote
    loss = generator(slices, conditions).mean()     # (B, 12, X, Y) normalised and (B, 7), as
                                                    # SubLightcones returns them
    for s in generator.generate(slices[:, :2], conditions, 100, bins=2350, seeds=range(B)):
        ...                                         # (B, 1, X, Y), slice after slice

Shapes: B lightcones, T tokens, hidden size C, 6 parameters; S slices of X x Y cells, R x K patches
of p x p cells each.
"""
import json
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open

from flow import VelocityCNN, cfm_loss, sample
from lora import inject
from model import (
    SHAPES,
    Config,
    Decoder,
    KVCache,
    RMSNorm,
    fingerprint,
    init_weights,
    load_pretrained,
    load_tokenizer,
    reading,
    to_device,
)

# ----------------------------------------------------------------------------------------- prompts

NUMBERS = "numbers"                      # stands for the vectors that the input connectors make
TOKENS = ("<|ska-param|>", "<|system-prompt-token|>", "<|lightcone-token|>")    # trainable vectors
# Words in ChatML. The system message is there and empty: without one, templates fill in theirs.
SYSTEM = "<|im_start|>system\n"
USER = "<|im_end|>\n<|im_start|>user\n"
ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"
PROMPTS = {
    "minimal": (NUMBERS, "<|ska-param|>"),
    "chat": (SYSTEM + USER, NUMBERS, ASSISTANT, "<|ska-param|>"),
    "chat-trainable": (SYSTEM, "<|system-prompt-token|>", USER, "<|lightcone-token|>", NUMBERS,
                       ASSISTANT, "<|ska-param|>"),
}
GENERATION_PROMPT = (SYSTEM, "<|system-prompt-token|>", USER, NUMBERS, ASSISTANT,
                     "<|lightcone-token|>")                           # and then slice after slice


def is_words(piece):
    return piece != NUMBERS and piece not in TOKENS


def encode_words(base, pieces):
    """The words among the pieces of a prompt -> {piece: ids (n,)}.

    Each is encoded alone by the tokenizer of `base`, nothing added. Raises ValueError if the base
    has no tokenizer or does not know the ChatML tokens."""
    words = [piece for piece in pieces if is_words(piece)]
    if not words:
        return {}
    instead = "to regress without words, use --prompt minimal"
    if base in SHAPES:
        raise ValueError(f"{base} is a shape without a tokenizer: a prompt with words needs a "
                         f"model directory or hub id as --base; {instead}")
    tokenizer = load_tokenizer(base, control_tokens=True)
    missing = [t for t in ("<|im_start|>", "<|im_end|>") if tokenizer.token_to_id(t) is None]
    if missing:
        raise ValueError(f"{base} does not know {' and '.join(missing)}, the words of a ChatML "
                         f"prompt: take a base such as Qwen/Qwen2.5-0.5B-Instruct; {instead}")
    return {piece: torch.tensor(tokenizer.encode(piece, add_special_tokens=False).ids)
            for piece in words}


def place_prompt(network, pieces, words, others=()):
    """Give `network` the prompt `pieces`: its words (n, C), a vector for each trainable token,
    among which are `others` that stand behind the prompt."""
    C = network.backbone.config.hidden_size
    network.pieces = pieces
    names = [piece for piece in pieces if piece in TOKENS] + [*others]
    network.tokens = nn.ParameterDict({name: nn.Parameter(torch.empty(1, C)) for name in names})
    for i, piece in enumerate(pieces):
        if is_words(piece):
            network.register_buffer(f"words{i}", words[piece], persistent=False)


def embed_prompt(network, numbers):
    """The prompt with `numbers` (B, N, C) in their place -> (B, P, C) float32."""
    parts = []
    for i, piece in enumerate(network.pieces):
        if piece == NUMBERS:
            parts.append(numbers)
            continue
        vectors = network.tokens[piece] if piece in TOKENS else network.get_buffer(f"words{i}")
        parts.append(vectors.float().expand(len(numbers), -1, -1))    # (n, C) -> (B, n, C)
    return torch.cat(parts, dim=1)


class Prefix:
    """Keys and values of the frozen words that begin a prompt: a `cache` for Decoder.forward.

    They are computed once and shared by all rows. Unlike a KVCache it stores nothing: gradients
    pass through the new keys and values. k, v: (blocks, 1, G, P, D)."""

    def __init__(self, k, v):
        self.k = k
        self.v = v
        self.lengths = torch.full((1,), k.shape[3], device=k.device)

    def update(self, layer, k, v):
        """k, v (B, G, T, D) -> all keys, all values (B, G, P + T, D), and the mask
        (1, 1, T, P + T) of what each token may see."""
        B, _, T, _ = k.shape
        P = self.k.shape[3]
        k = torch.cat((self.k[layer].expand(B, -1, -1, -1), k), dim=2)
        v = torch.cat((self.v[layer].expand(B, -1, -1, -1), v), dim=2)
        return k, v, torch.ones(T, P + T, dtype=torch.bool, device=k.device).tril(P)[None, None]

    def grow(self, T):
        pass


# ------------------------------------------------------------------------------------ the Gaussian


def gaussian_head(raw):
    """Raw outputs (B, 27) -> mean (B, 6) in [0, 1] and L (B, 6, 6), lower triangular, of the
    precision matrix L L^T.

    L_ij = 2/sqrt(i) raw_ij with softplus on the diagonal, i = 1..6. Row i of L L^T sums i squares:
    without the factor the last parameter would start with a sixfold precision (arXiv:2506.14757,
    section on regression)."""
    lower = raw.new_zeros(len(raw), 6, 6)
    row, column = torch.tril_indices(6, 6, device=raw.device)
    lower[:, row, column] = raw[:, 6:]                                # (B, 21) -> (B, 6, 6)
    diagonal = F.softplus(lower.diagonal(dim1=1, dim2=2))
    L = lower.tril(-1) + torch.diag_embed(diagonal)
    scale = 2 / torch.arange(1, 7, device=raw.device).sqrt()
    return raw[:, :6].sigmoid(), L * scale[:, None]


def whiten(mean, L, y):
    """L^T (y - mean), (B, 6): standard normal where the Gaussian is right."""
    return torch.einsum("bij,bi->bj", L, y - mean)


def gaussian_nll(mean, L, y):
    """[1/2 (mu - y)^T L L^T (mu - y) - log det L] / 6, (B,): the negative log-likelihood a
    parameter, without its constant log(2 pi)/2."""
    log_det = L.diagonal(dim1=1, dim2=2).log().sum(-1)
    return (whiten(mean, L, y).square().sum(-1) / 2 - log_det) / 6


def sample_gaussian(mean, L, n, generator=None):
    """-> (n, B, 6) draws, not clamped to the prior. generator: a CPU one.

    Their covariance is (L L^T)^-1 = L^-T L^-1."""
    e = torch.randn(len(mean), 6, n, generator=generator).to(mean)
    draws = torch.linalg.solve_triangular(L.mT, e, upper=True)        # (B, 6, n)
    return mean + draws.permute(2, 0, 1)


def standard_deviation(L):
    """(B, 6): of each parameter, the others integrated out: the square roots of the diagonal of
    (L L^T)^-1."""
    one = torch.eye(6, device=L.device).expand_as(L)
    return torch.linalg.solve_triangular(L, one, upper=False).square().sum(1).sqrt()


def coverage(mean, L, y, levels):
    """Fraction of truths y (B, 6) in the central interval of each level, for each parameter:
    (levels, 6). Calibrated: equal to the level."""
    levels = torch.as_tensor(levels, dtype=mean.dtype, device=mean.device)
    pull = (y - mean).abs() / standard_deviation(L)
    limits = math.sqrt(2) * torch.erfinv(levels)
    return (pull < limits[:, None, None]).float().mean(1)             # (levels, B, 6)


def joint_coverage(mean, L, y, levels):
    """Fraction of truths in the ellipsoid of each level, all six parameters at once: (levels,).

    The squared Mahalanobis distance x is chi^2 with 6 degrees of freedom:
    P(<x) = 1 - exp(-x/2) (1 + x/2 + x^2/8)."""
    levels = torch.as_tensor(levels, dtype=mean.dtype, device=mean.device)
    half = whiten(mean, L, y).square().sum(-1) / 2
    inside = 1 - torch.exp(-half) * (1 + half + half.square() / 2)
    return (inside[:, None] < levels).float().mean(0)


# --------------------------------------------------------------------- backbones, and what is drawn

INITS = ("pretrained", "random", "small", "large")
REFERENCES = {      # regression: networks of the connectors' size and 30 times it, from scratch
    "small": Config("qwen2", 0, 32, 64, 3, 2, 2, 16, 1e-6, 10000.0),
    "large": Config("qwen2", 0, 128, 256, 6, 4, 4, 32, 1e-6, 10000.0),
}
GENERATION_REFERENCES = {      # networks of the size of LoRA r = 2 and r = 8, from scratch
    "small": Config("qwen2", 0, 128, 424, 7, 4, 4, 32, 1e-6, 10000.0),
    "large": Config("qwen2", 0, 256, 560, 7, 4, 4, 64, 1e-6, 10000.0),
}


def seed_of(seed, what):
    """A seed of its own for each use: equal draws in two places would be a correlation."""
    return int(np.random.SeedSequence([seed, what]).generate_state(1)[0])


def init_connectors(layers, tokens, seed):
    """Affine layers N(0, 0.02) with zero bias, tokens N(0, 1), drawn on the CPU."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(0.02 * torch.randn(layer.weight.shape, generator=draw))
            layer.bias.zero_()
        for token in tokens:
            token.copy_(torch.randn(token.shape, generator=draw))


def trained_parameters(network):
    """{name: parameter} of all that is trained."""
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def build_backbone(settings, references, pieces, dtype=None):
    """The backbone of a run before training, on the CPU -> Decoder, {words of the prompt: (n, C)},
    fingerprint of the base.

    A reference is float32 and has neither words nor base. Its start may be "wide" (ours): matrices
    N(0, 1/C) keep the size of what they map from C numbers, where the paper's N(0, 0.02^2) let it
    fade in seven blocks, and it learns sooner to look back. A language model is loaded, or drawn
    from torch's global generator, in settings["dtype"] (float32 where all of it is trained) and
    cast to `dtype` where that is given: what is random does not depend on it."""
    init = settings["init"]
    if init in references:
        backbone = Decoder(replace(references[init], attention_dropout=settings["dropout"]))
        wide = settings.get("start") == "wide"
        init_weights(backbone, backbone.config.hidden_size**-0.5 if wide else 0.02)
        return backbone, {}, None
    ids = encode_words(settings["base"], pieces)
    stored = getattr(torch, settings["dtype"])
    if settings.get("tune") == "full":
        stored = dtype = torch.float32
    lm = load_pretrained(settings["base"], dtype=stored, random_init=init == "random",
                         blocks=settings["blocks"], attention_dropout=settings["dropout"])
    base = fingerprint(lm)
    backbone = lm.model
    words = {piece: backbone.embed_tokens.weight[rows].clone() for piece, rows in ids.items()}
    del lm, backbone.embed_tokens                     # all that was needed of it are those rows
    backbone.norm.weight.fill_(1.0)
    return backbone.to(dtype), words, base            # None: as it is


# ----------------------------------------------------------------------------------- the regressor


class Regressor(nn.Module):
    """backbone: a Decoder, frozen, or to be trained if its parameters require a gradient.
    words: {piece of the prompt: (n, C) embeddings}."""
    trained = trained_parameters

    def __init__(self, backbone, prompt, words, causal=True, seed=0):
        super().__init__()
        C = backbone.config.hidden_size
        self.backbone = backbone
        self.causal = causal
        self.dtype = backbone.layers[0].self_attn.q_proj.weight.dtype
        self.input_connector = nn.Linear(1, C)
        self.output_connector = nn.Linear(C, 6 + 21)
        pieces = PROMPTS[prompt]
        self.prefix_length = 0
        if is_words(pieces[0]):
            self.run_prefix(words[pieces[0]])
            pieces = pieces[1:]
        place_prompt(self, pieces, words)
        if not self.input_connector.weight.is_meta:
            connectors = [self.input_connector, self.output_connector]
            init_connectors(connectors, self.tokens.values(), seed)

    @torch.no_grad()
    def run_prefix(self, embeds):
        """Keep the keys and values of the words (P, C) that nothing trainable precedes. They have
        no attention dropout, in training neither."""
        self.prefix_length = len(embeds)
        cache = KVCache(self.backbone.config, 1, len(embeds), self.dtype, embeds.device)
        training = self.backbone.training
        self.backbone.eval()(embeds=embeds[None].to(self.dtype), cache=cache)
        self.backbone.train(training)
        self.register_buffer("prefix_k", cache.k, persistent=False)
        self.register_buffer("prefix_v", cache.v, persistent=False)

    def hidden(self, signals):
        """(B, 47) float32, normalised -> (B, C) float32: the final state of <|ska-param|>."""
        numbers = self.input_connector(signals[..., None])            # (B, 47) -> (B, 47, C)
        embeds = embed_prompt(self, numbers).to(self.dtype)           # (B, T, C)
        cache = Prefix(self.prefix_k, self.prefix_v) if self.prefix_length else None
        states = self.backbone(embeds=embeds, cache=cache, causal=self.causal, last_only=True)
        return states[:, 0].float()

    def head(self, hidden):
        """(B, C) -> mean (B, 6), L (B, 6, 6)."""
        return gaussian_head(self.output_connector(hidden))

    def forward(self, signals):
        """(B, 47) float32, normalised -> mean (B, 6) in [0, 1], L (B, 6, 6), precision L L^T."""
        return self.head(self.hidden(signals))


def build_regressor(settings, device="cpu", dtype=None):
    """The network of a run before training, in eval mode.

    settings: init, base, blocks, prompt, seed, dropout, causal, dtype. A random backbone depends on
    the seed and settings["dtype"] alone: it is drawn on the CPU, whatever the device, and then
    cast. dtype: of the frozen backbone, default settings["dtype"]. References are float32. Raises
    ValueError for a base that cannot be loaded or does not know the words of the prompt."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(settings["seed"], 0))
        prompt = settings["prompt"]
        backbone, words, base = build_backbone(settings, REFERENCES, PROMPTS[prompt], dtype)
        seed = seed_of(settings["seed"], 1)
        regressor = Regressor(backbone, prompt, words, settings["causal"], seed)
    regressor.settings = settings
    regressor.fingerprint = base
    return regressor.to(device).eval()


# ----------------------------------------------------------------------------------- the generator
# The sequence: the prompt, then slice after slice its patches, row by row, with a new-line token
# after each row of patches and another kind after each slice: R (K + 1) + 1 tokens a slice.

ROW_END = "<|row-newline-token|>"
SLICE_END = "<|slice-newline-token|>"
GENERATION_WORDS = tuple(piece for piece in GENERATION_PROMPT if is_words(piece))
WINDOW = 12                                # slices of a sublightcone: no more are seen at once
GIVEN = 2                                  # its first slices, which are never scored


def patch(slices, p):
    """(..., X, Y) -> (..., R, K, p*p), row by row. Raises ValueError where p does not divide."""
    *some, X, Y = slices.shape
    if X % p or Y % p:
        raise ValueError(f"patches of {p} x {p} do not divide slices of {X} x {Y}: choose a patch "
                         "size that divides both sides")
    blocks = slices.reshape(*some, X // p, p, Y // p, p)              # (..., R, p, K, p)
    return blocks.transpose(-3, -2).flatten(-2)


def unpatch(patches):
    """(..., R, K, p*p) -> (..., X, Y): the inverse of `patch`."""
    *some, R, K, cells = patches.shape
    p = math.isqrt(cells)
    blocks = patches.reshape(*some, R, K, p, p).transpose(-3, -2)     # (..., R, p, K, p)
    return blocks.reshape(*some, R * p, K * p)


class Generator(nn.Module):
    """backbone: a Decoder of which `choose_trained` has said what is trained. words: {piece of the
    prompt: (n, C) embeddings}, none for the references. dtype: what the backbone computes in;
    connectors, final norm and velocity network are float32. velocity: width and inner width of that
    network, where they are not the paper's; velocity_dtype: what it is trained in. carry (not the
    paper's): the same patch of the slice before is added to the first channel of the condition, so
    that the backbone need only say what changes."""
    trained = trained_parameters

    def __init__(self, backbone, words, patch_size=14, dtype=torch.float32, seed=0, velocity=(),
                 velocity_dtype=torch.float32, carry=False):
        super().__init__()
        C = backbone.config.hidden_size
        p = patch_size
        self.backbone = backbone
        self.p = p
        self.dtype = dtype
        self.patch_connector = nn.Linear(p * p, C)
        self.parameter_connectors = nn.ModuleList(nn.Linear(1, C) for _ in range(6))
        self.index_connector = nn.Linear(1, C)
        self.output_connector = nn.Linear(C, 2 * p * p)
        pieces = [piece for piece in GENERATION_PROMPT if piece in words or not is_words(piece)]
        place_prompt(self, pieces, words, (ROW_END, SLICE_END))
        self.velocity = VelocityCNN(2, *velocity)
        self.velocity_dtype = velocity_dtype
        self.carry = carry
        if not self.index_connector.weight.is_meta:
            connectors = [self.patch_connector, *self.parameter_connectors, self.index_connector,
                          self.output_connector]
            init_connectors(connectors, self.tokens.values(), seed)
        # so that the final norm computes and returns float32
        backbone.norm.register_forward_pre_hook(lambda norm, inputs: (inputs[0].float(),))

    def embed(self, slices, conditions):
        """Slices (B, S, X, Y) after their prompt with conditions (B, 7) -> (B, T, C) float32, and
        the length of the prompt."""
        B, S = slices.shape[:2]
        connectors = (*self.parameter_connectors, self.index_connector)
        numbers = [connector(conditions[:, i, None]) for i, connector in enumerate(connectors)]
        prompt = embed_prompt(self, torch.stack(numbers, dim=1))      # 7 of (B, C) -> (B, P, C)
        rows = self.patch_connector(patch(slices, self.p))            # (B, S, R, K, C)
        row_ends = self.tokens[ROW_END].expand(*rows.shape[:3], 1, -1)
        slice_ends = self.tokens[SLICE_END].expand(B, S, 1, -1)
        rows = torch.cat((rows, row_ends), dim=3).flatten(2, 3)       # (B, S, R*(K + 1), C)
        grid = torch.cat((rows, slice_ends), dim=2).flatten(1, 2)
        return torch.cat((prompt, grid), dim=1), prompt.shape[1]

    def hidden(self, embeds, **context):
        """The backbone, in its dtype: embeds (B, T, C) -> final hidden states (B, T, C) float32.
        Trained float32 matrices are cast at each call."""
        cast = self.backbone.layers[0].mlp.up_proj.weight.dtype != self.dtype
        with torch.autocast(embeds.device.type, self.dtype) if cast else nullcontext():
            return self.backbone(embeds=embeds.to(self.dtype), **context)

    def head(self, hidden, before):
        """Hidden states (..., C), the same patches of the slice before (..., p*p) -> conditions of
        the velocity network (..., 2, p, p)."""
        cond = self.output_connector(hidden)
        if self.carry:
            cond = cond + F.pad(before, (0, self.p**2))
        return cond.unflatten(-1, (2, self.p, self.p))

    def grid(self, slices):
        """R and K of slices (..., X, Y), and how many tokens each takes."""
        R = slices.shape[-2] // self.p
        K = slices.shape[-1] // self.p
        return R, K, R * (K + 1) + 1

    def patch_conditions(self, slices, conditions):
        """What the network knows before each patch of slices 3.., given the true slices before it:
        (B, S, X, Y), (B, 7) -> (B, S - 2, R*K, 2, p, p)."""
        embeds, P = self.embed(slices, conditions)
        hidden = self.hidden(embeds)
        R, K, per_slice = self.grid(slices)
        s = torch.arange(GIVEN, slices.shape[1])[:, None, None]
        r = torch.arange(R)[:, None]
        at = P + s * per_slice + r * (K + 1) + torch.arange(K) - 1    # before it: be it a new line
        before = patch(slices[:, GIVEN - 1:-1], self.p).flatten(2, 3)     # (B, S - 2, R*K, p*p)
        return self.head(hidden[:, to_device(at.flatten(1), hidden.device)], before)

    def forward(self, slices, conditions, noise=None, t=None):
        """Loss of flow matching, for each lightcone the mean over all patches of slices 3..:
        slices (B, S, X, Y) normalised, conditions (B, 7) -> (B,).

        noise (B, S - 2, R*K, p, p) and t (B, S - 2, R*K): drawn from torch's global generator
        unless given."""
        cond = self.patch_conditions(slices, conditions).flatten(0, 2)    # (N, 2, p, p)
        x = patch(slices[:, GIVEN:], self.p).reshape(-1, 1, self.p, self.p)
        noise = None if noise is None else noise.reshape(x.shape)
        t = None if t is None else t.flatten()
        low = self.training and self.velocity_dtype != torch.float32
        with torch.autocast(x.device.type, self.velocity_dtype) if low else nullcontext():
            losses = cfm_loss(self.velocity, x, cond, noise, t)
        return losses.view(len(slices), -1).mean(1)                   # (B*(S - 2)*R*K,) -> (B,)

    def draw(self, data, keys):
        """What `forward` needs of the sublightcones `keys`, pairs (epoch, i), of a SubLightcones:
        slices (n, 12, X, Y), conditions (n, 7), noise (n, 10, R*K, p, p) and times (n, 10, R*K),
        on the CPU. Each depends on the split and its own key alone, not on its batch."""
        drawn = []
        for key in keys:
            slices, conditions = data[key]
            seed = np.random.SeedSequence([data.split == "train", *key]).generate_state(1)[0]
            generator = torch.Generator().manual_seed(int(seed))
            patches = (len(slices) - GIVEN, slices[0].numel() // self.p**2)
            noise = torch.randn(*patches, self.p, self.p, generator=generator)
            drawn.append((slices, conditions, noise, torch.rand(patches, generator=generator)))
        return [torch.stack(column) for column in zip(*drawn)]

    @torch.no_grad()
    def generate(self, slices, conditions, n, bins, seeds, samples=1, slide=6, **solver):
        """Continue lightcones by n slices, patch after patch; yields each new slice,
        (B, samples, X, Y) normalised, as it is done.

        slices (B, S, X, Y): the context, normalised. conditions (B, 7): parameters and index of its
        first slice, (t - bins/2) / bins, bins = slices of the store's lightcones. seeds: B
        integers; sample k of a lightcone draws its noise from (seed, k) on the CPU, so neither the
        other lightcones nor the device change it (rounding may). The network has never seen more
        than WINDOW slices: when they are full, the last WINDOW - slide are encoded anew with the
        index of the first of them (cut out of the cache, they would still hold what they knew of
        the dropped ones). solver: method, steps, rtol, atol of flow.sample. Call it in eval mode.
        Raises ValueError for a slide that does not fit the window."""
        if not 1 <= slide <= WINDOW - GIVEN:
            raise ValueError(f"a slide of {slide} slices does not fit a window of {WINDOW}: choose "
                             f"1 to {WINDOW - GIVEN}")
        B, S = slices.shape[:2]
        R, K, _ = self.grid(slices)
        draws = [torch.Generator().manual_seed(seed_of(int(seed), k))
                 for seed in seeds for k in range(samples)]
        copies = samples                                # of each row that is held
        held = slices                                   # the last slices, of each row
        cache = None
        pending = None                                  # vectors that nothing has read yet
        for s in range(S, S + n):
            if pending is not None and held.shape[1] < WINDOW:
                hidden = self.hidden(pending, cache=cache, last_only=True)
            else:
                if held.shape[1] >= WINDOW:
                    held = held[:, slide - WINDOW:]
                index = conditions.new_tensor([0] * 6 + [(s - held.shape[1]) / bins])
                hidden, cache = self.encode_context(held, conditions + index, copies)
                held = held.repeat_interleave(copies, dim=0)
                conditions = conditions.repeat_interleave(copies, dim=0)
                copies = 1
            noise = [torch.randn(R, K, 1, self.p, self.p, generator=draw) for draw in draws]
            noise = torch.stack(noise, dim=2).to(slices)              # (R, K, B*samples, 1, p, p)
            new, pending = self.draw_slice(hidden[:, 0], cache, held[:, -1], noise, solver)
            held = torch.cat((held, new[:, None]), dim=1)
            yield new.unflatten(0, (B, samples))

    def encode_context(self, held, conditions, copies):
        """Read the prompt and the slices held (B, S, X, Y), each lightcone once -> final hidden
        state (B*copies, 1, C), and a cache with room for WINDOW slices, of `copies` rows for each
        lightcone."""
        embeds, P = self.embed(held, conditions)
        size = P + WINDOW * self.grid(held)[2]
        cache = KVCache(self.backbone.config, len(held), size, self.dtype, held.device)
        hidden = self.hidden(embeds, cache=cache, last_only=True)
        if copies > 1:
            cache.k = cache.k.repeat_interleave(copies, dim=1)        # (blocks, rows, G, size, D)
            cache.v = cache.v.repeat_interleave(copies, dim=1)
            cache.lengths = cache.lengths.repeat_interleave(copies)
        return hidden.repeat_interleave(copies, dim=0), cache

    def draw_slice(self, hidden, cache, before, noise, solver):
        """Draw a slice, each patch after those before it: hidden (N, C), the state before the first
        one, `before` (N, X, Y), the slice before, noise (R, K, N, 1, p, p) -> slice (N, X, Y), and
        its last vectors (N, n, C), which nothing has read yet."""
        rows = []
        pending = None
        before = patch(before, self.p).movedim(0, 2)                  # (R, K, N, p*p)
        for row_before, row_noise in zip(before, noise):
            row = []
            for b, e in zip(row_before, row_noise):
                if pending is not None:
                    hidden = self.hidden(pending, cache=cache, last_only=True)[:, 0]
                x, _ = sample(self.velocity, self.head(hidden, b), noise=e, **solver)
                row.append(x.flatten(1))                              # (N, p*p)
                pending = self.patch_connector(row[-1])[:, None]
            rows.append(torch.stack(row, dim=1))                      # (N, K, p*p)
            pending = torch.cat((pending, self.tokens[ROW_END].expand(len(x), 1, -1)), dim=1)
        pending = torch.cat((pending, self.tokens[SLICE_END].expand(len(x), 1, -1)), dim=1)
        return unpatch(torch.stack(rows, dim=1)), pending


def choose_trained(backbone, tune, rank, seed=0):
    """Says which parameters of the backbone are trained, in place.

    tune "full": all, "lora": adapters of this rank on all seven projections, alpha = 2 rank,
    without dropout, and all norms. Whatever is trained becomes float32, and the final norm starts
    at one. Raises ValueError for another tune or rank."""
    if tune not in ("full", "lora") or (tune == "lora" and not rank):
        raise ValueError("--tune is full or lora, the latter with a --rank of at least 1; not "
                         f"{tune!r} with rank {rank}")
    if tune == "lora":
        inject(backbone, "all", rank, 2 * rank, 0.0, seed)
    for module in backbone.modules():
        if tune == "full" or isinstance(module, RMSNorm):
            for p in module.parameters(recurse=False):
                p.data = p.data.float()
                p.requires_grad_(True)
    nn.init.ones_(backbone.norm.weight)


def build_generator(settings, device="cpu", dtype=None):
    """The network of a run before training, in eval mode.

    settings: init, base, blocks, tune, rank, patch, seed, dropout, dtype; perhaps velocity, a width
    and an inner width, velocity_dtype, carry, and start: "wide" or "paper". What is random depends
    on the seed and settings["dtype"] alone: it is drawn on the CPU, whatever the device. dtype:
    what the backbone computes in, default settings["dtype"]. Raises ValueError for a base that
    cannot be loaded or does not know the words of the prompt."""
    # The velocity network is float32. By default a GPU rounds what its convolutions multiply to 10
    # bits, an error as large as the sampler's tolerance.
    torch.backends.cudnn.allow_tf32 = False
    seed = settings["seed"]
    computed = dtype or getattr(torch, settings["dtype"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, 0))
        backbone, words, base = build_backbone(settings, GENERATION_REFERENCES, GENERATION_WORDS,
                                               dtype)
        choose_trained(backbone, settings["tune"], settings["rank"], seed_of(seed, 2))
        trained_in = getattr(torch, settings.get("velocity_dtype", "float32"))
        generator = Generator(backbone, words, settings["patch"], computed, seed_of(seed, 1),
                              settings.get("velocity", ()), trained_in,
                              settings.get("carry", False))
    generator.settings = settings
    generator.fingerprint = base
    return generator.to(device).eval()


# ----------------------------------------------------------------------- what train_l3m.py has made


def load_run(directory, experiment, build, settings, device, dtype):
    """A directory that train_l3m.py `experiment` wrote -> build(settings, device, dtype) with the
    weights of the best validation; its settings: `.settings`.

    settings: of the run, where they have been read; else they are read from its config.json. Raises
    ValueError if the directory holds no such run, none that has been validated yet, damaged
    weights, or if base and weights do not fit each other."""
    directory = Path(directory)
    weights = directory / "model.safetensors"
    with reading(directory / "config.json", "put back what it names, or give another run") as path:
        settings = settings or json.loads(path.read_text())["settings"]
        if settings["experiment"] != experiment:
            raise ValueError(f"is of train_l3m.py {settings['experiment']}, not of {experiment}")
        if not weights.exists():
            raise ValueError(f"there is no {weights.name} yet: go on with --resume")
        dtypes = ("bfloat16", "float32")
        choices = {"init": INITS, "causal": (True, False), "dtype": dtypes,
                   "velocity_dtype": dtypes, "start": (None, "wide", "paper"),
                   "carry": (True, False)}
        for name in choices.keys() & settings.keys():
            if settings[name] not in choices[name]:
                raise ValueError(f"{name} {settings[name]!r} is none of {choices[name]}")
        if not 0 <= (settings["blocks"] or 0) < 10**4:
            raise ValueError(f"blocks {settings['blocks']} is no number of blocks")
        network = build(settings, "cpu", dtype)
    network.to(device)
    named = trained_parameters(network)
    with reading(weights, "train it again, or give another run") as path, \
            safe_open(path, framework="pt") as file:
        state = json.loads((file.metadata() or {}).get("state", "{}"))
        if state.get("fingerprint", network.fingerprint) != network.fingerprint:
            raise ValueError(f"was trained with another backbone than {settings['base']} now "
                             "gives: its files, or torch's random numbers, have changed")
        tensors = {name: file.get_tensor(name) for name in file.keys()}          # noqa: SIM118
        for name in sorted(tensors.keys() | named.keys()):
            shape = tuple(tensors[name].shape) if name in tensors else "missing"
            expected = tuple(named[name].shape) if name in named else "none"
            if shape != expected:
                size = network.backbone.config.hidden_size
                raise ValueError(f"does not fit its backbone (hidden size {size}): {name} is "
                                 f"{shape}, expected {expected}")
            if not tensors[name].isfinite().all():
                raise ValueError(f"{name} holds NaN or infinity: the network has diverged")
    with torch.no_grad():
        for name, p in named.items():
            p.copy_(tensors[name])
    return network


def load_regressor(run_directory, device="cpu", dtype=None, settings=None):
    """What train_l3m.py regress wrote -> Regressor in eval mode. Raises ValueError as load_run."""
    return load_run(run_directory, "regress", build_regressor, settings, device, dtype)


def load_generator(run_directory, device="cpu", dtype=None, settings=None):
    """What train_l3m.py generate wrote -> Generator in eval mode. Raises ValueError as load_run."""
    generator = load_run(run_directory, "generate", build_generator, settings, device, dtype)
    for module in generator.backbone.modules():       # trained matrices are cast once and for all,
        if isinstance(module, nn.Linear):             # not at each of thousands of calls
            module.to(generator.dtype)
    return generator
