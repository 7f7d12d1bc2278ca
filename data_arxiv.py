"""arXiv abstracts as training text: metadata snapshot -> training sets s1..s10 -> token batches.

The data of FeynTune (arXiv:2508.03716). Of the arXiv metadata snapshot (Kaggle Cornell-University/arxiv, one JSON record a
line) the records whose PRIMARY category is hep-th, hep-ph, gr-qc, q-bio.* or cs.* are kept, in the order of the file:
five control papers set aside, withdrawn papers dropped, line breaks removed. Each pool of abstracts (one a category, and
`joint` = hep-ph and gr-qc together) is split 70/15/15, and the ten training sets are mixtures of pools, made split by split.
Splits and mixtures are pure functions of the order of the records: two people with the same snapshot have the same
splits, id for id, and they are the authors' own.

    python data_arxiv.py prepare arxiv-metadata-oai-snapshot.json      # also .gz; -> data/arxiv
    python data_arxiv.py prepare mine.jsonl --own                      # any JSONL with id and abstract, as the set `own`
    python data_arxiv.py ids data/arxiv --subset s3 --split test       # the arXiv ids of a split, in order
    python data_arxiv.py synthesize made_up.jsonl                      # a made-up snapshot, for demo and tests

A prepared directory holds
    abstracts-CHECKSUM.jsonl   {"id", "category", "abstract"}, one a line, in the order of the snapshot (8 hex digits of it)
    index-CHECKSUM.npz         group (N,) uint8: position in GROUPS; start (N+1,) int64: byte offsets; characters (N,) int32
    manifest.json              sources, categories (counts), sets (sizes), characters, unavailable, short, control, checksums; replaced
                               last, in one step: until then what was there before is valid
"""
import argparse
import contextlib
import functools
import gzip
import hashlib
import http.client
import io
import itertools
import json
import math
import mmap
import os
import random
import re
import sys
import textwrap
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from array import array
from datetime import datetime, timedelta, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from tqdm import tqdm

CATEGORIES = ("hep-th", "hep-ph", "gr-qc", "q-bio", "cs")          # q-bio and cs: every q-bio.* and cs.*
JOINT = ("hep-ph", "gr-qc")
GROUPS = CATEGORIES + ("control", "own")
SPLITS = ("train", "validation", "test")
SETS = tuple(f"s{i}" for i in range(1, 11))
NEEDS = {"s1": "hep-th", "s2": "hep-ph gr-qc", **{f"s{i}": "hep-th hep-ph gr-qc" for i in (3, 4, 5, 6, 9)}, "s7": "hep-th gr-qc",
         "s8": "hep-th hep-ph", "s10": "hep-th hep-ph gr-qc q-bio cs", "joint": "hep-ph gr-qc"}      # any other name needs itself
CONTROL = ("1804.08625", "1404.0016", "1205.2086", "1209.5915", "1802.05268")     # the authors' own papers: read, never trained on
CS_SAMPLE = 200_000


# ---------------------------------------------------------------------------------------------
# Files and command lines: the one way to read, to write, to lock and to fail, for all that is data.
# model.py has `reading` and `writing` once more, for all that is a model: it imports no data.

UMASK = os.umask(0)
os.umask(UMASK)


@contextlib.contextmanager
def reading(path, advice="get or make it again"):
    """Whatever goes wrong inside, while `path` is read, becomes a ValueError: file, reason, advice."""
    try:
        yield Path(path)
    except MemoryError:
        raise
    except Exception as e:
        if isinstance(e, ValueError) and str(e).startswith(str(path)):        # has been said
            raise
        reason = str(e).partition("\n")[0] or type(e).__name__
        if isinstance(e, FileNotFoundError):
            reason = "is not there"
        elif isinstance(e, KeyError):
            reason = f"lacks {e}"
        raise ValueError(f"{path}: {reason}; {advice}") from e


@contextlib.contextmanager
def writing(path):
    """A temporary path to write to, which takes the place of `path` once it is whole and on disk.

    A reader, or a kill, meets the old file or the new one. What is no regular file, such as
    /dev/null, is written to directly. Raises OSError, with the file's name, for a full disk."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.exists() and not path.is_file():
            yield path
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~UMASK)                   # safetensors writes 0600
        os.replace(temporary, path)
    except Exception as e:
        if not isinstance(e, (OSError, RuntimeError)) and type(e).__name__ != "SafetensorError":
            raise
        reason = getattr(e, "strerror", None) or str(e).partition("\n")[0]
        raise OSError(f"{path} could not be written ({reason}); what was there is as it was, so "
                      "free some space or choose another place, and run this again") from e
    finally:
        temporary.unlink(missing_ok=True)


def lock(path, doing):
    """Hold a file or directory until this process ends -> descriptor; ValueError if it is held.

    Where the file system has no locks (some cluster disks) it goes on with a warning."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        import fcntl
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{path} is in use: another process is {doing} it; wait for its end, or "
                         "choose another --out") from None
    except (ImportError, OSError) as e:
        print(f"warning: {path} cannot be locked ({e}): start only one job on it", file=sys.stderr)
    return descriptor


