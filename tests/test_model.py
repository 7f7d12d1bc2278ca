"""model.py against transformers, in float32; checkpoints and the hub."""
import copy
import dataclasses
import http.server
import json
import os
import re
import resource
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import data_arxiv
import model as nano
from conftest import ROOT
from model import ChunkedNLL, KVCache, generate, load_config, load_pretrained, load_tokenizer, read_config, save_pretrained, token_nll
from quant import NF4Linear, dequantize_nf4

LLAMA = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2,
             "head_dim": 16, "tie_word_embeddings": False, "max_position_embeddings": 512, "initializer_range": 0.1,
             "rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                              "original_max_position_embeddings": 32}}                    # used at 100 tokens: beyond its original context
QWEN = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
            "tie_word_embeddings": True, "max_position_embeddings": 512, "initializer_range": 0.1}


@pytest.fixture(scope="module", params=["llama", "qwen2", "smollm2"])
def pair(request, tmp_path_factory):
    """(transformers' model, our model, directory) in float32."""
    torch.manual_seed(0)
    if request.param == "smollm2":
        directory = request.getfixturevalue("smollm2")
    else:
        directory = tmp_path_factory.mktemp(request.param)
        theirs = LlamaForCausalLM(LlamaConfig(**LLAMA)) if request.param == "llama" else Qwen2ForCausalLM(Qwen2Config(**QWEN))
        for name, p in theirs.named_parameters():
            if name.endswith("bias"):
                p.data.normal_(0, 0.5)                                                    # they start as zero, which would test nothing
        theirs.save_pretrained(directory)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return theirs, load_pretrained(str(directory), dtype=torch.float32), directory


def tokens(model, *shape):
    return torch.randint(3, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))


def close(a, b, tolerance=1e-4):
    difference = (a - b).abs().max().item()
    assert a.shape == b.shape and difference < tolerance, difference


@torch.no_grad()
def test_logits(pair):
    theirs, ours, _ = pair
    ids = tokens(ours, 2, 100)
    close(ours(ids), theirs(ids).logits)
    close(ours.lm_head(ours.model(embeds=ours.model.embed_tokens(ids))), theirs(ids).logits)


@torch.no_grad()
def test_right_padding(pair):
    theirs, ours, _ = pair
    ids, mask = tokens(ours, 3, 40), torch.arange(40) < torch.tensor([[40], [25], [3]])
    close(ours(ids)[mask], theirs(ids, attention_mask=mask.long()).logits[mask])


@torch.no_grad()
def test_sequences_end_to_end(pair):
    theirs, ours, _ = pair
    ids, lengths = tokens(ours, 1, 90), [40, 1, 37, 12]
    close(ours(ids, lengths=torch.tensor(lengths))[0], torch.cat([theirs(part[None]).logits[0] for part in ids[0].split(lengths)]))
    used = KVCache(ours.config, 1, 95, torch.float32, "cpu")
    ours(ids[:, :5], cache=used)
    for wrong in ({"lengths": [40, 40]}, {"lengths": [90], "cache": used}):
        with pytest.raises(ValueError, match="lengths need one row"):
            ours(ids, **wrong)


@torch.no_grad()
def test_bidirectional(pair):
    theirs, ours, _ = pair
    ids = tokens(ours, 1, 30)
    everywhere = torch.zeros(1, 1, 30, 30)                                                # an additive mask that hides nothing
    close(ours(ids, causal=False), theirs(ids, attention_mask=everywhere).logits, 2e-3)   # so used, a causal model amplifies rounding: in float64 it is 1e-3 from either
    both = ours(torch.cat([ids, ids[:, :11]], dim=1), lengths=[30, 11], causal=False)
    close(both[:, 30:], ours(ids[:, :11], causal=False), 1e-3)                            # matrix products of other sizes round otherwise


@torch.no_grad()
def test_cache(pair):
    theirs, ours, _ = pair
    ids = tokens(ours, 2, 50)
    cache = KVCache(ours.config, 2, 50, torch.float32, "cpu")
    steps = [ours(part, cache=cache) for part in ids.split([20, 1, 1, 28], dim=1)]
    close(torch.cat(steps, dim=1), theirs(ids).logits)
    with pytest.raises(ValueError, match="50 slots and would need 51"):
        ours(ids[:, :1], cache=cache)


