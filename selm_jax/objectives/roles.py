"""The roles that responses to a prompt play in a loss."""

CHOSEN, REJECTED, EXPLORE = "chosen", "rejected", "explore"
PAIR = (CHOSEN, REJECTED)  # y_w and y_l
ROLES = (*PAIR, EXPLORE)  # and y_ref
