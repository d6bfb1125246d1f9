"""The one error that a person can mend: what was found, where, and what to do."""


class InputError(ValueError):
    """Bad input or a wrong knob, in one sentence with its place (file, row, column or field) and its remedy.

    Scripts print the sentence and leave with exit code 2; everything else is a defect and keeps its stack trace.
    """
