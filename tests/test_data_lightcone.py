"""data_lightcone.py: readers, filter, the store under kill -9, many writers and full disks, simulators, data sets."""
import json
import multiprocessing
import os
import platform
import resource
import shutil
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
CASES = Path(__file__).resolve().parents[2] / "shared" / "cases" / "lightcone"
needs_cases = pytest.mark.skipif(not CASES.exists(), reason="needs ../shared/cases/lightcone")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
GOOD = {"m_WDM": 3.0, "Om": 0.3, "log10_L_X": 40.0, "E_0": 500.0, "log10_T_vir": 4.7, "zeta": 30.0}
NODES = np.array([35.0, 20, 10, 9, 8, 7, 6, 5])
REIONISED_AT_8 = np.array([1.0, 1, 1, 0.9, 0.4, 0, 0, 0])                  # tau = 0.059


def cube(bins=60, sky=8, seed=0):
    """(x, y, t from low z): the first five bins are ionised, and every bin can be told from every other."""
    a = np.random.default_rng(seed).normal(-20, 5, (sky, sky, bins)) - np.arange(bins)
    a[:, :, :5] = 0
    return a.astype(np.float32)


def write_v3(path, image=None, p_cutoff=True, m_min=False, history=REIONISED_AT_8, nodes=NODES, drop=(), seed=7, z_low=5.0, cell=2.5, los=None, cosmo=None, flags=None,
             root=None, user=None, **changes):
    p, image = {**GOOD, **changes}, cube() if image is None else image
    cosmo = {"hlittle": 0.6766, "OMb": 0.04897, "SIGMA_8": 0.8102, "POWER_INDEX": 0.9665} | (cosmo or {})
    attributes = {"astro_params": {"HII_EFF_FACTOR": p["zeta"], "ION_Tvir_MIN": p["log10_T_vir"], "L_X": p["log10_L_X"], "NU_X_THRESH": p["E_0"]},
                      "cosmo_params": {"OMm": p["Om"]} | cosmo, "_globals": {"M_WDM": p["m_WDM"], "P_CUTOFF": p_cutoff},
                      "flag_options": {"M_MIN_in_Mass": m_min, "USE_TS_FLUCT": True, "USE_MINI_HALOS": False, "INHOMO_RECO": False} | (flags or {}),
                      "user_params": {"BOX_LEN": cell * image.shape[0], "HII_DIM": image.shape[0]} | (user or {})}
    with h5py.File(path, "w") as f:
        f.attrs.update({"random_seed": seed, "redshift": z_low} | (root or {}))
        for group, values in attributes.items():
            f.create_group(group).attrs.update({k: v for k, v in values.items() if k not in drop})
        f["lightcones/brightness_temp"] = image
        if "distances" not in drop:
            f["distances"] = dl.comoving_distance(z_low, p["Om"], cosmo["hlittle"]) + (los or cell) * np.arange(image.shape[2])
        f["node_redshifts"] = nodes
        if history is not None:
            f["global_quantities/xH_box"] = history
    return path


def write_v4(path, image=None, m_min=False, source="CONST-ION-EFF", history=REIONISED_AT_8, nodes=NODES, flags=None, sizes=None, root=None):
    image = cube() if image is None else image
    with h5py.File(path, "w") as f:
        f.attrs.update({"last_completed_node": -1, "last_completed_lcidx": -1} | (root or {}))
        top = f.create_group("InputParameters")
        top.attrs["random_seed"] = 5
        for group, values in {"astro_params": {"HII_EFF_FACTOR": 30.0, "ION_Tvir_MIN": 4.7, "L_X": 40.0, "NU_X_THRESH": 500.0},
                                  "cosmo_params": {"OMm": 0.3, "hlittle": 0.6766, "OMb": 0.0489747, "POWER_INDEX": 0.9665, "wl": -1.0},
                                  "astro_options": {"M_MIN_in_Mass": m_min, "USE_TS_FLUCT": True} | (flags or {}), "matter_options": {"SOURCE_MODEL": source},
                                  "simulation_options": sizes or {"BOX_LEN": 20.0, "HII_DIM": image.shape[0]}}.items():
            top.create_group(group).attrs.update(values)
        top["node_redshifts"] = nodes
        f["global_quantities/neutral_fraction"] = history
        f["lightcones/brightness_temp"] = image
        f["lightcone_distances"] = dl.comoving_distance(5.0, 0.3) + 2.5 * np.arange(image.shape[2])
    return path


def redshifts(bins=60, cell=2.5, Om=0.3):
    return dl.redshift_at(dl.comoving_distance(5.0, Om) + cell * np.arange(bins), Om)


def write_npz(path, image=None, drop=(), **changes):
    image = cube() if image is None else image
    values = dict(image=image.astype(np.float16), z=redshifts(image.shape[2]), **GOOD, seed=3, node_z=NODES, xH=REIONISED_AT_8)
    np.savez_compressed(path, **{k: v for k, v in {**values, **changes}.items() if k not in drop})
    return path


def write_release(path, label, name="label"):
    np.savez(path, image=cube().astype(np.float16), **{name: np.array(label)})
    return path


def make_store(path, n=40, T=100, sky=8, seed=0, edit=None):
    """Rows whose voxels are row + slice / 1000 (float16), the last ten slices all zero; parameters over the priors. edit(i, row) changes them."""
    for i, p in enumerate(dl.draw_parameters(n, seed)):
        row = small_row(i, p, T, sky)
        if edit:
            edit(i, row)
        dl.save_row(path, dl.name_of(i, p, (T, sky)), row)
    return path


