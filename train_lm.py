"""Fine-tune a Llama on arXiv abstracts: LoRA on a 4-bit base, the recipe of FeynTune.

    python train_lm.py --demo                                  # the whole path, nothing to download
    python train_lm.py --subset s1 --base path/to/model        # one process: a GPU, or a laptop
    torchrun --nproc_per_node=3 train_lm.py --subset s3        # the paper's: Llama-3.1-8B, 3 GPUs
    torchrun --nproc_per_node=3 train_lm.py --subset s3 --resume        # go on where it stopped
    python train_lm.py --dry-run --base llama-3.1-8b           # sizes, without weights or data

- FeynTune: arXiv:2508.03716; LoRA: arXiv:2106.09685; a base in 4 bits: arXiv:2305.14314
- a step is --batch-size abstracts over all processes, laid end to end without padding; its loss is
  the mean over all their tokens
- every batch and every random draw is a function of (seed, step, rank): a resumed run is the
  undisturbed run, bit for bit on a CPU
- the validation loss ten times a run, on the run's own set and on hep-th (s1)
- out/SUBSET-LORA/ gets config.json, rows.npz (what it was trained on), metrics.jsonl, checkpoints,
  adapter/ (the last step's) and adapter-best/ (the lowest validation loss's), in peft's format

Settings and the training loop come first, then the machinery that train_l3m.py shares.
"""
import argparse
import json
import math
import os
import re
import reprlib
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
import zlib
from datetime import timedelta
from pathlib import Path

import numpy as np

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")           # before torch: threads that spin long
os.environ.setdefault("GOMP_SPINCOUNT", "4000")               # make a busy CPU ten times slower,
import torch                                                  # never a quiet one by a quarter
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import data_arxiv
from data_arxiv import bounded, lock, one_line, reading, writing
from lora import TARGETS, inject, load_adapter, merge, save_adapter
from model import (SHAPES, CausalLM, ChunkedNLL, Config, bos_eos, fingerprint, generate,
                   init_weights, load_config, load_pretrained, load_tokenizer, save_pretrained,
                   to_device, token_nll)

# ------------------------------------------------------------------------------------------------
# Settings: the defaults are the paper's.


def arguments(argv=None):
    p = argparse.ArgumentParser(
        formatter_class=Help,
        description="Fine-tune a Llama with LoRA on arXiv abstracts (arXiv:2508.03716).")
    add = p.add_argument
    count = bounded(int, 1)
    add("--base", default="meta-llama/Llama-3.1-8B",
        help=f"model directory or hub id; with --dry-run also {', '.join(SHAPES)}")
    add("--data", default="data/arxiv", help="directory that data_arxiv.py prepare wrote")
    add("--subset", default="s3", help="s1..s10, own, a category, or hep-th:0.7+gr-qc:0.15")
    add("--lora", type=matrices, default="all", help="qkv, all, or names such as q_proj,v_proj")
    add("--rank", type=bounded(int, 1, 4096), default=8, help="r of LoRA")
    add("--alpha", type=bounded(float, 0, above=True), default=32, help="scale: alpha / rank")
    add("--dropout", type=bounded(float, 0, 0.999), default=0.05, help="on the adapter's input")
    add("--quantize", choices=["nf4", "none"], default="nf4", help="the base in 4 bits or in 16")
    add("--dtype", choices=["auto", "bfloat16", "float32"], default="auto",
        help="of the computation; auto: bfloat16 where the device is fast in it, float32 on GPUs "
        "before Ampere")
    add("--batch-size", type=count, default=48, help="abstracts a step, over all processes")
    add("--micro-batch", type=count, default=8,
        help="abstracts in one forward pass; lower it if memory runs out: the same gradient")
    add("--checkpoint-activations", action="store_true",
        help="compute each block again in the backward pass: little memory, 4/3 of the time")
    add("--compile", action="store_true",
        help="torch.compile the blocks around attention: by counting half the memory traffic "
        "outside matrix products, and half the activations; minutes at first; needs a C++ compiler")
    add("--epochs", type=count, default=4, help="passes over the training set")
    add("--max-steps", type=count, help="end, and end the learning-rate schedule, after so many")
    add("--lr", type=bounded(float, 0, above=True), default=3e-4, help="highest learning rate")
    add("--min-lr", type=bounded(float, 0), default=3e-6, help="learning rate of the last step")
    add("--warmup", type=bounded(float, 0, 1), default=0.1, help="fraction of steps that it rises")
    add("--eval-samples", type=bounded(int, 0), default=512, help="of a validation; 0: all")
    add("--checkpoint-every", type=count, default=200,
        help="steps between checkpoints (there is one before each validation, too)")
    add("--seed", type=bounded(int, 0, 2**32 - 1), default=42, help="of batches, adapter, dropout")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where to train")
    add("--deterministic", action="store_true", help="bit-exact repetition on CUDA, too; slower")
    add("--out", help="run directory (default: out/SUBSET-LORA)")
    add("--resume", action="store_true", help="go on with the run in --out, or start it")
    add("--dry-run", action="store_true", help="print sizes, memory and steps: no weights needed")
    add("--demo", action="store_true", help="the whole path on made-up abstracts; three minutes")
    args = p.parse_args(argv)
    if args.subset == "control":
        p.error("--subset control: these papers are there to be completed, never to be trained on")
    if args.min_lr > args.lr:
        p.error(f"--min-lr {args.min_lr:g} is above --lr {args.lr:g}: lower --min-lr, too")
    lora = args.lora if isinstance(args.lora, str) else ",".join(args.lora)
    name = "demo" if args.demo else re.sub(r"[^\w.-]", "_", f"{args.subset}-{lora}")
    args.out = args.out or f"out/{name}"
    return args


