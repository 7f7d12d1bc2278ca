"""lora.py against the peft library."""
import dataclasses
import functools
import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

import lora
import train_lm
from lora import adapted, inject, load_adapter, merge, save_adapter, save_merged
from model import SHAPES, CausalLM, load_pretrained, new_directory, save_pretrained, token_nll

IDS = torch.arange(1, 41).view(2, 20)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
                                 num_key_value_heads=2, tie_word_embeddings=False)).save_pretrained(directory)
    return directory


def ours(base, **kwargs):
    return load_pretrained(str(base), dtype=torch.float32, **kwargs)


def randomise(model):
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data.normal_(0, 0.1)


@pytest.mark.parametrize("targets", ["qkv", "all", ["up_proj", "o_proj"]])
def test_peft_loads_ours(base, tmp_path, targets):
    model = ours(base)
    inject(model, targets, r=4, alpha=16, dropout=0.05)
    randomise(model)
    save_adapter(model, tmp_path, base=str(base))
    theirs = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path).eval()
    assert (model(IDS) - theirs(IDS).logits).abs().max() < 1e-5
    assert (model(IDS) - ours(base)(IDS)).abs().max() > 1e-2                              # and the adapter does something


@pytest.mark.parametrize("target_modules", [["q_proj", "k_proj", "v_proj"], "all-linear", r".*\.0\.mlp\.\w+_proj"])
def test_we_load_peft(base, tmp_path, target_modules):
    theirs = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(r=4, lora_alpha=16, lora_dropout=0.05, target_modules=target_modules))
    randomise(theirs)
    theirs.eval().save_pretrained(tmp_path)
    model = ours(base)
    load_adapter(model, tmp_path)
    assert (model(IDS) - theirs(IDS).logits).abs().max() < 1e-5
    assert not any(p.requires_grad for p in model.parameters())
    merge(model)
    assert (model(IDS) - theirs.merge_and_unload()(IDS).logits).abs().max() < 1e-5
    assert not adapted(model) and not any("lora" in k for k in model.state_dict())


def test_initial_adapter(base):
    model = ours(base)
    before = model(IDS)
    inject(model, "all", seed=3)
    assert torch.equal(model(IDS), before)                                                # B = 0
    for _, layer in adapted(model):
        bound = layer.in_features ** -0.5
        assert layer.lora_A.abs().max() <= bound and abs(layer.lora_A.std() / bound - 3 ** -0.5) < 0.1
        assert not layer.lora_B.any() and layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    again = ours(base)
    inject(again, "all", seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_gradients(base, quantize):
    """The adapters' gradients equal those of the formula written out; the base gets none."""
    model = ours(base, quantize=quantize)
    inject(model, ["q_proj"], r=4, alpha=16, dropout=0.0)
    randomise(model)
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(5, 48)
    layer(x).square().sum().backward()
    A, B = layer.lora_A.detach().requires_grad_(), layer.lora_B.detach().requires_grad_()
    W = layer(torch.eye(48)).detach().T - 4 * (B @ A).detach()                            # 16/4 = 4
    (x @ (W + 4 * B @ A).T).square().sum().backward()
    assert torch.allclose(layer.lora_A.grad, A.grad, rtol=1e-3, atol=1e-3) and torch.allclose(layer.lora_B.grad, B.grad, rtol=1e-3, atol=1e-3)
    assert sum(p.requires_grad for p in model.parameters()) == 4


@pytest.mark.parametrize("targets, count", [("qkv", 4718592), ("all", 20971520)])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_trainable_parameters_of_8b(targets, count, quantize):
    from model import linear_factory
    with torch.device("meta"):
        model = CausalLM(SHAPES["llama-3.1-8b"], linear_factory(quantize))
    assert inject(model, targets, r=8, alpha=32, dropout=0.05) == count


def test_merge_refuses_nf4(base):
    model = ours(base, quantize="nf4")
    inject(model, "qkv")
    with pytest.raises(ValueError, match="4-bit layer.*load the base in 16 bit"):
        merge(model)
    assert len(adapted(model)) == 6                                                       # nothing was touched


def test_bad_input(base, tmp_path):
    model = ours(base)
    with pytest.raises(ValueError, match="'w_proj'.*down_proj"):
        inject(model, ["q_proj", "w_proj"])
    with pytest.raises(ValueError, match="adapter_config.json: is not there; only plain LoRA"):
        load_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="no adapter to save"):
        save_adapter(model, tmp_path)
    inject(model, "qkv", r=4)
    with pytest.raises(ValueError, match="carries an adapter already"):
        inject(model, "qkv")
    save_adapter(model, tmp_path)
    config, tensors = json.loads((tmp_path / "adapter_config.json").read_text()), load_file(tmp_path / "adapter_model.safetensors")
    for change in ({"use_dora": True}, {"lora_bias": True}, {"bias": "all"}, {"peft_type": "IA3"}):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match="only plain LoRA"):
            load_adapter(ours(base), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    key = next(iter(tensors))
    save_file(tensors | {key: torch.zeros(4, 7)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="does not fit at model.layers.0.self_attn"):
        load_adapter(ours(base), tmp_path)
    save_file({key.replace("layers.0", "layers.9"): tensors[key]}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="another base"):
        load_adapter(ours(base), tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="adapter_model.safetensors: Error.*; save or get the adapter again"):
        load_adapter(ours(base), tmp_path)


def plain(base, directory, **options):
    """An adapter that peft made, with a B that matters -> (peft's model, directory)."""
    theirs = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "up_proj"], **options}))
    randomise(theirs)
    theirs.eval().save_pretrained(directory)
    return theirs


