"""What is made smaller: log-probabilities of responses, and the losses made of them."""
