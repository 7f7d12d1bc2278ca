"""The same training twice: ours, and transformers + peft + bitsandbytes, on real weights and real abstracts.

    python tests/compare_peft.py --base DIR --data data/arxiv [--steps 20] [--batch-size 8] [--samples 50] [--out out/compare]

Same batches, same initial A, NF4 on both sides, no dropout, same dtype. Prints the loss of every step side by side and the perplexity of test
abstracts afterwards, NF4 on both sides; writes compare.json. Each side runs in a process of its own.

bitsandbytes 0.50 on a CPU repacks its weights in an evaluation forward and then passes no gradient, so the peer is trained before
anything is evaluated, and a flowing gradient is asserted first; its evaluation kernel also rounds the block maxima to
bfloat16, so its perplexity is taken in train() mode (there is no dropout).
"""
import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def peer(args):
    """Train and evaluate with transformers + peft + bitsandbytes; prints one JSON line."""
    import data_arxiv
    import train_lm
    from bench_lm import copy_initial_adapter, load_peer, padded
    from model import bos_eos, load_config, load_tokenizer
    model = load_peer(args.base, "cpu", getattr(torch, args.dtype), "nf4", dropout=0.0, prepare=False)
    copy_initial_adapter(model, args.base)
    trained = [p for p in model.parameters() if p.requires_grad]
    tokenizer, (_, texts) = load_tokenizer(args.base), data_arxiv.load(args.data, "s1", "train")
    bos, eos = bos_eos(load_config(args.base), tokenizer)
    settings = train_lm.arguments(["--batch-size", str(args.batch_size)])
    optimizer = torch.optim.AdamW(trained, lr=3e-4, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1)
    losses = []
    for step in range(args.steps):
        rows = data_arxiv.batch_rows(len(texts), args.batch_size, 42, step)
        ids, mask = padded([data_arxiv.encode(tokenizer, texts[r], bos, eos) for r in rows], eos)
        loss = model(ids, attention_mask=mask.long(), labels=ids.masked_fill(~mask, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0).item()
        assert norm > 0, "no gradient flows through the peer"
        optimizer.param_groups[0]["lr"] = train_lm.learning_rate(step, args.steps, settings)
        optimizer.step()
        losses.append(loss.item())
        print(f"peer step {step + 1} loss {losses[-1]:.4f}", file=sys.stderr, flush=True)
    ids, texts = data_arxiv.load(args.data, "s1", "test")
    keep = np.sort(np.random.default_rng(42).permutation(len(texts))[:args.samples])      # as eval.py draws them
    values = []
    with torch.no_grad():
        for i in keep:
            sequence = torch.tensor([data_arxiv.encode(tokenizer, texts[i], bos, None)])
            logits = model(sequence).logits[0, :-1].float()
            values.append(torch.nn.functional.cross_entropy(logits, sequence[0, 1:]).exp().item())
    print(json.dumps({"losses": losses, "ids": [ids[i] for i in keep], "perplexity": values}))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--base", required=True)
    p.add_argument("--data", required=True)
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--samples", type=int, default=50)
    p.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    p.add_argument("--out", default="out/compare", help="run directory of our side; must not exist")
    p.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.peer:
        return peer(args)
    common = ["--base", args.base, "--data", args.data, "--batch-size", str(args.batch_size), "--dtype", args.dtype]
    theirs = subprocess.run([sys.executable, __file__, "--peer", "--steps", str(args.steps), "--samples", str(args.samples), *common],
                            stdout=subprocess.PIPE, text=True, check=True)
    theirs = json.loads(theirs.stdout.splitlines()[-1])
    subprocess.run([sys.executable, ROOT / "train_lm.py", "--subset", "s1", "--lora", "all", "--dropout", "0", "--device", "cpu", "--eval-samples", "8",
                    "--max-steps", str(args.steps), "--out", args.out, *common], check=True)
    subprocess.run([sys.executable, ROOT / "eval.py", "perplexity", args.out, "--quantize", "nf4", "--samples", str(args.samples), "--device", "cpu",
                    "--dtype", args.dtype, "--json", f"{args.out}/nf4.json"], check=True)
    ours = [m["loss"] for m in map(json.loads, Path(args.out, "metrics.jsonl").read_text().splitlines()) if "loss" in m]
    mine = json.loads(Path(args.out, "nf4.json").read_text())["rows"][1]["values"]["perplexity"]
    assert list(mine) == theirs["ids"]
    difference = max(abs(a - b) for a, b in zip(ours, theirs["losses"], strict=True))
    a, b = np.mean(list(mine.values())), np.mean(theirs["perplexity"])
    print("\nstep    ours    peer")
    for i, (x, y) in enumerate(zip(ours, theirs["losses"])):
        print(f"{i + 1:4d} {x:7.4f} {y:7.4f}")
    print(f"largest difference of a step's loss {difference:.4f}; mean perplexity of {args.samples} abstracts, NF4: ours {a:.3f}, peer {b:.3f} ({100 * (a / b - 1):+.2f}%)")
    report = {"ours": ours, "peer": theirs["losses"], "largest_loss_difference": difference, "perplexity": {"ours": a, "peer": b, "ratio": a / b}}
    Path(args.out, "compare.json").write_text(json.dumps(report, indent=1))
    assert math.isfinite(difference)


if __name__ == "__main__":
    main()
