"""Looking inside a Refiner."""
