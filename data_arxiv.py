"""arXiv abstracts as training text: metadata snapshot -> training sets s1..s10 -> token batches.

The data of FeynTune (arXiv:2508.03716). Of the arXiv metadata snapshot (Kaggle's data set
Cornell-University/arxiv, one JSON record a line) the records whose PRIMARY category is hep-th,
hep-ph, gr-qc, q-bio.* or cs.* are kept, in the order of the file: five control papers set aside,
withdrawn papers dropped, line breaks removed. Each pool of abstracts (one a category, and `joint` =
hep-ph and gr-qc together) is split 70/15/15, and the ten training sets are mixtures of pools, made
split by split. Splits and mixtures are pure functions of the order of the records: two people with
the same snapshot have the same splits, id for id, and they are the authors' own.

    python data_arxiv.py prepare arxiv-metadata-oai-snapshot.json   # or .gz; makes data/arxiv
    python data_arxiv.py prepare mine.jsonl --own                   # id, abstract; makes data/own
    python data_arxiv.py ids data/arxiv --subset s3 --split test    # arXiv ids of a split, in order
    python data_arxiv.py synthesize made_up.jsonl                   # made up, for demo and tests

A prepared directory holds
    abstracts-CHECKSUM.jsonl  {"id", "category", "abstract"}, one a line, in the snapshot's order
    index-CHECKSUM.npy        (N,), see ROW: what is known of each of these lines
    manifest.json             source, categories and sets (counts), characters, unavailable, short,
                              control, and the checksum: of the index, in hexadecimal; replaced
                              last, in one step: until then what was there before is valid
The manifest vouches for itself and the index, the index for every line that is read: damage is
found at the price of what is used. Own texts have a directory of their own, and one set, `own`.
"""
import argparse
import codecs
import contextlib
import functools
import gzip
import hashlib
import json
import math
import mmap
import os
import platform
import random
import re
import struct
import sys
import textwrap
import zlib
from datetime import datetime
from pathlib import Path

import numpy as np
from tqdm import tqdm

CATEGORIES = ("hep-th", "hep-ph", "gr-qc", "q-bio", "cs")     # q-bio and cs: every q-bio.*, cs.*
JOINT = ("hep-ph", "gr-qc")
CODES = (*CATEGORIES, "control", "own")
SPLITS = ("train", "validation", "test")
SETS = tuple(f"s{i}" for i in range(1, 11))
PHYSICS = ("hep-th", "hep-ph", "gr-qc")
NEEDS = {                                                     # any other name needs itself
    "s1": ("hep-th",),
    "s2": JOINT,
    **dict.fromkeys(("s3", "s4", "s5", "s6", "s9"), PHYSICS),
    "s7": ("hep-th", "gr-qc"),
    "s8": ("hep-th", "hep-ph"),
    "s10": CATEGORIES,
    "joint": JOINT,
}
CONTROL = (                                                   # the authors' own papers: read by
    "1804.08625", "1404.0016", "1205.2086",                   # them at every evaluation, never
    "1209.5915", "1802.05268",                                # trained on
)
CS_SAMPLE = 200_000
ROW = np.dtype([                                              # one prepared abstract:
    ("category", "u1"),                                       # position in CODES
    ("size", "<i4"),                                          # bytes of its line
    ("crc32", "<u4"),                                         # of its line
    ("characters", "<i4"),                                    # of the abstract
    ("number", "<i4"),                                        # of the line that it comes from
    ("id", "<u8"),                                            # see row_hashes
])
ROW_FORMAT = struct.Struct("<BiIiiQ")                         # the same, to pack


# ---------------------------------------------------------------------------------------------
# Files and command lines: the one way to read, to write, to lock and to fail, for all that is data.
# model.py has `reading` and `writing` once more, for all that is a model: it imports no data.

UMASK = os.umask(0)
os.umask(UMASK)


@contextlib.contextmanager
def reading(path, advice="get or make it again"):
    """Whatever goes wrong inside, as `path` is read, becomes a ValueError: file, reason, advice."""
    try:
        yield Path(path)
    except BaseException as e:                                # a panic of Rust's is no Exception
        said = isinstance(e, ValueError) and str(e).startswith(str(path))
        if said or isinstance(e, (KeyboardInterrupt, SystemExit, GeneratorExit)):
            raise
        reason = getattr(e, "strerror", None) or str(e).partition("\n")[0] or type(e).__name__
        if isinstance(e, FileNotFoundError):
            reason = "is not there"
        elif isinstance(e, KeyError):
            reason = f"lacks {e}"
        raise ValueError(f"{path}: {reason}; {advice}") from e


