"""data_arxiv.py: splits and sets id for id against `datasets` and pandas, the snapshot's odd lines, refusals, own records, batches."""
import gzip
import hashlib
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pandas
import pytest
from datasets import Dataset, concatenate_datasets

import data_arxiv as d

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "data" / "hepth_1992_2001.jsonl.gz"
needs_real = pytest.mark.skipif(not REAL.exists(), reason="needs the real abstracts in ../shared/data")


def run(*arguments, **kwargs):
    return subprocess.run([sys.executable, ROOT / "data_arxiv.py", *map(str, arguments)], capture_output=True, text=True, **kwargs)


def record(paper, categories="hep-th", abstract="  We study branes.\n", **fields):
    return {"id": paper, "submitter": "A. Author", "authors": "A. Author", "title": "T", "comments": None, "journal-ref": None, "doi": None,
            "report-no": None, "categories": categories, "license": None, "abstract": abstract,
            "versions": [{"version": "v1", "created": "Mon, 3 Jan 2000 22:38:03 GMT"}], "update_date": "2000-01-03",
            "authors_parsed": [["Author", "A.", ""]], **fields}


def line(*args, **fields):
    return json.dumps(record(*args, **fields), separators=(",", ":"))


def write(path, lines):
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    path = tmp_path_factory.mktemp("snapshot") / "made_up.jsonl"
    d.synthesize(path, records=4000, seed=3)
    return path


