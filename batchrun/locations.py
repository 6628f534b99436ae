"""Names of places outside this machine: which are URLs, and how they are shown without what is secret in them."""

from __future__ import annotations

import re

_USER = re.compile(r"(?P<scheme>[\w+.-]+)://(?P<user>[^/\s]*)@")
# In a text a URL ends where white space is, or the quote that it began with.
_WEB_QUERY = re.compile(r"""(?P<quote>['"])?(?P<before>https?://[^\s?#'"]*)[?#](?(quote)(?:(?!(?P=quote))\S)*|\S*)""")
_QUERY = re.compile(r"[?#][^\s'\"<>]*=[^\s'\"<>]*")
_URL = re.compile(r"(?P<scheme>[\w+.-]+)://(?:(?P<user>[^/?#]*)@)?(?P<place>[^?#]*)(?P<query>.*)", re.DOTALL)
_WEB = ("http", "https")


def is_url(location: str) -> bool:
    """Whether it is fsspec's to find: `s3://bucket/jobs.jsonl`, `zip://jobs.jsonl::https://host/jobs.zip`."""
    return "://" in location or "::" in location


def redact(text: str) -> str:
    """A text without the secrets of URLs in it: users, passwords and tokens before an `@`, and queries, which may be a
    signature. What stands before an `@` in a bucket's name (`abfs://container@account/...`) is no secret. Of a name
    that is all there is, `redact_location` knows better where it ends."""
    text = _WEB_QUERY.sub(r"\g<quote>\g<before>?***", _USER.sub(_without_user, text))
    return _QUERY.sub("?***", text)


def redact_location(location: str) -> str:
    """A location without what is secret in it, as `redact`, whatever characters it has."""
    return "::".join(map(_redact_part, location.split("::")))


def _redact_part(part: str) -> str:
    url = _URL.fullmatch(part)
    if url is None:
        return part
    query = url["query"]
    if query and (url["scheme"].lower() in _WEB or "=" in query):
        query = "?***"
    before = f"{url['scheme']}://" if url["user"] is None else _without_user(url)
    return f"{before}{url['place']}{query}"


def _without_user(url: re.Match[str]) -> str:
    """The scheme of a URL and what stands before its `@`."""
    user = "***" if ":" in url["user"] or url["scheme"].lower() in _WEB else url["user"]
    return f"{url['scheme']}://{user}@"