@contextlib.contextmanager
def writing(path):
    """A temporary path to write to, which takes the place of `path` once it is whole and on disk.

    A reader, or a kill, meets the old file or the new one; no two processes, of one machine or of
    several, share a temporary one. What is no regular file, such as /dev/null, is written to
    directly. Raises OSError, with the file's name, for a full disk."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}.tmp")
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
        with contextlib.suppress(OSError):
            temporary.unlink()


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
    except BrokenPipeError:                                   # .. | head: it has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return
    except KeyboardInterrupt:
        code = 130
        message = "stopped; what was written before is whole, the same command starts again"
    except (ValueError, OSError) as e:
        # of an OSError: no "[Errno 20]"; of two files, as of a renaming, the second
        place = getattr(e, "filename2", None) or getattr(e, "filename", None)
        message = f"error: {place}: {e.strerror}" if place else f"error: {e}"
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


# ---------------------------------------------------------------------------------------------
# Pools, splits and sets: arithmetic on row numbers.
# `category` is (N,) uint8 everywhere: the category of each prepared abstract, position in CODES.

def split_rows(n):
    """The authors' 70/15/15 split of n rows: {split: (n_split,) row numbers, in order}.

    It is what `datasets` does in train_test_split(train_size=0.7, seed=42) and then
    train_test_split(test_size=0.5, seed=42) of the part held out: permute, the held-out rows
    first; permute those with a fresh generator of the same seed, test rows first."""
    permutation = np.random.default_rng(42).permutation(n)
    n_held_out = n - math.floor(0.7 * n)
    held_out = permutation[:n_held_out]
    again = np.random.default_rng(42).permutation(n_held_out)
    n_test = math.ceil(0.5 * n_held_out)
    return {
        "train": permutation[n_held_out:],
        "validation": held_out[again[n_test:]],
        "test": held_out[again[:n_test]],
    }


def shuffle42(rows):
    """The rows as `datasets` puts them in shuffle(seed=42)."""
    return rows[np.random.default_rng(42).permutation(len(rows))]


def mix(*parts):
    """The parts one after the other, then shuffled."""
    return shuffle42(np.concatenate(parts))


def pool(category, name):
    """Row numbers of a pool before it is split: a category's, "joint"'s, "control"'s or "own"'s.

    They are in the order of the snapshot, but for cs: a sample of 200,000 in the order that pandas'
    sample(random_state=42) draws, or all of them where there are fewer."""
    members = JOINT if name == "joint" else (name,)
    rows = np.flatnonzero(np.isin(category, [CODES.index(c) for c in members]))
    if name == "cs" and len(rows) >= CS_SAMPLE:
        rows = rows[np.random.RandomState(42).choice(len(rows), CS_SAMPLE, replace=False)]
    return rows


def pool_split(category, name, split):
    """Row numbers of one split of a pool, in order."""
    rows = pool(category, name)
    return rows[split_rows(len(rows))[split]]


def first(count, rows, what, short):
    """The first `count` rows, or all there are and a sentence about it in the list `short`."""
    if count > len(rows):
        short.append(f"the recipe takes {count:,} {what} rows, there are {len(rows):,}")
    return rows[:max(count, 0)]


def training_set(category, name, split, short):
    """Row numbers of one split of s1..s10, in order: the table in the paper's appendix."""

    def part(which):                                          # a pool's rows in this split
        return pool_split(category, which, split)

    def joint(which, count):                                  # the first of a category in joint's
        rows = part("joint")
        rows = rows[category[rows] == CODES.index(which)]
        return first(count, rows, f"{which} of joint", short)

    th = part("hep-th")
    n = len(th)
    c = int(0.15 * n)
    if name == "s1":
        return th
    if name == "s2":
        return part("joint")
    if name == "s3":
        return mix(th, part("joint"))
    if name == "s4":                                          # s4, s5, s6: 15% of hep-th replaced,
        return mix(th[:n - 2 * c], joint("gr-qc", c), joint("hep-ph", c))         # once or twice
    if name == "s5":
        return mix(th[:n - c], joint("gr-qc", c))
    if name == "s6":
        return mix(th[:n - c], joint("hep-ph", c))
    if name == "s7":
        return mix(th, part("gr-qc"))
    if name == "s8":
        return mix(th, part("hep-ph"))
    gr = part("gr-qc")
    ph = part("hep-ph")
    if name == "s9":                                          # as many as hep-th, none of it
        share = len(pool(category, "hep-th")) / len(pool(category, "joint"))
        gr = first(int(share * len(gr)), shuffle42(gr), "gr-qc", short)
        return mix(gr, first(n - len(gr), shuffle42(ph), "hep-ph", short))
    bio = part("q-bio")                                       # s10: as many as s3, from afar
    count = len(gr) + len(ph) - len(bio)
    return mix(th, bio, first(count, shuffle42(part("cs")), "cs", short))


