"""Figures quoted for data_lightcone.py; each is one command (run in the repository root):

    python tests/bench_lightcone.py compare SIGNALS.npz out/compare.png    # fast simulator against 21cmFAST at the same parameters and what differs, in numbers
    python tests/bench_lightcone.py regress data/lightcones                # held-out R^2 of ridge regression, linear and in a Gaussian kernel
    python tests/bench_lightcone.py layout                                 # read speed of the ways to lay out a cube in its file
    python tests/bench_lightcone.py draws                                  # CPU time of a batch of 64 draws, 12 slices of 28 x 28 and of 140 x 140
    python tests/bench_lightcone.py start STORE wide 0                     # 450 steps of the small reference from --start wide or paper, seed 0: does it look back? "biases"
                                                                           # and "both": with biases N(0, 1.5^2) of queries and keys, on paper's and on wide's matrices
    python tests/bench_lightcone.py loader                                 # SubLightcones over a sparse 304 GB store: slices/s and resident memory"""
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data_lightcone as dl


def _simulate(p, seed):
    torch.set_num_threads(1)
    lc = dl.simulate_fast(p, seed)
    return lc.redshifts[::-1], lc.cube.mean((1, 2))[::-1], dl.history_summary(lc)


def compare(signals, figure):
    """SIGNALS.npz: signal (N, 2350) from low z, parameters (N,), xH (N, nodes) over node_z, made with 21cmFAST in 200/140 Mpc bins from z = 5."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    with np.load(signals) as f:
        real, P, x_hi, node_z = f["signal"], np.stack([f[k] for k in dl.PARAMETERS], 1), f["xH"], f["node_z"]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        fast = pool.starmap(_simulate, [(p, i) for i, p in enumerate(P)])
    rows = []
    shown = np.argsort(P[:, 2])[np.linspace(0, len(P) - 1, 12).astype(int)]                           # over the range of L_X
    fig, axes = plt.subplots(3, 4, figsize=(16, 9.5), layout="constrained")
    for i, p in enumerate(P):
        z, mean, (tau, _) = fast[i]
        fine = dl.redshift_at(dl.comoving_distance(5.0, p[1]) + dl.CELL * np.arange(real.shape[1]), p[1])
        smooth = real[i].reshape(-1, 10).mean(1)[:len(z)]                    # over 14 Mpc
        smooth = np.convolve(smooth, [0.5, 1, 0.5], "same") / 2              # and about a 40 Mpc box
        coarse = fine.reshape(-1, 10).mean(1)
        here = np.interp(coarse, z, mean)
        a, b = smooth.argmin(), here.argmin()
        rows.append([tau - dl.optical_depth(node_z, x_hi[i], p[1], 5.0), here[b] - smooth[a], coarse[b] - coarse[a], here.max() - smooth.max(),
                     np.sqrt(np.mean((here - smooth) ** 2)), np.sqrt(np.mean(smooth**2))])
        if i in shown:
            ax = axes.flat[list(shown).index(i)]
            ax.plot(fine, real[i], color="0.7", lw=0.6)
            ax.plot(coarse, smooth, "k", lw=1.3, label="21cmFAST 3.4.0, 40 Mpc box (grey: every bin)")
            ax.plot(z, mean, "C3", lw=1.5, label="fast simulator, 200 Mpc box")
            ax.set_title("$m_{\\rm WDM}$ %.1f keV, $\\Omega_m$ %.2f, lg $L_X$ %.1f,\n$E_0$ %.0f eV, lg $T_{\\rm vir}$ %.2f, $\\zeta$ %.0f" % tuple(p), fontsize=9)
            ax.axhline(0, color="k", lw=0.4)
            ax.set_xlim(5, 28)
    for ax in axes[-1]:
        ax.set_xlabel("redshift $z$")
    for ax in axes[:, 0]:
        ax.set_ylabel(r"sky mean $\bar T_b$ [mK]")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    Path(figure).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(figure, dpi=110)
    rows = np.array(rows)
    for name, r in zip(("optical depth", "trough depth [mK]", "trough redshift", "highest value [mK]"), rows.T):
        print(f"fast - 21cmFAST, {name:20} median {np.median(r):8.3f}, 16 to 84%: {np.quantile(r, 0.16):8.3f} to {np.quantile(r, 0.84):8.3f}")
    print(f"rms difference of the signals {np.sqrt(np.mean(rows[:, 4] ** 2)):.1f} mK, rms of 21cmFAST's {np.sqrt(np.mean(rows[:, 5] ** 2)):.1f} mK, over {len(P)} signals")


def regress(store):
    """Every usable signal is predicted once, from the four fifths that it is not in."""
    parts = [dl.GlobalSignals(store, s, norm=(0, 1)) for s in ("train", "validation", "test")]
    print(parts[0].note)
    x, y = dl.normalise(torch.cat([d.signals for d in parts])).double(), torch.cat([d.parameters for d in parts]).double()
    x, fold = (x - x.mean(0)) / (x.std(0) + 1e-6), torch.arange(len(x)) % 5
    for name, kernel, ridge in (("linear", x @ x.T / 47, 0.02), ("Gaussian kernel", torch.exp(-((x[:, None] - x[None]) ** 2).mean(2) / 2), 0.01)):
        predicted = torch.zeros_like(y)
        for k in range(5):
            out, rest = fold == k, fold != k
            weights = torch.linalg.solve(kernel[rest][:, rest] + ridge * torch.eye(int(rest.sum())), y[rest] - y[rest].mean(0))
            predicted[out] = kernel[out][:, rest] @ weights + y[rest].mean(0)
        r2 = 1 - ((y - predicted) ** 2).sum(0) / ((y - y.mean(0)) ** 2).sum(0)
        print(f"{name:16} held-out R^2: " + ", ".join(f"{k} {v:.2f}" for k, v in zip(dl.PARAMETERS, r2)))


def layout():
    """Runs of 12 slices of 140 x 140 from 8 rows of 480 slices, with the noise of a real field, from the page cache and from disk."""
    T, S = 480, 140
    field = dl.simulate_fast([3, 0.3, 40, 500, 4.7, 30], 0, sky=28, bins=470).cube[100:200]
    a = np.tile(field, (5, 5, 5))[:T] + np.random.default_rng(0).normal(0, 3, (T, S, S))
    options = {"a row a chunk": {"chunks": (1, T, S, S)}, "12 slices": {"chunks": (1, 12, S, S)},
               "12 slices, gzip 1, shuffle": {"chunks": (1, 12, S, S), "compression": "gzip", "compression_opts": 1, "shuffle": True},
               "12 slices, lzf, shuffle": {"chunks": (1, 12, S, S), "compression": "lzf", "shuffle": True},
               "24 slices, lzf, shuffle": {"chunks": (1, 24, S, S), "compression": "lzf", "shuffle": True}}
    with tempfile.TemporaryDirectory() as folder:
        for name, o in options.items():
            path = Path(folder) / (name.replace(" ", "") + ".h5")
            with h5py.File(path, "w") as f:
                d = f.create_dataset("x", (8, T, S, S), "f2", **o)
                for i in range(8):
                    d[i] = a
            speed = {False: 0.0, True: 0.0}
            with h5py.File(path, "r", rdcc_nbytes=0) as f, open(path, "rb") as raw:
                x = f["x"]
                for cold in (False, True) * 5:                               # the best of five: other people's work on the machine only slows it down
                    rng, spent = np.random.default_rng(1), 0.0
                    for _ in range(40):
                        if cold:
                            os.posix_fadvise(raw.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                        row, s, start = rng.integers(8), rng.integers(T - 12), time.perf_counter()
                        x[row, s:s + 12]
                        spent += time.perf_counter() - start
                    speed[cold] = max(speed[cold], 480 / spent)
            print(f"{name:28} {path.stat().st_size / 8e6:6.1f} MB a row, {speed[0]:8.0f} slices/s from the page cache, {speed[1]:7.0f} from disk")


def draws():
    """CPU time: other people's work on the machine matters less. The old store of one file: 0.31 and 1.44 ms beside 0.31 and 1.6 here, on a busy machine."""
    torch.set_num_threads(1)
    for sky in (28, 140):
        with tempfile.TemporaryDirectory() as folder:
            for i, p in enumerate(dl.draw_parameters(24, 0)):
                cube = np.random.default_rng(i).normal(-20, 30, (480, sky, sky)).astype(np.float32)
                lightcone = dl.Lightcone(cube, p, np.linspace(30, 5, 480), None, i, sky, 1.4, 1.4, dl.COSMOLOGY, "", [])
                dl.save_row(Path(folder) / "s", dl.name_of(i, p, (480, sky)), dl.make_row(lightcone, "noise"))
            data, times = dl.SubLightcones(Path(folder) / "s", "train"), []
            keys = [(e, int(i)) for e, i in enumerate(np.random.default_rng(1).integers(len(data), size=64))]
            for _ in range(15):
                start = time.thread_time()
                for key in keys:
                    data[key]
                times.append((time.thread_time() - start) / 64)
            print(f"{sky} x {sky}: {min(times) * 1e3:.2f} ms a draw")


