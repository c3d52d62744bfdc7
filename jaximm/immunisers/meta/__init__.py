"""Methods that train against simulated attackers."""
