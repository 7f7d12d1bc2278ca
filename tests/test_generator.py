"""connectors.py: the generator of lightcone slices."""
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

import connectors
from connectors import (GENERATION_REFERENCES, GENERATION_WORDS, ROW_END, SLICE_END, Generator, build_generator, choose_trained, load_generator, patch, seed_of,
                        unpatch)
from flow import VelocityCNN, sample
from model import SHAPES, Config, Decoder, init_weights

TINY = Config("qwen2", 0, 32, 48, 2, 4, 2, 8, 1e-6, 10000.0)


def tiny(tune="full", dtype=torch.float32, words=False, carry=False, **changes):
    """A generator whose weights are large enough that everything shows in the output."""
    torch.manual_seed(0)
    backbone = Decoder(replace(TINY, **changes))
    init_weights(backbone)
    for p in backbone.parameters():
        if p.dim() == 2:
            p.data *= 5
    backbone.to(dtype).requires_grad_(False)
    choose_trained(backbone, tune, 2)
    words = {piece: torch.randn(2 + i, 32).to(dtype) for i, piece in enumerate(GENERATION_WORDS)} if words else {}
    generator = Generator(backbone, words, 7, dtype, carry=carry)
    generator.velocity = VelocityCNN(width=8, inner=16, blocks=1)
    for connector in (*generator.parameter_connectors, generator.index_connector, generator.output_connector):
        connector.weight.data *= 20
    return generator.eval()


def lightcones(B=2, S=5, X=14, Y=14):
    g = torch.Generator().manual_seed(3)
    return torch.randn(B, S, X, Y, generator=g), torch.rand(B, 7, generator=g)


# ------------------------------------------------------------------------------------------------------- patches and grid


@pytest.mark.parametrize("X, Y, p", [(140, 140, 14), (28, 28, 14), (6, 15, 3)])
def test_unpatch_inverts_patch(X, Y, p):
    slices = torch.arange(2 * 3 * X * Y).view(2, 3, X, Y)
    patches = patch(slices, p)
    assert patches.shape == (2, 3, X // p, Y // p, p * p)
    assert torch.equal(patches[1, 2, 1, 0].view(p, p), slices[1, 2, p:2 * p, :p])
    assert torch.equal(patches[0, 0, 0, 1].view(p, p), slices[0, 0, :p, p:2 * p])
    assert torch.equal(unpatch(patches), slices)


def test_patches_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="patches of 14 x 14 do not divide slices of 28 x 30: choose"):
        patch(torch.zeros(1, 28, 30), 14)


@pytest.mark.parametrize("X, p, tokens", [(140, 14, 111), (28, 14, 7)])
def test_newline_grid(X, p, tokens):
    """A row of patches and its new line, and so on, and after each slice the other new line."""
    torch.manual_seed(0)
    backbone = Decoder(TINY)
    generator = Generator(backbone, {}, p)
    slices, conditions = lightcones(1, 3, X, X)
    embeds, P = generator.embed(slices, conditions)
    assert P == 9 and embeds.shape == (1, 9 + 3 * tokens, 32)
    row_end, slice_end = (generator.tokens[name][0] for name in (ROW_END, SLICE_END))
    expected = []
    for s in slices[0]:
        for x in range(0, X, p):
            expected += [generator.patch_connector(s[x:x + p, y:y + p].flatten()) for y in range(0, X, p)] + [row_end]
        expected.append(slice_end)
    torch.testing.assert_close(embeds[0, P:], torch.stack(expected))


