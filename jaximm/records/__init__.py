"""What is written and read back: the only writer, and the schemas."""
