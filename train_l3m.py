"""Train L3M: a language-model backbone with connectors, on 21cm lightcones (arXiv:2506.14757).

`regress`: six parameters from the sky-averaged signal. The backbone is frozen.

    python train_l3m.py regress --demo                                                   # the whole path in two minutes, nothing to download
    python train_l3m.py regress --init pretrained --prompt chat --seeds 0 1 2 3 4        # the paper's: Qwen2.5-0.5B-Instruct, a GPU
    python train_l3m.py regress --init random --blocks 6 --base path/to/SmolLM2-135M-Instruct --batch-size 64 --epochs 100 --lr 1e-3      # a laptop
    python train_l3m.py regress --init small                                             # a reference network, trained from scratch

`generate`: lightcones slice by slice, by conditional flow matching. LoRA and the norms, or the whole backbone, are trained, and a velocity network.

    python train_l3m.py generate --demo                                                  # the whole path in a few minutes, nothing to download
    python train_l3m.py generate --init pretrained --tune lora --rank 8 --seeds 0 1 2    # the paper's: Qwen2.5-0.5B-Instruct, a GPU
    python train_l3m.py generate --init random --blocks 8 --base path/to/SmolLM2-135M-Instruct --batch-size 4 --lr 1e-3 --max-steps 1000 --validate-every 0.1     # a laptop
    python train_l3m.py generate --init small                                            # a reference network, trained from scratch

    torchrun --nproc_per_node=4 train_l3m.py generate ...                                # the same run on four GPUs; --resume goes on with it
    python train_l3m.py generate --dry-run --base qwen2.5-0.5b                           # sizes, without weights or data

- regress: only connectors and trainable tokens learn (26,907 numbers); each batch is seen twice: what feeds the frozen backbone is updated first, then what reads it
- nothing is computed that does not change: no gradients of frozen weights, none through the backbone in the second update, the chat words before the signal once
- every batch and every random draw is a function of (seed, step, rank): a resumed run is the undisturbed run, bit for bit on a CPU
- the noise and the times of flow matching belong to the sublightcone, not to the process: without dropout, process count and --micro-batch change rounding only
- out/EXPERIMENT-INIT-seedN/ gets config.json, metrics.jsonl, checkpoint-*/ and model.safetensors, the weights with the lowest validation loss: evaluate with eval.py
"""
import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from train_lm import (Help, StopSignal, fail, open_metrics, open_run, optimizer_tensors, peak_memory_gb, resolve_dtype, restore, save_checkpoint,  # before torch
                      start_processes, sum_over_processes, sync)
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tqdm import tqdm

import data_lightcone
from connectors import (GENERATION_REFERENCES, GENERATION_WORDS, PROMPTS, REFERENCES, Generator, Regressor, build_generator, build_regressor, choose_trained,
                        gaussian_nll, is_words)
from model import SHAPES, Decoder, load_config

TOKENS_A_SIGNAL = 47
CLIP = {"regress": 30.0, "generate": 1.0}                     # gradient norm of an update
WEIGHT_DECAY = 1e-3                                           # generate: of all but biases; regress: none
# generate: patches of 14 x 14 in one pass. The velocity network keeps 2 MB of each for the backward pass; more than these made a CPU slower.
PATCHES = {"cpu": 160, "cuda": 2000, "mps": 2000}

# ====================================================================================================== settings