@torch.no_grad()
def test_cache_of_unequal_rows(pair):
    """Three sequences of unequal length, laid end to end, fill three rows; then one leaves and another takes its place; all go on."""
    _, ours, _ = pair
    ids, lengths = tokens(ours, 3, 30), [12, 20, 7]
    cache = KVCache(ours.config, 3, 23, torch.float32, "cpu")
    ours(torch.cat([row[:n] for row, n in zip(ids, lengths)])[None], lengths=lengths, cache=cache)
    for rows, extra in (([0, 1, 2], 1), ([2, 1], 2)):
        if len(rows) < 3:
            cache.keep(rows)
        for t in range(extra):
            step = ours(ids[rows, 20 + extra + t][:, None], cache=cache)
    for i, row in enumerate(rows):
        close(step[i, 0], ours(torch.cat([ids[row, :lengths[row]], ids[row, 21:24]])[None])[0, -1])


def test_greedy_generation(pair):
    theirs, ours, _ = pair
    prompts = [tokens(ours, 9).tolist(), tokens(ours, 4).tolist(), tokens(ours, 1).tolist()]
    new = generate(ours, prompts, max_new_tokens=20, temperature=0)
    for prompt, mine in zip(prompts, new):
        ids = torch.tensor([prompt])
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert mine == expected[0, len(prompt):].tolist()
    eos = new[0][5]
    stopped = generate(ours, prompts, max_new_tokens=20, temperature=0, eos=eos)
    assert stopped == [row[:row.index(eos)] if eos in row else row for row in new] and len(stopped[0]) <= 5


def test_sampling(pair):
    _, ours, _ = pair
    n = 2000 if ours.config.vocab_size < 1000 else 200
    prompts = [tokens(ours, 9).tolist()] * n
    first, same, other = (generate(ours, prompts, max_new_tokens=1, temperature=0.7, top_k=5, seed=seed) for seed in (1, 1, 2))
    assert first == same != other
    top, index = ours(torch.tensor(prompts[:1]))[0, -1].topk(5)
    counts = torch.tensor([first.count([i]) for i in index.tolist()]) / n
    assert abs(counts.sum() - 1) < 1e-6 and (counts - F.softmax(top / 0.7, -1)).abs().max() < 2.5 / n ** 0.5      # five sigma
    with pytest.raises(ValueError, match="without any token"):
        generate(ours, [[]])


def test_token_nll(pair):
    """Value and gradient against the plain computation; both ways of token_nll (head frozen, head trained)."""
    _, ours, _ = pair
    ids, lengths = tokens(ours, 700), [300, 1, 250, 149]
    expected = torch.cat([F.cross_entropy(ours(part[None])[0, :-1], part[1:], reduction="none") for part in ids.split(lengths)])
    close(token_nll(ours, ids, lengths), expected)
    ours.lm_head.weight.requires_grad_(True)
    close(token_nll(ours, ids, lengths), expected)
    ours.lm_head.weight.requires_grad_(False)
    x, W = torch.randn(600, 32, requires_grad=True), torch.randn(50, 32)
    target, weight = torch.randint(0, 50, (600,)), torch.rand(600)
    plain = torch.autograd.grad((F.cross_entropy(x @ W.T, target, reduction="none") * weight).sum(), x)[0]
    close(torch.autograd.grad((ChunkedNLL.apply(x, W, target) * weight).sum(), x)[0], plain)


