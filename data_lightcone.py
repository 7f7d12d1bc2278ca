"""21cm lightcones: simulate them, read anybody's, filter, store, look at them, feed them to L3M.

A lightcone is the brightness temperature T_b(x, y, t) of neutral hydrogen in mK: two periodic
directions on the sky and one along the line of sight, which is cosmic time. Six parameters made it
(table PRIORS below). The experiments are those of Heneka et al., arXiv:2506.14757: regress the six
parameters from the sky-averaged signal (`GlobalSignals`), and generate lightcones slice by slice
(`SubLightcones`).

    python data_lightcone.py simulate -n 1000        # built in, fast: 28 x 28 x 470, some minutes
    python data_lightcone.py simulate --box 40 --bins 2350             # the paper's cells, 1.43 Mpc
    python data_lightcone.py simulate --backend 21cmfast -n 5000 --workers 32 --python PYTHON
    python data_lightcone.py convert ~/my_lightcones/*    # 21cmFAST v3 or v4 HDF5, .npz
    python data_lightcone.py inspect data/lightcones      # counts and figures

Files that `convert` reads (told apart by content, not by name)
  21cmFAST v3 .h5   as LightCone.save writes it; m_WDM counts only where P_CUTOFF is on
  21cmFAST v4 .h5   the same under InputParameters; no m_WDM
  named .npz        image (x, y, t from low z) in mK, scalars m_WDM, Om, log10_L_X, E_0,
                    log10_T_vir, zeta; if there: z (t), xH over node_z, seed, hlittle, OMb
  L3M release .npz  image and one array label or labels, in either of the two orders that its
                    authors use; the values of L_X and E_0 tell which

The store is a directory with one HDF5 file a lightcone, NAME.h5, T slices FORWARD in cosmic time
(highest z first)
  brightness_temp (T, X, Y) float16 mK, one run of bytes     global_signal (T,) its mean on the sky
  redshifts (T,) falling      history (2, 128): z and mean x_HI of the ionisation, NaN after the end
and in the attribute `about`, as JSON (one is read in a tenth of the time of twelve): parameters
(6,), NaN where the format cannot say; tau, x_hi_end (optical depth and neutral fraction at the
low-z end, NaN: unknown); passed (False: an extreme history, not for training); signal_end (slices
up to the last that is not all zero); seed (-1: unknown); cell_sky, cell_los (Mpc); z_low; cosmology
(h, Omega_b, sigma_8, n_s); options (21cmFAST's that are not the paper's); source.
NAME is a hash of what makes a simulation the same, so one simulation is one file, whoever adds it.
A file is written under a temporary name and renamed, and never changed: any number of processes and
cluster jobs (one --seed each) add to a store, and nobody waits for anybody.
"""
import argparse
import contextlib
import hashlib
import inspect
import io
import json
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import torch
from tqdm import tqdm

from data_arxiv import bounded, one_line, reading, writing

PARAMETERS = ("m_WDM", "Om", "log10_L_X", "E_0", "log10_T_vir", "zeta")      # the order everywhere
PRIORS = np.array([[0.3, 10], [0.2, 0.4], [38, 42], [100, 1500], [4.0, 5.3], [10, 250]])   # (6, 2)
SYMBOLS = [r"$m_{\rm WDM}$", r"$\Omega_m$", r"$\log_{10} L_X$", "$E_0$",
           r"$\log_{10} T_{\rm vir}$", r"$\zeta$"]                                   # for figures
UNITS = ["keV", "", "erg/s/(Msun/yr)", "eV", "K", ""]
DIGITS = [2, 3, 2, 0, 2, 0]                   # decimals that make sense
COLOURS = [                                   # Okabe and Ito, colour-blind safe
    "#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"]
HUBBLE = 0.6766                               # h; this line and three more: Planck 2018, flat LCDM
OMEGA_B = 0.04897
SIGMA_8 = 0.8102
N_S = 0.9665
COSMOLOGY = (HUBBLE, OMEGA_B, SIGMA_8, N_S)
COSMOLOGY_NAMES = ("h", "Omega_b", "sigma_8", "n_s")                                  # here
COSMOLOGY_KEYS = ("hlittle", "OMb", "SIGMA_8", "POWER_INDEX")                         # in 21cmFAST
N_HE = 0.083                                  # helium atoms per hydrogen atom
TAU = 0.054                                   # optical depth; it and its sigma: Planck 2018
TAU_SIGMA = 0.007
BINS = 2350                                   # the paper's lightcones: slices
CELL = 200 / 140                              # Mpc a slice
Z_LOW = 5.0                                   # where they begin
HISTORY = 128                                 # nodes of an ionisation history that a store keeps
LIGHT_SPEED = 2.99792458e10                   # cgs, as are all these
MPC = 3.0857e24
PROTON_MASS = 1.6726e-24
GRAVITY = 6.6743e-8
BOLTZMANN = 1.3807e-16
THOMSON = 6.6524e-25


# ---------------------------------------------------------------------------------------------
# Cosmology

def hubble(z, Om, h=HUBBLE):
    """H(z) in 1/s. As astropy's Planck15, which 21cmFAST takes its distances from: photons, two
    massless neutrinos and one of 0.06 eV."""
    radiation = 4.15e-5 * 0.8733 / h**2
    neutrino = 0.06 / 93.14 / h**2
    matter = (Om + neutrino) * (1 + z) ** 3
    return h * 1e7 / MPC * np.sqrt(matter + radiation * (1 + z) ** 4
                                   + 1 - Om - neutrino - radiation)


def hydrogen(h=HUBBLE, Ob=OMEGA_B):
    """Hydrogen nuclei per cm^3 today."""
    return 3 * (h * 1e7 / MPC) ** 2 / (8 * np.pi * GRAVITY) * Ob / (1 + 4 * N_HE) / PROTON_MASS


REDSHIFTS = np.linspace(0, 100, 20001)        # where distances are worked out


def comoving_distance(z, Om, h=HUBBLE):
    """Comoving distance to redshift z (array or number) in Mpc."""
    f = LIGHT_SPEED / hubble(REDSHIFTS, Om, h) / MPC
    steps = (f[1:] + f[:-1]) / 2 * np.diff(REDSHIFTS)
    return np.interp(z, REDSHIFTS, np.concatenate([[0], np.cumsum(steps)]))


def redshift_at(distance, Om, h=HUBBLE):
    """The inverse of `comoving_distance`."""
    return np.interp(distance, comoving_distance(REDSHIFTS, Om, h), REDSHIFTS)


def optical_depth(z, x_hi, Om, z_end, h=HUBBLE, Ob=OMEGA_B):
    """Thomson optical depth of an ionisation history: mean neutral fraction x_hi at the falling
    redshifts z. Neutral above z[0], ionised below z_end, helium singly ionised with hydrogen and
    the second time at z = 3. tau = c sigma_T n_H integral of (1 - x_HI)(1 + y)(1 + z)^2 / H(z)."""
    grid = np.linspace(0, z[0], 4001)
    x = np.where(grid < z_end, 0, np.interp(grid, z[::-1], x_hi[::-1]))
    electrons = (1 - x) * (1 + N_HE) + N_HE * (grid < 3)                   # per hydrogen nucleus
    integral = np.trapezoid(electrons * (1 + grid) ** 2 / hubble(grid, Om, h), grid)
    return float(LIGHT_SPEED * THOMSON * hydrogen(h, Ob) * integral)


def filter_reason(tau, x_hi_end, tau_sigma=5.0, max_x_hi=0.1):
    """Why this ionisation history is too extreme to train on: a sentence, or "" if it is not (or if
    the history is unknown)."""
    if abs(tau - TAU) > tau_sigma * TAU_SIGMA:                                    # False for NaN
        return (f"optical depth {tau:.3f} is not within {tau_sigma:g} sigma of Planck's "
                f"{TAU} +- {TAU_SIGMA}")
    if x_hi_end > max_x_hi:
        return (f"not reionised: mean neutral fraction {x_hi_end:.2f} > {max_x_hi:g} at the low-z "
                "end")
    return ""


def to_unit(parameters):
    """(..., 6) in physical units -> [0, 1] over the priors."""
    return (parameters - PRIORS[:, 0]) / (PRIORS[:, 1] - PRIORS[:, 0])


def to_physical(unit, j=slice(None)):
    """[0, 1] over the priors -> physical units, for all parameters (..., 6) or for parameter j."""
    return PRIORS[j, 0] + unit * (PRIORS[j, 1] - PRIORS[j, 0])


# ---------------------------------------------------------------------------------------------
# Reading anybody's lightcones

class Lightcone(NamedTuple):
    cube: np.ndarray | None         # (T, X, Y) float32, mK, forward in time: high z first
    parameters: np.ndarray          # (6,) in the order of PARAMETERS; NaN: the format cannot say
    redshifts: np.ndarray           # (T,) falling
    history: np.ndarray | None      # (2, nodes): falling redshifts, mean neutral fraction
    seed: int                       # -1: unknown
    sky: int                        # X = Y
    cell_sky: float                 # cell size on the sky, Mpc
    cell_los: float                 # and along the line of sight
    cosmology: tuple                # h, Omega_b, sigma_8, n_s; NaN: the file does not say
    options: str                    # 21cmFAST's that are not the paper's
    notes: list                     # what a user should know about this file, a sentence each


def read_lightcone(path, bins=BINS, cube=True):
    """Read the first `bins` line-of-sight bins (from low z; None: all) of a lightcone file in any
    of the formats above.

    cube=False leaves the cube unread (None) and is quick. Raises ValueError with one sentence when
    the file is broken, of no known format, unfinished, or made with settings under which the six
    parameters do not mean what they mean here."""
    with reading(path, "if it is truncated or damaged, copy it again") as path:
        if not path.is_file():
            raise ValueError(f"{path}: is {'a directory' if path.is_dir() else 'no file'}; "
                             "give lightcone files")
        with open(path, "rb") as f:
            magic = f.read(8)
        if magic.startswith(b"\x89HDF"):
            with h5py.File(path, "r", locking=False) as f:
                return finish(path, bins, cube, **read_21cmfast(path, f))
        if magic.startswith(b"PK"):
            with np.load(path, allow_pickle=False) as f:
                return finish(path, bins, cube, **read_npz(path, f))
        raise ValueError(f"{path}: {'neither HDF5 nor .npz' if magic else 'is an empty file'}")


# What changes the meaning of the parameters. Options by name, whichever group a version keeps them
# in; the values are the paper's, as 3.x and as 4.x write them.
OTHER_SOURCES = ("USE_MASS_DEPENDENT_ZETA", "USE_MINI_HALOS", "USE_HALO_FIELD")
PAPER_OPTIONS = {"INHOMO_RECO": (False,), "RECOMB_MODEL": ("none",), "CELL_RECOMB": (False,),
                 "PHOTON_CONS": (False,), "PHOTON_CONS_TYPE": ("no-photoncons",),
                 "POWER_SPECTRUM": (0, "EH"), "HMF": (1, "ST"), "USE_RELATIVE_VELOCITIES": (False,),
                 "USE_CMB_HEATING": (True,), "USE_LYA_HEATING": (True,), "APPLY_RSDS": (True,),
                 "SUBCELL_RSD": (False,), "X_RAY_SPEC_INDEX": (1,), "F_STAR10": (-1.3,),
                 "NU_X_BAND_MAX": (2000,), "HII_FILTER": (1, "sharp-k"),
                 "LYA_MULTIPLE_SCATTERING": (False,)}


