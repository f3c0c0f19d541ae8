"""System calls that not every system has, and what is done without them."""

from __future__ import annotations

import os

NO_FOLLOW: int = getattr(os, "O_NOFOLLOW", 0)
"""Flag for `os.open`: a link in the last place is an error."""
