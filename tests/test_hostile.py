"""Whatever is wrong in a file that a command reads, is one line with the file's name and exit status 2.

    python tests/test_hostile.py --count 5000 --seed 1         # a long run; prints the failing mutants
    python tests/test_hostile.py --mutant '["config.json", "perplexity", "set", ["hidden_size"], -1]'

A mutant is [kind, command, operation, arguments..]: the file of that kind is copied, changed by the operation, and the
command reads it. It must end with exit status 0, or with 2 and one line "error: .." that names the file (for flags,
argparse's own), in time, within 1 GB; no traceback, no other file touched, no temporary file left. Mutants are drawn
by structure (a key of this JSON, a tensor of this file); one that once failed stays in FAILED_ONCE.
"""
import argparse
import gzip
import json
import math
import multiprocessing
import os
import random
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"                       # before torch: forked.py says why
import h5py
import numpy as np

import conftest
import forked

# ---------------------------------------------------------------------------------------------- commands and kinds

MODEL = "--device cpu --dtype float32"
TEXTS = "--data data --subset s1 --samples 3"
LM = f"--data data --subset s1 --batch-size 4 --eval-samples 4 --max-steps 3 --checkpoint-every 1 {MODEL}"
REGRESS = f"--data lightcones --batch-size 4 --max-steps 3 --checkpoint-every 1 --log-every 1 {MODEL}"
GENERATE = f"--data lightcones --patch 4 --batch-size 2 --eval-samples 2 --max-steps 3 --checkpoint-every 1 --log-every 1 {MODEL}"
L3M = "--device cpu --batch-size 4 --out out/e"

COMMANDS = {                                                  # all write below out/ alone, or as WRITES says
    "prepare": "data_arxiv prepare snapshot.jsonl --out out/data",
    "prepare own": "data_arxiv prepare own.jsonl --own --out out/data",
    "ids": "data_arxiv ids data --subset s3 --split test",
    "synthesize": "data_arxiv synthesize out/made.jsonl --records 120",
    "train": f"train_lm --base base {LM} --out out/run",
    "train resumed": f"train_lm --base base {LM} --out lm-stopped --resume",
    "dry run": f"train_lm --base base {LM} --out out/run --dry-run",
    "perplexity": f"eval perplexity --base base {TEXTS} --json out/p.json {MODEL}",
    "perplexity of a run": f"eval perplexity lm --samples 3 --json out/p.json {MODEL}",
    "perplexity of texts": f"eval perplexity --base base --data own.jsonl --samples 3 --json out/p.json {MODEL}",
    "perplexity in nf4": f"eval perplexity lm --samples 3 --quantize nf4 --json out/p.json {MODEL}",
    "perplexity of shards": f"eval perplexity --base shards {TEXTS} --json out/p.json {MODEL}",
    "complete": f"eval complete --base base {TEXTS} --max-new-tokens 4 --out out/c.jsonl {MODEL}",
    "complete chat": f"eval complete --base chatty {TEXTS} --max-new-tokens 4 --out out/c.jsonl {MODEL}",
    "complete on": f"eval complete --base base {TEXTS} --max-new-tokens 4 --out texts/c.jsonl {MODEL}",
    "export": "eval export lm --out out/export",
    "semscore": "eval semscore texts/c.jsonl --encoder encoder --device cpu",
    "pairwise": f"eval semscore --pairwise --base base {TEXTS} --json out/p.json {MODEL}",
    "signatures": "eval signatures texts/c.jsonl",
    "rate": "eval rate texts/c.jsonl --out out/rate.html",
    "collect": "eval rate texts/c.jsonl --collect ratings.json",
    "compare": "eval compare lm --completions texts/c.jsonl --out out/compare",
    "simulate": "data_lightcone simulate -n 2 --sky 8 --bins 94 --workers 1 --out out/lightcones",
    "convert v3": "data_lightcone convert v3.h5 --bins 94 --out out/lightcones",
    "convert v4": "data_lightcone convert v4.h5 --bins 94 --out out/lightcones",
    "convert npz": "data_lightcone convert cube.npz --bins 94 --out out/lightcones",
    "inspect": "data_lightcone inspect lightcones --out out/inspect",
    "regress": f"train_l3m regress --base chatty --init random {REGRESS} --out out/run",
    "regress signals": f"train_l3m regress --init small {REGRESS.replace('lightcones', 'signals.npz')} --out out/run",
    "regress resumed": f"train_l3m regress --base chatty --init random {REGRESS} --out regress-stopped --resume",
    "generate": f"train_l3m generate --base chatty --init random {GENERATE} --out out/run",
    "generate resumed": f"train_l3m generate --base chatty --init random {GENERATE} --out generate-stopped --resume",
    "eval regress": f"eval regress regress --samples 2 {L3M}",
    "eval regress npz": f"eval regress regress --lightcone cube.npz {L3M}",
    "eval next-patch": f"eval next-patch generate --max-windows 2 --method midpoint --steps 1 {L3M}",
    "eval generate": f"eval generate generate --lightcones 1 --redshifts 8 --slices 2 --figures 0 --method midpoint --steps 1 {L3M}",
}
ALSO_NAMED = {                                                # other words that tell a user as much as the file's name
    "regress run config": ["lightcones"], "generate run config": ["lightcones"],        # one of another name is one that is gone
    "run config": ["no prepared abstracts in"], "adapter_config.json": ["lm gives"], "adapter tensors": ["lm gives"],
    "completions": ["--out"], "encoder pooling": ["encoder sets"],
}
WRITES = {"train resumed": "lm-stopped/", "regress resumed": "regress-stopped/", "generate resumed": "generate-stopped/",
          "semscore": "texts/", "signatures": "texts/", "rate": "texts/", "collect": "texts/", "complete on": "texts/"}