def free_recipe(category, recipe, split, short):
    """Row numbers of one split of "POOL:F+POOL:F+..", shuffled.

    Each term takes the first int(F n) rows of its pool in this split, where n counts the hep-th
    rows there; without F all of them."""
    parts = []
    for term in recipe.split("+"):
        match = re.fullmatch(r"([a-z-]+)(?::(\d{1,6}\.?\d*|\.\d+))?", term.strip())
        if not match or match[1] not in (*CATEGORIES, "joint", "own"):
            raise ValueError(
                f"{recipe!r} is no training set: give one of s1..s10, own, control, "
                f"{', '.join(CATEGORIES)}, joint, or a recipe such as hep-th:0.7+gr-qc:0.15")
        which, share = match.groups()
        require(category, recipe, NEEDS.get(which, (which,)))
        rows = pool_split(category, which, split)
        if share:
            require(category, recipe, ("hep-th",))
            n = len(pool_split(category, "hep-th", split))
            rows = first(int(float(share) * n), rows, which, short)
        parts.append(rows)
    return mix(*parts)


def require(category, name, wanted):
    """Raises ValueError if there are no records of a wanted category."""
    lacking = [c for c in wanted if CODES.index(c) not in category]
    if lacking:
        raise ValueError(f"{name} is unavailable: no {', '.join(lacking)} records in the prepared "
                         "data")


def select(category, name, split):
    """Row numbers of one split of a set, in order, and what it lacks -> (rows, short).

    name: s1..s10, own, a category or joint (as they are split), "control" (all of it, whatever the
    split), or a free recipe. short: a sentence for each part of the recipe that asks for more rows
    than there are; all there are are taken. Raises ValueError if a category is lacking, or the name
    means nothing."""
    if split not in SPLITS:
        raise ValueError(f"{split!r} is no split: give train, validation or test")
    known = name in (*SETS, *CODES, "joint")
    if known:
        require(category, name, NEEDS.get(name, (name,)))
    short = []
    if not known:
        rows = free_recipe(category, name, split, short)
    elif name in SETS:
        rows = training_set(category, name, split, short)
    elif name == "control":
        rows = pool(category, name)
    else:
        rows = pool_split(category, name, split)
    return rows, [f"{name} {split}: {sentence}" for sentence in short]


# ---------------------------------------------------------------------------------------------
# Prepared data -> texts -> token batches

def checksum(data):
    """The CRC-32 of bytes or an array: 8 hexadecimal digits."""
    return f"{zlib.crc32(data):08x}"


def seal(manifest):
    """The checksum of a manifest's content."""
    return checksum(json.dumps(manifest, sort_keys=True).encode())


def available(directory):
    """The manifest of a prepared directory, a dict (its keys stand at the top of this file).

    Raises ValueError if nothing is prepared there, with the way to it, or if it is damaged."""
    path = Path(directory) / "manifest.json"
    if not path.exists():
        raise ValueError(
            f"no prepared abstracts in {directory} (no manifest.json): `curl -L -o arxiv.zip "
            "https://www.kaggle.com/api/v1/datasets/download/Cornell-University/arxiv` (4.5 GB "
            "unpacked, no account; version 193 has the paper's splits), unzip it, `python "
            f"data_arxiv.py prepare arxiv-metadata-oai-snapshot.json --out {directory}`")
    with reading(path, "run prepare again"):
        manifest = json.loads(path.read_text())
        if not isinstance(manifest, dict) or manifest.pop("seal", None) != seal(manifest):
            raise ValueError("it was edited or is damaged, or another version wrote it")
    return manifest


def read_index(directory):
    """The index of a prepared directory -> (path of the abstracts, (N,) array of ROW)."""
    name = available(directory)["checksum"]
    abstracts = Path(directory) / f"abstracts-{name}.jsonl"
    path = Path(directory) / f"index-{name}.npy"
    with reading(path, "run prepare again"):
        index = np.load(path, mmap_mode="r", allow_pickle=False)
        if index.dtype != ROW or checksum(index) != name:
            raise ValueError("it was edited or is damaged")
    with reading(abstracts, "run prepare again"):
        size = abstracts.stat().st_size
        expected = index["size"].sum(dtype=np.int64)
        if size != expected:
            raise ValueError(f"it was edited or is damaged: {size:,} bytes, not {expected:,}")
    return abstracts, index


