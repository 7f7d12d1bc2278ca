"""Every evaluation and figure.

    python eval.py perplexity out/s1-all            # base and run, hep-th's test set
    python eval.py perplexity out/s1-all out/s1-qkv --quantize nf4 --samples 500
    python eval.py perplexity --base path/to/model --data mine.jsonl
    python eval.py perplexity --adapter LLMsForHepth/s3-L-3.1-8B-qkv     # published
    python eval.py perplexity out/s1-all out/s10-all --across hep-th q-bio cs
    python eval.py complete out/s1-all out/s1-qkv --samples 100  # -> out/completions-s1-test.jsonl
    python eval.py complete out/s1-all --prompt "We study the"   # finish a text of your own
    python eval.py semscore out/completions-s1-test.jsonl        # how near to the true abstracts
    python eval.py semscore --pairwise out/s1-all --across hep-th gr-qc    # as the LLM sees them
    python eval.py signatures out/completions-s1-test.jsonl      # how completions fail
    python eval.py rate out/completions-s1-test.jsonl            # a page for blind rating
    python eval.py rate out/completions-s1-test.jsonl --collect *.json     # and what they say
    python eval.py compare out/s*-all out/s*-qkv --completions out/completions-s1-test.jsonl
    python eval.py export out/s1-all --out merged --push ORG/NAME
    python eval.py regress out/regress-*-seed*                   # L3M: the six parameters
    python eval.py regress out/regress-pretrained-seed0 --lightcone mine.h5
    python eval.py next-patch out/generate-*-seed*               # L3M: patches given the truth
    python eval.py generate out/generate-*-seed0 --slices 30     # L3M: slices beside the truth

perplexity: of an abstract, exp(mean negative log-likelihood of its tokens after BOS), no EOS added;
the figure is the mean over abstracts with a 95% bootstrap interval (arXiv:2508.03716 reports 11.20
for Llama-3.1-8B and 9.83 for its best variant on hep-th).

complete: the first half of an abstract's sentences is the prompt; sampled at temperature 0.7 among
the 50 likeliest tokens, 1,024 at most. Every abstract has its own random stream, a function of
--seed and its id, so all models get the same draws. The file has one JSON object for each abstract
and model (id, prompt, truth, completion, model, settings).

semscore (arXiv:2401.17072): the cosine between sentence embeddings of the full abstract and of
prompt + completion. The encoder, MPNet (arXiv:2004.09297) or BERT (arXiv:1810.04805), is computed
here from its raw safetensors, with the pooling and the length that its own files name. The prompt
is in both texts, so it alone scores high already: the row "prompt alone" shows how high.

signatures: over the words of each completion, lower-cased: Shannon entropy in bits; distinct-n, the
share of different n-grams; the longest span of words that comes twice; length against the truth's;
the share that goes on into invented metadata ("Comments: 12 pages", keywords, arXiv numbers, URLs).

rate: one HTML page for any browser, without a network: truth and completions of each abstract in
random order without names, 1-10 each for grammar, coherence, relevance, accuracy, creativity and
overall (the criteria of arXiv:2508.03716). Which text is whose stays in a key file here.

compare: what the commands above left of each run, by name, and the loss curves, smoothed within
each epoch only: `all` shows a step at an epoch's end, `qkv` does not (arXiv:2508.03716).

export: the adapter merged into the 16-bit base, a checkpoint that transformers, vLLM and the
converter of llama.cpp open (or, --what adapter, the adapter in peft's format), with a model card.

regress (arXiv:2506.14757): the Gaussian over six parameters that runs of train_l3m.py predict for
held-out lightcones: loss and error in units of the prior's width, beside the prior mean and ridge
regression on the same signals; coverage and sharpness, which are not in the paper.

next-patch (arXiv:2506.14757): every patch of held-out lightcones from the third slice of a window
on, drawn once given the true patches before it; mean squared error in normalised units. A perfect
generator does not come to zero: it errs by twice the variance that the truth before leaves.

generate: slices drawn patch after patch, each given what was generated before it. Not in the paper:
power spectra and distributions of T_b beside the truth's, by redshift; the last given slice,
repeated, is the row to compare with: it has the right power and does not evolve.
"""
import argparse
import base64
import bisect
import contextlib
import hashlib
import html
import itertools
import json
import math
import os
import re
import shutil
import sys
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

# before torch: train_lm sets how threads wait
from train_lm import Help, read_settings, resolve_dtype, start_processes, trained_rows
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tqdm import tqdm

from connectors import (GIVEN, coverage, gaussian_nll, joint_coverage, load_generator,
                        load_regressor, patch, sample_gaussian, standard_deviation, unpatch)
import data_arxiv
from data_arxiv import bounded, lock, one_line, reading, writing
from data_lightcone import (BINS, CELL, COLOURS, DIGITS, PARAMETERS, PRIORS, SYMBOLS, UNITS,
                            GlobalSignals, SubLightcones, colour_bar, denormalise, difference,
                            eor_colours, figure, in_words, name_of as lightcone_name, normalise,
                            power_spectrum, read_lightcone, read_store, setting_of, split_names,
                            to_physical)
from flow import sample
from lora import load_adapter, merge, save_merged
from model import (TOKENIZER_FILES, bos_eos, fetch, generate as generate_text, load_config,
                   load_pretrained, load_tokenizer, new_directory, no_links_out,
                   note as note_once, printable, token_nll)
from quant import NF4Linear


# -------------------------------------------------------------------------------------------------
# Reports. Every command's is of this shape:
#     {"command", "settings": {..}, "rows": [{"name", "n", "measures": {measure: summary}, ..}]}
# A row may have more keys, and "values": {measure: {item: value}} where a later command needs them.


def summary(values, bootstrap=True):
    """Number, mean, 95% interval, median, quartiles and standard deviation of (N,) values.

    The interval is the bootstrap's (percentiles of the means of 9,999 resamples). Of fewer than
    ten values it would be too narrow, and without `bootstrap` (values that are not independent)
    it is not wanted: `low` and `high` are None. Raises ValueError for no values."""
    values = np.asarray(values, float)
    n = len(values)
    if not n:
        raise ValueError("there is nothing to take a mean of")
    low = high = None
    if bootstrap and n >= 10:
        rng = np.random.default_rng(0)
        means = [rng.choice(values, (99, n)).mean(1) for _ in range(101)]                 # 9,999
        low, high = np.quantile(means, [0.025, 0.975]).tolist()
    q1, median, q3 = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return {"n": n, "mean": float(values.mean()), "low": low, "high": high,
            "median": median, "q1": q1, "q3": q3, "std": float(values.std())}


def report_row(name, values, **more):
    """The row of a report on values {measure: {item: value}}, which it also keeps."""
    measures = {m: summary(list(of_items.values())) for m, of_items in values.items()}
    n = max(s["n"] for s in measures.values())
    return {"name": name, "n": n, **more, "measures": measures, "values": values}


def interval(s, digits=3):
    """A summary as "mean [low, high]", or its mean alone where there is no interval."""
    if s["low"] is None:
        return f"{s['mean']:.{digits}f}"
    return f"{s['mean']:.{digits}f} [{s['low']:.{digits}f}, {s['high']:.{digits}f}]"


def print_table(title, header, rows, digits=3):
    """Columns as wide as they need be, the first to the left and the others to the right.

    digits: decimals of floats."""
    lines = [[printable(f"{cell:.{digits}f}" if isinstance(cell, float) else cell) for cell in row]
             for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*lines)]
    print(f"\n{printable(title)}")
    for first, *others in lines:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        print("  ".join([first.ljust(widths[0]), *cells]))


def show(rows, measures, title, digits=3, keys=("n",)):
    """Print the rows of a report: their `keys`, then their measures as "mean [95% interval]".

    A single measure also shows its median, quartiles and standard deviation. A measure that a
    row lacks is a dash."""
    spread = ["median", "q1", "q3", "std"] if len(measures) == 1 else []
    lines = []
    every = []
    for row in rows:
        found = [row["measures"].get(m) for m in measures]
        cells = [interval(s, digits) if s else "-" for s in found]
        cells += [found[0][k] if found[0] else "-" for k in spread]
        lines.append([row["name"], *(row.get(k, "-") for k in keys), *cells])
        every += filter(None, found)
    print_table(f"{title}: mean [95% interval]", ["", *keys, *measures, *spread], lines, digits)
    if any(s["low"] is None for s in every):
        print("(no interval: fewer than ten values, or values that are not independent)")


def plain(value):
    """What json cannot say by itself, as it can: numpy's numbers and arrays, paths, dtypes."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def write_json(path, content):
    """Write what a report or a key holds as JSON."""
    with writing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, default=plain))
    print(f"written: {path}")


def write_report(path, args, rows, **more):
    """Write the report of a command as JSON."""
    write_json(path, {"command": args.command, "settings": vars(args), "rows": rows, **more})


def read_json(path, otherwise=None):
    """The JSON object (or list, like `otherwise`) in a file; `otherwise`, if given, without it."""
    if otherwise is not None and not Path(path).exists():
        return otherwise
    with reading(path):
        found = json.loads(Path(path).read_bytes())
        if not isinstance(found, type(otherwise or {})):
            raise ValueError(f"a JSON {type(found).__name__} is not what it should hold")
    return found


# -------------------------------------------------------------------------------------------------
# Figures

def style_of(i):
    """Colour and line style of the i-th method."""
    return {"color": COLOURS[1 + i % 6], "ls": ["-", "--", ":"][i // 6 % 3]}


def read_metrics(run):
    """The records of a run's metrics.jsonl, its numbers only; none if it has no such file.

    A last line that a kill cut short is left out."""
    path = Path(run) / "metrics.jsonl"
    if not path.exists():
        return []
    with reading(path):
        lines = path.read_text().splitlines(keepends=True)
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        return [{k: v for k, v in r.items() if isinstance(v, (int, float))} for r in records]


def smooth(epochs, losses, width):
    """Running mean over `width` steps to each side, never across the end of an epoch.

    epochs: as logged, e.g. 1.0 ends the first."""
    epochs = np.ceil(np.array(epochs) - 1e-9)
    losses = np.array(losses, float)
    result = []
    for i, epoch in enumerate(epochs):
        near = slice(max(0, i - width), i + width + 1)
        result.append(losses[near][epochs[near] == epoch].mean())
    return np.array(result)


def draw_curves(ax, runs, x, key, look, label, smoothing=0.0):
    """Draw a quantity of metrics.jsonl against x ("epoch" or "step").

    The line is the mean over runs that differ by the seed, the band one standard deviation.
    smoothing: the part of a curve to each side that a running mean takes in; over epochs it
    stops at each epoch's end, so that a step there stays one."""
    curves = [{r[x]: r[key] for r in read_metrics(run) if key in r and x in r} for run in runs]
    at = sorted(set.intersection(*map(set, curves)))          # a seed may have been stopped earlier
    epochs = at if x == "epoch" else np.zeros(len(at))
    width = int(np.ceil(smoothing * len(at)))
    values = np.array([smooth(epochs, [curve[v] for v in at], width) for curve in curves])
    mean = values.mean(0)                                     # values: (runs, at)
    std = values.std(0)
    ax.plot(at, mean, **look, label=label + (f" ({len(runs)} seeds)" if len(runs) > 1 else ""))
    if len(runs) > 1:
        ax.fill_between(at, mean - std, mean + std, color=look["color"], alpha=0.25, lw=0)


# -------------------------------------------------------------------------------------------------
# Runs and texts


@dataclass
class Model:
    """What a row of a table stands for: its name there, the base, the adapter (None: the base)."""
    name: str
    base: str
    adapter: Path | None = None


def name_of(source):
    """The name of a model in tables: of RUN/adapter the run's, of a directory its own, a hub id."""
    if not Path(source).is_dir():
        return str(source)
    place = Path(os.path.abspath(source))
    if place.name in ("adapter", "adapter-best"):
        return place.parent.name + place.name.removeprefix("adapter")
    return place.name


def fetch_adapter(source, base):
    """An adapter in peft's format, a directory or a hub id -> Model, on `base` or the one it names.

    Raises ValueError if it is not to be had."""
    directory = fetch(source, ["adapter_config.json", "adapter_model.safetensors"])
    with reading(directory / "adapter_config.json", f"{source} holds no adapter of peft's") as path:
        config = json.loads(path.read_bytes())
        revision = config.get("revision")
        if not base and revision not in (None, "main"):
            raise ValueError(f"its base is the revision {revision!r} of "
                             f"{config['base_model_name_or_path']}: say with --base where it is")
        base = base or str(config["base_model_name_or_path"])
    return Model(name_of(source), base, directory)


def refuse_twins(names):
    """Raises ValueError if two models of a table share a name."""
    for name, count in Counter(names).items():
        if count > 1:
            raise ValueError(f"two models are called {name}: rename a directory, so that tables "
                             "can tell them apart")


def find_models(runs, args):
    """The runs, --adapter and --base of a command line -> ([Model, ..], settings of the runs).

    Bases come first, each once; args.device and args.dtype become torch's. ValueError if nothing
    is named, two share a name, or a base is a path that is not there."""
    _, _, args.device = start_processes(args.device)
    args.dtype = resolve_dtype(args.dtype, args.device)
    settings = [read_settings(run, "lm") for run in runs]
    models = [Model(name_of(run), args.base or s["base"], Path(run) / "adapter")
              for run, s in zip(runs, settings)]
    models += [fetch_adapter(source, args.base) for source in args.adapter]
    for m in models:
        if not os.path.exists(m.base) and not re.fullmatch(r"[^/.~][^/]*/[^/]*", m.base):
            raise ValueError(f"{m.name} is for the base {m.base}, which is not on this machine: "
                             "say with --base where it is")
    bases = dict.fromkeys([args.base] if args.base else [m.base for m in models])
    if not bases:
        raise ValueError("give run directories, --adapter or --base")
    models = [Model(name_of(base), base) for base in bases] + models
    refuse_twins(m.name for m in models)
    return models, settings


def read_texts(data, subset, args):
    """-> ({id: text}, what they are): --split of a prepared directory's set, or a JSONL file.

    Of them --samples, drawn with --seed; 0: all. Empty ones are left out with a note; ValueError
    if no other is there."""
    what = f"{subset} {args.split}"
    if Path(data).is_file():
        what = Path(data).name
        ids, texts = data_arxiv.read_texts(data)
    else:
        ids, texts = data_arxiv.load(data, subset, args.split)
    keep = choose(range(len(texts)), args.samples, args.seed)
    found = {ids[i]: texts[i] for i in keep if texts[i]}
    if not found:
        raise ValueError(f"{what} of {data} holds no abstract with text")
    if len(found) < len(keep):
        note_once(f"{len(keep) - len(found)} empty abstracts of {what} are left out")
    return found, what


def texts_of(args, settings, models=()):
    """The texts that a command line is about -> {what they are: {id: text}}.

    By default the paper's: hep-th's test set, in the first run's data. Raises ValueError if some
    are among those that a model was trained on, unless --split train asks for them."""
    data = args.data or (settings[0]["data"] if settings else "data/arxiv")
    subset = args.subset or ("own" if any(s["subset"] == "own" for s in settings) else "s1")
    found = {}
    for name in args.across or [subset]:
        texts, what = read_texts(data, name, args)
        found[what] = texts
        if args.split != "train":
            for m in models:
                check_unseen(m, texts, what)
    return found


