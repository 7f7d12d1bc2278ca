"""eval.py perplexity against transformers and scipy."""
import json
import shutil

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
    return json.loads((tmp_path / "p.json").read_text())["models"]


def test_against_transformers(tiny, trained, tmp_path, capsys):
    """Base and merged run, abstract by abstract, against transformers and peft on one abstract at a time; printed and drawn as well."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    base, run = perplexity(tmp_path, trained)
    assert base["weights"] == "32 bit" and run["weights"] == "merged, 32 bit"
    ids, texts = data_arxiv.load(tiny[1], "s1", "test")
    assert list(base["perplexity"]) == ids and base["abstracts"] == len(ids)
    tokenizer = load_tokenizer(str(tiny[0]))
    theirs, adapted = (AutoModelForCausalLM.from_pretrained(tiny[0], dtype=torch.float32) for _ in range(2))
    for result, model in ((base, theirs), (run, PeftModel.from_pretrained(adapted, trained / "adapter"))):
        for i, text in list(zip(ids, texts))[:10]:
            sequence = torch.tensor([[0, *tokenizer.encode(text, add_special_tokens=False).ids]])
            with torch.no_grad():
                assert result["perplexity"][i] == pytest.approx(model(sequence, labels=sequence).loss.exp().item(), rel=1e-4)
    assert run["mean"] < 0.8 * base["mean"] and run["low"] < run["mean"] < run["high"]
    assert "s1-all" in capsys.readouterr().out and (tmp_path / "p.png").stat().st_size > 10000


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
    assert base["weights"] == "NF4" and run["weights"] == "unmerged, NF4" and len(run["perplexity"]) == 10
    merged = perplexity(tmp_path, trained, "--samples", 10)[1]
    assert list(merged["perplexity"]) == list(run["perplexity"]) and merged["mean"] != run["mean"] == pytest.approx(merged["mean"], rel=0.2)


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
    assert list(mine["perplexity"]) == ids[:4] and "1 empty abstract" in capsys.readouterr().err
    split, = perplexity(tmp_path, "--base", tiny[0], "--data", tiny[1])
    assert all(mine["perplexity"][i] == pytest.approx(split["perplexity"][i], rel=1e-4) for i in ids[:4])


def test_refusals(tiny, trained, tmp_path, capsys):
    def error(*arguments):
        with pytest.raises(SystemExit) as stop:
            nano_eval.main(["perplexity", *map(str, arguments)])
        lines = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2
        return lines[-1]
    assert "is no run directory" in error(tmp_path)
    assert "give run directories" in error()
    shutil.copytree(trained, tmp_path / "unfinished", ignore=shutil.ignore_patterns("adapter"))
    assert "has no adapter yet" in error(tmp_path / "unfinished")
    (tmp_path / "bad.jsonl").write_text('{"id": 1, "abstract": "x"}\n{"id": 2}\n')
    assert "bad.jsonl, line 2" in error(trained, "--data", tmp_path / "bad.jsonl")
    assert "unavailable" in error(trained, "--subset", "own")


def test_across_categories(tiny, trained, tmp_path, capsys):
    """The matrix holds, cell by cell, what a run on that category alone gives."""
    rows = perplexity(tmp_path, trained, "--across", "hep-th", "cs", "q-bio", "--samples", 6)
    assert [(r["model"], r["subset"]) for r in rows] == [(m, s) for m in ("base", "s1-all") for s in ("hep-th", "cs", "q-bio")]
    assert all((tmp_path / f"p.{suffix}").stat().st_size > 5000 for suffix in ("png", "pdf"))
    alone = perplexity(tmp_path, trained, "--subset", "cs", "--samples", 6)
    assert [alone[0]["perplexity"], alone[1]["perplexity"]] == [rows[1]["perplexity"], rows[4]["perplexity"]]


def test_compare(tiny, trained, tmp_path, capsys):
    """The table and compare.json repeat what the reports say, for runs and base; what is lacking is named with its command."""
    other = tmp_path / "s1-qkv"
    shutil.copytree(trained, other)
    config = json.loads((other / "config.json").read_text())
    config["settings"]["lora"] = "qkv"
    (other / "config.json").write_text(json.dumps(config))
    nano_eval.main(["perplexity", str(trained), str(other), "--samples", "6", "--device", "cpu", "--dtype", "float32"])
    (tmp_path / "c.semscore.json").write_text(json.dumps({"models": [{"model": m, "mean": x, "low": x - 0.1, "high": x + 0.1, "abstracts": 3}
                                                                     for m, x in (("base", 0.5), ("s1-all", 0.75))]}))
    (tmp_path / "c.rating.json").write_text(json.dumps({"models": [{"model": "s1-all", "means": {"overall": {"mean": 5.5, "low": 5, "high": 6, "abstracts": 3}}}]}))
    capsys.readouterr()
    nano_eval.main(["compare", str(trained), str(other), "--completions", str(tmp_path / "c.jsonl"), "--out", str(tmp_path / "compare")])
    base, run, twin = json.loads((tmp_path / "compare.json").read_text())["models"]
    report = json.loads((trained / "perplexity-16bit.json").read_text())["models"]
    assert [r["model"] for r in (base, run, twin)] == ["base", "s1-all", "s1-qkv"] and [base["lora"], run["lora"], twin["lora"]] == [None, "all", "qkv"]
    assert [r["perplexity"]["mean"] for r in (base, run, twin)] == [r["mean"] for r in report]
    assert run["SemScore"] == pytest.approx({"mean": 0.75, "low": 0.65, "high": 0.85}) and "SemScore" not in twin
    assert run["human rating, overall"]["mean"] == 5.5 and "human rating, overall" not in base
    losses = [json.loads(line).get("validation_loss") for line in open(trained / "metrics.jsonl")]
    assert run["validation loss"] == [x for x in losses if x][-1]
    printed = capsys.readouterr()
    line = next(x for x in printed.out.splitlines() if x.startswith("s1-all"))
    assert f"{report[1]['mean']:.3f} [{report[1]['low']:.3f}, {report[1]['high']:.3f}]" in line and "0.750 [0.650, 0.850]" in line
    assert "no entropy yet: python eval.py signatures" in printed.err and "rate FILE" not in printed.err and "5.500 [5.000, 6.000]" in line
    assert all((tmp_path / f"compare.{suffix}").stat().st_size > 10000 for suffix in ("png", "pdf"))


def test_smoothing_keeps_the_step():
    """A loss that falls at each epoch's end keeps its edge; within an epoch it is the running mean."""
    epochs = np.arange(1, 301) / 100
    step = np.where(epochs <= 1, 3.0, np.where(epochs <= 2, 2.0, 1.0))
    assert np.array_equal(nano_eval.smooth(epochs, step, 10), step)
    noise = np.random.default_rng(0).normal(size=300)
    smoothed = nano_eval.smooth(epochs, noise, 10)
    assert smoothed[50] == pytest.approx(noise[40:61].mean()) and smoothed[100] == pytest.approx(noise[100:111].mean())
