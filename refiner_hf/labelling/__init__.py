"""Label maps of a teacher, for token labelling."""
