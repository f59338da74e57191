"""What a Refiner costs: time, memory and the distance to the roofline, beside its peers."""