KINDS = {                                                     # kind: (file, format, commands that read it)
    "model.safetensors": ("base/model.safetensors", "safetensors", ["perplexity", "train", "export", "train resumed"]),
    "sharded weights": ("shards/model-00002-of-00002.safetensors", "safetensors", ["perplexity of shards"]),
    "index": ("shards/model.safetensors.index.json", "json", ["perplexity of shards"]),
    "config.json": ("base/config.json", "json", ["perplexity", "train", "dry run", "complete", "perplexity in nf4"]),
    "config.json of Qwen2": ("chatty/config.json", "json", ["complete chat", "regress", "generate"]),
    "tokenizer.json": ("base/tokenizer.json", "json", ["perplexity", "train", "complete"]),
    "adapter_config.json": ("lm/adapter/adapter_config.json", "json", ["perplexity of a run", "export", "perplexity in nf4"]),
    "adapter tensors": ("lm/adapter/adapter_model.safetensors", "safetensors", ["perplexity of a run", "export", "perplexity in nf4"]),
    "snapshot": ("snapshot.jsonl", "jsonl", ["prepare"]),
    "own texts": ("own.jsonl", "jsonl", ["prepare own", "perplexity of texts"]),
    "manifest": ("data/manifest.json", "json", ["ids", "train", "perplexity"]),
    "prepared index": ("data/index-*.npy", "npy", ["ids", "train"]),
    "prepared abstracts": ("data/abstracts-*.jsonl", "jsonl", ["ids", "train", "perplexity"]),
    "run config": ("lm/config.json", "json", ["perplexity of a run", "export", "compare"]),
    "run metrics": ("lm/metrics.jsonl", "jsonl", ["compare"]),
    "run rows": ("lm/rows.npz", "npz", ["perplexity of a run"]),
    "stopped run config": ("lm-stopped/config.json", "json", ["train resumed"]),
    "stopped run metrics": ("lm-stopped/metrics.jsonl", "jsonl", ["train resumed"]),
    "stopped run rows": ("lm-stopped/rows.npz", "npz", ["train resumed"]),
    "checkpoint": ("lm-stopped/checkpoint.safetensors", "safetensors", ["train resumed"]),
    "completions": ("texts/c.jsonl", "jsonl", ["semscore", "signatures", "rate", "complete on", "compare"]),
    "ratings": ("ratings.json", "json", ["collect"]),
    "semscore report": ("texts/c.semscore.json", "json", ["compare"]),
    "perplexity report": ("lm/perplexity-16bit.json", "json", ["compare", "export"]),
    "encoder weights": ("encoder/model.safetensors", "safetensors", ["semscore"]),
    "encoder config": ("encoder/config.json", "json", ["semscore"]),
    "encoder modules": ("encoder/modules.json", "json", ["semscore"]),
    "encoder pooling": ("encoder/1_Pooling/config.json", "json", ["semscore"]),
    "encoder length": ("encoder/sentence_bert_config.json", "json", ["semscore"]),
    "encoder tokenizer_config.json": ("encoder/tokenizer_config.json", "json", ["semscore"]),
    "encoder tokenizer": ("encoder/tokenizer.json", "json", ["semscore"]),
    "store": ("lightcones/*.h5", "h5", ["inspect", "regress", "generate", "eval regress", "eval generate"]),
    "21cmFAST 3": ("v3.h5", "h5", ["convert v3"]),
    "21cmFAST 4": ("v4.h5", "h5", ["convert v4"]),
    "cube.npz": ("cube.npz", "npz", ["convert npz", "eval regress npz"]),
    "signals.npz": ("signals.npz", "npz", ["regress signals"]),
    "regress run config": ("regress/config.json", "json", ["eval regress"]),
    "regress run metrics": ("regress/metrics.jsonl", "jsonl", ["eval regress"]),
    "regress network": ("regress/model.safetensors", "safetensors", ["eval regress"]),
    "regress checkpoint": ("regress-stopped/checkpoint.safetensors", "safetensors", ["regress resumed"]),
    "generate run config": ("generate/config.json", "json", ["eval generate", "eval next-patch"]),
    "generate network": ("generate/model.safetensors", "safetensors", ["eval generate", "eval next-patch"]),
    "generate checkpoint": ("generate-stopped/checkpoint.safetensors", "safetensors", ["generate resumed"]),
    "flags": (None, "flags", list(COMMANDS)),
    "paths": (None, "paths", list(COMMANDS)),
}

