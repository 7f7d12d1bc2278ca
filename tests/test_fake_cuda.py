"""Every command that trains, measures or generates, on pretended GPUs: no slow attention, no waiting, the CPU's numbers.

../shared/tools/gpu/fake_cuda.py runs them with real values on "cuda" tensors, raises on what CUDA would refuse and counts what it would wait
for. What it cannot show, such as rounding and time, test_cuda.py does on a GPU. As a script, in a process of its own:

    python fake_cuda.py --root REPOSITORY tests/test_fake_cuda.py JOBS.json DEVICE       the jobs of that file, and DEVICE.json beside it"""
import collections
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import pytest
from conftest import ENVIRONMENT, ROOT, SHARED, metrics
from forked import save_blank, write_npz

TOOL = SHARED / "tools" / "gpu" / "fake_cuda.py"
COUNTERS = {"syncs": "SYNCS", "copies": "COPIES", "attention": "SDPA"}
TRAINED = ("lm", "regress-minimal", "regress-chat", "regress-chat-trainable", "regress-small", "generate")       # as the directories are called
METHODS = {"model.py", "lora.py", "quant.py", "connectors.py", "flow.py", "backward/optimiser"}


def jobs(tiny, chatty, data, out, device):
    """{name: command}, in this order."""
    base, abstracts = tiny
    where = f"--device {device}"
    exact = f"{where} --dtype float32"
    lm = f"train_lm --base {base} --data {abstracts} --subset s3 --batch-size 6 --micro-batch 2 --max-steps 2 --eval-samples 4 --lr 1e-2 --dropout 0"
    regress = (f"train_l3m regress --data {data}/signals.npz --base {chatty} --batch-size 6 --micro-batch 3 --no-duplicate --max-steps 2 --lr 1e-2 "
               f"--dropout 0.1 --log-every 1 {exact}")
    commands = {"lm": f"{lm} {exact} --out {out}/lm", "perplexity": f"eval perplexity {out}/lm --samples 3 --quantize nf4 --json {out}/perplexity.json {exact}",
                "complete": f"eval complete {out}/lm --samples 3 --max-new-tokens 12 --out {out}/completions.jsonl {exact}"}
    for prompt in ("minimal", "chat", "chat-trainable"):
        commands[f"regress-{prompt}"] = f"{regress} --init random --prompt {prompt} --out {out}/regress-{prompt}"
    commands["regress-small"] = f"{regress} --init small --out {out}/regress-small"
    commands["generate"] = (f"train_l3m generate --data {data}/lightcones --base {chatty} --init random --patch 4 --batch-size 3 --micro-batch 2 --max-steps 2 "
                            f"--lr 1e-3 --dropout 0.1 --log-every 1 --velocity 8 12 --eval-samples 2 --out {out}/generate {exact}")
    commands["next-patch"] = f"eval next-patch {out}/generate --max-windows 1 --out {out}/next-patch {where}"
    commands["eval-generate"] = f"eval generate {out}/generate --lightcones 1 --slices 3 --redshifts 10 --figures 0 --samples 2 --out {out}/eval-generate {where}"
    if device == "cuda":
        commands |= {"half": f"{lm} {where} --dtype bfloat16 --max-steps 1 --checkpoint-activations --out {out}/half",
                     "half-complete": f"eval complete {out}/half --samples 2 --max-new-tokens 4 --quantize nf4 --out {out}/half.jsonl {where} --dtype bfloat16"}
    return commands


def do(path, device):
    """Do the jobs of a file -> DEVICE.json: {job: {counter: {line: how many}}}, of its training steps if it trains, else of all it does."""
    import matplotlib.figure
    import torch

    import train_lm
    matplotlib.figure.Figure.savefig = save_blank
    train_lm.measured_peak = lambda *_: 1e11
    fake = sys.modules.get("fake_cuda")
    counters = {}
    if fake:
        counters = {name: getattr(fake, counter) for name, counter in COUNTERS.items()}
        torch.cuda.mem_get_info = lambda *_: (10**11, 10**11)
        torch.Tensor.pin_memory = lambda tensor: tensor
        every = fake.run

        def run(function, arguments, how):
            copies = +fake.COPIES
            result = every(function, arguments, how)
            if how.get("non_blocking"):                       # nobody waits for these
                fake.COPIES.clear()
                fake.COPIES.update(copies)
            return result
        fake.run = run
    update = train_lm.update

    def counted(*arguments):
        for counter in counters.values():
            counter.clear()
        result = update(*arguments)
        for name, counter in counters.items():
            seen.setdefault(name, collections.Counter()).update(counter)
        return result
    train_lm.update = counted                                 # before train_l3m imports it
    found = {}
    for name, command in json.loads(path.read_text()).items():
        module, *flags = command.split()
        for counter in counters.values():
            counter.clear()
        seen = {}
        importlib.import_module(module).main(flags)
        found[name] = seen or {counter: dict(lines) for counter, lines in counters.items()}
    path.with_name(f"{device}.json").write_text(json.dumps(found))


