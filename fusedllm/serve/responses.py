"""`JSON`: the response that every endpoint answers with. ASCII, so that no text a client sends can make it fail."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response


def dumps(content: Any) -> str:
    """Compact JSON without any character beyond ASCII: half of a surrogate pair is written as the escape it came as."""
    return json.dumps(content, allow_nan=False, separators=(",", ":"))


class JSON(Response):
    """A JSON body."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The body's bytes.

        Raises:
          ValueError: a number that JSON has no word for.
        """
        return dumps(content).encode("ascii")
