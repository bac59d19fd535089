"""The page about a run that goes on: served here alone, and anew where a file has changed."""

import http.client
import json
import threading
import urllib.request

import pytest

from jaxrlhf.apps import cli
from jaxrlhf.apps.watch import Server


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("steps: 3\n")
    return folder


@pytest.fixture
def server(run):
    with Server([str(run)]) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server, path="/", **headers):
    """(status, tag, text) of a request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.headers["ETag"], answer.read().decode()


def test_watch_serves_the_page_and_its_changes(server, run):
    status, tag, page = ask(server)
    assert (status, page.count("0 of 3 iterations")) == (200, 1)
    assert "data-live" in page
    assert ask(server, **{"If-None-Match": tag}) == (304, tag, "")
    (run / "metrics.jsonl").write_text(json.dumps({"step": 2, "loss": 0.5}) + "\n")
    status, newer, page = ask(server, **{"If-None-Match": tag})
    assert (status, page.count("2 of 3 iterations")) == (200, 1)
    assert newer != tag


def test_watch_answers_this_machine_alone(server):
    assert server.server_address[0] == "127.0.0.1"
    assert ask(server, Host=f"elsewhere.example:{server.server_port}")[0] == 403
    assert ask(server, Host=f"localhost:{server.server_port}")[0] == 200
    assert ask(server, "/../config.yaml")[0] == 404


def test_watch_says_what_is_wrong_and_goes_on(server, run):
    (run / "summary.json").write_text("{")
    status, _, text = ask(server)
    assert status == 503
    assert "summary.json: not JSON" in text
    (run / "summary.json").unlink()
    assert ask(server)[0] == 200


def test_watch_leaves_no_file(server, run):
    urllib.request.urlopen(server.url, timeout=10).close()
    assert [path.name for path in run.iterdir()] == ["config.yaml"]


def test_main_report_watch_refuses(run, tmp_path, capsys):
    assert cli.main(["report", str(run), "--watch", "--output", "x.html"]) == 2
    assert "--output and --watch: " in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path), "--watch"]) == 2
    assert "not the output folder of a run" in capsys.readouterr().err
    with Server([str(run)]) as other:
        assert cli.main(["report", str(run), "--watch", "--port", str(other.server_port)]) == 2
    assert "Address already in use: choose another" in capsys.readouterr().err
