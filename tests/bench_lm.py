"""How fast and how small: nanophys beside transformers + peft (+ bitsandbytes), alternating in one run, each measurement in a fresh process.

    python tests/bench_lm.py --base DIR --data FILE [--json out/bench.json]                   # a CPU and SmolLM2: about an hour
    python tests/bench_lm.py --base DIR --data FILE --quick --only train,generate             # does it run? Its figures mean little
    python tests/bench_lm.py --shape llama-3.1-8b --device cuda --batch-size 16 --micro-batch 16 --only nf4,generate,load,dequantise
    python tests/bench_lm.py --shape llama-3.1-8b --only load [--blocks 20]

FILE: records as in the arXiv snapshot (JSONL, .gz or not), or a directory that data_arxiv.py prepare wrote; set s1, order of seed 42.
--shape: a checkpoint of random weights, made on the spot; without --base and --data also random tokens, in lengths drawn from the
distribution of real abstracts. Nothing is downloaded. (unsloth wants a tokenizer: give --base, too.)

train          LoRA on all matrices, r 8, alpha 32, dropout 0.05, AdamW on float32 adapters; the peer is a plain loop over padded batches
train_grouped  the same (ours unchanged) against the peer with batches of similar length, from windows of 50 batches
nf4, nf4_grouped  the same on a 4-bit base; the peer prepares its model as the QLoRA recipe says (prepare_model_for_kbit_training)
nf4_unsloth    with nf4, on a GPU, where unsloth can be imported: against unsloth (dropout 0: its fast kernels want that)
losses, losses_nf4  each step's loss at dropout 0 from the same initial adapter, the first 20 of a run of 100 steps: the largest difference (the peer
               then keeps its norms and residuals in bfloat16, as ours does)
generate       completions of the first halves of 32 abstracts, temperature 0.7, top_k 50; the peer's batch is padded on the left
load           the checkpoint into NF4; it is in the page cache as far as that holds it
prepare, prepare_all  data_arxiv.prepare of --gb gigabytes like the snapshot, made of the records in FILE: hep-th, hep-ph and gr-qc, then cs
               and q-bio, too; the peer parses every line with json
dequantise     NF4 to bfloat16, layer by layer, against bitsandbytes; on a GPU also as a share of the bandwidth of a copy

Medians over --repetitions processes of a side. tokens_per_s counts real tokens, of the abstracts or generated up to the end of each
sequence, over --steps steps after one that warms up; padding does not count. peak_memory_gb (10^9 bytes) of training and completions: the
largest resident set, interpreter and libraries included, on a GPU what torch allocated; above_weights_gb: that less the base's parameters;
of load and prepare: anonymous memory above the start (the page cache gives mapped files up at need). flop_utilisation: training's FLOP/s
(train_lm.step_flops) over those of a matrix product, measured at the start. ratio = ours / peer. A training peer that runs out of memory
is measured again with gradient checkpointing, and the report says so; a side that fails is reported as failed (exit status 1).
"""
import argparse
import gzip
import json
import os
import platform
import random
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")          # as train_lm.py does; the peer's processes inherit both
os.environ.setdefault("GOMP_SPINCOUNT", "4000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")                 # no peer shall ask the hub for anything
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data_arxiv

SEED, RANK, ALPHA, DROPOUT, WINDOW = 42, 8, 32, 0.05, 50
SIDES = ("ours", "peer")
ALL = ("train", "train_grouped", "nf4", "nf4_grouped", "losses", "losses_nf4", "generate", "load", "prepare", "prepare_all", "dequantise")
PEERS = ("torch", "transformers", "peft", "bitsandbytes", "unsloth")
COMMON = ("base", "data", "shape", "blocks", "device", "dtype", "micro_batch", "checkpoint_activations", "snapshot", "gb")    # every process gets these
OUT_OF_MEMORY = 12                                            # exit status of a measured process
ADAMW = {"betas": (0.9, 0.95), "eps": 1e-5, "weight_decay": 0.1}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LENGTHS = [7, 47, 59, 69, 78, 85, 93, 100, 108, 115, 123, 131, 139, 149, 159, 172, 186, 205, 229, 269, 621]    # tokens of a hep-th abstract of
# 1992 to 2001 with BOS and EOS, SmolLM2's tokenizer: minimum, 5%, 10% ... maximum of 17,644; drawn from by linear interpolation
SHARES = {"hep-th": 4, "hep-ph": 5, "gr-qc": 2.5, "cs": 21, "q-bio": 1, "other": 66.5}       # per cent of the snapshot's records, about
SUBJECTS = {"cs": "cs.LG cs.CV cs.CL cs.IT cs.AI cs.RO cs.CR cs.DS cs.NI cs.SE", "q-bio": "q-bio.NC q-bio.PE q-bio.QM",
            "other": "math.AG math.PR math.AP astro-ph astro-ph.CO astro-ph.GA cond-mat.str-el cond-mat.mes-hall quant-ph stat.ML hep-ex "
                     "hep-lat nucl-th physics.optics eess.SP"}
