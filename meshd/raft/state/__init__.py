"""What is agreed: the replicated queue, pure. `machine.py` is the door; the same entries lead to the same state everywhere."""