def load(directory, name, split):
    """The ids and texts of one split of a set, two lists of str in the set's order.

    directory: written by prepare. name: s1..s10, own, control, a category, joint, or a free recipe
    (see select). split: train, validation or test. Raises ValueError, in one sentence, if the set
    cannot be had, nothing is prepared, or a line of it is damaged."""
    abstracts, index = read_index(directory)
    rows, short = select(index["category"], name, split)
    for sentence in short:
        print(f"note: {sentence}; all of them are taken", file=sys.stderr)
    ids = [None] * len(rows)
    texts = [None] * len(rows)
    ends = np.cumsum(index["size"], dtype=np.int64)
    with reading(abstracts, "run prepare again"), open(abstracts, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        for k in np.argsort(rows):                            # in the order of the file: the disk
            row = rows[k]                                     # likes that
            line = data[ends[row] - index["size"][row]:ends[row]]
            if zlib.crc32(line) != index["crc32"][row]:
                raise ValueError(f"line {row + 1} was edited or is damaged")
            record = json.loads(line)
            ids[k] = record["id"]
            texts[k] = record["abstract"]
    return ids, texts


def row_hash(text):
    """Eight bytes of a text's blake2b, as an int."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def row_hashes(texts):
    """Hashes of texts, by which a run knows what it has seen: (N,) uint64."""
    return np.array([row_hash(text) for text in texts], np.uint64)


def encode(tokenizer, text, bos, eos):
    """Token ids of one training sequence, BOS + text + EOS (eos None: no EOS); never truncated.

    The text itself is encoded without special tokens: some tokenizers would add a BOS of their own.
    tokenizer: a tokenizers.Tokenizer."""
    end = [] if eos is None else [eos]
    with reading("tokenizer.json", "it cannot encode this text: get the model's own again"):
        return [bos] + tokenizer.encode(text, add_special_tokens=False).ids + end


@functools.lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    """The permutation of n rows that an epoch goes through."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def batch_rows(n, batch_size, seed, step):
    """Row indices of the batch of 0-based `step`, over all processes: (batch_size,) at most.

    It is a pure function of its arguments: every epoch has its own permutation of the n rows, and
    its last batch, perhaps smaller, is kept. So a run resumed at any step sees the batches that it
    would have seen, and nothing about the data needs saving."""
    epoch, i = divmod(step, math.ceil(n / batch_size))
    return epoch_order(n, seed, epoch)[i * batch_size:(i + 1) * batch_size].copy()


def collate(sequences):
    """Sequences end to end, without padding -> ids (total,), lengths (len(sequences),), int64."""
    import torch                                              # here: prepare starts without it
    ids = torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.int64)
    return ids, torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int64)


# ---------------------------------------------------------------------------------------------
# Reading JSONL: the one reader, for snapshots, own texts, completions and ratings

LONGEST_LINE = 1 << 24                                        # bytes; a record has a few thousand
LINE_BREAK = re.compile(r"[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*")       # str.splitlines' own


def clean(text):
    """The text in one line: a line break, with the white space after it, becomes one blank."""
    return LINE_BREAK.sub(" ", text.removeprefix("\ufeff").strip())


def read_lines(path):
    """Yields (number, bytes) of the lines of a file, plain or .gz, that are not blank; from 1.

    It takes a byte-order mark off, and shows its progress after a second. Raises ValueError, with
    the file's name, if it is an archive or in another encoding, is cut off, or has no lines."""
    encodings = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)   # 32_LE: as 16_LE
    with reading(path), open(path, "rb") as raw:
        magic = raw.peek(4)
        if magic.startswith(b"PK\x03\x04"):
            raise ValueError(f"{path} is a zip archive: unzip it and give the .json inside")
        if magic.startswith(encodings):
            raise ValueError(f"{path}, line 1: UTF-16 or UTF-32: convert it to UTF-8 (iconv)")
        file = gzip.GzipFile(fileobj=raw) if magic.startswith(b"\x1f\x8b") else raw
        size = os.path.getsize(path)
        name = Path(path).name
        lines = iter(functools.partial(file.readline, LONGEST_LINE), b"")
        with tqdm(total=size, unit="B", unit_scale=True, desc=f"reading {name}", delay=1) as bar:
            for number, line in enumerate(lines, 1):
                if len(line) == LONGEST_LINE:
                    raise ValueError(f"{path}, line {number}: no line break within 16 MB: this is "
                                     "no file of one JSON record a line")
                line = line.removeprefix(codecs.BOM_UTF8).strip()
                if line:
                    yield number, line
                if number % 4096 == 0:
                    bar.update(raw.tell() - bar.n)


def parse(line):
    """The JSON object in a line of bytes; ValueError or RecursionError if it is none."""
    if b"\0" in line:
        raise ValueError("it holds NUL bytes: it is damaged, or not in UTF-8")
    text = line.decode()
    try:
        record = json.loads(text)
    except json.JSONDecodeError as e:
        raise ValueError(f"it is no JSON: {e.msg} at character {e.pos + 1}") from None
    if not isinstance(record, dict):
        raise ValueError("it is no JSON object")
    if b"\\u" in line:                                        # half a surrogate pair is no text:
        json.dumps(record, ensure_ascii=False).encode()       # this raises
    return record