def arguments(argv=None):
    p = argparse.ArgumentParser(description="Train a language-model backbone with connectors on 21cm lightcones (arXiv:2506.14757).")
    experiments = p.add_subparsers(dest="experiment", required=True)
    r = experiments.add_parser("regress", help="six parameters from the sky-averaged signal", formatter_class=Help,
                               description="Regress the six parameters of a lightcone from its sky-averaged 21cm signal. The defaults are the paper's.")
    shared_flags(r, "lightcones", batch=1024, epochs="1500; references 40000", warmup=100, decay=100, dropout=0.001,
                 frozen="pretrained or random weights, frozen", micro="its whole share", checkpoint=500)
    r.add_argument("--prompt", choices=list(PROMPTS), default="minimal", help="what surrounds the signal; the chat prompts need a base that knows ChatML")
    r.add_argument("--duplicate", action=argparse.BooleanOptionalAction, default=True, help="an epoch has every lightcone twice; dropout makes the two differ")
    r.add_argument("--published-norm", action="store_true", help="normalise signals by the constants that L3M released instead of by the training set")
    r.add_argument("--causal", action=argparse.BooleanOptionalAction, help="references: with a causal mask, as the released code has it (default: without)")
    g = experiments.add_parser("generate", help="lightcones slice by slice", formatter_class=Help,
                               description="Learn to continue a lightcone slice by slice, patch by patch, by conditional flow matching. The defaults are the paper's.")
    shared_flags(g, "sublightcones (12 slices)", batch=64, epochs="20", warmup=1, decay=2, dropout=0.01,
                 frozen="pretrained or random weights, tuned", micro=f"about {PATCHES['cuda']} patches of 14 x 14; on a CPU {PATCHES['cpu']}", checkpoint=200)
    g.add_argument("--tune", choices=["full", "lora"], help="of the backbone: adapters on all seven projections and the norms, or all its weights (default: lora; references full)")
    g.add_argument("--rank", type=int, help="r of LoRA, alpha = 2r (default: 2; the paper also has 8)")
    g.add_argument("--patch", type=int, default=14, help="side of a patch in cells; must divide the side of the slices")
    g.add_argument("--eval-samples", type=int, default=1024, help="sublightcones of a validation; 0: all")
    args = p.parse_args(argv)
    q, reference = (r if args.experiment == "regress" else g), args.init in REFERENCES
    for name in ("blocks", "batch_size", "micro_batch", "epochs", "max_steps", "checkpoint_every", "log_every", "rank", "patch"):
        if getattr(args, name, None) is not None and getattr(args, name) < 1:
            q.error(f"--{name.replace('_', '-')} must be at least 1")
    if not 0 <= args.dropout < 1 or not args.lr > 0 or not args.validate_every > 0 or min(args.seeds) < 0:
        q.error("--dropout must be in [0, 1), --lr and --validate-every above 0, --seeds not below 0")
    if args.experiment == "regress":
        if reference and (args.prompt != "minimal" or args.blocks):
            q.error(f"--init {args.init} is a network of its own, without words: it has neither --blocks nor a chat --prompt")
        if args.causal is not None and not reference:
            q.error("--causal and --no-causal are for the references (--init small or large); a language model is causal")
        args.causal = not reference if args.causal is None else args.causal
        args.epochs, longest = args.epochs or (40000 if reference else 1500), {"warmup": 100, "decay": 100}
    else:
        if reference and (args.blocks or args.tune == "lora"):
            q.error(f"--init {args.init} is a network of its own, trained whole: it has neither --blocks nor --tune lora")
        args.tune = args.tune or ("full" if reference else "lora")
        if args.rank and args.tune == "full":
            q.error("--rank is of the adapters of --tune lora; here all weights are trained")
        args.rank = args.rank or (2 if args.tune == "lora" else None)
        args.epochs, longest = args.epochs or 20, {"warmup": 1, "decay": 2}
    for name, epochs in longest.items():
        if getattr(args, name) is None:
            setattr(args, name, min(epochs, args.epochs / 10))
    if args.warmup < 0 or args.decay < 0 or args.warmup + args.decay > args.epochs:
        q.error(f"--warmup {args.warmup:g} and --decay {args.decay:g} do not fit into --epochs {args.epochs}")
    return args