def learning_rate(step, steps, args):
    """Of 0-based `step`: linearly up over ceil(warmup * steps), then a cosine down to --min-lr."""
    warmup = math.ceil(args.warmup * steps)
    if step < warmup:
        return args.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return args.min_lr + (args.lr - args.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def count_steps(rows, args):
    """The steps of a run on so many abstracts."""
    return min(args.epochs * math.ceil(rows / args.batch_size), args.max_steps or sys.maxsize)


# ------------------------------------------------------------------------------------------------
# Training


def train(args):
    """Train, or go on with a run, to its end or until a signal."""
    rank, world, device = start_processes(args.device)
    stop = StopSignal()
    if args.deterministic:
        make_deterministic()
    dtype = resolve_dtype(args.dtype, device)
    ids, texts = data_arxiv.load(args.data, args.subset, "train")
    held_out = validation_rows(args, len(texts))
    steps = count_steps(len(texts), args)
    epoch_steps = math.ceil(len(texts) / args.batch_size)
    validate_at = {round(i * steps / 9) for i in range(10)}

    # The run directory comes before the minutes of loading: a wrong flag shows at once.
    run = open_run(args, dtype, rank, (ids, texts), held_out)
    if run.state and run.state["finished"]:
        return say(run, f"{run.out} is finished; evaluate: python eval.py perplexity {run.out}")
    base = run.settings["base"]
    tokenizer = load_tokenizer(base)
    bos, eos = bos_eos(load_config(base), tokenizer)
    held_out = {name: [data_arxiv.encode(tokenizer, text, bos, eos) for text in held_texts]
                for name, (_, held_texts) in held_out.items()}
    model, named = load_model(args, base, dtype, device)
    trained = list(named.values())
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1)
    peak = measured_peak(dtype, device)
    step, best = run.restore(named, optimizer, fingerprint(model))
    stopping = False
    say(run, f"{args.subset}: {len(texts):,} abstracts, {steps:,} steps, from step {step:,} on; "
             f"{sum(p.numel() for p in trained):,} trained parameters; {world} x {device.type}, "
             f"{dtype}\n"
             f"utilisation: of the {peak / 1e12:.3g} TFLOP/s of a measured matrix product")

    with tqdm(total=steps, initial=step, unit="step", desc=args.subset,
              disable=not run.first) as bar:
        while True:
            # The state reaches the disk before a validation, which takes a while.
            validating = step in validate_at and not stopping
            if validating or stopping or step % args.checkpoint_every == 0:
                run.save(step, best, named, optimizer)
            if validating:
                losses = validate(model, held_out, args.micro_batch, rank, world, stop)
                if losses is None:
                    stopping = True
                else:
                    best = keep_best(run, bar, model, step, step / epoch_steps, losses, best)
            if stopping or step == steps:
                break

            # One update of the adapters, on this process's share of the batch.
            began = time.perf_counter()
            optimizer.param_groups[0]["lr"] = learning_rate(step, steps, args)
            torch.manual_seed(step_seed(args.seed, step, rank))             # for dropout
            rows = data_arxiv.batch_rows(len(texts), args.batch_size, args.seed, step)
            mine = [data_arxiv.encode(tokenizer, texts[r], bos, eos)
                    for r in share(rows, texts, rank, world)]
            parts = micro_batches(mine, args.micro_batch, device)
            nll = (token_nll(model, *part) for part in parts)
            what = f"step {step + 1} (abstracts {', '.join(ids[r] for r in rows)})"
            loss, norm, stopping = update(trained, optimizer, nll, 1.0, stop.requested, what)
            step += 1
            if run.first:
                speed = throughput(model, mine, len(rows), time.perf_counter() - began, peak)
                record = {"step": step, "epoch": round(step / epoch_steps, 4), "loss": loss,
                          "lr": optimizer.param_groups[0]["lr"], "grad_norm": norm, **speed,
                          "memory_gb": round(peak_memory_gb(device), 3)}
                run.log(record)
                bar.set_postfix(epoch=f"{record['epoch']:.2f}", loss=f"{loss:.4f}",
                                tokens_per_s=f"{record['tokens_per_s']:.0f}",
                                utilisation=f"{record['flop_utilisation']:.0%}",
                                memory=f"{record['memory_gb']:.1f}GB", refresh=False)
                bar.update()

    if stopping:
        return say(run, f"stopped after step {step} of {steps}; go on with --resume")
    if run.first:
        save_adapter(model, run.out / "adapter", base)
    run.save(step, best, named, optimizer, finished=True)
    say(run, f"{run.out}/adapter is the adapter after step {steps}; lowest validation loss "
             f"{best['validation_loss']:.4f} at step {best['step']}\n"
             f"evaluate: python eval.py perplexity {run.out}")


# ------------------------------------------------------------------------------------------------
# What the loop needs


ADAPTER = "adapter/adapter_model.safetensors"                 # in a run directory


