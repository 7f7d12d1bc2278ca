"""Train L3M: a language-model backbone with connectors, on 21cm lightcones (arXiv:2506.14757).

`regress`: six parameters from the sky-averaged signal. The backbone is frozen.

    python train_l3m.py regress --demo                          # the whole path, 3 minutes of CPU
    python train_l3m.py regress --prompt chat --seeds 0 1 2 3 4 # the paper's: Qwen2.5-0.5B, a GPU
    python train_l3m.py regress --init random --blocks 6 --base path/to/SmolLM2-135M-Instruct \\
        --batch-size 64 --epochs 100 --lr 1e-3                  # a laptop
    python train_l3m.py regress --init small                    # a reference, trained from scratch

`generate`: lightcones slice by slice, by conditional flow matching. LoRA and the norms, or the
whole backbone, are trained, and a velocity network.

    python train_l3m.py generate --demo                         # the whole path, 4 minutes of CPU
    python train_l3m.py generate --rank 8 --seeds 0 1 2         # the paper's: Qwen2.5-0.5B, a GPU
    python train_l3m.py generate --init random --blocks 8 --base path/to/SmolLM2-135M-Instruct \\
        --batch-size 4 --lr 1e-3 --max-steps 1000 --validate-every 0.1          # a laptop
    python train_l3m.py generate --init small                   # a reference, trained from scratch

    torchrun --nproc_per_node=4 train_l3m.py generate ...       # the same run on four GPUs
    python train_l3m.py generate --dry-run --base qwen2.5-0.5b  # sizes, without weights or data

- regress: only connectors and trainable tokens learn (26,907 numbers); each batch is seen twice:
  what feeds the frozen backbone is updated first, then what reads it
- nothing is computed that does not change: no gradients of frozen weights, none through the
  backbone in the second update, the chat words before the signal once
- every batch and every random draw is a function of (seed, step, rank): a resumed run is the
  undisturbed run, bit for bit on a CPU
- the noise and the times of flow matching belong to the sublightcone, not to the process: without
  dropout, process count and --micro-batch change rounding only
- a run keeps the lightcones that it was started with, whatever is added to the store
- out/EXPERIMENT-INIT-seedN/ gets config.json, metrics.jsonl, checkpoint.safetensors and
  model.safetensors, the weights with the lowest validation loss: evaluate with eval.py
"""
import argparse
import json
import math
import os
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from train_lm import (  # before torch
    LIBRARIES,
    Help,
    Run,
    StopSignal,
    end_processes,
    fresh_demo,
    kept_bytes,
    make_deterministic,
    part,
    peak_memory_gb,
    read_settings,
    resolve_dtype,
    say,
    start_processes,
    step_seed,
    sum_over_processes,
    update,
)
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

import data_lightcone
from connectors import (
    GENERATION_REFERENCES,
    GENERATION_WORDS,
    INITS,
    PROMPTS,
    REFERENCES,
    WINDOW,
    Generator,
    Regressor,
    build_generator,
    build_regressor,
    choose_trained,
    gaussian_nll,
    is_words,
)
from data_arxiv import batch_rows, bounded, one_line, reading
from data_lightcone import GlobalSignals, SubLightcones
from model import SHAPES, Decoder, load_config, writing

TOKENS_A_SIGNAL = 47
CLIP = {"regress": 30.0, "generate": 1.0}                     # gradient norm of an update
WEIGHT_DECAY = 1e-3                                           # generate: of all but biases
# generate: patches of 14 x 14 in one pass. The velocity network keeps 2 MB of each for the backward
# pass; more than these made a CPU slower.
PATCHES = {"cpu": 160, "cuda": 2000, "mps": 2000}

# ---------------------------------------------------------------------------------------- settings