def read_jsonl(path):
    """Yields (line number, JSON object) of a file, plain or .gz, in UTF-8; blank lines are skipped.

    Raises ValueError, with the file's name and the line, for anything else."""
    for number, line in read_lines(path):
        with reading(f"{path}, line {number}", "it should be one JSON object a line, in UTF-8"):
            record = parse(line)
        yield number, record


def own_records(path):
    """Yields (line number, "own", record) of a JSONL with `id` and `abstract`.

    The id may be a number. Record gains `primary`, and its texts are cleaned."""
    for number, record in read_jsonl(path):
        with reading(f"{path}, line {number}", "give each line an id and an abstract"):
            name = record["id"]
            if isinstance(name, bool) or not isinstance(name, (str, int, float)):
                raise ValueError("its id is neither text nor number")
            if not isinstance(record["abstract"], str):
                raise ValueError("its abstract is no text")
        record["id"] = clean(str(name))
        record["abstract"] = clean(record["abstract"])
        record["primary"] = "own"
        yield number, "own", record


def read_texts(path):
    """The ids and one-line texts of a JSONL with `id` and `abstract`: two lists of str.

    Raises ValueError, with the lines, for what is no such record and for an id that comes twice."""
    ids = []
    texts = []
    numbers = []
    for number, _, record in own_records(path):
        ids.append(record["id"])
        texts.append(record["abstract"])
        numbers.append(number)
    refuse_repeated(path, row_hashes(ids), numbers)
    return ids, texts


def refuse_repeated(path, hashes, numbers):
    """Raises ValueError if two hashed ids (N,) are equal, with the numbers of their lines."""
    _, firsts, row_of = np.unique(hashes, return_index=True, return_inverse=True)
    before = firsts[row_of]                                   # where each id came first
    repeated = np.flatnonzero(before != np.arange(len(before)))
    if len(repeated):
        again = repeated[0]
        raise ValueError(f"{path}: an id comes twice (lines {numbers[before[again]]} and "
                         f"{numbers[again]}): give each text an id of its own")


# ---------------------------------------------------------------------------------------------
# prepare

PRIMARY = re.compile(rb'"categories":"([A-Za-z][A-Za-z.-]*)[ "]')
CONTROL_LINES = tuple(f'{{"id":"{paper}"'.encode() for paper in CONTROL)


@functools.cache
def category_of(primary):
    """The category that a primary category such as cs.LG (bytes or str) belongs to, or None."""
    primary = primary.decode() if isinstance(primary, bytes) else primary
    if primary in PHYSICS:
        return primary
    archive = primary.partition(".")[0]
    return archive if primary.startswith(("q-bio.", "cs.")) else None


def withdrawn(record):
    """The authors' test: "withdrawn" in the comments in any case, or in the abstract in two."""
    in_comments = "withdrawn" in str(record.get("comments")).lower()
    return in_comments or "withdrawn" in record["abstract"] or "Withdrawn" in record["abstract"]


def snapshot_records(path, categories, broken):
    """Yields (line number, category, record) of the wanted records and the control papers.

    Record gains `primary`, and its abstract is cleaned. Most lines are not wanted, and one look at
    their bytes shows it without parsing: inside a JSON string every quote has a backslash before
    it, so "categories":" cannot be part of a title or an abstract. Noticed as broken, their numbers
    appended to `broken`: lines that do not end in }, and, of those that are parsed, what has no
    strings id, categories and abstract. Raises ValueError if none of the first 100 is a record."""
    good = False
    for number, line in read_lines(path):
        found = PRIMARY.search(line)
        if (found and category_of(found[1]) not in categories
                and line.startswith(b'{"id":"') and line.endswith(b"}")
                and not line.startswith(CONTROL_LINES)):
            good = True
            continue
        try:
            record = parse(line)
            record["primary"] = record["categories"].replace(",", " ").split()[0]
            record["id"] = record["id"].strip()
            record["abstract"] = clean(record["abstract"])
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            broken.append(number)
            if len(broken) == 100 and not good:
                break
            continue
        good = True
        category = category_of(record["primary"])
        if record["id"] in CONTROL:
            yield number, "control", record
        elif category in categories:
            yield number, category, record
    if not good:
        raise ValueError(f"{path} does not hold one JSON record a line with id, categories and "
                         "abstract, as arXiv's metadata snapshot does")


def count_rows(index, counts):
    """The manifest's entries on `counts` ({category: {"records", "withdrawn"}}) and on the sets."""
    if set(JOINT) <= set(counts):
        both = {key: sum(counts[c][key] for c in JOINT) for key in ("records", "withdrawn")}
        counts = {**counts, "joint": both}
    entry = {"categories": {}, "sets": {}, "characters": {}, "unavailable": {}, "short": []}
    for name, count in counts.items():
        entry["categories"][name] = {**count, "kept": count["records"] - count["withdrawn"]}
    for name in (*counts, *SETS):
        try:
            chosen = {split: select(index["category"], name, split) for split in SPLITS}
        except ValueError as e:
            entry["unavailable"][name] = str(e).removeprefix(f"{name} is unavailable: ")
            continue
        entry["sets"][name] = {}
        entry["characters"][name] = {}
        for split, (rows, short) in chosen.items():
            entry["sets"][name][split] = len(rows)
            entry["characters"][name][split] = int(index["characters"][rows].sum())
            entry["short"] += short
    return entry


