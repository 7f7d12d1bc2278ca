"""Fine-tune a Llama on arXiv abstracts: LoRA (arXiv:2106.09685) on a 4-bit base (arXiv:2305.14314), the recipe of FeynTune (arXiv:2508.03716).

    python train_lm.py --demo                                             # the whole path in three minutes, nothing to download
    python train_lm.py --subset s1 --base path/to/model --batch-size 8    # one process: a GPU, or a laptop with a small model
    torchrun --nproc_per_node=3 train_lm.py --subset s3                   # the paper's run: Llama-3.1-8B on three GPUs
    torchrun --nproc_per_node=3 train_lm.py --subset s3 --resume          # go on where it was stopped, killed or pre-empted
    python train_lm.py --dry-run --base llama-3.1-8b                      # sizes and memory, without weights or data

- a step is --batch-size abstracts over all processes, laid end to end without padding; its loss is the mean over all their tokens
- every batch and every random draw is a function of (seed, step, rank): a resumed run is the undisturbed run, bit for bit on a CPU
- float32 adapters, AdamW, linear warm-up then cosine; the validation loss ten times a run, on the run's own set and on hep-th (s1)
- out/SUBSET-LORA/ gets config.json, metrics.jsonl, checkpoint-*/ and, at the end, adapter/ in peft's format: evaluate with eval.py
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

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")           # before torch: threads that spin for long make a busy CPU ten times slower,
os.environ.setdefault("GOMP_SPINCOUNT", "4000")               # threads that never spin a quiet one by a quarter
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import data_arxiv
from data_arxiv import bounded, lock, one_line, reading, writing
from lora import inject, save_adapter
from model import SHAPES, CausalLM, Config, bos_eos, generate, init_weights, load_config, load_pretrained, load_tokenizer, save_pretrained, token_nll

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
        raise ValueError("--device cuda, but torch sees no CUDA device; use --device cpu, or install "
                         "a CUDA build of torch")
    if "RANK" not in os.environ:
        return 0, 1, torch.device(device)
    if device == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise ValueError(f"torchrun started process {local + 1} on a machine with "
                             f"{torch.cuda.device_count()} GPUs: lower --nproc_per_node")
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    backend = "nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=2))     # the first may download long
    return dist.get_rank(), dist.get_world_size(), torch.device(device)


def end_processes():
    """Leave torchrun's other processes, after a whole run or a stopped one."""
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

    The training loop then saves and leaves. A second Ctrl-C kills. Under nohup SIGHUP is ignored."""

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
    gradient = flat[:-3].div_(count)                          # of the mean, by any number of processes
    norm = gradient.norm().item()
    if not math.isfinite(total + norm):
        raise ValueError(f"the loss of {what} is {total / count}, its gradient norm {norm}: stopped "
                         "before the update. Look at these, or lower --lr; the last checkpoint is whole")
    gradient.mul_(min(1.0, clip / (norm + 1e-6)))
    optimizer.step()                                          # passes over what has no gradient
    optimizer.zero_grad(set_to_none=True)
    return total / count, norm, asked > 0


PATHS = ("base", "data")                                      # settings that may change: places
WRITTEN = ("config.json", "rows.npz", "metrics.jsonl", "*.safetensors")


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
            for left in (p for name in WRITTEN for p in self.out.rglob(f".{name}.*.tmp")):
                left.unlink()                                 # of a kill in the middle of writing
            found = self.find(resume)
            self.write_config(found[0], data)
        if dist.is_initialized():
            dist.broadcast_object_list(found)
        self.checkpoint, self.state = found

    def find(self, resume):
        """-> [path, state] of the newest whole checkpoint, [None, None] where there is none."""
        old = [p for p in self.out.glob("checkpoint-*/state.json") if p.parent.name[11:].isdigit()]
        candidates = [p for p in (self.newest, self.previous) if p.exists()]
        if not resume and (candidates or old):
            raise ValueError(f"{self.out} already holds a run: add --resume to go on with it, or "
                             "choose another --out")
        if old and not candidates:
            raise ValueError(f"{self.out} holds a run of an older version of this program, in "
                             f"{old[0].parent.name}/ and the like: start anew in another --out")
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
            raise ValueError(f"no whole checkpoint is left: {'; '.join(damage)}. Put a copy of one in "
                             "its place, or choose another --out")
        return [None, None]

    def write_config(self, checkpoint, data):
        """Compare the settings with those the run was started with, and write where it is now."""
        path = self.out / "config.json"
        settings = json.loads(json.dumps(self.settings))      # as JSON gives them back
        if checkpoint:
            with reading(path, "put back the one that the run was started with"):
                config = json.loads(path.read_text())
                old = dict(config["settings"])
            data = config.get("data")
            changed = [f"{key} was {reprlib.repr(old.get(key))}, now {reprlib.repr(settings.get(key))}"
                       for key in sorted(old | settings)
                       if key not in PATHS and old.get(key) != settings.get(key)]
            if changed:
                raise ValueError(f"{self.out} was started with other settings: {'; '.join(changed)}. "
                                 "Resume with the old ones, or choose another --out")
        config = {"settings": settings, "directory": os.path.abspath(self.out)}
        if data is not None:
            config["data"] = data
        with writing(path) as temporary:
            temporary.write_text(json.dumps(config, indent=1))

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
            with reading(self.checkpoint, "is it of another run?"):
                tensors, _ = read_checkpoint(self.checkpoint)
                for name, p in named.items():
                    p.copy_(tensors.pop(name))
                for key, value in tensors.items():
                    name, _, part = key.rpartition("/")
                    device = named[name].device if value.dim() else "cpu"
                    optimizer.state[named[name]][part] = value.to(device)
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
        state = {"step": step, "best": best, "fingerprint": self.fingerprint, "finished": finished,
                 "checksum": checksum(tensors)}
        metadata = {"state": json.dumps(state, sort_keys=True)}          # several keys: random order
        with writing(self.newest) as temporary:
            save_file(tensors, temporary, metadata=metadata)
            if self.newest.exists():                          # a kill here leaves the one before
                os.replace(self.newest, self.previous)
        self.saved = step

    @staticmethod
    def close():
        """Let other jobs into the directory; the end of the process does so, too."""
        if Run.held is not None:
            os.close(Run.held)
            Run.held = None


def checksum(tensors):
    """crc32 of the bytes of {name: CPU tensor}, in the order of the names."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), crc)
    return crc