def check_unseen(model, texts, what):
    """Refuse texts {id: text} that a run was trained on; note ids it knows with other texts."""
    if not model.adapter or not (model.adapter.parent / "rows.npz").exists():
        return                                                # a base, or an adapter on its own
    ids, trained = trained_rows(model.adapter.parent)
    seen = len(trained.intersection(data_arxiv.row_hashes(texts.values()).tolist()))
    if seen:
        raise ValueError(f"{seen} of the {len(texts)} abstracts of {what} are among those that "
                         f"{model.name} was trained on: choose others with --data or --subset")
    known = len(ids.intersection(data_arxiv.row_hashes(texts).tolist()))
    if known:
        note_once(f"{known} of the {len(texts)} ids of {what} are among those that {model.name} "
                  "was trained on, with other texts")


def free_memory(device):
    """Bytes that a model may take of a GPU, or of a Linux machine; infinity where unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = math.inf
    for path, pattern, unit in (("/proc/meminfo", r"MemAvailable:\s*(\d+)", 1024),
                                ("/sys/fs/cgroup/memory.max", r"(\d+)", 1)):      # of a container
        if os.path.exists(path) and (match := re.search(pattern, Path(path).read_text())):
            free = min(free, int(match[1]) * unit)
    return free


def load_model(m, args):
    """A Model -> CausalLM, its tokenizer, how it was joined: "16 bit", "merged, 16 bit" or
    "unmerged, NF4".

    Raises ValueError, before any weights are read, if they do not fit in memory."""
    quantize = None if args.quantize == "none" else args.quantize
    bits = f"{args.dtype.itemsize * 8} bit"
    if not quantize:
        shapes = load_pretrained(m.base, dtype=args.dtype, device="meta")
        need = sum(t.nbytes for t in [*shapes.parameters(), *shapes.buffers()])
        free = free_memory(args.device)
        if need > free:
            raise ValueError(f"{m.base} takes {need / 1e9:.1f} GB in {bits}, {free / 1e9:.1f} GB "
                             "are free: add --quantize nf4, a third of it")
    model = load_pretrained(m.base, quantize=quantize, dtype=args.dtype, device=args.device)
    nf4 = any(isinstance(part, NF4Linear) for part in model.modules())
    how = "NF4" if nf4 else bits
    if m.adapter:
        load_adapter(model, m.adapter)
        if nf4 and not quantize:
            note_once(f"{m.base} was saved in 4 bits, so {m.name} is evaluated unmerged on NF4")
        if not nf4:
            merge(model)
        how = f"{'unmerged' if nf4 else 'merged'}, {how}"
    return model, load_tokenizer(m.base), how


# -------------------------------------------------------------------------------------------------
# Perplexity


def in_batches(function, sequences, most, desc):
    """What a function gives of a list of sequences, one result each, for all of them, as a list.

    They come to it in batches of like lengths, the longest first, of about `most` tokens each."""
    lengths = np.array([len(sequence) for sequence in sequences])
    order = np.argsort(-lengths, kind="stable")
    ends = lengths[order].cumsum()
    result = {}
    desc = printable(desc)
    with tqdm(total=len(order), desc=desc, unit="text", dynamic_ncols=True) as bar:
        for rows in np.split(order, np.flatnonzero(np.diff(ends // most)) + 1):
            result |= zip(rows, function([sequences[i] for i in rows]))
            bar.update(len(rows))
    return [result[i] for i in range(len(sequences))]


@torch.no_grad()
def per_text(function, model, tokenizer, texts, most=4096, desc="texts"):
    """What a function (ids, lengths) -> (tokens, ..) gives for the tokens of each text after BOS.

    -> a list of tensors on the CPU, one a text. Texts of like length are computed together, about
    `most` tokens, which changes nothing but the speed. ValueError for a text without tokens."""
    def compute(sequences):
        ids, lengths = data_arxiv.collate(sequences)
        values = function(ids.to(model.lm_head.weight.device), lengths).cpu()
        return values.split((lengths - 1).tolist())

    bos, _ = bos_eos(model.config, tokenizer)
    sequences = [data_arxiv.encode(tokenizer, text, bos, None) for text in texts]
    if min(map(len, sequences)) < 2:
        raise ValueError("the tokenizer finds no token in an abstract: is it this model's own?")
    return in_batches(compute, sequences, most, desc)


def perplexities(model, tokenizer, texts, batch_tokens=4096, desc="perplexity"):
    """Perplexity of each text given BOS, (N,) float64, and their numbers of tokens (N,)."""
    parts = per_text(partial(token_nll, model), model, tokenizer, texts, batch_tokens, desc)
    values = [part.double().mean().exp().item() for part in parts]
    return np.array(values), np.array([len(part) for part in parts])


def perplexity(args):
    """Mean perplexity of abstracts for the base model and any number of runs, on a split of a
    prepared directory or on a JSONL file. A run is not tested on what it was trained on."""
    models, settings = find_models(args.runs, args)
    tests = texts_of(args, settings, models)
    rows = []
    for m in models:
        model, tokenizer, how = load_model(m, args)
        for on, texts in tests.items():
            values, tokens = perplexities(model, tokenizer, texts.values(), args.batch_tokens,
                                          f"{m.name}, {on}")
            found = dict(zip(texts, values.tolist()))
            for i, value in found.items():
                if not math.isfinite(value):
                    raise ValueError(f"{m.name} gives the abstract {i} the perplexity {value}: "
                                     "some of its weights are not finite, or too large for --dtype")
            rows.append(report_row(m.name, {"perplexity": found}, on=on, weights=how,
                                   base=name_of(m.base), tokens=int(tokens.sum())))
        del model                                             # before the next one comes
    show(rows, ["perplexity"], "perplexity of abstracts", keys=("on", "n", "weights"))
    bits = "NF4" if args.quantize == "nf4" else "16bit"
    name = f"{'across' if args.across else 'perplexity'}-{bits}.json"
    paths = [args.json] if args.json else [Path(run) / name for run in args.runs]
    for path in paths:
        write_report(path, args, rows)
    if not paths:
        note_once("add --json FILE to keep these figures")


# -------------------------------------------------------------------------------------------------
# Completions

FIELDS = ("id", "prompt", "truth", "completion", "model", "settings")
ADVICE = "give the file that `eval.py complete` wrote"


def split_abstract(text):
    """-> (prompt, truth): the first half of the sentences (the larger one if odd) and the rest.

    A sentence ends at white space after . ! or ?; one sentence is halved by its words."""
    parts = re.split(r"(?<=[.!?])\s+", text.strip())
    parts = parts if len(parts) > 1 else text.split()
    half = (len(parts) + 1) // 2
    return " ".join(parts[:half]), " ".join(parts[half:])


def read_completions(path):
    """A file of `complete` -> {model: {id: record}}; first, as if a model gave it, the truth.

    Raises ValueError where there is none, naming a line that is no completion, and for a second
    one of an abstract."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is {'a directory' if path.is_dir() else 'not there'}: {ADVICE}")
    models = {"truth": {}}
    for number, record in data_arxiv.read_jsonl(path):
        with reading(f"{path}, line {number}", ADVICE):
            if not all(isinstance(record[field], str) for field in FIELDS[:5]):
                raise ValueError(f"not a completion, an object with {', '.join(FIELDS)}")
            record["settings"] = dict(record["settings"])
            of_model = models.setdefault(record["model"], {})
            if of_model.setdefault(record["id"], record) is not record:
                raise ValueError(f"a second completion of {record['id']} by {record['model']}")
            true = record | {"completion": record["truth"]}
            was = models["truth"].setdefault(record["id"], true)
            if (was["prompt"], was["completion"]) != (true["prompt"], true["completion"]):
                raise ValueError(f"{record['id']} had another prompt or truth before")
    if not models["truth"]:
        raise ValueError(f"{path} holds no completion: {ADVICE}")
    return models


def complete_batch(model, tokenizer, prompts, ids, args):
    """Completions (str) of prompts; each draws from the random stream of (--seed, its id)."""
    bos, _ = bos_eos(model.config, tokenizer)
    skip = 1 if args.no_bos else 0
    encoded = [data_arxiv.encode(tokenizer, prompt, bos, None)[skip:] for prompt in prompts]
    longest = max(map(len, encoded)) + args.max_new_tokens
    room = model.config.max_position_embeddings
    if longest > room:
        raise ValueError(f"prompt and completion may take {longest} tokens, the model has room for "
                         f"{room}: lower --max-new-tokens")
    seeds = [zlib.crc32(f"{args.seed} {i}".encode()) for i in ids]
    new = generate_text(model, encoded, args.max_new_tokens, args.temperature, args.top_k,
                        model.config.eos_token_id, seeds)
    # decoded together: a word that the prompt began goes on
    return [tokenizer.decode(p + n)[len(tokenizer.decode(p)):] for p, n in zip(encoded, new)]


def finish_prompt(models, args):
    """Print what the models (of one base: its runs alone, if there are any) make of --prompt."""
    if not args.prompt.strip():
        raise ValueError("--prompt is empty: give a few words to go on from")
    runs = [m for m in models if m.adapter]
    if len(runs) == len(models) - 1:
        models = runs or models
    for m in models:
        model, tokenizer, _ = load_model(m, args)
        completion, = complete_batch(model, tokenizer, [args.prompt], ["prompt"], args)
        print(printable(f"[{m.name}]\n{args.prompt}{completion}\n"), flush=True)
        del model                                             # before the next one comes


def complete(args):
    """Let the base and the runs finish the same abstracts, each from its first half, or a text of
    your own. Stopped, the same command goes on."""
    models, settings = find_models(args.runs, args)
    if args.prompt is not None:
        return finish_prompt(models, args)
    args.across = None
    (what, texts), = texts_of(args, settings, models).items()
    out = args.out
    if not out:
        near = Path(args.runs[0]).resolve().parent if args.runs else Path("out")
        name = re.sub(r"[^\w.-]+", "-", what.removesuffix(".jsonl"))
        out = near / f"completions-{name}.jsonl"
    abstracts = {i: split_abstract(text) for i, text in texts.items()}
    write_completions(Path(out), models, abstracts, args)
    print(printable(f"{out}: {len(texts)} abstracts ({what}), {len(models)} models: "
                    f"{', '.join(m.name for m in models)}\n"
                    f"next: python eval.py semscore {out}, then signatures and rate"))


def cut_half_line(path):
    """Remove a last line of a file that a kill or a full disk cut off."""
    if os.path.isfile(path):                                  # no device
        os.truncate(path, Path(path).read_bytes().rfind(b"\n") + 1)


