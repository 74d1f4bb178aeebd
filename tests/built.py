"""Where the built site is: what imports this is skipped where nobody says."""

import os
from pathlib import Path

import pytest

if "NORMWISE_SITE" not in os.environ:
    pytest.skip("`make test-site` builds the site, and tests it once", allow_module_level=True)

SITE = Path(os.environ["NORMWISE_SITE"]).resolve()
