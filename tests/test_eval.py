"""eval.py perplexity against transformers and scipy."""
import json
import os
import shutil
import stat

import numpy as np
import pytest
import torch

import data_arxiv
import eval as nano_eval
import train_lm
from model import load_pretrained, load_tokenizer


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """A run that learnt something."""
    out = tmp_path_factory.mktemp("eval") / "s1-all"
    train_lm.main(["--base", str(tiny[0]), "--data", str(tiny[1]), "--out", str(out), "--subset", "s1", "--device", "cpu", "--dtype", "float32",
                   "--batch-size", "8", "--max-steps", "30", "--lr", "1e-2", "--eval-samples", "8"])
    return out


def perplexity(tmp_path, *arguments):
    nano_eval.main(["perplexity", *map(str, arguments), "--device", "cpu", "--dtype", "float32", "--json", str(tmp_path / "p.json")])
    return json.loads((tmp_path / "p.json").read_text())["rows"]


def values(row):
    return row["values"]["perplexity"]


def mean(row):
    return row["measures"]["perplexity"]["mean"]


def test_against_transformers(tiny, trained, tmp_path, capsys):
    """Base and merged run, abstract by abstract, against transformers and peft on one abstract at a time; printed and drawn as well."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    base, run = perplexity(tmp_path, trained)
    assert base["weights"] == "32 bit" and run["weights"] == "merged, 32 bit"
    ids, texts = data_arxiv.load(tiny[1], "s1", "test")
    assert list(values(base)) == ids and base["n"] == len(ids)
    tokenizer = load_tokenizer(str(tiny[0]))
    theirs, adapted = (AutoModelForCausalLM.from_pretrained(tiny[0], dtype=torch.float32) for _ in range(2))
    for result, model in ((base, theirs), (run, PeftModel.from_pretrained(adapted, trained / "adapter"))):
        for i, text in list(zip(ids, texts))[:10]:
            sequence = torch.tensor([[0, *tokenizer.encode(text, add_special_tokens=False).ids]])
            with torch.no_grad():
                assert values(result)[i] == pytest.approx(model(sequence, labels=sequence).loss.exp().item(), rel=1e-4)
    s = run["measures"]["perplexity"]
    assert mean(run) < 0.8 * mean(base) and s["low"] < s["mean"] < s["high"]
    assert "s1-all" in capsys.readouterr().out


def test_batches_do_not_matter(tiny):
    model, tokenizer = load_pretrained(str(tiny[0]), dtype=torch.float32), load_tokenizer(str(tiny[0]))
    texts = data_arxiv.load(tiny[1], "s1", "test")[1][:12]
    one, tokens = nano_eval.perplexities(model, tokenizer, texts, batch_tokens=1)
    many, _ = nano_eval.perplexities(model, tokenizer, texts, batch_tokens=3000)
    back, _ = nano_eval.perplexities(model, tokenizer, texts[::-1], batch_tokens=1500)
    assert np.abs(one / many - 1).max() < 1e-5 and np.abs(one / back[::-1] - 1).max() < 1e-5
    assert tokens.tolist() == [len(tokenizer.encode(t, add_special_tokens=False).ids) for t in texts]


def test_statistics_against_scipy():
    from scipy import stats
    values = np.random.default_rng(0).lognormal(2, 0.5, 80)
    s = nano_eval.summary(values)
    oracle = stats.bootstrap((values,), np.mean, n_resamples=9999, method="percentile", rng=np.random.default_rng(1)).confidence_interval
    assert s["low"] == pytest.approx(oracle.low, rel=0.01) and s["high"] == pytest.approx(oracle.high, rel=0.01)
    assert s["mean"] == pytest.approx(values.mean()) and s["median"] == pytest.approx(np.median(values)) and s["std"] == pytest.approx(values.std())


def test_nf4_is_unmerged(trained, tmp_path):
    base, run = perplexity(tmp_path, trained, "--quantize", "nf4", "--samples", 10)
    assert base["weights"] == "NF4" and run["weights"] == "unmerged, NF4" and len(values(run)) == 10
    merged = perplexity(tmp_path, trained, "--samples", 10)[1]
    assert list(values(merged)) == list(values(run)) and mean(merged) != mean(run) == pytest.approx(mean(merged), rel=0.2)


def test_base_saved_in_4_bits(tiny, trained, tmp_path, capsys):
    """A checkpoint that bitsandbytes quantised is evaluated unmerged, and says so."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    theirs = AutoModelForCausalLM.from_pretrained(tiny[0], dtype=torch.bfloat16, device_map="cpu", quantization_config=BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True))
    theirs.save_pretrained(tmp_path / "base")
    shutil.copy(tiny[0] / "tokenizer.json", tmp_path / "base")
    base, run = perplexity(tmp_path, trained, "--base", tmp_path / "base", "--samples", 5)
    assert run["weights"] == "unmerged, NF4" and "evaluated unmerged on NF4" in capsys.readouterr().err