def append_lines(path, records):
    """Append records to a file; if the disk is full, whole lines only stay in it."""
    try:
        with open(path, "a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
    except OSError as e:
        cut_half_line(path)
        raise OSError(f"{path} could not be written ({e.strerror}); the completions in it are "
                      "whole: free some space, then the same command goes on") from e


def write_completions(out, models, abstracts, args):
    """Append to the JSONL file `out` what it lacks of {id: (prompt, truth)} by each model.

    Raises ValueError if another process does, or the file holds others by the same names or ids."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "ab"), open(lock(out, "writing")):
        cut_half_line(out)
        have = read_completions(out) if os.path.getsize(out) else {}
        for i, old in have.get("truth", {}).items():
            was = (old["prompt"], old["truth"])
            if abstracts.get(i, was) != was:
                raise ValueError(f"{out} holds another prompt or truth of {i}: choose another "
                                 "--out")
        with tqdm(total=len(models) * len(abstracts), desc="completions", unit="completion",
                  dynamic_ncols=True) as bar:
            for m in models:
                bar.set_postfix(model=printable(m.name))
                old = have.get(m.name, {})
                bar.update(len(old.keys() & abstracts.keys()))
                for records in new_completions(m, abstracts, old, args):
                    append_lines(out, records)
                    bar.update(len(records))


def new_completions(m, abstracts, have, args):
    """Yields, batch by batch, the records of a Model that are not among those it has, {id: record}.

    Raises ValueError if those were made with other settings."""
    weights = m.adapter and (m.adapter / "adapter_model.safetensors").read_bytes()
    settings = {"base": name_of(m.base), "quantize": args.quantize, "dtype": str(args.dtype)[6:],
                "adapter": weights and f"{zlib.crc32(weights):08x}",
                "temperature": args.temperature, "top_k": args.top_k, "seed": args.seed,
                "max_new_tokens": args.max_new_tokens, "bos": not args.no_bos}
    for old in have.values():
        was = old["settings"]
        for k, now in settings.items():
            if was.get(k) != now:
                raise ValueError(f"--out holds other completions of {m.name} ({k} was "
                                 f"{was.get(k)!r}, now {now!r}): choose another")
    if have.keys() >= abstracts.keys():
        return
    model, tokenizer, _ = load_model(m, args)
    order = sorted(abstracts, key=lambda i: len(abstracts[i][0]))       # like lengths: less padding
    for k in range(0, len(order), args.batch_size):
        ids = order[k:k + args.batch_size]
        if have.keys() >= set(ids):
            continue
        # the whole batch, as an undisturbed process computes it: it rounds the same
        texts = complete_batch(model, tokenizer, [abstracts[i][0] for i in ids], ids, args)
        yield [dict(zip(FIELDS, (i, *abstracts[i], text, m.name, settings)))
               for i, text in zip(ids, texts) if i not in have]


def beside(path, suffix):
    """The name of what is written beside a file of completions: c.jsonl, "key" -> c.key."""
    return Path(f"{str(path).removesuffix('.jsonl')}.{suffix}")


# -------------------------------------------------------------------------------------------------
# SemScore

# Where BERT and MPNet keep, in each layer, query, key, value, the attention's output and its norm.
LAYER = {"bert": ["attention.self.query", "attention.self.key", "attention.self.value",
                  "attention.output.dense", "attention.output.LayerNorm"],
         "mpnet": ["attention.attn.q", "attention.attn.k", "attention.attn.v", "attention.attn.o",
                   "attention.LayerNorm"]}
# The older keys of 1_Pooling/config.json, in the order in which poolings are joined.
POOLINGS = {"pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max",
            "pooling_mode_mean_tokens": "mean",
            "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
            "pooling_mode_weightedmean_tokens": "weightedmean",
            "pooling_mode_lasttoken": "lasttoken"}
FIRST_POSITION = {"bert": 0, "mpnet": 2}                       # MPNet: after its padding id
COMPUTED = {"cls", "max", "mean", "mean_sqrt_len_tokens"}
# Keys of an encoder's files that are read, or change nothing here; others are refused if set.
KNOWN = {*POOLINGS, "pooling_mode", "word_embedding_dimension", "embedding_dimension",
         "include_prompt", "max_seq_length", "do_lower_case", "modality_config", "prompts",
         "__version__", "similarity_fn_name"}
USUAL = {"module_output_name": "token_embeddings", "transformer_task": "feature-extraction",
         "model_type": "SentenceTransformer"}                  # the one value that is computed


@dataclass
class Encoder:
    """A sentence encoder: its config.json, its tensors (float32) by checkpoint name, its tokenizer,
    its poolings (of COMPUTED, joined) and whether its embeddings have unit length."""
    config: dict
    tensors: dict
    tokenizer: object
    pooling: list
    normalised: bool


def read_modules(directory):
    """What an encoder's own files ask for, as sentence-transformers reads them.

    -> (directory of its weights, poolings, normalised, settings of its text: max_seq_length,
    do_lower_case). Raises ValueError for what is not computed here, such as Dense layers."""
    usual = [{"type": "Transformer", "path": ""}, {"type": "Pooling", "path": "1_Pooling"}]
    modules = read_json(directory / "modules.json", usual)
    if modules is usual:
        note_once(f"{directory} has no modules.json: the mean over tokens is taken, as "
                  "sentence-transformers does")
    with reading(directory / "modules.json"):
        kinds = [re.sub(r"^sentence_transformers\..*\.", "", m["type"]) for m in modules]
        if kinds[:2] != ["Transformer", "Pooling"] or set(kinds[2:]) - {"Normalize"}:
            raise ValueError(f"{', '.join(kinds)}: only Transformer, Pooling and Normalize, in "
                             "this order, are computed here")
        weights, pooled = [directory / m["path"] for m in modules[:2]]
        if not all(p.resolve().is_relative_to(directory.resolve()) for p in (weights, pooled)):
            raise ValueError("a path leaves the directory")
    text = {}
    pooling = {}
    if modules is not usual:                                  # without it neither counts
        pooling = read_json(pooled / "config.json")
        paths = weights.glob("sentence_*_config.json")        # bert before roberta, distilbert, ..
        for path in sorted(paths, key=lambda path: "_bert_" not in path.name)[:1]:
            text = read_json(path)
    own = read_json(directory / "config_sentence_transformers.json", {})
    with reading(directory, "choose another --encoder"):
        for key, value in (text | pooling | own).items():
            if value and key not in KNOWN and value != USUAL.get(key):
                raise ValueError(f"it sets {key}, which is not computed here")
        if (weights / "adapter_config.json").exists():
            raise ValueError("it holds an adapter, which is not computed here")
        modes = [mode for key, mode in POOLINGS.items() if pooling.get(key)]
        modes = pooling.get("pooling_mode") or modes or ["mean"]
        modes = [modes] if isinstance(modes, str) else modes
        if not COMPUTED.issuperset(modes):
            raise ValueError(f"it asks for {', '.join(modes)} pooling; computed here are "
                             f"{', '.join(sorted(COMPUTED))}")
    return weights, modes, "Normalize" in kinds, text


def encoder_tokenizer(directory, lower_case):
    """-> an encoder's tokenizer, which neither pads nor cuts, and how its own files would cut: side
    and length (None: they do not say). ValueError where two of them disagree.

    lower_case: whether the text is to be lower-cased first."""
    from tokenizers import Tokenizer, normalizers
    words = read_json(directory / "tokenizer_config.json", {})
    with reading(directory / "tokenizer.json", "get the encoder again") as path:
        content = path.read_text(encoding="utf-8")
        tokenizer = Tokenizer.from_str(content)
        rules = json.loads(content)["normalizer"] or {}
        for key, name in (("do_lower_case", "lowercase"), ("strip_accents", "strip_accents"),
                          ("tokenize_chinese_chars", "handle_chinese_chars")):
            asked = words.get(key, rules.get(name))
            if asked != rules.get(name) and (asked or rules):
                raise ValueError(f"{name} is {rules.get(name)}, but tokenizer_config.json has "
                                 f"{key} {words[key]}")
        cut = tokenizer.truncation or {}
        tokenizer.no_padding()
        tokenizer.no_truncation()
        if len(tokenizer.encode("a").ids) < 3:                # some damage shows only here
            raise ValueError("it puts no [CLS] before a text, or no [SEP] behind it")
        if lower_case:
            own = [tokenizer.normalizer] if tokenizer.normalizer else []
            tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
    side = words.get("truncation_side") or cut.get("direction", "right")
    return tokenizer, side, words.get("model_max_length")


def load_encoder(source, device="cpu"):
    """A directory or hub id of a BERT or MPNet sentence encoder in safetensors -> Encoder.

    Raises ValueError for what is none, or is not computed here."""
    directory, modes, normalised, text = read_modules(fetch(
        source, ["*.json", "*/*.json", "model.safetensors", "*/model.safetensors"]))
    config = read_json(directory / "config.json")
    kind = str(config.get("model_type"))
    if kind not in LAYER:
        raise ValueError(f"{source} is a {kind}: only BERT and MPNet encoders are computed here")
    for key, computed in {"hidden_act": "gelu", "position_embedding_type": "absolute",
                          "is_decoder": False, "relative_attention_num_buckets": 32}.items():
        if config.get(key, computed) != computed:
            raise ValueError(f"{directory}/config.json: {key} {config[key]!r} is not computed "
                             "here: choose another --encoder")
    tokenizer, side, own_length = encoder_tokenizer(directory, text.get("do_lower_case"))
    last = torch.tensor([[max(tokenizer.get_vocab().values())]])
    with reading(directory / "model.safetensors", "get the encoder again, in safetensors") as path:
        tensors = {name.removeprefix(f"{kind}."): t.float() for name, t in load_file(path).items()}
        for name, t in tensors.items():
            if not t.isfinite().all():
                raise ValueError(f"{name} holds numbers that are not finite")
        room = len(tensors["embeddings.position_embeddings.weight"]) - FIRST_POSITION[kind]
        longest = text.get("max_seq_length") or own_length or room
        if longest < 3:                                       # [CLS], a word, [SEP]
            raise ValueError(f"the longest text is said to be {longest!r} tokens")
        tokenizer.enable_truncation(int(min(longest, room)), direction=side)
        encoder = Encoder(config, tensors, tokenizer, modes, normalised)
        encode_sentences(encoder, last, last >= 0)            # names, shapes, vocabulary fit
    encoder.tensors = {name: t.to(device) for name, t in tensors.items()}
    return encoder


def relative_buckets(T):
    """(T, T) bucket of the distance from a token (row) to another, as in T5 (arXiv:1910.10683).

    16 of the 32 for each direction: the distances 0 to 7, then a logarithmic scale up to 128."""
    distance = torch.arange(T) - torch.arange(T)[:, None]
    near = distance.abs()
    far = 8 + (torch.log(near.clamp(min=1) / 8) / math.log(128 / 8) * 8).long()
    return torch.where(near < 8, near, far.clamp(max=15)) + 16 * (distance > 0)


def encode_sentences(encoder, ids, mask):
    """Hidden states (B, T, C) of the last layer. ids (B, T); mask (B, T), False at padding."""
    c = encoder.config
    w = encoder.tensors
    kind = c["model_type"]
    B, T = ids.shape
    H = c["num_attention_heads"]

    def linear(x, name):
        return F.linear(x, w[name + ".weight"], w[name + ".bias"])

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"],
                            c.get("layer_norm_eps", 1e-12))

    first = FIRST_POSITION[kind]
    x = w["embeddings.word_embeddings.weight"][ids]
    x = x + w["embeddings.position_embeddings.weight"][first:T + first]
    attended = mask[:, None, None]                            # (B, 1, 1, T)
    if kind == "bert":
        x = x + w["embeddings.token_type_embeddings.weight"][0]
    else:                                                     # a bias on each distance, (H, T, T)
        bias = w["encoder.relative_attention_bias.weight"][relative_buckets(T).to(x.device)]
        attended = bias.permute(2, 0, 1).masked_fill(~attended, -torch.inf)       # (B, H, T, T)
    x = norm(x, "embeddings.LayerNorm")
    query, key, value, output, output_norm = LAYER[kind]
    for i in range(c["num_hidden_layers"]):
        layer = f"encoder.layer.{i}."
        q, k, v = [linear(x, layer + name).view(B, T, H, -1).transpose(1, 2)          # (B, H, T, D)
                   for name in (query, key, value)]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attended)
        y = y.transpose(1, 2).reshape(B, T, -1)
        x = norm(x + linear(y, layer + output), layer + output_norm)
        y = F.gelu(linear(x, layer + "intermediate.dense"))
        x = norm(x + linear(y, layer + "output.dense"), layer + "output.LayerNorm")
    return x


def pool(hidden, mask, modes):
    """Hidden states (B, T, C), mask (B, T) of tokens -> (B, D), the poolings' results, joined."""
    mask = mask[..., None]
    total = (hidden * mask).sum(1)
    count = mask.sum(1)
    pooled = {"cls": hidden[:, 0], "max": hidden.masked_fill(~mask, -torch.inf).amax(1),
              "mean": total / count, "mean_sqrt_len_tokens": total / count.sqrt()}
    return torch.cat([pooled[mode] for mode in modes], 1)


@torch.no_grad()
def embed(encoder, texts, most=4096):
    """Sentence embeddings (N, D) float32, on the CPU, of texts cut at the encoder's length.

    most: tokens in one pass."""
    device = encoder.tensors["embeddings.word_embeddings.weight"].device

    def compute(sequences):
        ids = torch.nn.utils.rnn.pad_sequence(sequences, True, -1)                # (B, T)
        mask = ids >= 0
        hidden = encode_sentences(encoder, ids.clamp(min=0).to(device), mask.to(device))
        return pool(hidden.cpu(), mask, encoder.pooling)

    with reading("tokenizer.json", "choose another --encoder"):
        sequences = [torch.tensor(e.ids) for e in encoder.tokenizer.encode_batch(list(texts))]
    result = torch.stack(in_batches(compute, sequences, most, "embeddings"))
    if not result.isfinite().all():
        raise ValueError("the encoder gives numbers that are not finite: choose another --encoder")
    return F.normalize(result, dim=1) if encoder.normalised else result


def semscore(args):
    """Similarity of completions to the true abstracts: the cosine between the sentence embeddings
    of abstract and prompt + completion. Or, --pairwise, of true abstracts to each other."""
    if args.pairwise:
        return pairwise(args)
    if len(args.inputs) != 1:
        raise ValueError("give one file that `eval.py complete` wrote")
    path = args.inputs[0]
    models = read_completions(path)
    truth = models.pop("truth")
    models["prompt alone"] = {i: r | {"completion": ""} for i, r in truth.items()}
    pairs = {(model, i): (f"{r['prompt']} {r['truth']}", r["prompt"] + r["completion"])
             for model, records in models.items() for i, r in records.items()}
    encoder = load_encoder(args.encoder, start_processes(args.device)[2])
    texts = dict.fromkeys(itertools.chain(*pairs.values()))
    vectors = dict(zip(texts, F.normalize(embed(encoder, texts).double(), dim=1)))
    scores = {place: float(vectors[a] @ vectors[b]) for place, (a, b) in pairs.items()}
    rows = [report_row(model, {"semscore": {i: scores[model, i] for i in records}})
            for model, records in models.items()]
    show(rows, ["semscore"], f"SemScore of {path} with {args.encoder}", 4)
    write_report(args.json or beside(path, "semscore.json"), args, rows)


def pairwise(args):
    """Cosine of all pairs of abstracts, within and between categories, in the mean of each LLM's
    last hidden states (after the final norm) over a text's tokens but BOS.

    Pairs share abstracts, so there is no interval."""
    models, settings = find_models(args.inputs, args)
    tests = texts_of(args, settings)
    rows = []
    for m in models:
        model, tokenizer, _ = load_model(m, args)
        vectors = {on: embed_llm(model, tokenizer, texts.values()) for on, texts in tests.items()}
        del model                                             # before the next one comes
        for a, b in itertools.combinations_with_replacement(vectors, 2):
            cosine = vectors[a] @ vectors[b].T                                    # (N_a, N_b)
            if a == b:
                cosine = cosine[torch.ones_like(cosine).triu(1).bool()]
            if not cosine.numel():
                raise ValueError(f"{a} holds fewer than two abstracts: there is no pair")
            rows.append({"name": m.name, "n": cosine.numel(), "between": f"{a} - {b}",
                         "measures": {"cosine": summary(cosine.flatten(), bootstrap=False)}})
    show(rows, ["cosine"], "pairs of abstracts, mean-pooled last layer", 4, ("between", "n"))
    if args.json or args.inputs:
        write_report(args.json or Path(args.inputs[0]) / "pairwise.json", args, rows)


@torch.no_grad()
def embed_llm(model, tokenizer, texts):
    """The LLM's own embeddings, (N, C) float64 of unit length."""
    def states(ids, lengths):
        hidden = model.model(ids[None], lengths=lengths)[0].float().cpu()                # (T, C)
        return torch.cat([part[1:] for part in hidden.split(lengths.tolist())])

    means = [part.mean(0) for part in per_text(states, model, tokenizer, texts, desc="embeddings")]
    return F.normalize(torch.stack(means).double(), dim=1)


# -------------------------------------------------------------------------------------------------
# Signatures of failure

METADATA = {  # what the arXiv shows around an abstract, and an abstract itself seldom holds
    "comments": r"\b(comments?|report[- ]no\.?|journal[- ]ref\.?|subjects?|doi)\s*:|"
                r"\b\d+ (pages|figures|pp\b)|\blatex\b",
    "keywords": r"\b(key ?words?|pacs|msc)\b( numbers?| codes?)?( \(\d+\))?\s*:",
    "arXiv number": r"\barxiv\s*:|\b\d{4}\.\d{4,5}(v\d+)?\b|"
                    r"\b(hep-(th|ph|ex|lat)|gr-qc|astro-ph|cond-mat|quant-ph|nucl-th|math|math-ph)"
                    r"/\d{7}\b",
    "URL": r"\bhttps?://|\bwww\.",
}


def words_of(text):
    return re.findall(r"\w+", text.lower())


def entropy(words):
    """Shannon entropy of the words' frequencies, bits; 0 for none. At most log2(their number)."""
    p = np.array(list(Counter(words).values())) / len(words)
    return float((p * np.log2(1 / p)).sum())


def distinct(words, n):
    """Different n-grams over all n-grams; 1 where there are none to repeat."""
    grams = list(zip(*(words[i:] for i in range(n))))
    return len(set(grams)) / len(grams) if grams else 1.0


def longest_repeat(words):
    """Words in the longest span that occurs at two places.

    If a span does, its beginnings do: bisection over the length."""
    lengths = range(1, len(words))
    return bisect.bisect_left(lengths, 1, key=lambda n: distinct(words, n))


def repetition(words):
    """Measures of how a list of words repeats itself."""
    return {"entropy": entropy(words), "distinct-1": distinct(words, 1),
            "distinct-2": distinct(words, 2), "distinct-3": distinct(words, 3),
            "longest repeat": longest_repeat(words)}


def signature(text, truth):
    """The measures of one completion, as a dictionary of numbers."""
    words = words_of(text)
    kinds = {kind: bool(re.search(pattern, text, re.IGNORECASE))
             for kind, pattern in METADATA.items()}
    return {"words": len(words), "length / truth": len(words) / max(1, len(words_of(truth))),
            **repetition(words), "metadata": max(kinds.values()), **kinds}


def drift_of(texts, window):
    """Lists of words -> for each window of so many words the means over the texts that fill it.

    Texts of at least two windows only."""
    texts = [words for words in texts if len(words) >= 2 * window]
    result = []
    for start in range(0, max(map(len, texts), default=0) - window + 1, window):
        here = [repetition(words[start:start + window]) for words in texts
                if len(words) >= start + window]
        means = {measure: np.mean([r[measure] for r in here]) for measure in here[0]}
        result.append({"from word": start, "completions": len(here), **means})
    return result


def signatures(args):
    """Repetition, invented metadata and length of completions, per model, with the truth as the row
    to compare with; of long completions also by windows."""
    models = read_completions(args.file)
    rows = []
    drift = []
    for model, records in tqdm(models.items(), desc="signatures", unit="model"):
        each = {i: signature(r["completion"], r["truth"]) for i, r in records.items()}
        names = list(next(iter(each.values())))
        rows.append(report_row(model, {k: {i: m[k] for i, m in each.items()} for k in names}))
        words = [words_of(r["completion"]) for r in records.values()]
        drift += [{"name": model, **d} for d in drift_of(words, args.window)]
    means = [[r["name"], *(s["mean"] for s in r["measures"].values())] for r in rows]
    print_table(f"means over completions of {args.file} (metadata and its kinds: the share of "
                "completions)", ["", *names], means)
    if drift:
        print_table(f"completions of two windows and more, by windows of {args.window} words",
                    drift[0], [d.values() for d in drift])
    write_report(beside(args.file, "signatures.json"), args, rows, drift=drift)


# -------------------------------------------------------------------------------------------------
# Human rating

CRITERIA = ["grammar", "coherence", "relevance", "accuracy", "creativity", "overall"]
STYLE = """
body { font: 17px/1.5 Georgia, serif; max-width: 52rem; margin: auto; padding: 0 1rem }
header { position: sticky; top: 0; background: #fff; border-bottom: 1px solid #bbb }
h2 { background: #eee; padding: 0.3rem } h3 { margin-bottom: 0 } #message { color: #a40000 }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: inherit }
label { display: inline-block; width: 7rem } input[type=number] { width: 3.5rem }
input:focus { outline: 3px solid #0072b2 } input:invalid { background: #fcc }
"""
SCRIPT = """
"use strict";
const page = document.body.dataset.page, slot = "ratings " + page;
const rater = document.getElementById("rater");
const marks = [...document.querySelectorAll("input[type=number]")];
const say = text => { document.getElementById("message").textContent = text; };
const forgetful = "This browser keeps nothing: save before you close the page.";
let kept = {};
try { kept = JSON.parse(localStorage.getItem(slot)) || {}; } catch (e) { say(forgetful); }

function count() {
  const done = marks.filter(i => i.value && i.validity.valid).length;
  document.getElementById("count").textContent = `${done} of ${marks.length}`;
}

for (const input of [rater, ...marks]) {
  input.value = kept[input.id] || "";
  input.addEventListener("input", () => {
    kept[input.id] = input.value;
    try { localStorage.setItem(slot, JSON.stringify(kept)); } catch (e) { say(forgetful); }
    count();
  });
  input.addEventListener("wheel", () => input.blur());        // scrolling must not change a mark
}
count();

document.getElementById("save").addEventListener("click", () => {
  const name = rater.value.trim(), wrong = marks.find(i => !i.validity.valid);
  say(!name ? "Give your name first: it tells your ratings from the others'."
      : wrong ? "Marks are whole numbers from 1 to 10." : "");
  if (!name) return rater.focus();
  if (wrong) return wrong.focus();
  const ratings = {};
  for (const i of marks.filter(i => i.value)) {
    const [abstract, text, criterion] = i.id.split("/"), item = abstract + "/" + text;
    (ratings[item] ||= {})[criterion] = Number(i.value);
  }
  const link = document.createElement("a");
  const content = JSON.stringify({page, rater: name, ratings}, null, 1);
  link.href = URL.createObjectURL(new Blob([content], {type: "application/json"}));
  link.download = `ratings-${name.replace(/[^a-zA-Z0-9]+/g, "_")}-${page}.json`;
  link.click();
});
"""


def rating_page(abstracts, page):
    """One HTML page: under each prompt the texts, six numbers below each, TeX as its source.

    abstracts: [(prompt, [text, ..]), ..]. Texts are untrusted: they are escaped, and a content
    security policy lets this script and this style run and nothing else, and loads nothing."""
    body = []
    for n, (prompt, texts) in enumerate(abstracts):
        body.append(f"<h2>Abstract {n + 1} of {len(abstracts)}</h2>"
                    f'<pre class="prompt">{html.escape(prompt)}</pre>')
        for j, text in enumerate(texts):
            body.append(f"<section><h3>Continuation {chr(65 + j)}</h3>"
                        f'<pre class="text">{html.escape(text) or "(nothing)"}</pre>')
            for c in CRITERIA:
                body.append(f'<label for="{n}/{j}/{c}">{c}</label>'
                            f'<input type="number" min="1" max="10" id="{n}/{j}/{c}"><br>')
            body.append("</section>")
    script, style = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
                     for text in (SCRIPT, STYLE)]
    policy = f"default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}; base-uri 'none'; form-action 'none'">