def test_prompt_of_the_spec():
    generator, (slices, conditions) = tiny(words=True), lightcones(2)
    embeds, P = generator.embed(slices, conditions)
    words = [getattr(generator, f"words{i}") for i in (0, 2, 4)]
    assert [len(w) for w in words] == [2, 3, 4] and P == 2 + 1 + 3 + 7 + 4 + 1
    numbers = [connector(conditions[1, i:i + 1])[None] for i, connector in enumerate([*generator.parameter_connectors, generator.index_connector])]
    expected = [words[0], generator.tokens["<|system-prompt-token|>"], words[1], *numbers, words[2], generator.tokens["<|lightcone-token|>"]]
    torch.testing.assert_close(embeds[1, :P], torch.cat(expected))
    references, P = tiny().embed(slices, conditions)
    assert P == 9


# ---------------------------------------------------------------------------------------------- what is trained, and counts


def count(config, tune, rank=2):
    with torch.device("meta"):
        backbone = Decoder(replace(config, vocab_size=0)).requires_grad_(False)
        choose_trained(backbone, tune, rank)
        return sum(p.numel() for p in Generator(backbone, {}).trained().values())


@pytest.mark.parametrize("config, tune, rank, expected", [
    (SHAPES["qwen2.5-0.5b"], "lora", 2, 2_182_409), (SHAPES["qwen2.5-0.5b"], "lora", 8, 5_481_737), (SHAPES["qwen2.5-0.5b"], "full", 0, 358_936_841),
    (GENERATION_REFERENCES["small"], "full", 0, 2_175_625), (GENERATION_REFERENCES["large"], "full", 0, 5_505_033)])
def test_trained_parameters(config, tune, rank, expected):
    assert count(config, tune, rank) == expected


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_trained_tensors_are_float32_frozen_ones_16_bit_and_a_small_step_changes_a_norm(tune):
    generator = tiny(tune, torch.bfloat16, words=True).train()
    named = generator.trained()
    assert all(p.dtype == torch.float32 for p in named.values())
    frozen = [p for p in generator.parameters() if not p.requires_grad]
    assert all(p.dtype == torch.bfloat16 for p in frozen) and bool(frozen) == (tune == "lora")
    assert torch.equal(generator.backbone.norm.weight, torch.ones(32))
    before = {name: p.detach().clone() for name, p in named.items()}
    optimizer = torch.optim.AdamW(named.values(), lr=5e-5, weight_decay=0)
    loss = generator(*lightcones()).mean()
    assert loss.dtype == torch.float32
    loss.backward()
    optimizer.step()
    assert all(p.grad is not None for p in named.values())
    unchanged = [name for name, p in named.items() if torch.equal(p, before[name])]
    assert not [name for name in unchanged if not name.endswith("lora_A")], unchanged           # lora_A has no gradient while lora_B is zero
    assert len([name for name in named if name.endswith("norm.weight")]) == 5


def test_bfloat16_backbone_computes_what_float32_does():
    """Trained float32 matrices are cast for the computation; the final norm and what follows are float32."""
    slices, conditions = lightcones()
    exact = tiny().patch_conditions(slices, conditions)
    cast = tiny()
    cast.dtype = torch.bfloat16
    dtypes = []
    for module in (cast.backbone.layers[0].self_attn.q_proj, cast.backbone.layers[1].mlp.down_proj, cast.backbone.layers[0], cast.backbone.norm, cast.output_connector):
        module.register_forward_hook(lambda module, inputs, y: dtypes.append(y.dtype))
    rounded = cast.patch_conditions(slices, conditions)
    assert dtypes == [torch.bfloat16] * 3 + [torch.float32] * 2 and rounded.dtype == torch.float32
    assert 0 < (rounded - exact).norm() < 0.1 * exact.norm()