def arguments(argv=None):
    p = argparse.ArgumentParser(description="Train a language-model backbone with connectors on "
                                            "21cm lightcones (arXiv:2506.14757).")
    experiments = p.add_subparsers(dest="experiment", required=True)
    r = experiments.add_parser(
        "regress", help="six parameters from the sky-averaged signal", formatter_class=Help,
        description="Regress the six parameters of a lightcone from its sky-averaged 21cm signal.")
    shared_flags(r, "lightcones", batch=1024, epochs="1500; references 40000", warmup=100,
                 decay=100, dropout=0.001, micro="", checkpoint=500)
    r.set_defaults(micro_batch=512)                           # Qwen2.5-0.5B: 24 GB of a GPU
    add = r.add_argument
    add("--prompt", choices=list(PROMPTS), default="minimal",
        help="what surrounds the signal; the chat prompts need a base that knows ChatML")
    add("--duplicate", action=argparse.BooleanOptionalAction, default=True,
        help="an epoch has every lightcone twice; dropout makes the two differ")
    add("--published-norm", action="store_true",
        help="normalise signals by the constants that L3M released, not by the training set")
    add("--causal", action=argparse.BooleanOptionalAction,
        help="references: with a causal mask, as the released code has it (default: without)")
    g = experiments.add_parser(
        "generate", help="lightcones slice by slice", formatter_class=Help,
        description="Learn to continue a lightcone slice by slice, patch by patch, by conditional "
                    "flow matching.")
    shared_flags(g, f"sublightcones ({WINDOW} slices)", batch=64, epochs="20", warmup=1, decay=2,
                 dropout=0.01, checkpoint=200,
                 micro=f" (default: about {PATCHES['cuda']} patches of 14 x 14; on a CPU "
                       f"{PATCHES['cpu']})")
    add = g.add_argument
    add("--tune", choices=["full", "lora"],
        help="of the backbone: all its weights, or adapters on all seven projections and the norms "
             "(default: lora; references full)")
    add("--rank", type=bounded(int, 1, 4096),
        help="r of LoRA, alpha = 2r (default: 2; the paper also has 8)")
    add("--patch", type=bounded(int, 2), default=14,
        help="side of a patch in cells; must divide the side of the slices")
    add("--velocity", type=bounded(int, 1, 4096), nargs=2, metavar=("WIDTH", "INNER"),
        default=[64, 128], help="channels of the velocity network, between and inside its blocks")
    add("--velocity-dtype", choices=["auto", "bfloat16", "float32"], default="float32",
        help="what the velocity network is trained in (sampling and validation: float32); auto: "
             "bfloat16 where it is fast")
    add("--start", choices=["wide", "paper"],
        help="of the references' matrices. paper: N(0, 0.02^2); wide: N(0, 1/hidden size), which "
             "learn to look back sooner (default: wide)")
    add("--carry", action="store_true",
        help="not the paper's: the same patch of the slice before is added to the condition")
    add("--eval-samples", type=bounded(int, 0), default=1024,
        help="sublightcones of a validation; 0: all")
    args = p.parse_args(argv)
    complete(args, {"regress": r, "generate": g}[args.experiment].error)
    return args


