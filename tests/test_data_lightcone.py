"""data_lightcone.py: readers, filter, the store under kill -9 and full disks, simulators, data sets."""
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data_lightcone as dl

SCRIPT = Path(dl.__file__)
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "lightcones"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data/lightcones")
GOOD = dict(m_WDM=3.0, Om=0.3, log10_L_X=40.0, E_0=500.0, log10_T_vir=4.7, zeta=30.0)
NODES = np.array([35.0, 20, 10, 9, 8, 7, 6, 5])
REIONISED_AT_8 = np.array([1.0, 1, 1, 0.9, 0.4, 0, 0, 0])                  # tau = 0.059


def cube(bins=60, sky=8, seed=0):
    """(x, y, t from low z): the first five bins are ionised, and every bin can be told from every other."""
    a = np.random.default_rng(seed).normal(-20, 5, (sky, sky, bins)) - np.arange(bins)
    a[:, :, :5] = 0
    return a.astype(np.float32)


def write_v3(path, image=None, p_cutoff=True, m_min=False, history=REIONISED_AT_8, drop=(), seed=7, **changes):
    p, image = {**GOOD, **changes}, cube() if image is None else image
    attributes = dict(astro_params=dict(HII_EFF_FACTOR=p["zeta"], ION_Tvir_MIN=p["log10_T_vir"], L_X=p["log10_L_X"], NU_X_THRESH=p["E_0"]),
                      cosmo_params=dict(OMm=p["Om"]), _globals=dict(M_WDM=p["m_WDM"], P_CUTOFF=p_cutoff), flag_options=dict(M_MIN_in_Mass=m_min),
                      user_params=dict(BOX_LEN=20.0, HII_DIM=image.shape[0]))
    with h5py.File(path, "w") as f:
        f.attrs["random_seed"] = seed
        for group, values in attributes.items():
            f.create_group(group).attrs.update({k: v for k, v in values.items() if k not in drop})
        f["lightcones/brightness_temp"] = image
        f["distances"] = dl.comoving_distance(5.0, p["Om"]) + 2.5 * np.arange(image.shape[2])
        f["node_redshifts"] = NODES
        if history is not None:
            f["global_quantities/xH_box"] = history
    return path


def write_v4(path, image=None, m_min=False, source="CONST-ION-EFF"):
    image = cube() if image is None else image
    with h5py.File(path, "w") as f:
        top = f.create_group("InputParameters")
        top.attrs["random_seed"] = 5
        for group, values in dict(astro_params=dict(HII_EFF_FACTOR=30.0, ION_Tvir_MIN=4.7, L_X=40.0, NU_X_THRESH=500.0), cosmo_params=dict(OMm=0.3),
                                  astro_options=dict(M_MIN_in_Mass=m_min), matter_options=dict(SOURCE_MODEL=source),
                                  simulation_options=dict(BOX_LEN=20.0, HII_DIM=image.shape[0])).items():
            top.create_group(group).attrs.update(values)
        top["node_redshifts"] = NODES
        f["global_quantities/neutral_fraction"] = REIONISED_AT_8
        f["lightcones/brightness_temp"] = image
        f["lightcone_distances"] = dl.comoving_distance(5.0, 0.3) + 2.5 * np.arange(image.shape[2])
    return path


def write_npz(path, image=None, drop=(), **changes):
    image = cube() if image is None else image
    values = dict(image=image.astype(np.float16), z=np.linspace(5, 12, image.shape[2]), **GOOD, seed=3, node_z=NODES, xH=REIONISED_AT_8)
    np.savez_compressed(path, **{k: v for k, v in {**values, **changes}.items() if k not in drop})
    return path


def write_release(path, label, name="label"):
    np.savez(path, image=cube().astype(np.float16), **{name: np.array(label)})
    return path


def make_store(path, n=40, T=100, sky=8, seed=0):
    """Rows whose voxels are row + slice / 1000 (float16), the last ten slices all zero; parameters over the priors."""
    writer = dl.StoreWriter(path, T, sky)
    for i, p in enumerate(dl.draw_parameters(n, seed)):
        writer.rows.append(small_row(i, p, T, sky))
    writer.flush()
    return path


def small_row(i, p, T=100, sky=8):
    image = np.broadcast_to((i + 1 + np.arange(T) / 1000)[:, None, None], (T, sky, sky)).astype(np.float32).copy()
    image[:, 1, 0] += 5                                                    # something that a rotation or shift moves
    image[-10:] = 0
    lightcone = dl.Lightcone(image, p, np.linspace(30, 5, T), np.stack([NODES, REIONISED_AT_8]), i, 1.0, sky, [])
    return dl.make_row(lightcone, f"row {i}")


# ------------------------------------------------------------------------------------------------------------------------------------------ reading