@pytest.fixture(scope="module")
def prepared(snapshot, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared")
    d.prepare(snapshot, out)
    return out


# ---- splits and sets, against the libraries that the authors used --------------------------------------------------

def authors_split(dataset):
    first = dataset.train_test_split(train_size=0.7, seed=42)
    second = first["test"].train_test_split(test_size=0.5, seed=42)
    return {"train": first["train"], "validation": second["train"], "test": second["test"]}


@pytest.mark.parametrize("n", [4, 5, 7, 10, 99, 101, 1000, 1001, 4242, 12345, 30001])
def test_split_is_that_of_datasets(n):
    ours, theirs = d.split_rows(n), authors_split(Dataset.from_dict({"row": range(n)}))
    for split in d.SPLITS:
        assert ours[split].tolist() == theirs[split]["row"]
        if len(ours[split]):
            assert d.shuffle42(ours[split]).tolist() == theirs[split].shuffle(seed=42)["row"]


def test_split_of_tiny_pools_loses_nothing():
    for n in range(4):
        assert sorted(np.concatenate(list(d.split_rows(n).values()))) == list(range(n))


@pytest.mark.parametrize("n", [200_000, 200_001, 534_243])
def test_cs_sample_is_that_of_pandas(n):
    group = np.full(n, d.CODES.index("cs"), np.uint8)
    assert d.pool(group, "cs").tolist() == pandas.DataFrame({"row": range(n)}).sample(n=200_000, random_state=42)["row"].tolist()


def test_cs_with_fewer_rows_is_all_of_them():
    assert d.pool(np.full(199_999, d.CODES.index("cs"), np.uint8), "cs").tolist() == list(range(199_999))


@pytest.mark.parametrize("n, sizes", [(105_384, (73_768, 15_808, 15_808)), (195_909, (137_136, 29_386, 29_387))])
def test_published_pool_sizes_of_version_193(n, sizes):
    assert tuple(len(d.split_rows(n)[split]) for split in d.SPLITS) == sizes


def test_published_set_sizes_of_version_193():
    """132,678 hep-ph and 63,776 gr-qc records leave 195,909 after the withdrawn ones; how they share that does not matter here."""
    group = np.repeat(np.array([d.CODES.index(c) for c in ("hep-th", "hep-ph", "gr-qc")], np.uint8), [105_384, 132_283, 63_626])
    assert tuple(len(d.select(group, "s3", split)[0]) for split in d.SPLITS) == (210_904, 45_194, 45_195)
    for name in ("s4", "s5", "s6", "s9"):                                       # the size of hep-th, whatever is mixed in
        assert tuple(len(d.select(group, name, split)[0]) for split in d.SPLITS) == (73_768, 15_808, 15_808)


def authors_sets(path, cs_sample):
    """The pipeline and the table of sets once more, straight from the record list, with pandas and datasets. {set: {split: ids}}"""
    frame = pandas.DataFrame([json.loads(text) for text in path.read_text().splitlines()])
    frame = frame[~frame["id"].isin(["1804.08625", "1404.0016", "1205.2086", "1209.5915", "1802.05268"])]
    frame["primary"] = frame["categories"].str.split().str[0]
    frame = frame[~frame["comments"].str.contains("withdrawn", case=False, na=False)]
    frame = frame[~frame["abstract"].str.contains("withdrawn|Withdrawn")]
    frame["abstract"] = frame["abstract"].str.replace(r"\n\s*", " ", regex=True).str.strip()
    frame = frame[["id", "primary", "abstract"]]

    def dataset(rows):
        return Dataset.from_pandas(rows, preserve_index=False)

    by = {c: frame[frame["primary"] == c] for c in ("hep-th", "hep-ph", "gr-qc")}
    by |= {c: frame[frame["primary"].str.startswith(c + ".")] for c in ("q-bio", "cs")}
    by["cs"] = by["cs"].sample(n=cs_sample, random_state=42)
    pools = {name: authors_split(dataset(rows)) for name, rows in by.items()}
    pools["joint"] = authors_split(dataset(frame[frame["primary"].isin(["hep-ph", "gr-qc"])]))
    ratio = len(by["hep-th"]) / (len(by["gr-qc"]) + len(by["hep-ph"]))
    sets = {name: {} for name in d.SETS} | {name: {} for name in pools}
    for split in d.SPLITS:
        th, ph, gr, qb, cs, joint = (pools[name][split] for name in ("hep-th", "hep-ph", "gr-qc", "q-bio", "cs", "joint"))
        n = len(th)
        c = int(0.15 * n)
        gr_of_joint = joint.filter(lambda row: row["primary"] == "gr-qc")
        ph_of_joint = joint.filter(lambda row: row["primary"] == "hep-ph")
        k = int(ratio * len(gr))

        def mix(*parts):
            return concatenate_datasets(list(parts)).shuffle(seed=42)

        made = {"s1": th, "s2": joint, "s3": mix(th, joint),
                "s4": mix(th.select(range(n - 2 * c)), gr_of_joint.select(range(c)), ph_of_joint.select(range(c))),
                "s5": mix(th.select(range(n - c)), gr_of_joint.select(range(c))),
                "s6": mix(th.select(range(n - c)), ph_of_joint.select(range(c))),
                "s7": mix(th, gr), "s8": mix(th, ph),
                "s9": mix(gr.shuffle(seed=42).select(range(k)), ph.shuffle(seed=42).select(range(n - k))),
                "s10": mix(th, qb, cs.shuffle(seed=42).select(range(len(gr) + len(ph) - len(qb))))}
        for name, rows in {**made, **{name: pool[split] for name, pool in pools.items()}}.items():
            sets[name][split] = rows["id"], rows["abstract"]
    return sets


def test_every_set_id_for_id(snapshot, tmp_path, monkeypatch):
    monkeypatch.setattr(d, "CS_SAMPLE", 1200)                                   # so that the sample is drawn at this size too
    manifest = d.prepare(snapshot, tmp_path)
    assert manifest["categories"]["cs"]["kept"] >= 1200 and not manifest["short"] and not manifest["unavailable"]
    for name, splits in authors_sets(snapshot, 1200).items():
        for split, (ids, texts) in splits.items():
            assert d.load(tmp_path, name, split) == (list(ids), list(texts)), (name, split)
            assert manifest["sets"][name][split] == len(ids)
            assert manifest["characters"][name][split] == sum(map(len, texts))


@needs_real
def test_real_abstracts_id_for_id(tmp_path):
    manifest = d.prepare(REAL, tmp_path)
    assert manifest["categories"]["hep-th"] == {"records": 25_224, "withdrawn": 18, "kept": 25_206}
    sizes = {"train": 17_644, "validation": 3_781, "test": 3_781}
    assert manifest["sets"] == {"hep-th": sizes, "s1": sizes}
    assert set(manifest["unavailable"]) == {f"s{i}" for i in range(2, 11)} | {"hep-ph", "gr-qc", "q-bio", "cs", "joint"}
    frame = pandas.DataFrame([json.loads(text) for text in gzip.decompress(REAL.read_bytes()).splitlines()])
    frame = frame[~frame["comments"].str.lower().str.contains("withdrawn", na=False) & ~frame["abstract"].str.contains("[wW]ithdrawn")]
    frame["abstract"] = frame["abstract"].str.replace(r"\n\s*", " ", regex=True).str.strip()
    for split, rows in authors_split(Dataset.from_pandas(frame[["id", "abstract"]], preserve_index=False)).items():
        assert d.load(tmp_path, "s1", split) == (list(rows["id"]), list(rows["abstract"]))


# ---- the pipeline's rules ------------------------------------------------------------------------------------------

def test_rules_of_the_pipeline(tmp_path):
    kept = {
        "0704.0001": line("0704.0001", abstract="  We study\n  branes at \\alpha' \\n and\nmore.\n\n  A new paragraph.\n"),
        "0704.0002": line("0704.0002", "hep-th gr-qc", "WITHDRAWN in capitals is not what the authors looked for.\n"),
        "0704.0003": line("0704.0003", "gr-qc hep-th"),
        "0704.0004": line("0704.0004", "q-bio.NC"),
        "0704.0005": line("0704.0005", "cs.LG stat.ML", comments="12 pages"),
        "0704.0006": line("0704.0006", "hep-ph"),
    }
    dropped = [
        line("1404.0016", abstract="A control paper.\n"), line("1205.2086", "math.AG", abstract="Another,\nwherever it stands.\n"),
        line("0801.0001", comments="This paper has been WithDrawn"), line("0801.0002", abstract="It was withdrawn.\n"),
        line("0801.0003", abstract="Withdrawn.\n"),
        line("0801.0004", "math-ph hep-th"), line("0801.0005", "csx.LG"), line("0801.0006", "q-bio"), line("0801.0007", "hep-lat hep-th"),
    ]
    manifest = d.prepare(write(tmp_path / "s.jsonl", [*kept.values(), *dropped]), tmp_path / "out")
    rows = [json.loads(text) for text in next((tmp_path / "out").glob("abstracts-*.jsonl")).open()]
    assert [(row["id"], row["category"]) for row in rows] == [
        ("0704.0001", "hep-th"), ("0704.0002", "hep-th"), ("0704.0003", "gr-qc"), ("0704.0004", "q-bio.NC"), ("0704.0005", "cs.LG"),
        ("0704.0006", "hep-ph"), ("1404.0016", "hep-th"), ("1205.2086", "math.AG")]
    assert rows[0]["abstract"] == "We study branes at \\alpha' \\n and more. A new paragraph."
    for split in d.SPLITS:
        ids, texts = d.load(tmp_path / "out", "control", split)
        assert ids == ["1404.0016", "1205.2086"] and texts == ["A control paper.", "Another, wherever it stands."]
    assert manifest["control"] == 2
    assert {k: manifest["categories"]["hep-th"][k] for k in ("records", "withdrawn", "kept")} == {"records": 5, "withdrawn": 3, "kept": 2}
    assert manifest["categories"]["joint"]["kept"] == 2
    assert "cs: fewer than the 200,000" in run("prepare", tmp_path / "s.jsonl", "--out", tmp_path / "again").stdout


def test_lines_out_of_the_ordinary(tmp_path):
    """Wanted and unwanted records in other JSON forms, texts that imitate the key, and broken lines with their numbers."""
    imitation = 'a "categories":"hep-th" within, and \\"categories\\":\\"hep-th gr-qc'
    wanted = {
        "a1": line("a1", title=imitation.replace("hep-th", "math.AG"), abstract=imitation + "\n"),
        "a2": json.dumps(record("a2")),                                         # blanks after : and ,
        "a3": json.dumps(dict(reversed(record("a3").items())), separators=(",", ":")),
        "a4": line("a4").replace('"hep-th"', '"\\u0068ep-th"'),
        "a5": line("a5").replace('"hep-th"', '" hep-th, gr-qc"'),                # commas, as some dumps have them
        "a6": line("a6") + "\r", "a7": "  " + line("a7") + "  ",
        "a8": json.dumps(record("a8", abstract="Poincar\u00e9 \U0001d54a\n"), ensure_ascii=False, separators=(",", ":")),
        "a9": line("a9", authors_parsed=[["x" * 3_000_000, "", ""]]),           # longer than the blocks that are read
    }
    unwanted = [line("b1", "math.AG", title=imitation), json.dumps(record("b2", "math.AG")),
                line("b3", "astro-ph.CO hep-th", comments=imitation)]
    broken = [line("c1")[:-1], line("c2")[:300], line("c3", "math.AG")[:-40], "no JSON", "[1, 2]", '{"id":"c4","categories":"hep-th"}',
              line(5), line("c5", abstract=None), line("c6", abstract=["x"]), line("c7", categories=""), line("c8", categories=None),
              line("c9", abstract="\ud835 half a pair\n"), '{"id":"c10","categories":"hep-th', "[" * 100_000]
    lines = [*wanted.values(), "", *unwanted, *broken, line("a99")]
    (tmp_path / "s.jsonl").write_text("\n".join(lines))                         # no line break at the end
    manifest = d.prepare(tmp_path / "s.jsonl", tmp_path / "out")
    rows = [json.loads(text) for text in next((tmp_path / "out").glob("abstracts-*.jsonl")).open()]
    assert [row["id"] for row in rows] == [*wanted, "a99"]
    assert rows[0]["abstract"] == imitation and rows[7]["abstract"] == "Poincar\u00e9 \U0001d54a"
    first = len(wanted) + 1 + len(unwanted) + 1
    assert manifest["source"]["broken_lines"] == {"count": len(broken), "first": list(range(first, first + 10))}
    shown = run("prepare", tmp_path / "s.jsonl", "--out", tmp_path / "out")
    assert shown.returncode == 0 and f"{len(broken)} broken lines skipped (line {first}, {first + 1}" in shown.stdout


def test_gz_and_plain_give_the_same(snapshot, prepared, tmp_path):
    (tmp_path / "s.gz").write_bytes(gzip.compress(snapshot.read_bytes()))
    manifest = d.prepare(tmp_path / "s.gz", tmp_path / "out")
    assert manifest["checksum"] == d.available(prepared)["checksum"] and manifest["sets"] == d.available(prepared)["sets"]
    assert manifest["source"]["file"] == "s.gz" and len(list((tmp_path / "out").iterdir())) == 3


def test_manifest_and_checksums(prepared):
    manifest = d.available(prepared)
    name = manifest["checksum"]
    index = np.load(prepared / f"index-{name}.npy")
    assert index.dtype == d.ROW and f"{zlib.crc32(index.tobytes()):08x}" == name and d.ROW_FORMAT.size == d.ROW.itemsize
    lines = (prepared / f"abstracts-{name}.jsonl").read_bytes().splitlines(keepends=True)
    assert [zlib.crc32(text) for text in lines] == index["crc32"].tolist() and list(map(len, lines)) == index["size"].tolist()
    records = [json.loads(text) for text in lines]
    assert [len(r["abstract"]) for r in records] == index["characters"].tolist()
    assert d.row_hashes([r["id"] for r in records]).tolist() == index["id"].tolist()
    assert sorted(p.name for p in prepared.iterdir()) == [f"abstracts-{name}.jsonl", f"index-{name}.npy", "manifest.json"]
    for category, count in manifest["categories"].items():
        assert count["kept"] == count["records"] - count["withdrawn"] == sum(manifest["sets"][category].values())
    assert set(manifest["categories"]) == {*d.CATEGORIES, "joint"} and set(manifest["sets"]) == {*d.SETS, *d.CATEGORIES, "joint"}


def test_row_hashes():
    hashes = d.row_hashes(["", "hep-th/9711200", "Schr\u00f6dinger"])
    assert hashes.dtype == np.uint64 and len(d.row_hashes([])) == 0 and d.row_hashes([]).dtype == np.uint64
    expected = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in ("", "hep-th/9711200", "Schr\u00f6dinger")]
    assert hashes.astype("<u8").tobytes() == b"".join(expected)


