"""Methods that change condition numbers of the two tasks' features."""