WHOLE = [["whole", command, "nothing"] for command in COMMANDS]                # nothing is wrong: must be accepted
FAILED_ONCE = [
    ["tokenizer.json", "perplexity", "pointer"],
    ["model.safetensors", "train resumed", "fill", "model.embed_tokens.weight", math.inf, True],
    ["sharded weights", "perplexity of shards", "fill", "model.norm.weight", math.nan, True],
    ["own texts", "prepare own", "encode", "utf-8-sig"],
    ["checkpoint", "train resumed", "empty"],
    ["run rows", "perplexity of a run", "array", "train_texts", "claims 2 TB"],
    ["semscore report", "compare", "set", ["rows", 0, "measures", "semscore", "q1"], math.nan],
    ["encoder config", "semscore", "set", ["model_type"], {"a": 1}],
    ["encoder length", "semscore", "set", ["max_seq_length"], 0],
    ["encoder length", "semscore", "set", ["max_seq_length"], True],
    ["encoder tokenizer", "semscore", "set", ["post_processor", "special_tokens", "[SEP]"], "REMOVE"],
    ["encoder tokenizer", "semscore", "set", ["post_processor", "single", 2, "SpecialToken", "id"], ""],
    ["store", "inspect", "about", ["parameters", 5], "12"],
    ["store", "regress", "about", ["parameters"], 2**63],
    ["store", "regress", "about", ["cell_sky"], 0],
    ["store", "inspect", "about", ["x_hi_end"], []],
    ["store", "inspect", "item", "global_signal", "another axis"],
    ["store", "inspect", "item", "redshifts", "longer"],
    ["21cmFAST 3", "convert v3", "cut", 0.08],
    ["21cmFAST 3", "convert v3", "item", "node_redshifts", "falling"],
    ["21cmFAST 4", "convert v4", "item", "InputParameters/astro_params", "no data"],
    ["21cmFAST 4", "convert v4", "loop"],
    ["cube.npz", "convert npz", "empty"],
    ["cube.npz", "convert npz", "array", "z", "claims 2 TB"],
    ["cube.npz", "convert npz", "array", "node_z", "nan"],
    ["signals.npz", "regress signals", "array", "signal", "bytes"],
    ["signals.npz", "regress signals", "array", "seed", "no elements"],
    ["generate checkpoint", "generate resumed", "header", ["tokens.<|row-newline-token|>/exp_avg_sq", "shape"], [1, 1, 48]],
    ["regress run config", "eval regress", "set", ["settings", "norm", 0], {}],
    ["regress run config", "eval regress", "set", ["settings", "data"], [[]]],
    ["regress run config", "eval regress", "set", ["settings", "lightcones"], [1, "a"]],
    ["regress run config", "eval regress", "set", ["settings", "lightcones", "train", 3], []],
    ["generate run config", "eval next-patch", "set", ["settings", "lightcones", "test"], [1, "a"]],
    ["generate run config", "eval next-patch", "set", ["settings", "lightcones", "validation"], "REMOVE"],
    ["generate network", "eval generate", "fill", "velocity.blocks.2.0.weight", 1e30, False],
    ["flags", "regress", "flag", "--blocks", "1000000000000"],
]

# --------------------------------------------------------------------------------------------------------- operations
# Each changes the file at `path`. The same name may serve several formats.

OPERATIONS = {}
POISON = [None, True, -1, 0, 1, 0.5, 1e308, math.nan, math.inf, 10**30, 2**63, "", "text", "nan", "12", "../../../etc/passwd", "\ud800",
          "\x1b[31m\n", "\0", [], {}, [1, "a"], [[]], {"a": 1}, [10**9]]


def operation(function):
    OPERATIONS[function.__name__.rstrip("_")] = function
    return function


@operation
def nothing(path):
    pass


@operation
def empty(path):
    path.write_bytes(b"")


@operation
def missing(path):
    path.unlink()


@operation
def directory(path):
    path.unlink()
    path.mkdir()


@operation
def loop(path):
    path.unlink()
    path.symlink_to(path.name)


@operation
def pointer(path):
    """What git leaves of a file in LFS."""
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n")


@operation
def cut(path, fraction):
    content = path.read_bytes()
    path.write_bytes(content[:int(fraction * len(content))])


@operation
def zeros(path, fraction):
    """The rest is zeros, as after a crash of the machine."""
    content = path.read_bytes()
    whole = int(fraction * len(content))
    path.write_bytes(content[:whole] + bytes(len(content) - whole))


@operation
def flip(path, fraction, value):
    content = bytearray(path.read_bytes())
    content[int(fraction * len(content))] ^= value
    path.write_bytes(content)


@operation
def append(path, text):
    path.write_bytes(path.read_bytes() + text.encode())


@operation
def garbage(path, seed):
    path.write_bytes(random.Random(seed).randbytes(3000))


@operation
def encode(path, codec):
    path.write_bytes(path.read_text().encode(codec, errors="replace"))


@operation
def zipped(path):
    path.write_bytes(gzip.compress(path.read_bytes()))