def write_abstracts(file, records, counts):
    """Writes the records that are kept and counts all -> (index: (N,) of ROW, any made up?)."""
    index = bytearray()
    synthetic = False
    for number, name, record in records:
        if name != "control":
            counts[name]["records"] += 1
            if name != "own" and withdrawn(record):
                counts[name]["withdrawn"] += 1
                continue
        synthetic = synthetic or record.get("submitter") == SYNTHETIC
        abstract = record["abstract"]
        row = {"id": record["id"], "category": record["primary"], "abstract": abstract}
        line = json.dumps(row).encode() + b"\n"
        file.write(line)
        index += ROW_FORMAT.pack(CODES.index(name), len(line), zlib.crc32(line), len(abstract),
                                 number, row_hash(record["id"]))
    return np.frombuffer(index, ROW), synthetic


def prepare(source, out=None, categories=CATEGORIES, own=False):
    """Snapshot (or, with own, any JSONL with id and abstract) -> prepared directory; its manifest.

    out: data/arxiv, or data/own. It streams: memory is a few bytes a kept record. Files are written
    under new names, and the manifest, replaced last, names them: killed at any instant, prepare
    leaves the old state. Raises ValueError if the source is no such file or holds nothing wanted,
    or `out` is in use or holds the other kind; OSError if a file cannot be written."""
    source = Path(source)
    out = Path(out or ("data/own" if own else "data/arxiv"))
    kind = "own" if own else "snapshot"
    out.mkdir(parents=True, exist_ok=True)
    held = lock(out, "preparing")
    try:
        there = kind
        with contextlib.suppress(ValueError):                 # nothing is there yet, or damaged
            there = available(out)["source"]["kind"]
        if there != kind:
            raise ValueError(f"{out} holds another kind of texts ({there}): choose another --out")
        return write_prepared(source, out, kind, categories)
    finally:
        os.close(held)


def write_prepared(source, out, kind, categories):
    """The work of prepare, in a directory that is locked; returns the manifest."""
    broken = []
    if kind == "own":
        categories = ("own",)
        records = own_records(source)
    else:
        records = snapshot_records(source, categories, broken)
    counts = {name: {"records": 0, "withdrawn": 0} for name in categories}
    new = out / "abstracts-new.jsonl"
    with writing(new) as temporary, open(temporary, "wb") as file:
        index, synthetic = write_abstracts(file, records, counts)
        if not any(count["records"] > count["withdrawn"] for count in counts.values()):
            raise ValueError(f"{source} holds no abstract of {', '.join(counts)}")
        refuse_repeated(source, index["id"], index["number"])

    name = checksum(index)
    with writing(out / f"index-{name}.npy") as temporary, open(temporary, "wb") as file:
        np.save(file, index)
    os.replace(new, out / f"abstracts-{name}.jsonl")
    manifest = {
        "source": {
            "file": source.name,
            "bytes": source.stat().st_size,
            "kind": kind,
            "synthetic": synthetic,
            "broken_lines": {"count": len(broken), "first": broken[:10]},
        },
        **count_rows(index, counts),
        "control": int(np.sum(index["category"] == CODES.index("control"))),
        "checksum": name,
    }
    with writing(out / "manifest.json") as temporary:
        temporary.write_text(json.dumps({**manifest, "seal": seal(manifest)}, indent=1))
    for path in out.iterdir():                                # of the state before, of killed runs
        ours = re.fullmatch(r"\.?(abstracts|index)-(new|[0-9a-f]{8})\.(jsonl|np[yz])(\..*\.tmp)?"
                            r"|\.manifest\.json\..*\.tmp", path.name)
        if ours and path.name not in (f"abstracts-{name}.jsonl", f"index-{name}.npy"):
            path.unlink()
    return manifest


