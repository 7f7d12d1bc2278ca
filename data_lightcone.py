"""21cm lightcones: simulate them, read anybody's, filter, store, look at them, and feed them to the L3M experiments.

A lightcone is the brightness temperature T_b(x, y, t) of neutral hydrogen in mK: two periodic directions on the sky and one along the line of sight, which is
cosmic time. Six parameters made it (table PRIORS below). The experiments are those of Heneka et al., arXiv:2506.14757: regress the six parameters from the
sky-averaged signal (`GlobalSignals`), and generate lightcones slice by slice (`SubLightcones`).

    python data_lightcone.py simulate -n 1000                     # the built-in fast simulator: 28 x 28 x 470, a few minutes on a laptop
    python data_lightcone.py simulate --backend 21cmfast -n 5000 --workers 32 --python ~/21cmfast/bin/python --out data/lightcones.h5
    python data_lightcone.py convert ~/my_lightcones/* --out data/lightcones.h5     # 21cmFAST v3 or v4 HDF5, .npz
    python data_lightcone.py inspect data/lightcones.h5           # counts and figures

Files that `convert` reads (told apart by content, not by name)
  21cmFAST v3 .h5   as LightCone.save writes it; m_WDM counts only where the global parameter P_CUTOFF is on
  21cmFAST v4 .h5   the same under InputParameters; no m_WDM
  named .npz        image (x, y, t from low z) in mK, scalars m_WDM, Om, log10_L_X, E_0, log10_T_vir, zeta; if there: z (t), xH over node_z, seed
  L3M release .npz  image and one array label or labels, in either of the two orders that its authors use; the values of L_X and E_0 tell which

The store that every command writes: one HDF5 file, N lightcones (rows) of T slices, FORWARD in cosmic time (highest z first)
  brightness_temp (N, T, X, Y) float16 mK    global_signal (N, T) float32 mK, its mean over the sky    redshifts (N, T) falling
  parameters (N, 6) float64, attribute `names`; NaN where the file's format cannot say      ionisation_history (N, 2, 128): z and mean x_HI, NaN after the end
  tau, x_hi_end (N,)  Thomson optical depth and neutral fraction at the low-z end (NaN: unknown)      passed (N,) False: an extreme history, not for training
  signal_end (N,)  slices up to the last that is not all zero      seed (N,), -1 unknown      cell_mpc (N,) cell size on the sky      source (N,) where the row is from
A row is one uncompressed chunk, so any run of slices is one contiguous read. For runs of 12 slices of 140 x 140, thousand slices/s from the page cache / from
disk (tests/bench_lightcone.py layout): this 222 / 11.2; chunks of 12 slices 81 / 8.5, with gzip and shuffle 2.6 / 2.2 (26% smaller), lzf 3.0 / 2.0 (14% smaller).

Why a store survives kill -9: HDF5 puts new data at the end of a file but changes its index in place, and a process killed between two such changes leaves a file
that nothing can open. So rows are added by a `Transaction`, a file object under h5py: new bytes go behind the old end of the file, where nothing points yet;
changes of old bytes are held back, written to a journal beside the store, and copied over the old ones when all else is on disk. A kill before the journal is
complete leaves the old store, a kill after it leaves a journal that the next command (reading or writing) copies once more. One file, one copy of the data at
any size, and it can grow at any time: 5,000 x 2350 x 140 x 140 is 461 GB."""
import argparse
import fcntl
import inspect as inspect_module                   # `inspect` is a command here
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import h5py
import numpy as np
import torch
from tqdm import tqdm

PARAMETERS = ("m_WDM", "Om", "log10_L_X", "E_0", "log10_T_vir", "zeta")                             # the order everywhere
PRIORS = np.array([[0.3, 10], [0.2, 0.4], [38, 42], [100, 1500], [4.0, 5.3], [10, 250]])            # (6, 2), uniform between the two
SYMBOLS = [r"$m_{\rm WDM}$", r"$\Omega_m$", r"$\log_{10} L_X$", "$E_0$", r"$\log_{10} T_{\rm vir}$", r"$\zeta$"]      # for figures
UNITS = ["keV", "", "erg/s/(Msun/yr)", "eV", "K", ""]
OMEGA_B, H, SIGMA_8, N_S = 0.04897, 0.6766, 0.8102, 0.9665                                           # Planck 2018, fixed; flat LCDM
N_HE = 0.083                                                                                          # helium atoms per hydrogen atom
TAU, TAU_SIGMA = 0.054, 0.007                                                                         # Planck 2018 optical depth
BINS, CELL = 2350, 200 / 140                                                                          # the paper's lightcones: bins, and Mpc a bin
HISTORY = 128                                                                                         # room for the nodes of an ionisation history
C, MPC, M_P, G, K_B = 2.99792458e10, 3.0857e24, 1.6726e-24, 6.6743e-8, 1.3807e-16                    # cgs
N_H = 3 * (H * 1e7 / MPC) ** 2 / (8 * np.pi * G) * OMEGA_B / (1 + 4 * N_HE) / M_P                     # hydrogen nuclei per cm^3 today


# ---------------------------------------------------------------------------------------------------------------------------------------------------- cosmology

def hubble(z, Om):
    """H(z) in 1/s. As astropy's Planck15, which 21cmFAST takes its distances from: photons, two massless neutrinos and one of 0.06 eV."""
    radiation, neutrino = 4.15e-5 * 0.8733 / H**2, 0.06 / 93.14 / H**2
    return H * 1e7 / MPC * np.sqrt((Om + neutrino) * (1 + z) ** 3 + radiation * (1 + z) ** 4 + 1 - Om - neutrino - radiation)


def comoving_distance(z, Om):
    """Comoving distance to redshift z (array or number) in Mpc."""
    grid = np.linspace(0, 45, 9001)
    f = C / hubble(grid, Om) / MPC
    return np.interp(z, grid, np.concatenate([[0], np.cumsum((f[1:] + f[:-1]) / 2 * np.diff(grid))]))


def redshift_at(distance, Om):
    """The inverse of `comoving_distance`."""
    grid = np.linspace(0, 45, 9001)
    return np.interp(distance, comoving_distance(grid, Om), grid)


def optical_depth(z, x_hi, Om, z_end):
    """Thomson optical depth of an ionisation history: mean neutral fraction x_hi at the falling redshifts z. Neutral above z[0], ionised below z_end, helium
    singly ionised with hydrogen and the second time at z = 3. tau = c sigma_T n_H integral of (1 - x_HI)(1 + y)(1 + z)^2 / H(z)."""
    grid = np.linspace(0, z[0], 4001)
    x = np.where(grid < z_end, 0, np.interp(grid, z[::-1], x_hi[::-1]))
    electrons = (1 - x) * (1 + N_HE) + N_HE * (grid < 3)                                              # per hydrogen nucleus
    return float(C * 6.6524e-25 * N_H * np.trapezoid(electrons * (1 + grid) ** 2 / hubble(grid, Om), grid))


def filter_reason(tau, x_hi_end, tau_sigma=5.0, max_x_hi=0.1):
    """Why this ionisation history is too extreme to train on: a sentence, or "" if it is not (or if the history is unknown)."""
    if abs(tau - TAU) > tau_sigma * TAU_SIGMA:                                                        # False for NaN
        return f"optical depth {tau:.3f} is not within {tau_sigma:g} sigma of Planck's {TAU} +- {TAU_SIGMA}"
    if x_hi_end > max_x_hi:
        return f"not reionised: mean neutral fraction {x_hi_end:.2f} > {max_x_hi:g} at the low-z end"
    return ""


def to_unit(parameters):
    """(..., 6) in physical units -> [0, 1] over the priors."""
    return (parameters - PRIORS[:, 0]) / (PRIORS[:, 1] - PRIORS[:, 0])


# ------------------------------------------------------------------------------------------------------------------------------------------------------ reading

class Lightcone(NamedTuple):
    cube: np.ndarray | None         # (T, X, Y) float32, mK, forward in time: high z first
    parameters: np.ndarray          # (6,) float64 in the order of PARAMETERS; NaN where the file's format cannot give one
    redshifts: np.ndarray           # (T,) falling
    history: np.ndarray | None      # (2, nodes): falling redshifts, mean neutral fraction
    seed: int                       # -1: unknown
    cell: float                     # cell size, Mpc
    sky: int                        # X = Y
    notes: list                     # what a user should know about this file, a sentence each


def read_lightcone(path, bins=BINS, cube=True):
    """Read the first `bins` line-of-sight bins (from low z; None: all) of a lightcone file in any of the formats above.

    cube=False leaves the cube unread (None) and is quick. Raises ValueError with one sentence when the file is broken, is of no known format, has the wrong axis
    order, too few bins, NaNs, or lacks a parameter that its format should have."""
    try:
        with open(path, "rb") as f:
            magic = f.read(8)
        if magic.startswith(b"\x89HDF"):
            with h5py.File(path, "r") as f:
                image, parameters, z, history, seed, cell, notes = _read_21cmfast(f)
                return _finish(image, parameters, z, history, seed, cell, notes, bins, cube)
        if magic.startswith(b"PK"):
            with np.load(path, allow_pickle=False) as f:
                image, parameters, z, history, seed, notes = _read_npz(f)
                return _finish(image, parameters, z, history, seed, None, notes, bins, cube)
    except KeyError as e:
        raise ValueError(f"{path}: lacks {e.args[0]}") from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise ValueError(f"{path}: {reason}" + ("; truncated or damaged, copy it again" if isinstance(e, (EOFError, zipfile.BadZipFile, zlib.error))
                                                or "truncated" in reason else "")) from None
    raise ValueError(f"{path}: neither HDF5 nor .npz" + (" (empty file)" if not magic else ""))