def bounded(kind, low, high=math.inf, above=False):
    """An argparse type: an int or a float from low to high; `above`: greater than low."""
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or above and value == low or math.isinf(value):
            least = f"above {low:g}" if above else f"of at least {low:g}"
            most = f", at most {high:g}" if high < math.inf else ""
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} {least}{most}")
        return value
    return convert


@contextlib.contextmanager
def one_line(memory="less at a time"):
    """Around a script's work: what a user can mend is one line on stderr and exit status 2.

    memory: what to lower where memory runs out."""
    code = 2
    try:
        yield
        return
    except BrokenPipeError:                                   # .. | head: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return
    except KeyboardInterrupt:
        code = 130
        message = "stopped; what was written before is whole, the same command starts again"
    except (ValueError, OSError) as e:
        message = f"error: {e}"
    except (MemoryError, RuntimeError) as e:
        full = re.search("out of memory|enough memory|allocate memory", str(e))
        if not (full or isinstance(e, MemoryError)):
            raise
        message = f"error: out of memory: {memory}"
    rank = os.environ.get("RANK", "0")
    message = message if rank == "0" else f"process {rank}: {message}"
    printable = "".join(c if c.isprintable() else " " for c in message)
    print(" ".join(printable.split()), file=sys.stderr, flush=True)
    if "RANK" in os.environ:                                  # the others may wait for this one:
        os._exit(code)                                        # torchrun ends them
    sys.exit(code)


# ---------------------------------------------------------------------------------------------------------------------
# Pools, splits and sets: arithmetic on row numbers. `group` is (N,) uint8, the group of each prepared record (GROUPS).

def split_rows(n):
    """The authors' 70/15/15 split of n rows: {"train": (n_train,), "validation": .., "test": ..} row numbers, in order.

    What `datasets` does in train_test_split(train_size=0.7, seed=42), then train_test_split(test_size=0.5, seed=42) of the
    part held out: permute, the held-out rows first; permute those with a fresh generator of the same seed, test rows first."""
    permutation = np.random.default_rng(42).permutation(n)
    n_train = math.floor(0.7 * n)
    held_out, train = permutation[:n - n_train], permutation[n - n_train:]
    permutation = np.random.default_rng(42).permutation(len(held_out))
    n_test = math.ceil(0.5 * len(held_out))
    return {"train": train, "validation": held_out[permutation[n_test:]], "test": held_out[permutation[:n_test]]}


def shuffle42(rows):
    """What `datasets` does in shuffle(seed=42)."""
    return rows[np.random.default_rng(42).permutation(len(rows))]


def pool(group, name):
    """Row numbers of a pool before it is split: a category, "joint", "control" or "own".

    In the order of the snapshot, but for cs: a sample of 200,000 in the order that pandas' sample(random_state=42) draws,
    or all of them where there are fewer."""
    rows = np.flatnonzero(np.isin(group, [GROUPS.index(c) for c in (JOINT if name == "joint" else [name])]))
    if name == "cs" and len(rows) >= CS_SAMPLE:
        rows = rows[np.random.RandomState(42).choice(len(rows), CS_SAMPLE, replace=False)]
    return rows


def select(group, name, split):
    """(rows, short): the row numbers of one split of a set, in order, and one sentence for every part of the recipe that asks
    for more rows than there are (all there are are taken).

    `name`: s1..s10, a pool (its split), "control" (all of it, whatever the split), or a free
    recipe "GROUP:F+GROUP:F+..": the first int(F n) rows of each group in this split, n = its hep-th rows; no F: all of them;
    then shuffled. ValueError, in one sentence, if a category is lacking or the name means nothing."""
    if split not in SPLITS:
        raise ValueError(f"{split!r} is no split: give train, validation or test")
    short = []

    def need(categories):
        lacking = [c for c in categories.split() if not np.any(group == GROUPS.index(c))]
        if lacking:
            raise ValueError(f"{name} is unavailable: no {', '.join(lacking)} records in the prepared data")

    def part(category):                                                         # a pool's rows in this split
        need(NEEDS.get(category, category))
        rows = pool(group, category)
        return rows[split_rows(len(rows))[split]]

    def first(count, rows, what):
        if count > len(rows):
            short.append(f"{name} {split}: the recipe takes {count:,} {what} rows, there are {len(rows):,}")
        return rows[:max(count, 0)]

    def of_joint(category):                                                     # rows of one category in joint's split
        rows = part("joint")
        return rows[group[rows] == GROUPS.index(category)]

    if name in SETS + ("control",):
        need(NEEDS.get(name, name))
    if name == "control":
        rows = pool(group, "control")
    elif name in CATEGORIES + ("joint", "own"):
        rows = part(name)
    elif name not in SETS:
        rows = free_recipe(name, part, first)
    elif name == "s1":
        rows = part("hep-th")
    elif name == "s2":
        rows = part("joint")
    elif name == "s3":
        rows = shuffle42(np.concatenate([part("hep-th"), part("joint")]))
    elif name in ("s4", "s5", "s6"):                                            # hep-th diluted, the size kept
        th = part("hep-th")
        c = int(0.15 * len(th))
        added = {"s4": ["gr-qc", "hep-ph"], "s5": ["gr-qc"], "s6": ["hep-ph"]}[name]
        others = [first(c, of_joint(category), f"{category} of joint") for category in added]
        rows = shuffle42(np.concatenate([th[:len(th) - len(added) * c], *others]))
    elif name in ("s7", "s8"):
        rows = shuffle42(np.concatenate([part("hep-th"), part("gr-qc" if name == "s7" else "hep-ph")]))
    elif name == "s9":                                                          # as many rows as hep-th, none of them hep-th
        n, gr, ph = len(part("hep-th")), part("gr-qc"), part("hep-ph")
        q = len(pool(group, "hep-th")) / (len(pool(group, "gr-qc")) + len(pool(group, "hep-ph")))
        gr = first(int(q * len(gr)), shuffle42(gr), "gr-qc")
        rows = shuffle42(np.concatenate([gr, first(n - len(gr), shuffle42(ph), "hep-ph")]))
    else:                                                                       # s10: as many rows as s3, from afar
        qb = part("q-bio")
        cs = first(len(part("gr-qc")) + len(part("hep-ph")) - len(qb), shuffle42(part("cs")), "cs")
        rows = shuffle42(np.concatenate([part("hep-th"), qb, cs]))
    return rows, short


