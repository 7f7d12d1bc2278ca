"""How fast and how small: nanophys beside transformers + peft (+ bitsandbytes) on the same abstracts, alternating in one run.

    python tests/bench_lm.py --base DIR --data FILE [--json out/bench.json]           # everything, on a CPU with SmolLM2 about an hour
    python tests/bench_lm.py --base DIR --data FILE --quick --only train,generate     # the same code in a few minutes; no figures to quote
    python tests/bench_lm.py --shape llama-3.1-8b --device cuda --batch-size 16 --micro-batch 16 --only nf4,generate,load,dequantise

- FILE: records as in the arXiv snapshot (JSONL, .gz or not), or a directory that data_arxiv.py prepare wrote: set s1, order of seed 42
- --shape: a checkpoint of random weights, made on the spot; without --base and --data also random tokens, in lengths drawn from the
  distribution of real abstracts. Nothing is downloaded
- every measurement is a process of its own: a step that warms up, then --steps timed ones; --repetitions of it, alternating; medians
- tokens_per_s counts real tokens: of the abstracts, or generated up to the end of each sequence; padding does not count
- peak_memory_gb, 10^9 bytes: largest resident set of the process (interpreter and libraries included), on a GPU what torch allocated;
  above_weights_gb: that less the bytes of the base model's parameters
- ratio = ours / peer: above 1 is better for tokens_per_s, below 1 for memory

train        LoRA on all matrices, r 8, alpha 32, dropout 0.05, AdamW on float32 adapters; the peer is a plain loop over padded batches
train_grouped  the same (ours unchanged) against the peer with batches of similar length, from windows of 50 batches
nf4, nf4_grouped  the same on a 4-bit base; the peer prepares its model as the QLoRA recipe says (prepare_model_for_kbit_training)
losses, losses_nf4  each step's loss at dropout 0 from the same initial adapter, the first 20 of a run of 100 steps: the largest difference
generate     completions of the first halves of 32 abstracts, temperature 0.7, top_k 50; the peer's batch is padded on the left

A peer that runs out of memory is measured again with gradient checkpointing, and the report says so. Where unsloth can be imported, nf4
is measured with it, too, as `unsloth` (its dropout is 0: its fast kernels want that).
"""
import argparse
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")          # as train_lm.py does; the peer's processes inherit it
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data_arxiv