@pytest.fixture(scope="session")
def pretend(request):
    """The environment of a process whose torch has a pretended CUDA, and the command that it begins with."""
    import torch
    if not TOOL.exists() or not shutil.which("g++") or torch.version.cuda:
        pytest.skip("needs ../shared/tools/gpu/fake_cuda.py, g++ and a CPU build of torch")
    directory = request.config.cache.mkdir(f"fake-cuda-{torch.__version__}")
    script, library = directory / TOOL.name, directory / "libpretendcuda.so"
    shutil.copyfile(TOOL, script)
    if not library.exists():                                  # it compiles that at its first call
        subprocess.run([sys.executable, script, "train_lm.py", "--help"], cwd=ROOT, check=True, capture_output=True)
    return ENVIRONMENT | {"LD_PRELOAD": str(library)}, [script, "--root", ROOT, __file__]


@pytest.fixture(scope="module")
def done(pretend, tiny, chatty, tmp_path_factory):
    """(out of the CPU, out of the pretended GPU, what was counted there), and out/three of three processes."""
    import data_lightcone
    root = tmp_path_factory.mktemp("pretend")
    write_npz(root)
    data_lightcone.convert(sorted(root.glob("cube*.npz")), root / "lightcones", bins=94, tau_sigma=1e9, max_x_hi=1.0)
    environment, emulated = pretend
    running = []
    for device, start, variables in (("cpu", [__file__], ENVIRONMENT), ("cuda", emulated, environment)):
        out = root / device
        out.mkdir()
        (out / "jobs.json").write_text(json.dumps(jobs(tiny, chatty, root, out, device)))
        with open(out / "log.txt", "w") as log:
            running.append(subprocess.Popen([sys.executable, *start, out / "jobs.json", device], env=variables, stdout=log, stderr=log))
    for process, device in zip(running, ("cpu", "cuda")):
        assert process.wait() == 0, (root / device / "log.txt").read_text()[-6000:]
    (root / "cuda" / "three.json").write_text(json.dumps({"three": jobs(tiny, chatty, root, root / "cuda", "cuda")["lm"].replace("/lm --", "/three --") + f" --out {root}/cuda/three"}))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3", *emulated, root / "cuda" / "three.json", "rank"]
    finished = subprocess.run(torchrun, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return root / "cpu", root / "cuda", json.loads((root / "cuda" / "cuda.json").read_text())


def numbers(report):
    """The floating point numbers in a report, in its order."""
    if isinstance(report, dict):
        report = list(report.values())
    if isinstance(report, list):
        return [number for item in report for number in numbers(item)]
    return [report] if isinstance(report, float) else []


def test_numbers(done):
    """Losses, tokens, perplexities and errors are the CPU's, and those of three GPUs."""
    cpu, cuda, _ = done
    for name in TRAINED:
        ours, theirs = (numbers([[m.get("loss"), m.get("validation_loss")] for m in metrics(out / name)]) for out in (cpu, cuda))
        assert len(ours) >= 4 and ours == pytest.approx(theirs, abs=2e-5), name
    one, three = ([m["loss"] for m in metrics(out) if "loss" in m] for out in (cpu / "lm", cuda / "three"))
    assert three == pytest.approx(one, abs=2e-5)
    for name in ("perplexity", "next-patch", "eval-generate"):
        ours, theirs = (numbers(json.loads((out / f"{name}.json").read_text())["rows"]) for out in (cpu, cuda))
        assert len(ours) > 10 and ours == pytest.approx(theirs, rel=1e-3, abs=1e-5), name
    ours, theirs = ([json.loads(line)["completion"] for line in (out / "completions.jsonl").read_text().splitlines()] for out in (cpu, cuda))
    assert ours == theirs and len(ours) == 6


def test_attention(done):
    """Never the kernel that writes out all scores; in 16 bit training takes flash."""
    for name, counted in done[2].items():
        assert counted["attention"] and not any("MATH" in kind for kind in counted["attention"]), (name, counted["attention"])
    assert all(" flash " in kind for kind in done[2]["half"]["attention"])


def test_no_waiting(done):
    """A training step waits for the loss and the gradient's norm, after all of its work; a token of a completion and a step of the sampler once."""
    _, _, counted = done
    for name in (*TRAINED, "half"):
        waits = {line.split(":")[0]: line for kind in ("syncs", "copies") for line in counted[name][kind]}
        assert not METHODS & waits.keys(), (name, waits)
    waits = [n for line, n in counted["complete"]["syncs"].items() if line.startswith("model.py") and line.endswith("tolist")]
    assert len(waits) == 1 and waits[0] <= 2 * 12             # base and run, three rows together
    for name in ("next-patch", "eval-generate"):
        assert len([line for line in counted[name]["syncs"] if line.startswith("flow.py")]) <= 2, counted[name]["syncs"]


if __name__ == "__main__":
    do(Path(sys.argv[1]), sys.argv[2])
