"""Speed and memory of train_l3m.py against the same mathematics written plainly with transformers' Qwen2Model, peft, torchdiffeq and torch's AdamW.

    python tests/bench_l3m.py regress                                                # two CPU cores: six blocks of SmolLM2's shape, batch 64
    python tests/bench_l3m.py regress --shape qwen2.5-0.5b --blocks 24 --batch 1024 --device cuda --steps 8
    python tests/bench_l3m.py training                                               # eight blocks, LoRA r = 2, 28 x 28 slices, batch 16
    python tests/bench_l3m.py training --shape small                                 # the reference; also: large
    python tests/bench_l3m.py training --shape qwen2.5-0.5b --blocks 24 --sky 140 --batch 64 --micro-batch 2 --device cuda
    python tests/bench_l3m.py generation --run out/generate-random-seed0             # the weights of a run; without --run random ones

Both sides have the same weights, data and noise; the losses, or the generated slices, must agree.
regress: connectors to a frozen random backbone with the chat prompt, two updates a batch
- naive: all gradients on, two whole passes forward and backward a batch
- careful: gradients only where something is trained or lies on the way to it, none through the backbone in the second update
training: a step of the generator (forward, backward, clipping, AdamW). plain: Qwen2Model under autocast with peft's adapters, convolutions as torch has them
generation: slices after 2 of context, one slide of the window. plain: Qwen2Model with transformers' DynamicCache, each sample a row of its own; torchdiffeq's dopri5 on
the whole batch, the condition among the network's inputs at each evaluation. plain, no cache: the whole sequence anew for each patch
- ours: the code of train_l3m.py and connectors.py as it is; ours, checkpointed: with --checkpoint-activations
Each measurement is a process of its own, in turn, --rounds times; the medians are over all steps but the first of each. Seconds are of CPU time in one thread on a
CPU (so a busy machine matters less), of the clock on a GPU. Memory is the peak of the process on a CPU, also less what it had before the model, and of the allocator
on a GPU."""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
VARIANTS = {"regress": ("naive", "careful", "ours", "ours, checkpointed"), "training": ("plain", "ours", "ours, checkpointed"), "generation": ("plain, no cache", "plain", "ours")}
BATCH, BLOCKS = {"regress": 64, "training": 16, "generation": 4}, {"regress": 6, "training": 8, "generation": 8}


def stopwatch(device):
    """A function that notes the time, and the list of what it noted."""
    import torch
    times = []
    def clock():
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() if device == "cuda" else time.process_time())
    return clock, times


def fitted(groups, optimizer, data, losses, clip, micro_batch, clock):
    """The updates of train_l3m.py on the batches `data`, of each of the `groups` of parameters in turn -> losses of the first, step by step.

    losses(i, micro_batches) yields those of group i. clock() is called before each step and at the end."""
    from train_l3m import update
    found = []
    for batch in data:
        clock()
        parts = list(zip(*(t.split(micro_batch or len(t)) for t in batch)))
        values = [update(group, optimizer, losses(i, parts), clip)[0] for i, group in enumerate(groups)]
        found.append(values[0])
    clock()
    return found


def flags(o, experiment, *more):
    return [experiment, "--batch-size", str(o.batch), "--dropout", "0", "--epochs", "1000", "--max-steps", str(o.steps + 1), "--log-every", "1", "--warmup", "0", "--decay", "0",
            "--dtype", o.dtype, *(["--micro-batch", str(o.micro_batch)] if o.micro_batch else []), *more]


def words_without_tokenizer(pieces):
    """A shape has no tokenizer: made-up ids, as many as SmolLM2's makes."""
    import torch
    import connectors
    ids = {piece: torch.arange(10 * i + 1, 10 * i + 1 + n) for i, (piece, n) in enumerate(pieces)}
    connectors.encode_words = lambda base, pieces: ids
    return ids


