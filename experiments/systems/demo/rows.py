"""A demonstration: methods that the library had before, on `halves`."""

from experiments.systems.rows import Row, more_training

TASK = "halves"
ROWS = {
    "more training": more_training(steps=500),
    "NPO": Row("npo", {"steps": 300}),
    "IMMA": Row("imma", {"steps": 500, "weight": 0.3}),
}
