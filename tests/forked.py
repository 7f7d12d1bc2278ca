"""Commands of the project in forked children, which have paid their imports: for test_hostile.py and test_kills.py.

A child may hang, crash, be killed or run out of memory or disk: the parent goes on. torch forbids threads and
gradients before a fork, so the parent does neither (OMP_NUM_THREADS=1; whatever computes runs in a child)."""
import fcntl
import importlib
import multiprocessing
import os
import re
import resource
import select
import shlex
import signal
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import conftest                                               # the project on the import path
import h5py
import numpy as np
import torch
import contextlib

MODULES = ("data_arxiv", "data_lightcone", "train_lm", "train_l3m", "eval")
GB = 10**9


@dataclass
class Done:
    """What a child left. status: its exit status, -9 and the like for a signal, None if it ran too long."""
    status: int | None
    stdout: str
    stderr: str
    gigabytes: float                                          # of memory beyond the parent's

    def lines(self):
        """Lines of stderr, also those that a progress bar shares with others."""
        return [line.strip() for line in re.split(r"[\r\n]", self.stderr) if line.strip()]

    def errors(self):
        """The lines with which a script, or argparse, ends."""
        return [line for line in self.lines() if re.match(r"error: |\w+\.py( \w[\w-]*)?: error: ", line)]

    def last(self):
        return (self.lines() or ["(nothing on stderr)"])[-1]


def load_modules():
    """Import the scripts and what they import when they need it, so that no child pays for it."""
    torch.set_num_threads(1)
    for name in MODULES:
        importlib.import_module(name)
    import corner                                             # noqa: F401
    import matplotlib.backends.backend_agg
    import matplotlib.backends.backend_pdf                    # noqa: F401
    import matplotlib.figure
    for name in ("torch._dynamo", "torch.distributed.fsdp"):
        importlib.import_module(name)
    matplotlib.figure.Figure.savefig = save_blank
    sys.modules["train_lm"].measured_peak = lambda dtype, device: 1e11                       # a second of matrix products


def save_blank(figure, path, **how):
    """In place of drawing, which takes seconds."""
    if hasattr(path, "write"):
        path.write(bytes(20_000))
    else:
        Path(path).write_bytes(bytes(20_000))


def program(command):
    """"eval perplexity .." -> a function that runs it in this process, as `python eval.py perplexity ..` would."""
    module, *arguments = shlex.split(command)

    def run():
        sys.argv = [f"{module}.py", *arguments]
        importlib.import_module(module).main(arguments)
    return run


def start(work, place, environment=None):
    """Fork a child that calls `work` in directory `place`, as leader of its own process group -> (pid, [stdout, stderr])."""
    pipes = [os.pipe() for _ in range(2)]
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        for _, write in pipes:
            os.close(write)
        return pid, [read for read, _ in pipes]
    status = 1
    try:
        os.setsid()
        os.chdir(place)
        multiprocessing.current_process()._config["daemon"] = False      # as in a process of its own
        os.environ.update(environment or {})
        for number, (read, write) in zip((1, 2), pipes):
            os.close(read)
            fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 1 << 20)   # nobody reads before the end
            os.dup2(write, number)
            os.close(write)
        work()
        status = 0
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else 1
        status = 0 if e.code is None else status
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def kill(pid):
    """kill -9 to the process group of a child."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:                                # it has ended, or has not come as far as setsid
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def finish(pid, outputs, seconds=60.0):
    """Wait for a child of `start`, at most so long, end what it left running -> Done."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    descriptor = os.pidfd_open(pid)
    in_time = bool(select.select([descriptor], [], [], seconds)[0])
    os.close(descriptor)
    kill(pid)
    _, status, usage = os.wait4(pid, 0)
    text = []
    for read in outputs:
        os.set_blocking(read, False)
        try:
            text.append(os.read(read, 1 << 20).decode(errors="replace"))
        except BlockingIOError:                               # a left-over child holds the other end
            text.append("")
        os.close(read)
    status = os.waitstatus_to_exitcode(status) if in_time else None
    return Done(status, *text, (usage.ru_maxrss - own) * 1024 / GB)


def call(work, place, seconds=60.0, environment=None):
    """Run a function, or a command such as "eval perplexity --base base", in a forked child -> Done."""
    return finish(*start(program(work) if isinstance(work, str) else work, place, environment), seconds)