def read_21cmfast(path, f):
    """21cmFAST's own files, 3.x and 4.x -> arguments of `finish`."""
    if "brightness_temp" in f:
        raise ValueError(f"{path}: is a store's lightcone already: copy it into the other store")
    v4 = "InputParameters" in f
    inputs = f["InputParameters"] if v4 else f
    if "astro_params" not in inputs:
        raise ValueError(f"{path}: HDF5, but not a 21cmFAST v3 or v4 lightcone (no astro_params)")
    settings = {}
    for group in inputs.values():
        for key, value in group.attrs.items():                # a flag may be a word
            settings[key] = {"True": True, "False": False}.get(str(value), value)
    parameters, notes = parameters_21cmfast(path, settings, v4)
    options = [f"{name} {settings[name]}" for name, values in PAPER_OPTIONS.items()
               if name in settings and settings[name] not in values]
    if settings.get("USE_SIGMA_8"):
        settings.setdefault("SIGMA_8", settings.get("ps_norm", np.nan))
    cosmology = [float(settings.get(key, np.nan)) for key in COSMOLOGY_KEYS]
    for key, flat in (("wl", -1), ("OMk", 0)):
        if abs(settings.get(key, flat) - flat) > 0.002:
            raise ValueError(f"{path}: made with {key} = {settings[key]:g}, not flat LCDM")

    image = f["lightcones/brightness_temp"]
    side = settings["HII_DIM"]
    cell = settings.get("BOX_LEN", settings.get("LOWRES_CELL_SIZE_MPC", 1.5) * side) / side
    if not 0 < cell < np.inf:
        raise ValueError(f"{path}: cells of {cell:g} Mpc (BOX_LEN over HII_DIM): simulate it again")
    distances = f.get("lightcone_distances", f.get("distances"))                         # v4, v3
    if distances is None:                          # up to 3.3.1: cells are cubes, from `redshift`
        start = comoving_distance(f.attrs["redshift"], parameters[1], assumed(cosmology)[0])
        distances = start + cell * np.arange(image.shape[-1])

    history = None
    nodes = inputs["node_redshifts"]
    if nodes.shape:
        check_finished(path, f.attrs, nodes[:])
        means = f.get("global_quantities", {})
        x_hi = means.get("neutral_fraction", means.get("xH_box"))                        # v4, v3
        history = None if x_hi is None else (nodes[:], x_hi[:])
    return {
        "shape": image.shape, "image": lambda: image, "parameters": parameters,
        "distances": distances[:], "history": history, "cosmology": cosmology,
        "seed": int(inputs.attrs.get("random_seed", -1)), "cell_sky": cell, "side": side,
        "options": ", ".join(options), "notes": notes,
        "first": int(f.attrs.get("lowz_buffer_pixels", 0)),
        "spare": int(f.attrs.get("highz_buffer_pixels", 0))}


def parameters_21cmfast(path, settings, v4):
    """The six parameters of 21cmFAST's settings, NaN where one does not count -> (6,), notes."""
    source = settings.get("SOURCE_MODEL", "CONST-ION-EFF")
    other = [name for name in OTHER_SOURCES if settings.get(name)]
    if other or source != "CONST-ION-EFF":
        raise ValueError(f"{path}: lacks zeta: made with {other[0] if other else source}, where "
                         "HII_EFF_FACTOR does not count")
    T_vir = settings["ION_Tvir_MIN"]
    unknown = {}
    if v4:
        unknown["m_WDM"] = "21cmFAST v4 has none"
    elif not settings.get("P_CUTOFF"):
        unknown["m_WDM"] = "P_CUTOFF is off"
    for switch in ("USE_TS_FLUCT", "USE_X_RAY_HEATING"):
        if not settings.get(switch, True):
            unknown["log10_L_X"] = f"{switch} is off: L_X and NU_X_THRESH do not count"
            unknown["E_0"] = unknown["log10_L_X"]
    if settings.get("M_MIN_in_Mass"):
        unknown["log10_T_vir"] = "M_MIN_in_Mass is on, ION_Tvir_MIN does not count"
    elif abs(settings.get("X_RAY_Tvir_MIN", T_vir) - T_vir) > 0.01:
        unknown["log10_T_vir"] = "X_RAY_Tvir_MIN is not ION_Tvir_MIN"
    names = ("M_WDM", "OMm", "L_X", "NU_X_THRESH", "ION_Tvir_MIN", "HII_EFF_FACTOR")
    parameters = [np.nan if own in unknown else float(settings[name])
                  for own, name in zip(PARAMETERS, names)]
    return np.array(parameters), [f"{k} unknown: {why}" for k, why in unknown.items()]


def check_finished(path, attributes, nodes):
    """ValueError if 21cmFAST's checkpoint says that it stopped before the last node."""
    done = attributes.get("last_completed_node", -1) + 1                                  # v4
    if "current_redshift" in attributes:                                                  # v3
        done = int(np.sum(nodes >= attributes["current_redshift"] - 1e-3))
    if 0 < done < len(nodes):
        raise ValueError(f"{path}: unfinished: stopped at z = {nodes[done - 1]:.1f} "
                         f"(node {done} of {len(nodes)})")


def read_npz(path, f):
    """The two kinds of .npz -> arguments of `finish`."""
    if "image" not in f:
        raise ValueError(f"{path}: lacks image (and is not a lightcone .npz)")
    label = [key for key in ("label", "labels") if key in f]
    if len(label) + any(key in f for key in PARAMETERS) > 1:
        raise ValueError(f"{path}: holds {label[0]} and other parameters: keep one of them")
    if label:                                                                # the L3M release
        parameters = order_labels(path, label[0], np.asarray(f[label[0]], float).ravel())
    else:
        missing = [key for key in PARAMETERS if key not in f]
        if missing:
            raise ValueError(f"{path}: lacks {', '.join(missing)}")
        parameters = np.array([float(f[key]) for key in PARAMETERS])
    with f.zip.open("image.npy") as header:              # the cube stays packed
        np.lib.format.read_magic(header)
        shape = np.lib.format.read_array_header_1_0(header)[0]
    return {
        "shape": shape, "side": shape[0], "image": lambda: f["image"], "parameters": parameters,
        "z": f["z"].astype(float) if "z" in f else None,
        "history": (f["node_z"], f["xH"]) if "xH" in f and "node_z" in f else None,
        "cosmology": [float(f.get(key, np.nan)) for key in COSMOLOGY_KEYS],
        "seed": int(f.get("seed", -1))}


def order_labels(path, name, p):
    """The L3M release's six numbers in the order of PARAMETERS: the ranges of L_X and E_0 tell."""
    if p.shape != (6,):
        raise ValueError(f"{path}: {name} has {p.size} values, expected six parameters")
    swapped = p[[0, 1, 3, 2, 4, 5]]
    for ordered in (p, swapped):
        inside = (PRIORS[2:4, 0] <= ordered[2:4]) & (ordered[2:4] <= PRIORS[2:4, 1])
        if inside.all():
            return ordered
    raise ValueError(f"{path}: cannot tell the order of {name}: one of its 3rd and 4th value must "
                     "be log10 L_X (38 to 42), the other E_0 (100 to 1500 eV), found "
                     f"{p[2]:g} and {p[3]:g}")


def assumed(cosmology):
    """A file's h, Omega_b, sigma_8, n_s, and the paper's where it does not say (NaN). ValueError
    for what no universe has, such as h = 67."""
    values = np.where(np.isnan(cosmology), COSMOLOGY, cosmology).tolist()
    if not all(paper / 2 < value < paper * 2 for value, paper in zip(values, COSMOLOGY)):
        raise ValueError(f"h, Omega_b, sigma_8, n_s are {values}, far from the paper's "
                         f"{COSMOLOGY}: mend those of another unit, such as h = 67")
    return tuple(values)


def finish(path, bins, want_cube, *, shape, side, image, parameters, history, cosmology, z=None,
           distances=None, seed=-1, cell_sky=None, options="", notes=(), first=0, spare=0):
    """What all formats share -> Lightcone: checks, the first bins, forward in time.

    image() is the cube (x, y, t from low z) of this shape, read only if it is wanted; z or
    distances (t,) Mpc, or neither; history: two arrays, z and x_HI of the nodes. Slices before
    `first` and the last `spare` are no result."""
    if len(shape) != 3 or shape[:2] != (side, side):
        raise ValueError(f"{path}: wrong axis order: the cube is {' x '.join(map(str, shape))}, "
                         f"expected (x, y, t) with a sky of {side} x {side}")
    Om = parameters[1]
    if not 0 < Om < 1:
        raise ValueError(f"{path}: Om = {Om:g}, so the redshifts of the bins cannot be worked out")
    h = assumed(cosmology)[0]
    notes = [*notes]
    if z is None and distances is None:                                       # the L3M release
        distances = comoving_distance(Z_LOW, Om, h) + CELL * np.arange(shape[2])
        notes.append("no redshifts in the file: bins of 200/140 Mpc from z = 5")
    if z is None:
        z = redshift_at(distances, Om, h)
    z = np.ravel(z)
    if z.size != shape[2]:
        raise ValueError(f"{path}: {z.size} redshifts for {shape[2]} line-of-sight bins")
    if not np.all(np.diff(z) > 0):
        raise ValueError(f"{path}: wrong axis order: redshift must rise along t (reverse the cube "
                         "and z together), without NaN")
    z = z[first:shape[2] - spare][:bins]
    if bins and len(z) < bins:
        raise ValueError(f"{path}: {len(z)} line-of-sight bins, fewer than --bins {bins}")
    steps = np.diff(comoving_distance(z, Om, h))
    if not len(steps) or steps.max() > 1.1 * steps.min():
        raise ValueError(f"{path}: the bins are not equal steps of comoving distance")
    history = clean_history(history, notes)
    if history is None:
        notes.append("no ionisation history: passes the filter unfiltered")
    elif z[0] < history[0, -1] - 0.02:
        raise ValueError(f"{path}: {np.sum(z < history[0, -1])} slices lie below the last node of "
                         f"its history (z = {history[0, -1]:.2f}): they were not simulated")
    notes += about_cosmology(cosmology, options)
    cube = None
    if want_cube:
        cube = np.moveaxis(image()[:, :, first:first + len(z)], 2, 0)[::-1]           # (T, X, Y)
        cube = cube.astype(np.float32, "C", "same_kind")                              # not complex
        check_cube(path, cube, z[::-1], history)
    cell_los = float(steps.mean())
    return Lightcone(cube, parameters, z[::-1], history, seed, shape[0], cell_sky or cell_los,
                     cell_los, tuple(cosmology), options, notes)