def _attribute(group, name):
    """An HDF5 attribute, or KeyError with its full name."""
    if name not in group.attrs:
        raise KeyError(f"{group.name.strip('/')}/{name}")
    return group.attrs[name]


def _read_21cmfast(f):
    if "brightness_temp" in f and "parameters" in f:
        raise ValueError("is a store that this program wrote, not a lightcone")
    v4 = "InputParameters" in f
    top = f["InputParameters"] if v4 else f
    if "astro_params" not in top:
        raise ValueError("HDF5, but not a 21cmFAST v3 or v4 lightcone (no group astro_params)")
    astro, notes = top["astro_params"], []
    options = (top["astro_options"] if v4 else f["flag_options"]).attrs
    if options.get("USE_MASS_DEPENDENT_ZETA", False) or (v4 and top["matter_options"].attrs.get("SOURCE_MODEL", "CONST-ION-EFF") != "CONST-ION-EFF"):
        raise ValueError("lacks zeta: made with mass-dependent ionising efficiency, where HII_EFF_FACTOR does not count")
    m_wdm = T_vir = np.nan
    if v4:
        notes.append("m_WDM unknown: 21cmFAST v4 has none")
    elif f["_globals"].attrs.get("P_CUTOFF", False):
        m_wdm = _attribute(f["_globals"], "M_WDM")
    else:
        notes.append("m_WDM unknown: P_CUTOFF is off")
    if options.get("M_MIN_in_Mass", False):
        notes.append("T_vir unknown: M_MIN_in_Mass is on, ION_Tvir_MIN does not count")
    else:
        T_vir = _attribute(astro, "ION_Tvir_MIN")
    Om = _attribute(top["cosmo_params"], "OMm")
    parameters = [m_wdm, Om, _attribute(astro, "L_X"), _attribute(astro, "NU_X_THRESH"), T_vir, _attribute(astro, "HII_EFF_FACTOR")]
    z = redshift_at(f["lightcone_distances" if v4 else "distances"][:], Om)
    name, x_name = ("InputParameters/node_redshifts", "neutral_fraction") if v4 else ("node_redshifts", "xH_box")
    history = np.stack([f[name][:], f["global_quantities"][x_name][:]]) if x_name in f.get("global_quantities", {}) else None
    user = top["simulation_options" if v4 else "user_params"]
    seed = (top if v4 else f).attrs.get("random_seed", -1)
    return f["lightcones/brightness_temp"], parameters, z, history, int(seed), _attribute(user, "BOX_LEN") / _attribute(user, "HII_DIM"), notes


def _read_npz(f):
    notes, label = [], [k for k in ("label", "labels") if k in f]
    if "image" not in f:
        raise ValueError("lacks image (and is not a lightcone .npz)")
    if label:                                                       # the L3M release
        p = np.asarray(f[label[0]], float).ravel()
        if p.shape != (6,):
            raise ValueError(f"{label[0]} has {p.size} values, expected six parameters")
        is_lx, is_e0 = [(PRIORS[i, 0] <= p[2:4]) & (p[2:4] <= PRIORS[i, 1]) for i in (2, 3)]
        if is_e0[0] and is_lx[1]:
            p[[2, 3]] = p[[3, 2]]
        elif not (is_lx[0] and is_e0[1]):
            raise ValueError(f"cannot tell the order of {label[0]}: one of its 3rd and 4th value must be log10 L_X (38 to 42), the other E_0 (100 to 1500 eV), "
                             f"found {p[2]:g} and {p[3]:g}")
    else:
        if missing := [k for k in PARAMETERS if k not in f]:
            raise ValueError(f"lacks {', '.join(missing)}")
        p = np.array([float(f[k]) for k in PARAMETERS])
    history = np.stack([f["node_z"], f["xH"]]) if "xH" in f and "node_z" in f else None
    return f, p, (f["z"].astype(float) if "z" in f else None), history, int(f["seed"]) if "seed" in f else -1, notes


def _finish(image, parameters, z, history, seed, cell, notes, bins, want_cube):
    """What all formats share: checks, the first bins, forward in time. `image` is an HDF5 data set or an open .npz that has one."""
    parameters = np.asarray(parameters, float)
    if isinstance(image, h5py.Dataset):
        shape = image.shape
    else:                                                           # the header of the array inside the zip: no need to unpack it to know its shape
        with image.zip.open("image.npy") as f:
            shape = (np.lib.format.read_array_header_1_0 if np.lib.format.read_magic(f) == (1, 0) else np.lib.format.read_array_header_2_0)(f)[0]
    if len(shape) != 3 or shape[0] != shape[1]:
        raise ValueError(f"wrong axis order: the cube is {' x '.join(map(str, shape))}, expected (x, y, t) with a square sky")
    bins = shape[2] if bins is None else bins
    if shape[2] < bins:
        raise ValueError(f"{shape[2]} line-of-sight bins, fewer than --bins {bins}")
    if z is None:                                                   # the L3M release
        if not 0 < parameters[1] < 1:
            raise ValueError(f"Om = {parameters[1]:g}, so the redshifts of the bins cannot be worked out")
        z = redshift_at(comoving_distance(5.0, parameters[1]) + CELL * np.arange(shape[2]), parameters[1])
        notes.append("no redshifts in the file: bins of 200/140 Mpc from z = 5")
    if len(z) != shape[2]:
        raise ValueError(f"{len(z)} redshifts for {shape[2]} line-of-sight bins")
    if not np.all(np.diff(z) > 0):
        raise ValueError("wrong axis order: redshift must rise along t (reverse the cube and z together)")
    if history is None:
        notes.append("no ionisation history: passes the filter unfiltered")
    else:
        history = np.asarray(history, float)[:, np.argsort(-np.asarray(history[0], float))]
        if not np.isfinite(history).all() or history.shape[1] > HISTORY:
            raise ValueError(f"ionisation history with NaNs or more than {HISTORY} nodes")
    if cell is None:                                                # cells are cubes
        cell = float(np.diff(comoving_distance(z[:2], parameters[1]))[0])
    cube = None
    if want_cube:
        cube = image[:, :, :bins] if isinstance(image, h5py.Dataset) else image["image"][:, :, :bins]
        cube = np.ascontiguousarray(np.moveaxis(cube, 2, 0)[::-1], dtype=np.float32)                  # (X, Y, t from low z) -> (T from high z, X, Y)
        if bad := cube.size - np.count_nonzero(np.abs(cube) < 65504):                                 # NaN, infinite, or beyond float16
            raise ValueError(f"{bad} voxels are NaN, infinite or beyond 65504 mK")
    return Lightcone(cube, parameters, z[:bins][::-1], history, seed, cell, shape[0], notes)


# ---------------------------------------------------------------------------------------------------------------------------------------------------- the store

PAGE = 4096


