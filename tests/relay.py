"""Somebody between a client and a server, for tests: hands everything on behind TLS, and may change the answer."""

from __future__ import annotations

import contextlib
import http.server
import json
import ssl
import threading

import httpx


class Relay(http.server.BaseHTTPRequestHandler):
    """Somebody in between, with a certificate of its own: hands everything on, and may change the answer."""

    upstream = ""
    change = staticmethod(lambda body: body)

    def do_GET(self):
        answer = httpx.get(self.upstream + self.path, verify=False, timeout=30)
        body = json.dumps(self.change(answer.json())).encode()
        self.send_response(answer.status_code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def relayed(upstream, pair, change=lambda body: body):
    handler = type("Handler", (Relay,), {"upstream": upstream, "change": staticmethod(change)})
    relay = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    # The end waits for connections that are still being closed.
    relay.daemon_threads = False
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*pair)
    relay.socket = context.wrap_socket(relay.socket, server_side=True)
    thread = threading.Thread(target=relay.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"https://127.0.0.1:{relay.server_port}"
    finally:
        relay.shutdown()
        relay.server_close()
        thread.join()