SEED, RANK, ALPHA, DROPOUT, WINDOW = 42, 8, 32, 0.05, 50
ALL = ("train", "train_grouped", "nf4", "nf4_grouped", "losses", "losses_nf4", "generate")
PEERS = ("torch", "transformers", "peft", "bitsandbytes", "unsloth")
MEASURED = ("tokens_per_s", "peak_memory_gb", "above_weights_gb")
OUT_OF_MEMORY = 12                                            # exit status of a measured process
ADAMW = dict(betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LENGTHS = [7, 47, 59, 69, 78, 85, 93, 100, 108, 115, 123, 131, 139, 149, 159, 172, 186, 205, 229, 269, 621]    # tokens of a hep-th abstract of
# 1992 to 2001 with BOS and EOS, SmolLM2's tokenizer: minimum, 5%, 10% ... maximum of 17,644; drawn from by linear interpolation


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


def learning_rate(step):
    """The one of train_lm.py in a run of 100 steps."""
    import train_lm
    return train_lm.learning_rate(step, 100, train_lm.arguments([]))


def result(t, model, device, tokens, seconds, **more):
    """What a timed process says; the first of `tokens` and `seconds` is the warm-up's."""
    from train_lm import peak_memory_gb
    weights = sum(p.nbytes for p in model.parameters() if not p.requires_grad) + sum(b.nbytes for b in model.buffers())
    peak = peak_memory_gb(device)
    return {"tokens_per_s": sum(tokens[1:]) / sum(seconds[1:]), "peak_memory_gb": peak, "above_weights_gb": peak - weights / 1e9,
            "warm_up_s": seconds[0], "checkpointing": t.checkpointing, **more}


def training_result(t, model, device, seconds, losses):
    """... with the FLOP/s of training on a frozen base: 4 FLOP a token for each weight that multiplies (2 forward, 2 for the gradient of
    its input), and causal attention's 6 n^2 (H D) a layer for a sequence of n tokens. Padding, recomputation, adapters do not count."""
    from model import load_config
    c, lengths = load_config(t.base), [np.array([len(s) for s in batch]) for batch in t.batches]
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    weights = c.num_hidden_layers * c.hidden_size * (2 * q + 2 * kv + 3 * c.intermediate_size) + c.vocab_size * c.hidden_size
    flop = sum(float(4 * weights * n.sum() + 6 * c.num_hidden_layers * q * (n**2).sum()) for n in lengths[1:])
    return result(t, model, device, [int(n.sum()) for n in lengths], seconds, losses=losses, flop_per_s=flop / sum(seconds[1:]))


def train_ours(t):
    """The steps of train_lm.py: abstracts end to end, token_nll, one flat buffer of gradients, clipping, AdamW."""
    import torch
    from lora import inject
    from model import load_pretrained, token_nll
    device, dtype = place(t)
    model = load_pretrained(t.base, quantize=t.quantize, dtype=dtype, device=device)
    trainable = inject(model, "all", RANK, ALPHA, t.dropout, SEED)
    model.train()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(named.values(), **ADAMW)
    flat = torch.zeros(trainable + 1, device=device)
    for p, gradient in zip(named.values(), flat[:-1].split([p.numel() for p in named.values()])):
        p.grad = gradient.view_as(p)
    losses, seconds = [], []
    for step, batch in enumerate(t.batches):
        began = clock(device)
        flat.zero_()
        count = 0
        for i in range(0, len(batch), t.micro_batch):
            ids, lengths = data_arxiv.collate(batch[i:i + t.micro_batch])
            nll = token_nll(model, ids.to(device), lengths)
            nll.sum().backward()
            flat[-1] += nll.detach().sum()
            count += len(nll)
        gradient = flat[:-1].div_(count)
        gradient.mul_(min(1.0, 1.0 / (gradient.norm().item() + 1e-6)))
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        optimizer.step()
        losses.append(flat[-1].item() / count)
        seconds.append(clock(device) - began)
    return training_result(t, model, device, seconds, losses)


def load_peer(base, device, dtype, quantize, dropout, checkpointing=False, prepare=True):
    """transformers + peft (+ bitsandbytes), as their documentation sets them up for LoRA and QLoRA (`prepare`: norms, lm_head in float32)."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, device_map=str(device), quantization_config=nf4 if quantize else None)
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
        load_peer(t.base, device, dtype, t.quantize, t.dropout, t.checkpointing)
    if t.same_start:
        copy_initial_adapter(model, t.base)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, **ADAMW)
    losses, seconds = [], []
    for step, batch in enumerate(t.batches):
        began = clock(device)
        ids, mask = padded(batch, 0)
        loss = model(input_ids=ids.to(device), attention_mask=mask.long().to(device), labels=ids.masked_fill(~mask, -100).to(device)).loss
        optimizer.zero_grad()
        loss.backward()
        if not torch.nn.utils.clip_grad_norm_(trained, 1.0).item() > 0:
            raise ValueError("no gradient flows through the peer")
        optimizer.param_groups[0]["lr"] = learning_rate(step)
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
    """Random weights of a shape, as a checkpoint that both sides open."""
    import torch
    from model import load_pretrained, save_pretrained
    torch.manual_seed(SEED)
    save_pretrained(load_pretrained(t.shape, random_init=True, dtype=torch.bfloat16, device=t.device), t.base)
    return {}


def measure_peak(t):
    """The fastest of some matrix products, FLOP/s: what this device does at best in this dtype."""
    import torch
    device, dtype = place(t)
    n, best = 8192 if device.type == "cuda" else 2048, 0.0
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in "ab")
    for _ in range(10):
        began = clock(device)
        a @ b
        best = max(best, 2 * n**3 / (clock(device) - began))
    return {"flops": best, "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
            "dtype": str(dtype).removeprefix("torch.")}


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
    """One process -> its result, or None if it ran out of memory. A training peer that does is tried again with gradient checkpointing."""
    path = Path(folder) / "task.json"
    checkpointing = function == "train_peer" and library in args.checkpointing
    common = {k: getattr(args, k) for k in ("base", "shape", "device", "dtype", "micro_batch")}
    path.write_text(json.dumps(common | {"function": function, "library": library, "checkpointing": checkpointing} | task))
    done = subprocess.run([sys.executable, __file__, "--child", str(path)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode == 0:
        return json.loads(path.with_suffix(".result").read_text())
    if done.returncode not in (OUT_OF_MEMORY, -signal.SIGKILL):
        raise ValueError(f"{function} failed:\n{done.stderr[-3000:]}")
    if function != "train_peer" or checkpointing:
        return None
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
    cut = lambda x: window[int(x * WINDOW) * args.batch_size:][:args.batch_size]              # x in [0, 1)
    grouped = [[cut(0.5)] + [cut((k * R + r + 0.5) / (args.steps * R)) for k in range(args.steps)] for r in range(R)]
    return plain, grouped


def plan(args, draw):
    """-> [(comparison, side, function, task)] in the order of running: the sides of a comparison alternate."""
    plain, grouped = training_batches(draw, args)
    jobs, wanted, cuda = [], args.only, args.device == "cuda"
    for name, quantize in (("train", None), ("nf4", "nf4")):
        task = dict(quantize=quantize, dropout=DROPOUT, same_start=False)
        for r in range(args.repetitions):
            on = task | dict(batches=plain[r])
            jobs += [(name, "ours", "train_ours", on)] if name in wanted or f"{name}_grouped" in wanted else []
            jobs += [(name, "peer", "train_peer", on)] if name in wanted else []
            jobs += [(f"{name}_grouped", "peer", "train_peer", task | dict(batches=grouped[r]))] if f"{name}_grouped" in wanted else []
            jobs += [("nf4_unsloth", "peer", "train_peer", on | dict(library="unsloth"))] if name == "nf4" in wanted and cuda and find_spec("unsloth") else []
    batches = [draw(step) for step in range(args.loss_steps)]
    for name, quantize in (("losses", None), ("losses_nf4", "nf4")):
        task = dict(quantize=quantize, dropout=0.0, same_start=True, batches=batches)
        jobs += [(name, "ours", "train_ours", task), (name, "peer", "train_peer", task)] if name in wanted else []
    prompts = [s[:max(1, len(s) // 2)] for step in range(args.prompts) for s in draw(step)][:args.prompts]
    for r in range(args.repetitions) if "generate" in wanted else ():
        task = dict(prompts=prompts, new_tokens=args.new_tokens, seed=SEED + r)
        jobs += [("generate", "ours", "generate_ours", task), ("generate", "peer", "generate_peer", task)]
    return jobs


def medians(found, best):
    """The results of one side -> medians over its repetitions, and each one's speed; None if it ran out of memory."""
    if None in found:
        return None
    m = {k: statistics.median(f[k] for f in found) for k in found[0] if isinstance(found[0][k], float)}
    if "flop_per_s" in m:
        m["flop_utilisation"] = m.pop("flop_per_s") / best
    return m | {"each": [f["tokens_per_s"] for f in found], "gradient_checkpointing": any(f["checkpointing"] for f in found)}


def summary(results, best):
    """{(comparison, side): [result]} -> {comparison: {"ours": .., "peer": .., "ratio": ..}}; best: FLOP/s of a matrix product."""
    comparisons = {}
    for name in (name for name, side in results if side == "peer"):
        if name.startswith("losses"):
            ours, peer = (result and result["losses"] for side in ("ours", "peer") for result in results[name, side])
            difference = max(abs(a - b) for a, b in zip(ours, peer, strict=True)) if ours and peer else None
            comparisons[name] = {"ours": ours, "peer": peer, "largest_difference": difference}
        else:
            ours, peer = medians(results[name.split("_")[0], "ours"], best), medians(results[name, "peer"], best)    # train_grouped: train's ours
            comparisons[name] = {"ours": ours, "peer": peer, "ratio": {k: ours[k] / peer[k] for k in MEASURED} if ours and peer else None}
    return comparisons


def show(comparisons):
    print("\n" + " " * 15 + "".join(f"{title:^26}" for title in ("real tokens/s", "peak memory, GB", "above the weights, GB")) +
          f"\n{'':15}" + f"{'ours':>8}{'peer':>8}{'ratio':>8}  " * 3)
    for name, c in comparisons.items():
        if name.startswith("losses"):
            print(f"{name:15} largest difference of a step's loss: {c['largest_difference']}")
        else:
            cells = [f"{c[side][key]:8.3g}" if c[side] else "   (out)" for key in MEASURED for side in ("ours", "peer", "ratio")]
            print(f"{name:15}" + "".join(cell + "  " * (i % 3 == 2) for i, cell in enumerate(cells)))
    print("(out): out of memory")


def write(path, report):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(f"{path}.tmp").write_text(json.dumps(report, indent=1))
    os.replace(f"{path}.tmp", path)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--base", help="model directory; with --shape its tokenizer only")
    p.add_argument("--data", metavar="FILE", help="records as in the arXiv snapshot (JSONL, .gz or not), or a prepared directory")
    p.add_argument("--shape", help="random weights instead: a name such as llama-3.1-8b, or a directory with a config.json")
    p.add_argument("--only", type=lambda s: s.split(","), default=ALL, help=f"of {','.join(ALL)} (default: all)")
    p.add_argument("--quick", action="store_true", help="one repetition of two steps: does it run? Its figures mean little")
    p.add_argument("--json", metavar="OUT", help="write the report there, after every process")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    p.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help="of both sides (default: auto, as train_lm.py)")
    p.add_argument("--batch-size", type=int, default=8, help="abstracts a step (default %(default)s)")
    p.add_argument("--micro-batch", type=int, default=8, help="of ours: abstracts in one forward pass, as in train_lm.py (default %(default)s)")
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
    if unknown := set(args.only) - set(ALL):
        raise ValueError(f"--only {','.join(sorted(unknown))}: choose among {','.join(ALL)}")
    if not args.shape and not (args.base and args.data):
        raise ValueError("give --base DIR and --data FILE, or --shape for random weights")
    if args.quick:
        args.steps, args.repetitions, args.loss_steps, args.prompts, args.new_tokens = 2, 1, 2, 4, 16
    args.checkpointing = {"peer", "unsloth"} if args.peer_checkpointing else set()
    with tempfile.TemporaryDirectory() as folder:
        from model import load_config
        jobs = plan(args, sequences(args, folder, load_config(args.shape or args.base).vocab_size))
        if args.shape:
            args.base = os.path.join(folder, "base")
            measure(args, folder, "make_checkpoint")
        peak = measure(args, folder, "measure_peak")
        versions = {name: version(name) for name in PEERS if find_spec(name)}
        report = {"machine": {"cpu": platform.processor(), "cores": os.cpu_count(), **peak}, "versions": versions,
                  "settings": {k: v for k, v in vars(args).items() if k not in ("child", "checkpointing")}}
        results = {}
        for name, side, function, task in (bar := tqdm(jobs, unit="process")):
            bar.set_description(f"{name} {side}")
            results.setdefault((name, side), []).append(measure(args, folder, function, side, **task))
            report["comparisons"] = summary(results, peak["flops"])
            if args.json:
                write(args.json, report)
    show(report["comparisons"])


if __name__ == "__main__":
    main()