def test_velocity_network_of_another_size_trained_in_bfloat16(tmp_path):
    """The size is the run's; in training its convolutions are rounded to bfloat16, in validation and sampling nothing is."""
    settings = SETTINGS | {"velocity": [16, 24], "velocity_dtype": "bfloat16"}
    low, full = build_generator(settings), build_generator(settings | {"velocity_dtype": "float32"})
    assert low.velocity.first.weight.shape == (16, 4, 3, 3) and low.velocity.blocks[0][0].weight.shape == (24, 16, 3, 3)
    batch = *lightcones(2, 4, 28, 28), torch.randn(2, 2, 4, 14, 14), torch.rand(2, 2, 4)
    assert torch.equal(low(*batch), full(*batch))
    low.backbone.config.attention_dropout = full.backbone.config.attention_dropout = 0.0
    one, two = low.train()(*batch), full.train()(*batch)
    assert one.dtype == torch.float32 and not torch.equal(one, two)
    torch.testing.assert_close(one, two, rtol=1e-2, atol=0)
    one.sum().backward()
    two.sum().backward()
    for (name, a), b in zip(low.trained().items(), full.trained().values()):
        assert a.grad.dtype == torch.float32 and (a.grad - b.grad).norm() < 0.1 * b.grad.norm(), name
    write_run(tmp_path / "run", settings, low)
    assert load_generator(tmp_path / "run").velocity.blocks[5][0].weight.shape == (24, 16, 3, 3)
    write_run(tmp_path / "run", SETTINGS, low)
    with pytest.raises(ValueError, match=r"velocity.blocks.0.0.weight is \(24, 16, 3, 3\), expected \(128, 64, 3, 3\)"):
        load_generator(tmp_path / "run")


def test_wrong_tune():
    for tune, rank in (("half", 2), ("lora", 0)):
        with pytest.raises(ValueError, match="--tune is full or lora"):
            choose_trained(Decoder(TINY), tune, rank)


# ------------------------------------------------------------------------------------------------- sequence and conditions


def test_each_condition_reaches_the_output():
    generator, (slices, conditions) = tiny(words=True), lightcones()
    with torch.no_grad():
        base = generator.patch_conditions(slices, conditions)
        for i in range(7):
            changed = conditions.clone()
            changed[0, i] += 0.3
            difference = (generator.patch_conditions(slices, changed) - base).flatten(3).norm(dim=3)          # (B, S - 2, R*K patches)
            assert (difference[0] > 1e-3).all() and (difference[1] == 0).all(), i
        for name in generator.tokens:
            token = generator.tokens[name]
            token += 0.5
            difference = (generator.patch_conditions(slices, conditions) - base).flatten(3).norm(dim=3)
            assert (difference > 1e-3).all(), name
            token -= 0.5


def test_carry_adds_the_patch_of_the_slice_before_to_the_first_channel():
    slices, conditions = lightcones()
    with torch.no_grad():
        added = tiny(carry=True).patch_conditions(slices, conditions) - tiny().patch_conditions(slices, conditions)
    torch.testing.assert_close(added[:, :, :, 0].flatten(3), patch(slices[:, 1:-1], 7).flatten(2, 3), rtol=1e-4, atol=1e-5)
    assert not added[:, :, :, 1].any()


def test_each_condition_gets_a_gradient():
    generator = tiny()
    generator(*lightcones()).sum().backward()
    assert all((p.grad != 0).any() for p in generator.trained().values())


def test_a_patch_is_predicted_from_what_precedes_it_alone():
    """Changing a patch changes what is known before every later patch, and nothing before that, itself included."""
    generator, (slices, conditions) = tiny(), lightcones(1)
    with torch.no_grad():
        base = generator.patch_conditions(slices, conditions)
        assert base.shape == (1, 3, 4, 2, 7, 7)
        for s, r, k in ((0, 1, 1), (2, 0, 0), (3, 0, 1), (3, 1, 0), (4, 1, 1)):
            changed = slices.clone()
            changed[0, s, 7 * r:7 * r + 7, 7 * k:7 * k + 7] += 1
            moved = ((generator.patch_conditions(changed, conditions) - base).flatten(3).norm(dim=3) > 1e-4)[0].flatten().tolist()
            number = (s - 2) * 4 + 2 * r + k
            assert moved == [i > number for i in range(12)], (s, r, k)