def read_checkpoint(path):
    """-> ({name: tensor}, state) of a checkpoint; ValueError if it is not as it was written."""
    with reading(path, "it is damaged"):
        with safe_open(path, framework="pt") as file:
            state = json.loads(file.metadata()["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}      # noqa: SIM118
        if checksum(tensors) != state["checksum"]:
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
        raise ValueError(f"{directory} is no run: it has no config.json; give the --out of a training")
    with reading(path, "give the --out of train_lm.py or train_l3m.py"):
        config = json.loads(path.read_text())
        settings = dict(config["settings"])
        was = config["directory"]
    kind = settings.get("experiment", "lm")
    if experiment and kind != experiment:
        command = "perplexity" if kind == "lm" else kind
        raise ValueError(f"{directory} is another experiment's run: python eval.py {command} {directory}")
    result = "adapter/adapter_model.safetensors" if kind == "lm" else "model.safetensors"
    if experiment and not (directory / result).is_file():
        raise ValueError(f"{directory} has no {result} yet: go on with the training by --resume")
    for key in PATHS:
        place = settings.get(key)
        if place and os.path.isabs(place) and not os.path.exists(place):
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


# ====================================================================================================== settings


def arguments(argv=None):
    p = argparse.ArgumentParser(description="Fine-tune a Llama with LoRA on arXiv abstracts (arXiv:2508.03716). The defaults are the paper's.",
                                formatter_class=Help)
    p.add_argument("--base", default="meta-llama/Llama-3.1-8B", help=f"model directory or hub id; with --dry-run also {', '.join(SHAPES)}")
    p.add_argument("--data", default="data/arxiv", help="directory that data_arxiv.py prepare wrote")
    p.add_argument("--subset", default="s3", help="s1..s10, own, a category, or a recipe such as hep-th:0.7+gr-qc:0.15")
    p.add_argument("--lora", default="all", help="adapted matrices: qkv, all, or names such as q_proj,v_proj")
    p.add_argument("--rank", type=int, default=8, help="r of LoRA")
    p.add_argument("--alpha", type=float, default=32, help="the adapter is scaled by alpha / rank")
    p.add_argument("--dropout", type=float, default=0.05, help="on the adapter's input")
    p.add_argument("--quantize", choices=["nf4", "none"], default="nf4", help="the frozen base in 4 bits or in 16")
    p.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help="of the computation; auto: bfloat16 where it is fast")
    p.add_argument("--batch-size", type=int, default=48, help="abstracts a step, over all processes")
    p.add_argument("--micro-batch", type=int, default=8, help="abstracts in one forward pass, gradients accumulate; lower it if memory runs out: the same gradient, up to rounding and dropout's draws")
    p.add_argument("--checkpoint-activations", action="store_true", help="keep each block's input only and compute the block again in the backward pass: a fraction of the memory, 4/3 of the time")
    p.add_argument("--epochs", type=int, default=4)
    p.add_argument("--max-steps", type=int, help="stop (and end the learning-rate schedule) after so many steps")
    p.add_argument("--lr", type=float, default=3e-4, help="highest learning rate")
    p.add_argument("--min-lr", type=float, default=3e-6, help="learning rate of the last step")
    p.add_argument("--warmup", type=float, default=0.1, help="fraction of the steps with a rising learning rate")
    p.add_argument("--eval-samples", type=int, default=512, help="abstracts of a validation; 0: all")
    p.add_argument("--checkpoint-every", type=int, default=200, help="steps between checkpoints (there is one at each validation, too)")
    p.add_argument("--seed", type=int, default=42)
    p.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    p.add_argument("--deterministic", action="store_true", help="bit-exact repetition on CUDA, too; slower")
    p.add_argument("--out", help="run directory; default out/SUBSET-LORA")
    p.add_argument("--profile", action="store_true", help="write trace.json, a torch profiler trace of steps 3 to 5 (open it at ui.perfetto.dev), and print where the time goes")
    p.add_argument("--resume", action="store_true", help="go on with the run in --out (or start it, if there is none)")
    p.add_argument("--dry-run", action="store_true", help="print sizes, memory, steps and tokens as JSON and stop: no weights needed")
    p.add_argument("--demo", action="store_true", help="the whole path on made-up abstracts and a small model trained on the spot; two minutes")
    args = p.parse_args(argv)
    args.out = args.out or "out/" + ("demo" if args.demo else re.sub(r"[^\w.-]", "_", f"{args.subset}-{args.lora}"))
    args.lora = args.lora if args.lora in ("qkv", "all") else args.lora.split(",")
    for name in ("rank", "batch_size", "micro_batch", "epochs", "max_steps", "checkpoint_every"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            p.error(f"--{name.replace('_', '-')} must be at least 1")
    return args


def learning_rate(step, steps, args):
    """Of 0-based `step`: up linearly over the first ceil(warmup * steps), then down a cosine to --min-lr at the last step."""
    warmup = math.ceil(args.warmup * steps)
    if step < warmup:
        return args.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return args.min_lr + (args.lr - args.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def count_steps(rows, args):
    return min(args.epochs * math.ceil(rows / args.batch_size), args.max_steps or sys.maxsize)


def measured_peak(dtype, device):
    """FLOP/s of a large matrix product here and now: what model FLOP utilisation is a fraction of. Half a second, once a run."""
    n = 8192 if device.type == "cuda" else 2048
    a, seconds = torch.randn(n, n, device=device, dtype=dtype), []
    for _ in range(5):
        began = time.perf_counter()
        (a @ a)[0, 0].item()                                  # .item() waits for the device
        seconds.append(time.perf_counter() - began)
    return 2 * n ** 3 / min(seconds)


def step_flops(config, frozen, trainable, lengths):
    """FLOP that a LoRA step on sequences of these lengths must do, whatever an implementation does (arXiv:2204.02311, appendix B, without the
    gradients of frozen weights): 4 for each frozen weight and token, 6 for each trained one, and causal attention. frozen: without the embeddings."""
    attention = 6 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * sum(n * n for n in lengths)
    return sum(lengths) * (4 * frozen + 6 * trainable) + attention


def dry_run(args):
    """Parameters, memory, steps and tokens of a run, from shapes alone. The memory is an estimate for one process."""
    config, quantize = load_config(args.base), args.quantize == "nf4"
    with torch.device("meta"):
        model = CausalLM(config)
        total = sum(p.numel() for p in model.parameters())
        trainable = inject(model, args.lora, args.rank, args.alpha, args.dropout)
    projections = sum(p.numel() for name, p in model.named_parameters() if name.endswith("_proj.weight"))
    weights = projections * (0.516 if quantize else 2) + (total - projections) * 2    # 4.127 bits a weight, the rest in 16 bit
    tokens_kept = args.micro_batch * 250                                              # a generous abstract
    layer = tokens_kept * 2 * (12 * config.hidden_size + 4.5 * config.intermediate_size)    # kept for the backward pass, counted on SmolLM2
    kept = layer + config.num_hidden_layers * tokens_kept * 2 * config.hidden_size if args.checkpoint_activations else config.num_hidden_layers * layer
    memory = weights + trainable * 16 + kept + 256 * config.vocab_size * 6
    steps = tokens = None
    if (Path(args.data) / "manifest.json").exists():
        manifest = data_arxiv.available(args.data)
        rows = manifest["sets"].get(args.subset, {}).get("train")
        if rows:
            steps = count_steps(rows, args)
            seen = steps * args.batch_size / rows if args.max_steps else args.epochs
            tokens = round(seen * (manifest["characters"][args.subset]["train"] / 3.8 + rows))    # 3.8 characters a token, and EOS
    print(json.dumps({"config": {**vars(args), "model": vars(config)}, "trainable_parameters": trainable,
                      "total_parameters": total + trainable, "memory_gb": round(memory / 1e9, 2), "steps": steps, "tokens": tokens}, indent=1))


# ====================================================================================================== training


@torch.no_grad()
def validation_loss(model, sequences, args, rank, world, device):
    """Mean negative log-likelihood a token, nats, over `sequences` (lists of ids), shared out over the processes."""
    model.eval()
    total = torch.zeros(2, device=device, dtype=torch.float32)
    mine = sequences[rank::world]
    for i in range(0, len(mine), args.micro_batch):
        ids, lengths = data_arxiv.collate(mine[i:i + args.micro_batch])
        nll = token_nll(model, ids.to(device), lengths)
        total += torch.stack([nll.sum(), torch.tensor(float(len(nll)), device=device)])
    model.train()
    nll, tokens = sum_over_processes(total).tolist()
    return nll / tokens


def start_profiler(out, device):
    """A torch profiler of steps 3 to 5; it then writes out/trace.json and prints where the time went. Call .step() after each step, .stop() at the end."""
    def finished(profiler):
        profiler.export_chrome_trace(str(Path(out) / "trace.json"))
        print(profiler.key_averages().table(sort_by=f"self_{'cuda' if device.type == 'cuda' else 'cpu'}_time_total", row_limit=10, max_name_column_width=40), flush=True)
    profiler = torch.profiler.profile(schedule=torch.profiler.schedule(wait=1, warmup=1, active=3, repeat=1), on_trace_ready=finished)
    profiler.start()
    return profiler


def train(args):
    rank, world, device = start_processes(args.device)
    main, stop = rank == 0, StopSignal()
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    dtype = resolve_dtype(args.dtype, device)

    # Data: texts are encoded when they are drawn; a batch takes milliseconds.
    ids, texts = data_arxiv.load(args.data, args.subset, "train")
    manifest = data_arxiv.available(args.data)
    base = os.path.abspath(args.base) if os.path.isdir(args.base) else args.base
    tokenizer = load_tokenizer(base)
    bos, eos = bos_eos(load_config(base), tokenizer)
    steps = count_steps(len(texts), args)
    validation = {}
    for name, key in ((args.subset, "validation_loss"), ("s1", "validation_loss_s1")):
        if key == "validation_loss" or name != args.subset and name in manifest["sets"]:
            held_out = data_arxiv.load(args.data, name, "validation")[1]
            if not held_out:
                raise ValueError(f"{name} of {args.data} has no validation abstracts: {len(texts)} for training are too few to split; prepare more")
            order = np.random.default_rng(args.seed).permutation(len(held_out))[:args.eval_samples or None]
            validation[key] = [data_arxiv.encode(tokenizer, held_out[i], bos, eos) for i in order]
    validate_at = {round(i * steps / 9) for i in range(10)}

    # The run directory, before the minutes of loading: a wrong flag should show at once.
    free = {"resume", "dry_run", "demo", "out", "device", "checkpoint_every", "micro_batch", "checkpoint_activations", "profile"}             # may change between resumptions
    settings = {k: v for k, v in vars(args).items() if k not in free} | {
        "base": base, "data": os.path.abspath(args.data), "dtype": str(dtype).removeprefix("torch."), "data_checksums": sorted(manifest["checksums"])}
    if main:
        print(json.dumps(settings | {"processes": world, "device": str(device), "steps": steps, "abstracts": len(texts)}, indent=1), flush=True)
    checkpoint = [open_run(args.out, settings, args.resume) if main else None]
    if dist.is_initialized():
        dist.broadcast_object_list(checkpoint)
    checkpoint, = checkpoint

    model = load_pretrained(base, quantize=None if args.quantize == "none" else "nf4", dtype=dtype, device=device)
    trainable = inject(model, args.lora, args.rank, args.alpha, args.dropout, args.seed)
    model.train()
    model.model.checkpoint_activations = args.checkpoint_activations
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(named.values(), lr=args.lr, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1)
    step, best = 0, None
    if checkpoint:
        state = restore(checkpoint, named, optimizer)
        step, best = state["step"], state["best"]
    if main:
        print(f"{trainable:,} trainable parameters; {'resumed after' if checkpoint else 'starting at'} step {step} of {steps}", flush=True)
        metrics = open_metrics(args.out, step)

        peak = world * measured_peak(dtype, device)
        print(f"{peak / 1e12:.3g} TFLOP/s in a large matrix product on {world} {device.type}{'s' * (world > 1)}, which utilisation is a fraction of", flush=True)

    frozen = sum(m.in_features * m.out_features for m in model.modules() if hasattr(m, "in_features"))

    # One flat buffer holds all gradients and, behind them, the four sums that go round with them: one all_reduce a step.
    flat = torch.zeros(trainable + 4, device=device)
    for p, gradient in zip(named.values(), flat[:-4].split([p.numel() for p in named.values()])):
        p.grad = gradient.view_as(p)

    def checkpoint_now():
        if main:
            save_checkpoint(args.out, step, optimizer_tensors(named, optimizer), {"step": step, "best": best, "settings": settings}, best and best["step"])

    def validate_now():
        nonlocal best
        losses = {key: validation_loss(model, sequences, args, rank, world, device) for key, sequences in validation.items()}
        if best is None or losses["validation_loss"] < best["validation_loss"]:
            best = {"step": step, **losses}
        if main:
            bar.write(f"step {step:6d}  " + "  ".join(f"{key} {loss:.4f}" for key, loss in losses.items()))
            metrics.write(json.dumps({"step": step, **losses}) + "\n")

    with tqdm(total=steps, initial=step, disable=not main, desc=args.subset, unit="step", dynamic_ncols=True) as bar:
        if checkpoint is None:
            validate_now()
            checkpoint_now()
        profiler = start_profiler(args.out, device) if args.profile and main else None
        while step < steps:
            began = time.perf_counter()
            rows = data_arxiv.batch_rows(len(texts), args.batch_size, args.seed, step)
            torch.manual_seed(int(np.random.SeedSequence([args.seed, step, rank]).generate_state(1)[0]))     # for dropout
            flat.zero_()
            mine = rows[rank::world]
            for i in range(0, len(mine), args.micro_batch):
                batch, lengths = data_arxiv.collate([data_arxiv.encode(tokenizer, texts[r], bos, eos) for r in mine[i:i + args.micro_batch]])
                nll = token_nll(model, batch.to(device), lengths)
                nll.sum().backward()                              # adds to p.grad, that is to `flat`
                flat[-4] += nll.detach().sum()
                flat[-3] += len(nll)
                flat[-2] += step_flops(model.config, frozen, trainable, lengths) / 1e12
            flat[-1] = float(stop.requested)
            sum_over_processes(flat)
            total, tokens, teraflop, stopping = flat[-4:].tolist()
            loss, gradient = total / tokens, flat[:-4].div_(tokens)
            norm = gradient.norm().item()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise ValueError(f"the loss of step {step + 1} is {loss}, its gradient norm {norm}: stopped before the update. Its abstracts: "
                                 f"{', '.join(ids[r] for r in rows)}. Look at them, or lower --lr; the last checkpoint is whole")
            gradient.mul_(min(1.0, 1.0 / (norm + 1e-6)))          # clip at 1
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, args)
            optimizer.step()
            step += 1
            if main:
                epoch, seconds = step / math.ceil(len(texts) / args.batch_size), time.perf_counter() - began
                record = {"step": step, "epoch": round(epoch, 4), "loss": loss, "lr": group["lr"], "grad_norm": norm,
                          "tokens_per_s": round(tokens / seconds, 1), "flop_utilisation": round(teraflop * 1e12 / seconds / peak, 3), "memory_gb": round(peak_memory_gb(device), 3)}
                metrics.write(json.dumps(record) + "\n")
                bar.update()
                bar.set_postfix(epoch=f"{epoch:.2f}", loss=f"{loss:.4f}", tokens_per_s=f"{record['tokens_per_s']:.0f}",
                                utilisation=f"{record['flop_utilisation']:.0%}", memory=f"{record['memory_gb']:.1f}GB")
            if profiler:
                profiler.step()
            if step in validate_at:
                validate_now()
            if step in validate_at or step % args.checkpoint_every == 0 or stopping:
                checkpoint_now()
            if stopping and step < steps:
                if main:
                    print(f"stopped after step {step} of {steps}; go on with --resume", flush=True)
                return
        if profiler:
            profiler.stop()
    if main:
        save_adapter(model, Path(args.out) / "adapter", base)
        print(f"{args.out}/adapter is the adapter after step {steps}; lowest validation loss {best['validation_loss']:.4f} at step {best['step']}\n"
              f"evaluate: python eval.py perplexity {args.out}", flush=True)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


# ========================================================================================================== demo


def demo(args):
    """The whole path on made-up abstracts: snapshot, training sets, tokenizer, a small base model, NF4, LoRA, perplexity, a completion."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    out = Path(args.out)
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    print("1. A made-up snapshot (synthetic: the words mean nothing), prepared into training sets", flush=True)
    data_arxiv.synthesize(out / "snapshot.jsonl", records=6000, seed=0)
    data_arxiv.prepare(out / "snapshot.jsonl", out / "data")

    print("2. A tokenizer and a small base model, trained for 40 seconds on every category, with little hep-th among them", flush=True)
    texts = data_arxiv.load(out / "data", "hep-th:0.1+hep-ph+gr-qc+q-bio+cs", "train")[1]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=2048, special_tokens=["<s>", "</s>"], show_progress=False,
                                                             initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    config = Config("llama", tokenizer.get_vocab_size(), 192, 512, 4, 6, 2, 32, max_position_embeddings=2048, bos_token_id=0, eos_token_id=1)
    torch.manual_seed(0)
    base = CausalLM(config)
    init_weights(base)
    optimizer, seconds, began, losses = torch.optim.AdamW(base.parameters(), lr=2e-3, betas=(0.9, 0.95)), 40, time.time(), []
    bar = tqdm(total=seconds, desc="base", bar_format="{l_bar}{bar}| {n:.0f}/{total} s {postfix}")
    while time.time() - began < seconds:
        rows = data_arxiv.batch_rows(len(texts), 8, 0, len(losses))
        batch, lengths = data_arxiv.collate([data_arxiv.encode(tokenizer, texts[r], 0, 1) for r in rows])
        loss = token_nll(base, batch, lengths).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        bar.n = min(time.time() - began, seconds)
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    bar.close()
    save_pretrained(base, out / "base")
    tokenizer.save(str(out / "base" / "tokenizer.json"))

    print("3. The base again, in NF4, fine-tuned with LoRA on hep-th (set s1)", flush=True)
    here = Path(__file__).resolve().parent
    subprocess.run([sys.executable, here / "train_lm.py", "--base", out / "base", "--data", out / "data", "--subset", "s1", "--lora", "all",
                    "--batch-size", "16", "--max-steps", "60", "--lr", "2e-3", "--eval-samples", "32", "--out", out / "s1-all"], check=True)

    print("4. Perplexity of the hep-th test split, before and after", flush=True)
    subprocess.run([sys.executable, here / "eval.py", "perplexity", out / "s1-all"], check=True)

    print("5. A completion by the fine-tuned model", flush=True)
    from lora import load_adapter, merge
    model = load_pretrained(str(out / "base"), dtype=torch.float32)
    load_adapter(model, out / "s1-all" / "adapter")
    merge(model)
    truth = data_arxiv.load(out / "data", "s1", "test")[1][0].split()
    prompt = " ".join(truth[:20])
    completion = generate(model, [data_arxiv.encode(tokenizer, prompt, 0, None)], max_new_tokens=80, eos=1)[0]
    print(f"PROMPT:     {prompt}\nCOMPLETION: {tokenizer.decode(completion)}\n\nEverything is in {out}. Next: real abstracts and a real model, see README.md")


def main(argv=None):
    args = arguments(argv)
    try:
        dry_run(args) if args.dry_run else demo(args) if args.demo else train(args)
    except subprocess.CalledProcessError as e:
        fail(f"a part of the demo failed, see above ({Path(e.cmd[1]).name})")
    except torch.OutOfMemoryError:
        fail(f"out of memory: lower --micro-batch (now {args.micro_batch}) or add --checkpoint-activations")
    except (ValueError, OSError) as e:
        fail(e)
    except RuntimeError as e:
        if "not enough memory" in str(e) or "can't allocate memory" in str(e):
            fail(f"out of memory: lower --micro-batch (now {args.micro_batch}) or add --checkpoint-activations")
        raise


if __name__ == "__main__":
    main()