def free_recipe(recipe, part, first):
    """Rows of "hep-th:0.7+gr-qc:0.15"; part, first: see select."""
    parts = []
    for term in recipe.split("+"):
        match = re.fullmatch(r"([a-z-]+)(?::(\d+\.?\d*|\.\d+))?", term.strip())
        if not match or match[1] not in CATEGORIES + ("joint", "own"):
            raise ValueError(f"{recipe!r} is no training set: give one of s1..s10, own, control, {', '.join(CATEGORIES)}, joint, "
                             f"or a recipe such as hep-th:0.7+gr-qc:0.15")
        rows = part(match[1])
        parts.append(first(int(float(match[2]) * len(part("hep-th"))), rows, match[1]) if match[2] else rows)
    return shuffle42(np.concatenate(parts))


# ---------------------------------------------------------------------------------------------------------------------
# Prepared data -> texts -> token batches

def available(directory):
    """The manifest of a prepared directory. ValueError, with the two ways that lead there, if nothing is prepared."""
    path = Path(directory) / "manifest.json"
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"""no prepared abstracts in {directory} (there is no manifest.json). Two ways lead there:
1. the snapshot: download arxiv-metadata-oai-snapshot.json of Kaggle Cornell-University/arxiv (account, about 4.5 GB), then, in a minute,
     python data_arxiv.py prepare arxiv-metadata-oai-snapshot.json --out {directory}""") from None
    except ValueError as e:
        raise ValueError(f"{path} is not valid JSON ({e}): run prepare again") from None


@functools.lru_cache
def checksum_of(path, modified):
    """sha256 of a file, computed once a process and state of the file."""
    with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return hashlib.sha256(data).hexdigest()


def read_index(directory):
    """(path of the abstracts, group (N,), start (N+1,), characters (N,)) of a prepared directory; ValueError if it is damaged."""
    manifest = available(directory)
    try:
        names = [next(Path(directory) / n for n in manifest["checksums"] if n.startswith(stem)) for stem in ("abstracts-", "index-")]
        if any(checksum_of(path, path.stat().st_mtime_ns) != manifest["checksums"][path.name] for path in names):
            raise ValueError("its checksum is not the manifest's")
        with np.load(names[1], allow_pickle=False) as arrays:
            return names[0], arrays["group"], arrays["start"], arrays["characters"]
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as e:
        raise ValueError(f"the prepared data in {directory} is damaged or incomplete ({e}): run prepare again") from None