class Transaction:
    """A file object for h5py through which rows are added to a store, all or nothing (see the top of this file).

        with Transaction(path, room) as t:
            with h5py.File(t, "r+") as f: ...

    `room` bytes are reserved first: a full disk is found before anything is written. An exception leaves the store as it was."""

    def __init__(self, path, room):
        self.path, self.room, self.pages, self.at = Path(path), room, {}, 0

    def __enter__(self):
        self.file = open(self.path, "r+b", buffering=0)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)                                     # h5py's readers hold a shared lock
        except BlockingIOError:
            tqdm.write(f"{self.path} is open in another program: waiting", file=sys.stderr)
            fcntl.flock(self.file, fcntl.LOCK_EX)
        recover(self.path)
        self.size = self.old_size = self.file.seek(0, 2)
        self.border = -(-self.old_size // PAGE) * PAGE                                                # below it writes are held back, above it they are not
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self.file.fileno(), self.old_size, self.border - self.old_size + self.room)
        except OSError as e:
            os.ftruncate(self.file.fileno(), self.old_size)
            self.file.close()
            raise OSError(f"{self.path}: no room for {self.room / 1e6:.0f} MB more ({e.strerror}); the {self.old_size / 1e6:.0f} MB in it are safe, "
                          "free some space and run the same command again") from None
        return self

    def __exit__(self, error, *_):
        with self.file:                                                                               # closing it gives the lock back
            if error:
                os.ftruncate(self.file.fileno(), self.old_size)                                       # nothing below the old end was touched
                return
            os.fsync(self.file.fileno())
            temporary = Path(f"{self.path}.journal.tmp")
            with open(temporary, "wb") as f:
                pages = sorted(self.pages)
                np.savez(f, pages=pages, data=np.array([np.frombuffer(self.pages[p], np.uint8) for p in pages]), size=self.size)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, f"{self.path}.journal")                                             # from here on the new rows are in
            recover(self.path)

    def write(self, data):
        data = memoryview(data).cast("B")
        end = self.at + len(data)
        while self.at < min(end, self.border):
            number, first = divmod(self.at, PAGE)
            page = self.pages.setdefault(number, bytearray(os.pread(self.file.fileno(), PAGE, number * PAGE).ljust(PAGE, b"\0")))
            n = min(PAGE - first, end - self.at)
            page[first:first + n] = data[:n]
            self.at, data = self.at + n, data[n:]
        while len(data):
            n = os.pwrite(self.file.fileno(), data, self.at)
            self.at, data = self.at + n, data[n:]
        self.size = max(self.size, end)

    def read(self, n):
        buffer = bytearray(n)
        return bytes(buffer[:self.readinto(buffer)])

    def readinto(self, buffer):
        buffer = memoryview(buffer).cast("B")
        n = os.preadv(self.file.fileno(), [buffer], self.at)
        for number in range(self.at // PAGE, (self.at + n - 1) // PAGE + 1):
            if number in self.pages:
                a, b = max(self.at, number * PAGE), min(self.at + n, number * PAGE + PAGE)
                buffer[a - self.at:b - self.at] = self.pages[number][a - number * PAGE:b - number * PAGE]
        self.at += n
        return n

    def seek(self, offset, whence=0):
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def tell(self):
        return self.at

    def truncate(self, size):
        self.size = size

    def flush(self):
        pass                                                                                          # __exit__ decides what reaches the disk


def recover(path):
    """Finish a transaction whose journal is complete; harmless to do twice."""
    journal = Path(f"{path}.journal")
    if not journal.exists():
        return
    with np.load(journal) as j, open(path, "r+b", buffering=0) as f:
        for number, page in zip(j["pages"], j["data"]):
            os.pwrite(f.fileno(), page.tobytes(), int(number) * PAGE)
        os.ftruncate(f.fileno(), int(j["size"]))
        os.fsync(f.fileno())
    journal.unlink()


def create_store(path, T, sky):
    """An empty store, whole from its first moment."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(f"{path}.tmp{os.getpid()}")
    columns = dict(brightness_temp=((T, sky, sky), "f2"), global_signal=((T,), "f4"), parameters=((6,), "f8"), redshifts=((T,), "f4"),
                   ionisation_history=((2, HISTORY), "f4"), tau=((), "f4"), x_hi_end=((), "f4"), passed=((), "?"), signal_end=((), "i4"), seed=((), "i8"),
                   cell_mpc=((), "f4"), source=((), h5py.string_dtype()))
    with h5py.File(temporary, "w") as f:
        f.attrs["format"] = "nanophys lightcones 1: see the top of data_lightcone.py"
        for name, (shape, dtype) in columns.items():
            chunk = max(1, 8192 // max(1, int(np.prod(shape))))                                       # a cube is one chunk, small columns share one
            f.create_dataset(name, (0, *shape), dtype, maxshape=(None, *shape), chunks=(1 if name == "brightness_temp" else chunk, *shape))
        f["parameters"].attrs["names"] = list(PARAMETERS)
        f["parameters"].attrs["priors"] = PRIORS
    os.replace(temporary, path)


def open_store(path):
    """A store for reading, as h5py.File. Raises ValueError or OSError with one sentence if it is none."""
    if not Path(path).exists():
        raise OSError(f"{path}: no such store; make one with `python data_lightcone.py simulate` or `convert`")
    recover(path)
    try:
        f = h5py.File(path, "r", rdcc_nbytes=0)                                                       # no chunk cache: read the slices asked for, not the row
    except OSError as e:
        raise OSError(f"{path}: cannot be opened as a store ({str(e).splitlines()[0]})") from None
    if missing := [k for k in ("brightness_temp", "parameters", "redshifts", "global_signal", "signal_end", "passed") if k not in f]:
        raise ValueError(f"{path}: not a lightcone store (lacks {', '.join(missing)}); `python data_lightcone.py convert` makes one from lightcone files")
    return f


def make_row(lightcone, source, tau_sigma=5.0, max_x_hi=0.1):
    """The columns of a store's row."""
    cube = lightcone.cube.astype(np.float16)
    tau, x_hi_end = history_summary(lightcone)
    history = np.full((2, HISTORY), np.nan)
    if lightcone.history is not None:
        history[:, :lightcone.history.shape[1]] = lightcone.history
    alive = np.flatnonzero(cube.any(axis=(1, 2)))
    return dict(brightness_temp=cube, global_signal=cube.mean(axis=(1, 2), dtype=np.float32), parameters=lightcone.parameters, redshifts=lightcone.redshifts,
                ionisation_history=history, tau=tau, x_hi_end=x_hi_end, passed=not filter_reason(tau, x_hi_end, tau_sigma, max_x_hi),
                signal_end=int(alive[-1]) + 1 if len(alive) else 0, seed=lightcone.seed, cell_mpc=lightcone.cell, source=str(source))


def history_summary(lightcone):
    """(optical depth, mean neutral fraction at the low-z end); NaN where the history is unknown."""
    if lightcone.history is None:
        return np.nan, np.nan
    z, x_hi = lightcone.history
    z_end = lightcone.redshifts[-1]
    return optical_depth(z, x_hi, lightcone.parameters[1], z_end), float(np.interp(z_end, z[::-1], x_hi[::-1]))


class StoreWriter:
    """Adds rows to a store, many to a transaction where they come quickly: `add(row)`, and at the end `flush()`."""

    def __init__(self, path, T, sky):
        self.path, self.rows, self.last = Path(path), [], time.monotonic()
        if not self.path.exists():
            create_store(path, T, sky)
        with open_store(path) as f:
            shape = f["brightness_temp"].shape[1:]
        if shape != (T, sky, sky):
            raise ValueError(f"{path} holds lightcones of {' x '.join(map(str, shape))} (t, x, y), not {T} x {sky} x {sky}: choose another --out, or the same "
                             "--bins and sky size")

    def add(self, row):
        self.rows.append(row)
        if time.monotonic() - self.last > 5 or len(self.rows) * row["brightness_temp"].nbytes > 64e6:
            self.flush()

    def flush(self):
        if self.rows:
            room = sum(r["brightness_temp"].nbytes + 65536 for r in self.rows) + 2**20
            with Transaction(self.path, room) as t, h5py.File(t, "r+") as f:
                n = len(f["seed"])
                for name, dataset in f.items():
                    dataset.resize(n + len(self.rows), axis=0)
                    for i, row in enumerate(self.rows):
                        dataset[n + i] = row[name]
        self.rows, self.last = [], time.monotonic()


def check_space(out, size):
    """OSError unless the disk of `out` has room for `size` bytes more."""
    folder = Path(out).absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder).free) < size * 1.02:
        raise OSError(f"{folder}: {free / 1e9:.3g} GB are free, {size / 1e9:.3g} GB are needed: give --out another disk")


# ------------------------------------------------------------------------------------------------------------------------------------------------------ convert

def simulation_key(seed, parameters, source):
    """What makes two files the same simulation: seed and parameters; where the seed is unknown, only the same file is the same."""
    return (int(seed), *np.round(np.nan_to_num(parameters, nan=-1), 6)) if seed >= 0 else source


def convert(files, out, bins=BINS, tau_sigma=5.0, max_x_hi=0.1):
    """Read lightcone files into the store `out`; returns a list of dicts, one a file: status kept / there / dropped / skipped, and why.

    A first pass reads everything but the cubes, decides, and estimates size and time; the second copies cube after cube. Files that are in the store already are
    left alone, so an interrupted conversion is continued by the same command. One simulation in two files (same seed and parameters) is taken once, or it could
    stand in both the training and the test set."""
    report, jobs, keys, sky = [], [], {}, None
    if Path(out).exists():
        with open_store(out) as f:
            T, sky = f["brightness_temp"].shape[1:3]
            keys = {simulation_key(seed, p, s.decode()): s.decode() for seed, p, s in zip(f["seed"][:], f["parameters"][:], f["source"][:])}
        if T != bins:
            raise ValueError(f"{out} holds lightcones of {T} bins: give --bins {T}, or another --out")
    for path in tqdm(files, desc="looking", unit="file", disable=len(files) < 100):
        path = Path(path).resolve()
        entry = dict(file=str(path), status="skipped", reason="", notes=[])
        report.append(entry)
        try:
            lc = read_lightcone(path, bins, cube=False)
            tau, x_hi_end = history_summary(lc)
            entry.update(parameters=dict(zip(PARAMETERS, lc.parameters.tolist())), sky=lc.sky, seed=lc.seed, tau=tau, x_hi_end=x_hi_end, notes=lc.notes)
            for name, value, (low, high) in zip(PARAMETERS, lc.parameters, PRIORS):
                if value < low or value > high:
                    raise ValueError(f"{path}: {name} = {value:g} lies outside the prior, {low:g} to {high:g}")
            key = simulation_key(lc.seed, lc.parameters, str(path))
            if keys.get(key) == str(path):
                entry.update(status="there", reason="in the store already")
            elif key in keys:
                entry["reason"] = f"same seed and parameters as {Path(keys[key]).name}"
            elif reason := filter_reason(tau, x_hi_end, tau_sigma, max_x_hi):
                entry.update(status="dropped", reason=reason)
            else:
                jobs.append(entry)
                keys[key] = str(path)
        except ValueError as e:
            entry["reason"] = str(e).removeprefix(f"{path}: ")

    sizes = [entry["sky"] for entry in jobs]
    sky = sky or max(sizes, key=sizes.count, default=None)                                            # the store's, or the commonest
    for entry in jobs:
        if entry["sky"] != sky:
            entry["reason"] = f"{entry['sky']} x {entry['sky']} on the sky, the store has {sky} x {sky}: convert it into another --out"
    jobs = [entry for entry in jobs if entry["sky"] == sky]
    if not jobs:
        return report
    size, bytes_read = len(jobs) * bins * sky * sky * 2, sum(Path(entry["file"]).stat().st_size for entry in jobs)
    print(f"{len(jobs)} lightcones of {sky} x {sky} x {bins}: {bytes_read / 1e9:.3g} GB to read, {size / 1e9:.3g} GB to write into {out}, "
          f"about {(bytes_read + size) / 40e6 / 60:.1f} minutes at 40 MB/s")
    check_space(out, size)
    writer = StoreWriter(out, bins, sky)
    for entry in tqdm(jobs, desc="converting", unit="lightcone"):
        try:
            writer.add(make_row(read_lightcone(entry["file"], bins), entry["file"], tau_sigma, max_x_hi))
            entry["status"] = "kept"
        except ValueError as e:
            entry["reason"] = str(e).removeprefix(f"{entry['file']}: ")
    writer.flush()
    return report


