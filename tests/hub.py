"""A small fake of the Hugging Face hub on the loopback: repositories of models and of rows, at one
commit each, and what is pushed to it."""

import base64
import hashlib
import json
import re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants
from servers import running

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer(body=True)

    def do_HEAD(self):
        self.answer(body=False)

    def answer(self, body):
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(path)
        kind = "datasets" if path.startswith(("/api/datasets/", "/datasets/")) else "models"
        path = path.removeprefix("/api").removeprefix(f"/{kind}")
        match = re.fullmatch(r"/([^/]+/[^/]+)(?:/(revision|tree|resolve)/([^/]+)(?:/(.*))?)?", path)
        held = self.server.repositories.get((kind, match[1])) if match else None
        if held is None:
            return self.say(404, {"error": "Repository not found"}, body, code="RepoNotFound")
        name, what, revision, rest = match.groups()
        if revision not in (None, "main", self.server.commit):
            return self.say(404, {"error": "Invalid rev id"}, body, code="RevisionNotFound")
        if what == "tree":
            listed = [self.entry(file, content) for file, content in held.items()]
            return self.say(200, listed, body)
        if what == "resolve":
            if rest not in held:
                return self.say(404, {"error": "Entry not found"}, body, code="EntryNotFound")
            return self.say(200, held[rest], body)
        files = [{"rfilename": file} for file in held]
        about = {"id": name, "sha": self.server.commit, "siblings": files, "private": False}
        return self.say(200, {**about, "tags": [], "downloads": 0, "likes": 0}, body)

    def entry(self, file, content):
        oid = hashlib.sha1(content).hexdigest()
        return {"type": "file", "path": file, "size": len(content), "oid": oid}

    def do_POST(self):
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlsplit(self.path).path
        self.server.asked.append(path)
        if self.server.refuses:
            return self.say(403, {"error": "no right to write"}, True)
        if path == "/api/repos/create":
            made = json.loads(sent)
            self.server.made.append(made)
            url = f"{self.server.url}/{made['organization']}/{made['name']}"
            return self.say(200, {"url": url}, True)
        if path.endswith("/preupload/main"):
            files = [
                {"path": x["path"], "uploadMode": "regular", "shouldIgnore": False}
                for x in json.loads(sent)["files"]
            ]
            return self.say(200, {"files": files}, True)
        name = re.fullmatch(r"/api/models/(.*)/commit/main", path)[1]
        lines = [json.loads(line) for line in sent.splitlines()]
        self.server.repositories["models", name] = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines
            if line["key"] == "file"
        }
        about = {"commitUrl": f"{self.server.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT}
        return self.say(200, about, True)

    def say(self, status, content, body, code=""):
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.send_header("ETag", f'"{hashlib.sha1(raw).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.server.commit)
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if body:
            self.wfile.write(raw)

    def log_message(self, *_):
        pass


@contextmanager
def hub(repositories):
    """A hub with repositories: by ("models" or "datasets", name) their files, names and bytes.

    ``server.asked`` lists the paths of requests, ``server.made`` what repositories were made;
    ``server.refuses``: nothing may be written.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.asked, server.made, server.refuses = True, [], [], False
    server.repositories, server.commit = repositories, COMMIT
    server.url = f"http://127.0.0.1:{server.server_port}"
    with running(server):
        yield server


def believe_in(server, monkeypatch, cache):
    """Have the hub's library ask this server, and keep what it gets in a folder of its own."""
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    url = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