def small_row(i, p, T=100, sky=8):
    image = np.broadcast_to((i + 1 + np.arange(T) / 1000)[:, None, None], (T, sky, sky)).astype(np.float32).copy()
    image[:, 1, 0] += 5                                                    # something that a rotation or shift moves
    image[-10:] = 0
    lightcone = dl.Lightcone(image, p, np.linspace(30, 5, T), np.stack([NODES, REIONISED_AT_8]), i, sky, 1.0, 1.0, dl.COSMOLOGY, "", [])
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
    "a store's row": (lambda p: make_store(p.parent / "s", 3) and next((p.parent / "s").iterdir()).rename(p), "is a store's lightcone already"),
    "a directory": (lambda p: p.mkdir(), "directory"),
    "wrong axis order": (lambda p: write_v3(p, np.moveaxis(cube(), 2, 0).copy()), "the cube is 60 x 8 x 8, expected (x, y, t)"),
    "from high z": (lambda p: write_npz(p, z=redshifts()[::-1]), "wrong axis order: redshift must rise"),
    "uneven": (lambda p: write_npz(p, z=np.linspace(5, 12, 60)), "not equal steps of comoving distance"),
    "in kelvin": (lambda p: write_v3(p, cube() / 1000, history=None), "is it in kelvin"),
    "in another unit": (lambda p: write_v3(p, cube() * 20), "a slice of 1370 mK on average: is it in another unit"),
    "filled up": (lambda p: write_v3(p, np.where(np.arange(60) > 40, -999, cube())), "a slice of 999 mK on average"),
    "object array": (lambda p: write_npz(p, xH=np.array([None, 1], dtype=object)), "Object arrays cannot be loaded"),
    "two lengths": (lambda p: write_npz(p, xH=REIONISED_AT_8[1:]), "shape"),
    "NaN": (lambda p: write_v3(p, with_nan()), "1 voxels are NaN"),
    "too few bins": (lambda p: write_v3(p, cube(bins=40)), "40 line-of-sight bins, fewer than --bins 50"),
    "lacks zeta (v3)": (lambda p: write_v3(p, drop=("HII_EFF_FACTOR",)), "lacks 'HII_EFF_FACTOR'"),
    "lacks zeta (npz)": (lambda p: write_npz(p, drop=("zeta",)), "lacks zeta"),
    "label and names": (lambda p: write_npz(p, label=np.zeros(6)), "holds label and other parameters"),
    "lacks image": (lambda p: write_npz(p, drop=("image",)), "lacks image"),
    "zeta by mass (v4)": (lambda p: write_v4(p, source="E-INTEGRAL"), "lacks zeta"),
    "outside the priors": (lambda p: write_v3(p, zeta=300.0), "zeta = 300 lies outside the prior, 10 to 250"),
    "five labels": (lambda p: write_release(p, [3.0, 0.3, 40.0, 500.0, 4.7]), "5 values"),
    "wrong z": (lambda p: write_npz(p, z=redshifts(50)), "50 redshifts for 60"),
    "cut out of a larger box": (lambda p: write_v3(p, user={"HII_DIM": 16}), "the cube is 8 x 8 x 60, expected (x, y, t) with a sky of 16 x 16"),
    "box of no size": (lambda p: write_v3(p, user={"BOX_LEN": np.nan}), "cells of nan Mpc"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_file_is_one_sentence_and_the_rest_is_converted(tmp_path, case):
    bad = tmp_path / "bad.npz"                                             # np.savez would add the ending to any other name
    write, words = BAD[case]
    write(bad)
    report = dl.convert([write_v3(tmp_path / "good1", seed=1), bad, write_v3(tmp_path / "good2", seed=2)], tmp_path / "store", bins=50)
    assert [e["status"] for e in report] == ["kept", "skipped", "kept"]
    assert words in report[1]["reason"] and "\n" not in report[1]["reason"] and str(bad) not in report[1]["reason"]
    store = dl.read_store(tmp_path / "store")
    assert len(store.names) == 2 and all(np.isfinite(store.slices(name, 0, 50)).all() for name in store.names)


@needs_shared
def test_shared_files_agree_with_each_other():
    a, b = dl.read_lightcone(SHARED / "native_v3_0.h5"), dl.read_lightcone(SHARED / "npz" / "lc_0000.npz")
    assert np.array_equal(a.cube.astype(np.float16), b.cube.astype(np.float16)) and np.array_equal(a.parameters, b.parameters) and a.seed == b.seed
    np.testing.assert_allclose(a.redshifts, b.redshifts, atol=0.005)      # ours from distances, theirs from astropy
    assert [a.cell_sky, a.cell_los, b.cell_sky, b.cell_los] == pytest.approx([40 / 28] * 4, rel=0.001)
    v4 = dl.read_lightcone(SHARED / "native_v4_0.h5")
    assert v4.redshifts[-1] == pytest.approx(5.6, abs=0.02) and np.isnan(v4.parameters).tolist() == [True, False, False, False, True, False]


@needs_shared
def test_convert_shared_files(tmp_path, capsys):
    files = sorted(SHARED.glob("*.h5")) + sorted(SHARED.glob("npz/*.npz"))
    dl.main(["convert", *map(str, files), "--out", str(tmp_path / "s")])
    report = {Path(e["file"]).name: e for e in json.loads((tmp_path / "s" / "convert.json").read_text())}
    assert len(report) == 44 and "44 files: 29 kept" in capsys.readouterr().out
    assert report["lc_0021.npz"]["status"] == "dropped" and "not reionised" in report["lc_0021.npz"]["reason"]
    assert report["lc_0058.npz"]["status"] == "dropped" and "optical depth" in report["lc_0058.npz"]["reason"]
    assert "same seed" in report["lc_0000.npz"]["reason"]                  # the same simulation as native_v3_0.h5
    assert report["native_v4_0.h5"]["reason"] == "starts at z = 5.60, the store at 5.00"
    data = dl.GlobalSignals(tmp_path / "s", "train")
    assert "29 of 29" in data.note
    npz = dl.GlobalSignals(SHARED / "signals.npz", "train")
    assert npz.signals.shape == (len(npz), 47) and "extreme history" in npz.note
    with np.load(SHARED / "signals.npz") as f:                             # by hand, for one row
        row = {dl.name_of(s, [f[k][i] for k in dl.PARAMETERS], (2350,)): i for i, s in enumerate(f["seed"])}[npz.names[3]]
        hand = f["signal"][row][::-1].reshape(47, 50).mean(1)
    np.testing.assert_allclose(npz.signals[3].numpy() * npz.norm[1] + npz.norm[0], hand, atol=1e-3)


# ------------------------------------------------------------------------------------------------------------------------------------------ filter

def test_optical_depth():
    z = np.array([30, 7.69, 7.68, 5])                                     # Planck 2018, instantaneous: z_re = 7.68 +- 0.79 for tau = 0.0544 (arXiv:1807.06209, tab. 2)
    assert dl.optical_depth(z, np.array([1, 1, 0, 0]), 0.311, 5.0) == pytest.approx(0.0544, abs=0.002)
    never = dl.optical_depth(np.array([30.0, 5]), np.array([1.0, 1]), 0.311, 5.0)      # nothing ionised above the lightcone's end: the part below counts as ionised
    from scipy.integrate import quad
    h0, n_h = 67.66e5 / 3.0857e24, 0.75095 * 0.02242 * 1.878e-29 / 1.6726e-24          # 1/s; X rho_b / m_p with X = 1 / (1 + 4 x 0.083)
    def f(z):
        return 2.998e10 * 6.652e-25 * n_h * (1 + z) ** 2 / (h0 * np.sqrt(0.311 * (1 + z) ** 3 + 0.689)) * (1.083 + 0.083 * (z < 3))
    assert never == pytest.approx(quad(f, 0, 3)[0] + quad(f, 3, 5)[0], rel=0.005)


def test_filter_and_its_thresholds(tmp_path):
    late = write_v3(tmp_path / "late", history=np.array([1.0, 1, 1, 1, 1, 0.9, 0.5, 0.3]), seed=1)
    early = write_v3(tmp_path / "early", history=np.array([1.0, 0.9, 0, 0, 0, 0, 0, 0]), seed=2)
    unknown = write_v3(tmp_path / "unknown", history=None, seed=3)
    report = dl.convert([late, early, unknown], tmp_path / "s", bins=50)
    assert [e["status"] for e in report] == ["dropped", "dropped", "kept"]
    assert "not reionised: mean neutral fraction 0.30 > 0.1" in report[0]["reason"] and "optical depth" in report[1]["reason"]
    assert "unfiltered" in " ".join(report[2]["notes"])
    assert [e["status"] for e in dl.convert([late, early], tmp_path / "s", bins=50, tau_sigma=50, max_x_hi=0.5)] == ["kept", "kept"]


# ------------------------------------------------------------------------------------------------------------------------------------------ the store

def test_convert_continues_and_finds_duplicates(tmp_path):
    a, b, c = (write_v3(tmp_path / n, cube(seed=i), seed=i) for i, n in enumerate("abc"))
    copy = write_v3(tmp_path / "copy", cube(seed=0), seed=0)
    dl.convert([a, b], tmp_path / "s", bins=50)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "s").iterdir()}
    report = dl.convert([a, b, c, copy], tmp_path / "s", bins=50)
    assert [e["status"] for e in report] == ["there", "there", "kept", "skipped"] and "same seed and parameters as a" in report[3]["reason"]
    store = dl.read_store(tmp_path / "s")
    assert {Path(s).name for s in store.source} == {"a", "b", "c"} and store.names == sorted(store.names)
    assert all((tmp_path / "s" / name).stat().st_mtime_ns == t for name, t in before.items())
    for name, seed, signal in zip(store.names, store.seed, store.global_signal):
        np.testing.assert_array_equal(store.slices(name, 0, 50), np.moveaxis(cube(seed=seed)[:, :, :50], 2, 0)[::-1].astype(np.float16))
        np.testing.assert_allclose(signal, store.slices(name, 0, 50).astype(float).mean((1, 2)), rtol=1e-4)
    assert store.signal_end[0] == 45 and (store.T, store.sky, store.cell_sky, store.cell_los) == (50, 8, 2.5, pytest.approx(2.5, rel=1e-4))


def test_unknown_seeds_are_told_apart_by_the_cube(tmp_path):
    a, copy, b = (write_npz(tmp_path / f"{n}.npz", cube(seed=s), drop=("seed",)) for n, s in (("a", 0), ("copy", 0), ("b", 1)))
    report = dl.convert([a, copy, b], tmp_path / "s", bins=50)
    assert [e["status"] for e in report] == ["kept", "skipped", "kept"] and "the same simulation" in report[1]["reason"]
    assert [e["status"] for e in dl.convert([a, b], tmp_path / "s", bins=50)] == ["there", "there"]


def test_mixed_sky_sizes_and_bins(tmp_path):
    files = [write_v3(tmp_path / "a", cube(sky=8), seed=1), write_v3(tmp_path / "b", cube(sky=10), seed=2), write_v3(tmp_path / "c", cube(sky=8), seed=3)]
    report = dl.convert(files, tmp_path / "s", bins=50)
    assert [e["status"] for e in report] == ["kept", "skipped", "kept"] and "10 x 10 on the sky, the store has 8 x 8" in report[1]["reason"]
    assert {e["reason"] for e in dl.convert([files[0]], tmp_path / "s", bins=40)} == {"40 slices, the store has 50"}