def clean_history(history, notes):
    """Nodes and neutral fractions -> (2, nodes) of the finite nodes, redshift falling; None where
    there is none."""
    if history is None:
        return None
    history = np.asarray(history, float)                        # unequal lengths: a ValueError
    finite = np.isfinite(history).all(axis=0)
    if not finite.all():
        notes.append(f"{np.sum(~finite)} nodes of the ionisation history are no numbers: left out")
    history = history[:, finite]
    if history.shape[1] < 2:
        return None
    if history[1].min() < -0.01 or history[1].max() > 1.01:
        raise ValueError("the ionisation history is not a neutral fraction from 0 to 1")
    return history[:, np.argsort(-history[0])]


def about_cosmology(cosmology, options):
    """Notes on the cosmology and the options, where they are unknown or not the paper's."""
    compared = list(zip(COSMOLOGY_NAMES, cosmology, COSMOLOGY))
    unknown = [name for name, value, _ in compared if np.isnan(value)]
    other = [f"{name} {value:g} (the paper's {paper:g})" for name, value, paper in compared
             if abs(value / paper - 1) > 0.002]                               # False for NaN
    notes = []
    if unknown:
        notes.append(f"does not say {', '.join(unknown)}: the paper's assumed")
    if options:
        other.append(options)
    if other:
        notes.append(f"not as in the paper: {', '.join(other)}")
    return notes


def check_cube(path, cube, z, history):
    """ValueError if the cube (T, X, Y) is not brightness temperature in mK, or not all there."""
    bad = cube.size - np.count_nonzero(np.abs(cube) < 5000)
    if bad:                                             # 21cmFAST's reach 533
        raise ValueError(f"{path}: {bad} voxels are NaN, infinite or beyond 5000 mK: convert "
                         "another unit to mK, leave out slices that were filled up")
    x_hi = np.ones(len(z))
    if history is not None and history[1].any():        # of zeros alone: not written yet
        x_hi = np.interp(z, history[0, ::-1], history[1, ::-1])
    neutral = x_hi > 0.4                                # finished ones reach 0.29, between nodes
    check_unit(path, np.abs(cube.mean(axis=(1, 2))).max(), (x_hi > 0.9).any())
    dead = ~cube.any(axis=(1, 2)) & neutral
    if history is not None and dead.any():
        raise ValueError(f"{path}: unfinished: {dead.sum()} slices up to z = {z[dead][0]:.1f} are "
                         f"all zero, where its history has x_HI = {x_hi[dead].max():.2f}")


def check_unit(path, highest, neutral):
    """ValueError if this cannot be the highest |sky mean| in mK of a lightcone, with or without
    slices of neutral gas: 21cmFAST's from z = 5 to 35 have 27 to 365, few of the fast ones 6."""
    if neutral and highest < 3:
        raise ValueError(f"{path}: no sky mean is above {highest:.3g} mK: is it in kelvin, "
                         "normalised, without its mean, or empty?")
    if highest > 500:
        raise ValueError(f"{path}: a slice of {highest:.4g} mK on average: is it in another unit "
                         "(convert it to mK), or filled up (leave it out)?")


def history_summary(lightcone):
    """(optical depth, mean neutral fraction at the low-z end); NaN where there is no history."""
    if lightcone.history is None:
        return np.nan, np.nan
    z, x_hi = lightcone.history
    z_end = lightcone.redshifts[-1]
    h, Omega_b, *_ = assumed(lightcone.cosmology)
    tau = optical_depth(z, x_hi, lightcone.parameters[1], z_end, h, Omega_b)
    return tau, float(np.interp(z_end, z[::-1], x_hi[::-1]))


# ---------------------------------------------------------------------------------------------
# The store

class Setting(NamedTuple):
    """What all lightcones of a store have in common."""
    bins: int
    sky: int
    z_low: float
    cell_sky: float
    cell_los: float
    cosmology: tuple                # as the redshifts were worked out: no NaN
    options: str


def setting_of(lightcone):
    """The Setting of a Lightcone."""
    return Setting(len(lightcone.redshifts), lightcone.sky, float(lightcone.redshifts[-1]),
                   lightcone.cell_sky, lightcone.cell_los, assumed(lightcone.cosmology),
                   lightcone.options)


def difference(a, b):
    """Why a lightcone of Setting a cannot be in a store of Setting b: a sentence, or ""."""
    if a.sky != b.sky:
        return f"{a.sky} x {a.sky} on the sky, the store has {b.sky} x {b.sky}"
    if a.bins != b.bins:
        return f"{a.bins} slices, the store has {b.bins}"
    if abs(a.z_low - b.z_low) > 0.05:
        return f"starts at z = {a.z_low:.2f}, the store at {b.z_low:.2f}"
    if abs(a.cell_sky / b.cell_sky - 1) > 0.02:
        return f"cells of {a.cell_sky:.4g} Mpc, the store's {b.cell_sky:.4g}"
    if abs(a.cell_los / b.cell_los - 1) > 0.02:
        return (f"cells of {a.cell_los:.4g} Mpc along the line of sight, the store's "
                f"{b.cell_los:.4g}")
    for name, mine, theirs in zip(COSMOLOGY_NAMES, a.cosmology, b.cosmology):
        if abs(mine / theirs - 1) > 0.002:
            return f"made with {name} = {mine:g}, the store with {theirs:g}"
    if a.options != b.options:
        usual = "the usual options"
        return f"made with {a.options or usual}, the store with {b.options or usual}"
    return ""


def name_of(seed, parameters, shape, maker="", content=None):
    """NAME of a lightcone: a hash of its seed (of its `content`, an array, where the seed is
    unknown), of its parameters as float32, and of its shape (T, X). The fast simulator's `maker`
    keeps its lightcones apart from 21cmFAST's of the same seed; a file says nothing of this."""
    if seed < 0:
        seed = hashlib.blake2b(np.ascontiguousarray(content), digest_size=16).hexdigest()
    values = " ".join(repr(float(p)) for p in np.asarray(parameters, np.float32))
    text = f"{maker} {seed} {values} {' '.join(map(str, shape))}"
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def make_row(lightcone, source, tau_sigma=5.0, max_x_hi=0.1):
    """What the file of a lightcone holds (top of this file), as a dict."""
    cube = lightcone.cube.astype("<f2")
    tau, x_hi_end = history_summary(lightcone)
    history = np.full((2, HISTORY), np.nan, np.float32)
    if lightcone.history is not None:
        nodes = lightcone.history.shape[1]
        kept = np.linspace(0, nodes - 1, min(nodes, HISTORY)).round().astype(int)    # thinned
        history[:, :len(kept)] = lightcone.history[:, kept]
    alive = np.flatnonzero(cube.any(axis=(1, 2))).tolist()
    return {
        "brightness_temp": cube, "global_signal": cube.mean(axis=(1, 2), dtype=np.float32),
        "redshifts": lightcone.redshifts.astype(np.float32), "history": history,
        "parameters": lightcone.parameters, "tau": tau, "x_hi_end": x_hi_end,
        "passed": not filter_reason(tau, x_hi_end, tau_sigma, max_x_hi),
        "signal_end": max(alive, default=-1) + 1, "seed": lightcone.seed,
        "cell_sky": lightcone.cell_sky, "cell_los": lightcone.cell_los,
        "z_low": float(lightcone.redshifts[-1]), "cosmology": lightcone.cosmology,
        "options": lightcone.options, "source": str(source)}


DATASETS = ("brightness_temp", "global_signal", "redshifts", "history")


def save_row(store, name, row):
    """Add a lightcone (of `make_row`) to a store -> whether it was not there already.

    HDF5 makes the file in memory: at a full disk it crashes, where a plain write raises."""
    path = Path(store) / f"{name}.h5"
    if path.exists():
        return False
    content = io.BytesIO()
    about = dict(row)
    with h5py.File(content, "w") as f:
        for key in DATASETS:
            f[key] = about.pop(key)
        f.attrs["about"] = json.dumps(about, default=lambda number: number.tolist())
    with writing(path) as temporary:
        temporary.write_bytes(content.getbuffer())
    return True


def read_row(path, signals):
    """The file of a lightcone without its cube -> its Setting, and a dict of all else, with the
    `offset` of the cube in the file."""
    with reading(path, "delete it and make it again"), h5py.File(path, "r", locking=False) as f:
        if "brightness_temp" not in f or "about" not in f.attrs:
            raise ValueError(f"{path}: is not a lightcone of a store, so it cannot lie in one; "
                             "`python data_lightcone.py convert` adds lightcone files to a store")
        if len(path.stem) != 12:       # as name_of has it: a copy could be trained on and tested
            raise ValueError("is not called as it was written: is it a copy?")
        cube = f["brightness_temp"]
        row = json.loads(f.attrs["about"])
        row["offset"] = cube.id.get_offset()             # None: packed by somebody else's program
        if row["offset"] is None or cube.dtype != "<f2":
            raise ValueError("the cube is not one run of float16")
        if signals:
            row |= {key: f[key][:] for key in DATASETS[1:]}
        check_row(row, len(cube))
        return Setting(cube.shape[0], cube.shape[1], row["z_low"], row["cell_sky"], row["cell_los"],
                       assumed(row["cosmology"]), row["options"]), row


def check_row(row, T):
    """ValueError if what is read from a lightcone's file is not of the kind that was written."""
    shapes = {"parameters": (6,), "cosmology": (4,), "global_signal": (T,), "redshifts": (T,),
              "history": (2, HISTORY)}
    kinds = {"passed": "b", "seed": "i", "signal_end": "i", "source": "U", "options": "U"}
    for key in {*kinds, "parameters", "tau", "x_hi_end", *row}:
        value = np.asarray(row[key])
        shape = shapes.get(key, ())
        if value.shape != shape or value.dtype.kind not in kinds.get(key, "if"):
            raise ValueError(f"{key} is not of the kind and the shape that were written")
    if not min(row["cell_sky"], row["cell_los"]) > 0:
        raise ValueError("its cells have no size")


class Store:
    """A store in memory, but for its cubes: columns over the sorted `names`, and `slices`.

    parameters (N, 6), tau, x_hi_end, passed, signal_end, seed, source, options (N,), cosmology
    (N, 4); with `signals` redshifts and global_signal (N, T), history (N, 2, 128). The same for
    all: T, sky, cell_sky, cell_los (Mpc), setting."""

    def __init__(self, path, names, rows, setting):
        for key in rows[0]:
            setattr(self, key, np.array([row[key] for row in rows]))
        self.path = path
        self.names = names
        self.index = {name: i for i, name in enumerate(names)}
        self.setting = setting
        self.T = setting.bins
        self.sky = setting.sky
        self.cell_sky = setting.cell_sky
        self.cell_los = setting.cell_los

    def slices(self, name, start, stop):
        """Slices [start, stop) of a lightcone: (n, X, X) float16 mK. One read of a run of bytes:
        no file stays open, and opening it costs 20 us where HDF5 takes 300."""
        path = f"{self.path}/{name}.h5"
        run = np.empty((min(stop, self.T) - start, self.sky, self.sky), "<f2")
        first = self.offset[self.index[name]] + start * self.sky**2 * 2
        with reading(path, "a lightcone in use must stay as it is"), open(path, "rb", 0) as f:
            if os.preadv(f.fileno(), [run], first) < run.nbytes:
                raise ValueError("is cut short")
        return run