@operation
def whole(path, text):
    path.write_text(text)


@operation
def nested(path):
    path.write_text("[" * 100_000)


def changed(tree, keys, value):
    """A JSON tree with the item at `keys` replaced, or removed where `value` is the string REMOVE."""
    if not keys:
        return value
    node = tree
    for key in keys[:-1]:
        node = node[key]
    if value == "REMOVE":
        del node[keys[-1]]
    else:
        node[keys[-1]] = value
    return tree


@operation
def set_(path, keys, value):
    path.write_text(json.dumps(changed(json.loads(path.read_text()), keys, value)))


@operation
def line(path, number, keys, value):
    """`set` in one line of a JSONL file."""
    lines = path.read_text().splitlines()
    lines[number] = json.dumps(changed(json.loads(lines[number]), keys, value))
    path.write_text("\n".join(lines) + "\n")


@operation
def replace_line(path, number, text):
    lines = path.read_text().splitlines()
    lines[number] = text
    path.write_text("\n".join(lines) + "\n")


@operation
def repeat_line(path, number, times):
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines + [lines[number]] * times) + "\n")


@operation
def line_ends(path, end):
    path.write_bytes(path.read_bytes().replace(b"\n", end.encode()))


def read_safetensors(path):
    content = path.read_bytes()
    length, = struct.unpack("<Q", content[:8])
    return json.loads(content[8:8 + length]), content[8 + length:]


def write_safetensors(path, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@operation
def header(path, keys, value):
    tree, data = read_safetensors(path)
    write_safetensors(path, changed(tree, keys, value), data)


@operation
def header_text(path, text):
    write_safetensors(path, text.encode(), read_safetensors(path)[1])


@operation
def header_length(path, length):
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])


@operation
def rename(path, name, new):
    tree, data = read_safetensors(path)
    tree[new] = tree.pop(name)
    write_safetensors(path, tree, data)


@operation
def fill(path, name, value, first):
    """A tensor's numbers, all or the first alone, become `value` (NaN, infinity, 0, 1e30)."""
    tree, data = read_safetensors(path)
    begin, end = tree[name]["data_offsets"]
    codes = {"F32": lambda: np.float32(value).tobytes(), "F64": lambda: np.float64(value).tobytes(), "F16": lambda: np.float16(value).tobytes(),
             "BF16": lambda: np.float32(value).tobytes()[2:]}
    number = codes.get(tree[name]["dtype"], lambda: b"\xff")()
    count = 1 if first else (end - begin) // len(number)
    data = data[:begin] + number * count + data[begin + len(number) * count:]
    write_safetensors(path, tree, data)


@operation
def state(path, keys, value):
    """`set` in the JSON that a checkpoint keeps in its metadata."""
    tree, data = read_safetensors(path)
    tree["__metadata__"]["state"] = json.dumps(changed(json.loads(tree["__metadata__"]["state"]), keys, value))
    write_safetensors(path, tree, data)


