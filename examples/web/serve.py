"""Serve the page on 127.0.0.1, with the headers that let WebAssembly use several threads."""

import argparse
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Handler(SimpleHTTPRequestHandler):
    """Files of this folder. Any static server does; without these headers the model runs on one thread."""

    extensions_map = SimpleHTTPRequestHandler.extensions_map | {
        ".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm",
    }  # fmt: skip

    def end_headers(self):
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, *args):
        pass


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (%(default)s)")
    args = parser.parse_args()
    try:
        handler = partial(Handler, directory=str(Path(__file__).parent))
        server = ThreadingHTTPServer(("127.0.0.1", args.port), handler)
    except (OSError, OverflowError) as error:
        raise SystemExit(f"port {args.port} cannot be used ({error}). Choose another with --port.") from error
    print(f"http://127.0.0.1:{server.server_port}/  (Ctrl+C stops it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main()