def test_only_some_categories(snapshot, prepared, tmp_path):
    manifest = d.prepare(snapshot, tmp_path, ("hep-th", "hep-ph", "gr-qc"))
    assert set(manifest["sets"]) == {"hep-th", "hep-ph", "gr-qc", "joint", *(f"s{i}" for i in range(1, 10))}
    assert manifest["unavailable"] == {"s10": "no q-bio, cs records in the prepared data"}
    assert d.load(tmp_path, "s9", "test") == d.load(prepared, "s9", "test")
    with pytest.raises(ValueError, match="s10 is unavailable: no q-bio, cs records"):
        d.load(tmp_path, "s10", "train")


def test_a_recipe_that_asks_for_more_than_there_is_says_so(tmp_path, capsys):
    lines = [line(f"th{i:03}") for i in range(100)] + [line(f"x{i:03}", "gr-qc" if i % 5 else "hep-ph") for i in range(20)]
    manifest = d.prepare(write(tmp_path / "s.jsonl", lines), tmp_path / "out")
    sentence = "s6 train: the recipe takes 10 hep-ph of joint rows, there are 2"
    assert sentence in manifest["short"] and manifest["sets"]["s6"]["train"] == 62
    assert len(d.load(tmp_path / "out", "s6", "train")[0]) == 62 and sentence in capsys.readouterr().err


