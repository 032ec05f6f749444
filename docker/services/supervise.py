"""supervisord, with an exit status that tells: 0 after a stop, 70 when a required service could not be kept up."""

from __future__ import annotations

import sys
from pathlib import Path

from supervisor.supervisord import main

RUN = Path("/run/dropforge")
FATAL_STATUS = 70

if __name__ == "__main__":
    main(["-c", str(RUN / "supervisord.conf")])
    sys.exit(FATAL_STATUS if (RUN / "fatal").exists() else 0)
