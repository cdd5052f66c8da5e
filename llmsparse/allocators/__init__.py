"""How one budget is divided among weights, a method a file; see ``llmsparse.allocation`` for the protocol."""