def read_store(path, signals=True):
    """A directory of lightcones -> Store. signals=False leaves out what is T long.

    Raises ValueError with one sentence if it is none, or holds lightcones of two geometries or
    cosmologies (which it names)."""
    path = Path(path)
    if path.is_file():
        raise ValueError(f"{path}: is a file, as earlier versions wrote; a store is a directory "
                         "now: simulate or convert again, into another --out")
    files = sorted(path.glob("[!.]*.h5"))                 # not ._NAME.h5, which macOS adds
    if not files:
        raise ValueError(f"{path}: no such store, or an empty one; make one with "
                         "`python data_lightcone.py simulate` or `convert`")
    settings, rows = zip(*(read_row(file, signals) for file in files))
    for file, setting in zip(files, settings):
        why = difference(setting, settings[0])
        if why:
            raise ValueError(f"{path}: {file.name} and {files[0].name} cannot be in one store "
                             f"({file.name}: {why}): move one kind into another directory")
    return Store(path, [file.stem for file in files], rows, settings[0])


def store_at(out):
    """The Store to add to, without its signals; None where there is none yet."""
    filled = out.is_file() or any(out.glob("[!.]*.h5"))
    return read_store(out, signals=False) if filled else None


def open_for_adding(out, size):
    """Make the directory of a store, remove what killed processes of this machine left half-written
    (of another machine after a day), and see that `size` bytes more have room. OSError if not."""
    out.mkdir(parents=True, exist_ok=True)
    for path in out.glob(".*.tmp"):
        ours, _, pid = path.stem.rpartition("-")                      # .NAME.h5.HOST-PID.tmp
        ended = ours.endswith(f".{platform.node()}") and not is_running(int(pid))
        with contextlib.suppress(FileNotFoundError):                  # another job cleans up, too
            old = time.time() - path.stat().st_mtime > 86400
            if old or ended:
                path.unlink()
    free = shutil.disk_usage(out).free
    if free < size * 1.02:
        raise OSError(f"{out}: {free / 1e9:.3g} GB are free, {size / 1e9:.3g} GB are needed: give "
                      "--out another disk")


def is_running(pid):
    """Whether a process of this machine has this number."""
    try:
        os.kill(pid, 0)
    except OSError as e:
        return isinstance(e, PermissionError)                         # another user's
    return True


# ---------------------------------------------------------------------------------------------
# Convert

def convert(files, out, bins=BINS, tau_sigma=5.0, max_x_hi=0.1):
    """Read lightcone files into the store `out`; returns a list of dicts, one a file: status kept /
    there / dropped / skipped, and why.

    A first pass reads everything but the cubes and decides; the second copies cube after cube.
    Files that are in the store already are left alone, so an interrupted conversion is continued by
    the same command. One simulation in two files is taken once, or it could stand in both the
    training and the test set."""
    out = Path(out)
    store = store_at(out)
    sources = dict(zip(store.names, store.source)) if store else {}   # {NAME: file that it is from}
    report = []
    jobs = []                                                         # (entry, Setting)
    for path in tqdm(files, desc="looking", unit="file", disable=len(files) < 100):
        entry = {"file": os.path.realpath(path), "status": "skipped", "reason": "", "notes": []}
        report.append(entry)
        lightcone = try_to_read(entry, bins, cube=False)
        if lightcone and look(entry, lightcone, sources, tau_sigma, max_x_hi):
            jobs.append((entry, setting_of(lightcone)))

    setting = store.setting if store else commonest([own for _, own in jobs])
    for entry, own in jobs:
        entry["reason"] = difference(own, setting)
    jobs = [entry for entry, _ in jobs if not entry["reason"]]
    if not jobs:
        return report
    open_for_adding(out, len(jobs) * bins * setting.sky**2 * 2)
    for entry in tqdm(jobs, desc="converting", unit="lightcone"):
        lightcone = try_to_read(entry, bins, cube=True)
        if lightcone is None:
            continue
        row = make_row(lightcone, entry["file"], tau_sigma, max_x_hi)
        name = name_of(lightcone.seed, lightcone.parameters, (bins, lightcone.sky),
                       content=row["brightness_temp"])
        if save_row(out, name, row):
            entry["status"] = "kept"
        else:                                                         # added since the first look
            entry["reason"] = "the same simulation is in the store already"
    return report


def try_to_read(entry, bins, cube):
    """The Lightcone of a file in the report, or None and in its `entry` the reason."""
    try:
        return read_lightcone(entry["file"], bins, cube)
    except ValueError as e:
        entry["reason"] = str(e).removeprefix(f"{entry['file']}: ")
        return None


def look(entry, lightcone, sources, tau_sigma, max_x_hi):
    """Fill in a file's `entry` in the report; whether it is to be converted. `sources` is
    {NAME: file} of what is in the store or about to be."""
    tau, x_hi_end = history_summary(lightcone)
    entry.update(parameters=dict(zip(PARAMETERS, map(or_none, lightcone.parameters))),
                 tau=or_none(tau), x_hi_end=or_none(x_hi_end), sky=lightcone.sky,
                 seed=lightcone.seed, notes=lightcone.notes)
    for name, value, (low, high) in zip(PARAMETERS, lightcone.parameters, PRIORS):
        if value < low or value > high:
            entry["reason"] = f"{name} = {value:g} lies outside the prior, {low:g} to {high:g}"
            return False
    file = entry["file"]
    name = file                                                       # unknown seed: once a file
    there = file in sources.values()
    if lightcone.seed >= 0:
        shape = (len(lightcone.redshifts), lightcone.sky)
        name = name_of(lightcone.seed, lightcone.parameters, shape)
        there = sources.get(name) == file                             # no other one of this path
    if there:
        entry.update(status="there", reason="in the store already")
    elif name in sources:
        entry["reason"] = f"same seed and parameters as {Path(sources[name]).name}"
    elif reason := filter_reason(tau, x_hi_end, tau_sigma, max_x_hi):
        entry.update(status="dropped", reason=reason)
    else:
        sources[name] = file
        return True
    return False


def or_none(value):
    """A number for JSON, which knows no NaN: None."""
    return None if np.isnan(value) else float(value)


def commonest(settings):
    """The Setting that most of these agree with; None of none."""
    counts = {}
    for setting in settings:
        kind = next((k for k in counts if not difference(setting, k)), setting)
        counts[kind] = counts.get(kind, 0) + 1
    return max(counts, key=counts.get, default=None)


def print_report(report):
    """The table of a conversion: every file that was not taken, and all of them if they fit a
    screen or two."""
    columns = " ".join(f"{name:>11}" for name in (*PARAMETERS, "tau", "x_HI"))
    print(f"{'file':22} {'status':8} {columns}  remarks")
    counts = dict.fromkeys(("kept", "there", "dropped", "skipped"), 0)
    for entry in report:
        status = entry["status"]
        counts[status] += 1
        values = []
        if "parameters" in entry:
            values = [*entry["parameters"].values(), entry["tau"], entry["x_hi_end"]]
        if len(report) <= 100 or status in ("dropped", "skipped"):
            columns = " ".join("    unknown" if v is None else f"{v:11.4g}" for v in values)
            remarks = "; ".join([entry["reason"], *entry["notes"]]).strip("; ")
            print(f"{Path(entry['file']).name:22} {status:8} {columns:95}  {remarks}")
    print(f"{len(report)} files: {counts['kept']} kept, {counts['there']} in the store already, "
          f"{counts['dropped']} dropped by the filter, {counts['skipped']} skipped")


# ---------------------------------------------------------------------------------------------
# The fast simulator

DELTA_C = 1.68                                     # linear overdensity at which a halo collapses
IONISING_REACH = 15.0                              # Mpc: how far an ionising photon gets at most


def matter_power(k, Om):
    """Linear P(k) of cold dark matter (k in 1/Mpc), not normalised: the spectrum without wiggles of
    Eisenstein & Hu, astro-ph/9709112, eq. 26 to 31."""
    theta = 2.7255 / 2.7
    w = Om * HUBBLE**2
    wb = OMEGA_B * HUBBLE**2
    fb = OMEGA_B / Om
    sound = 44.5 * np.log(9.83 / w) / np.sqrt(1 + 10 * wb**0.75)
    alpha = 1 - 0.328 * np.log(431 * w) * fb + 0.38 * np.log(22.3 * w) * fb**2
    q = k * theta**2 / (w * (alpha + (1 - alpha) / (1 + (0.43 * k * sound) ** 4)))
    L = np.log(2 * np.e + 1.8 * q)
    T = L / (L + (14.2 + 731 / (1 + 62.5 * q)) * q**2)
    return k**N_S * T**2


def warm_cutoff(k, Om, m_wdm):
    """What warm dark matter of m_wdm keV does to the transfer function: Bode, Ostriker & Turok,
    astro-ph/0010389, in the form that 21cmFAST uses."""
    cutoff = 0.201 * ((Om - OMEGA_B) * HUBBLE**2 / 0.15) ** 0.15 * m_wdm**-1.15              # Mpc
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
    """Collapsed fraction above the peak height nu = delta_c / (D sigma): the integral of Sheth &
    Tormen's mass function, with 21cmFAST's constants."""
    A = 0.353
    a = 0.73
    p = 0.175
    grid = np.linspace(0, 60, 24001)[1:]
    f = A * np.sqrt(2 * a / np.pi) * (1 + (a * grid**2) ** -p) * np.exp(-a * grid**2 / 2)
    above = np.cumsum(f[::-1])[::-1] * (grid[1] - grid[0])
    return np.exp(np.interp(nu, grid, np.log(np.maximum(above, 1e-300))))


def halo_history(z, m_wdm, Om, log_tvir, k, power):
    """Growth D(z), sigma(M_min) today, and the mean collapsed fraction above M_min, each (Z,).

    `power` is the normalised spectrum of cold dark matter (Mpc^3) at k."""
    cold = (Om - OMEGA_B) * HUBBLE**2 / 0.15
    rho = 2.7754e11 * Om * HUBBLE**2                                              # Msun / Mpc^3
    O_z = Om * (1 + z) ** 3 / (Om * (1 + z) ** 3 + 1 - Om)
    contrast = 18 * np.pi**2 + 82 * (O_z - 1) - 39 * (O_z - 1) ** 2
    # Msun; Barkana & Loeb, astro-ph/0010468, eq. 26
    m_vir = (7030.97 / HUBBLE * np.sqrt(O_z / (Om * contrast))
             * (10**log_tvir / (0.59 * (1 + z))) ** 1.5)
    # Msun; warm dark matter, as 21cmFAST's M_J_WDM
    m_jeans = 60 * 3.06e8 * np.sqrt(cold) * m_wdm**-4 * (1.2 * cold) ** 1.5
    truncated = power * warm_cutoff(k, Om, m_wdm) ** 2
    masses = np.geomspace(1e6, 1e15, 46)
    radii = (3 * masses / (4 * np.pi * rho)) ** (1 / 3)
    sigmas = [variance_of(truncated, k, R) ** 0.5 for R in radii]
    sigma_min = np.interp(np.log(np.maximum(m_vir, m_jeans)), np.log(masses), sigmas)
    D = growth(z, Om)
    return D, sigma_min, sheth_tormen_fraction(DELTA_C / (D * sigma_min))