def test_loss_is_that_of_the_patches_from_the_third_slice_on():
    generator, (slices, conditions) = tiny(), lightcones()
    g = torch.Generator().manual_seed(5)
    noise, t = torch.randn(2, 3, 4, 7, 7, generator=g), torch.rand(2, 3, 4, generator=g)
    with torch.no_grad():
        cond = generator.patch_conditions(slices, conditions)
        terms = []
        for b in range(2):
            for s in range(3):
                for i in range(4):
                    x, e, c = patch(slices[b, s + 2], 7).flatten(0, 1)[i].view(7, 7), noise[b, s, i], generator.velocity.condition(cond[b, s, i][None])
                    v = generator.velocity(((1 - t[b, s, i]) * e + t[b, s, i] * x)[None, None], t[b, s, i][None], c)
                    terms.append((v - (x - e)).square().mean())
        torch.testing.assert_close(generator(slices, conditions, noise, t), torch.stack(terms).view(2, 12).mean(1))
        torch.manual_seed(1)
        first = generator(slices, conditions)
        torch.manual_seed(1)
        assert torch.equal(generator(slices, conditions), first) and not torch.equal(generator(slices, conditions), first)


# -------------------------------------------------------------------------------------------------------------- generation


def run(generator, context, conditions, n, **kwargs):
    kwargs = {"bins": 100, "method": "midpoint", "steps": 3} | kwargs
    return torch.stack(list(generator.generate(context, conditions, n, **kwargs)), dim=2)       # (B, samples, n, X, Y)


@pytest.mark.parametrize("S, window, slide, carry", [(2, 12, 6, False), (2, 5, 2, True), (3, 5, 1, False), (7, 5, 3, True)])
@pytest.mark.parametrize("method", ["midpoint", "dopri5"])
def test_cached_equals_teacher_forced_across_slides(S, window, slide, carry, method, monkeypatch):
    """Each generated patch is the one that a pass without a cache over the true window, with its true index, gives."""
    monkeypatch.setattr(connectors, "WINDOW", window)
    generator, n, (slices, conditions) = tiny(words=True, carry=carry, attention_dropout=0.0), 6, lightcones(2, S)
    got = run(generator, slices, conditions, n, seeds=[11, 12], slide=slide, samples=2, method=method)
    assert got.shape == (2, 2, n, 14, 14) and got.std() > 0.1
    for b, k in ((0, 0), (1, 1)):
        whole, draw, first = torch.cat((slices[b], got[b, k])), torch.Generator().manual_seed(seed_of(11 + b, k)), 0
        for s in range(S, S + n):
            if s - first >= window:
                first = s - (window - slide)
            shifted = conditions[b:b + 1].clone()
            shifted[0, 6] += first / 100
            with torch.no_grad():
                cond = generator.patch_conditions(whole[None, first:s + 1], shifted)[0, -1]     # (R*K, 2, p, p), before each patch of slice s
            x, _ = sample(generator.velocity, cond, method, noise=torch.randn(4, 1, 7, 7, generator=draw), steps=3)
            torch.testing.assert_close(unpatch(x.view(2, 2, 49)), whole[s], rtol=2e-3, atol=2e-3)
    if S == 2 and window == 5:
        assert first > 3                                                                        # it slid twice
        again = run(generator, slices, conditions, n, seeds=[11, 12], slide=slide, samples=2, method=method, bins=10)
        assert torch.equal(again[:, :, :3], got[:, :, :3]) and (again[:, :, 3] - got[:, :, 3]).abs().max() > 1e-3     # the new index arrives


