"""URLs are shown without what is secret in them."""

from __future__ import annotations

import pytest

from batchrun.locations import is_url, redact, redact_location


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
        ("(https://host/a?columns=a,b&token=secret)", "(https://host/a?***"),
        ('GET "https://host/a?t=it\'s,secret" failed', 'GET "https://host/a?***" failed'),
        ("sftp://me:it's@host/a", "sftp://***@host/a"),
    ],
)
def test_secrets_are_cut_out(text, shown):
    assert redact(text) == shown
    assert redact(shown) == shown


@pytest.mark.parametrize(
    ("location", "shown"),
    [
        ("https://host/a.csv?columns=a,b&token=secret", "https://host/a.csv?***"),
        ("https://host/a.csv?name='x y'&token=(secret)", "https://host/a.csv?***"),
        ("https://me:pa'ss w@rd@host/a", "https://***@host/a"),
        ("zip://a.csv::https://me:se@host/a.zip?k=v::file", "zip://a.csv::https://***@host/a.zip?***::file"),
        ("abfs://container@account.example/a", "abfs://container@account.example/a"),
        ("hf://datasets/a/b@main/c.parquet", "hf://datasets/a/b@main/c.parquet"),
        ("s3://bucket/part-?.jsonl", "s3://bucket/part-?.jsonl"),
        ("s3://bucket/a.jsonl?versionId=abc", "s3://bucket/a.jsonl?***"),
        ("jobs/it's? all=right.jsonl", "jobs/it's? all=right.jsonl"),
    ],
)
def test_a_location_has_no_secrets_whatever_its_characters(location, shown):
    assert redact_location(location) == shown
    assert redact_location(shown) == shown
    assert "secret" not in shown and "ss w@rd" not in shown


def test_what_a_url_is():
    assert is_url("memory://a.jsonl")
    assert is_url("simplecache::s3://bucket/a.jsonl")
    assert not is_url("a/b.jsonl")
    assert not is_url("a:b.jsonl")