def matrices(text):
    """The argparse type of --lora -> "qkv", "all" or a list of names."""
    if text in TARGETS:
        return text
    names = text.split(",")
    for name in names:
        if name not in TARGETS["all"]:                        # lm_head: the loss passes it by
            raise argparse.ArgumentTypeError(
                f"no linear layer is named {name!r} that LoRA could adapt: qkv, all or some of "
                f"{','.join(TARGETS['all'])}")
    return names


def validation_rows(args, rows):
    """-> {name of the loss: (ids, texts)} of the run's own set and of s1, where there is one.

    rows: the number of training abstracts, for the error where there are too few abstracts."""
    sets = {"validation_loss": args.subset}
    if args.subset != "s1" and "s1" in data_arxiv.available(args.data)["sets"]:
        sets["validation_loss_s1"] = "s1"
    found = {}
    for key, name in sets.items():
        ids, texts = data_arxiv.load(args.data, name, "validation")
        if not texts:
            raise ValueError(f"{name} of {args.data} has no validation abstracts: {rows} for "
                             "training are too few to split; prepare more")
        order = np.random.default_rng(args.seed).permutation(len(texts))[:args.eval_samples or None]
        found[key] = [ids[i] for i in order], [texts[i] for i in order]
    return found


def open_run(args, dtype, rank, train_rows, held_out):
    """Open the run directory; rows.npz there keeps what the run is trained and validated on.

    train_rows, and each of held_out: (ids, texts). Raises ValueError if a resumed run would go on
    with other rows."""
    free = {"resume", "dry_run", "demo", "out", "device", "checkpoint_every", "micro_batch",
            "checkpoint_activations", "compile"}
    settings = {key: value for key, value in vars(args).items() if key not in free}
    settings["dtype"] = str(dtype).removeprefix("torch.")
    settings["data"] = os.path.abspath(args.data)
    if os.path.isdir(args.base):
        settings["base"] = os.path.abspath(args.base)
    counts = {"train": len(train_rows[0]), "validation": len(held_out["validation_loss"][0])}
    source = data_arxiv.available(args.data)["source"]
    run = Run(args.out, settings, args.resume, rank, {"sources": [source], "counts": counts})
    if run.state:
        run.state["finished"] &= (run.out / ADAPTER).is_file()
    if not run.first or (run.state and run.state["finished"]):
        return run

    rows = {}
    for i, kind in enumerate(("ids", "texts")):
        held = [row for part in held_out.values() for row in part[i]]
        rows[f"train_{kind}"] = data_arxiv.row_hashes(train_rows[i])
        rows[f"validation_{kind}"] = data_arxiv.row_hashes(held)
    path = run.out / "rows.npz"
    if run.state is None:
        with writing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **rows)
        return run
    with reading(path, "put back the one of this run"), np.load(path) as was:
        changed = [key for key in rows if not np.array_equal(was[key], rows[key])]
    if changed:
        raise ValueError(f"{args.data} is not what {run.out} was started on ({', '.join(changed)} "
                         "differ): give that --data, or choose another --out")
    return run


def trained_rows(directory):
    """-> (hashes of the ids, hashes of the texts) that an LM run was trained on, two sets."""
    path = Path(directory) / "rows.npz"
    with reading(path, "it is part of every run of train_lm.py"), np.load(path) as rows:
        return set(rows["train_ids"].tolist()), set(rows["train_texts"].tolist())


def load_model(args, base, dtype, device):
    """-> the base with fresh adapters, in training mode, and {name: trained parameter}."""
    if args.compile:                                          # tried before the minutes of loading
        try:
            torch.compile(torch.sin)(torch.zeros(8, device=device))
        except RuntimeError as e:
            reason = str(e).partition("\n")[0]
            raise ValueError(f"--compile needs a C++ compiler (apt install g++): {reason}") from e
    quantize = None if args.quantize == "none" else args.quantize
    model = load_pretrained(base, quantize=quantize, dtype=dtype, device=device)
    inject(model, args.lora, args.rank, args.alpha, args.dropout, args.seed)
    model.train()
    model.model.checkpoint_activations = args.checkpoint_activations
    if args.compile:
        compile_blocks(model)
    return model, {name: p for name, p in model.named_parameters() if p.requires_grad}


def compile_blocks(model):
    """Compile what each block does before and after attention, for any number of tokens.

    The backward pass computes what is cheap again, dropout included, but no 4-bit product."""
    from torch._functorch import config                       # here: it imports the compiler
    config.aggressive_recomputation = True
    config.is_non_builtin_to_include = True
    # The first block's input as the others': else they would be compiled twice.
    model.model.embed_tokens.register_forward_hook(
        lambda layer, ids, x: x.requires_grad_(torch.is_grad_enabled()))
    for block in model.model.layers:
        block.before = torch.compile(block.before, dynamic=True)
        block.after = torch.compile(block.after, dynamic=True)


