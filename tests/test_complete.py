"""eval.py complete: the split of an abstract, resuming, own prompts, adapters in peft's format."""
import argparse
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import data_arxiv
import eval as nano_eval
from conftest import ROOT
from lora import inject, save_adapter
from model import generate, load_pretrained, load_tokenizer


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory):
    """An adapter directory whose B is not zero, so that it changes the model."""
    model = load_pretrained(str(tiny[0]), dtype=torch.float32)
    inject(model, "all", seed=3)
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            p.data.normal_(0, 0.3)
    directory = tmp_path_factory.mktemp("adapters") / "peft-style"
    save_adapter(model, directory, str(tiny[0]))
    return directory


@pytest.fixture(scope="module")
def run(tiny, adapter, tmp_path_factory):
    """A run directory as train_lm.py leaves it, with that adapter."""
    out = tmp_path_factory.mktemp("runs") / "s1-all"
    out.mkdir()
    (out / "config.json").write_text(json.dumps({"directory": str(out), "settings": {"base": str(tiny[0]), "data": str(tiny[1]), "subset": "s1"}}))
    (out / "adapter").symlink_to(adapter)
    return out


def command(*arguments):
    return [*map(str, arguments), "--device", "cpu", "--dtype", "float32"]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_split():
    split = nano_eval.split_abstract
    assert split("One is 3.5 GeV. Two! Three? Four.") == ("One is 3.5 GeV. Two!", "Three? Four.")
    assert split("One. Two. Three.") == ("One. Two.", "Three.")
    assert split("only one sentence of seven words here") == ("only one sentence of", "seven words here")
    assert split("word") == ("word", "")


def test_complete(tiny, run, tmp_path):
    """Base and run on the same prompts; each completion is what `generate` gives alone for that abstract's random stream."""
    out = tmp_path / "c.jsonl"
    nano_eval.main(command("complete", run, "--samples", 5, "--max-new-tokens", 12, "--out", out, "--batch-size", 3))
    records = lines(out)
    base, tuned = [[r for r in records if r["model"] == m] for m in ("base", "s1-all")]
    assert len(base) == len(tuned) == 5 and list(records[0]) == list(nano_eval.FIELDS)
    abstracts = dict(zip(*data_arxiv.load(tiny[1], "s1", "test")))
    assert all(" ".join([r["prompt"], r["truth"]]).split() == abstracts[r["id"]].split() for r in records)
    assert [(r["id"], r["prompt"]) for r in base] == [(r["id"], r["prompt"]) for r in tuned]
    assert [r["completion"] for r in base] != [r["completion"] for r in tuned]
    model, tokenizer = load_pretrained(str(tiny[0]), dtype=torch.float32), load_tokenizer(str(tiny[0]))
    for r in base:
        ids = [0] + tokenizer.encode(r["prompt"], add_special_tokens=False).ids
        new = generate(model, [ids], 12, eos=1, seed=[nano_eval.zlib.crc32(f"42 {r['id']}".encode())])[0]
        assert tokenizer.decode(ids + new) == r["prompt"] + r["completion"] and r["completion"]
    assert records[0]["settings"] | {"temperature": 0.7, "top_k": 50, "max_new_tokens": 12, "seed": 42, "bos": True} == records[0]["settings"]


def test_resume(run, tmp_path, capsys):
    """Cut anywhere, even inside a line, the same command restores the file byte for byte; other settings are refused."""
    out = tmp_path / "c.jsonl"
    arguments = command("complete", run, "--samples", 7, "--max-new-tokens", 8, "--out", out, "--batch-size", 3)
    nano_eval.main(arguments)
    whole = out.read_bytes()
    for cut in (0, 1, len(whole) // 3, len(whole) // 2 + 1, len(whole) - 1, len(whole)):
        out.write_bytes(whole[:cut])
        nano_eval.main(arguments)
        assert out.read_bytes() == whole
    with pytest.raises(SystemExit) as stop:
        nano_eval.main([*arguments, "--seed", "1"])
    assert stop.value.code == 2 and "seed was 42, now 1" in capsys.readouterr().err and out.read_bytes() == whole
    out.write_bytes(b'{"id": 3}\n' + whole)
    with pytest.raises(SystemExit):
        nano_eval.main(arguments)
    assert "line 1: not a completion" in capsys.readouterr().err and out.read_bytes() == b'{"id": 3}\n' + whole


def test_other_texts_of_the_same_ids(tiny, run, tmp_path, capsys):
    """A file is gone on with only where its abstracts are the same ones, wherever they lie; an id twice is refused."""
    for name, text in (("a", "One. Two. Three."), ("b", "Other. Texts.")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"id": 1, "abstract": text}) + "\n")
    arguments = command("complete", run, "--max-new-tokens", 3, "--out", tmp_path / "c.jsonl")
    nano_eval.main([*arguments, "--data", str(tmp_path / "a.jsonl")])
    whole = (tmp_path / "c.jsonl").read_bytes()
    (tmp_path / "moved").mkdir()
    (tmp_path / "a.jsonl").rename(tmp_path / "moved" / "texts.jsonl")
    nano_eval.main([*arguments, "--data", str(tmp_path / "moved" / "texts.jsonl")])
    assert (tmp_path / "c.jsonl").read_bytes() == whole
    with pytest.raises(SystemExit):
        nano_eval.main([*arguments, "--data", str(tmp_path / "b.jsonl")])
    assert "another prompt or truth" in capsys.readouterr().err
    (tmp_path / "c.jsonl").write_bytes(whole + whole)
    with pytest.raises(SystemExit):
        nano_eval.main(["signatures", str(tmp_path / "c.jsonl")])
    assert "c.jsonl, line 3: a second completion of 1 by base" in capsys.readouterr().err