def xray_heat(z, stars, dt_dz, Om, log_lx, e_0):
    """Heat in erg/s per hydrogen nucleus that X-rays bring at the rising redshifts z, (Z,).

    `stars` is the fraction of the baryons that becomes stars in a second, dt_dz is |dt/dz| in s.
    X-rays of an energy (K, 1, 1) that are absorbed at z (., Z, 1) left at z' (., 1, Z) with more by
    (1 + z') / (1 + z). Cross section per hydrogen nucleus with helium ~ energy^-3; with it and
    H ~ (1 + z)^1.5 the optical depth from z' to z has a closed form. A step of z' can be many mean
    free paths: exp(-depth) is averaged over it."""
    energy = np.geomspace(1, 1e4 / e_0, 24)[:, None, None] * e_0                            # eV
    n_h = hydrogen() * (1 + z) ** 3                                                       # cm^-3
    cross = 1.6e-17 * (energy / 13.6) ** -3                                                # cm^2
    middles = (z[1:] + z[:-1]) / 2
    edges = np.maximum(np.concatenate([z[:1], middles, z[-1:]]), z[:, None])      # (Z, Z + 1)
    paths = (n_h * LIGHT_SPEED / hubble(z, Om))[:, None]
    depth = cross * paths * (1 - ((1 + edges) / (1 + z[:, None])) ** -1.5) / 1.5   # (K, Z, Z + 1)
    through = -np.diff(np.exp(-depth), axis=2) / np.maximum(np.diff(depth, axis=2), 1e-12)
    escape = np.exp((800 - e_0) / 280)                          # NOT in 21cmFAST: see simulate_fast
    # erg/s/eV per Msun/yr, ~ 1 / energy
    emitted = (10**log_lx * escape / np.log(2000 / e_0) / energy
               / np.maximum((1 + z) / (1 + z[:, None]), 1))
    msun_per_year = stars * PROTON_MASS * (1 + 4 * N_HE) / (1.989e33 / 3.156e7)
    # (K, Z) erg/s/eV/cm^2 per hydrogen nucleus per cm^3
    light = np.sum(emitted * through * msun_per_year * LIGHT_SPEED * dt_dz * np.diff(edges), axis=2)
    absorbed = light * cross[:, :, 0] * n_h                       # erg/s/eV per hydrogen nucleus
    return 0.3 * np.trapezoid(absorbed, energy[:, 0, 0], axis=0)  # the rest ionises and excites


def lyman_alpha_coupling(z, stars, Om):
    """x_alpha (Z,): 9690 photons a baryon between Lyman alpha and the Lyman limit, flat; those that
    stop at level n cascade to alpha with the fraction f."""
    dz = np.gradient(z)
    flux = np.zeros(len(z))                                            # cm^-2 s^-1 Hz^-1 sr^-1
    fractions = (1, 0, 0.2609, 0.3078, 0.3259, 0.3353, 0.3410, 0.3448, 0.3476)
    for n, f in enumerate(fractions, start=2):
        horizon = (1 + z) * (1 - (n + 1.0) ** -2) / (1 - float(n) ** -2) - 1
        within = (z[None, :] >= z[:, None]) & (z[None, :] <= horizon[:, None])
        flux += f * np.sum(within * stars * dz / hubble(z, Om), axis=1)
    flux *= (LIGHT_SPEED * (1 + z) ** 2 / (4 * np.pi) * hydrogen() * (1 + 4 * N_HE)
             * 9690 / 8.22e14)
    return 1.7e11 * flux / (1 + z)


def thermal_history(z, f_coll, Om, log_lx, e_0):
    """Mean histories on the rising redshifts z, each (Z,): heat that X-rays left in the gas (K, on
    top of adiabatic cooling), adiabatic temperature (K), and the Lyman-alpha coupling x_alpha.

    Stars form with efficiency 0.05 as f_coll grows (Pritchard & Loeb, arXiv:1109.6012, 3.2-3.4)."""
    dz = np.gradient(z)
    dt_dz = 1 / (hubble(z, Om) * (1 + z))                                          # |dt/dz|, s
    stars = 0.05 * np.maximum(-np.gradient(f_coll, z), 0) / dt_dz
    heat = xray_heat(z, stars, dt_dz, Om, log_lx, e_0)
    rise = heat / (1.5 * BOLTZMANN * (1 + N_HE)) * dt_dz * dz / (1 + z) ** 2
    warm = (1 + z) ** 2 * np.cumsum(rise[::-1])[::-1]
    return warm, 0.0186 * (1 + z) ** 2, lyman_alpha_coupling(z, stars, Om)


def density_field(seed, k, power, bins, sky, depth, side):
    """A Gaussian field of the linear density today in cells of depth x side x side Mpc, as the
    function smooth(R) -> (T, X, Y) delta in spheres of R Mpc (0: in cells), and its variance.

    Every slice has the mean density (21cmFAST: every box), or 7 Mpc of it would carry more cosmic
    variance than the parameters' mark on the global signal."""
    kz = 2 * np.pi * np.fft.fftfreq(bins, depth)[:, None, None]
    kx = 2 * np.pi * np.fft.fftfreq(sky, side)[:, None]
    ky = 2 * np.pi * np.fft.rfftfreq(sky, side)
    kk = np.sqrt(kz**2 + kx**2 + ky**2)                                      # (T, X, Y//2 + 1)
    spectrum = np.exp(np.interp(np.log(np.maximum(kk, 1e-4)), np.log(k), np.log(power)))
    amplitude = np.sqrt(spectrum / (depth * side**2)) * (np.hypot(kx, ky) > 0)
    noise = np.random.default_rng(seed).standard_normal((bins, sky, sky), dtype=np.float32)
    field = torch.fft.rfftn(torch.from_numpy(noise))
    field = field * torch.from_numpy(amplitude.astype(np.float32))
    # how often a column of rfftn stands in the full transform
    twice = np.where((ky == 0) | (2 * np.arange(len(ky)) == sky), 1, 2)

    def smooth(R):
        W = top_hat(kk * R) if R else 1.0
        smoothed = torch.from_numpy(np.asarray(W, np.float32)) * field
        variance = np.sum((amplitude * W) ** 2 * twice) / (bins * sky**2)
        return torch.fft.irfftn(smoothed, s=(bins, sky, sky)), float(variance)

    return smooth


def simulate_fast(parameters, seed, sky=28, bins=470, box=200.0):
    """A Lightcone of the six parameters (6,) from a small semi-numerical model, NOT 21cmFAST: a
    stand-in with the right signs, times and sizes. The box is periodic, `box` Mpc on the sky; the
    `bins` slices cover the line of sight of the paper's 2350 x 200/140 Mpc from z = 5 (and so end,
    as those do, between z = 22 and 35 by Omega_m). `seed` is whatever np.random.default_rng takes.

    1. A Gaussian density field of the linear power spectrum fills the whole line of sight and grows
       linearly: slices evolve coherently, and nothing repeats.
    2. Haloes above M_min (of T_vir, or the warm dark matter Jeans mass) hold the fraction f_coll of
       the mass: Sheth-Tormen, with sigma(M) of the truncated spectrum. Where the overdensity in
       spheres of R is delta, it is f_coll times the Press-Schechter ratio `boost`, as in 21cmFAST
       (arXiv:1003.3878).
    3. A sphere is ionised where zeta f_coll > 1, from large R down to the cell, which can be partly
       ionised: inside out.
    4. Stars heat (L_X, E_0) and couple the gas in the mean; `boost` in spheres of the photons'
       reach makes both follow the density.
    5. T_b = 27 mK x_HI (1 + delta) (Omega_b h^2 / 0.023) sqrt(0.15 (1 + z) / (10 Omega_m h^2))
       (1 - T_CMB / T_S).
    Left out: peculiar velocities, recombinations, heating by Lyman-alpha photons and the CMB, light
    travel in `boost`, all that is smaller than a cell.
    Exaggerated on purpose: hosts that absorb up to a higher E_0 let fewer X-rays out, by
    exp((800 eV - E_0) / 280 eV), 12 at 100 eV and 0.08 at 1500 eV. With 21cmFAST's convention (L_X
    is what comes out, from E_0 to 2 keV) E_0 leaves hardly a mark on the global signal, and there
    would be nothing to regress."""
    m_wdm, Om, log_lx, e_0, log_tvir, zeta = map(float, parameters)
    depth = BINS * CELL / bins                # Mpc: of a cell along the line of sight
    side = box / sky                          # and on the sky
    z = redshift_at(comoving_distance(Z_LOW, Om) + depth * np.arange(bins), Om)       # (T,) rising
    early = np.geomspace(1 + z[0], 46, 100) - 1       # (Z,) mean histories are on this, to z = 45

    def column(a):
        """(Z,) -> (T, 1, 1)"""
        return torch.from_numpy(np.interp(z, early, a).astype(np.float32))[:, None, None]

    # 1. delta today
    k = np.geomspace(1e-4, 1e3, 2000)
    power = matter_power(k, Om)
    power *= SIGMA_8**2 / variance_of(power, k, 8 / HUBBLE)
    smooth = density_field(seed, k, power, bins, sky, depth, side)
    delta, variance = smooth(0)

    # 2. collapsed fraction
    D, sigma_min, f_coll = halo_history(early, m_wdm, Om, log_tvir, k, power)
    barrier = column(DELTA_C / D)

    def boost(delta, variance):
        """f_coll in regions of this overdensity over its mean on the slice, which is held at
        Sheth-Tormen's. In logarithms: early on both are tiny."""
        width = (column(sigma_min) ** 2 - variance).clamp(min=0.05).sqrt()
        log_fraction = torch.special.log_ndtr((delta - barrier) / width)
        return torch.softmax(log_fraction.flatten(1), dim=1).view_as(delta) * sky**2

    # 3. ionisation
    cell_radius = (3 / (4 * np.pi) * depth * side**2) ** (1 / 3)
    ionised = torch.zeros(delta.shape, dtype=torch.bool)
    if cell_radius < 10:
        for R in np.geomspace(IONISING_REACH, 1.3 * cell_radius, 4):
            ionised |= zeta * column(f_coll) * boost(*smooth(R)) > 1
    partly = (1 - zeta * column(f_coll) * boost(delta, variance)).clamp(0, 1)
    x_hi = torch.where(ionised, 0, partly)

    # 4. spin temperature
    warm, cool, x_alpha = thermal_history(early, f_coll, Om, log_lx, e_0)
    # Mpc, of X-rays at z = 14 (Furlanetto et al. 2006)
    reach = float(np.clip(4.9 * (e_0 / 300) ** 3, 10, 60))
    # log-normal: the density stays positive
    one_plus_delta = torch.exp(column(D) * delta - column(D) ** 2 * variance / 2)
    T_k = column(cool) * one_plus_delta ** (2 / 3) + column(warm) * boost(*smooth(reach))
    T_cmb = column(2.7255 * (1 + early))
    n_h = column(hydrogen() * (1 + early) ** 3)
    collisions = (3.1e-11 * T_k**0.357 * torch.exp(-32 / T_k) * n_h * one_plus_delta
                  * 0.0682 / (2.85e-15 * T_cmb))
    coupling = column(x_alpha) * boost(*smooth(30.0)) + collisions
    T_s = (1 + coupling) / (1 / T_cmb + coupling / T_k)

    # 5. the signal
    scale = 27 * (OMEGA_B * HUBBLE**2 / 0.023) * np.sqrt(0.15 / (Om * HUBBLE**2) * (1 + early) / 10)
    T_b = column(scale) * x_hi * one_plus_delta * (1 - T_cmb / T_s) + 0.0            # mK; no -0.0
    groups = np.array_split(np.arange(bins), min(47, bins))
    history = [[z[g].mean(), x_hi[g[0]:g[-1] + 1].mean()] for g in groups[::-1]]
    return Lightcone(T_b.flip(0).numpy(), np.array([*parameters], float), z[::-1],
                     np.array(history).T, -1, sky, side, depth, COSMOLOGY, "", [])