def loader():
    def rss():
        return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6
    torch.set_num_threads(1)
    from test_data_lightcone import make_sparse_store
    with tempfile.TemporaryDirectory() as folder:
        path, n = Path(folder) / "sparse", 3300
        make_sparse_store(path, n)
        start = time.process_time()
        dl.read_store(path, signals=False)
        print(f"index of {n} lightcones: {time.process_time() - start:.1f} s of CPU")
        data = dl.SubLightcones(path, "train")
        data[0, 0]
        before, start, draws = rss(), time.perf_counter(), np.random.default_rng(0).integers(len(data), size=640)
        for i in draws:
            data[0, int(i)]
        print(f"{n * 2350 * 140 * 140 * 2 / 1e9:.0f} GB: one process {12 * len(draws) / (time.perf_counter() - start):.0f} slices/s, resident {before:.0f} -> {rss():.0f} MB")
        batches = [[(0, int(i)) for i in b] for b in draws.reshape(-1, 64)]
        start = time.perf_counter()
        for _ in torch.utils.data.DataLoader(data, batch_sampler=batches, num_workers=2):
            pass
        print(f"two loader workers, batches of 64: {12 * len(draws) / (time.perf_counter() - start):.0f} slices/s")


def start(store, kind, seed="0", steps=450):
    """The small reference without its velocity network regresses the next patch: error, and correlation of the structure with the truth."""
    import connectors
    torch.set_num_threads(1)
    generator = connectors.build_generator({
        "experiment": "generate", "init": "small", "base": None, "blocks": None, "tune": "full", "rank": 2, "patch": 14, "seed": int(seed),
        "dropout": 0.0, "dtype": "float32", "start": "wide" if kind in ("wide", "both") else "paper"}).train()
    torch.manual_seed(int(seed) + 1)
    for name, p in generator.backbone.layers.named_parameters():
        if kind in ("biases", "both") and name.endswith(("q_proj.bias", "k_proj.bias")):
            torch.nn.init.normal_(p, 0.0, 1.5)
    train, held_out = dl.SubLightcones(store, "train"), dl.SubLightcones(store, "validation")
    keys = [(0, int(i)) for i in np.random.default_rng(0).permutation(len(held_out))[:64]]
    held_out = [generator.draw(held_out, keys[i:i + 16])[:2] for i in range(0, len(keys), 16)]

    def predict(slices, conditions):
        """-> predicted and true patches, and those of the slice before, (B, S - 2, R*K, p*p)."""
        predicted = generator.patch_conditions(slices, conditions)[:, :, :, 0].flatten(3)
        patches = connectors.patch(slices[:, 1:], 14).flatten(2, 3)
        return predicted, patches[:, 1:], patches[:, :-1]

    parameters = [p for name, p in generator.trained().items() if not name.startswith("velocity")]
    optimizer = torch.optim.AdamW(parameters, weight_decay=1e-3)
    for step in range(1, int(steps) + 1):
        rows = np.random.default_rng([int(seed), step - 1]).integers(len(train), size=16)
        predicted, true, _ = predict(*generator.draw(train, [(step - 1, int(i)) for i in rows])[:2])
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, step / 50)
        optimizer.zero_grad()
        (predicted - true).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 75 == 0 or step == int(steps):
            with torch.no_grad():
                found = [torch.cat(part).double() for part in zip(*(predict(*batch) for batch in held_out))]
            structure = torch.stack([(x - x.mean(-1, keepdim=True)).flatten() for x in found])
            R = torch.corrcoef(structure)[1]
            print(f"{kind}, seed {seed}, step {step}: error {(found[0] - found[1]).square().mean():.4f}, R {R[0]:.3f}, of a copy {R[2]:.3f}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in ("compare", "regress", "layout", "draws", "loader", "start"):
        sys.exit(__doc__)
    globals()[sys.argv[1]](*sys.argv[2:])
