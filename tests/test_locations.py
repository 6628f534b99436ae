"""URLs are shown without what is secret in them."""

from __future__ import annotations

import pytest

from batchrun.locations import is_url, redact


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://bucket/jobs.jsonl", "s3://bucket/jobs.jsonl"),
        ("https://host/jobs.jsonl?X-Amz-Signature=abc&x=1", "https://host/jobs.jsonl?***"),
        ("https://host/jobs.jsonl?abc", "https://host/jobs.jsonl?***"),
        ("https://host/jobs.jsonl#token=abc", "https://host/jobs.jsonl?***"),
        ("https://me:secret@host/a", "https://***@host/a"),
        ("https://secret@host/a", "https://***@host/a"),
        ("sftp://me:se@cr:et@host/a", "sftp://***@host/a"),
        ("zip://a.csv::https://me:secret@host/a.zip?k=v", "zip://a.csv::https://***@host/a.zip?***"),
        ("abfs://container@account.example/a", "abfs://container@account.example/a"),
        ("hf://datasets/a/b@main/c.parquet", "hf://datasets/a/b@main/c.parquet"),
        ("s3://bucket/part-?.jsonl", "s3://bucket/part-?.jsonl"),
        ("s3://bucket/a.jsonl?versionId=abc", "s3://bucket/a.jsonl?***"),
        (
            "failed: GET 'https://host/a?sig=x', then /a?sig=x again",
            "failed: GET 'https://host/a?***', then /a?*** again",
        ),
        ("no URL: a = b? c=d", "no URL: a = b? c=d"),
    ],
)
def test_secrets_are_cut_out(text, shown):
    assert redact(text) == shown
    assert redact(shown) == shown


def test_what_a_url_is():
    assert is_url("memory://a.jsonl")
    assert is_url("simplecache::s3://bucket/a.jsonl")
    assert not is_url("a/b.jsonl")
    assert not is_url("a:b.jsonl")
