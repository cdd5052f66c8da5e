"""Measures of a pruned model: perplexity, and fidelity to the dense model."""
