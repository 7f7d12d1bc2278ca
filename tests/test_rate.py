"""eval.py rate in a real headless Chromium: rate by keyboard, reload, save, collect; hostile completions. And the statistics."""
import base64
import json
import math
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

import eval as nano_eval

HOSTILE = ["<img src=x onerror=\"window.hacked=1\">", "</script><script>window.hacked=1</script>", "<!--<script>", "<svg onload=window.hacked=1>",
           "$\\frac{<img src=x onerror=window.hacked=1>}{\\mathrm{<script>window.hacked=1</script>}}$", "<a href=\"javascript:window.hacked=1\">click</a>",
           "\" autofocus onfocus=\"window.hacked=1", "<style>body{display:none}</style>", "$" + "{" * 30000 + "$", "$\\constructor \\__proto__ \\toString{x}$",
           "<iframe srcdoc=\"<script>parent.hacked=1</script>\"></iframe>", "\u2028 \u0000 \U0001f600"]


def write_completions(path, completion_of, models=("base", "s1-all"), n=12):
    with open(path, "w") as file:
        for model in models:
            for i in range(n):
                file.write(json.dumps({"id": f"id{i}", "prompt": f"Prompt {i}.", "truth": f"The truth {i}.", "completion": completion_of(model, i),
                                       "model": model, "settings": {}}) + "\n")
    return path