<title>Rate abstracts</title><style>{STYLE}</style></head><body data-page="{page}">
<header><label for="rater">Your name</label><input id="rater"> <span id="count"></span>
<button id="save">Save as JSON</button> <b id="message" role="alert"></b></header>
<p>The beginning of an abstract, then several continuations in random order, TeX as its source. Rate
each from 1 (worst) to 10 (best): type the number; Tab goes on. What you enter stays in this browser
until you save it.</p>
<main>{"".join(body)}</main>
<script>{SCRIPT}</script></body></html>
"""


def rate(args):
    """One HTML page for blind rating of truth and completions by experts, and the key that tells
    which text is whose; with --collect the table from the raters' files."""
    if args.collect:
        return collect(args)
    models = read_completions(args.file)
    ids = [i for i in models["truth"] if all(i in records for records in models.values())]
    if not ids:
        raise ValueError(f"no abstract of {args.file} has a completion by every model: finish "
                         "`eval.py complete` first")
    rng = np.random.default_rng(args.seed)
    abstracts = []
    key = {}
    for n, i in enumerate(rng.permutation(ids)[:args.samples or None].tolist()):
        order = rng.permutation(list(models)).tolist()
        texts = [models[model][i]["completion"].strip() for model in order]
        abstracts.append((models["truth"][i]["prompt"], texts))
        key |= {f"{n}/{j}": {"id": i, "model": model} for j, model in enumerate(order)}
    page = hashlib.sha256(json.dumps(abstracts).encode()).hexdigest()[:12]
    out = args.out or beside(args.file, "rate.html")
    with writing(out) as temporary:
        temporary.write_text(rating_page(abstracts, page), encoding="utf-8")
    print(f"written: {out} ({len(abstracts)} abstracts, {len(models)} texts each): give it to the "
          "raters")
    write_json(beside(args.file, f"{page}.key.json"), key)
    print(f"keep the key to yourself; then: python eval.py rate {args.file} --collect FILES")


def krippendorff_alpha(values):
    """Agreement of raters beyond chance, Krippendorff's alpha for interval data: 1 - variance
    within items, weighted by their ratings, over the variance of all ratings (both unbiased).

    values (raters, items), NaN where a rater gave none; items with one rating say nothing. 1: full
    agreement, 0: as by chance; None where there is nothing to compare. K. Krippendorff, Content
    Analysis (2004), chapter 11."""
    count = (~np.isnan(values)).sum(0)                        # ratings of each item
    values = values[:, count > 1]
    total = np.nanvar(values, ddof=1) if values.size else 0
    if not total:
        return None
    within = np.average(np.nanvar(values, 0, ddof=1), weights=count[count > 1])
    return float(1 - within / total)


def read_rating(file, path):
    """A rater's file -> (rater, {(model, abstract id): {criterion: 1..10}}), by its page's key.

    Raises ValueError naming what is wrong."""
    saved = read_json(file)
    with reading(file, "is it what the rating page saved?"):
        key = read_json(beside(path, f"{saved['page']}.key.json"))
        result = {}
        for item, marks in saved["ratings"].items():
            good = all(c in CRITERIA and type(v) is int and 1 <= v <= 10 for c, v in marks.items())
            if item not in key or not good:
                raise ValueError(f"item {item} is not on its page, or a mark is none from 1 to 10")
            if marks:
                result[key[item]["model"], key[item]["id"]] = marks
        return str(saved["rater"]), result


def collect(args):
    """Raters' files -> per model and criterion the mean over abstracts (of the mean over raters)
    with its interval; and their agreement."""
    raters = {}
    for file in args.collect:
        rater, ratings = read_rating(file, args.file)
        if rater in raters:
            raise ValueError(f"{file}: there is another file by the rater {rater}")
        raters[rater] = ratings
    items = list(dict.fromkeys(itertools.chain(*raters.values())))
    if not items:
        raise ValueError("these files hold no rating yet")
    models = np.array([model for model, _ in items])
    rows = [{"name": model, "n": n, "measures": {}} for model, n in Counter(models).items()]
    agreement = {}
    for c in CRITERIA:
        marks = np.array([[ratings.get(item, {}).get(c, np.nan) for item in items]
                          for ratings in raters.values()])                        # (raters, items)
        agreement[c] = krippendorff_alpha(marks)
        given = ~np.isnan(marks)
        for row in rows:
            here = (models == row["name"]) & given.any(0)
            if here.any():
                s = summary(np.nanmean(marks[:, here], 0))
                row["measures"][f"rating {c}"] = s | {"ratings": given[:, here].sum()}
    rows.sort(key=lambda row: -row["measures"].get("rating overall", {"mean": 0})["mean"])
    show(rows, [f"rating {c}" for c in CRITERIA], f"human rating by {', '.join(raters)}", 2)
    print_table("agreement of the raters (Krippendorff's alpha)", CRITERIA,
                [["-" if alpha is None else alpha for alpha in agreement.values()]])
    write_report(beside(args.file, "rating.json"), args, rows, raters=list(raters),
                 agreement=agreement)


# -------------------------------------------------------------------------------------------------
# What was measured; sharing a model


def measured(name, run, completions=None):
    """All that was measured of a model, of a run directory's reports and of those beside a file of
    completions -> {measure: summary, and "on": what it was measured on}."""
    reports = {Path(run) / "perplexity-16bit.json": "", Path(run) / "perplexity-NF4.json": ", NF4"}
    if completions:
        with reading(completions, ADVICE):
            open(completions).close()
        reports |= {beside(completions, f"{kind}.json"): ""
                    for kind in ("semscore", "signatures", "rating")}
    found = {}
    for path, suffix in reports.items():
        rows = read_json(path, {"rows": []})
        with reading(path, "write it again with eval.py"):
            for row in rows["rows"]:
                for m, s in row["measures"].items():
                    interval(s)                               # raises for what is no summary
                    if not np.isfinite([v for v in s.values() if v is not None]).all():
                        raise ValueError(f"{m} of {row['name']} is not finite")
                    if row["name"] == name:
                        on = row.get("on", Path(completions or path).name)
                        found[m + suffix] = s | {"on": on, "n": s["n"]}
    return found


def validation_losses(run):
    return [r["validation_loss"] for r in read_metrics(run) if "validation_loss" in r]


# The columns of compare, and the command that makes each.
COMPARED = {"perplexity": "perplexity RUNS", "perplexity, NF4": None, "semscore": "semscore FILE",
            "rating overall": "rate FILE --collect", "entropy": "signatures FILE",
            "distinct-2": None, "longest repeat": None, "metadata": None}


def compare(args):
    """One table and two figures over any number of runs and their bases: what the other commands
    measured of them, and their loss curves."""
    refuse_twins(name_of(run) for run in args.runs)
    settings = {run: read_settings(run, "lm") for run in args.runs}
    bases = {name_of(s["base"]): run for run, s in settings.items()}
    rows = [{"name": name, "measures": measured(name, run, args.completions)}
            for name, run in bases.items()]
    for run, s in settings.items():
        losses = [f"{loss:.4f}" for loss in validation_losses(run)]
        rows.append({"name": name_of(run), "subset": s["subset"], "run": run,
                     "lora": re.sub(r"[\[\]']", "", str(s.get("lora"))),        # may be a list
                     "validation loss": losses[-1] if losses else "-",
                     "measures": measured(name_of(run), run, args.completions)})
    columns = []
    for column, command in COMPARED.items():
        every = [row["measures"][column] for row in rows if column in row["measures"]]
        if every:
            columns.append(column)
        elif command:
            note_once(f"no {column} yet: python eval.py {command} (FILE: --completions, what "
                      "`complete` wrote)")
        if len({(s["on"], s["n"]) for s in every}) > 1:
            note_once(f"{column} was not measured on the same abstracts for all of these; run them "
                      "in one command")
    show(rows, columns, "runs", keys=("subset", "lora", "validation loss"))
    out = args.out or Path(args.runs[0]).resolve().parent / "compare"
    write_report(f"{out}.json", args, rows)
    if columns:
        draw_intervals(rows, columns, out)
    draw_losses(rows[len(bases):], f"{out}-loss")


def draw_intervals(rows, columns, name):
    """A panel for each measure, a line for each model: mean, 95% interval; the bases' dashed."""
    kinds = list(dict.fromkeys(row.get("lora") for row in rows))        # None: the bases
    size = (max(7, 1.8 + 1.7 * len(columns)), 1.2 + 0.26 * len(rows))
    with figure(name, 1, len(columns), size, sharey=True, squeeze=False) as axes:
        for c, ax in zip(columns, axes[0]):
            for y, row in enumerate(rows):
                if s := row["measures"].get(c):
                    kind = kinds.index(row.get("lora"))
                    ax.plot([s["low"], s["mean"], s["high"]], [y] * 3, color=COLOURS[kind % 7],
                            marker="*osD^vP"[kind % 7], markevery=[1])
                    if kind == 0:
                        ax.axvline(s["mean"], color="0.6", ls="--", lw=1, zorder=0)
            ax.set_title(c.replace(", ", ",\n"))
            ax.locator_params(axis="x", nbins=4)
            ax.grid(axis="x", alpha=0.3)
        ax.set_yticks(range(len(rows)), [row["name"] for row in rows])        # shared by the panels
        ax.set_ylim(len(rows) - 0.5, -0.5)


def draw_losses(rows, name):
    """Losses, a panel for each choice of adapted matrices: in training, smoothed within each epoch,
    and circles for those of validations."""
    kinds = list(dict.fromkeys(row["lora"] for row in rows))
    size = (1.5 + 3.5 * len(kinds), 3.6)
    with figure(name, 1, len(kinds), size, sharex=True, sharey=True, squeeze=False) as axes:
        for kind, ax in zip(kinds, axes[0]):
            here = [row for row in rows if row["lora"] == kind]
            for i, row in enumerate(here):
                look = style_of(i)
                draw_curves(ax, [row["run"]], "epoch", "loss", look, row["name"], 0.02)
                draw_curves(ax, [row["run"]], "epoch", "validation_loss",
                            look | {"ls": "none", "marker": "o", "mfc": "none"}, "")
            ax.set(title=f"LoRA on {kind}", xlabel="epoch")
            ax.locator_params(axis="x", integer=True)         # the grid shows where epochs end
            ax.grid(alpha=0.3)
            ax.legend(fontsize=8, title="lines: training, circles: validation", title_fontsize=7)
        axes[0, 0].set_ylabel("loss [nats a token]")


CARD = """---
{front}
language: en
tags: [lora, arxiv, physics]
---

# {name}

{llama}{base}, fine-tuned on arXiv abstracts with LoRA (arXiv:2106.09685), after the recipe of
FeynTune (arXiv:2508.03716). It continues abstracts; it is no source of facts: what it writes may be
wrong, and references that it names may not exist.

## Data

Training set `{subset}`; seed {seed}.

{data}

## Hyperparameters

| setting | value |
|---|---|
{hyperparameters}

## Measured

| model | measure | mean [95% interval] | on |
|---|---|---|---|
{measures}

{losses}

## Licence

{licence}: a fine-tuned model stays under its base model's licence ({base}).
"""
HYPERPARAMETERS = ("lora", "rank", "alpha", "dropout", "quantize", "dtype", "batch_size", "epochs",
                   "max_steps", "lr", "min_lr", "warmup", "seed")