def print_table(manifest):
    """Prints the counts, and everything that a user should not overlook."""
    def table(title, columns, rows):
        print(f"{title:10}" + "".join(f"{c:>12}" for c in columns))
        for name, count in rows.items():
            print(f"{name:10}" + "".join(f"{count[c]:12,}" for c in columns))

    table("category", ("records", "withdrawn", "kept"), manifest["categories"])
    print()
    table("set", SPLITS, manifest["sets"])
    for name, reason in manifest["unavailable"].items():
        print(f"{name:10}unavailable: {reason}")
    print(f"\ncontrol papers, kept apart: {manifest['control']} of {len(CONTROL)}")
    if 0 < manifest["categories"].get("cs", {"kept": 0})["kept"] < CS_SAMPLE:
        print(f"cs: fewer than the {CS_SAMPLE:,} abstracts that are sampled of it; all are used")
    for sentence in manifest["short"]:
        print(f"{sentence}; all of them are taken")
    source = manifest["source"]
    broken = source["broken_lines"]
    if broken["count"]:
        numbers = ", ".join(map(str, broken["first"]))
        more = ", .." if broken["count"] > len(broken["first"]) else ""
        print(f"{source['file']}: {broken['count']:,} broken lines skipped (line {numbers}{more})")
    if source["synthetic"]:
        print(f"{source['file']} is SYNTHETIC: made-up records, for demo and tests only")


# ---------------------------------------------------------------------------------------------
# synthesize: a made-up snapshot

SYNTHETIC = "Synthetic Record"                                # the submitter of every such record
VOCABULARY = {                                                # theories, objects, methods, formulae
    "hep-th": ("string theory|supergravity|conformal field theory",
               "D-branes|Wilson loops|black hole microstates",
               "T-duality|the AdS/CFT correspondence|mirror symmetry",
               r"$AdS_5 \times S^5$|$\mathcal{N}=4$|$T\bar{T}$"),
    "hep-ph": ("the Standard Model|chiral perturbation theory|the seesaw mechanism",
               "Higgs decays|pion form factors|neutrino masses",
               "next-to-leading order corrections|lattice input|a global fit",
               r"$b \to s \gamma$|$\alpha_s(M_Z)$|$m_H = 125$ GeV"),
    "gr-qc": ("general relativity|loop quantum gravity|Brans-Dicke theory",
              "binary mergers|spin networks|apparent horizons",
              "matched filtering|energy conditions|moving punctures",
              r"$g_{\mu\nu}$|$\gamma = 0.2375$|$l=m=2$"),
    "q-bio": ("population genetics|neuroscience|molecular evolution",
              "allele frequencies|spike trains|phylogenetic trees",
              "a Wright-Fisher model|maximum entropy inference|Bayesian sampling",
              r"$N_e$|$\sim 40$ Hz|$dN/dS$"),
    "cs": ("deep learning|distributed systems|natural language processing",
           "object detectors|consensus protocols|word embeddings",
           "stochastic gradient descent|message passing|data augmentation",
           r"$O(n \log n)$|$97.3\%$|$f+1$"),
    "other": ("algebraic geometry|stellar astrophysics|superconductivity",
              "vector bundles|red giants|vortex lattices",
              "derived categories|asteroseismology|neutron scattering",
              r"$\mathbb{P}^n$|$T_{eff}$|$T_c$"),
}
SENTENCES = (
    "We study {object} in {theory} by means of {method}.",
    "It is shown that {object} are governed by {formula} once {method} is taken into account.",
    "In particular, {method} leads to a new relation between {object} and {formula}.",
    "Our result for {formula} agrees with earlier work on {theory}.",
    "As an application we compute {formula} for {object} and compare with what {method} predicts.",
    "This extends the known description of {object}, where only the leading term in {formula} had "
    "been kept.",
    "The consequences for {theory} are discussed.",
    "We comment on open problems in {theory}, such as the role of {object} at large {formula}.",
)
SUBJECTS = {                                                  # primary categories, each as often
    "hep-th": ["hep-th"] * 22,                                # as in a hundred records: enough of
    "hep-ph": ["hep-ph"] * 20,                                # each category for all ten sets
    "gr-qc": ["gr-qc"] * 12,
    "q-bio": ["q-bio.NC", "q-bio.PE", "q-bio.QM"] * 2,
    "cs": ["cs.LG", "cs.CV", "cs.CL", "cs.DC"] * 8,
    "other": ["math.AG", "astro-ph.SR", "cond-mat.supr-con", "quant-ph"] * 2,
}
SURNAMES = ["Alder", "Birch", "Cedar", "Elm", "Hazel", "Maple", "M\\\"uhlenbeck", "d'Ormeau"]


def wrap(text, **indents):
    """The text in lines of 79 characters, as arXiv keeps it."""
    return textwrap.fill(text, 79, break_long_words=False, break_on_hyphens=False, **indents)