def test_own_texts(tiny, tmp_path, capsys):
    ids, texts = data_arxiv.load(tiny[1], "s1", "test")
    with open(tmp_path / "mine.jsonl", "w") as file:
        for i, text in zip(ids[:4], texts):
            file.write(json.dumps({"id": i, "abstract": "  " + text.replace(" ", "\n  ", 3)}) + "\n")
        file.write(json.dumps({"id": "empty", "abstract": ""}) + "\n")
    mine, = perplexity(tmp_path, "--base", tiny[0], "--data", tmp_path / "mine.jsonl")
    assert list(values(mine)) == ids[:4] and "1 empty abstract" in capsys.readouterr().err
    base = tmp_path / "ba\x1b[31mse"
    base.symlink_to(tiny[0])
    split, = perplexity(tmp_path, "--base", base, "--data", tiny[1])
    printed = capsys.readouterr()
    assert "ba?[31mse" in printed.err and "\x1b[31m" not in printed.out + printed.err
    assert all(values(mine)[i] == pytest.approx(values(split)[i], rel=1e-4) for i in ids[:4])


def error_of(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        nano_eval.main([*map(str, arguments)])
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_refusals(tiny, trained, tmp_path, capsys):
    def error(*arguments):
        return error_of(capsys, "perplexity", *arguments)
    assert "is no run" in error(tmp_path) and "is no run" in error(tmp_path / "nowhere")
    assert "give run directories" in error()
    shutil.copytree(trained, tmp_path / "unfinished", ignore=shutil.ignore_patterns("adapter"))
    assert "has no adapter/adapter_model.safetensors yet" in error(tmp_path / "unfinished")
    (tmp_path / "bad.jsonl").write_text('{"id": 1, "abstract": "x"}\n{"id": 2}\n')
    assert "bad.jsonl, line 2" in error(trained, "--data", tmp_path / "bad.jsonl")
    (tmp_path / "twice.jsonl").write_text('{"id": 1, "abstract": "x"}\n{"id": 1, "abstract": "y"}\n')
    assert "lines 1 and 2" in error(trained, "--data", tmp_path / "twice.jsonl")
    assert "no prepared abstracts" in error(trained, "--subset", "own", "--data", tmp_path)
    for flag, value in (("--samples", "-1"), ("--samples", "nan"), ("--batch-tokens", "0"), ("--seed", "-1"), ("--dtype", "int8")):
        assert "argument " + flag in error(trained, flag, value)
    settings = json.loads((trained / "config.json").read_text())
    settings["settings"]["base"] = str(tmp_path / "elsewhere" / "base")
    shutil.copytree(trained, tmp_path / "lost")
    (tmp_path / "lost" / "config.json").write_text(json.dumps(settings))
    assert "not on this machine: say with --base" in error(tmp_path / "lost")
    settings["settings"]["base"] = 7
    (tmp_path / "lost" / "config.json").write_text(json.dumps(settings))
    assert "base is 7" in error(tmp_path / "lost")


def test_numbers_that_are_not_finite(tiny, tmp_path, capsys):
    """A NaN anywhere in the model is an error about the model, with the abstract or the tensor; never "empty abstracts"."""
    from safetensors.torch import load_file, save_file
    shutil.copytree(tiny[0], tmp_path / "nan")
    weights = load_file(tmp_path / "nan" / "model.safetensors")
    weights["model.embed_tokens.weight"][300] = float("nan")
    save_file(weights, tmp_path / "nan" / "model.safetensors", metadata={"format": "pt"})
    for quantize in ("none", "nf4"):
        line = error_of(capsys, "perplexity", "--base", tmp_path / "nan", "--data", tiny[1], "--quantize", quantize)
        assert "model.embed_tokens.weight" in line or "the perplexity nan" in line
    weights["model.embed_tokens.weight"][300] = 0
    weights["model.norm.weight"][:] = 3e38                     # finite itself, its results are not
    save_file(weights, tmp_path / "nan" / "model.safetensors", metadata={"format": "pt"})
    assert "gives the abstract" in error_of(capsys, "perplexity", "--base", tmp_path / "nan", "--data", tiny[1])


def test_not_on_what_it_was_trained_on(tiny, trained, tmp_path, capsys):
    """Training rows among the test texts are refused with their number, wherever they come from; --split train asks for them."""
    ids, texts = data_arxiv.load(tiny[1], "s1", "train")
    others, fresh = data_arxiv.load(tiny[1], "s1", "test")
    rows = [*zip(ids[:3], texts[:3]), *zip(others[:4], fresh[:4]), (ids[5], fresh[5])]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps({"id": i, "abstract": t}) + "\n" for i, t in rows))
    for command in ("perplexity", "complete"):
        assert "3 of the 8 abstracts" in error_of(capsys, command, trained, "--data", tmp_path / "mixed.jsonl")
    assert "3 of the 8" in error_of(capsys, "perplexity", "--adapter", trained / "adapter", "--data", tmp_path / "mixed.jsonl")
    (tmp_path / "fresh.jsonl").write_text("".join(json.dumps({"id": i, "abstract": t}) + "\n" for i, t in rows[3:]))
    assert len(perplexity(tmp_path, trained, "--data", tmp_path / "fresh.jsonl")) == 2
    assert "1 of the 5 ids" in capsys.readouterr().err
    assert perplexity(tmp_path, trained, "--split", "train", "--samples", 4)[1]["n"] == 4


