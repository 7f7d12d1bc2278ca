"""connectors.py, regression: the prompts against transformers, the Gaussian against torch.distributions, parameter counts of the paper."""
import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import connectors
from connectors import (NUMBERS, PROMPTS, REFERENCES, build_regressor, coverage, encode_words, gaussian_head, gaussian_nll, joint_coverage, load_regressor,
                        sample_gaussian, standard_deviation)
from model import SHAPES, CausalLM

BLOCKS = 2


def settings_of(base, **changes):
    return {"experiment": "regress", "init": "pretrained", "base": str(base), "blocks": None, "prompt": "minimal", "seed": 0, "dropout": 0.0, "causal": True, "dtype": "float32"} | changes


def gaussian(n, seed=0):
    """Means and factors of n correlated Gaussians."""
    draw = torch.Generator().manual_seed(seed)
    return gaussian_head(torch.randn(n, 27, generator=draw))


# ------------------------------------------------------------------------------------------------------------ prompts


def test_words_are_the_chat_template_with_an_empty_system_message(smollm2):
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    text = tokenizer.apply_chat_template([{"role": "system", "content": ""}, {"role": "user", "content": "SIGNAL"}], tokenize=False, add_generation_prompt=True)
    assert "".join("SIGNAL" if piece == NUMBERS else piece for piece in PROMPTS["chat"][:-1]) == text
    for prompt, count in (("minimal", 0), ("chat", 2), ("chat-trainable", 3)):
        words = encode_words(str(smollm2), PROMPTS[prompt])
        assert len(words) == count
        for piece, ids in words.items():
            assert ids.tolist() == tokenizer(piece, add_special_tokens=False).input_ids
    assert [len(ids) for ids in encode_words(str(smollm2), PROMPTS["chat"]).values()] == [8, 6]          # as plain text 26 and more


def test_words_keep_their_control_tokens(chatty):
    """Where abstracts are encoded, <|im_start|> is text; in a prompt it is one token."""
    for piece, ids in encode_words(str(chatty), PROMPTS["chat"]).items():
        assert [t for t in ids.tolist() if t > 255] == [{"<|im_start|>": 257, "<|im_end|>": 258}[t] for t in re.findall(r"<\|im_\w+\|>", piece)]


def naive_hidden(regressor, base, signals, blocks):
    """The same with transformers: the whole prompt, word by word, from the start."""
    from transformers import AutoModelForCausalLM
    peer = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, num_hidden_layers=blocks).model
    peer.norm.weight.data.fill_(1.0)
    ids = encode_words(str(base), PROMPTS[regressor.settings["prompt"]])
    pieces = [regressor.input_connector(signals[..., None]) if piece == NUMBERS else
              (peer.embed_tokens(ids[piece]) if piece in ids else regressor.tokens[piece]).expand(len(signals), -1, -1)
              for piece in PROMPTS[regressor.settings["prompt"]]]
    return peer(inputs_embeds=torch.cat(pieces, dim=1), use_cache=False).last_hidden_state[:, -1]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_same_as_transformers(prompt, chatty, request):
    """Forward and gradients, a Qwen2 and a Llama: neither the prefix that is run once nor the shortened last block changes anything."""
    for base in (chatty, request.getfixturevalue("smollm2")) if prompt == "chat" else (chatty,):
        regressor = build_regressor(settings_of(base, prompt=prompt, blocks=BLOCKS))
        signals = torch.randn(3, 47, generator=torch.Generator().manual_seed(0))
        ours, peer = regressor.hidden(signals), naive_hidden(regressor, base, signals, BLOCKS)
        assert torch.allclose(ours, peer, atol=1e-4, rtol=1e-4)
        inputs = [p for name, p in regressor.trained().items() if not name.startswith("output_connector.")]
        assert len(inputs) == {"minimal": 3, "chat": 3, "chat-trainable": 5}[prompt]
        weights = torch.randn(peer.shape, generator=torch.Generator().manual_seed(1))
        for a, b in zip(torch.autograd.grad((ours * weights).sum(), inputs), torch.autograd.grad((peer * weights).sum(), inputs)):
            assert a.norm() > 0 and torch.allclose(a, b, atol=1e-4 * b.abs().max())


@pytest.mark.parametrize("causal", [False, True])
def test_references_are_small_qwen2(causal):
    from transformers import Qwen2Config, Qwen2Model
    regressor = build_regressor(settings_of(None, init="small", causal=causal))
    c = REFERENCES["small"]
    peer = Qwen2Model(Qwen2Config(vocab_size=8, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size, num_hidden_layers=c.num_hidden_layers,
                                  num_attention_heads=c.num_attention_heads, num_key_value_heads=c.num_key_value_heads, rms_norm_eps=1e-6, rope_theta=10000.0))
    peer.load_state_dict({k.removeprefix("backbone."): v for k, v in regressor.state_dict().items() if k.startswith("backbone.")}, strict=False)
    signals = torch.randn(3, 47)
    x = torch.cat([regressor.input_connector(signals[..., None]), regressor.tokens["<|ska-param|>"].expand(3, 1, -1)], dim=1)
    mask = None if causal else torch.zeros(3, 1, 48, 48)                  # a four-dimensional mask is added as it is
    expected = peer(inputs_embeds=x, attention_mask=mask, use_cache=False).last_hidden_state[:, -1]
    assert torch.allclose(regressor.hidden(signals), expected, atol=1e-5)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in regressor.parameters())