def succeed(work, place, seconds=300.0):
    """`call` for what must succeed."""
    done = call(work, place, seconds)
    if done.status != 0:
        raise RuntimeError(f"{work}: exit status {done.status}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return done


# ------------------------------------------------------------------------------------------------ inputs of every kind


def comoving(z, matter, h):
    """Comoving distance in Mpc, flat LambdaCDM."""
    grid = np.linspace(0, 40, 20001)
    e = np.sqrt(matter * (1 + grid) ** 3 + 1 - matter)
    steps = np.concatenate([[0], np.cumsum(0.5 * (1 / e[1:] + 1 / e[:-1]) * np.diff(grid))])
    return np.interp(z, grid, 299792.458 / (100 * h) * steps)


def signal_of(z):
    """A made-up global signal in mK: a trough, some emission, then nothing."""
    mean = -120 * np.exp(-((z - 15) / 3) ** 2) + 15 * np.exp(-((z - 8.5) / 1) ** 2)
    return np.where(z < 7, 0, mean)


def write_native(path, version):
    """A small lightcone, 6 x 6 x 120 cells of 10 Mpc from z = 5, in the layout of 21cmFAST 3 or 4; the numbers are made up."""
    grid = np.linspace(4.9, 12, 7000)
    distances = comoving(5.0, 0.31, 0.6766) + 10 * np.arange(120)
    z = np.interp(distances, comoving(grid, 0.31, 0.6766), grid)
    cube = (signal_of(z) * (1 + 0.1 * np.random.default_rng(1).standard_normal((6, 6, 120)))).astype("f4")
    nodes = np.geomspace(5.95, 36, 20)[::-1] - 1
    neutral = 1 / (1 + np.exp(-(nodes - 7.8) / 0.35))
    astro = {"HII_EFF_FACTOR": 30.0, "ION_Tvir_MIN": 4.7, "L_X": 40.0, "NU_X_THRESH": 500.0}
    cosmo = {"OMm": 0.31, "OMb": 0.04897, "hlittle": 0.6766, "POWER_INDEX": 0.9665}
    box = {"BOX_LEN": 60.0, "HII_DIM": 6, "DIM": 18}
    with h5py.File(path, "w") as file:
        if version == 3:
            file.attrs.update({"random_seed": 7, "redshift": 5.0, "version": "3.4.0"})
            file.create_group("_globals").attrs.update({"P_CUTOFF": True, "M_WDM": 3.0})
            file.create_group("astro_params").attrs.update(astro)
            file.create_group("cosmo_params").attrs.update(cosmo | {"SIGMA_8": 0.8102})
            file.create_group("flag_options").attrs.update(
                {"USE_TS_FLUCT": True, "USE_MASS_DEPENDENT_ZETA": False, "M_MIN_in_Mass": False, "USE_MINI_HALOS": False})
            file.create_group("user_params").attrs.update(box)
            file["distances"] = distances
            file["node_redshifts"] = nodes
        else:
            file.attrs.update({"lightcone": True, "last_completed_node": -1, "last_completed_lcidx": -1, "lowz_buffer_pixels": 0,
                                   "highz_buffer_pixels": 0, "__version__": "4.1.1"})
            inputs = file.create_group("InputParameters")
            inputs.attrs["random_seed"] = 7
            inputs["node_redshifts"] = nodes
            inputs.create_group("astro_params").attrs.update(astro)
            inputs.create_group("astro_options").attrs.update({"USE_TS_FLUCT": True, "M_MIN_in_Mass": False, "USE_MINI_HALOS": False})
            inputs.create_group("matter_options").attrs.update({"SOURCE_MODEL": "CONST-ION-EFF"})
            inputs.create_group("cosmo_params").attrs.update(cosmo)
            inputs.create_group("simulation_options").attrs.update(box)
            file["lightcone_distances"] = distances
        history = "xH_box" if version == 3 else "neutral_fraction"
        file[f"global_quantities/{history}"] = neutral
        file["global_quantities/brightness_temp"] = np.zeros_like(neutral)
        file["lightcones/brightness_temp"] = cube


def crop_native(source, path, slices=120):
    """The low-redshift end of a real lightcone of 21cmFAST, everything else as it is."""
    def copy(group, into):
        into.attrs.update(group.attrs)
        for name, item in group.items():
            if isinstance(item, h5py.Group):
                copy(item, into.create_group(name))
            elif item.shape and item.shape[-1] > 1000:
                into[name] = item[..., :slices]
            else:
                into[name] = item[()]
    with h5py.File(source) as whole, h5py.File(path, "w") as file:
        copy(whole, file)


def write_npz(root):
    """Six lightcones and a set of 40 signals as .npz; the numbers are made up."""
    draw = np.random.default_rng(0)
    low = np.array([0.3, 0.2, 38, 100, 4, 10])
    high = np.array([10, 0.4, 42, 1500, 5.3, 250])
    names = ("m_WDM", "Om", "log10_L_X", "E_0", "log10_T_vir", "zeta")
    nodes = np.geomspace(5.95, 36, 20)[::-1] - 1
    neutral = 1 / (1 + np.exp(-(nodes - 7.8) / 0.35))
    grid = np.linspace(4.9, 39, 30000)
    distances = comoving(5.0, 0.31, 0.6766) + 3357.142857 / 94 * np.arange(94)     # as simulate --bins 94
    z_of_cube = np.interp(distances, comoving(grid, 0.31, 0.6766), grid)
    parameters = dict(zip(names, (3.0, 0.31, 40.0, 500.0, 4.7, 30.0)))
    for k in range(6):
        image = (signal_of(z_of_cube) * (1 + 0.1 * draw.standard_normal((8, 8, 94)))).astype("f2")
        np.savez(root / f"cube{k or ''}.npz", image=image, z=z_of_cube, seed=5 + k, node_z=nodes, xH=neutral, **parameters)
    u = draw.random((40, 6))
    t = np.linspace(0, 1, 94)
    signals = -(50 + 100 * u[:, 2:3]) * np.exp(-((t - 0.3 - 0.4 * u[:, 4:5]) / 0.1) ** 2) + 20 * u[:, 5:6] * (t < 0.2)
    parameters = dict(zip(names, (low + u * (high - low)).T))
    np.savez(root / "signals.npz", signal=signals.astype("f4"), xH=np.tile(neutral, (40, 1)), node_z=nodes,
             seed=np.arange(40), **parameters)


def write_lightcones(root):
    """v3.h5, v4.h5 (of real ones, where they are), cube.npz, cube1.npz to cube5.npz, signals.npz."""
    for version in (3, 4):
        real = conftest.SHARED / "data" / "lightcones" / f"native_v{version}_0.h5"
        if real.exists():
            crop_native(real, root / f"v{version}.h5")
        else:
            write_native(root / f"v{version}.h5", version)
    write_npz(root)


def write_encoder(directory):
    """A BERT of random weights with a word tokenizer and the files by which sentence-transformers pools."""
    import json

    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    directory.mkdir()
    words = {word: i for i, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "we", "study", "the", "of", "in"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"model_type": "bert", "architectures": ["BertModel"], "vocab_size": len(words), "hidden_size": 16, "num_hidden_layers": 2,
                  "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 64, "type_vocab_size": 2,
                  "layer_norm_eps": 1e-12, "hidden_act": "gelu", "position_embedding_type": "absolute", "pad_token_id": 0}
    pooling = {"word_embedding_dimension": 16, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True,
                   "pooling_mode_max_tokens": False, "pooling_mode_mean_sqrt_len_tokens": False}
    modules = [{"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
               for i, (path, kind) in enumerate([("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")])]
    (directory / "1_Pooling").mkdir()
    for name, content in [("config.json", config), ("modules.json", modules), ("1_Pooling/config.json", pooling),
                          ("sentence_bert_config.json", {"max_seq_length": None, "do_lower_case": False}),
                          ("tokenizer_config.json", {"model_max_length": 32, "do_lower_case": False})]:
        (directory / name).write_text(json.dumps(content, indent=1))
    shapes = {"embeddings.word_embeddings.weight": (len(words), 16), "embeddings.position_embeddings.weight": (64, 16),
              "embeddings.token_type_embeddings.weight": (2, 16), "embeddings.LayerNorm.weight": (16,), "embeddings.LayerNorm.bias": (16,),
              "pooler.dense.weight": (16, 16), "pooler.dense.bias": (16,)}
    for i in range(2):
        layer = f"encoder.layer.{i}."
        for name, rows, columns in [("attention.self.query", 16, 16), ("attention.self.key", 16, 16), ("attention.self.value", 16, 16),
                                    ("attention.output.dense", 16, 16), ("intermediate.dense", 24, 16), ("output.dense", 16, 24)]:
            shapes |= {f"{layer}{name}.weight": (rows, columns), f"{layer}{name}.bias": (rows,)}
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"{layer}{name}.weight": (16,), f"{layer}{name}.bias": (16,)}
    torch.manual_seed(0)
    save_file({name: 0.2 * torch.randn(shape) + float(name.endswith("LayerNorm.weight")) for name, shape in shapes.items()},
              directory / "model.safetensors", {"format": "pt"})