SHAPES = (576, 1536), (192, 576), (4096, 4096), (14336, 4096)                                # of dequantise


# =============================================================================================== the measured processes
# Each function below runs alone in a fresh process; `t` is what the parent asks for, the result is one JSON object.


def place(t):
    """-> (torch.device, torch.dtype) of a measurement, resolved as train_lm.py resolves them."""
    import torch
    from train_lm import resolve_dtype
    device = torch.device(t.device)
    return device, resolve_dtype(t.dtype, device)


def clock(device):
    """Seconds; waits for the GPU first."""
    import torch
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def largest_memory_gb(device):
    """Peak memory of this process, 10^9 bytes: of the GPU, or the largest resident set, mapped files and all."""
    import torch
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def learning_rates(steps):
    """Those of train_lm.py in the first `steps` steps of a run of 100."""
    import train_lm
    defaults = train_lm.arguments([])
    return [train_lm.learning_rate(step, 100, defaults) for step in range(steps)]


def result(t, model, device, tokens, seconds, **more):
    """What a timed process says; the first of `tokens` and `seconds` is the warm-up's."""
    weights = sum(p.nbytes for p in model.parameters() if not p.requires_grad) + sum(b.nbytes for b in model.buffers())
    peak = largest_memory_gb(device)
    return {"tokens_per_s": sum(tokens[1:]) / sum(seconds[1:]), "peak_memory_gb": peak, "above_weights_gb": peak - weights / 1e9,
            "warm_up_s": seconds[0], **more}


def training_result(t, model, device, seconds, losses):
    """... with the FLOP/s of train_lm.py's count: what the real tokens need, whatever is padded or computed again."""
    from model import load_config
    from train_lm import step_flops
    c, lengths = load_config(t.base), [[len(s) for s in batch] for batch in t.batches]
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    frozen = c.num_hidden_layers * c.hidden_size * (2 * q + 2 * kv + 3 * c.intermediate_size) + c.vocab_size * c.hidden_size
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    flop = sum(float(step_flops(c, frozen, trained, n)) for n in lengths[1:])
    return result(t, model, device, [sum(n) for n in lengths], seconds, losses=losses, flop_per_s=flop / sum(seconds[1:]))


def train_ours(t):
    """The steps of train_lm.py: abstracts end to end, token_nll, update()."""
    import torch
    from lora import inject
    from model import load_pretrained, token_nll
    from train_lm import micro_batches, update
    device, dtype = place(t)
    model = load_pretrained(t.base, quantize=t.quantize, dtype=dtype, device=device)
    inject(model, "all", RANK, ALPHA, t.dropout, SEED)
    model.train()
    model.model.checkpoint_activations = t.checkpoint_activations
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, **ADAMW)
    losses, seconds = [], []
    for batch, rate in zip(t.batches, learning_rates(len(t.batches))):
        began = clock(device)
        optimizer.param_groups[0]["lr"] = rate
        nll = (token_nll(model, *part) for part in micro_batches(batch, t.micro_batch, device))
        losses.append(update(trained, optimizer, nll, clip=1.0)[0])
        seconds.append(clock(device) - began)
    return training_result(t, model, device, seconds, losses)


def bitsandbytes_nf4(dtype):
    from transformers import BitsAndBytesConfig
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)