def model_card(args, settings, base_id):
    """README.md of an exported model: front matter that the hub reads, then base, data as the run
    stored it, hyperparameters, what was measured, licence."""
    models = {name_of(settings["base"]): base_id or name_of(settings["base"]),
              name_of(args.run): name_of(args.run)}           # as in reports, as on the card
    base, name = [" ".join(printable(shown).split()) for shown in models.values()]
    front = {"base_model": base_id, "pipeline_tag": "text-generation", "license": args.license,
             "library_name": "transformers" if args.what == "merged" else "peft"}
    data = read_json(Path(args.run) / "config.json").get("data", {})
    measures = [f"| {shown} | {measure} | {interval(s)} | {s['n']} abstracts, {s['on']} |"
                for who, shown in zip(models, (base, name))
                for measure, s in measured(who, args.run, args.completions).items()]
    losses = validation_losses(args.run)
    return CARD.format(
        front="\n".join(f"{k}: {v}" for k, v in front.items() if v), name=name, base=base,
        llama="Built with Llama. " if "llama-3" in base.lower() else "",
        subset=settings["subset"], seed=settings.get("seed"),
        data="\n".join(f"- {k}: {json.dumps(v)}" for k, v in data.items()),
        hyperparameters="\n".join(f"| {k} | {settings[k]} |" for k in HYPERPARAMETERS
                                  if settings.get(k) is not None),
        measures="\n".join(measures),
        losses=f"Validation loss, nats a token: {losses[0]:.4f} before, {losses[-1]:.4f} after "
               "training." if losses else "",
        licence=args.license or "That of the base model")


def export(args):
    """Write a run as a 16-bit checkpoint (or its adapter) with a model card; upload it."""
    settings = read_settings(args.run, "lm")
    base = args.base or settings["base"]
    base_id = args.base_id or (None if os.path.isdir(base) else base)
    adapter = Path(args.run) / "adapter"
    if args.push:
        from huggingface_hub import get_token
        if args.push.count("/") != 1:
            raise ValueError(f"--push takes ORGANISATION/NAME, not {args.push!r}")
        if not get_token():
            raise ValueError("no token for the hub: make one with write access at "
                             "https://huggingface.co/settings/tokens, then run `hf auth login`")
    card = model_card(args, settings, base_id)
    with new_directory(args.out) as temporary:
        if args.what == "merged":
            save_merged(base, adapter, temporary)
            files = [fetch(base) / name for name in TOKENIZER_FILES]
        else:
            no_links_out(adapter)
            files = [adapter / "adapter_model.safetensors"]
            config = read_json(adapter / "adapter_config.json")
            config["base_model_name_or_path"] = base_id or base
            with writing(temporary / "adapter_config.json") as path:
                path.write_text(json.dumps(config, indent=1))
        for file in filter(os.path.lexists, files):
            with writing(temporary / file.name) as path:
                shutil.copyfile(file, path)
        with writing(temporary / "README.md") as path:
            path.write_text(card, encoding="utf-8")
    names = ", ".join(sorted(p.name for p in Path(args.out).iterdir()))
    print(f"{args.out} holds the {args.what} model: {names}")
    if args.push:
        upload(args)


def upload(args):
    """Upload the exported directory to the hub. ValueError, with the way on, if that fails."""
    from huggingface_hub import HfApi
    try:
        HfApi().create_repo(args.push, private=args.private, exist_ok=True)
        HfApi().upload_folder(repo_id=args.push, folder_path=Path(args.out),
                              commit_message=f"{name_of(args.run)}: {args.what}")
    except Exception as e:              # the hub's, the network's and the system's share no type
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise ValueError(f"the upload to {args.push} failed ({reason}); {args.out} is whole: check "
                         "the network and that your token may write there, then "
                         f"`hf upload {args.push} {args.out}`") from e
    print(f"uploaded: https://huggingface.co/{args.push}")


# ------------------------------------------------------------------------------------- runs of L3M


def open_runs(args, experiment, shared):
    """The runs of a command line and the lightcones to judge them on -> groups {name: {run:
    settings}}, settings of the first, path, {split: names}.

    Runs that are called alike but for a "-seedN", and differ by the seed only, are one group. A run
    is judged on the lightcones that it set aside when it started, whatever was added since; with
    --data on the split of other lightcones. shared: the settings that must be equal. Raises
    ValueError where the runs cannot share a table, or were trained on some of the lightcones."""
    runs = {Path(run): read_settings(run, experiment) for run in args.runs}
    first = runs[Path(args.runs[0])]
    data = args.data or first["data"]
    if not Path(data).exists():
        raise ValueError(f"{data}, the lightcones of the run, is not there: say with --data where "
                         "they are")
    lightcones = first["lightcones"]
    if args.data:
        kind = "regression" if experiment == "regress" else "generation"
        lightcones, _ = split_names(data, kind)
    else:
        shared = (*shared, "lightcones")
    held_out = set(lightcones[args.split])
    groups = {}
    for run, s in runs.items():
        if any(s[k] != first[k] for k in shared):
            raise ValueError(f"{run} was trained on other lightcones, or another normalisation of "
                             f"them, than {args.runs[0]}: they cannot share a table")
        if seen := held_out & set(s["lightcones"]["train"]):
            raise ValueError(f"{len(seen)} of the {len(held_out)} {args.split} lightcones of "
                             f"{data} are among those that {run} was trained on: leave out --data, "
                             "or name lightcones that it has not seen")
        name = re.sub(r"[-_]?seed\d+$", "", run.resolve().name)
        group = groups.setdefault(name, {})
        if any(s | {"seed": None} != other | {"seed": None} for other in group.values()):
            raise ValueError(f"runs with different settings are called {name}: rename a directory, "
                             "so that tables can tell them apart")
        group[run] = s
    return groups, first, data, lightcones


def report_path(args):
    """Where results go, without suffix: --out, or COMMAND-SPLIT in the run's directory, or beside
    the first's if there are several."""
    first = Path(args.runs[0])
    parent = first if len(args.runs) == 1 else first.resolve().parent
    other = f"-{Path(args.data).stem}" if args.data else ""
    return args.out or parent / f"{args.command}-{args.split}{other}"


def best_loss(run, settings):
    """The lowest validation loss of a run: that of its model.safetensors. ValueError if it has
    none; a note if it is not at its end."""
    records = [r for r in read_metrics(run) if "validation_loss" in r]
    if not records:
        raise ValueError(f"{run} has no validation loss in its metrics.jsonl: finish the run first")
    last = records[-1]
    if last["epoch"] < settings["epochs"] and last["step"] != settings["max_steps"]:
        tqdm.write(f"note: {run} has come to epoch {last['epoch']:g} of {settings['epochs']}: its "
                   "best network so far is judged", file=sys.stderr)
    return min(r["validation_loss"] for r in records)


def judge(groups, score):
    """Groups of runs -> a method each: name, runs, settings, look, best validation losses, and what
    score(run, settings) -> {measure: array} finds: the mean over seeds; "draws" side by side."""
    methods = []
    for i, (name, runs) in enumerate(groups.items()):
        best = [best_loss(run, s) for run, s in runs.items()]
        found = []
        for run, s in runs.items():
            try:
                found.append(score(run, s))
            except ValueError as e:
                where = "" if str(run) in str(e) else f"{run}/model.safetensors: "
                raise ValueError(f"{where}{e}") from e
        method = {"name": name, "runs": list(runs), "look": style_of(i),
                  "settings": next(iter(runs.values())), "validation_loss": best}
        for key in found[0]:
            arrays = [f[key] for f in found]
            method[key] = np.concatenate(arrays, 1) if key == "draws" else np.mean(arrays, 0)
        methods.append(method)
    return methods


def baseline(name, i, found):
    """A method that needs no network, in grey."""
    look = {"color": ("0.4", "0.55", "0.7")[i], "ls": ("--", "-.", ":")[i]}
    return {"name": name, "runs": [], "settings": {}, "look": look, **found}


SEEDS = ("n", "seeds", "std over seeds")                      # what tables show of a row


def row_of(m, n, measures, **more):
    """A method's row of the report on some of its measures, (n,) each. What is not finite is left
    out, as is a measure that never is."""
    finite = {k: np.asarray(m[k])[np.isfinite(m[k])] for k in measures if k in m}
    seeds = len(m["runs"])
    scatter = f"{np.std(m['validation_loss']):.4f}" if seeds > 1 else "-"
    return {"name": m["name"], "n": n, "seeds": seeds or "-", "std over seeds": scatter,
            "runs": m["runs"], "measures": {k: summary(v) for k, v in finite.items() if len(v)},
            **more}


def legend(ax, title=None):
    """One legend above all panels, so that it covers nothing."""
    ax.figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=4,
                     fontsize=8, title=title, title_fontsize=8)


def draw_training(methods, x, losses, name, **scales):
    """A panel for each of losses {key of metrics.jsonl: label}: against x ("epoch" or "step"), the
    mean over seeds and one standard deviation as a band; baselines as level lines."""
    with figure(name, 1, len(losses), (2 + 4.5 * len(losses), 4.5), squeeze=False) as axes:
        for ax, (key, label) in zip(axes[0], losses.items()):
            for m in methods:
                if m["runs"]:
                    smoothing = 0.02 if key == "loss" else 0
                    draw_curves(ax, m["runs"], x, key, m["look"], m["name"], smoothing)
                elif key in m:
                    ax.axhline(m[key][0], **m["look"], lw=1, label=m["name"])
            ax.set(xlabel=x, ylabel=f"$\\leftarrow$ better    {label}", **scales)
            ax.grid(alpha=0.3, which="both")
        legend(ax, "bands: standard deviation over seeds, where there are several")


# --------------------------------------------- regress: six parameters from the global 21cm signal

LEVELS = np.linspace(0.05, 0.95, 19)                          # nominal levels of the coverage
MARKERS = "osD^vP"


def axis_label(j):
    """The symbol of parameter j with its unit."""
    return f"{SYMBOLS[j]} [{UNITS[j]}]" if UNITS[j] else SYMBOLS[j]


@torch.no_grad()
def predict(run, settings, signals, device, batch_size):
    """The Gaussians that a run predicts from signals (N, tokens) -> mean (N, 6) in [0, 1] and
    lower-triangular L (N, 6, 6) of the precision L L^T. ValueError where they are not finite."""
    regressor = load_regressor(run, device, settings=settings)
    parts = [regressor(batch.to(device)) for batch in signals.split(batch_size)]
    mean, L = (torch.cat(part).float().cpu() for part in zip(*parts))
    if not (mean.isfinite().all() and L.isfinite().all()):
        raise ValueError(f"{run}: its network predicts NaN or infinity: train it again")
    return mean, L


def baselines(train, validation):
    """What needs no network -> {name: function of signals (N, tokens) to a Gaussian like a run's,
    mean (N, 6) and L (N, 6, 6)}, and ridge's alpha.

    prior mean: 0.5 for each parameter, with the training set's scatter about it. ridge regression:
    linear in the signal, weights (X^T X + alpha)^-1 X^T Y from the training set, alpha and the
    covariance from the validation set; clamped to the prior."""
    x0 = train.signals.double().mean(0)
    y0 = train.parameters.double().mean(0)
    X = train.signals - x0
    Y = train.parameters - y0

    def linear(alpha):
        weights = torch.linalg.solve(X.T @ X + alpha * torch.eye(len(x0)), X.T @ Y)
        return lambda signals: ((signals - x0) @ weights + y0).clamp(0, 1)    # (tokens, 6)

    def error(alpha):
        return (linear(alpha)(validation.signals) - validation.parameters).square().mean()

    def gaussian(mean_of, data):
        residual = mean_of(data.signals).double() - data.parameters
        covariance = residual.T @ residual / len(residual)
        covariance += 1e-6 * torch.eye(6)                     # no deviation below 0.001
        if len(residual) < 60:                                # too few for 15 correlations
            covariance = covariance.diag().diag()
        L = torch.linalg.cholesky(torch.linalg.inv(covariance)).float()
        return lambda signals: (mean_of(signals).float(), L.expand(len(signals), 6, 6))

    middle = gaussian(lambda signals: torch.full((len(signals), 6), 0.5), train)
    alpha = min(np.logspace(-4, 4, 33).tolist(), key=error)
    return {"ridge regression": gaussian(linear(alpha), validation),
            "prior mean": middle}, alpha


@contextlib.contextmanager
def panels(name, n):
    """A figure of n axes, in rows and columns."""
    columns = math.ceil(n**0.5)
    rows = math.ceil(n / columns)
    size = (3.2 * columns + 1, 2.9 * rows + 0.9)
    with figure(name, rows, columns, size, squeeze=False) as axes:
        for ax in axes.flat[n:]:
            ax.remove()
        yield axes.flat[:n]


def score(mean, L, y, args):
    """Gaussians (N, 6), (N, 6, 6) against the truth y (N, 6), in units of the prior's width ->
    arrays: loss, error |mean - truth| and sigma (N,), the last two by parameter; coverage (levels,
    6), of all six at once (levels,); draws (N, samples, 6) clamped to the prior."""
    draws = sample_gaussian(mean, L, args.samples, torch.Generator().manual_seed(args.seed))
    errors = (mean - y).abs()
    found = {"loss": gaussian_nll(mean, L, y), "error": errors.mean(1),
             "coverage": coverage(mean, L, y, LEVELS),
             "joint_coverage": joint_coverage(mean, L, y, LEVELS),
             "draws": draws.clamp(0, 1).transpose(0, 1)}
    for p, error, sigma in zip(PARAMETERS, errors.T, standard_deviation(L).T):
        found |= {f"error_{p}": error, f"sigma_{p}": sigma}
    return {k: np.asarray(v, float) for k, v in found.items()}


def regress(args):
    """Loss, errors and calibration of any number of L3M regression runs on held-out lightcones,
    beside the prior mean and ridge regression, with figures: validation loss by epoch (a band where
    runs differ by the seed only) and by depth (where --blocks differs), prediction against truth,
    calibration. With --lightcone: what a run says of your own lightcones."""
    if args.lightcone:
        return posteriors(args)
    groups, first, data, names = open_runs(args, "regress", ("tokens", "norm"))
    device = start_processes(args.device)[2]
    train, validation, test = (
        GlobalSignals(data, split, tokens=first["tokens"], norm=first["norm"], names=names)
        for split in ("train", "validation", args.split))

    def score_run(run, settings):
        gaussians = predict(run, settings, test.signals, device, args.batch_size)
        return score(*gaussians, test.parameters, args)

    methods = judge(groups, score_run)
    gaussians, alpha = baselines(train, validation)
    for i, (name, gaussian) in enumerate(gaussians.items()):
        loss = gaussian_nll(*gaussian(validation.signals), validation.parameters).mean().item()
        found = score(*gaussian(test.signals), test.parameters, args)
        methods.append(baseline(name, i, found | {"validation_loss": [loss]}))
    for m in methods[1:]:
        m["loss_difference"] = m["loss"] - methods[0]["loss"]
    errors = [f"error_{p}" for p in PARAMETERS]
    measures = ["validation_loss", "loss", "loss_difference", "error"]
    every = [*measures, *errors, *(f"sigma_{p}" for p in PARAMETERS)]
    rows = []
    for m in methods:
        kept = {k: m["settings"].get(k) for k in ("init", "base", "blocks", "prompt")}
        rows.append(row_of(m, len(test), every, **kept, joint_coverage=m["joint_coverage"],
                           coverage=dict(zip(PARAMETERS, m["coverage"].T))))
    out = report_path(args)
    vars(args).update({"data": data, "levels": LEVELS, "ridge alpha": alpha})
    show(rows, measures,
         f"{args.split} lightcones of {data}, losses in nats a parameter (difference: from the "
         "first row's, lightcone by lightcone), error over the prior's width", 4, SEEDS)
    show(rows, errors, "error |predicted mean - truth| over the prior's width", keys=())
    write_report(f"{out}.json", args, rows)
    worst = max(max(m["validation_loss"]) for m in methods)   # as a rule the prior mean's
    draw_training(methods, "epoch", {"validation_loss": "validation loss [nats a parameter]"},
                  f"{out}-loss", ylim=(None, worst + 0.05))
    draw_parameters(methods, test.parameters.numpy(), f"{out}-parameters")
    draw_calibration(methods[:-1], len(test), f"{out}-calibration")
    if len({m["settings"]["blocks"] for m in methods if m["runs"]}) > 1:
        draw_depth(methods, f"{out}-depth")