def shared_flags(q, unit, batch, epochs, warmup, decay, dropout, micro, checkpoint):
    """What both experiments have, with the defaults of this one, which are the paper's."""
    add = q.add_argument
    count = bounded(int, 1)
    add("--init", choices=INITS, default="pretrained",
        help="the backbone: of --base, pretrained or with random weights; or a small or large "
             "reference network, trained from scratch")
    add("--base", default="Qwen/Qwen2.5-0.5B-Instruct",
        help=f"model directory or hub id; without words and for --dry-run also {', '.join(SHAPES)}")
    add("--blocks", type=bounded(int, 1, 1000),
        help="the first N blocks of a pretrained backbone, or any number of random ones "
             "(default: all of the base)")
    add("--data", default="data/lightcones", help="a store of data_lightcone.py; to regress also "
                                                  "an .npz of signals")
    add("--batch-size", type=count, default=batch, help=f"{unit} a step, over all processes")
    add("--micro-batch", type=count,
        help=f"{unit} in one pass of a process{micro}; lower it if memory runs out")
    add("--epochs", type=count, help=f"passes over the training set (default: {epochs})")
    add("--max-steps", type=count,
        help="end after so many steps; warm-up and decay shrink in proportion")
    add("--lr", type=bounded(float, 0, above=True), default=5e-5, help="highest learning rate")
    add("--warmup", type=bounded(float, 0), help="epochs with a linearly rising learning rate "
        f"(default: {warmup}, at most a tenth of --epochs)")
    add("--decay", type=bounded(float, 0), help="last epochs, over which it falls as a cosine "
        f"(default: {decay}, at most a tenth of --epochs)")
    add("--dropout", type=bounded(float, 0, 0.999), default=dropout, help="of the attention")
    add("--seeds", type=bounded(int, 0), nargs="+", default=[0],
        help="one run each, one after the other; the split of the data is the same")
    add("--validate-every", type=bounded(float, 0, above=True), default=1,
        help="epochs between validations, also a fraction")
    add("--checkpoint-every", type=count, default=checkpoint, help="steps between checkpoints")
    add("--log-every", type=count, default=10, help="steps between lines of metrics.jsonl")
    add("--checkpoint-activations", action="store_true",
        help="less memory: compute each block again in the backward pass")
    add("--dtype", choices=["auto", "bfloat16", "float32"], default="auto",
        help="of the language model; auto: bfloat16 where it is fast")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where to train")
    add("--deterministic", action="store_true", help="bit-exact repetition on CUDA, too; slower")
    add("--out", help="run directory, with -seedN behind it if there are several seeds "
                      f"(default: out/{q.prog.split()[-1]}-INIT-seedN)")
    add("--resume", action="store_true", help="go on with the run in --out, or start it")
    add("--dry-run", action="store_true", help="print sizes, memory and steps: no weights needed")
    add("--demo", action="store_true",
        help="the whole path on simulated lightcones; 3 or 4 minutes of CPU")


def complete(args, error):
    """Fill in the defaults that depend on other flags; error(sentence) where flags contradict."""
    reference = args.init in REFERENCES
    if args.experiment == "regress":
        if reference and (args.prompt != "minimal" or args.blocks):
            error(f"--init {args.init} is a network of its own, without words: it has neither "
                  "--blocks nor a chat --prompt")
        if args.causal is not None and not reference:
            error("--causal and --no-causal are for the references (--init small or large); a "
                  "language model is causal")
        if args.causal is None:
            args.causal = not reference
        args.epochs = args.epochs or (40000 if reference else 1500)
        warmup = 100
        decay = 100
    else:
        if reference and (args.blocks or args.tune == "lora"):
            error(f"--init {args.init} is a network of its own, trained whole: it has neither "
                  "--blocks nor --tune lora")
        if args.start and not reference:
            error("--start is for the references (--init small or large); a language model starts "
                  "as its checkpoint, or at random as its kind does")
        if reference:
            args.start = args.start or "wide"
        args.tune = args.tune or ("full" if reference else "lora")
        if args.rank and args.tune == "full":
            error("--rank is of the adapters of --tune lora; here all weights are trained")
        if args.tune == "lora":
            args.rank = args.rank or 2
        args.epochs = args.epochs or 20
        warmup = 1
        decay = 2
    if args.warmup is None:
        args.warmup = min(warmup, args.epochs / 10)
    if args.decay is None:
        args.decay = min(decay, args.epochs / 10)
    if args.warmup + args.decay > args.epochs:
        error(f"--warmup {args.warmup:g} and --decay {args.decay:g} do not fit into --epochs "
              f"{args.epochs}")


def run_settings(args, seed, device, **data):
    """What must not change over the life of a run, and all that an evaluation needs to know."""
    kept = ["experiment", "init", "blocks", "batch_size", "epochs", "max_steps", "lr", "warmup",
            "decay", "dropout", "validate_every", "deterministic"]
    if args.experiment == "regress":
        kept += ["prompt", "duplicate", "causal"]
    else:
        kept += ["tune", "rank", "patch", "velocity", "start", "carry", "eval_samples"]
        velocity_dtype = resolve_dtype(args.velocity_dtype, device)
        data["velocity_dtype"] = str(velocity_dtype).removeprefix("torch.")
    settings = {name: getattr(args, name) for name in kept}
    settings |= {"base": args.base, "data": os.path.abspath(args.data), "seed": seed,
                 "dtype": str(resolve_dtype(args.dtype, device)).removeprefix("torch."), **data}
    if os.path.isdir(args.base):
        settings["base"] = os.path.abspath(args.base)
    if args.init in REFERENCES:
        settings |= {"base": None, "dtype": "float32"}
    return settings


