"""data_arxiv.py harvest, against a local server on loopback that behaves like arXiv's OAI-PMH interface, with and without faults."""
import contextlib
import gzip
import http.server
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path
from xml.sax.saxutils import escape

import pytest

import data_arxiv as d

os.environ["no_proxy"] = "127.0.0.1"                                            # the server here is reached directly
ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "data" / "hepth_1992_2001.jsonl.gz"
PHYSICS = ["hep-th", "hep-ph", "gr-qc"]
FAULTS = ("503", "503 date", "500", "reset", "cut", "chopped", "malformed", "html", "slow", "expired", "duplicate")


class Server(http.server.HTTPServer):
    """ListRecords as arXiv does it: sorted by (datestamp, id), pages of `size` records, tokens that hold the date reached and a number of
    rows to skip, an empty last token, granularity one day. `records`: {id: snapshot record}, update_date = datestamp; `deleted`:
    {id: (sets, datestamp)}. `fault(number of the request, parameters)` names a fault or None; every request is kept in `log`."""
    def __init__(self, records, size=100, fault=lambda number, parameters: None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.records, self.size, self.fault, self.deleted, self.log, self.served = records, size, fault, {}, [], []
        self.url = f"http://127.0.0.1:{self.server_port}/oai"

    def answer(self, q, duplicate):
        if q.get("verb") != "ListRecords":
            return error("badVerb", "Invalid verb provided")
        skip = 0
        if "resumptionToken" in q:
            if set(q) != {"verb", "resumptionToken"}:
                return error("badArgument", "resumptionToken is an exclusive argument")
            q = dict(urllib.parse.parse_qsl(urllib.parse.unquote(q["resumptionToken"])))
            skip = int(q.pop("skip"))
        elif q.get("metadataPrefix") != "arXivRaw" or not set(q) <= {"verb", "metadataPrefix", "from", "until", "set"}:
            return error("badArgument", "Unallowed parameter")
        if not re.fullmatch(r"\d{4}-\d\d-\d\d", q.get("from", "2020-01-01")) or q.get("from", "9") < "2005-09-16":
            return error("badArgument", "from")
        rows = [(r["update_date"], paper, r) for paper, r in self.records.items() if q["set"] in sets_of(r)]
        rows += [(date, paper, None) for paper, (sets, date) in self.deleted.items() if q["set"] in sets]
        rows = sorted((row for row in rows if row[0] >= q.get("from", "")), key=lambda row: row[:2])[skip:]
        if not rows:
            return error("noRecordsMatch", "nothing")
        page, token = rows[:self.size], ""
        if len(rows) > self.size:
            same = page[0][0] == page[-1][0]
            q = q if same else q | {"from": page[-1][0]}
            skip = skip + self.size if same else sum(row[0] == page[-1][0] for row in page)
            token = urllib.parse.quote(urllib.parse.urlencode(q | {"skip": skip}))
        midnight = (datetime.now(timezone.utc) + timedelta(days=1)).strftime("%Y-%m-%dT00:00:00Z")
        self.served += [row[1] for row in page]
        body = "".join(xml_of(*row) for row in page + (page[:7] + page if duplicate else []))
        return envelope(f"<ListRecords>{body}<resumptionToken expirationDate='{midnight}'>{token}</resumptionToken></ListRecords>")


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        q = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.path).query))
        server.log.append({"time": time.monotonic(), "agent": self.headers["User-Agent"], **q})
        with contextlib.suppress(OSError):                                      # the client hung up, or was killed
            self.reply(server.fault(len(server.log), q), q)

    def reply(self, fault, q):
        body = self.server.answer(q, fault == "duplicate").encode()
        if fault == "expired" and "resumptionToken" in q:
            body = error("badResumptionToken", "expired").encode()
        if fault in ("503", "503 date", "503 now", "500", "404"):
            self.send_response(int(fault[:3]))
            if fault.startswith("503"):
                later = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=1), usegmt=True)
                self.send_header("Retry-After", {"503": "1", "503 date": later, "503 now": "0"}[fault])
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if fault == "reset":
            return self.connection.close()
        if fault == "chopped":
            body = body[:len(body) * 2 // 3]
        if fault == "malformed":
            body = body.replace(b"</abstract>", b"& \x07</abstrac>", 1).replace(b"</error>", b"<error>")
        self.send_response(200)
        self.send_header("Content-Type", "text/html" if fault == "html" else "text/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "cut":
            self.wfile.write(body[:len(body) // 2])
            return self.connection.close()
        if fault == "slow":
            for byte in body:
                self.wfile.write(bytes([byte]))
                time.sleep(0.02)
        self.wfile.write(body)


def envelope(interior):
    date = f"<responseDate>{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ}</responseDate><request verb='ListRecords'>x</request>"
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<OAI-PMH xmlns="http://www.openarchives.org/OAI/2.0/">\n{date}\n{interior}</OAI-PMH>'


def error(code, text):
    return envelope(f"<error code='{code}'>{text}</error>")


def sets_of(record):
    archives = {c.split(".")[0] for c in record["categories"].split()}
    return {archive if archive in ("cs", "q-bio", "math") else f"physics:{archive}" for archive in archives}


def xml_of(date, paper, r):
    header = f"<identifier>oai:arXiv.org:{paper}</identifier><datestamp>{date}</datestamp>"
    if r is None:
        return f"<record><header status='deleted'>{header}</header></record>"
    versions = "".join(f'<version version="{v["version"]}"><date>{re.sub(r", (?=[0-9] )", ", 0", v["created"])}</date><size>12kb</size>'
                       "<source_type>D</source_type></version>" for v in r["versions"])
    keys = ("title", "authors", "categories", "comments", "report-no", "journal-ref", "doi", "license", "abstract")
    rest = "".join(f"<{key}>{escape(r[key])}</{key}>\n" for key in keys if r[key] is not None)
    return (f'<record><header>{header}<setSpec>x</setSpec></header><metadata><arXivRaw xmlns="http://arxiv.org/OAI/arXivRaw/"><id>{paper}</id>'
            f"<submitter>{escape(r['submitter'] or '')}</submitter>{versions}{rest}<proxy>p</proxy><msc-class>81T30</msc-class></arXivRaw>"
            "</metadata></record>\n")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """{id: record} as a harvest writes them: made-up records, 5,000 of them with a primary category in CATEGORIES."""
    path = tmp_path_factory.mktemp("corpus") / "made_up.jsonl"
    d.synthesize(path, records=5600, seed=7)
    records, wanted = {}, 0
    for r in map(json.loads, path.open()):
        wanted += d.group_of(r["categories"].split()[0]) is not None
        if wanted <= 5000:
            records[r["id"]] = r | {"update_date": max(r["update_date"], "2005-09-16"), "authors_parsed": []}
    return records


@contextlib.contextmanager
def serving(records, **kwargs):
    server = Server(dict(records), **kwargs)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def expected(records, categories=PHYSICS, until="9999"):
    rows = [r for _, r in sorted(records.items()) if d.group_of(r["categories"].split()[0]) in categories and d.first_submitted(r) <= until]
    return "".join(json.dumps(r, separators=(",", ":")) + "\n" for r in rows)


def few(corpus, n=400):
    return {paper: corpus[paper] for paper in sorted(corpus)[::len(corpus) // n]}


def harvest(server, out, categories=PHYSICS, **kwargs):
    return d.harvest(out, categories, base=server.url, **{"pause": 0.0, "timeout": 5.0, **kwargs})


# ---- what is written -----------------------------------------------------------------------------------------------

def test_undisturbed(corpus, tmp_path):
    """Record for record what the server holds; cross-lists once; another primary category not at all; then prepare."""
    with serving(corpus, size=300) as server:
        written = harvest(server, tmp_path / "s.jsonl")
    assert (tmp_path / "s.jsonl").read_text() == expected(corpus)
    assert len(server.served) > len(set(server.served)) > written["records"] > 2000 and written["cross-lists"] > 100
    assert all("nanophys" in request["agent"] and "@" not in request["agent"] for request in server.log)
    manifest = d.prepare(tmp_path / "s.jsonl", tmp_path / "out")
    source = manifest["sources"]["snapshot"]
    assert source["kind"] == "harvest" and source["date"] == f"{datetime.now(timezone.utc):%Y-%m-%d}" and source["categories"] == PHYSICS
    assert set(manifest["sets"]) == {f"s{i}" for i in range(1, 10)} and manifest["categories"]["cs"]["records"] == 0
    whole = d.prepare(write(tmp_path / "whole.jsonl", corpus), tmp_path / "whole")
    assert whole["sources"]["snapshot"]["kind"] == "snapshot"
    for split in d.SPLITS:                                                      # the same splits as from a snapshot
        assert d.load(tmp_path / "out", "s3", split) == d.load(tmp_path / "whole", "s3", split)


def write(path, records):
    path.write_text("".join(json.dumps(r, separators=(",", ":")) + "\n" for _, r in sorted(records.items())))
    return path


@pytest.mark.skipif(not REAL.exists(), reason="needs the real abstracts in ../shared/data")
def test_real_records_come_back_as_they_are(tmp_path):
    """Real texts through XML and back: the schema, and every field but the two that arXivRaw does not have."""
    real = [json.loads(text) for text in gzip.open(REAL)][::100]
    for version in (v for r in real for v in r["versions"]):
        version["created"] = version["created"].replace(", 0", ", ")            # a few of the oldest: Fri, 02 Apr 93
    served = {r["id"]: r | {"update_date": max(r["update_date"], "2005-09-16"), "authors_parsed": []} for r in real}
    with serving(served) as server:
        harvest(server, tmp_path / "s.jsonl", ["hep-th"])
    ours = [json.loads(text) for text in (tmp_path / "s.jsonl").open()]
    assert [list(r) for r in ours] == [list(r) for r in real]
    assert ours == list(served.values())


def test_until_goes_by_the_first_version(corpus, tmp_path):
    records = few(corpus)
    old = next(r for r in records.values() if r["categories"].startswith("hep-th") and d.first_submitted(r) < "2005")
    records[old["id"]] = old | {"update_date": "2024-05-01"}                    # revised late: it stays
    with serving(records) as server:
        harvest(server, tmp_path / "s.jsonl", until="2010-06-30")
        assert (tmp_path / "s.jsonl").read_text() == expected(records, until="2010-06-30")
        assert f'"id":"{old["id"]}"' in (tmp_path / "s.jsonl").read_text()
        before = len(server.served)
        harvest(server, tmp_path / "s.jsonl", until="2015-06-30")               # a later limit does not need the old records again
        assert (tmp_path / "s.jsonl").read_text() == expected(records, until="2015-06-30") and len(server.served) == before
        assert all("until" not in request for request in server.log)


def test_second_run_fetches_only_what_changed(corpus, tmp_path):
    records, today = few(corpus), f"{datetime.now(timezone.utc):%Y-%m-%d}"
    with serving(records) as server:
        harvest(server, tmp_path / "s.jsonl")
        th = [r for r in records.values() if r["categories"].startswith("hep-th")]
        server.records[th[0]["id"]] = th[0] | {"update_date": today, "title": "A new title"}
        server.records["9901.00001"] = th[1] | {"id": "9901.00001", "update_date": today}
        server.records[th[2]["id"]] = th[2] | {"update_date": today, "categories": "math.AG hep-th"}       # moved out
        del server.records[th[3]["id"]]
        server.deleted[th[3]["id"]] = {"physics:hep-th"}, today
        server.deleted["0001.00001"] = {"physics:hep-th"}, today                # never seen here
        server.served.clear(), server.log.clear()
        harvest(server, tmp_path / "s.jsonl")
        assert (tmp_path / "s.jsonl").read_text() == expected(server.records)
        assert {"0001.00001", *(th[i]["id"] for i in (0, 2, 3)), "9901.00001"} >= set(server.served) and len(server.served) < 12
        assert all(request["from"] == today for request in server.log)
        server.records[th[0]["id"]] |= {"title": "And another on the same day"}
        harvest(server, tmp_path / "s.jsonl")
        assert (tmp_path / "s.jsonl").read_text() == expected(server.records)
        harvest(server, tmp_path / "s.jsonl", PHYSICS + ["q-bio"])              # one category more
        assert {r.split(".")[0] for r in re.findall(r'"categories":"([^ "]*)', (tmp_path / "s.jsonl").read_text())} == {*PHYSICS, "q-bio"}


# ---- manners -------------------------------------------------------------------------------------------------------

def test_pauses_and_retry_after(corpus, tmp_path):
    """A pause before every request; a storm of 503 is waited out, each as long as it asks, and never counts as a failure."""
    faults = {2: "503", 3: "503 date", 4: "503", **{number: "503 now" for number in range(6, 18)}}
    with serving(few(corpus), size=20, fault=lambda number, q: faults.get(number)) as server:
        harvest(server, tmp_path / "s.jsonl", ["gr-qc"], pause=0.1)
    times = [request["time"] for request in server.log]
    gaps = [b - a for a, b in zip(times, times[1:])]
    assert min(gaps) >= 0.1 and gaps[1] >= 1 and gaps[3] >= 1 and gaps[2] >= 0.1      # an HTTP date has whole seconds only
    assert all(server.log[i].get("resumptionToken") == server.log[1].get("resumptionToken") for i in (2, 3, 4))
    assert 25 < d.seconds(format_datetime(datetime.now(timezone.utc) + timedelta(seconds=30), usegmt=True)) < 31
    assert d.seconds("120") == 120 and d.seconds("soon") is None and d.seconds(None) is None


def test_failures_back_off_and_end_in_one_sentence(corpus, tmp_path):
    out = tmp_path / "s.jsonl"
    with serving(few(corpus), size=50, fault=lambda number, q: "500" if number > 4 else None) as server:
        with pytest.raises(ValueError, match="10 failures in a row, the last: HTTP 500 .* run the same command later"):
            harvest(server, out, pause=0.001)
        gaps = [b["time"] - a["time"] for a, b in zip(server.log[4:], server.log[5:])]
        assert len(gaps) == 9 and all(gap > 0.001 * 2 ** (i + 1) for i, gap in enumerate(gaps)) and not out.exists()
        done = subprocess.run([sys.executable, ROOT / "data_arxiv.py", "harvest", "--base-url", server.url, "--pause", "0", "--out", out],
                              capture_output=True, text=True)
        assert done.returncode == 2 and "Traceback" not in done.stderr and "error: http://127" in done.stderr
        server.fault = lambda number, q: None
        asked = len(server.log)
        harvest(server, out)                                                    # goes on with the page that failed
        assert server.log[asked].get("resumptionToken") == server.log[4]["resumptionToken"]
        assert out.read_text() == expected(server.records)


def test_refusals(corpus, tmp_path):
    with serving(few(corpus), fault=lambda number, q: "404") as server, pytest.raises(ValueError, match="HTTP 404 .*: is the base URL right"):
        harvest(server, tmp_path / "s.jsonl")
    with serving({}) as server, pytest.raises(ValueError, match="2024-08-22"):
        harvest(server, tmp_path / "s.jsonl", until="August")
    with serving(few(corpus)) as server:
        server.answer = lambda q, duplicate: error("badArgument", "Set does not exist")
        with pytest.raises(ValueError, match="the server refuses .* badArgument: Set does not exist"):
            harvest(server, tmp_path / "s.jsonl")
    (tmp_path / "kaggle.json").write_text("precious")
    with serving(few(corpus)) as server, pytest.raises(ValueError, match="kaggle.json exists and is no harvest"):
        harvest(server, tmp_path / "kaggle.json")
    assert (tmp_path / "kaggle.json").read_text() == "precious"
    with open(tmp_path / "s.jsonl.journal") as f:
        d.lock(f)
        with serving({}) as server, pytest.raises(ValueError, match="another harvest is running"):
            harvest(server, tmp_path / "s.jsonl")


# ---- faults --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault(corpus, tmp_path, fault):
    """The fault on the 2nd and the 4th request: nothing is lost or doubled."""
    with serving(few(corpus), size=60, fault=lambda number, q: fault if number in (2, 4) else None) as server:
        harvest(server, tmp_path / "s.jsonl", timeout=0.2)
    assert (tmp_path / "s.jsonl").read_text() == expected(server.records)


def test_dead_token_goes_on_by_the_datestamp(corpus, tmp_path):
    records = few(corpus)
    with serving(records, size=20, fault=lambda number, q: "expired" if number == 5 else None) as server:
        harvest(server, tmp_path / "s.jsonl", ["hep-th"])
    assert (tmp_path / "s.jsonl").read_text() == expected(records, ["hep-th"])
    dates = sorted(r["update_date"] for r in records.values() if "physics:hep-th" in sets_of(r))
    assert server.log[5] == server.log[5] | {"from": dates[4 * 20 - 1], "set": "physics:hep-th"} and "resumptionToken" not in server.log[5]
    with serving(records, size=20, fault=lambda number, q: "expired") as server, pytest.raises(ValueError, match="badResumptionToken"):
        harvest(server, tmp_path / "never.jsonl", ["hep-th"])                   # a server that never honours a token: no endless loop


def test_dead_token_of_a_second_run(corpus, tmp_path):
    """The second run goes on from where it is itself, not from where the first had come to."""
    records = few(corpus)
    with serving(records, size=20) as server:
        harvest(server, tmp_path / "s.jsonl", ["hep-th"])
        journal = tmp_path / "s.jsonl.journal"                                  # as if the first run had begun in 2015
        journal.write_text(re.sub(r'"since":"[^"]*"', '"since":"2015-01-01"', journal.read_text()))
        late = sorted(p for p, r in records.items() if r["update_date"] > "2015-06" and r["categories"].split()[0] == "hep-th")
        for paper in late:
            server.records[paper] = records[paper] | {"title": "Changed in the meantime"}
        server.log.clear()
        server.size, server.fault = 8, lambda number, q: "expired" if number == 2 else None
        harvest(server, tmp_path / "s.jsonl", ["hep-th"])
        dates = sorted(r["update_date"] for r in records.values() if r["update_date"] >= "2015" and "physics:hep-th" in sets_of(r))
        assert server.log[0]["from"] == "2015-01-01" and server.log[2]["from"] == dates[7] < "2019" and len(late) > 20
        assert (tmp_path / "s.jsonl").read_text() == expected(server.records, ["hep-th"])


def test_token_that_has_expired_is_not_sent(corpus, tmp_path):
    """The day after a kill: the journal's token is dead, and known to be."""
    with serving(few(corpus), size=20, fault=lambda number, q: "404" if number == 3 else None) as server:
        with pytest.raises(ValueError):
            harvest(server, tmp_path / "s.jsonl", ["hep-th"])
        journal = tmp_path / "s.jsonl.journal"
        text = journal.read_text()
        journal.write_text(re.sub(r'"expires":"[^"]*"', '"expires":"2020-01-01T00:00:00Z"', text))
        harvest(server, tmp_path / "s.jsonl", ["hep-th"])
        assert "resumptionToken" not in server.log[3] and server.log[3]["from"] >= "2005-09-16"
    assert (tmp_path / "s.jsonl").read_text() == expected(server.records, ["hep-th"])


def test_journal_cut_at_every_place(corpus, tmp_path):
    """A kill can cut the journal anywhere: from wherever it is cut, the harvest ends with the same file."""
    records = few(corpus, 60)
    with serving(records, size=10) as server:
        harvest(server, tmp_path / "s.jsonl", ["gr-qc", "hep-th"])
        journal, whole = tmp_path / "s.jsonl.journal", (tmp_path / "s.jsonl.journal").read_bytes()
        for cut in [*range(0, len(whole), len(whole) // 40), len(whole) - 1]:
            journal.write_bytes(whole[:cut])
            (tmp_path / "s.jsonl").unlink()
            harvest(server, tmp_path / "s.jsonl", ["gr-qc", "hep-th"])
            assert (tmp_path / "s.jsonl").read_text() == expected(records, ["gr-qc", "hep-th"])
            with journal.open("rb") as f:
                assert d.read_journal(f)[3] == journal.stat().st_size           # whole again, to its end


def test_killed_ten_times_under_faults(corpus, tmp_path):
    """5,000 records, a fault on every fourth request, kill -9 ten times: the bytes of the undisturbed harvest, and prepare on them."""
    draw = random.Random(1)
    faults = [draw.choice(FAULTS) if draw.random() < 0.25 else None for _ in range(1000)]
    out, kills = tmp_path / "s.jsonl", 0
    with serving(corpus, size=80, fault=lambda number, q: faults[number]) as server:
        command = [sys.executable, ROOT / "data_arxiv.py", "harvest", "--categories", *d.CATEGORIES, "--base-url", server.url, "--out", out,
                   "--pause", "0.005", "--timeout", "0.2"]
        while kills < 10:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            target = len(server.log) + draw.randint(2, 8)
            while len(server.log) < target and process.poll() is None:
                time.sleep(0.005)
            time.sleep(draw.random() * 0.03)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL, "it was to be killed on the way"
            kills += 1
            assert not out.exists()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        target = len(server.log) + 2
        while len(server.log) < target:
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)                                      # Ctrl-C
        shown = process.communicate()[1]
        assert process.returncode == 130 and "the same command" in shown and "Traceback" not in shown
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    with serving(corpus) as undisturbed:
        harvest(undisturbed, tmp_path / "undisturbed.jsonl", d.CATEGORIES)
    assert out.read_bytes() == (tmp_path / "undisturbed.jsonl").read_bytes() and out.read_text() == expected(corpus, d.CATEGORIES)
    assert out.read_bytes().count(b"\n") == 5000
    assert sorted(p.name for p in tmp_path.glob("s.jsonl*")) == ["s.jsonl", "s.jsonl.harvest.json", "s.jsonl.journal"]
    done = subprocess.run([sys.executable, ROOT / "data_arxiv.py", "prepare", out, "--out", tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 0 and "is a harvest of" in done.stdout and "not version 193" in done.stdout
    assert set(d.available(tmp_path / "out")["sets"]) == set(d.SETS)
