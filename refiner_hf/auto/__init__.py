"""`refiner train auto`: looks at the data and the time, and chooses the options of a training."""