@pytest.mark.parametrize("options", [
    {"use_rslora": True}, {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 3}}, {"layers_to_transform": [1]}, {"layers_to_transform": 0},
    {"layers_to_transform": []}, {"exclude_modules": ["model.layers.0.mlp.up_proj"]}, {"exclude_modules": r".*\.1\..*"}, {"init_lora_weights": "gaussian"}, {"init_lora_weights": "orthogonal"},
    {"init_lora_weights": False}, {"target_modules": r".*layers\.[01]\.mlp\.(up|down)_proj"}, {"target_modules": ["q_proj", "not_of_this_model"]}])
def test_variants_that_are_computed(base, tmp_path, options):
    """Everything that peft writes about them, read and computed as peft does."""
    theirs, model = plain(base, tmp_path, **options), ours(base)
    load_adapter(model, tmp_path)
    assert (model(IDS) - theirs(IDS).logits).abs().max() < 1e-5 < (model(IDS) - ours(base)(IDS)).abs().max()


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_init_that_changes_the_base(base, tmp_path, init):
    plain(base, tmp_path, init_lora_weights=init)
    with pytest.raises(ValueError, match=f"adapter_config.json: init_lora_weights '{init}' changes the base.*path_initial_model_for_weight_conversion"):
        load_adapter(ours(base), tmp_path)


def test_every_field_of_peft_is_known(base, tmp_path):
    """Each field of LoraConfig is computed, harmless, or refused where it is set to other than peft's default."""
    plain(base, tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    for key in sorted({f.name for f in dataclasses.fields(LoraConfig)} - lora.COMPUTED - lora.HARMLESS - {"runtime_config"}):
        assert not saved[key], key                                                        # unset is falsy, so it passes
        (tmp_path / "adapter_config.json").write_text(json.dumps(saved | {key: [3, 5]}))
        with pytest.raises(ValueError, match=f"{key} is set"):
            load_adapter(ours(base), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved | {"of_a_later_peft": None, "another": {}, "switch": False, "count": 0}))
    load_adapter(ours(base), tmp_path)