class Browser:
    """Chromium through chromedriver's HTTP interface (W3C WebDriver)."""

    def __init__(self, profile):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.url, self.downloads = f"http://127.0.0.1:{port}", profile / "downloads"
        for _ in range(100):
            try:
                urllib.request.urlopen(self.url + "/status").read()
                break
            except OSError:
                time.sleep(0.1)
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
                 "--disable-sync", "--disable-quic", "--disable-dev-shm-usage", "--window-size=1000,1300", f"--user-data-dir={profile / 'profile'}"]
        options = {"args": flags, "prefs": {"download.default_directory": str(self.downloads)}}
        self.url += "/session/" + self("", capabilities={"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options,
                                                                          "goog:loggingPrefs": {"browser": "ALL"}}}, path="/session")["sessionId"]

    def __call__(self, what, method="POST", path=None, **body):
        request = urllib.request.Request(self.url + (f"/{what}" if path is None else path), json.dumps(body).encode() if method == "POST" else None,
                                         {"Content-Type": "application/json"}, method=method)
        try:
            return json.loads(urllib.request.urlopen(request, timeout=60).read())["value"]
        except urllib.error.HTTPError as e:
            raise AssertionError(e.read().decode()[:500]) from None

    def open(self, path):
        self("url", url=Path(path).resolve().as_uri())

    def js(self, script):
        return self("execute/sync", script="return " + script, args=[])

    def type(self, *keys):
        strokes = [{"type": kind, "value": k} for k in keys for kind in ("keyDown", "keyUp")]
        self("actions", actions=[{"type": "key", "id": "keyboard", "actions": strokes}])

    def click(self, selector):
        """A real click: a download wants one."""
        found = self("element", using="css selector", value=selector)
        self(f"element/{next(iter(found.values()))}/click")

    def screenshot(self, path):
        Path(path).write_bytes(base64.b64decode(self("screenshot", "GET")))

    def close(self):
        try:
            self("", "DELETE", path="")
        finally:
            self.driver.terminate()
            self.driver.wait()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs Chromium and its driver (Debian's packages chromium and chromium-driver)")
    b = Browser(tmp_path_factory.mktemp("chromium"))
    yield b
    b.close()


def page_of(path, *arguments):
    nano_eval.main(["rate", str(path), *map(str, arguments)])
    return path.with_suffix(".rate.html")


def set_value(browser, name, value):
    browser.js(f"(() => {{ const e = document.getElementById('{name}'); e.value = {json.dumps(str(value))}; e.dispatchEvent(new Event('input')); }})()")


def name_rater(browser, rater):
    set_value(browser, "rater", rater)


def saved(browser, rater):
    """Type the name, save, -> the file that the browser downloads."""
    name_rater(browser, rater)
    browser.click("#save")
    for _ in range(100):
        done = list(browser.downloads.glob(f"ratings-{rater}-*.json"))
        if done:
            return done[0]
        time.sleep(0.1)
    raise AssertionError("nothing was downloaded")


TAB = "\ue004"


def test_rate_reload_save_collect(browser, tmp_path, capsys):
    """Keyboard rating of one abstract; a reload keeps it; the saved files of two raters become the table, by model."""
    path = write_completions(tmp_path / "c.jsonl", lambda m, i: f" Words of {m}, {i}, are hidden.".replace("base", "B").replace("s1-all", "S"))
    html = page_of(path, "--samples", 3)
    assert not any(name in html.read_text() for name in ("s1-all", ">base", "\"base", "id0", "id1\"", ".jsonl"))           # blind
    key = json.loads(next(tmp_path.glob("c.*.key.json")).read_text())
    assert len(key) == 9 and [key[f"{n}/{j}"]["model"] for n in range(3) for j in range(3)] != ["truth", "base", "s1-all"] * 3
    browser.open(html)
    assert browser.js("document.querySelectorAll('section').length") == 9
    assert browser.js("document.querySelectorAll('section input[type=number]').length") == 54
    browser.click("#save")
    assert "name first" in browser.js("document.getElementById('message').textContent") and not browser.downloads.exists()
    browser.js("document.getElementById('0/0/grammar').focus()")
    browser.type("7", TAB, "1", "0", TAB, "1", TAB, TAB, "5")             # seven, ten, one; accuracy is left out; five
    assert browser.js("document.getElementById('count').textContent") == "4 of 54"
    browser.open(html)
    assert browser.js("document.getElementById('count').textContent") == "4 of 54"
    assert [browser.js(f"document.getElementById('0/0/{c}').value") for c in nano_eval.CRITERIA] == ["7", "10", "1", "", "5", ""]
    browser.js("document.getElementById('1/0/grammar').focus()")
    browser.type("3", TAB, "1", "1")                          # eleven is no mark
    assert browser.js("document.getElementById('count').textContent") == "5 of 54"
    assert browser.js("document.getElementById('1/0/coherence').matches(':invalid')")
    name_rater(browser, "Ada")
    browser.click("#save")
    assert "1 to 10" in browser.js("document.getElementById('message').textContent") and not browser.downloads.exists()
    set_value(browser, "1/0/coherence", "")
    first = saved(browser, "Ada")
    content = json.loads(first.read_text())
    assert content["rater"] == "Ada"
    assert content["ratings"] == {"0/0": {"grammar": 7, "coherence": 10, "relevance": 1, "creativity": 5}, "1/0": {"grammar": 3}}
    for section, mark in ((0, 8), (1, 4), (2, 6)):
        set_value(browser, f"0/{section}/overall", mark)
    browser.open(html)
    assert browser.js("document.getElementById('rater').value") == "Ada"
    second = saved(browser, "Emmy")
    capsys.readouterr()
    nano_eval.main(["rate", str(path), "--collect", str(first), str(second)])
    report = json.loads((tmp_path / "c.rating.json").read_text())
    means = {r["name"]: r["measures"] for r in report["rows"]}
    assert report["raters"] == ["Ada", "Emmy"] and sorted(means) == ["base", "s1-all", "truth"]
    for j, mark in enumerate((8, 4, 6)):
        assert means[key[f"0/{j}"]["model"]]["rating overall"]["mean"] == mark
    assert means[key["0/0"]["model"]]["rating coherence"]["mean"] == 10 and report["agreement"]["grammar"] == 1          # both files hold Ada's marks
    assert "agreement" in capsys.readouterr().out


def test_hostile_completions(browser, tmp_path):
    """Nothing in a completion becomes an element, runs, or loads; all of it is shown as its source; the page stays usable."""
    path = write_completions(tmp_path / "h.jsonl", lambda m, i: HOSTILE[i] if m == "base" else f"Fine {i}.")
    html = page_of(path, "--samples", 0)
    key = json.loads(next(tmp_path.glob("h.*.key.json")).read_text())
    browser.open(html)
    shown = browser.js("[...document.querySelectorAll('section .text')].map(e => e.textContent)")
    assert len(shown) == 36
    for place, text in enumerate(shown):
        item = key[f"{place // 3}/{place % 3}"]
        if item["model"] == "base":
            assert text.split() == HOSTILE[int(item["id"][2:])].replace("\0", "").split()
    allowed = "main,h2,h3,pre,section,label,input,br"
    foreign = f"!e.matches('{allowed}') || [...e.attributes].some(a => /^(on|src|href|style)/.test(a.name))"
    assert browser.js(f"[...document.querySelectorAll('main *')].filter(e => {foreign}).length") == 0
    set_value(browser, "11/2/overall", 4)
    assert browser.js("document.getElementById('count').textContent") == "1 of 216"
    assert browser.js("window.hacked === undefined") and browser.js("document.scripts.length") == 1
    browser.js("document.querySelector('main').insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hacked=1\">')")
    time.sleep(0.3)
    assert browser.js("window.hacked === undefined")          # even if HTML did get in, the policy would not let it run
    assert [e["message"] for e in browser("se/log", type="browser") if e["level"] == "SEVERE" and "Content Security Policy" not in e["message"]
            and "favicon" not in e["message"]] == []


def test_the_page_needs_no_network_and_is_the_same_again(tmp_path):
    path = write_completions(tmp_path / "c.jsonl", lambda m, i: "x")
    first = page_of(path).read_text()
    assert page_of(path).read_text() == first and page_of(path, "--seed", 1).read_text() != first
    assert "default-src 'none'" in first and "http:" not in first and "https:" not in first


# ------------------------------------------------------------------------------------------------------------- statistics


def test_krippendorff():
    """Krippendorff's own example for interval data (Computing Krippendorff's alpha-reliability, 2011): 0.849."""
    nan = math.nan
    example = np.array([[1, 2, 3, 3, 2, 1, 4, 1, 2, nan, nan, nan], [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, nan, 3],
                        [nan, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, nan], [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, nan]])
    assert nano_eval.krippendorff_alpha(example) == pytest.approx(0.849, abs=5e-4)
    assert nano_eval.krippendorff_alpha(np.array([[1., 5, 9], [1, 5, 9]])) == 1
    assert nano_eval.krippendorff_alpha(np.array([[1., nan], [nan, 3]])) is None
    rng = np.random.default_rng(0)
    assert abs(nano_eval.krippendorff_alpha(rng.integers(1, 11, (3, 4000)).astype(float))) < 0.03


def test_collect(tmp_path, capsys):
    """Means over abstracts of the means over raters, their intervals, and the place in the table."""
    path = write_completions(tmp_path / "c.jsonl", lambda m, i: m)
    page_of(path)
    key_file = next(tmp_path.glob("c.*.key.json"))
    key, page = json.loads(key_file.read_text()), key_file.name.split(".")[1]
    rng, level = np.random.default_rng(1), {"truth": 8, "s1-all": 5, "base": 2}
    marks, files = {}, []
    for rater in ("a", "b", "c"):
        ratings = {item: {"overall": int(level[v["model"]] + rng.integers(-1, 3))} for item, v in key.items() if rater != "c" or item < "5"}
        for item, r in ratings.items():
            marks.setdefault((key[item]["model"], key[item]["id"]), []).append(r["overall"])
        files.append(tmp_path / f"{rater}.json")
        files[-1].write_text(json.dumps({"page": page, "rater": rater, "ratings": ratings}))
    nano_eval.main(["rate", str(path), "--collect", *map(str, files)])
    report = json.loads((tmp_path / "c.rating.json").read_text())
    for row in report["rows"]:
        values = np.array([np.mean(v) for (model, _), v in marks.items() if model == row["name"]])
        overall = row["measures"]["rating overall"]
        assert overall["mean"] == pytest.approx(values.mean()) and overall["low"] < values.mean() < overall["high"]
        assert overall["n"] == 12 == len(values)
        assert overall["ratings"] == sum(len(v) for (model, _), v in marks.items() if model == row["name"])
    assert report["agreement"]["overall"] > 0.8 and report["agreement"]["grammar"] is None
    table = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith(("truth", "s1-all", "base"))]
    assert table == ["truth", "s1-all", "base"]