def learning_rate(step, steps, args):
    """Of 0-based `step`: up linearly, constant, down a cosine; warm-up and decay are the fractions
    warmup / epochs and decay / epochs of the run."""
    warmup = round(steps * args.warmup / args.epochs)
    decay = round(steps * args.decay / args.epochs)
    if step < warmup:
        return args.lr * (step + 1) / warmup
    progress = max(0, step - (steps - decay)) / max(1, decay)
    return args.lr * (1 + math.cos(math.pi * progress)) / 2


def count_steps(n, args):
    """The steps of a run on n samples an epoch."""
    return min(args.epochs * math.ceil(n / args.batch_size), args.max_steps or sys.maxsize)


# ----------------------------------------------------------------------- what both experiments need


def choose_lightcones(args, seed, rank, experiment):
    """-> the run directory, and {split: names of its lightcones}.

    A run that goes on keeps the lightcones that it was started with; a new one splits the store as
    it is now. The first process chooses for all."""
    out = args.out or f"out/{args.experiment}-{args.init}"
    if not args.out or len(args.seeds) > 1:
        out += f"-seed{seed}"
    names = None
    config = Path(out) / "config.json"
    if rank == 0 and args.resume and config.exists():
        with reading(config, f"it is no run of train_l3m.py {args.experiment}: give another --out"):
            stored = read_settings(out)["lightcones"]
            names = {split: [*stored[split]] for split in data_lightcone.SPLITS}
    elif rank == 0:
        names, note = data_lightcone.split_names(args.data, experiment)
        print(note, flush=True)
    names = [names]
    if dist.is_initialized():
        dist.broadcast_object_list(names)
    return out, names[0]


def is_finished(run):
    """Say so if nothing is left to do, before the base is loaded."""
    if not (run.state and run.state["finished"]):
        return False
    say(run, f"{run.out} is finished; evaluate: python eval.py {run.settings['experiment']} "
             f"{run.out}")
    return True


@torch.no_grad()
def validate(run, network, losses, stop, step, epoch, best):
    """The mean of the losses (n,) that an iterator yields, shared out over the processes; the best
    network so far is kept in model.safetensors -> the best, whether anyone is asked to stop."""
    network.eval()
    sums = torch.zeros(3, device=network.output_connector.weight.device)
    for values in losses:
        sums[:2] += torch.stack([values.sum(), values.new_tensor(len(values))])
        if stop.requested:
            break
    network.train()
    sums[2] = float(stop.requested)
    total, count, asked = sum_over_processes(sums).tolist()
    if asked:
        return best, True
    loss = total / count
    if not math.isfinite(loss):
        raise ValueError(f"the validation loss is {loss} after step {step}: lower --lr; the last "
                         "checkpoint is whole")
    run.log({"step": step, "epoch": round(epoch, 4), "validation_loss": loss})
    if best and best["validation_loss"] <= loss:
        return best, False
    best = {"step": step, "validation_loss": loss}
    if run.first:
        tensors = {name: p.cpu().contiguous() for name, p in network.trained().items()}
        state = json.dumps(best | {"fingerprint": network.fingerprint}, sort_keys=True)
        with writing(run.out / "model.safetensors") as temporary:
            save_file(tensors, temporary, metadata={"state": state})
    return best, False


def start_bar(run, network, steps, step):
    """Say what is trained -> a progress bar."""
    count = sum(p.numel() for p in network.trained().values())
    say(run, f"{run.out}: {count:,} trained parameters, step {step:,} of {steps:,}")
    return tqdm(total=steps, initial=step, disable=not run.first, desc=run.out.name, unit="step")


def record_step(run, args, bar, best, record, samples, seconds, device):
    """Log a step, every --log-every of them, and show it."""
    bar.set_postfix(epoch=f"{record['epoch']:.1f}", loss=f"{record['loss']:.4f}",
                    validation=f"{best['validation_loss']:.4f}", refresh=False)
    bar.update()
    if record["step"] % args.log_every == 0 or record["step"] in (1, bar.total):
        run.log(record | {"samples_per_s": round(samples / seconds, 1),
                          "memory_gb": round(peak_memory_gb(device), 3)})