def test_killed(run, tmp_path):
    """kill -9 in the middle of a real process: what was written stays, and the end is that of an undisturbed run."""
    out, undisturbed = tmp_path / "c.jsonl", tmp_path / "u.jsonl"

    def arguments(path):
        return command("complete", run, "--samples", 12, "--max-new-tokens", 60, "--out", path, "--batch-size", 1)
    process = subprocess.Popen([sys.executable, ROOT / "eval.py", *arguments(out)], env=os.environ | {"OMP_NUM_THREADS": "1"})
    while process.poll() is None and not (out.exists() and out.read_bytes().count(b"\n") >= 2):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = out.read_bytes()
    assert 2 <= left.count(b"\n") < 24
    nano_eval.main(arguments(out))
    nano_eval.main(arguments(undisturbed))
    assert out.read_bytes() == undisturbed.read_bytes() and out.read_bytes().startswith(left[:left.rfind(b"\n") + 1])


def test_batches_do_not_change_the_draws(tiny):
    model = load_pretrained(str(tiny[0]), dtype=torch.float32)
    prompts = [[0, 5, 9], [0, 7], [0, 30, 31, 32, 33]]
    together = generate(model, prompts, 20, seed=[11, 12, 13])
    assert together == [generate(model, [p], 20, seed=[s])[0] for p, s in zip(prompts, (11, 12, 13))]
    assert together[::-1] == generate(model, prompts[::-1], 20, seed=[13, 12, 11]) and together != generate(model, prompts, 20, seed=[1, 2, 3])


def test_own_prompt(run, capsys):
    nano_eval.main(command("complete", run, "--prompt", "We study the", "--max-new-tokens", 9))
    printed = capsys.readouterr().out
    assert printed.startswith("[s1-all]\nWe study the") and len(printed) > len("[s1-all]\nWe study the\n\n") and "[base]" not in printed


def test_own_prompt_with_two_bases(tiny, run, tmp_path, capsys):
    """Where the runs have different bases, these are printed, too."""
    (tmp_path / "other").symlink_to(tiny[0])
    twin = tmp_path / "twin"
    twin.mkdir()
    config = json.loads((run / "config.json").read_text())
    config["settings"]["base"] = str(tmp_path / "other")
    (twin / "config.json").write_text(json.dumps(config))
    (twin / "adapter").symlink_to((run / "adapter").resolve())
    nano_eval.main(command("complete", run, twin, "--prompt", "We study the", "--max-new-tokens", 3))
    printed = capsys.readouterr().out
    assert [x for x in printed.splitlines() if x in ("[base]", "[other]", "[s1-all]", "[twin]")] == ["[base]", "[other]", "[s1-all]", "[twin]"]


def test_control_papers(tiny, run, tmp_path, capsys):
    """The five control papers are a set of their own."""
    from data_arxiv import prepare
    with open(tmp_path / "snapshot.jsonl", "w") as file:
        for i in ("1804.08625", "0001.00001", "1205.2086", "0001.00002", "0001.00003"):
            file.write(json.dumps({"id": i, "categories": "hep-th", "comments": None, "abstract": f"First of {i}. Then the second.", "authors": "A",
                                   "title": "T", "versions": [], "update_date": "2020-01-01"}) + "\n")
    prepare(tmp_path / "snapshot.jsonl", tmp_path / "data")
    nano_eval.main(command("complete", run, "--subset", "control", "--data", tmp_path / "data", "--max-new-tokens", 4, "--out", tmp_path / "c.jsonl"))
    assert {r["id"] for r in lines(tmp_path / "c.jsonl")} == {"1804.08625", "1205.2086"} and "2 abstracts" in capsys.readouterr().out


