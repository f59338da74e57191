# Copyright 2026 The refiner_hf authors. Licensed under the Apache License, Version 2.0.
"""Where things are kept that a machine makes or measures once."""

import os
from pathlib import Path


def user_cache() -> Path:
    """The folder of this package in the user's cache. It needn't be there, or be writable."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "refiner_hf"