def step_seed(*key):
    """A seed for torch that is a function of numbers such as (seed, step, rank)."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def share(rows, texts, rank, world):
    """This process's rows of a batch, in its order: dealt from the longest text on, forth and back,
    so that all have as many tokens to do: of three processes the busiest has 3% more than their
    mean, dealt in order 10%."""
    longest = sorted(range(len(rows)), key=lambda i: -len(texts[rows[i]]))
    mine = longest[rank::2 * world] + longest[2 * world - 1 - rank::2 * world]
    return [rows[i] for i in sorted(mine)]


def micro_batches(sequences, size, device):
    """Cuts lists of token ids into parts of `size`; yields (ids end to end, lengths) of each."""
    for i in range(0, len(sequences), size):
        ids, lengths = data_arxiv.collate(sequences[i:i + size])
        yield to_device(ids, device), lengths


@torch.no_grad()
def validate(model, held_out, micro_batch, rank, world, stop):
    """-> {name: mean negative log-likelihood of a token, nats}, shared out over the processes.

    held_out: {name: lists of token ids}. None if any process is asked to stop meanwhile."""
    device = model.lm_head.weight.device
    losses = {}
    model.eval()
    for name, sequences in held_out.items():
        sums = torch.zeros(3, device=device)                  # nats, tokens, who is asked to stop
        for part in micro_batches(sequences[rank::world], micro_batch, device):
            if stop.requested:
                break
            nll = token_nll(model, *part)
            sums[:2] += torch.stack([nll.sum(), nll.new_tensor(float(len(nll)))])
        sums[2] = float(stop.requested)
        nats, tokens, asked = sum_over_processes(sums).tolist()
        if asked:
            return None
        if not math.isfinite(nats):
            raise ValueError(f"the {name} is {nats / tokens}: a weight of the base is not finite, "
                             "or --lr is too high; the last checkpoint is whole")
        losses[name] = nats / tokens
    model.train()
    return losses


def keep_best(run, bar, model, step, epoch, losses, best):
    """Log a validation and, if it is the best so far, keep its adapter -> the best."""
    record = {"step": step, "epoch": round(epoch, 4), **losses}
    run.log(record)
    if run.first:
        bar.write(f"step {step:6d}  " + "  ".join(f"{k} {v:.4f}" for k, v in losses.items()))
    if best and best["validation_loss"] <= losses["validation_loss"]:
        return best
    if run.first:
        save_adapter(model, run.out / "adapter-best", run.settings["base"])
    return record


def say(run, text):
    """Print in the first process."""
    if run.first:
        print(text, flush=True)


def throughput(model, mine, batch, seconds, peak):
    """-> what metrics.jsonl says of the speed of a step, in which this process had `mine`.

    mine: lists of token ids, of a batch of so many in all. peak: FLOP/s of a matrix product."""
    lengths = [len(sequence) for sequence in mine]
    tokens = sum(lengths) - len(lengths)                      # BOS is no target
    frozen = sum(m.in_features * m.out_features for m in model.modules()
                 if hasattr(m, "in_features"))                # without the embeddings
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    flops = step_flops(model.config, frozen, trained, lengths)
    return {"tokens_per_s": round(tokens * batch / len(mine) / seconds, 1),
            "flop_utilisation": round(flops / seconds / peak, 3)}


def measured_peak(dtype, device):
    """FLOP/s of a large matrix product here and now, of which utilisation is a fraction.

    It takes half a second, once a run."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        (a @ a)[0, 0].item()                                  # .item() waits for the device
        seconds.append(time.perf_counter() - began)
    return 2 * n ** 3 / min(seconds)


def step_flops(config, frozen, trained, lengths):
    """FLOP that a LoRA step on sequences of these lengths needs, however it is computed.

    arXiv:2204.02311, appendix B, without the gradients of frozen weights: 4 for each frozen weight
    and token, 6 for each trained one, and causal attention. frozen: without the embeddings."""
    heads = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    attention = 6 * heads * sum(n * n for n in lengths)
    return sum(lengths) * (4 * frozen + 6 * trained) + attention


# ------------------------------------------------------------------------------------------------
# The run machinery: what train_lm.py and train_l3m.py share.


def start_processes(device="auto"):
    """Join torchrun's other processes, if there are any -> (rank, number of them, torch.device)."""
    if device == "auto":
        device = "cpu"
        if torch.cuda.is_available():
            device = "cuda"
        elif torch.backends.mps.is_available():
            device = "mps"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no CUDA device; use --device cpu, or "
                         "install a CUDA build of torch")
    if "RANK" not in os.environ:
        return 0, 1, torch.device(device)
    if device == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise ValueError(f"torchrun started process {local + 1} on a machine with "
                             f"{torch.cuda.device_count()} GPUs: lower --nproc_per_node")
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    device = torch.device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(                                  # the first may download long
        backend, timeout=timedelta(hours=2), device_id=device if backend == "nccl" else None)
    return dist.get_rank(), dist.get_world_size(), device


def end_processes():
    """Leave the run directory and the other processes, after a whole run or a stopped one."""
    Run.close()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def sum_over_processes(tensor):
    """Sum a tensor over all processes, in place; also returned."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def make_deterministic():
    """Let torch use none but repeatable kernels, also on CUDA; slower."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False      # NaN in every torch.empty


def resolve_dtype(name, device):
    """--dtype -> torch.dtype; auto is bfloat16 where the device multiplies in it, else float32."""
    if name != "auto":
        return getattr(torch, name)
    fast = False
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


owned_peak = 0.0


