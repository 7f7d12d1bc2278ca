"""Killed at any instant, or out of disk space in any file: nothing is lost, and the same command ends with the undisturbed result.

    python tests/test_kills.py --count 20                     # so many kill -9 of each command, and the disk-full sweep
    python tests/test_kills.py --count 20 --only train simulate

Commands run in forked children (forked.py), so that a kill costs no imports; a kill hits the whole process tree. The
disk is full where a file grows beyond a limit (RLIMIT_FSIZE, EFBIG).
"""
import argparse
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"                       # before torch: forked.py says why
import h5py
import numpy as np

import conftest
import forked

CPU = "--device cpu --dtype float32"
LM = f"train_lm --base base --data data --subset s1 --batch-size 4 --eval-samples 8 --max-steps 8 --checkpoint-every 2 --dropout 0.1 {CPU} --out out/run"
L3M = f"--data lightcones --epochs 2 --validate-every 0.5 --checkpoint-every 2 --log-every 1 --dropout 0.1 {CPU} --out out/run"
KILLED = {                                                    # all write below out/, alone
    "train": f"{LM} --resume",
    "train, two processes": f"{LM} --resume",
    "regress": f"train_l3m regress --base chatty --init random --batch-size 6 --max-steps 8 {L3M} --resume",
    "generate": f"train_l3m generate --base chatty --init random --patch 4 --batch-size 2 --eval-samples 4 --max-steps 4 {L3M} --resume",
    "simulate": "data_lightcone simulate -n 8 --sky 8 --bins 94 --workers 2 --out out/lightcones",
    "convert": "data_lightcone convert cube.npz cube1.npz cube2.npz cube3.npz cube4.npz cube5.npz --bins 94 --out out/lightcones",
    "prepare": "data_arxiv prepare snapshot.jsonl --out out/data",
    "complete": f"eval complete --base base --data data --subset s1 --samples 8 --batch-size 2 --max-new-tokens 20 --out out/c.jsonl {CPU}",
}
FULL = KILLED | {
    "perplexity": f"eval perplexity --base base --data data --subset s1 --samples 4 --json out/p.json {CPU}",
    "export": "eval export lm --out out/export",
    "export of the adapter": "eval export lm --what adapter --out out/export",
    "compare": "eval compare lm --completions texts/c.jsonl --out out/compare",
    "rate": "eval rate texts/c.jsonl --out out/rate.html",
    "inspect": "data_lightcone inspect lightcones --out out/inspect",
    "synthesize": "data_arxiv synthesize out/made.jsonl --records 120",
}
del FULL["train, two processes"]
TIMES = {"tokens_per_s", "samples_per_s", "flop_utilisation", "data_wait", "memory_gb"}


def write_inputs(place):
    """Whole inputs of all the commands."""
    (place / "out").mkdir()

    def models():
        conftest.make_tiny(place)
        conftest.make_chatty(place / "chatty")
    forked.succeed(models, place)
    forked.write_lightcones(place)
    forked.succeed(KILLED["simulate"].replace("-n 8", "-n 60").replace("out/", ""), place)
    (place / "texts").mkdir()
    forked.succeed(KILLED["complete"].replace("out/", "texts/"), place)
    forked.succeed(KILLED["train"].replace("out/run", "lm"), place)


def copy_of(inputs, place):
    shutil.copytree(inputs, place, copy_function=os.link)     # no command writes into its inputs


def start(name, place):
    """Start a command of KILLED -> [(pid, outputs)], one for each of its processes."""
    line = FULL.get(name) or KILLED[name]
    if name != "train, two processes":
        return [forked.start(forked.program(line), place)]
    port = str(random.SystemRandom().randrange(20000, 60000))
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}                      # as torchrun says it
    return [forked.start(forked.program(line), place, world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]


def run(name, place):
    """A command undisturbed; it must succeed -> seconds."""
    began = time.monotonic()
    for process in start(name, place):
        done = forked.finish(*process, 300)
        assert done.status == 0, f"{name}: exit status {done.status}: {done.stderr[-1500:]}"
    return time.monotonic() - began


def content(path):
    """What a file says, without times and places."""
    if path.suffix == ".h5":
        with h5py.File(path) as file:
            values = json.loads(file.attrs["about"]) | {"source": ""}
            file.visititems(lambda name, item: values.update({name: item[()].tobytes()} if isinstance(item, h5py.Dataset) else {}))
        return values
    if path.suffix in (".npz", ".npy"):
        arrays = np.load(path)
        return {key: arrays[key].tobytes() for key in arrays} if path.suffix == ".npz" else arrays.tobytes()
    if path.suffix == ".jsonl" and path.name == "metrics.jsonl":
        return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in path.read_text().splitlines()]
    if path.suffix == ".json":
        text = re.sub(r'"(directory|seconds|date)": [^,\n]*', "", path.read_text())
        return re.sub(r"/tmp/[^\"]*", "", text)
    return path.read_bytes()


def results(place, name):
    """{file: content} of all that a command left; of a conversion the reports tell what it had to do, which differs."""
    found = {str(path.relative_to(place)): content(path) for path in sorted((place / "out").rglob("*"))
             if path.is_file() and not path.name.startswith(".") and path.suffix not in (".png", ".pdf")}
    return {key: value for key, value in found.items() if key != "out/lightcones/convert.json" and "checkpoint-previous" not in key}


def differences(a, b):
    return [key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]