def test_generation_is_seeded_and_independent_of_the_batch():
    generator, (slices, conditions) = tiny(), lightcones(3, 2)
    got = run(generator, slices, conditions, 2, seeds=[5, 6, 7], samples=2)
    assert torch.equal(got, run(generator, slices, conditions, 2, seeds=[5, 6, 7], samples=2))
    torch.testing.assert_close(run(generator, slices[1:2], conditions[1:2], 2, seeds=[6]), got[1:2, :1], rtol=1e-3, atol=1e-3)
    assert (got[1, 0] - got[1, 1]).abs().max() > 0.1 and (got[0, 0] - got[1, 0]).abs().max() > 0.1
    assert (run(generator, slices, conditions, 2, seeds=[8, 6, 7])[0] - got[0, :1]).abs().max() > 0.1


def test_the_context_is_encoded_once_for_all_samples():
    generator, (slices, conditions) = tiny(), lightcones(2, 4)
    shapes = []
    generator.backbone.register_forward_hook(lambda module, args, kwargs, y: shapes.append(tuple(kwargs["embeds"].shape[:2])), with_kwargs=True)
    run(generator, slices, conditions, 2, seeds=[0, 1], samples=3)
    assert shapes == [(2, 9 + 4 * 7), (6, 1), (6, 2), (6, 1), (6, 3), (6, 1), (6, 2), (6, 1)]


def test_a_slide_that_does_not_fit_the_window_is_refused():
    generator, (slices, conditions) = tiny(), lightcones(1, 2)
    for slide in (0, 11):
        with pytest.raises(ValueError, match="choose 1 to 10"):
            run(generator, slices, conditions, 1, seeds=[0], slide=slide)


# ------------------------------------------------------------------------------------------------------------ build and load


SETTINGS = {"experiment": "generate", "init": "small", "base": "none", "blocks": None, "tune": "full", "rank": 2, "patch": 14, "seed": 3, "dropout": 0.01, "dtype": "float32"}


def write_run(directory, settings, generator):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"settings": settings}))
    save_file({k: v.detach().contiguous() for k, v in generator.trained().items()}, directory / "model.safetensors", {"state": json.dumps({"fingerprint": generator.fingerprint})})


def test_reference_builds_from_its_seed_alone_and_loads(tmp_path):
    torch.manual_seed(99)
    generator = build_generator(SETTINGS)
    state = torch.get_rng_state()
    again = build_generator(SETTINGS)
    assert torch.equal(state, torch.get_rng_state()) and not generator.training
    assert all(torch.equal(a, b) for a, b in zip(generator.parameters(), again.parameters()))
    other = build_generator(SETTINGS | {"seed": 4})
    assert not torch.equal(generator.velocity.first.weight, other.velocity.first.weight)
    assert not torch.equal(generator.patch_connector.weight, other.patch_connector.weight)
    for p in generator.parameters():
        p.data += 0.01
    write_run(tmp_path / "run", SETTINGS, generator)
    loaded = load_generator(tmp_path / "run")
    slices, conditions = lightcones(1, 3, 28, 28)
    with torch.no_grad():
        assert torch.equal(loaded.patch_conditions(slices, conditions), generator.patch_conditions(slices, conditions))
        generator.dtype = torch.bfloat16
        half = load_generator(tmp_path / "run", dtype=torch.bfloat16)
        assert half.backbone.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16 and half.velocity.last.weight.dtype == torch.float32
        torch.testing.assert_close(half.patch_conditions(slices, conditions), generator.patch_conditions(slices, conditions))


def test_the_start_of_a_reference():
    """wide: block matrices N(0, 1/C), where the paper's are N(0, 0.02^2); the rest is the same."""
    wide, paper = build_generator(SETTINGS | {"start": "wide"}).trained(), build_generator(SETTINGS | {"start": "paper"}).trained()
    for name, p in paper.items():
        std = 0.02 if name.endswith("proj.weight") else 0.0
        if name.startswith("backbone.layers.") and "norm" not in name:
            assert p.std().item() == pytest.approx(std, rel=0.05), name
            assert wide[name].std().item() == pytest.approx(128**-0.5 if std else 0.0, rel=0.05), name
        elif not name.startswith("velocity."):
            assert torch.equal(wide[name], p), name


