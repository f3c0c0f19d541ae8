"""Sizes on the command line are numbers of bytes."""

from __future__ import annotations

import click
import pytest

from fusechat_merge.cli import _Size


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("500", 500), ("500B", 500), ("500 b", 500),
        ("2K", 2_000), ("2kB", 2_000), ("2KiB", 2_048),
        ("3M", 3_000_000), ("3MB", 3_000_000), ("3MiB", 3_145_728),
        ("5G", 5_000_000_000), ("5GB", 5_000_000_000), ("1GiB", 1_073_741_824),
        ("1T", 1_000_000_000_000), ("1TB", 1_000_000_000_000), ("1TiB", 1_099_511_627_776),
        ("2.3GB", 2_300_000_000), ("9007199254740993", 9_007_199_254_740_993),
    ],
)  # fmt: skip
def test_sizes(written: str, size: int) -> None:
    assert _Size().convert(written, None, None) == size


@pytest.mark.parametrize("written", ["0.5B", "0GB", "-1", "1e9", "5 miles", "B", ""])
def test_what_is_no_size(written: str) -> None:
    with pytest.raises(click.BadParameter):
        _Size().convert(written, None, None)