def altered(array, how):
    """An array with something wrong about it."""
    array = np.asarray(array)
    if how in ("nan", "inf", "negative", "huge numbers"):
        array = array.astype(float) if array.dtype.kind in "fiub" else np.zeros(array.shape)
        value = {"nan": np.nan, "inf": np.inf, "negative": -3.0, "huge numbers": 1e38}[how]
        array = array.copy()
        array.flat[:1 + array.size // 3] = value
        return array
    if how == "falling":
        return array[..., ::-1].copy() if array.ndim else -array
    return {"text": lambda: np.full(array.shape, "text"), "complex": lambda: array.astype(complex) if array.dtype.kind in "fiub" else np.zeros(array.shape, complex),
            "bool": lambda: np.ones(array.shape, bool), "bytes": lambda: np.ones(array.shape, "i1"), "scalar": lambda: np.float32(3),
            "no elements": lambda: np.zeros((0,) * array.ndim), "shorter": lambda: array[..., :-1] if array.ndim else array[None][:0],
            "one": lambda: array[..., :1] if array.ndim else array, "longer": lambda: np.concatenate([array, array], -1) if array.ndim else array.repeat(2),
            "another axis": lambda: array[None], "transposed": lambda: array.T, "all equal": lambda: np.zeros_like(array)}[how]()


ALTERATIONS = ["nan", "inf", "negative", "huge numbers", "falling", "text", "complex", "bool", "bytes", "scalar", "no elements", "shorter", "one", "longer",
               "another axis", "transposed", "all equal"]


@operation
def array(path, name, how):
    """Something wrong about an array of an .npz file."""
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    if how == "removed":
        del arrays[name]
    elif how == "pickle":
        arrays[name] = np.array([print, 1], dtype=object)
    elif how != "claims 2 TB":
        arrays[name] = altered(arrays[name], how)
    with open(path, "wb") as file:
        np.savez(file, **arrays)
    if how == "claims 2 TB":
        with zipfile.ZipFile(path) as old:
            members = {item: old.read(item) for item in old.namelist()}
        text = b"{'descr': '<f8', 'fortran_order': False, 'shape': (250000000000,), }"
        members[f"{name}.npy"] = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text + b"\n" + bytes(64)
        with zipfile.ZipFile(path, "w") as new:
            for item, content in members.items():
                new.writestr(item, content)


@operation
def index(path, how, name=None):
    """Something wrong about an array of records (.npy), or one of its fields."""
    records = np.load(path)
    if how == "pickle":
        records = np.array([print, 1], dtype=object)
    elif how == "no records":
        records = np.arange(len(records))
    elif how == "field lost":
        records = records[[other for other in records.dtype.names if other != name]]
    elif how.startswith("field"):
        records[name][:5] = {"field large": 127, "field zero": 0}[how]
    else:
        records = altered(records, how)
    np.save(path, records)


@operation
def item(path, name, how):
    """Something wrong about a dataset or group of an HDF5 file."""
    with h5py.File(path, "a") as file:
        old = file[name]
        value = old[()] if isinstance(old, h5py.Dataset) else None
        del file[name]
        if how == "group":
            file.create_group(name)
        elif how == "lost link":
            file[name] = h5py.SoftLink("/nowhere")
        elif how == "outside link":
            file[name] = h5py.ExternalLink("nowhere.h5", "/x")
        elif how == "link to all":
            file[name] = h5py.SoftLink("/")
        elif how == "claims 8 TB":
            file.create_dataset(name, shape=(10**4, 10**4, 10**4), chunks=(100, 100, 100), dtype="f8")
        elif how == "no data":
            file[name] = h5py.Empty("f4")
        elif how == "words":
            file[name] = ["some", "words"]
        elif how != "removed":
            new = altered(np.zeros(3) if value is None else value, how)
            file[name] = new.astype("S") if new.dtype.kind == "U" else new


@operation
def about(path, keys, value):
    """`set` in the JSON that a lightcone of a store keeps in an attribute."""
    with h5py.File(path, "a") as file:
        file.attrs["about"] = json.dumps(changed(json.loads(file.attrs["about"]), keys, value))


@operation
def attribute(path, name, key, value):
    with h5py.File(path, "a") as file:
        attributes = file[name].attrs
        del attributes[key]
        if value != "REMOVE":
            attributes[key] = value


# ------------------------------------------------------------------------------------------------------------ drawing

ANY = [["empty"], ["missing"], ["directory"], ["loop"], ["pointer"]]


def draw_bytes(path, rng):
    return rng.choice([*ANY, ["cut", rng.random()], ["zeros", rng.random()], ["flip", rng.random(), rng.randrange(1, 256)], ["garbage", rng.randrange(1000)],
                       ["append", "x"]])


def keys_of(tree, above=()):
    """The keys that lead to each item of a JSON tree; of long lists the first few."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    found = [list(above)]
    for key, value in list(pairs)[:40]:
        found += keys_of(value, (*above, key))
    return found


def draw_json(path, rng):
    tree = json.loads(path.read_text())
    which = rng.random()
    if which < 0.15:
        return draw_bytes(path, rng)
    if which < 0.25:
        return rng.choice([["whole", text] for text in ("[]", "{}", "null", "3", '"text"', "{", "\n", '{"a": NaN}', '[{"a": 1}]')] + [
            ["nested"], ["encode", "utf-16"], ["encode", "utf-8-sig"], ["zipped"]])
    return ["set", rng.choice(keys_of(tree)[1:] or [[]]), rng.choice(["REMOVE", "REMOVE", *POISON])]


def draw_jsonl(path, rng):
    lines = path.read_text().splitlines()
    number = rng.randrange(min(len(lines), 8))
    which = rng.random()
    if which < 0.15:
        return draw_bytes(path, rng)
    if which < 0.4:
        return rng.choice([["replace_line", number, rng.choice(["", "{", "[]", "null", "3", '"text"', "\0", "[" * 50_000, "x" * 10**6, '{"a": 1}', "{}{}"])],
                           ["repeat_line", number, rng.choice([1, 100])], ["line_ends", rng.choice(["\r\n", "\r", "\n\n", ""])],
                           ["encode", rng.choice(["utf-16", "utf-8-sig", "utf-32"])], ["zipped"], ["append", rng.choice(['{"id": "1", "abs', "\n\n", "{}\n"])],
                           ["whole", rng.choice(["\n", "[]", "{}", "null\n", "\ufeff"])]])
    return ["line", number, rng.choice(keys_of(json.loads(lines[number]))), rng.choice(["REMOVE", *POISON])]


def draw_safetensors(path, rng):
    tree, _ = read_safetensors(path)
    names = [name for name in tree if name != "__metadata__"]
    name = rng.choice(names)
    which = rng.random()
    if which < 0.15:
        return draw_bytes(path, rng)
    if which < 0.25:
        return rng.choice([["header_length", rng.choice([0, 1, 2**63, 2**64 - 1, 10**7, 10**12])],
                           ["header_text", rng.choice(["", "{", "[]", "null", "3", "[" * 50_000, "\0", "{}"])]])
    if which < 0.45:
        return ["fill", name, rng.choice([math.nan, math.inf, -math.inf, 0.0, 1e30]), rng.random() < 0.5]
    if which < 0.55:
        return rng.choice([["header", [name], "REMOVE"], ["rename", name, rng.choice(["", "text", name.upper(), name + ".weight", rng.choice(names)])]])
    if which < 0.7 and "state" in tree.get("__metadata__", {}):
        return ["state", rng.choice(keys_of(json.loads(tree["__metadata__"]["state"]))), rng.choice(["REMOVE", *POISON])]
    part = rng.choice(["dtype", "shape", "data_offsets"])
    begin, end = tree[name]["data_offsets"]
    shape = tree[name]["shape"]
    value = {"dtype": ["F32", "F16", "BF16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "XX", 3, None],
             "shape": [shape[::-1], [], [0], [-1], [2**62, 4], [1, *shape], [1.5], "text", None, shape[:-1]],
             "data_offsets": [[end, begin], [begin, end + 4], [begin + 1, end], [0, 2**62], [-4, 0], [begin], "text", None, [0, 0]]}[part]
    return ["header", [name, part], rng.choice(value)]


def draw_npz(path, rng):
    with np.load(path) as file:
        name = rng.choice(file.files)
    if rng.random() < 0.2:
        return draw_bytes(path, rng)
    return ["array", name, rng.choice(["removed", "pickle", "claims 2 TB", *ALTERATIONS])]


def draw_npy(path, rng):
    if rng.random() < 0.3:
        return draw_bytes(path, rng)
    how = rng.choice(["pickle", "no records", "field lost", "field large", "field zero", "shorter", "one", "longer", "another axis", "scalar", "no elements"])
    return ["index", how, rng.choice(np.load(path).dtype.names)]


def draw_h5(path, rng):
    names = []
    with h5py.File(path) as file:
        file.visit(names.append)
        attributes = [(name, key) for name in ["/", *names] for key in file[name].attrs]
        columns = json.loads(file.attrs.get("about", "0"))
    which = rng.random()
    if which < 0.5 and columns:
        return ["about", rng.choice(keys_of(columns)), rng.choice(["REMOVE", *POISON])]
    if which < 0.2:
        return draw_bytes(path, rng)
    if which < 0.5 and attributes:
        return ["attribute", *rng.choice(attributes), rng.choice(["REMOVE", "text", "", -1, 0, 1e30, math.nan, math.inf, True, [1.0, 2.0], 2**62])]
    return ["item", rng.choice(names), rng.choice(["removed", "group", "lost link", "outside link", "link to all", "claims 8 TB", "no data", "words", *ALTERATIONS])]


def parser_of(words):
    """The argparse parser of a command's words, such as ["eval", "perplexity", ..]."""
    found = []

    def take(self, *arguments):
        found.append(self)
        raise StopIteration
    parse = argparse.ArgumentParser.parse_args
    argparse.ArgumentParser.parse_args = take
    try:
        sys.modules[words[0]].main(["--help"])
    except StopIteration:
        pass
    finally:
        argparse.ArgumentParser.parse_args = parse
    for action in found[0]._actions:
        if isinstance(action, argparse._SubParsersAction):
            return action.choices[words[1]]
    return found[0]


# how long a command works: any number of these is a user's right
WORK = {"--epochs", "--max-steps", "--records", "-n", "--max-new-tokens", "--slices", "--samples", "--steps", "--workers"}


def numeric_flags(command):
    return [action for action in parser_of(shlex.split(COMMANDS[command]))._actions if action.option_strings and action.type]


def draw_flags(command, rng):
    """What is no number, or out of range, or huge."""
    action = rng.choice(numeric_flags(command))
    huge = [] if WORK & set(action.option_strings) else ["1000000000000", "123456789012345678901234567890"]
    return ["flag", action.option_strings[-1], rng.choice(["nan", "inf", "-inf", "-1", "0", "1e30", "1e-30", "text", "", "0.5", "1_0", *huge])]


def draw_paths(command, rng, place):
    words = shlex.split(COMMANDS[command])
    paths = [word for word in words[1:] if (place / word).exists() or word.startswith("out/")]
    swap = ["nowhere", "", "base", "own.jsonl", "/dev/null", "x" * 300, "a\nb", "*.h5", "v3.h5", "base/config.json/x", ".", "encoder", "lightcones", "data", "lm", "~", "\x1b[31m"]
    return ["path", rng.choice(paths), rng.choice(swap)]


DRAW = {"json": draw_json, "jsonl": draw_jsonl, "safetensors": draw_safetensors, "npz": draw_npz, "npy": draw_npy, "h5": draw_h5}


def input_file(place, kind):
    """The file that mutants of this kind change."""
    return min(place.glob(KINDS[kind][0]))


def draw(kind, number, seed, place):
    rng = random.Random(f"{seed} {kind} {number}")
    _, form, commands = KINDS[kind]
    command = rng.choice([c for c in commands if form != "flags" or numeric_flags(c)])
    if form == "flags":
        return [kind, command, *draw_flags(command, rng)]
    if form == "paths":
        return [kind, command, *draw_paths(command, rng, place)]
    return [kind, command, *DRAW[form](input_file(place, kind), rng)]


# ------------------------------------------------------------------------------------------------------------- trials


def stop_in_update(command):
    """A function that runs a training and asks it to stop in its second update."""
    def run():
        import signal

        import train_l3m
        import train_lm
        update = train_lm.update
        calls = []

        def counted(*arguments, **named):
            calls.append(1)
            if len(calls) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return update(*arguments, **named)
        train_lm.update = train_l3m.update = counted
        forked.program(command)()
    return run


def make_inputs(place):
    """Whole inputs of every kind."""
    (place / "out").mkdir()

    def models():
        conftest.make_tiny(place)
        conftest.make_chatty(place / "chatty")
    forked.succeed(models, place)
    records = [json.loads(text) for text in (place / "snapshot.jsonl").read_text().splitlines()[:60]]
    (place / "own.jsonl").write_text("".join(json.dumps({"id": r["id"], "abstract": r["abstract"]}) + "\n" for r in records))
    (place / "shards").mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(place / "base" / name, place / "shards")
    tree, data = read_safetensors(place / "base/model.safetensors")
    tree.pop("__metadata__", None)
    where = {}
    for k, names in enumerate((list(tree)[:9], list(tree)[9:]), 1):
        parts = [data[slice(*tree[name]["data_offsets"])] for name in names]
        ends = np.cumsum([len(part) for part in parts]).tolist()
        shard = {name: tree[name] | {"data_offsets": [end - len(part), end]} for name, part, end in zip(names, parts, ends)}
        file = f"model-0000{k}-of-00002.safetensors"
        write_safetensors(place / "shards" / file, {"__metadata__": {"format": "pt"}} | shard, b"".join(parts))
        where |= dict.fromkeys(names, file)
    (place / "shards/model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": len(data)}, "weight_map": where}))
    forked.write_lightcones(place)
    forked.write_encoder(place / "encoder")
    simulate = COMMANDS["simulate"].replace("-n 2", "-n 60").replace("out/", "")
    regress = COMMANDS["regress"].replace("out/run", "regress").replace("--max-steps 3", "--max-steps 40 --lr 1e-2")
    for command in (simulate, COMMANDS["train"].replace("out/run", "lm"), regress,
                    COMMANDS["generate"].replace("out/run", "generate"), COMMANDS["complete"].replace("out/", "texts/"),
                    COMMANDS["perplexity of a run"].replace("--samples 3 --json out/p.json ", "")):
        forked.succeed(command, place)
    for name in ("train", "regress", "generate"):
        forked.succeed(stop_in_update(COMMANDS[f"{name} resumed"]), place)
    for name in ("regress", "generate"):                      # lm-stopped can go on from the one before
        (place / f"{name}-stopped/checkpoint-previous.safetensors").unlink(missing_ok=True)
    for command in ("semscore", "signatures"):
        forked.succeed(COMMANDS[command], place)
    forked.succeed("eval rate texts/c.jsonl", place)
    for key in place.glob("texts/*.key.json"):
        items = json.loads(key.read_text())
        marks = {criterion: 3 + k for k, criterion in enumerate(sys.modules["eval"].CRITERIA)}
        rating = {"page": key.name.split(".")[1], "rater": "A. Reader", "ratings": dict.fromkeys(items, marks)}
        (place / "ratings.json").write_text(json.dumps(rating))
    forked.succeed(COMMANDS["collect"], place)


