"""eval.py export: transformers opens it with the same logits; the model card; the upload and how it fails."""
import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

import eval as nano_eval
from conftest import ROOT
from lora import inject, load_adapter, merge, save_adapter
from model import load_pretrained


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A finished run directory whose adapter changes the model, with metrics and a perplexity report."""
    out = tmp_path_factory.mktemp("export") / "s1-qkv"
    model = load_pretrained(str(tiny[0]), dtype=torch.float32)
    inject(model, "qkv", seed=1)
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            p.data.normal_(0, 0.3)
    save_adapter(model, out / "adapter", str(tiny[0]))
    settings = {"base": str(tiny[0]), "data": str(tiny[1]), "subset": "s1", "lora": "qkv", "rank": 8, "alpha": 32, "lr": 3e-4, "seed": 42}
    data = {"sources": [{"file": "made-up.jsonl", "kind": "synthetic"}], "counts": {"train": 123, "validation": 45}}
    (out / "config.json").write_text(json.dumps({"settings": settings, "directory": str(out), "data": data}))
    (out / "metrics.jsonl").write_text('{"step": 0, "validation_loss": 6.25}\n{"step": 1, "epoch": 0.1, "loss": 6.0}\n'
                                       '{"step": 9, "validation_loss": 5.5}\n{"st')
    nano_eval.main(["perplexity", str(out), "--samples", "12", "--device", "cpu", "--dtype", "float32"])
    return out


def test_merged(tiny, run, tmp_path, capsys):
    """The exported checkpoint in transformers: the logits of our merged model, and of peft's merge; its tokenizer, too."""
    from peft import PeftModel
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM
    nano_eval.main(["export", str(run), "--out", str(tmp_path / "merged")])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert theirs.dtype == torch.bfloat16
    ours = load_pretrained(str(tiny[0]), dtype=torch.bfloat16)
    load_adapter(ours, run / "adapter")
    merge(ours)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny[0], dtype=torch.bfloat16), run / "adapter").merge_and_unload()
    ids = torch.randint(0, ours.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = theirs.float()(ids).logits
        assert (ours.float()(ids) - logits).abs().max() < 1e-4
        assert (peft.float()(ids).logits - logits).abs().max() < 0.02 * logits.abs().max()          # peft rounds at other places
        base = AutoModelForCausalLM.from_pretrained(tiny[0], dtype=torch.float32)(ids).logits
        assert (base - logits).abs().max() > 0.1 * logits.abs().max()                                # the adapter is in
    encoded = [Tokenizer.from_file(str(d / "tokenizer.json")).encode("We study").ids for d in (tmp_path / "merged", tiny[0])]
    assert encoded[0] == encoded[1]
    assert "model.safetensors" in capsys.readouterr().out and [p.name for p in tmp_path.iterdir()] == ["merged"]


def test_card(tiny, run, tmp_path):
    completions = tmp_path / "c.jsonl"
    nano_eval.main(["complete", str(run), "--samples", "3", "--max-new-tokens", "9", "--out", str(completions), "--device", "cpu",
                    "--dtype", "float32"])
    nano_eval.main(["signatures", str(completions)])
    nano_eval.main(["export", str(run), "--out", str(tmp_path / "a"), "--what", "adapter", "--base-id", "meta-llama/Llama-3.1-8B",
                    "--license", "llama3.1", "--completions", str(completions)])
    card = (tmp_path / "a" / "README.md").read_text()
    front = card.split("---")[1]
    assert "base_model: meta-llama/Llama-3.1-8B\n" in front and "license: llama3.1\n" in front and "library_name: peft" in front
    rows = [r["measures"]["perplexity"] for r in json.loads((run / "perplexity-16bit.json").read_text())["rows"]]
    words = next(r["measures"]["words"] for r in json.loads((tmp_path / "c.signatures.json").read_text())["rows"] if r["name"] == "s1-qkv")

    def line(model, measure, s, on):
        return f"| {model} | {measure} | {nano_eval.interval(s)} | {on} |"
    for text in ("Built with Llama.", "Training set `s1`; seed 42", "synthetic", '"train": 123', "| lora | qkv |", "| lr | 0.0003 |",
                 "6.2500 before, 5.5000 after", line("meta-llama/Llama-3.1-8B", "perplexity", rows[0], "12 abstracts, s1 test"),
                 line("s1-qkv", "perplexity", rows[1], "12 abstracts, s1 test"), line("s1-qkv", "words", words, "3 abstracts, c.jsonl")):
        assert text in card, text
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["base_model_name_or_path"] == "meta-llama/Llama-3.1-8B"
    load_adapter(load_pretrained(str(tiny[0]), dtype=torch.float32), tmp_path / "a")
    nano_eval.main(["export", str(run), "--out", str(tmp_path / "b"), "--what", "adapter"])
    card = (tmp_path / "b" / "README.md").read_text()
    assert "license:" not in card and "base_model:" not in card and "That of the base model" in card       # unknown: not made up


def test_push(run, tmp_path, monkeypatch, capsys):
    """What is asked of the hub, with the hub's client replaced by a recorder."""
    import huggingface_hub
    asked = []

    class Recorder:
        def create_repo(self, *a, **k):
            asked.append((a, k))

        def upload_folder(self, repo_id, folder_path, commit_message):
            asked.append((repo_id, sorted(p.name for p in folder_path.iterdir())))
    monkeypatch.setattr(huggingface_hub, "HfApi", Recorder)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    nano_eval.main(["export", str(run), "--out", str(tmp_path / "a"), "--what", "adapter", "--push", "me/s1-qkv", "--private"])
    assert asked == [(("me/s1-qkv",), {"private": True, "exist_ok": True}), ("me/s1-qkv", ["README.md", "adapter_config.json", "adapter_model.safetensors"])]
    assert "huggingface.co/me/s1-qkv" in capsys.readouterr().out


def test_push_fails(run, tmp_path):
    """The real client: without a token nothing is begun; without a network the directory is whole and the way on is said."""
    def push(out, **environment):
        without_token = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")}
        made = subprocess.run([sys.executable, ROOT / "eval.py", "export", run, "--out", out, "--what", "adapter", "--push", "me/model"],
                              capture_output=True, text=True, env=without_token | {
                                  "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", **environment})
        assert made.returncode == 2 and "Traceback" not in made.stderr
        return made.stderr.strip().splitlines()[-1]
    assert "no token for the hub" in push(tmp_path / "none") and not (tmp_path / "none").exists()
    error = push(tmp_path / "whole", HF_TOKEN="hf_made_up")
    assert "the upload to me/model failed" in error and "hf upload me/model" in error and (tmp_path / "whole" / "README.md").exists()


def test_refusals(tiny, run, tmp_path, capsys):
    def error(*arguments):
        with pytest.raises(SystemExit) as stop:
            nano_eval.main(["export", *map(str, arguments)])
        assert stop.value.code == 2
        return capsys.readouterr().err.strip().splitlines()[-1]
    assert "exists already" in error(run, "--out", tmp_path)
    assert "is no run" in error(tmp_path, "--out", tmp_path / "x")
    for flag in ("--base-id", "--license"):
        assert f"argument {flag}" in error(run, "--out", tmp_path / "x", flag, "mit\nbase_model: other")
    assert "--push takes ORGANISATION/NAME" in error(run, "--out", tmp_path / "x", "--push", "name")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text((run / "config.json").read_text())
    shutil.copytree(run / "adapter", tmp_path / "run" / "adapter")
    for content in ("{", "[]"):
        (tmp_path / "run" / "adapter" / "adapter_config.json").write_text(content)
        for what in ("merged", "adapter"):
            assert "adapter_config.json" in error(tmp_path / "run", "--out", tmp_path / "x", "--what", what)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]          # no half directories


def test_links_that_leave(tiny, run, tmp_path, capsys):
    """A base with a file that is a link to somewhere else is not exported: it could carry a private file into an upload."""
    (tmp_path / "secret").write_text("private")
    shutil.copytree(tiny[0], tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(SystemExit):
        nano_eval.main(["export", str(run), "--base", str(tmp_path / "base"), "--out", str(tmp_path / "x")])
    assert "is a link that leaves" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_full_disk(run, tmp_path, monkeypatch, capsys):
    """One line, nothing half; with space the same command goes on."""
    import model
    whole = model.writing

    @contextlib.contextmanager
    def full(path):
        if path.name == "README.md":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        with whole(path) as temporary:
            yield temporary
    monkeypatch.setattr(nano_eval, "writing", full)
    arguments = ["export", str(run), "--out", str(tmp_path / "x")]
    with pytest.raises(SystemExit) as stop:
        nano_eval.main(arguments)
    assert stop.value.code == 2 and "No space left" in capsys.readouterr().err and not list(tmp_path.iterdir())
    monkeypatch.undo()
    nano_eval.main(arguments)
    assert (tmp_path / "x" / "README.md").exists()