def load(directory, set, split):
    """(ids, texts) of one split of a set, two lists of str in the set's order.

    directory: written by prepare. set: s1..s10, own, control, a category, joint, or a free recipe (see select).
    split: train, validation or test. ValueError in one sentence when the set cannot be had or nothing is prepared."""
    abstracts, group, start, _ = read_index(directory)
    rows, short = select(group, set, split)
    for sentence in short:
        print(f"note: {sentence}; all of them are taken", file=sys.stderr)
    ids, texts = [None] * len(rows), [None] * len(rows)
    with open(abstracts, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for k in np.argsort(rows):                                              # in the order of the file: the disk likes that
            record = json.loads(data[start[rows[k]]:start[rows[k] + 1]])
            ids[k], texts[k] = record["id"], record["abstract"]
    return ids, texts


def encode(tokenizer, text, bos, eos):
    """Token ids of one training sequence, BOS + text + EOS (eos None: no EOS); never truncated. `tokenizer`: tokenizers.Tokenizer.

    The text itself is encoded without special tokens: some tokenizers would add a BOS of their own."""
    return [bos] + tokenizer.encode(text, add_special_tokens=False).ids + ([eos] if eos is not None else [])


@functools.lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(n)


def batch_rows(n, batch_size, seed, step):
    """Row indices of the batch of 0-based `step`, over all processes: (batch_size,), or fewer for the last batch of an epoch.

    A pure function of its arguments: every epoch has its own permutation of the n rows, so a run resumed at any step sees
    the batches that it would have seen, and nothing about the data needs saving."""
    steps = math.ceil(n / batch_size)                                           # an epoch; its partial last batch is kept
    epoch, i = divmod(step, steps)
    return epoch_order(n, seed, epoch)[i * batch_size:(i + 1) * batch_size].copy()


def collate(sequences):
    """Sequences laid end to end, without padding: (ids (total,) int64, lengths (len(sequences),) int64), torch tensors."""
    import torch                                                                # here: prepare and ids start without it
    ids = torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.int64)
    return ids, torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int64)


# ---------------------------------------------------------------------------------------------------------------------
# prepare

quoted = json.encoder.encode_basestring_ascii                                   # a JSON string; twice as fast as json.dumps of the row
LINE_BREAK, NEW_PARAGRAPH = re.compile(r"\n\s*"), re.compile(r"\n\s")             # most abstracts have one paragraph: no search and replace


def clean(abstract):
    """One line: every newline, with the white space after it, becomes one blank."""
    abstract = abstract.strip()
    return LINE_BREAK.sub(" ", abstract) if NEW_PARAGRAPH.search(abstract) else abstract.replace("\n", " ")


def withdrawn(record):
    """The authors' test: "withdrawn" in the comments in any case, or in the abstract in one of two."""
    return ("ithdrawn" in record["abstract"] and ("withdrawn" in record["abstract"] or "Withdrawn" in record["abstract"])
            or "withdrawn" in str(record.get("comments")).lower())


@functools.cache
def group_of(primary):
    """The group that a primary category belongs to, or None."""
    if primary in ("hep-th", "hep-ph", "gr-qc"):
        return primary
    return next((archive for archive in ("q-bio", "cs") if primary.startswith(archive + ".")), None)


def read_blocks(path, size=1 << 17):
    """Yields the bytes of a plain or .gz file in blocks of whole lines, about 128 KB each; shows progress and ETA.

    ValueError if the file is a zip archive, is cut off, or has no line break for 16 MB (a record has a few thousand bytes)."""
    with open(path, "rb") as raw:
        magic, rest = raw.read(4), b""
        raw.seek(0)
        if magic == b"PK\x03\x04":
            raise ValueError(f"{path} is a zip archive: unzip it and give the .json inside it")
        f = gzip.GzipFile(fileobj=raw) if magic[:2] == b"\x1f\x8b" else raw
        with tqdm(total=os.path.getsize(path), unit="B", unit_scale=True, desc=f"reading {Path(path).name}") as bar:
            try:
                while data := f.read(size):
                    bar.update(raw.tell() - bar.n)
                    cut = data.rfind(b"\n") + 1
                    if cut:
                        yield rest + data[:cut]
                        rest = b""
                    rest += data[cut:]
                    if len(rest) > 1 << 24:
                        raise ValueError(f"{path} has no line break within 16 MB: it does not hold one JSON record a line")
            except (EOFError, zlib.error, gzip.BadGzipFile) as e:
                raise ValueError(f"{path} is cut off or damaged ({e}): download it again") from None
        if rest:
            yield rest + b"\n"