# ---------------------------------------------------------------------------------------------
# Simulate

def draw_parameters(n, seed):
    """(n, 6) in physical units: the first n points of a scrambled Sobol sequence over the priors. A
    larger n continues the same sequence."""
    engine = torch.quasirandom.SobolEngine(6, scramble=True, seed=seed)
    return to_physical(engine.draw(n, dtype=torch.float64).numpy())


def simulate(out, n, backend="fast", seed=0, sky=28, bins=470, box=200.0, step=1.02,
             workers=None, python=sys.executable, keep=None, tau_sigma=5.0, max_x_hi=0.1):
    """Draw n sets of parameters and add the lightcone of each to the store `out`; returns a dict of
    counts. Run again, it continues where it stopped.

    What a simulator could not do is in OUT/NAME.failed.json, with parameters and reason (delete it
    to try again): a gap in the prior that a user of the store should know of. Rows with extreme
    histories are there, but not `passed`."""
    out = Path(out)
    fast = backend == "fast"
    maker = "fast simulator (semi-numerical stand-in, not 21cmFAST)"
    if not fast:
        maker = f"21cmFAST {version_21cmfast(python)}, step {step:g}"
    elif box < 2 * IONISING_REACH or box / sky < 0.5:
        raise ValueError(f"a box of {box:g} Mpc and {sky} x {sky} cells cannot be filled: at least "
                         f"{2 * IONISING_REACH:g} Mpc, where the largest ionised spheres fit, and "
                         "cells of at least 0.5 Mpc, which hold haloes")
    store = store_at(out)
    if store:
        cell_los = BINS * CELL / bins if fast else box / sky
        setting = Setting(bins, sky, Z_LOW, box / sky, cell_los, COSMOLOGY, "")
        why = difference(setting, store.setting)
        if why:
            raise ValueError(f"{out}: {why}: choose another --out, or the same --bins and --box")
    jobs = []
    native = Path(keep or out / "native").absolute()
    for i, parameters in enumerate(draw_parameters(n, seed)):
        number = seed * 1_000_000 + i + 1
        jobs.append({
            "name": name_of(number, parameters, (bins, sky), "fast" if fast else ""),
            "source": f"{maker}, box {box:g} Mpc, seed {seed}, draw {i}",
            "parameters": dict(zip(PARAMETERS, parameters.tolist())), "random_seed": number,
            "rng": [seed, i], "fast": fast, "sky": sky, "bins": bins, "box": box, "step": step,
            "file": str(native / f"lightcone_{number}_{sky}_{box:g}Mpc_step{step:g}.h5"),
            "keep": bool(keep), "python": python, "out": str(out), "tau_sigma": tau_sigma,
            "max_x_hi": max_x_hi})
    done = {path.name.partition(".")[0] for path in out.glob("*.*")}
    todo = [job for job in jobs if job["name"] not in done]
    size = len(todo) * bins * sky**2 * 2
    print(f"{n} lightcones of {sky} x {sky} x {bins} asked for, {len(todo)} to simulate: "
          f"{size / 1e9:.3g} GB in {out}")
    open_for_adding(out, size)
    failures = 0
    results = run_jobs(todo, workers or os.cpu_count())
    try:
        for failure in tqdm(results, "simulating", len(todo), unit="lightcone"):
            if failure:
                failures += 1
                tqdm.write(failure, file=sys.stderr)
    finally:
        open_for_adding(out, 0)                             # what a killed worker left half-written
    store = store_at(out)
    passed = store.passed if store else []
    return {"asked": n, "there_before": n - len(todo), "simulated": len(todo) - failures,
            "failed_now": failures, "rows_in_store": len(passed), "rows_passed": int(sum(passed))}


def run_jobs(jobs, workers):
    """Do the jobs in `workers` processes; yields what `do_job` returns as they finish."""
    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(max(1, min(workers, len(jobs))),
                               multiprocessing.get_context("spawn"), initializer=end_with_parent)
    with pool:
        try:
            for future in as_completed([pool.submit(do_job, job) for job in jobs]):
                yield future.result()
        except BrokenExecutor:
            raise OSError("a simulating process was killed (out of memory?): the lightcones so far "
                          "are in the store, the same command continues") from None
        except BaseException:
            for process in set(multiprocessing.active_children()) - set(others):
                process.kill()                              # do not wait for hours of simulation
            raise


def end_with_parent():
    """In a worker: end when the parent does, however it ends, and at once at Ctrl-C."""
    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=watch, daemon=True).start()
    torch.set_num_threads(1)


def do_job(job):
    """In a worker: simulate one lightcone and add it to the store -> "", or why it failed."""
    out = Path(job["out"])
    if (out / f"{job['name']}.h5").exists():                # another command has done it
        return ""
    try:
        if job["fast"]:
            lightcone = simulate_fast(job["parameters"].values(), job["rng"], job["sky"],
                                      job["bins"], job["box"])
        else:
            lightcone = run_21cmfast(job)
    except ValueError as e:
        with writing(out / f"{job['name']}.failed.json") as temporary:
            temporary.write_text(json.dumps({**job, "reason": str(e)}, indent=1))
        return f"{job['source']} failed: {e}"
    row = make_row(lightcone._replace(seed=job["random_seed"]), job["source"], job["tau_sigma"],
                   job["max_x_hi"])
    save_row(out, job["name"], row)
    if not (job["fast"] or job["keep"]):
        Path(job["file"]).unlink()
    return ""


def version_21cmfast(python):
    """The version that this interpreter has; OSError if it has none."""
    code = "import py21cmfast; print(py21cmfast.__version__)"
    try:
        probe = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as e:
        why = last_line(getattr(e, "stderr", str(e)))
        raise OSError(f"no 21cmFAST for {python} ({why}): install it as the README says, name the "
                      "Python that has it with --python, or use --backend fast") from None
    version = probe.stdout.split()[-1]
    print(f"21cmFAST {version}")
    if version >= "4":
        print("it has no warm dark matter: m_WDM will be unknown (NaN), and these lightcones not "
              "for training")
    return version


def last_line(text):
    """The last line of what a program printed; a traceback says there what went wrong."""
    return (text.strip().splitlines() or ["it said nothing"])[-1]


def run_21cmfast(job):
    """The Lightcone of 21cmFAST in job["file"], which a process of its own makes if it is not there
    (hours of work: one that cannot be read stays). ValueError if that fails."""
    file = Path(job["file"])
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        code = inspect.getsource(main_21cmfast) + "\nmain_21cmfast()"
        child = subprocess.run([job["python"], "-c", code, json.dumps(job)], text=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, errors="replace",
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
        if child.returncode < 0:
            raise ValueError(f"killed by {signal.Signals(-child.returncode).name}")
        if child.returncode:
            raise ValueError(last_line(child.stderr))
    return read_lightcone(file, job["bins"])


def main_21cmfast():
    """A program of its own: it is sent as source to the interpreter that has 21cmFAST (3.4.0 needs
    numpy < 2, so it is seldom ours) and imports nothing of this project."""
    import ctypes
    import json
    import os
    import sys
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, 9)                       # PR_SET_PDEATHSIG: end with the parent
    import py21cmfast as p21c
    job = json.loads(sys.argv[1])
    m_wdm, Om, log_lx, e_0, log_tvir, zeta = job["parameters"].values()
    grid = {"HII_DIM": job["sky"], "BOX_LEN": job["box"]}
    astro = {"HII_EFF_FACTOR": zeta, "ION_Tvir_MIN": log_tvir, "L_X": log_lx, "NU_X_THRESH": e_0,
             "R_BUBBLE_MAX": min(15.0, 0.325 * job["box"])}
    folder, name = os.path.split(job["file"])
    part = "part-" + name
    if int(p21c.__version__.split(".")[0]) >= 4:
        from astropy import units
        inputs = p21c.InputParameters.from_template(["const-zeta"], random_seed=job["random_seed"])
        inputs = inputs.with_logspaced_redshifts(zmin=4.95, zstep_factor=job["step"])
        inputs = inputs.evolve_input_structs(
            OMm=Om, **grid, DIM=3 * job["sky"], ZPRIME_STEP_FACTOR=job["step"], USE_TS_FLUCT=True,
            M_MIN_in_Mass=False, X_RAY_Tvir_MIN=log_tvir, **astro)
        geometry = p21c.RectilinearLightconer.between_redshifts(
            min_redshift=5.0, max_redshift=35.0, resolution=job["box"] / job["sky"] * units.Mpc,
            cosmo=inputs.cosmo_params.cosmo, quantities=("brightness_temp",))
        lightcone = p21c.run_lightcone(lightconer=geometry, inputs=inputs, write=False,
                                       progressbar=False)
        lightcone.save(os.path.join(folder, part), clobber=True)
    else:
        p21c.global_params.P_CUTOFF = True
        p21c.global_params.M_WDM = m_wdm
        p21c.global_params.ZPRIME_STEP_FACTOR = job["step"]
        lightcone = p21c.run_lightcone(
            redshift=5.0, max_redshift=35.0, user_params=p21c.UserParams(**grid),
            cosmo_params=p21c.CosmoParams(OMm=Om), astro_params=p21c.AstroParams(**astro),
            flag_options=p21c.FlagOptions(USE_TS_FLUCT=True), random_seed=job["random_seed"],
            write=False, lightcone_quantities=("brightness_temp",),
            global_quantities=("brightness_temp", "xH_box"))
        lightcone.save(fname=part, direc=folder, clobber=True)
    os.replace(os.path.join(folder, part), job["file"])     # whole, or not there


# ---------------------------------------------------------------------------------------------
# Data sets for training