def print_report(report):
    """The table of a conversion: every file that was not taken, and all of them if they fit a screen or two."""
    number = lambda v, width: f"{v:{width}}" if v == v else "unknown".rjust(int(float(width.split(".")[0])))
    print(f"{'file':22} {'status':8} {'m_WDM':>7} {'Om':>7} {'log L_X':>7} {'E_0':>7} {'log T_v':>7} {'zeta':>7} {'tau':>7} {'x_HI':>7}  remarks")
    for e in report if len(report) <= 100 else [e for e in report if e["status"] in ("dropped", "skipped")]:
        values = [*e["parameters"].values(), e["tau"], e["x_hi_end"]] if "parameters" in e else []
        cells = " ".join(number(v, w) for v, w in zip(values, ("7.2f", "7.3f", "7.2f", "7.0f", "7.2f", "7.1f", "7.3f", "7.3f")))
        print(f"{Path(e['file']).name:22} {e['status']:8} {cells:63}  {'; '.join(filter(None, [e['reason'], *e['notes']]))}")
    status = [e["status"] for e in report]
    print(f"{len(report)} files: {status.count('kept')} kept, {status.count('there')} in the store already, {status.count('dropped')} dropped by the filter, "
          f"{status.count('skipped')} skipped; {sum('no ionisation history' in ' '.join(e['notes']) for e in report)} without ionisation history (unfiltered), "
          f"{sum('unknown' in ' '.join(e['notes']) and e['status'] in ('kept', 'there') for e in report)} in the store with a parameter unknown (not for training)")


# --------------------------------------------------------------------------------------------------------------------------------------- the fast simulator

DELTA_C = 1.68                                                                                        # linear overdensity at which a halo collapses


def matter_power(k, Om):
    """Linear P(k) of cold dark matter (k in 1/Mpc), not normalised: the spectrum without wiggles of Eisenstein & Hu, astro-ph/9709112, eq. 26 to 31."""
    theta, w, wb, fb = 2.7255 / 2.7, Om * H**2, OMEGA_B * H**2, OMEGA_B / Om
    sound = 44.5 * np.log(9.83 / w) / np.sqrt(1 + 10 * wb**0.75)
    alpha = 1 - 0.328 * np.log(431 * w) * fb + 0.38 * np.log(22.3 * w) * fb**2
    q = k * theta**2 / (w * (alpha + (1 - alpha) / (1 + (0.43 * k * sound) ** 4)))
    L = np.log(2 * np.e + 1.8 * q)
    T = L / (L + (14.2 + 731 / (1 + 62.5 * q)) * q**2)
    return k**N_S * T**2


def warm_cutoff(k, Om, m_wdm):
    """What warm dark matter of m_wdm keV does to the transfer function: Bode, Ostriker & Turok, astro-ph/0010389, in the form that 21cmFAST uses."""
    cutoff = 0.201 * ((Om - OMEGA_B) * H**2 / 0.15) ** 0.15 * m_wdm**-1.15                            # Mpc
    return (1 + (0.361 * k * cutoff) ** 2.4) ** (-5 / 1.2)


def top_hat(x):
    """The Fourier transform of a sphere, x = kR."""
    x = np.maximum(x, 1e-3)
    return 3 * (np.sin(x) - x * np.cos(x)) / x**3


def variance_of(power, k, R):
    """Variance of the linear density in spheres of R (Mpc), from P(k) on a logarithmic grid."""
    return np.sum(power * k**3 * top_hat(k * R) ** 2) * np.log(k[1] / k[0]) / (2 * np.pi**2)


def growth(z, Om):
    """Linear growth factor D(z), one today; Carroll, Press & Turner 1992, eq. 29."""
    def g(z):
        O = Om * (1 + z) ** 3 / (Om * (1 + z) ** 3 + 1 - Om)
        return 2.5 * O / (O ** (4 / 7) - (1 - O) + (1 + O / 2) * (1 + (1 - O) / 70)) / (1 + z)
    return g(z) / g(0.0)


def sheth_tormen_fraction(nu):
    """Collapsed fraction above the peak height nu = delta_c / (D sigma): the integral of Sheth & Tormen's mass function, with 21cmFAST's constants."""
    A, a, p = 0.353, 0.73, 0.175
    grid = np.linspace(0, 60, 24001)[1:]
    f = A * np.sqrt(2 * a / np.pi) * (1 + (a * grid**2) ** -p) * np.exp(-a * grid**2 / 2)
    above = np.cumsum(f[::-1])[::-1] * (grid[1] - grid[0])
    return np.exp(np.interp(nu, grid, np.log(np.maximum(above, 1e-300))))


def halo_history(z, m_wdm, Om, log_tvir, k, power):
    """Growth D(z), sigma(M_min) today, and the mean collapsed fraction above M_min, each (E,). `power` is the normalised CDM spectrum (Mpc^3) at k."""
    cold, rho = (Om - OMEGA_B) * H**2 / 0.15, 2.7754e11 * Om * H**2                                   # rho in Msun / Mpc^3
    O_z = Om * (1 + z) ** 3 / (Om * (1 + z) ** 3 + 1 - Om)
    contrast = 18 * np.pi**2 + 82 * (O_z - 1) - 39 * (O_z - 1) ** 2
    m_vir = 7030.97 / H * np.sqrt(O_z / (Om * contrast)) * (10**log_tvir / (0.59 * (1 + z))) ** 1.5   # Msun; Barkana & Loeb, astro-ph/0010468, eq. 26
    m_jeans = 60 * 3.06e8 * np.sqrt(cold) * m_wdm**-4 * (1.2 * cold) ** 1.5                           # Msun; warm dark matter, as 21cmFAST's M_J_WDM
    truncated = power * warm_cutoff(k, Om, m_wdm) ** 2
    masses = np.geomspace(1e6, 1e15, 46)
    sigmas = [variance_of(truncated, k, (3 * M / (4 * np.pi * rho)) ** (1 / 3)) ** 0.5 for M in masses]
    sigma_min = np.interp(np.log(np.maximum(m_vir, m_jeans)), np.log(masses), sigmas)
    D = growth(z, Om)
    return D, sigma_min, sheth_tormen_fraction(DELTA_C / (D * sigma_min))


def thermal_history(z, f_coll, Om, log_lx, e_0):
    """Mean histories on the rising redshifts z, each (E,): heat that X-rays left in the gas (K, on top of adiabatic cooling), adiabatic temperature (K), and the
    Lyman-alpha coupling x_alpha. Stars form with efficiency 0.05 as f_coll grows (Pritchard & Loeb, arXiv:1109.6012, sections 3.2 to 3.4)."""
    dz, dt_dz = np.gradient(z), 1 / (hubble(z, Om) * (1 + z))                                         # dt_dz: |dt/dz| in s
    stars = 0.05 * np.maximum(-np.gradient(f_coll, z), 0) / dt_dz                                     # fraction of the baryons that becomes stars, 1/s

    # X-rays of energy E (K, 1, 1) absorbed at z (., E, 1) that left at z' (., 1, E) with E (1+z')/(1+z). Cross section per hydrogen nucleus with helium ~ E^-3;
    # with it and H ~ (1+z)^1.5 the optical depth from z' to z has a closed form. A step of z' can be many mean free paths: exp(-depth) is averaged over it.
    E = np.geomspace(1, 1e4 / e_0, 24)[:, None, None] * e_0                                           # eV
    n_h, cross = N_H * (1 + z) ** 3, 1.6e-17 * (E / 13.6) ** -3                                       # cm^-3, cm^2
    edges = np.maximum(np.concatenate([z[:1], (z[1:] + z[:-1]) / 2, z[-1:]]), z[:, None])             # (E, E + 1) of the steps of z', cut at z
    depth = cross * (n_h * C / hubble(z, Om))[:, None] * (1 - ((1 + edges) / (1 + z[:, None])) ** -1.5) / 1.5      # (K, E, E + 1)
    through = -np.diff(np.exp(-depth), axis=2) / np.maximum(np.diff(depth, axis=2), 1e-12)            # mean of exp(-depth)
    escape = np.exp((800 - e_0) / 280)                                                                # NOT in 21cmFAST: see simulate_fast
    emitted = 10**log_lx * escape / np.log(2000 / e_0) / E / np.maximum((1 + z) / (1 + z[:, None]), 1)      # erg/s/eV per Msun/yr: ~ 1/E
    msun_per_year = stars * M_P * (1 + 4 * N_HE) / (1.989e33 / 3.156e7)                               # per hydrogen nucleus
    light = np.sum(emitted * through * msun_per_year * C * dt_dz * np.diff(edges), axis=2)            # (K, E) erg/s/eV/cm^2 per hydrogen nucleus per cm^3
    absorbed = light * cross[:, :, 0] * n_h                                                           # (K, E) erg/s/eV per hydrogen nucleus
    heat = 0.3 * np.trapezoid(absorbed, E[:, 0, 0], axis=0)                                           # erg/s; a third becomes heat, the rest ionises and excites
    rise = heat / (1.5 * K_B * (1 + N_HE)) * dt_dz * dz / (1 + z) ** 2
    warm = (1 + z) ** 2 * np.cumsum(rise[::-1])[::-1]

    # Lyman-alpha: 9690 photons a baryon between Lyman alpha and the Lyman limit, flat; those that stop at level n cascade to alpha with the fraction f
    flux = np.zeros(len(z))                                                                           # cm^-2 s^-1 Hz^-1 sr^-1
    for n, f in enumerate((1, 0, 0.2609, 0.3078, 0.3259, 0.3353, 0.3410, 0.3448, 0.3476), start=2):
        horizon = (1 + z) * (1 - (n + 1.0) ** -2) / (1 - float(n) ** -2) - 1
        within = (z[None, :] >= z[:, None]) & (z[None, :] <= horizon[:, None])
        flux += f * np.sum(within * stars * dz / hubble(z, Om), axis=1)
    flux *= C * (1 + z) ** 2 / (4 * np.pi) * N_H * (1 + 4 * N_HE) * 9690 / 8.22e14
    return warm, 0.0186 * (1 + z) ** 2, 1.7e11 * flux / (1 + z)


