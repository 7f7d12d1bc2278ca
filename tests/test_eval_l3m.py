"""eval.py regress: trained references on simulated lightcones, the table against numpy and torch, baselines, a user's own lightcone, bad input.
eval.py next-patch and generate: errors and statistics against slow, plain versions and where the answer is known."""
import json
import shutil
from functools import partial

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import connectors
import data_lightcone
import eval as nano_eval
from conftest import SHARED
from connectors import build_generator, build_regressor, gaussian_nll, load_generator, load_regressor, patch
from data_lightcone import PARAMETERS, PRIORS, GlobalSignals, SubLightcones, normalise, power_spectrum, to_unit
from flow import VelocityCNN, sample
from model import Config

SETTINGS = {"experiment": "regress", "init": "small", "base": None, "blocks": None, "prompt": "minimal", "tokens": 47, "split_seed": 0, "epochs": 3, "max_steps": None,
            "dropout": 0.0, "causal": False, "dtype": "float32"}


def write_run(directory, settings, train, validation):
    """A run as train_l3m.py leaves it: three epochs of training."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"settings": settings}))
    model, records = build_regressor(settings), []
    optimizer, losses = torch.optim.AdamW(model.trained().values(), lr=3e-3), []
    for epoch in range(4):
        for rows in torch.randperm(len(train), generator=torch.Generator().manual_seed(epoch)).split(16) if epoch else ():
            loss = gaussian_nll(*model(train.signals[rows]), train.parameters[rows]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            losses.append(gaussian_nll(*model(validation.signals), validation.parameters).mean().item())
        records.append({"step": 3 * epoch, "epoch": epoch, "validation_loss": losses[-1]})
        if losses[-1] == min(losses):
            save_file({name: p.detach() for name, p in model.trained().items()}, directory / "model.safetensors")
    (directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(directory of runs small-seed0, small-seed1, random-1-seed0, random-2-seed0, their store)."""
    root = tmp_path_factory.mktemp("l3m")
    store = root / "lightcones.h5"
    data_lightcone.main(["simulate", "-n", "96", "--sky", "14", "--bins", "235", "--out", str(store), "--workers", "2"])
    train, validation = (GlobalSignals(store, split) for split in ("train", "validation"))
    settings = SETTINGS | {"data": str(store), "norm": list(train.norm)}
    llm = settings | {"init": "random", "base": str(root / "base"), "causal": True}
    (root / "base").mkdir()
    (root / "base" / "config.json").write_text(json.dumps({
        "model_type": "llama", "vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 128, "hidden_act": "silu", "tie_word_embeddings": True}))
    for name, s in (("small-seed0", settings | {"seed": 0}), ("small-seed1", settings | {"seed": 1}), ("random-1-seed0", llm | {"seed": 0, "blocks": 1}),
                    ("random-2-seed0", llm | {"seed": 0, "blocks": None})):
        write_run(root / name, s, train, validation)
    return root, store


def regress(*arguments):
    nano_eval.main(["regress", *map(str, arguments), "--device", "cpu"])


def test_table_and_figures(runs, tmp_path, capsys):
    """Losses, errors and intervals of a group of two seeds against torch.distributions and scipy; printed, written and drawn."""
    from scipy import stats
    root, store = runs
    regress(*(root / f"{name}-seed0" for name in ("small", "random-1", "random-2")), root / "small-seed1", "--out", tmp_path / "r")
    report = json.loads((tmp_path / "r.json").read_text())
    test = GlobalSignals(store, "test")
    assert [(m["name"], len(m["runs"])) for m in report["methods"]] == [("small", 2), ("random-1", 1), ("random-2", 1), ("ridge regression", 0), ("prior mean", 0)]
    assert report["lightcones"] == len(test) >= 3
    losses, errors, inside, sigmas = [], [], [], []
    for seed in (0, 1):
        with torch.no_grad():
            mean, L = load_regressor(root / f"small-seed{seed}")(test.signals)
        oracle = torch.distributions.MultivariateNormal(mean, precision_matrix=L @ L.mT)
        losses.append((-oracle.log_prob(test.parameters) / 6 - np.log(2 * np.pi) / 2).numpy())
        errors.append((mean - test.parameters).abs().numpy())
        sigmas.append(oracle.covariance_matrix.diagonal(dim1=1, dim2=2).sqrt().numpy())
        inside.append((errors[-1] < stats.norm.ppf(0.95) * sigmas[-1]).mean(0))                    # the central 90%
    loss, error, sigma = (np.mean(x, 0) for x in (losses, errors, sigmas))
    small = report["methods"][0]
    assert small["loss"]["mean"] == pytest.approx(loss.mean(), rel=1e-4) and small["mean error"]["mean"] == pytest.approx(error.mean(), rel=1e-4)
    assert [small["error"][p]["mean"] for p in PARAMETERS] == pytest.approx(error.mean(0), rel=1e-4)
    assert [small["sigma"][p]["mean"] for p in PARAMETERS] == pytest.approx(sigma.mean(0), rel=1e-4)
    assert [small["coverage"][p][report["levels"].index(0.9)] for p in PARAMETERS] == pytest.approx(np.mean(inside, 0), abs=1e-6)
    interval = stats.bootstrap((loss,), np.mean, n_resamples=9999, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    assert [small["loss"]["low"], small["loss"]["high"]] == pytest.approx([interval.low, interval.high], rel=0.05)
    best = [min(json.loads(line)["validation_loss"] for line in open(root / f"small-seed{seed}" / "metrics.jsonl")) for seed in (0, 1)]
    assert small["validation loss"] == {"mean": pytest.approx(np.mean(best)), "std": pytest.approx(np.std(best)), "seeds": best}
    assert report["methods"][1]["loss minus the first's"]["mean"] == pytest.approx(report["methods"][1]["loss"]["mean"] - small["loss"]["mean"])
    printed = capsys.readouterr().out
    assert f"{small['error']['E_0']['mean']:.3f} [{small['error']['E_0']['low']:.3f}, {small['error']['E_0']['high']:.3f}]" in printed
    for kind in ("loss", "parameters", "calibration", "depth"):
        assert all((tmp_path / f"r-{kind}.{suffix}").stat().st_size > 8000 for suffix in ("png", "pdf"))


def test_validation_split_repeats_the_training_script(runs):
    """On the validation split the loss is the one that metrics.jsonl holds: same lightcones, same network. One run: no figure against depth."""
    root, _ = runs
    regress(root / "small-seed0", "--split", "validation")
    report = json.loads((root / "small-seed0" / "regress-validation.json").read_text())
    assert report["methods"][0]["loss"]["mean"] == pytest.approx(report["methods"][0]["validation loss"]["mean"], abs=1e-5)
    assert report["methods"][1]["loss"]["mean"] == pytest.approx(report["methods"][1]["validation loss"]["mean"], abs=1e-5)        # ridge
    assert not (root / "small-seed0" / "regress-validation-depth.png").exists()


def test_baselines():
    """Ridge recovers a linear truth and its covariance; its weights are numpy's least squares with the penalty as rows; the prior mean is 0.5."""
    class Signals:
        def __init__(self, n, seed):
            rng = np.random.default_rng(seed)
            self.signals = torch.from_numpy(rng.normal(size=(n, 47)).astype(np.float32))
            weights = np.random.default_rng(9).normal(size=(47, 6)) * 0.01
            noise = rng.multivariate_normal(np.zeros(6), 1e-4 * (np.eye(6) + 0.5), n)
            self.parameters = torch.from_numpy((0.5 + self.signals.numpy() @ weights + noise).astype(np.float32))

    train, validation, test = Signals(800, 0), Signals(400, 1), Signals(2000, 2)
    methods, alpha = nano_eval.baselines(train, validation)
    mean, L = methods["ridge regression"](test.signals)
    covariance = torch.linalg.inv(L[0] @ L[0].T).numpy()
    assert covariance == pytest.approx(1e-4 * (np.eye(6) + 0.5), abs=4e-5)
    assert gaussian_nll(mean, L, test.parameters).mean() < gaussian_nll(*methods["prior mean"](test.signals), test.parameters).mean() - 1
    few = Signals(60, 3)                                                                        # where the penalty matters
    methods, alpha = nano_eval.baselines(few, validation)
    X, Y = few.signals.double().numpy(), few.parameters.double().numpy()
    rows = np.vstack([X - X.mean(0), np.sqrt(alpha) * np.eye(47)])
    weights = np.linalg.lstsq(rows, np.vstack([Y - Y.mean(0), np.zeros((47, 6))]))[0]
    mean = methods["ridge regression"](test.signals)[0]
    assert alpha > 1 and mean.numpy() == pytest.approx((test.signals.numpy() - X.mean(0)) @ weights + Y.mean(0), abs=1e-5)
    assert methods["prior mean"](test.signals)[0].unique().tolist() == [0.5]


@pytest.mark.parametrize("depth, unknown", [(1, False), (5, True)])
def test_own_lightcone(runs, tmp_path, capsys, monkeypatch, depth, unknown):
    """A lightcone of the store, written as a file with `depth` times finer bins, gives the run's prediction for it, in physical units. Without
    parameters the posterior is the same."""
    root, store = runs
    test = GlobalSignals(store, "test")
    with h5py.File(store) as f:
        row = test.rows[0]
        cube, truth, z = f["brightness_temp"][row], f["parameters"][row], f["redshifts"][row].astype(float)
    cube = np.repeat(np.moveaxis(cube[::-1], 0, 2), depth, axis=2).astype(np.float32)           # (x, y, t from low z)
    T = cube.shape[2]
    distance = data_lightcone.comoving_distance(z[::-1], truth[1])
    z = data_lightcone.redshift_at(distance[0] + (distance[1] - distance[0]) / depth * np.arange(T), truth[1])
    history = {} if unknown else {"node_z": np.array([35.0, 15, 5]), "xH": np.array([1.0, 1, 0.9])}
    np.savez(tmp_path / "mine.npz", image=cube, z=z, **history, **{p: np.nan if unknown and p != "Om" else v for p, v in zip(PARAMETERS, truth)})
    if not unknown:
        monkeypatch.setattr(nano_eval, "draw_corner", lambda *_: None)                          # once is enough
    regress(root / "small-seed0", "--lightcone", tmp_path / "mine.npz", "--out", tmp_path / "p")
    report = json.loads((tmp_path / "p-mine.json").read_text())
    settings = json.loads((root / "small-seed0" / "config.json").read_text())["settings"]
    signal, _, notes = nano_eval.read_own(tmp_path / "mine.npz", settings, store)
    assert signal.numpy() == pytest.approx(test.signals[:1].numpy(), abs=1e-3) and not any("Mpc deep" in note or "ends at" in note for note in notes)
    with torch.no_grad():
        mean, L = load_regressor(root / "small-seed0")(test.signals[:1])
    width = PRIORS[:, 1] - PRIORS[:, 0]
    covariance = np.linalg.inv((L[0] @ L[0].T).numpy()) * np.outer(width, width)
    found = list(report["parameters"].values())
    assert to_unit(np.array([p["mean"] for p in found])) == pytest.approx(mean[0].numpy(), abs=1e-3)       # the store rounds to float16
    assert [p["std"] for p in found] == pytest.approx(np.sqrt(covariance.diagonal()), rel=1e-2)
    assert np.array(report["covariance"]) / np.outer(width, width) == pytest.approx(covariance / np.outer(width, width), abs=1e-3)
    assert all(PRIORS[j, 0] <= p["low"] < p["mean"] < p["high"] <= PRIORS[j, 1] for j, p in enumerate(found))
    assert [p["truth"] for p in found] == [None if unknown and p != "Om" else pytest.approx(v) for p, v in zip(PARAMETERS, truth)]
    printed = capsys.readouterr()
    assert "68% interval" in printed.out and ("such histories are usually left out" in printed.err) == (not unknown)
    assert not unknown or all((tmp_path / f"p-mine.{s}").stat().st_size > 20000 for s in ("png", "pdf"))


def test_own_lightcone_of_21cmfast(runs, tmp_path, capsys, monkeypatch):
    """Files as 21cmFAST wrote them; what sets them apart from the training lightcones is said."""
    files = [SHARED / "data" / "lightcones" / name for name in ("native_v3_0.h5", "native_v4_0.h5")]
    if not files[0].exists():
        pytest.skip("needs ../shared/data/lightcones, made with 21cmFAST")
    root, _ = runs
    monkeypatch.setattr(nano_eval, "draw_corner", lambda *_: None)
    regress(root / "small-seed0", "--lightcone", *files, "--out", tmp_path / "p")
    printed = capsys.readouterr()
    assert "native_v3_0.h5: its sky is 40 Mpc wide, the training lightcones' 200 Mpc" in printed.err
    assert "native_v4_0.h5: it ends at z = 5.60, the training lightcones at 5.00" in printed.err and "native_v3_0.h5: it ends" not in printed.err
    assert json.loads((tmp_path / "p-native_v4_0.json").read_text())["parameters"]["m_WDM"]["truth"] is None
    shutil.copytree(root / "small-seed0", tmp_path / "alone")                                   # a run directory without its store
    config = (tmp_path / "alone" / "config.json").read_text().replace("lightcones.h5", "gone.h5")
    (tmp_path / "alone" / "config.json").write_text(config)
    regress(tmp_path / "alone", "--lightcone", files[0])
    with_store, alone = (json.loads(p.read_text()) for p in (tmp_path / "p-native_v3_0.json", tmp_path / "alone" / "posterior-native_v3_0.json"))
    assert alone["parameters"] == with_store["parameters"] and "is not there" in capsys.readouterr().err


def refusal(capsys, function, *arguments):
    """The one line that a refused command leaves; its exit status is 2."""
    with pytest.raises(SystemExit) as stop:
        function(*arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def copy_run(run, to, **settings):
    """A copy of a run directory with other settings in its config.json -> `to`."""
    shutil.copytree(run, to)
    s = json.loads((run / "config.json").read_text())["settings"] | settings
    (to / "config.json").write_text(json.dumps({"settings": s}))
    return to


def test_bad_input(runs, tmp_path, capsys):
    root, store = runs
    run = root / "small-seed0"

    def error(*arguments, command="regress"):
        return refusal(capsys, nano_eval.main, [command, *map(str, arguments)])

    def changed(name, **settings):
        return copy_run(run, tmp_path / name, **settings)

    assert "is a run of train_l3m.py regress: evaluate it with `eval.py regress`" in error(run, command="perplexity")
    assert "is a run of train_l3m.py regress: evaluate it with `eval.py regress`" in error(run, command="compare")
    assert "is a run of train_lm.py: evaluate it with `eval.py perplexity`" in error(changed("lm", experiment=None))
    assert "is a run of train_l3m.py generate" in error(changed("generator", experiment="generate"))
    assert "is no run directory of train_l3m.py" in error(tmp_path)
    (changed("unfinished") / "model.safetensors").unlink()
    assert "has no model yet: finish the run" in error(tmp_path / "unfinished")
    (changed("silent") / "metrics.jsonl").unlink()
    assert "has no validation loss in its metrics.jsonl" in error(tmp_path / "silent")
    assert "nowhere.h5, the lightcones of the run, is not there" in error(changed("moved", data=str(tmp_path / "nowhere.h5")))
    assert "cannot be averaged into 40 equal groups" in error(changed("tokens", tokens=40))
    assert "is not what it was when the run was trained on it" in error(changed("grown", norm=[-30.0, 60.0]))
    assert "was trained on other lightcones" in error(run, tmp_path / "moved")
    assert "are called small" in error(run, changed("small-seed3", lr=1.0))
    assert "--lightcone takes one run" in error(run, root / "small-seed1", "--lightcone", store)
    assert "is a store that this program wrote" in error(run, "--lightcone", store)
    (tmp_path / "text.h5").write_text("no lightcone")
    assert "text.h5: neither HDF5 nor .npz" in error(run, "--lightcone", tmp_path / "text.h5")
    np.savez(tmp_path / "short.npz", image=np.zeros((14, 14, 60), np.float32), z=np.linspace(5, 6, 60), **dict(zip(PARAMETERS, PRIORS.mean(1))))
    assert "short.npz: 60 line-of-sight bins" in error(run, "--lightcone", tmp_path / "short.npz")
    assert "at least 1" in error(run, "--samples", 0)


# ------------------------------------------------------------------------------------------------- next-patch and generate

GENERATE = {"experiment": "generate", "init": "small", "base": None, "blocks": None, "tune": "full", "rank": None, "patch": 7, "T": 235, "sky": 14, "split_seed": 0,
            "epochs": 3, "max_steps": None, "dropout": 0.0, "dtype": "float32"}


@pytest.fixture(scope="module")
def generators(runs):
    """(directory of runs flow-seed0, flow-seed1, other-seed0, their store): tiny generators, random weights large enough that conditions show."""
    root, store = runs
    with pytest.MonkeyPatch.context() as m:
        m.setitem(connectors.GENERATION_REFERENCES, "small", Config("qwen2", 0, 32, 48, 2, 4, 2, 8, 1e-6, 10000.0))
        m.setattr(connectors, "VelocityCNN", partial(VelocityCNN, width=8, inner=16, blocks=1))
        for name, seed, lr in (("flow-seed0", 0, 1.0), ("flow-seed1", 1, 1.0), ("other-seed0", 0, 2.0)):
            settings = GENERATE | {"data": str(store), "usable": SubLightcones(store, "test").usable, "seed": seed, "lr": lr}
            (root / name).mkdir()
            (root / name / "config.json").write_text(json.dumps({"settings": settings}))
            generator = build_generator(settings)
            for connector, larger in ((generator.index_connector, 20), (generator.output_connector, 4)):
                connector.weight.data *= larger
            save_file({k: (1 + lr) * p.detach() for k, p in generator.trained().items()}, root / name / "model.safetensors")
            records = [{"step": s, "epoch": s / 4, "validation_loss": 1 / (1 + s) + seed} for s in (0, 4, 8, 12)]
            records += [{"step": s, "epoch": s / 4, "loss": 1 / s + seed} for s in range(1, 13)]
            (root / name / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in sorted(records, key=lambda r: r["step"])))
        yield root, store


def evaluate(command, *arguments):
    nano_eval.main([command, *map(str, arguments), "--device", "cpu", "--method", "midpoint", "--steps", "2"])


def test_squared_errors_of_a_known_error(runs):
    """Truth plus (1 + slice) * map: by cell map^2 times the mean square of the slice's factor over a lightcone's windows, by slice the square of its factor."""
    class Args:
        seed, batch_size = 0, 3

    class Bar:
        update = staticmethod(lambda n: seen.append(n))

    test, seen, bump = SubLightcones(runs[1], "train"), [], torch.rand(14, 14, generator=torch.Generator().manual_seed(0))
    predict = lambda slices, conditions, noise: slices[:, 2:] + torch.arange(1, slices.shape[1] - 1)[:, None, None] * bump
    windows = test.windows()[5:30]                             # two lightcones, not equally many windows
    rows = sorted({row for row, _, _ in windows})
    by_cell, by_slice = nano_eval.squared_errors(predict, windows, test, Args, "cpu", Bar)
    assert sum(seen) == len(windows) and len({length for _, _, length in windows}) > 1 and len(rows) == 2
    for i, row in enumerate(rows):
        factors = np.concatenate([np.arange(1, length - 1) for r, _, length in windows if r == row])
        assert by_cell[i] == pytest.approx(np.mean(factors ** 2) * bump.numpy() ** 2, rel=1e-3, abs=1e-5)
    assert by_slice == pytest.approx(np.arange(1, 11) ** 2 * float(bump.square().mean()), rel=1e-3)


def test_next_patch(generators, tmp_path, capsys):
    """Errors of a group of two seeds against patches drawn one by one; of the copy against the store itself; printed, written and drawn."""
    root, store = generators
    evaluate("next-patch", root / "flow-seed0", root / "other-seed0", root / "flow-seed1", "--max-windows", 4, "--batch-size", 3, "--out", tmp_path / "n")
    report, test = json.loads((tmp_path / "n.json").read_text()), SubLightcones(store, "test")
    assert [(m["name"], len(m["runs"])) for m in report["methods"]] == [("flow", 2), ("other", 1), ("copy of the previous slice", 0), ("noise", 0)]
    windows = [test.windows()[i] for i in np.random.default_rng(42).permutation(len(test.windows()))[:4]]
    errors = {kind: {row: [] for row, _, _ in windows} for kind in ("flow", "copy", "noise")}
    nets = [load_generator(root / f"flow-seed{seed}") for seed in (0, 1)]
    for row, start, length in windows:
        with h5py.File(store) as f:
            T_b = f["brightness_temp"][row, start:start + length].astype(float)
        slices, conditions = test.read(row, start, length)
        noise = torch.randn(length - 2, 14, 14, generator=torch.Generator().manual_seed(nano_eval.draw_seed(42, row, start)))
        x = (np.sign(T_b) * np.log(1 + abs(T_b)) + 1.51) / 2.74
        errors["copy"][row] += ((x[2:] - x[1:-1]) ** 2).mean((1, 2)).tolist()
        errors["noise"][row] += ((x[2:] - noise.numpy()) ** 2).mean((1, 2)).tolist()
        for net in nets:
            with torch.no_grad():
                cond = net.patch_conditions(slices[None], conditions[None])[0]
            for s in range(length - 2):
                for i, (e, truth) in enumerate(zip(patch(noise[s], 7).flatten(0, 1), patch(slices[s + 2], 7).flatten(0, 1))):
                    drawn, _ = sample(net.velocity, cond[s, i][None], "midpoint", noise=e.view(1, 1, 7, 7), steps=2)
                    errors["flow"][row].append((drawn.flatten() - truth).square().mean().item())
    flow, other, copy, noise = report["methods"]
    for m, kind in ((flow, "flow"), (copy, "copy"), (noise, "noise")):
        assert m["error"]["mean"] == pytest.approx(np.mean([np.mean(e) for e in errors[kind].values()]), rel=1e-3), kind
        assert np.mean(m["by patch"]) == pytest.approx(m["error"]["mean"]) and np.shape(m["by patch"]) == (2, 2) and len(m["by slice"]) == 10
    assert flow["validation loss"]["seeds"] == [1 / 13, 1 / 13 + 1] and copy["validation loss"] is None
    assert other["error minus the first's"]["mean"] == pytest.approx(other["error"]["mean"] - flow["error"]["mean"]) and abs(other["error minus the first's"]["mean"]) > 1e-3
    printed = capsys.readouterr().out
    assert f"{copy['error']['mean']:.3f} [{copy['error']['low']:.3f}, {copy['error']['high']:.3f}]" in printed and "0.5769 +- 0.5000" in printed
    for kind in ("position", "loss"):
        assert all((tmp_path / f"n-{kind}.{suffix}").stat().st_size > 8000 for suffix in ("png", "pdf"))


def test_generate(generators, tmp_path, capsys):
    """Saved slices are those of Generator.generate with the true context, indices and seeds, beyond the window, too; the report is that of the saved slices."""
    root, store = generators
    evaluate("generate", root / "flow-seed0", root / "flow-seed1", root / "other-seed0", "--slices", 11, "--slide", 5, "--samples", 2, "--lightcones", 0,
             "--redshifts", 12, 9, 5.2, 3, "--batch-size", 3, "--figures", 1, "--out", tmp_path / "g")
    test, report = SubLightcones(store, "test"), json.loads((tmp_path / "g.json").read_text())
    with np.load(tmp_path / "g.npz") as f:
        saved = {name: f[name] for name in f.files}
    n = len(saved["row"])
    assert saved["generated flow"].shape == (n, 4, 11, 14, 14) and saved["generated other"].shape == (n, 2, 11, 14, 14) and saved["truth"].dtype == np.float16
    with h5py.File(store) as f:
        for i, (row, t) in enumerate(zip(saved["row"], saved["start"])):
            assert row in test.rows and np.array_equal(saved["truth"][i], f["brightness_temp"][row, t:t + 13]) and t + 13 <= f["signal_end"][row]
            assert saved["redshifts"][i] == pytest.approx(f["redshifts"][row, t:t + 13]) and saved["parameters"][i] == pytest.approx(f["parameters"][row])
        cell = f["cell_mpc"][0]
    assert np.abs(saved["redshifts"][:, 0] - np.repeat([12, 9], [p["lightcones"] for p in report["redshifts"]])).max() < 0.3
    i, net = n - 1, load_generator(root / "flow-seed1")
    slices, conditions = test.read(saved["row"][i], saved["start"][i], 2)
    seed = nano_eval.draw_seed(42, int(saved["row"][i]), int(saved["start"][i]))
    drawn = net.generate(slices[None], conditions[None], 11, bins=235, seeds=[seed], samples=2, slide=5, method="midpoint", steps=2)
    drawn = torch.stack(list(drawn), dim=2)[0].clamp(*normalise(torch.tensor([-6e4, 6e4])).tolist())             # float16 holds no more
    assert normalise(torch.from_numpy(saved["generated flow"][i, 2:]).float()).numpy() == pytest.approx(drawn.numpy(), abs=5e-3) and drawn.std() > 0.1
    panel = report["redshifts"][1]
    here = range(n - panel["lightcones"], n)
    names = [m["name"] for m in panel["methods"]]
    assert panel["z"] == 9 and names == ["truth", "flow", "other", "last given slice"]
    true = np.mean([power_spectrum(saved["truth"][i, 2:].astype(np.float32), cell)[1] for i in here], 0)
    flow = np.mean([power_spectrum(cube.astype(np.float32), cell)[1] for i in here for cube in saved["generated flow"][i]], 0)
    still = np.mean([power_spectrum(saved["truth"][i, 1:2].astype(np.float32), cell)[1] for i in here], 0)
    for m, power in zip(panel["methods"], (true, flow, None, still)):
        if power is not None:
            assert m["power"] == pytest.approx(power, rel=1e-3) and m["ratio"] == pytest.approx(power / true, rel=1e-3)
            assert m["within a factor 2"] == [0.5 <= r <= 2 for r in m["ratio"]]
    assert panel["methods"][2]["mean"] == pytest.approx(saved["generated other"][list(here)].astype(float).mean(), rel=1e-3, abs=1e-3)
    printed = capsys.readouterr()
    assert "z = 3 is left out" in printed.err and "z = 5.2 is left out" in printed.err and f"{sum(panel['methods'][1]['within a factor 2'])}/{len(panel['k'])}" in printed.out
    assert all((tmp_path / f"g-{kind}.{suffix}").stat().st_size > 8000 for kind in ("statistics", "slices-1", "sections-1") for suffix in ("png", "pdf"))


def test_statistics_of_known_slices():
    """Fields of 1.3 and 1.8 times the true amplitude have 1.69 and 3.24 times its power, in every bin of k and every lightcone: one within a factor 2, one not."""
    true = 10 * np.random.default_rng(0).normal(size=(6, 1, 3, 14, 14)) - 5
    methods = [{"name": name, "runs": [], "slices": np.repeat(a * true, samples, 1)} for name, a, samples in (("truth", 1, 1), ("near", 1.3, 2), ("far", 1.8, 1))]
    methods.append({"name": "uneven", "runs": [], "slices": true * np.linspace(0.5, 2, 6)[:, None, None, None, None]})
    panel = nano_eval.compare_slices(10.0, methods, [0, 1, 2, 3, 4, 5], 2.0)
    truth, near, far, uneven = nano_eval.statistics_report(panel, methods)["methods"]
    assert truth["ratio"] == pytest.approx(np.ones(len(panel["k"]))) and truth["std"] == pytest.approx(10, rel=0.1) and truth["mean"] == pytest.approx(-5, abs=1)
    for m, ratio, good in ((near, 1.69, True), (far, 3.24, False)):
        assert all(m[k] == pytest.approx(np.full(len(panel["k"]), ratio), rel=1e-3) for k in ("ratio", "low", "high"))
        assert set(m["within a factor 2"]) == {good} and set(m["share of lightcones within"]) == {float(good)}
    assert all(low < ratio < high for low, ratio, high in zip(uneven["low"], uneven["ratio"], uneven["high"]))
    inside = [0.5 <= a ** 2 <= 2 for a in np.linspace(0.5, 2, 6)]
    assert uneven["share of lightcones within"] == pytest.approx(np.full(len(panel["k"]), np.mean(inside)))
    width = panel["edges"][1] - panel["edges"][0]
    assert (panel["found"][0]["density"].sum(1) * width).min() > 0.99


def test_bad_input_of_generation(generators, tmp_path, capsys):
    root, store = generators
    run = root / "flow-seed0"

    def error(*arguments):
        return refusal(capsys, evaluate, *arguments)

    def changed(name, **settings):
        return copy_run(run, tmp_path / name, **settings)

    assert "is a run of train_l3m.py regress: evaluate it with `eval.py regress`" in error("generate", root / "small-seed0")
    assert "is no run directory of train_l3m.py" in error("next-patch", tmp_path)
    assert "--context must be at least 2" in error("generate", run, "--context", 1)
    assert "--slices must be at least 1" in error("generate", run, "--slices", 0)
    assert "a slide of 11 slices does not fit a window of 12: choose 1 to 10" in error("generate", run, "--slide", 11, "--redshifts", 10)
    assert "from any of these redshifts on: choose other --redshifts" in error("generate", run, "--redshifts", 3, 90)
    assert "nowhere.h5, the lightcones of the run, is not there" in error("next-patch", changed("moved", data=str(tmp_path / "nowhere.h5")))
    assert "was trained on other lightcones" in error("next-patch", run, tmp_path / "moved")
    assert "holds 235 slices of 14 x 14, the runs were trained on 2350 of 140 x 140" in error("generate", changed("paper", T=2350, sky=140))
    assert "when the run was trained on it, it had 40, so its test lightcones are others" in error("next-patch", changed("before", usable=40))
    (changed("silent") / "metrics.jsonl").unlink()
    assert "has no validation loss in its metrics.jsonl" in error("next-patch", tmp_path / "silent")
    weights = changed("damaged") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    assert "is damaged" in error("next-patch", tmp_path / "damaged", "--max-windows", 1)
    assert not list(tmp_path.glob("*/next-patch*")) and not list(tmp_path.glob("*/generate-*")) and not list(root.glob("flow-seed0/generate-*"))