def test_shapes_recur(monkeypatch):
    """In 16 bit on a CPU each new shape of a product is compiled and kept, 1,024 of them: lengths that differ in every step must not make new ones."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.__name__.split(".")[0] in ("mm", "bmm", "addmm", "baddbmm"):
                self.seen.add((function.__name__, *(tuple(a.shape) for a in args if isinstance(a, torch.Tensor))))
            return function(*args, **(kwargs or {}))

    torch.manual_seed(0)
    network = nano.CausalLM(nano.Config("llama", 300, 32, 64, 2, 4, 2, 8, max_position_embeddings=512, bos_token_id=0, eos_token_id=1))
    nano.init_weights(network)
    network = network.to(torch.bfloat16)
    network.lm_head.requires_grad_(False)

    def work(steps):
        rng = np.random.default_rng(0)
        shapes, losses = Shapes(), []
        shapes.seen = set()
        network.zero_grad()
        with shapes:
            for _ in range(steps):
                lengths = rng.integers(20, 200, 4).tolist()
                nll = token_nll(network, torch.from_numpy(rng.integers(2, 300, sum(lengths))), lengths)
                assert len(nll) == sum(lengths) - 4
                nll.sum().backward()
                losses.append(nll.sum().item())
            new = generate(network, [[5] * n for n in (7, 12, 30)], 70, temperature=0)
        return losses, torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]).double(), new, len(shapes.seen)

    losses, gradient, new, few = work(6)
    many = work(16)[3]
    monkeypatch.setattr(nano, "spare", lambda n, x, unit=64: 0)
    plain_losses, plain_gradient, plain_new, plain = work(6)
    assert losses == pytest.approx(plain_losses, rel=1e-4) and new == plain_new
    assert (gradient - plain_gradient).norm() < 0.01 * plain_gradient.norm()
    assert few < 0.3 * plain and many < 0.25 * work(16)[3]


def test_attention_dropout(pair):
    _, _, directory = pair
    model = load_pretrained(str(directory), dtype=torch.float32, attention_dropout=0.3)
    ids = tokens(model, 1, 20)
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


# ------------------------------------------------------------------------------------------------------- configurations


def test_config_of_both_styles():
    new = LlamaConfig(**LLAMA).to_dict()
    old = {k: v for k, v in new.items() if k not in ("rope_parameters", "head_dim")} | {
        "rope_theta": 500.0, "rope_scaling": {k: v for k, v in LLAMA["rope_parameters"].items() if k != "rope_theta"}}
    a, b = read_config(new), read_config(old | {"hidden_size": 128})
    assert a.rope_theta == b.rope_theta == 500.0 and a.rope_scaling == b.rope_scaling and a.rope_scaling["factor"] == 8.0
    assert a.head_dim == 16 and b.head_dim == 16                                          # given; implied by 128 / 8
    assert read_config(Qwen2Config(**QWEN).to_dict()).rope_scaling is None


@pytest.mark.parametrize("change, named", [
    ({"model_type": "mistral"}, "model_type 'mistral'"), ({"use_sliding_window": True}, "sliding-window"), ({"num_local_experts": 8}, "mixture of experts"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"), ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"attention_bias": True}, "attention_bias"), ({"quantization_config": {"quant_method": "gptq"}}, "gptq"), ({"num_key_value_heads": 3}, "no multiple")])
def test_what_is_not_computed_is_refused_by_name(change, named):
    with pytest.raises(ValueError, match=named):
        read_config(LlamaConfig(**LLAMA).to_dict() | change)


WRONG = [
    ({"hidden_size": "64"}, "hidden_size is '64'"), ({"num_hidden_layers": 0}, "num_hidden_layers is 0"), ({"vocab_size": -5}, "vocab_size is -5"),
    ({"num_attention_heads": True}, "num_attention_heads is True"), ({"intermediate_size": None}, "intermediate_size is missing"),
    ({"head_dim": 15}, "head_dim 15"), ({"hidden_size": 64.0}, "hidden_size is 64.0"), ({"num_hidden_layers": 10 ** 9}, "num_hidden_layers is"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"), ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"), ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
    ({"bos_token_id": 96}, "token id is 96"), ({"eos_token_id": [1, 500]}, "token id is 500"), ({"eos_token_id": -1}, "token id is -1"),
    ({"rope_parameters": LLAMA["rope_parameters"] | {"factor": "8"}}, "factor is '8'"), ({"rope_parameters": LLAMA["rope_parameters"] | {"high_freq_factor": 1.0}}, "low_freq_factor"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "rope_theta is 0"), ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"), ({"mlp_bias": True}, "mlp_bias"), ({"sliding_window": 4096}, "sliding_window 4096"),
    ({"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "layer_types"), ({"is_causal": False}, "is_causal"),
    ({"attention_multiplier": 0.1}, "attention_multiplier"), ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True, "bnb_4bit_quant_type": "nf4"}}, "bitsandbytes (8 bit")]


@pytest.mark.parametrize("change, named", WRONG)
def test_wrong_values_are_named(change, named):
    with pytest.raises(ValueError, match=re.escape(named)) as error:
        read_config(LlamaConfig(**LLAMA).to_dict() | change, "here/config.json")
    assert str(error.value).startswith("here/config.json: ") and "\n" not in str(error.value)


def test_unknown_fields_are_noted_once(smollm2, capsys):
    load_config(str(smollm2))
    for config in (LlamaConfig(**LLAMA), Qwen2Config(**QWEN), LlamaConfig(**LLAMA, pad_token_id=3, sliding_window=None, pretraining_tp=2)):
        read_config(config.to_dict())
    assert capsys.readouterr().err == ""
    for _ in range(2):
        read_config(LlamaConfig(**LLAMA).to_dict() | {"mystery_gate": 0.5, "another": True, "unset": None, "off": False}, "x/config.json")
    assert capsys.readouterr().err == "note: x/config.json: not known here and left out of the computation: another, mystery_gate\n"
    read_config(LlamaConfig(**LLAMA, attention_dropout=0.1).to_dict(), "y/config.json")
    assert capsys.readouterr().err == "note: y/config.json: not known here and left out of the computation: attention_dropout\n"


@torch.no_grad()
@pytest.mark.parametrize("change", [
    {"rope_scaling": LLAMA["rope_parameters"] | {"factor": 4.0}}, {"rope_scaling": {k: v for k, v in LLAMA["rope_parameters"].items() if k != "rope_theta"}},
    {"rope_scaling": {"rope_type": "default"}, "rope_theta": 300.0}, {"rope_theta": 300.0}])
def test_rotary_settings_in_two_places(tmp_path, change):
    """rope_scaling beside rope_parameters, rope_theta beside both: what counts is what counts in transformers."""
    source = checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(json.loads((tmp_path / "config.json").read_text()) | change))
    theirs, ours = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), load_pretrained(source, dtype=torch.float32)
    close(ours(tokens(ours, 1, 100)), theirs(tokens(ours, 1, 100)).logits)


def test_published_shapes():
    for name, count in (("llama-3.1-8b", 8030261248), ("qwen2.5-0.5b", 494032768), ("smollm2-135m", 134515008)):
        with torch.device("meta"):
            model = nano.CausalLM(nano.SHAPES[name])
        assert sum(p.numel() for p in model.parameters()) == count
    with pytest.raises(ValueError, match="shape without weights"):
        load_pretrained("llama-3.1-8b")


def test_smollm2_is_the_published_shape(smollm2):
    published = nano.SHAPES["smollm2-135m"]
    config = load_config(str(smollm2))
    assert config == dataclasses.replace(published, rms_norm_eps=config.rms_norm_eps) and abs(config.rms_norm_eps - 1e-5) < 1e-10


# ---------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("shard_bytes", [10 ** 9, 100_000])
def test_save_pretrained(pair, tmp_path, shard_bytes):
    theirs, ours, directory = pair
    if shard_bytes < 10 ** 6 and ours.config.vocab_size > 1000:
        shard_bytes = 100_000_000
    save_pretrained(ours, tmp_path / "saved", shard_bytes)
    shards = list((tmp_path / "saved").glob("*.safetensors"))
    assert (len(shards) > 1) == (shard_bytes < 10 ** 9) and all(s.stat().st_size < shard_bytes * 1.2 for s in shards)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    ids = tokens(ours, 1, 60)
    with torch.no_grad():
        close(again(ids).logits, theirs(ids).logits)
        assert torch.equal(load_pretrained(str(tmp_path / "saved"), dtype=torch.float32)(ids), ours(ids))
    with pytest.raises(ValueError, match="exists already"):
        save_pretrained(ours, tmp_path / "saved")


def test_nf4_loading(pair):
    """quantize="nf4" gives the layers that quantising the loaded weights gives; embedding, norms and head stay."""
    _, ours, directory = pair
    model = load_pretrained(str(directory), quantize="nf4", dtype=torch.float32)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, NF4Linear)}
    assert len(layers) == 7 * model.config.num_hidden_layers and not isinstance(model.lm_head, NF4Linear)
    dense = load_pretrained(str(directory), dtype=torch.float32)
    for name, layer in layers.items():
        dense.get_submodule(name).weight.data = dequantize_nf4(layer.quantized(), torch.float32)
    ids = tokens(ours, 1, 20)
    with torch.no_grad():
        close(model(ids), dense(ids))
        assert (model(ids) - ours(ids)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="load the base in 16 bit"):
        save_pretrained(model, "never-written")


def test_bitsandbytes_checkpoint(pair, tmp_path):
    """A checkpoint that bitsandbytes serialised in NF4 loads into the very same 4-bit weights."""
    theirs, _, _ = pair
    directory = tmp_path / "bfloat16"
    LlamaForCausalLM.save_pretrained(copy.deepcopy(theirs).bfloat16(), directory)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, device_map="cpu", quantization_config=BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16))
    theirs.save_pretrained(tmp_path / "nf4")
    ours, fresh = load_pretrained(str(tmp_path / "nf4")), load_pretrained(str(directory), quantize="nf4")
    for (name, a), (_, b) in zip(ours.named_modules(), fresh.named_modules()):
        if isinstance(b, NF4Linear):
            assert isinstance(a, NF4Linear) and all(torch.equal(x, y) for x, y in zip(a.buffers(), b.buffers())), name
    ids = tokens(ours, 1, 20)
    assert torch.equal(ours(ids), fresh(ids))
    tensors = load_file(tmp_path / "nf4" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != name + ".nested_absmax"}, tmp_path / "nf4" / "model.safetensors")
    with pytest.raises(ValueError, match=f"{name}.*missing: nested_absmax"):
        load_pretrained(str(tmp_path / "nf4"))


@torch.no_grad()
@pytest.mark.parametrize("skip, storage", [(["lm_head", "model.layers.0.mlp"], "uint8"), (["nothing"], "bfloat16")])
def test_unusual_bitsandbytes_checkpoints(tmp_path, skip, storage):
    """Modules kept in 16 bit stay so whatever is asked; a 4-bit lm_head is computed; packed bytes may be stored as another dtype."""
    config = {"hidden_size": 128, "intermediate_size": 192, "vocab_size": 128}
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint(tmp_path / "source", config=config), dtype=torch.bfloat16, device_map="cpu", quantization_config=BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=skip,
        bnb_4bit_quant_storage=getattr(torch, storage)))
    theirs.save_pretrained(tmp_path / "nf4")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", device_map="cpu", dtype="auto")
    ids = torch.arange(3, 63)[None]
    right = F.cross_entropy(theirs(ids).logits[0, :-1].float(), ids[0, 1:]).item()
    ours = [load_pretrained(str(tmp_path / "nf4"), quantize=q) for q in (None, "nf4")]
    for model in ours:
        assert abs(token_nll(model, ids[0], [60]).mean().item() - right) < 0.01
        assert isinstance(model.model.layers[0].mlp.up_proj, NF4Linear) is (storage == "bfloat16") and isinstance(model.model.layers[1].mlp.up_proj, NF4Linear)
    assert torch.equal(ours[0](ids), ours[1](ids))


def test_first_blocks_and_random_blocks(pair):
    _, ours, directory = pair
    short = load_pretrained(str(directory), dtype=torch.float32, blocks=2)
    assert len(short.model.layers) == 2 and torch.equal(short.model.layers[1].mlp.up_proj.weight, ours.model.layers[1].mlp.up_proj.weight)
    deep = load_pretrained(str(directory), dtype=torch.float32, blocks=40, random_init=True)
    weight = deep.model.layers[39].mlp.up_proj.weight
    assert len(deep.model.layers) == 40 and abs(weight.std() - 0.02) < 0.001 and torch.equal(deep.model.norm.weight, torch.ones_like(deep.model.norm.weight))
    with pytest.raises(ValueError, match="99 blocks asked for"):
        load_pretrained(str(directory), blocks=99)


def checkpoint(directory, change=lambda tensors: tensors, config=None):
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(**LLAMA | (config or {})))
    theirs.save_pretrained(directory)
    save_file(change({k: v.contiguous() for k, v in theirs.state_dict().items()}), directory / "model.safetensors")
    return str(directory)


def test_all_wrong_tensors_in_one_error(tmp_path):
    def change(tensors):
        del tensors["model.norm.weight"]
        return tensors | {"model.layers.1.self_attn.k_proj.weight": torch.zeros(5, 64), "model.layers.0.mlp.extra.weight": torch.zeros(2)}
    with pytest.raises(ValueError) as error:
        load_pretrained(checkpoint(tmp_path, change))
    for part in ("model.norm.weight is missing", "k_proj.weight is [5, 64] instead of [32, 64]", "model.layers.0.mlp.extra.weight is not part"):
        assert part in str(error.value)


def test_nan_is_named(tmp_path):
    def change(tensors):
        tensors["model.layers.2.mlp.down_proj.weight"][3, 4] = float("nan")
        return tensors
    with pytest.raises(ValueError, match="model.layers.2.mlp.down_proj.weight holds NaN"):
        load_pretrained(checkpoint(tmp_path, change), quantize="nf4")


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "model.layers.1.self_attn.q_proj.weight", "lm_head.weight"])
@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
def test_not_finite_is_named(tmp_path, name, bad):
    def change(tensors):
        tensors[name].view(-1)[7] = bad
        return tensors
    source = checkpoint(tmp_path, change)
    for quantize in (None, "nf4"):
        with pytest.raises(ValueError, match=f"{name} holds NaN or inf"):
            load_pretrained(source, quantize=quantize)


def test_overflow_of_float16_is_named(tmp_path):
    source = checkpoint(tmp_path, lambda tensors: tensors | {"model.norm.weight": torch.full((64,), 1e5)})
    with pytest.raises(ValueError, match="model.norm.weight holds NaN or infinite values \\(as torch.float16"):
        load_pretrained(source, dtype=torch.float16)


@torch.no_grad()
@pytest.mark.parametrize("differs", [False, True])
def test_tied_with_a_head_of_its_own(tmp_path, differs):
    """As in transformers: a head in the file that differs from the embedding is used, one that does not is tied."""
    def change(tensors):
        return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + differs}
    source = checkpoint(tmp_path, change, {"tie_word_embeddings": True})
    theirs, ours = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), load_pretrained(source, dtype=torch.float32)
    close(ours(tokens(ours, 1, 30)), theirs(tokens(ours, 1, 30)).logits)
    assert ours.config.tie_word_embeddings is not differs


def test_tied_without_embedding(tmp_path):
    """safetensors' save_model keeps the first by name of two tensors that share their memory: the head."""
    source = checkpoint(tmp_path, lambda t: {k: v for k, v in t.items() if k != "model.embed_tokens.weight"}, {"tie_word_embeddings": True})
    with pytest.raises(ValueError, match="model.embed_tokens.weight is missing"):
        load_pretrained(source)


