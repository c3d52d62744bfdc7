"""Published files read into arrays, nothing more."""