# ---- free recipes --------------------------------------------------------------------------------------------------

def test_free_recipes(prepared):
    ids = {name: d.load(prepared, name, "test")[0] for name in ("hep-th", "gr-qc", "cs", "joint")}
    n = len(ids["hep-th"])

    def shuffled(rows):
        return Dataset.from_dict({"id": rows}).shuffle(seed=42)["id"]

    expected = ids["hep-th"][:int(0.7 * n)] + ids["gr-qc"][:int(0.15 * n)]
    assert d.load(prepared, "hep-th:0.7+gr-qc:0.15", "test")[0] == list(shuffled(expected))
    assert d.load(prepared, "hep-th:0.7 + gr-qc:.15", "test") == d.load(prepared, "hep-th:0.7+gr-qc:0.15", "test")
    assert d.load(prepared, "joint+cs:0.5", "test")[0] == list(shuffled(ids["joint"] + ids["cs"][:int(0.5 * n)]))
    assert d.load(prepared, "hep-th+joint", "test") == d.load(prepared, "s3", "test")


@pytest.mark.parametrize("name", ["s11", "", "hep-th:x", "hep-th:0.7+", "hep-th:1.2.3", "hep-th:.", "hep-th:-1", "control:0.5", "s1+s2", "hep-th:nan"])
def test_names_that_mean_nothing(prepared, name):
    with pytest.raises(ValueError, match="is no training set"):
        d.load(prepared, name, "train")
    with pytest.raises(ValueError, match="is no split"):
        d.load(prepared, "s1", "valid")


# ---- own records ---------------------------------------------------------------------------------------------------

def test_own_records_have_a_directory_of_their_own(prepared, snapshot, tmp_path, monkeypatch):
    notes = [{"id": i, "abstract": f"Note {i},\nwithdrawn or not.", "more": 1} for i in range(50)]
    own = write(tmp_path / "own.jsonl", map(json.dumps, notes))
    alone = d.prepare(own, tmp_path / "own", own=True)
    assert alone["sets"] == {"own": {"train": 35, "validation": 7, "test": 8}} and alone["categories"]["own"]["withdrawn"] == 0
    ids, texts = d.load(tmp_path / "own", "own", "train")
    assert ids == [str(i) for i in d.split_rows(50)["train"]] and texts[0] == f"Note {ids[0]}, withdrawn or not."
    assert set(alone["unavailable"]) == set(d.SETS)

    before = {p.name: p.read_bytes() for p in (tmp_path / "own").iterdir()}
    with pytest.raises(ValueError, match="own holds another kind of texts .own.: choose another --out"):
        d.prepare(snapshot, tmp_path / "own")
    assert {p.name: p.read_bytes() for p in (tmp_path / "own").iterdir()} == before
    with pytest.raises(ValueError, match="holds another kind of texts .snapshot.: choose another --out"):
        d.prepare(own, prepared, own=True)
    assert d.load(prepared, "s3", "test")
    again = d.prepare(write(tmp_path / "own.jsonl", [f'{{"id":"{i}","abstract":"y"}}' for i in range(10)]), tmp_path / "own", own=True)
    assert again["sets"]["own"] == {"train": 7, "validation": 1, "test": 2} and len(list((tmp_path / "own").iterdir())) == 3
    monkeypatch.chdir(tmp_path)
    d.prepare(own, own=True)
    d.prepare(snapshot)
    assert sorted(p.parent.name for p in (tmp_path / "data").glob("*/manifest.json")) == ["arxiv", "own"]


# ---- one reader of JSONL -------------------------------------------------------------------------------------------

BODY = [{"id": f"p{i}", "abstract": f"Schr\u00f6dinger, \U0001d54a\n and {i}."} for i in range(8)]
RAW = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in BODY)
BOM = b"\xef\xbb\xbf"


def both_readers(path, tmp_path):
    """(ids, texts) of read_texts; prepare --own must have the same, or the same error."""
    try:
        ids, texts = d.read_texts(path)
    except ValueError as error:
        with pytest.raises(ValueError) as again:
            d.prepare(path, tmp_path / "prepared", own=True)
        assert str(again.value) == str(error) and "\n" not in str(error)
        raise
    d.prepare(path, tmp_path / "prepared", own=True)
    splits = [d.load(tmp_path / "prepared", "own", split) for split in d.SPLITS]
    assert dict(zip(ids, texts)) == {i: t for found in splits for i, t in zip(*found)}
    return ids, texts


@pytest.mark.parametrize("data", [
    RAW.encode(), BOM + RAW.encode(), RAW.replace("\n", "\r\n").encode(), RAW.replace("\n", "\n\n \t\n").encode(), RAW.strip().encode(),
    gzip.compress(RAW.encode()), gzip.compress(BOM + RAW.encode()), gzip.compress(RAW[:200].encode()) + gzip.compress(RAW[200:].encode()),
    BOM + RAW[:RAW.index("\n") + 1].encode() + BOM + RAW[RAW.index("\n") + 1:].encode(), "".join(json.dumps(r) + "\n" for r in BODY).encode(),
], ids=["plain", "bom", "crlf", "blank", "no-end", "gz", "gz-bom", "gz-members", "two-boms", "ascii"])
def test_forms_of_jsonl_that_are_the_same(data, tmp_path):
    (tmp_path / "texts").write_bytes(data)                                      # no suffix: .gz is known by its first bytes
    assert both_readers(tmp_path / "texts", tmp_path) == (
        [f"p{i}" for i in range(8)], [f"Schr\u00f6dinger, \U0001d54a and {i}." for i in range(8)])