def test_refusals(tmp_path, capsys):
    path = write_completions(tmp_path / "c.jsonl", lambda m, i: m)
    page_of(path)
    page = next(tmp_path.glob("c.*.key.json")).name.split(".")[1]

    def error(*contents):
        files = []
        for i, content in enumerate(contents):
            files.append(str(tmp_path / f"r{i}.json"))
            Path(files[-1]).write_text(content if isinstance(content, str) else json.dumps(content))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            nano_eval.main(["rate", str(path), "--collect", *files])
        assert stop.value.code == 2 and not (tmp_path / "c.rating.json").exists()
        return capsys.readouterr().err.strip().splitlines()[-1]
    good = {"page": page, "rater": "a", "ratings": {"0/0": {"overall": 3}}}
    assert "r0.json" in error("{") and "what the rating page saved" in error({"rater": 1}) and "r0.json" in error([1])
    assert "what the rating page saved" in error(good | {"page": "../../etc"}) and "what the rating page saved" in error(good | {"page": 7})
    assert "key" in error(good | {"page": "0" * 12})
    for marks in ({"overall": 11}, {"overall": "9"}, {"charm": 3}, {"overall": True}, 7):
        assert "r0.json" in error(good | {"ratings": {"0/0": marks}})
    assert "item 99/0" in error(good | {"ratings": {"99/0": {"overall": 3}}})
    assert "another file by the rater a" in error(good, good) and "hold no rating yet" in error(good | {"ratings": {}})
    write_completions(path, lambda m, i: m, ["base"], 2)
    with open(path, "a") as file:
        file.write(json.dumps({"id": "other", "prompt": "", "truth": "", "completion": "", "model": "s1-all", "settings": {}}) + "\n")
    with pytest.raises(SystemExit):
        nano_eval.main(["rate", str(path)])
    assert "no abstract" in capsys.readouterr().err