def read_records(path, categories, broken):
    """Yields (group, primary category, record) for the records of a snapshot whose primary category is wanted and for the control papers, their
    abstracts cleaned; appends the line numbers of broken lines to `broken`. categories None: any JSONL with `id` and
    `abstract`, group "own".

    Most lines of a snapshot are not wanted, and their bytes show it without parsing: the primary category follows the first
    "categories":" of the line. Inside a JSON string every quote has a backslash before it, so these bytes cannot be part of a
    title or an abstract; only a nested object with a key of that name could mislead, and the snapshot has none. A line
    that is not in the snapshot's compact form is parsed.
    Noticed as broken: any line that does not end in }, and, of the lines that are parsed (all wanted ones are), those that
    are no JSON object with the strings id, categories and abstract. A rejected line is not looked at further.
    ValueError if none of the first 100 lines is a record."""
    key, rejected, control = b'"categories":"' if categories else b"\n", {}, tuple(f'{{"id":"{paper}"'.encode() for paper in CONTROL)
    parse, number, recognised, brace, skip = json.JSONDecoder().raw_decode, 0, False, ord("}"), len(key)
    for block in read_blocks(path):                                             # calls saved in this loop are a third of its time
        find, begins, end, last = block.find, block.startswith, -1, len(block) - 1
        while end < last:
            start, number = end + 1, number + 1
            end = find(b"\n", start)
            at = find(key, start, end)
            if at > 0:
                value = block[at + skip:find(b'"', at + skip)]
                if value not in rejected:                                       # categories not met before; most have been, soon
                    plain = re.fullmatch(rb"[A-Za-z][A-Za-z. -]*", value)
                    rejected[value] = bool(plain) and group_of(value.decode().split()[0]) not in categories
                if rejected[value] and block[end - 1] == brace and begins(b'{"id":"', start) and not begins(control, start):
                    recognised = True
                    continue
            try:
                line = block[start:end].strip(b" \t\r").decode()
                record, length = parse(line)
                if length < len(line):
                    raise ValueError("more than one JSON value")
                category = record["categories"].split(None, 1)[0] if categories else "own"
                group = group_of(category) if categories else "own"
                record["id"] = str(record["id"]) if group == "own" else record["id"].strip()       # strip: must be a string
                record["abstract"] = abstract = clean(record["abstract"])
                abstract.isascii() or abstract.encode()                         # half a surrogate pair is no text
            except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
                if block[start:end].strip():
                    broken.append(number)
                if not recognised and len(broken) == 100:
                    break
                continue
            recognised = True
            if group != "own" and record["id"] in CONTROL:
                yield "control", category, record
            elif group == "own" or group in categories:
                yield group, category, record
        if not recognised and len(broken) == 100:
            break
    if not recognised:
        fields = "id and abstract" if categories is None else "id, categories and abstract, as arXiv's metadata snapshot does"
        raise ValueError(f"{path} does not hold one JSON record a line with {fields}: none of its first lines is one")


def carried_over(out, own):
    """Yields (group code, line, characters) of what is in `out` already and this run does not replace: the set `own` stays when
    a snapshot is prepared, and the snapshot's abstracts stay when own records are."""
    abstracts, group, start, characters = read_index(out)
    with open(abstracts, "rb") as f:
        for row in np.flatnonzero((group != GROUPS.index("own")) == own):
            f.seek(start[row])
            yield int(group[row]), f.read(start[row + 1] - start[row]), int(characters[row])


def count_sets(group, characters, counts):
    """The manifest's entries on `counts` ({category: {"records", "withdrawn"}}), the sets and their sizes."""
    if set(JOINT) <= set(counts):
        counts = {**counts, "joint": {key: sum(counts[c][key] for c in JOINT) for key in ("records", "withdrawn")}}
    entry = {"categories": {}, "sets": {}, "characters": {}, "unavailable": {}, "short": []}
    for name, count in counts.items():
        sizes = {split: len(rows) for split, rows in split_rows(len(pool(group, name))).items()}
        entry["categories"][name] = {"records": count["records"], "withdrawn": count["withdrawn"],
                                     "kept": count["records"] - count["withdrawn"], **sizes}
    entry["control"] = int(np.sum(group == GROUPS.index("control")))
    for name in (*counts, *SETS):
        try:
            rows = {split: select(group, name, split) for split in SPLITS}
        except ValueError as e:
            if name in SETS:
                entry["unavailable"][name] = str(e).removeprefix(f"{name} is unavailable: ")
            continue
        if name in SETS + ("own",):
            entry["sets"][name] = {split: len(rows[split][0]) for split in SPLITS}
        entry["characters"][name] = {split: int(characters[rows[split][0]].sum()) for split in SPLITS}
        entry["short"] += [sentence for split in SPLITS for sentence in rows[split][1]]
    return entry