def test_a_file_of_one_record_with_a_mark(tmp_path):
    (tmp_path / "one.jsonl").write_bytes(BOM + b'{"id":"x","abstract":"y"}')
    assert both_readers(tmp_path / "one.jsonl", tmp_path) == (["x"], ["y"])
    assert list(d.read_jsonl(tmp_path / "one.jsonl")) == [(1, {"id": "x", "abstract": "y"})]


GOOD = b'{"id":"x","abstract":"y"}\n'


@pytest.mark.parametrize("data, words", [
    (RAW.encode("utf-16"), "line 1: UTF-16 or UTF-32"), (RAW.encode("utf-32"), "line 1: UTF-16 or UTF-32"),
    (b"\xfe\xff" + RAW.encode("utf-16-be"), "line 1: UTF-16 or UTF-32"), (b"\0\0\xfe\xff" + RAW.encode("utf-32-be"), "line 1: UTF-16 or UTF-32"),
    (RAW.encode("utf-16-le"), "line 1: it holds NUL bytes"), (RAW.encode("utf-32-be"), "line 1: it holds NUL bytes"),
    (GOOD + b"\n" + '{"id":"z","abstract":"Schr\u00f6dinger"}\n'.encode("latin-1"), "line 3: 'utf-8' codec can't decode byte 0xf6"),
    (GOOD + b"\0" * 4096, "line 2: it holds NUL bytes"), (GOOD + b'{"id":"z\0","abstract":"y"}\n', "line 2: it holds NUL bytes"),
    (GOOD + b'{"id":"z","abstract":"\xed\xa0\xb5 half"}\n', "line 2: 'utf-8' codec can't decode"),
    (GOOD + b'{"id":"z","abstract":"\\ud835 half"}\n', "line 2: 'utf-8' codec can't encode"),
    (GOOD + b'{"id":"\\uDC00","abstract":"half"}\n', "line 2: 'utf-8' codec can't encode"),
    (b"PK\x03\x04" + bytes(100), "is a zip archive: unzip it"), (gzip.compress(GOOD * 999, mtime=0)[:-9], "end-of-stream"),
    (gzip.compress(GOOD * 999, mtime=0)[:60] + bytes(99), ""), (gzip.compress(GOOD, mtime=0) + b"more", "Not a gzipped file"),
    (GOOD + b"[1, 2]\n", "line 2: it is no JSON object"), (GOOD + b"7\n", "line 2: it is no JSON object"), (GOOD + b"null", "line 2: it is no JSON object"),
    (GOOD + b"\n\n{", "line 4: it is no JSON"), (GOOD + GOOD.strip() + GOOD, "line 2: it is no JSON: Extra data at character 26"),
    (b"[" * 100_000, "line 1: "), (b'{"id":' + b"9" * 9999 + b',"abstract":"y"}', "line 1: "),
    (GOOD.replace(b"\n", b"\r") * 3, "line 1: it is no JSON: Extra data"),
    (b'{"id":"x"}', "line 1: lacks 'abstract'"), (b'{"abstract":"x"}', "line 1: lacks 'id'"), (b'{"id":"x","text":"y"}', "line 1: lacks 'abstract'"),
    (b'{"id":"x","abstract":null}', "line 1: its abstract is no text"), (b'{"id":"x","abstract":["y"]}', "line 1: its abstract is no text"),
    (b'{"id":null,"abstract":"y"}', "line 1: its id is neither"), (b'{"id":["x"],"abstract":"y"}', "line 1: its id is neither"),
    (b'{"id":true,"abstract":"y"}', "line 1: its id is neither"), (b'{"id":{},"abstract":"y"}', "line 1: its id is neither"),
    (GOOD + b"\n" + GOOD, r"an id comes twice \(lines 1 and 3\)"), (b'{"id":7,"abstract":"y"}\n{"id":"7","abstract":"z"}', r"an id comes twice \(lines 1 and 2\)"),
    (b'{"id":"a","abstract":"y"}\n' + GOOD + b'{"id":"b","abstract":"y"}\n' + GOOD + GOOD, r"an id comes twice \(lines 2 and 4\)"),
])
def test_texts_that_are_refused_by_name(data, words, tmp_path):
    (tmp_path / "texts.jsonl").write_bytes(data)
    with pytest.raises(ValueError, match=f"texts.jsonl.*{words}"):
        both_readers(tmp_path / "texts.jsonl", tmp_path)
    assert not list((tmp_path / "prepared").iterdir())


