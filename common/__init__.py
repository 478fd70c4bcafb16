"""Used by all packages. Sets the log level of torch's C++ part, which is read when torch is imported."""

import os

if "WORLD_SIZE" in os.environ:  # without it torch prints a C++ stack trace for every lost process; we print one line
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