def test_what_cannot_be_in_one_store(tmp_path):
    """Another start, cell, cosmology or option: the commonest wins an empty store, and a store decides for what comes later."""
    odd = {"b": ({"z_low": 5.5}, "starts at z = 5.50, the store at 5.00"), "c": ({"z_low": 7.0, "nodes": NODES + 2}, "starts at z = 7.00, the store at 5.00"),
           "d": ({"cell": 20.0}, "cells of 20 Mpc, the store's 2.5"), "e": ({"cosmo": {"hlittle": 0.7}}, "made with h = 0.7, the store with 0.6766"),
           "f": ({"cosmo": {"SIGMA_8": 0.9}}, "made with sigma_8 = 0.9, the store with 0.8102"),
           "g": ({"flags": {"INHOMO_RECO": True}}, "made with INHOMO_RECO True, the store with the usual options")}
    files = [write_v3(tmp_path / name, seed=i, **how) for i, (name, (how, _)) in enumerate(odd.items(), 1)]
    usual = [write_v3(tmp_path / f"usual{i}", seed=20 + i, cosmo={"OMb": 0.04897 * (1 + i * 1e-3)}) for i in range(2)]                # 0.2% is equal
    report = dl.convert([*files, *usual], tmp_path / "s", bins=50, tau_sigma=50)
    assert [e["reason"] for e in report] == [reason for _, reason in odd.values()] + ["", ""]
    for i, file in enumerate(files):                                       # each in a store of its own: kept, with a note
        own, = dl.convert([file], tmp_path / f"own{i}", bins=50, tau_sigma=50)
        assert own["status"] == "kept" and ("not as in the paper" in " ".join(own["notes"])) == (i >= 3)
        again, = dl.convert([usual[0]], tmp_path / f"own{i}", bins=50)
        assert again["status"] == "skipped" and again["reason"]
    mixed = next((tmp_path / "own0").glob("*.h5"))                         # put there by hand
    mixed.rename(tmp_path / "s" / mixed.name)
    with pytest.raises(ValueError, match=rf"{mixed.name} .*cannot be in one store|cannot be in one store .*{mixed.name}"):
        dl.read_store(tmp_path / "s")


def check_rows(path):
    """Every row of a store of `small_row`s is whole; returns how many there are."""
    store = dl.read_store(path)
    for name, seed, p, source in zip(store.names, store.seed, store.parameters, store.source):
        np.testing.assert_array_equal(store.slices(name, 0, 100), small_row(seed, p)["brightness_temp"])
        assert source == f"row {seed}" and name == dl.name_of(seed, p, (100, 8))
    return len(store.names)


def test_killed_at_a_write(tmp_path):
    """A process that dies at its k-th system call on the file, for every k: the row is there, whole, or it is not; the next command removes what is left over."""
    path = tmp_path / "s"
    make_store(path, 3)
    calls = multiprocessing.get_context("fork").Value("i")

    def child(k, i):
        calls.value = 0

        def deadly(real):
            def call(*args):
                if calls.value == k:
                    os._exit(9)
                calls.value += 1
                return real(*args)
            return call
        for name in ("fsync", "chmod", "replace", "unlink"):
            setattr(os, name, deadly(getattr(os, name)))
        p = np.array(list(GOOD.values()))
        dl.save_row(path, dl.name_of(i, p, (100, 8)), small_row(i, p))
        os._exit(0)

    outcomes = []
    for k in range(4):
        p = multiprocessing.get_context("fork").Process(target=child, args=(k, 100 + k))
        p.start()
        p.join()
        outcomes.append((p.exitcode, check_rows(path)))
    assert outcomes == [(9, 3), (9, 3), (9, 3), (9, 4)]                   # before fsync, chmod, replace; and after
    mine = path / f".mine.h5.{platform.node()}-{os.getpid()}.tmp"                            # somebody is writing this one
    mine.touch()
    assert len(list(path.glob(".*.tmp"))) == 4
    dl.open_for_adding(path, 0)
    assert list(path.glob(".*.tmp")) == [mine]
    os.utime(mine, (0, 0))                                                 # a number that is in use again, or of another machine, long ago
    dl.open_for_adding(path, 0)
    assert not list(path.glob(".*.tmp"))


SIMULATE = [sys.executable, str(SCRIPT), "simulate", "--sky", "4", "--bins", "94"]


def same_rows(a, b):
    a, b = dl.read_store(a), dl.read_store(b)
    assert a.names == b.names
    for name in a.names:
        np.testing.assert_array_equal(a.slices(name, 0, a.T), b.slices(name, 0, b.T))
    for column in ("parameters", "redshifts", "global_signal", "history", "tau", "x_hi_end", "passed", "signal_end", "seed", "source", "cosmology"):
        np.testing.assert_array_equal(getattr(a, column), getattr(b, column))
    return a


