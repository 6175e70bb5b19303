"""Tests run as the commands do: `kaf_study` sets what TensorFlow reads when it is imported."""

import kaf_study  # noqa: F401