def test_surplus_blocks(tmp_path):
    source = checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(json.loads((tmp_path / "config.json").read_text()) | {"num_hidden_layers": 2}))
    with pytest.raises(ValueError, match="model.layers.2.input_layernorm.weight is not part"):
        load_pretrained(source)
    with pytest.raises(ValueError, match="model.layers.2"):
        load_pretrained(source, blocks=1)


def test_which_file_counts(tmp_path):
    """A single file goes before an index, as in transformers; a tensor in two shards is refused."""
    source = checkpoint(tmp_path)
    save_file({"a": torch.zeros(2)}, tmp_path / "one.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "two.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    assert len(list(load_pretrained(source).parameters())) == 30
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="two.safetensors: a is in another file"):
        load_pretrained(source)
    (tmp_path / "adapter_config.json").write_text("{}")       # transformers would add it, without a word
    with pytest.raises(ValueError, match="holds a model and an adapter"):
        load_pretrained(source)


def test_fingerprint(tmp_path):
    a, b = load_pretrained(checkpoint(tmp_path)), load_pretrained(checkpoint(tmp_path), quantize="nf4")
    marks = [nano.fingerprint(m) for m in (a, b)]
    assert marks == [nano.fingerprint(load_pretrained(str(tmp_path), quantize=q)) for q in (None, "nf4")] and marks[0] != marks[1]
    assert all(re.fullmatch("[0-9a-f]{8}", mark) for mark in marks)
    a.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
    assert nano.fingerprint(a) != marks[0]
    assert nano.fingerprint(a.requires_grad_(True)) is None


