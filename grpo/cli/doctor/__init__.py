"""`rankup doctor`: shows installed versions and tests them."""
