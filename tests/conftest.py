"""Shared by all tests: the project on the import path, and the real inputs where they are."""
import contextlib
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")       # as train_lm.py does, and why
os.environ.setdefault("GOMP_SPINCOUNT", "4000")
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"          # real inputs, beside the repository; a user's clone has none
sys.path.insert(0, str(ROOT))
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}            # of the processes that tests start
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)                                      # beside each other, two at a time


@pytest.fixture(scope="session")
def smollm2(request):
    """Directory of SmolLM2-135M-Instruct: real pretrained weights of Llama architecture."""
    tool = SHARED / "tools" / "smollm2.py"
    if not tool.exists():
        pytest.skip("needs ../shared/tools/smollm2.py, which unpacks real weights")
    directory = request.config.cache.mkdir("smollm2")
    with open(directory.with_suffix(".lock"), "w") as f:                  # another worker may be unpacking
        fcntl.flock(f, fcntl.LOCK_EX)
        if not (directory / "tokenizer.json").exists():
            made = subprocess.run([sys.executable, str(tool), str(directory)], capture_output=True, text=True)
            if made.returncode:
                pytest.fail(f"smollm2.py could not unpack the weights: {made.stderr[-500:]}")
    return directory


@pytest.fixture(scope="session")
def abstracts():
    """Path of 25,224 real hep-th records."""
    path = SHARED / "data" / "hepth_1992_2001.jsonl.gz"
    if not path.exists():
        pytest.skip("needs ../shared/data/hepth_1992_2001.jsonl.gz, real records")
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """(base, data): a two-block Llama of random weights with a tokenizer, and a prepared made-up snapshot of all categories."""
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def make_tiny(root):
    """What the fixture `tiny` returns, written into `root`."""
    import data_arxiv
    from model import CausalLM, Config, init_weights, save_pretrained
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    data_arxiv.synthesize(root / "snapshot.jsonl", records=700, seed=1)
    data_arxiv.prepare(root / "snapshot.jsonl", root / "data")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator(data_arxiv.load(root / "data", "s3", "train")[1], trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<s>", "</s>"], show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    torch.manual_seed(0)
    model = CausalLM(Config("llama", tokenizer.get_vocab_size(), 64, 96, 2, 4, 2, 16, max_position_embeddings=1024, bos_token_id=0, eos_token_id=1))
    init_weights(model)
    save_pretrained(model, root / "base")
    tokenizer.save(str(root / "base" / "tokenizer.json"))
    return root / "base", root / "data"


@pytest.fixture(scope="session")
def chatty(tmp_path_factory):
    """Directory of a two-block Qwen2 of random weights whose tokenizer knows ChatML."""
    return make_chatty(tmp_path_factory.mktemp("chatty") / "base")


def make_chatty(directory):
    """What the fixture `chatty` returns, written into `directory`."""
    from model import CausalLM, Config, init_weights, save_pretrained
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    torch.manual_seed(3)
    model = CausalLM(Config("qwen2", tokenizer.get_vocab_size(), 48, 80, 2, 4, 2, 12, 1e-6, tie_word_embeddings=True, eos_token_id=256))
    init_weights(model)
    for layer in model.model.layers:                          # biases and norms that matter
        for p in (layer.self_attn.q_proj.bias, layer.self_attn.k_proj.bias, layer.self_attn.v_proj.bias):
            p.data.normal_(0, 0.5)
        layer.input_layernorm.weight.data.uniform_(0.5, 2)
    save_pretrained(model, directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def kill_tree(process):
    """kill -9 to a process and all its children, at once."""
    import psutil
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for p in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            p.kill()
    process.wait()
    psutil.wait_procs(family, timeout=20)


def run(command, check=True):
    """A command with one thread a process -> what it left; it must succeed if `check`."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=ENVIRONMENT)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def metrics(out):
    """The whole lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines(keepends=True) if line.endswith("\n")]