def load_peer(base, device, dtype, quantize, dropout, checkpointing=False, prepare=True):
    """transformers + peft (+ bitsandbytes), as their documentation sets them up for LoRA and QLoRA (`prepare`: norms, lm_head in float32)."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM
    nf4 = bitsandbytes_nf4(dtype) if quantize else None
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, device_map=str(device), quantization_config=nf4)
    model.config.use_cache = False
    if quantize and prepare:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    elif checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=TARGETS, task_type="CAUSAL_LM")).train()


def load_unsloth(base, dtype, checkpointing):
    from unsloth import FastLanguageModel
    model, _ = FastLanguageModel.from_pretrained(base, dtype=dtype, load_in_4bit=True, max_seq_length=2048)
    return FastLanguageModel.get_peft_model(model, r=RANK, lora_alpha=ALPHA, lora_dropout=0, target_modules=TARGETS,
                                            use_gradient_checkpointing="unsloth" if checkpointing else False).train()


def copy_initial_adapter(model, base):
    """Give the peer the A that lora.inject draws (B is zero on both sides)."""
    import torch
    from lora import inject
    from model import load_pretrained
    ours = load_pretrained(base, dtype=torch.float32)
    inject(ours, "all", RANK, ALPHA, 0.0, SEED)
    initial = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.dtype == torch.float32
            p.data.copy_(initial[name.removeprefix("base_model.model.").replace(".default.weight", "")])


def padded(batch, pad, side="right"):
    """Lists of ids -> ids (B, longest), mask (B, longest), True at real tokens."""
    import torch
    width = max(map(len, batch))
    ids = torch.tensor([s + [pad] * (width - len(s)) if side == "right" else [pad] * (width - len(s)) + s for s in batch])
    column, lengths = torch.arange(width), torch.tensor([[len(s)] for s in batch])
    return ids, column < lengths if side == "right" else column >= width - lengths


def train_peer(t):
    """A plain training loop; its loss is the mean over the batch's real tokens, as ours."""
    import torch
    device, dtype = place(t)
    model = load_unsloth(t.base, dtype, t.checkpointing) if t.library == "unsloth" else \
        load_peer(t.base, device, dtype, t.quantize, t.dropout, t.checkpointing, prepare=not t.same_start)
    if t.same_start:
        copy_initial_adapter(model, t.base)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, **ADAMW)
    losses, seconds = [], []
    for batch, rate in zip(t.batches, learning_rates(len(t.batches))):
        began = clock(device)
        ids, mask = padded(batch, 0)
        loss = model(input_ids=ids.to(device), attention_mask=mask.long().to(device), labels=ids.masked_fill(~mask, -100).to(device)).loss
        optimizer.zero_grad()
        loss.backward()
        if not torch.nn.utils.clip_grad_norm_(trained, 1.0).item() > 0:
            raise ValueError("no gradient flows through the peer")
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        losses.append(loss.item())
        seconds.append(clock(device) - began)
    return training_result(t, model, device, seconds, losses)


def generate_ours(t):
    from model import generate, load_config, load_pretrained
    device, dtype = place(t)
    model, eos = load_pretrained(t.base, dtype=dtype, device=device), load_config(t.base).eos_token_id
    tokens, seconds = [], []
    for new in (2, t.new_tokens):                            # warm-up, measurement
        began = clock(device)
        rows = generate(model, t.prompts, max_new_tokens=new, temperature=0.7, top_k=50, eos=eos, seed=t.seed)
        seconds.append(clock(device) - began)
        tokens.append(sum(min(len(row) + 1, new) for row in rows))           # the EOS that ends a row was generated, too
    return result(t, model, device, tokens, seconds)


def generate_peer(t):
    import torch
    from transformers import AutoModelForCausalLM
    device, dtype = place(t)
    model = AutoModelForCausalLM.from_pretrained(t.base, dtype=dtype, device_map=str(device)).eval()
    eos = model.config.eos_token_id
    eos, tokens, seconds = eos if isinstance(eos, list) else [eos], [], []
    ids, mask = (x.to(device) for x in padded(t.prompts, eos[0], side="left"))
    torch.manual_seed(t.seed)
    for new in (2, t.new_tokens):
        began = clock(device)
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=mask.long(), max_new_tokens=new, do_sample=True, temperature=0.7, top_k=50, top_p=1.0,
                                 eos_token_id=eos, pad_token_id=eos[0])[:, ids.shape[1]:].tolist()
        seconds.append(clock(device) - began)
        tokens.append(sum(next((i + 1 for i, token in enumerate(row) if token in eos), new) for row in out))
    return result(t, model, device, tokens, seconds)


