"""The one error of the training command: its message names what is wrong and the remedy."""


class TrainingError(ValueError):
    """A run that cannot start or go on, for a reason its user can mend."""
