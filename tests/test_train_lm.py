"""train_lm.py: the same run whatever the number of processes, the same run after any kill, the same run as peft's."""
import json
import math
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import data_arxiv
import train_lm
from conftest import ENVIRONMENT, ROOT, kill_tree, metrics, run
from model import load_pretrained, load_tokenizer

SCRIPT = str(ROOT / "train_lm.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def flags(tiny, out, *more):
    base, data = tiny
    return ["--base", str(base), "--data", str(data), "--out", str(out), "--subset", "s1", "--device", "cpu", "--dtype", "float32", "--batch-size", "6",
            "--micro-batch", "2", "--max-steps", "14", "--checkpoint-every", "3", "--eval-samples", "6", *more]


def losses(out):
    return [m["loss"] for m in metrics(out) if "loss" in m]


def adapter(out):
    return load_file(out / "adapter" / "adapter_model.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    """A run with dropout that nothing disturbed."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    run([sys.executable, SCRIPT, *flags(tiny, out)])
    return out


# -------------------------------------------------------------------------------------------------------- the same run


def test_process_counts_agree(tiny, tmp_path):
    """One process, three, and two torchrun agents that stand for two nodes; batches of 7 leave some process with less."""
    more = ["--dropout", "0", "--batch-size", "7"]
    run([sys.executable, SCRIPT, *flags(tiny, tmp_path / "one", *more)])
    run([*TORCHRUN, "--standalone", "--nproc_per_node=3", SCRIPT, *flags(tiny, tmp_path / "three", *more)])
    port = random.randint(20000, 60000)
    nodes = [subprocess.Popen([*TORCHRUN, "--nnodes=2", f"--node_rank={i}", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}", SCRIPT,
                               *flags(tiny, tmp_path / "nodes", *more)], env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for i in range(2)]
    for node in nodes:
        error = node.communicate()[1]
        assert node.returncode == 0, error[-2000:]
    for other in ("three", "nodes"):
        assert len(losses(tmp_path / "one")) == 14
        assert max(abs(a - b) for a, b in zip(losses(tmp_path / "one"), losses(tmp_path / other), strict=True)) < 1e-5
        one, many = adapter(tmp_path / "one"), adapter(tmp_path / other)
        assert all(torch.allclose(one[k], many[k], atol=2e-5) for k in one)


def test_micro_batches_change_nothing(tiny, tmp_path):
    train_lm.main(flags(tiny, tmp_path / "a", "--dropout", "0", "--micro-batch", "6"))
    train_lm.main(flags(tiny, tmp_path / "b", "--dropout", "0", "--micro-batch", "1"))
    assert max(abs(a - b) for a, b in zip(losses(tmp_path / "a"), losses(tmp_path / "b"), strict=True)) < 1e-5


def test_same_as_peft(tiny, tmp_path):
    """Fourteen steps of the same batches with peft, torch's AdamW and a padded batch: the same losses and the same adapter."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    base, data = tiny
    out = tmp_path / "ours"
    train_lm.main(flags(tiny, out, "--dropout", "0", "--quantize", "none"))
    ours = adapter(out)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(
        r=8, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"))
    start = load_file(out / "checkpoint-0000014" / "state.safetensors")                   # only for the names
    trained = {}
    fresh = load_pretrained(str(base), dtype=torch.float32)
    train_lm.inject(fresh, "all", 8, 32, 0.0, seed=42)
    initial = dict(fresh.named_parameters())
    for name, p in model.named_parameters():
        if p.requires_grad:
            key = name.removeprefix("base_model.model.").replace(".default.weight", "")
            assert key in start
            p.data.copy_(initial[key].data)
            trained[key] = p
    optimizer = torch.optim.AdamW(trained.values(), lr=3e-4, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1)
    tokenizer, (_, texts) = load_tokenizer(str(base)), data_arxiv.load(data, "s1", "train")
    mine = []
    for step in range(14):
        sequences = [data_arxiv.encode(tokenizer, texts[r], 0, 1) for r in data_arxiv.batch_rows(len(texts), 6, 42, step)]
        width = max(map(len, sequences))
        ids = torch.tensor([s + [1] * (width - len(s)) for s in sequences])
        mask = torch.arange(width) < torch.tensor([[len(s)] for s in sequences])
        loss = model(ids, attention_mask=mask.long(), labels=ids.masked_fill(~mask, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        warmup = math.ceil(1.4)
        optimizer.param_groups[0]["lr"] = 3e-4 * (step + 1) / warmup if step < warmup else \
            3e-6 + (3e-4 - 3e-6) * (1 + math.cos(math.pi * (step - warmup) / (13 - warmup))) / 2
        optimizer.step()
        mine.append(loss.item())
    assert max(abs(a - b) for a, b in zip(mine, losses(out), strict=True)) < 1e-5
    for key, p in trained.items():
        assert torch.allclose(p, ours[f"base_model.model.{key}.weight"], atol=2e-5), key


# --------------------------------------------------------------------------------------------------- stopped and resumed


def test_kill_9_and_resume(tiny, undisturbed, tmp_path):
    """One process, killed without warning at random instants until it is through: the adapter is bit for bit the undisturbed one."""
    draw, kills = random.Random(0), 0
    while True:
        process = subprocess.Popen([sys.executable, SCRIPT, *flags(tiny, tmp_path / "run", "--resume")], env=ENVIRONMENT,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        began = time.time()
        while process.poll() is None and not (tmp_path / "run").exists() and kills < 4:
            time.sleep(0.01)                                                              # importing torch takes longer than the run
        try:
            assert process.wait(timeout=draw.uniform(0.2, 1.5) if kills < 4 else 120) == 0
            break
        except subprocess.TimeoutExpired:
            kill_tree(process)
            kills += 1
        assert time.time() - began < 200
    assert kills >= 1
    assert equal(adapter(undisturbed), adapter(tmp_path / "run"))
    assert losses(undisturbed) == losses(tmp_path / "run") and [m["step"] for m in metrics(undisturbed)] == [m["step"] for m in metrics(tmp_path / "run")]
    assert not list((tmp_path / "run").glob("tmp-*"))


def test_two_processes_stopped_and_killed(tiny, tmp_path):
    """Under torchrun: SIGTERM to the agent, resume, kill -9 of everything, resume: the adapter is the undisturbed one."""
    command = [*TORCHRUN, "--standalone", "--nproc_per_node=2", SCRIPT]
    run([*command, *flags(tiny, tmp_path / "undisturbed")])
    for stop_at, stop in ((2, lambda process: process.send_signal(signal.SIGTERM)), (7, kill_tree)):
        process = subprocess.Popen([*command, *flags(tiny, tmp_path / "run", "--resume")], env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (tmp_path / "run" / "metrics.jsonl").exists() or len(losses(tmp_path / "run")) < stop_at:
            assert process.poll() is None
            time.sleep(0.005)
        stop(process)
        process.wait(timeout=60)
        if stop_at == 2:
            assert max((tmp_path / "run").glob("checkpoint-*")).name == f"checkpoint-{len(losses(tmp_path / 'run')):07d}"
    assert not (tmp_path / "run" / "adapter").exists()
    run([*command, *flags(tiny, tmp_path / "run", "--resume")])
    assert equal(adapter(tmp_path / "undisturbed"), adapter(tmp_path / "run")) and losses(tmp_path / "undisturbed") == losses(tmp_path / "run")


def test_sigterm_saves_the_last_step(tiny, undisturbed, tmp_path):
    process = subprocess.Popen([sys.executable, SCRIPT, *flags(tiny, tmp_path / "run", "--checkpoint-every", "1000")], env=ENVIRONMENT,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while not (tmp_path / "run" / "metrics.jsonl").exists() or not losses(tmp_path / "run"):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    stopped = int(re.search(r"stopped after step (\d+) of 14", printed)[1])
    assert max((tmp_path / "run").glob("checkpoint-*")).name == f"checkpoint-{stopped:07d}" and len(losses(tmp_path / "run")) == stopped
    run([sys.executable, SCRIPT, *flags(tiny, tmp_path / "run", "--checkpoint-every", "1000", "--resume")])
    assert equal(adapter(undisturbed), adapter(tmp_path / "run"))


def test_checkpoints_kept(undisturbed):
    """The last two and the best; the metrics have every step once and ten validations."""
    names = sorted(p.name for p in undisturbed.glob("checkpoint-*"))
    best = min((m for m in metrics(undisturbed) if "validation_loss" in m), key=lambda m: m["validation_loss"])["step"]
    assert set(names) == {"checkpoint-0000012", "checkpoint-0000014", f"checkpoint-{best:07d}"}
    steps = [m["step"] for m in metrics(undisturbed) if "loss" in m]
    assert steps == list(range(1, 15)) and sum("validation_loss" in m for m in metrics(undisturbed)) == 10
    assert {"step", "epoch", "loss", "lr", "grad_norm", "tokens_per_s", "flop_utilisation", "memory_gb"} == set(metrics(undisturbed)[1])


# ------------------------------------------------------------------------------------------------------------ bad input


def refused(*command):
    done = run(command, check=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert done.returncode == 2 and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
    return errors[0]


def test_refusals(tiny, undisturbed, tmp_path, capfd):
    def error(*more, out=tmp_path / "new"):
        with pytest.raises(SystemExit) as stop:
            train_lm.main(flags(tiny, out, *more))
        assert stop.value.code == 2
        return capfd.readouterr().err.strip().splitlines()[-1]
    assert "already holds a run: add --resume" in error(out=undisturbed)
    message = error("--resume", "--lr", "1e-3", "--rank", "4", out=undisturbed)
    assert "lr was 0.0003, now 0.001" in message and "rank was 8, now 4" in message
    assert "no linear layer is named 'w_proj'" in error("--lora", "w_proj")
    assert "neither a directory nor a hub id" in error("--base", "./nowhere")
    assert "--batch-size must be at least 1" in error("--batch-size", "0")
    with pytest.raises(SystemExit):
        train_lm.main(flags(tiny, tmp_path / "new", "--data", str(tmp_path / "nothing")))
    assert "data_arxiv.py prepare" in capfd.readouterr().err


def test_not_finite_loss(tiny, tmp_path):
    message = refused(sys.executable, SCRIPT, *flags(tiny, tmp_path / "run", "--lr", "1e30", "--max-steps", "5", "--warmup", "0"))
    assert re.search(r"loss of step [2-5] is (nan|inf)", message)
    ids = message.split("Its abstracts: ")[1].split(". Look")[0].split(", ")
    assert len(ids) == 6 and set(ids) <= set(data_arxiv.load(tiny[1], "s1", "train")[0])
    assert (tmp_path / "run" / "checkpoint-0000000" / "state.json").exists()


def test_disk_full(tiny, tmp_path, capfd):
    """Files may grow to 150 kB only, the checkpoint wants more: one line, and the run directory stays usable."""
    code = f"import resource, signal, sys; sys.path.insert(0, {str(ROOT)!r}); import train_lm\n" \
           "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))\n" \
           f"train_lm.main({flags(tiny, tmp_path / 'run')!r})"
    message = refused(sys.executable, "-c", code)
    assert "could not be written" in message and "free some space" in message
    left = {p.name for p in (tmp_path / "run").iterdir()}
    assert "config.json" in left and not any(name.startswith("tmp-") for name in left)
    run([sys.executable, SCRIPT, *flags(tiny, tmp_path / "run", "--resume")])
    assert len(losses(tmp_path / "run")) == 14


def test_out_of_memory_names_the_flag(tiny, tmp_path, monkeypatch, capfd):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(train_lm, "token_nll", full)
    with pytest.raises(SystemExit) as stop:
        train_lm.main(flags(tiny, tmp_path / "run"))
    assert stop.value.code == 2 and "lower --micro-batch (now 2)" in capfd.readouterr().err


# ------------------------------------------------------------------------------------------------- schedule and dry run


def test_learning_rate():
    args = train_lm.arguments([])
    rates = [train_lm.learning_rate(i, 100, args) for i in range(100)]
    assert rates[0] == pytest.approx(3e-5) and rates[9] == pytest.approx(3e-4) and max(rates) == rates[9] and rates[99] == pytest.approx(3e-6)
    assert rates[10] == pytest.approx(3e-4) and rates[54] > 1.5e-4 > rates[56] and rates[9:] == sorted(rates[9:], reverse=True)
    assert train_lm.learning_rate(0, 1, args) == pytest.approx(3e-4)


@pytest.mark.parametrize("lora, count", [("qkv", 4718592), ("all", 20971520)])
def test_dry_run(lora, count, tiny, capsys):
    train_lm.main(["--dry-run", "--base", "llama-3.1-8b", "--lora", lora, "--data", str(tiny[1])])
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"config", "trainable_parameters", "total_parameters", "memory_gb", "steps", "tokens"}
    assert report["trainable_parameters"] == count and report["total_parameters"] == 8030261248 + count
    rows = len(data_arxiv.load(tiny[1], "s3", "train")[1])
    assert report["steps"] == 4 * math.ceil(rows / 48) and report["tokens"] > 400 * rows and 5 < report["memory_gb"] < 40
    train_lm.main(["--dry-run", "--base", str(tiny[0]), "--data", "nowhere"])
    report = json.loads(capsys.readouterr().out)
    assert report["steps"] is None and report["tokens"] is None


def test_recomputing_and_profiling_change_nothing(tiny, undisturbed, tmp_path):
    """--checkpoint-activations and --profile leave the adapter as it is, bit for bit, with dropout on; the trace opens as JSON."""
    run([sys.executable, SCRIPT, *flags(tiny, tmp_path / "run", "--checkpoint-activations", "--profile")])
    assert equal(adapter(undisturbed), adapter(tmp_path / "run"))
    events = json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]
    assert any(e.get("name") == "aten::mm" for e in events)


def test_step_flops():
    """Of the 8B shape: 4 N and the attention a token (causal: half of T^2 pairs, 2 products of 2 D flop, forward once and backward twice)."""
    config, lengths = train_lm.SHAPES["llama-3.1-8b"], [100, 300]
    attention = sum(3 * 32 * 32 * 2 * 2 * 128 * n * n / 2 for n in lengths)
    assert train_lm.step_flops(config, 7_504_658_432, 20_971_520, lengths) == 400 * (4 * 7_504_658_432 + 6 * 20_971_520) + attention


def test_batch_of_every_split_of_the_paper(tiny, capsys):
    """Steps of the paper's s3: 4 epochs of ceil(210,904 / 48) steps."""
    assert train_lm.count_steps(210904, train_lm.arguments([])) == 4 * 4394