def test_kill_9_of_simulate(tmp_path):
    """`simulate` and kill -9 of the parent alone: its workers end, nothing is lost, and the end is as if nothing had happened."""
    psutil = pytest.importorskip("psutil")
    command, done = [*SIMULATE, "-n", "16", "--workers", "2", "--out"], 0
    for _ in range(2):
        p = subprocess.Popen([*command, str(tmp_path / "killed")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
        while p.poll() is None and len(list((tmp_path / "killed").glob("*.h5"))) < done + 2:
            time.sleep(0.02)
        children = psutil.Process(p.pid).children(recursive=True) if p.poll() is None else []
        p.kill()
        p.wait()
        assert not psutil.wait_procs(children, timeout=20)[1]
        done = len(dl.read_store(tmp_path / "killed").names)
    (tmp_path / "killed" / f".0123.h5.{platform.node()}-4194999.tmp").write_bytes(b"half a lightcone")
    for name in ("killed", "whole"):
        subprocess.run([*command, str(tmp_path / name)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    assert len(same_rows(tmp_path / "killed", tmp_path / "whole").names) == 16
    assert all(p.suffix == ".h5" for p in (tmp_path / "killed").iterdir())


def test_many_add_while_one_reads(tmp_path):
    """Two `simulate` and one `convert` into one store at the same time, and a training's reader that draws all the while."""
    files = [write_v3(tmp_path / f"native{i}", cube(bins=94, sky=4, seed=i), seed=10**8 + i, cell=50.0, history=REIONISED_AT_8, los=2350 / 94 * dl.CELL) for i in range(12)]
    store = tmp_path / "s"
    dl.simulate(store, 4, sky=4, bins=94, workers=1, tau_sigma=1e9, max_x_hi=1.0)
    data = dl.SubLightcones(store, "train")
    expected = [data[0, i] for i in range(len(data))]
    jobs = [subprocess.Popen([*SIMULATE, "-n", "8", "--workers", "1", "--seed", str(seed), "--out", str(store)], stdout=subprocess.DEVNULL,
                             stderr=subprocess.PIPE, env=ENVIRONMENT) for seed in (1, 2)]
    jobs.append(subprocess.Popen([sys.executable, str(SCRIPT), "convert", *map(str, files), "--bins", "94", "--out", str(store)], stdout=subprocess.DEVNULL,
                                 stderr=subprocess.PIPE, env=ENVIRONMENT))
    draws = 0
    while any(job.poll() is None for job in jobs):
        for i, item in enumerate(expected):
            assert all(torch.equal(a, b) for a, b in zip(data[0, i], item))
            draws += 1
        dl.read_store(store)                                               # whole, however far the others are
    for job in jobs:
        assert job.returncode == 0, job.stderr.read().decode()[-2000:]
    after = dl.read_store(store)
    assert len(after.names) == 4 + 8 + 8 + 12 and draws > 20
    for name, seed in zip(after.names, after.seed):                        # every row whole
        if seed >= 10**8:
            image = cube(bins=94, sky=4, seed=seed - 10**8)
            np.testing.assert_array_equal(after.slices(name, 0, 94), np.moveaxis(image, 2, 0)[::-1].astype(np.float16))
        else:
            again = dl.simulate_fast(after.parameters[after.names.index(name)], [seed // 10**6, seed % 10**6 - 1], 4, 94)
            np.testing.assert_allclose(after.slices(name, 0, 94), again.cube.astype(np.float16), rtol=1e-2, atol=0.1)
    same = dl.SubLightcones(store, "train", names=data.split_names)        # a run goes on with its own lightcones
    assert same.names == data.names and torch.equal(same[0, 0][0], expected[0][0])


@needs_shared
def test_one_simulation_as_npz_and_native_file_by_two_processes_at_once_is_one_row(tmp_path):
    jobs = [subprocess.Popen([sys.executable, str(SCRIPT), "convert", str(SHARED / file), "--out", str(tmp_path / "s")], stdout=subprocess.DEVNULL, env=ENVIRONMENT)
            for file in ("native_v3_0.h5", "npz/lc_0000.npz")]
    for job in jobs:
        job.wait()
    assert 0 in [job.returncode for job in jobs] and len(dl.read_store(tmp_path / "s").names) == 1


def test_rows_that_others_put_or_changed(tmp_path):
    path = make_store(tmp_path / "s", 3)
    row = min(path.glob("*.h5"))
    (path / f"._{row.name}").write_bytes(b"of macOS")
    copy = Path(shutil.copy(row, path / "copy of it.h5"))                  # it could be in both the training and the test part
    with pytest.raises(ValueError, match=f"{copy.name}: is not called as it was written: is it a copy"):
        dl.read_store(path)
    copy.unlink()
    about = json.loads(dict(h5py.File(row).attrs)["about"])
    for key, value in (("passed", 2), ("signal_end", 3.5), ("cosmology", [0, 0, 0, 0]), *((key, None) for key in about)):
        with h5py.File(row, "a") as f:
            f.attrs["about"] = json.dumps({k: v for k, v in (about | {key: value}).items() if v is not None})
        with pytest.raises(ValueError, match=row.name):
            dl.read_store(path)


def test_another_lightcone_of_the_same_path_is_converted(tmp_path):
    for seed in (1, 2, 2):
        report = dl.convert([write_v3(tmp_path / "lc.h5", cube(seed=seed), seed=seed)], tmp_path / "s", bins=50)
    assert report[0]["status"] == "there" and sorted(dl.read_store(tmp_path / "s").seed) == [1, 2]


def test_a_file_is_no_store(tmp_path):
    (tmp_path / "old.h5").write_bytes(b"as earlier versions wrote it")
    for read in (dl.read_store, lambda p: dl.SubLightcones(p, "train"), lambda p: dl.GlobalSignals(p, "train"), lambda p: dl.simulate(p, 1),
                 lambda p: dl.convert([write_v3(tmp_path / "a")], p, 50)):
        with pytest.raises(ValueError, match="is a file, as earlier versions wrote"):
            read(tmp_path / "old.h5")


def test_disk_full(tmp_path):
    """A file size limit stands for the full disk: one line, exit status 2, what is whole stays, and the same command goes on when there is room."""
    def limit():
        import signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))

    small, big = (write_v3(tmp_path / name, cube(bins=bins, sky=6, seed=seed), seed=seed) for name, bins, seed in (("a", 60, 1), ("b", 60, 2)))
    dl.convert([small], tmp_path / "s", bins=60)
    commands = [[sys.executable, str(SCRIPT), "convert", str(small), str(big), "--bins", "60", "--out", str(tmp_path / "s")],
                [*SIMULATE, "-n", "3", "--workers", "2", "--sky", "10", "--out", str(tmp_path / "simulated")]]
    for command, rows in zip(commands, (2, 3)):
        full = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, preexec_fn=limit)
        errors = [line for line in full.stderr.splitlines() if "%|" not in line and line.strip()]
        assert full.returncode == 2 and len(errors) == 1 and "could not be written" in errors[0] and ".h5" in errors[0], full.stderr
        assert not list(Path(command[-1]).glob(".*")) and len(list(Path(command[-1]).glob("*.h5"))) < rows
        subprocess.run(command, check=True, capture_output=True, env=ENVIRONMENT)
        assert len(dl.read_store(command[-1]).names) == rows


def test_no_room_is_said_before_anything_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(dl.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    for work in (lambda: dl.simulate(tmp_path / "s", 2), lambda: dl.convert([write_v3(tmp_path / "a")], tmp_path / "s", bins=50)):
        with pytest.raises(OSError, match="1e-09 GB are free, .* GB are needed"):
            work()
    assert not list((tmp_path / "s").iterdir())


@pytest.mark.parametrize("error", [95, 37, 38])
def test_a_file_system_without_locks(tmp_path, error):
    """ENOTSUP, ENOLCK, ENOSYS of flock, as on Lustre, NFS, DVS."""
    source, library = tmp_path / "noflock.c", tmp_path / "noflock.so"
    source.write_text('#include <errno.h>\n#include <stdlib.h>\nint flock(int fd, int how) { errno = atoi(getenv("FLOCK_ERRNO")); return -1; }\n')
    if subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(library), str(source)], capture_output=True).returncode:
        pytest.skip("no C compiler")
    code = f"""
import sys; sys.path.insert(0, {str(SCRIPT.parent)!r})
import data_lightcone as dl
report = dl.convert([{str(write_v3(tmp_path / "a"))!r}], {str(tmp_path / "s")!r}, bins=50)
assert report[0]["status"] == "kept", report
assert len(dl.read_store({str(tmp_path / "s")!r}).names) == 1"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT | {"LD_PRELOAD": str(library), "FLOCK_ERRNO": str(error)})
    assert done.returncode == 0, done.stderr[-1500:]


def test_errors_are_one_line_and_status_2(tmp_path, capsys):
    (tmp_path / "text.h5").write_text("no store")
    make_store(tmp_path / "store", 3, T=50)
    make_store(tmp_path / "foreign", 3)
    h5py.File(tmp_path / "foreign" / "other.h5", "w").close()
    for arguments, words in [(["inspect", tmp_path / "none"], "no such store"), (["inspect", tmp_path / "text.h5"], "is a file, as earlier versions wrote"),
                             (["inspect", tmp_path / "foreign"], "other.h5: is not a lightcone of a store"),
                             (["convert", tmp_path / "text.h5", "--out", tmp_path / "x"], "neither HDF5 nor .npz"),
                             (["simulate", "-n", "2", "--out", tmp_path / "store"], "choose another --out"),
                             (["simulate", "--box", "20", "--out", tmp_path / "x"], "cannot be filled"),
                             (["simulate", "--sky", "500", "--out", tmp_path / "x"], "cannot be filled"),
                             (["simulate", "--backend", "21cmfast", "--python", "/nowhere/python", "--out", tmp_path / "y"], "no 21cmFAST")]:
        with pytest.raises(SystemExit) as e:
            dl.main([str(a) for a in arguments])
        error = capsys.readouterr().err.strip().splitlines()
        assert e.value.code == 2 and len([line for line in error if line.startswith("error:")]) == 1 and words in error[-1]
    assert not (tmp_path / "x").exists()
    for flags in ("-n 0", "-n 1.5", "--sky -1", "--sky 0", "--bins 0", "--box nan", "--box inf", "--box 0", "--workers 0", "--seed -1", "--step 1", "--tau-sigma -1",
                  "--tau-sigma nan", "--max-xhi 2"):
        with pytest.raises(SystemExit) as e:
            dl.main(["simulate", *flags.split()])
        assert e.value.code == 2 and flags.split()[0] in capsys.readouterr().err
    for value in ("0", "-5", "x"):
        with pytest.raises(SystemExit):
            dl.main(["convert", "file", "--bins", value])


# ------------------------------------------------------------------------------------------------------------------------------------------ right, or refused by name

def reason_of(path):
    with pytest.raises(ValueError) as e:
        dl.read_lightcone(path, 50)
    assert str(e.value).startswith(f"{path}: ") and "\n" not in str(e.value)
    return str(e.value).removeprefix(f"{path}: ")


def test_unfinished_lightcones(tmp_path):
    """By the checkpoint's attributes of either version, else by slices that are all zero where the history says neutral."""
    assert reason_of(write_v4(tmp_path / "a", root={"last_completed_node": 3})) == "unfinished: stopped at z = 9.0 (node 4 of 8)"
    assert reason_of(write_v3(tmp_path / "b", root={"current_redshift": 9.0, "current_index": 20})) == "unfinished: stopped at z = 9.0 (node 4 of 8)"
    for write, root in ((write_v4, {"last_completed_node": 7}), (write_v3, {"current_redshift": 5.0, "current_index": 59})):
        assert dl.read_lightcone(write(tmp_path / "c", root=root), 50).notes.count("unfinished") == 0              # a checkpoint of the end
    image = cube()
    image[:, :, :40] = 0
    whole = np.array([1.0, 1, 1, 1, 1, 1, 0.9, 0.8])                       # the history of the file ...
    stopped = np.array([1.0, 1, 1, 1, 1, 1, 0.9, 0])                       # ... or only as far as it got
    for history in (whole, stopped):
        assert "unfinished" in reason_of(write_v3(tmp_path / "d", image, history=history, cell=20.0)) and "all zero" in reason_of(tmp_path / "d")
    image = cube() - 1
    image[:, :, 45:] = 0
    assert "all zero" in reason_of(write_npz(tmp_path / "e.npz", image, xH=whole))                                  # at the high end
    dl.read_lightcone(write_npz(tmp_path / "f.npz"), 50)                   # ionised slices are all zero, too


@needs_cases
def test_cases_of_unfinished_lightcones():
    assert reason_of_case("01/interrupted.h5") == reason_of_case("01/stopped.h5") == "unfinished: stopped at z = 8.6 (node 15 of 20)"
    assert dl.read_lightcone(CASES / "01/whole.h5", 120).notes == []


def reason_of_case(name):
    with pytest.raises(ValueError) as e:
        dl.read_lightcone(CASES / name, 120)
    return str(e.value).removeprefix(f"{CASES / name}: ")


def test_slices_below_the_last_node(tmp_path):
    late = np.array([35.0, 20, 12, 10, 9, 8, 7, 5.2])
    for write in (write_v3, write_v4):
        assert "slices lie below the last node of its history (z = 5.20)" in reason_of(write(tmp_path / "a", nodes=late))
    assert "below the last node" in reason_of(write_npz(tmp_path / "a.npz", node_z=late))
    x = np.array([1.0, 1, 1, 0.9, 0.4, 0.1, np.nan, np.nan])               # nodes that were never filled
    assert "below the last node" in reason_of(write_v4(tmp_path / "b", history=x))


def test_options_that_change_what_a_parameter_means(tmp_path):
    def known(path):
        lightcone = dl.read_lightcone(path, 50)
        return [k for k, v in zip(dl.PARAMETERS, lightcone.parameters) if np.isfinite(v)], " ".join(lightcone.notes)

    for write, rest in ((write_v3, ["m_WDM", "Om", "log10_T_vir", "zeta"]), (write_v4, ["Om", "log10_T_vir", "zeta"])):
        for off in (False, "False"):                          # a word, as other writers of HDF5 have it
            names, notes = known(write(tmp_path / "a", flags={"USE_TS_FLUCT": off}))
            assert names == rest
        assert names == rest and "log10_L_X unknown: USE_TS_FLUCT is off" in notes and "E_0 unknown: USE_TS_FLUCT is off" in notes
    names, notes = known(write_v4(tmp_path / "a", flags={"USE_X_RAY_HEATING": False}))
    assert names == ["Om", "log10_T_vir", "zeta"] and "USE_X_RAY_HEATING is off" in notes
    names, notes = known(write_v4(tmp_path / "a", flags={"X_RAY_Tvir_MIN": 4.0}))
    assert "log10_T_vir" not in names and "X_RAY_Tvir_MIN" in notes
    for option in ("USE_MASS_DEPENDENT_ZETA", "USE_MINI_HALOS", "USE_HALO_FIELD"):
        assert reason_of(write_v3(tmp_path / "a", flags={option: True})).startswith(f"lacks zeta: made with {option}")
    assert reason_of(write_v3(tmp_path / "a", cosmo={"wl": -0.9})) == "made with wl = -0.9, not flat LCDM"
    for write, flags in ((write_v3, {"INHOMO_RECO": True}), (write_v3, {"PHOTON_CONS": True}), (write_v3, {"POWER_SPECTRUM": 2}),
                         (write_v3, {"APPLY_RSDS": False}), (write_v3, {"X_RAY_SPEC_INDEX": 1.5}), (write_v4, {"F_STAR10": -1.0}),
                         (write_v4, {"RECOMB_MODEL": "homogeneous"}), (write_v3, {"HII_FILTER": 0}), (write_v4, {"HII_FILTER": "spherical-tophat"}),
                         (write_v3, {"NU_X_BAND_MAX": 10000.0}), (write_v4, {"LYA_MULTIPLE_SCATTERING": True}), (write_v4, {"PHOTON_CONS_TYPE": "z-photoncons"}), (write_v4, {"HMF": "PS"})):
        assert f"not as in the paper: {next(iter(flags))}" in known(write(tmp_path / "a", flags=flags))[1]
    usual = {"X_RAY_SPEC_INDEX": 1.0, "F_STAR10": -1.3, "RECOMB_MODEL": "none", "POWER_SPECTRUM": "EH", "HMF": "ST", "PHOTON_CONS_TYPE": "no-photoncons"}
    assert "not as in the paper" not in known(write_v4(tmp_path / "a", flags=usual))[1]


def test_what_is_no_brightness_temperature_in_mk(tmp_path):
    image = cube()
    for wrong, words in ((image - image.mean((0, 1)), "without its mean"), (np.log10(1 + np.abs(image)), "above 1.84 mK"), ((image + 32.5) / 65.4, "normalised"),
                         (np.where(image == image[0, 0, 9], 9999, image), "1 voxels are NaN"), (image.astype(complex), "complex128"), (image > -30, "normalised"),
                         (image * 0, "or empty?")):
        assert words in reason_of(write_v3(tmp_path / "a", wrong, history=None))
    assert "or empty?" in reason_of(write_v3(tmp_path / "a", image * 0, history=REIONISED_AT_8 * 0))      # 21cmFAST 4 before its first node: ionised, it says


def test_what_is_no_cosmology(tmp_path):
    for cosmo, words in (({"SIGMA_8": "0.81 (Planck)"}, "could not convert string to float: '0.81 (Planck)'"), ({"hlittle": 67.66}, "h, Omega_b, sigma_8, n_s are [67.66, "),
                         ({"OMb": 0.0}, "n_s are [0.6766, 0.0,"), ({"SIGMA_8": np.inf}, "0.04897, inf,"), ({"OMk": 0.1}, "made with OMk = 0.1, not flat")):
        assert words in reason_of(write_v3(tmp_path / "a", cosmo=cosmo))


def test_redshifts_and_optical_depth_come_from_the_files_own_cosmology(tmp_path):
    usual, other = (dl.read_lightcone(write_v3(tmp_path / "a", cosmo={"hlittle": h, "OMb": Ob}), 50) for h, Ob in ((0.6766, 0.04897), (0.75, 0.06)))
    assert other.redshifts[-1] == pytest.approx(5, abs=2e-3) and usual.notes == []
    z = dl.redshift_at(dl.comoving_distance(5.0, 0.3, 0.75) + 2.5 * 49, 0.3, 0.75)
    assert other.redshifts[0] == pytest.approx(z) and z > usual.redshifts[0] + 0.02
    assert dl.history_summary(other)[0] / dl.history_summary(usual)[0] == pytest.approx(0.75 / 0.6766 * 0.06 / 0.04897, rel=2e-3)       # tau ~ h Omega_b
    assert other.notes == ["not as in the paper: h 0.75 (the paper's 0.6766), Omega_b 0.06 (the paper's 0.04897)"]
    v4 = dl.read_lightcone(write_v4(tmp_path / "b"), 50)                    # no sigma_8
    assert np.isnan(v4.cosmology).tolist() == [False, False, True, False] and "does not say sigma_8" in " ".join(v4.notes)


@needs_cases
def test_cases_of_another_cosmology_spin_temperature_and_nodes():
    lightcone = dl.read_lightcone(CASES / "04/h70.h5", 120)
    np.testing.assert_allclose(lightcone.redshifts[[-1, 59, 0]], [5.000, 6.345, 8.159], atol=1e-3)
    assert np.isnan(dl.read_lightcone(CASES / "03/tsoff.h5", 120).parameters).tolist() == [False, False, True, True, False, False]
    fine, coarse = dl.read_lightcone(CASES / "07/nodes182.h5", 120), dl.read_lightcone(CASES / "07/nan_hist.h5", 120)
    assert dl.history_summary(fine)[0] == pytest.approx(0.056, abs=1e-3) and fine.history.shape == (2, 182) and fine.notes == []
    assert coarse.notes == ["1 nodes of the ionisation history are no numbers: left out"] and dl.history_summary(coarse)[0] == pytest.approx(0.056, abs=1e-3)


@needs_cases
def test_cases_of_other_ranges_and_cells(tmp_path):
    report = dl.convert(sorted((CASES / "05").glob("*.h5")), tmp_path / "s", bins=120)
    assert [e["reason"] for e in report] == ["", "starts at z = 5.50, the store at 5.00", "starts at z = 7.00, the store at 5.00", "cells of 5 Mpc, the store's 10",
                                             "cells of 20 Mpc, the store's 10"]


def test_many_nodes_are_thinned_for_the_store_only(tmp_path):
    nodes = np.geomspace(36, 5.95, 300) - 1
    x = 1 / (1 + np.exp(-(nodes - 7.8) / 0.35))
    lightcone = dl.read_lightcone(write_v3(tmp_path / "a", nodes=nodes, history=x), 50)
    row = dl.make_row(lightcone, "a")
    assert lightcone.history.shape == (2, 300) and np.isfinite(row["history"]).all() and row["tau"] == dl.optical_depth(nodes, x, 0.3, lightcone.redshifts[-1])
    np.testing.assert_allclose(row["history"][:, [0, -1]], lightcone.history[:, [0, -1]], rtol=1e-6)
    np.testing.assert_allclose(np.interp(8, row["history"][0, ::-1], row["history"][1, ::-1]), np.interp(8, nodes[::-1], x[::-1]), atol=0.01)


def test_nodes_in_any_order_and_with_nan(tmp_path):
    usual = dl.history_summary(dl.read_lightcone(write_v3(tmp_path / "a"), 50))
    assert dl.history_summary(dl.read_lightcone(write_v3(tmp_path / "b", nodes=NODES[::-1], history=REIONISED_AT_8[::-1]), 50)) == usual
    x = REIONISED_AT_8.copy()
    x[0] = np.nan
    for lightcone in (dl.read_lightcone(write_v4(tmp_path / "c", history=x), 50), dl.read_lightcone(write_npz(tmp_path / "c.npz", xH=x), 50)):
        assert lightcone.history.shape == (2, 7) and "1 nodes of the" in " ".join(lightcone.notes)
    assert "not a neutral fraction" in reason_of(write_v3(tmp_path / "d", history=REIONISED_AT_8 * 100))


def test_layouts_of_other_versions(tmp_path):
    """Up to 3.3.1 without distances; 4.x with buffer pixels at both ends; 4.2 with LOWRES_CELL_SIZE_MPC instead of BOX_LEN."""
    usual, early = dl.read_lightcone(write_v3(tmp_path / "a"), 50), dl.read_lightcone(write_v3(tmp_path / "b", drop=("distances",)), 50)
    np.testing.assert_allclose(early.redshifts, usual.redshifts)
    usual, cell = dl.read_lightcone(write_v4(tmp_path / "c"), 50), dl.read_lightcone(write_v4(tmp_path / "d", sizes={"LOWRES_CELL_SIZE_MPC": 2.5, "HII_DIM": 8}), 50)
    assert cell.cell_sky == usual.cell_sky == 2.5
    buffered = dl.read_lightcone(write_v4(tmp_path / "e", root={"lowz_buffer_pixels": 3, "highz_buffer_pixels": 4}), None)
    assert len(buffered.redshifts) == 53
    np.testing.assert_array_equal(buffered.cube, np.moveaxis(cube()[:, :, 3:56], 2, 0)[::-1])
    np.testing.assert_allclose(buffered.redshifts[::-1], redshifts()[3:56])


SIGNALS = dict(signal=np.random.default_rng(0).normal(-50, 20, (30, 94)), seed=np.arange(30), **dict(zip(dl.PARAMETERS, dl.draw_parameters(30, 1).T)))


@needs_shared
def test_signals_with_nan_or_rising_nodes(tmp_path):
    with np.load(SHARED / "signals.npz") as f:
        arrays = dict(f)
    usual, note = dl.split_names(SHARED / "signals.npz", "regression")
    assert "54 of 74" in note
    nan = arrays["xH"].copy()
    nan[:, 0] = np.nan
    for changes in ({"xH": nan}, {"node_z": arrays["node_z"][::-1], "xH": arrays["xH"][:, ::-1]}):
        np.savez(tmp_path / "x.npz", **arrays | changes)
        names, note = dl.split_names(tmp_path / "x.npz", "regression")
        assert "54 of 74" in note and names == usual


@pytest.mark.parametrize("changes, words", [
    ({"signal": SIGNALS["signal"][0]}, "1-dimensional"), ({"zeta": SIGNALS["zeta"][:5]}, "shape"), ({"zeta": np.array(["a"] * 30)}, "could not convert"),
    ({"signal": np.array([None] * 30, dtype=object)}, "Object arrays"), ({"signal": SIGNALS["signal"] / 1000}, "kelvin"), ({"Om": None}, "lacks 'Om'"),
    ({"signal": (SIGNALS["signal"] + 32.5) / 65.4}, "normalised"), ({"signal": np.where(np.arange(30)[:, None] == 3, -999, SIGNALS["signal"])}, "filled up"),
    ({"signal": np.where(np.arange(94) == 3, np.nan, SIGNALS["signal"])}, "NaN in the signal"), (dict(seed=np.zeros(30, int), **{k: np.full(30, SIGNALS[k][0]) for k in dl.PARAMETERS}), "twice"),
    ({"xH": np.ones((30, 4)), "node_z": np.ones(5)}, "shape"), ({"xH": np.ones((29, 5)), "node_z": np.ones(5)}, "histories")])
def test_bad_signals_are_one_line(tmp_path, changes, words):
    np.savez(tmp_path / "x.npz", **{k: v for k, v in (SIGNALS | changes).items() if v is not None})
    with pytest.raises(ValueError, match=words) as e:
        dl.GlobalSignals(tmp_path / "x.npz", "train")
    assert str(tmp_path / "x.npz") in str(e.value) and "\n" not in str(e.value)


# ------------------------------------------------------------------------------------------------------------------------------------------ the fast simulator

def fast(seed=0, sky=12, **changes):
    return dl.simulate_fast(list({**GOOD, **changes}.values()), seed, sky=sky)


def test_fast_simulator_signs():
    def tau(lc):
        return dl.history_summary(lc)[0]
    assert tau(fast(zeta=30)) < tau(fast(zeta=100)) < tau(fast(zeta=240))                            # more ionising photons: earlier
    assert tau(fast(log10_T_vir=4.1)) > tau(fast(log10_T_vir=4.7)) > tau(fast(log10_T_vir=5.2))      # only big haloes: later
    assert tau(fast(m_WDM=0.5)) < tau(fast(m_WDM=2)) <= tau(fast(m_WDM=9))                           # warm dark matter: later
    def trough(lc):
        return lc.cube.mean((1, 2)).min()
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
    def correlation(a, b):
        return (a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum())
    assert correlation(alive[1:], alive[:-1]) > 0.5 > 0.2 > abs(correlation(alive[30:], alive[:-30]))
    wrap = correlation(alive[:, 0], alive[:, -1])                                                    # neighbours across the edge ...
    assert wrap == pytest.approx(correlation(alive[:, 13], alive[:, 14]), abs=0.2) and wrap > 0.4   # ... are like neighbours inside


def test_parameters_can_be_regressed():
    """Ridge regression in a Gaussian kernel finds all six in signals held out, each fifth in turn. (Linear ridge does on the default grid, with less of a margin:
    the sign of T_b flips with heating. `bench_lightcone.py regress` shows both. Here cells are coarser, for speed.)"""
    P = dl.draw_parameters(1200, seed=1)
    with multiprocessing.get_context("spawn").Pool(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        lightcones = pool.starmap(signal_of, [(p, i) for i, p in enumerate(P)], chunksize=60)
    kept = np.array([ok for _, ok in lightcones])
    x = dl.normalise(torch.tensor(np.array([s for s, _ in lightcones])[kept]).reshape(-1, 47, 2).mean(2)).numpy()
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
    lc = dl.simulate_fast(p, [7, i], sky=8, bins=94)
    return lc.cube.mean((1, 2)), not dl.filter_reason(*dl.history_summary(lc))


def test_draws_are_space_filling_and_continue():
    a, b = dl.draw_parameters(256, 3), dl.draw_parameters(64, 3)
    np.testing.assert_array_equal(a[:64], b)
    unit = dl.to_unit(a)
    assert unit.min() >= 0 and unit.max() <= 1
    assert all(np.histogram(u, 16, (0, 1))[0].min() >= 12 for u in unit.T)                           # 16 in each of 16 bins, nearly exactly


def test_simulate_writes_continues_and_does_not_depend_on_workers(tmp_path, capsys):
    dl.simulate(tmp_path / "a", 3, sky=4, bins=94, workers=1, tau_sigma=1e9, max_x_hi=1.0)
    first = dl.simulate(tmp_path / "a", 6, sky=4, bins=94, workers=1, tau_sigma=1e9, max_x_hi=1.0)
    dl.simulate(tmp_path / "b", 6, sky=4, bins=94, workers=4, tau_sigma=1e9, max_x_hi=1.0)
    assert first["simulated"] == 3 and first["there_before"] == 3 and first["rows_in_store"] == 6
    store = same_rows(tmp_path / "a", tmp_path / "b")
    assert "not 21cmFAST" in store.source[0] and sorted(store.seed) == [1, 2, 3, 4, 5, 6]
    for experiment in ("regression", "generation"):                        # the split does not depend on who finished first
        assert dl.split_names(tmp_path / "a", experiment)[0] == dl.split_names(tmp_path / "b", experiment)[0]
    assert dl.simulate(tmp_path / "c", 1, sky=8, bins=94, box=40.0, workers=1)["simulated"] == 1
    small = dl.read_store(tmp_path / "c")
    assert (small.cell_sky, small.cell_los) == (5.0, pytest.approx(2350 / 94 * 200 / 140))
    with pytest.raises(ValueError, match="cells of 25 Mpc, the store's 5: choose another --out"):
        dl.simulate(tmp_path / "c", 2, sky=8, bins=94, box=200.0, workers=1)


# ------------------------------------------------------------------------------------------------------------------------------------------ 21cmFAST

FAKE = '''
import os, shutil, signal
__version__ = "3.4.0"
class Namespace(dict):
    __init__ = dict.__init__
UserParams = CosmoParams = AstroParams = FlagOptions = dict
class global_params: pass
open(os.environ["FAKE_LOG"], "a").write("started\\n")
def run_lightcone(random_seed, user_params, cosmo_params, astro_params, **_):
    print("chatter of the C code on stdout", flush=True)
    if random_seed == 2: os.kill(os.getpid(), signal.SIGSEGV)
    if random_seed == 3: raise RuntimeError("no convergence")
    class Lightcone:
        def save(self, fname, direc, clobber):
            import h5py
            path = shutil.copy(os.environ["FAKE_LOG"] + ".h5", os.path.join(direc, fname))
            with h5py.File(path, "a") as f:
                f.attrs["random_seed"] = random_seed
                f["_globals"].attrs["M_WDM"] = global_params.M_WDM
                f["cosmo_params"].attrs.update(cosmo_params)
                f["astro_params"].attrs.update(astro_params)
    return Lightcone()
'''


def install_fake(path, monkeypatch):
    (path / "py21cmfast.py").write_text(FAKE)
    write_v3(path / "log.h5", drop=("distances",))
    monkeypatch.setenv("PYTHONPATH", str(path))
    monkeypatch.setenv("FAKE_LOG", str(path / "log"))


def test_21cmfast_workers_survive_and_record_failures(tmp_path, monkeypatch, capsys):
    """A stand-in for the package that crashes on one draw and raises on another: the rest is there, failures are on record, workers are used again."""
    install_fake(tmp_path, monkeypatch)
    def run():
        return dl.simulate(tmp_path / "s", 6, "21cmfast", sky=8, bins=50, box=20.0, workers=1, keep=tmp_path / "native")
    counts = run()
    assert counts["simulated"] == 4 and counts["failed_now"] == 2
    failures = [json.loads(path.read_text()) for path in (tmp_path / "s").glob("*.failed.json")]
    assert {f["random_seed"]: f["reason"] for f in failures} == {2: "killed by SIGSEGV", 3: "RuntimeError: no convergence"}
    assert set(failures[0]["parameters"]) == set(dl.PARAMETERS)
    assert (tmp_path / "log").read_text().count("started") == 1 + 6                                  # the version, and a process a lightcone
    assert len(list((tmp_path / "native").iterdir())) == 4
    store = dl.read_store(tmp_path / "s")
    draws = dict(zip(store.seed.tolist(), store.parameters))
    for i, p in enumerate(dl.draw_parameters(6, 0)):
        if i + 1 in draws:
            np.testing.assert_allclose(draws[i + 1], p)
    assert run()["simulated"] == 0                                                                   # finished and failed ones are not run again
    report = dl.convert(sorted((tmp_path / "native").iterdir()), tmp_path / "s", bins=50)            # its own files are the rows that are there
    assert len(store.names) == 4 and {e["reason"].split(" as ")[0] for e in report} == {"same seed and parameters"}


def test_21cmfast_work_is_not_thrown_away(tmp_path, monkeypatch, capsys):
    """A lightcone that took hours and cannot be read stays where it is, and is not simulated again once it can."""
    install_fake(tmp_path, monkeypatch)
    def run(bins):
        return dl.simulate(tmp_path / "s", 1, "21cmfast", sky=8, bins=bins, box=20.0, workers=1, step=1.01)
    assert run(99)["failed_now"] == 1 and "fewer than --bins 99" in next((tmp_path / "s").glob("*.failed.json")).read_text()
    assert len(list((tmp_path / "s" / "native").iterdir())) == 1
    counts = run(50)
    assert counts["simulated"] == 1 and (tmp_path / "log").read_text().count("started") == 3         # the version twice, one lightcone
    assert not list((tmp_path / "s" / "native").iterdir())


def test_21cmfast_for_real(tmp_path, capsys):
    python = os.environ.get("PYTHON_21CMFAST", sys.executable)
    if subprocess.run([python, "-c", "import py21cmfast"], capture_output=True).returncode:
        pytest.skip("21cmFAST is not installed (PYTHON_21CMFAST may name a Python that has it)")
    counts = dl.simulate(tmp_path / "s", 1, "21cmfast", sky=16, bins=1000, box=16 / 0.7, step=1.2, workers=1, python=python)
    assert counts["simulated"] == 1


# ------------------------------------------------------------------------------------------------------------------------------------------ data sets

def test_splits():
    for n, experiment, sizes in [(5010, "regression", (3800, 960, 250)), (6000, "regression", (3800, 960, 250)), (1000, "regression", (760, 190, 50)),
                                 (3, "regression", (1, 1, 1)), (2500, "generation", (2025, 225, 250)), (100, "generation", (85, 10, 5)), (3, "generation", (1, 1, 1))]:
        names = [f"{i:05}" for i in range(n)]
        split = dl.divide(names, experiment, 0)
        parts = [split[s] for s in ("train", "validation", "test")]
        assert abs(len(parts[0]) - sizes[0]) <= 1 and tuple(map(len, parts))[1:] == pytest.approx(sizes[1:], abs=1)
        assert len(set().union(*parts)) == sum(map(len, parts)) and all(p == sorted(p) for p in parts)   # nobody in two parts
        assert split == dl.divide(names[::-1], experiment, 0)
    names = [f"{i:05}" for i in range(100)]
    assert dl.divide(names, "generation", 0) != dl.divide(names, "generation", 1)


def test_a_run_keeps_its_lightcones(tmp_path):
    path = make_store(tmp_path / "s", 20, T=94)
    for experiment, read in (("regression", dl.GlobalSignals), ("generation", dl.SubLightcones)):
        names, note = dl.split_names(path, experiment)
        assert "20 of 20" in note and names == read(path, "train").split_names
    regression, generation = dl.split_names(path, "regression")[0], dl.split_names(path, "generation")[0]
    before = dl.GlobalSignals(path, "test")
    make_store(path, 40, T=94)
    assert dl.split_names(path, "regression")[0] != regression
    after = dl.GlobalSignals(path, "test", names=regression)
    assert after.names == before.names == regression["test"] and torch.equal(after.signals, before.signals) and after.norm == before.norm
    assert dl.SubLightcones(path, "validation", names=generation).names == generation["validation"]
    for name in generation["train"][:2]:
        (path / f"{name}.h5").unlink()
    for read in (lambda: dl.SubLightcones(path, "test", names=generation), lambda: dl.GlobalSignals(path, "train", names=regression)):
        with pytest.raises(ValueError, match="2 of the lightcones that the run trains and tests with are gone"):
            read()
    with pytest.raises(ValueError, match="at least 3"):
        dl.split_names(make_store(tmp_path / "two", 2), "regression")


def test_global_signals(tmp_path):
    path = make_store(tmp_path / "s", 60, T=94)
    train, test = (dl.GlobalSignals(path, s) for s in ("train", "test"))
    assert train.signals.mean().abs() < 1e-5 and train.signals.std() == pytest.approx(1, rel=1e-3) and test.norm == train.norm
    store = dl.read_store(path)
    signal = store.slices(test.names[0], 0, 94).astype(float).mean((1, 2)).reshape(47, 2).mean(1)
    parameters = store.parameters[store.index[test.names[0]]]
    x, y = test.signals[0], test.parameters[0]
    np.testing.assert_allclose(x * test.norm[1] + test.norm[0], signal, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(y, dl.to_unit(parameters), rtol=1e-5)
    published = dl.GlobalSignals(path, "test", norm=dl.PUBLISHED_NORM)
    np.testing.assert_allclose(published.signals[0] * 65.4 - 32.5, signal, rtol=1e-3, atol=1e-2)
    assert dl.GlobalSignals(path, "train", tokens=94).signals.shape[1] == 94
    with pytest.raises(ValueError, match="cannot be averaged into 50"):
        dl.GlobalSignals(path, "train", tokens=50)


def test_rows_not_for_training_are_left_out(tmp_path):
    def edit(i, row):
        if i == 3:
            row["parameters"] = np.append(np.nan, row["parameters"][1:])
        if i == 4:
            row["parameters"] = np.append(row["parameters"][:5], 999)
        row["passed"] = i != 5
    path = make_store(tmp_path / "s", 20, T=94, edit=edit)
    store = dl.read_store(path)
    bad = {name for name, seed in zip(store.names, store.seed) if seed in (3, 4, 5)}
    for data in (dl.GlobalSignals, dl.SubLightcones):
        parts = [data(path, s) for s in ("train", "validation", "test")]
        assert "17 of 20" in parts[0].note and "1 with a parameter unknown, 1 outside the priors, 1 with an extreme history" in parts[0].note
        assert not bad & set().union(*[p.names for p in parts])


def test_transform_and_its_inverse():
    T = torch.tensor([-300, -1, 0, 0.5, 30])
    np.testing.assert_allclose(dl.normalise(T), [(-np.log(301) + 1.51) / 2.74, (-np.log(2) + 1.51) / 2.74, 1.51 / 2.74, (np.log(1.5) + 1.51) / 2.74,
                                                 (np.log(31) + 1.51) / 2.74], rtol=1e-5)
    np.testing.assert_allclose(dl.denormalise(dl.normalise(T)), T, rtol=1e-5, atol=1e-6)


def millikelvin(slices):
    return dl.denormalise(torch.as_tensor(slices)).numpy()


def test_sublightcones(tmp_path):
    path = make_store(tmp_path / "s", 40, T=160)                        # signal ends at 150: trimming to 198 does nothing here
    train, test = dl.SubLightcones(path, "train"), dl.SubLightcones(path, "test")
    chunks = (160 - 24) // 22 + 1                                          # 7 whole chunks; 160 - 7 * 22 = 6 slices are left for the test
    assert len(train) == len(train.names) * chunks and len(test) == len(test.names) * (chunks + 1)
    x, conditions = train[0, 8]
    assert x.shape == (12, 8, 8) and x.dtype == conditions.dtype == torch.float32 and conditions.shape == (7,)
    start = round(float(conditions[6]) * 160 + 80)                         # index = (t - T/2) / T
    assert 22 <= start <= 34
    name, store = train.names[1], dl.read_store(path)
    truth = store.slices(name, start, start + 12).astype(np.float32)
    np.testing.assert_allclose(conditions[:6], dl.to_unit(store.parameters[store.index[name]]), rtol=1e-5)
    np.testing.assert_allclose(np.sort(millikelvin(x).reshape(12, -1)), np.sort(truth.reshape(12, -1)), rtol=1e-3, atol=1e-3)          # the same voxels, elsewhere
    x, conditions = test[7]                                                # the partial last chunk of the first test lightcone
    assert len(x) == 6 and round(float(conditions[6]) * 160 + 80) == 154
    assert [(s, n) for r, s, n in test.windows() if r == test.names[0]] == [(s, 12) for s in range(0, 156, 12)] + [(156, 4)]


def test_trimming(tmp_path):
    path = make_store(tmp_path / "s", 10, T=300, edit=lambda i, row: row.update(signal_end=100))
    data = dl.SubLightcones(path, "test")
    assert set(data.length) == {148} and max(s + n for _, s, n in data.windows()) == 148              # 100 with signal, at most 48 all zero
    assert data[0][1][6] == pytest.approx((round(float(data[0][1][6]) * 300 + 150) - 150) / 300)      # T counts before trimming


def test_draws_depend_on_seed_epoch_and_index_only(tmp_path):
    path = make_store(tmp_path / "s", 20)
    data, again = dl.SubLightcones(path, "train", seed=5), dl.SubLightcones(path, "train", seed=5)
    pairs = [(e, i) for e in range(3) for i in range(len(data))]
    alone = [data[p] for p in pairs]
    for order in (pairs[::-1], pairs[1::2]):
        for p in order:
            assert all(torch.equal(a, b) for a, b in zip(again[p], alone[pairs.index(p)]))
    for context in ("fork", "spawn"):                                      # workers get copies by fork, pickles by spawn
        loader = torch.utils.data.DataLoader(data, batch_sampler=[pairs[i:i + 4] for i in range(0, len(pairs), 4)], num_workers=2, multiprocessing_context=context)
        x = torch.cat([batch[0] for batch in loader])
        assert torch.equal(x, torch.stack([a for a, _ in alone]))
    assert not torch.equal(data[0, 0][0], data[1, 0][0])
    validation = dl.SubLightcones(path, "validation")
    assert all(torch.equal(a, b) for i in range(len(validation)) for a, b in zip(validation[0, i], validation[9, i]))
    start = round(float(validation[0][1][6]) * 100 + 50)
    truth = validation.read(validation.names[0], start, 12)[0]
    np.testing.assert_array_equal(validation[0][0], truth)                 # not augmented


def test_augmentation_is_the_whole_group_and_acts_alike_on_all_slices(tmp_path):
    """On a sky of 4 x 4, all 8 rotations and mirror images times 16 shifts turn up and nothing else, and all slices move together."""
    a = np.full((100, 4, 4), 10.0)
    a[:, 0, 0], a[:, 0, 1], a[:, 1, 0] = 20, 30, 40                        # no symmetry
    path = make_store(tmp_path / "s", 10, T=100, sky=4, edit=lambda i, row: row.update(brightness_temp=a.astype("<f2"), signal_end=100))
    data, seen = dl.SubLightcones(path, "train"), set()
    expected = {np.roll(m, (i, j), (0, 1)).tobytes() for k in range(4) for m in (np.rot90(a[0], k), np.rot90(a[0], k).T) for i in range(4) for j in range(4)}
    for epoch in range(60):
        for i in range(len(data)):
            x = millikelvin(data[epoch, i][0]).round().astype(float)
            assert (x == x[0]).all()
            seen.add(x[0].tobytes())
    assert seen == expected and len(expected) == 128


def test_memory_does_not_grow_with_the_store(tmp_path):
    """300 GB of lightcones (sparse: never written): reading runs from all over needs no memory to speak of, and keeps no file open."""
    n = 3300
    make_sparse_store(tmp_path / "big", n)
    script = f"""
import os, sys, time, numpy as np; sys.path.insert(0, {str(SCRIPT.parent)!r})
import data_lightcone as dl
rss = lambda: int(open('/proc/self/statm').read().split()[1]) * 4096 / 1e6
start = time.time()
data = dl.SubLightcones({str(tmp_path / "big")!r}, 'train'); data[0, 0]; before, t = rss(), time.time()
for i in np.random.default_rng(0).integers(len(data), size=300): data[0, int(i)]
print(before, rss(), 3600 / (time.time() - t), len(data), len(os.listdir('/proc/self/fd')), t - start)"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    before, after, rate, chunks, files, index = map(float, done.stdout.split())
    print(f"{n * 2350 * 140 * 140 * 2 / 1e9:.0f} GB, {chunks:.0f} chunks: index {index:.1f} s, {before:.0f} MB before, {after:.0f} MB after 300 draws, {rate:.0f} slices/s")
    assert after - before < 60 and chunks > 250_000 and files < 20


def make_sparse_store(path, n, T=2350, sky=140):
    """n lightcones whose cubes are holes in their files."""
    path.mkdir()
    row = small_row(0, np.array(list(GOOD.values())), T, 4)
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    for i, p in enumerate(dl.draw_parameters(n, 0)):
        with h5py.File(path / f"{dl.name_of(i, p, (T, sky))}.h5", "w") as f:
            h5py.h5d.create(f.id, b"brightness_temp", h5py.h5t.IEEE_F16LE, h5py.h5s.create_simple((T, sky, sky)), dcpl=plist)
            for key, value in row.items():
                if key in dl.DATASETS[1:]:
                    f[key] = value
            about = {k: v for k, v in row.items() if k not in dl.DATASETS} | {"parameters": p, "seed": i, "passed": True, "signal_end": T}
            f.attrs["about"] = json.dumps(about, default=lambda number: number.tolist())


# ------------------------------------------------------------------------------------------------------------------------------------------ inspect

def test_inspect(tmp_path, capsys):
    dl.simulate(tmp_path / "s", 6, sky=8, bins=94, workers=1)
    capsys.readouterr()
    command = [sys.executable, str(SCRIPT), "inspect", str(tmp_path / "s"), "--out", str(tmp_path / "figures")]
    notebook = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}                           # of a notebook, of which this Python knows nothing
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT | notebook)
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads(done.stdout)
    assert summary["lightcones"] == 6 and summary == json.loads((tmp_path / "figures" / "summary.json").read_text())
    assert summary["cell_sky"] == 25 and summary["parameters"]["Om"]["unknown"] == 0
    figures = {f"{name}.{kind}" for name in ("signals", "lightcones", "power") for kind in ("png", "pdf")}
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {*figures, "summary.json"}


def test_power_spectrum_of_white_noise_is_flat():
    cell, sigma = 2.0, 3.0
    k, power = dl.power_spectrum(np.random.default_rng(0).normal(0, sigma, (200, 32, 32)), cell)
    np.testing.assert_allclose(power, k**2 * sigma**2 * cell**2 / (2 * np.pi), rtol=0.15)