def prepare(source, out="data/arxiv", categories=CATEGORIES, own=False):
    """Snapshot (or, with own, any JSONL with id and abstract) -> prepared directory `out`; returns its manifest.

    Streams: memory is a few bytes a kept record. Files are written under new names, and the manifest, replaced last, names
    them: killed at any instant, prepare leaves the old state. What `out` holds of the other kind (own or snapshot) stays.
    ValueError if the source is no snapshot or holds nothing wanted; OSError if a file cannot be read or written."""
    source, out = Path(source), Path(out)
    size = source.stat().st_size
    try:                                                                        # what stays of the state before
        sources, others = ({name: value for name, value in available(out)[key].items() if (name == "own") != own}
                           for key in ("sources", "categories"))
        stays = carried_over(out, own) if others and read_index(out) else []
    except (ValueError, KeyError):                                              # nothing there yet, or damaged
        sources, others, stays = {}, {}, []
    counts = {name: {"records": 0, "withdrawn": 0} for name in (["own"] if own else categories)}
    group, characters, start = bytearray(), array("i"), array("q", [0])
    broken, synthetic = [], set()

    def new_rows():
        for name, category, record in read_records(source, None if own else categories, broken):
            if name != "control":
                counts[name]["records"] += 1
                if not own and withdrawn(record):
                    counts[name]["withdrawn"] += 1
                    continue
            synthetic.add(record.get("submitter") == SYNTHETIC)
            line = f'{{"id":{quoted(record["id"])},"category":{quoted(category)},"abstract":{quoted(record["abstract"])}}}\n'
            yield GROUPS.index(name), line.encode(), len(record["abstract"])

    out.mkdir(parents=True, exist_ok=True)
    new, checksum = out / f"abstracts-{os.getpid()}", hashlib.sha256()
    with writing(new) as temporary, open(temporary, "wb") as f:
        for code, line, n in itertools.chain(new_rows(), stays):
            f.write(line)
            checksum.update(line)
            group.append(code)
            characters.append(n)
            start.append(start[-1] + len(line))
        if not any(c["records"] > c["withdrawn"] for c in counts.values()):
            raise ValueError(f"{source} holds no abstract of {', '.join(counts)}")
    arrays = {"group": np.frombuffer(group, np.uint8), "start": np.frombuffer(start, np.int64),
              "characters": np.frombuffer(characters, np.int32)}
    index, stem = io.BytesIO(), checksum.hexdigest()[:8]
    np.savez(index, **arrays)
    with writing(out / f"index-{stem}.npz") as temporary, open(temporary, "wb") as f:
        f.write(index.getvalue())
    os.replace(new, out / f"abstracts-{stem}.jsonl")

    entry = {"file": source.name, "bytes": size, "kind": "own records" if own else "snapshot", "synthetic": True in synthetic,
             "broken_lines": {"count": len(broken), "first": broken[:10]}}
    about = Path(f"{source}.harvest.json")                                      # beside what harvest wrote
    if about.exists() and not own:
        about = json.loads(about.read_text())
        entry |= about if about.get("bytes") == size else {}
    manifest = {"sources": {**sources, "own" if own else "snapshot": entry},
                **count_sets(arrays["group"], arrays["characters"], {**others, **counts}),
                "checksums": {f"abstracts-{stem}.jsonl": checksum.hexdigest(),
                              f"index-{stem}.npz": hashlib.sha256(index.getvalue()).hexdigest()}}
    with writing(out / "manifest.json") as temporary, open(temporary, "wb") as f:
        f.write(json.dumps(manifest, indent=1).encode())
    for path in [*out.glob("abstracts-*"), *out.glob("index-*")]:               # of the state before, or of killed runs
        if path.name not in manifest["checksums"]:
            path.unlink(missing_ok=True)
    return manifest


def print_table(manifest):
    """The counts on screen, and everything that a user should not overlook."""
    columns = ("records", "withdrawn", "kept", *SPLITS)
    print(f"{'category':10}" + "".join(f"{c:>12}" for c in columns))
    for name, count in manifest["categories"].items():
        print(f"{name:10}" + "".join(f"{count[c]:12,}" for c in columns))
    print(f"\n{'set':46}" + "".join(f"{c:>12}" for c in SPLITS))
    for name, count in manifest["sets"].items():
        print(f"{name:46}" + "".join(f"{count[c]:12,}" for c in SPLITS))
    for name, reason in manifest["unavailable"].items():
        print(f"{name:10}unavailable: {reason}")
    print(f"\ncontrol papers, kept apart: {manifest['control']} of {len(CONTROL)}")
    if 0 < manifest["categories"].get("cs", {"kept": 0})["kept"] < CS_SAMPLE:
        print(f"cs: fewer than the {CS_SAMPLE:,} abstracts that are sampled of it; all are used")
    for sentence in manifest["short"]:
        print(f"{sentence}; all of them are taken")
    for source in manifest["sources"].values():
        lines = source["broken_lines"]
        if lines["count"]:
            more = ", .." if lines["count"] > len(lines["first"]) else ""
            print(f"{source['file']}: {lines['count']:,} broken lines skipped (line {', '.join(map(str, lines['first']))}{more})")
        if source["kind"] == "harvest":
            print(f"{source['file']} is a harvest of {source['date']}, not version 193 of the snapshot: its counts are its own")
        if source["synthetic"]:
            print(f"{source['file']} is SYNTHETIC: made-up records, for demo and tests only")


# ---------------------------------------------------------------------------------------------------------------------
# synthesize: a made-up snapshot