def end_run(run, step, steps, best, named, optimizer, stopping):
    """Say how a run ended and mark it as finished, unless it was stopped -> whether it was."""
    if stopping:
        say(run, f"stopped after step {step} of {steps}; go on with --resume")
        return True
    run.save(step, best, named, optimizer, finished=True)
    say(run, f"{run.out}/model.safetensors is the network after step {best['step']}, of the lowest "
             f"validation loss, {best['validation_loss']:.4f}\n"
             f"evaluate: python eval.py {run.settings['experiment']} {run.out}")
    return False


def name_step(step, names):
    """What an error calls the step after `step`: its number, and its first twenty lightcones."""
    more = ", ..." if len(names) > 20 else ""
    return f"step {step + 1} (lightcones {', '.join(names[:20])}{more})"


def cut(items, size):
    """Items in parts of `size`, perhaps none."""
    return [items[i:i + size] for i in range(0, len(items), size)]


# -------------------------------------------------------------------------------------- regression


def regress(args, seed, rank, world, device, stop):
    """Train a regressor, or go on with it -> whether a signal stopped it."""
    out, names = choose_lightcones(args, seed, rank, "regression")
    norm = data_lightcone.PUBLISHED_NORM if args.published_norm else None
    read = partial(GlobalSignals, args.data, tokens=TOKENS_A_SIGNAL, norm=norm, names=names)
    train = read("train")
    held = read("validation")
    run = Run(out, run_settings(args, seed, device, lightcones=names, tokens=TOKENS_A_SIGNAL,
                                norm=list(train.norm)), args.resume, rank)
    if is_finished(run):
        return False
    regressor = build_regressor(run.settings, device).train()
    regressor.backbone.checkpoint_activations = args.checkpoint_activations
    named = regressor.trained()
    optimizer = torch.optim.AdamW(named.values(), betas=(0.9, 0.999), weight_decay=0.0)
    first = list(named.values())                              # the references: all at once
    second = []
    if args.init not in REFERENCES:
        second = list(regressor.output_connector.parameters())
        first = [p for name, p in named.items() if not name.startswith("output_connector.")]

    samples = len(train.signals) * (2 if args.duplicate else 1)
    epoch_steps = math.ceil(samples / args.batch_size)
    steps = count_steps(samples, args)
    validate_every = max(1, round(epoch_steps * args.validate_every))
    x, y = train.signals.to(device), train.parameters.to(device)
    held_x, held_y = held.signals.to(device), held.parameters.to(device)
    held_parts = cut(torch.arange(rank, len(held_x), world, device=device), args.micro_batch)

    def losses(parts, through):
        """through: with gradients through the backbone."""
        for rows in parts:
            with torch.set_grad_enabled(through):
                hidden = regressor.hidden(x[rows])
            yield gaussian_nll(*regressor.head(hidden), y[rows])

    step, best = run.restore(named, optimizer, regressor.fingerprint)
    stopping = False
    with start_bar(run, regressor, steps, step) as bar:
        while True:
            # The state reaches the disk before a validation, which takes a while.
            validating = (step % validate_every == 0 or step == steps) and not stopping
            if validating or stopping or step % args.checkpoint_every == 0:
                run.save(step, best, named, optimizer)
            if validating:
                values = (gaussian_nll(*regressor(held_x[i]), held_y[i]) for i in held_parts)
                best, stopping = validate(run, regressor, values, stop, step, step / epoch_steps,
                                          best)
            if stopping or step == steps:
                break

            began = time.perf_counter()
            rows = batch_rows(samples, args.batch_size, seed, step) % len(x)
            mine = cut(torch.from_numpy(rows[rank::world]).to(device), args.micro_batch)
            what = name_step(step, [train.names[r] for r in rows])
            optimizer.param_groups[0]["lr"] = learning_rate(step, steps, args)
            # First what feeds the backbone, then, with new gradients, what reads it: that needs no
            # gradient through the backbone.
            torch.manual_seed(step_seed(seed, step, rank, 0))     # for dropout
            loss, norm, stopping = update(first, optimizer, losses(mine, True), CLIP["regress"],
                                          stop.requested, what)
            record = {"step": step + 1, "epoch": round((step + 1) / epoch_steps, 4), "loss": loss,
                      "lr": optimizer.param_groups[0]["lr"], "grad_norm": norm}
            if second:
                torch.manual_seed(step_seed(seed, step, rank, 1))
                _, norm, stopping = update(second, optimizer, losses(mine, False), CLIP["regress"],
                                           stop.requested, what)
                record["grad_norm_output"] = norm
            step += 1
            seconds = time.perf_counter() - began
            record_step(run, args, bar, best, record, len(rows), seconds, device)
    return end_run(run, step, steps, best, named, optimizer, stopping)