@pytest.mark.parametrize("write", [write_v3, write_v4, write_npz])
def test_readers_agree(tmp_path, write):
    lc = dl.read_lightcone(write(tmp_path / "file.npz"), bins=50)         # the name says nothing: told by content
    assert lc.cube.shape == (50, 8, 8) and lc.cube.dtype == np.float32 and lc.sky == 8
    np.testing.assert_allclose(lc.cube, np.moveaxis(cube()[:, :, :50], 2, 0)[::-1], rtol=1e-3)          # forward in time, x and y in place
    assert (lc.cube[-5:] == 0).all() and (np.diff(lc.redshifts) < 0).all() and lc.redshifts[-1] == pytest.approx(5, abs=1e-3)
    known = dict(zip(dl.PARAMETERS, lc.parameters))
    assert np.isnan(known.pop("m_WDM")) == (write is write_v4)
    assert known == {k: GOOD[k] for k in known}
    np.testing.assert_array_equal(lc.history, [NODES, REIONISED_AT_8])
    assert dl.read_lightcone(tmp_path / "file.npz", bins=50, cube=False).cube is None


def test_what_a_format_cannot_say_is_nan(tmp_path):
    lc = dl.read_lightcone(write_v3(tmp_path / "a", p_cutoff=False, m_min=True), 50)
    assert np.isnan(lc.parameters[[0, 4]]).all() and np.isfinite(lc.parameters[[1, 2, 3, 5]]).all()
    assert "P_CUTOFF" in " ".join(lc.notes) and "M_MIN_in_Mass" in " ".join(lc.notes)
    assert np.isnan(dl.read_lightcone(write_v4(tmp_path / "b", m_min=True), 50).parameters[[0, 4]]).all()


@pytest.mark.parametrize("name", ["label", "labels"])
def test_release_label_order_is_told_by_the_values(tmp_path, name):
    for label in ([3.0, 0.3, 500.0, 40.0, 4.7, 30.0], [3.0, 0.3, 40.0, 500.0, 4.7, 30.0]):
        lc = dl.read_lightcone(write_release(tmp_path / "a.npz", label, name), 60)
        np.testing.assert_array_equal(lc.parameters, list(GOOD.values()))
        assert lc.history is None and "unfiltered" in " ".join(lc.notes)
        expected = dl.comoving_distance(5.0, 0.3) + 200 / 140 * np.arange(60)
        np.testing.assert_allclose(dl.comoving_distance(lc.redshifts[::-1], 0.3), expected, rtol=1e-6)
    for label in ([3.0, 0.3, 0.5, 0.4, 4.7, 30.0], [3.0, 0.3, 41.0, 40.0, 4.7, 30.0], [3.0, 0.3, 500.0, 400.0, 4.7, 30.0]):
        with pytest.raises(ValueError, match="cannot tell the order"):
            dl.read_lightcone(write_release(tmp_path / "b.npz", label), 60)