def copy_inputs(inputs, place, writable):
    """Hard links to all inputs; copies of what may be written."""
    def copy(source, target):
        if Path(source).relative_to(inputs).parts[0] in writable:
            shutil.copy2(source, target)
        else:
            os.link(source, target)
    shutil.copytree(inputs, place, copy_function=copy)


def listing(place):
    """{name: what shows whether a file was touched}."""
    found = {}
    for folder, _, names in os.walk(place):
        for name in names:
            path = os.path.join(folder, name)
            status = os.lstat(path)
            found[os.path.relpath(path, place)] = (status.st_size, status.st_mtime_ns, status.st_ino)
    return found


def same(a, b):
    return a.is_file() and b.is_file() and a.read_bytes() == b.read_bytes()


def fault(done, kind, named, touched, writes):
    """What is wrong about the way in which a command ended; None if nothing is."""
    if done.status is None:
        return f"still running after two minutes; {done.last()[:200]}"
    if "Traceback (most recent call last)" in done.stderr + done.stdout or done.status not in (0, 2):
        return f"exit status {done.status}: {done.last()[:300]}"
    if done.gigabytes > 1:
        return f"took {done.gigabytes:.1f} GB"
    outside = [name for name in touched if not name.startswith(("out/", *([writes] if isinstance(writes, str) else writes)))]
    if outside:
        return f"touched {outside[:3]}"
    left = [name for name in touched if name.endswith((".tmp", ".partial"))]
    if left:
        return f"left {left[:3]}"
    if done.status == 0:
        return None
    if kind == "whole":
        return f"refused: {done.last()}"
    errors = done.errors()
    if len(errors) != 1 or done.last() != errors[0]:
        return f"not one line: {done.lines()[-4:]}"
    if len(errors[0]) > 1200:
        return f"an error of {len(errors[0])} characters: {errors[0][:100]}.."
    if named and not any(name in errors[0] for name in named):
        return f"the error does not name {named[0]}: {errors[0][:300]}"
    return None