def shared_flags(q, unit, batch, epochs, warmup, decay, dropout, frozen, micro, checkpoint):
    """What both experiments have, with the defaults of this one."""
    q.add_argument("--init", choices=["pretrained", "random", "small", "large"], default="pretrained",
                   help=f"backbone: {frozen}; or a small or large reference network trained from scratch")
    q.add_argument("--base", default="Qwen/Qwen2.5-0.5B-Instruct", help=f"model directory or hub id; without words and for --dry-run also {', '.join(SHAPES)}")
    q.add_argument("--blocks", type=int, help="the first N blocks of a pretrained backbone, or any number of random ones (default: all of the base)")
    q.add_argument("--data", default="data/lightcones.h5", help="a store of data_lightcone.py" + (", or an .npz of signals" if q.prog.endswith("regress") else ""))
    q.add_argument("--batch-size", type=int, default=batch, help=f"{unit} a step, over all processes")
    q.add_argument("--micro-batch", type=int, help=f"{unit} in one pass of a process (default: {micro}); lower it if memory runs out")
    q.add_argument("--epochs", type=int, help=f"passes over the training set (default: {epochs})")
    q.add_argument("--max-steps", type=int, help="end after so many steps; warm-up and decay shrink in proportion")
    q.add_argument("--lr", type=float, default=5e-5, help="highest learning rate")
    q.add_argument("--warmup", type=float, help=f"epochs with a linearly rising learning rate (default: {warmup}, at most a tenth of --epochs)")
    q.add_argument("--decay", type=float, help=f"last epochs, over which it falls as a cosine (default: {decay}, at most a tenth of --epochs)")
    q.add_argument("--dropout", type=float, default=dropout, help="of the attention")
    q.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run each, one after the other; the split of the data is the same")
    q.add_argument("--validate-every", type=float, default=1, help="epochs between validations, also a fraction")
    q.add_argument("--checkpoint-every", type=int, default=checkpoint, help="steps between checkpoints")
    q.add_argument("--log-every", type=int, default=10, help="steps between lines of metrics.jsonl")
    q.add_argument("--checkpoint-activations", action="store_true", help="less memory: compute each block again in the backward pass")
    q.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help="of the language model; auto: bfloat16 where it is fast")
    q.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    q.add_argument("--deterministic", action="store_true", help="bit-exact repetition on CUDA, too; slower")
    q.add_argument("--out", help=f"run directory, with -seedN behind it if there are several seeds (default: out/{q.prog.split()[-1]}-INIT-seedN)")
    q.add_argument("--resume", action="store_true", help="go on with the run in --out (or start it, if there is none)")
    q.add_argument("--dry-run", action="store_true", help="print sizes, memory and steps as JSON and stop: no weights needed")
    q.add_argument("--demo", action="store_true", help="the whole path on simulated lightcones; minutes")


def run_settings(args, seed, dtype, **data):
    """What must not change over the life of a run, and all that an evaluation needs to know."""
    reference = args.init in REFERENCES
    base = None if reference else os.path.abspath(args.base) if os.path.isdir(args.base) else args.base
    references, own = {"regress": (REFERENCES, ("prompt", "duplicate", "causal")),
                       "generate": (GENERATION_REFERENCES, ("tune", "rank", "patch", "eval_samples"))}[args.experiment]
    kept = ("experiment", "init", "blocks", *own, "batch_size", "epochs", "max_steps", "lr", "warmup", "decay", "dropout", "validate_every", "deterministic")
    return {k: getattr(args, k) for k in kept} | {
        "base": base, "hidden_size": (references[args.init] if reference else load_config(base)).hidden_size, "data": os.path.abspath(args.data), **data,
        "seed": seed, "split_seed": 0, "dtype": "float32" if reference else str(dtype).removeprefix("torch.")}


def batch_rows(n, batch_size, seed, step):
    """Numbers (below n) of the samples of 0-based `step`: each epoch is a permutation of its own, cut into batches, the last one smaller."""
    epoch, i = divmod(step, math.ceil(n / batch_size))
    return np.random.default_rng([seed, epoch]).permutation(n)[i * batch_size:(i + 1) * batch_size]


def learning_rate(step, steps, args):
    """Of 0-based `step`: up linearly, constant, down a cosine; warm-up and decay are the fractions warmup / epochs and decay / epochs of the run."""
    warmup, decay = (round(steps * part / args.epochs) for part in (args.warmup, args.decay))
    if step < warmup:
        return args.lr * (step + 1) / warmup
    return args.lr * (1 + math.cos(math.pi * max(0, step - (steps - decay)) / max(1, decay))) / 2


def count_steps(n, args):
    return min(args.epochs * math.ceil(n / args.batch_size), args.max_steps or sys.maxsize)


# ====================================================================================================== training


def begin(args):
    """-> rank, number of processes, device, dtype of the backbone."""
    rank, world, device = start_processes(args.device)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return rank, world, device, resolve_dtype(args.dtype, device)


class Run:
    """What a run carries besides its model: where it writes, how many steps it has, which process this is."""

    def __init__(self, args, settings, samples, rank, world, device, stop):
        self.args, self.settings, self.seed = args, settings, settings["seed"]
        self.rank, self.world, self.device, self.stop = rank, world, device, stop
        out = args.out or f"out/{args.experiment}-{args.init}"
        self.out = Path(out if args.out and len(args.seeds) == 1 else f"{out}-seed{self.seed}")
        self.per_epoch = math.ceil(samples / args.batch_size)
        self.steps = count_steps(samples, args)