# ------------------------------------------------------------------------------------------------------- the Gaussian


def test_loss_is_the_multivariate_normal():
    mean, L = (t.double() for t in gaussian(50))
    y = torch.rand(50, 6).double()
    expected = -torch.distributions.MultivariateNormal(mean, precision_matrix=L @ L.mT).log_prob(y) / 6 - math.log(2 * math.pi) / 2
    assert torch.allclose(gaussian_nll(mean, L, y), expected, rtol=1e-6)


def test_precision_is_unbiased_at_the_start():
    """Raw outputs N(0, 1): the mean diagonal of L L^T is the same for all six; without the factor it spreads sixfold."""
    mean, L = gaussian(200_000)
    diagonal = (L @ L.mT).diagonal(dim1=1, dim2=2).mean(0)
    assert diagonal.max() / diagonal.min() < 1.1
    biased = L / (2 / torch.arange(1, 7).sqrt())[:, None]
    diagonal = (biased @ biased.mT).diagonal(dim1=1, dim2=2).mean(0)
    assert diagonal.max() / diagonal.min() > 5
    assert torch.equal(L, L.tril()) and (L.diagonal(dim1=1, dim2=2) > 0).all() and mean.min() >= 0 and mean.max() <= 1


def test_samples_have_the_covariance():
    mean, L = gaussian(3)
    samples = sample_gaussian(mean, L, 200_000, torch.Generator().manual_seed(0))
    assert samples.shape == (200_000, 3, 6) and torch.equal(samples, sample_gaussian(mean, L, 200_000, torch.Generator().manual_seed(0)))
    for i in range(3):
        covariance = torch.linalg.inv((L[i] @ L[i].T).double()).float()
        assert torch.allclose(standard_deviation(L)[i], covariance.diagonal().sqrt(), rtol=1e-3)
        z = (samples[:, i] - mean[i]) / covariance.diagonal().sqrt()
        assert z.mean(0).abs().max() < 0.02
        assert torch.allclose(torch.cov(z.T), covariance / torch.outer(covariance.diagonal().sqrt(), covariance.diagonal().sqrt()), atol=0.02)


def test_coverage_of_truths_drawn_from_the_gaussian_is_the_level():
    from scipy.stats import chi2
    mean, L = gaussian(40_000)
    y = sample_gaussian(mean, L, 1, torch.Generator().manual_seed(1))[0]
    levels = [0.1, 0.5, 0.68, 0.95]
    each, joint = coverage(mean, L, y, levels), joint_coverage(mean, L, y, levels)
    assert each.shape == (4, 6) and joint.shape == (4,)
    assert (each - torch.tensor(levels)[:, None]).abs().max() < 0.012 and (joint - torch.tensor(levels)).abs().max() < 0.012
    too_sure = coverage(mean, 2 * L, y, levels)                           # half the width
    assert too_sure[2].max() < 0.5
    distance = torch.einsum("bij,bi->bj", L, y - mean).square().sum(1).double()
    for level, fraction in zip(levels, joint.tolist()):
        assert fraction == pytest.approx((distance < chi2(6).ppf(level)).double().mean().item(), abs=1e-4)


# ----------------------------------------------------------------------------------------------------- the regressor


@pytest.mark.parametrize("init, prompt, trained", [("pretrained", "minimal", 26_907), ("pretrained", "chat", 26_907), ("random", "chat-trainable", 26_907 + 1_792),
                                                   ("small", "minimal", 32_219), ("large", "minimal", 990_875)])
def test_parameter_counts_of_the_paper(init, prompt, trained, capsys):
    import train_l3m
    train_l3m.main(["regress", "--dry-run", "--base", "qwen2.5-0.5b", "--init", init, "--prompt", prompt, "--data", "nowhere"])
    report = json.loads(capsys.readouterr().out)
    assert report["trainable_parameters"] == sum(report["trainable_by_group"].values()) == trained
    with torch.device("meta"):
        blocks = sum(p.numel() for p in CausalLM(SHAPES["qwen2.5-0.5b"]).parameters()) - 151936 * 896
    assert report["frozen_parameters"] == (0 if init in REFERENCES else blocks)