def make_checkpoint(t):
    """Random weights of a shape (or its first t.blocks blocks) into t.base, a shard for each block: the whole is never in memory."""
    import torch
    from model import CausalLM, config_json, load_config
    from safetensors.torch import save_file
    config = load_config(t.shape)
    config = replace(config, num_hidden_layers=t.blocks or config.num_hidden_layers)
    with torch.device("meta"):
        model = CausalLM(config)
    shards, index, base = {}, {}, Path(f"{t.base}.tmp")
    for name, p in model.named_parameters():                 # a tied lm_head is not among them
        shards.setdefault(name.split(".")[2] if name.startswith("model.layers.") else name, {})[name] = p.shape
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir(parents=True)
    torch.manual_seed(SEED)
    for i, shapes in enumerate(shards.values()):
        def new(shape):
            return torch.empty(shape, dtype=torch.bfloat16, device=t.device)
        save_file({name: (new(shape).fill_(1) if len(shape) == 1 else new(shape).normal_(0, 0.02)).cpu() for name, shape in shapes.items()},
                  base / f"model-{i:03}.safetensors", metadata={"format": "pt"})
        index |= dict.fromkeys(shapes, f"model-{i:03}.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (base / "config.json").write_text(json.dumps(config_json(config) | {"torch_dtype": "bfloat16"}))
    base.rename(t.base)                                      # --checkpoint DIR is there whole or not at all
    return {}


class AnonymousPeak:
    """with AnonymousPeak() as p: ..; p.gb: largest anonymous memory of the process, in 10^9 bytes, above what it had at the start."""

    def now(self):
        return int(re.search(r"RssAnon:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9

    def watch(self):
        while not self.done:
            self.peak = max(self.peak, self.now())
            time.sleep(0.005)

    def __enter__(self):
        self.start, self.peak, self.done = self.now(), 0.0, False
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.done = True
        self.thread.join()
        self.gb = max(self.peak, self.now()) - self.start


def timed_load(t, load):
    """load() -> what it took; the imports are done and do not count."""
    import torch
    device = torch.device(t.device)
    if device.type == "cuda":
        torch.zeros(1, device=device)                        # the context
    began = clock(device)
    with AnonymousPeak() as peak:
        model = load()
        seconds = clock(device) - began
    gpu = {"peak_gpu_memory_gb": torch.cuda.max_memory_allocated() / 1e9} if device.type == "cuda" else {}
    return {"seconds": seconds, "peak_memory_gb": peak.gb, **gpu, "parameters": sum(p.numel() for p in model.parameters())}


def load_nf4_ours(t):
    from model import load_pretrained
    return timed_load(t, lambda: load_pretrained(t.base, quantize="nf4", device=t.device))


def load_nf4_peer(t):
    import bitsandbytes  # noqa: F401    its import is no part of the loading
    import torch
    from transformers import AutoModelForCausalLM
    options = {"quantization_config": bitsandbytes_nf4(torch.bfloat16), "dtype": torch.bfloat16, "device_map": t.device}
    return timed_load(t, lambda: AutoModelForCausalLM.from_pretrained(t.base, **options))


def make_snapshot(t):
    """A file like the snapshot, t.gb * 10^9 bytes: the records of t.data over and over, under the snapshot's shares of categories
    with cross-lists, lengthened to about its 1,600 bytes a line."""
    draw = random.Random(SEED)
    with (gzip.open if t.data.endswith(".gz") else open)(t.data) as f:
        records = [json.loads(line) for line in f]
    every = [c for group in SHARES for c in SUBJECTS.get(group, group).split()]
    size = 0
    turn = 0
    with open(t.snapshot, "wb") as f:
        while size < t.gb * 1e9:
            turn += 1                                        # an id comes once
            for r, other in zip(records, draw.sample(records, len(records))):
                group, = draw.choices(list(SHARES), SHARES.values())
                categories = [draw.choice(SUBJECTS.get(group, group).split()), *draw.sample(every, draw.choice([0, 0, 1, 1, 2, 3]))]
                line = json.dumps(r | {"id": f"{r['id']}.{turn}", "categories": " ".join(categories), "license": "http://arxiv.org/licenses/nonexclusive-distrib/1.0/",
                                       "abstract": f"{r['abstract']}{other['abstract'][:draw.randrange(700)].strip()}\n",
                                       "authors_parsed": r["authors_parsed"] + other["authors_parsed"]}, separators=(",", ":"))
                size += f.write(line.encode() + b"\n")
                if size >= t.gb * 1e9:
                    break
    return {}


def timed_prepare(t, work):
    began, cpu = time.perf_counter(), time.process_time()
    with AnonymousPeak() as peak:
        kept = work()
    mb = os.path.getsize(t.snapshot) / 1e6
    return {"mb_per_s": mb / (time.perf_counter() - began), "mb_per_cpu_s": mb / (time.process_time() - cpu), "peak_memory_gb": peak.gb, "kept": kept}


def prepare_ours(t):
    """All of data_arxiv.prepare: splits, checksums, files on disk."""
    def work():
        counts = data_arxiv.prepare(t.snapshot, out, tuple(t.categories))["categories"]
        return sum(count["kept"] for name, count in counts.items() if name != "joint")       # joint: hep-ph and gr-qc once more
    with tempfile.TemporaryDirectory(dir=Path(t.snapshot).parent) as out:
        return timed_prepare(t, work)


def prepare_peer(t):
    """What one writes without a thought of speed: json.loads of every line, the wanted records cleaned and written as JSONL."""
    def work():
        kept = 0
        with open(t.snapshot) as snapshot, tempfile.TemporaryFile("w", dir=Path(t.snapshot).parent) as out:
            for line in snapshot:
                record = json.loads(line)
                primary = record["categories"].split()[0]
                if data_arxiv.category_of(primary) in t.categories and not data_arxiv.withdrawn(record) and record["id"] not in data_arxiv.CONTROL:
                    out.write(json.dumps({"id": record["id"], "category": primary, "abstract": data_arxiv.clean(record["abstract"])}) + "\n")
                    kept += 1
        return kept
    return timed_prepare(t, work)


def dequantise(t, prepare):
    """prepare(weight) -> a function that dequantises it. -> for each shape 10^9 weights/s, on a GPU the share of a copy's bandwidth."""
    import torch
    device, cuda, found = torch.device(t.device), t.device == "cuda", {}
    calls = 5 if cuda else 1

    def seconds(functions):
        """The median time of a call, the functions called in turn: the operands of one do not stay in the cache of the GPU."""
        times = []
        for _ in range(22):
            began = clock(device)
            for _ in range(calls):
                for f in functions:
                    f()
            times.append((clock(device) - began) / calls / len(functions))
        return statistics.median(times[2:])                  # the first two compile and warm up

    if cuda:
        a, b = (torch.empty(2**30, dtype=torch.uint8, device=device) for _ in "ab")
        copy = 2 * a.nbytes / seconds([lambda: b.copy_(a)])  # read and written
        del a, b
    for shape in SHAPES:
        weights = [torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02) for _ in range(4 if cuda else 1)]
        s, n = seconds([prepare(w) for w in weights]), weights[0].numel()
        name = "x".join(map(str, shape))
        found[f"{name} 10^9/s"] = n / s / 1e9
        if cuda:
            found[f"{name} of copy"] = n * (2 + 1 / 2 + 1 / 64 + 4 / 16384) / s / copy          # bfloat16, 4 bits, block maxima and their maxima
    return found


def dequantise_ours(t):
    from quant import dequantize_nf4, quantize_nf4
    return dequantise(t, lambda w: lambda q=quantize_nf4(w): dequantize_nf4(q))


def dequantise_peer(t):
    import bitsandbytes.functional as bnb
    return dequantise(t, lambda w: lambda q=bnb.quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type="nf4"): bnb.dequantize_4bit(*q))


def measure_peak(t):
    """FLOP/s of a large matrix product: what flop_utilisation is a fraction of."""
    import torch
    from train_lm import measured_peak
    device, dtype = place(t)
    return {"flops": measured_peak(dtype, device), "device": torch.cuda.get_device_name() if device.type == "cuda" else cpu_name(),
            "threads": torch.get_num_threads(), "dtype": str(dtype).removeprefix("torch.")}


def cpu_name():
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return f"{(names or [platform.processor()])[0]}, {os.cpu_count()} cores"


def child(task):
    t = SimpleNamespace(**json.loads(Path(task).read_text()))
    try:
        result = globals()[t.function](t)
    except (RuntimeError, MemoryError) as e:                 # torch.OutOfMemoryError is a RuntimeError
        if isinstance(e, MemoryError) or re.search(r"out of memory|not enough memory|can't allocate", str(e)):
            sys.exit(OUT_OF_MEMORY)
        raise
    Path(task).with_suffix(".result").write_text(json.dumps(result))


# ==================================================================================================== the comparisons


def measure(args, folder, function, library="transformers", **task):
    """One process -> its result, or {"failed": why}. A training peer that runs out of memory is tried again with gradient checkpointing."""
    path = Path(folder) / "task.json"
    checkpointing = function == "train_peer" and library in args.checkpointing
    common = {k: getattr(args, k) for k in COMMON}
    path.write_text(json.dumps(common | {"function": function, "library": library, "checkpointing": checkpointing} | task))
    done = subprocess.run([sys.executable, __file__, "--child", str(path)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode == 0:
        return json.loads(path.with_suffix(".result").read_text()) | {"gradient_checkpointing": checkpointing}
    if done.returncode not in (OUT_OF_MEMORY, -signal.SIGKILL):
        tqdm.write(done.stderr, file=sys.stderr)
        return {"failed": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    if function != "train_peer" or checkpointing:
        return {"failed": "out of memory"}
    tqdm.write(f"{library} ran out of memory; from here on with gradient checkpointing", file=sys.stderr)
    args.checkpointing.add(library)
    return measure(args, folder, function, library, **task)


def sequences(args, folder, vocabulary):
    """-> draw(step), the token ids of a training step: real abstracts, or random tokens in the lengths of real abstracts."""
    if not args.data:
        def draw(step):
            rng = np.random.default_rng([SEED, step])
            lengths = np.interp(rng.random(args.batch_size), np.linspace(0, 1, len(LENGTHS)), LENGTHS)
            return [rng.integers(vocabulary, size=round(n)).tolist() for n in lengths]
        return draw
    from model import bos_eos, load_config, load_tokenizer
    data = args.data
    if not os.path.isdir(data):
        data = os.path.join(folder, "data")
        data_arxiv.prepare(args.data, data)
    texts, tokenizer = data_arxiv.load(data, "s1", "train")[1], load_tokenizer(args.base)
    ends = bos_eos(load_config(args.base), tokenizer)
    return lambda step: [data_arxiv.encode(tokenizer, texts[i], *ends) for i in data_arxiv.batch_rows(len(texts), args.batch_size, SEED, step)]


def training_batches(draw, args):
    """-> plain[repetition][step], grouped[repetition][step]: lists of sequences; the first step of a repetition is its warm-up.

    Grouped: the sequences of WINDOW batches are sorted by length and cut into batches anew. Of these the repetitions together take
    evenly spaced ones, so that short and long batches count as they would over the whole window."""
    n, R = args.steps + 1, args.repetitions
    plain = [[draw(r * n + k) for k in range(n)] for r in range(R)]
    window = sorted((s for step in range(WINDOW) for s in draw(step)), key=len)
    def cut(x):
        return window[int(x * WINDOW) * args.batch_size:][:args.batch_size]              # x in [0, 1)
    grouped = [[cut(0.5)] + [cut((k * R + r + 0.5) / (args.steps * R)) for k in range(args.steps)] for r in range(R)]
    return plain, grouped


def plan(args, draw):
    """-> [(comparison, side, function, task)] in the order of running: the sides of a comparison alternate."""
    plain, grouped = training_batches(draw, args)
    jobs, wanted, unsloth = [], args.only, args.device == "cuda" and find_spec("unsloth")
    for name, quantize in (("train", None), ("nf4", "nf4")):
        task = {"quantize": quantize, "dropout": DROPOUT, "same_start": False}
        for r in range(args.repetitions):
            on = task | {"batches": plain[r]}
            jobs += [(name, "ours", "train_ours", on)] if name in wanted or f"{name}_grouped" in wanted else []
            jobs += [(name, "peer", "train_peer", on)] if name in wanted else []
            jobs += [(f"{name}_grouped", "peer", "train_peer", task | {"batches": grouped[r]})] if f"{name}_grouped" in wanted else []
            jobs += [("nf4_unsloth", "peer", "train_peer", on | {"library": "unsloth"})] if name == "nf4" in wanted and unsloth else []
    batches = [draw(step) for step in range(args.loss_steps)]
    for name, quantize in (("losses", None), ("losses_nf4", "nf4")):
        task = {"quantize": quantize, "dropout": 0.0, "same_start": True, "batches": batches}
        jobs += [(name, side, f"train_{side}", task) for side in SIDES if name in wanted]
    prompts = [s[:max(1, len(s) // 2)] for step in range(args.prompts) for s in draw(step)][:args.prompts]
    for r in range(args.repetitions) if "generate" in wanted else ():
        task = {"prompts": prompts, "new_tokens": args.new_tokens, "seed": SEED + r}
        jobs += [("generate", side, f"generate_{side}", task) for side in SIDES]
    physics, every = {"categories": data_arxiv.CATEGORIES[:3]}, {"categories": data_arxiv.CATEGORIES}
    for name, function, task in (("load", "load_nf4", {}), ("prepare", "prepare", physics), ("prepare_all", "prepare", every),
                                 ("dequantise", "dequantise", {})):
        for _ in range(args.repetitions) if name in wanted else ():
            jobs += [(name, side, f"{function}_{side}", task) for side in SIDES]
    return jobs


def medians(found, best):
    """The results of one side -> the medians over its repetitions, and each of them; the failure if one failed."""
    if "failed" in found[-1]:
        return found[-1]
    m = {k: statistics.median(f[k] for f in found) for k in found[0] if isinstance(found[0][k], float)}
    if "flop_per_s" in m:
        m["flop_utilisation"] = m["flop_per_s"] / best
    return m | {"gradient_checkpointing": any(f["gradient_checkpointing"] for f in found), "repetitions": found}


def summary(results, best):
    """{(comparison, side): [result]} -> {comparison: {"ours": .., "peer": .., "ratio": ..}}; best: FLOP/s of a matrix product."""
    comparisons = {}
    for name in (name for name, side in results if side == "peer"):
        same = name.removesuffix("_grouped").removesuffix("_unsloth")                        # ours does not change with the peer
        ours, peer = medians(results[same, "ours"], best), medians(results[name, "peer"], best)
        ratio = {k: v / peer[k] for k, v in ours.items() if isinstance(v, float) and peer.get(k, 0) > 0}
        c = comparisons[name] = {"ours": ours, "peer": peer, "ratio": ratio}
        if name.startswith("losses") and c["ratio"]:
            c["largest_difference"] = max(abs(a - b) for a, b in zip(*(c[side]["repetitions"][0]["losses"] for side in SIDES), strict=True))
    return comparisons


def show(comparisons, machine):
    print(f"\n{machine['device']}, {machine['threads']} threads, {machine['flops'] / 1e9:,.0f} GFLOP/s in {machine['dtype']}"
          f"\n{'':40}{'ours':>10}{'peer':>10}{'ratio':>10}")
    for name, c in comparisons.items():
        if "largest_difference" in c:
            print(f"{name:16}largest difference of a step's loss{c['largest_difference']:19.4f}")
            continue
        for key in dict.fromkeys(k for side in SIDES for k, v in c[side].items() if isinstance(v, float) and k not in ("warm_up_s", "flop_per_s")):
            print(f"{name:16}{key:24}" + "".join(f"{c[side][key]:10.4g}" if key in c[side] else f"{'-':>10}" for side in (*SIDES, "ratio")))
        for side in SIDES:
            if "failed" in c[side]:
                print(f"{name:16}{side} failed: {c[side]['failed']}")
            elif c[side]["gradient_checkpointing"]:
                print(f"{name:16}{side} with gradient checkpointing")


def write(path, report):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(f"{path}.tmp").write_text(json.dumps(report, indent=1))
    os.replace(f"{path}.tmp", path)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--base", help="model directory; with --shape its tokenizer only")
    p.add_argument("--data", metavar="FILE", help="records as in the arXiv snapshot (JSONL, .gz or not), or a prepared directory")
    p.add_argument("--shape", help="random weights instead: a name such as llama-3.1-8b, or a directory with a config.json")
    p.add_argument("--checkpoint", metavar="DIR", help="with --shape: keep the random weights there, or take them from there")
    p.add_argument("--blocks", type=int, help="with --shape: so many of its blocks (default: all)")
    p.add_argument("--gb", type=float, default=4.5, help="size of the file that prepare reads, 10^9 bytes (default %(default)s)")
    p.add_argument("--only", type=lambda s: s.split(","), help=f"of {','.join(ALL)} (default: all; prepare wants a FILE)")
    p.add_argument("--quick", action="store_true", help="one repetition of two steps: does it run? Its figures mean little")
    p.add_argument("--json", metavar="OUT", help="write the report there, after every process")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    p.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help="of both sides (default: auto, as train_lm.py)")
    p.add_argument("--batch-size", type=int, default=8, help="abstracts a step (default %(default)s)")
    p.add_argument("--micro-batch", type=int, default=8, help="of ours: abstracts in one forward pass, as in train_lm.py (default %(default)s)")
    p.add_argument("--checkpoint-activations", action="store_true", help="of ours, as in train_lm.py")
    p.add_argument("--steps", type=int, default=5, help="timed steps of a process (default %(default)s)")
    p.add_argument("--repetitions", type=int, default=3, help="processes of each side (default %(default)s)")
    p.add_argument("--loss-steps", type=int, default=20, help="steps of the comparison of losses (default %(default)s)")
    p.add_argument("--prompts", type=int, default=32, help="of generate (default %(default)s)")
    p.add_argument("--new-tokens", type=int, default=128, help="of generate, at most for each prompt (default %(default)s)")
    p.add_argument("--peer-checkpointing", action="store_true", help="gradient checkpointing in the peers from the start")
    p.add_argument("--child", help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.child:
        return child(args.child)
    try:
        run(args)
    except (ValueError, OSError) as e:
        p.exit(2, f"error: {e}\n")


def run(args):
    from model import load_config
    args.only = args.only or [name for name in ALL if not name.startswith("prepare") or os.path.isfile(args.data or "")]
    if unknown := set(args.only) - set(ALL):
        raise ValueError(f"--only {','.join(sorted(unknown))}: choose among {','.join(ALL)}")
    if not args.base and (args.data or not args.shape):
        raise ValueError("give --base DIR and --data FILE, or --shape for random weights (with --data, --base says whose tokenizer)")
    if not args.data and not args.shape:
        raise ValueError("give --data FILE, real abstracts, or --shape for random weights and tokens")
    if {"prepare", "prepare_all"} & set(args.only) and not os.path.isfile(args.data or ""):
        raise ValueError("prepare wants --data FILE with records, not a prepared directory; choose other comparisons with --only")
    if args.quick:
        args.steps, args.repetitions, args.loss_steps, args.prompts, args.new_tokens, args.gb = 2, 1, 2, 4, 16, 0.02
    settings = {k: v for k, v in vars(args).items() if k != "child"}
    with tempfile.TemporaryDirectory() as folder:
        jobs = plan(args, sequences(args, folder, load_config(args.shape or args.base).vocab_size))
        args.snapshot, args.checkpointing = os.path.join(folder, "snapshot.jsonl"), {"transformers", "unsloth"} if args.peer_checkpointing else set()

        def prepared(function):
            result = measure(args, folder, function)
            if "failed" in result:
                raise ValueError(f"{function}: {result['failed']}")
            return result

        if args.shape:
            tokenizer, args.base = args.base, args.checkpoint or os.path.join(folder, "base")
            if not os.path.exists(args.base):
                prepared("make_checkpoint")
                for file in Path(tokenizer).glob("tokenizer*") if tokenizer else ():
                    shutil.copy(file, args.base)
        if "prepare" in args.only or "prepare_all" in args.only:
            prepared("make_snapshot")
        machine = prepared("measure_peak")
        report = {"machine": machine, "versions": {name: version(name) for name in PEERS if find_spec(name)}, "settings": settings}
        results = {}
        for name, side, function, task in (bar := tqdm(jobs, unit="process")):
            bar.set_description(f"{name} {side}")
            found = results.setdefault((name, side), [])
            if not found or "failed" not in found[-1]:       # what has failed once is not tried again
                found.append(measure(args, folder, function, **task))
            report["comparisons"] = summary(results, machine["flops"])
            if args.json:
                write(args.json, report)
    show(report["comparisons"], machine)
    if any(result[-1].get("failed", "out of memory") != "out of memory" for result in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
