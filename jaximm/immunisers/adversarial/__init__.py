"""Methods that train against an adversary with parameters of its own, which lives between steps."""