def results_not_finite(place, touched):
    """Reports of a command that ended well, with NaN in them."""
    for name in touched:
        path = place / name
        if name.endswith((".json", ".jsonl")) and path.name not in ("config.json", "metrics.jsonl") and path.is_file():
            text = path.read_text()
            if "NaN" in text or "Infinity" in text:
                return f"exit status 0 with NaN in {name}"
    return None


def trial(task):
    """Make one mutant and let its command read it -> (mutant, "refused" or "accepted", fault or None, seconds)."""
    inputs, mutant = task
    kind, command, operation_name, *arguments = mutant
    writes = WRITES.get(command, "out/")                      # a path's beginning, or several
    line = COMMANDS[command]
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="nanophys-mutant-") as scratch:
        place = Path(scratch) / "inputs"
        copy_inputs(inputs, place, {writes.rstrip("/")})
        named = []
        if operation_name == "flag":
            line = shlex.join([*shlex.split(line), f"{arguments[0]}={arguments[1]}" if arguments[0].startswith("--") else f"{arguments[0]}{arguments[1]}"])
        elif operation_name == "path":
            line = shlex.join([arguments[1] if word == arguments[0] else word for word in shlex.split(line)])
            if arguments[0].startswith(("out/", writes.rstrip("/"))):
                writes = (writes, os.path.normpath(arguments[1]).removeprefix("."))       # as told
        elif kind != "whole":
            path = input_file(place, kind)
            named = [path.name, f"{path.parent.name}/", path.parent.name, *ALSO_NAMED.get(kind, [])]
            content = path.read_bytes()
            path.unlink()                                     # a hard link no longer
            path.write_bytes(content)
            OPERATIONS[operation_name](path, *arguments)
        before = listing(place)
        done = forked.call(limited(line), place, 120)
        after = listing(place)
        touched = [name for name in before | after if before.get(name) != after.get(name) and not same(inputs / name, place / name)]
        wrong = fault(done, kind, named, touched, writes)
        if wrong is None and done.status == 0:
            wrong = results_not_finite(place, touched)
    return mutant, "refused" if done.status else "accepted", wrong, time.monotonic() - began


