"""Speed and memory of train_l3m.py regress against the same training written plainly with transformers' Qwen2Model and torch's AdamW.

    python tests/bench_l3m.py                                                        # two CPU cores: six blocks of SmolLM2's shape, batch 64
    python tests/bench_l3m.py --shape qwen2.5-0.5b --blocks 24 --batch 1024 --device cuda --steps 8

Both train connectors to a frozen random backbone with the chat prompt, the same weights and data, two updates a batch; the losses of all must agree.
- naive: all gradients on, two whole passes forward and backward a batch
- careful: gradients only where something is trained or lies on the way to it, none through the backbone in the second update
- ours: the loop of train_l3m.py as it is; ours, checkpointed: with --checkpoint-activations
Each measurement is a process of its own, in turn, --rounds times; the medians are over all steps but the first of each. Seconds are of CPU time in one thread on a
CPU (so a busy machine matters less), of the clock on a GPU. Memory is the peak of the process on a CPU, also less what it had before the model, and of the allocator
on a GPU."""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
VARIANTS = ("naive", "careful", "ours", "ours, checkpointed")


def measure(variant, o):
    """-> seconds of each step but the first, losses, peak memory and memory before the model, GB. Runs in a process of its own."""
    import train_l3m
    import torch
    import connectors
    from connectors import PROMPTS, SIGNAL, gaussian_head, gaussian_nll, init_connectors, is_words, seed_of
    from model import load_pretrained
    device, dtype = torch.device(o.device), getattr(torch, o.dtype)
    if o.device == "cpu":
        torch.set_num_threads(1)
    ids = dict(zip((p for p in PROMPTS["chat"] if is_words(p)), (torch.arange(1, 9), torch.arange(11, 17))))    # as many as SmolLM2's tokenizer makes
    connectors.encode_words = lambda base, pieces: ids                                                           # a shape has no tokenizer
    args = train_l3m.arguments(["regress", "--init", "random", "--base", o.shape, "--prompt", "chat", "--batch-size", str(o.batch), "--dropout", "0", "--lr", "1e-3",
                                "--epochs", "1000", "--max-steps", str(o.steps + 1), "--log-every", "1", "--warmup", "0", "--decay", "0",
                                *(["--blocks", str(o.blocks)] if o.blocks else []), *(["--micro-batch", str(o.micro_batch)] if o.micro_batch else [])])
    settings = train_l3m.regress_settings(args, 0, dtype, (0, 1))
    draw = torch.Generator().manual_seed(0)
    data = [(torch.randn(o.batch, 47, generator=draw).to(device), torch.rand(o.batch, 6, generator=draw).to(device)) for _ in range(o.steps + 1)]
    before, times, losses = train_l3m.peak_memory_gb(device), [], []

    def clock():
        if o.device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() if o.device == "cuda" else time.process_time())

    if variant.startswith("ours"):
        regressor = connectors.build_regressor(settings, device)
        regressor.backbone.checkpoint_activations = "checkpointed" in variant
        optimizer = torch.optim.AdamW(regressor.trained().values(), lr=args.lr, betas=(0.9, 0.999), weight_decay=0.0)

        def batches(step):
            for batch in data:
                clock()
                yield batch, range(o.batch)

        def loss(group, signals, truth):
            with torch.set_grad_enabled(group == 0):
                hidden = regressor.hidden(signals)
            return gaussian_nll(*regressor.head(hidden), truth)

        with tempfile.TemporaryDirectory() as out:
            run = train_l3m.Run(args, settings, out, 1000 * o.batch, 0, 1, device, train_l3m.StopSignal())
            stdout, sys.stdout = sys.stdout, sys.stderr
            train_l3m.fit(run, None, regressor, optimizer, batches, loss, lambda: clock() or 0.0, train_l3m.CLIP)
            sys.stdout = stdout
            losses = [r["loss"] for r in map(json.loads, open(Path(out) / "metrics.jsonl")) if "loss" in r]
        times = times[1:]                                     # the first is of the validation before the first step
    else:
        from transformers import Qwen2Config, Qwen2Model
        torch.manual_seed(seed_of(0, 0))
        lm = load_pretrained(o.shape, dtype=dtype, random_init=True, blocks=o.blocks)                            # the same random numbers
        lm.model.norm.weight.fill_(1.0)
        c = lm.config
        with torch.device("meta"):
            peer = Qwen2Model(Qwen2Config(vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
                                          num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads, num_key_value_heads=c.num_key_value_heads,
                                          rms_norm_eps=c.rms_norm_eps, rope_theta=c.rope_theta))
        weights = lm.model.state_dict()
        weights |= {name: torch.zeros(p.shape, dtype=dtype) for name, p in peer.named_parameters() if name not in weights}       # Llama has no biases
        peer.load_state_dict(weights, assign=True)
        peer.rotary_emb = type(peer.rotary_emb)(peer.config)
        peer.to(device).requires_grad_(variant == "naive")
        del lm, weights
        inputs, outputs = torch.nn.Linear(1, c.hidden_size), torch.nn.Linear(c.hidden_size, 27)
        token = torch.nn.Parameter(torch.empty(1, c.hidden_size))
        init_connectors([inputs, outputs], [token], seed_of(0, 1))
        inputs.to(device), outputs.to(device)
        token.data = token.data.to(device)
        groups = [[*inputs.parameters(), token], list(outputs.parameters())]
        optimizers = [torch.optim.AdamW(group, lr=args.lr, betas=(0.9, 0.999), weight_decay=0.0) for group in groups]

        def hidden(signals):
            pieces = [inputs(signals[..., None]) if p == SIGNAL else (peer.embed_tokens(ids[p].to(device)) if p in ids else token).expand(len(signals), -1, -1)
                      for p in PROMPTS["chat"]]
            return peer(inputs_embeds=torch.cat([p.to(dtype) for p in pieces], dim=1), use_cache=False).last_hidden_state[:, -1].float()

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
                torch.nn.utils.clip_grad_norm_(group, train_l3m.CLIP)
                optimizer.step()
                losses += [total] if i == 0 else []
        clock()
    return {"seconds": [b - a for a, b in zip(times[1:], times[2:])], "losses": losses, "memory_gb": train_l3m.peak_memory_gb(device), "memory_before_gb": before}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", default="smollm2-135m", help="smollm2-135m or qwen2.5-0.5b")
    p.add_argument("--blocks", type=int, default=6)
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--micro-batch", type=int)
    p.add_argument("--steps", type=int, default=2, help="measured in each process, after one that is not")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    p.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    p.add_argument("--out", help="also write the JSON here")
    p.add_argument("--measure", choices=VARIANTS, help=argparse.SUPPRESS)
    o = p.parse_args()
    if o.measure:
        return print(json.dumps(measure(o.measure, o)))
    found = {variant: [] for variant in VARIANTS}
    for i in range(o.rounds):
        for variant in VARIANTS:
            done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--measure", variant], capture_output=True, text=True, env=os.environ | {
                "OMP_NUM_THREADS": "1"} if o.device == "cpu" else None)
            if done.returncode:
                sys.exit(f"{variant} failed: {done.stderr[-2000:]}")
            found[variant].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {i + 1}: {variant:20} {statistics.median(found[variant][-1]['seconds']):8.3f} s a step", file=sys.stderr, flush=True)
    table = {}
    for variant, runs in found.items():
        seconds = statistics.median(s for r in runs for s in r["seconds"])
        peak, before = (statistics.median(r[key] for r in runs) for key in ("memory_gb", "memory_before_gb"))
        table[variant] = {"samples_per_s": round(o.batch / seconds, 2), "seconds_a_step": round(seconds, 4), "memory_gb": round(peak, 3),
                          "memory_of_model_and_training_gb": round(peak - before, 3), "losses": [round(v, 4) for v in runs[0]["losses"]]}
    ours, slim = table["ours"], table["ours, checkpointed"]
    memory = "memory_gb" if o.device == "cuda" else "memory_of_model_and_training_gb"
    ratios = {"speed over naive": table["naive"]["seconds_a_step"] / ours["seconds_a_step"],
              "speed over careful": table["careful"]["seconds_a_step"] / ours["seconds_a_step"],
              "memory of careful": ours[memory] / table["careful"][memory],
              "checkpointed: memory of careful": slim[memory] / table["careful"][memory], "checkpointed: memory of naive": slim[memory] / table["naive"][memory],
              "checkpointed: speed over careful": table["careful"]["seconds_a_step"] / slim["seconds_a_step"]}
    report = json.dumps({"settings": {k: v for k, v in vars(o).items() if k not in ("measure", "out")}, "table": table,
                         "ratios": {k: round(v, 3) for k, v in ratios.items()}}, indent=1)
    print(report)
    if o.out:
        Path(o.out).write_text(report)
    spread = max(abs(table[v]["losses"][i] - table["naive"]["losses"][i]) for v in VARIANTS for i in range(o.steps + 1))
    if spread > 0.02:
        sys.exit(f"the losses differ by {spread:.3f}: not the same mathematics")


if __name__ == "__main__":
    main()