def open_directory(run, **sizes):
    """Print the settings, open_run of the first process -> the newest checkpoint, or None, in every process."""
    found = [None]
    if run.rank == 0:
        print(json.dumps(run.settings | {"processes": run.world, "device": str(run.device), "steps": run.steps, **sizes}, indent=1), flush=True)
        found = [open_run(run.out, run.settings, run.args.resume)]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    return found[0]


def save_best(run, model, step, loss):
    """out/model.safetensors: the trained tensors of the lowest validation loss so far, whole or not at all."""
    temporary, final = run.out / "tmp-model.safetensors", run.out / "model.safetensors"
    try:
        save_file({name: p.detach().cpu().contiguous() for name, p in model.trained().items()}, temporary,
                  metadata={"step": str(step), "validation_loss": str(loss), "fingerprint": str(model.fingerprint)})
        sync(temporary)
    except Exception as e:                                    # safetensors reports a full disk as an error of its own
        temporary.unlink(missing_ok=True)
        raise OSError(f"{final} could not be written ({e}); free some space, then --resume: the last checkpoint is whole") from None
    os.replace(temporary, final)


def fit(run, checkpoint, model, optimizer, batches, loss, validate, clip):
    """The training loop -> whether it came to its end (False: stopped by a signal).

    model: has trained() {name: parameter}, groups() lists of names, updated one after the other on each batch, and a fingerprint of what is frozen.
    batches(step): iterator over (tensors of this process's share, possibly of length 0; ids of the whole batch) from `step` on.
    loss(group, *tensors) -> (n,) losses, differentiable with respect to that group of parameters. validate() -> mean validation loss."""
    args, main, named = run.args, run.rank == 0, model.trained()
    step, best = 0, None
    if checkpoint:
        state = restore(checkpoint, named, optimizer)
        step, best = state["step"], state["best"]
        if state["fingerprint"] != model.fingerprint:
            raise ValueError(f"{run.out} was trained with another backbone than {run.settings['base']} now gives: its files, or torch's random numbers, have changed")
    if main:
        print(f"{run.out}: {sum(p.numel() for p in named.values()):,} trained parameters; "
              f"{'resumed after' if checkpoint else 'starting at'} step {step} of {run.steps}", flush=True)
        metrics = open_metrics(run.out, step)

    # For each group one flat buffer: all its gradients and, behind them, the three sums that go round with them in one all_reduce.
    groups = [{name: named[name] for name in names} for names in model.groups()]
    flats = [torch.zeros(sum(p.numel() for p in group.values()) + 3, device=run.device) for group in groups]
    views = [[g.view_as(p) for p, g in zip(group.values(), flat[:-3].split([p.numel() for p in group.values()]))] for group, flat in zip(groups, flats)]

    def validate_now():
        nonlocal best
        value = validate()
        if best is None or value < best["validation_loss"]:
            best = {"step": step, "validation_loss": value}
            if main:
                save_best(run, model, step, value)
        if main:
            metrics.write(json.dumps({"step": step, "epoch": round(step / run.per_epoch, 4), "validation_loss": value}) + "\n")
            shown["validation"] = f"{value:.4f}"

    def checkpoint_now():
        if main:
            state = {"step": step, "best": best, "fingerprint": model.fingerprint, "settings": run.settings}
            save_checkpoint(run.out, step, optimizer_tensors(named, optimizer), state)

    shown, waited, logged = {}, 0.0, time.perf_counter()       # seconds since `logged` that the model waited for data
    validate_at = max(1, round(run.per_epoch * args.validate_every))
    with tqdm(total=run.steps, initial=step, disable=not main, desc=run.out.name, unit="step", dynamic_ncols=True) as bar:
        if checkpoint is None:
            validate_now()
            checkpoint_now()
        share = batches(step)
        while step < run.steps:
            began = time.perf_counter()
            tensors, ids = next(share)
            waited += time.perf_counter() - began
            model.train()
            losses, norms, stopping = [], [], False
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, run.steps, args)
            for i, (group, flat, view) in enumerate(zip(groups, flats, views)):
                torch.manual_seed(int(np.random.SeedSequence([run.seed, step, run.rank, i]).generate_state(1)[0]))     # for dropout
                flat.zero_()
                for p, g in zip(group.values(), view):
                    p.grad = g
                for part in zip(*(t.split(args.micro_batch or len(t) or 1) for t in tensors)) if len(tensors[0]) else ():
                    values = loss(i, *part)
                    torch.autograd.backward(values.sum(), inputs=list(group.values()))           # adds to p.grad, that is to `flat`
                    flat[-3] += values.detach().sum()
                    flat[-2] += len(values)
                flat[-1] = float(run.stop.requested)
                sum_over_processes(flat)
                total, n, asked = flat[-3:].tolist()
                gradient = flat[:-3].div_(n)
                losses, norms, stopping = losses + [total / n], norms + [gradient.norm().item()], stopping or asked > 0
                if not (math.isfinite(losses[-1]) and math.isfinite(norms[-1])):
                    raise ValueError(f"the loss of step {step + 1} is {losses[-1]}, its gradient norm {norms[-1]}: stopped before the update. Its lightcones are "
                                     f"the rows {', '.join(map(str, ids[:20]))}{' ...' if len(ids) > 20 else ''} of {args.data}. Lower --lr; the last checkpoint is whole")
                gradient.mul_(min(1.0, clip / (norms[-1] + 1e-6)))
                optimizer.step()                                                                 # passes over parameters without a gradient
                optimizer.zero_grad(set_to_none=True)
            step += 1
            if main:
                epoch, rate = step / run.per_epoch, len(ids) / (time.perf_counter() - began)
                if step % args.log_every == 0 or step in (1, run.steps):
                    record = {"step": step, "epoch": round(epoch, 4), "loss": losses[0], "lr": optimizer.param_groups[0]["lr"], "grad_norm": norms[0]}
                    record |= {"grad_norm_output": norms[1]} if len(norms) > 1 else {}
                    record |= {"samples_per_s": round(rate, 1), "data_wait": round(waited / (time.perf_counter() - logged), 4), "memory_gb": round(peak_memory_gb(run.device), 3)}
                    metrics.write(json.dumps(record) + "\n")
                    waited, logged = 0.0, time.perf_counter()
                bar.set_postfix(epoch=f"{epoch:.1f}", loss=f"{losses[0]:.4f}", **shown, refresh=False)
                bar.update()
            if step % validate_at == 0 or step == run.steps:
                validate_now()
            if step % args.checkpoint_every == 0 or step == run.steps or stopping:
                checkpoint_now()
            if stopping and step < run.steps:
                if main:
                    print(f"stopped after step {step} of {run.steps}; go on with --resume", flush=True)
                return False
    if main:
        print(f"{run.out}/model.safetensors is the network after step {best['step']}, of the lowest validation loss, {best['validation_loss']:.4f}\n"
              f"evaluate: python eval.py {args.experiment} {run.out}", flush=True)
    return True