def truncated(path):
    data = path.read_bytes()
    path.write_bytes(data[:len(data) * 2 // 3])
    return path


def with_nan():
    image = cube()
    image[3, 4, 20] = np.nan
    return image


BAD = {
    "truncated HDF5": (lambda p: truncated(write_v3(p)), "truncated"),
    "truncated npz": (lambda p: truncated(write_npz(p)), "truncated or damaged"),
    "empty file": (lambda p: p.write_bytes(b"") and None or p, "empty"),
    "text file": (lambda p: p.write_text("hello") and p, "neither HDF5 nor .npz"),
    "other HDF5": (lambda p: h5py.File(p, "w").close() or p, "not a 21cmFAST"),
    "a store": (lambda p: make_store(p, 3), "is a store"),
    "wrong axis order": (lambda p: write_v3(p, np.moveaxis(cube(), 2, 0).copy()), "wrong axis order: the cube is 60 x 8 x 8"),
    "from high z": (lambda p: write_npz(p, z=np.linspace(12, 5, 60)), "wrong axis order: redshift must rise"),
    "NaN": (lambda p: write_v3(p, with_nan()), "1 voxels are NaN"),
    "too few bins": (lambda p: write_v3(p, cube(bins=40)), "40 line-of-sight bins, fewer than --bins 50"),
    "lacks zeta (v3)": (lambda p: write_v3(p, drop=("HII_EFF_FACTOR",)), "lacks astro_params/HII_EFF_FACTOR"),
    "lacks zeta (npz)": (lambda p: write_npz(p, drop=("zeta",)), "lacks zeta"),
    "lacks image": (lambda p: write_npz(p, drop=("image",)), "lacks image"),
    "zeta by mass (v4)": (lambda p: write_v4(p, source="E-INTEGRAL"), "lacks zeta"),
    "outside the priors": (lambda p: write_v3(p, zeta=300.0), "zeta = 300 lies outside the prior, 10 to 250"),
    "five labels": (lambda p: write_release(p, [3.0, 0.3, 40.0, 500.0, 4.7]), "5 values"),
    "wrong z": (lambda p: write_npz(p, z=np.linspace(5, 12, 50)), "50 redshifts for 60"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_file_is_one_sentence_and_the_rest_is_converted(tmp_path, case):
    bad = tmp_path / "bad.npz"                                             # np.savez would add the ending to any other name
    write, words = BAD[case]
    write(bad)
    report = dl.convert([write_v3(tmp_path / "good1", seed=1), bad, write_v3(tmp_path / "good2", seed=2)], tmp_path / "store.h5", bins=50)
    assert [e["status"] for e in report] == ["kept", "skipped", "kept"]
    assert words in report[1]["reason"] and "\n" not in report[1]["reason"] and str(bad) not in report[1]["reason"]
    with dl.open_store(tmp_path / "store.h5") as f:
        assert len(f["seed"]) == 2 and np.isfinite(f["brightness_temp"][:]).all()


@needs_shared
def test_shared_files_agree_with_each_other():
    a, b = dl.read_lightcone(SHARED / "native_v3_0.h5"), dl.read_lightcone(SHARED / "npz" / "lc_0000.npz")
    assert np.array_equal(a.cube.astype(np.float16), b.cube.astype(np.float16)) and np.array_equal(a.parameters, b.parameters) and a.seed == b.seed
    np.testing.assert_allclose(a.redshifts, b.redshifts, atol=0.005)      # ours from distances, theirs from astropy
    assert a.cell == pytest.approx(40 / 28) and b.cell == pytest.approx(40 / 28, rel=0.01)
    v4 = dl.read_lightcone(SHARED / "native_v4_0.h5")
    assert v4.redshifts[-1] == pytest.approx(5.6, abs=0.02) and np.isnan(v4.parameters).tolist() == [True, False, False, False, True, False]


@needs_shared
def test_convert_shared_files(tmp_path, capsys):
    files = sorted(SHARED.glob("*.h5")) + sorted(SHARED.glob("npz/*.npz"))
    dl.main(["convert", *map(str, files), "--out", str(tmp_path / "s.h5")])
    report = {Path(e["file"]).name: e for e in json.loads((tmp_path / "s.h5.convert.json").read_text())}
    assert len(report) == 44 and "44 files: 30 kept" in capsys.readouterr().out
    assert report["lc_0021.npz"]["status"] == "dropped" and "not reionised" in report["lc_0021.npz"]["reason"]
    assert report["lc_0058.npz"]["status"] == "dropped" and "optical depth" in report["lc_0058.npz"]["reason"]
    assert "same seed" in report["lc_0000.npz"]["reason"]                  # the same simulation as native_v3_0.h5
    data = dl.GlobalSignals(tmp_path / "s.h5", "train")
    assert "29 of 30" in data.note and "1 with a parameter unknown" in data.note
    npz = dl.GlobalSignals(SHARED / "signals.npz", "train")
    assert npz.signals.shape == (len(npz), 47) and "extreme history" in npz.note
    with np.load(SHARED / "signals.npz") as f:                             # by hand, for one row
        hand = f["signal"][npz.rows[3]][::-1].reshape(47, 50).mean(1)
    np.testing.assert_allclose(npz.signals[3].numpy() * npz.norm[1] + npz.norm[0], hand, atol=1e-3)


# ------------------------------------------------------------------------------------------------------------------------------------------ filter

def test_optical_depth():
    z = np.array([30, 7.69, 7.68, 5])                                     # Planck 2018, instantaneous: z_re = 7.68 +- 0.79 for tau = 0.0544 (arXiv:1807.06209, tab. 2)
    assert dl.optical_depth(z, np.array([1, 1, 0, 0]), 0.311, 5.0) == pytest.approx(0.0544, abs=0.002)
    never = dl.optical_depth(np.array([30.0, 5]), np.array([1.0, 1]), 0.311, 5.0)      # nothing ionised above the lightcone's end: the part below counts as ionised
    from scipy.integrate import quad
    h0, n_h = 67.66e5 / 3.0857e24, 0.75095 * 0.02242 * 1.878e-29 / 1.6726e-24          # 1/s; X rho_b / m_p with X = 1 / (1 + 4 x 0.083)
    f = lambda z: 2.998e10 * 6.652e-25 * n_h * (1 + z) ** 2 / (h0 * np.sqrt(0.311 * (1 + z) ** 3 + 0.689)) * (1.083 + 0.083 * (z < 3))
    assert never == pytest.approx(quad(f, 0, 3)[0] + quad(f, 3, 5)[0], rel=0.005)


def test_filter_and_its_thresholds(tmp_path):
    late = write_v3(tmp_path / "late", history=np.array([1.0, 1, 1, 1, 1, 0.9, 0.5, 0.3]), seed=1)
    early = write_v3(tmp_path / "early", history=np.array([1.0, 0.9, 0, 0, 0, 0, 0, 0]), seed=2)
    unknown = write_v3(tmp_path / "unknown", history=None, seed=3)
    report = dl.convert([late, early, unknown], tmp_path / "s.h5", bins=50)
    assert [e["status"] for e in report] == ["dropped", "dropped", "kept"]
    assert "not reionised: mean neutral fraction 0.30 > 0.1" in report[0]["reason"] and "optical depth" in report[1]["reason"]
    assert "unfiltered" in " ".join(report[2]["notes"])
    assert [e["status"] for e in dl.convert([late, early], tmp_path / "s.h5", bins=50, tau_sigma=50, max_x_hi=0.5)] == ["kept", "kept"]


# ------------------------------------------------------------------------------------------------------------------------------------------ the store

def test_convert_continues_and_finds_duplicates(tmp_path):
    a, b, c = (write_v3(tmp_path / n, cube(seed=i), seed=i) for i, n in enumerate("abc"))
    copy = write_v3(tmp_path / "copy", cube(seed=0), seed=0)
    dl.convert([a, b], tmp_path / "s.h5", bins=50)
    report = dl.convert([a, b, c, copy], tmp_path / "s.h5", bins=50)
    assert [e["status"] for e in report] == ["there", "there", "kept", "skipped"] and "same seed and parameters as a" in report[3]["reason"]
    with dl.open_store(tmp_path / "s.h5") as f:
        assert [Path(s.decode()).name for s in f["source"][:]] == ["a", "b", "c"]
        for i in range(3):
            np.testing.assert_array_equal(f["brightness_temp"][i], np.moveaxis(cube(seed=i)[:, :, :50], 2, 0)[::-1].astype(np.float16))
        assert f["signal_end"][0] == 45 and f["brightness_temp"].chunks == (1, 50, 8, 8)
        np.testing.assert_allclose(f["global_signal"][1], f["brightness_temp"][1].astype(float).mean((1, 2)), rtol=1e-4)


def test_mixed_sky_sizes_and_bins(tmp_path):
    files = [write_v3(tmp_path / "a", cube(sky=8), seed=1), write_v3(tmp_path / "b", cube(sky=10), seed=2), write_v3(tmp_path / "c", cube(sky=8), seed=3)]
    report = dl.convert(files, tmp_path / "s.h5", bins=50)
    assert [e["status"] for e in report] == ["kept", "skipped", "kept"] and "10 x 10 on the sky, the store has 8 x 8" in report[1]["reason"]
    with pytest.raises(ValueError, match="holds lightcones of 50 bins"):
        dl.convert(files, tmp_path / "s.h5", bins=40)


def check_rows(path, at_least=0):
    """Every row of a store of `small_row`s is whole; returns how many there are."""
    with dl.open_store(path) as f:
        n = len(f["seed"])
        assert n >= at_least and {len(f[k]) for k in f} == {n}
        for i in range(n):
            expected = small_row(i, f["parameters"][i])
            assert np.array_equal(f["brightness_temp"][i], expected["brightness_temp"]) and f["source"][i].decode() == f"row {i}" and f["seed"][i] == i
    assert not list(Path(path).parent.glob("*.journal"))
    return n


def add_rows(path, first, n):
    writer = dl.StoreWriter(path, 100, 8)
    for i in range(first, first + n):
        writer.rows.append(small_row(i, np.array(list(GOOD.values()))))
    writer.flush()


def test_killed_at_a_write(tmp_path):
    """A process that dies at its k-th system call that changes the file, k all over the transaction and every one of its last 16: the store has the old rows or the
    old and the new ones, never less, all whole."""
    path, outcomes = tmp_path / "s.h5", []
    add_rows(path, 0, 3)
    calls = multiprocessing.get_context("fork").Value("i")

    def child(k, first):
        calls.value = 0

        def deadly(real):
            def call(*args):
                if calls.value == k:
                    os._exit(9)
                calls.value += 1
                return real(*args)
            return call
        for name in ("pwrite", "ftruncate", "replace", "fsync", "posix_fallocate"):
            setattr(os, name, deadly(getattr(os, name)))
        add_rows(path, first, 2)
        os._exit(0)

    def run(k):
        n = check_rows(path)
        p = multiprocessing.get_context("fork").Process(target=child, args=(k, n))
        p.start()
        p.join()
        after = check_rows(path, at_least=n)
        assert after in (n, n + 2)
        return p.exitcode, after - n

    assert run(10**9) == (0, 2)
    total = calls.value
    for k in sorted({*range(0, total - 16, max(1, total // 12)), *range(total - 16, total)}):
        code, gained = run(k)
        outcomes.append(gained)
        assert code == 9 or k > total - 4                                  # (the number of pages in the journal differs a little from time to time)
    assert 0 in outcomes and 2 in outcomes                                 # some deaths came before the journal was whole, some after


def test_kill_9_while_converting(tmp_path):
    """The real thing: `simulate` and kill -9, again and again; nothing is lost and the end is as if nothing had happened."""
    command = [sys.executable, str(SCRIPT), "simulate", "-n", "12", "--sky", "4", "--bins", "94", "--workers", "1", "--out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = 0
    for wait in (4.0, 6.0):
        p = subprocess.Popen([*command, str(tmp_path / "killed.h5")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        time.sleep(wait)
        p.kill()
        p.wait()
        if (tmp_path / "killed.h5").exists():
            with dl.open_store(tmp_path / "killed.h5") as f:
                assert len(f["seed"]) >= done
                done = len(f["seed"])
    for name in ("killed.h5", "whole.h5"):
        subprocess.run([*command, str(tmp_path / name)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    with dl.open_store(tmp_path / "killed.h5") as a, dl.open_store(tmp_path / "whole.h5") as b:
        assert len(a["seed"]) == 12
        for name in a:
            np.testing.assert_array_equal(a[name][:], b[name][:])


def test_disk_full(tmp_path):
    """A file size limit stands for the full disk: one sentence, exit status 2, the old rows are whole, and it continues when there is room."""
    path = tmp_path / "s.h5"
    add_rows(path, 0, 3)
    size = path.stat().st_size

    def child():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20000, size + 20000))
        import signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            add_rows(path, 3, 2)
        except OSError as e:
            os._exit(7 if "no room for" in str(e) and "are safe" in str(e) else 8)
        os._exit(0)

    p = multiprocessing.get_context("fork").Process(target=child)
    p.start()
    p.join()
    assert p.exitcode == 7 and path.stat().st_size == size
    assert check_rows(path) == 3
    add_rows(path, 3, 2)
    assert check_rows(path) == 5


def test_errors_are_one_line_and_status_2(tmp_path, capsys):
    (tmp_path / "text.h5").write_text("no store")
    h5py.File(tmp_path / "other.h5", "w").close()
    make_store(tmp_path / "store.h5", 3, T=50)
    for arguments, words in [(["inspect", tmp_path / "none.h5"], "no such store"), (["inspect", tmp_path / "text.h5"], "cannot be opened as a store"),
                             (["inspect", tmp_path / "other.h5"], "not a lightcone store"), (["convert", tmp_path / "text.h5", "--out", tmp_path / "x.h5"], "none of the 1"),
                             (["simulate", "-n", "0", "--out", tmp_path / "x.h5"], "at least 1"),
                             (["simulate", "-n", "2", "--out", tmp_path / "store.h5"], "choose another --out"),
                             (["simulate", "--backend", "21cmfast", "--python", "/nowhere/python", "--out", tmp_path / "y.h5"], "no 21cmFAST")]:
        with pytest.raises(SystemExit) as e:
            dl.main([str(a) for a in arguments])
        error = capsys.readouterr().err.strip().splitlines()
        assert e.value.code == 2 and len([line for line in error if line.startswith("error:")]) == 1 and words in error[-1]
    assert not (tmp_path / "x.h5").exists()


# ------------------------------------------------------------------------------------------------------------------------------------------ the fast simulator

def fast(seed=0, sky=12, **changes):
    return dl.simulate_fast(list({**GOOD, **changes}.values()), seed, sky=sky)


def test_fast_simulator_signs():
    tau = lambda lc: dl.history_summary(lc)[0]
    assert tau(fast(zeta=30)) < tau(fast(zeta=100)) < tau(fast(zeta=240))                            # more ionising photons: earlier
    assert tau(fast(log10_T_vir=4.1)) > tau(fast(log10_T_vir=4.7)) > tau(fast(log10_T_vir=5.2))      # only big haloes: later
    assert tau(fast(m_WDM=0.5)) < tau(fast(m_WDM=2)) <= tau(fast(m_WDM=9))                           # warm dark matter: later
    trough = lambda lc: lc.cube.mean((1, 2)).min()
    assert trough(fast(log10_L_X=38.5)) < trough(fast(log10_L_X=40)) < trough(fast(log10_L_X=41.5)) < 0          # more heating: shallower
    assert trough(fast(E_0=1400)) < trough(fast(E_0=600)) < trough(fast(E_0=150))                    # fewer and harder X-rays: deeper


def test_fast_simulator_shape_and_reproducibility():
    lc = fast(sky=28)
    assert lc.cube.shape == (470, 28, 28) and np.isfinite(lc.cube).all() and lc.redshifts[-1] == pytest.approx(5)
    assert dl.comoving_distance(lc.redshifts[0], 0.3) - dl.comoving_distance(5.0, 0.3) == pytest.approx(469 / 470 * 2350 * 200 / 140, rel=1e-3)
    np.testing.assert_array_equal(lc.cube, fast(sky=28).cube)
    assert not np.array_equal(lc.cube, fast(sky=28, seed=1).cube)
    for corner in (dl.PRIORS[:, 0], dl.PRIORS[:, 1], np.where([1, 0, 0, 0, 0, 0], *dl.PRIORS.T)):    # extremes of the priors: no NaN, no overflow
        assert np.isfinite(dl.simulate_fast(corner, 0, sky=8).cube).all()


def test_fast_simulator_is_coherent_and_periodic():
    lc = fast(sky=28)
    alive = lc.cube[(lc.redshifts > 10) & (lc.redshifts < 18)].astype(float)
    alive -= alive.mean((1, 2), keepdims=True)
    correlation = lambda a, b: (a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum())
    assert correlation(alive[1:], alive[:-1]) > 0.5 > 0.2 > abs(correlation(alive[30:], alive[:-30]))
    wrap = correlation(alive[:, 0], alive[:, -1])                                                    # neighbours across the edge ...
    assert wrap == pytest.approx(correlation(alive[:, 13], alive[:, 14]), abs=0.2) and wrap > 0.4   # ... are like neighbours inside


def test_parameters_can_be_regressed():
    """Ridge regression in a Gaussian kernel finds all six in signals held out, each fifth in turn. (Linear ridge does on the default grid, with less of a margin:
    the sign of T_b flips with heating. `bench_lightcone.py regress` shows both. Here the sky is coarser, for speed.)"""
    P = dl.draw_parameters(1200, seed=1)
    with multiprocessing.get_context("spawn").Pool(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        lightcones = pool.starmap(signal_of, [(p, i) for i, p in enumerate(P)], chunksize=20)
    kept = np.array([ok for _, ok in lightcones])
    x = dl.normalise(torch.tensor(np.array([s for s, _ in lightcones])[kept]).reshape(-1, 47, 10).mean(2)).numpy()
    x, y, fold = (x - x.mean(0)) / (x.std(0) + 1e-6), dl.to_unit(P[kept]), np.arange(kept.sum()) % 5
    kernel, predicted = np.exp(-((x[:, None] - x[None]) ** 2).mean(2) / 2), np.zeros_like(y)
    for k in range(5):
        out, rest = fold == k, fold != k
        weights = np.linalg.solve(kernel[np.ix_(rest, rest)] + 0.01 * np.eye(rest.sum()), y[rest] - y[rest].mean(0))
        predicted[out] = kernel[np.ix_(out, rest)] @ weights + y[rest].mean(0)
    r2 = 1 - ((y - predicted) ** 2).sum(0) / ((y - y.mean(0)) ** 2).sum(0)
    print({k: round(float(v), 2) for k, v in zip(dl.PARAMETERS, r2)}, "from", (fold != 0).sum())
    assert (r2 > 0.1).all()


def signal_of(p, i):
    lc = dl.simulate_fast(p, [7, i], sky=12)
    return lc.cube.mean((1, 2)), not dl.filter_reason(*dl.history_summary(lc))


def test_draws_are_space_filling_and_continue():
    a, b = dl.draw_parameters(256, 3), dl.draw_parameters(64, 3)
    np.testing.assert_array_equal(a[:64], b)
    unit = dl.to_unit(a)
    assert unit.min() >= 0 and unit.max() <= 1
    assert all(np.histogram(u, 16, (0, 1))[0].min() >= 12 for u in unit.T)                           # 16 in each of 16 bins, nearly exactly


def test_simulate_writes_continues_and_does_not_depend_on_workers(tmp_path, capsys):
    dl.simulate(tmp_path / "a.h5", 3, sky=4, bins=94, workers=1)
    first = dl.simulate(tmp_path / "a.h5", 6, sky=4, bins=94, workers=1)
    dl.simulate(tmp_path / "b.h5", 6, sky=4, bins=94, workers=2)
    assert first["simulated"] == 3 and first["there_before"] == 3 and first["rows_in_store"] == 6
    with dl.open_store(tmp_path / "a.h5") as a, dl.open_store(tmp_path / "b.h5") as b:
        for name in a:
            np.testing.assert_array_equal(a[name][:], b[name][:])
        assert b"not 21cmFAST" in a["source"][0]


# ------------------------------------------------------------------------------------------------------------------------------------------ 21cmFAST

FAKE = '''
import os, signal, sys
__version__ = "3.4.0"
sys.path.insert(0, os.path.dirname(__file__))
class Namespace(dict):
    __init__ = dict.__init__
UserParams = CosmoParams = AstroParams = FlagOptions = dict
class global_params: pass
started = os.environ["FAKE_LOG"]
open(started, "a").write("started\\n")
def run_lightcone(random_seed, user_params, cosmo_params, astro_params, **_):
    print("chatter of the C code on stdout", flush=True)
    if random_seed == 2: os.kill(os.getpid(), signal.SIGSEGV)
    if random_seed == 3: raise RuntimeError("no convergence")
    class Lightcone:
        def save(self, fname, direc, clobber):
            from test_data_lightcone import write_v3
            write_v3(os.path.join(direc, fname), seed=random_seed, m_WDM=global_params.M_WDM, Om=cosmo_params["OMm"], log10_L_X=astro_params["L_X"],
                     E_0=astro_params["NU_X_THRESH"], log10_T_vir=astro_params["ION_Tvir_MIN"], zeta=astro_params["HII_EFF_FACTOR"])
    return Lightcone()
'''


def test_21cmfast_workers_survive_and_record_failures(tmp_path, monkeypatch, capsys):
    """A stand-in for the package that crashes on one draw and raises on another: the rest is there, failures are on record, workers are used again."""
    (tmp_path / "py21cmfast.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(__file__).parent), str(SCRIPT.parent)]))
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    run = lambda: dl.simulate(tmp_path / "s.h5", 6, "21cmfast", sky=8, bins=50, workers=1, keep=tmp_path / "native")
    counts = run()
    assert counts["simulated"] == 4 and counts["failed_now"] == 2
    failures = [json.loads(line) for line in (tmp_path / "s.h5.failures.jsonl").read_text().splitlines()]
    assert {f["random_seed"]: f["reason"] for f in failures} == {2: "killed by SIGSEGV", 3: "RuntimeError: no convergence"}
    assert set(failures[0]["parameters"]) == set(dl.PARAMETERS)
    assert (tmp_path / "log").read_text().count("started") == 1 + 2                                  # the version, one worker, its successor
    assert len(list((tmp_path / "native").iterdir())) == 4
    with dl.open_store(tmp_path / "s.h5") as f:
        draws = {int(s): p for s, p in zip(f["seed"][:], f["parameters"][:])}
    for i, p in enumerate(dl.draw_parameters(6, 0)):
        if i + 1 in draws:
            np.testing.assert_allclose(draws[i + 1], p)
    assert run()["simulated"] == 0                                                                   # finished and failed ones are not run again


def test_21cmfast_for_real(tmp_path, capsys):
    python = os.environ.get("PYTHON_21CMFAST", sys.executable)
    if subprocess.run([python, "-c", "import py21cmfast"], capture_output=True).returncode:
        pytest.skip("21cmFAST is not installed (PYTHON_21CMFAST may name a Python that has it)")
    counts = dl.simulate(tmp_path / "s.h5", 1, "21cmfast", sky=16, bins=1000, box=16 / 0.7, step=1.2, workers=1, python=python)
    assert counts["simulated"] == 1


# ------------------------------------------------------------------------------------------------------------------------------------------ data sets

def test_splits():
    for n, experiment, sizes in [(5010, "regression", (3800, 960, 250)), (6000, "regression", (3800, 960, 250)), (1000, "regression", (760, 190, 50)),
                                 (3, "regression", (1, 1, 1)), (2500, "generation", (2025, 225, 250)), (100, "generation", (85, 10, 5)), (3, "generation", (1, 1, 1))]:
        parts = [dl.split_rows(n, s, 0, experiment) for s in ("train", "validation", "test")]
        assert abs(len(parts[0]) - sizes[0]) <= 1 and tuple(map(len, parts))[1:] == pytest.approx(sizes[1:], abs=1)
        assert len(set(np.concatenate(parts))) == sum(map(len, parts))                               # nobody in two parts
        np.testing.assert_array_equal(parts[0], dl.split_rows(n, "train", 0, experiment))
    assert not np.array_equal(dl.split_rows(100, "train", 0, "generation"), dl.split_rows(100, "train", 1, "generation"))
    with pytest.raises(ValueError, match="at least 3"):
        dl.split_rows(2, "train", 0, "regression")


def test_global_signals(tmp_path):
    path = make_store(tmp_path / "s.h5", 60, T=94)
    train, test = (dl.GlobalSignals(path, s) for s in ("train", "test"))
    assert train.signals.mean().abs() < 1e-5 and train.signals.std() == pytest.approx(1, rel=1e-3) and test.norm == train.norm
    with dl.open_store(path) as f:
        signal = f["brightness_temp"][int(test.rows[0])].astype(float).mean((1, 2)).reshape(47, 2).mean(1)
        parameters = f["parameters"][int(test.rows[0])]
    x, y = test[0]
    np.testing.assert_allclose(x * test.norm[1] + test.norm[0], signal, rtol=1e-3)
    np.testing.assert_allclose(y, dl.to_unit(parameters), rtol=1e-5)
    published = dl.GlobalSignals(path, "test", norm=dl.PUBLISHED_NORM)
    np.testing.assert_allclose(published.signals[0] * 65.4 - 32.5, signal, rtol=1e-3, atol=1e-2)
    assert dl.GlobalSignals(path, "train", tokens=94).signals.shape[1] == 94
    with pytest.raises(ValueError, match="cannot be averaged into 50"):
        dl.GlobalSignals(path, "train", tokens=50)


def test_rows_not_for_training_are_left_out(tmp_path):
    path = make_store(tmp_path / "s.h5", 20, T=94)
    with h5py.File(path, "r+") as f:
        f["parameters"][3, 0], f["parameters"][4, 5], f["passed"][5] = np.nan, 999, False
    for data in (dl.GlobalSignals, dl.SubLightcones):
        parts = [data(path, s) for s in ("train", "validation", "test")]
        assert "17 of 20" in parts[0].note and "1 with a parameter unknown, 1 outside the priors, 1 with an extreme history" in parts[0].note
        assert not {3, 4, 5} & set(np.concatenate([p.rows for p in parts]))


def test_transform_and_its_inverse():
    T = torch.tensor([-300, -1, 0, 0.5, 30])
    np.testing.assert_allclose(dl.normalise(T), [(-np.log(301) + 1.51) / 2.74, (-np.log(2) + 1.51) / 2.74, 1.51 / 2.74, (np.log(1.5) + 1.51) / 2.74,
                                                 (np.log(31) + 1.51) / 2.74], rtol=1e-5)
    np.testing.assert_allclose(dl.denormalise(dl.normalise(T)), T, rtol=1e-5, atol=1e-6)


def millikelvin(slices):
    return dl.denormalise(torch.as_tensor(slices)).numpy()


def test_sublightcones(tmp_path):
    path = make_store(tmp_path / "s.h5", 40, T=160)                        # signal ends at 150: trimming to 198 does nothing here
    train, test = dl.SubLightcones(path, "train"), dl.SubLightcones(path, "test")
    chunks = (160 - 24) // 22 + 1                                          # 7 whole chunks; 160 - 7 * 22 = 6 slices are left for the test
    assert len(train) == len(train.rows) * chunks and len(test) == len(test.rows) * (chunks + 1)
    x, conditions = train[0, 8]
    assert x.shape == (12, 8, 8) and x.dtype == conditions.dtype == torch.float32 and conditions.shape == (7,)
    start = round(float(conditions[6]) * 160 + 80)                         # index = (t - T/2) / T
    assert 22 <= start <= 34
    row = train.rows[1]
    with dl.open_store(path) as f:
        truth = f["brightness_temp"][int(row), start:start + 12].astype(np.float32)
        np.testing.assert_allclose(conditions[:6], dl.to_unit(f["parameters"][int(row)]), rtol=1e-5)
    np.testing.assert_allclose(np.sort(millikelvin(x).reshape(12, -1)), np.sort(truth.reshape(12, -1)), rtol=1e-3, atol=1e-3)          # the same voxels, elsewhere
    x, conditions = test[7]                                                # the partial last chunk of the first test lightcone
    assert len(x) == 6 and round(float(conditions[6]) * 160 + 80) == 154
    assert [(s, n) for r, s, n in test.windows() if r == test.rows[0]] == [(s, 12) for s in range(0, 156, 12)] + [(156, 4)]


def test_trimming(tmp_path):
    path = make_store(tmp_path / "s.h5", 10, T=300)
    with h5py.File(path, "r+") as f:
        f["brightness_temp"][:, 100:], f["signal_end"][:] = 0, 100
    data = dl.SubLightcones(path, "test")
    assert set(data.length) == {148} and max(s + n for _, s, n in data.windows()) == 148              # 100 with signal, at most 48 all zero
    assert data[0][1][6] == pytest.approx((round(float(data[0][1][6]) * 300 + 150) - 150) / 300)      # T counts before trimming


def test_draws_depend_on_seed_epoch_and_index_only(tmp_path):
    path = make_store(tmp_path / "s.h5", 20)
    data, again = dl.SubLightcones(path, "train", seed=5), dl.SubLightcones(path, "train", seed=5)
    pairs = [(e, i) for e in range(3) for i in range(len(data))]
    alone = [data[p] for p in pairs]
    for order in (pairs[::-1], pairs[1::2]):
        for p in order:
            assert all(torch.equal(a, b) for a, b in zip(again[p], alone[pairs.index(p)]))
    for context in ("fork", "spawn"):                                      # workers get open handles by fork, pickles by spawn
        loader = torch.utils.data.DataLoader(data, batch_sampler=[pairs[i:i + 4] for i in range(0, len(pairs), 4)], num_workers=2, multiprocessing_context=context)
        x = torch.cat([batch[0] for batch in loader])
        assert torch.equal(x, torch.stack([a for a, _ in alone]))
    assert not torch.equal(data[0, 0][0], data[1, 0][0])
    validation = dl.SubLightcones(path, "validation")
    assert all(torch.equal(a, b) for i in range(len(validation)) for a, b in zip(validation[0, i], validation[9, i]))
    start = round(float(validation[0][1][6]) * 100 + 50)
    truth = validation.read(validation.rows[0], start, 12)[0]
    np.testing.assert_array_equal(validation[0][0], truth)                 # not augmented


def test_augmentation_is_the_whole_group_and_acts_alike_on_all_slices(tmp_path):
    """On a sky of 4 x 4, all 8 rotations and mirror images times 16 shifts turn up and nothing else, and all slices move together."""
    path = make_store(tmp_path / "s.h5", 10, T=100, sky=4)
    with h5py.File(path, "r+") as f:
        a = np.full((100, 4, 4), 10.0)
        a[:, 0, 0], a[:, 0, 1], a[:, 1, 0] = 20, 30, 40                    # no symmetry
        f["brightness_temp"][:], f["signal_end"][:] = a, 100
    data, seen = dl.SubLightcones(path, "train"), set()
    expected = {np.roll(m, (i, j), (0, 1)).tobytes() for k in range(4) for m in (np.rot90(a[0], k), np.rot90(a[0], k).T) for i in range(4) for j in range(4)}
    for epoch in range(60):
        for i in range(len(data)):
            x = millikelvin(data[epoch, i][0]).round().astype(float)
            assert (x == x[0]).all()
            seen.add(x[0].tobytes())
    assert seen == expected and len(expected) == 128


def test_memory_does_not_grow_with_the_store(tmp_path):
    """300 GB of lightcones (sparse: chunks that were never written): reading runs from all over needs no memory to speak of."""
    path = tmp_path / "big.h5"
    dl.create_store(path, 2350, 140)
    n = 3300
    with h5py.File(path, "r+") as f:
        for name in f:
            f[name].resize(n, axis=0)
        f["parameters"][:], f["passed"][:], f["signal_end"][:] = dl.draw_parameters(n, 0), True, 2350
    script = f"""
import sys, time, numpy as np; sys.path.insert(0, {str(SCRIPT.parent)!r})
import data_lightcone as dl
rss = lambda: int(open('/proc/self/statm').read().split()[1]) * 4096 / 1e6
data = dl.SubLightcones({str(path)!r}, 'train'); data[0, 0]; before, t = rss(), time.time()
for i in np.random.default_rng(0).integers(len(data), size=300): data[0, int(i)]
print(before, rss(), 3600 / (time.time() - t), len(data))"""
    before, after, rate, chunks = map(float, subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split())
    print(f"{n * 2350 * 140 * 140 * 2 / 1e9:.0f} GB, {chunks:.0f} chunks: {before:.0f} MB before, {after:.0f} MB after 300 draws, {rate:.0f} slices/s")
    assert after - before < 60 and chunks > 250_000


# ------------------------------------------------------------------------------------------------------------------------------------------ inspect

def test_inspect(tmp_path, capsys):
    dl.simulate(tmp_path / "s.h5", 6, sky=8, bins=94, workers=1)
    capsys.readouterr()
    dl.main(["inspect", str(tmp_path / "s.h5"), "--out", str(tmp_path / "figures")])
    summary = json.loads(capsys.readouterr().out)
    assert summary["lightcones"] == 6 and summary == json.loads((tmp_path / "figures" / "summary.json").read_text())
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {"coverage.png", "signals.png", "lightcones.png", "power.png", "summary.json"}


def test_power_spectrum_of_white_noise_is_flat():
    cell, sigma = 2.0, 3.0
    k, power = dl.power_spectrum(np.random.default_rng(0).normal(0, sigma, (200, 32, 32)), cell)
    np.testing.assert_allclose(power, k**2 * sigma**2 * cell**2 / (2 * np.pi), rtol=0.15)