def simulate_fast(parameters, seed, sky=28, bins=470):
    """A Lightcone of the six parameters (6,) from a small semi-numerical model, NOT 21cmFAST: a stand-in with the right signs, times and sizes. The box is 200 Mpc
    on the sky, periodic; the `bins` slices cover the line of sight of the paper's 2350 x 200/140 Mpc from z = 5 (and so end, as those do, between z = 22 and 35
    by Omega_m). `seed` is whatever np.random.default_rng takes.

    1. A Gaussian density field of the linear power spectrum fills the whole line of sight and grows linearly: slices evolve coherently, and nothing repeats.
       Every slice has the mean density (21cmFAST: every box), or 7 Mpc of it would carry more cosmic variance than the parameters' mark on the global signal.
    2. Haloes above M_min (of T_vir, or the warm dark matter Jeans mass) hold the fraction f_coll of the mass: Sheth-Tormen, with sigma(M) of the truncated
       spectrum. Where the overdensity in spheres of R is delta, it is f_coll times the Press-Schechter ratio `boost`, as in 21cmFAST (arXiv:1003.3878).
    3. A sphere is ionised where zeta f_coll > 1, from large R down to the cell, which can be partly ionised: inside out.
    4. Stars heat (L_X, E_0) and couple the gas in the mean; `boost` in spheres of the photons' reach makes both follow the density.
    5. T_b = 27 mK x_HI (1 + delta) (Omega_b h^2 / 0.023) sqrt(0.15 (1 + z) / (10 Omega_m h^2)) (1 - T_CMB / T_S).
    Left out: peculiar velocities, recombinations, heating by Lyman-alpha photons and the CMB, light travel in `boost`, all that is smaller than a cell (7 Mpc).
    Exaggerated on purpose: hosts that absorb up to a higher E_0 let fewer X-rays out, by exp((800 eV - E_0) / 280 eV), 12 at 100 eV and 0.08 at 1500 eV. With
    21cmFAST's convention (L_X is what comes out, from E_0 to 2 keV) E_0 leaves hardly a mark on the global signal, and there would be nothing to regress."""
    m_wdm, Om, log_lx, e_0, log_tvir, zeta = map(float, parameters)
    depth, side = BINS * CELL / bins, 200 / sky                                                       # of a cell, along the line of sight and on the sky, Mpc
    z = redshift_at(comoving_distance(5.0, Om) + depth * np.arange(bins), Om)                         # (T,) rising; turned at the end
    early = np.geomspace(1 + z[0], 46, 100) - 1                                                       # (E,) mean histories are worked out on this, to z = 45
    column = lambda a: torch.from_numpy(np.interp(z, early, a).astype(np.float32))[:, None, None]     # (E,) -> (T, 1, 1)

    # 1. delta today, in Fourier space
    k = np.geomspace(1e-4, 1e3, 2000)
    power = matter_power(k, Om)
    power *= SIGMA_8**2 / variance_of(power, k, 8 / H)
    kz, kx, ky = 2 * np.pi * np.fft.fftfreq(bins, depth), 2 * np.pi * np.fft.fftfreq(sky, side), 2 * np.pi * np.fft.rfftfreq(sky, side)
    kk = np.sqrt(kz[:, None, None] ** 2 + kx[:, None] ** 2 + ky**2)                                   # (T, X, Y//2 + 1)
    amplitude = np.sqrt(np.exp(np.interp(np.log(np.maximum(kk, 1e-4)), np.log(k), np.log(power))) / (depth * side**2)) * (np.hypot(kx[:, None], ky) > 0)
    noise = torch.from_numpy(np.random.default_rng(seed).standard_normal((bins, sky, sky), dtype=np.float32))
    field = torch.fft.rfftn(noise) * torch.from_numpy(amplitude.astype(np.float32))
    twice = np.where((ky == 0) | (2 * np.arange(len(ky)) == sky), 1, 2)                               # how often a column of rfftn stands in the full transform

    def smooth(R):
        """(T, X, Y) delta in spheres of R (0: in cells), and its variance."""
        W = top_hat(kk * R) if R else 1.0
        delta = torch.fft.irfftn(torch.from_numpy(np.asarray(W, np.float32)) * field, s=(bins, sky, sky))
        return delta, float(np.sum((amplitude * W) ** 2 * twice) / (bins * sky**2))

    # 2. collapsed fraction
    D, sigma_min, f_coll = halo_history(early, m_wdm, Om, log_tvir, k, power)
    barrier = column(DELTA_C / D)

    def boost(delta, variance):
        """f_coll in regions of this overdensity over its mean on the slice, which is held at Sheth-Tormen's. In logarithms: early on both are tiny."""
        width = (column(sigma_min) ** 2 - variance).clamp(min=0.05).sqrt()
        return torch.softmax(torch.special.log_ndtr((delta - barrier) / width).flatten(1), dim=1).view_as(delta) * sky**2

    # 3. ionisation
    delta, variance = smooth(0)
    cell_radius = (3 / (4 * np.pi) * depth * side**2) ** (1 / 3)
    ionised = torch.zeros(delta.shape, dtype=torch.bool)
    for R in np.geomspace(15, 1.3 * cell_radius, 4) if cell_radius < 10 else []:                      # Mpc; 15: how far an ionising photon gets
        ionised |= zeta * column(f_coll) * boost(*smooth(R)) > 1
    x_hi = torch.where(ionised, 0, (1 - zeta * column(f_coll) * boost(delta, variance)).clamp(0, 1))

    # 4. spin temperature
    warm, cool, x_alpha = thermal_history(early, f_coll, Om, log_lx, e_0)
    reach = float(np.clip(4.9 * (e_0 / 300) ** 3, 10, 60))                                            # Mpc, of X-rays at z = 14 (Furlanetto et al. 2006)
    one_plus_delta = torch.exp(column(D) * delta - column(D) ** 2 * variance / 2)                     # log-normal: the density stays positive
    T_k = column(cool) * one_plus_delta ** (2 / 3) + column(warm) * boost(*smooth(reach))
    T_cmb = column(2.7255 * (1 + early))
    collisions = 3.1e-11 * T_k**0.357 * torch.exp(-32 / T_k) * column(N_H * (1 + early) ** 3) * one_plus_delta * 0.0682 / (2.85e-15 * T_cmb)
    coupling = column(x_alpha) * boost(*smooth(30.0)) + collisions
    T_s = (1 + coupling) / (1 / T_cmb + coupling / T_k)

    # 5. the signal
    scale = 27 * (OMEGA_B * H**2 / 0.023) * np.sqrt(0.15 / (Om * H**2) * (1 + early) / 10)
    T_b = column(scale) * x_hi * one_plus_delta * (1 - T_cmb / T_s) + 0.0                             # (T, X, Y) mK; no -0.0
    groups = np.array_split(np.arange(bins), min(47, bins))
    history = np.array([[z[g].mean(), x_hi[g[0]:g[-1] + 1].mean()] for g in groups[::-1]]).T
    return Lightcone(T_b.flip(0).numpy(), np.asarray(parameters, float), z[::-1], history, -1, side, sky, [])


# ----------------------------------------------------------------------------------------------------------------------------------------------------- simulate

def draw_parameters(n, seed):
    """(n, 6) in physical units: the first n points of a scrambled Sobol sequence over the priors. A larger n continues the same sequence."""
    unit = torch.quasirandom.SobolEngine(6, scramble=True, seed=seed).draw(n, dtype=torch.float64).numpy()
    return PRIORS[:, 0] + unit * (PRIORS[:, 1] - PRIORS[:, 0])


def _fast_job(job):
    """One lightcone as a store's row, in a process of a pool."""
    torch.set_num_threads(1)
    lc = simulate_fast(job["parameters"], [job["seed"], job["draw"]], job["sky"], job["bins"])
    return job, make_row(lc._replace(seed=job["random_seed"]), job["source"], job["tau_sigma"], job["max_x_hi"])