def kill_and_finish(name, inputs, expected, seconds, rng):
    """kill -9 at a random instant, the command again -> None, or what differs from the undisturbed results."""
    instant = rng.uniform(0, seconds)
    with tempfile.TemporaryDirectory(prefix="nanophys-kill-") as scratch:
        place = Path(scratch) / "inputs"
        copy_of(inputs, place)
        processes = start(name, place)
        time.sleep(instant)
        for pid, _ in processes:
            forked.kill(pid)
        for process in processes:
            forked.finish(*process)
        left = sorted(str(path.relative_to(place / "out")) for path in (place / "out").rglob("*"))
        try:
            run(name, place)
        except AssertionError as e:
            return f"killed after {instant:.3f} s, left {left[:6]}: {e}"
        differs = differences(results(place, name), expected)
        if differs:
            return f"killed after {instant:.3f} s, left {left[:6]}: another {differs}"
    return None


def kills(inputs, count, seed=0, only=KILLED):
    """So many kills of each command -> faults."""
    faults = []
    for name in [n for n in KILLED if n in only]:
        rng = random.Random(f"{seed} {name}")
        with tempfile.TemporaryDirectory(prefix="nanophys-kill-") as scratch:
            place = Path(scratch) / "inputs"
            copy_of(inputs, place)
            seconds = run(name, place)
            expected = results(place, name)
        wrong = [fault for fault in (kill_and_finish(name, inputs, expected, seconds, rng) for _ in range(count)) if fault]
        print(f"{name:24}{count} kills within {seconds:.2f} s, {len(expected)} files compared, {len(wrong)} faults", *wrong, sep="\n    ", flush=True)
        faults += [f"{name}: {fault}" for fault in wrong]
    return faults


def limited(line, size):
    """A function that runs a command while no file can grow beyond `size` bytes."""
    def run():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))             # Python ignores SIGXFSZ: EFBIG
        forked.program(line)()
    return run


def fill_disk(name, inputs, expected, size):
    """A command with a full disk, then with space -> None, or what is wrong."""
    with tempfile.TemporaryDirectory(prefix="nanophys-full-") as scratch:
        place = Path(scratch) / "inputs"
        copy_of(inputs, place)
        done = forked.call(limited(FULL[name], size), place, 120)
        out = place / "out"
        left = sorted(str(path.relative_to(out)) for path in out.rglob("*"))
        if done.status == 0:
            differs = differences(results(place, name), expected)
            return f"{size} bytes: exit status 0, and another {differs}" if differs else None
        errors = done.errors()
        if done.status != 2 or len(errors) != 1 or done.last() != errors[0] or "Traceback" in done.stderr:
            return f"{size} bytes: exit status {done.status}, {done.lines()[-3:]}"
        names = {Path(key).name for key in expected} | {Path(key).parent.name for key in expected} | {"png", "pdf", "checkpoint"}
        if not any(word in errors[0] for word in names - {"out"}):
            return f"{size} bytes: no file is named: {errors[0]}"
        temporary = [item for item in left if item.endswith(".tmp") or "/." in f"/{item}"]
        if temporary or (name.startswith("export") and left):
            return f"{size} bytes: left {left}"
        try:
            run(name, place)
        except AssertionError as e:
            return f"{size} bytes, left {left}, then with space: {e}"
        differs = differences(results(place, name), expected)
        if differs:
            return f"{size} bytes, then with space another {differs}"
        forked.call(limited(FULL[name], size), place, 120)    # over its own results: they stay whole
        differs = differences(results(place, name), expected)
        return f"{size} bytes, over whole results: another {differs}" if differs else None


def full_disks(inputs, count, only=FULL):
    """Each command with several limits, one below the size of each of its files -> faults."""
    faults = []
    for name in [n for n in FULL if n in only]:
        with tempfile.TemporaryDirectory(prefix="nanophys-full-") as scratch:
            place = Path(scratch) / "inputs"
            copy_of(inputs, place)
            run(name, place)
            expected = results(place, name)
            sizes = sorted({path.stat().st_size for path in (place / "out").rglob("*") if path.is_file()})
        limits = sorted({100, *(size - 1 for size in sizes), sizes[-1] // 2})
        limits = [limits[round(k)] for k in np.linspace(0, len(limits) - 1, min(count, len(limits)))]
        wrong = [fault for fault in (fill_disk(name, inputs, expected, size) for size in limits) if fault]
        print(f"{name:24}disk full at {', '.join(map(str, limits))} bytes, {len(wrong)} faults", *wrong, sep="\n    ", flush=True)
        faults += [f"{name}: {fault}" for fault in wrong]
    return faults


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2, help="kills of each command, and sizes of full disks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=list(FULL | KILLED), choices=FULL | KILLED, metavar="COMMAND")
    parser.add_argument("--what", nargs="+", default=["kills", "full"], choices=["kills", "full"])
    args = parser.parse_args(argv)
    forked.load_modules()
    with tempfile.TemporaryDirectory(prefix="nanophys-kills-") as scratch:
        inputs = Path(scratch) / "inputs"
        inputs.mkdir()
        write_inputs(inputs)
        faults = kills(inputs, args.count, args.seed, args.only) if "kills" in args.what else []
        faults += full_disks(inputs, args.count, args.only) if "full" in args.what else []
    if faults:
        sys.exit(1)


def test_kills_and_full_disks():
    """A process of its own: pytest's has threads and gradients."""
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=conftest.ENVIRONMENT)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]


if __name__ == "__main__":
    main()