SYNTHETIC = "Synthetic Record"                                                  # the submitter of every made-up record
VOCABULARY = {  # theories; objects; methods; formulae. An abstract keeps to one object and its method
    "hep-th": ("string theory|supergravity|holography|gauge theory|conformal field theory|M-theory",
               "D-branes|Wilson loops|instantons|moduli spaces|black hole microstates|conformal blocks",
               "T-duality|the AdS/CFT correspondence|localization|mirror symmetry|the elliptic genus|the conformal bootstrap",
               r"$AdS_5 \times S^5$|$\mathcal{N}=4$|$SU(N)$|$\alpha'$|$T\bar{T}$|$c = 24$"),
    "hep-ph": ("the Standard Model|QCD|the MSSM|chiral perturbation theory|a two-Higgs-doublet model|the seesaw mechanism",
               "Higgs decays|parton distributions|squark masses|pion form factors|charged scalars|neutrino masses",
               "next-to-leading order corrections|a global fit|LHC data|lattice input|flavour constraints|renormalization group running",
               r"$b \to s \gamma$|$\alpha_s(M_Z)$|$\tan\beta$|$\pi\pi$|$m_H = 125$ GeV|$0\nu\beta\beta$"),
    "gr-qc": ("general relativity|loop quantum gravity|$f(R)$ gravity|Brans-Dicke theory|numerical relativity|quantum cosmology",
              "binary mergers|spin networks|wormholes|cosmological perturbations|apparent horizons|bouncing universes",
              "matched filtering|coherent states|energy conditions|the Hamiltonian formalism|moving punctures|minisuperspace",
              r"$g_{\mu\nu}$|$\gamma = 0.2375$|$\Lambda$|$\omega_{BD}$|$l=m=2$|$a(t)$"),
    "q-bio": ("population genetics|neuroscience|epidemiology|systems biology|molecular evolution|ecology",
              "allele frequencies|spike trains|epidemic thresholds|gene regulatory networks|phylogenetic trees|food webs",
              "a Wright-Fisher model|maximum entropy inference|contact tracing data|stochastic simulation|Bayesian sampling|field data",
              r"$N_e$|$\sim 40$ Hz|$R_0 > 1$|$k_{cat}$|$dN/dS$|$\mu_{max}$"),
    "cs": ("deep learning|computer vision|distributed systems|natural language processing|program analysis|reinforcement learning",
           "transformers|object detectors|consensus protocols|word embeddings|type checkers|policy gradients",
           "stochastic gradient descent|data augmentation|message passing|pre-training|abstract interpretation|replay buffers",
           r"$O(n \log n)$|$97.3\%$|$f+1$|$\ell_2$|$\mathsf{NP}$|$\epsilon$-greedy"),
    "other": ("algebraic geometry|stellar astrophysics|superconductivity|probability theory|quantum information|turbulence",
              "vector bundles|red giants|vortex lattices|random walks|entangled photons|shear flows",
              "derived categories|asteroseismology|neutron scattering|coupling arguments|tomography|direct numerical simulation",
              r"$\mathbb{P}^n$|$T_{eff}$|$T_c$|$n \to \infty$|$|\psi\rangle$|$Re$"),
}
SENTENCES = (
    "We study {object} in {theory} by means of {method}.",
    "It is shown that {object} are governed by {formula} once {method} is taken into account.",
    "In particular, {method} leads to a new relation between {object} and {formula}.",
    "Our result for {formula} agrees with earlier work on {theory}.",
    "As an application we compute {formula} for {object} and compare it with what {method} predicts.",
    "This extends the known description of {object}, where only the leading term in {formula} had been kept.",
    "The consequences for {theory} are discussed.",
    "We comment on open problems in {theory}, among them the role of {object} at large {formula}.")
PRIMARIES = {"hep-th": ["hep-th"], "hep-ph": ["hep-ph"], "gr-qc": ["gr-qc"], "q-bio": ["q-bio.NC", "q-bio.PE", "q-bio.QM"],
             "cs": ["cs.LG", "cs.CV", "cs.CL", "cs.DC"], "other": ["math.AG", "astro-ph.SR", "cond-mat.supr-con", "quant-ph"]}
SHARES = {"hep-th": 22, "hep-ph": 20, "gr-qc": 12, "q-bio": 6, "cs": 32, "other": 8}      # per cent; enough of each for all ten sets
SURNAMES = "Alder Birch Cedar Elm Fir Hazel Larch Maple Oak Pine Rowan Spruce Willow M\\\"uhlenbeck d'Ormeau".split()


def made_up_record(draw, paper, group, created):
    """One record in the snapshot's schema and key order; `draw`: random.Random."""
    theories, objects, methods, formulae = (words.split("|") for words in VOCABULARY[group])
    i = draw.randrange(6)                                                       # the topic, kept through the abstract
    words = {"theory": theories[i], "object": objects[i], "method": methods[i], "formula": formulae[i]}
    sentences = [draw.choice(SENTENCES).format(**words | {"theory": draw.choice(theories), "formula": draw.choice(formulae)})
                 for _ in range(draw.randint(3, 9))]
    abstract = " ".join([SENTENCES[0].format(**words), *sentences])
    comments = f"{draw.randint(4, 60)} pages, {draw.randint(0, 20)} figures. Made up"
    if draw.random() < 0.02:
        comments = draw.choice(["This paper has been withdrawn", "WITHDRAWN by the author", "Withdrawn: error in Section 3"])
    elif draw.random() < 0.01:
        abstract = draw.choice(["This paper has been withdrawn by the author.", "Withdrawn."])
    wrap = functools.partial(textwrap.fill, width=79, break_long_words=False, break_on_hyphens=False)
    authors = [(draw.choice(SURNAMES), draw.choice("ABCDEGHJKLMNPRSTVW") + ".") for _ in range(draw.randint(1, 8))]
    cross = draw.sample([c for g, cs in PRIMARIES.items() if g != group for c in cs], draw.choice([0, 0, 1, 2]))
    dates = [created + timedelta(days=100 * v, seconds=draw.randrange(86400)) for v in range(draw.choice([1, 1, 2, 3]))]
    published = draw.random() < 0.5
    return {"id": paper, "submitter": SYNTHETIC, "authors": ", ".join(f"{first} {last}" for last, first in authors),
            "title": wrap(f"{objects[i][0].upper()}{objects[i][1:]} in {draw.choice(theories)} and {methods[i]}", subsequent_indent="  "),
            "comments": comments,
            "journal-ref": f"Made-up J. {draw.randint(1, 99)} ({created.year}) {draw.randint(1, 9999)}" if published else None,
            "doi": f"10.0000/made.up.{draw.randint(1, 10**7)}" if published else None, "report-no": None,
            "categories": " ".join([draw.choice(PRIMARIES[group]), *cross]),
            "license": draw.choice([None, "http://arxiv.org/licenses/nonexclusive-distrib/1.0/",
                                    "http://creativecommons.org/licenses/by/4.0/"]),
            "abstract": wrap(abstract, initial_indent="  ") + "\n",
            "versions": [{"version": f"v{v}", "created": f"{d:%a}, {d.day} {d:%b %Y %H:%M:%S} GMT"} for v, d in enumerate(dates, 1)],
            "update_date": f"{dates[-1]:%Y-%m-%d}", "authors_parsed": [[last, first, ""] for last, first in authors]}


