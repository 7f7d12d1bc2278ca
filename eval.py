"""Every evaluation and figure.

    python eval.py perplexity out/s1-all                         # base and run on the hep-th test split, merged on the 16-bit base
    python eval.py perplexity out/s1-all out/s1-qkv --quantize nf4 --samples 500
    python eval.py perplexity --base path/to/model --data mine.jsonl
    python eval.py perplexity --adapter LLMsForHepth/s3-L-3.1-8B-qkv       # a published adapter: hub id or directory, peft's format
    python eval.py complete out/s1-all out/s1-qkv --samples 100  # base and runs finish the same abstracts -> out/completions-s1-test.jsonl
    python eval.py complete out/s1-all --prompt "We study the"   # finish a text of your own
    python eval.py semscore out/completions-s1-test.jsonl        # how near the completions come to the true abstracts
    python eval.py semscore --pairwise out/s1-all --across hep-th gr-qc    # how near abstracts are to each other, as the LLM sees them
    python eval.py signatures out/completions-s1-test.jsonl      # how completions fail: repetition, invented metadata, length
    python eval.py rate out/completions-s1-test.jsonl            # a page for blind rating by experts; then the same with --collect *.json
    python eval.py compare out/s*-all out/s*-qkv --completions out/completions-s1-test.jsonl    # one table, one figure, all runs
    python eval.py perplexity out/s1-all out/s10-all --across hep-th hep-ph gr-qc q-bio cs      # does physics training hurt elsewhere?
    python eval.py export out/s1-all --out merged --push ORG/NAME    # a 16-bit checkpoint with a model card, to the hub
    python eval.py regress out/regress-*-seed*                   # L3M: errors, loss and calibration of the six parameters, with figures
    python eval.py regress out/regress-pretrained-seed0 --lightcone mine.h5    # the posterior of your own lightcone
    python eval.py next-patch out/generate-*-seed*               # L3M: flow-matching loss, and how well patches follow from the truth before them
    python eval.py generate out/generate-*-seed0 --slices 30     # L3M: slices generated on their own, beside the truth

perplexity: of an abstract, exp(mean negative log-likelihood of its tokens after BOS), no EOS added; the figure is the mean over
abstracts with a 95% bootstrap interval (arXiv:2508.03716 reports 11.20 for Llama-3.1-8B and 9.83 for its best variant on hep-th).

complete: the first half of an abstract's sentences is the prompt; sampled at temperature 0.7 among the 50 likeliest tokens, 1,024 at most.
Every abstract has its own random stream, a function of --seed and its id, so all models get the same draws. The file has one JSON object
for each abstract and model (id, prompt, truth, completion, model, settings); the same command goes on where it was stopped.

semscore (arXiv:2401.17072): the cosine between sentence embeddings of the full abstract and of prompt + completion. The encoder,
MPNet (arXiv:2004.09297) or BERT (arXiv:1810.04805), is computed here from its raw safetensors: mean over at most 384 tokens. The
prompt is in both texts, so it alone scores high already: the row "prompt alone" shows how high.

signatures: over the words of each completion, lower-cased: Shannon entropy in bits; distinct-n, the share of different n-grams; the
longest span of words that comes twice; length against the truth's; the share that goes on into invented metadata ("Comments: 12
pages", keywords, arXiv numbers, URLs). The truth is judged too, as the row to compare with. Long completions also by windows.

rate: one HTML page for any browser, without a network: truth and completions of each abstract in random order without names, 1-10 each for
grammar, coherence, relevance, accuracy, creativity and overall (the criteria of arXiv:2508.03716). Which text is whose stays in a key
file here. Completions are untrusted text and cannot run in the page. --collect joins the raters' files; agreement is Krippendorff's alpha.

compare: gathers what the commands above left of each run (perplexity, SemScore, signatures, human rating) and the loss curves, smoothed
within each epoch only, so that a step at an epoch's end stays one: `all` shows such steps, `qkv` does not (arXiv:2508.03716).

export: the adapter merged into the 16-bit base, a checkpoint that transformers, vLLM and llama.cpp's converter open (or, with --what
adapter, the adapter in peft's format), with a model card: base, data, hyperparameters, what was measured, licence.

regress (arXiv:2506.14757): runs of train_l3m.py on held-out lightcones, which they predict a Gaussian each over the six parameters for. Loss
and mean absolute error in units of the prior's width, beside the prior mean and ridge regression on the same signals; intervals are
bootstrapped over lightcones, differences lightcone by lightcone. Figures: validation loss by epoch, a band over seeds, and by depth;
prediction against truth, 50 samples a lightcone; and, not in the paper, coverage and sharpness: whether the Gaussian's intervals hold the
truth as often as they claim, and how wide they are. Of your own lightcone: the Gaussian in physical units, as table and corner plot.

next-patch (arXiv:2506.14757): every patch of held-out lightcones from the third slice of a window of 12 on, drawn once given the true patches
before it; mean squared error in normalised units, with intervals over lightcones. A perfect generator does not come to zero: the error of a draw
is twice the variance that the truth before leaves. Baselines: the patch at the same place of the slice before, and N(0, 1) noise, which is what
the flow starts from and what an untrained one returns.

generate: slices drawn patch after patch, each given what was generated before it, from a few true ones on, at several redshifts. Not in the paper:
power spectra on the sky and the distribution of T_b, of generated against true slices of the same lightcones, by redshift. The last given slice,
repeated, is the row to compare with: it has the right power and does not evolve.
"""
import argparse
import base64
import hashlib
import json
import math
import os
import re
import shutil
import sys
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

import data_arxiv
from connectors import (CONTEXT, coverage, gaussian_nll, joint_coverage, load_generator, load_regressor, patch, sample_gaussian, standard_deviation,
                        unpatch)
from data_lightcone import (BINS, CELL, PARAMETERS, PRIORS, PUBLISHED_NORM, SYMBOLS, UNITS, GlobalSignals, SubLightcones, denormalise, eor_colours,
                            filter_reason, history_summary, open_store, power_spectrum, read_lightcone)
from flow import sample
from lora import load_adapter, merge
from model import bos_eos, fetch, generate as generate_text, load_config, load_pretrained, load_tokenizer, save_pretrained, token_nll
from quant import NF4Linear
from train_lm import Help, fail, resolve_dtype, start_processes, sync

COLOURS = ["#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"]               # Okabe and Ito, colour-blind safe

# ---------------------------------------------------------------------------------------------------------- runs and data


def read_run(directory, experiment=None):
    """A run directory of train_lm.py, or of an `experiment` of train_l3m.py -> its settings (base, data, seed, ...). ValueError if it is none, or
    has no result yet."""
    directory, script = Path(directory), "train_l3m.py" if experiment else "train_lm.py"
    try:
        settings = json.loads((directory / "config.json").read_text())["settings"]
        found = settings.get("experiment")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{directory} is no run directory of {script}: it has no config.json with settings") from None
    if found != experiment:
        whose, command = (f"train_l3m.py {found}", found) if found else ("train_lm.py", "perplexity")
        raise ValueError(f"{directory} is a run of {whose}: evaluate it with `eval.py {command}`")
    if not (directory / ("model.safetensors" if experiment else "adapter/adapter_config.json")).exists():
        raise ValueError(f"{directory} has no {'model' if experiment else 'adapter'} yet: finish the run first (the same {script} command with --resume)")
    return settings


