"""Tests run as the commands do: `experiments` sets what TensorFlow reads when it is imported."""

import experiments  # noqa: F401