def synthesize(path, records=5000, seed=0):
    """Writes a made-up snapshot of `records` records and says so: the snapshot's schema, order and form, all category
    groups with a vocabulary of their own, withdrawn papers, cross-lists and the control papers. The same seed, the same bytes.
    ValueError for fewer than 100 records."""
    if records < 100:
        raise ValueError(f"--records {records}: a made-up snapshot has at least 100 records")
    draw, papers = random.Random(seed), {paper: ("hep-th", paper[:4]) for paper in CONTROL}
    while len(papers) < records:
        group, = draw.choices(list(SHARES), SHARES.values())
        year, month = draw.randint(1994, 2023), draw.randint(1, 12)
        yymm = f"{year % 100:02}{month:02}"
        archive = PRIMARIES[group][0].split(".")[0]
        paper = (f"{archive}/{yymm}{draw.randrange(1, 1000):03}" if (year, month) < (2007, 4) else
                 f"{yymm}.{draw.randrange(1, 10_000):04}" if year < 2015 else f"{yymm}.{draw.randrange(1, 25_000):05}")
        papers.setdefault(paper, (group, yymm))
    with writing(path) as temporary, open(temporary, "wb") as f:
        for paper in tqdm(sorted(papers), desc="synthesize", unit=" records"):  # plain string order, as in the snapshot
            group, yymm = papers[paper]
            created = datetime((1900 if yymm > "90" else 2000) + int(yymm[:2]), int(yymm[2:]), draw.randint(1, 28))
            f.write(json.dumps(made_up_record(draw, paper, group, created), separators=(",", ":")).encode() + b"\n")
    print(f"{path}: {records:,} SYNTHETIC records, made up: for demo and tests, no physics in them", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("prepare", help="snapshot -> training sets")
    p.add_argument("source", metavar="SNAPSHOT", help="arxiv-metadata-oai-snapshot.json, plain or .gz, or what harvest wrote")
    p.add_argument("--out", default="data/arxiv", help="prepared directory (default %(default)s)")
    p.add_argument("--categories", nargs="+", choices=CATEGORIES, default=CATEGORIES, metavar="C",
                   help=f"of {' '.join(CATEGORIES)} (default: all; s1..s9 need the first three only)")
    p.add_argument("--own", action="store_true", help="SNAPSHOT is any JSONL with id and abstract: one pool, the set `own`")
    p = commands.add_parser("ids", help="print the arXiv ids of a split, in order, one a line")
    p.add_argument("directory", metavar="DIR", help="prepared directory")
    p.add_argument("--subset", required=True, help="s1..s10, own, control, a category, joint, or a recipe such as hep-th:0.7+gr-qc:0.15")
    p.add_argument("--split", required=True, choices=SPLITS)
    p = commands.add_parser("synthesize", help="write a made-up snapshot")
    p.add_argument("out", metavar="OUT", help="file to write")
    p.add_argument("--records", type=int, default=5000, help="(default %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    args = parser.parse_args(argv)
    try:
        if args.command == "prepare":
            print_table(prepare(args.source, args.out, tuple(args.categories), args.own))
        elif args.command == "ids":
            print("\n".join(load(args.directory, args.subset, args.split)[0]))
        else:
            synthesize(args.out, args.records, args.seed)
    except BrokenPipeError:                                                     # ids .. | head: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except KeyboardInterrupt:
        parser.exit(130, "\nstopped; what was there before is untouched, and a harvest goes on with the same command\n")
    except (ValueError, OSError) as e:
        parser.exit(2, f"error: {e}\n")


if __name__ == "__main__":
    main()
