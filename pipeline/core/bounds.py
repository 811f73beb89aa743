"""Numbers that a configuration may state: a slip of the pen is refused when the file is read.

The largest values are far above what anybody needs, and below what never ends.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

MOST_IMAGES = 10**8
MOST_BATCH = 2**16
MOST_THREADS = 2**12
MOST_CALLS = 10**6
MOST_SECONDS = 7 * 24 * 3600.0

Count = Annotated[int, Field(gt=0, le=MOST_IMAGES)]
"""Images, or other things that are counted."""
Batch = Annotated[int, Field(gt=0, le=MOST_BATCH)]
Threads = Annotated[int, Field(gt=0, le=MOST_THREADS)]
Calls = Annotated[int, Field(gt=0, le=MOST_CALLS)]
Seconds = Annotated[float, Field(gt=0, le=MOST_SECONDS)]
LogitError = Annotated[float, Field(gt=0, le=1)]
"""Distance of logits, relative to their norm: with 1, nothing is left of them."""
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""What every generator of random numbers takes."""
