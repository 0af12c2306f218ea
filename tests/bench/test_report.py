"""What is written of a result."""

from __future__ import annotations

import json
import math
from pathlib import Path

from adapter_server.bench import report


def test_what_has_no_figure_is_null(tmp_path: Path) -> None:
    """JSON knows no NaN, and strict readers refuse a file with one."""
    report.publish({"a": [math.nan, 1.234567], "b": {"c": math.inf}}, tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text()) == {"a": [None, 1.2346], "b": {"c": None}}