def _worker_21cmfast():
    """The loop of a child process that runs 21cmFAST: a job comes as a line of JSON on stdin, the answer goes as one to stdout. It is sent as source to the
    interpreter that has 21cmFAST (3.4.0 needs numpy < 2, so it is seldom ours) and imports nothing of this project."""
    import json, os, sys
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)                                                                                     # what the C code prints must not mix with the answers
    import py21cmfast as p21c
    v4 = int(p21c.__version__.split(".")[0]) >= 4
    for line in sys.stdin:
        job = json.loads(line)
        m_wdm, Om, log_lx, e_0, log_tvir, zeta = job["parameters"]
        grid = dict(HII_DIM=job["sky"], BOX_LEN=job["box"])
        astro = dict(HII_EFF_FACTOR=zeta, ION_Tvir_MIN=log_tvir, L_X=log_lx, NU_X_THRESH=e_0, R_BUBBLE_MAX=min(15.0, 0.325 * job["box"]))
        try:
            if v4:
                nodes = p21c.InputParameters.from_template(["const-zeta"], random_seed=job["random_seed"]).with_logspaced_redshifts(
                    zmin=4.95, zstep_factor=job["step"])
                inputs = nodes.evolve_input_structs(OMm=Om, **grid, DIM=3 * job["sky"], ZPRIME_STEP_FACTOR=job["step"], USE_TS_FLUCT=True,
                                                    M_MIN_in_Mass=False, X_RAY_Tvir_MIN=log_tvir, **astro)
                from astropy import units
                geometry = p21c.RectilinearLightconer.between_redshifts(
                    min_redshift=5.0, max_redshift=35.0, resolution=job["box"] / job["sky"] * units.Mpc, cosmo=inputs.cosmo_params.cosmo,
                    quantities=("brightness_temp",))
                lightcone = p21c.run_lightcone(lightconer=geometry, inputs=inputs, write=False, progressbar=False)
                lightcone.save(job["file"], clobber=True)
            else:
                p21c.global_params.P_CUTOFF, p21c.global_params.M_WDM, p21c.global_params.ZPRIME_STEP_FACTOR = True, m_wdm, job["step"]
                lightcone = p21c.run_lightcone(
                    redshift=5.0, max_redshift=35.0, user_params=p21c.UserParams(**grid), cosmo_params=p21c.CosmoParams(OMm=Om),
                    astro_params=p21c.AstroParams(**astro), flag_options=p21c.FlagOptions(USE_TS_FLUCT=True), random_seed=job["random_seed"], write=False,
                    lightcone_quantities=("brightness_temp",), global_quantities=("brightness_temp", "xH_box"))
                lightcone.save(fname=os.path.basename(job["file"]), direc=os.path.dirname(job["file"]), clobber=True)
            answer = {}
        except Exception as e:
            answer = {"error": f"{type(e).__name__}: {e}"}
        print(json.dumps(answer), file=answers, flush=True)


class Worker:
    """A child process for 21cmFAST that is used again and again, and replaced when it dies."""

    def __init__(self, python):
        self.python, self.child = python, None

    def run(self, job):
        """Run one job; returns "" or why it failed."""
        if self.child is None:
            source = inspect_module.getsource(_worker_21cmfast) + "\n_worker_21cmfast()"
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self.log = tempfile.TemporaryFile()
            self.child = subprocess.Popen([self.python, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment)
        try:
            self.child.stdin.write(json.dumps(job) + "\n")
            self.child.stdin.flush()
            return json.loads(self.child.stdout.readline()).get("error", "")
        except (BrokenPipeError, json.JSONDecodeError):                                               # no answer: it is dead
            code = self.child.wait()
            self.log.seek(0)
            last = (self.log.read().decode(errors="replace").strip().splitlines() or [""])[-1]
            self.child = None
            return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}: {last}"

    def close(self):
        if self.child:
            self.child.stdin.close()
            self.child.wait()


def simulate(out, n, backend="fast", seed=0, sky=28, bins=470, box=200.0, step=1.02, workers=os.cpu_count(), python=sys.executable, keep=None,
             tau_sigma=5.0, max_x_hi=0.1):
    """Draw n sets of parameters and add the lightcone of each to the store `out`; returns a dict of counts. Run again, it continues where it stopped.

    What a simulator could not do is a line of JSON in OUT.failures.jsonl, with parameters and reason (delete it to try those again): a gap in the prior that a
    user of the store should know of. Rows with extreme histories are there, but not `passed`."""
    name = "fast simulator (semi-numerical stand-in, not 21cmFAST)" if backend == "fast" else f"21cmFAST {version_21cmfast(python)}, box {box:g} Mpc, step {step:g}"
    writer, failures = StoreWriter(out, bins, sky), Path(f"{out}.failures.jsonl")
    failed = {json.loads(line)["source"] for line in failures.read_text().splitlines()} if failures.exists() else set()
    jobs = [dict(draw=i, parameters=p.tolist(), seed=seed, random_seed=seed * 1_000_000 + i + 1, source=f"{name}, seed {seed}, draw {i}", sky=sky, bins=bins, box=box,
                 step=step, tau_sigma=tau_sigma, max_x_hi=max_x_hi) for i, p in enumerate(draw_parameters(n, seed))]
    with open_store(out) as f:
        there = {s.decode() for s in f["source"][:]}
    todo = [j for j in jobs if j["source"] not in there and j["source"] not in failed]
    size = len(todo) * bins * sky * sky * 2
    print(f"{n} lightcones of {sky} x {sky} x {bins} asked for, {len(todo)} to simulate: {size / 1e9:.3g} GB in {out}")
    check_space(out, size)
    run = _run_fast if backend == "fast" else _run_21cmfast
    done = 0
    try:
        for job, row, reason in tqdm(run(todo, workers, python, keep), total=len(todo), desc="simulating", unit="lightcone"):
            if row:
                writer.add(row)
                done += 1
            else:
                tqdm.write(f"draw {job['draw']} failed: {reason}", file=sys.stderr)
                line = dict(source=job["source"], parameters=dict(zip(PARAMETERS, job["parameters"])), random_seed=job["random_seed"], reason=reason)
                with open(failures, "a") as f:
                    f.write(json.dumps(line) + "\n")
    finally:
        writer.flush()
    with open_store(out) as f:
        return dict(asked=n, there_before=len(jobs) - len(todo), simulated=done, failed_now=len(todo) - done, rows_in_store=len(f["seed"]),
                    rows_passed=int(f["passed"][:].sum()))


def _run_fast(jobs, workers, python, keep):
    """Yields (job, row, "") in order."""
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            yield from ((job, row, "") for job, row in pool.map(_fast_job, jobs))
        except BrokenExecutor:
            raise OSError("a simulating process was killed (out of memory?): the lightcones so far are in the store, the same command continues") from None


def version_21cmfast(python):
    """The version that this interpreter has; OSError if it has none."""
    try:
        probe = subprocess.run([python, "-c", "import py21cmfast; print(py21cmfast.__version__)"], capture_output=True, text=True)
        why = (probe.stderr.strip().splitlines() or [""])[-1] if probe.returncode else ""
    except OSError as e:
        why = str(e)
    if why:
        raise OSError(f"no 21cmFAST for {python} ({why}): install it as the README says, name the Python that has it with --python, or use --backend fast")
    version = probe.stdout.split()[-1]
    print(f"21cmFAST {version}" + ("" if version < "4" else " has no warm dark matter: m_WDM will be unknown (NaN), and these lightcones not for training"))
    return version


def _run_21cmfast(jobs, workers, python, keep):
    """Yields (job, row, reason) as they finish; row is None where 21cmFAST failed, reason then says how."""
    free = SimpleQueue()
    for _ in range(workers):
        free.put(Worker(python))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(keep or folder)
        folder.mkdir(parents=True, exist_ok=True)

        def one(job):
            file = folder.absolute() / f"lightcone_{job['random_seed']}.h5"
            worker = free.get()
            reason = worker.run({**job, "file": str(file)})
            free.put(worker)
            return file, reason

        with ThreadPoolExecutor(workers) as threads:
            futures = {threads.submit(one, job): job for job in jobs}
            for future in as_completed(futures):
                job, (file, reason), row = futures[future], future.result(), None
                try:
                    if not reason:
                        row = make_row(read_lightcone(file, job["bins"]), job["source"], job["tau_sigma"], job["max_x_hi"])
                except ValueError as e:
                    reason = str(e)
                if not keep:
                    file.unlink(missing_ok=True)
                yield job, row, reason
        while not free.empty():
            free.get().close()


# ------------------------------------------------------------------------------------------------------------------------------------- data sets for training

def split_rows(n, split, seed, experiment, note=""):
    """Row numbers (of n usable ones) of a split, by a seeded permutation. Regression: 3800 / 960 / 250 train / validation / test from 5,010 on (what is beyond is
    left out), else 0.76 / 0.19 / 0.05. Generation: 250 for the test from 2,500 on, else 5%; of the rest 0.9 / 0.1. At least one of each, or a ValueError,
    which begins with `note`."""
    if split not in ("train", "validation", "test"):
        raise ValueError(f"split {split!r}: must be train, validation or test")
    if n < 3:
        raise ValueError(f"{note or f'{n} lightcones'}: at least 3 are needed, one each to train, validate and test; simulate or convert more")
    if experiment == "regression":
        test, validation, train = (250, 960, 3800) if n >= 5010 else (max(1, round(0.05 * n)), max(1, round(0.19 * n)), n)
    else:
        test = 250 if n >= 2500 else max(1, round(0.05 * n))
        validation, train = max(1, round(0.1 * (n - test))), n
    order = np.random.default_rng(seed).permutation(n)
    start, stop = {"test": (0, test), "validation": (test, test + validation), "train": (test + validation, test + validation + train)}[split]
    return np.sort(order[start:stop])


def usable(parameters, passed, where):
    """Numbers of the rows that may be trained on, and a sentence on those that may not."""
    unknown = ~np.isfinite(parameters).all(axis=1)
    outside = ~unknown & ((parameters < PRIORS[:, 0]) | (parameters > PRIORS[:, 1])).any(axis=1)
    extreme = ~passed & ~unknown & ~outside
    rows = np.flatnonzero(~unknown & ~outside & ~extreme)
    left_out = [f"{m.sum()} {why}" for m, why in ((unknown, "with a parameter unknown"), (outside, "outside the priors"), (extreme, "with an extreme history")) if m.any()]
    return rows, f"{where}: {len(rows)} of {len(parameters)} lightcones usable" + (f"; left out: {', '.join(left_out)}" if left_out else "")


PUBLISHED_NORM = (-32.5, 65.4)                                                                        # mK; mean and deviation that L3M released


