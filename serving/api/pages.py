"""What people open: the page at `/`, its files, and `/docs`. All of it is read once, at start."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from serving.api.errors import ApiError, error_response

UI_FOLDER = Path(__file__).parent.parent / "ui"
PAGE_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob: data:; "
    "media-src 'self' blob:; font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".woff2": "font/woff2",
}
_DOCS_STYLE = """
:root{color-scheme:light dark;font:16px/1.5 system-ui,sans-serif}body{max-width:60rem;margin:2rem auto;padding:0 1rem}
h2{margin:2.5rem 0 .25rem;font-size:1.05rem}h2 code{font-weight:600}p{margin:.25rem 0 .75rem}
table{border-collapse:collapse;width:100%;font-size:.9rem}
td,th{border-top:1px solid #8884;padding:.3rem .6rem .3rem 0;text-align:left;vertical-align:top}
pre{overflow:auto;background:#8882;padding:.75rem;border-radius:.4rem;font-size:.85rem}
nav a{margin-right:1rem;white-space:nowrap}
"""


class Pages:
    """The files of a folder, in memory, by name."""

    def __init__(self, folder: Path = UI_FOLDER) -> None:
        self._files: dict[str, Response] = {}
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            if path.is_file() and path.suffix in _TYPES:
                data = path.read_bytes()
                headers = {
                    "Content-Type": _TYPES[path.suffix],
                    "Content-Security-Policy": PAGE_CSP,
                    "Cache-Control": "no-cache",
                    "ETag": f'"{hashlib.sha256(data).hexdigest()[:32]}"',
                }
                self._files[path.name] = Response(data, headers=headers)

    def answer(self, request: Request, name: str) -> Response:
        """A file, 304 where the browser has it, or 404. Names are looked up, never made into paths."""
        found = self._files.get(name)
        if found is None:
            return error_response(ApiError(404, "not_found", "There is no such page: GET /docs lists all."))
        if request.headers.get("if-none-match") == found.headers["etag"]:
            headers = {k: v for k, v in found.headers.items() if k not in ("content-length", "content-type")}
            return Response(status_code=304, headers=headers)
        return found


def install(app: FastAPI) -> None:
    """Add the page, its files and `/docs`. They ask for no key: they hold nothing that is anybody's."""
    pages = Pages()

    async def page(request: Request) -> Response:
        return pages.answer(request, "index.html")

    async def file(request: Request) -> Response:
        return pages.answer(request, request.path_params["name"])

    docs: list[Response] = []

    async def read(request: Request) -> Response:
        if not docs:  # the schema is whole only once every route is there
            body = docs_page(app.openapi())
            digest = "sha256-" + _base64_digest(_DOCS_STYLE)
            csp = f"default-src 'none'; style-src '{digest}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
            docs.append(Response(body, headers={"Content-Type": _TYPES[".html"], "Content-Security-Policy": csp}))
        return docs[0]

    app.add_api_route("/", page, methods=["GET", "HEAD"], include_in_schema=False, response_model=None)
    app.add_api_route("/ui/{name}", file, methods=["GET", "HEAD"], include_in_schema=False, response_model=None)
    app.add_api_route("/docs", read, methods=["GET", "HEAD"], include_in_schema=False, response_model=None)


def _base64_digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def docs_page(schema: dict[str, Any]) -> bytes:
    """The OpenAPI schema as one plain page, without scripts and without anybody else's server."""
    info, parts, links = schema["info"], [], []
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            name = operation["operationId"]
            links.append(f'<a href="#{html.escape(name)}">{method.upper()} {html.escape(path)}</a>')
            parts.append(_operation(name, method, path, operation))
    body = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(info["title"])}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{_DOCS_STYLE}</style></head><body>'
        f"<h1>{html.escape(info['title'])} {html.escape(info['version'])}</h1><p>{html.escape(info.get('description', ''))} "
        f'The schema: <a href="openapi.json">openapi.json</a>.</p><nav>{" ".join(links)}</nav>{"".join(parts)}</body></html>'
    )
    return body.encode()


def _operation(name: str, method: str, path: str, operation: dict[str, Any]) -> str:
    rows = [_row(p["name"], p["in"], p.get("description", "")) for p in operation.get("parameters", [])]
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    rows += [_row(field, "body", about.get("description", "")) for field, about in body.get("properties", {}).items()]
    rows += [_row(status, "answer", about["description"]) for status, about in sorted(operation["responses"].items())]
    good = [content for status, r in operation["responses"].items() if status < "3" for content in r.get("content", {}).values()]
    example = next((content["example"] for content in good if "example" in content), None)
    shown = example if isinstance(example, str) or example is None else json.dumps(example, indent=2)
    return (
        f'<h2 id="{html.escape(name)}"><code>{method.upper()} {html.escape(path)}</code></h2>'
        f"<p>{html.escape(operation.get('summary', ''))}. {html.escape(operation.get('description', ''))}</p>"
        f"<table>{''.join(rows)}</table>" + (f"<pre>{html.escape(shown)}</pre>" if shown else "")
    )


def _row(name: str, kind: str, text: str) -> str:
    return f"<tr><td><code>{html.escape(name)}</code></td><td>{kind}</td><td>{html.escape(text)}</td></tr>"