def test_adapter_directory_works_as_a_run(tiny, run, adapter, tmp_path):
    """perplexity and complete give for --adapter DIR what they give for the run that holds it."""
    results = []
    for what in ([run], ["--adapter", adapter]):
        nano_eval.main(command("perplexity", *what, "--data", tiny[1], "--samples", 6, "--json", tmp_path / "p.json"))
        out = tmp_path / f"c{len(results)}.jsonl"
        nano_eval.main(command("complete", *what, "--data", tiny[1], "--samples", 2, "--max-new-tokens", 8, "--out", out))
        results.append([json.loads((tmp_path / "p.json").read_text())["rows"][1], [r["completion"] for r in lines(out)]])
    (of_run, completions), (of_adapter, same) = results
    assert of_adapter["name"] == "peft-style" and of_adapter["values"] == of_run["values"] and same == completions


def test_an_adapter_is_named_after_its_run(tiny, run):
    args = argparse.Namespace(adapter=[str(run / "adapter")], base=None, device="cpu", dtype="float32")
    models, _ = nano_eval.find_models([], args)
    assert [m.name for m in models] == ["base", "s1-all"] and models[0].base == str(tiny[0])
    (run / "adapter-best").symlink_to(run / "adapter")
    assert nano_eval.name_of(run / "adapter-best") == "s1-all-best"
    (run / "adapter-best").unlink()


def test_an_adapter_for_a_base_of_another_machine(adapter, tmp_path, capsys):
    import shutil
    shutil.copytree(adapter, tmp_path / "theirs")
    config = json.loads((adapter / "adapter_config.json").read_text())
    for base in ("/home/ada/models/llama", "models/v1/llama", "../llama"):
        (tmp_path / "theirs" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        with pytest.raises(SystemExit) as stop:
            nano_eval.main(command("perplexity", "--adapter", tmp_path / "theirs"))
        assert stop.value.code == 2 and "say with --base" in capsys.readouterr().err
    (tmp_path / "theirs" / "adapter_config.json").write_text(json.dumps(config | {"revision": "v2"}))       # other weights by the same name
    with pytest.raises(ValueError, match="the revision 'v2' of .*: say with --base"):
        nano_eval.fetch_adapter(tmp_path / "theirs", None)
    assert nano_eval.fetch_adapter(tmp_path / "theirs", "here").base == "here"


def test_adapter_from_the_hub(tiny, adapter, tmp_path, monkeypatch, capsys):
    """A hub id is downloaded: only the two files of the adapter; without a network, or for an unknown name, one sentence says so."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError
    asked = []

    def snapshot_download(source, allow_patterns, ignore_patterns=None):
        asked.append((source, allow_patterns))
        if source != "LLMsForHepth/s3-L-3.1-8B-qkv":
            raise LocalEntryNotFoundError("no connection")
        return str(adapter)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    published = "LLMsForHepth/s3-L-3.1-8B-qkv"
    nano_eval.main(command("perplexity", "--adapter", published, "--data", tiny[1], "--samples", 3, "--json", tmp_path / "p.json"))
    assert [m["name"] for m in json.loads((tmp_path / "p.json").read_text())["rows"]] == ["base", published]
    assert asked == [(published, ["adapter_config.json", "adapter_model.safetensors"])]
    for source, sentence in (("nobody/nothing", "no connection"), (str(tmp_path), "holds no adapter"),
                             ("./nowhere", "neither a directory nor a hub id")):
        with pytest.raises(SystemExit) as stop:
            nano_eval.main(command("complete", "--adapter", source))
        error = capsys.readouterr().err
        assert stop.value.code == 2 and sentence in error and "shapes" not in error


def test_ctrl_c(run, monkeypatch, capsys, tmp_path):
    def interrupted(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(nano_eval, "complete_batch", interrupted)
    with pytest.raises(SystemExit) as stop:
        nano_eval.main(command("complete", run, "--max-new-tokens", 5, "--out", tmp_path / "c.jsonl"))
    assert stop.value.code == 130 and "the same command" in capsys.readouterr().err


def test_refusals(tiny, run, tmp_path, capsys):
    def error(*arguments):
        with pytest.raises(SystemExit) as stop:
            nano_eval.main(command("complete", *arguments))
        assert stop.value.code == 2
        return capsys.readouterr().err.strip().splitlines()[-1]
    assert "give run directories" in error()
    assert "--prompt is empty" in error(run, "--prompt", " ")
    assert "the model has room for 1024" in error(run, "--prompt", "We study")
    for flag, value in (("--max-new-tokens", 0), ("--temperature", -1), ("--temperature", "nan"), ("--temperature", "inf"), ("--samples", -1),
                        ("--top-k", 0), ("--batch-size", 0)):
        assert f"argument {flag}" in error(run, flag, value)
    assert "two models are called s1-all" in error(run, run)
    assert "Is a directory" in error(run, "--out", tmp_path)
    import fcntl
    with open(tmp_path / "c.jsonl", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another process is writing it" in error(run, "--out", tmp_path / "c.jsonl", "--samples", 1)
