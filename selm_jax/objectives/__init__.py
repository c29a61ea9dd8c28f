"""The losses, and the log-probabilities of responses from which they are computed."""
