"""The study: architectures, data, training runs, evaluation, figures.

Imports kernel_expansion, activationsf and fbfadvtrain; they never import it.
"""

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

# XLA keeps to 256-bit vectors unless told; on processors with AVX-512, 512 bits make the compiled
# KAFs 1.5 to 2 times faster. Elsewhere this changes nothing. XLA reads it once, before its first
# compilation; whoever sets the same flag has the last word.
if "xla_cpu_prefer_vector_width" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_cpu_prefer_vector_width=512"
    ).strip()

# TensorFlow uses oneDNN's convolutions by default only where the processor has AVX-512 VNNI or the
# like; with AVX2 alone a ResNet20's training step takes half the time with them. TensorFlow reads
# it when it is first imported.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line that says what to do.

    Commands print it and exit with code 2; from Python it is an ordinary ValueError.
    """


def called_as(script: str, otherwise: str) -> str:
    """The name of a command: `script` where it was called by that installed script."""
    return script if os.path.basename(sys.argv[0]) == script else otherwise


def run_command(prog: str, command: Callable[[], int | None], again: str | None = None) -> int:
    """The exit code of a command: 0, or its own; 2 if something given cannot be used; 130.

    Args:
        prog: what it is called as, for the one line that says what is wrong.
        command: what it does; returns another exit code than 0, if any.
        again: what the same command would do after an interrupt ("resumes"); None: it is not said.
    """
    try:
        return command() or 0
    except InputError as error:
        code, said = 2, f"error: {error}"
    except KeyboardInterrupt:
        if again is None:
            raise
        code, said = 130, f"interrupted; the same command {again}"
    print(f"{prog}: {said}", file=sys.stderr)
    return code


class CommandParser(argparse.ArgumentParser):
    """argparse, with one line for a wrong command instead of all its options as well."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; --help lists the options\n")