def peak_memory_gb(device):
    """Peak memory that this process owned so far, in 10^9 bytes: of its GPU, or of the machine.

    On Linux the pages of mapped weight files do not count (the system takes them back at will),
    and the peak is that of the moments at which this function was called."""
    global owned_peak
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if not sys.platform.startswith("linux"):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    status = Path("/proc/self/status").read_text()
    kilobytes = sum(map(int, re.findall(r"Rss(?:Anon|Shmem):\s*(\d+)", status)))
    owned_peak = max(owned_peak, kilobytes * 1024 / 1e9)
    return owned_peak


class StopSignal:
    """SIGTERM (pre-emption, scancel), Ctrl-C and SIGHUP (a closed terminal) set `.requested`.

    The training loop then saves and leaves. A second Ctrl-C kills. Under nohup a
    closed terminal stays ignored."""

    def __init__(self):
        self.requested = False
        signal.signal(signal.SIGTERM, self.request)
        signal.signal(signal.SIGINT, self.request)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self.request)

    def request(self, number, frame):
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if number == signal.SIGHUP:                           # a print to the closed terminal would
            for descriptor in (1, 2):                         # fail before the checkpoint is saved
                if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def update(parameters, optimizer, losses, clip, stop=False, what="this step"):
    """One step of AdamW over all processes, on the mean of all the losses that `losses` yields.

    losses: an iterator over micro-batches, (n,) losses each, that depend on `parameters`; it may be
    empty in a process that has no share of a small batch. clip: the highest gradient norm.
    stop: whether this process was asked to stop. what: names the step and its rows in an error.
    -> (mean loss, gradient norm before clipping, whether any process was asked to stop).
    Raises ValueError, before the update, where the loss or the gradient is not finite."""
    sizes = [p.numel() for p in parameters]
    flat = torch.zeros(sum(sizes) + 3, device=parameters[0].device)      # gradients, then 3 sums
    for p, gradient in zip(parameters, flat[:-3].split(sizes)):
        p.grad = gradient.view_as(p)
    for values in losses:
        peak_memory_gb(flat.device)                           # here the activations are all alive
        torch.autograd.backward(values.sum(), inputs=parameters)         # adds to `flat`
        flat[-3] += values.detach().sum()
        flat[-2] += len(values)
    flat[-1] = float(stop)
    sum_over_processes(flat)                                  # the only communication of a step
    total, count, asked = flat[-3:].tolist()
    gradient = flat[:-3].div_(count)                          # of the mean, over all processes
    norm = gradient.norm().item()
    if not math.isfinite(total + norm):
        raise ValueError(f"the loss of {what} is {total / count}, its gradient norm {norm}: "
                         "stopped before the update. Look at these, or lower --lr; the last "
                         "checkpoint is whole")
    gradient.mul_(min(1.0, clip / (norm + 1e-6)))
    optimizer.step()                                          # passes over what has no gradient
    optimizer.zero_grad(set_to_none=True)
    return total / count, norm, asked > 0


PATHS = ("base", "data")                                      # settings that may change: places
LEFT = (".config.json.*.tmp", ".rows.npz.*.tmp", ".metrics.jsonl.*.tmp", ".*.safetensors.*.tmp",
        "adapter*/.adapter_*.tmp")                            # of a kill in the middle of writing


