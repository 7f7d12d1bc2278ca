"""train_lm.py: the same run whatever the number of processes, the same run after any kill, the same run as peft's."""
import gc
import json
import math
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors import safe_open
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


def saved(out, name="checkpoint.safetensors"):
    """What a checkpoint says beside its tensors."""
    with safe_open(out / name, framework="pt") as file:
        assert list(file.metadata()) == ["state"]                                         # several keys: in random order
        return json.loads(file.metadata()["state"])


def unfinish(out):
    """The state before the very last checkpoint."""
    os.replace(out / "checkpoint-previous.safetensors", out / "checkpoint.safetensors")


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


def test_processes_share_the_tokens():
    rng = np.random.default_rng(0)
    worst = {"dealt": [], "in order": []}
    for size in [48] * 40 + [7, 2]:
        texts = ["x" * n for n in rng.lognormal(7, 0.5, 60).astype(int)]
        rows = rng.permutation(60)[:size]
        shares = [train_lm.share(rows, texts, rank, 3) for rank in range(3)]
        assert sorted(sum(shares, [])) == sorted(rows) and train_lm.share(rows, texts, 0, 1) == list(rows)
        for how, parts in (("dealt", shares), ("in order", [rows[rank::3] for rank in range(3)])):
            tokens = [sum(len(texts[r]) for r in part) for part in parts]
            if size == 48:
                worst[how].append(max(tokens) / np.mean(tokens))
    assert np.mean(worst["dealt"]) < 1.04 < 1.08 < np.mean(worst["in order"])


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
    start = load_file(out / "checkpoint.safetensors")                                     # only for the names
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
    assert not list((tmp_path / "run").rglob("*.tmp"))
    for file in ("checkpoint.safetensors", "checkpoint-previous.safetensors", "adapter/adapter_model.safetensors", "rows.npz"):
        assert (undisturbed / file).read_bytes() == (tmp_path / "run" / file).read_bytes(), file


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
            assert saved(tmp_path / "run")["step"] == len(losses(tmp_path / "run"))
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
    assert saved(tmp_path / "run")["step"] == stopped == len(losses(tmp_path / "run"))
    run([sys.executable, SCRIPT, *flags(tiny, tmp_path / "run", "--checkpoint-every", "1000", "--resume")])
    assert equal(adapter(undisturbed), adapter(tmp_path / "run"))


def test_what_a_run_leaves(tiny, undisturbed):
    """The last two checkpoints, the last and the best adapter; the metrics have every step once and ten validations."""
    assert {p.name for p in undisturbed.iterdir()} == {"config.json", "rows.npz", "metrics.jsonl", "checkpoint.safetensors",
                                                       "checkpoint-previous.safetensors", "adapter", "adapter-best"}
    state = saved(undisturbed)
    best = min((m for m in metrics(undisturbed) if "validation_loss" in m), key=lambda m: m["validation_loss"])
    assert state["step"] == 14 and state["finished"] and state["best"] == best
    assert not saved(undisturbed, "checkpoint-previous.safetensors")["finished"]
    steps = [m["step"] for m in metrics(undisturbed) if "loss" in m]
    assert steps == list(range(1, 15)) and sum("validation_loss" in m for m in metrics(undisturbed)) == 10
    assert {"step", "epoch", "loss", "lr", "grad_norm", "tokens_per_s", "flop_utilisation", "memory_gb"} == set(metrics(undisturbed)[1])
    umask = os.umask(0)
    os.umask(umask)
    assert all(p.stat().st_mode & 0o777 == 0o666 & ~umask for p in undisturbed.rglob("*") if p.is_file())
    ids, texts = data_arxiv.load(tiny[1], "s1", "train")
    assert train_lm.trained_rows(undisturbed) == tuple(set(data_arxiv.row_hashes(rows).tolist()) for rows in (ids, texts))
    data = json.loads((undisturbed / "config.json").read_text())["data"]
    assert data["counts"]["train"] == len(ids) and data["sources"][0]["synthetic"]