def made_up_record(draw, paper, category, created):
    """One record in the snapshot's schema and key order; `draw`: random.Random."""
    theories, objects, methods, formulae = (w.split("|") for w in VOCABULARY[category])
    topic = draw.randrange(len(objects))                      # kept through the abstract
    words = {"object": objects[topic], "method": methods[topic]}
    sentences = [SENTENCES[0], *draw.choices(SENTENCES, k=draw.randint(3, 9))]
    abstract = " ".join(
        s.format(theory=draw.choice(theories), formula=draw.choice(formulae), **words)
        for s in sentences)
    comments = f"{draw.randint(4, 60)} pages. Made up"
    chance = draw.random()
    if chance < 0.02:
        comments = draw.choice(["This paper has been withdrawn", "WITHDRAWN by the author"])
    elif chance < 0.03:
        abstract = "Withdrawn."
    authors = draw.sample(SURNAMES, draw.randint(1, len(SURNAMES)))
    elsewhere = [s for c, subjects in SUBJECTS.items() if c != category for s in subjects]
    cross_lists = draw.sample(elsewhere, draw.choice([0, 0, 1, 2]))
    return {
        "id": paper,
        "submitter": SYNTHETIC,
        "authors": ", ".join(f"A. {name}" for name in authors),
        "title": wrap(f"On {words['object']} in {draw.choice(theories)} and {words['method']}",
                      subsequent_indent="  "),
        "comments": comments,
        "journal-ref": None,
        "doi": None,
        "report-no": None,
        "categories": " ".join([draw.choice(SUBJECTS[category]), *dict.fromkeys(cross_lists)]),
        "license": draw.choice([None, "http://arxiv.org/licenses/nonexclusive-distrib/1.0/"]),
        "abstract": wrap(abstract, initial_indent="  ") + "\n",
        "versions": [{"version": "v1", "created": f"{created:%a, %d %b %Y %H:%M:%S} GMT"}],
        "update_date": f"{created:%Y-%m-%d}",
        "authors_parsed": [[name, "A.", ""] for name in authors],
    }


def synthesize(path, records=5000, seed=0):
    """Writes a made-up snapshot in the real one's schema, order and form, and says so.

    It has all categories with a vocabulary of their own, withdrawn papers, cross-lists and the
    control papers. The same seed gives the same bytes. Raises ValueError for fewer than 100."""
    if records < 100:
        raise ValueError(f"--records {records}: a made-up snapshot has at least 100 records")
    draw = random.Random(seed)
    shares = [len(subjects) for subjects in SUBJECTS.values()]
    papers = {paper: ("hep-th", f"20{paper[:4]}") for paper in CONTROL}
    while len(papers) < records:
        [category] = draw.choices(list(SUBJECTS), shares)
        month = f"{draw.randint(1994, 2023)}{draw.randint(1, 12):02}"
        paper = f"{month[2:]}.{draw.randrange(1, 10_000):04}"
        if month < "200704":                                  # arXiv's older ids
            paper = f"{SUBJECTS[category][0]}/{month[2:]}{draw.randrange(1, 1000):03}"
        papers.setdefault(paper, (category, month))
    with writing(path) as temporary, open(temporary, "w") as file:
        for paper in sorted(papers):                          # in string order, as in the snapshot
            category, month = papers[paper]
            created = datetime(int(month[:4]), int(month[4:]), draw.randint(1, 28))
            record = made_up_record(draw, paper, category, created)
            file.write(json.dumps(record, separators=(",", ":")) + "\n")
    print(f"{path}: {records:,} SYNTHETIC records, made up: for demo and tests, no physics in them",
          file=sys.stderr)


# ---------------------------------------------------------------------------------------------

def main(argv=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("prepare", help="snapshot -> training sets")
    p.add_argument("source", metavar="SNAPSHOT",
                   help="arxiv-metadata-oai-snapshot.json, plain or .gz")
    p.add_argument("--own", action="store_true",
                   help="SNAPSHOT is any JSONL with id and abstract: one pool, the set `own`")
    p.add_argument("--categories", nargs="+", choices=CATEGORIES, default=CATEGORIES, metavar="C",
                   help=f"of {' '.join(CATEGORIES)} (default: all; s1..s9 need the first three)")
    p.add_argument("--out", help="prepared directory (default: data/arxiv; with --own data/own)")
    p = commands.add_parser("ids", help="print the arXiv ids of a split, in order, one a line")
    p.add_argument("directory", metavar="DIR", help="prepared directory")
    p.add_argument("--subset", required=True,
                   help="s1..s10, own, control, a category, joint, or a recipe such as "
                        "hep-th:0.7+gr-qc:0.15")
    p.add_argument("--split", required=True, choices=SPLITS)
    p = commands.add_parser("synthesize", help="write a made-up snapshot")
    p.add_argument("out", metavar="OUT", help="file to write")
    p.add_argument("--records", type=bounded(int, 100, 1_000_000), default=5000,
                   help="(default: %(default)s)")
    p.add_argument("--seed", type=bounded(int, 0), default=0, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    with one_line():
        if args.command == "prepare":
            print_table(prepare(args.source, args.out, tuple(args.categories), args.own))
        elif args.command == "ids":
            print("\n".join(load(args.directory, args.subset, args.split)[0]), flush=True)
        else:
            synthesize(args.out, args.records, args.seed)


if __name__ == "__main__":
    main()