@pytest.mark.parametrize("init, tune", [("pretrained", "lora"), ("random", "lora"), ("pretrained", "full")])
def test_language_model_backbone(smollm2, tmp_path, init, tune):
    settings = SETTINGS | {"init": init, "tune": tune, "base": str(smollm2), "blocks": 2, "dtype": "bfloat16"}
    generator = build_generator(settings)
    assert not hasattr(generator.backbone, "embed_tokens")
    words = connectors.encode_words(str(smollm2), GENERATION_WORDS)
    assert [words[w].tolist() for w in GENERATION_WORDS] == [[1, 9690, 198], [2, 198, 1, 4093, 198], [2, 198, 1, 520, 9531, 198]]
    write_run(tmp_path / "run", settings, generator)
    slices, conditions = lightcones(1, 3, 28, 28)
    generator.train()(slices, conditions).sum().backward()
    loaded = load_generator(tmp_path / "run")
    with torch.no_grad():
        torch.testing.assert_close(loaded.patch_conditions(slices, conditions), generator.eval().patch_conditions(slices, conditions))
        list(loaded.generate(slices, conditions, 1, bins=100, seeds=[0], method="midpoint", steps=2))


def test_bad_runs_end_in_a_sentence(tmp_path):
    def error():
        with pytest.raises(ValueError) as e:
            load_generator(tmp_path)
        assert "\n" not in str(e.value)
        return str(e.value)
    assert "config.json: is not there" in error()
    generator = build_generator(SETTINGS)
    write_run(tmp_path, SETTINGS | {"experiment": "regress"}, generator)
    assert "is of train_l3m.py regress, not of generate" in error()
    write_run(tmp_path, SETTINGS | {"init": "large"}, generator)
    assert "does not fit its backbone (hidden size 256)" in error()
    for name, value in (("init", "other"), ("init", ["small"]), ("dtype", "int8"), ("dtype", None), ("blocks", -3), ("blocks", 10**9), ("blocks", "six"), ("patch", None),
                        ("patch", 0), ("seed", "zero"), ("seed", -1), ("tune", "none"), ("rank", {}), ("dropout", {}), ("start", "far"), ("carry", "no")):
        for init in (SETTINGS, SETTINGS | {"init": "random", "base": "smollm2-135m", "blocks": 1, "tune": "lora"}):
            if (name, init["init"]) in (("rank", "small"), ("dropout", "small"), ("dropout", "random")):
                continue                                                                        # not used there
            write_run(tmp_path, init | {name: value}, generator)
            assert "config.json" in error() or "does not fit" in error(), (name, value)
    for name in ("init", "seed", "dtype", "patch", "tune", "rank", "blocks", "experiment", "dropout"):
        write_run(tmp_path, {k: v for k, v in SETTINGS.items() if k != name}, generator)
        assert f"config.json: lacks '{name}'" in error()
    write_run(tmp_path, SETTINGS, generator)
    for text in ("{", "[]", '{"settings": 3}', '{"settings": null}', ""):
        (tmp_path / "config.json").write_text(text)
        assert "config.json: " in error()
    write_run(tmp_path, SETTINGS, generator)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    for part in (whole[:1000], whole[:-10], b"", b"nonsense"):
        weights.write_bytes(part)
        assert "model.safetensors: " in error() and "train it again, or give another run" in error()
    weights.unlink()
    assert "there is no model.safetensors yet: go on with --resume" in error()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_tensor_that_is_not_finite_is_refused_by_name(tmp_path, value):
    generator = build_generator(SETTINGS)
    generator.velocity.blocks[3][1].weight.data[5, 6] = value
    write_run(tmp_path, SETTINGS, generator)
    with pytest.raises(ValueError, match="model.safetensors: velocity.blocks.3.1.weight holds NaN or infinity"):
        load_generator(tmp_path)