def test_a_moved_project(tiny, trained, tmp_path):
    """Base, data and run carried elsewhere together: everything is found by where it lay before."""
    for source, name in ((tiny[0], "base"), (tiny[1], "data"), (trained, "s1-all")):
        shutil.copytree(source, tmp_path / "a" / name)
    run = tmp_path / "a" / "s1-all"
    config = json.loads((run / "config.json").read_text())
    config["directory"] = str(run)
    config["settings"] |= {"base": str(tmp_path / "a" / "base"), "data": str(tmp_path / "a" / "data")}
    (run / "config.json").write_text(json.dumps(config))
    (tmp_path / "a").rename(tmp_path / "b")
    moved = perplexity(tmp_path, tmp_path / "b" / "s1-all", "--samples", 3)
    assert [mean(r) for r in moved] == [mean(r) for r in perplexity(tmp_path, trained, "--samples", 3)]


def test_too_large_for_memory(trained, capsys, monkeypatch):
    """Weights that do not fit are refused before any is read, with the command that does fit."""
    monkeypatch.setattr(nano_eval, "free_memory", lambda device: 1000)
    assert "add --quantize nf4" in error_of(capsys, "perplexity", trained)
    assert nano_eval.free_memory is not None


def test_devices_stay_devices(tiny, capsys):
    """--json /dev/null writes there and does not replace it; a full device is one line with its name."""
    nano_eval.main(["perplexity", "--base", str(tiny[0]), "--data", str(tiny[1]), "--samples", "2", "--json", "/dev/null"])
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert "/dev/full could not be written" in error_of(
        capsys, "perplexity", "--base", tiny[0], "--data", tiny[1], "--samples", "2", "--json", "/dev/full")
    assert "/dev/full could not be written" in error_of(
        capsys, "complete", "--base", tiny[0], "--data", tiny[1], "--samples", "2", "--max-new-tokens", "2", "--out", "/dev/full")
    nano_eval.main(["complete", "--base", str(tiny[0]), "--data", str(tiny[1]), "--samples", "2", "--max-new-tokens", "2", "--out", "/dev/null"])
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode) and stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_no_interval_of_a_few():
    """Fewer than ten values, or values that hang together, have no interval, and the table says so."""
    assert nano_eval.summary([1.0] * 9)["low"] is None and nano_eval.interval(nano_eval.summary([1.0, 2.0])) == "1.500"
    assert nano_eval.summary(range(10))["low"] is not None and nano_eval.summary(range(10), bootstrap=False)["high"] is None
    with pytest.raises(ValueError, match="nothing"):
        nano_eval.summary([])


