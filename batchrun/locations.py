"""Names of places outside this machine: which are URLs, and how they are shown without what is secret in them."""

from __future__ import annotations

import re

_USER = re.compile(r"(?P<scheme>[\w+.-]+)://(?P<user>[^/\s'\"]*)@")
_WEB_QUERY = re.compile(r"(https?://[^\s'\"?#]*)[?#][^\s'\"<>,)]*")
_QUERY = re.compile(r"[?#][^\s'\"<>,)]*=[^\s'\"<>)]*")


def is_url(location: str) -> bool:
    """Whether it is fsspec's to find: `s3://bucket/jobs.jsonl`, `zip://jobs.jsonl::https://host/jobs.zip`."""
    return "://" in location or "::" in location


def redact(text: str) -> str:
    """A text without the secrets of URLs in it: users, passwords and tokens before an `@`, and queries, which may be a
    signature. What stands before an `@` in a bucket's name (`abfs://container@account/...`) is no secret."""
    text = _WEB_QUERY.sub(r"\1?***", _USER.sub(_without_user, text))
    return _QUERY.sub("?***", text)


def _without_user(match: re.Match[str]) -> str:
    if ":" in match["user"] or match["scheme"].lower() in ("http", "https"):
        return f"{match['scheme']}://***@"
    return match[0]
