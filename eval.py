"""Every evaluation and figure.

    python eval.py perplexity out/s1-all                         # base and run on the hep-th test split, merged on the 16-bit base
    python eval.py perplexity out/s1-all out/s1-qkv --quantize nf4 --samples 500
    python eval.py perplexity --base path/to/model --data mine.jsonl

perplexity: of an abstract, exp(mean negative log-likelihood of its tokens after BOS), no EOS added; the figure is the mean over
abstracts with a 95% bootstrap interval (arXiv:2508.03716 reports 11.20 for Llama-3.1-8B and 9.83 for its best variant on hep-th).
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data_arxiv
from lora import load_adapter, merge
from model import bos_eos, load_config, load_pretrained, load_tokenizer, token_nll
from quant import NF4Linear
from train_lm import fail, resolve_dtype, start_processes

# ---------------------------------------------------------------------------------------------------------- runs and data


def read_run(directory):
    """A run directory of train_lm.py -> its settings (base, data, subset, ...). ValueError if it is none or has no adapter yet."""
    directory = Path(directory)
    try:
        settings = json.loads((directory / "config.json").read_text())["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{directory} is no run directory of train_lm.py: it has no config.json with settings") from None
    if not (directory / "adapter" / "adapter_config.json").exists():
        raise ValueError(f"{directory} has no adapter yet: finish the run first (the same train_lm.py command with --resume)")
    return settings


def read_texts(data, subset, split, samples, seed):
    """-> (ids, texts, what they are) of a split of a prepared directory, or of a JSONL file with `id` and `abstract`.

    samples: so many of them, drawn with `seed`; 0: all."""
    if Path(data).is_file():
        ids, texts, what = [], [], str(data)
        for number, line in enumerate(open(data, encoding="utf-8"), 1):
            try:
                record = json.loads(line)
                ids.append(str(record["id"]))
                texts.append(data_arxiv.clean(record["abstract"]))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(f"{data}, line {number}: not a JSON object with id and abstract") from None
    else:
        (ids, texts), what = data_arxiv.load(data, subset, split), f"{subset} {split} of {data}"
    keep = np.sort(np.random.default_rng(seed).permutation(len(texts))[:samples or None])
    return [ids[i] for i in keep], [texts[i] for i in keep], what


def load_model(base, adapter, quantize, dtype, device):
    """The base with an adapter directory (or None) -> (CausalLM, how it was joined: "16 bit", "merged, 16 bit" or "unmerged, NF4")."""
    model = load_pretrained(base, quantize=quantize, dtype=dtype, device=device)
    four_bit = any(isinstance(m, NF4Linear) for m in model.modules())
    if adapter:
        load_adapter(model, adapter)
        if not four_bit:
            merge(model)
    bits = "NF4" if four_bit else "32 bit" if dtype == torch.float32 else "16 bit"
    return model, bits if not adapter else f"unmerged, {bits}" if four_bit else f"merged, {bits}"


# ------------------------------------------------------------------------------------------------------------- perplexity


@torch.no_grad()
def perplexities(model, tokenizer, texts, batch_tokens=4096, desc=""):
    """Perplexity of each text given BOS: (N,) float64 array; (N,) token counts. NaN for a text without tokens.

    Texts of like length are evaluated together, up to batch_tokens at a time, which changes nothing but the speed."""
    bos, _ = bos_eos(model.config, tokenizer)
    sequences = [data_arxiv.encode(tokenizer, text, bos, None) for text in texts]
    result, tokens = np.full(len(texts), np.nan), np.array([len(s) - 1 for s in sequences])
    batch, device = [], model.lm_head.weight.device
    with tqdm(total=len(texts), desc=desc, unit="abstract", dynamic_ncols=True) as bar:
        order = sorted(np.flatnonzero(tokens), key=lambda i: -len(sequences[i]))
        for n, i in enumerate(order):
            batch.append(i)
            following = len(sequences[order[n + 1]]) if n + 1 < len(order) else batch_tokens
            if sum(len(sequences[j]) for j in batch) + following > batch_tokens:
                ids, lengths = data_arxiv.collate([sequences[j] for j in batch])
                nll = token_nll(model, ids.to(device), lengths).double().cpu()
                for j, part in zip(batch, nll.split((lengths - 1).tolist())):
                    result[j] = part.mean().exp()
                bar.update(len(batch))
                batch = []
    return result, tokens


def bootstrap_interval(values, resamples=9999, level=0.95, seed=0):
    """Percentile bootstrap interval of the mean: (low, high)."""
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(resamples)]
    return tuple(np.quantile(means, [(1 - level) / 2, (1 + level) / 2]).tolist())


def summary(values):
    """Mean with its 95% interval, median, quartiles and standard deviation, as a dictionary of floats."""
    low, high = bootstrap_interval(values)
    q1, median, q3 = np.quantile(values, [0.25, 0.5, 0.75])
    return {"mean": values.mean(), "low": low, "high": high, "median": median, "q1": q1, "q3": q3, "std": values.std()}


def perplexity(args):
    _, _, device = start_processes(args.device)
    dtype, quantize = resolve_dtype(args.dtype, device), None if args.quantize == "none" else "nf4"
    runs = {str(run): read_run(run) for run in args.runs}
    if not runs and not (args.base and args.data):
        raise ValueError("give run directories, or --base and --data")
    data = args.data or next(iter(runs.values()))["data"]
    subset = args.subset or ("own" if any(r["subset"] == "own" for r in runs.values()) else "s1")
    ids, texts, what = read_texts(data, subset, args.split, args.samples, args.seed)
    if not texts:
        raise ValueError(f"{what} holds no abstract")
    bases = [args.base] if args.base else list(dict.fromkeys(r["base"] for r in runs.values()))
    jobs = [(base, base, None) for base in bases] + [(run, args.base or r["base"], Path(run) / "adapter") for run, r in runs.items()]
    rows = []
    for name, base, adapter in jobs:
        tokenizer = load_tokenizer(base)
        model, how = load_model(base, adapter, quantize, dtype, device)
        if adapter and "NF4" in how and not quantize:
            print(f"note: {base} was saved in 4 bits, so {name} is evaluated unmerged on NF4", file=sys.stderr)
        values, tokens = perplexities(model, tokenizer, texts, args.batch_tokens, Path(name).name)
        del model
        good = ~np.isnan(values)
        if not good.all():
            print(f"note: {(~good).sum()} empty abstracts are left out", file=sys.stderr)
        rows.append({"model": name, "weights": how, "abstracts": int(good.sum()), "tokens": int(tokens.sum()), **summary(values[good]),
                     "perplexity": dict(zip(np.array(ids)[good].tolist(), values[good].tolist()))})
    print(f"\nperplexity on {what}, {len(texts)} abstracts\n{'model':32} {'weights':18} {'mean':>8} {'95% interval':>17} {'median':>8} {'quartiles':>16} {'std':>7}")
    for r in rows:
        print(f"{Path(r['model']).name[-32:]:32} {r['weights']:18} {r['mean']:8.3f} {r['low']:8.3f} -{r['high']:7.3f} {r['median']:8.3f} "
              f"{r['q1']:7.3f} -{r['q3']:7.3f} {r['std']:7.3f}")
    report = {"data": what, "split": args.split, "dtype": str(dtype), "seed": args.seed, "models": rows}
    outputs = [args.json] if args.json else [Path(run) / f"perplexity-{'NF4' if quantize else '16bit'}.json" for run in runs]
    for path in outputs:
        Path(path).write_text(json.dumps(report, indent=1))
        figure = Path(path).with_suffix(".png")
        draw_perplexity(rows, what, figure)
        print(f"written: {path}, {figure}")


def draw_perplexity(rows, what, path):
    """Cumulative distribution of the abstracts' perplexities, one line a model, the mean with its interval as a point on it."""
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    colours = ["#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"]           # Okabe and Ito, colour-blind safe
    fig, ax = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for i, r in enumerate(rows):
        values = np.sort(list(r["perplexity"].values()))
        colour, style = colours[i % 7], ["-", "--", ":"][i // 7 % 3]
        ax.step(values, np.arange(1, len(values) + 1) / len(values), color=colour, ls=style, where="post",
                label=f"{Path(r['model']).name} ({r['weights']}): {r['mean']:.2f} [{r['low']:.2f}, {r['high']:.2f}]")
        ax.errorbar(r["mean"], (values < r["mean"]).mean(), xerr=[[r["mean"] - r["low"]], [r["high"] - r["mean"]]], color=colour, marker="o", ms=5, capsize=3)
    ax.set(xscale="log", xlabel="perplexity of an abstract", ylabel="fraction of abstracts below", ylim=(0, 1), title=f"{what}, {len(values)} abstracts")
    ax.xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
    ax.xaxis.set_minor_formatter(matplotlib.ticker.LogFormatter(minor_thresholds=(2, 0.6)))
    ax.grid(alpha=0.3, which="both")
    ax.legend(fontsize=8, title="mean with 95% interval", title_fontsize=8)
    fig.savefig(path, dpi=150)
    plt.close(fig)


# ----------------------------------------------------------------------------------------------------------- command line


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("perplexity", help="base model and runs on a split or a JSONL file", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                            description="Mean perplexity of abstracts for the base model and any number of runs.")
    p.add_argument("runs", nargs="*", metavar="RUN", help="run directories of train_lm.py; they know their base and data")
    p.add_argument("--base", help="model directory or hub id; default: each run's own")
    p.add_argument("--data", help="prepared directory, or a JSONL file with id and abstract; default: the first run's")
    p.add_argument("--subset", help="set, category or recipe; default s1 (hep-th), or own for a run on own data")
    p.add_argument("--split", choices=["train", "validation", "test"], default="test")
    p.add_argument("--samples", type=int, default=0, help="so many abstracts, drawn with --seed; 0: all")
    p.add_argument("--quantize", choices=["none", "nf4"], default="none", help="nf4: base and adapter unmerged on the 4-bit base; none: merged in 16 bit")
    p.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto")
    p.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    p.add_argument("--batch-tokens", type=int, default=4096, help="tokens in one forward pass; changes memory and speed only")
    p.add_argument("--seed", type=int, default=42)
    p.add_argument("--json", help="where the results go (a figure beside it); default: into each run directory")
    p.set_defaults(function=perplexity)
    args = parser.parse_args(argv)
    try:
        args.function(args)
    except torch.OutOfMemoryError:
        fail("out of memory: lower --batch-tokens")
    except (ValueError, OSError) as e:
        fail(e)


if __name__ == "__main__":
    main()
