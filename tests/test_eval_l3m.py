"""eval.py regress: trained references on simulated lightcones, the table against numpy and torch, baselines, a user's own lightcone, bad input.
eval.py next-patch and generate: errors, correlations and statistics against slow, plain versions and where the answer is known."""
import json
import shutil
from types import SimpleNamespace

import connectors
import data_lightcone
import numpy as np
import pytest
import torch
from conftest import SHARED
from connectors import build_generator, build_regressor, gaussian_nll, load_generator, load_regressor, patch, trained_parameters
from data_lightcone import PARAMETERS, PRIORS, GlobalSignals, SubLightcones, normalise, power_spectrum, read_store, split_names, to_unit
from flow import sample
from model import Config
from safetensors.torch import save_file

import eval as nano_eval

SETTINGS = {"experiment": "regress", "init": "small", "base": None, "blocks": None, "prompt": "minimal", "tokens": 47, "epochs": 3, "max_steps": None,
            "dropout": 0.0, "causal": False, "dtype": "float32"}


def write_config(directory, settings):
    """config.json of a run -> the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"settings": settings, "directory": str(directory)}))
    return directory


def write_metrics(directory, records):
    (directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def write_run(directory, settings, train, validation):
    """A run as train_l3m.py leaves it: three epochs of training."""
    write_config(directory, settings)
    model, records = build_regressor(settings), []
    named = trained_parameters(model)
    optimizer, losses = torch.optim.AdamW(named.values(), lr=3e-3), []
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
            save_file({name: p.detach() for name, p in named.items()}, directory / "model.safetensors")
    write_metrics(directory, records)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(directory of runs small-seed0, small-seed1, random-1-seed0, random-2-seed0, their store)."""
    root = tmp_path_factory.mktemp("l3m")
    store = root / "lightcones"
    data_lightcone.simulate(store, 96, sky=14, bins=235, workers=1)
    names, _ = split_names(store, "regression")
    train, validation = (GlobalSignals(store, split, names=names) for split in ("train", "validation"))
    settings = SETTINGS | {"data": str(store), "norm": list(train.norm), "lightcones": names}
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


def settings_of(run):
    return json.loads((run / "config.json").read_text())["settings"]


def test_table_and_figures(runs, tmp_path, capsys):
    """Losses and errors of a group of two seeds against torch.distributions and scipy; printed, written and drawn. Fewer than ten lightcones: no interval."""
    from scipy import stats
    root, store = runs
    regress(*(root / f"{name}-seed0" for name in ("small", "random-1", "random-2")), root / "small-seed1", "--out", tmp_path / "r")
    report = json.loads((tmp_path / "r.json").read_text())
    test = GlobalSignals(store, "test")
    rows = report["rows"]
    assert report["command"] == "regress" and [(m["name"], len(m["runs"])) for m in rows] == [
        ("small", 2), ("random-1", 1), ("random-2", 1), ("ridge regression", 0), ("prior mean", 0)]
    assert rows[0]["n"] == len(test) >= 3
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
    small, other = rows[0]["measures"], rows[1]["measures"]
    assert small["loss"]["mean"] == pytest.approx(loss.mean(), rel=1e-4) and small["error"]["mean"] == pytest.approx(error.mean(), rel=1e-4)
    assert [small[f"error_{p}"]["mean"] for p in PARAMETERS] == pytest.approx(error.mean(0), rel=1e-4)
    assert [small[f"sigma_{p}"]["mean"] for p in PARAMETERS] == pytest.approx(sigma.mean(0), rel=1e-4)
    level = report["settings"]["levels"].index(0.9)
    assert [rows[0]["coverage"][p][level] for p in PARAMETERS] == pytest.approx(np.mean(inside, 0), abs=1e-6)
    best = [min(json.loads(line)["validation_loss"] for line in (root / f"small-seed{seed}" / "metrics.jsonl").read_text().splitlines()) for seed in (0, 1)]
    assert small["validation_loss"]["mean"] == pytest.approx(np.mean(best)) and small["validation_loss"]["std"] == pytest.approx(np.std(best))
    assert other["loss_difference"]["mean"] == pytest.approx(other["loss"]["mean"] - small["loss"]["mean"]) and "loss_difference" not in small
    printed = capsys.readouterr().out
    assert f"{small['error_E_0']['mean']:.3f} " in printed and f"{np.std(best):.4f}" in printed
    assert small["loss"]["low"] is None and "no interval: fewer than ten" in printed
    for kind in ("loss", "parameters", "calibration", "depth"):
        assert all((tmp_path / f"r-{kind}.{suffix}").stat().st_size > 8000 for suffix in ("png", "pdf"))


