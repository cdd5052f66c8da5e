"""What a pruned checkpoint can be turned into: one target a file."""