SPLITS = ("train", "validation", "test")
PUBLISHED_NORM = (-32.5, 65.4)                           # mK; mean and deviation that L3M released
WINDOW = 12                                              # slices of a draw
CHUNK = 24                                               # of the chunk that it is drawn from
STEP = 22                                                # from one chunk to the next


def divide(names, experiment, seed):
    """{split: sorted names} by a seeded permutation of the sorted names.

    Regression: 3800 / 960 / 250 train / validation / test from 5,010 on (what is beyond is left
    out), else 0.76 / 0.19 / 0.05. Generation: 250 for the test from 2,500 on, else 5%; of the rest
    0.9 / 0.1. At least one of each."""
    n = len(names)
    large = n >= (5010 if experiment == "regression" else 2500)
    test = 250 if large else max(1, round(0.05 * n))
    validation = max(1, round(0.1 * (n - test)))
    train = n
    if experiment == "regression":
        validation = 960 if large else max(1, round(0.19 * n))
        train = 3800 if large else n
    ordered = sorted(names)
    drawn = [ordered[i] for i in np.random.default_rng(seed).permutation(n)]
    held = test + validation
    return {"train": sorted(drawn[held:held + train]), "validation": sorted(drawn[test:held]),
            "test": sorted(drawn[:test])}


def usable(parameters, passed, where):
    """Numbers of the rows that may be trained on, and a sentence on those that may not."""
    unknown = ~np.isfinite(parameters).all(axis=1)
    outside = ((parameters < PRIORS[:, 0]) | (parameters > PRIORS[:, 1])).any(axis=1) & ~unknown
    extreme = ~passed & ~unknown & ~outside
    rows = np.flatnonzero(~unknown & ~outside & ~extreme)
    note = f"{where}: {len(rows)} of {len(parameters)} lightcones usable"
    left_out = [f"{left.sum()} {why}" for left, why in [
        (unknown, "with a parameter unknown"), (outside, "outside the priors"),
        (extreme, "with an extreme history")] if left.any()]
    return rows, note + ("; left out: " + ", ".join(left_out) if left_out else "")


def split_table(table, path, experiment, seed, names=None):
    """({split: names}, note) of a Store or a Signals table, or of the names that a run stored."""
    if names is not None:
        gone = {name for split in SPLITS for name in names[split]} - set(table.names)
        if gone:
            raise ValueError(f"{path}: {len(gone)} of the lightcones that the run trains and tests "
                             f"with are gone ({min(gone)}, ...): put them back, or train anew")
        kept = sum(len(names[split]) for split in SPLITS)
        return names, f"{path}: the run's {kept} of {len(table.names)} lightcones"
    rows, note = usable(table.parameters, table.passed, path)
    if len(rows) < 3:
        raise ValueError(f"{note}: at least 3 are needed, one each to train, validate and test; "
                         "simulate or convert more")
    return divide([table.names[i] for i in rows], experiment, seed), note


def split_names(path, experiment, seed=0):
    """({"train": names, "validation": .., "test": ..}, a sentence on what was left out) of a store,
    or of an .npz of signals. experiment: "regression" or "generation"."""
    table = read_signals(path) if experiment == "regression" else read_store(path, signals=False)
    return split_table(table, path, experiment, seed)


class Signals(NamedTuple):
    """Of an .npz of signals what a Store has of its lightcones."""
    names: list
    parameters: np.ndarray          # (N, 6)
    passed: np.ndarray              # (N,)
    global_signal: np.ndarray       # (N, T) mK, high z first


def read_signals(path):
    """A store, or an .npz of signals, as a table with names, parameters, passed, global_signal."""
    if Path(path).suffix != ".npz":
        return read_store(path)
    with reading(path, "signals are arrays signal (N, T) and the six parameters (N,)"):
        with np.load(path, allow_pickle=False) as f:
            keys = ("signal", *PARAMETERS, "seed", "xH", "node_z")
            arrays = {key: f[key] for key in keys if key in f}
        signal = arrays["signal"].astype(float)[:, ::-1]
        parameters = np.stack([arrays[key] for key in PARAMETERS], axis=1).astype(float)
        n = len(signal)
        seeds = arrays.get("seed", np.full(n, -1)).astype(int)
        histories = arrays.get("xH", np.empty((n, 0)))
        for what, rows in (("parameters", parameters), ("seeds", seeds), ("histories", histories)):
            if len(rows) != n:
                raise ValueError(f"{len(rows)} {what} for {n} signals")
        check_unit(path, np.nanmax(np.abs(signal), initial=0), True)
        passed = np.ones(n, bool)
        for i in range(n if histories.size else 0):
            history = clean_history((arrays["node_z"], histories[i]), [])
            if history is not None:
                z, x_hi = history
                tau = optical_depth(z, x_hi, parameters[i, 1], z[-1])
                passed[i] = not filter_reason(tau, x_hi[-1])
        names = [name_of(seed, p, signal.shape[1:], content=row)
                 for seed, p, row in zip(seeds, parameters, signal)]
        if len(set(names)) < n:
            raise ValueError(f"{n - len(set(names))} signals are there twice")
    return Signals(names, parameters, passed, signal)


class GlobalSignals:
    """Sky-averaged signals for the regression, all in memory (5,000 of 47 values are 1 MB):
    `signals` (n, tokens) float32, normalised and forward in time, `parameters` (n, 6) in [0, 1],
    `names` (n), `split_names` {split: names} of all, `note`.

    path: a store, or an .npz with signal (N, T) in mK from low z, the six parameters (N,), and if
    there seed (N,) and xH (N, nodes) over node_z (nodes,) to filter by.
    norm: (mean, deviation) in mK; None fits them on the training part. Either way they are
    `self.norm`, to be kept with the run. PUBLISHED_NORM are L3M's.
    names: the `split_names` that a run stored, whatever else is in the store by now."""

    def __init__(self, path, split, *, tokens=47, seed=0, norm=None, names=None):
        table = read_signals(path)
        self.split_names, self.note = split_table(table, path, "regression", seed, names)
        self.names = self.split_names[split]
        index = {name: i for i, name in enumerate(table.names)}

        def signals_of(names):
            """(n, T) -> (n, tokens) mK"""
            signal = table.global_signal[[index[name] for name in names]].astype(float)
            n, T = signal.shape
            if T % tokens:
                raise ValueError(f"{path}: {T} bins cannot be averaged into {tokens} equal groups")
            if not np.isfinite(signal).all():
                raise ValueError(f"{path}: NaN in the signal of a lightcone")
            return signal.reshape(n, tokens, -1).mean(axis=2)

        if norm is None:
            values = signals_of(self.split_names["train"])
            norm = values.mean(), values.std()
        self.norm = float(norm[0]), float(norm[1])
        if not self.norm[1] > 0:
            raise ValueError(f"{path}: all signals are the same number, which cannot be normalised")
        normalised = (signals_of(self.names) - self.norm[0]) / self.norm[1]
        self.signals = torch.from_numpy(normalised.astype(np.float32))
        parameters = to_unit(table.parameters[[index[name] for name in self.names]])
        self.parameters = torch.from_numpy(parameters.astype(np.float32))

    def __len__(self):
        return len(self.signals)


def normalise(T_b):
    """mK -> what the generator sees: sign(T) log(1 + |T|), shifted and scaled by the paper's
    constants. float32 tensors."""
    return (torch.sign(T_b) * torch.log1p(T_b.abs()) + 1.51) / 2.74


def denormalise(x):
    """The inverse of `normalise`: mK."""
    y = x * 2.74 - 1.51
    return torch.sign(y) * torch.expm1(y.abs())


class SubLightcones(torch.utils.data.Dataset):
    """Runs of slices for the generator: item (epoch, i) is (slices (12, X, Y) normalised,
    conditions (7,)), float32. Conditions: the six parameters in [0, 1] and the index of the first
    slice, (t - T/2) / T with t = 0 the highest z, counted before trimming.

    A lightcone is trimmed to at most 48 all-zero slices after the last with signal and cut into
    chunks of 24, step 22; a draw is a random run of 12 in chunk i. train: rotated, mirrored and
    shifted over the periodic sky at random. validation and test: one fixed run a chunk, not
    augmented, whatever the epoch. A partial last chunk is dropped, but for the test, which keeps it
    from 3 slices on (and may so return less than 12).
    A draw depends only on (seed, epoch, i): give a DataLoader a (batch) sampler of (epoch, i)
    pairs, and workers, resuming and process counts change nothing. Only the slices asked for are
    read; what is in memory is a few numbers a lightcone. `names` (n) are this split's,
    `split_names` {split: names} all; `windows()` and `read()` are for evaluation."""

    def __init__(self, path, split, *, seed=0, names=None):
        self.store = read_store(path, signals=False)
        self.T = self.store.T
        self.sky = self.store.sky
        self.split_names, self.note = split_table(self.store, path, "generation", seed, names)
        self.names = self.split_names[split]
        self.path = path
        self.split = split
        self.seed = seed
        self.parameters = to_unit(self.store.parameters).astype(np.float32)        # (N, 6)
        signal_end = self.store.signal_end[[self.store.index[name] for name in self.names]]
        self.length = np.minimum(signal_end + 2 * CHUNK, self.T)     # (n,) slices after trimming
        least = 3 if split == "test" else CHUNK
        # (chunks, 2): number of the lightcone in `names`, first slice
        self.chunks = np.array([(n, start) for n, length in enumerate(self.length)
                                for start in range(0, length - least + 1, STEP)])
        if not len(self.chunks):
            raise ValueError(f"{path}: no chunk of {CHUNK} slices in the {split} part, the "
                             f"lightcones have {self.T}")

    def __len__(self):
        return len(self.chunks)

    def __getitem__(self, key):
        epoch, i = key if isinstance(key, tuple) else (0, key)
        training = self.split == "train"
        n, start = self.chunks[i].tolist()
        rng = np.random.default_rng([self.seed, epoch if training else 0, i])
        end = min(start + CHUNK, int(self.length[n]))
        start += int(rng.integers(max(0, end - start - WINDOW) + 1))
        return self.read(self.names[n], start, min(WINDOW, end - start), rng if training else None)

    def read(self, name, start, length, rng=None):
        """Slices [start, start + length) of a lightcone and their conditions, as above:
        ((length, X, Y), (7,)); augmented if `rng` is given."""
        slices = self.store.slices(name, start, start + length)
        if rng:
            slices = np.roll(slices, rng.integers(self.sky, size=2), axis=(1, 2))
            slices = np.rot90(slices, rng.integers(4), axes=(1, 2))
            if rng.integers(2):
                slices = slices.transpose(0, 2, 1)
        slices = torch.from_numpy(np.ascontiguousarray(slices)).float()
        index = np.float32((start - self.T / 2) / self.T)
        conditions = np.append(self.parameters[self.store.index[name]], index)
        return normalise(slices), torch.from_numpy(conditions)

    def windows(self):
        """(name, start, length) of consecutive runs of 12 slices through each trimmed lightcone of
        the split, a shorter last one from 3 slices on."""
        return [(name, start, min(WINDOW, length - start))
                for name, length in zip(self.names, self.length.tolist())
                for start in range(0, length - 2, WINDOW)]