class Run:
    """A run directory: config.json, metrics.jsonl, checkpoint.safetensors and the one before it.

    `state` is what the newest whole checkpoint says, {"step", "best", "fingerprint", "finished"},
    or None for a new run; `first` is whether this is the process that writes; `out` and `settings`
    are as given. A checkpoint holds the trained tensors and AdamW's state."""
    held = None                                               # descriptor of the lock

    def __init__(self, out, settings, resume, rank=0, data=None):
        """Open the directory in the first process, for one job alone, and tell the others.

        settings: what may not change over the life of a run, but for its PATHS.
        data: what config.json says of the data beside the settings, for a model card.
        Raises ValueError if the directory holds a run and `resume` is off, for other settings
        than it was started with, for damaged checkpoints, and while another job works in it."""
        self.out = Path(out)
        self.settings = settings
        self.first = rank == 0
        self.saved = None                                     # step of the newest checkpoint
        self.newest = self.out / "checkpoint.safetensors"
        self.previous = self.out / "checkpoint-previous.safetensors"
        found = [None, None]
        if self.first:
            self.out.mkdir(parents=True, exist_ok=True)
            self.close()
            Run.held = lock(self.out, "training in")
            for pattern in LEFT:
                for path in self.out.glob(pattern):
                    path.unlink()
            found = self.find(resume)
            self.config = self.check_settings(found[0], data)
            if not found[0]:
                self.write_config()
        if dist.is_initialized():
            dist.broadcast_object_list(found)
        self.checkpoint, self.state = found

    def find(self, resume):
        """-> [path, state] of the newest whole checkpoint, [None, None] where there is none."""
        candidates = [p for p in (self.newest, self.previous) if p.exists()]
        if candidates and not resume:
            raise ValueError(f"{self.out} already holds a run: add --resume to go on with it, or "
                             "choose another --out")
        damage = []
        for path in candidates:
            try:
                tensors, state = read_checkpoint(path)
            except ValueError as e:
                damage.append(str(e))
                continue
            if damage:                                        # make room for the next one
                aside = path.with_name(f"damaged-{time.time_ns()}-{self.newest.name}")
                self.newest.rename(aside)
                print(f"warning: {damage[0]}. It is {aside.name} now; going on with {path.name}, "
                      f"step {state['step']}", file=sys.stderr, flush=True)
            return [path, state]
        if damage:
            raise ValueError(f"no whole checkpoint is left: {'; '.join(damage)}. Put a copy of one "
                             "in its place, or choose another --out")
        for result in ("adapter", "adapter-best", "model.safetensors"):
            if (self.out / result).exists():
                raise ValueError(f"{self.out} holds a {result}, but no checkpoint to go on from: "
                                 "choose another --out")
        return [None, None]

    def write_config(self):
        """Write the settings and where the run is now: of an old run once its base is known to be
        the same, or an evaluation would take the wrong one."""
        with writing(self.out / "config.json") as temporary:
            temporary.write_text(json.dumps(self.config, indent=1))

    def check_settings(self, checkpoint, data):
        """-> what config.json should say; ValueError for other settings than the run's."""
        path = self.out / "config.json"
        settings = json.loads(json.dumps(self.settings))      # as JSON gives them back
        if checkpoint:
            with reading(path, "put back the one that the run was started with"):
                config = json.loads(path.read_text())
                old = dict(config["settings"])
            data = config.get("data")
            changed = []
            for key in sorted((old | settings).keys() - set(PATHS)):
                was, now = old.get(key), settings.get(key)
                if was != now:
                    changed.append(f"{key} was {reprlib.repr(was)}, now {reprlib.repr(now)}")
            if changed:
                raise ValueError(f"{self.out} was started with other settings: "
                                 f"{'; '.join(changed)}. Resume with the old ones, or choose "
                                 "another --out")
        config = {"settings": settings, "directory": os.path.abspath(self.out)}
        if data is not None:
            config["data"] = data
        return config

    @torch.no_grad()
    def restore(self, named, optimizer, fingerprint):
        """Load the checkpoint into {name: parameter} and AdamW's state -> (step, best).

        A new run is at (0, None). metrics.jsonl is cut back to that step, whose validation will be
        repeated. Raises ValueError where the frozen weights are not those of the run."""
        self.fingerprint = fingerprint
        step = 0
        best = None
        if self.checkpoint:
            step = self.saved = self.state["step"]
            best = self.state["best"]
            if self.state["fingerprint"] != fingerprint:
                raise ValueError(f"{self.out} was trained on another base than "
                                 f"{self.settings.get('base')} is: resume with that one, or choose "
                                 "another --out")
            if self.first:
                self.write_config()
            tensors, _ = read_checkpoint(self.checkpoint)
            for key in {*named, *tensors}:
                name, _, part = key.partition("/")            # part: of AdamW's state
                p = named.get(name)
                value = tensors.get(key)
                if p is None or value is None or value.shape not in (p.shape, ()):
                    raise ValueError(f"{self.checkpoint} is of another run: {key} does not fit")
                if part:
                    optimizer.state[p][part] = value.to(p.device if value.dim() else "cpu")
                else:
                    p.copy_(value)
        if self.first:
            self.cut_metrics(step)
        return step, best

    def cut_metrics(self, step):
        """Keep the records before `step`, and of it the training record."""
        path = self.out / "metrics.jsonl"
        kept = ""
        with reading(path, "remove what is no JSON object"):
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            for line in lines:
                if not line.endswith("}\n"):                  # a kill, or a full disk, cut it off
                    continue
                record = json.loads(line)
                if record["step"] < step or (record["step"] == step and "loss" in record):
                    kept += line
        with writing(path) as temporary:
            temporary.write_text(kept)

    def log(self, record):
        """Append one line to metrics.jsonl, in the first process."""
        if not self.first:
            return
        path = self.out / "metrics.jsonl"
        try:
            with open(path, "a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as e:
            raise OSError(f"{path} could not be written ({e.strerror}); the last checkpoint is "
                          "whole: free some space, then --resume") from e

    def save(self, step, best, named, optimizer, finished=False):
        """Write the checkpoint of `step`, in the first process; the one before it is kept.

        best: JSON, the lowest validation so far. finished: nothing is left to do.
        Does nothing where the newest checkpoint is that of `step` already."""
        if not self.first or (step == self.saved and not finished):
            return
        tensors = dict(named)
        for name, p in named.items():
            for part, value in optimizer.state[p].items():
                tensors[f"{name}/{part}"] = value
        tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        state = {"step": step, "best": best, "fingerprint": self.fingerprint, "finished": finished}
        state["checksum"] = checksum(state, tensors)
        metadata = {"state": json.dumps(state, sort_keys=True)}         # two keys: in random order
        try:
            with writing(self.newest) as temporary:
                save_file(tensors, temporary, metadata=metadata)
                if self.newest.exists():                      # a kill here leaves the one before
                    os.replace(self.newest, self.previous)
        except OSError as e:
            raise OSError(f"{e}, with --resume") from e
        self.saved = step

    @staticmethod
    def close():
        """Let other jobs into the directory; the end of the process does so, too."""
        if Run.held is not None:
            os.close(Run.held)
            Run.held = None


def checksum(state, tensors):
    """crc32 of JSON and of the bytes of {name: CPU tensor}, in the order of the names."""
    crc = zlib.crc32(json.dumps(state, sort_keys=True).encode())
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), crc)
    return crc