def test_a_random_backbone_is_redrawn_from_the_seed(chatty):
    signals = torch.randn(4, 47)
    a, b, other = (build_regressor(settings_of(chatty, init="random", prompt="chat", blocks=3, seed=s)) for s in (1, 1, 2))
    assert torch.equal(a.hidden(signals), b.hidden(signals)) and a.fingerprint == b.fingerprint != other.fingerprint
    assert len(a.backbone.layers) == 3 and all(p.requires_grad == (not name.startswith("backbone.")) for name, p in a.named_parameters())
    pretrained = build_regressor(settings_of(chatty, prompt="chat", seed=1))
    assert torch.equal(pretrained.input_connector.weight, a.input_connector.weight)              # the same start for both
    words = [b for name, b in a.named_buffers() if name.startswith("words")]
    assert not torch.allclose(words[0], pretrained.get_buffer("words1"))                          # random embeddings, too
    low = build_regressor(settings_of(chatty, init="random", dtype="bfloat16", seed=1))
    cast = build_regressor(settings_of(chatty, init="random", dtype="bfloat16", seed=1), dtype=torch.float32)
    assert low.backbone.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16 and low.fingerprint == cast.fingerprint
    assert torch.equal(low.backbone.layers[0].mlp.up_proj.weight.float(), cast.backbone.layers[0].mlp.up_proj.weight)
    assert torch.allclose(low.hidden(signals), cast.hidden(signals), atol=0.1)
    assert {p.dtype for p in low.trained().values()} == {torch.float32}


def test_the_start_of_connectors_and_tokens():
    regressor = build_regressor(settings_of("smollm2-135m", init="random", blocks=1))
    deviation = {name: p.std().item() for name, p in regressor.trained().items()}
    assert deviation["output_connector.weight"] == pytest.approx(0.02, rel=0.05) and deviation["input_connector.weight"] == pytest.approx(0.02, rel=0.1)
    assert not regressor.input_connector.bias.any() and not regressor.output_connector.bias.any()
    assert deviation["tokens.<|ska-param|>"] == pytest.approx(1, rel=0.1)
    assert torch.equal(regressor.backbone.norm.weight, torch.ones(576, dtype=regressor.dtype))


def test_dropout_only_in_training_and_not_in_the_prefix(chatty):
    regressor = build_regressor(settings_of(chatty, prompt="chat", dropout=0.5))
    still = build_regressor(settings_of(chatty, prompt="chat"))
    signals = torch.randn(4, 47)
    assert torch.equal(regressor.prefix_k, still.prefix_k) and torch.equal(regressor.hidden(signals), still.hidden(signals))
    regressor.train()
    assert not torch.equal(regressor.hidden(signals), regressor.hidden(signals))


def test_load_regressor(chatty, tmp_path):
    settings = settings_of(chatty, init="random", prompt="chat")
    (tmp_path / "config.json").write_text(json.dumps({"settings": settings}))
    with pytest.raises(ValueError, match="there is no model.safetensors yet: go on with --resume"):
        load_regressor(tmp_path)
    regressor = build_regressor(settings)
    for p in regressor.trained().values():
        p.data.add_(0.1)
    def save(**more):
        return save_file({k: v.detach().contiguous() for k, v in regressor.trained().items()}, tmp_path / "model.safetensors",
                                        metadata={"state": json.dumps({"fingerprint": regressor.fingerprint} | more)})
    save()
    loaded, signals = load_regressor(tmp_path), torch.randn(4, 47)
    assert all(torch.equal(a, b) for a, b in zip(loaded(signals), regressor(signals))) and loaded.settings == settings and not loaded.training
    save(fingerprint="00000001")
    with pytest.raises(ValueError, match="trained with another backbone"):
        load_regressor(tmp_path)
    save_file(load_file(tmp_path / "model.safetensors") | {"input_connector.weight": torch.zeros(7, 1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"does not fit its backbone \(hidden size 48\): input_connector.weight is \(7, 1\), expected \(48, 1\)"):
        load_regressor(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="model.safetensors: .*; train it again, or give another run"):
        load_regressor(tmp_path)
    with pytest.raises(ValueError, match="config.json: is not there"):
        load_regressor(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps({"settings": settings | {"experiment": "generate"}}))
    with pytest.raises(ValueError, match="is of train_l3m.py generate, not of regress"):
        load_regressor(tmp_path)


def test_a_base_without_chat_words(tiny):
    with pytest.raises(ValueError, match=r"does not know <\|im_start\|> and <\|im_end\|>.*use --prompt minimal"):
        build_regressor(settings_of(tiny[0], prompt="chat"))
    with pytest.raises(ValueError, match="shape without a tokenizer"):
        build_regressor(settings_of("smollm2-135m", init="random", prompt="chat"))
    assert build_regressor(settings_of(tiny[0]))(torch.randn(2, 47))[0].isfinite().all()


def test_checkpointed_activations_give_the_same_gradients(chatty):
    """Dropout included."""
    grads = []
    for recompute in (False, True):
        regressor = build_regressor(settings_of(chatty, prompt="chat", dropout=0.2)).train()
        regressor.backbone.checkpoint_activations = recompute
        torch.manual_seed(0)
        loss = gaussian_nll(*regressor(torch.ones(3, 47)), torch.rand(3, 6, generator=torch.Generator().manual_seed(0)))
        grads.append(torch.autograd.grad(loss.sum(), list(regressor.trained().values())))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads))


def test_prompts_use_the_trainable_tokens():
    for prompt, tokens in (("minimal", 1), ("chat", 1), ("chat-trainable", 3)):
        assert sum(piece in connectors.TOKENS for piece in PROMPTS[prompt]) == tokens and PROMPTS[prompt][-1] == "<|ska-param|>"