# -------------------------------------------------------------------------------------- generation


def check_patch(args, sky, device):
    """The patches must tile the slices, and a sublightcone fit what the base can read; how many a
    process takes at once depends on how many cells the ten slices of each have."""
    if sky % args.patch:
        raise ValueError(f"{args.data}: patches of {args.patch} x {args.patch} do not divide its "
                         f"slices of {sky} x {sky}: choose a --patch that divides {sky}")
    K = sky // args.patch
    tokens = WINDOW * (K * (K + 1) + 1)
    config = GENERATION_REFERENCES.get(args.init) or load_config(args.base)
    if tokens > config.max_position_embeddings:
        raise ValueError(f"--patch {args.patch} makes {tokens:,} tokens of a sublightcone, and the "
                         f"backbone reads {config.max_position_embeddings:,}: choose a larger one")
    args.micro_batch = args.micro_batch or max(1, PATCHES[device] * 14**2 // (10 * sky**2))


def ahead(function, items):
    """function(item) of each item; a thread works on the next one meanwhile, so that the model does
    not wait for the disk."""
    with ThreadPoolExecutor(1) as thread:
        ready = None
        for item in items:
            following = thread.submit(function, item)
            if ready:
                yield ready.result()
            ready = following
        if ready:
            yield ready.result()


def generate(args, seed, rank, world, device, stop):
    """Train a generator, or go on with it -> whether a signal stopped it."""
    out, names = choose_lightcones(args, seed, rank, "generation")
    train = SubLightcones(args.data, "train", names=names)
    held = SubLightcones(args.data, "validation", names=names)
    check_patch(args, train.sky, device.type)
    run = Run(out, run_settings(args, seed, device, lightcones=names, T=train.T, sky=train.sky),
              args.resume, rank)
    if is_finished(run):
        return False
    generator = build_generator(run.settings, device).train()
    generator.backbone.checkpoint_activations = args.checkpoint_activations
    named = generator.trained()
    biases = [p for name, p in named.items() if name.endswith("bias")]
    others = [p for name, p in named.items() if not name.endswith("bias")]
    groups = [{"params": others, "weight_decay": WEIGHT_DECAY},
              {"params": biases, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))

    epoch_steps = math.ceil(len(train) / args.batch_size)
    steps = count_steps(len(train), args)
    validate_every = max(1, round(epoch_steps * args.validate_every))
    held_rows = np.random.default_rng(0).permutation(len(held))[:args.eval_samples or None]
    held_keys = [(0, int(i)) for i in np.sort(held_rows)[rank::world]]    # the same at each one

    def draw(step):
        """-> rows of the batch, micro-batches of this process's share of it, perhaps none. Each
        seed has epochs of its own."""
        epoch = 1_000_000 * seed + step // epoch_steps
        rows = batch_rows(len(train), args.batch_size, seed, step)
        keys = [(epoch, int(i)) for i in rows[rank::world]]
        return rows, [generator.draw(train, part) for part in cut(keys, args.micro_batch)]

    def losses(micro_batches):
        for tensors in micro_batches:
            yield generator(*(t.to(device) for t in tensors))

    step, best = run.restore(named, optimizer, generator.fingerprint)
    batches = ahead(draw, range(step, steps))
    waited = 0.0                                              # seconds for data, since `logged`
    logged = time.perf_counter()
    stopping = False
    with start_bar(run, generator, steps, step) as bar:
        while True:
            validating = (step % validate_every == 0 or step == steps) and not stopping
            if validating or stopping or step % args.checkpoint_every == 0:
                run.save(step, best, named, optimizer)
            if validating:
                drawn = ahead(partial(generator.draw, held), cut(held_keys, args.micro_batch))
                best, stopping = validate(run, generator, losses(drawn), stop, step,
                                          step / epoch_steps, best)
            if stopping or step == steps:
                break

            began = time.perf_counter()
            rows, micro_batches = next(batches)
            waited += time.perf_counter() - began
            cones = train.chunks[rows, 0]
            what = name_step(step, [train.names[i] for i in cones])
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, args)
            torch.manual_seed(step_seed(seed, step, rank, 0))     # for dropout
            loss, norm, stopping = update(list(named.values()), optimizer, losses(micro_batches),
                                          CLIP["generate"], stop.requested, what)
            step += 1
            now = time.perf_counter()
            record = {"step": step, "epoch": round(step / epoch_steps, 4), "loss": loss,
                      "lr": optimizer.param_groups[0]["lr"], "grad_norm": norm,
                      "data_wait": round(waited / (now - logged), 4)}
            if step % args.log_every == 0:
                waited = 0.0
                logged = now
            record_step(run, args, bar, best, record, len(rows), now - began, device)
    return end_run(run, step, steps, best, named, optimizer, stopping)