def read_checkpoint(path):
    """-> ({name: tensor}, state) of a checkpoint; ValueError if it is not as it was written."""
    with reading(path, "it is damaged"):
        with safe_open(path, framework="pt") as file:
            state = json.loads(file.metadata()["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}      # noqa: SIM118
        if state.pop("checksum") != checksum(state, tensors):
            raise ValueError("its numbers are not those that were written")
    return tensors, state


def read_settings(directory, experiment=None):
    """-> the settings of a run, with base and data where they are now.

    experiment: "lm", "regress" or "generate", of which the run must be and have a result;
    None: any run. A base or data path that is gone is looked for where it lay relative to the run:
    a project may move. Raises ValueError for what is no run, one of another experiment, and one
    without a result yet."""
    directory = Path(directory)
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory} is no run (no config.json): give the --out of a training")
    with reading(path, "give the --out of train_lm.py or train_l3m.py"):
        config = json.loads(path.read_text())
        settings = dict(config["settings"])
        was = str(config["directory"])
    kind = settings.get("experiment", "lm")
    if experiment and kind != experiment:
        command = "perplexity" if kind == "lm" else kind
        raise ValueError(f"{directory} is another experiment's run: use eval.py {command}")
    with reading(path, "give the --out of train_lm.py or train_l3m.py"):
        text = str if kind == "lm" else str | None            # L3M: no subset, perhaps no base
        for key in (*PATHS, "subset"):
            if not isinstance(settings.get(key), text):
                raise ValueError(f"{key} is {settings.get(key)!r}")
        for split in data_arxiv.SPLITS if "lightcones" in settings else ():
            "".join(settings["lightcones"][split])            # names
        sum(settings.get("norm", ()), 0.0)                    # numbers
    result = ADAPTER if kind == "lm" else "model.safetensors"
    if experiment and not (directory / result).is_file():
        raise ValueError(f"{directory} has no {result} yet: go on with the training by --resume")
    for key in PATHS:
        place = settings.get(key)
        if isinstance(place, str) and os.path.isabs(place) and not os.path.exists(place):
            moved = os.path.normpath(directory / os.path.relpath(place, was))
            if os.path.exists(moved):
                settings[key] = moved
    return settings


def fresh_demo(out, made):
    """A directory for a demo, without the entries `made` that an earlier demo left in it -> Path.

    Nothing else is ever removed. Raises ValueError where `out` holds files and is no demo's."""
    out = Path(out)
    mark = out / "demo.json"
    if out.exists() and not mark.is_file() and any(out.iterdir()):
        raise ValueError(f"{out} holds files that are not a demo's: give a new directory as --out")
    for name in made:
        if (out / name).is_dir():
            shutil.rmtree(out / name)
        else:
            (out / name).unlink(missing_ok=True)
    with writing(mark) as temporary:
        temporary.write_text(json.dumps({"demo": made}))
    return out


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """--help with the default that acts; the help text itself tells one that depends on others."""

    def _get_help_string(self, action):
        if action.default in (None, False, []):
            return action.help
        return super()._get_help_string(action)


# ------------------------------------------------------------------------------------------------
# --dry-run

LIBRARIES = 0.25e9                                            # bytes that Python and torch take


def kept_bytes(forward, model, decoder):
    """Bytes that autograd keeps of forward() for the backward pass, beside the model's own tensors.

    On the meta device, where nothing is computed. If `decoder` checkpoints its activations: the
    input of each block, and the insides of the one that is computed again."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward()
    total = sum(storage.nbytes() for storage in kept.values())
    if decoder.checkpoint_activations:
        decoder.checkpoint_activations = False
        total += kept_bytes(forward, model, decoder) / len(decoder.layers)
        decoder.checkpoint_activations = True
    return total


def estimate(args, device, dtype):
    """Parameters and peak memory of one process, from shapes alone; an abstract is 250 tokens.

    memory_gb is what the process owns; on a CPU, 16-bit weights that are used as they are on disk
    stay in mapped files, mapped_gb, which the system takes back at will."""
    config = load_config(args.base)
    with torch.device("meta"):
        model = CausalLM(config).to(dtype)
        total = sum(p.numel() for p in model.parameters())
        trained = inject(model, args.lora, args.rank, args.alpha, args.dropout)
        ids = torch.zeros(args.micro_batch, 250, dtype=torch.int64)
    model.train()
    model.model.checkpoint_activations = args.checkpoint_activations
    if device.type != "cpu":                                  # fused attention keeps no scores,
        ids = ids.view(-1, 1)                                 # like that of lone tokens

    def forward():
        hidden = model.model(ids).flatten(0, 1)
        ChunkedNLL.apply(hidden, model.lm_head.weight, ids.flatten())
    kept = kept_bytes(forward, model, model.model)

    sizes = [p.numel() for name, p in model.named_parameters() if name.endswith("_proj.weight")]
    four_bit = sum(sizes) if args.quantize == "nf4" else 0
    full = (total - four_bit) * dtype.itemsize
    mapped = full if device.type == "cpu" and dtype.itemsize == 2 else 0
    owned = full - mapped
    owned += four_bit * 0.516                                 # NF4: 4.127 bits a weight
    owned += 2 * max(sizes) * dtype.itemsize                  # the two matrices at work
    owned += trained * 16                                     # weight, gradient, AdamW's moments
    owned += kept
    owned += ChunkedNLL.ROWS * config.vocab_size * (4 + dtype.itemsize)         # logits and softmax
    owned += LIBRARIES if device.type == "cpu" else 0
    return {"trainable_parameters": trained, "total_parameters": total + trained,
            "memory_gb": round(owned / 1e9, 2), "mapped_gb": round(mapped / 1e9, 2)}


def dry_run(args):
    """Print parameters, memory, steps and tokens of a run; auto is a GPU here, in bfloat16."""
    device = torch.device("cuda" if args.device == "auto" else args.device)
    dtype = torch.bfloat16
    if args.dtype != "auto" or device.type != "cuda":
        dtype = resolve_dtype(args.dtype, device)
    report = {"base": args.base, "device": device.type, "dtype": str(dtype).removeprefix("torch."),
              **estimate(args, device, dtype), "steps": None, "tokens": None}
    try:
        texts = data_arxiv.load(args.data, args.subset, "train")[1]
    except ValueError as e:
        report["steps and tokens"] = str(e)
    else:
        report["steps"] = count_steps(len(texts), args)
        characters = sum(map(len, texts)) / len(texts)
        epochs = report["steps"] * args.batch_size / len(texts) if args.max_steps else args.epochs
        report["tokens"] = round(epochs * len(texts) * (characters / 3.8 + 1))  # 3.8 a token; EOS
    print(json.dumps(report, indent=1))


# ------------------------------------------------------------------------------------------------
# --demo


def part(script, *flags):
    """Run one of our scripts as a part of a demo; ValueError if it fails, as it has told."""
    command = [sys.executable, Path(__file__).with_name(script), *map(str, flags)]
    if subprocess.run(command).returncode:
        raise ValueError(f"a part of the demo failed, see above ({script})")


def train_tokenizer(texts):
    """-> a byte-level BPE tokenizer of 2,048 tokens; BOS is 0 and EOS is 1."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=2048, special_tokens=["<s>", "</s>"],
                                  show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train_base(tokenizer, texts, steps):
    """-> a small model, trained on `texts` for so many steps."""
    torch.manual_seed(0)
    base = CausalLM(Config("llama", tokenizer.get_vocab_size(), 192, 512, 4, 6, 2, 32,
                           max_position_embeddings=2048, bos_token_id=0, eos_token_id=1))
    init_weights(base)
    optimizer = torch.optim.AdamW(base.parameters(), lr=2e-3, betas=(0.9, 0.95))
    bar = tqdm(range(steps), desc="base", unit="step")
    for step in bar:
        rows = data_arxiv.batch_rows(len(texts), 8, 0, step)
        sequences = [data_arxiv.encode(tokenizer, texts[r], 0, 1) for r in rows]
        loss = token_nll(base, *data_arxiv.collate(sequences)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return base


def demo(args):
    """The whole path: snapshot, sets, a small base, NF4, LoRA, perplexity, a completion."""
    out = fresh_demo(args.out, ["snapshot.jsonl", "data", "base", "s1-all"])
    print("The whole path in three minutes on two CPU cores\n1. A made-up snapshot (synthetic: the "
          "words mean nothing), prepared into training sets", flush=True)
    data_arxiv.synthesize(out / "snapshot.jsonl", records=6000, seed=0)
    data_arxiv.prepare(out / "snapshot.jsonl", out / "data")

    print("2. A tokenizer and a small base model, trained on every category, with little hep-th "
          "among them", flush=True)
    texts = data_arxiv.load(out / "data", "hep-th:0.1+hep-ph+gr-qc+q-bio+cs", "train")[1]
    tokenizer = train_tokenizer(texts)
    save_pretrained(train_base(tokenizer, texts, steps=220), out / "base")
    with writing(out / "base" / "tokenizer.json") as temporary:
        tokenizer.save(str(temporary))

    print("3. The base again, in NF4, fine-tuned with LoRA on hep-th (set s1)", flush=True)
    part("train_lm.py", "--base", out / "base", "--data", out / "data", "--subset", "s1",
         "--batch-size", 16, "--max-steps", 60, "--lr", 2e-3, "--eval-samples", 32,
         "--out", out / "s1-all")

    print("4. Perplexity of the hep-th test split, before and after", flush=True)
    part("eval.py", "perplexity", out / "s1-all")

    print("5. A completion by the fine-tuned model", flush=True)
    model = load_pretrained(str(out / "base"), dtype=torch.float32)
    load_adapter(model, out / "s1-all" / "adapter")
    merge(model)
    truth = data_arxiv.load(out / "data", "s1", "test")[1][0].split()
    prompt = " ".join(truth[:20])
    start = data_arxiv.encode(tokenizer, prompt, 0, None)
    completion = generate(model, [start], max_new_tokens=80, eos=1)[0]
    print(f"PROMPT:     {prompt}\nCOMPLETION: {tokenizer.decode(completion)}\n\n"
          f"Everything is in {out}. Next: real abstracts and a real model, see README.md")


def main(argv=None):
    args = arguments(argv)
    advice = f"lower --micro-batch (now {args.micro_batch}) or add --checkpoint-activations"
    with one_line(advice):
        if args.dry_run:
            dry_run(args)
        elif args.demo:
            demo(args)
        else:
            train(args)
        end_processes()


if __name__ == "__main__":
    main()
