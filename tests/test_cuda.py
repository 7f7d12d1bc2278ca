"""What only a GPU can show, in one command and under ten minutes, from a clone with nothing downloaded but packages:

    python -m pytest tests/test_cuda.py -q -s -n 0           # -s: the figures of the 8B model

Commands run as users run them, on tiny models; the CPU's numbers are the reference. test_fake_cuda.py emulates the same on a CPU."""
import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ENVIRONMENT, ROOT, metrics, run
from safetensors.torch import load_file
from test_fake_cuda import jobs, numbers
from torch.nn.attention import SDPBackend, sdpa_kernel

import data_lightcone
import lora
import model
import train_lm
from flow import VelocityCNN, sample
from forked import write_npz

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


def command(text, *start):
    module, *flags = text.split()
    return [sys.executable, *start, ROOT / f"{module}.py", *flags]


@pytest.fixture(scope="module")
def done(tiny, chatty, tmp_path_factory):
    """(out of the CPU, out of the GPU, {name: command} of the GPU): test_fake_cuda.py's commands."""
    root = tmp_path_factory.mktemp("cuda")
    write_npz(root)
    data_lightcone.convert(sorted(root.glob("cube*.npz")), root / "lightcones", bins=94, tau_sigma=1e9, max_x_hi=1.0)
    commands = {device: jobs(tiny, chatty, root, root / device, device) for device in ("cpu", "cuda")}
    for each in commands.values():
        for text in each.values():
            run(command(text))
    return root / "cpu", root / "cuda", commands["cuda"]


def losses(out):
    return numbers([[m.get("loss"), m.get("validation_loss")] for m in metrics(out)])


@pytest.mark.parametrize("name", ["lm", "regress-small", "generate"])
def test_losses(done, name):
    """In float32; where attention has dropout its draws differ, so there the start alone."""
    ours, theirs = (losses(out / name) for out in done[:2])
    if name != "lm":
        ours, theirs = ours[:1], theirs[:1]
    assert theirs == pytest.approx(ours, abs=2e-3 if name == "lm" else 1e-4)


def test_half(done):
    assert losses(done[1] / "half")[0] == pytest.approx(losses(done[0] / "lm")[0], abs=0.03)


def test_perplexity_and_tokens(done):
    """NF4 by its kernel; sampled tokens are equal but where rounding decides a draw: a row in three may differ."""
    ours, theirs = (numbers(json.loads((out / "perplexity.json").read_text())["rows"]) for out in done[:2])
    assert theirs == pytest.approx(ours, rel=1e-2)
    ours, theirs = ([json.loads(line)["completion"] for line in (out / "completions.jsonl").read_text().splitlines()] for out in done[:2])
    assert sum(a == b for a, b in zip(ours, theirs)) >= 4


def test_greedy(tiny):
    prompts = [[0, 5, 9], [0, 7], [0, 3, 4, 5, 6]]
    rows = [model.generate(model.load_pretrained(str(tiny[0]), dtype=torch.float32, device=d), prompts, 40, temperature=0) for d in ("cpu", "cuda")]
    assert rows[0] == rows[1]


def weights(out):
    return load_file(out / "adapter" / "adapter_model.safetensors")