def test_best_adapter(tiny, tmp_path):
    """adapter-best/ is that of the lowest validation loss, not the last."""
    from lora import load_adapter
    from model import token_nll
    run([sys.executable, SCRIPT, *flags(tiny, tmp_path / "run", "--lr", "3", "--warmup", "0", "--max-steps", "6")])   # far too high: it gets worse
    best = saved(tmp_path / "run")["best"]
    assert best["step"] < 6
    model = load_pretrained(str(tiny[0]), quantize="nf4", dtype=torch.float32)
    load_adapter(model, tmp_path / "run" / "adapter-best")
    tokenizer, (_, texts) = load_tokenizer(str(tiny[0])), data_arxiv.load(tiny[1], "s1", "validation")
    rows = [data_arxiv.encode(tokenizer, texts[i], 0, 1) for i in np.random.default_rng(42).permutation(len(texts))[:6]]
    assert token_nll(model, *data_arxiv.collate(rows)).mean().item() == pytest.approx(best["validation_loss"], abs=1e-5)


def test_finished_run_ends_without_its_base(tiny, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*.*")}
    done = run([sys.executable, SCRIPT, *flags((tmp_path / "gone", tiny[1]), tmp_path / "run", "--resume")])
    assert "is finished" in done.stdout and before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*.*")}
    shutil.rmtree(tmp_path / "run" / "adapter")                                            # what is missing is made again
    train_lm.main(flags(tiny, tmp_path / "run", "--resume"))
    assert equal(adapter(undisturbed), adapter(tmp_path / "run")) and saved(tmp_path / "run")["best"] == saved(undisturbed)["best"]


def test_signal_during_a_validation(tiny, undisturbed, tmp_path):
    """It is looked at between micro-batches; the checkpoint stands already, and the validation is done again."""
    code = f"import os, signal, sys; sys.path.insert(0, {str(ROOT)!r}); import train_lm\n" \
           "plain, calls = train_lm.token_nll, []\n" \
           "def count(model, *part):\n" \
           "    calls.append(model.training)\n" \
           "    if calls.count(False) == 4: os.kill(os.getpid(), signal.SIGHUP)\n" \
           "    assert calls.count(False) < 5, 'the validation went on'\n" \
           "    return plain(model, *part)\n" \
           "train_lm.token_nll = count\n" \
           f"train_lm.main({flags(tiny, tmp_path / 'run')!r})"
    done = run([sys.executable, "-c", code])
    assert "stopped after step 2 of 14" in done.stdout and saved(tmp_path / "run")["step"] == 2
    run([sys.executable, SCRIPT, *flags(tiny, tmp_path / "run", "--resume")])
    assert equal(adapter(undisturbed), adapter(tmp_path / "run"))
    keys = ("step", "loss", "validation_loss", "grad_norm")
    assert [[m.get(k) for k in keys] for m in metrics(undisturbed)] == [[m.get(k) for k in keys] for m in metrics(tmp_path / "run")]


def test_closed_terminal_saves(tiny, tmp_path):
    """SIGHUP, with a terminal that can no longer be written to; under nohup the run goes on."""
    master, slave = pty.openpty()
    process = subprocess.Popen([sys.executable, SCRIPT, *flags(tiny, tmp_path / "run", "--max-steps", "2000", "--eval-samples", "1")], env=ENVIRONMENT,
                               stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    while not (tmp_path / "run" / "metrics.jsonl").exists() or not losses(tmp_path / "run"):
        assert process.poll() is None
        os.read(master, 1 << 16)
    process.send_signal(signal.SIGHUP)
    os.close(master)
    assert process.wait(timeout=60) == 0 and saved(tmp_path / "run")["step"] == len(losses(tmp_path / "run"))
    code = f"import os, signal, sys; sys.path.insert(0, {str(ROOT)!r}); signal.signal(signal.SIGHUP, signal.SIG_IGN); import train_lm\n" \
           "stop = train_lm.StopSignal(); os.kill(os.getpid(), signal.SIGHUP); assert not stop.requested"
    run([sys.executable, "-c", code])


# ------------------------------------------------------------------------------------------------- the run directory


@pytest.fixture
def stopped(undisturbed, tmp_path):
    """A copy of a run that has yet to say that it is finished: its newest two checkpoints are of the last step."""
    out = tmp_path / "stopped"
    shutil.copytree(undisturbed, out)
    shutil.rmtree(out / "adapter")
    return out


def damage_whole(path, how):
    data = path.read_bytes()
    path.unlink()
    if how == "a directory":
        path.mkdir()
        (path / "state.safetensors").write_bytes(data)
    else:
        half = len(data) // 2
        path.write_bytes({"cut off": data[:-9], "empty": b"", "garbage": b"\x93garbage" * 999, "header only": data[:2000],
                          "zeros at the end": data[:-4000] + bytes(4000), "another step": data.replace(b'step\\": 14', b'step\\": 13'), "a flipped bit": data[:half] + bytes([data[half] ^ 1]) + data[half + 1:],
                          "an adapter": (path.parent / "adapter-best" / "adapter_model.safetensors").read_bytes()}[how])


@pytest.mark.parametrize("how", ["cut off", "empty", "garbage", "header only", "zeros at the end", "a flipped bit", "another step", "an adapter", "a directory"])
def test_damaged_checkpoint(how, tiny, undisturbed, stopped, capfd):
    """It is named and put aside, the one before is used; without one before it: one line."""
    damage_whole(stopped / "checkpoint.safetensors", how)
    capfd.readouterr()
    train_lm.main(flags(tiny, stopped, "--resume"))
    said = capfd.readouterr().err
    assert "checkpoint.safetensors: " in said and "damaged" in said and "going on with checkpoint-previous.safetensors, step 14" in said
    assert equal(adapter(undisturbed), adapter(stopped)) and saved(stopped)["finished"]
    assert len([p for p in stopped.iterdir() if p.name.startswith("damaged-")]) == 1
    for name in ("checkpoint.safetensors", "checkpoint-previous.safetensors"):
        damage_whole(stopped / name, how)
    before = sorted(stopped.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        train_lm.main(flags(tiny, stopped, "--resume"))
    said = capfd.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(said) == 1 and "no whole checkpoint is left" in said[0] and str(stopped / "checkpoint-previous.safetensors") in said[0]
    assert sorted(stopped.rglob("*")) == before


def test_copies_of_checkpoints(tiny, undisturbed, stopped):
    """What a user puts beside them is neither read nor deleted."""
    shutil.copytree(undisturbed, stopped / "checkpoint-0000099-keep")
    for name in ("checkpoint-keep", "checkpoint-0000001-backup", "checkpoint.safetensors.bak", "checkpoint-previous-mine.safetensors", "checkpoint-0000099.safetensors"):
        (stopped / name).write_bytes(b"mine")
    os.replace(stopped / "checkpoint-previous.safetensors", stopped / "checkpoint.safetensors")          # a kill between the two renames, and back
    os.replace(stopped / "checkpoint.safetensors", stopped / "checkpoint-previous.safetensors")
    before = {p.name for p in stopped.iterdir()}
    train_lm.main(flags(tiny, stopped, "--resume"))
    assert equal(adapter(undisturbed), adapter(stopped)) and before <= {p.name for p in stopped.iterdir()}
    assert (stopped / "checkpoint-keep").read_bytes() == b"mine" and len(list((stopped / "checkpoint-0000099-keep").iterdir())) == 7


def test_kill_between_the_two_renames(tiny, undisturbed, tmp_path):
    code = f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); import train_lm\n" \
           "replace, done = os.replace, []\n" \
           "def kill(a, b):\n" \
           "    replace(a, b)\n" \
           "    if 'checkpoint-previous' in str(b): done.append(b)\n" \
           "    if len(done) == 5: os.kill(os.getpid(), 9)\n" \
           "os.replace = kill\n" \
           f"train_lm.main({flags(tiny, tmp_path / 'run')!r})"
    assert run([sys.executable, "-c", code], check=False).returncode == -9
    left = {p.name for p in (tmp_path / "run").iterdir()}
    assert "checkpoint-previous.safetensors" in left and "checkpoint.safetensors" not in left and any(name.endswith(".tmp") for name in left)
    run([sys.executable, SCRIPT, *flags(tiny, tmp_path / "run", "--resume")])
    assert (undisturbed / "checkpoint.safetensors").read_bytes() == (tmp_path / "run" / "checkpoint.safetensors").read_bytes()
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_second_job_is_refused(tiny, tmp_path):
    process = subprocess.Popen([sys.executable, SCRIPT, *flags(tiny, tmp_path / "run", "--max-steps", "2000", "--eval-samples", "1")], env=ENVIRONMENT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert process.poll() is None
            time.sleep(0.01)
        for more in ([], ["--resume"]):
            assert "another process is training in it" in refused(sys.executable, SCRIPT, *flags(tiny, tmp_path / "run", "--max-steps", "2000", "--eval-samples", "1", *more))
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0 and saved(tmp_path / "run")["step"] == len(losses(tmp_path / "run"))
    finally:
        process.kill()


def test_moved_project(tiny, undisturbed, tmp_path):
    """base, data and run in another place: the same command goes on there, an evaluation finds base and data; other texts are refused."""
    for name, source in (("base", tiny[0]), ("data", tiny[1])):
        shutil.copytree(source, tmp_path / "a" / name)
    command = flags(("base", "data"), "run", "--checkpoint-every", "1000")
    done = subprocess.run([sys.executable, SCRIPT, *command, "--max-steps", "14"], cwd=tmp_path / "a", env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    os.replace(tmp_path / "a" / "run" / "checkpoint-previous.safetensors", tmp_path / "a" / "run" / "checkpoint.safetensors")     # not finished
    shutil.rmtree(tmp_path / "a" / "run" / "adapter")
    (tmp_path / "a").rename(tmp_path / "b")
    with pytest.raises(ValueError, match="no adapter.* yet"):
        train_lm.read_settings(tmp_path / "b" / "run", "lm")
    settings = train_lm.read_settings(tmp_path / "b" / "run")
    assert settings["base"] == str(tmp_path / "b" / "base") and settings["data"] == str(tmp_path / "b" / "data")
    done = subprocess.run([sys.executable, SCRIPT, *command, "--resume"], cwd=tmp_path / "b", env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert equal(adapter(undisturbed), adapter(tmp_path / "b" / "run"))
    assert json.loads((tmp_path / "b" / "run" / "config.json").read_text())["directory"] == str(tmp_path / "b" / "run")


def test_content_decides(tiny, stopped, tmp_path):
    """Other texts under the same path, or another base: refused with what differs."""
    shutil.rmtree(tmp_path / "data", ignore_errors=True)
    data_arxiv.synthesize(tmp_path / "snapshot.jsonl", records=700, seed=2)
    data_arxiv.prepare(tmp_path / "snapshot.jsonl", tmp_path / "data")
    unfinish(stopped)
    before = (stopped / "config.json").read_bytes()
    assert "is not what" in refused(sys.executable, SCRIPT, *flags((tiny[0], tmp_path / "data"), stopped, "--resume"))
    from model import CausalLM, Config, init_weights, save_pretrained
    torch.manual_seed(5)
    model = CausalLM(Config("llama", 512, 64, 96, 2, 4, 2, 16, max_position_embeddings=1024, bos_token_id=0, eos_token_id=1))
    init_weights(model)
    save_pretrained(model, tmp_path / "base")
    shutil.copy(tiny[0] / "tokenizer.json", tmp_path / "base")
    assert "another base" in refused(sys.executable, SCRIPT, *flags((tmp_path / "base", tiny[1]), stopped, "--resume"))
    assert (stopped / "config.json").read_bytes() == before            # an evaluation takes the run's own base


def test_read_settings(undisturbed, tmp_path):
    assert train_lm.read_settings(undisturbed, "lm")["subset"] == "s1"
    with pytest.raises(ValueError, match="another experiment's run: use eval.py perplexity"):
        train_lm.read_settings(undisturbed, "regress")
    with pytest.raises(ValueError, match="is no run"):
        train_lm.read_settings(tmp_path / "missing")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="config.json: lacks 'settings'"):
        train_lm.read_settings(tmp_path)


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
    for flag, value in (("--batch-size", "0"), ("--micro-batch", "1.5"), ("--rank", "nan"), ("--alpha", "inf"), ("--alpha", "0"), ("--dropout", "1"), ("--dropout", "-0.1"),
                        ("--warmup", "2"), ("--lr", "nan"), ("--lr", "0"), ("--min-lr", "-1"), ("--eval-samples", "-1"), ("--max-steps", "0"), ("--seed", "-1"),
                        ("--checkpoint-every", "0"), ("--epochs", "two")):
        message = error(flag, value)
        assert f"argument {flag}: {value!r} is not" in message and "number" in message
    assert "never to be trained on" in error("--subset", "control") and "--min-lr 0.1 is above --lr 0.01: lower" in error("--lr", "0.01", "--min-lr", "0.1")
    assert "at most 4096" in error("--rank", "100000")
    assert "'lm_head'" in error("--lora", "q_proj,lm_head") and "''" in error("--lora", "q_proj,")
    assert not list((tmp_path / "new").glob("checkpoint*"))
    with pytest.raises(SystemExit):
        train_lm.main(flags(tiny, tmp_path / "new", "--data", str(tmp_path / "nothing")))
    assert "data_arxiv.py prepare" in capfd.readouterr().err


def test_not_finite_loss(tiny, tmp_path):
    message = refused(sys.executable, SCRIPT, *flags(tiny, tmp_path / "run", "--lr", "1e30", "--max-steps", "50", "--warmup", "0"))
    found = re.search(r"loss of step [2-5] \(abstracts (.*)\) is (nan|inf)", message)
    ids = found[1].split(", ")
    assert len(ids) == 6 and set(ids) <= set(data_arxiv.load(tiny[1], "s1", "train")[0])
    assert saved(tmp_path / "run")["step"] < 5
    message = refused(sys.executable, SCRIPT, *flags(tiny, tmp_path / "other", "--lr", "1e30", "--max-steps", "5", "--warmup", "0"))
    assert "validation_loss is nan" in message and saved(tmp_path / "other")["step"] == 1


def test_disk_full(tiny, tmp_path, capfd):
    """Files may grow to 150 kB only, the checkpoint wants more: one line, and the run directory stays usable."""
    code = f"import resource, signal, sys; sys.path.insert(0, {str(ROOT)!r}); import train_lm\n" \
           "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))\n" \
           f"train_lm.main({flags(tiny, tmp_path / 'run')!r})"
    message = refused(sys.executable, "-c", code)
    assert "could not be written" in message and "free some space" in message and message.endswith("run this again, with --resume")
    left = {p.name for p in (tmp_path / "run").iterdir()}
    assert "config.json" in left and not any(name.endswith(".tmp") for name in left)
    run([sys.executable, SCRIPT, *flags(tiny, tmp_path / "run", "--resume")])
    assert len(losses(tmp_path / "run")) == 14


def test_more_processes_than_gpus(monkeypatch):
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="process 2 on a machine with 1 GPUs: lower --nproc_per_node"):
        train_lm.start_processes("auto")


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
    assert set(report) == {"base", "device", "dtype", "trainable_parameters", "total_parameters", "memory_gb", "mapped_gb", "steps", "tokens"}
    assert report["trainable_parameters"] == count and report["total_parameters"] == 8030261248 + count
    rows = len(data_arxiv.load(tiny[1], "s3", "train")[1])
    assert report["steps"] == 4 * math.ceil(rows / 48) and report["tokens"] > 400 * rows and 5 < report["memory_gb"] < 40
    train_lm.main(["--dry-run", "--base", str(tiny[0]), "--data", "nowhere"])
    report = json.loads(capsys.readouterr().out)
    assert report["steps"] is None and report["tokens"] is None and "prepare" in report["steps and tokens"]


@pytest.mark.parametrize("more, memory", [("--device cuda --micro-batch 8", 19.9), ("--device cuda --micro-batch 16", 33.9),
                                          ("--device cuda --micro-batch 16 --checkpoint-activations", 8.2),
                                          ("--device cpu --micro-batch 1 --checkpoint-activations --dtype bfloat16", 4.7)])
def test_memory_of_8b(more, memory, capsys):
    """Of fake CUDA tensors of the same shape, and of a run on a CPU."""
    train_lm.main(["--dry-run", "--base", "llama-3.1-8b", *more.split()])
    report = json.loads(capsys.readouterr().out)
    assert report["memory_gb"] == pytest.approx(memory, rel=0.25)
    assert report["mapped_gb"] == (pytest.approx(2.1, rel=0.02) if "cpu" in more else 0)


def test_help(capsys):
    with pytest.raises(SystemExit):
        train_lm.main(["--help"])
    said = capsys.readouterr().out
    assert "None" not in said and "(default: 0.0003)" in said and "(default: out/SUBSET-LORA)" in said


def test_recomputing_changes_nothing(tiny, undisturbed, tmp_path):
    """--checkpoint-activations leaves the adapter as it is, bit for bit, with dropout on."""
    run([sys.executable, SCRIPT, *flags(tiny, tmp_path / "run", "--checkpoint-activations")])
    assert equal(adapter(undisturbed), adapter(tmp_path / "run"))


def test_memory_is_what_the_process_owns(tmp_path, monkeypatch):
    """Pages of a mapped file do not count, pages of its own do."""
    gc.collect()                                              # what tests before left is not to go meanwhile
    monkeypatch.setattr(train_lm, "owned_peak", 0.0)
    np.save(tmp_path / "file.npy", np.ones(30_000_000))
    before = train_lm.peak_memory_gb(torch.device("cpu"))
    mapped = np.load(tmp_path / "file.npy", mmap_mode="r")
    assert mapped.sum() == 30_000_000 and train_lm.peak_memory_gb(torch.device("cpu")) < before + 0.1
    own = np.ones(60_000_000)
    assert train_lm.peak_memory_gb(torch.device("cpu")) > before + 0.3
    del own
    assert train_lm.peak_memory_gb(torch.device("cpu")) > before + 0.3                        # the peak


def test_demo_directory(tmp_path):
    """A demo removes what a demo made, and refuses a directory of somebody else's."""
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(ValueError, match="not a demo's"):
        train_lm.fresh_demo(tmp_path, ["data"])
    out = train_lm.fresh_demo(tmp_path / "new", ["data", "one"])
    (out / "data").mkdir()
    (out / "one").write_text("")
    (out / "thesis.tex").write_text("years")
    train_lm.fresh_demo(out, ["data", "one"])
    assert {p.name for p in out.iterdir()} == {"demo.json", "thesis.tex"}
    (tmp_path / "empty").mkdir()
    assert train_lm.fresh_demo(tmp_path / "empty", []).exists()


def test_step_flops():
    """Of the 8B shape: 4 N and the attention a token (causal: half of T^2 pairs, 2 products of 2 D flop, forward once and backward twice)."""
    config, lengths = train_lm.SHAPES["llama-3.1-8b"], [100, 300]
    attention = sum(3 * 32 * 32 * 2 * 2 * 128 * n * n / 2 for n in lengths)
    assert train_lm.step_flops(config, 7_504_658_432, 20_971_520, lengths) == 400 * (4 * 7_504_658_432 + 6 * 20_971_520) + attention


def test_batch_of_every_split_of_the_paper(tiny, capsys):
    """Steps of the paper's s3: 4 epochs of ceil(210,904 / 48) steps."""
    assert train_lm.count_steps(210904, train_lm.arguments([])) == 4 * 4394