def test_written_files(tmp_path):
    """Equal models are equal files, byte for byte, with the user's umask; on a full disk nothing stays."""
    model = load_pretrained(checkpoint(tmp_path / "base"))
    for name in "ab":
        save_pretrained(model, tmp_path / name, 50_000)
    names = sorted(os.listdir(tmp_path / "a"))
    assert names == sorted(os.listdir(tmp_path / "b")) and len(names) > 3
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    assert {(tmp_path / "a" / name).stat().st_mode & 0o777 for name in names} == {0o666 & ~nano.UMASK}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match="model.safetensors could not be written .File too large"):
            save_pretrained(model, tmp_path / "c")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "base"]


def test_links_out_of_the_directory(tmp_path):
    """A file that is a link to elsewhere is refused where it would be exported; the hub's own cache is made of links."""
    (tmp_path / "secret").write_text("x")
    for directory, target, refused in (("model", "../secret", True), ("model", "config.json", False), ("models--a--b/snapshots/1234", "../../blobs/f", False),
                                       ("models--a--b/snapshots/5678", "../../../secret", True)):
        (tmp_path / directory).mkdir(parents=True, exist_ok=True)
        link = tmp_path / directory / "tokenizer.json"
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        if refused:
            with pytest.raises(ValueError, match="tokenizer.json is a link that leaves"):
                nano.no_links_out(tmp_path / directory)
        else:
            nano.no_links_out(tmp_path / directory)