def in_bins(draws, y, bins=10):
    """Samples (N, samples) of a parameter in bins of the truth y (N,), in [0, 1] -> (4, bins that
    hold some): centre, mean and standard deviation of the samples, mean |sample - truth|."""
    bin_of = np.minimum((y * bins).astype(int), bins - 1)
    found = []
    for b in np.unique(bin_of):
        inside = draws[bin_of == b]
        error = np.abs(inside - y[bin_of == b, None])
        found.append([(b + 0.5) / bins, inside.mean(), inside.std(), error.mean()])
    return np.array(found).T


def draw_parameters(methods, y, name):
    """For each parameter, above: the samples (mean and standard deviation) in ten bins of the
    truth; below: mean |sample - truth| over the prior's width."""
    with figure(name, 4, 3, (10, 9.5), height_ratios=[3, 1.3, 3, 1.3]) as axes:
        for j in range(6):
            above, below = axes[j // 3 * 2:, j % 3][:2]
            above.axline((PRIORS[j, 0], PRIORS[j, 0]), slope=1, color="0.7", lw=1)
            for i, m in enumerate(methods):
                x, mean, std, error = in_bins(m["draws"][..., j], y[:, j])
                look = m["look"] | {"marker": MARKERS[i % 6], "ms": 3.5, "lw": 1}
                below.plot(to_physical(x, j), error, **look, label=m["name"])
                if m["runs"]:
                    shift = 0.06 * (i / len(methods) - 0.5)
                    above.errorbar(to_physical(x + shift, j), to_physical(mean, j),
                                   std * np.ptp(PRIORS[j]), **look | {"ls": "none"})
            above.set(xlim=PRIORS[j], ylim=PRIORS[j], ylabel=f"predicted {axis_label(j)}")
            above.tick_params(labelbottom=False)
            above.grid(alpha=0.3)
            below.set(xlim=PRIORS[j], ylim=(0, None), xlabel=f"true {axis_label(j)}",
                      ylabel="$\\leftarrow$ better\nerror / width")
            below.grid(alpha=0.3)
        legend(below, "above: samples in bins of the truth, mean and standard deviation; below: "
               "mean |sample - truth| / width of the prior")


def draw_calibration(methods, n, name):
    """Coverage: how often the truth lies in the central interval of each level (black: in the
    ellipsoid of all six), a panel for each method; in the grey band 95% of calibrated ones would
    be. Sharpness, last: the predicted standard deviation, the median over lightcones."""
    band = 1.96 * np.sqrt(LEVELS * (1 - LEVELS) / n)
    with panels(name, len(methods) + 1) as axes:
        *others, last = axes
        for i, (ax, m) in enumerate(zip(others, methods)):
            if n >= 10:
                ax.fill_between(LEVELS, LEVELS - band, LEVELS + band, color="0.85",
                                label=f"95% of calibrated, {n} lightcones")
            ax.axline((0, 0), (1, 1), color="0.5", lw=1)
            for j in range(6):
                ax.plot(LEVELS, m["coverage"][:, j], **style_of(j), label=SYMBOLS[j])
            ax.plot(LEVELS, m["joint_coverage"], "k--", label="all six")
            ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", title=m["name"],
                   xlabel="nominal level", ylabel="truth inside, fraction")
            last.plot([np.median(m[f"sigma_{p}"]) for p in PARAMETERS], MARKERS[i % 6],
                      color=m["look"]["color"], label=m["name"])
        legend(axes[0])
        last.axhline(12 ** -0.5, color="0.6", ls=":", label="prior")
        last.set_xticks(range(6), SYMBOLS, rotation=45)
        last.set(ylim=(0, None), title="median predicted std / prior width",
                 ylabel="$\\leftarrow$ sharper")
        last.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))


def draw_depth(methods, name):
    """Best validation loss against the number of blocks, mean and one standard deviation over
    seeds: a line for each backbone and prompt, level lines for the references."""
    lines = {}
    with figure(name) as ax:
        for m in methods:
            s = m["settings"]
            mean = np.mean(m["validation_loss"])
            if s.get("init") in ("pretrained", "random"):
                depth = s["blocks"] or load_config(s["base"]).num_hidden_layers
                line = lines.setdefault(f"{s['init']}, {s['prompt']}", [])
                line.append((depth, mean, np.std(m["validation_loss"])))
            elif m["runs"]:
                ax.axhline(mean, **m["look"], label=m["name"])
        for i, (label, points) in enumerate(lines.items()):
            ax.errorbar(*zip(*sorted(points)), color=COLOURS[i % 7], marker=MARKERS[i % 6],
                        capsize=3, label=label)
        ax.set(xlabel="blocks of the backbone",
               ylabel="$\\leftarrow$ better    best validation loss [nats a parameter]")
        ax.locator_params(axis="x", integer=True)
        ax.grid(alpha=0.3)
        legend(ax, "bars: standard deviation over seeds, where there are several")


# --------------------------------------------------------- regress --lightcone: your own lightcone


def read_own(path, settings, data):
    """A user's lightcone as a run would have seen it -> signal (1, tokens) float32, Lightcone,
    redshifts (tokens,), notes: a sentence each on what could make the answer wrong.

    The sky's mean over equal steps of the comoving depth of the run's own lightcones, from the
    low-z end on, whatever the cells. ValueError if it cannot be read, or is not so deep."""
    lightcone = read_lightcone(path, bins=None)
    T = len(lightcone.redshifts)
    notes = [note for note in lightcone.notes if "filter" not in note]       # which we do not
    names = settings["lightcones"]
    depth = BINS * CELL
    if Path(data).is_dir():
        store = read_store(data)
        depth = store.T * store.cell_los
        cube = lightcone.cube[-store.T:].astype("<f2")        # as `convert` would have kept it
        name = lightcone_name(lightcone.seed, lightcone.parameters, cube.shape[:2], content=cube)
        if name in names["train"] + names["validation"]:
            notes.append("the run was trained on this very lightcone, or chosen by it")
        own = setting_of(lightcone)._replace(bins=store.T, sky=store.sky, cell_sky=store.cell_sky,
                                             cell_los=store.cell_los)     # its cells may be others
        if why := difference(own, store.setting):
            notes.append(f"{why}: the run was trained on others")
    else:
        notes.append(f"{data} is not there or no store: {depth:.0f} Mpc from z = 5 on are assumed, "
                     "as the paper's lightcones have them")
    deep = depth / lightcone.cell_los                         # in bins
    if deep > T + 0.5:
        raise ValueError(f"{path}: {T} line-of-sight bins of {lightcone.cell_los:.2f} Mpc; the run "
                         f"needs {depth:.0f} Mpc from low z on, as its own lightcones have: make a "
                         "longer one")
    mean = lightcone.cube.mean((1, 2), dtype=np.float64)      # (T, X, Y) -> (T,) mK
    edges = np.linspace(max(T - deep, 0), T, settings["tokens"] + 1)
    sums = np.interp(edges, np.arange(T + 1), np.cumsum([0, *mean]))
    redshifts = np.interp((edges[1:] + edges[:-1] - 1) / 2, np.arange(T), lightcone.redshifts)
    centre, width = settings["norm"]
    signal = torch.from_numpy((np.diff(sums) / np.diff(edges) - centre) / width).float()[None]
    if Path(data).exists():
        train = GlobalSignals(data, "train", tokens=settings["tokens"], norm=settings["norm"],
                              names=names)
        low, high = train.signals.aminmax(dim=0)
        outside = int(((signal < low) | (signal > high)).sum())
        if outside:
            notes.append(f"{outside} of its {signal.numel()} values are outside the range of the "
                         "training signals: the posterior is an extrapolation")
    return signal, lightcone, redshifts, notes


def sample_in_prior(mean, L, n, generator):
    """Draws (n, 6) of the Gaussian mean (1, 6), L (1, 6, 6) where it lies in the prior, the unit
    cube. ValueError where nearly none of it does."""
    kept = torch.empty(0, 6)
    for _ in range(200):
        draws = sample_gaussian(mean, L, 100_000, generator)[:, 0]
        kept = torch.cat((kept, draws[((draws >= 0) & (draws <= 1)).all(1)]))
        if len(kept) >= n:
            return kept[:n]
    raise ValueError("the predicted Gaussian lies outside the prior: train the run for longer")


def posteriors(args):
    """Predict the six parameters of a user's own lightcones with one run: of each a table, JSON and
    corner plot of the Gaussian cut at the prior."""
    if len(args.runs) > 1:
        raise ValueError("--lightcone takes one run: name the run whose posterior you want")
    run = Path(args.runs[0])
    settings = read_settings(run, "regress")
    device = start_processes(args.device)[2]
    files = {Path(file).stem: file for file in args.lightcone}
    if len(files) < len(args.lightcone):
        raise ValueError("two of the lightcone files have the same name: their figures would "
                         "overwrite each other, rename one")
    for stem, file in files.items():
        signal, lightcone, z, notes = read_own(file, settings, args.data or settings["data"])
        for note in notes:
            note_once(f"{file}: {note}")
        mean, L = predict(run, settings, signal, device, 1)
        draws = sample_in_prior(mean, L, 20_000, torch.Generator().manual_seed(args.seed))
        draws = to_physical(draws.double().numpy())           # (20000, 6)
        row = posterior_row(stem, draws, lightcone.parameters)
        width = torch.from_numpy(np.ptp(PRIORS, axis=1))
        L = L[0].double() / width[:, None]                    # in physical units
        gaussian = {"mean": to_physical(mean[0].double().numpy()),
                    "covariance": torch.cholesky_inverse(L)}
        what = f"{stem}, by {run.resolve().name}"
        print_table(f"posterior of {what}: the Gaussian cut at the prior",
                    ["", "unit", "median", "std", "68% interval", "truth"], row.pop("table"))
        out = f"{args.out or run / 'posterior'}-{stem}"
        write_report(f"{out}.json", args, [row | {"notes": notes, "gaussian": gaussian}])
        signal = signal[0].numpy() * settings["norm"][1] + settings["norm"][0]
        draw_corner(draws, row, z, signal, what, out)


def posterior_row(name, draws, truth):
    """The row of a posterior, from draws (n, 6) in physical units; low and high enclose its central
    68%. "table" is what a terminal shows."""
    row = {"name": name, "n": 1, "interval": 0.68, "measures": {}, "truth": {}, "table": []}
    for values, p, unit, d, true in zip(draws.T, PARAMETERS, UNITS, DIGITS, truth):
        low, high = np.quantile(values, [0.16, 0.84])
        s = summary(values, bootstrap=False) | {"low": low, "high": high}
        row["measures"][p] = s
        row["truth"][p] = true if np.isfinite(true) else None
        numbers = (s["median"], s["std"], low, high, true)    # an unknown truth: nan
        median, std, low, high, true = (f"{v:.{d}f}" for v in numbers)
        row["table"].append([p, unit, median, std, f"{low} - {high}", true])
    return row


def draw_corner(draws, row, z, signal, title, name):
    """Draws (n, 6) of a posterior in physical units: densities with medians and 68% intervals, 68%
    and 95% contours, the truth where it is known. Above, the signal (tokens,) in mK at z."""
    truth = list(row["truth"].values())
    shown = np.vstack((draws, np.array(truth, float)))        # None becomes NaN
    known = np.isfinite(shown[-1]).any()
    with figure(name, 0, size=(11, 11)) as fig:
        import corner                                         # after `figure` has chosen a backend
        fig.set_layout_engine(None)                           # corner has its own
        corner.corner(draws, bins=40, smooth=1, color=COLOURS[1], truth_color=COLOURS[2], fig=fig,
                      labels=[axis_label(j) for j in range(6)], label_kwargs={"fontsize": 8},
                      truths=truth, quantiles=(0.16, 0.84), levels=(0.68, 0.95),
                      plot_datapoints=False, plot_density=False, fill_contours=True,
                      max_n_ticks=3, labelpad=0.05,
                      range=[*zip(np.nanmin(shown, 0), np.nanmax(shown, 0))])
        for j, (s, d) in enumerate(zip(row["measures"].values(), DIGITS)):
            below = s["median"] - s["low"]
            above = s["high"] - s["median"]
            found = f"${s['median']:.{d}f}_{{-{below:.{d}f}}}^{{+{above:.{d}f}}}$"
            fig.axes[7 * j].set_title(f"{SYMBOLS[j]} = {found}", fontsize=9)
        ax = fig.add_axes([0.62, 0.75, 0.35, 0.19])
        ax.plot(z, signal, "ko-", ms=3, lw=1)
        ax.set(xlabel="redshift $z$", ylabel=r"sky mean $\bar T_b$ [mK]", title=title)
        fig.text(0.62, 0.66, "the Gaussian cut at the prior; contours 68% and 95%;\ndashed: "
                 "central 68%" + ("; orange: the truth" if known else ""))


# ------------------------------------ next-patch and generate: slices by conditional flow matching


def open_slices(args):
    """What both begin with: groups of runs by seed {name: {run: settings}}, settings of the first,
    SubLightcones of --split, device."""
    groups, first, data, names = open_runs(args, "generate", ("T", "sky"))
    test = SubLightcones(data, args.split, names=names)
    if (test.T, test.sky) != (first["T"], first["sky"]):
        raise ValueError(f"{data} holds {test.T} slices of {test.sky} x {test.sky}, the runs were "
                         f"trained on {first['T']} of {first['sky']} x {first['sky']}")
    return groups, first, test, start_processes(args.device)[2]


def draw_seed(seed, name, start):
    """Of the noise for one place in one lightcone: all models get the same, whatever else is
    evaluated."""
    place = [seed, zlib.crc32(name.encode()), start]
    return int(np.random.SeedSequence(place).generate_state(1)[0])


def batches_of(windows, size):
    """Windows (name, start, length) in lists of at most `size`, each of one length."""
    for length in sorted({length for _, _, length in windows}):
        same = [window for window in windows if window[2] == length]
        for i in range(0, len(same), size):
            yield same[i:i + size]


def structure(slices, p):
    """What patches hold beside their means: (..., X, Y) -> (..., R, K, p*p) float64."""
    patches = patch(slices.double(), p)
    return patches - patches.mean(-1, keepdim=True)


def choose(items, n, seed):
    """n of a list, drawn with a seed, in its order; n = 0: all."""
    chosen = np.random.default_rng(seed).permutation(len(items))[:n or None]
    return [items[i] for i in np.sort(chosen)]


def correlation(a, b, dim=(0, 1, 2)):
    """Of two fields of mean zero, over some of three dimensions; NaN where one of them does not
    fluctuate."""
    return (a * b).sum(dim) / (a.square().sum(dim) * b.square().sum(dim)).sqrt()


FOLLOWED = ["error", "error_mean", "error_structure", "structure_vs_truth",
            "structure_vs_previous", "conditional_mean_vs_truth"]


