"""bench_lm.py: every comparison runs through on a small model; what it reports is consistent. No figure is judged here."""
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import bench_lm
from conftest import ROOT

pytest.importorskip("peft")


def run(*flags):
    return subprocess.run([sys.executable, str(ROOT / "tests" / "bench_lm.py"), *map(str, flags)], capture_output=True, text=True)


def test_quick(tiny, tmp_path):
    """Random weights of a shape (so the checkpoint is made, too), real tokens: every side gives a figure, and losses agree."""
    base, data = tiny
    out = tmp_path / "bench.json"
    done = run("--base", base, "--data", data.parent / "snapshot.jsonl", "--shape", base, "--quick", "--dtype", "float32", "--only", "nf4_grouped,losses,generate,load,prepare",
               "--json", out)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(out.read_text())
    comparisons = report["comparisons"]
    assert set(comparisons) == {"nf4_grouped", "losses", "generate", "load", "prepare"}
    for name in ("nf4_grouped", "generate"):
        c = comparisons[name]
        for key in ("tokens_per_s", "peak_memory_gb", "above_weights_gb"):
            assert c["ours"][key] > 0 and c["peer"][key] > 0 and c["ratio"][key] == pytest.approx(c["ours"][key] / c["peer"][key])
        assert name in done.stdout
    assert 0 < comparisons["nf4_grouped"]["ours"]["flop_utilisation"] < 1
    assert comparisons["losses"]["largest_difference"] < 1e-4               # float32 on both sides
    first, second = comparisons["losses"]["ours"]["repetitions"][0]["losses"]
    assert first != second
    for name, key in (("load", "parameters"), ("prepare", "kept")):           # both sides did the same
        assert comparisons[name]["ratio"] and comparisons[name]["ours"]["repetitions"][0][key] > 0
    assert comparisons["prepare"]["ours"]["repetitions"][0]["kept"] == comparisons["prepare"]["peer"]["repetitions"][0]["kept"]


def test_batches(tmp_path):
    """Plain and grouped batches are of the same abstracts; grouped ones pad less and run over all lengths."""
    args = bench_lm.SimpleNamespace(data=None, batch_size=8, steps=5, repetitions=10)
    draw = bench_lm.sequences(args, tmp_path, 1000)
    plain, grouped = bench_lm.training_batches(draw, args)
    assert plain[1][0] == draw(6) != draw(7)
    lengths = np.array([len(s) for step in range(bench_lm.WINDOW) for s in draw(step)])
    assert abs(np.mean(lengths) - 135) < 10 and lengths.min() >= 7 and lengths.max() <= 621
    timed = [batch for r in grouped for batch in r[1:]]                      # 50 of the window's 50 batches: each once
    assert sorted(len(s) for batch in timed for s in batch) == sorted(lengths)
    assert sum(8 * max(map(len, b)) for b in timed) < 1.15 * lengths.sum() < sum(8 * max(map(len, draw(k))) for k in range(50))


def test_out_of_memory(tmp_path, monkeypatch):
    """A training peer without memory is tried again with gradient checkpointing; a failure is told, not raised."""
    args = bench_lm.SimpleNamespace(checkpointing=set(), **dict.fromkeys(bench_lm.COMMON))
    tasks = []

    def process(command, **_):
        tasks.append(json.loads((tmp_path / "task.json").read_text()))
        (tmp_path / "task.result").write_text('{"tokens_per_s": 5.0}')
        memory, broken = tasks[-1]["function"] == "train_peer" and not tasks[-1]["checkpointing"], tasks[-1]["function"] == "load_nf4_peer"
        return bench_lm.SimpleNamespace(returncode=bench_lm.OUT_OF_MEMORY if memory else 1 if broken else 0, stderr="Traceback\nOSError: no\n")
    monkeypatch.setattr(bench_lm.subprocess, "run", process)
    peer = bench_lm.measure(args, tmp_path, "train_peer", batches=[])
    assert peer == {"tokens_per_s": 5.0, "gradient_checkpointing": True} and [t["checkpointing"] for t in tasks] == [False, True]
    assert bench_lm.measure(args, tmp_path, "train_ours") == {"tokens_per_s": 5.0, "gradient_checkpointing": False}
    failed = bench_lm.measure(args, tmp_path, "load_nf4_peer")
    assert failed == {"failed": "OSError: no"}
    comparison = bench_lm.summary({("load", "ours"): [{"seconds": 1.0, "gradient_checkpointing": False}], ("load", "peer"): [failed]}, 1.0)["load"]
    assert comparison["peer"] == failed and comparison["ratio"] == {}

    def full(t):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(bench_lm, "train_ours", full)
    (tmp_path / "task.json").write_text('{"function": "train_ours"}')
    with pytest.raises(SystemExit) as e:
        bench_lm.child(str(tmp_path / "task.json"))
    assert e.value.code == bench_lm.OUT_OF_MEMORY


def test_dequantise(monkeypatch):
    monkeypatch.setattr(bench_lm, "SHAPES", ((64, 128),))
    t = bench_lm.SimpleNamespace(device="cpu")
    for side in (bench_lm.dequantise_ours, bench_lm.dequantise_peer):
        found = side(t)
        assert list(found) == ["64x128 10^9/s"] and found["64x128 10^9/s"] > 0


def test_padded():
    ids, mask = bench_lm.padded([[5, 6, 7], [8]], 0)
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]] and mask.tolist() == [[True] * 3, [True, False, False]]
    ids, mask = bench_lm.padded([[5, 6, 7], [8]], 0, side="left")
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]] and mask.tolist() == [[True] * 3, [False, False, True]]


@pytest.mark.parametrize("flags", [["--only", "speed"], [], ["--base", "nowhere", "--data", "nowhere.jsonl"], ["--shape", "gpt-5"]])
def test_bad_input_is_one_line(flags, capsys):
    with pytest.raises(SystemExit) as e:
        bench_lm.main(flags)
    assert e.value.code == 2 and capsys.readouterr().err.count("\n") == 1