# ==================================================================================================== regression


def regress(args):
    (rank, world, device, dtype), stop = begin(args), StopSignal()
    norm = data_lightcone.PUBLISHED_NORM if args.published_norm else None
    train, validation = (data_lightcone.GlobalSignals(args.data, split, tokens=TOKENS_A_SIGNAL, norm=norm) for split in ("train", "validation"))
    if rank == 0:
        print(train.note, flush=True)
    x, y, held_x, held_y = (t.to(device) for t in (train.signals, train.parameters, validation.signals, validation.parameters))
    samples = len(x) * (2 if args.duplicate else 1)

    for seed in args.seeds:
        settings = run_settings(args, seed, dtype, tokens=TOKENS_A_SIGNAL, norm=list(train.norm))
        run = Run(args, settings, samples, rank, world, device, stop)
        checkpoint = open_directory(run, train=len(x), validation=len(held_x))
        regressor = build_regressor(settings, device)
        regressor.backbone.checkpoint_activations = args.checkpoint_activations
        optimizer = torch.optim.AdamW(regressor.trained().values(), lr=args.lr, betas=(0.9, 0.999), weight_decay=0.0)

        def batches(step):
            while True:
                rows = batch_rows(samples, args.batch_size, seed, step) % len(x)
                mine = torch.from_numpy(rows[rank::world].copy()).to(device)
                yield (x[mine], y[mine]), train.rows[rows]
                step += 1

        def loss(group, signals, truth):
            with torch.set_grad_enabled(group == 0):                        # the output connector's update needs no gradient through the backbone
                hidden = regressor.hidden(signals)
            return gaussian_nll(*regressor.head(hidden), truth)

        @torch.no_grad()
        def validate():
            regressor.eval()
            sums = torch.zeros(2, device=device)
            for part in torch.arange(rank, len(held_x), world, device=device).split(args.micro_batch or args.batch_size):
                sums += torch.stack([gaussian_nll(*regressor(held_x[part]), held_y[part]).sum(), torch.tensor(float(len(part)), device=device)])
            total, n = sum_over_processes(sums).tolist()
            return total / n

        if not fit(run, checkpoint, regressor, optimizer, batches, loss, validate, CLIP["regress"]):
            break