def limited(line):
    """The command, in an address space of 4 GB more than now: a machine should survive what asks for terabytes."""
    def run():
        import resource
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 4 * 10**9,) * 2)
        forked.program(line)()
    return run


def run_mutants(mutants, inputs, jobs):
    """-> the faults, after a table of what happened to each kind."""
    table = {mutant[0]: [0, 0, 0, 0.0] for mutant in mutants}
    faults = []
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        for mutant, outcome, wrong, seconds in pool.imap_unordered(trial, [(inputs, m) for m in mutants]):
            row = table[mutant[0]]
            row[["refused", "accepted"].index(outcome)] += 1
            row[3] += seconds
            if wrong:
                row[2] += 1
                faults.append((mutant, wrong))
                print(f"FAULT {json.dumps(mutant)[:400]}\n      {wrong}", flush=True)
    print(f"{'kind':26}{'mutants':>9}{'refused':>9}{'accepted':>9}{'faults':>9}{'seconds':>9}")
    for kind, (refused, accepted, wrong, seconds) in table.items():
        print(f"{kind:26}{refused + accepted:9}{refused:9}{accepted:9}{wrong:9}{seconds:9.1f}")
    print(f"{len(mutants)} mutants, {len(faults)} faults")
    return faults


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=460)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mutant", type=json.loads, help="this one alone, with all that its command prints")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS, metavar="KIND")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--inputs", type=Path, help="keep the whole inputs here, for the next time")
    args = parser.parse_args(argv)
    forked.load_modules()
    with tempfile.TemporaryDirectory(prefix="nanophys-hostile-") as scratch:
        inputs = (args.inputs or Path(scratch) / "inputs").absolute()
        if not inputs.exists():
            inputs.mkdir()
            make_inputs(inputs)
        if args.mutant:
            forked.program = shown(forked.program)
            print(*trial((inputs, args.mutant))[1:3])
            return
        each = math.ceil(args.count / len(args.kinds))
        drawn = [draw(kind, k, args.seed, inputs) for kind in args.kinds for k in range(each)]
        once = [mutant for mutant in FAILED_ONCE if mutant[0] in args.kinds]
        if run_mutants(WHOLE + once + drawn, inputs, args.jobs):
            sys.exit(1)


def shown(program):
    """forked.program for one mutant: its command prints to the terminal, too."""
    def of(line):
        def run():
            print(f"$ {line}", file=sys.stderr)
            os.dup2(TERMINAL, 1)
            os.dup2(TERMINAL, 2)
            program(line)()
        return run
    return of


TERMINAL = os.dup(2)


def test_hostile():
    """A process of its own: pytest's has threads and gradients."""
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=conftest.ENVIRONMENT)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]


if __name__ == "__main__":
    main()