def test_a_file_in_place_of_a_directory(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        d.main(["prepare", "snapshot.jsonl", "--out", str(tmp_path / "file")])
    assert capsys.readouterr().err == f"error: {tmp_path}/file: File exists\n"


@pytest.mark.parametrize("text", ["a\n b", "a\r\n b", "a\r b", "a\u2028b", "a\u2029 b", "a\x85b", "a\x0b b", "a\x0cb", "\r\na\r\n\r\n  b\r\n", "a\x1cb", " a\n\r b "])
def test_every_line_break_becomes_a_blank(text, tmp_path):
    assert d.clean(text) == d.clean("\ufeff" + text) == "a b"
    write(tmp_path / "s.jsonl", [json.dumps({"id": "x", "abstract": text}), json.dumps({"id": "z", "abstract": text}, ensure_ascii=False)])
    assert both_readers(tmp_path / "s.jsonl", tmp_path) == (["x", "z"], ["a b", "a b"])
    d.prepare(write(tmp_path / "snapshot.jsonl", [line("x", abstract=text), line("y", abstract=text)]), tmp_path / "out")
    assert set(sum((d.load(tmp_path / "out", "s1", split)[1] for split in d.SPLITS), [])) == {"a b"}


def test_clean_is_the_authors_rule_on_their_line_breaks():
    draw = np.random.default_rng(0)
    for _ in range(2000):
        text = "".join(draw.choice(list("ab \n\t"), 20))
        assert d.clean(text) == re.sub(r"\n\s*", " ", text.strip())


def test_a_snapshot_with_an_id_twice(tmp_path):
    lines = [line("a"), line("b", "math.AG"), "broken", line("c", comments="withdrawn"), line("b"), line("c"), line("a ", "gr-qc")]
    with pytest.raises(ValueError, match=r"s.jsonl: an id comes twice \(lines 1 and 7\)"):      # b and c: only one of them is kept
        d.prepare(write(tmp_path / "s.jsonl", lines), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    assert d.prepare(write(tmp_path / "s.jsonl", lines[:-1]), tmp_path / "out")["categories"]["hep-th"]["kept"] == 3


def test_a_snapshot_with_a_mark_keeps_its_first_record(tmp_path):
    (tmp_path / "s.jsonl").write_bytes(BOM + "\r\n".join(line(f"p{i}") for i in range(9)).encode())
    manifest = d.prepare(tmp_path / "s.jsonl", tmp_path / "out")
    assert manifest["categories"]["hep-th"]["kept"] == 9 and manifest["source"]["broken_lines"]["count"] == 0


# ---- refusals ------------------------------------------------------------------------------------------------------

def refused(source, out, *words):
    """Exit status 2, one line on stderr after the progress bar, no traceback, nothing new in out. Returns the CPU time that it took."""
    before = {p.name: p.read_bytes() for p in out.iterdir()} if out.exists() else {}
    begun = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run("prepare", source, "--out", out)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    error = done.stderr[done.stderr.index("error: "):]
    assert error.count("\n") == 1 and all(word in error for word in words), error
    assert ({p.name: p.read_bytes() for p in out.iterdir()} if out.exists() else {}) == before
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ended.ru_utime + ended.ru_stime - begun.ru_utime - begun.ru_stime


def test_files_that_are_no_snapshot(tmp_path, prepared):
    bad = {
        "table.csv": b"id,abstract\n" * 1000, "empty.json": b"", "blank.json": b"\n" * 1000,
        "array.json": json.dumps([record("x")] * 9, indent=1).encode(),
        "binary.json": os.urandom(1 << 20), "other.jsonl": b'{"text": "x"}\n' * 1000, "image.png": b"\x89PNG\r\n" + b"\0" * 1_000_000,
    }
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
        refused(tmp_path / name, prepared, name, "does not hold one JSON record a line with id, categories and abstract")
    with open(tmp_path / "zeros", "wb") as f:
        f.truncate(4 << 30)                                                     # 4 GB without a line break: refused after 16 MB
    assert refused(tmp_path / "zeros", prepared, "no line break within 16 MB") < 3
    with open(tmp_path / "large.csv", "wb") as f:
        f.write(b"id,abstract\n" * 1_000_000)
        f.truncate(4 << 30)
    assert refused(tmp_path / "large.csv", prepared, "does not hold") < 3       # the interpreter's start included
    (tmp_path / "archive.zip").write_bytes(b"PK\x03\x04" + b"\0" * 100)
    refused(tmp_path / "archive.zip", prepared, "is a zip archive: unzip it")
    packed = gzip.compress("\n".join(line(f"p{i}") for i in range(2000)).encode())
    (tmp_path / "half.gz").write_bytes(packed[:len(packed) // 2])
    refused(tmp_path / "half.gz", prepared, "half.gz", "ended before the end-of-stream marker")
    (tmp_path / "damaged.gz").write_bytes(packed[:200] + bytes(50) + packed[250:])
    refused(tmp_path / "damaged.gz", prepared, "damaged.gz", "get or make it again")
    refused(tmp_path / "missing.json", prepared, "missing.json")
    refused(tmp_path, prepared, str(tmp_path))
    write(tmp_path / "far.jsonl", [line(f"m{i}", "math.AG") for i in range(20)])
    refused(tmp_path / "far.jsonl", prepared, "holds no abstract of hep-th, hep-ph, gr-qc, q-bio, cs")
    d.load(prepared, "s3", "test")


def test_unprepared_and_damaged_directories(tmp_path, snapshot):
    done = run("ids", tmp_path / "nowhere", "--subset", "s3", "--split", "test")
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stdout == ""
    for words in ("no prepared abstracts in", "arxiv-metadata-oai-snapshot.json", "4.5 GB", "version 193", "no account",
                  "`curl -L -o arxiv.zip https://www.kaggle.com/api/v1/datasets/download/Cornell-University/arxiv`",
                  "`python data_arxiv.py prepare arxiv-metadata-oai-snapshot.json --out"):
        assert words in done.stderr
    assert done.stderr.count("\n") == 1
    d.prepare(snapshot, tmp_path / "out")
    abstracts = next((tmp_path / "out").glob("abstracts-*"))
    index = next((tmp_path / "out").glob("index-*"))
    manifest = tmp_path / "out" / "manifest.json"
    whole = {path: path.read_bytes() for path in (abstracts, index, manifest)}
    first, rows = whole[abstracts].index(b"\n"), np.load(index)
    swapped = rows.copy()
    swapped[[5, 9]] = rows[[9, 5]]
    relabelled = rows.copy()
    relabelled["category"][:50] = 1

    def as_npy(array):
        import io
        np.save(file := io.BytesIO(), array)
        return file.getvalue()

    record = json.loads(whole[manifest])
    damaged = [(abstracts, whole[abstracts][:-1]), (abstracts, b""), (abstracts, whole[abstracts] + b"{}\n"),
               (abstracts, whole[abstracts].replace(b"the", b"teh")), (abstracts, whole[abstracts][:first] + b" " + whole[abstracts][first:-1]),
               (index, whole[index][:-1]), (index, b""), (index, b"PK" * 99), (index, as_npy(swapped)), (index, as_npy(relabelled)),
               (index, as_npy(rows[:-1])), (index, as_npy(rows["size"])), (index, whole[index].replace(b"'shape': (", b"'shape': (9")),
               *[(manifest, data) for data in (b"", b"{", b"[]", b"7", b'"text"', b"{}", b"\xff\xfe", b"[" * 100_000, whole[manifest][:-20])],
               *[(manifest, json.dumps({**record, key: value}).encode()) for key in record for value in (None, 7, "x", [], {}) if record[key] != value],
               *[(manifest, json.dumps({k: v for k, v in record.items() if k != key}).encode()) for key in record]]
    for path, data in damaged:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"(edited or is damaged|; run prepare again)") as error:
            d.load(tmp_path / "out", "s1", "train")
        assert path.name in str(error.value) and "\n" not in str(error.value)
        path.write_bytes(whole[path])
    assert d.load(tmp_path / "out", "s1", "train")[0]
    for path in (abstracts, index):
        path.unlink()
        with pytest.raises(ValueError, match=f"{path.name}: is not there; run prepare again"):
            d.load(tmp_path / "out", "s1", "train")
        d.prepare(snapshot, tmp_path / "out")                                   # and run again, it is whole again
    manifest.write_text("{")
    with pytest.raises(ValueError, match="manifest.json: .*run prepare again"):
        d.available(tmp_path / "out")
    (tmp_path / "out" / "abstracts-mine.jsonl").write_text("a user's own")
    d.prepare(snapshot, tmp_path / "out")
    assert d.load(tmp_path / "out", "s1", "train")[0] and len(list((tmp_path / "out").iterdir())) == 4


def test_full_disk_and_kill_leave_the_old_state(snapshot, tmp_path, monkeypatch):
    out = tmp_path / "out"
    d.prepare(write(tmp_path / "small.jsonl", [line(f"p{i}") for i in range(10)]), out)
    before, replace = d.load(out, "s1", "train"), os.replace
    for last in range(4):                                                       # an end at each of the steps that put files in place
        done = []

        def step(source, target, done=done, last=last):
            if len(done) == last:
                raise OSError("the end")
            done.append(replace(source, target))

        monkeypatch.setattr(os, "replace", step)
        with pytest.raises(OSError, match="the end"):
            d.prepare(snapshot, out)
        assert d.load(out, "s1", "train") == before
    monkeypatch.undo()
    d.prepare(tmp_path / "small.jsonl", out)
    done = run("prepare", snapshot, "--out", out, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    error = done.stderr[done.stderr.index("error: "):]
    assert "File too large" in error and str(out / "abstracts-new.jsonl") in error and error.count("\n") == 1
    assert d.load(out, "s1", "train") == before and len(list(out.iterdir())) == 3
    big = tmp_path / "big.jsonl"
    d.synthesize(big, records=20_000)
    for delay in (0.15, 0.3, 0.45, 0.6):
        process = subprocess.Popen([sys.executable, ROOT / "data_arxiv.py", "prepare", big, "--out", out], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:
            assert d.load(out, "s1", "train") == before
    d.prepare(snapshot, out)
    assert len(list(out.iterdir())) == 3                                        # what the killed ones left is gone


def test_two_prepares_into_one_directory(snapshot, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    held = d.lock(out, "preparing")
    refused(snapshot, out, f"{out} is in use: another process is preparing it", "choose another --out")
    os.close(held)
    assert run("prepare", snapshot, "--out", out).returncode == 0
    processes = [subprocess.Popen([sys.executable, ROOT / "data_arxiv.py", "prepare", snapshot, "--out", tmp_path / "both"], text=True,
                                  stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for _ in range(2)]
    errors = [process.communicate()[1] for process in processes]
    for process, error in zip(processes, errors):
        assert process.returncode == 0 or process.returncode == 2 and "is in use" in error and "Traceback" not in error
    assert d.load(tmp_path / "both", "s1", "test") == d.load(out, "s1", "test") and len(list((tmp_path / "both").iterdir())) == 3


def test_flags_out_of_range(tmp_path):
    for flags in (["--records", "99"], ["--records", "nan"], ["--records", "1e3"], ["--records", "9999999"], ["--seed", "-1"], ["--seed", "x"]):
        done = run("synthesize", tmp_path / "made.jsonl", *flags)
        assert done.returncode == 2 and "Traceback" not in done.stderr and f"argument {flags[0]}" in done.stderr
    assert not (tmp_path / "made.jsonl").exists()
    assert "(default: data/arxiv; with --own data/own)" in " ".join(run("prepare", "--help").stdout.split())


def test_memory_is_bounded(tmp_path):
    """150 MB of records, most of them kept, in less than 60 MB above what the imports take."""
    with open(tmp_path / "s.jsonl", "w") as f:
        text = "".join(line(f"pX{i}", ["hep-th", "cs.LG", "math.AG"][i % 3], "word " * 200) + "\n" for i in range(1000))
        for k in range(110):
            f.write(text.replace("pX", f"p{k}."))
    code = ("import sys, resource, data_arxiv as d; before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
            "d.prepare(sys.argv[1], sys.argv[2]); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)")
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "s.jsonl", tmp_path / "out"], cwd=ROOT, capture_output=True, text=True,
                          check=True)
    assert (tmp_path / "s.jsonl").stat().st_size > 140e6 and int(done.stdout) < 60 * 1024


# ---- command line --------------------------------------------------------------------------------------------------

def test_ids_and_the_table(snapshot, prepared, tmp_path):
    done = run("ids", prepared, "--subset", "s3", "--split", "test")
    assert done.returncode == 0 and done.stdout.split() == d.load(prepared, "s3", "test")[0] and done.stderr == ""
    command = f"'{sys.executable}' '{ROOT}/data_arxiv.py' ids '{prepared}' --subset s3 --split train | head -1"
    pipe = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert pipe.stdout.split() == d.load(prepared, "s3", "train")[0][:1] and pipe.stderr == ""
    shown = run("prepare", snapshot, "--out", tmp_path / "out").stdout
    manifest = d.available(tmp_path / "out")
    for name, count in manifest["categories"].items():
        assert re.search(rf"^{name} +" + " +".join(f"{n:,}" for n in count.values()) + "$", shown, re.M), name
    for name, count in manifest["sets"].items():
        assert re.search(rf"^{name} +" + " +".join(f"{n:,}" for n in count.values()) + "$", shown, re.M), name
    assert "SYNTHETIC" in shown and manifest["source"]["synthetic"] is True
    for command in ("prepare", "ids", "synthesize"):
        assert run(command, "--help").returncode == 0


# ---- synthesize ----------------------------------------------------------------------------------------------------

def test_synthesize(snapshot, tmp_path, capsys):
    d.synthesize(tmp_path / "again.jsonl", records=4000, seed=3)
    assert "SYNTHETIC" in capsys.readouterr().err
    assert (tmp_path / "again.jsonl").read_bytes() == snapshot.read_bytes()
    lines = snapshot.read_text().splitlines()
    records = [json.loads(text) for text in lines]
    assert [json.dumps(r, separators=(",", ":")) for r in records] == lines     # the compact form
    ids = [r["id"] for r in records]
    assert ids == sorted(ids) and len(set(ids)) == 4000 and set(d.CONTROL) < set(ids)
    assert 560 < np.mean([len(r["abstract"]) for r in records]) < 700 and 1100 < np.mean([len(text) for text in lines]) < 2000
    assert max(len(row) for r in records for row in r["abstract"].split("\n")) <= 80
    assert any("$" in r["abstract"] for r in records) and any(len(r["categories"].split()) > 1 for r in records)
    words = {c: set(" ".join(r["abstract"] for r in records if r["categories"].split()[0].startswith(c)).split()) for c in d.CATEGORIES}
    for c in d.CATEGORIES:                                                      # each group has words that no other has
        assert len(words[c] - set().union(*(words[other] for other in d.CATEGORIES if other != c))) > 20
    with pytest.raises(ValueError, match="at least 100"):
        d.synthesize(tmp_path / "few.jsonl", records=9)


@needs_real
def test_synthetic_schema_is_the_real_one(snapshot):
    def shape(r):
        return {key: type(value) for key, value in r.items() if value is not None}

    real = [json.loads(text) for text in gzip.decompress(REAL.read_bytes()).splitlines()][:2000]
    made = [json.loads(text) for text in snapshot.open()]
    assert {tuple(r) for r in made} == {tuple(r) for r in real}                 # keys and their order
    types = {key: kind for r in real for key, kind in shape(r).items()}
    for r in made:
        assert all(types.get(key, str) is kind for key, kind in shape(r).items())
        assert [set(v) for v in r["versions"]] == [{"version", "created"}] * len(r["versions"]) and all(len(a) == 3 for a in r["authors_parsed"])
        for version in r["versions"]:
            assert time.strptime(version["created"], "%a, %d %b %Y %H:%M:%S GMT")


# ---- token batches -------------------------------------------------------------------------------------------------

def test_encode_adds_each_special_token_once():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "we": 2, "study": 3, "[UNK]": 4}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    assert tokenizer.encode("we study").ids == [0, 2, 3, 1]                     # as some tokenizers do on their own
    assert d.encode(tokenizer, "we study", 0, 1) == [0, 2, 3, 1]
    assert d.encode(tokenizer, "we study", 0, None) == [0, 2, 3] and d.encode(tokenizer, "", 0, 1) == [0, 1]


def test_batches_are_a_pure_function_of_the_step():
    for n, batch in [(100, 48), (96, 48), (7, 48), (1, 1)]:
        steps = math.ceil(n / batch)
        epochs = [[d.batch_rows(n, batch, 5, epoch * steps + i) for i in range(steps)] for epoch in range(3)]
        for rows in epochs:
            assert sorted(np.concatenate(rows)) == list(range(n)) and [len(r) for r in rows[:-1]] == [batch] * (steps - 1)
        if n > 10:
            assert len({tuple(np.concatenate(rows)) for rows in epochs}) == 3   # reshuffled each epoch
    late = d.batch_rows(100, 48, 5, 4)
    d.epoch_order.cache_clear()
    assert d.batch_rows(100, 48, 5, 4).tolist() == late.tolist() == np.random.default_rng([5, 1]).permutation(100)[48:96].tolist()
    assert d.batch_rows(100, 48, 6, 4).tolist() != late.tolist()
    late[:] = 0                                                                 # a caller's array is his own
    assert d.batch_rows(100, 48, 5, 4).any()


def test_collate():
    import torch
    ids, lengths = d.collate([[5, 6, 7], [8], [9, 10]])
    assert ids.tolist() == [5, 6, 7, 8, 9, 10] and lengths.tolist() == [3, 1, 2] and ids.dtype == lengths.dtype == torch.int64
    ids, lengths = d.collate([])                                                # a process whose slice of the batch is empty
    assert ids.shape == lengths.shape == (0,) and ids.dtype == lengths.dtype == torch.int64
