"""eval.py regress: trained references on simulated lightcones, the table against numpy and torch, baselines, a user's own lightcone, bad input."""
import json
import shutil

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import data_lightcone
import eval as nano_eval
from conftest import SHARED
from connectors import build_regressor, gaussian_nll, load_regressor
from data_lightcone import PARAMETERS, PRIORS, GlobalSignals, to_unit

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


def test_bad_input(runs, tmp_path, capsys):
    root, store = runs
    run = root / "small-seed0"

    def error(*arguments, command="regress"):
        with pytest.raises(SystemExit) as stop:
            nano_eval.main([command, *map(str, arguments)])
        assert stop.value.code == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    def changed(name, **settings):
        shutil.copytree(run, tmp_path / name)
        s = json.loads((run / "config.json").read_text())["settings"] | settings
        (tmp_path / name / "config.json").write_text(json.dumps({"settings": s}))
        return tmp_path / name

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
