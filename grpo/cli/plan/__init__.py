"""`rankup plan`: rank, alpha, targets and a memory budget."""