def test_across_categories(tiny, trained, tmp_path, capsys):
    """The matrix holds, cell by cell, what a run on that category alone gives."""
    rows = perplexity(tmp_path, trained, "--across", "hep-th", "cs", "q-bio", "--samples", 6)
    assert [(r["name"], r["on"]) for r in rows] == [(m, s) for m in ("base", "s1-all") for s in ("hep-th test", "cs test", "q-bio test")]
    alone = perplexity(tmp_path, trained, "--subset", "cs", "--samples", 6)
    assert [values(alone[0]), values(alone[1])] == [values(rows[1]), values(rows[4])]


def test_compare(tiny, trained, tmp_path, capsys):
    """The table and compare.json repeat what the reports say, for runs and base; what is lacking is named with its command."""
    other = tmp_path / "s1-qkv"
    shutil.copytree(trained, other)
    config = json.loads((other / "config.json").read_text())
    config["settings"]["lora"] = "qkv"
    (other / "config.json").write_text(json.dumps(config))
    nano_eval.main(["perplexity", str(trained), str(other), "--samples", "12", "--device", "cpu", "--dtype", "float32"])
    report = {"command": "x", "settings": {}, "rows": [nano_eval.report_row(m, {"semscore": {str(i): x for i in range(12)}})
                                                         for m, x in (("base", 0.5), ("s1-all", 0.75))]}
    nano_eval.write_json(tmp_path / "c.semscore.json", report)
    s = {"n": 3, "mean": 5.5, "low": 5, "high": 6}
    (tmp_path / "c.rating.json").write_text(json.dumps({"rows": [{"name": "s1-all", "measures": {"rating overall": s}}]}))
    assert "c.jsonl: is not there; give the file" in error_of(capsys, "compare", trained, "--completions", tmp_path / "c.jsonl")
    (tmp_path / "c.jsonl").touch()
    nano_eval.main(["compare", str(trained), str(other), "--completions", str(tmp_path / "c.jsonl"), "--out", str(tmp_path / "compare")])
    base, run, twin = json.loads((tmp_path / "compare.json").read_text())["rows"]
    report = json.loads((trained / "perplexity-16bit.json").read_text())["rows"]
    assert [r["name"] for r in (base, run, twin)] == ["base", "s1-all", "s1-qkv"] and [r.get("lora") for r in (base, run, twin)] == [None, "all", "qkv"]
    assert [mean(r) for r in (base, run, twin)] == [mean(r) for r in report]
    assert run["measures"]["semscore"]["mean"] == pytest.approx(0.75) and "semscore" not in twin["measures"]
    assert run["measures"]["rating overall"]["mean"] == 5.5 and "rating overall" not in base["measures"]
    losses = [json.loads(line).get("validation_loss") for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert run["validation loss"] == f"{[x for x in losses if x][-1]:.4f}"
    printed = capsys.readouterr()
    line = next(x for x in printed.out.splitlines() if x.startswith("s1-all"))
    assert nano_eval.interval(report[1]["measures"]["perplexity"]) in line and "0.750 [0.750, 0.750]" in line
    assert "no entropy yet: python eval.py signatures" in printed.err and "rate FILE" not in printed.err and "5.500 [5.000, 6.000]" in line
    for name in ("compare", "compare-loss"):
        assert all((tmp_path / f"{name}.{suffix}").stat().st_size > 8000 for suffix in ("png", "pdf"))
    (tmp_path / "c.rating.json").write_text('{"rows": [{"name": "s1-all", "measures": {"rating overall": {"mean": "x"}}}]}')
    assert "c.rating.json" in error_of(capsys, "compare", trained, "--completions", tmp_path / "c.jsonl")


def test_smoothing_keeps_the_step():
    """A loss that falls at each epoch's end keeps its edge; within an epoch it is the running mean."""
    epochs = np.arange(1, 301) / 100
    step = np.where(epochs <= 1, 3.0, np.where(epochs <= 2, 2.0, 1.0))
    assert np.array_equal(nano_eval.smooth(epochs, step, 10), step)
    noise = np.random.default_rng(0).normal(size=300)
    smoothed = nano_eval.smooth(epochs, noise, 10)
    assert smoothed[50] == pytest.approx(noise[40:61].mean()) and smoothed[100] == pytest.approx(noise[100:111].mean())