@torch.no_grad()
def follow(predict, windows, test, p, args, device, bar):
    """Slices 3.. of windows (name, start, length), predicted from the truth before them, against
    the truth -> arrays by lightcone (n,) of FOLLOWED, error by cell of the sky "map" (X, Y),
    "by_patch" (R, K) and "by_slice" (10,), normalised units.

    predict(slices (B, S, X, Y), conditions (B, 7), noise (B, S - 2, X, Y)) -> slices 3.. as drawn,
    and their conditional mean (zero where there is none), (B, S - 2, X, Y) each."""
    names = sorted({name for name, _, _ in windows})
    n = len(names)
    scored = torch.zeros(n, 1, 1)                             # slices of each lightcone
    maps = torch.zeros(n, test.sky, test.sky).double()        # sums over them of squared errors,
    products = torch.zeros(n, 4, 4).double()                  # and of products of structures
    by_slice = torch.zeros(2, max(length for _, _, length in windows) - GIVEN)    # sum, number
    for part in batches_of(windows, args.batch_size):
        slices, conditions = map(torch.stack, zip(*(test.read(*window) for window in part)))
        truth = slices[:, GIVEN:]
        S = truth.shape[1]
        noise = torch.empty_like(truth)
        for e, (name, start, _) in zip(noise, part):
            e.normal_(generator=torch.Generator().manual_seed(draw_seed(args.seed, name, start)))
        inputs = slices, conditions, noise
        drawn, expected = (x.cpu() for x in predict(*(x.to(device) for x in inputs)))
        squares = (drawn - truth).double().square()           # (B, S, X, Y)
        fields = drawn, truth, slices[:, GIVEN - 1:-1], expected
        inner = torch.stack([structure(field, p).flatten(1) for field in fields], dim=1)
        at = torch.tensor([names.index(name) for name, _, _ in part])
        scored.index_add_(0, at, torch.full((len(part), 1, 1), float(S)))
        maps.index_add_(0, at, squares.sum(1))
        products.index_add_(0, at, inner @ inner.mT)          # inner: (B, 4, cells)
        by_slice[0, :S] += squares.mean((2, 3)).sum(0)
        by_slice[1, :S] += len(part)
        bar.update(len(part))
    maps /= scored
    error = maps.mean((1, 2))
    products /= scored * test.sky**2
    of_structure = products[:, 0, 0] + products[:, 1, 1] - 2 * products[:, 0, 1]
    norm = products.diagonal(dim1=1, dim2=2).sqrt()           # (n, 4)
    r = products / norm[:, :, None] / norm[:, None]
    found = (error, error - of_structure, of_structure, r[:, 0, 1], r[:, 0, 2], r[:, 3, 1])
    by_cell = maps.mean(0)
    found = dict(zip(FOLLOWED, found)) | {"by_slice": by_slice[0] / by_slice[1], "map": by_cell,
                                          "by_patch": patch(by_cell, p).mean(-1)}
    return {k: v.numpy() for k, v in found.items()}


def drawn_by(generator, args):
    """The generator as a `predict` of `follow`: each patch drawn once, given the truth before it;
    its conditional mean is e + v at t = 0, where the velocity v of the noise e is E[x] - e."""
    def predict(slices, conditions, noise):
        p = generator.p
        net = generator.velocity
        cond = generator.patch_conditions(slices, conditions).flatten(0, 2)       # (N, 2, p, p)
        patches = patch(noise, p)                             # (B, S - 2, R, K, p*p)
        e = patches.reshape(-1, 1, p, p)
        x, _ = sample(net, cond, args.method, noise=e, steps=args.steps)
        first = net(e, e.new_zeros(len(e)), net.condition(cond))
        return unpatch(x.view_as(patches)), unpatch((e + first).view_as(patches))
    return predict


def simple_predictions(p):
    """What needs no network -> {name: a `predict` of `follow`}."""
    def copy(slices, conditions, noise):
        return slices[:, GIVEN - 1:-1], 0 * noise

    def independent(slices, conditions, noise):
        before = patch(slices[:, GIVEN - 1:-1], p)            # (B, S - 2, R, K, p*p)
        unrelated = structure(noise, p)
        unrelated *= before.std(-1, keepdim=True) / unrelated.std(-1, keepdim=True)
        return unpatch(before.mean(-1, keepdim=True) + unrelated), 0 * noise

    def only_noise(slices, conditions, noise):
        return noise, 0 * noise

    return {"copy of the previous slice": copy,
            "previous mean, independent structure": independent, "noise": only_noise}


def next_patch(args):
    """Validation loss of flow matching, and mean squared error of each patch, drawn once given the
    true patches before it, for any number of L3M generation runs, beside three baselines: the
    previous slice; its patch's mean with structure of its own; noise. The error is that of the
    patches' means plus that of the structure inside. Correlations are of structure: of what is
    drawn with the truth and with the slice before (the truth's own is the copy's with the truth),
    and of the conditional mean with the truth. Figures: error by position, loss by batch."""
    groups, first, test, device = open_slices(args)
    windows = choose(test.windows(), args.max_windows, args.seed)
    p = first["patch"]
    simple = simple_predictions(p)
    total = len(windows) * (len(args.runs) + len(simple))
    with tqdm(total=total, desc="next patches", unit="window", dynamic_ncols=True) as bar:
        def score_run(run, settings):
            generator = load_generator(run, device, settings=settings)
            return follow(drawn_by(generator, args), windows, test, generator.p, args, device, bar)

        methods = judge(groups, score_run)
        for i, (name, function) in enumerate(simple.items()):
            found = follow(function, windows, test, p, args, device, bar)
            methods.append(baseline(name, i, found))
    for m in methods[1:]:
        m["error_difference"] = m["error"] - methods[0]["error"]
    measures = ["validation_loss", "error", "error_difference"]
    rows = [row_of(m, len(m["error"]), [*measures, *FOLLOWED], by_slice=m["by_slice"],
                   by_patch=m["by_patch"]) for m in methods]
    out = report_path(args)
    vars(args).update(data=test.path, windows=len(windows))
    show(rows, measures,
         f"{len(windows)} windows of {args.split} lightcones of {test.path}, normalised units "
         "(difference: from the first row's, lightcone by lightcone)", keys=SEEDS)
    show(rows, FOLLOWED[1:], "error of patch means, of structure; correlations of structure",
         keys=())
    write_report(f"{out}.json", args, rows)
    draw_positions(methods, f"{out}-position")
    draw_training(methods, "step", {"loss": "training loss (running mean)",
                                    "validation_loss": "validation loss"},
                  f"{out}-loss", yscale="log")


def draw_positions(methods, name):
    """Next-patch error by position on the sky, a map for each method but noise, lines between
    patches; last, by slice of the window."""
    *shown, _ = methods                                       # noise has no structure
    high = max(np.quantile(m["map"], 0.99) for m in shown)
    low = max(min(m["map"].min() for m in shown), high / 1000)
    with panels(name, len(methods)) as axes:
        *others, last = axes
        for ax, m in zip(others, shown):
            sky = len(m["map"])
            image = ax.imshow(m["map"], norm="log", vmin=low, vmax=high, extent=(0, sky, sky, 0))
            edges = np.linspace(0, sky, len(m["by_patch"]) + 1)
            ax.set_xticks(edges, [])
            ax.set_yticks(edges, [])
            ax.grid(color="w", lw=0.4)
            ax.tick_params(length=0)
            ax.set_title(m["name"], fontsize=8)
        last.figure.colorbar(image, ax=axes, extend="both",
                             label="mean squared error (normalised units)")
        for m in methods:
            at = GIVEN + 1 + np.arange(len(m["by_slice"]))
            last.plot(at, m["by_slice"], **m["look"], marker=".", label=m["name"])
        last.set(xlabel="slice of the window", yscale="log",
                 ylabel="$\\leftarrow$ better    mean squared error")
        last.grid(alpha=0.3, which="both")
        legend(last)


def choose_starts(test, store, args):
    """Where to generate: --lightcones of the split at each --redshift -> [(redshift, lightcone's
    name, first given slice)].

    A lightcone whose signal ends before the last slice is left out of that redshift; a redshift
    without lightcones is left out with a note."""
    length = args.context + args.slices
    names = choose(test.names, args.lightcones, args.seed)
    starts = []
    for redshift in dict.fromkeys(args.redshifts):
        here = []
        for name in names:
            row = store.index[name]
            z = store.redshifts[row]
            first = int(np.abs(z - redshift).argmin())
            if z[-1] <= redshift <= z[0] and first + length <= store.signal_end[row]:
                here.append((redshift, name, first))
        if not here:
            note_once(f"z = {redshift:g} is left out: no lightcone has signal in {length} slices "
                      "from there on")
        starts += here
    if not starts:
        raise ValueError(f"{test.path}: no lightcone has signal in {length} slices from any of "
                         "these redshifts on: choose other --redshifts, or fewer --slices")
    return starts


def continue_lightcones(groups, slices, conditions, seeds, bins, device, args):
    """The methods that groups of runs are, as `judge` makes them, with their "draws" in mK: context
    (N, S, X, Y) normalised, conditions (N, 7) -> (N, samples, --slices, X, Y) float16."""
    shape = (len(slices), args.samples, args.slices, *slices.shape[2:])
    total = len(args.runs) * math.prod(shape[:3])
    with tqdm(total=total, desc="slices", unit="slice", dynamic_ncols=True) as bar:
        def draw(run, settings):
            generator = load_generator(run, device, settings=settings)
            draws = np.empty(shape, np.float16)
            for part in torch.arange(len(slices)).split(args.batch_size):
                going = generator.generate(slices[part].to(device), conditions[part].to(device),
                                           args.slices, bins, [seeds[i] for i in part],
                                           args.samples, slide=args.slide, method=args.method,
                                           steps=args.steps)
                for s, new in enumerate(going):
                    draws[part, :, s] = denormalise(new).clamp(-6e4, 6e4).cpu()   # float16's range
                    bar.update(len(part) * args.samples)
            return {"draws": draws}

        return judge(groups, draw)


def generate(args):
    """Continue held-out lightcones from a few true slices on, by any number of L3M generation runs.
    Tables and figures beside the truth: slices, sections along the line of sight, power spectra and
    distributions of T_b; whether the power is within a factor 2 of the truth; whether structure
    lives on (its correlation with that of the slice 1 and 5 before: lag1, lag5; with the truth),
    and whether patches join (edge_jump: rms step between neighbouring cells across their edges over
    that inside)."""
    groups, first, test, device = open_slices(args)
    store = read_store(test.path)
    starts = choose_starts(test, store, args)
    S = args.context
    length = S + args.slices
    redshifts, names, at = zip(*starts)
    rows = [store.index[name] for name in names]
    slices, conditions = map(torch.stack, zip(*(test.read(*start[1:], length) for start in starts)))
    seeds = [draw_seed(args.seed, *start[1:]) for start in starts]
    truth = denormalise(slices).numpy().astype(np.float16)    # (N, S + n, X, Y) mK
    z = np.array([store.redshifts[row, t:t + length] for row, t in zip(rows, at)])
    methods = continue_lightcones(groups, slices[:, :S], conditions, seeds, test.T, device, args)
    out = report_path(args)
    with writing(f"{out}.npz") as temporary, open(temporary, "wb") as file:
        np.savez(file, name=names, start=at, truth=truth, redshifts=z,
                 parameters=store.parameters[rows],
                 **{f"generated {m['name']}": m["draws"] for m in methods})
    print(f"written: {out}.npz")
    last = truth[:, None, S - 1:S].repeat(args.slices, 2)
    methods = [baseline("truth", 0, {"draws": truth[:, None, S:], "look": {"color": "k"}}),
               *methods, baseline("last given slice", 0, {"draws": last})]
    panels = []
    for redshift in dict.fromkeys(redshifts):
        here = np.flatnonzero(np.equal(redshifts, redshift))
        panels.append(compare_slices(redshift, methods, truth, here, store.cell_sky,
                                     first["patch"]))
        show_panel(panels[-1])
    args.data = test.path
    write_report(f"{out}.json", args, [row for panel in panels for row in panel["rows"]])
    draw_statistics(panels, methods, f"{out}-statistics")
    drawn = [name for name, _ in Counter(names).most_common(args.figures)]     # at most redshifts
    for i, name in enumerate(names):
        if name in drawn:
            draw_slices(methods, truth[i], z[i], i, store.cell_sky, store.parameters[rows[i]],
                        first["patch"], f"{out}-slices-{drawn.index(name) + 1}-z{redshifts[i]:g}")


EVOLUTION = ["lag1", "lag5", "edge_jump", "structure_variance", "structure_vs_truth", "mean", "std"]


def evolution(given, new, truth, p):
    """How structure in patches evolves: given (S, X, Y), new (samples, n, X, Y), true (n, X, Y)
    slices, normalised -> lag1, lag5, edge_jump, structure_variance, structure_vs_truth, and that
    slice by slice, "followed" (n,). NaN where nothing fluctuates or there are too few slices."""
    S = len(given)
    every = torch.cat((given.expand(len(new), *given.shape), new), dim=1)
    every = structure(every, p).flatten(2)                    # (samples, S + n, cells)
    fresh = every[:, S:]
    true = structure(truth, p).flatten(1).expand_as(fresh)
    steps = torch.cat((new.diff(dim=-1), new.mT.diff(dim=-1))).square().mean((0, 1, 2))
    across = torch.arange(1, new.shape[-1]) % p == 0          # steps: (X - 1,)
    found = {"edge_jump": (steps[across].mean() / steps[~across].mean()).sqrt(),
             "structure_variance": fresh.square().mean(),
             "structure_vs_truth": correlation(fresh, true),
             "followed": correlation(fresh, true, (0, 2))}
    for lag in (1, 5):
        found[f"lag{lag}"] = correlation(every[:, max(S, lag):], every[:, max(S - lag, 0):-lag])
    return {k: v.numpy() for k, v in found.items()}


@np.errstate(divide="ignore", invalid="ignore")
def compare_slices(redshift, methods, truth, here, cell, p):
    """Statistics of all methods at one redshift -> k (K,) in 1/Mpc, edges of bins of T_b, found: of
    each method, by lightcone (m, ..), power (K) in mK^2, that of the normalised field, density of
    T_b, mean and std of T_b in mK, and what `evolution` finds; rows of the report.

    truth (N, S + n, X, Y): given and true slices of all starts; here: those at this redshift."""
    n = methods[0]["draws"].shape[2]
    low, high = np.quantile(truth[here, -n:].astype(np.float32), [0.001, 0.999])
    margin = 0.2 * (high - low) + 0.5
    edges = np.linspace(low - margin, high + margin, 61)
    panel = {"redshift": redshift, "edges": edges, "found": [], "rows": []}
    for m in methods:
        found = []
        for i in here:
            T_b = torch.from_numpy(m["draws"][i]).float()     # (samples, n, X, Y)
            x = normalise(T_b)
            seen = normalise(torch.from_numpy(truth[i]).float())
            k, power = power_spectrum(T_b.flatten(0, 1).numpy(), cell)
            _, normalised = power_spectrum(x.flatten(0, 1).numpy(), cell)
            density = np.histogram(T_b, edges)[0] / T_b.numel() / np.diff(edges)
            found.append({"power": power, "normalised": normalised, "density": density,
                          "mean": T_b.mean(), "std": T_b.std(),
                          **evolution(seen[:-n], x, seen[-n:], m["settings"].get("patch", p))})
        f = {key: np.array([one[key] for one in found]) for key in found[0]}
        panel["found"].append(f)
        true = panel["found"][0]                              # the truth is the first method
        values = {f"structure_vs_truth {s}": v for s, v in enumerate(f["followed"].T, 1)}
        for key in ("power", "normalised"):
            ratio = f[key] / true[key].mean(0)                # (m, K)
            f[f"{key} ratio"] = ratio
            values |= {f"{key} {at:.2g}": v for at, v in zip(k, ratio.T)}
        within = np.abs(np.log2(f["power ratio"].mean(0))) <= 1
        panel["rows"].append(row_of(m | f | values, len(here), [*EVOLUTION, *values], z=redshift,
                                    k=k, power=f["power"].mean(0), within=within.sum()))
    return panel | {"k": k}


