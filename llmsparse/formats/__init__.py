"""How the numbers of one weight are laid out in named tensors; docs/format.md is the specification."""