def test_resume_bit_for_bit(done, tmp_path):
    """--deterministic: stopped by SIGTERM and resumed, the adapter is that of an undisturbed run."""
    text = done[2]["lm"].replace("--max-steps 2", "--max-steps 60 --deterministic").replace("--dropout 0", "--dropout 0.05").partition(" --out")[0]
    run(command(f"{text} --out {tmp_path}/whole"))
    stopped = subprocess.Popen([str(c) for c in command(f"{text} --out {tmp_path}/stopped")], env=ENVIRONMENT)
    while stopped.poll() is None and not ((tmp_path / "stopped" / "metrics.jsonl").exists() and len(metrics(tmp_path / "stopped")) > 10):
        time.sleep(0.05)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(60) == 0 and not (tmp_path / "stopped" / "adapter").exists()
    run(command(f"{text} --out {tmp_path}/stopped --resume"))
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_all_gpus(done, tmp_path):
    """torchrun over all GPUs, or its single one, is one process."""
    text = done[2]["lm"].partition(" --out")[0] + f" --out {tmp_path}/all"
    run(command(text, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={torch.cuda.device_count()}"))
    assert losses(tmp_path / "all") == pytest.approx(losses(done[1] / "lm"), abs=1e-3)


@pytest.mark.parametrize("dtype, off", [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("T, S, kind", [(70, 70, "causal"), (1, 90, "mask"), (30, 90, "mask"), (40, 40, "whole")])
@pytest.mark.parametrize("H, G", [(8, 2), (4, 4)])
def test_attention(dtype, off, T, S, kind, H, G):
    """A fused kernel, or an error; the CPU's numbers, gradients too."""
    torch.manual_seed(0)
    mask = torch.ones(T, S, dtype=torch.bool).tril(S - T).expand(3, 1, T, S) if kind == "mask" else None
    at = [torch.randn(3, heads, n, 64) for heads, n in ((H, T), (G, S), (G, S))]
    found = []
    for device, kernels in (("cpu", [SDPBackend.MATH]), ("cuda", FUSED)):
        inputs = [x.to(device, dtype if device == "cuda" else None).requires_grad_() for x in at]
        with sdpa_kernel(kernels):
            y = model.attend(*inputs, None if mask is None else mask.to(device), kind == "causal")
            found.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
            model.attend(*inputs, None if mask is None else mask.to(device), kind == "causal", 0.1).sum().backward()
    for ours, theirs in zip(*found):
        assert (ours - theirs.float().cpu()).abs().max() < off * ours.abs().max()


def test_sampler():
    """dopri5: as many evaluations, nearly the same patches."""
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    net, cond, noise = VelocityCNN(2, 16, 16), torch.randn(6, 2, 14, 14), torch.randn(6, 1, 14, 14)
    x, evaluations = sample(net, cond, noise=noise)
    y, others = sample(net.cuda(), cond.cuda(), noise=noise.cuda())
    assert (x - y.cpu()).abs().max() < 1e-2 and torch.equal(evaluations, others.cpu())


@pytest.fixture(scope="module")
def eight():
    """The 8B model of random weights in NF4, with adapters; tokens and lengths of 8 abstracts."""
    torch.cuda.reset_peak_memory_stats()
    llm = model.load_pretrained("llama-3.1-8b", quantize="nf4", device="cuda", random_init=True, blocks=None)
    lora.inject(llm, "all")
    lengths = [250] * 8
    return llm.train(), torch.randint(0, 128256, (2000,), device="cuda"), lengths


def test_8b(eight, capsys):
    """Peak memory as --dry-run says, tokens a second and utilisation; in a step nothing waits but for the results."""
    llm, ids, lengths = eight
    train_lm.main(["--dry-run", "--base", "llama-3.1-8b", "--device", "cuda", "--micro-batch", "8"])
    expected = json.loads(capsys.readouterr().out)["memory_gb"]
    trained = [p for p in llm.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    seconds = []
    for _ in range(4):
        torch.cuda.synchronize()
        began = time.perf_counter()
        train_lm.update(trained, optimizer, iter([model.token_nll(llm, ids, lengths)]), 1.0)
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() / 1e9
    frozen = sum(m.in_features * m.out_features for m in llm.modules() if hasattr(m, "in_features"))
    flops = train_lm.step_flops(llm.config, frozen, sum(p.numel() for p in trained), lengths)
    utilisation = flops / min(seconds) / train_lm.measured_peak(torch.bfloat16, torch.device("cuda"))
    print(f"{torch.cuda.get_device_name()}: {len(ids) / min(seconds):.0f} tokens/s, {utilisation:.0%} of a matrix product, {peak:.1f} GB (--dry-run: {expected})")
    assert peak < 1.1 * expected
    llm.zero_grad(set_to_none=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.token_nll(llm, ids, lengths).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(p.grad is not None for p in trained)
