"""Environment variables that Ray reads when it is imported.

The package imports this module first, so that they are set before any module here imports ray.
Values that the user has set are kept.
"""

from __future__ import annotations

import os

DEFAULTS = {
    # quiet, without usage reports and without result files of its own
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    # Ray's record of the run is never read, and grows with every trial
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # despite its name: Ray keeps a loopback address only if clusters over machines are off
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}

for _name, _value in DEFAULTS.items():
    os.environ.setdefault(_name, _value)
