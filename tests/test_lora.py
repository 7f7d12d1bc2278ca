"""lora.py against the peft library."""
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import lora
from lora import adapted, inject, load_adapter, merge, save_adapter
from model import SHAPES, CausalLM, load_pretrained

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
    with pytest.raises(ValueError, match="holds no adapter"):
        load_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="no adapter to save"):
        save_adapter(model, tmp_path)
    inject(model, "qkv", r=4)
    with pytest.raises(ValueError, match="carries an adapter already"):
        inject(model, "qkv")
    save_adapter(model, tmp_path)
    config, tensors = json.loads((tmp_path / "adapter_config.json").read_text()), load_file(tmp_path / "adapter_model.safetensors")
    for change in ({"use_dora": True}, {"use_rslora": True}, {"bias": "all"}, {"peft_type": "IA3"}):
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
    with pytest.raises(ValueError, match="cannot be read"):
        load_adapter(ours(base), tmp_path)


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
        monkeypatch.setattr(lora, "draw_dropped", lambda *_: where)
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