# ==================================================================================================== generation


def check_patch(args, sky, device):
    """The patches must tile the slices; how many sublightcones a process takes at once depends on how many cells the 10 slices of each have."""
    if sky % args.patch:
        raise ValueError(f"{args.data}: patches of {args.patch} x {args.patch} do not divide its slices of {sky} x {sky}: choose a --patch that divides {sky}")
    args.micro_batch = args.micro_batch or max(1, PATCHES[device] * 14**2 // (10 * sky**2))


def ahead(function, items):
    """function(item) of each item; a thread works on the next one meanwhile, so that the model does not wait for the disk."""
    with ThreadPoolExecutor(1) as thread:
        ready = None
        for item in items:
            following = thread.submit(function, item)
            if ready:
                yield ready.result()
            ready = following
        if ready:
            yield ready.result()


def generate(args):
    (rank, world, device, dtype), stop = begin(args), StopSignal()
    train, validation = (data_lightcone.SubLightcones(args.data, split) for split in ("train", "validation"))
    check_patch(args, train.sky, device.type)
    if rank == 0:
        print(train.note, flush=True)
    held = np.sort(np.random.default_rng(0).permutation(len(validation))[:args.eval_samples or None])[rank::world]
    held = [held[i:i + args.micro_batch] for i in range(0, len(held), args.micro_batch)]

    for seed in args.seeds:
        settings = run_settings(args, seed, dtype, T=train.T, sky=train.sky, usable=train.usable)
        run = Run(args, settings, len(train), rank, world, device, stop)
        checkpoint = open_directory(run, train=len(train), validation=len(validation), train_lightcones=len(train.rows), micro_batch=args.micro_batch)
        generator = build_generator(settings, device)
        generator.backbone.checkpoint_activations = args.checkpoint_activations
        biases, others = ([p for name, p in generator.trained().items() if name.endswith("bias") == wanted] for wanted in (True, False))
        optimizer = torch.optim.AdamW([{"params": others, "weight_decay": WEIGHT_DECAY}, {"params": biases, "weight_decay": 0.0}], lr=args.lr, betas=(0.9, 0.999))

        def batch(step):
            numbers = batch_rows(len(train), args.batch_size, seed, step)
            mine = [(1_000_000 * seed + step // run.per_epoch, int(i)) for i in numbers[rank::world]]                 # epochs of their own for each seed
            return generator.draw(train, mine) or [torch.empty(0)], train.rows[np.searchsorted(train.first, numbers, side="right") - 1]

        def batches(step):
            for tensors, rows in ahead(batch, range(step, run.steps)):
                yield [t.to(device) for t in tensors], rows

        def loss(group, slices, conditions, noise, t):
            return generator(slices, conditions, noise, t)

        @torch.no_grad()
        def validate():
            generator.eval()
            sums = torch.zeros(2, device=device)
            for tensors in ahead(lambda numbers: generator.draw(validation, [(0, int(i)) for i in numbers]), held):   # the same draws at each validation
                losses = generator(*(t.to(device) for t in tensors))
                sums += torch.stack([losses.sum(), losses.new_tensor(len(losses))])
            total, n = sum_over_processes(sums).tolist()
            return total / n

        if not fit(run, checkpoint, generator, optimizer, batches, loss, validate, CLIP["generate"]):
            break


# ======================================================================================================= dry run


def kept_bytes(forward, model):
    """What autograd keeps of forward() for the backward pass, beside the model's own tensors, bytes. On the meta device: nothing is computed."""
    own, kept = {id(t) for t in (*model.parameters(), *model.buffers())}, {}
    def note(t):
        if id(t) not in own and not (t._base is not None and id(t._base) in own):
            kept[t.untyped_storage()._cdata] = t.untyped_storage()
        return t
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


def regress_dry_run(args):
    """Parameters by group, memory and steps, from shapes alone. The memory is of a process that is alone, from above: attention counts as written out."""
    reference = args.init in REFERENCES
    config = REFERENCES[args.init] if reference else load_config(args.base)
    config = replace(config, vocab_size=0, num_hidden_layers=args.blocks or config.num_hidden_layers)
    with torch.device("meta"):
        dtype = torch.float32 if reference or args.dtype == "float32" else torch.bfloat16
        backbone = Decoder(config).requires_grad_(reference).to(dtype)
        words = {piece: torch.empty(6, config.hidden_size, dtype=dtype) for piece in PROMPTS[args.prompt] if is_words(piece)}
        regressor = Regressor(backbone, args.prompt, words)
    groups = {"input_connector": 0, "output_connector": 0, "tokens": 0, "backbone": 0}
    for name, p in regressor.trained().items():
        groups[name.split(".")[0]] += p.numel()
    frozen = sum(p.numel() for p in regressor.parameters() if not p.requires_grad)
    rows, length = args.micro_batch or args.batch_size, TOKENS_A_SIGNAL + sum(6 if is_words(piece) else 1 for piece in regressor.pieces)
    kept = kept_bytes(lambda: regressor.hidden(torch.empty(rows, TOKENS_A_SIGNAL, device="meta")), regressor)
    if args.checkpoint_activations:                           # the input of each block, and the insides of one
        kept = kept / config.num_hidden_layers + config.num_hidden_layers * rows * length * config.hidden_size * regressor.dtype.itemsize
    memory = frozen * 2 + sum(groups.values()) * 16 + kept
    samples = steps = None
    if os.path.exists(args.data):
        train = data_lightcone.GlobalSignals(args.data, "train", tokens=TOKENS_A_SIGNAL)
        samples = len(train)
        steps = count_steps(samples * (2 if args.duplicate else 1), args)
    print(json.dumps({"config": {**vars(args), "model": vars(config)}, "trainable_parameters": sum(groups.values()), "trainable_by_group": groups,
                      "frozen_parameters": frozen, "memory_gb": round(memory / 1e9, 2), "train_lightcones": samples, "steps": steps}, indent=1))


def generate_dry_run(args):
    """As regress_dry_run; without a store, for slices of 140 x 140."""
    reference, sky, samples = args.init in REFERENCES, 140, None
    if os.path.exists(args.data):
        train = data_lightcone.SubLightcones(args.data, "train")
        sky, samples = train.sky, len(train)
    check_patch(args, sky, args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    config = GENERATION_REFERENCES[args.init] if reference else load_config(args.base)
    config = replace(config, vocab_size=0, num_hidden_layers=args.blocks or config.num_hidden_layers)
    dtype = torch.float32 if reference or args.dtype == "float32" else torch.bfloat16
    rows = min(args.micro_batch, args.batch_size)
    with torch.device("meta"):
        backbone = Decoder(config).requires_grad_(False).to(dtype)
        choose_trained(backbone, args.tune, args.rank)
        generator = Generator(backbone, {} if reference else {piece: torch.empty(6, config.hidden_size) for piece in GENERATION_WORDS}, args.patch, dtype)
        groups = {}
        for name, p in generator.trained().items():
            part = name.split(".")[0]
            part = "lora" if "lora_" in name else "norms" if "norm" in name and part == "backbone" else part
            groups[part] = groups.get(part, 0) + p.numel()
        frozen = sum(p.numel() for p in generator.parameters() if not p.requires_grad)
        cast = sum(p.numel() for p in backbone.parameters() if p.dim() == 2) * dtype.itemsize if args.tune == "full" and dtype != torch.float32 else 0
        backbone.to(dtype)                                    # autocast does not know the meta device
        patches = 10, (sky // args.patch) ** 2
        batch = torch.empty(rows, 12, sky, sky), torch.empty(rows, 7), torch.empty(rows, *patches, args.patch, args.patch), torch.empty(rows, *patches)
        attention = kept_bytes(lambda: generator.patch_conditions(*batch[:2]), generator)
        velocity = kept_bytes(lambda: generator(*batch), generator) - attention
    if args.checkpoint_activations:                           # the input of each block, and the insides of one
        tokens = rows * generator.embed(*batch[:2])[0].shape[1]
        attention = attention / config.num_hidden_layers + config.num_hidden_layers * tokens * config.hidden_size * dtype.itemsize
    memory = frozen * dtype.itemsize + sum(groups.values()) * 16 + cast + attention + velocity
    print(json.dumps({"config": {**vars(args), "model": vars(config)}, "trainable_parameters": sum(groups.values()), "trainable_by_group": groups,
                      "frozen_parameters": frozen, "sky": sky, "memory_gb": round(memory / 1e9, 2), "train_sublightcones": samples,
                      "steps": samples and count_steps(samples, args)}, indent=1))


# ========================================================================================================== demo


def demo_store(out, n):
    """A fresh directory `out` with a store of n small lightcones -> (the store, this script, eval.py)."""
    shutil.rmtree(out, ignore_errors=True)
    print(f"1. {n} lightcones of the fast simulator (a stand-in, not 21cmFAST), extreme histories kept", flush=True)
    data_lightcone.simulate(out / "lightcones.h5", n, sky=16, tau_sigma=1e9, max_x_hi=1.0)
    script = Path(__file__).resolve()
    return out / "lightcones.h5", script, script.with_name("eval.py")


def regress_demo(args):
    """The whole path on the built-in fast simulator: lightcones, the small reference, a random language-model backbone, the table and the figures."""
    out = Path(args.out or "out/demo-l3m")
    store, script, evaluation = demo_store(out, 400)
    common = [sys.executable, script, "regress", "--data", store, "--batch-size", "64", "--dropout", "0", "--no-duplicate"]
    print("2. The small reference network, trained from scratch", flush=True)
    subprocess.run([*common, "--init", "small", "--epochs", "100", "--lr", "3e-3", "--out", out / "small"], check=True)
    print("3. Connectors to two random, frozen blocks of SmolLM2-135M's shape", flush=True)
    subprocess.run([*common, "--init", "random", "--base", "smollm2-135m", "--blocks", "2", "--epochs", "10", "--lr", "3e-3", "--out", out / "random"], check=True)
    print("4. Both on the test lightcones, beside the prior mean and a ridge regression", flush=True)
    subprocess.run([sys.executable, evaluation, "regress", out / "small", out / "random"], check=True)
    print(f"Everything is in {out}. Next: your own lightcones and a pretrained backbone, see README.md")


def generate_demo(args):
    """The whole path on the built-in fast simulator: lightcones, the small reference, slices that it generates beside the truth."""
    out = Path(args.out or "out/demo-generate")
    store, script, evaluation = demo_store(out, 100)
    print("2. The small reference network, trained from scratch: 250 small batches, a taste of it", flush=True)
    subprocess.run([sys.executable, script, "generate", "--init", "small", "--data", store, "--patch", "8", "--batch-size", "4", "--max-steps", "250", "--epochs", "2",
                    "--lr", "1e-3", "--dropout", "0", "--eval-samples", "64", "--validate-every", "0.3", "--out", out / "small"], check=True)
    print("3. Test lightcones, continued from two of their slices at redshifts 16, 12, 10 and 8", flush=True)
    subprocess.run([sys.executable, evaluation, "generate", out / "small"], check=True)
    print(f"Everything is in {out}. Next: your own lightcones and a pretrained backbone, see README.md")


COMMANDS = {"regress": (regress_dry_run, regress_demo, regress), "generate": (generate_dry_run, generate_demo, generate)}


def main(argv=None):
    args = arguments(argv)
    dry_run, demo, train = COMMANDS[args.experiment]
    try:
        (dry_run if args.dry_run else demo if args.demo else train)(args)
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
    except subprocess.CalledProcessError as e:
        fail(f"a part of the demo failed, see above ({Path(e.cmd[1]).name})")
    except (ValueError, OSError) as e:
        fail(e)
    except RuntimeError as e:                                 # torch.OutOfMemoryError is one
        if isinstance(e, torch.OutOfMemoryError) or "not enough memory" in str(e) or "can't allocate memory" in str(e):
            fail(f"out of memory: lower --micro-batch (now {args.micro_batch or args.batch_size})"
                 + ("" if args.checkpoint_activations else ", or add --checkpoint-activations"))
        raise


if __name__ == "__main__":
    main()