def test_damaged_checkpoints(tmp_path):
    path = tmp_path / "model.safetensors"
    checkpoint(tmp_path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="model.safetensors: Error.*; get the checkpoint again"):
        load_pretrained(str(tmp_path))
    path.unlink()
    with pytest.raises(ValueError, match="model.safetensors: is not there; get the checkpoint again"):
        load_pretrained(str(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../etc/secret.safetensors"}}))
    with pytest.raises(ValueError, match="points outside the directory"):
        load_pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(ValueError, match="config.json: Expecting property name"):
        load_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="neither a directory nor a hub id"):
        load_pretrained("./nowhere")


# ------------------------------------------------------------------------------------------------------------------ hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """The parts of the hub's HTTP interface that a download uses. good/model is public, gated/model wants a licence, others are unknown."""
    protocol_version = "HTTP/1.1"
    directory, requests = None, []

    def do_HEAD(self):
        self.requests.append(self.path)
        if not self.path.startswith(("/api/models/good/model", "/good/model", "/api/models/gated/model", "/gated/model")):
            return self.reply(401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        if self.path.startswith("/api"):
            names = os.listdir(self.directory) + ["pytorch_model.bin", "original/consolidated.safetensors"]
            answer = {"id": "good/model", "sha": COMMIT, "siblings": [{"rfilename": f} for f in names]}
            if "/tree/" in self.path:
                answer = [{"type": "file", "path": f, "size": 1, "oid": f"{i:040x}"} for i, f in enumerate(names)]
            return self.reply(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})
        if self.path.startswith("/gated"):
            return self.reply(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this model is restricted"})
        name = self.path.rpartition("/")[2]
        with open(os.path.join(self.directory, name), "rb") as file:
            self.reply(200, file.read(), {"ETag": f'"{name}-1"', "X-Repo-Commit": COMMIT})

    do_GET = do_HEAD

    def reply(self, status, body, headers):
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path):
    checkpoint(tmp_path / "served")
    Hub.directory, Hub.requests = str(tmp_path / "served"), []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def load(source, endpoint=f"http://127.0.0.1:{server.server_address[1]}"):
        """Loads in a fresh process (the hub library reads its settings once) -> (exit status, last line printed)."""
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport model\ntry: print('loaded', len(list(model.load_pretrained({source!r}).parameters())))\n" \
               "except ValueError as e: print('error:', e)"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {
            "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_ETAG_TIMEOUT": "2"})
        return (run.stdout.strip().splitlines() or [run.stderr])[-1]
    yield load
    server.shutdown()


