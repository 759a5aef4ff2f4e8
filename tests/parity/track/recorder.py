"""A stand-in for Weights & Biases that answers what its client needs and keeps each request."""
import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def answer(path, body):
    if not path.endswith("/graphql"):
        return {}
    query, given = body["query"], body.get("variables") or {}
    if "upsertBucket" in query:
        project = {"id": "p", "name": given["project"], "entity": {"id": "e", "name": given["entity"] or "me"}}
        bucket = {"id": "b", "name": given["name"], "displayName": given["displayName"] or "d", "description": "", "config": None,
                  "sweepName": None, "historyLineCount": 0, "project": project}
        return {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
    if "createRunFiles" in query:
        files = [{"name": name, "uploadUrl": given["upload"] + name} for name in given["files"]]
        return {"data": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}}
    if "viewer" in query:
        viewer = {"id": "v", "entity": "me", "username": "me", "email": "me", "flags": "{}", "teams": {"edges": []}}
        return {"data": {"viewer": viewer}}
    return {"data": {}}


class Recorder:
    """Serves on a free port of this machine, as a context; `requests` are what came."""

    def __enter__(self):
        self.requests = recorded = []

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self):
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                try:
                    body = json.loads(body)
                except ValueError:
                    body = {}
                recorded.append({"method": self.command, "path": self.path, "authorization": self.headers.get("authorization"), "body": body})
                if body.get("variables") is not None:
                    body = body | {"variables": body["variables"] | {"upload": f"http://{self.headers['host']}/upload/"}}
                text = json.dumps(answer(self.path, body)).encode()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_POST = do_PUT = handle_any

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # a client that ends drops its connections
        self.host = f"127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