def test_validation_split_repeats_the_training_script(runs):
    """On the validation split (ten lightcones or more: intervals) the loss is the one that metrics.jsonl holds: same lightcones, same network. One run: no
    figure against depth."""
    from scipy import stats
    root, store = runs
    regress(root / "small-seed0", "--split", "validation")
    rows = json.loads((root / "small-seed0" / "regress-validation.json").read_text())["rows"]
    for row in rows[:2]:                                      # the run, and ridge
        assert row["measures"]["loss"]["mean"] == pytest.approx(row["measures"]["validation_loss"]["mean"], abs=1e-5)
    assert not (root / "small-seed0" / "regress-validation-depth.png").exists()
    validation = GlobalSignals(store, "validation")
    with torch.no_grad():
        loss = gaussian_nll(*load_regressor(root / "small-seed0")(validation.signals), validation.parameters).numpy()
    assert len(loss) >= 10
    interval = stats.bootstrap((loss,), np.mean, n_resamples=9999, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    assert [rows[0]["measures"]["loss"][k] for k in ("low", "high")] == pytest.approx([interval.low, interval.high], rel=0.05)


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


def test_samples_of_the_cut_gaussian():
    """Draws in the unit cube have the moments of the Gaussian cut there, by scipy; 68% of it lie in the 68% interval, where mean +- sigma, clipped, holds less."""
    from scipy import stats
    sigma = torch.tensor([0.4, 0.05, 0.3, 0.1, 0.2, 0.6])
    mean, L = torch.tensor([[0.9, 0.5, 0.1, 0.02, 0.5, 0.5]]), torch.diag(1 / sigma)[None]
    draws = nano_eval.sample_in_prior(mean, L, 40_000, torch.Generator().manual_seed(0)).numpy()
    assert draws.min() >= 0 and draws.max() <= 1 and len(draws) == 40_000
    for j in range(6):
        m, s = float(mean[0, j]), float(sigma[j])
        cut = stats.truncnorm(-m / s, (1 - m) / s, m, s)
        assert draws[:, j].mean() == pytest.approx(cut.mean(), abs=0.005) and draws[:, j].std() == pytest.approx(cut.std(), abs=0.005)
        row = nano_eval.posterior_row("x", draws * np.ptp(PRIORS, axis=1) + PRIORS[:, 0], np.full(6, np.nan))
        found = row["measures"][PARAMETERS[j]]
        low, high = ((found[k] - PRIORS[j, 0]) / np.ptp(PRIORS[j]) for k in ("low", "high"))
        assert [low, high] == pytest.approx(cut.ppf([0.16, 0.84]), abs=0.01) and cut.cdf(high) - cut.cdf(low) == pytest.approx(0.68, abs=0.01)
    assert row["truth"] == dict.fromkeys(PARAMETERS)
    with pytest.raises(ValueError, match="outside the prior"):
        nano_eval.sample_in_prior(mean - 50, L, 10, torch.Generator())


@pytest.mark.parametrize("depth, unknown", [(1, False), (5, True)])
def test_own_lightcone(runs, tmp_path, capsys, monkeypatch, depth, unknown):
    """A lightcone of the store, written as a file with `depth` times finer bins, gives the run's prediction for it, in physical units. Without
    parameters the posterior is the same."""
    root, path = runs
    test, store = GlobalSignals(path, "test"), read_store(path)
    row = store.index[test.names[0]]
    cube, truth, z = store.slices(test.names[0], 0, store.T), store.parameters[row], store.redshifts[row].astype(float)
    cube = np.repeat(np.moveaxis(cube[::-1], 0, 2), depth, axis=2).astype(np.float32)           # (x, y, t from low z)
    T = cube.shape[2]
    distance = data_lightcone.comoving_distance(z[::-1], truth[1])
    z = data_lightcone.redshift_at(distance[0] + (distance[1] - distance[0]) / depth * np.arange(T), truth[1])
    history = {} if unknown else {"node_z": np.array([35.0, 15, 5]), "xH": np.array([1.0, 1, 0.0])}
    np.savez(tmp_path / "mine.npz", image=cube, z=z, **history, **{p: np.nan if unknown and p != "Om" else v for p, v in zip(PARAMETERS, truth)})
    if not unknown:
        monkeypatch.setattr(nano_eval, "draw_corner", lambda *_: None)                          # once is enough
    regress(root / "small-seed0", "--lightcone", tmp_path / "mine.npz", "--out", tmp_path / "p")
    row = json.loads((tmp_path / "p-mine.json").read_text())["rows"][0]
    signal, _, redshifts, notes = nano_eval.read_own(tmp_path / "mine.npz", settings_of(root / "small-seed0"), path)
    assert signal.numpy() == pytest.approx(test.signals[:1].numpy(), abs=2e-3) and not any("ends at" in note for note in notes)
    assert len(redshifts) == 47 and (np.diff(redshifts) < 0).all() and redshifts[-1] == pytest.approx(z[T // 94], abs=0.02)
    with torch.no_grad():
        mean, L = load_regressor(root / "small-seed0")(test.signals[:1])
    width = PRIORS[:, 1] - PRIORS[:, 0]
    covariance = np.linalg.inv((L[0] @ L[0].T).numpy())
    assert to_unit(np.array(row["gaussian"]["mean"])) == pytest.approx(mean[0].numpy(), abs=2e-3)           # the store rounds to float16
    assert np.array(row["gaussian"]["covariance"]) / np.outer(width, width) == pytest.approx(covariance, abs=2e-3)
    found = list(row["measures"].values())
    assert all(PRIORS[j, 0] <= p["low"] < p["median"] < p["high"] <= PRIORS[j, 1] for j, p in enumerate(found))
    assert [row["truth"][p] for p in PARAMETERS] == [None if unknown and p != "Om" else pytest.approx(v) for p, v in zip(PARAMETERS, truth)]
    assert "68% interval" in capsys.readouterr().out
    assert not unknown or all((tmp_path / f"p-mine.{s}").stat().st_size > 20000 for s in ("png", "pdf"))


def test_own_lightcone_that_the_run_was_trained_on(runs, tmp_path, capsys, monkeypatch):
    """What `convert` made a training lightcone of is recognised by its content; a test lightcone is no training one."""
    monkeypatch.setattr(nano_eval, "draw_corner", lambda *_: None)
    rng = np.random.default_rng(0)
    files = []
    for i in range(4):
        values = PRIORS[:, 0] + (0.2 + 0.15 * i) * np.ptp(PRIORS, axis=1)
        cube = rng.normal(-40, 20, (4, 4, 94)).astype(np.float32)
        z = data_lightcone.redshift_at(data_lightcone.comoving_distance(5.0, values[1]) + 30 * np.arange(94), values[1])
        files.append(tmp_path / f"lc{i}.npz")
        np.savez(files[-1], image=cube, z=z, **dict(zip(PARAMETERS, values)))
    store = tmp_path / "converted"
    data_lightcone.convert(files, store, 94)
    names, _ = split_names(store, "regression")
    train, validation = (GlobalSignals(store, split, names=names) for split in ("train", "validation"))
    write_run(tmp_path / "run", SETTINGS | {"data": str(store), "norm": list(train.norm), "lightcones": names, "seed": 0}, train, validation)
    regress(tmp_path / "run", "--lightcone", *files)
    notes = capsys.readouterr().err
    of_file = {file.stem: (tmp_path / "run" / f"posterior-{file.stem}.json") for file in files}
    known = [stem for stem, report in of_file.items() if any("this very lightcone" in n for n in json.loads(report.read_text())["rows"][0]["notes"])]
    assert len(known) == 3 and notes.count("this very lightcone") == 3                          # two to train, one to validate


def test_own_lightcone_of_21cmfast(runs, tmp_path, capsys, monkeypatch):
    """Files as 21cmFAST wrote them; what makes the answer wrong is said. The sky's cells of the store, 14 Mpc, have no say in the depth."""
    files = [SHARED / "data" / "lightcones" / name for name in ("native_v3_0.h5", "native_v4_0.h5")]
    if not files[0].exists():
        pytest.skip("needs ../shared/data/lightcones, made with 21cmFAST")
    root, store = runs
    monkeypatch.setattr(nano_eval, "draw_corner", lambda *_: None)
    regress(root / "small-seed0", "--lightcone", *files, "--out", tmp_path / "p")
    printed = capsys.readouterr()
    assert "native_v4_0.h5: starts at z = 5.60, the store at 5.00: the run was" in printed.err and "native_v3_0.h5: starts" not in printed.err
    assert json.loads((tmp_path / "p-native_v4_0.json").read_text())["rows"][0]["truth"]["m_WDM"] is None
    own = data_lightcone.read_lightcone(files[0], bins=2350)
    signal, _, redshifts, _ = nano_eval.read_own(files[0], settings_of(root / "small-seed0"), store)
    values = own.cube.mean((1, 2), dtype=float).reshape(47, 50).mean(1)                          # the paper's: means of 50 bins of 1.43 Mpc
    mean, deviation = settings_of(root / "small-seed0")["norm"]
    assert signal[0].numpy() * deviation + mean == pytest.approx(values, abs=1.0)
    assert redshifts == pytest.approx(own.redshifts.reshape(47, 50).mean(1), abs=0.1) and redshifts[0] > 25
    for bins, sky in ((470, 56), (235, 28)):                                                    # cells of the line of sight of 7.1 and 14.3 Mpc, of the sky of 3.6 and 7.1
        other = tmp_path / f"store-{bins}-{sky}"
        data_lightcone.simulate(other, 3, sky=sky, bins=bins, workers=1, tau_sigma=1e9, max_x_hi=1.0)
        names, _ = split_names(other, "regression")
        again = nano_eval.read_own(files[0], settings_of(root / "small-seed0") | {"lightcones": names}, other)[0]
        assert again.numpy() == pytest.approx(signal.numpy(), abs=0.02)
    shutil.copytree(root / "small-seed0", tmp_path / "alone")                                   # a run directory without its store
    write_config(tmp_path / "alone", settings_of(tmp_path / "alone") | {"data": str(tmp_path / "gone")})
    regress(tmp_path / "alone", "--lightcone", files[0])
    with_store, alone = (json.loads(p.read_text())["rows"][0] for p in (tmp_path / "p-native_v3_0.json", tmp_path / "alone" / "posterior-native_v3_0.json"))
    for p in PARAMETERS:
        assert alone["measures"][p]["median"] == pytest.approx(with_store["measures"][p]["median"], rel=0.02)
    assert "is not there" in capsys.readouterr().err


def refusal(capsys, function, *arguments):
    """The one line that a refused command leaves; its exit status is 2."""
    with pytest.raises(SystemExit) as stop:
        function(*arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def copy_run(run, to, **settings):
    """A copy of a run directory with other settings in its config.json -> `to`."""
    shutil.copytree(run, to)
    return write_config(to, settings_of(run) | settings)


def test_other_lightcones(runs, tmp_path, capsys):
    """A store that has grown does not matter; other lightcones are judged on with --data, refused with the count where the run was trained on them."""
    root, store = runs
    grown = tmp_path / "grown"
    shutil.copytree(store, grown)
    data_lightcone.simulate(grown, 6, seed=5, sky=14, bins=235, workers=1, tau_sigma=1e9, max_x_hi=1.0)
    assert len(read_store(grown).names) > len(read_store(store).names)
    run = copy_run(root / "small-seed0", tmp_path / "run", data=str(grown))
    regress(run)
    regress(root / "small-seed0", "--out", tmp_path / "before")
    after, before = (json.loads(p.read_text())["rows"] for p in (run / "regress-test.json", tmp_path / "before.json"))
    assert after[0]["measures"] == before[0]["measures"] and after[0]["n"] == before[0]["n"]
    held_out = split_names(grown, "regression")[0]["test"]
    seen = len(set(held_out) & set(settings_of(run)["lightcones"]["train"]))
    sentence = refusal(capsys, nano_eval.main, ["regress", str(run), "--data", str(grown)])
    assert seen and f"{seen} of the {len(held_out)} test lightcones of {grown} are among those that {run} was trained on" in sentence
    other = tmp_path / "other"
    data_lightcone.simulate(other, 5, seed=7, sky=14, bins=235, workers=1, tau_sigma=1e9, max_x_hi=1.0)
    regress(run, "--data", other)
    assert json.loads((run / "regress-test-other.json").read_text())["rows"][0]["n"] == 1
    for name in settings_of(run)["lightcones"]["test"][:2]:
        (grown / f"{name}.h5").unlink()
    assert "2 of the lightcones" in refusal(capsys, nano_eval.main, ["regress", str(run)])


def test_bad_input(runs, tmp_path, capsys):
    root, store = runs
    run = root / "small-seed0"

    def error(*arguments, command="regress"):
        return refusal(capsys, nano_eval.main, [command, *map(str, arguments)])

    def changed(name, **settings):
        return copy_run(run, tmp_path / name, **settings)

    assert "eval.py regress" in error(run, command="perplexity") and "eval.py regress" in error(run, command="compare")
    assert "eval.py perplexity" in error(changed("lm", experiment="lm"))
    assert "eval.py generate" in error(changed("generator", experiment="generate"))
    assert "is no run" in error(tmp_path)
    (changed("unfinished") / "model.safetensors").unlink()
    assert "has no model.safetensors yet" in error(tmp_path / "unfinished")
    (changed("silent") / "metrics.jsonl").unlink()
    assert "has no validation loss in its metrics.jsonl" in error(tmp_path / "silent")
    assert "nowhere, the lightcones of the run, is not there" in error(changed("moved", data=str(tmp_path / "nowhere")))
    assert "cannot be averaged into 40 equal groups" in error(changed("tokens", tokens=40))
    assert "was trained on other lightcones" in error(run, changed("shifted", norm=[-30.0, 60.0]))
    assert "are called small" in error(run, changed("small-seed3", lr=1.0))
    assert "--lightcone takes one run" in error(run, root / "small-seed1", "--lightcone", store)
    (tmp_path / "text.h5").write_text("no lightcone")
    assert "text.h5: neither HDF5 nor .npz" in error(run, "--lightcone", tmp_path / "text.h5")
    z = data_lightcone.redshift_at(data_lightcone.comoving_distance(5.0, 0.3) + 5 * np.arange(60), 0.3)
    np.savez(tmp_path / "short.npz", image=np.full((14, 14, 60), 5, np.float32), z=z, **dict(zip(PARAMETERS, PRIORS.mean(1))))
    assert "short.npz: 60 line-of-sight bins" in error(run, "--lightcone", tmp_path / "short.npz")
    assert "'0'" in error(run, "--samples", 0) and "'nan'" in error(run, "--seed", "nan")
    for value, name in ((np.nan, "nan"), (np.inf, "inf")):    # a network that has diverged
        broken = changed(name)
        tensors = {k: p.detach().clone() for k, p in trained_parameters(load_regressor(broken)).items()}
        tensors["output_connector.weight"][3, 5] = value
        save_file(tensors, broken / "model.safetensors")
        assert "output_connector.weight holds NaN or infinity" in error(broken)
    huge = changed("huge")
    save_file({k: torch.full_like(p, 3e38) for k, p in tensors.items()}, huge / "model.safetensors")
    assert f"{huge}: its network predicts NaN or infinity" in error(huge)


# ------------------------------------------------------------------------------------------------- next-patch and generate

GENERATE = {"experiment": "generate", "init": "small", "base": None, "blocks": None, "tune": "full", "rank": None, "patch": 7, "T": 235, "sky": 14,
            "epochs": 3, "max_steps": None, "dropout": 0.0, "dtype": "float32", "velocity": [8, 16]}


@pytest.fixture(scope="module")
def generators(runs):
    """(directory of runs flow-seed0, flow-seed1, other-seed0, their store): tiny generators, random weights large enough that conditions show."""
    root, store = runs
    names, _ = split_names(store, "generation")
    with pytest.MonkeyPatch.context() as m:
        m.setitem(connectors.GENERATION_REFERENCES, "small", Config("qwen2", 0, 32, 48, 2, 4, 2, 8, 1e-6, 10000.0))
        for name, seed, lr in (("flow-seed0", 0, 1.0), ("flow-seed1", 1, 1.0), ("other-seed0", 0, 2.0)):
            settings = GENERATE | {"data": str(store), "lightcones": names, "seed": seed, "lr": lr}
            write_config(root / name, settings)
            generator = build_generator(settings)
            for connector, larger in ((generator.index_connector, 20), (generator.output_connector, 4)):
                connector.weight.data *= larger
            save_file({k: (1 + lr) * p.detach() for k, p in trained_parameters(generator).items()}, root / name / "model.safetensors")
            records = [{"step": s, "epoch": s / 4, "validation_loss": 1 / (1 + s) + seed} for s in (0, 4, 8, 12)]
            records += [{"step": s, "epoch": s / 4, "loss": 1 / s + seed} for s in range(1, 13)]
            write_metrics(root / name, sorted(records, key=lambda r: r["step"]))
        yield root, store


def evaluate(command, *arguments):
    nano_eval.main([command, *map(str, arguments), "--device", "cpu", "--method", "midpoint", "--steps", "2"])


def follow(predict, windows, test, p):
    """eval.py's `follow` -> what it finds; that the bar counts every window."""
    seen = []
    args = SimpleNamespace(seed=0, batch_size=3)
    found = nano_eval.follow(predict, windows, test, p, args, "cpu", SimpleNamespace(update=seen.append))
    assert sum(seen) == len(windows)
    return found


def test_errors_of_a_known_error(runs):
    """Truth plus (1 + slice) * map: by cell map^2 times the mean square of the slice's factor over a lightcone's windows, by slice the square of its factor;
    the part in the patches' means and that in their structure are those of the map."""
    test, bump = SubLightcones(runs[1], "train"), torch.rand(14, 14, generator=torch.Generator().manual_seed(0))

    def predict(slices, conditions, noise):
        return slices[:, 2:] + torch.arange(1, slices.shape[1] - 1)[:, None, None] * bump, torch.zeros_like(noise)

    windows = [w for w in test.windows() if w[0] in test.names[:2]][5:30]                       # two lightcones, not equally many windows
    names = sorted({name for name, _, _ in windows})
    found = follow(predict, windows, test, 7)
    assert len({length for _, _, length in windows}) > 1 and len(names) == 2
    factors = [np.mean(np.concatenate([np.arange(1, length - 1) for n, _, length in windows if n == name]) ** 2.0) for name in names]
    assert found["map"] == pytest.approx(np.mean(factors) * bump.numpy() ** 2, rel=1e-3, abs=1e-5)
    assert found["by_slice"] == pytest.approx(np.arange(1, 11) ** 2 * float(bump.square().mean()), rel=1e-3)
    means = bump.numpy().reshape(2, 7, 2, 7).mean((1, 3))
    assert found["error_mean"] == pytest.approx(np.array(factors) * (means ** 2).mean(), rel=1e-3)
    assert found["error_structure"] == pytest.approx(np.array(factors) * ((bump.numpy() ** 2).mean() - (means ** 2).mean()), rel=1e-3)
    assert found["error"] == pytest.approx(found["error_mean"] + found["error_structure"])
    assert found["map"].mean() == pytest.approx(found["error"].mean())


class MadeUp:
    """Lightcones whose structure follows a known process: s(t) = rho s(t - 1) + sqrt(1 - rho^2) white noise inside patches, of patch mean 0.3 t."""
    sky, rho = 28, 0.8

    def __init__(self, lightcones=2, slices=48):
        rng = np.random.default_rng(0)
        self.slices = {}
        for i in range(lightcones):
            s = [rng.normal(size=(28, 28))]
            for _ in range(slices - 1):
                s.append(self.rho * s[-1] + np.sqrt(1 - self.rho ** 2) * rng.normal(size=(28, 28)))
            self.slices[f"lc{i}"] = torch.tensor(np.array(s) + 0.3 * np.arange(slices)[:, None, None]).float()

    def windows(self):
        return [(name, start, 12) for name in self.slices for start in range(0, 48, 12)]

    def read(self, name, start, length):
        return self.slices[name][start:start + length], torch.zeros(7)


def test_correlations_of_known_slices():
    """The truth correlates with the slice before by rho. A perfect sampler of p(x | before) draws with Rdraw = Rm^2 = rho^2 and error twice the variance that
    the past leaves; what knows means only, and noise, with 0."""
    test, rho = MadeUp(), MadeUp.rho

    def perfect(slices, conditions, noise):
        level = slices.mean((2, 3), keepdim=True)             # nearly the process's
        mean = rho * (slices - level)[:, 1:-1] + level[:, 2:]
        return mean + np.sqrt(1 - rho ** 2) * noise, mean

    found = {name: {k: np.mean(v) for k, v in follow(predict, test.windows(), test, 14).items()}
             for name, predict in ({"perfect": perfect} | nano_eval.simple_predictions(14)).items()}
    copy, independent, noise = (found[name] for name in ("copy of the previous slice", "previous mean, independent structure", "noise"))
    assert copy["structure_vs_truth"] == pytest.approx(rho, abs=0.01) and copy["structure_vs_previous"] == pytest.approx(1)
    assert copy["error_structure"] == pytest.approx(2 * (1 - rho), abs=0.02) and copy["error_mean"] == pytest.approx(0.09, abs=0.01)
    assert np.isnan(copy["conditional_mean_vs_truth"])
    assert found["perfect"]["structure_vs_truth"] == pytest.approx(rho ** 2, abs=0.01)
    assert found["perfect"]["conditional_mean_vs_truth"] == pytest.approx(rho, abs=0.01)
    assert found["perfect"]["structure_vs_previous"] == pytest.approx(rho, abs=0.01)
    assert found["perfect"]["error_structure"] == pytest.approx(2 * (1 - rho ** 2), abs=0.02)
    for row in (independent, noise):
        assert abs(row["structure_vs_truth"]) < 0.02 and abs(row["structure_vs_previous"]) < 0.02
        assert row["error_structure"] == pytest.approx(2, abs=0.04)
    assert independent["error_mean"] == pytest.approx(copy["error_mean"])


def test_evolution_of_known_slices():
    """lag1 = rho, lag5 = rho^5, variance 1 and no jump at edges of a process without any; patches with means of their own jump by what is put in."""
    test, rho = MadeUp(1, 400), MadeUp.rho
    x = test.slices["lc0"].double() - 0.3 * torch.arange(400)[:, None, None]
    found = nano_eval.evolution(x[:2], x[None, 2:], x[2:], 14)
    assert found["lag1"] == pytest.approx(rho, abs=0.01) and found["lag5"] == pytest.approx(rho ** 5, abs=0.01)
    assert found["structure_variance"] == pytest.approx(1, abs=0.02) and found["edge_jump"] == pytest.approx(1, abs=0.02)
    assert found["structure_vs_truth"] == pytest.approx(1) and found["followed"] == pytest.approx(np.ones(398))
    steps = torch.zeros(28, 28)
    steps[:14, :14] = steps[14:, 14:] = 2.0                   # +-2 across every edge, where the rms step is sqrt(2)
    blocks = nano_eval.evolution(x[:2], (x + steps)[None, 2:].repeat(3, 1, 1, 1), x[2:], 14)
    assert blocks["edge_jump"] == pytest.approx(np.sqrt((2 + 4) / 2), abs=0.05) and blocks["lag1"] == pytest.approx(found["lag1"])
    half = nano_eval.evolution(x[:2], 2 * (x[None, 2:] + torch.randn(2, 398, 28, 28, dtype=torch.float64)), x[2:], 14)
    assert half["structure_vs_truth"] == pytest.approx(np.sqrt(0.5), abs=0.01) and half["structure_variance"] == pytest.approx(8, abs=0.1)
    assert half["lag1"] == pytest.approx(rho / 2, abs=0.01)
    short = nano_eval.evolution(x[:2], x[None, 2:4], x[2:4], 28)
    assert np.isnan(short["lag5"]) and np.isnan(short["edge_jump"]) and short["lag1"] == pytest.approx(rho, abs=0.05)
    assert np.isnan(nano_eval.evolution(x[:2] * 0, x[None, 2:4] * 0, x[2:4] * 0, 14)["structure_vs_truth"])


def test_next_patch(generators, tmp_path, capsys):
    """Errors of a group of two seeds against patches drawn one by one; of the copy against the store itself; printed, written and drawn."""
    root, path = generators
    evaluate("next-patch", root / "flow-seed0", root / "other-seed0", root / "flow-seed1", "--max-windows", 4, "--batch-size", 3, "--out", tmp_path / "n")
    report, test = json.loads((tmp_path / "n.json").read_text()), SubLightcones(path, "test")
    assert [(m["name"], len(m["runs"])) for m in report["rows"]] == [
        ("flow", 2), ("other", 1), ("copy of the previous slice", 0), ("previous mean, independent structure", 0), ("noise", 0)]
    windows = [test.windows()[i] for i in np.random.default_rng(42).permutation(len(test.windows()))[:4]]
    errors = {kind: {name: [] for name, _, _ in windows} for kind in ("flow", "copy", "noise")}
    expected = {name: [] for name, _, _ in windows}           # structures of the conditional mean and of the truth, seed 0
    nets = [load_generator(root / f"flow-seed{seed}") for seed in (0, 1)]
    for name, start, length in windows:
        T_b = test.store.slices(name, start, start + length).astype(float)
        slices, conditions = test.read(name, start, length)
        noise = torch.randn(length - 2, 14, 14, generator=torch.Generator().manual_seed(nano_eval.draw_seed(42, name, start)))
        x = (np.sign(T_b) * np.log(1 + abs(T_b)) + 1.51) / 2.74
        errors["copy"][name] += ((x[2:] - x[1:-1]) ** 2).mean((1, 2)).tolist()
        errors["noise"][name] += ((x[2:] - noise.numpy()) ** 2).mean((1, 2)).tolist()
        for net in nets:
            with torch.no_grad():
                cond = net.patch_conditions(slices[None], conditions[None])[0]
            for s in range(length - 2):
                for i, (e, truth) in enumerate(zip(patch(noise[s], 7).flatten(0, 1), patch(slices[s + 2], 7).flatten(0, 1))):
                    e = e.view(1, 1, 7, 7)
                    drawn, _ = sample(net.velocity, cond[s, i][None], "midpoint", noise=e, steps=2)
                    errors["flow"][name].append((drawn.flatten() - truth).square().mean().item())
                    with torch.no_grad():
                        mean = (e + net.velocity(e, torch.zeros(1), net.velocity.condition(cond[s, i][None]))).flatten()
                    if net is nets[0]:
                        expected[name].append((mean - mean.mean(), truth - truth.mean()))
    flow, other, copy, independent, noise = report["rows"]
    for m, kind in ((flow, "flow"), (copy, "copy"), (noise, "noise")):
        assert m["measures"]["error"]["mean"] == pytest.approx(np.mean([np.mean(e) for e in errors[kind].values()]), rel=1e-3), kind
        assert np.mean(m["by_patch"]) == pytest.approx(m["measures"]["error"]["mean"]) and np.shape(m["by_patch"]) == (2, 2) and len(m["by_slice"]) == 10
        for part in ("mean", "structure"):
            assert m["measures"][f"error_{part}"]["mean"] > 0
    evaluate("next-patch", root / "flow-seed0", "--max-windows", 4, "--out", tmp_path / "one")
    one = json.loads((tmp_path / "one.json").read_text())["rows"][0]["measures"]
    pairs = [(torch.cat([m for m, _ in v]), torch.cat([x for _, x in v])) for v in expected.values()]
    pairs = [(m, x) for m, x in pairs if x.abs().max() > 1e-5]        # a lightcone whose signal is gone has no structure
    assert one["conditional_mean_vs_truth"]["n"] == len(pairs) < len(expected)
    assert one["conditional_mean_vs_truth"]["mean"] == pytest.approx(np.mean([float(m @ x / (m.norm() * x.norm())) for m, x in pairs]), abs=1e-4)
    assert flow["measures"]["validation_loss"]["mean"] == pytest.approx(1 / 13 + 0.5) and "validation_loss" not in copy["measures"]
    difference = other["measures"]["error_difference"]["mean"]
    assert difference == pytest.approx(other["measures"]["error"]["mean"] - flow["measures"]["error"]["mean"]) and abs(difference) > 1e-3
    printed = capsys.readouterr().out
    assert f"{copy['measures']['error']['mean']:.3f}" in printed and "0.577" in printed and "0.5000" in printed and "conditional_mean_vs_truth" in printed
    for kind in ("position", "loss"):
        assert all((tmp_path / f"n-{kind}.{suffix}").stat().st_size > 8000 for suffix in ("png", "pdf"))


def test_generate(generators, tmp_path, capsys):
    """Saved slices are those of Generator.generate with the true context, indices and seeds, beyond the window, too; the report is that of the saved slices."""
    root, path = generators
    evaluate("generate", root / "flow-seed0", root / "flow-seed1", root / "other-seed0", "--slices", 11, "--slide", 5, "--samples", 2, "--lightcones", 0,
             "--redshifts", 12, 9, 5.2, 3, "--batch-size", 3, "--figures", 1, "--out", tmp_path / "g")
    test, report, store = SubLightcones(path, "test"), json.loads((tmp_path / "g.json").read_text()), read_store(path)
    with np.load(tmp_path / "g.npz") as f:
        saved = {name: f[name] for name in f.files}
    n = len(saved["name"])
    assert saved["generated flow"].shape == (n, 4, 11, 14, 14) and saved["generated other"].shape == (n, 2, 11, 14, 14) and saved["truth"].dtype == np.float16
    for i, (name, t) in enumerate(zip(saved["name"], saved["start"])):
        row = store.index[name]
        assert name in test.names and t + 13 <= store.signal_end[row]
        assert saved["truth"][i].astype(float) == pytest.approx(store.slices(name, t, t + 13).astype(float), rel=2e-3, abs=2e-3)
        assert saved["redshifts"][i] == pytest.approx(store.redshifts[row, t:t + 13]) and saved["parameters"][i] == pytest.approx(store.parameters[row])
    rows = {(r["z"], r["name"]): r for r in report["rows"]}
    assert np.abs(saved["redshifts"][:, 0] - np.repeat([12, 9], [rows[z, "truth"]["n"] for z in (12, 9)])).max() < 0.3
    i, net = n - 1, load_generator(root / "flow-seed1")
    place = str(saved["name"][i]), int(saved["start"][i])
    slices, conditions = test.read(*place, 2)
    drawn = net.generate(slices[None], conditions[None], 11, bins=235, seeds=[nano_eval.draw_seed(42, *place)], samples=2, slide=5, method="midpoint", steps=2)
    drawn = torch.stack(list(drawn), dim=2)[0].clamp(*normalise(torch.tensor([-6e4, 6e4])).tolist())             # float16 holds no more
    assert normalise(torch.from_numpy(saved["generated flow"][i, 2:]).float()).numpy() == pytest.approx(drawn.numpy(), abs=5e-3) and drawn.std() > 0.1
    here = range(n - rows[9, "truth"]["n"], n)
    assert [r["name"] for r in report["rows"] if r["z"] == 9] == ["truth", "flow", "other", "last given slice"]
    cell = store.cell_sky
    power = {"truth": np.mean([power_spectrum(saved["truth"][i, 2:].astype(np.float32), cell)[1] for i in here], 0),
             "flow": np.mean([power_spectrum(cube.astype(np.float32), cell)[1] for i in here for cube in saved["generated flow"][i]], 0),
             "last given slice": np.mean([power_spectrum(saved["truth"][i, 1:2].astype(np.float32), cell)[1] for i in here], 0)}
    for name, found in power.items():
        row, ratio = rows[9, name], found / power["truth"]
        assert row["power"] == pytest.approx(found, rel=1e-3)
        assert [row["measures"][f"power {k:.2g}"]["mean"] for k in row["k"]] == pytest.approx(ratio, rel=1e-3)
        assert row["within"] == sum(0.5 <= r <= 2 for r in ratio)
        assert {"lag1", "lag5", "edge_jump", "structure_variance"} < set(row["measures"])
    assert rows[9, "truth"]["measures"]["structure_vs_truth"]["mean"] == pytest.approx(1) and rows[9, "last given slice"]["measures"]["lag1"]["mean"] == pytest.approx(1)
    assert rows[9, "other"]["measures"]["mean"]["mean"] == pytest.approx(saved["generated other"][list(here)].astype(float).mean(), rel=1e-3, abs=1e-3)
    printed = capsys.readouterr()
    assert "z = 3 is left out" in printed.err and "z = 5.2 is left out" in printed.err and "structure_variance" in printed.out
    assert all((tmp_path / f"g-{kind}.{suffix}").stat().st_size > 8000 for kind in ("statistics", "slices-1-z12", "slices-1-z9") for suffix in ("png", "pdf"))


def test_statistics_of_known_slices():
    """Fields of 1.3 and 1.8 times the true amplitude have 1.69 and 3.24 times its power, in every bin of k and every lightcone: one within a factor 2, one not."""
    true = 10 * np.random.default_rng(0).normal(size=(6, 1, 3, 14, 14)) - 5
    truth = np.concatenate((true[:, 0, :2], true[:, 0]), 1)                                     # two given slices before
    methods = [nano_eval.baseline(name, 0, {"draws": np.repeat(a * true, samples, 1)}) for name, a, samples in (("truth", 1, 1), ("near", 1.3, 2), ("far", 1.8, 1))]
    methods.append(nano_eval.baseline("uneven", 0, {"draws": true * np.linspace(0.5, 2, 6)[:, None, None, None, None]}))
    panel = nano_eval.compare_slices(10.0, methods, truth, [0, 1, 2, 3, 4, 5], 2.0, 7)
    rows = {r["name"]: r for r in panel["rows"]}
    assert rows["truth"]["measures"]["std"]["mean"] == pytest.approx(10, rel=0.1) and rows["truth"]["measures"]["mean"]["mean"] == pytest.approx(-5, abs=1)
    for name, ratio, within in (("truth", 1, True), ("near", 1.69, True), ("far", 3.24, False)):
        assert [rows[name]["measures"][f"power {k:.2g}"]["mean"] for k in panel["k"]] == pytest.approx(np.full(len(panel["k"]), ratio), rel=1e-3)
        assert rows[name]["within"] == within * len(panel["k"])
    width = panel["edges"][1] - panel["edges"][0]
    assert (panel["found"][0]["density"].sum(1) * width).min() > 0.99


def test_redshifts_that_differ_in_print():
    assert nano_eval.tell_apart([8.123, 8.119, 8.05]) == ["8.123", "8.119", "8.050"]
    assert nano_eval.tell_apart([10.02, 9.4]) == ["10.0", "9.4"] and nano_eval.tell_apart([7.0, 7.0]) == ["7.0000", "7.0000"]


def test_bad_input_of_generation(generators, tmp_path, capsys):
    root, store = generators
    run = root / "flow-seed0"

    def error(*arguments):
        return refusal(capsys, evaluate, *arguments)

    def changed(name, **settings):
        return copy_run(run, tmp_path / name, **settings)

    assert "eval.py regress" in error("generate", root / "small-seed0")
    assert "is no run" in error("next-patch", tmp_path)
    assert "'1' is not a whole number of at least 2" in error("generate", run, "--context", 1)
    assert "'0'" in error("generate", run, "--slices", 0) and "'11'" in error("generate", run, "--slide", 11, "--redshifts", 10)
    assert "'inf'" in error("generate", run, "--redshifts", "inf")
    assert "from any of these redshifts on: choose other --redshifts" in error("generate", run, "--redshifts", 3, 90)
    assert "nowhere, the lightcones of the run, is not there" in error("next-patch", changed("moved", data=str(tmp_path / "nowhere")))
    names = {k: v[::-1] for k, v in settings_of(run)["lightcones"].items()}
    assert "was trained on other lightcones" in error("next-patch", run, changed("elsewhere", lightcones=names))
    assert "holds 235 slices of 14 x 14, the runs were trained on 2350 of 140 x 140" in error("generate", changed("paper", T=2350, sky=140))
    (changed("silent") / "metrics.jsonl").unlink()
    assert "has no validation loss in its metrics.jsonl" in error("next-patch", tmp_path / "silent")
    weights = changed("damaged") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    assert "model.safetensors" in error("next-patch", tmp_path / "damaged", "--max-windows", 1)
    assert not list(tmp_path.glob("*/next-patch*")) and not list(tmp_path.glob("*/generate-*")) and not list(root.glob("flow-seed0/generate-*"))