def test_download(hub):
    assert hub("good/model") == "loaded 30"
    assert not any(".bin" in path or "original" in path for path in Hub.requests)
    assert hub("good/model", "http://127.0.0.1:9") == "loaded 30"                         # now without a network: from the cache


def test_hub_refusals(hub):
    for source, endpoint, said in (("gated/model", (), "restricted"), ("nobody/nothing", (), "epository [Nn]ot [Ff]ound.*private or gated"),
                                   ("good/other", ("http://127.0.0.1:9",), "check your (internet )?connection")):
        line = hub(source, *endpoint)
        assert line.startswith(f"error: {source} cannot be had from the hub") and re.search(said, line), line


def test_tokenizer_missing(tmp_path):
    with pytest.raises(ValueError, match="tokenizer.json: is not there"):
        load_tokenizer(str(tmp_path))


def test_saved_truncation_and_padding(smollm2, tmp_path):
    """What transformers' last call left in tokenizer.json changes nothing."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(smollm2 / "tokenizer.json"), pad_token="<|im_end|>")
    text = "We study the entropy of black holes in anti-de Sitter space. " * 9
    right = tokenizer(text, add_special_tokens=False)["input_ids"]
    for options in ({"truncation": True, "max_length": 16}, {"truncation": True, "padding": "max_length", "max_length": 512}):
        tokenizer(text, **options)
        tokenizer.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "tokenizer.json").read_text())["truncation"]
        assert load_tokenizer(str(tmp_path)).encode(text, add_special_tokens=False).ids == right


def test_control_tokens(smollm2):
    text = "a<|im_end|>"
    assert load_tokenizer(str(smollm2), control_tokens=True).encode(text).ids[-1] == 2
    as_text = load_tokenizer(str(smollm2)).encode(text).ids
    assert len(as_text) > 3 and 2 not in as_text and load_tokenizer(str(smollm2)).decode(as_text) == text


def test_control_tokens_that_are_not_said_to_be(smollm2, tmp_path):
    """The model's own BOS and EOS are control tokens even where tokenizer.json has them as others; BPE's dropout would draw tokens."""
    content = json.loads((smollm2 / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["special"] = False
    content["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "config.json").write_text((smollm2 / "config.json").read_text())
    text = "We study supersymmetric gauge theories.<|im_end|>"
    assert load_tokenizer(str(tmp_path)).encode(text).ids == load_tokenizer(str(smollm2)).encode(text).ids
    assert load_tokenizer(str(tmp_path), control_tokens=True).encode(text).ids[-1] == 2
    content["model"]["dropout"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    for special in (True, False):                              # as transformers, which takes tokenizer_config.json's word
        decoder = {"0": {"content": "<|endoftext|>", "special": special, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
        right = PreTrainedTokenizerFast.from_pretrained(tmp_path)("<|endoftext|>", split_special_tokens=True)["input_ids"]
        assert load_tokenizer(str(tmp_path)).encode("<|endoftext|>").ids == right and (len(right) > 1) is special


def test_a_tokenizer_that_lacks_its_unknown_token(tmp_path):
    words = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(words))
    tokenizer = load_tokenizer(str(tmp_path))
    assert data_arxiv.encode(tokenizer, "a a", 0, None) == [0, 0, 0]
    with pytest.raises(ValueError, match="tokenizer.json: .*Missing"):
        data_arxiv.encode(tokenizer, "a b", 0, None)


def test_unreadable_tokenizers(smollm2, tmp_path):
    path = tmp_path / "tokenizer.json"
    newer = json.loads((smollm2 / "tokenizer.json").read_text())
    newer["model"]["type"] = "SomeNewerModel"
    for text in ("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 17210282\n", json.dumps(newer), ""):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"{path}: .*; get it again, or update `tokenizers`"):
            load_tokenizer(str(tmp_path))
    path.write_bytes((smollm2 / "tokenizer.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(LlamaConfig(**LLAMA).to_dict()))
    with pytest.raises(ValueError, match="token id 49151 is beyond the model's vocab_size 96"):
        load_tokenizer(str(tmp_path))


def test_finished_sequences_leave(pair):
    """Sequences that end at different steps get the tokens that each gets alone."""
    _, ours, _ = pair
    prompts = [tokens(ours, 20)[i:i + n].tolist() for i, n in ((0, 3), (1, 9), (2, 5), (8, 4), (9, 2))]
    free = generate(ours, prompts, max_new_tokens=12, temperature=0.9, top_k=8, seed=[1, 2, 3, 4, 5])
    eos = [free[0][2], free[1][0], free[3][5], free[4][8]]
    batch = generate(ours, prompts, max_new_tokens=12, temperature=0.9, top_k=8, seed=[1, 2, 3, 4, 5], eos=eos)
    alone = [generate(ours, [p], max_new_tokens=12, temperature=0.9, top_k=8, seed=[i + 1], eos=eos)[0] for i, p in enumerate(prompts)]
    assert batch == alone and len(set(map(len, batch))) > 2
    assert batch == [f[:next((i for i, t in enumerate(f) if t in eos), 12)] for f in free]


def test_last_only(pair):
    """The last position alone is what it is among all, causal or not, with a cache behind it or without; so is the gradient."""
    _, ours, _ = pair
    x = torch.randn(2, 17, ours.config.hidden_size, generator=torch.Generator().manual_seed(1)).requires_grad_()
    for causal in (True, False):
        whole, last = ours.model(embeds=x, causal=causal)[:, -1:], ours.model(embeds=x, causal=causal, last_only=True)
        close(last, whole)
        weights = torch.linspace(-1, 1, whole.numel()).view_as(whole)
        close(*(torch.autograd.grad((y * weights).sum(), x)[0] for y in (last, whole)), 1e-4)
    with torch.no_grad():
        cache = KVCache(ours.config, 2, 17, torch.float32, "cpu")
        ours.model(embeds=x[:, :9], cache=cache)
        close(ours.model(embeds=x[:, 9:], cache=cache, last_only=True), ours.model(embeds=x)[:, -1:], 1e-4)


def test_activation_checkpointing_changes_nothing(pair):
    """The same loss and gradient, bit for bit, with both dropouts on; far less is kept."""
    from lora import inject
    ours = copy.deepcopy(pair[1])
    ours.config.attention_dropout = 0.1
    inject(ours, "all", r=4, alpha=8, dropout=0.1)
    ours.train()
    ids, results = tokens(ours, 60), []
    for recompute in (False, True):
        ours.model.checkpoint_activations, kept = recompute, []
        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            loss = token_nll(ours, ids, [40, 20]).sum()
        ours.zero_grad()
        loss.backward()
        results.append((loss.item(), [p.grad.clone() for p in ours.parameters() if p.requires_grad], sum(kept)))
    (a, g, many), (b, h, few) = results
    assert a == b and all(torch.equal(x, y) for x, y in zip(g, h, strict=True)) and few < many / 2


@pytest.mark.parametrize("T, S, causal, masked", [(7, 7, True, False), (7, 7, False, False), (3, 9, False, True), (1, 9, False, True), (1, 9, False, False)])
def test_fused_attention_is_attention(T, S, causal, masked):
    """What a GPU takes, query heads that share a key head and masks included, gives what a CPU multiplies out."""
    q, k, v = torch.randn(2, 6, T, 8), torch.randn(2, 3, S, 8), torch.randn(2, 3, S, 8)
    mask = (torch.arange(S) < torch.tensor([S, S - 2]).view(2, 1, 1, 1)).expand(2, 1, T, S) if masked else None
    torch.testing.assert_close(nano.attend_fused(q, k, v, mask, causal, 0.0), nano.attend(q, k, v, mask, causal), atol=1e-5, rtol=1e-5)