# ----------------------------------------------------------------------------------------- dry run


def estimate(args, device, dtype, sky):
    """Parameters and memory of one process -> dict, from shapes alone. Fake tensors compute
    nothing."""
    regression = args.experiment == "regress"
    reference = args.init in REFERENCES
    config = (REFERENCES if regression else GENERATION_REFERENCES).get(args.init)
    config = replace(config or load_config(args.base), vocab_size=0)
    config.num_hidden_layers = args.blocks or config.num_hidden_layers
    # A GPU's attention is fused and keeps no scores for the backward pass, like a CPU's without
    # dropout.
    config.attention_dropout = args.dropout if device == "cpu" else 0.0
    rows = min(args.micro_batch, args.batch_size)
    with FakeTensorMode(allow_non_fake_inputs=True):
        backbone = Decoder(config).requires_grad_(reference)
        backbone.checkpoint_activations = args.checkpoint_activations
        for p in backbone.parameters():
            p.data = p.data.to(dtype)
        pieces = PROMPTS[args.prompt] if regression else GENERATION_WORDS
        words = {piece: torch.empty(6, config.hidden_size, dtype=dtype)
                 for piece in pieces if is_words(piece) and not reference}
        if regression:
            network = Regressor(backbone, args.prompt, words, args.causal)
            inputs = [torch.empty(rows, TOKENS_A_SIGNAL)]
        else:
            choose_trained(backbone, args.tune, args.rank)
            network = Generator(backbone, words, args.patch, dtype, velocity=args.velocity)
            patches = (rows, WINDOW - 2, (sky // args.patch) ** 2)
            inputs = [torch.empty(rows, WINDOW, sky, sky), torch.empty(rows, 7),
                      torch.empty(*patches, args.patch, args.patch), torch.empty(patches)]
        network.train()
        kept = kept_bytes(lambda: network(*inputs), network, backbone)
    groups = Counter()
    for name, p in network.trained().items():
        group = name.split(".")[0]
        if group == "backbone" and not reference:
            if "norm" in name:
                group = "norms"
            elif "lora_" in name:
                group = "lora"
        groups[group] += p.numel()
    trained = groups.total()
    frozen = sum(p.numel() for p in network.parameters()) - trained
    memory = frozen * dtype.itemsize + trained * 16 + kept    # weight, gradient, AdamW's moments
    memory += LIBRARIES if device == "cpu" else 0
    return {"trainable_parameters": trained, "trainable_by_group": groups,
            "frozen_parameters": frozen, "memory_gb": round(memory / 1e9, 2)}


def dry_run(args):
    """Print parameters, memory and steps as JSON. Without a store, the slices are 140 x 140."""
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16
    if args.init in REFERENCES:
        dtype = torch.float32
    elif device == "cpu" or args.dtype != "auto":
        dtype = resolve_dtype(args.dtype, torch.device(device))
    report = {"device": device, "dtype": str(dtype).removeprefix("torch.")}
    sky = 140
    samples = None
    stored = os.path.exists(args.data)
    if stored and args.experiment == "regress":
        names, _ = data_lightcone.split_names(args.data, "regression")
        samples = report["train_lightcones"] = len(names["train"])
        samples *= 2 if args.duplicate else 1
    elif stored:
        train = SubLightcones(args.data, "train")
        sky = train.sky
        samples = report["train_sublightcones"] = len(train)
    if args.experiment == "generate":
        check_patch(args, sky, device)
        report["sky"] = sky
    report |= estimate(args, device, dtype, sky)
    report["steps"] = samples and count_steps(samples, args)
    print(json.dumps(report, indent=1))


# -------------------------------------------------------------------------------------------- demo


def demo(args):
    """The whole path on the built-in fast simulator: lightcones, the small reference network, the
    evaluation; regress: also a random language-model backbone."""
    regression = args.experiment == "regress"
    out = args.out or ("out/demo-l3m" if regression else "out/demo-generate")
    out = fresh_demo(out, ["lightcones", "small", "random"])
    n = 400
    how = {"sky": 16, "tau_sigma": 1e9, "max_x_hi": 1.0}      # extreme histories, too
    if not regression:
        n = 40
        how = {"bins": 2350, "box": 40.0}                     # cells of 1.43 Mpc, as the paper's
    print(f"1. {n} lightcones of the fast simulator (a stand-in, not 21cmFAST)", flush=True)
    store = out / "lightcones"
    data_lightcone.simulate(store, n, **how)
    common = ["train_l3m.py", args.experiment, "--data", store, "--dropout", 0]
    print("2. The small reference network, trained from scratch", flush=True)
    if regression:
        common += ["--batch-size", 64, "--no-duplicate", "--lr", 3e-3]
        part(*common, "--init", "small", "--epochs", 100, "--out", out / "small")
        print("3. Connectors to two random, frozen blocks of SmolLM2-135M's shape", flush=True)
        part(*common, "--init", "random", "--base", "smollm2-135m", "--blocks", 2, "--epochs", 10,
             "--out", out / "random")
        print("4. Both on the test lightcones, beside the prior mean and a ridge regression",
              flush=True)
        part("eval.py", "regress", out / "small", out / "random")
    else:
        print("   300 steps, a taste of it: a small velocity network, and --carry, which is not\n"
              "   the paper's: without it, slices evolve only after a longer training",
              flush=True)
        part(*common, "--init", "small", "--carry", "--velocity", 16, 32, "--batch-size", 4,
             "--epochs", 1, "--max-steps", 300, "--lr", 2e-3, "--eval-samples", 32,
             "--validate-every", 0.2, "--out", out / "small")
        print("3. A test lightcone, continued twice from two of its slices; lag1: how alike the "
              "structure\n   of neighbouring slices is, drawn and true", flush=True)
        part("eval.py", "generate", out / "small", "--redshifts", 11, 10, 9, "--samples", 2)
    print(f"Everything is in {out}. Next: your own lightcones and a pretrained backbone, see "
          "README.md")


def train(args):
    """A run for each of --seeds, one after the other, until a signal."""
    rank, world, device = start_processes(args.device)
    stop = StopSignal()
    if args.deterministic:
        make_deterministic()
    run_one = regress if args.experiment == "regress" else generate
    for seed in args.seeds:
        if run_one(args, seed, rank, world, device, stop):
            break
    end_processes()


def main(argv=None):
    args = arguments(argv)
    advice = "lower --micro-batch"
    if args.micro_batch:
        advice += f" (now {args.micro_batch})"
    if not args.checkpoint_activations:
        advice += ", or add --checkpoint-activations"
    with one_line(advice):
        if args.dry_run:
            dry_run(args)
        elif args.demo:
            demo(args)
        else:
            train(args)


if __name__ == "__main__":
    main()
