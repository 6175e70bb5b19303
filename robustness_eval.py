"""Attack saved classifiers; see kaf_study/command.py, or --help."""

import sys

from kaf_study.command import main

if __name__ == "__main__":
    sys.exit(main())