def fetch_adapter(source):
    """A directory with an adapter in peft's format, or a hub id such as LLMsForHepth/s3-L-3.1-8B-qkv -> (its directory, the base it names).

    Raises ValueError in one sentence where there is none, or none to be had."""
    directory = fetch(source, ["adapter_config.json", "adapter_model.safetensors"])
    try:
        return directory, json.loads((directory / "adapter_config.json").read_text()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        raise ValueError(f"{source} holds no adapter in peft's format: adapter_config.json is missing or damaged") from None


def find_models(args):
    """The runs, --adapter and --base of a command line -> ([(name, base, adapter directory or None)], settings of the runs).

    Bases come first, each once; a name is a directory's last part or a hub id. ValueError if nothing is named, or two share a name."""
    settings = [read_run(run) for run in args.runs]
    jobs = [(Path(run).resolve().name, args.base or s["base"], Path(run) / "adapter") for run, s in zip(args.runs, settings)]
    for source in args.adapter:
        directory, base = fetch_adapter(source)
        if not (args.base or base):
            raise ValueError(f"the adapter {source} does not say which base it is for: add --base")
        place = Path(os.path.abspath(directory))
        name = source if not Path(source).is_dir() else place.parent.name if place.name == "adapter" else place.name      # of out/s1-all/adapter: s1-all
        jobs.append((name, args.base or base, directory))
    if not jobs and not args.base:
        raise ValueError("give run directories, --adapter or --base")
    bases = [args.base] if args.base else list(dict.fromkeys(base for _, base, _ in jobs))
    jobs = [(Path(base).resolve().name if Path(base).is_dir() else base, base, None) for base in bases] + jobs
    names = [name for name, _, _ in jobs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two models are called {name}: rename a directory, so that tables can tell them apart")
    return jobs, settings


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
    if not texts:
        raise ValueError(f"{what} holds no abstract")
    keep = np.sort(np.random.default_rng(seed).permutation(len(texts))[:samples or None])
    return [ids[i] for i in keep], [texts[i] for i in keep], what


def data_of(args, runs):
    """-> (--data, --subset), by default those of the first run, on the paper's test set: hep-th, whatever a run was trained on."""
    own = any(r["subset"] == "own" for r in runs)
    return args.data or (runs[0]["data"] if runs else "data/arxiv"), args.subset or ("own" if own else "s1")


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


def print_table(title, header, rows):
    """Columns as wide as they need be, the first to the left and the others to the right."""
    lines = [header] + [[str(cell) for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    print(f"\n{title}")
    for line in lines:
        print("  ".join([line[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:])]))


SPREAD = ["mean [95% interval]", "median", "quartiles", "std"]                           # the columns that `spread` fills


def interval(s, digits=3):
    """A summary -> "mean [low, high]"."""
    return f"{s['mean']:.{digits}f} [{s['low']:.{digits}f}, {s['high']:.{digits}f}]"


def spread(s, digits=3):
    return [interval(s, digits), f"{s['median']:.{digits}f}", f"{s['q1']:.{digits}f} - {s['q3']:.{digits}f}", f"{s['std']:.{digits}f}"]


def write_json(path, what):
    """The old file or the new one, never half of it."""
    with data_arxiv.replacing(path) as file:
        file.write(json.dumps(what, indent=1).encode())
    print(f"written: {path}")


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
                nll = token_nll(model, ids.to(device), lengths).cpu().double()
                for j, part in zip(batch, nll.split((lengths - 1).tolist())):
                    result[j] = part.mean().exp()
                bar.update(len(batch))
                batch = []
    return result, tokens


def bootstrap_interval(values, resamples=9999, level=0.95, seed=0):
    """Percentile bootstrap interval of the mean: (low, high)."""
    rng, n = np.random.default_rng(seed), len(values)
    at_once = max(1, 10 ** 6 // n)                            # resamples in one array of a million numbers
    means = np.concatenate([values[rng.integers(n, size=(min(at_once, resamples - i), n))].mean(1) for i in range(0, resamples, at_once)])
    return tuple(np.quantile(means, [(1 - level) / 2, (1 + level) / 2]).tolist())


def summary(values):
    """Mean with its 95% interval, median, quartiles and standard deviation, as a dictionary of floats."""
    low, high = bootstrap_interval(values)
    q1, median, q3 = np.quantile(values, [0.25, 0.5, 0.75])
    return {"mean": values.mean(), "low": low, "high": high, "median": median, "q1": q1, "q3": q3, "std": values.std()}


def perplexity(args):
    _, _, device = start_processes(args.device)
    dtype, quantize = resolve_dtype(args.dtype, device), None if args.quantize == "none" else "nf4"
    jobs, runs = find_models(args)
    data, subset = data_of(args, runs)
    splits = {s: read_texts(data, s, args.split, args.samples, args.seed) for s in args.across or [subset]}
    rows, base_name = [], {base: name for name, base, adapter in jobs if adapter is None}
    for name, base, adapter in jobs:
        tokenizer = load_tokenizer(base)
        model, how = load_model(base, adapter, quantize, dtype, device)
        if adapter and "NF4" in how and not quantize:
            print(f"note: {base} was saved in 4 bits, so {name} is evaluated unmerged on NF4", file=sys.stderr)
        for s, (ids, texts, what) in splits.items():
            values, tokens = perplexities(model, tokenizer, texts, args.batch_tokens, f"{name} {s}")
            good = ~np.isnan(values)
            if not good.any():
                raise ValueError(f"{what} holds no abstract with text")
            if not good.all():
                print(f"note: {(~good).sum()} empty abstracts are left out", file=sys.stderr)
            rows.append({"model": name, "base": base_name[base], "subset": s, "weights": how, "abstracts": int(good.sum()),
                         "tokens": int(tokens.sum()), **summary(values[good]),
                         "perplexity": dict(zip(np.array(ids)[good].tolist(), values[good].tolist()))})
        del model
    what = f"{args.split} splits of {data}" if args.across else what
    print_table(f"perplexity on {what}", ["model", "on", "abstracts", "weights", *SPREAD],
                [[r["model"], r["subset"], r["abstracts"], r["weights"], *spread(r)] for r in rows])
    report = {"data": what, "split": args.split, "dtype": str(dtype), "seed": args.seed, "models": rows}
    file = f"{'across' if args.across else 'perplexity'}-{'NF4' if quantize else '16bit'}.json"
    for path in [args.json] if args.json else [Path(run) / file for run in args.runs]:
        write_json(path, report)
        (draw_matrix if args.across else draw_perplexity)(rows, what, Path(path).with_suffix(".png"))
    if not (args.json or args.runs):
        print("note: add --json FILE to keep these figures", file=sys.stderr)


def draw_matrix(rows, what, path):
    """Mean perplexity of each model (row) on each category (column); the colour is the change against its base, in percent."""
    plt = pyplot()
    names, subsets = (list(dict.fromkeys(r[k] for r in rows)) for k in ("model", "subset"))
    mean = {(r["model"], r["subset"]): r["mean"] for r in rows}
    base = {r["model"]: r["base"] for r in rows}
    change = np.array([[100 * (mean[n, s] / mean[base[n], s] - 1) for s in subsets] for n in names])          # (models, categories)
    limit = max(1.0, np.abs(change).max())
    fig, ax = plt.subplots(figsize=(3.5 + 1.1 * len(subsets), 1.5 + 0.45 * len(names)), layout="constrained")
    image = ax.imshow(change, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto")
    for i, n in enumerate(names):
        for j, s in enumerate(subsets):
            text = f"{mean[n, s]:.2f}" + (f"\n{change[i, j]:+.1f}%" if n != base[n] else "")
            ax.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if abs(change[i, j]) > 0.5 * limit else "black")
    ax.set_xticks(range(len(subsets)), subsets)
    ax.set_yticks(range(len(names)), names)
    counts = sorted({r["abstracts"] for r in rows})
    ax.set_title(f"mean perplexity, {' - '.join(map(str, counts[::max(1, len(counts) - 1)]))} abstracts a category", fontsize=10)
    fig.colorbar(image, label="change against the base, %")
    save_figure(fig, path)


def pyplot():
    """matplotlib, for files only; imported here, so that nothing but a figure needs it."""
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    return plt


def error_bar(s):
    """A summary's interval as matplotlib wants it: what to go down and up from the mean."""
    return [[s["mean"] - s["low"]], [s["high"] - s["mean"]]]


def save_figure(fig, path):
    """As PNG and as PDF, and close it."""
    for suffix in (".png", ".pdf"):
        fig.savefig(Path(path).with_suffix(suffix), dpi=150)
        print(f"written: {Path(path).with_suffix(suffix)}")
    pyplot().close(fig)


def draw_perplexity(rows, what, path):
    """Cumulative distribution of the abstracts' perplexities, one line a model, the mean with its interval as a point on it."""
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for i, r in enumerate(rows):
        values = np.sort(list(r["perplexity"].values()))
        colour, style = COLOURS[i % 7], ["-", "--", ":"][i // 7 % 3]
        ax.step(values, np.arange(1, len(values) + 1) / len(values), color=colour, ls=style, where="post",
                label=f"{r['model']} ({r['weights']}): {r['mean']:.2f} [{r['low']:.2f}, {r['high']:.2f}]")
        ax.errorbar(r["mean"], (values < r["mean"]).mean(), xerr=error_bar(r), color=colour, marker="o", ms=5, capsize=3)
    ax.set(xscale="log", xlabel="perplexity of an abstract", ylabel="fraction of abstracts below", ylim=(0, 1),
           title=f"{what}, {len(values)} abstracts")
    ax.xaxis.set_major_formatter(plt.ScalarFormatter())
    ax.xaxis.set_minor_formatter(plt.LogFormatter(minor_thresholds=(2, 0.6)))
    ax.grid(alpha=0.3, which="both")
    ax.legend(fontsize=8, title="mean with 95% interval", title_fontsize=8)
    save_figure(fig, path)


# ------------------------------------------------------------------------------------------------------------ completions

FIELDS = ("id", "prompt", "truth", "completion", "model", "settings")


def split_abstract(text):
    """-> (prompt, truth): the first half of the sentences (the larger one if odd) and the rest; of one sentence, half of its words.

    A sentence ends at white space after . ! or ?"""
    parts = re.split(r"(?<=[.!?])\s+", text.strip())
    parts = parts if len(parts) > 1 else text.split()
    half = (len(parts) + 1) // 2
    return " ".join(parts[:half]), " ".join(parts[half:])


def read_completions(path):
    """A file of `complete` -> list of its records. A last line without its newline is being written, and left out.

    Raises ValueError naming the line that is no such record."""
    records = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.endswith("\n"):
                try:
                    records.append(json.loads(line))
                    strings = [records[-1][field] for field in FIELDS[:5]]
                except (ValueError, KeyError, TypeError):
                    strings = [None]
                if not all(isinstance(s, str) for s in strings):
                    raise ValueError(f"{path}, line {number}: not a completion (a JSON object with {', '.join(FIELDS)})")
    return records


def open_completions(path):
    """-> (records so far, file to append to): what a kill left of a last line is cut off. ValueError if another process has the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "ab+")
    try:
        data_arxiv.lock(file)
    except ValueError:
        raise ValueError(f"{path} is in use: another `eval.py complete` is writing it") from None
    file.seek(0)
    content = file.read()
    file.truncate(content.rfind(b"\n") + 1)
    return read_completions(path), file


def complete_batch(model, tokenizer, prompts, ids, args):
    """Completions (str) of prompts; each draws from the random stream of (--seed, its id)."""
    bos, eos = bos_eos(model.config, tokenizer)
    encoded = [data_arxiv.encode(tokenizer, prompt, bos, None)[args.no_bos:] for prompt in prompts]
    longest, room = max(map(len, encoded)) + args.max_new_tokens, model.config.max_position_embeddings
    if longest > room:
        raise ValueError(f"prompt and completion may take {longest} tokens, the model has room for {room}: lower --max-new-tokens")
    ends = model.config.eos_token_id if isinstance(model.config.eos_token_id, list) else eos
    seeds = [zlib.crc32(f"{args.seed} {i}".encode()) for i in ids]
    new = generate_text(model, encoded, args.max_new_tokens, args.temperature, args.top_k, ends, seeds)
    return [tokenizer.decode(p + n)[len(tokenizer.decode(p)):] for p, n in zip(encoded, new)]      # a word begun in the prompt goes on


def complete(args):
    _, _, device = start_processes(args.device)
    dtype, quantize = resolve_dtype(args.dtype, device), None if args.quantize == "none" else "nf4"
    jobs, runs = find_models(args)
    if args.prompt is not None:
        if not args.prompt.strip():
            raise ValueError("--prompt is empty: give a few words to go on from")
        for name, base, adapter in jobs[1:] or jobs:
            model, _ = load_model(base, adapter, quantize, dtype, device)
            completion, = complete_batch(model, load_tokenizer(base), [args.prompt], ["prompt"], args)
            print(f"[{name}]\n{args.prompt}{completion}\n", flush=True)
            del model                                         # before the next one comes
        return
    data, subset = data_of(args, runs)
    ids, texts, what = read_texts(data, subset, args.split, args.samples, args.seed)
    prompts, truths = zip(*map(split_abstract, texts))
    name = Path(data).stem if Path(data).is_file() else subset if subset == "control" else f"{subset}-{args.split}"
    beside = Path(args.runs[0]).resolve().parent if args.runs else Path("out")
    out = Path(args.out or beside / f"completions-{re.sub(r'[^a-zA-Z0-9.-]', '_', name)}.jsonl")
    records, file = open_completions(out)
    have = {(r["model"], r["id"]): r["settings"] for r in records}
    order = sorted(range(len(ids)), key=lambda i: len(prompts[i]))                      # like lengths together: little padding
    with file, tqdm(total=len(jobs) * len(ids), desc="completions", unit="completion", dynamic_ncols=True) as bar:
        for name, base, adapter in jobs:
            settings = {"base": base, "adapter": adapter and str(adapter), "quantize": args.quantize, "dtype": str(dtype).removeprefix("torch."),
                        "temperature": args.temperature, "top_k": args.top_k, "max_new_tokens": args.max_new_tokens, "seed": args.seed,
                        "bos": not args.no_bos, "data": what}
            old = next((s for (model, _), s in have.items() if model == name and s != settings), None)
            if old:
                changed = "; ".join(f"{k} was {old.get(k)!r}, now {settings[k]!r}" for k in settings if old.get(k) != settings[k])
                raise ValueError(f"{out} holds completions of {name} with other settings ({changed}): choose another --out")
            bar.set_postfix(model=name)
            model = None
            for start in range(0, len(order), args.batch_size):
                batch = order[start:start + args.batch_size]
                missing = [i for i in batch if (name, ids[i]) not in have]
                if missing:                                   # the whole batch, even if some of it is there: the same batch rounds the same
                    if model is None:
                        model, _ = load_model(base, adapter, quantize, dtype, device)
                        tokenizer = load_tokenizer(base)
                    completions = complete_batch(model, tokenizer, [prompts[i] for i in batch], [ids[i] for i in batch], args)
                    for i, text in zip(batch, completions):
                        if i in missing:
                            record = dict(zip(FIELDS, (ids[i], prompts[i], truths[i], text, name, settings)))
                            file.write(json.dumps(record).encode() + b"\n")
                            file.flush()
                            os.fsync(file.fileno())
                bar.update(len(batch))
    print(f"{out}: {len(ids)} abstracts ({what}), {len(jobs)} models: {', '.join(name for name, _, _ in jobs)}\n"
          f"next: python eval.py semscore {out}, then signatures and rate")


# --------------------------------------------------------------------------------------------------------------- SemScore

# Where BERT and MPNet keep what, in each layer: query, key, value, the attention's output and the norm after it.
LAYER = {"bert": ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense", "attention.output.LayerNorm"],
         "mpnet": ["attention.attn.q", "attention.attn.k", "attention.attn.v", "attention.attn.o", "attention.LayerNorm"]}


@dataclass
class Encoder:
    """A sentence encoder: its config.json, its tensors (float32) by checkpoint name, and its tokenizer."""
    config: dict
    tensors: dict
    tokenizer: object


def load_encoder(path, device="cpu"):
    """A directory or hub id with a BERT or MPNet in safetensors -> Encoder. ValueError in one sentence for anything else."""
    from tokenizers import Tokenizer
    directory = fetch(path)
    try:
        config = json.loads((directory / "config.json").read_text())
        tensors = load_file(directory / "model.safetensors")
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    except (OSError, ValueError, SafetensorError) as e:
        raise ValueError(f"{path} is no sentence encoder: config.json, model.safetensors and tokenizer.json are needed ({e})") from None
    except Exception as e:                                    # what tokenizers raises has no type of its own
        raise ValueError(f"{directory / 'tokenizer.json'} cannot be read ({e}); get the encoder again") from None
    kind = config.get("model_type")
    if kind not in LAYER or config.get("hidden_act", "gelu") != "gelu" or config.get("position_embedding_type", "absolute") != "absolute":
        raise ValueError(f"{path} is a {kind} ({config.get('hidden_act')}); only BERT and MPNet encoders with gelu are computed here")
    tensors = {name.removeprefix(f"{kind}."): t.to(device, torch.float32) for name, t in tensors.items() if t.is_floating_point()}
    tokenizer.no_padding()
    tokenizer.enable_truncation(min(384, config["max_position_embeddings"] - 2))
    return Encoder(config, tensors, tokenizer)


def relative_buckets(T, buckets=32, furthest=128):
    """(T, T) bucket of the distance from each token (row) to each other, as in T5 (arXiv:1910.10683): half of the buckets for each
    direction, in each a half for single distances and a half on a logarithmic scale up to `furthest`."""
    distance = torch.arange(T)[None, :] - torch.arange(T)[:, None]
    half, exact = buckets // 2, buckets // 4
    far = exact + (torch.log(distance.abs().clamp(min=1) / exact) / math.log(furthest / exact) * (half - exact)).long()
    return torch.where(distance.abs() < exact, distance.abs(), far.clamp(max=half - 1)) + half * (distance > 0)


def encode_sentences(encoder, ids, mask):
    """Hidden states (B, T, C) of the last layer. ids (B, T); mask (B, T), False at padding on the right."""
    c, w, kind = encoder.config, encoder.tensors, encoder.config["model_type"]
    (B, T), H = ids.shape, c["num_attention_heads"]

    def linear(x, name):
        return F.linear(x, w[name + ".weight"], w[name + ".bias"])

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"], c.get("layer_norm_eps", 1e-12))

    x = w["embeddings.word_embeddings.weight"][ids]
    if kind == "bert":
        x = x + w["embeddings.position_embeddings.weight"][:T] + w["embeddings.token_type_embeddings.weight"][0]
    else:                                                     # MPNet counts from 2, after its padding id
        x = x + w["embeddings.position_embeddings.weight"][2:T + 2]
    x = norm(x, "embeddings.LayerNorm")
    bias = torch.zeros(B, 1, 1, T, device=x.device).masked_fill(~mask[:, None, None], -torch.inf)
    if kind == "mpnet":                                       # (T, T, H) -> (1, H, T, T)
        bias = bias + w["encoder.relative_attention_bias.weight"][relative_buckets(T).to(x.device)].permute(2, 0, 1)[None]
    for i in range(c["num_hidden_layers"]):
        layer = f"encoder.layer.{i}."
        q, k, v = (linear(x, layer + name).view(B, T, H, -1).transpose(1, 2) for name in LAYER[kind][:3])     # (B, T, C) -> (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(B, H, T, T)).transpose(1, 2).reshape(B, T, -1)
        x = norm(x + linear(y, layer + LAYER[kind][3]), layer + LAYER[kind][4])
        y = F.gelu(linear(x, layer + "intermediate.dense"))
        x = norm(x + linear(y, layer + "output.dense"), layer + "output.LayerNorm")
    return x


@torch.no_grad()
def embed(encoder, texts, batch_size=16):
    """Sentence embeddings (N, D) float32, on the CPU: the mean over each text's tokens, at most 384 of them; not normalised."""
    device = encoder.tensors["embeddings.word_embeddings.weight"].device
    sequences = [e.ids for e in encoder.tokenizer.encode_batch(list(texts))]
    result = torch.empty(len(texts), encoder.config["hidden_size"])
    order = sorted(range(len(texts)), key=lambda i: len(sequences[i]))
    for start in tqdm(range(0, len(order), batch_size), desc="embeddings", unit="batch", dynamic_ncols=True):
        rows = order[start:start + batch_size]
        lengths = torch.tensor([len(sequences[i]) for i in rows])
        ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
        for row, i in zip(ids, rows):
            row[:len(sequences[i])] = torch.tensor(sequences[i])
        mask = torch.arange(ids.shape[1]) < lengths[:, None]                             # (B, T)
        hidden = encode_sentences(encoder, ids.to(device), mask.to(device)).cpu()
        result[rows] = (hidden * mask[..., None]).sum(1) / lengths[:, None]
    return result


@torch.no_grad()
def embed_llm(model, tokenizer, texts, batch_tokens=4096):
    """The LLM's own embeddings (N, C) float32: the mean of the last hidden states (after the final norm) over a text's tokens but BOS."""
    bos, _ = bos_eos(model.config, tokenizer)
    device, result, batch = model.lm_head.weight.device, [], []
    for n, text in enumerate(tqdm(texts, desc="embeddings", unit="abstract", dynamic_ncols=True), 1):
        batch.append(data_arxiv.encode(tokenizer, text, bos, None))
        if n == len(texts) or sum(map(len, batch)) + len(batch[-1]) > batch_tokens:
            ids, lengths = data_arxiv.collate(batch)
            hidden = model.model(ids[None].to(device), lengths=lengths)[0].float().cpu()                      # (T, C)
            result += [part[1:].mean(0) for part in hidden.split(lengths.tolist())]
            batch = []
    return torch.stack(result)


def grouped(records):
    """Records of completions -> {model: {id: record}}, in the file's order."""
    models = {}
    for r in records:
        models.setdefault(r["model"], {})[r["id"]] = r
    return models


def read_file(args):
    """The one completions file of a command line -> (path, records)."""
    if len(args.runs) != 1:
        raise ValueError("give one file that `eval.py complete` wrote")
    path = Path(args.runs[0])
    records = read_completions(path)
    if not records:
        raise ValueError(f"{path} holds no completion")
    return path, records


def semscore(args):
    if args.pairwise:
        return pairwise(args)
    path, records = read_file(args)
    _, _, device = start_processes(args.device)
    encoder = load_encoder(args.encoder, device)
    pairs = {model: {i: (f"{r['prompt']} {r['truth']}", r["prompt"] + r["completion"]) for i, r in of_model.items()}
             for model, of_model in grouped(records).items()}
    pairs["prompt alone"] = {r["id"]: (f"{r['prompt']} {r['truth']}", r["prompt"]) for r in records}
    texts = list(dict.fromkeys(text for of_model in pairs.values() for pair in of_model.values() for text in pair))
    vectors = dict(zip(texts, F.normalize(embed(encoder, texts).double(), dim=1)))
    rows = []
    for model, of_model in pairs.items():
        scores = {i: float(vectors[a] @ vectors[b]) for i, (a, b) in of_model.items()}
        rows.append({"model": model, "abstracts": len(scores), **summary(np.array(list(scores.values()))), "scores": scores})
    print_table(f"SemScore of {path} with {args.encoder}", ["model", "abstracts", *SPREAD], [[r["model"], r["abstracts"], *spread(r, 4)] for r in rows])
    write_json(path.with_suffix(".semscore.json"), {"file": str(path), "encoder": args.encoder, "models": rows})


def pairwise(args):
    """Cosine similarity of all pairs of different abstracts, within and between categories, from each LLM's own embeddings."""
    _, _, device = start_processes(args.device)
    dtype, quantize = resolve_dtype(args.dtype, device), None if args.quantize == "none" else "nf4"
    jobs, runs = find_models(args)
    data, subset = data_of(args, runs)
    texts = {name: read_texts(data, name, args.split, args.samples, args.seed)[1] for name in args.across or [subset]}
    rows = []
    for name, base, adapter in jobs:
        model, _ = load_model(base, adapter, quantize, dtype, device)
        tokenizer = load_tokenizer(base)
        vectors = {s: F.normalize(embed_llm(model, tokenizer, t).double(), dim=1) for s, t in texts.items()}
        del model
        for i, a in enumerate(texts):
            for b in list(texts)[i:]:
                cosine = vectors[a] @ vectors[b].T                                      # (N_a, N_b)
                cosine = cosine[torch.ones_like(cosine, dtype=torch.bool).triu(1)] if a == b else cosine.flatten()
                if not len(cosine):
                    raise ValueError(f"{a} holds fewer than two abstracts: there is no pair")
                q1, median, q3 = np.quantile(cosine, [0.25, 0.5, 0.75])
                rows.append({"model": name, "a": a, "b": b, "pairs": len(cosine), "mean": float(cosine.mean()), "std": float(cosine.std()),
                             "q1": q1, "median": median, "q3": q3})
    print_table("cosine similarity of pairs of abstracts, mean-pooled last layer", ["model", "between", "pairs", "mean", "std", "median", "quartiles"],
                [[r["model"], f"{r['a']} - {r['b']}", r["pairs"], *(f"{r[k]:.4f}" for k in ("mean", "std", "median")), f"{r['q1']:.4f} - {r['q3']:.4f}"]
                 for r in rows])
    if args.json or args.runs:
        out = args.json or Path(args.runs[0]) / "pairwise.json"
        write_json(out, {"data": data, "split": args.split, "samples": args.samples, "models": rows})


# ------------------------------------------------------------------------------------------------------------- signatures

METADATA = {  # what the arXiv shows around an abstract, and an abstract itself seldom holds
    "comments": r"\b(comments?|report[- ]no\.?|journal[- ]ref\.?|subjects?|doi)\s*:|\b\d+ (pages|figures|pp\b)|\blatex\b",
    "keywords": r"\b(key ?words?|pacs|msc)\b( numbers?| codes?)?( \(\d+\))?\s*:",
    "arXiv number": r"\barxiv\s*:|\b\d{4}\.\d{4,5}(v\d+)?\b|"
                    r"\b(hep-(th|ph|ex|lat)|gr-qc|astro-ph|cond-mat|quant-ph|nucl-th|math|math-ph)/\d{7}\b",
    "URL": r"\bhttps?://|\bwww\.",
}


def words_of(text):
    return re.findall(r"\w+", text.lower())


def entropy(words):
    """Shannon entropy of the words' frequencies, bits; 0 for none. At most log2(number of words)."""
    p = np.array(list(Counter(words).values())) / max(1, len(words))
    return float(-(p * np.log2(p)).sum()) if words else 0.0


def ngrams(words, n):
    return list(zip(*(words[i:] for i in range(n))))


def distinct(words, n):
    """Different n-grams over all n-grams; 1 where there are none to repeat."""
    grams = ngrams(words, n)
    return len(set(grams)) / len(grams) if grams else 1.0


def longest_repeat(words):
    """Words in the longest span that occurs at two places. If a span does, its beginnings do: bisection over the length."""
    low, high = 0, max(0, len(words) - 1)
    while low < high:
        n = (low + high + 1) // 2
        low, high = (n, high) if distinct(words, n) < 1 else (low, n - 1)
    return low


def signature(text, truth):
    """The measures of one completion, as a dictionary of floats."""
    words, kinds = words_of(text), {kind: bool(re.search(pattern, text, re.IGNORECASE)) for kind, pattern in METADATA.items()}
    return {"words": len(words), "length / truth": len(words) / max(1, len(words_of(truth))), "entropy": entropy(words),
            "distinct-1": distinct(words, 1), "distinct-2": distinct(words, 2), "distinct-3": distinct(words, 3),
            "longest repeat": longest_repeat(words), "metadata": float(any(kinds.values())), **{k: float(v) for k, v in kinds.items()}}


def drift_of(texts, window):
    """Lists of words -> for each window of so many words the means over the texts that hold it; texts of at least two windows only."""
    cut = [[words[i:i + window] for i in range(0, len(words) - window + 1, window)] for words in texts]
    cut = [windows for windows in cut if len(windows) > 1]
    result = []
    for k in range(max(map(len, cut), default=0)):
        there = [windows[k] for windows in cut if len(windows) > k]
        measures = {"entropy": entropy, "distinct-2": lambda words: distinct(words, 2), "longest repeat": longest_repeat}
        result.append({"from word": k * window, "completions": len(there)} | {
            name: float(np.mean([measure(words) for words in there])) for name, measure in measures.items()})
    return result


def signatures(args):
    path, records = read_file(args)
    texts = {"truth": {r["id"]: (r["truth"], r["truth"]) for r in records}}
    texts |= {model: {i: (r["completion"], r["truth"]) for i, r in rs.items()} for model, rs in grouped(records).items()}
    rows, drift = [], []
    for model, pairs in tqdm(texts.items(), desc="signatures", unit="model", dynamic_ncols=True):
        each = [signature(*pair) for pair in pairs.values()]
        rows.append({"model": model, "abstracts": len(each), "means": {
            k: {**summary(np.array([m[k] for m in each], float)), "abstracts": len(each)} for k in each[0]}})
        drift += [{"model": model, **d} for d in drift_of([words_of(text) for text, _ in pairs.values()], args.window)]
    names = list(rows[0]["means"])
    print_table(f"means over completions of {path} (metadata and its kinds: the share of completions)", ["model", *names],
                [[r["model"], *(f"{r['means'][n]['mean']:.3f}" for n in names)] for r in rows])
    if drift:
        print_table(f"drift: completions of two windows and more, by windows of {args.window} words", list(drift[0]),
                    [[f"{v:.3f}" if isinstance(v, float) else v for v in d.values()] for d in drift])
    write_json(path.with_suffix(".signatures.json"), {"file": str(path), "window": args.window, "models": rows, "drift": drift})


# ----------------------------------------------------------------------------------------------------------- human rating

CRITERIA = ["grammar", "coherence", "relevance", "accuracy", "creativity", "overall"]
STYLE = """
body { font: 17px/1.5 Georgia, serif; max-width: 52rem; margin: 1.5rem auto; padding: 0 1rem; color: #111; background: #fff }
header, nav, legend, label, h2, h3, #hint { font-family: system-ui, sans-serif } h2 { font-size: 1.2rem } h3 { font-size: 1rem; margin: 0 }
#hint { font-size: 0.85rem; color: #555 } #message { color: #a40000; font-weight: bold } progress { width: 12rem }
.prompt { background: #f1f1f1; padding: 0.6rem 1rem } .text { white-space: pre-wrap; overflow-wrap: anywhere }
section { border: 1px solid #bbb; border-radius: 6px; padding: 0.8rem 1rem; margin: 1rem 0 }
fieldset { border: 0; border-left: 4px solid transparent; padding: 0 0.4rem; margin: 0; display: flex; gap: 0.5rem }
fieldset:focus-within { border-left-color: #0072b2; background: #eef6fb } fieldset.rated legend::after { content: " \\2713" }
legend { float: left; width: 7rem; font-size: 0.9rem } label { font-size: 0.85rem } button { font-size: 1rem; padding: 0.2rem 0.8rem }
.frac { display: inline-block; vertical-align: middle; text-align: center; font-size: 0.85em; line-height: 1.15 }
.frac > * { display: block; padding: 0 0.15em } .frac > :first-child { border-bottom: 1px solid } .root { border-top: 1px solid }
.cal { font-family: "Snell Roundhand", "URW Chancery L", cursive } .rm, .rm i { font-style: normal } sub, sup { font-size: 0.7em; line-height: 0 }
"""
SCRIPT = r"""
"use strict";
// Completions are untrusted: text enters the page through text nodes alone, never as HTML.
function element(tag, name, ...children) {
  const e = document.createElement(tag);
  if (name) e.className = name;
  e.append(...children);
  return e;
}

// LaTeX between dollars, \( \) and \[ \] becomes HTML elements; commands that are not known here stay as source.
const SYMBOLS = {}, pairs = `alpha α beta β gamma γ delta δ epsilon ϵ varepsilon ε zeta ζ eta η theta θ vartheta ϑ iota ι kappa κ lambda λ mu μ nu ν xi ξ pi π rho ρ
 sigma σ tau τ upsilon υ phi ϕ varphi φ chi χ psi ψ omega ω Gamma Γ Delta Δ Theta Θ Lambda Λ Xi Ξ Pi Π Sigma Σ Upsilon Υ Phi Φ Psi Ψ
 Omega Ω times × cdot · pm ± mp ∓ to → rightarrow → leftarrow ← leftrightarrow ↔ Rightarrow ⇒ mapsto ↦ infty ∞ sim ∼ simeq ≃ approx ≈
 equiv ≡ cong ≅ propto ∝ le ≤ leq ≤ ge ≥ geq ≥ ll ≪ gg ≫ ne ≠ neq ≠ lesssim ≲ gtrsim ≳ partial ∂ nabla ∇ int ∫ oint ∮ sum ∑ prod ∏ in ∈
 notin ∉ subset ⊂ supset ⊃ cup ∪ cap ∩ otimes ⊗ oplus ⊕ wedge ∧ vee ∨ forall ∀ exists ∃ langle ⟨ rangle ⟩ ldots … dots … cdots ⋯
 dagger † ddagger ‡ star ⋆ ast ∗ circ ∘ bullet • ell ℓ hbar ℏ Re ℜ Im ℑ prime ′ perp ⊥ parallel ∥ mid | setminus ∖ Box □ aleph ℵ vert |
 Vert ‖`.split(/\s+/);
for (let i = 0; i < pairs.length; i += 2) SYMBOLS["\\" + pairs[i]] = pairs[i + 1];
for (const f of ["sin", "cos", "tan", "exp", "log", "ln", "det", "dim", "lim", "max", "min", "ker"]) SYMBOLS["\\" + f] = f;
for (const s of ["\\left", "\\right", "\\big", "\\Big", "\\displaystyle", "\\!"]) SYMBOLS[s] = "";
for (const s of ["\\,", "\\;", "\\:", "\\ ", "\\quad", "\\qquad", "~"]) SYMBOLS[s] = " ";
for (const c of "{}%&#$_") SYMBOLS["\\" + c] = c;
Object.assign(SYMBOLS, {"-": "−", "'": "′"});
const FONTS = {bf: ["b"], rm: ["span", "rm"], it: ["i"], cal: ["span", "cal"], bb: ["b"], boldsymbol: ["b"]};
FONTS.text = FONTS.operatorname = FONTS.rm;
for (const f of ["bf", "rm", "it", "cal", "bb"]) FONTS["math" + f] = FONTS["text" + f] = FONTS[f];
const BB = {A: "𝔸", C: "ℂ", H: "ℍ", N: "ℕ", P: "ℙ", Q: "ℚ", R: "ℝ", S: "𝕊", T: "𝕋", Z: "ℤ"};
const ACCENTS = {"\\bar": "\u0304", "\\overline": "\u0305", "\\hat": "\u0302", "\\widehat": "\u0302", "\\tilde": "\u0303",
                 "\\widetilde": "\u0303", "\\dot": "\u0307", "\\ddot": "\u0308", "\\vec": "\u20d7"};

function sequence(t) {                                        // up to the end of the group
  const out = document.createDocumentFragment();
  while (t.i < t.tokens.length && t.tokens[t.i] !== "}") out.append(atom(t));
  return out;
}

function atom(t) {
  if (t.i >= t.tokens.length) throw new Error("an argument is missing");
  const x = t.tokens[t.i++], name = x.slice(1);
  if (x === "{") {
    const inside = sequence(t);
    if (t.tokens[t.i++] !== "}") throw new Error("a brace is not closed");
    return inside;
  }
  if (/\s/.test(x)) return " ";
  if (x === "^" || x === "_") return element(x === "^" ? "sup" : "sub", "", argument(t));
  if (x === "\\frac") return element("span", "frac", element("span", "", argument(t)), element("span", "", argument(t)));
  if (x === "\\sqrt") return element("span", "", "√", element("span", "root", argument(t)));
  if (Object.hasOwn(ACCENTS, x)) return element("span", "", argument(t), ACCENTS[x]);
  if (x[0] === "\\" && Object.hasOwn(FONTS, name)) {           // \cal N: a switch up to the group's end; \mathcal{N}: an argument
    const inside = name.length < 4 ? sequence(t) : argument(t);
    if (name.endsWith("bb") && Object.hasOwn(BB, inside.textContent)) return BB[inside.textContent];
    return element(FONTS[name][0], FONTS[name][1], inside);
  }
  if (Object.hasOwn(SYMBOLS, x)) return SYMBOLS[x];
  return /^[a-zA-Z]$/.test(x) ? element("i", "", x) : x;
}

function argument(t) {
  while (t.tokens[t.i] === " ") t.i++;
  const out = document.createDocumentFragment();
  out.append(atom(t));
  return out;
}

function tex(text) {
  const out = document.createDocumentFragment();
  text.split(/(\$\$[^$]+\$\$|\$[^$]+\$|\\\([^]+?\\\)|\\\[[^]+?\\\])/).forEach((part, i) => {
    if (i % 2 === 0) return out.append(part);
    const source = part.startsWith("$$") || part[0] === "\\" ? part.slice(2, -2) : part.slice(1, -1);
    const t = {tokens: source.match(/\\[a-zA-Z]+|\\[^]|[^]/gu) || [], i: 0};
    try {
      const math = sequence(t);
      out.append(t.i < t.tokens.length ? part : element("span", "math", math));
    } catch (e) { out.append(part); }                         // not well formed, or nested too deep: the source
  });
  return out;
}

const data = JSON.parse(document.getElementById("data").textContent), slot = "ratings " + data.page;
const main = document.querySelector("main"), rater = document.getElementById("rater"), message = document.getElementById("message");
let state = {rater: "", at: 0, ratings: {}};
const forgetful = "This browser keeps nothing: save before you close the page.";
try { Object.assign(state, JSON.parse(localStorage.getItem(slot))); } catch (e) { message.textContent = forgetful; }

function keep() {
  try { localStorage.setItem(slot, JSON.stringify(state)); } catch (e) { message.textContent = forgetful; }
  const total = data.criteria.length * data.abstracts.reduce((n, a) => n + a.texts.length, 0);
  const done = Object.values(state.ratings).reduce((n, r) => n + Object.keys(r).length, 0);
  document.getElementById("progress").value = done / total;
  document.getElementById("count").textContent = `${done} of ${total}`;
}

function card(text, a, j) {
  const item = `${a.key}/${j}`, title = element("h3", "", "Continuation " + String.fromCharCode(65 + j));
  const section = element("section", "", title, element("p", "text", text ? tex(text) : "(nothing)"));
  for (const criterion of data.criteria) {
    const row = element("fieldset", "", element("legend", "", criterion));
    for (let n = 1; n <= 10; n++) {
      const input = element("input");
      Object.assign(input, {type: "radio", name: item + criterion, value: n, checked: (state.ratings[item] || {})[criterion] === n});
      input.addEventListener("change", () => {
        (state.ratings[item] ||= {})[criterion] = n;
        row.className = "rated";
        keep();
      });
      row.append(element("label", "", input, String(n)));
    }
    if ((state.ratings[item] || {})[criterion]) row.className = "rated";
    section.append(row);
  }
  return section;
}

function draw(step) {
  state.at = Math.min(Math.max(state.at + step, 0), data.abstracts.length - 1);
  const a = data.abstracts[state.at];
  const title = element("h2", "", `Abstract ${state.at + 1} of ${data.abstracts.length}`);
  main.replaceChildren(title, element("p", "prompt text", tex(a.prompt)), ...a.texts.map((text, j) => card(text, a, j)));
  keep();
  scrollTo(0, 0);
}

function go(rows, i) {
  const row = rows[Math.min(Math.max(i, 0), rows.length - 1)];
  (row.querySelector(":checked") || row.querySelector("input")).focus();
  row.scrollIntoView({block: "center"});
}

document.addEventListener("keydown", e => {
  if (e.target === rater || e.ctrlKey || e.metaKey || e.altKey) return;
  const rows = [...main.querySelectorAll("fieldset")], i = rows.indexOf(document.activeElement.closest("fieldset"));
  if (/^[0-9]$/.test(e.key)) {
    rows[Math.max(i, 0)].querySelectorAll("input")[(Number(e.key) + 9) % 10].click();
    go(rows, Math.max(i, 0) + 1);
  } else if (e.key === "ArrowDown" || e.key === "ArrowUp") go(rows, i + (e.key === "ArrowDown" ? 1 : -1));
  else if (e.key === "n" || e.key === "p") draw(e.key === "n" ? 1 : -1);
  else return;
  e.preventDefault();
});

rater.value = state.rater;
rater.addEventListener("input", () => { state.rater = rater.value.trim(); keep(); });
document.getElementById("previous").addEventListener("click", () => draw(-1));
document.getElementById("next").addEventListener("click", () => draw(1));
document.getElementById("save").addEventListener("click", () => {
  message.textContent = state.rater ? "" : "Give your name first: it tells your ratings from the others'.";
  if (!state.rater) return rater.focus();
  const link = element("a");
  const content = JSON.stringify({page: data.page, rater: state.rater, ratings: state.ratings}, null, 1);
  link.href = URL.createObjectURL(new Blob([content], {type: "application/json"}));
  link.download = `ratings-${state.rater.replace(/[^a-zA-Z0-9]+/g, "_")}-${data.page}.json`;
  link.click();
});
draw(0);
"""


def rating_page(abstracts, page):
    """The self-contained HTML. A content security policy lets this script and this style run and nothing else, and loads nothing."""
    sha = {name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for name, text in (("script", SCRIPT), ("style", STYLE))}
    policy = f"default-src 'none'; script-src 'sha256-{sha['script']}'; style-src 'sha256-{sha['style']}'; base-uri 'none'; form-action 'none'"
    data = json.dumps({"page": page, "criteria": CRITERIA, "abstracts": abstracts}).replace("<", "\\u003c")       # no text can close the element
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">
<title>Rate abstracts</title><style>{STYLE}</style></head><body>
<header><label>Your name <input id="rater" type="text"></label>
<progress id="progress"></progress> <span id="count"></span> <button id="save">Save as JSON</button>
<p id="hint">The beginning of an abstract, then several continuations in random order. Rate each from 1 (worst) to 10 (best). Keys: 1 to 9,
and 0 for ten, rate and go on; up and down choose a line; n and p turn to the next and previous abstract. What you enter stays in this
browser until you save it.</p><p id="message" role="alert"></p></header>
<main></main><nav><button id="previous">Previous</button> <button id="next">Next</button></nav>
<script type="application/json" id="data">{data}</script><script>{SCRIPT}</script></body></html>
"""


def rate(args):
    """Write the page for blind rating, and the key that tells which text is whose; or collect the raters' files."""
    path, records = read_file(args)
    if args.collect:
        return collect(path, args.collect)
    models = grouped(records)
    ids = [i for i in next(iter(models.values())) if all(i in of_model for of_model in models.values())]
    if not ids:
        raise ValueError(f"no abstract of {path} has a completion by every model: finish `eval.py complete` first")
    rng, abstracts, key = np.random.default_rng(args.seed), [], {}
    for n, i in enumerate(rng.permutation(ids)[:args.samples or None].tolist()):
        first = next(iter(models.values()))[i]
        texts = [("truth", first["truth"])] + [(model, of_model[i]["completion"]) for model, of_model in models.items()]
        order = rng.permutation(len(texts))
        abstracts.append({"key": n, "prompt": first["prompt"], "texts": [texts[k][1].strip() for k in order]})
        key |= {f"{n}/{j}": {"id": i, "model": texts[k][0]} for j, k in enumerate(order)}
    page = hashlib.sha256(json.dumps(abstracts).encode()).hexdigest()[:12]
    html = Path(args.out or path.with_suffix(".rate.html"))
    with data_arxiv.replacing(html) as file:
        file.write(rating_page(abstracts, page).encode())
    print(f"written: {html} ({len(abstracts)} abstracts, {len(models) + 1} texts each): give it to the raters")
    write_json(path.with_suffix(f".{page}.key.json"), key)
    print(f"keep the key to yourself; then: python eval.py rate {path} --collect RATER1.json RATER2.json ...")


def krippendorff_alpha(values):
    """Agreement of raters beyond chance, Krippendorff's alpha for interval data: 1 - observed / expected squared difference of pairs.

    values (raters, items), NaN where a rater gave none; items with one rating say nothing. 1: full agreement, 0: as by chance; NaN where
    there is nothing to compare. K. Krippendorff, Content Analysis (2004), chapter 11."""
    items = [v[~np.isnan(v)] for v in values.T]
    items = [v for v in items if len(v) > 1]
    every = np.concatenate(items) if items else np.empty(0)
    observed = sum(((v[:, None] - v) ** 2).sum() / (len(v) - 1) for v in items) / max(1, len(every))
    expected = 2 * len(every) * every.var() / (len(every) - 1) if len(every) else 0.0       # over all pairs, whoever rated whatever
    return float(1 - observed / expected) if expected else math.nan


def read_rating(file, path):
    """A rater's file -> (rater, {(model, abstract id): {criterion: 1..10}}), by the key of its page. ValueError naming what is wrong."""
    try:
        saved = json.loads(Path(file).read_text())
        rater, page, ratings = str(saved["rater"]), str(saved["page"]), saved["ratings"].items()
        if not re.fullmatch("[0-9a-f]{12}", page):
            raise ValueError(f"page {page!r}")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{file} is no file that the rating page saved ({e})") from None
    key = read_report(path.with_suffix(f".{page}.key.json"))
    if not key:
        raise ValueError(f"{file} rates a page whose key is not there ({path.with_suffix(f'.{page}.key.json')}): is it for other completions?")
    result = {}
    for item, marks in ratings:
        good = isinstance(marks, dict) and all(c in CRITERIA and type(v) is int and 1 <= v <= 10 for c, v in marks.items())
        if item not in key or not good:
            raise ValueError(f"{file}: item {item} is not on its page, or has a mark that is not a number from 1 to 10")
        result[key[item]["model"], key[item]["id"]] = marks
    return rater, result


def collect(path, files):
    """Several raters' files -> per model and criterion the mean over abstracts (of the mean over raters) with its interval; agreement."""
    raters = {}
    for file in files:
        rater, ratings = read_rating(file, path)
        if rater in raters:
            raise ValueError(f"{file}: there is another file by the rater {rater}")
        raters[rater] = ratings
    items = list(dict.fromkeys(item for ratings in raters.values() for item in ratings))
    marks = {c: np.array([[ratings.get(item, {}).get(c, np.nan) for item in items] for ratings in raters.values()], float)
             for c in CRITERIA}                                                         # (raters, items)
    agreement, rows = {c: krippendorff_alpha(v) for c, v in marks.items()}, []
    for model in dict.fromkeys(model for model, _ in items):
        means = {}
        for c, v in marks.items():
            v = v[:, [m == model for m, _ in items]]
            v = v[:, ~np.isnan(v).all(0)]
            if v.size:
                means[c] = {**summary(np.nanmean(v, 0)), "abstracts": v.shape[1], "ratings": int((~np.isnan(v)).sum())}
        rows.append({"model": model, "means": means})
    if not any(r["means"] for r in rows):
        raise ValueError("these files hold no rating yet")
    best_first = sorted(rows, key=lambda r: -r["means"].get("overall", {"mean": 0})["mean"])
    print_table(f"human rating, 1-10, of {path} by {', '.join(raters)}: mean over abstracts [95% interval]", ["model", *CRITERIA, "ratings"],
                [[r["model"], *(interval(r["means"][c], 2) if c in r["means"] else "-" for c in CRITERIA), sum(m["ratings"] for m in r["means"].values())]
                 for r in best_first] + [["agreement (alpha)", *(f"{a:.3f}" for a in agreement.values()), ""]])
    write_json(path.with_suffix(".rating.json"), {"file": str(path), "raters": list(raters), "models": rows,
                                                  "agreement": {c: None if math.isnan(a) else a for c, a in agreement.items()}})


# ----------------------------------------------------------------------------------------------- what was measured; sharing


def measured(name, directory, completions=None):
    """All that was measured of one model -> {quantity: summary}, read from a run directory and, of `completions`, the files beside it."""
    found = {}
    for file, quantity in (("perplexity-16bit.json", "perplexity"), ("perplexity-NF4.json", "perplexity, NF4")):
        report = read_report(Path(directory) / file)
        for row in report.get("models", []):
            if row["model"] == name:
                found[quantity] = {k: v for k, v in row.items() if k != "perplexity"} | {"on": report["data"]}
    for kind in ("semscore", "signatures", "rating") if completions else ():
        for row in read_report(Path(completions).with_suffix(f".{kind}.json")).get("models", []):
            if row["model"] == name and kind == "semscore":
                found["SemScore"] = row
            elif row["model"] == name:
                found |= {f"human rating, {k}" if kind == "rating" else k: v for k, v in row["means"].items()}
    return found


def read_report(path):
    """A JSON report of ours -> dictionary; empty where the file is not there (yet)."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        return {}
    except ValueError as e:
        raise ValueError(f"{path} is no report of eval.py ({e}): write it again") from None


# A column each, if measured.
COMPARED = ["perplexity", "perplexity, NF4", "SemScore", "human rating, overall", "entropy", "distinct-2", "longest repeat", "metadata"]


def compare(args):
    """One table and one figure over runs and their bases, from the reports that the other commands wrote."""
    settings = [read_run(run) for run in args.runs]
    names = [Path(run).resolve().name for run in args.runs]
    models = {Path(s["base"]).name if Path(s["base"]).is_dir() else s["base"]: (run, None) for run, s in zip(args.runs, settings)}
    models |= {name: (run, s) for name, run, s in zip(names, args.runs, settings)}
    if len(set(names)) < len(names):
        raise ValueError("two runs have directories of the same name: rename one, so that the table can tell them apart")
    rows = []
    for name, (run, s) in models.items():
        losses = [r["validation_loss"] for r in read_metrics(run) if "validation_loss" in r] if s else []
        rows.append({"model": name, "lora": s and s["lora"], "subset": s and s["subset"], "validation loss": losses[-1] if losses else None,
                     **measured(name, run, args.completions)})
    columns = [c for c in COMPARED if any(c in r for r in rows)]
    with_file = "" if args.completions else ", and give --completions FILE"
    for lacking, command in (("perplexity", f"python eval.py perplexity {' '.join(args.runs)}"), ("SemScore", f"complete, then semscore FILE{with_file}"),
                             ("entropy", f"python eval.py signatures FILE{with_file}"),
                             ("human rating, overall", f"python eval.py rate FILE, then with --collect{with_file}")):
        if lacking not in columns:
            print(f"note: no {lacking} yet: {command}", file=sys.stderr)
    for c in ("perplexity", "perplexity, NF4"):
        if len({(r[c]["on"], r[c]["abstracts"]) for r in rows if c in r}) > 1:
            print(f"note: {c} was not measured on the same abstracts for all of these; run them in one command", file=sys.stderr)
    print_table("mean [95% interval]", ["model", "validation loss", *columns],
                [[r["model"], format(r["validation loss"], ".4f") if r["validation loss"] else "-", *(interval(r[c]) if c in r else "-" for c in columns)]
                 for r in rows])
    kept = [{k: {n: v[n] for n in ("mean", "low", "high")} if isinstance(v, dict) else v for k, v in r.items()} for r in rows]
    out = Path(args.out or Path(args.runs[0]).resolve().parent / "compare")
    write_json(out.with_suffix(".json"), {"completions": args.completions, "models": kept})
    draw_comparison(rows, columns, {name: (read_metrics(run), s) for name, (run, s) in models.items() if s}, out.with_suffix(".png"))


def smooth(epochs, losses, width):
    """Running mean over `width` steps to each side, never across an epoch boundary. epochs: as logged, e.g. 1.0 ends the first."""
    epochs, losses = np.ceil(np.array(epochs) - 1e-9), np.array(losses, float)
    result = np.empty_like(losses)
    for epoch in np.unique(epochs):
        rows = np.flatnonzero(epochs == epoch)
        sums = np.concatenate([[0], np.cumsum(losses[rows])])
        low, high = np.maximum(np.arange(len(rows)) - width, 0), np.minimum(np.arange(len(rows)) + width + 1, len(rows))
        result[rows] = (sums[high] - sums[low]) / (high - low)
    return result


def draw_comparison(rows, columns, curves, path):
    """Above: a panel for each quantity, a line for each model, mean with 95% interval, the base's mean dashed. Below: training losses, a
    panel for each choice of adapted matrices."""
    plt = pyplot()
    kinds = list(dict.fromkeys(str(s["lora"]) for _, s in curves.values()))
    look = {kind: (COLOURS[1 + i % 6], "osD^vP"[i % 6]) for i, kind in enumerate(kinds)}
    fig = plt.figure(figsize=(max(8, 1.5 + 1.9 * len(columns)), 4.8 + 0.24 * len(rows)), layout="constrained")
    above, below = fig.subfigures(2, 1, height_ratios=[1.4 + 0.24 * len(rows), 3.4]) if columns else (None, fig)
    for c, ax in zip(columns, above.subplots(1, len(columns), sharey=True, squeeze=False)[0] if columns else []):
        for y, r in enumerate(rows):
            colour, marker = look[str(r["lora"])] if r["lora"] else (COLOURS[0], "*")
            if c in r:
                ax.errorbar(r[c]["mean"], y, xerr=error_bar(r[c]), color=colour, marker=marker, ms=6, capsize=3)
                if not r["lora"]:
                    ax.axvline(r[c]["mean"], color="0.6", ls="--", lw=1, zorder=0)
        ax.set_title(c.replace(", ", ",\n") if len(c) > 16 else c, fontsize=10)
        ax.set_yticks(range(len(rows)), [r["model"] for r in rows])
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.grid(axis="x", alpha=0.3)
    axes = below.subplots(1, len(kinds), sharex=True, sharey=True, squeeze=False)[0]
    for kind, ax in zip(kinds, axes):
        of_kind = {name: [r for r in metrics if "loss" in r] for name, (metrics, s) in curves.items() if str(s["lora"]) == kind}
        for i, (name, records) in enumerate(of_kind.items()):
            epoch, loss = [r["epoch"] for r in records], [r["loss"] for r in records]
            single = len(of_kind) == 1                        # one curve a panel: in the colour that its marker has above
            colour, style = look[kind][0] if single else COLOURS[i % 7], ["-", "--", ":"][i // 7 % 3]
            if single:
                ax.plot(epoch, loss, color=colour, lw=0.6, alpha=0.3)
            ax.plot(epoch, smooth(epoch, loss, max(1, len(loss) // 50)), color=colour, ls=style, lw=1.5, label=name)
        for boundary in range(1, math.ceil(max((r["epoch"] for records in of_kind.values() for r in records), default=0))):
            ax.axvline(boundary, color="0.5", ls=":", lw=1, zorder=0)
        ax.set(title=f"training loss, LoRA on {kind}", xlabel="epoch (dotted: an epoch ends)")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8, ncols=1 + len(of_kind) // 6)
    axes[0].set_ylabel("nats a token")
    save_figure(fig, path)


RECIPES = {"s1": "hep-th", "s2": "hep-ph and gr-qc", "s3": "hep-th, hep-ph and gr-qc", "s4": "hep-th, 15% of it replaced by gr-qc, 15% by hep-ph",
           "s5": "hep-th, 15% of it replaced by gr-qc", "s6": "hep-th, 15% of it replaced by hep-ph", "s7": "hep-th and gr-qc",
           "s8": "hep-th and hep-ph", "s9": "gr-qc and hep-ph, as many abstracts as hep-th has", "s10": "hep-th, q-bio and cs, as many abstracts as s3 has"}


def model_card(name, settings, base_id, run, completions, licence, what):
    """README.md of an exported model: front matter that the hub reads, then base, data, hyperparameters, measurements, licence."""
    base_name = base_id or Path(settings["base"]).name
    library = "transformers" if what == "merged" else "peft"
    front = {"base_model": base_id, "library_name": library, "pipeline_tag": "text-generation", "license": licence}
    lines = ["---", *(f"{k}: {v}" for k, v in front.items() if v), "language: en", "tags: [lora, arxiv, physics]", "---", "", f"# {name}", ""]
    lines += ["Built with Llama.", ""] if "llama-3" in base_name.lower() else []
    lines += [f"{base_name}, fine-tuned on arXiv abstracts with LoRA (arXiv:2106.09685), after the recipe of FeynTune (arXiv:2508.03716).",
              "It continues abstracts; it is no source of facts: what it writes may be wrong, and references that it names may not exist.", "", "## Data", "",
              f"Training set `{settings['subset']}`: {RECIPES.get(settings['subset'], 'a choice of its own')}; seed {settings['seed']}."]
    try:
        manifest = data_arxiv.available(settings["data"])
        lines += [f"{rows:,} abstracts in {split}." for split, rows in manifest["sets"].get(settings["subset"], {}).items()]
        lines += [f"Source: {s.get('file')}{' (synthetic: made-up abstracts)' if s.get('synthetic') else ''}." for s in manifest["sources"].values()]
    except ValueError:
        lines += ["(The prepared data was no longer there when this card was written.)"]
    lines += ["Checksums: " + ", ".join(settings.get("data_checksums", [])) + ".", "", "## Hyperparameters", "", "| setting | value |", "|---|---|"]
    shown = ("lora", "rank", "alpha", "dropout", "quantize", "dtype", "batch_size", "epochs", "max_steps", "lr", "min_lr", "warmup", "seed")
    lines += [f"| {k} | {settings[k]} |" for k in shown if settings.get(k) is not None] + ["", "## Measured", ""]
    in_reports = Path(settings["base"]).name if Path(settings["base"]).is_dir() else settings["base"]
    rows = []
    for who, shown in ((in_reports, base_name), (name, name)):
        for quantity, s in measured(who, run, completions).items():
            on = f"{s['abstracts']} abstracts" + (f", {Path(s['on'].split(' of ')[0]).name}" if "on" in s else "")
            rows.append(f"| {shown} | {quantity} | {s['mean']:.4g} | {s['low']:.4g} - {s['high']:.4g} | {on} |")
    lines += ["| model | quantity | mean | 95% interval | on |", "|---|---|---|---|---|", *rows] if rows else ["Nothing yet."]
    losses = [r["validation_loss"] for r in read_metrics(run) if "validation_loss" in r]
    lines += ["", f"Validation loss, nats a token: {losses[0]:.4f} before, {losses[-1]:.4f} after training."] if losses else []
    lines += ["", "## Licence", "", f"{licence or 'That of the base model'}: a fine-tuned model stays under its base model's licence ({base_name}).", ""]
    return "\n".join(lines)


def read_metrics(run):
    """The records of a run's metrics.jsonl, none if it has no such file; a last line that a kill cut short is left out."""
    path = Path(run) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("}\n")] if path.exists() else []


def licence_of(base):
    """Licence identifier of the bases this project names; None for others."""
    known = {"llama-3.1": "llama3.1", "smollm2": "apache-2.0", "qwen2.5-0.5b": "apache-2.0"}
    return next((licence for name, licence in known.items() if name in base.lower()), None)


def export(args):
    settings, out = read_run(args.run), Path(args.out)
    name, base = Path(args.run).resolve().name, args.base or settings["base"]
    base_id = args.base_id or (None if Path(base).is_dir() else base)
    if out.exists():
        raise ValueError(f"{out} exists already; remove it or choose another --out")
    if args.push:
        from huggingface_hub import get_token
        if args.push.count("/") != 1:
            raise ValueError(f"--push takes ORGANISATION/NAME, not {args.push!r}")
        if not get_token():
            raise ValueError("no token for the hub: make one with write access at https://huggingface.co/settings/tokens, then run `hf auth login`")
    temporary = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    try:
        if args.what == "merged":
            model, how = load_model(base, Path(args.run) / "adapter", None, torch.bfloat16, "cpu")
            if "NF4" in how:
                raise ValueError(f"{base} is stored in 4 bits and cannot be merged into: name its 16-bit original with --base, or --what adapter")
            save_pretrained(model, temporary)
            for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
                if (fetch(base) / file).exists():
                    shutil.copy(fetch(base) / file, temporary)
        else:
            temporary.mkdir(parents=True)
            shutil.copy(Path(args.run) / "adapter" / "adapter_model.safetensors", temporary)
            config = json.loads((Path(args.run) / "adapter" / "adapter_config.json").read_text())
            (temporary / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base_id or base}, indent=1))
        licence = args.license or licence_of(base_id or Path(base).name)
        (temporary / "README.md").write_text(model_card(name, settings, base_id, args.run, args.completions, licence, args.what))
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{out} holds the {args.what} model: {', '.join(sorted(p.name for p in out.iterdir()))}")
    if args.push:
        from huggingface_hub import HfApi
        try:
            HfApi().create_repo(args.push, private=args.private, exist_ok=True)
            HfApi().upload_folder(repo_id=args.push, folder_path=out, commit_message=f"{name}: {args.what}")
        except Exception as e:                                # the hub's, the HTTP client's and the system's errors share no type
            reason = (str(e).strip() or type(e).__name__).splitlines()[0]
            raise ValueError(f"the upload to {args.push} failed ({reason}); {out} is whole: check the network and that your token "
                             f"may write there, then `hf upload {args.push} {out}`") from None
        print(f"uploaded: https://huggingface.co/{args.push}")


# ------------------------------------------------------------------------- regress: six parameters from the global 21cm signal

DIGITS = [2, 3, 2, 0, 2, 0]                                   # decimals that make sense
LEVELS = np.linspace(0.05, 0.95, 19)                          # nominal levels of the coverage
OTHER_LIGHTCONES = "so its test lightcones are others: take it as it was then, or, if you know that the run has not seen them, name it with --data"


def axis_label(j):
    return f"{SYMBOLS[j]} [{UNITS[j]}]" if UNITS[j] else SYMBOLS[j]


def to_physical(unit, j=slice(None)):
    """[0, 1] over the priors -> physical units, for all parameters (..., 6) or for parameter j."""
    return PRIORS[j, 0] + unit * (PRIORS[j, 1] - PRIORS[j, 0])


def group_seeds(runs, settings):
    """Runs whose settings differ by the seed only belong together -> {name: [(run, settings), ...]}, named like the first without its "-seedN"."""
    groups = {}
    for run, s in zip(runs, settings):
        same = json.dumps({k: v for k, v in s.items() if k not in ("seed", "norm")}, sort_keys=True)
        groups.setdefault(same, []).append((run, s))
    names = [re.sub(r"[-_]?seed\d+$", "", Path(members[0][0]).resolve().name) for members in groups.values()]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two groups of runs with different settings are called {name}: rename a directory, so that tables can tell them apart")
    return dict(zip(names, groups.values()))


def common_data(args, settings, keys):
    """The file of lightcones that all runs are judged on. ValueError if it is not there, or if they did not train on the same ones (`keys`: their settings)."""
    for run, s in zip(args.runs, settings):
        if any(s[k] != settings[0][k] for k in keys) or not args.data and s["data"] != settings[0]["data"]:
            raise ValueError(f"{run} was trained on other lightcones, or another normalisation of them, than {args.runs[0]}: they cannot share a table")
    data = args.data or settings[0]["data"]
    if not Path(data).is_file():
        raise ValueError(f"{data}, the lightcones of the run, is not there: say with --data where they are")
    return data


def report_path(args):
    """Where results go, without suffix: --out, or COMMAND-SPLIT in the run's directory, or beside the first's if there are several."""
    beside = Path(args.runs[0]) if len(args.runs) == 1 else Path(args.runs[0]).resolve().parent
    return args.out or beside / (f"{args.command}-{args.split}" + (f"-{Path(args.data).stem}" if args.data else ""))


def style_of(i):
    """Colour and line style of the i-th method."""
    return {"color": COLOURS[1 + i % 6], "ls": ["-", "--", ":"][i // 6 % 3]}


def read_signals(path, settings, split, own):
    """The signals of a split as a run saw them: GlobalSignals. own: the path is the run's own, so the split must be, too.

    Raises ValueError if the file has grown since: then the split is another, and its test lightcones were trained on."""
    norm, how = settings["norm"], {"tokens": settings["tokens"], "seed": settings["split_seed"]}
    if own and tuple(norm) != PUBLISHED_NORM and not np.allclose(GlobalSignals(path, "train", **how).norm, norm, rtol=1e-6):
        raise ValueError(f"{path} is not what it was when the run was trained on it, {OTHER_LIGHTCONES}")
    return GlobalSignals(path, split, norm=norm, **how)


@torch.no_grad()
def predict(regressor, signals, device, batch_size):
    """The Gaussians that a run predicts from signals (N, tokens): mean (N, 6) in [0, 1], lower-triangular L (N, 6, 6) of the precision L L^T."""
    parts = [regressor(batch.to(device)) for batch in signals.split(batch_size)]
    return tuple(torch.cat(part).float().cpu() for part in zip(*parts))


def baselines(train, validation):
    """What needs no network, as Gaussians like a run's -> {name: function of signals (N, tokens) to mean (N, 6), L (N, 6, 6)}, and ridge's alpha.

    prior mean: 0.5 for each parameter, with the training set's scatter about it. ridge regression: linear in the signal, weights
    (X^T X + alpha)^-1 X^T Y from the training set, alpha and the covariance from the validation set; clamped to the prior."""
    X, Y = train.signals.double(), train.parameters.double()
    x0, y0 = X.mean(0), Y.mean(0)

    def linear(alpha):
        weights = torch.linalg.solve((X - x0).T @ (X - x0) + alpha * torch.eye(len(x0)), (X - x0).T @ (Y - y0))            # (tokens, 6)
        return lambda signals: ((signals.double() - x0) @ weights + y0).clamp(0, 1)

    def gaussian(mean_of, residual):
        covariance = residual.T @ residual / len(residual)
        if len(residual) < 60:                                # too few for 15 correlations
            covariance = covariance.diag().diag()
        L = torch.linalg.cholesky(torch.linalg.inv(covariance)).float()
        return lambda signals: (mean_of(signals).float(), L.expand(len(signals), 6, 6))

    residual = {alpha: validation.parameters.double() - linear(alpha)(validation.signals) for alpha in np.logspace(-4, 4, 33).tolist()}
    alpha = min(residual, key=lambda alpha: residual[alpha].square().mean())
    return {"ridge regression": gaussian(linear(alpha), residual[alpha]),
            "prior mean": gaussian(lambda signals: torch.full((len(signals), 6), 0.5), Y - 0.5)}, alpha


def score(mean, L, y, samples, seed):
    """Gaussians (N, 6), (N, 6, 6) against the truth (N, 6), in units of the prior's width -> arrays: loss (N,), error |mean - truth| (N, 6),
    sigma (N, 6), coverage (levels, 6), of all six at once joint (levels,), and samples (samples, N, 6) clamped to the prior."""
    draws = sample_gaussian(mean, L, samples, torch.Generator().manual_seed(seed)).clamp(0, 1)
    found = {"loss": gaussian_nll(mean, L, y), "error": (mean - y).abs(), "sigma": standard_deviation(L), "coverage": coverage(mean, L, y, LEVELS),
             "joint": joint_coverage(mean, L, y, LEVELS), "samples": draws}
    return {k: np.asarray(v, float) for k, v in found.items()}


def best_loss(run, settings):
    """The lowest validation loss of a run: that of its model.safetensors. ValueError if it has none; a note if it is not at its end."""
    records = [r for r in read_metrics(run) if "validation_loss" in r]
    if not records:
        raise ValueError(f"{run} has no validation loss in its metrics.jsonl: finish the run first")
    if records[-1]["epoch"] < settings["epochs"] and records[-1]["step"] != settings["max_steps"]:
        tqdm.write(f"note: {run} has come to epoch {records[-1]['epoch']:g} of {settings['epochs']}: its best network so far is judged", file=sys.stderr)
    return min(r["validation_loss"] for r in records)


def judge(name, members, test, device, args, bar):
    """A group of runs -> its settings, best validation losses (a seed each) and scores on `test`: the mean over seeds, lightcone by lightcone."""
    scores, best = [], []
    for run, s in members:
        best.append(best_loss(run, s))
        gaussians = predict(load_regressor(run, device), test.signals, device, args.batch_size)
        scores.append(score(*gaussians, test.parameters, args.samples, args.seed))
        bar.update()
    return {"name": name, "runs": [str(run) for run, _ in members], **{k: s[k] for k in ("init", "base", "blocks", "prompt")}, "validation loss": best,
            **{k: np.mean([of_seed[k] for of_seed in scores], 0) for k in ("loss", "error", "sigma", "coverage", "joint")},
            "samples": np.concatenate([of_seed["samples"] for of_seed in scores])}


def regress(args):
    """The table and the figures of any number of runs; or, with --lightcone, the posterior of a user's own lightcones."""
    settings = [read_run(run, "regress") for run in args.runs]
    _, _, device = start_processes(args.device)
    if args.samples < 1:
        raise ValueError("--samples must be at least 1")
    if args.lightcone:
        return posteriors(args, settings, device)
    groups, data = group_seeds(args.runs, settings), common_data(args, settings, ("tokens", "norm", "split_seed"))
    train, validation, test = (read_signals(data, settings[0], split, not args.data) for split in ("train", "validation", args.split))
    with tqdm(total=len(args.runs), desc="predictions", unit="run", dynamic_ncols=True) as bar:
        methods = [judge(name, members, test, device, args, bar) for name, members in groups.items()]
    for i, m in enumerate(methods):
        m["look"] = style_of(i)
    gaussians, alpha = baselines(train, validation)
    for (name, gaussian), look in zip(gaussians.items(), ({"color": "0.4", "ls": "--"}, {"color": "0.6", "ls": ":"})):
        loss = gaussian_nll(*gaussian(validation.signals), validation.parameters).mean().item()
        methods.append({"name": name, "runs": [], "validation loss": [loss], "look": look,
                        **score(*gaussian(test.signals), test.parameters, args.samples, args.seed)})
    report = {"data": str(data), "split": args.split, "lightcones": len(test), "samples": args.samples, "seed": args.seed, "ridge alpha": alpha,
              "levels": LEVELS.tolist(), "methods": [method_report(m, methods[0]) for m in methods]}
    print_regression(report)
    out = report_path(args)
    write_json(f"{out}.json", report)
    draw_losses(methods, f"{out}-loss.png")
    draw_parameters(methods, test.parameters.numpy(), f"{out}-parameters.png")
    draw_calibration(methods, len(test), f"{out}-calibration.png")
    if len({m["blocks"] for m in methods if m.get("init") in ("pretrained", "random")}) > 1:
        draw_depth(methods, f"{out}-depth.png")


def over_seeds(values):
    return {"mean": np.mean(values), "std": np.std(values), "seeds": values}


def loss_cell(s):
    """What `over_seeds` returns, for a table."""
    return f"{s['mean']:.4f}" + (f" +- {s['std']:.4f}" if len(s["seeds"]) > 1 else "")


def method_report(m, first):
    """What the JSON says of a method: means over the lightcones with intervals; against the first method, lightcone by lightcone."""
    per_parameter = {k: {p: summary(v) for p, v in zip(PARAMETERS, m[k].T)} for k in ("error", "sigma")}
    return {k: m.get(k) for k in ("name", "runs", "init", "base", "blocks", "prompt")} | {
        "validation loss": over_seeds(m["validation loss"]),
        "loss": summary(m["loss"]), "loss minus the first's": summary(m["loss"] - first["loss"]), "mean error": summary(m["error"].mean(1)), **per_parameter,
        "coverage": {p: c.tolist() for p, c in zip(PARAMETERS, m["coverage"].T)}, "joint coverage": m["joint"].tolist()}


def print_regression(report):
    """A table of losses and one of errors. A difference is more certain than two means: every method has the same lightcones."""
    rows = report["methods"]
    print_table(f"{report['lightcones']} {report['split']} lightcones of {report['data']}: loss in nats a parameter, mean [95% interval]",
                ["", "seeds", "best validation loss", f"{report['split']} loss", f"minus {rows[0]['name']}'s", "mean of the six errors"],
                [[r["name"], len(r["runs"]) or "-", loss_cell(r["validation loss"]),
                  interval(r["loss"]), interval(r["loss minus the first's"]) if i else "-", interval(r["mean error"])] for i, r in enumerate(rows)])
    print_table("error: mean |predicted mean - truth| in units of the prior's width [95% interval]", ["", *PARAMETERS],
                [[r["name"], *(interval(r["error"][p]) for p in PARAMETERS)] for r in rows])


def draw_curve(ax, m, x, key, smoothing=0):
    """A quantity of metrics.jsonl against x, the mean over the runs of a group and one standard deviation as a band -> values of x.

    smoothing: fraction of the curve to each side that a running mean takes in."""
    curves = [{r[x]: r[key] for r in read_metrics(run) if key in r} for run in m["runs"]]
    at = sorted(set.intersection(*map(set, curves)))                                    # a seed may have been stopped earlier
    values = np.array([smooth(np.zeros(len(at)), [curve[v] for v in at], int(smoothing * len(at))) for curve in curves])          # (seeds, at)
    mean, std = values.mean(0), values.std(0)
    ax.plot(at, mean, **m["look"], label=m["name"] + (f" ({len(curves)} seeds)" if len(curves) > 1 else ""))
    ax.fill_between(at, mean - std, mean + std, color=m["look"]["color"], alpha=0.25, lw=0)
    return at


def draw_losses(methods, path):
    """Validation loss against epoch: the mean over seeds, and one standard deviation as a band."""
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    lasts, top, bottom = [], methods[-1]["validation loss"][0], min(min(m["validation loss"]) for m in methods)        # top: the prior mean's
    for m in methods:
        if not m["runs"]:
            ax.axhline(m["validation loss"][0], **m["look"], lw=1, label=m["name"])
        else:
            lasts.append(draw_curve(ax, m, "epoch", "validation_loss")[-1])
    ax.set(xlabel="epoch", ylabel="validation loss [nats a parameter]", xscale="log" if max(lasts) > 10 * min(lasts) else "linear",
           ylim=np.array([bottom, top]) + 0.07 * abs(top - bottom) * np.array([-1, 1]))
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    save_figure(fig, path)


def draw_parameters(methods, y, path, bins=10):
    """For each parameter, above: the samples (mean and standard deviation) in ten bins of the truth; below: mean |sample - truth| / prior width."""
    plt = pyplot()
    fig, axes = plt.subplots(4, 3, figsize=(11, 9.5), height_ratios=[3, 1.3] * 2, layout="constrained")
    bin_of = np.minimum((y * bins).astype(int), bins - 1)                               # (N, 6)
    for j in range(6):
        above, below = axes[j // 3 * 2:j // 3 * 2 + 2, j % 3]
        filled = np.unique(bin_of[:, j])
        above.plot(PRIORS[j], PRIORS[j], color="0.7", lw=1)
        for i, m in enumerate(methods):
            in_bin = [m["samples"][:, bin_of[:, j] == b, j] for b in filled]            # (samples, lightcones in the bin) each
            mean, std = to_physical(np.array([s.mean() for s in in_bin]), j), np.array([s.std() for s in in_bin]) * np.ptp(PRIORS[j])
            error = [np.abs(s - y[bin_of[:, j] == b, j]).mean() for s, b in zip(in_bin, filled)]
            centre = to_physical((filled + 0.5) / bins, j)
            shift = (i - (len(methods) - 3) / 2) * 0.6 / bins / len(methods) * np.ptp(PRIORS[j])
            if m["runs"]:
                above.errorbar(centre + shift, mean, std, color=m["look"]["color"], fmt="osD^vP"[i % 6], ms=3.5, lw=1, label=m["name"])
            below.plot(centre, error, **m["look"], lw=1.2, label=None if m["runs"] else m["name"])
        above.set(xlim=PRIORS[j], ylim=PRIORS[j], ylabel=f"predicted {axis_label(j)}")
        below.set(xlim=PRIORS[j], ylim=(0, None), xlabel=f"true {axis_label(j)}", ylabel="error / prior width" if j % 3 == 0 else None)
        above.tick_params(labelbottom=False)
        for ax in (above, below):
            ax.grid(alpha=0.3)
    handles = [sum(h, []) for h in zip(*(ax.get_legend_handles_labels() for ax in (above, below)))]
    fig.legend(*handles, loc="outside upper center", ncols=min(4, len(methods)), fontsize=9)
    save_figure(fig, path)


def draw_calibration(methods, n, path):
    """Coverage: how often the truth lies in the central interval of each level (black: in the ellipsoid of all six), a panel for each method; in
    the grey band 95% of calibrated ones would be. Sharpness: the predicted standard deviation, median and central 68% over the lightcones."""
    plt = pyplot()
    shown = methods[:-1]                                      # all but the prior mean
    columns = min(4, len(shown))
    rows = math.ceil(len(shown) / columns)
    fig = plt.figure(figsize=(max(8, 2.7 * columns), 2.8 * rows + 3.4), layout="constrained")
    above, below = fig.subfigures(2, 1, height_ratios=[2.8 * rows, 3.4])
    axes = above.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for ax, m in zip(axes.flat, shown):
        band = 1.96 * np.sqrt(LEVELS * (1 - LEVELS) / n)
        ax.fill_between(LEVELS, LEVELS - band, LEVELS + band, color="0.85")
        ax.plot([0, 1], [0, 1], color="0.5", lw=1)
        for j in range(6):
            ax.plot(LEVELS, m["coverage"][:, j], color=COLOURS[1 + j], lw=1.2, label=SYMBOLS[j])
        ax.plot(LEVELS, m["joint"], color="k", ls="--", lw=1.2, label="all six")
        ax.set_title(m["name"], fontsize=9)
        ax.set(xlim=(0, 1), ylim=(0, 1), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1], aspect="equal")
    for ax in axes.flat[len(shown):]:
        ax.axis("off")
    above.supxlabel("nominal level", fontsize=10)
    above.supylabel("truth inside, fraction", fontsize=10)
    above.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=9)
    ax = below.subplots()
    for i, m in enumerate(shown):
        low, middle, high = np.quantile(m["sigma"], [0.16, 0.5, 0.84], axis=0)          # (6,) each
        ax.errorbar(np.arange(6) + (i - (len(shown) - 1) / 2) * 0.8 / len(shown), middle, yerr=[middle - low, high - middle], fmt="osD^vP"[i % 6],
                    color=m["look"]["color"], ms=4, capsize=2, label=m["name"])
    ax.axhline(12 ** -0.5, color="0.6", ls=":", label="prior")
    ax.set_xticks(range(6), SYMBOLS)
    ax.set(ylim=(0, None), ylabel="predicted std / prior width")
    ax.grid(alpha=0.3, axis="y")
    below.legend(*ax.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    save_figure(fig, path)


def draw_depth(methods, path):
    """Best validation loss against the number of blocks, mean and one standard deviation over seeds: a line for each backbone and prompt."""
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    lines = {}
    for m in methods:
        if m.get("init") in ("pretrained", "random"):
            depth = m["blocks"] or load_config(m["base"]).num_hidden_layers
            line = lines.setdefault(f"{m['init']}, {m['prompt']}", [])
            line.append((depth, np.mean(m["validation loss"]), np.std(m["validation loss"])))
        elif m["runs"]:                                       # a reference
            ax.axhline(np.mean(m["validation loss"]), **m["look"], lw=1.2, label=m["name"])
    for i, (name, points) in enumerate(lines.items()):
        depth, mean, std = zip(*sorted(points))
        ax.errorbar(depth, mean, yerr=std, color=COLOURS[i % 7], marker="osD^vP"[i % 6], ms=5, capsize=3, label=name)
    ax.set(xlabel="blocks of the backbone", ylabel="best validation loss [nats a parameter]")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    save_figure(fig, path)


def read_own(path, settings, data):
    """A user's lightcone as a run would have seen it -> (signal (1, tokens) float32, Lightcone, notes: a sentence each).

    It is read from its low-z end over the comoving depth of the training lightcones. Where `data`, what the run was trained on, is there, the notes
    tell what sets this lightcone apart from it. ValueError if it cannot be read, or is not so deep."""
    tokens, (mean, deviation) = settings["tokens"], settings["norm"]
    whole, depth, store = read_lightcone(path, bins=None, cube=False), BINS * CELL, h5py.is_hdf5(data)
    cell, notes = whole.cell, [note for note in whole.notes if "filter" not in note]               # convert filters, we do not
    if store:
        with open_store(data) as f:
            scale, z_end = float(f["cell_mpc"][0]), f["redshifts"][0, -1]
            depth, width = f["redshifts"].shape[1] * scale, f["brightness_temp"].shape[2] * scale
    else:
        notes.append(f"{data} is not there or no store: whether this lightcone has the redshifts and the size of the training lightcones was not checked")
    if not math.isfinite(cell):
        cell = CELL
        notes.append(f"cell size unknown, {CELL:.2f} Mpc assumed")
    bins = tokens * max(1, round(depth / cell / tokens))
    if bins > len(whole.redshifts):
        raise ValueError(f"{path}: {len(whole.redshifts)} line-of-sight bins of {cell:.2f} Mpc; the run needs {bins}, the first {depth:.0f} Mpc from low z")
    lightcone = read_lightcone(path, bins)
    signal = lightcone.cube.mean((1, 2), dtype=np.float64).reshape(1, tokens, -1).mean(2)         # (T, X, Y) -> (1, tokens), mK
    signal = torch.from_numpy((signal - mean) / deviation).float()
    if store and abs(lightcone.redshifts[-1] - z_end) > 0.05:
        notes.append(f"it ends at z = {lightcone.redshifts[-1]:.2f}, the training lightcones at {z_end:.2f}: every value of the signal is at another redshift")
    if store and abs(bins * cell / depth - 1) > 0.01:
        notes.append(f"it is {bins * cell:.0f} Mpc deep, the training lightcones {depth:.0f} Mpc")
    if store and abs(lightcone.sky * cell / width - 1) > 0.1:
        notes.append(f"its sky is {lightcone.sky * cell:.0f} Mpc wide, the training lightcones' {width:.0f} Mpc: its cosmic variance is not theirs")
    if reason := filter_reason(*history_summary(lightcone)):
        notes.append(f"{reason}: such histories are usually left out of training")
    if Path(data).is_file():
        train = GlobalSignals(data, "train", tokens=tokens, seed=settings["split_seed"], norm=settings["norm"]).signals
        if outside := int(((signal < train.min(0).values) | (signal > train.max(0).values)).sum()):
            notes.append(f"{outside} of its {tokens} values are outside the range of the training signals: the posterior is an extrapolation")
    return signal, lightcone, notes


def posteriors(args, settings, device):
    """Predict the six parameters of a user's own lightcones with one run: table, JSON and corner plot each."""
    if len(args.runs) > 1:
        raise ValueError("--lightcone takes one run: name the run whose posterior you want")
    run, s, stems = args.runs[0], settings[0], [Path(file).stem for file in args.lightcone]
    if len(set(stems)) < len(stems):
        raise ValueError("two of the lightcone files have the same name: their figures would overwrite each other, rename one")
    regressor, data = load_regressor(run, device), args.data or s["data"]
    for file, stem in zip(args.lightcone, stems):
        signal, lightcone, notes = read_own(file, s, data)
        for note in notes:
            print(f"note: {file}: {note}", file=sys.stderr)
        mean, L = predict(regressor, signal, device, 1)
        mean, width = to_physical(mean[0].double().numpy()), PRIORS[:, 1] - PRIORS[:, 0]
        covariance = torch.cholesky_inverse(L[0].double()).numpy() * np.outer(width, width)                # physical units
        std, truth = np.sqrt(covariance.diagonal()), lightcone.parameters
        low, high = np.clip(mean - std, *PRIORS.T), np.clip(mean + std, *PRIORS.T)
        print_table(f"posterior of {file} by {Path(run).resolve().name}", ["", "unit", "mean", "std", "68% interval", "truth"],
                    [[p, UNITS[j], f"{mean[j]:.{d}f}", f"{std[j]:.{d}f}", f"{low[j]:.{d}f} - {high[j]:.{d}f}",
                      f"{truth[j]:.{d}f}" if math.isfinite(truth[j]) else "-"] for j, (p, d) in enumerate(zip(PARAMETERS, DIGITS))])
        out = f"{args.out or Path(run) / 'posterior'}-{stem}"
        write_json(f"{out}.json", {"file": str(file), "run": str(run), "notes": notes, "covariance": covariance.tolist(), "parameters": {
            p: {"mean": mean[j], "std": std[j], "low": low[j], "high": high[j], "truth": truth[j] if math.isfinite(truth[j]) else None, "unit": UNITS[j]}
            for j, p in enumerate(PARAMETERS)}})
        signal = (signal[0] * s["norm"][1] + s["norm"][0]).numpy()
        z = lightcone.redshifts.reshape(len(signal), -1).mean(1)
        draw_corner(mean, covariance, truth, z, signal, f"{stem}, by {Path(run).resolve().name}", f"{out}.png")


def draw_corner(mean, covariance, truth, z, signal, title, path):
    """A Gaussian posterior in physical units, cut at the prior: each parameter's density, each pair's 68% and 95% contours; the truth where it is
    known. Above them, the signal (tokens,) in mK at the redshifts z that it was predicted from."""
    plt = pyplot()
    fig, axes = plt.subplots(6, 6, figsize=(11, 11), gridspec_kw={"left": 0.08, "right": 0.98, "bottom": 0.07, "top": 0.97, "wspace": 0.14, "hspace": 0.22})
    std = np.sqrt(covariance.diagonal())
    low, high = (np.fmin(mean - 4 * std, truth - std), np.fmax(mean + 4 * std, truth + std))       # fmin, fmax: an unknown truth is left out
    low, high = np.clip([low, high], *PRIORS.T)
    circle = np.array([f(np.linspace(0, 2 * np.pi, 200)) for f in (np.cos, np.sin)])                 # (2, points)
    for i in range(6):
        for j in range(6):
            ax = axes[i, j]
            if j > i:
                ax.axis("off")
                continue
            if i == j:
                x = np.linspace(low[j], high[j], 300)
                density = np.exp(-((x - mean[j]) / std[j]) ** 2 / 2)
                ax.plot(x, density, color=COLOURS[1])
                ax.fill_between(x, density, where=np.abs(x - mean[j]) < std[j], color=COLOURS[1], alpha=0.3, lw=0)
                ax.set(ylim=(0, 1.1), yticks=[])
                ax.set_title(f"{SYMBOLS[j]} = {mean[j]:.{DIGITS[j]}f} $\\pm$ {std[j]:.{DIGITS[j]}f}", fontsize=9)
            else:
                root = np.linalg.cholesky(covariance[np.ix_([j, i], [j, i])])
                for level, alpha in ((0.95, 0.25), (0.68, 0.5)):
                    ax.fill(*(mean[[j, i]][:, None] + math.sqrt(-2 * math.log(1 - level)) * root @ circle), color=COLOURS[1], alpha=alpha, lw=0)
                ax.axhline(truth[i], color=COLOURS[2], lw=1)
                ax.set_ylim(low[i], high[i])
            ax.axvline(truth[j], color=COLOURS[2], lw=1)
            ax.set_xlim(low[j], high[j])
            ax.xaxis.set_major_locator(plt.MaxNLocator(3, prune="both"))
            ax.tick_params(labelsize=8, labelbottom=i == 5, labelleft=j == 0 < i)
            if i == 5:
                ax.set_xlabel(axis_label(j).replace(" [", "\n["), fontsize=9)
            if j == 0 < i:
                ax.set_ylabel(axis_label(i).replace(" [", "\n["), fontsize=9)
    ax = fig.add_axes([0.62, 0.75, 0.35, 0.19])
    ax.plot(z, signal, "o-", color="k", ms=3, lw=1)
    ax.set(xlabel="redshift $z$", ylabel=r"sky mean $\bar T_b$ [mK]")
    ax.set_title(title, fontsize=10)
    fig.text(0.62, 0.67, "dark, light: 68%, 95%" + ("; orange: the truth" if np.isfinite(truth).any() else ""), fontsize=9)
    save_figure(fig, path)


# -------------------------------------------------------------------- next-patch and generate: slices by conditional flow matching


def open_slices(args):
    """What both begin with: runs of train_l3m.py generate -> groups by seed {name: [(run, settings), ...]}, SubLightcones of --split, device."""
    settings = [read_run(run, "generate") for run in args.runs]
    _, _, device = start_processes(args.device)
    data = common_data(args, settings, ("split_seed", "T", "sky", "usable"))
    test, (T, sky) = SubLightcones(data, args.split, seed=settings[0]["split_seed"]), (settings[0][k] for k in ("T", "sky"))
    if (test.T, test.sky) != (T, sky):
        raise ValueError(f"{data} holds {test.T} slices of {test.sky} x {test.sky}, the runs were trained on {T} of {sky} x {sky}")
    if not args.data and test.usable != settings[0]["usable"]:
        raise ValueError(f"{data} has {test.usable} usable lightcones; when the run was trained on it, it had {settings[0]['usable']}, {OTHER_LIGHTCONES}")
    return group_seeds(args.runs, settings), test, device


def draw_seed(seed, row, start):
    """Of the noise for one place in one lightcone: all models get the same, whatever else is evaluated."""
    return int(np.random.SeedSequence([seed, row, start]).generate_state(1)[0])


@torch.no_grad()
def squared_errors(predict, windows, test, args, device, bar):
    """Mean squared error of slices 3.. of windows (row, start, length), normalised units -> by lightcone and cell on the sky (n, X, Y); by slice of
    the window (10,).

    predict(slices (B, S, X, Y), conditions (B, 7), noise (B, S - 2, X, Y)) -> (B, S - 2, X, Y)."""
    place = {row: i for i, row in enumerate(sorted({row for row, _, _ in windows}))}
    lengths = sorted({length for _, _, length in windows})
    by_cell, by_slice = np.zeros((len(place), test.sky, test.sky)), np.zeros(lengths[-1] - CONTEXT)
    cells, slices_seen = np.zeros(len(place)), np.zeros_like(by_slice)
    for length in lengths:
        same = [w for w in windows if w[2] == length]
        for part in (same[i:i + args.batch_size] for i in range(0, len(same), args.batch_size)):
            slices, conditions = (torch.stack(x) for x in zip(*(test.read(*w) for w in part)))
            noise = torch.stack([torch.randn(length - CONTEXT, test.sky, test.sky, generator=torch.Generator().manual_seed(draw_seed(args.seed, row, start)))
                                 for row, start, _ in part])
            predicted = predict(slices.to(device), conditions.to(device), noise.to(device)).cpu()
            for (row, _, _), error in zip(part, (predicted - slices[:, CONTEXT:]).double().square().numpy()):          # (S - 2, X, Y)
                by_cell[place[row]] += error.sum(0)
                cells[place[row]] += len(error)
                by_slice[:len(error)] += error.mean((1, 2))
                slices_seen[:len(error)] += 1
            bar.update(len(part))
    return by_cell / cells[:, None, None], by_slice / slices_seen


def sampled(generator, args):
    """The generator as a `predict` of squared_errors: each patch drawn once, given the truth before it."""
    def predict(slices, conditions, noise):
        p, noise = generator.p, patch(noise, generator.p)                               # (B, S - 2, R, K, p*p)
        cond = generator.patch_conditions(slices, conditions).flatten(0, 2)             # (N, 2, p, p)
        x, _ = sample(generator.velocity, cond, args.method, noise=noise.reshape(-1, 1, p, p), steps=args.steps)
        return unpatch(x.view_as(noise))
    return predict


def next_patch(args):
    """Table and figures of the flow-matching loss and of the next-patch error of any number of runs, beside two baselines."""
    groups, test, device = open_slices(args)
    windows = test.windows()
    if args.max_windows:
        windows = [windows[i] for i in np.sort(np.random.default_rng(args.seed).permutation(len(windows))[:args.max_windows])]
    methods, lightcones = [], len({row for row, _, _ in windows})
    losses = {name: [best_loss(run, s) for run, s in members] for name, members in groups.items()}
    simple = {"copy of the previous slice": lambda slices, conditions, noise: slices[:, CONTEXT - 1:-1], "noise": lambda slices, conditions, noise: noise}
    with tqdm(total=len(windows) * (len(args.runs) + len(simple)), desc="next patches", unit="window", dynamic_ncols=True) as bar:
        for name, members in groups.items():
            errors = [squared_errors(sampled(load_generator(run, device), args), windows, test, args, device, bar) for run, _ in members]
            methods.append({"name": name, "runs": [str(run) for run, _ in members], "validation loss": losses[name], "look": style_of(len(methods)),
                            "patch": members[0][1]["patch"], "errors": [np.mean(e, 0) for e in zip(*errors)]})
        for (name, predict), style in zip(simple.items(), ("--", ":")):
            methods.append({"name": name, "runs": [], "look": {"color": "0.5", "ls": style}, "patch": methods[0]["patch"],
                            "errors": squared_errors(predict, windows, test, args, device, bar)})
    if lightcones < 5:
        print(f"note: intervals over {lightcones} lightcones are too narrow: errors of one lightcone are not independent", file=sys.stderr)
    report = {"data": test.path, "split": args.split, "lightcones": lightcones, "windows": len(windows), "method": args.method,
              "steps": args.steps if args.method == "midpoint" else None, "seed": args.seed, "methods": []}
    first = methods[0]["errors"][0].mean((1, 2))
    for m in methods:
        (by_cell, by_slice), p = m["errors"], m["patch"]
        of_lightcone, m["map"] = by_cell.mean((1, 2)), by_cell.mean(0)                  # (n,), (X, Y)
        report["methods"].append({
            "name": m["name"], "runs": m["runs"], "validation loss": over_seeds(m["validation loss"]) if m["runs"] else None, "error": summary(of_lightcone),
            "error minus the first's": summary(of_lightcone - first), "by slice": by_slice.tolist(),
            "by patch": m["map"].reshape(test.sky // p, p, -1, p).mean((1, 3)).tolist()})
    rows = report["methods"]
    print_table(f"{lightcones} {args.split} lightcones of {test.path}, {len(windows)} windows, normalised units: mean [95% interval]",
                ["", "seeds", "CFM validation loss", "next-patch error", f"minus {rows[0]['name']}'s"],
                [[r["name"], len(r["runs"]) or "-", loss_cell(r["validation loss"]) if r["runs"] else "-", interval(r["error"]),
                  interval(r["error minus the first's"]) if i else "-"] for i, r in enumerate(rows)])
    out = report_path(args)
    write_json(f"{out}.json", report)
    draw_positions(methods, f"{out}-position.png")
    draw_training(methods, f"{out}-loss.png")


def draw_positions(methods, path):
    """Above: next-patch error by position on the sky, a map for each group of runs and for the copy, lines between patches; below: by slice."""
    plt = pyplot()
    from matplotlib.colors import LogNorm
    shown = methods[:-1]                                      # noise has no structure
    columns = min(4, len(shown))
    rows = math.ceil(len(shown) / columns)
    fig = plt.figure(figsize=(max(7, 2.6 * columns), 2.7 * rows + 3.2), layout="constrained")
    above, below = fig.subfigures(2, 1, height_ratios=[2.7 * rows, 3.2])
    axes = above.subplots(rows, columns, squeeze=False)
    high = max(np.quantile(m["map"], 0.99) for m in shown)
    low = max(min(m["map"].min() for m in shown), high / 1000)
    for ax, m in zip(axes.flat, shown):
        sky = len(m["map"])
        image = ax.imshow(m["map"], cmap="viridis", norm=LogNorm(low, high), extent=(0, sky, sky, 0))
        for edge in range(m["patch"], sky, m["patch"]):
            ax.axhline(edge, color="w", lw=0.4)
            ax.axvline(edge, color="w", lw=0.4)
        ax.set_title(m["name"], fontsize=9)
    for ax in axes.flat:
        ax.axis("off")
    above.colorbar(image, ax=axes, label="mean squared error", extend="max")
    ax = below.subplots()
    for m in methods:
        by_slice = m["errors"][1]
        ax.plot(CONTEXT + 1 + np.arange(len(by_slice)), by_slice, **m["look"], marker=".", label=m["name"])
    ax.set(xlabel="slice of the window", ylabel="mean squared error", yscale="log")
    ax.grid(alpha=0.3, which="both")
    ax.legend(fontsize=8)
    save_figure(fig, path)


def draw_training(methods, path):
    """Loss of flow matching against the number of batches, in training (running mean) and on the validation lightcones."""
    plt = pyplot()
    fig, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for ax, key, smoothing in zip(axes, ("loss", "validation_loss"), (0.02, 0)):
        for m in methods:
            if m["runs"]:
                draw_curve(ax, m, "step", key, smoothing)
        ax.set(xlabel="batches", ylabel=f"{'training' if key == 'loss' else 'validation'} loss of flow matching", yscale="log")
        ax.grid(alpha=0.3, which="both")
    axes[1].legend(fontsize=8)
    save_figure(fig, path)


def choose_starts(test, args):
    """Where to generate: --lightcones of the split at each --redshift -> [(redshift, row of the store, first given slice)], and the cell size, Mpc.

    A lightcone whose signal ends before the last slice is left out of that redshift; a redshift without lightcones is left out with a note."""
    with open_store(test.path) as f:
        chosen = np.sort(np.random.default_rng(args.seed).permutation(len(test.rows))[:args.lightcones or None])
        rows = test.rows[chosen]
        z, end, cell = f["redshifts"][rows], f["signal_end"][rows], float(f["cell_mpc"][rows[0]])
    length, starts = args.context + args.slices, []
    for redshift in args.redshifts:
        first = np.abs(z - redshift).argmin(1)                                          # (n,)
        fits = (z[:, -1] <= redshift) & (redshift <= z[:, 0]) & (first + length <= end)
        starts += [(redshift, int(row), int(t)) for row, t in zip(rows[fits], first[fits])]
        if not fits.any():
            print(f"note: z = {redshift:g} is left out: no lightcone has signal in {length} slices from there on", file=sys.stderr)
    if not starts:
        raise ValueError(f"{test.path}: no lightcone has signal in {length} slices from any of these redshifts on: choose other --redshifts, or fewer --slices")
    return starts, cell if math.isfinite(cell) else CELL


def continue_lightcones(generator, slices, conditions, seeds, bins, args, device, bar):
    """Generated slices in mK: context (N, S, X, Y) normalised, conditions (N, 7) -> (N, samples, --slices, X, Y) float16."""
    result = np.empty((len(slices), args.samples, args.slices, *slices.shape[2:]), np.float16)
    for part in torch.arange(len(slices)).split(args.batch_size):
        going = generator.generate(slices[part].to(device), conditions[part].to(device), args.slices, bins, [seeds[i] for i in part], args.samples,
                                   slide=args.slide, method=args.method, steps=args.steps)
        for s, new in enumerate(going):
            result[part.numpy(), :, s] = denormalise(new).clamp(-6e4, 6e4).cpu()        # float16 ends at 65504
            bar.update(len(part) * args.samples)
    return result


def generate(args):
    """Slices generated on their own by any number of runs, beside the truth: figures, table, and the slices themselves."""
    groups, test, device = open_slices(args)
    if args.context < CONTEXT or args.samples < 1:
        raise ValueError(f"--context must be at least {CONTEXT}, --samples at least 1")
    starts, cell = choose_starts(test, args)
    slices, conditions = (torch.stack(x) for x in zip(*(test.read(row, t, args.context + args.slices) for _, row, t in starts)))
    seeds, truth = [draw_seed(args.seed, row, t) for _, row, t in starts], denormalise(slices).numpy().astype(np.float16)
    methods = [{"name": "truth", "runs": [], "look": {"color": "k", "ls": "-"}, "slices": truth[:, None, args.context:]}]               # (N, 1, n, X, Y)
    with tqdm(total=len(starts) * args.samples * args.slices * len(args.runs), desc="slices", unit="slice", dynamic_ncols=True) as bar:
        for name, members in groups.items():
            made = [continue_lightcones(load_generator(run, device), slices[:, :args.context], conditions, seeds, test.T, args, device, bar) for run, _ in members]
            methods.append({"name": name, "runs": [str(run) for run, _ in members], "look": style_of(len(methods) - 1), "slices": np.concatenate(made, 1)})
    methods.append({"name": "last given slice", "runs": [], "look": {"color": "0.5", "ls": "--"},
                    "slices": np.repeat(truth[:, None, args.context - 1:args.context], args.slices, 2)})
    out = report_path(args)
    with open_store(test.path) as f:
        arrays = {"row": np.array([row for _, row, _ in starts]), "start": np.array([t for _, _, t in starts]), "truth": truth,
                  "parameters": np.array([f["parameters"][row] for _, row, _ in starts]),
                  "redshifts": np.array([f["redshifts"][row, t:t + truth.shape[1]] for _, row, t in starts])}
    with data_arxiv.replacing(f"{out}.npz") as file:
        np.savez(file, **arrays, **{f"generated {m['name']}": m["slices"] for m in methods if m["runs"]})
    print(f"written: {out}.npz")
    report = {k: getattr(args, k) for k in ("split", "context", "slices", "slide", "samples", "seed", "method")} | {
        "data": test.path, "steps": args.steps if args.method == "midpoint" else None, "redshifts": []}
    panels = []
    for redshift in dict.fromkeys(z for z, _, _ in starts):
        here = [i for i, (z, _, _) in enumerate(starts) if z == redshift]
        panels.append(compare_slices(redshift, methods, here, cell))
        report["redshifts"].append(statistics_report(panels[-1], methods))
    print_slices(report)
    write_json(f"{out}.json", report)
    draw_statistics(panels, methods, f"{out}-statistics.png")
    rows, counts = np.unique(arrays["row"], return_counts=True)
    for number, row in enumerate(rows[np.argsort(-counts, kind="stable")][:args.figures], 1):          # those that are continued at most redshifts
        here = np.flatnonzero(arrays["row"] == row)
        draw_slices(methods, truth, arrays["redshifts"], here, f"{out}-slices-{number}.png")
        draw_sections(methods, truth, arrays["redshifts"], here, f"{out}-sections-{number}.png")


def compare_slices(redshift, methods, here, cell):
    """Statistics of the slices (N, samples, n, X, Y) of all methods at one redshift -> k (K,), bins of T_b, and for each method by lightcone:
    power (m, K) in mK^2, density of T_b (m, bins), mean and standard deviation of T_b (m,) in mK."""
    true = methods[0]["slices"][here].astype(np.float32)
    low, high = np.quantile(true, [0.001, 0.999])
    edges = np.linspace(low - 0.2 * (high - low) - 0.5, high + 0.2 * (high - low) + 0.5, 61)
    found = []
    for m in methods:
        cubes = m["slices"][here].astype(np.float32)                                    # (m, samples, n, X, Y)
        k, power = zip(*(power_spectrum(cube.reshape(-1, *cube.shape[2:]), cell) for cube in cubes))
        density = [np.histogram(cube, edges)[0] / cube.size / (edges[1] - edges[0]) for cube in cubes]
        found.append({"power": np.array(power), "density": np.array(density), "mean": cubes.mean((1, 2, 3, 4)), "std": cubes.std((1, 2, 3, 4))})
    return {"redshift": redshift, "lightcones": len(here), "k": k[0], "edges": edges, "found": found}


def power_ratio(power, true, resamples=2000, seed=0):
    """Power over true power (m, K), each a mean over lightcones, with its 95% bootstrap interval over lightcones: three arrays (K,), not finite where the
    true slices do not fluctuate."""
    m = len(power)
    weights = np.random.default_rng(seed).multinomial(m, np.full(m, 1 / m), resamples)      # (resamples, m): how often each lightcone was drawn
    with np.errstate(divide="ignore", invalid="ignore"):
        return power.mean(0) / true.mean(0), *np.quantile(weights @ power / (weights @ true), [0.025, 0.975], axis=0)


def statistics_report(panel, methods):
    """What the JSON says of one redshift."""
    rows, true = [], panel["found"][0]
    for m, f in zip(methods, panel["found"]):
        intervals = zip(("ratio", "low", "high"), power_ratio(f["power"], true["power"]))
        row = {"name": m["name"], "runs": m["runs"], "power": f["power"].mean(0).tolist(), "mean": float(f["mean"].mean()), "std": float(f["std"].mean()),
               **{k: [v if math.isfinite(v) else None for v in values.tolist()] for k, values in intervals}}
        within = (true["power"] / 2 <= f["power"]) & (f["power"] <= 2 * true["power"])  # (m, K)
        rows.append(row | {"within a factor 2": [r is not None and 0.5 <= r <= 2 for r in row["ratio"]], "share of lightcones within": within.mean(0).tolist()})
    return {"z": panel["redshift"], "lightcones": panel["lightcones"], "k": panel["k"].tolist(), "methods": rows}


def print_slices(report):
    """A table for each redshift: power over true power in bins of k, and the one-point distribution's mean and width."""
    for panel in report["redshifts"]:
        print_table(f"{report['slices']} slices from z = {panel['z']:g} on, {panel['lightcones']} lightcones: generated over true power by k [1/Mpc] "
                    "(*: not within a factor 2), T_b [mK]",
                    ["", *(f"{k:.2g}" for k in panel["k"]), "within", "mean T_b", "std"],
                    [[r["name"], *("- " if ratio is None or not i else f"{ratio:.2f}{' ' if good else '*'}" for ratio, good in zip(r["ratio"], r["within a factor 2"])),
                      f"{sum(r['within a factor 2'])}/{len(panel['k'])}" if i else "-", f"{r['mean']:.1f}", f"{r['std']:.1f}"]
                     for i, r in enumerate(panel["methods"])])


def draw_statistics(panels, methods, path):
    """A column for each redshift: power spectra, their ratio to the truth (grey: a factor 2) with 95% intervals, distribution of T_b. Lines are means over
    lightcones, bands hold the central 68% of them."""
    plt = pyplot()
    fig, axes = plt.subplots(3, len(panels), figsize=(3.4 * len(panels) + 1, 9), height_ratios=[3, 2, 3], squeeze=False, layout="constrained")
    for panel, (above, middle, below) in zip(panels, axes.T):
        k, T, true = panel["k"], (panel["edges"][1:] + panel["edges"][:-1]) / 2, panel["found"][0]["power"]
        middle.axhspan(0.5, 2, color="0.9")
        for i, (m, f) in enumerate(zip(methods, panel["found"])):
            for ax, x, values in ((above, k, f["power"]), (below, T, f["density"])):
                ax.plot(x, values.mean(0), **m["look"], label=m["name"])
                ax.fill_between(x, *np.quantile(values, [0.16, 0.84], axis=0), color=m["look"]["color"], alpha=0.15, lw=0)
            if i:
                ratio, low, high = power_ratio(f["power"], true)
                shift = 1.03 ** (i - len(methods) / 2)                                  # so that intervals do not hide each other
                middle.errorbar(k * shift, ratio, [ratio - low, high - ratio], **m["look"], marker=".", capsize=2, lw=1)
        for ax in (above, middle):
            ax.set(xscale="log", yscale="log")
            ticks = [t for t in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2) if k[0] <= t <= k[-1]]
            ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
            ax.set_xticks([], minor=True)
            ax.yaxis.set_minor_formatter(plt.NullFormatter())                           # over less than a decade it would crowd
        above.set_title(f"from z = {panel['redshift']:g} (lightcones: {panel['lightcones']})", fontsize=10)
        middle.set_xlabel(r"$k_\perp$ [Mpc$^{-1}$]")
        top = max(f["density"].mean(0).max() for f in panel["found"])
        below.set(yscale="log", ylim=(top * 1e-4, top * 2), xlabel="$T_b$ [mK]")
        for ax in (above, middle, below):
            ax.grid(alpha=0.3)
    for ax, label in zip(axes[:, 0], (r"$k_\perp^2 P(k_\perp) / 2\pi$ [mK$^2$]", "ratio to the truth", "density [1/mK]")):
        ax.set_ylabel(label)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=min(5, len(methods)), fontsize=9)
    save_figure(fig, path)


def pictures(methods, i):
    """What to draw of start i: [(name, slices (n, X, Y))], the truth and up to two samples (of the first runs) of each group."""
    shown = [(m["name"] + (f" ({k + 1})" if m["slices"].shape[1] > 1 else ""), m["slices"][i, k]) for m in methods[:-1] for k in range(min(2, m["slices"].shape[1]))]
    return [(name, cube.astype(np.float32)) for name, cube in shown]


def draw_temperature(fig, axes, images, truth, aspect="equal"):
    """Images of T_b, one on each of the axes, in the colours of the field, black at zero, over the range of the true slices; and their colour bar."""
    from matplotlib.colors import TwoSlopeNorm
    low, high = np.quantile(truth.astype(np.float32), [0.001, 0.999])
    scale = TwoSlopeNorm(0, min(low, -20), max(high, 20))
    for ax, image in zip(axes.flat, images):
        drawn = ax.imshow(image, cmap=eor_colours(), norm=scale, interpolation="nearest", aspect=aspect)
        ax.set(xticks=[], yticks=[])
    fig.colorbar(drawn, ax=axes, label="$T_b$ [mK]", location="bottom", extend="both", aspect=30, ticks=np.fix([scale.vmin, scale.vmin / 2, 0, scale.vmax]))


def draw_slices(methods, truth, z, here, path):
    """One lightcone at its starts `here`: the last given slice, the first, the middle and the last generated one; above the true ones.

    truth (N, S + n, X, Y), z (N, S + n): of all starts."""
    plt = pyplot()
    n = methods[0]["slices"].shape[2]
    S, which, names = truth.shape[1] - n, sorted({0, n // 2, n - 1}), [name for name, _ in pictures(methods, here[0])]
    fig = plt.figure(figsize=(1 + 1.25 * len(here) * (1 + len(which)), 1.5 + 1.25 * len(names)), layout="constrained")
    for part, i in zip(np.atleast_1d(fig.subfigures(1, len(here))), here):
        axes = part.subplots(len(names), 1 + len(which), squeeze=False)
        draw_temperature(part, axes, (image for _, cube in pictures(methods, i) for image in (truth[i, S - 1].astype(np.float32), *cube[which])), truth[i])
        for ax, s in zip(axes[0], (-1, *which)):
            ax.set_title(("given" if s < 0 else f"slice {s + 1}") + f"\nz = {z[i, S + s]:.2f}", fontsize=8)
        for ax, name in zip(axes[:, 0], names if i == here[0] else ()):
            ax.set_ylabel(name, fontsize=8)
    save_figure(fig, path)


def draw_sections(methods, truth, z, here, path):
    """One lightcone at its starts `here`: sections along the line of sight, given slices left of the green line, true or generated ones right of it."""
    plt = pyplot()
    S, names = truth.shape[1] - methods[0]["slices"].shape[2], [name for name, _ in pictures(methods, here[0])]
    fig, axes = plt.subplots(len(names), len(here), figsize=(1.5 + 3 * len(here), 1.2 + 1.3 * len(names)), squeeze=False, layout="constrained")
    for column, i in zip(axes.T, here):
        sections = (np.concatenate((truth[i, :S], cube))[:, 0].T.astype(np.float32) for _, cube in pictures(methods, i))          # (Y, S + n)
        draw_temperature(fig, column, sections, truth[i], "auto")
        for ax, name in zip(column, names):
            ax.axvline(S - 0.5, color=COLOURS[3], lw=2)
            ax.set_ylabel(name if i == here[0] else None, fontsize=8)
        at = [0, S, z.shape[1] - 1]
        column[-1].set_xticks(at, [f"{z[i, s]:.1f}" for s in at])
        column[-1].set_xlabel("redshift (time runs to the right)", fontsize=9)
    save_figure(fig, path)


# ----------------------------------------------------------------------------------------------------------- command line


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(function, help, description):
        p = commands.add_parser(function.__name__.replace("_", "-"), help=help, description=description, formatter_class=Help)
        p.set_defaults(function=function)
        return p

    def model_flags(p, metavar="RUN", help="run directories of train_lm.py; they know their base and data"):
        p.add_argument("runs", nargs="*", metavar=metavar, help=help)
        p.add_argument("--adapter", nargs="+", default=[], metavar="DIR_OR_ID", help="adapters in peft's format: directories or hub ids")
        p.add_argument("--base", help="model directory or hub id; default: each run's own")
        p.add_argument("--quantize", choices=["none", "nf4"], default="none", help="nf4: base and adapter unmerged on the 4-bit base; none: merged in 16 bit")
        p.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help="auto: bfloat16 where it is fast")
        p.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="auto: a GPU if there is one")

    def text_flags(p, samples):
        p.add_argument("--data", help="prepared directory, or a JSONL file with id and abstract; default: the first run's, or data/arxiv")
        p.add_argument("--subset", help="set, category, recipe, or control (the five control papers); default s1 (hep-th), or own for a run on own data")
        p.add_argument("--split", choices=["train", "validation", "test"], default="test", help="of --subset")
        p.add_argument("--samples", type=int, default=samples, help="so many abstracts, drawn with --seed; 0: all")
        p.add_argument("--seed", type=int, default=42, help="of the choice of abstracts, and of sampling")

    p = command(perplexity, "base model and runs on a split or a JSONL file", "Mean perplexity of abstracts for the base model and any number of runs.")
    model_flags(p)
    text_flags(p, 0)
    p.add_argument("--across", nargs="+", metavar="CATEGORY", help="a matrix: models by these categories' splits, in place of --subset")
    p.add_argument("--batch-tokens", type=int, default=4096, help="tokens in one forward pass; changes memory and speed only")
    p.add_argument("--json", help="where the results go (a figure beside it); default: into each run directory")

    p = command(complete, "let base and runs finish abstracts, or a text of your own",
                "The base and the runs finish the same abstracts, each from its first half. Stopped, the same command goes on.")
    model_flags(p)
    text_flags(p, 100)
    p.add_argument("--prompt", metavar="TEXT", help="finish this text instead, and print the result")
    p.add_argument("--max-new-tokens", type=int, default=1024, help="longest completion")
    p.add_argument("--temperature", type=float, default=0.7, help="0: always the likeliest token")
    p.add_argument("--top-k", type=int, default=50, help="sample among so many of the likeliest tokens")
    p.add_argument("--no-bos", action="store_true", help="prompts without the BOS token, as in the paper's released code")
    p.add_argument("--batch-size", type=int, default=16, help="abstracts at a time; lower it if memory runs out")
    p.add_argument("--out", metavar="FILE", help="JSONL file; default: completions-SUBSET-SPLIT.jsonl beside the first run's directory")

    p = command(semscore, "similarity of completions to the true abstracts", "Cosine between the sentence embeddings of abstract and prompt + completion.")
    model_flags(p, "FILE", "the file that complete wrote; with --pairwise: run directories")
    p.add_argument("--encoder", default="sentence-transformers/all-mpnet-base-v2", help="directory or hub id of a BERT or MPNet sentence encoder")
    p.add_argument("--pairwise", action="store_true", help="instead: similarity of pairs of true abstracts in the LLM's own mean-pooled last layer")
    p.add_argument("--across", nargs="+", metavar="CATEGORY", help="with --pairwise: within and between these")
    p.add_argument("--json", help="with --pairwise: where the results go; default: into the first run directory")
    text_flags(p, 100)

    p = command(signatures, "repetition, invented metadata and length of completions", "How completions fail, per model, with the truth as the row to compare with.")
    p.add_argument("runs", nargs="+", metavar="FILE", help="the file that complete wrote")
    p.add_argument("--window", type=int, default=250, help="words of a window; 2,000 tokens are about 1,400 words")

    p = command(rate, "a page for blind rating by experts; collect their files", "One HTML page for blind rating of truth and completions, and the table from the raters' files.")
    p.add_argument("runs", nargs="+", metavar="FILE", help="the file that complete wrote")
    p.add_argument("--samples", type=int, default=12, help="so many abstracts, drawn with --seed; 0: all")
    p.add_argument("--seed", type=int, default=42, help="of the choice and the order")
    p.add_argument("--out", metavar="HTML", help="the page; default: FILE with .rate.html")
    p.add_argument("--collect", nargs="+", metavar="JSON", help="files that raters saved: means, intervals, agreement, by model")

    p = command(compare, "one table and one figure over any number of runs", "What was measured of runs and bases, side by side, with the loss curves.")
    p.add_argument("runs", nargs="+", metavar="RUN", help="run directories of train_lm.py")
    p.add_argument("--completions", metavar="FILE", help="file of complete; SemScore, signatures and rating lie beside it")
    p.add_argument("--out", metavar="NAME", help="NAME.json, NAME.png, NAME.pdf; default: compare, beside the first run's directory")

    p = command(export, "merge a run into a checkpoint with a model card; upload it", "Write a run as a 16-bit checkpoint (or its adapter) with a model card.")
    p.add_argument("run", metavar="RUN", help="run directory of train_lm.py")
    p.add_argument("--out", required=True, metavar="DIR", help="directory to write; must not exist")
    p.add_argument("--what", choices=["merged", "adapter"], default="merged", help="the whole model in 16 bit, or the adapter alone")
    p.add_argument("--base", help="16-bit model directory or hub id to merge into; default: the run's own base")
    p.add_argument("--base-id", metavar="ORG/NAME", help="hub id of the base, for the card, where the run's base is a directory")
    p.add_argument("--completions", metavar="FILE", help="file of complete, whose SemScore, signatures and rating go on the card")
    p.add_argument("--license", help="identifier for the card; default: the base's, where it is known")
    p.add_argument("--push", metavar="ORG/NAME", help="also upload it to the hub")
    p.add_argument("--private", action="store_true", help="a private repository on the hub")

    p = command(regress, "six parameters from the global 21cm signal: errors, calibration; your own lightcone",
                "Loss and error of any number of L3M regression runs on held-out lightcones, beside the prior mean and ridge regression, with figures: "
                "validation loss by epoch (a band where runs differ by the seed only) and by depth (where --blocks differs), prediction against truth, "
                "calibration. With --lightcone: what a run says of your own lightcone.")
    p.add_argument("runs", nargs="+", metavar="RUN", help="run directories of train_l3m.py regress")
    p.add_argument("--lightcone", nargs="+", metavar="FILE", help="lightcones as `data_lightcone.py convert` reads them (NaN: parameter unknown): print and "
                   "draw the posterior")
    p.add_argument("--split", choices=["test", "validation"], default="test", help="lightcones to judge on; validation also chose each run's best step, and ridge's alpha")
    p.add_argument("--data", help="store or .npz of signals; default: the runs' own (of others, the best validation loss still is on their own)")
    p.add_argument("--samples", type=int, default=50, help="draws from the Gaussian of each lightcone, for the figure of prediction against truth")
    p.add_argument("--seed", type=int, default=42, help="of these draws")
    p.add_argument("--batch-size", type=int, default=64, help="signals at a time; changes memory and speed only")
    p.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="auto: a GPU if there is one")
    p.add_argument("--out", metavar="NAME", help="NAME.json, NAME-loss.png, ...; default: regress-SPLIT in the run's directory, or beside the first's for "
                   "several; with --lightcone NAME-FILE.json and .png, default posterior-FILE in the run's directory")

    def slice_flags(p, batch, what):
        p.add_argument("runs", nargs="+", metavar="RUN", help="run directories of train_l3m.py generate; those that differ by the seed only count as one")
        p.add_argument("--split", choices=["test", "validation"], default="test", help="lightcones to judge on; validation also chose each run's best step")
        p.add_argument("--data", help="store of data_lightcone.py; default: the runs' own")
        p.add_argument("--method", choices=["dopri5", "midpoint"], default="dopri5", help="sampler: dopri5 adapts its steps (tolerance 1e-3), midpoint takes --steps")
        p.add_argument("--steps", type=int, default=20, help="of midpoint, two evaluations of the network each; fewer are quicker and less exact")
        p.add_argument("--seed", type=int, default=42, help="of the choice of lightcones or windows, and of the noise, which all runs share")
        p.add_argument("--batch-size", type=int, default=batch, help=f"{what} at a time; changes memory and speed only")
        p.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="auto: a GPU if there is one")

    p = command(next_patch, "lightcone slices: loss of flow matching, error of the next patch given the truth before it",
                "Validation loss of flow matching, and mean squared error of each patch, drawn once given the true patches before it, for any number of L3M "
                "generation runs, beside two baselines: the previous slice's patch, and noise. Figures: error by position, loss by batch.")
    slice_flags(p, 8, "windows")
    p.add_argument("--max-windows", type=int, default=0, help="a quick look: so many windows of 12 slices, drawn with --seed; 0: all")
    p.add_argument("--out", metavar="NAME", help="NAME.json, NAME-position.png, NAME-loss.png; default: next-patch-SPLIT in the run's directory, or beside the "
                   "first's for several")

    p = command(generate, "lightcone slices generated on their own, beside the truth",
                "Continue held-out lightcones from a few true slices on, by any number of L3M generation runs. Figures beside the truth: slices, sections along the "
                "line of sight, power spectra and distributions of T_b; a table says whether the power is within a factor 2 of the truth.")
    slice_flags(p, 16, "lightcones")
    p.add_argument("--context", type=int, default=2, help="true slices to begin with; the paper's: 2 or 10")
    p.add_argument("--slices", type=int, default=10, help="slices to generate; beyond 12 with the context, the window slides")
    p.add_argument("--slide", type=int, default=6, help="slices that the window drops when it is full, 1 to 10; small ones remember more and are slower")
    p.add_argument("--samples", type=int, default=1, help="generated continuations of each lightcone")
    p.add_argument("--lightcones", type=int, default=8, help="so many lightcones of the split, drawn with --seed; 0: all")
    p.add_argument("--redshifts", type=float, nargs="+", default=[16, 12, 10, 8], metavar="Z", help="of the first given slice; each lightcone is continued from each")
    p.add_argument("--figures", type=int, default=2, help="so many lightcones are drawn; 0: none")
    p.add_argument("--out", metavar="NAME", help="NAME.json, NAME.npz (all slices, mK), NAME-statistics.png, ...; default: generate-SPLIT in the run's directory, or "
                   "beside the first's for several")

    args = parser.parse_args(argv)
    for name in ("window", "max_new_tokens", "top_k", "batch_size", "steps", "slices"):
        if getattr(args, name, 1) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("samples", "temperature", "max_windows", "lightcones", "figures"):
        if getattr(args, name, 0) < 0:
            parser.error(f"--{name} cannot be negative")
    try:
        args.function(args)
    except KeyboardInterrupt:
        parser.exit(130, "\nstopped; reports are as they were before, and `complete` goes on with the same command\n")
    except torch.OutOfMemoryError:
        fail("out of memory: lower --batch-tokens or --batch-size")
    except (ValueError, OSError) as e:
        fail(e)


if __name__ == "__main__":
    main()