class GlobalSignals(torch.utils.data.Dataset):
    """Sky-averaged signals for the regression: item i is (signal (tokens,), parameters (6,)), float32, signal normalised and forward in time, parameters in [0, 1].

    path: a store, or an .npz with signal (N, T) in mK from low z, the six parameters (N,), xH (N, nodes) over node_z (nodes,) to filter by.
    norm: (mean, deviation) in mK; None fits them on the training part. Either way they are `self.norm`, to be kept with the run. PUBLISHED_NORM are L3M's.
    All of it is in memory (5,000 signals of 47 values are 1 MB): `self.signals` (n, tokens), `self.parameters` (n, 6), `self.rows` (n,) in the file, `self.note`."""

    def __init__(self, path, split, *, tokens=47, seed=0, norm=None, tau_sigma=5.0, max_x_hi=0.1):
        with open(path, "rb") as f:
            is_npz = f.read(2) == b"PK"
        if is_npz:
            with np.load(path, allow_pickle=False) as f:
                if missing := [k for k in ("signal", *PARAMETERS) if k not in f]:
                    raise ValueError(f"{path}: lacks {', '.join(missing)}")
                parameters, signal = np.stack([f[k] for k in PARAMETERS], axis=1).astype(float), f["signal"][:, ::-1]
                passed = np.ones(len(signal), bool)
                if "xH" in f and "node_z" in f:
                    z = f["node_z"]
                    passed = np.array([not filter_reason(optical_depth(z, x, Om, z[-1]), x[-1], tau_sigma, max_x_hi) for x, Om in zip(f["xH"], parameters[:, 1])])
            read = lambda rows: signal[rows]
        else:
            with open_store(path) as f:
                parameters, passed = f["parameters"][:], f["passed"][:]
            read = lambda rows: _read_rows(path, "global_signal", rows)
        rows, self.note = usable(parameters, passed, path)
        train, self.rows = (rows[split_rows(len(rows), s, seed, "regression", self.note)] for s in ("train", split))
        shrink = lambda a: self._shrink(a, tokens, path)
        if norm is None:
            values = shrink(read(train))
            norm = values.mean(), values.std()
        self.norm = float(norm[0]), float(norm[1])
        self.signals = torch.from_numpy(((shrink(read(self.rows)) - self.norm[0]) / self.norm[1]).astype(np.float32))
        self.parameters = torch.from_numpy(to_unit(parameters[self.rows]).astype(np.float32))

    @staticmethod
    def _shrink(signal, tokens, path):
        n, T = signal.shape
        if T % tokens:
            raise ValueError(f"{path}: {T} bins cannot be averaged into {tokens} equal groups")
        if not np.isfinite(signal).all():
            raise ValueError(f"{path}: NaN in the signal of {(~np.isfinite(signal).all(axis=1)).sum()} lightcones")
        return signal.astype(np.float64).reshape(n, tokens, T // tokens).mean(axis=2)                 # (n, T) -> (n, tokens)

    def __len__(self):
        return len(self.signals)

    def __getitem__(self, i):
        return self.signals[i], self.parameters[i]


def _read_rows(path, name, rows):
    with open_store(path) as f:
        return f[name][rows]


def normalise(T_b):
    """mK -> what the generator sees: sign(T) log(1 + |T|), shifted and scaled by the paper's constants. float32 tensors."""
    return (torch.sign(T_b) * torch.log1p(T_b.abs()) + 1.51) / 2.74


def denormalise(x):
    """The inverse of `normalise`: mK."""
    y = x * 2.74 - 1.51
    return torch.sign(y) * torch.expm1(y.abs())


class SubLightcones(torch.utils.data.Dataset):
    """Runs of slices for the generator: item (epoch, i) is (slices (12, X, Y) normalised, conditions (7,)), float32. Conditions: the six parameters in [0, 1] and
    the index of the first slice, (t - T/2) / T with t = 0 the highest z, counted before trimming.

    A lightcone is trimmed to at most 48 all-zero slices after the last with signal and cut into chunks of 24, step 22; a draw is a random run of 12 in chunk i.
    train: rotated, mirrored and shifted over the periodic sky at random. validation and test: one fixed run a chunk, not augmented, whatever the epoch.
    A partial last chunk is dropped, but for the test, which keeps it from 3 slices on (and may so return less than 12).
    A draw depends only on (seed, epoch, i): give a DataLoader a (batch) sampler of (epoch, i) pairs, and workers, resuming and process counts change nothing.
    Only the slices asked for are read; what is in memory is a few numbers a lightcone. `windows()` and `read()` are for evaluation."""

    def __init__(self, path, split, *, seed=0, window=12, chunk=24, step=22):
        with open_store(path) as f:
            parameters, passed, signal_end = f["parameters"][:], f["passed"][:], f["signal_end"][:]
            self.T, self.sky = f["brightness_temp"].shape[1:3]
        rows, self.note = usable(parameters, passed, path)
        self.usable = len(rows)                                                                       # lightcones of all splits
        self.rows = rows[split_rows(len(rows), split, seed, "generation", self.note)]                 # (n,) in the store
        self.path, self.split, self.seed, self.window, self.chunk, self.step = path, split, seed, window, chunk, step
        self.parameters = to_unit(parameters).astype(np.float32)                                      # (N, 6), by row of the store
        self.length = np.minimum(signal_end[self.rows] + 2 * 24, self.T)                              # (n,) slices after trimming
        chunks = np.maximum(self.length - chunk + step, 0) // step
        if split == "test":
            chunks += self.length - chunks * step >= 3
        self.first = np.concatenate([[0], np.cumsum(chunks)])                                         # (n + 1,) number of each lightcone's first chunk
        if self.first[-1] == 0:
            raise ValueError(f"{path}: no chunk of {chunk} slices in the {split} part, the lightcones have {self.T}")
        self._file = self._cubes = None

    def __len__(self):
        return int(self.first[-1])

    def __getitem__(self, key):
        epoch, i = key if isinstance(key, tuple) else (0, key)
        if not 0 <= i < len(self):
            raise IndexError(i)
        rng = np.random.default_rng([self.seed, epoch if self.split == "train" else 0, i])
        n = int(np.searchsorted(self.first, i, side="right")) - 1
        start = (i - self.first[n]) * self.step
        spare = min(self.chunk, self.length[n] - start) - self.window
        start = int(start + (rng.integers(spare + 1) if spare > 0 else 0))
        slices = self._slices(self.rows[n], start, min(self.window, int(self.length[n]) - start))
        if self.split == "train":
            slices = np.rot90(np.roll(slices, rng.integers(self.sky, size=2), axis=(1, 2)), rng.integers(4), axes=(1, 2))
            slices = slices.transpose(0, 2, 1) if rng.integers(2) else slices
        return self._finish(slices, self.rows[n], start)

    def read(self, row, start, length):
        """Slices [start, start + length) of a row of the store and their conditions, as above: ((length, X, Y), (7,))."""
        return self._finish(self._slices(row, start, length), row, start)

    def _slices(self, row, start, length):
        if self._cubes is None or self._pid != os.getpid():                                           # an open file must not be shared over a fork
            self._file, self._pid = open_store(self.path), os.getpid()
            self._cubes = self._file["brightness_temp"]
        return self._cubes[int(row), start:start + length]                                            # float16 mK

    def _finish(self, slices, row, start):
        conditions = np.append(self.parameters[row], np.float32((start - self.T / 2) / self.T))
        return normalise(torch.from_numpy(np.ascontiguousarray(slices)).float()), torch.from_numpy(conditions)

    def windows(self):
        """(row, start, length) of consecutive runs of 12 slices through each trimmed lightcone of the split, a shorter last one from 3 slices on."""
        return [(int(row), start, min(self.window, int(length) - start))
                for row, length in zip(self.rows, self.length) for start in range(0, int(length) - 2, self.window)]

    def __getstate__(self):
        return {**self.__dict__, "_file": None, "_cubes": None}


# ------------------------------------------------------------------------------------------------------------------------------------------------------ inspect

def eor_colours():
    """The colour map of the field for T_b, from 21cmFAST's "EoR": white, yellow, red below zero, black at zero, blue above."""
    from matplotlib.colors import LinearSegmentedColormap
    return LinearSegmentedColormap.from_list("EoR", [(0, "white"), (0.125, "yellow"), (0.25, "orange"), (0.375, "red"), (0.5, "black"), (0.75, "blue"), (1, "cyan")])


def power_spectrum(slices, cell):
    """Power of fluctuations on the sky: slices (n, X, X) in mK -> k (1/Mpc) and k^2 P(k) / 2 pi (mK^2), the mean over the slices, in bins of equal width in log k."""
    n, X, _ = slices.shape
    modes = np.abs(np.fft.fft2(slices - slices.mean(axis=(1, 2), keepdims=True))) ** 2 / X**2 * cell**2      # (n, X, X) mK^2 Mpc^2
    f = 2 * np.pi * np.fft.fftfreq(X, cell)
    k = np.hypot(f[:, None], f[None, :])
    edges = np.geomspace(f[1] * 0.99, f.max(), min(12, X // 3) + 1)
    inside = [(k >= a) & (k < b) for a, b in zip(edges, edges[1:])]
    points = [(k[m].mean(), modes[:, m].mean() * k[m].mean() ** 2 / (2 * np.pi)) for m in inside if m.any()]
    return np.array(points).T


def inspect(path, out):
    """Counts and coverage of a store as a dict; figures coverage, signals, lightcones and power in the directory `out`."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import TwoSlopeNorm
    Path(out).mkdir(parents=True, exist_ok=True)
    with open_store(path) as f:
        parameters, passed, tau, x_end, z = f["parameters"][:], f["passed"][:], f["tau"][:], f["x_hi_end"][:], f["redshifts"]
        N, T, X, _ = f["brightness_temp"].shape
        if N == 0:
            raise ValueError(f"{path}: the store is empty")
        rows, note = usable(parameters, passed, path)
        show = rows if len(rows) else np.arange(N)
        show = show[np.linspace(0, len(show) - 1, min(12, len(show))).astype(int)]
        low, high = (lambda a: float(np.nanmin(a)) if np.isfinite(a).any() else None), (lambda a: float(np.nanmax(a)) if np.isfinite(a).any() else None)
        summary = dict(store=str(path), lightcones=N, shape=[T, X, X], gigabytes=round(Path(path).stat().st_size / 1e9, 3), usable=len(rows), note=note,
                       history_unknown=int(np.isnan(tau).sum()), tau=[low(tau), high(tau)], x_hi_end=[low(x_end), high(x_end)],
                       redshift_low_end=[low(z[:, -1]), high(z[:, -1])], redshift_high_end=[low(z[:, 0]), high(z[:, 0])],
                       parameters={n: dict(low=low(p), high=high(p), unknown=int(np.isnan(p).sum())) for n, p in zip(PARAMETERS, parameters.T)})

        labels = [f"{n}\n[{u}]" if u else n for n, u in zip(SYMBOLS, UNITS)]
        figure, axes = plt.subplots(6, 6, figsize=(11, 11))
        for i in range(6):
            for j in range(6):
                a = axes[i, j]
                if j > i:
                    a.axis("off")
                    continue
                a.set_xlim(PRIORS[j])
                if i == j:
                    a.hist(parameters[:, j][np.isfinite(parameters[:, j])], bins=10, range=PRIORS[j], color="0.75")
                    a.hist(parameters[rows, j], bins=10, range=PRIORS[j], color="C0")
                else:
                    a.plot(parameters[~passed, j], parameters[~passed, i], ".", ms=3, color="C3", label="filtered")
                    a.plot(parameters[rows, j], parameters[rows, i], ".", ms=3, color="C0", label="usable")
                    a.set_ylim(PRIORS[i])
                a.locator_params(nbins=3)
                a.tick_params(labelsize=7, labelbottom=i == 5, labelleft=j == 0)
                if i == 5:
                    a.set_xlabel(labels[j], fontsize=9)
                if j == 0:
                    a.set_ylabel("lightcones" if i == 0 else labels[i], fontsize=9)
        figure.legend(*axes[1, 0].get_legend_handles_labels(), loc=(0.7, 0.75), markerscale=3)
        figure.suptitle(f"{Path(path).name}: {len(rows)} usable of {N} lightcones, over the priors", y=0.92)
        figure.savefig(Path(out) / "coverage.png", dpi=120, bbox_inches="tight")

        figure, a = plt.subplots(figsize=(9, 5))
        for r in show:
            a.plot(z[r], f["global_signal"][r], lw=1, label=", ".join(f"{v:.3g}" for v in parameters[r]))
        a.axhline(0, color="k", lw=0.5)
        a.set(xlabel="redshift $z$", ylabel=r"sky mean $\bar T_b$ [mK]", title="Global signals")
        a.legend(title=", ".join(PARAMETERS), fontsize=6, title_fontsize=6)
        figure.savefig(Path(out) / "signals.png", dpi=120, bbox_inches="tight")

        strips = show[np.linspace(0, len(show) - 1, min(4, len(show))).astype(int)]
        figure, axes = plt.subplots(len(strips), 1, figsize=(13, 2.3 * len(strips)), squeeze=False, layout="constrained")
        for a, r in zip(axes[:, 0], strips):
            cube, side = f["brightness_temp"][r, :, :, 0].astype(np.float32), X * float(f["cell_mpc"][r])  # (T, X)
            drawn = a.imshow(cube[::-1].T, aspect="auto", cmap=eor_colours(), norm=TwoSlopeNorm(0, -200, 40), extent=(0, T, 0, side), interpolation="nearest")
            ticks = [t for t in (5, 6, 7, 8, 10, 12, 15, 20, 25, 30, 35) if z[r, -1] - 0.05 <= t <= z[r, 0]]
            a.set_xticks(np.interp(ticks, z[r][::-1], np.arange(T) + 0.5), ticks)
            a.set_ylabel("sky [Mpc]")
            a.set_title(", ".join(f"{n} {v:.3g}" for n, v in zip(PARAMETERS, parameters[r])), fontsize=9)
        axes[-1, 0].set_xlabel("redshift $z$ (bins are equal steps of comoving distance; time runs to the left)")
        figure.colorbar(drawn, ax=axes[:, 0], label="$T_b$ [mK]", extend="both", ticks=[-200, -150, -100, -50, 0, 20, 40])
        figure.savefig(Path(out) / "lightcones.png", dpi=120)

        figure, axes = plt.subplots(1, len(strips), figsize=(3.6 * len(strips), 3.6), squeeze=False, sharey=True, layout="constrained")
        for a, r in zip(axes[0], strips):
            for target, colour in zip((7, 9, 12, 16, 20), plt.cm.viridis(np.linspace(0, 0.9, 5))):
                centre = int(np.argmin(np.abs(z[r] - target)))
                k, power = power_spectrum(f["brightness_temp"][r, max(0, centre - 10):centre + 10].astype(np.float32), float(f["cell_mpc"][r]))
                if abs(z[r, centre] - target) < 0.5 and power.max() > 1e-2:
                    a.loglog(k, power, color=colour, label=f"z = {target}")
            ticks = [t for t in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2) if k[0] <= t <= k[-1]]
            a.set_xticks(ticks, [f"{t:g}" for t in ticks])
            a.set_xticks([], minor=True)
            a.set_xlabel(r"$k_\perp$ [Mpc$^{-1}$]")
            a.set_title(f"{', '.join(PARAMETERS)}\n{', '.join(f'{v:.3g}' for v in parameters[r])}", fontsize=7)
            a.legend(fontsize=7)
        axes[0, 0].set_ylim(bottom=1e-2)
        axes[0, 0].set_ylabel(r"$k_\perp^2 P(k_\perp) / 2\pi$ [mK$^2$]")
        figure.suptitle("Fluctuations on the sky, mean of 20 slices")
        figure.savefig(Path(out) / "power.png", dpi=120)
    return summary


# ------------------------------------------------------------------------------------------------------------------------------------------------- command line

def main(argv=None):
    parser = argparse.ArgumentParser(description="Lightcones for the L3M experiments: simulate, convert, inspect.", epilog="More at the top of data_lightcone.py.")
    commands = parser.add_subparsers(dest="command", required=True)
    how = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    s = commands.add_parser("simulate", help="make lightcones, with parameters drawn from the priors", **how)
    s.add_argument("-n", type=int, default=1000, help="how many parameter draws; a larger n later continues the same sequence")
    s.add_argument("--backend", choices=["fast", "21cmfast"], default="fast", help="fast: built in, a stand-in; 21cmfast: the real one, if installed")
    s.add_argument("--seed", type=int, default=0, help="of the parameters and the density fields")
    s.add_argument("--sky", type=int, help="cells along each side of the sky (default 28 for fast, 140 for 21cmfast)")
    s.add_argument("--bins", type=int, help="slices along the line of sight (default 470 for fast, 2350 for 21cmfast)")
    s.add_argument("--box", type=float, default=200.0, help="21cmfast: side of the box, Mpc")
    s.add_argument("--step", type=float, default=1.02, help="21cmfast: ZPRIME_STEP_FACTOR; 1.1 is coarse and quick")
    s.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    s.add_argument("--python", default=sys.executable, help="21cmfast: the Python interpreter that has it")
    s.add_argument("--keep", metavar="DIR", help="21cmfast: keep its own files here, too")
    c = commands.add_parser("convert", help="read lightcone files (21cmFAST v3 and v4 HDF5, .npz) into a store", **how)
    c.add_argument("files", nargs="+", metavar="FILES")
    c.add_argument("--bins", type=int, default=BINS, help="line-of-sight bins to keep, from low z")
    for p in (s, c):
        p.add_argument("--out", default="data/lightcones.h5", help="the store; it is added to if it is there")
        p.add_argument("--tau-sigma", type=float, default=5.0, help=f"filter: optical depth within this many sigma of Planck's {TAU} +- {TAU_SIGMA}")
        p.add_argument("--max-xhi", type=float, default=0.1, help="filter: mean neutral fraction at the low-z end at most this")
    i = commands.add_parser("inspect", help="counts and figures of a store", **how)
    i.add_argument("store", nargs="?", default="data/lightcones.h5")
    i.add_argument("--out", help="directory for the figures (default out/inspect-STORE)")
    args = parser.parse_args(argv)

    try:
        if args.command == "simulate":
            fast = args.backend == "fast"
            if args.n < 1 or args.workers < 1:
                raise ValueError("-n and --workers must be at least 1")
            summary = simulate(args.out, args.n, args.backend, args.seed, args.sky or (28 if fast else 140), args.bins or (470 if fast else BINS), args.box, args.step,
                               args.workers, args.python, args.keep, args.tau_sigma, args.max_xhi)
        elif args.command == "convert":
            report = convert(args.files, args.out, args.bins, args.tau_sigma, args.max_xhi)
            print_report(report)
            if not any(e["status"] in ("kept", "there") for e in report):
                raise ValueError(f"none of the {len(report)} files could be taken, see the table")
            Path(f"{args.out}.convert.json").write_text(json.dumps(report, indent=1))
            return
        else:
            out = Path(args.out or f"out/inspect-{Path(args.store).stem}")
            summary = inspect(args.store, out)
            (out / "summary.json").write_text(json.dumps(summary, indent=1))
        print(json.dumps(summary, indent=1))
    except (ValueError, OSError) as e:
        parser.exit(2, f"error: {e}\n")


if __name__ == "__main__":
    main()