def show_panel(panel):
    """The tables of one redshift."""
    show(panel["rows"], EVOLUTION,
         f"from z = {panel['redshift']:g} on, structure in patches (normalised), T_b [mK]")
    for key, of in (("power", "T_b"), ("normalised", "the normalised field")):
        measures = [f"{key} {k:.2g}" for k in panel["k"]]
        show(panel["rows"], measures, f"power of {of} over the truth's by k [1/Mpc] (within: bins "
             "of k where that of T_b is within a factor 2)", 2, ("within",))


def draw_statistics(panels, methods, name):
    """A column for each redshift: power spectra, their ratio to the truth (grey: a factor 2), the
    distribution of T_b, correlation of structure with the truth by slice. Lines are means over
    lightcones, bands hold the central 68% of them, from ten on."""
    labels = (r"$k_\perp^2 P(k_\perp) / 2\pi$ [mK$^2$]", "power / true power", "density [1/mK]",
              "correlation of structure\nwith the truth")
    with figure(name, 4, len(panels), (3 * len(panels) + 1, 10), height_ratios=[3, 2, 3, 2],
                squeeze=False, sharey="row") as axes:
        for panel, column in zip(panels, axes.T):
            k = panel["k"]
            middles = (panel["edges"][1:] + panel["edges"][:-1]) / 2
            true = panel["found"][0]
            n, slices = true["followed"].shape
            x = {"power": k, "power ratio": k, "density": middles,
                 "followed": np.arange(1, slices + 1)}
            for ax, key in zip(column, x):
                for m, f in zip(methods, panel["found"]):
                    ax.plot(x[key], np.nanmean(f[key], 0), **m["look"], label=m["name"])
                    if n >= 10:
                        ax.fill_between(x[key], *np.nanquantile(f[key], [0.16, 0.84], axis=0),
                                        color=m["look"]["color"], alpha=0.15, lw=0)
                ax.grid(alpha=0.3)
            for ax in column[:2]:
                ax.set(xscale="log", yscale="log", xlabel=r"$k_\perp$ [Mpc$^{-1}$]")
                ax.set_xticks([k[0], k[-1]], [f"{k[0]:.2g}", f"{k[-1]:.2g}"])
                ax.xaxis.set_minor_formatter("")
            top = max(f["density"].mean(0).max() for f in panel["found"])
            column[0].set_title(f"from z = {panel['redshift']:g} (lightcones: {n})")
            column[1].axhspan(0.5, 2, color="0.9")
            column[2].set(yscale="log", ylim=(top * 1e-4, top * 2), xlabel="$T_b$ [mK]")
            column[3].set(xlabel="generated slice", ylim=(-0.3, 1.05))
        for ax, label in zip(axes[:, 0], labels):
            ax.set_ylabel(label)
        legend(axes[0, 0], "lines: means over lightcones; bands, from ten on: central 68% of them")


def tell_apart(values):
    """Numbers as strings, with as many decimals as tell them apart, four at most."""
    for digits in range(1, 5):
        texts = [f"{v:.{digits}f}" for v in values]
        if len(set(texts)) == len(texts):
            break
    return texts


def draw_slices(methods, truth, z, i, cell, parameters, p, name):
    """One lightcone from one start i: the last given slice, the first, the middle and the last
    generated one, and a section along the line of sight (given slices left of the green line);
    above the true ones, below up to two samples of each group, each with lag1 of `evolution`. truth
    (S + n, X, Y) mK, z (S + n,), cell in Mpc, patches of p x p.

    T_b in the colours of the field over the range of the true slices."""
    shown = [(m, cube) for m in methods[:-1] for cube in m["draws"][i, :2]]
    n = len(shown[0][1])
    S = len(truth) - n
    at = [S - 1, *sorted({S, S + n // 2, S + n - 1})]
    look = eor_colours(truth)
    with figure(name, len(shown), len(at) + 1, (9, 1.4 + 1.4 * len(shown)), squeeze=False,
                width_ratios=[1] * len(at) + [2], subplot_kw={"xticks": [], "yticks": []}) as axes:
        for row, (m, cube) in zip(axes, shown):
            cube = np.concatenate((truth[:S], cube)).astype(np.float32)           # (S + n, X, Y)
            x = normalise(torch.from_numpy(cube))
            lag1 = evolution(x[:S], x[None, S:], x[S:], m["settings"].get("patch", p))["lag1"]
            for ax, s in zip(row, at):
                drawn = ax.imshow(cube[s], **look)
                ax.set_box_aspect(1)
            row[-1].imshow(cube[:, 0].T, **look)
            row[-1].axvline(S - 0.5, color=COLOURS[3], lw=2)
            row[0].set_ylabel(f"{m['name']}\nlag1 {lag1:.2f}", fontsize=8)
        for ax, s, redshift in zip(axes[0], at, tell_apart(z[at])):
            which = f"slice {s - S + 1}" if s >= S else "given"
            ax.set_title(f"{which}\nz = {redshift}", fontsize=8)
        axes[0, -1].set_title("section; left of the line: given", fontsize=8)
        row[0].set_xlabel(f"$\\leftarrow$ {truth.shape[2] * cell:.0f} Mpc $\\rightarrow$")
        ends = [0, S, S + n - 1]
        row[-1].set_xticks(ends, tell_apart(z[ends]))
        row[-1].set_xlabel("redshift (time runs to the right)")
        row[0].figure.suptitle(in_words(parameters), fontsize=8)
        colour_bar(drawn, axes)


# -------------------------------------------------------------------------------------------------
# Command line


def identifier(text):
    """An argparse type: what stands on one line of a model card, such as ORG/NAME or apache-2.0."""
    if not re.fullmatch(r"[\w./+-]+", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is no identifier: letters, digits, - . / _ +")
    return text


# Each flag once, with its range; a command may change a default or a help.
FLAGS = {}
POSITIONS = ("run", "runs", "inputs", "file")                 # no flags
COUNT = bounded(int, 1)
COUNT_OR_ALL = bounded(int, 0)


def flag(name, help, **how):
    """A row of the table of flags: how is what argparse's add_argument takes."""
    FLAGS[name] = {"help": help, **how}


flag("run", "run directory of train_lm.py", metavar="RUN")
flag("runs", "directories of finished trainings; L3M's that differ by the seed only count as one",
     metavar="RUN", nargs="+")
flag("inputs", "the file that `complete` wrote; with --pairwise run directories",
     metavar="FILE_OR_RUN", nargs="*")
flag("file", "the file that `complete` wrote", metavar="FILE")
# models
flag("adapter", "adapters in peft's format: directories or hub ids",
     nargs="+", default=[], metavar="DIR_OR_ID")
flag("base", "model directory or hub id; default: each run's own")
flag("quantize", "nf4: base and adapter unmerged on the 4-bit base; none: merged in 16 bit",
     choices=["none", "nf4"], default="none")
flag("dtype", "auto: bfloat16 where it is fast",
     choices=["auto", "bfloat16", "float32"], default="auto")
flag("device", "auto: a GPU if there is one",
     choices=["auto", "cpu", "cuda", "mps"], default="auto")
flag("encoder", "directory or hub id of a BERT or MPNet sentence encoder",
     default="sentence-transformers/all-mpnet-base-v2")
# data
flag("data", "prepared directory, or a JSONL file with id and abstract; default: the first run's, "
     "or data/arxiv")
flag("subset", "set, category, recipe, or control (the five control papers); default: s1 "
     "(hep-th), or own for a run on own data")
flag("split", "of --subset", choices=["train", "validation", "test"], default="test")
flag("across", "these, one by one, in place of --subset", nargs="+", metavar="CATEGORY")
flag("samples", "so many abstracts, drawn with --seed; 0: all", type=COUNT_OR_ALL, default=0)
flag("seed", "of every random choice: which items, in which order, what is sampled",
     type=bounded(int, 0, 2 ** 32 - 1), default=42)
flag("batch_tokens", "tokens in one forward pass; changes memory and speed only",
     type=COUNT, default=4096)
flag("batch_size", "abstracts, signals, windows or lightcones at a time; changes memory and speed "
     "only", type=COUNT, default=16)
# sampling of text
flag("prompt", "finish this text instead, and print the result", metavar="TEXT")
flag("max_new_tokens", "longest completion", type=COUNT, default=1024)
flag("temperature", "0: always the likeliest token", type=bounded(float, 0), default=0.7)
flag("top_k", "sample among so many of the likeliest tokens", type=COUNT, default=50)
flag("no_bos", "prompts without the BOS token, as in the paper's released code",
     action="store_true")
# L3M
flag("lightcone", "lightcones as `data_lightcone.py convert` reads them (NaN: parameter unknown): "
     "print and draw the posterior; NAME-FILE.json and .png, default: posterior-FILE",
     nargs="+", metavar="FILE")
flag("method", "sampler: dopri5 adapts its steps (tolerance 1e-3), midpoint takes --steps",
     choices=["dopri5", "midpoint"], default="dopri5")
flag("steps", "of midpoint, two evaluations of the network each; fewer are quicker and less exact",
     type=COUNT, default=20)
flag("max_windows", "a quick look: so many windows of 12 slices, drawn with --seed; 0: all",
     type=COUNT_OR_ALL, default=0)
flag("context", "true slices to begin with; the paper's: 2 or 10",
     type=bounded(int, 2, 11), default=2)
flag("slices", "slices to generate; beyond 12 with the context, the window slides",
     type=COUNT, default=10)
flag("slide", "slices that the window drops when it is full; small ones remember more and are "
     "slower", type=bounded(int, 1, 10), default=6)
flag("lightcones", "so many lightcones of the split, drawn with --seed; 0: all",
     type=COUNT_OR_ALL, default=8)
flag("redshifts", "of the first given slice; each lightcone is continued from each",
     type=bounded(float, 0), nargs="+", default=[16, 12, 10, 8], metavar="Z")
flag("figures", "so many lightcones are drawn; 0: none", type=COUNT_OR_ALL, default=2)
# results
flag("pairwise", "instead: similarity of pairs of true abstracts in the LLM's own mean-pooled "
     "last layer", action="store_true")
flag("window", "words of a window; 2,000 tokens are about 1,400 words", type=COUNT, default=250)
flag("collect", "files that raters saved: means, intervals, agreement, by model",
     nargs="+", metavar="JSON")
flag("completions", "file of `complete`, beside which SemScore, signatures and rating lie",
     metavar="FILE")
flag("json", "where the report goes; default: into each run directory", metavar="FILE")
flag("out", "JSONL file; default: completions-SUBSET-SPLIT.jsonl beside the first run's directory",
     metavar="FILE")
flag("what", "the whole model in 16 bit, or the adapter alone",
     choices=["merged", "adapter"], default="merged")
flag("base_id", "hub id of the base, for the card, where the run's base is a directory",
     type=identifier, metavar="ORG/NAME")
flag("license", "identifier for the card; default: the base's holds", type=identifier)
flag("push", "also upload it to the hub", type=identifier, metavar="ORG/NAME")
flag("private", "a private repository on the hub", action="store_true")
MODELS = ["adapter", "base", "quantize", "dtype", "device"]
TEXTS = ["data", "subset", "split", "samples", "seed"]
SLICES = ["split", "data", "method", "steps", "seed", "batch_size", "device", "out"]


def add_command(commands, function, help, names, **changes):
    """A row of the table of commands: its flags by name; changes: {flag: what is other here}.

    Its --help begins with the function's docstring."""
    parser = commands.add_parser(function.__name__.replace("_", "-"), help=help,
                                 description=function.__doc__, formatter_class=Help)
    parser.set_defaults(function=function)
    for name in names:
        position = name in POSITIONS
        flag = name if position else "--" + name.replace("_", "-")
        parser.add_argument(flag, **FLAGS[name] | changes.get(name, {}))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    text_runs = {"nargs": "*", "help": "run directories of train_lm.py; they know base and data"}
    add_command(commands, perplexity, "base model and runs on a split or a JSONL file",
                ["runs", *MODELS, *TEXTS, "across", "batch_tokens", "json"], runs=text_runs)
    add_command(commands, complete, "let base and runs finish abstracts, or a text of your own",
                ["runs", *MODELS, *TEXTS, "prompt", "max_new_tokens", "temperature", "top_k",
                 "no_bos", "batch_size", "out"], runs=text_runs, samples={"default": 100})
    add_command(commands, semscore, "similarity of completions to the true abstracts",
                ["inputs", "encoder", "pairwise", *MODELS, *TEXTS, "across", "json"],
                samples={"default": 100},
                json={"help": "where the report goes; default: beside FILE, or into the first RUN"})
    add_command(commands, signatures, "repetition, invented metadata and length of completions",
                ["file", "window"])
    add_command(commands, rate, "a page for blind rating by experts; collect their files",
                ["file", "samples", "seed", "out", "collect"], samples={"default": 12},
                out={"metavar": "HTML", "help": "the page; default: FILE with .rate.html"})
    add_command(commands, compare, "one table and figures over any number of runs",
                ["runs", "completions", "out"],
                out={"metavar": "NAME", "help": "NAME.json, NAME.png, NAME-loss.png; default: "
                     "compare, beside the first run's directory"})
    add_command(commands, export, "merge a run into a checkpoint with a model card; upload it",
                ["run", "out", "what", "base", "base_id", "completions", "license", "push",
                 "private"],
                out={"metavar": "DIR", "required": True, "help": "a new directory to write"},
                base={"help": "16-bit model to merge into; default: the run's base"})
    of_l3m = {
        "split": {"choices": ["validation", "test"],
                  "help": "lightcones to judge on; validation also chose each run's best step"},
        "data": {"help": "store of data_lightcone.py, or for regress .npz of signals; default: the "
                 "runs' own"},
        "out": {"metavar": "NAME", "help": "NAME.json, NAME-....png; default: COMMAND-SPLIT in the "
                "run's directory, or beside the first's for several"}}
    add_command(commands, regress, "six parameters from the global 21cm signal: errors, "
                "calibration; your own lightcone",
                ["runs", "lightcone", "split", "data", "samples", "seed", "batch_size", "device",
                 "out"], **of_l3m, batch_size={"default": 64},
                samples={"type": COUNT, "default": 50, "help": "draws from the Gaussian of each "
                         "lightcone, for the figure of prediction against truth"})
    add_command(commands, next_patch, "lightcone slices: the next patch given the truth before it",
                ["runs", *SLICES, "max_windows"], **of_l3m, batch_size={"default": 8})
    add_command(commands, generate, "lightcone slices generated on their own, beside the truth",
                ["runs", *SLICES, "context", "slices", "slide", "samples", "lightcones",
                 "redshifts", "figures"], **of_l3m,
                samples={"type": COUNT, "default": 1, "help": "continuations of each lightcone"})
    args = parser.parse_args(argv)
    function = args.function
    del args.function                                         # a report keeps the rest
    with one_line("lower --batch-tokens or --batch-size"):
        function(args)


if __name__ == "__main__":
    main()
