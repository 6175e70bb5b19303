"""The study: architectures, data, training runs, evaluation, figures.

Imports kernel_expansion, activationsf and fbfadvtrain; they never import it.
"""


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line that says what to do.

    Commands print it and exit with code 2; from Python it is an ordinary ValueError.
    """