@pytest.mark.parametrize("change, named", [
    ({"r": 8}, "rank 4, adapter_config.json says 8"), ({"r": "4"}, "says 4"), ({"lora_alpha": "16"}, "lora_alpha"), ({"lora_alpha": float("nan")}, "lora_alpha"), ({"lora_alpha": True}, "lora_alpha"),
    ({"lora_dropout": 1.0}, "lora_dropout 1.0"), ({"lora_dropout": "0"}, "lora_dropout '0'"), ({"target_modules": ["q_proj"]}, "holds 4 others .*up_proj.lora_A.weight"),
    ({"target_modules": ["q_proj", "up_proj", "k_proj"]}, "lacks 4 .*k_proj.lora_A.weight"), ({"target_modules": ["q_proj", "up_proj", "lm_head"]}, "it adapts lm_head"),
    ({"target_modules": ["q_proj", "embed_tokens"]}, "it adapts model.embed_tokens"), ({"target_modules": "("}, "adapter_config.json"), ({"target_modules": None}, "holds 8 others"),
    ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens is set"), ({"rank_pattern": {"q_proj": 2}}, "says 2"), ({"rank_pattern": [2]}, "adapter_config.json"), ({"alpha_pattern": {"(": 2}}, "adapter_config.json"), ({"r": "4", "use_rslora": True}, "says 4"), ({"modules_to_save": ["lm_head"]}, "modules_to_save is set")])
def test_config_unlike_the_tensors(base, tmp_path, change, named):
    plain(base, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=named) as error:
        load_adapter(ours(base), tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_tensors_unlike_the_config(base, tmp_path):
    plain(base, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(k for k in tensors if "lora_B" in k)
    nan = tensors[key].clone()
    nan[0, 0] = float("nan")
    for wrong, named in (({}, "lacks 8"), ({k: v for k, v in tensors.items() if k != key}, rf"lacks 1 .*\['{key}'\]"), ({k: v for k, v in tensors.items() if "layers.0" in k}, "lacks 4 .*layers.1"),
                         (tensors | {key: nan}, f"{key} holds NaN"), (tensors | {"base_model.model.lm_head.weight": nan.nan_to_num()}, "holds 1 others .*base_model.model.lm_head.weight"),
                         (tensors | {key: tensors[key].int()}, "no floating point")):
        save_file(wrong, path)
        with pytest.raises(ValueError, match=named):
            load_adapter(ours(base), tmp_path)
    path.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="adapter_model.safetensors: is not there; adapter_model.bin is a pickle.*save_pretrained"):
        load_adapter(ours(base), tmp_path)


def test_the_head_is_not_adapted(base, tmp_path):
    for name in ("lm_head", "embed_tokens"):
        with pytest.raises(ValueError, match=f"no linear layer that can be adapted is named '{name}'"):
            inject(ours(base), ["q_proj", name])
        plain(base, tmp_path / name, target_modules=["q_proj", name])
        with pytest.raises(ValueError, match=f"it adapts .*{name}, which is not computed here"):
            load_adapter(ours(base), tmp_path / name)


@torch.no_grad()
def test_merged_on_disk(base, tmp_path):
    """save_merged writes, bit for bit, what loading, merging and saving gives; a base with links out of it is refused."""
    theirs = plain(base, tmp_path / "adapter", use_rslora=True)
    model = load_pretrained(str(base))
    load_adapter(model, tmp_path / "adapter")
    merge(model)
    save_pretrained(model, tmp_path / "held", 20_000)
    with new_directory(tmp_path / "streamed") as temporary:
        save_merged(str(base), tmp_path / "adapter", temporary, shard_bytes=20_000)
    files = sorted(p.name for p in (tmp_path / "held").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "streamed").iterdir()) and len(files) > 4
    assert all((tmp_path / "held" / f).read_bytes() == (tmp_path / "streamed" / f).read_bytes() for f in files)
    opened = LlamaForCausalLM.from_pretrained(tmp_path / "streamed", dtype=torch.float32)
    assert (opened(IDS).logits - theirs(IDS).logits).abs().max() < 0.05                   # bfloat16
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in ("config.json", "model.safetensors"):
        (linked / file).symlink_to(base / file)
    with pytest.raises(ValueError, match="is a link that leaves its directory"):
        save_merged(str(linked), tmp_path / "adapter", tmp_path)


@pytest.mark.parametrize("p", [0.0, 0.05, 0.6])
def test_branch_is_plain_lora(p, monkeypatch):
    """Values and all three gradients of the hand-written branch against plain torch with the same elements dropped; nothing of y's history is disturbed."""
    g = torch.Generator().manual_seed(0)
    x, W, A, B, upstream = (torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()
                            for shape in ((3, 70, 48), (32, 48), (4, 48), (32, 4), (3, 70, 32)))
    for chosen in ("positions", "mask"):                                              # as on a CPU, as on a GPU
        where = lora.draw_dropped(x.detach(), p)
        keep = torch.ones(x.numel(), dtype=torch.float64)
        keep = keep if where is None else keep.index_fill(0, where, 0)
        if chosen == "mask" and where is not None:
            where = keep.view(-1, 48) == 0
        monkeypatch.setattr(lora, "draw_dropped", lambda *_, where=where: where)
        plain = x @ W.T + 3 * (x * keep.view_as(x) / (1 - p)) @ A.T @ B.T
        ours = lora.LoRABranch.apply(x @ W.T, x, A, B, 3.0, p)
        assert torch.allclose(plain, ours, atol=1e-5)
        for a, b in zip(*(torch.autograd.grad((y * upstream).sum(), (x, W, A, B)) for y in (plain, ours))):
            assert torch.allclose(a, b, atol=1e-3)                                    # gradients of A and B pass through float32
        monkeypatch.undo()


def test_dropout_is_bernoulli():
    """Each element is dropped with probability p, whatever its place and whatever became of its neighbour; the seed decides."""
    x, p, rows = torch.zeros(400, 50), 0.05, 200
    torch.manual_seed(0)
    hits = torch.stack([torch.zeros(x.numel()).index_fill(0, lora.draw_dropped(x, p), 1) for _ in range(rows)])         # (200, 20000)
    n = hits.numel()
    assert abs(hits.mean() - p) < 4 * (p * (1 - p) / n) ** 0.5
    for part in (hits[:, :50], hits[:, -50:], hits[:, 9000:9050]):                    # the beginning, the end, the middle
        assert abs(part.mean() - p) < 4 * (p * (1 - p) / part.numel()) ** 0.5
    assert abs((hits[:, 1:] * hits[:, :-1]).mean() - p * p) < 4 * (p * p / n) ** 0.5
    counts = hits.sum(1)
    assert 0.7 < counts.var() / (20000 * p * (1 - p)) < 1.4                           # chi^2 with 199 degrees of freedom: +-4 sigma
    draws = [lora.draw_dropped(x, p) for s in (1, 1, 2) if torch.manual_seed(s)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_dropout_of_one_position():
    """Rows that are not next to each other in memory, as the last position of each sequence, can be dropped from."""
    layer = torch.nn.Linear(8, 4)
    lora.attach(layer, torch.randn(2, 8), torch.randn(4, 2), alpha=2, dropout=0.5)
    x = torch.randn(3, 5, 8)[:, -1:]
    torch.manual_seed(0)
    strided = layer(x)
    torch.manual_seed(0)
    assert torch.equal(strided, layer(x.contiguous()))
    strided.sum().backward()
    assert layer.lora_A.grad.norm() > 0


# ------------------------------------------------------------------------------------------------------------- compiled


def test_compiled_blocks(base, monkeypatch):
    """--compile: the same losses and gradients, no graph break, and nothing compiled again from batch to batch."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    models = [ours(base, quantize="nf4") for _ in range(2)]
    for model in models:
        inject(model, "all", dropout=0.0)
        randomise(model)
        model.train()
    train_lm.compile_blocks(models[1])
    g = torch.Generator().manual_seed(0)
    for _ in range(30):
        lengths = torch.randint(2, 40, (3,), generator=g).tolist()
        ids = torch.randint(64, (sum(lengths),), generator=g)
        found = []
        for model in models:
            nll = token_nll(model, ids, lengths)
            found.append([nll, *torch.autograd.grad(nll.mean(), [p for p in model.parameters() if p.requires_grad])])
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*found, strict=True))
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]        # of two blocks: before and after attention
    models[1].eval()
    with torch.no_grad():
        assert torch.allclose(token_nll(models[1], ids, lengths), token_nll(models[0].eval(), ids, lengths), atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 4                        # and in a validation


def test_compiled_model_is_saved_and_merged(base, tmp_path):
    """Nothing of the compiler is in the names."""
    plain, compiled = (ours(base) for _ in range(2))
    for model in (plain, compiled):
        inject(model, "all")
        randomise(model)
    train_lm.compile_blocks(compiled)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    save_adapter(compiled, tmp_path)
    load_adapter(ours(base), tmp_path)
    for model in (plain, compiled):
        merge(model)
    save_pretrained(compiled, tmp_path / "merged")
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), ours(tmp_path / "merged").parameters(), strict=True))


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler: apt install g++")
def test_compiled_dropout(base):
    """Dropout that the compiled backward pass draws again is the forward pass's; a seed decides."""
    model = ours(base)
    inject(model, ["down_proj"], dropout=0.5)
    randomise(model)
    train_lm.compile_blocks(model)
    layer = model.double().train().model.layers[0].mlp.down_proj
    compiled = torch.compile(layer)
    x = torch.randn(30, 80, dtype=torch.float64)

    def forward(seed=0):
        torch.manual_seed(seed)
        return compiled(x)
    y = forward()
    slope, = torch.autograd.grad(y.sum(), layer.lora_A)
    assert torch.allclose((slope * layer.lora_A).sum(), (y - x @ layer.weight.T).sum())  # linear in A
    assert torch.equal(y, forward()) and not torch.equal(y, forward(seed=1))
