"""`sfc serve`: who is answered, what experiments do and leave behind, and the page in Chromium."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from circuits.cli.commands.pictures.serve import ServeCommand
from circuits.cli.live.app import listen
from circuits.cli.live.experiments import Experiments
from circuits.cli.live.jobs import Worker
from circuits.cli.live.serving import make_server, open_run
from circuits.report.page import report_html
from sae import _files
from tests.graphs.browser import Page

TOKEN = "a-token-that-nobody-knows"
PROMPT = "the man near the girl"
REFUSALS = [
    ({"x-sfc-token": ""}, 401),
    ({"x-sfc-token": TOKEN[:-1]}, 401),
    ({"x-sfc-token": b"\xe9"}, 401),
    ({"host": "evil.example"}, 421),
    ({"host": "127.0.0.1:1"}, 421),
    ({"origin": "http://evil.example"}, 403),
    ({"origin": "null"}, 403),
    ({"origin": "http://127.0.0.1:1"}, 403),
    ({"sec-fetch-site": "cross-site"}, 403),
    ({"sec-fetch-site": "same-site"}, 403),
]


@dataclass
class Served:
    """A server of a copy of the tiny run."""

    run: Path
    experiments: Experiments
    worker: Worker
    port: int
    client: TestClient

    def job(self, kind: str, **request: Any) -> list[dict[str, Any]]:
        """The events of a job."""
        return self.events(self.begin(kind, **request))

    def begin(self, kind: str, **request: Any) -> str:
        answer = self.client.post("/jobs", json={"kind": kind, **request})
        assert answer.status_code == 200, answer.text
        return answer.json()["id"]

    def events(self, id: str) -> list[dict[str, Any]]:
        lines = self.client.get(f"/jobs/{id}").text.splitlines()
        return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]

    def edit(self, **request: Any) -> dict[str, dict[str, Any]]:
        """The last event of each kind of an edit."""
        given = {"prompt": PROMPT, "answer": 30, "against": 31, "features": ["resid_1/3"], "new_tokens": 4, **request}
        return {event["kind"]: event for event in self.job("edit", **given)}


@pytest.fixture(scope="module")
def served(tmp_path_factory, run_folder, text_file) -> Iterator[Served]:
    run = tmp_path_factory.mktemp("served") / "near"
    shutil.copytree(run_folder, run)
    experiments = open_run(ServeCommand(circuit=run), str(text_file), 3)
    worker, listening = Worker(experiments.model), listen(0)
    port = listening.getsockname()[1]
    server = make_server(experiments, worker, token=TOKEN, port=port)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    client = TestClient(server.config.app, base_url=f"http://127.0.0.1:{port}", headers={"x-sfc-token": TOKEN})
    yield Served(run, experiments, worker, port, client)
    server.should_exit = True
    thread.join(20)
    worker.close()


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- who is answered


@pytest.mark.parametrize(("headers", "status"), REFUSALS)
def test_strangers_are_refused(served, headers, status):
    for method, path in (("GET", "/run"), ("POST", "/jobs"), ("GET", "/live.js")):
        answer = served.client.request(method, path, headers=headers)
        assert answer.status_code == status and "traceback" not in answer.text.lower()


def test_the_token_becomes_a_cookie(served):
    fresh = TestClient(served.client.app, base_url=f"http://127.0.0.1:{served.port}", follow_redirects=False)
    assert fresh.get("/?token=wrong").status_code == 401
    answer = fresh.get("/", params={"token": TOKEN})
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    assert {"httponly", "samesite=strict"} <= {part.strip().lower() for part in answer.headers["set-cookie"].split(";")}
    page = fresh.get("/")
    assert page.status_code == 200 and TOKEN not in page.text
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
    assert page.headers["x-content-type-options"] == "nosniff" and "access-control-allow-origin" not in page.headers


@pytest.mark.parametrize(
    "path", ["/config.json", "/../config.json", "/..%2fconfig.json", "/live.js/../../near/config.json", "/edits/x.json"]
)
def test_no_path_leads_to_a_file(served, path):
    assert served.client.get(path).status_code == 404
    assert served.client.get(f"/circuits/{path}").status_code in (400, 404)


def test_requests_that_are_none(served):
    def refused(**request: Any) -> str:
        answer = served.client.post("/jobs", **request)
        assert answer.status_code == 400
        return answer.json()["error"]

    assert "content-type" in refused(content=b"{}")
    assert "no JSON object" in refused(content=b"[" * 5000, headers={"content-type": "application/json"})
    assert "unknown kind 'shell'" in refused(json={"kind": "shell"})
    assert "prompt" in refused(json={"kind": "prompt"})
    assert "operation" in refused(
        json={"kind": "edit", "prompt": "a", "answer": 1, "against": 2, "features": ["a"], "operation": "rm"}
    )
    too_long = served.client.post("/jobs", json={"kind": "prompt", "prompt": "a " * 2**20})
    assert too_long.status_code == 413


def test_a_port_in_use_and_runs_that_are_none(sfc, tmp_path, run_folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = sfc("serve", run_folder, "--port", port)
    assert result.status == 2 and f"port {port} is in use: give another --port" in result.err
    (tmp_path / "empty").mkdir()
    for folder, reason in (("empty", "no circuit in"), ("absent", "no circuit in")):
        result = sfc("serve", tmp_path / folder, "--port", 0)
        assert result.status == 2 and reason in result.err and len(result.err.splitlines()) == 1
    shutil.copytree(run_folder / "circuit", tmp_path / "empty" / "circuit")
    result = sfc("serve", tmp_path / "empty", "--port", 0)
    assert result.status == 2 and result.err.splitlines()[-1].startswith("sfc: no autoencoder in")
    result = sfc("serve", run_folder, "--port", 0, "--text", tmp_path / "absent.txt")
    assert result.status == 2 and "absent.txt" in result.err


# ---- experiments


def test_features_of_a_prompt_are_those_of_the_autoencoders(served):
    prompt, features, _ = served.job("prompt", prompt=PROMPT)
    model, saes = served.experiments.model, served.experiments.circuit.saes
    tokens = model.tokenize_prompts([PROMPT])
    run = model.run(tokens, capture=list(saes))
    assert prompt["tokens"] == model.token_strings(tokens.input_ids[0])
    shares = run.logits[0, -1].softmax(-1)
    assert prompt["next"][0]["before"] == pytest.approx(shares.max().item(), abs=1e-5)
    assert prompt["answer"] == shares.argmax().item() != prompt["against"]
    for position in range(tokens.n_positions):
        expected = {}
        for site, sae in saes.items():
            f = sae.encode(run.activations[site][0, position])
            expected |= {f"{site}/{i}": f[i].item() for i in f.nonzero().flatten().tolist()}
        shown = {name: activation for name, activation, _ in features["tokens"][position]}
        assert shown == pytest.approx({name: expected[name] for name in shown}, abs=1e-4)
        assert len(shown) >= min(len(expected), 60)
    answer = served.job("prompt", prompt=PROMPT, answer=" runs", against=" run")[0]
    assert [answer["answer"], answer["against"]] == model.tokenizer.convert_tokens_to_ids(["runs", "run"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "request_",
    [
        {"operation": "zero"},
        {"operation": "scale", "value": 2.0, "where": 4},
        {"operation": "steer", "value": 9.0, "where": "generated"},
    ],
)
def test_the_command_line_repeats_an_edit(served, sfc, request_):
    before = files(served.run)
    strongest = [name for name, _, _ in served.job("prompt", prompt=PROMPT)[1]["tokens"][4][:2]]
    events = served.edit(features=strongest, **request_)
    assert list(events)[-1] == "done", events
    report, command = events["report"]["report"], shlex.split(events["command"]["line"])
    new = files(served.run)
    name = events["command"]["name"]
    assert {file for file in new if new[file] != before.get(file)} == {f"edits/{name}.json", f"edits/{name}.jsonl"}
    repeated = sfc(*command[1:], "--json")
    assert repeated.status == 0, repeated.err
    data = json.loads(repeated.out)
    for key in ("features", "random_features", "continuations", "n_texts"):
        assert data[key] == report[key]
    for run in ("before", "after"):
        assert data[run]["overall"]["metric"] == pytest.approx(report[run]["overall"]["metric"], abs=1e-5)
        assert data[run]["ce"] == pytest.approx(report[run]["ce"], abs=1e-5)
    shares = {row["id"]: (row["before"], row["after"]) for row in events["next"]["rows"]}
    assert len(events["next"]["rows"][0]["random"]) == 5
    moved = any(abs(a - b) > 1e-6 for a, b in shares.values())
    assert moved == (request_.get("where") != "generated")
    said = events["continuations"]
    assert [said["before"], said["after"]] == [report["continuations"][0][run] for run in ("before", "after")]
    assert f'id="edit-{name}"' in report_html(served.run)
    assert name in [entry["name"] for entry in served.client.get("/edits").json()]


def test_a_damaged_edit_is_told_beside_the_others(served):
    damaged = served.run / "edits" / "damaged.json"
    damaged.parent.mkdir(exist_ok=True)
    damaged.write_text('{"kind": "edit"')
    try:
        (entry,) = [entry for entry in served.client.get("/edits").json() if entry["name"] == "damaged"]
    finally:
        damaged.unlink()
    assert "damaged.json" in entry["title"] and entry["left"] is None


@pytest.mark.slow
def test_the_circuit_of_a_pair_is_that_of_sfc_discover(served, sfc):
    events = served.job(
        "circuit", clean=PROMPT, patch="the men near the girl", clean_answer=" runs", patch_answer=" run"
    )
    found = next(event for event in events if event["kind"] == "circuit")
    page = served.client.get(f"/circuits/{found['id']}")
    assert page.status_code == 200 and "'sha256-" in page.headers["content-security-policy"]
    command = shlex.split(next(event["line"] for event in events if event["kind"] == "command"))
    result = sfc(*command[1:], "--json")
    assert result.status == 0, result.err
    assert json.loads(result.out)["total_effect"] == pytest.approx(found["total_effect"], abs=1e-5)
    assert served.client.get("/circuits/other").status_code == 400
    assert served.client.get("/circuit").status_code == 200 and served.client.get("/report").status_code == 200


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        ({"prompt": " \n"}, "the prompt is empty"),
        ({"prompt": "the man " * 2500}, "the prompt has 50.. tokens: at most 64 are read here"),
        ({"features": ["resid_1/99999"]}, "unknown feature 'resid_1/99999'"),
        ({"features": ["../../etc/passwd"]}, "unknown site"),
        ({"features": ["resid_1/3@subject"]}, "resid_1/3@subject"),
        ({"where": 400}, "there is no token 400"),
        ({"operation": "set"}, "needs a value"),
        ({"operation": "zero", "value": 3.0}, "takes no value"),
        ({"answer": 10**6}, "there is no token 1000000"),
    ],
)
def test_what_cannot_be_tried_is_told_in_a_sentence(served, request_, sentence):
    before = files(served.run)
    events = served.edit(**request_)
    assert re.search(sentence, events["error"]["message"]), events
    new = set(files(served.run)) - set(before)
    assert not [name for name in new if name.endswith(".json")]
    assert served.job("prompt", prompt=PROMPT)[-1] == {"kind": "done"}


@pytest.mark.slow
def test_two_browsers_take_turns_and_either_can_cancel(served):
    first = served.begin("edit", prompt=PROMPT, answer=30, against=31, features=["resid_1/4"], new_tokens=12)
    second = served.begin("edit", prompt="the king near the girl", answer=30, against=31, features=["resid_1/5"])
    third = served.begin("edit", prompt=PROMPT, answer=30, against=31, features=["resid_1/6"], operation="mean")
    look = served.begin("prompt", prompt=PROMPT)
    assert served.client.delete(f"/jobs/{third}").status_code == 200
    ends = [served.events(id)[-1]["kind"] for id in (first, second, third, look)]
    assert ends == ["done", "done", "cancelled", "done"]
    assert not list((served.run / "edits").glob("live_mean_*.json"))
    again = served.client.get(f"/jobs/{look}", headers={"last-event-id": "1"}).text
    assert again.count("data: ") == 1 and '"done"' in again


def test_a_forward_pass_of_a_cancelled_job_is_its_last(served):
    started = threading.Event()

    def work(job):
        started.set()
        while True:
            served.experiments.model.run(served.experiments.model.tokenize_prompts([PROMPT]))
            yield from ()

    job = served.worker.submit(work)
    assert started.wait(20)
    served.worker.cancel(job.id)
    deadline = time.monotonic() + 20
    while not job.ended and time.monotonic() < deadline:
        time.sleep(0.01)
    assert job.events[-1] == {"kind": "cancelled"}


@pytest.mark.slow
def test_an_edit_that_is_cut_off_leaves_the_run_whole(served, monkeypatch):
    """What a process that is killed between writing and renaming leaves: a temporary file, and no edit."""

    def killed(*_: Any) -> None:
        raise SystemError("killed")

    before = files(served.run)
    with monkeypatch.context() as patch:
        patch.setattr(_files.os, "replace", killed)
        events = served.edit(features=["resid_1/7"])
    assert "killed" in events["error"]["message"]
    assert {name for name in files(served.run) if name.endswith(".json")} == {n for n in before if n.endswith(".json")}
    report_html(served.run)
    assert served.edit(features=["resid_1/7"])["report"]["report"]["features"] == ["resid_1/7"]


@pytest.mark.slow
def test_names_are_those_of_sfc_labels(served, sfc):
    assert served.client.post("/labels", json={"feature": "resid_1/3", "label": "plural <b>"}).status_code == 200
    names = json.loads(sfc("labels", "--circuit", served.run, "--json").out)["labels"]
    assert names["resid_1/3"]["label"] == "plural <b>" == served.client.get("/run").json()["labels"]["resid_1/3"]
    shown = next(node.name for node in served.experiments.graph.nodes() if node.kind == "feature")
    served.client.post("/labels", json={"feature": shown, "label": "in the drawing"})
    assert "in the drawing" in {node.label for node in served.experiments.graph.nodes()}
    served.client.post("/labels", json={"feature": shown, "label": ""})
    served.client.post("/labels", json={"feature": "resid_1/3", "label": ""})
    assert "resid_1/3" not in served.client.get("/run").json()["labels"]
    for feature in ("resid_1/99999", "../x", "resid_1/error", None):
        refused = served.client.post("/labels", json={"feature": feature, "label": "x"})
        assert refused.status_code == 400 and refused.json()["error"]
    assert "sfc features" in served.client.get("/features").json()["error"]


# ---- in a browser


@pytest.fixture
def page(served, browser) -> Iterator[Page]:
    page = browser.open()
    page.connect(online=True)
    page.goto(f"http://127.0.0.1:{served.port}/?token={TOKEN}")
    yield page
    problems = [problem for problem in page.problems() if f"http://127.0.0.1:{served.port}/" not in problem]
    page.close()
    assert problems == []


@pytest.mark.slow
def test_a_prompt_is_typed_and_a_feature_ablated(served, page):
    hostile = "<img src=x onerror=hacked=1> the man near </script><b>the girl"
    for text in (hostile, PROMPT):
        page.evaluate("document.querySelector('#prompt').focus(), document.querySelector('#prompt').select()")
        page.type(text)
        page.key("Enter")
        page.wait("document.querySelectorAll('.features li').length > 3 && !document.querySelector('.progress')")
        assert page.evaluate("window.hacked === undefined && !document.querySelector('#app img, #app script')")
    assert page.count(".token") == len(served.experiments.model.tokenize_prompts([PROMPT]).input_ids[0])
    page.click(".features li .more button")
    page.settle()
    page.type("says are")
    page.key("Enter")
    page.wait("document.querySelector('.features li .what b').innerText === 'says are'")
    assert "says are" in {line["label"] for line in served.experiments.labels.read().values()}
    page.click(".features li .pick")
    feature = page.text(".chip")
    page.click("#try")
    page.wait("document.querySelector('.measured')")
    rows = page.evaluate("[...document.querySelectorAll('.changes tbody .value')].map((cell) => cell.innerText)")
    before, after = rows[0].split(" → ")
    assert feature and before != after
    name = page.text(".command code").split("--name ")[1].split()[0]
    assert json.loads((served.run / "edits" / f"{name}.json").read_text())["n_prompts"] == 1
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    shown = next(node for node in served.experiments.graph.nodes() if node.kind == "feature")
    page.goto(f"http://127.0.0.1:{served.port}/circuit#node-{shown.id}")
    page.evaluate("document.querySelector('.label input').focus()")
    page.type("named in the drawing")
    page.key("Enter")
    page.wait("viewer.state.announcement.value.includes('written down')")
    assert served.experiments.labels.read()[shown.name]["label"] == "named in the drawing"
    page.goto(f"http://127.0.0.1:{served.port}/circuit?again#node-{shown.id}")
    assert page.evaluate("document.querySelector('.label input').value") == "named in the drawing"