# ---------------------------------------------------------------------------------------------
# Inspect

@contextlib.contextmanager
def figure(name, rows=1, columns=1, size=(7, 4.5), **grid):
    """Axes to draw on (one, or an array), saved as NAME.png and NAME.pdf at the end.

    size: in inches; grid: what `Figure.subplots` takes. rows = 0 gives the empty Figure itself."""
    os.environ["MPLBACKEND"] = "agg"                          # a notebook's own is not wanted
    import matplotlib
    from matplotlib.figure import Figure
    # 42: TrueType in the PDF, which journals ask for
    with matplotlib.rc_context({"pdf.fonttype": 42, "font.size": 9, "axes.titlesize": 10}):
        drawn = Figure(figsize=size, layout="constrained")
        yield drawn.subplots(rows, columns, **grid) if rows else drawn
        for suffix in ("png", "pdf"):
            content = io.BytesIO()                            # matplotlib trips over a full disk
            drawn.savefig(content, format=suffix, dpi=200)
            with writing(f"{name}.{suffix}") as temporary:
                temporary.write_bytes(content.getvalue())
            print(f"written: {name}.{suffix}", file=sys.stderr)


def in_words(parameters):
    """The six parameters in physical units as a line of a figure."""
    return ", ".join(f"{symbol} = {value:.{digits}f} {unit}".strip() for symbol, value, digits, unit
                     in zip(SYMBOLS, parameters, DIGITS, UNITS))


def eor_colours(T_b):
    """The colours of the field for T_b in mK, from 21cmFAST's "EoR", as keywords of imshow: white,
    yellow, red below zero, black at zero, blue above, over the range of all but 0.2% of the
    values; magenta is above that and grey below."""
    from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
    stops = [(0, "white"), (0.125, "yellow"), (0.25, "orange"), (0.375, "red"), (0.5, "black"),
             (0.75, "blue"), (1, "cyan")]
    colours = LinearSegmentedColormap.from_list("EoR", stops)
    low, high = np.quantile(np.asarray(T_b, np.float32), [0.001, 0.999])
    return {"norm": TwoSlopeNorm(0, min(low, -20), max(high, 20)), "aspect": "auto",
            "cmap": colours.with_extremes(under="0.6", over="magenta")}


def colour_bar(drawn, axes):
    """The colour bar of an image in `eor_colours`, beside all axes."""
    low, high = drawn.get_clim()
    drawn.figure.colorbar(drawn, ax=axes, label="$T_b$ [mK]", extend="both", aspect=30,
                          ticks=np.fix([low, low / 2, 0, high]))


def power_spectrum(slices, cell):
    """Power of fluctuations on the sky: slices (n, X, X) in mK -> k (1/Mpc) and k^2 P(k) / 2 pi
    (mK^2), the mean over the slices, in bins of equal width in log k."""
    X = slices.shape[1]
    fluctuations = slices - slices.mean(axis=(1, 2), keepdims=True)
    modes = np.abs(np.fft.fft2(fluctuations)) ** 2 / X**2 * cell**2         # (n, X, X) mK^2 Mpc^2
    f = 2 * np.pi * np.fft.fftfreq(X, cell)
    k = np.hypot(f[:, None], f[None, :])
    edges = np.geomspace(f[1] * 0.99, f.max(), min(12, X // 3) + 1)
    number = np.digitize(k, edges)                                    # of the bin; 0: the mean mode
    rings = [number == i for i in range(1, len(edges)) if (number == i).any()]
    mean_k = np.array([k[ring].mean() for ring in rings])
    power = np.array([modes[:, ring].mean() for ring in rings])
    return mean_k, power * mean_k**2 / (2 * np.pi)


def span(values):
    """{"low", "high", "unknown"} of numbers, for a summary."""
    known = values[np.isfinite(values)]
    return {"low": or_none(min(known, default=np.nan)),
            "high": or_none(max(known, default=np.nan)), "unknown": len(values) - len(known)}


def inspect_store(path, out):
    """Counts of a store as a dict, also in OUT/summary.json; figures signals, lightcones and power
    in the directory `out`."""
    store = read_store(path)
    out = Path(out)
    rows, note = usable(store.parameters, store.passed, path)
    summary = {
        "store": str(path), "lightcones": len(store.names), "usable": len(rows), "note": note,
        **store.setting._asdict(),
        "z_high": span(store.redshifts[:, 0]), "tau": span(store.tau),
        "x_hi_end": span(store.x_hi_end),
        "parameters": dict(zip(PARAMETERS, map(span, store.parameters.T)))}
    if not len(rows):
        rows = np.arange(len(store.names))
    draw_store(store, rows[np.linspace(0, len(rows) - 1, min(7, len(rows))).astype(int)], out)
    with writing(out / "summary.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=1))
    return summary


def draw_store(store, rows, out):
    """Global signals of the rows (OUT/signals); of every third a section along the line of sight
    (OUT/lightcones), and the power of its fluctuations on the sky within 0.25 of five redshifts
    (OUT/power)."""
    with figure(out / "signals", size=(7, 5.5)) as ax:
        for row, colour in zip(rows, COLOURS):
            ax.plot(store.redshifts[row], store.global_signal[row], lw=1, color=colour,
                    label=in_words(store.parameters[row]))
        ax.set(xlabel="redshift $z$", ylabel=r"sky mean $\bar T_b$ [mK]")
        ax.figure.legend(loc="outside upper center", fontsize=8)
    rows = rows[::3]
    cubes = [store.slices(store.names[row], 0, store.T).astype(np.float32) for row in rows]
    look = eor_colours([cube[:, :, 0] for cube in cubes])
    with figure(out / "lightcones", len(rows), size=(13, 2.3 * len(rows)), squeeze=False) as axes:
        for ax, row, cube in zip(axes[:, 0], rows, cubes):
            drawn = ax.imshow(cube[:, :, 0].T, **look,
                              extent=(0, store.T, 0, store.sky * store.cell_sky))
            ticks = np.linspace(0, store.T - 1, 9).astype(int)
            ax.set_xticks(ticks + 0.5, [f"{z:.1f}" for z in store.redshifts[row, ticks]])
            ax.set(ylabel="sky [Mpc]", title=in_words(store.parameters[row]))
        ax.set_xlabel("redshift $z$ (slices are equal steps of distance)")
        colour_bar(drawn, axes)
    with figure(out / "power", 1, len(rows), (3.6 * len(rows), 4), squeeze=False) as axes:
        for ax, row, cube in zip(axes[0], rows, cubes):
            for z, colour in zip((7, 9, 12, 16, 20), COLOURS):
                near = cube[np.abs(store.redshifts[row] - z) < 0.25]
                if near.any():
                    ax.loglog(*power_spectrum(near, store.cell_sky), label=f"z = {z}", color=colour)
            ax.set(xlabel=r"$k_\perp$ [Mpc$^{-1}$]", ylabel=r"$k_\perp^2 P / 2\pi$ [mK$^2$]")
            ax.xaxis.set_minor_formatter("")
            ax.set_title(in_words(store.parameters[row]).replace(", $E", ",\n$E"), fontsize=6)
            ax.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2))


# ---------------------------------------------------------------------------------------------
# Command line

def arguments(argv=None):
    parser = argparse.ArgumentParser(
        description="Lightcones for the L3M experiments: simulate, convert, inspect.",
        epilog="More at the top of data_lightcone.py.")
    commands = parser.add_subparsers(dest="command", required=True)
    how = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    s = commands.add_parser("simulate", help="make lightcones, parameters drawn from the priors",
                            **how)
    add = s.add_argument
    add("-n", type=bounded(int, 1, 10**6), default=1000,
                   help="how many parameter draws; a larger n later continues the sequence")
    add("--backend", choices=["fast", "21cmfast"], default="fast",
                   help="fast: built in, a stand-in; 21cmfast: the real one, if installed")
    add("--seed", type=bounded(int, 0, 2000), default=0,
                   help="of parameters and density; another for each job of a cluster")
    add("--sky", type=bounded(int, 4, 1000), default=argparse.SUPPRESS,
                   help="cells along each side of the sky (default: fast 28, 21cmfast 140)")
    add("--bins", type=bounded(int, 2, 20000), default=argparse.SUPPRESS,
                   help="slices along the line of sight (default: fast 470, 21cmfast 2350)")
    add("--box", type=bounded(float, 1, 5000), default=200.0,
                   help="side of the box on the sky, Mpc")
    add("--step", type=bounded(float, 1.0001, 2), default=1.02,
                   help="21cmfast: ZPRIME_STEP_FACTOR; 1.1 is coarse and quick")
    add("--workers", type=bounded(int, 1, 1024), default=os.cpu_count(),
                   help="processes")
    add("--python", default=sys.executable,
                   help="21cmfast: the Python interpreter that has it")
    add("--keep", metavar="DIR", default=argparse.SUPPRESS,
                   help="21cmfast: keep its own files here, too")
    c = commands.add_parser("convert", help="read lightcone files (21cmFAST v3 and v4 HDF5, .npz) "
                            "into a store", **how)
    c.add_argument("files", nargs="+", metavar="FILES")
    c.add_argument("--bins", type=bounded(int, 2, 20000), default=BINS,
                   help="line-of-sight bins to keep, from low z")
    for p in (s, c):
        p.add_argument("--out", default="data/lightcones", metavar="STORE",
                       help="a directory; it is added to if it is there")
        p.add_argument("--tau-sigma", type=bounded(float, 0), default=5.0,
                       help=f"filter: optical depth within this many sigma of {TAU} +- {TAU_SIGMA}")
        p.add_argument("--max-xhi", dest="max_x_hi", type=bounded(float, 0, 1), default=0.1,
                       help="filter: mean neutral fraction at the low-z end at most this")
    i = commands.add_parser("inspect", help="counts and figures of a store", **how)
    i.add_argument("store", nargs="?", default="data/lightcones")
    i.add_argument("--out", default=argparse.SUPPRESS,
                   help="directory for the figures (default: out/inspect-STORE)")
    return parser.parse_args(argv)


def main(argv=None):
    options = vars(arguments(argv))
    command = options.pop("command")
    with one_line("fewer --workers, or a smaller --sky"):
        if command == "simulate":
            sky, bins = (28, 470) if options["backend"] == "fast" else (140, BINS)
            print(json.dumps(simulate(**{"sky": sky, "bins": bins, **options}), indent=1))
        elif command == "inspect":
            store = options["store"]
            out = options.get("out", f"out/inspect-{Path(store).name}")
            print(json.dumps(inspect_store(store, out), indent=1))
        else:
            report = convert(**options)
            print_report(report)
            if not any(entry["status"] in ("kept", "there") for entry in report):
                first = f"{report[0]['file']}: {report[0]['reason']}"
                others = f"none of the {len(report)} files could be taken; "
                raise ValueError(first if len(report) == 1 else others + first)
            with writing(Path(options["out"]) / "convert.json") as temporary:
                temporary.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