def transformers_backbone(config, weights, dtype):
    """Qwen2Model of our Config with our weights; a Llama's biases, which it lacks, are zero."""
    import torch
    from transformers import Qwen2Config, Qwen2Model
    c = config
    with torch.device("meta"):
        peer = Qwen2Model(Qwen2Config(vocab_size=max(c.vocab_size, 1), hidden_size=c.hidden_size, intermediate_size=c.intermediate_size, num_hidden_layers=c.num_hidden_layers,
                                      num_attention_heads=c.num_attention_heads, num_key_value_heads=c.num_key_value_heads, head_dim=c.head_dim,
                                      rms_norm_eps=c.rms_norm_eps, rope_theta=c.rope_theta, use_cache=False))
    weights = {name: t.detach().clone() for name, t in weights.items()}
    weights |= {name: torch.zeros(p.shape, dtype=dtype) for name, p in peer.named_parameters() if name not in weights}
    peer.load_state_dict(weights, assign=True)
    peer.rotary_emb = type(peer.rotary_emb)(peer.config)
    return peer


# --------------------------------------------------------------------------------------------------------- regression


def measure_regress(variant, o):
    """-> seconds of each step, losses, peak memory and memory before the model, GB. Runs in a process of its own."""
    import train_l3m
    import torch
    import connectors
    from connectors import NUMBERS, PROMPTS, gaussian_head, gaussian_nll, init_connectors, is_words, seed_of
    from model import load_pretrained
    device, dtype = torch.device(o.device), getattr(torch, o.dtype)
    ids = words_without_tokenizer(zip((p for p in PROMPTS["chat"] if is_words(p)), (8, 6)))
    args = train_l3m.arguments(flags(o, "regress", "--init", "random", "--base", o.shape, "--prompt", "chat", "--lr", "1e-3", "--blocks", str(o.blocks)))
    settings = train_l3m.run_settings(args, 0, device)
    draw = torch.Generator().manual_seed(0)
    data = [(torch.randn(o.batch, 47, generator=draw).to(device), torch.rand(o.batch, 6, generator=draw).to(device)) for _ in range(o.steps + 1)]
    before, (clock, times) = train_l3m.peak_memory_gb(device), stopwatch(o.device)

    if variant.startswith("ours"):
        regressor = connectors.build_regressor(settings, device)
        regressor.backbone.checkpoint_activations = "checkpointed" in variant
        named = regressor.train().trained()
        optimizer = torch.optim.AdamW(named.values(), lr=args.lr, betas=(0.9, 0.999), weight_decay=0.0)
        groups = [[p for name, p in named.items() if name.startswith("output_connector.") == reads] for reads in (False, True)]

        def nll(group, micro_batches):
            for signals, truth in micro_batches:
                with torch.set_grad_enabled(group == 0):
                    hidden = regressor.hidden(signals)
                yield gaussian_nll(*regressor.head(hidden), truth)

        losses = fitted(groups, optimizer, data, nll, train_l3m.CLIP["regress"], o.micro_batch, clock)
    else:
        torch.manual_seed(seed_of(0, 0))
        lm = load_pretrained(o.shape, dtype=dtype, random_init=True, blocks=o.blocks)                            # the same random numbers
        lm.model.norm.weight.fill_(1.0)
        c = lm.config
        peer = transformers_backbone(c, lm.model.state_dict(), dtype).to(device).requires_grad_(variant == "naive")
        del lm
        inputs, outputs = torch.nn.Linear(1, c.hidden_size), torch.nn.Linear(c.hidden_size, 27)
        token = torch.nn.Parameter(torch.empty(1, c.hidden_size))
        init_connectors([inputs, outputs], [token], seed_of(0, 1))
        inputs.to(device), outputs.to(device)
        token.data = token.data.to(device)
        groups = [[*inputs.parameters(), token], list(outputs.parameters())]
        optimizers = [torch.optim.AdamW(group, lr=args.lr, betas=(0.9, 0.999), weight_decay=0.0) for group in groups]

        def hidden(signals):
            pieces = [inputs(signals[..., None]) if p == NUMBERS else (peer.embed_tokens(ids[p].to(device)) if p in ids else token).expand(len(signals), -1, -1)
                      for p in PROMPTS["chat"]]
            return peer(inputs_embeds=torch.cat([p.to(dtype) for p in pieces], dim=1), use_cache=False).last_hidden_state[:, -1].float()

        losses = []
        for signals, truth in data:
            clock()
            for i, (group, optimizer) in enumerate(zip(groups, optimizers)):
                peer.zero_grad(), optimizer.zero_grad()
                total = 0.0
                for x, y in zip(signals.split(o.micro_batch or o.batch), truth.split(o.micro_batch or o.batch)):
                    with torch.set_grad_enabled(variant == "naive" or i == 0):
                        h = hidden(x)
                    value = gaussian_nll(*gaussian_head(outputs(h)), y).sum() / o.batch
                    value.backward()
                    total += value.item()
                torch.nn.utils.clip_grad_norm_(group, train_l3m.CLIP["regress"])
                optimizer.step()
                losses += [total] if i == 0 else []
        clock()
    return {"seconds": [b - a for a, b in zip(times[1:], times[2:])], "results": losses, "memory_gb": train_l3m.peak_memory_gb(device), "memory_before_gb": before}


