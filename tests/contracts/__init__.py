"""What every entry of a registry keeps to: a line in a registry is its own test."""