# --------------------------------------------------------------------------------------------------------- generation


def our_generator(o):
    """-> the arguments and settings of a run, and its generator on the CPU; of o.run, or random."""
    import train_l3m
    import torch
    from connectors import GENERATION_WORDS, REFERENCES, build_generator, load_generator
    if o.run:
        generator = load_generator(o.run)
        return None, generator.settings, generator
    words_without_tokenizer(zip(GENERATION_WORDS, (3, 5, 6)))
    shape = ["--init", o.shape] if o.shape in REFERENCES else ["--init", "random", "--base", o.shape, "--blocks", str(o.blocks), "--rank", str(o.rank)]
    args = train_l3m.arguments(flags(o, "generate", *shape, "--lr", "1e-4"))
    train_l3m.check_patch(args, o.sky, o.device)
    settings = train_l3m.run_settings(args, 0, torch.device(o.device), T=470, sky=o.sky)
    return args, settings, build_generator(settings)


def plain_generator(generator, device):
    """The same network from transformers, peft and torch's own modules, and the weights of `generator`."""
    import torch
    import torch.nn as nn
    import torch.nn.functional as F
    from connectors import ROW_END, SLICE_END

    class Velocity(nn.Module):
        """v(x_t, t, condition): all four channels through the first convolution at each call."""
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(4, 64, 3, padding=1), nn.Conv2d(64, 1, 3, padding=1)
            self.blocks = nn.ModuleList(nn.ModuleList([nn.Conv2d(64, 128, 3, padding=1, bias=False), nn.Conv2d(128, 64, 1, bias=False)]) for _ in range(6))

        def forward(self, x, t, cond):
            h = self.first(torch.cat((cond, t.view(-1, 1, 1, 1).expand_as(x), x), dim=1))
            for widen, narrow in self.blocks:
                h = h + narrow(F.silu(widen(F.silu(h))))
            return self.last(F.silu(h))

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            ours = generator.backbone
            lora = {name: p for name, p in ours.state_dict().items() if "lora_" in name}
            self.backbone = transformers_backbone(ours.config, {name: p for name, p in ours.state_dict().items() if name not in lora}, generator.dtype)
            if lora:
                from peft import LoraConfig, get_peft_model
                r = next(iter(lora.values())).shape[0]
                projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
                self.backbone = get_peft_model(self.backbone, LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=0.0, target_modules=projections))
                names = dict(self.backbone.named_parameters())
                for name, p in lora.items():
                    names[f"base_model.model.{name}.default.weight"].data.copy_(p)
            for name, p in self.backbone.named_parameters():
                p.requires_grad_("lora_" in name or "norm" in name or not lora)
                p.data = p.data.float() if p.requires_grad else p.data
            norm = self.backbone.base_model.model.norm if lora else self.backbone.norm
            norm.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))
            self.patch, self.numbers = generator.patch_connector, nn.ModuleList([*generator.parameter_connectors, generator.index_connector])
            self.out, self.tokens, self.velocity = generator.output_connector, generator.tokens, Velocity()
            self.velocity.load_state_dict(generator.velocity.state_dict())
            self.fixed = [generator.tokens[piece] if piece in generator.tokens else getattr(generator, f"words{i}", None) for i, piece in enumerate(generator.pieces)]
            self.fixed = [None if t is None else t if t.requires_grad else t.to(device) for t in self.fixed]
            self.dtype, self.p = generator.dtype, generator.p
            self.row_end, self.slice_end = self.tokens[ROW_END], self.tokens[SLICE_END]

        def embed(self, slices, conditions):
            """The sequence, token by token, (B, T, C), and where the patches are, (S, R*K)."""
            (B, S, X, Y), p = slices.shape, self.p
            numbers = torch.stack([connector(conditions[:, i:i + 1]) for i, connector in enumerate(self.numbers)], dim=1)
            parts = [numbers if t is None else t.float().expand(B, -1, -1) for t in self.fixed]
            at, where = sum(part.shape[1] for part in parts), []
            for s in range(S):
                for x in range(0, X, p):
                    row = slices[:, s, x:x + p].reshape(B, p, Y // p, p).transpose(1, 2).flatten(2)              # (B, K, p*p)
                    parts += [self.patch(row), self.row_end.expand(B, 1, -1)]
                    where += range(at, at + Y // p)
                    at += Y // p + 1
                parts.append(self.slice_end.expand(B, 1, -1))
                at += 1
            return torch.cat(parts, dim=1), torch.tensor(where).view(S, -1)

        def hidden(self, embeds, cache=None):
            with torch.autocast(embeds.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                return self.backbone(inputs_embeds=embeds.to(self.dtype), past_key_values=cache, use_cache=cache is not None).last_hidden_state.float()

        def condition(self, hidden):
            return self.out(hidden).view(-1, 2, self.p, self.p)

        def forward(self, slices, conditions, noise, t):
            embeds, where = self.embed(slices, conditions)
            cond = self.condition(self.hidden(embeds)[:, where[2:].flatten() - 1])
            p, (B, S, X, Y) = self.p, slices.shape
            x = slices[:, 2:].reshape(B, S - 2, X // p, p, Y // p, p).transpose(3, 4).reshape(-1, 1, p, p)
            e, t = noise.reshape(x.shape), t.flatten().view(-1, 1, 1, 1)
            v = self.velocity((1 - t) * e + t * x, t, cond)
            return (v - (x - e)).square().flatten(1).mean(1).view(B, -1).mean(1)

    return Plain().to(device)


def made_up(o, n):
    """n batches of slices, conditions, noise and times."""
    import torch
    draw, K = torch.Generator().manual_seed(0), (o.sky // 14) ** 2
    return [[torch.randn(o.batch, 12, o.sky, o.sky, generator=draw), torch.rand(o.batch, 7, generator=draw),
             torch.randn(o.batch, 10, K, 14, 14, generator=draw), torch.rand(o.batch, 10, K, generator=draw)] for _ in range(n)]


def measure_training(variant, o):
    """-> as measure_regress."""
    import train_l3m
    import torch
    device = torch.device(o.device)
    data = [[t.to(device) for t in batch] for batch in made_up(o, o.steps + 1)]
    before, (clock, times) = train_l3m.peak_memory_gb(device), stopwatch(o.device)
    args, settings, generator = our_generator(o)
    model = generator.to(device) if variant.startswith("ours") else plain_generator(generator, device)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    biases, others = ([p for name, p in named.items() if name.endswith("bias") == wanted] for wanted in (True, False))
    optimizer = torch.optim.AdamW([{"params": others, "weight_decay": train_l3m.WEIGHT_DECAY}, {"params": biases, "weight_decay": 0.0}], lr=args.lr, betas=(0.9, 0.999))
    if variant.startswith("ours"):
        generator.backbone.checkpoint_activations = "checkpointed" in variant
        generator.train()
        losses = fitted([list(named.values())], optimizer, data, lambda _, parts: (generator(*part) for part in parts), train_l3m.CLIP["generate"],
                        args.micro_batch, clock)
    else:
        del generator
        losses = []
        for batch in data:
            clock()
            optimizer.zero_grad()
            total = 0.0
            for part in zip(*(t.split(o.micro_batch or o.batch) for t in batch)):
                loss = model(*part).sum() / o.batch
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(named.values(), train_l3m.CLIP["generate"])
            optimizer.step()
            losses.append(total)
        clock()
    return {"seconds": [b - a for a, b in zip(times[1:], times[2:])], "results": losses, "memory_gb": train_l3m.peak_memory_gb(device), "memory_before_gb": before,
            "parameters": sum(p.numel() for p in named.values())}


def measure_generation(variant, o):
    """-> seconds of the whole generation, the mean of each slice, evaluations of the velocity network a patch, memory."""
    import train_l3m
    import torch
    import connectors
    device = torch.device(o.device)
    _, settings, generator = our_generator(o)
    sky, p, bins = settings["sky"], settings["patch"], settings["T"]
    draw = torch.Generator().manual_seed(0)
    slices, conditions = torch.randn(o.batch, 2, sky, sky, generator=draw).to(device), torch.rand(o.batch, 7, generator=draw).to(device)
    if o.run:
        import data_lightcone
        data = data_lightcone.SubLightcones(settings["data"], "test", names=settings["lightcones"])
        windows = [w for w in data.windows() if w[2] == 12]
        drawn = [data.read(row, start, 2) for row, start, _ in (windows[i * len(windows) // o.batch] for i in range(o.batch))]
        slices, conditions = (torch.stack(column).to(device) for column in zip(*drawn))
    before, (clock, times) = train_l3m.peak_memory_gb(device), stopwatch(o.device)
    n, window, slide, evaluations = o.slices, 12, 6, []
    if variant == "ours":
        take = connectors.sample
        def counted(*a, **k):
            x, e = take(*a, **k)
            evaluations.append(e)
            return x, e
        connectors.sample = counted
        generator.to(device)
        clock()
        new = list(generator.generate(slices, conditions, n, bins, seeds=range(o.batch), samples=o.samples, slide=slide, method="dopri5"))
        clock()
        new = torch.stack(new, dim=2).flatten(0, 1)                                                               # (B*samples, n, X, Y)
        count = torch.cat(evaluations).float().mean().item()
    else:
        from torchdiffeq import odeint
        from transformers import DynamicCache
        model = plain_generator(generator, device)
        calls, patches = 0, 0
        clock()
        with torch.no_grad():
            held, given = slices.repeat_interleave(o.samples, 0), conditions.repeat_interleave(o.samples, 0)
            draws = [torch.Generator().manual_seed(connectors.seed_of(seed, k)) for seed in range(o.batch) for k in range(o.samples)]
            first, new = 0, []
            for s in range(2, 2 + n):
                if s == 2 or s - first == window:
                    drop = 0 if s == 2 else slide
                    first, held, cache = first + drop, held[:, drop:], DynamicCache() if variant == "plain" else None
                    pending, _ = model.embed(held, given + given.new_tensor([0] * 6 + [first / bins]))
                noise = torch.stack([torch.randn((sky // p) ** 2, 1, p, p, generator=g) for g in draws]).to(device)
                done = torch.empty(len(draws), sky, sky, device=device)
                for i in range((sky // p) ** 2):
                    cond = model.condition(model.hidden(pending, cache)[:, -1])
                    def velocity(t, x, cond=cond):
                        nonlocal calls
                        calls += 1
                        return model.velocity(x, t.expand(len(x)), cond)
                    x = odeint(velocity, noise[:, i], torch.tensor([0.0, 1.0], device=device), rtol=1e-3, atol=1e-3, method="dopri5")[-1]
                    patches += 1
                    r, k = divmod(i, sky // p)
                    done[:, r * p:(r + 1) * p, k * p:(k + 1) * p] = x[:, 0]
                    after = [model.patch(x.flatten(1))[:, None]]
                    after += [model.row_end.expand(len(x), 1, -1)] * (k + 1 == sky // p) + [model.slice_end.expand(len(x), 1, -1)] * (i + 1 == (sky // p) ** 2)
                    pending = torch.cat((pending, *after) if cache is None else after, dim=1)
                held = torch.cat((held, done[:, None]), dim=1)
                new.append(done)
        clock()
        new, count = torch.stack(new, dim=1), calls / patches
    return {"seconds": [times[1] - times[0]], "results": new.float().mean(dim=(0, 2, 3)).tolist() + new.float().std(dim=(0, 2, 3)).tolist(), "evaluations_a_patch": count,
            "memory_gb": train_l3m.peak_memory_gb(device), "memory_before_gb": before}


# ---------------------------------------------------------------------------------------------------------------- table


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", nargs="?", choices=list(VARIANTS), default="regress")
    p.add_argument("--shape", default="smollm2-135m", help="smollm2-135m or qwen2.5-0.5b; training and generation: also small and large")
    p.add_argument("--run", help="generation: a run of train_l3m.py generate, its weights and test lightcones")
    p.add_argument("--blocks", type=int, help="of the shape (default: 6; training and generation 8)")
    p.add_argument("--rank", type=int, default=2, help="of LoRA in training and generation")
    p.add_argument("--sky", type=int, default=28, help="side of the slices in training and generation")
    p.add_argument("--batch", type=int, help="lightcones (default: 64; training 16; generation 4)")
    p.add_argument("--samples", type=int, default=4, help="generation: of each lightcone")
    p.add_argument("--slices", type=int, default=12, help="generation: new ones")
    p.add_argument("--micro-batch", type=int)
    p.add_argument("--steps", type=int, default=2, help="measured in each process, after one that is not")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    p.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    p.add_argument("--out", help="also write the JSON here")
    p.add_argument("--measure", help=argparse.SUPPRESS)
    o = p.parse_args()
    o.batch, o.blocks = o.batch or BATCH[o.what], o.blocks or BLOCKS[o.what]
    if o.measure:
        import torch
        if o.device == "cpu":
            torch.set_num_threads(1)
        torch.backends.cudnn.allow_tf32 = False               # on both sides
        if not o.measure.startswith("ours"):                  # what the imports take is no part of the memory of the work
            from peft import get_peft_model  # noqa: F401
            from torchdiffeq import odeint  # noqa: F401
            from transformers import DynamicCache, Qwen2Model  # noqa: F401
        return print(json.dumps(globals()[f"measure_{o.what}"](o.measure, o)))
    variants = VARIANTS[o.what]
    found = {variant: [] for variant in variants}
    for i in range(o.rounds):
        for variant in variants:
            done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--measure", variant], capture_output=True, text=True, env=os.environ | {
                "OMP_NUM_THREADS": "1"} if o.device == "cpu" else None)
            if done.returncode:
                sys.exit(f"{variant} failed: {done.stderr[-2000:]}")
            found[variant].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {i + 1}: {variant:20} {statistics.median(found[variant][-1]['seconds']):8.3f} s", file=sys.stderr, flush=True)
    table = {}
    for variant, runs in found.items():
        seconds = statistics.median(s for r in runs for s in r["seconds"])
        peak, before = (statistics.median(r[key] for r in runs) for key in ("memory_gb", "memory_before_gb"))
        rate = {"slices_per_s": o.batch * o.samples * o.slices / seconds} if o.what == "generation" else {"samples_per_s": o.batch / seconds}
        table[variant] = {key: round(value, 3) for key, value in rate.items()} | {
            "seconds": round(seconds, 4), "memory_gb": round(peak, 3), "memory_of_model_and_work_gb": round(peak - before, 3),
            **{key: runs[0][key] for key in ("parameters", "evaluations_a_patch") if key in runs[0]}, "results": [round(v, 4) for v in runs[0]["results"]]}
    memory = "memory_gb" if o.device == "cuda" else "memory_of_model_and_work_gb"
    peers, ours = [v for v in variants if not v.startswith("ours")], [v for v in variants if v.startswith("ours")]
    ratios = {f"{v}: speed over {peer}": table[peer]["seconds"] / table[v]["seconds"] for v in ours for peer in peers}
    ratios |= {f"{v}: memory of {peer}": table[v][memory] / table[peer][memory] for v in ours for peer in peers}
    report = json.dumps({"settings": {k: v for k, v in vars(o).items() if k not in ("measure", "out")}, "table": table,
                         "ratios": {k: round(v, 3) for k, v in ratios.items()}}, indent=1)
    print(report)
    if o.out:
        Path(o.out).write_text(report)
    spread = max(abs(a - b) for v in variants for a, b in zip(table[v]["results"], table[peers[0]]["results"], strict=True))
    if spread > 0.02:
        sys.exit(f"the results differ by {spread:.3f}: not the same mathematics")


if __name__ == "__main__":
    main()
